"""Flower strategies: checked rounds around any strategy, and Federated Generative Learning around those."""

from strategies.fgl import FGL
from strategies.rounds import CheckedRounds

__all__ = ["FGL", "CheckedRounds"]
