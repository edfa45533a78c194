"""Differential privacy of whole clients in the rounds: Flower's wrappers, calibrated to the replies that came."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TypeGuard

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    Strategy,
)

from fgl_app.errors import ConfigError

_CLIPPING_NORM = "clipping_norm"


class _NormAfterNoise:
    """Move the clipping norm as Andrew et al. do (2021, arXiv 1905.03871, Algorithm 1): C <- C exp(-eta (b - gamma)).

    There b is the share of the updates that were *not* clipped, and the noise of a round is scaled by the norm that the
    round clipped to. Flower 1.41 puts the share that was clipped in the place of b, so that the norm runs away from its
    target, and scales the noise by the next norm, so that there is too little of it whenever the norm falls.
    """

    clipping_norm: float
    clip_norm_lr: float
    target_clipped_quantile: float
    _clipped_share: float | None = None

    def _geometric_update(self, clipped_fraction: float) -> None:
        self._clipped_share = clipped_fraction

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate and add the noise of this round's norm, then move the norm."""
        # The class that this one is mixed into, one of Flower's, has it; `object`, its base for mypy, has not.
        found: tuple[ArrayRecord | None, MetricRecord | None] = super().aggregate_train(  # type: ignore[misc]
            server_round, replies
        )
        if self._clipped_share is not None:
            above = self._clipped_share - self.target_clipped_quantile
            self.clipping_norm *= math.exp(self.clip_norm_lr * above)
            self._clipped_share = None
        return found


class ServerSideAdaptiveClipping(_NormAfterNoise, DifferentialPrivacyServerSideAdaptiveClipping):
    """Flower's, but for how the norm moves."""


class ClientSideAdaptiveClipping(_NormAfterNoise, DifferentialPrivacyClientSideAdaptiveClipping):
    """Flower's, but for how the norm moves; its mod on the clients clips."""


Noised = (
    DifferentialPrivacyServerSideFixedClipping
    | DifferentialPrivacyClientSideFixedClipping
    | ServerSideAdaptiveClipping
    | ClientSideAdaptiveClipping
)


def with_noise(
    inner: Strategy, client_dp: str, *, noise_multiplier: float, clipping_norm: float, num_selected: int
) -> Noised:
    """Wrap the strategy of the rounds so that it clips updates to a norm C and adds noise of z C to their sum.

    Args:
        inner: A strategy whose result is the unweighted mean of the replies.
        client_dp: ``fixed`` or ``adaptive``, clipped on the server, or ``client-fixed`` or ``client-adaptive``.
        noise_multiplier: z > 0. Where the norm adapts, that of the pair of the sum and the noised number of clipped
            updates (Andrew et al. 2021, Theorem 1); the number gets noise of z at least, so that few clients are
            enough, and the sum then gets at most 2 / sqrt(3) times z.
        clipping_norm: C > 0; the first one where it adapts.
        num_selected: Clients of a round.

    Raises:
        ConfigError: If the strategy does more to the replies than to take their mean: the noise, which Flower adds to
            what the strategy returns, would then not cover what one client can do to it.
    """
    if type(inner).aggregate_train is not FedAvg.aggregate_train:
        raise ConfigError(
            "`strategy` must take the plain mean of the updates where `client-dp` adds noise to it, but "
            f"{type(inner).__name__} does not. Use FedAvg or FedProx."
        )
    match client_dp:
        case "fixed":
            return DifferentialPrivacyServerSideFixedClipping(inner, noise_multiplier, clipping_norm, num_selected)
        case "client-fixed":
            return DifferentialPrivacyClientSideFixedClipping(inner, noise_multiplier, clipping_norm, num_selected)
    made = ServerSideAdaptiveClipping if client_dp == "adaptive" else ClientSideAdaptiveClipping
    return made(
        inner,
        noise_multiplier,
        num_selected,
        initial_clipping_norm=clipping_norm,
        clipped_count_stddev=max(num_selected / 20, noise_multiplier),  # Andrew et al. advise 1/20 of the clients
    )


def adds_noise(strategy: Strategy) -> TypeGuard[Noised]:
    """Return whether the strategy was made by :func:`with_noise`."""
    return isinstance(strategy, Noised)


def calibrate(strategy: Noised, num_replies: int) -> None:
    """Prepare the noise of a round for the replies that came.

    The mean of m updates moves by C / m with one client, whatever number was selected; Flower would scale the noise by
    the number selected, which is too little where clients failed. It draws the noise from NumPy's global generator,
    which is therefore seeded by the operating system: who knew its seed could take the noise off again.
    """
    strategy.num_sampled_clients = num_replies
    np.random.seed()


def reports_clipping(strategy: Strategy) -> bool:
    """Return whether the clients say with their updates if they clipped them."""
    return isinstance(strategy, ClientSideAdaptiveClipping)


def norm_memory(strategy: Strategy) -> dict[str, torch.Tensor]:
    """Return the clipping norm of the next round, float64, for :func:`restore_norm`; empty where it does not adapt."""
    if not isinstance(strategy, ServerSideAdaptiveClipping | ClientSideAdaptiveClipping):
        return {}
    return {_CLIPPING_NORM: torch.tensor(strategy.clipping_norm, dtype=torch.float64)}


def restore_norm(strategy: Strategy, memory: Mapping[str, torch.Tensor]) -> None:
    """Go on with the clipping norm of an earlier start."""
    if isinstance(strategy, ServerSideAdaptiveClipping | ClientSideAdaptiveClipping) and _CLIPPING_NORM in memory:
        strategy.clipping_norm = memory[_CLIPPING_NORM].item()
