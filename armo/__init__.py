"""armo: interpretable, multi-objective reward models."""

from importlib.metadata import version

from armo.data.objectives import Objective, ObjectiveSet
from armo.model.reward_model import ArmoRewardModel, Comparison, RewardOutput

__version__ = version("armo")

__all__ = [
    "ArmoRewardModel",
    "Comparison",
    "Objective",
    "ObjectiveSet",
    "RewardOutput",
    "__version__",
]
