"""Conformance: what a network and an objective must hold, to be run on one of your own."""

from score_models.network_checks import check_network, randomise
from score_models.objective_checks import check_objective

__all__ = ["check_network", "check_objective", "randomise"]
