"""What differential privacy a run's rounds have: epsilon at a given delta, by the RDP accountant of dp-accounting.

A unit, one client or one image, is *protected* at (epsilon, delta) if for every set S of results
P[S | with its data] <= exp(epsilon) P[S | without] + delta, and the reverse. "Without" means that the unit contributes
nothing while the numbers of clients and of images, which are not hidden, stay as they are: the zero-out relation
(Kairouz et al. 2021, arXiv 2103.00039, Definition 1.1), which dp-accounting treats as it does add-or-remove-one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

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
    num_examples: Collection[int],
    num_rounds: int,
    *,
    batch_size: int,
    local_epochs: int,
    delta: float,
) -> float:
    """Return epsilon of one training image over rounds of DP-SGD, of whichever client has the largest.

    Each step is a Poisson-sampled Gaussian mechanism of rate q and multiplier z, which is ``noise_multiplier`` (Abadi
    et al. 2016, Algorithm 1; Mironov, Talwar & Zhang 2019, arXiv 1908.10530); :func:`poisson_schedule` gives q and the
    number of steps. What the server makes of the clients' weights is post-processing. In each round and at each order
    the largest divergence of all numbers of images is taken, so that the bound holds whoever has which of them, even
    if it changes from round to round.

    Args:
        noise_multiplier: z > 0.
        num_examples: Training images that a client may have; empty if nothing is known, for 1 to 10,000,000.
        num_rounds: Rounds that one client took part in, at most; > 0.
        batch_size: Expected images of a step.
        local_epochs: Epochs in each round.
        delta: Delta at which epsilon is stated, 0 to 1.

    Raises:
        ConfigError: If dp-accounting is not installed.
    """
    dp = _library()
    # The series for orders below 2 often does not converge, and dp-accounting then leaves them out with a warning.
    orders = [*(2 + tenth / 10 for tenth in range(90)), *range(11, 64), 128, 256, 512, 1024]
    known = [poisson_schedule(number, batch_size, local_epochs) for number in num_examples]
    rates: dict[int, float] = {}  # of equally many steps those with the highest rate lose most
    for rate, steps in known or _schedules_of_any_number(batch_size, local_epochs):
        rates[steps] = max(rate, rates.get(steps, 0.0))
    curves = []
    for steps, rate in rates.items():
        accountant = dp.rdp.RdpAccountant(orders)
        event = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise_multiplier))
        accountant.compose(event, num_rounds * steps)
        curves.append(accountant.rdp)
    epsilon, _ = dp.rdp.compute_epsilon(orders, np.max(curves, axis=0), delta)
    return float(epsilon)


def _schedules_of_any_number(batch_size: int, epochs: int) -> Iterable[tuple[float, int]]:
    """Yield rates and steps of which one is no less than those of any number of images, up to ten million.

    With more than t / 2 and at most t steps an epoch, a client has at least floor(t / 2) B + 1 images.
    """
    most = 1
    while (fewest_images := most // 2 * batch_size + 1) <= 10_000_000:
        yield min(1.0, batch_size / fewest_images), epochs * most
        most *= 2


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
