"""What differential privacy a run's rounds have: epsilon at a given delta, by the RDP accountant of dp-accounting.

A unit, one client or one image, is *protected* at (epsilon, delta) if for every set S of results
P[S | with its data] <= exp(epsilon) P[S | without] + delta, and the reverse. "Without" means that the unit contributes
nothing while the numbers of clients and of images, which are not hidden, stay as they are: the zero-out relation
(Kairouz et al. 2021, arXiv 2103.00039, Definition 1.1), which dp-accounting treats as it does add-or-remove-one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fgl_app.errors import ConfigError


def clients_epsilon(noise_multiplier: float, drawn: Sequence[tuple[int, int]], delta: float) -> float:
    """Return epsilon of one client's whole data over rounds that add noise to a mean of clipped updates.

    Each round is a Gaussian mechanism: it releases (sum_i clip_C(d_i) + N(0, (z C)^2)) / m, where z is
    ``noise_multiplier`` and m the number of replies, which is known (McMahan et al. 2018, arXiv 1710.06963). Without
    one client the sum moves by at most C, so that the rounds compose as Gaussian mechanisms of multiplier z (Mironov
    2017, Proposition 7 and Corollary 3), whether or not the client took part in all.

    Where a round drew its clients, secretly and uniformly, a second bound holds: that of sampling without replacement
    (Wang, Balle & Kasiviswanathan 2019, arXiv 1808.00087, Theorem 27). It compares draws in which one client stands in
    for another, so that the sum moves by up to 2 C and the multiplier is z / 2. The lesser of the two is returned.

    Args:
        noise_multiplier: z > 0.
        drawn: For each round the number of clients that were drawn, and of those from which; no round gives 0.
        delta: Delta at which epsilon is stated, 0 to 1.

    Raises:
        ConfigError: If dp-accounting is not installed.
    """
    if not drawn:
        return 0.0
    dp = _library()
    accountant = dp.rdp.RdpAccountant()
    accountant.compose(dp.GaussianDpEvent(noise_multiplier), len(drawn))
    bounds = [accountant.get_epsilon(delta)]
    if any(count < population for count, population in drawn):
        sampled = dp.rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
        for (count, population), times in Counter(drawn).items():
            event = dp.GaussianDpEvent(noise_multiplier / 2)
            sampled.compose(dp.SampledWithoutReplacementDpEvent(population, count, event), times)
        bounds.append(sampled.get_epsilon(delta))
    return min(map(float, bounds))


def images_epsilon(
    noise_multiplier: float,
    num_examples: Mapping[str, Sequence[int]],
    *,
    batch_size: int,
    local_epochs: int,
    delta: float,
) -> float:
    """Return epsilon of one training image over rounds of DP-SGD, of the client where it is largest.

    Each step is a Poisson-sampled Gaussian mechanism of rate q and multiplier z, which is ``noise_multiplier`` (Abadi
    et al. 2016, Algorithm 1; Mironov, Talwar & Zhang 2019, arXiv 1908.10530); :func:`poisson_schedule` gives q and the
    number of steps. What the server makes of the clients' weights is post-processing.

    Args:
        noise_multiplier: z > 0.
        num_examples: For each client its number of training images in each round that it took part in.
        batch_size: Expected images of a step.
        local_epochs: Epochs in each round.
        delta: Delta at which epsilon is stated, 0 to 1.

    Raises:
        ConfigError: If dp-accounting is not installed.
    """
    dp = _library()
    # The series for orders below 2 often does not converge, and dp-accounting then leaves them out with a warning.
    orders = [*(2 + tenth / 10 for tenth in range(90)), *range(11, 64), 128, 256, 512, 1024]
    histories = {tuple(sorted(Counter(numbers).items())) for numbers in num_examples.values()}
    largest = 0.0
    for history in histories:
        accountant = dp.rdp.RdpAccountant(orders)
        for number, rounds in history:
            rate, steps = poisson_schedule(number, batch_size, local_epochs)
            event = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise_multiplier))
            accountant.compose(event, rounds * steps)
        largest = max(largest, float(accountant.get_epsilon(delta)))
    return largest


def poisson_schedule(num_examples: int, batch_size: int, epochs: int) -> tuple[float, int]:
    """Return the rate q at which DP-SGD draws each image into a step, and the number of steps.

    Args:
        num_examples: n >= 1 images.
        batch_size: B: q is min(1, B / n).
        epochs: Passes, of ceil(n / B) steps each, as ordinary SGD has them.
    """
    return min(1.0, batch_size / num_examples), epochs * math.ceil(num_examples / batch_size)


def _library() -> Any:
    try:
        import dp_accounting
        import dp_accounting.rdp
    except ImportError:
        raise ConfigError(
            "The epsilon of private rounds is computed by the package dp-accounting, which is not installed here. "
            "Install the extra: pip install 'federated-generative-learning[privacy]'."
        ) from None
    return dp_accounting
