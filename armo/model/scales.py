"""Rewards on the scale that is asked for, and what passes a threshold there."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from armo.data.objectives import ObjectiveSet
from armo.model.output import RewardOutput, Scale


def rescale(out: RewardOutput, objectives: ObjectiveSet, *, scale: Scale) -> RewardOutput:
    """Put rewards, which are on [0, 1], on another scale."""
    if scale == "raw":
        return out
    declared = objectives.objectives
    if scale == "standard":
        ranges = ((-math.inf, math.inf),) * len(declared)
        unknown = torch.full_like(out.uncertainty, torch.nan)
        return replace(out, rewards=out.adjusted, uncertainty=unknown, ranges=ranges)
    scales = torch.tensor([o.scale for o in declared], dtype=torch.float64)
    return replace(
        out,
        rewards=scales[:, 0] + scales[:, 1] * out.rewards,
        uncertainty=scales[:, 1].abs() * out.uncertainty,
        ranges=tuple((float(o.low), float(o.high)) for o in declared),
        higher_is_better=tuple(o.higher_is_better for o in declared),
    )


def limits_of(objectives: ObjectiveSet, thresholds: Mapping[str, float]) -> dict[int, float]:
    """Return thresholds by column.

    Raises:
        ValueError: If one is no finite number, or of no objective.
    """
    try:
        wrong = {n: value for n, value in thresholds.items() if not math.isfinite(value)}
    except (AttributeError, TypeError):
        raise ValueError(
            f"`thresholds` must be numbers by objective, got {thresholds!r}."
        ) from None
    if wrong:
        raise ValueError(f"`thresholds` must be finite, got {wrong}.")
    return {objectives.index(name): value for name, value in thresholds.items()}


def passing(out: RewardOutput, limits: Mapping[int, float]) -> RewardOutput:
    """Say which responses reach their thresholds, given by column and on the scale of `out`."""
    passes = torch.ones_like(out.passes)
    for column, limit in limits.items():
        values = out.rewards[:, column]
        passes &= values >= limit if out.higher_is_better[column] else values <= limit
    return replace(out, passes=passes)
