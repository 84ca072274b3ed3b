"""armo: interpretable, multi-objective reward models."""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from armo.model.registration import register

if TYPE_CHECKING:
    from armo.artifacts import ArtifactError
    from armo.data.conversation import Message
    from armo.data.objectives import Objective, ObjectiveSet
    from armo.embed.spec import BackboneError
    from armo.model.output import (
        Comparison,
        RewardModelOutput,
        RewardOutput,
        Scale,
        SegmentKind,
        SegmentOutput,
    )
    from armo.model.reward_model import ArmoRewardModel
    from armo.model.token_rows import TokenRowError

__version__ = version("armo")

__all__ = [
    "ArmoRewardModel",
    "ArtifactError",
    "BackboneError",
    "Comparison",
    "Message",
    "Objective",
    "ObjectiveSet",
    "RewardModelOutput",
    "RewardOutput",
    "Scale",
    "SegmentKind",
    "SegmentOutput",
    "TokenRowError",
    "__version__",
]

# Imported when first used: with torch and Transformers behind them, they take seconds.
_MODULES = {
    "ArmoRewardModel": "armo.model.reward_model",
    "ArtifactError": "armo.artifacts",
    "BackboneError": "armo.embed.spec",
    "Comparison": "armo.model.output",
    "Message": "armo.data.conversation",
    "Objective": "armo.data.objectives",
    "ObjectiveSet": "armo.data.objectives",
    "RewardModelOutput": "armo.model.output",
    "RewardOutput": "armo.model.output",
    "Scale": "armo.model.output",
    "SegmentKind": "armo.model.output",
    "SegmentOutput": "armo.model.output",
    "TokenRowError": "armo.model.token_rows",
}

register()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'armo' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
