"""What differential privacy a run's rounds have: epsilon at a given delta, by the RDP accountant of dp-accounting.

A unit, one client or one image, is *protected* at (epsilon, delta) if for every set S of results
P[S | with its data] <= exp(epsilon) P[S | without] + delta, and the reverse. "Without" is a neighbouring relation:

* *zero out*: the unit contributes nothing while the numbers of clients and of images, which are not hidden, stay as
  they are (Kairouz et al. 2021, arXiv 2103.00039, Definition 1.1). dp-accounting treats it as add-or-remove-one.
* *replace*: another unit, with any data, stands in its place. What holds for this costs up to twice as much.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from fgl_app.errors import ConfigError


def clients_epsilon(
    noise_multiplier: float,
    drawn: Sequence[tuple[int, int]],
    delta: float,
    *,
    num_colluding: int = 0,
    replaced: bool = False,
) -> float:
    """Return epsilon of one client's whole data over rounds that add noise to a mean of clipped updates.

    Each round is a Gaussian mechanism: it releases (sum_i clip_C(d_i) + N(0, (z C)^2)) / m, where z is
    ``noise_multiplier`` and m the number of replies, which is known (McMahan et al. 2018, arXiv 1710.06963). Without
    one client the sum moves by at most C, with another in its place by 2 C, so that the rounds compose as Gaussian
    mechanisms of multiplier z or z / 2 (Mironov 2017, Proposition 7 and Corollary 3), whether or not the client took
    part in all. Whoever sees the models learns no more of it, whatever else he knows, but for the noise.

    Where a round drew its clients, secretly and uniformly, a second bound holds against those who do not know the draw:
    that of sampling without replacement (Wang, Balle & Kasiviswanathan 2019, arXiv 1808.00087, Theorem 27). It compares
    draws in which one client stands in for another, so that the multiplier is z / 2 under both relations. The lesser of
    the two is returned.

    A client knows whether it was drawn itself. Against ``num_colluding`` others who share that, a round is a draw from
    the remaining clients: of as many as were drawn where none of them was, which tells most, and of fewer otherwise. If
    all others collude, they know the draw, and only the first bound holds. A client that is known to have failed in a
    round tells as much of the draw as one that colludes.

    Args:
        noise_multiplier: z > 0.
        drawn: For each round the number of clients that were drawn, and of those from which; no round gives 0.
        delta: Delta at which epsilon is stated, 0 to 1.
        num_colluding: Other clients that share what they know; 0 for somebody who sees the models alone.
        replaced: Whether another client stands in the place of the one, instead of nothing.

    Raises:
        ConfigError: If dp-accounting is not installed.
    """
    if not drawn:
        return 0.0
    dp = _library()
    accountant = dp.rdp.RdpAccountant()
    accountant.compose(dp.GaussianDpEvent(noise_multiplier / 2 if replaced else noise_multiplier), len(drawn))
    bounds = [accountant.get_epsilon(delta)]
    remaining = [max(1, population - num_colluding) for _, population in drawn]
    unknown = [(min(count, left), left) for (count, _), left in zip(drawn, remaining, strict=True)]
    if any(count < population for count, population in unknown):
        sampled = dp.rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
        for (count, population), times in Counter(unknown).items():
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
    replaced: bool = False,
) -> float:
    """Return epsilon of one training image over rounds of DP-SGD, of whichever client has the largest.

    Each step is a Poisson-sampled Gaussian mechanism of rate q and multiplier z, which is ``noise_multiplier`` (Abadi
    et al. 2016, Algorithm 1; Mironov, Talwar & Zhang 2019, arXiv 1908.10530); :func:`poisson_schedule` gives q and the
    number of steps. What the server makes of the clients' weights is post-processing. In each round and at each order
    the largest divergence of all numbers of images is taken, so that the bound holds whoever has which of them, even
    if it changes from round to round.

    That is the bound of zeroing an image out. Replacing it is zeroing it out and putting another into its place, which
    Mironov's weak triangle inequality (2017, Proposition 11) bounds: D_a(P, Q) <= (a - 1/2) / (a - 1) D_2a(P, R)
    + D_{2a-1}(R, Q) at every order a > 1, where R is without either image.

    Args:
        noise_multiplier: z > 0.
        num_examples: Training images that a client may have; empty if nothing is known, for 1 to 10,000,000.
        num_rounds: Rounds that one client took part in, at most; > 0.
        batch_size: Expected images of a step.
        local_epochs: Epochs in each round.
        delta: Delta at which epsilon is stated, 0 to 1.
        replaced: Whether another image stands in the place of the one, instead of nothing.

    Raises:
        ConfigError: If dp-accounting is not installed.
    """
    dp = _library()
    # The series for orders below 2 often does not converge, and dp-accounting then leaves them out with a warning.
    orders = np.array([*(2 + tenth / 10 for tenth in range(90)), *range(11, 64), 128, 256, 512, 1024])
    if replaced:  # the order a needs 2 a and 2 a - 1
        orders = np.array([*(1.5 + tenth / 10 for tenth in range(90)), *range(11, 64), 128, 256, 512])
    counted = np.concatenate([2 * orders, 2 * orders - 1]) if replaced else orders
    known = [poisson_schedule(number, batch_size, local_epochs) for number in num_examples]
    rates: dict[int, float] = {}  # of equally many steps those with the highest rate lose most
    for rate, steps in known or _schedules_of_any_number(batch_size, local_epochs):
        rates[steps] = max(rate, rates.get(steps, 0.0))
    curves = []
    for steps, rate in rates.items():
        accountant = dp.rdp.RdpAccountant(counted)
        event = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise_multiplier))
        accountant.compose(event, num_rounds * steps)
        curves.append(accountant.rdp)
    divergence = np.max(curves, axis=0)
    if replaced:
        there, back = np.split(divergence, 2)
        divergence = (orders - 0.5) / (orders - 1) * there + back
    epsilon, _ = dp.rdp.compute_epsilon(orders, divergence, delta)
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
