"""Who takes part in a round."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

from flwr.serverapp import Grid


def num_sampled(fraction_train: float, num_clients: int) -> int:
    """Return how many clients train in a round: their share, rounded up, where 0.07 of 100 is 7."""
    return math.ceil(round(fraction_train * num_clients, 9))


def only_nodes(grid: Grid, choose: Callable[[], Sequence[int]]) -> Grid:
    """Return the grid with those nodes alone that ``choose`` returns when it is first asked for them."""
    return cast(Grid, _SomeNodes(grid, choose))


class _SomeNodes:
    def __init__(self, grid: Grid, choose: Callable[[], Sequence[int]]) -> None:
        self._grid = grid
        self._choose = choose
        self._nodes: list[int] | None = None

    def get_node_ids(self) -> list[int]:
        if self._nodes is None:
            self._nodes = list(self._choose())
        return list(self._nodes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)
