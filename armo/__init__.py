"""armo: interpretable, multi-objective reward models."""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from armo.model.registration import register

if TYPE_CHECKING:
    from armo.data.objectives import Objective, ObjectiveSet
    from armo.model.output import Comparison, RewardOutput
    from armo.model.reward_model import ArmoRewardModel

__version__ = version("armo")

__all__ = [
    "ArmoRewardModel",
    "Comparison",
    "Objective",
    "ObjectiveSet",
    "RewardOutput",
    "__version__",
]

# Imported when first used: with torch and Transformers behind them, they take seconds.
_MODULES = {
    "ArmoRewardModel": "armo.model.reward_model",
    "Comparison": "armo.model.output",
    "Objective": "armo.data.objectives",
    "ObjectiveSet": "armo.data.objectives",
    "RewardOutput": "armo.model.output",
}

register()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'armo' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
