"""Why one response is preferred to another, and what would turn the preference round."""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from armo.data.objectives import ObjectiveSet
from armo.fit.judged import Link
from armo.model.output import Comparison, RewardOutput

# How far a row of the transform may be from a multiple of its head, as a share of its length, to
# count as one: more than rounding, less than any decorrelation that changes anything.
PARALLEL = 1e-6


def compare_scored(
    out: RewardOutput, a: int, b: int, *, beta: Float[Tensor, ""], slopes: Mapping[str, float]
) -> Comparison:
    """Compare two scored responses to one prompt.

    Args:
        out: What a model gave, on any scale.
        a: Row of the first response.
        b: Row of the second response.
        beta: Scale of score differences in the preference probability.
        slopes: See `rating_slopes`.

    Raises:
        ValueError: If the rows have other gating weights: their prompts are not the same.
    """
    weights = out.gating_weights[a]
    if bool(((weights - out.gating_weights[b]).abs() > 1e-9).any()):  # not so where NaN
        raise ValueError(f"rows {a} and {b} have other gating weights: not of one prompt")
    difference = out.contributions[a] - out.contributions[b] + 0.0  # -0 as 0
    score_difference = float(out.score[a] - out.score[b])
    order = difference.abs().argsort(descending=True).tolist()
    changes = {
        name: abs(score_difference) / weight
        for name, weight in sorted(
            zip(out.objectives, weights.tolist(), strict=True), key=lambda item: -item[1]
        )
        if weight > 0.0 and not math.isnan(score_difference)
    }
    return Comparison(
        probability=float(torch.sigmoid(beta * score_difference)),
        score_difference=score_difference,
        reasons={out.objectives[k]: float(difference[k]) for k in order},
        changes=changes,
        rating_changes={n: change * slopes[n] for n, change in changes.items() if n in slopes},
    )


def rating_slopes(
    objectives: ObjectiveSet,
    links: Sequence[Link],
    *,
    heads: Float[Tensor, "objectives dim"],
    adjusted: Float[Tensor, "objectives dim"],
) -> dict[str, float]:
    """Ratings per standard deviation of an adjusted reward that follows its own head alone."""
    slopes = {}
    for k, objective in enumerate(objectives.objectives):
        head, row = heads[k], adjusted[k]
        # The multiple of the head that comes closest to the row of the transform.
        per_reward = float(head @ row) / max(float(head @ head), 1e-300)
        apart = float((row - per_reward * head).norm())
        follows = per_reward > 0.0 and apart <= PARALLEL * float(row.norm())
        if follows and links[k] == "identity":
            slopes[objective.name] = objective.scale[1] / per_reward
    return slopes
