"""What a scoring model answers."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers.utils.generic import ModelOutput


@dataclass(frozen=True, eq=False, slots=True)
class RewardOutput:
    """Scores and what they are made of; float64, rows in the order of the input.

    Attributes:
        objectives: Names of the columns.
        score: The number that ranks responses to a prompt: the sum of the contributions.
        rewards: What a rater would say, on the scale asked for; not clipped. Of objectives
            learned from yes or no, or from judged pairs alone, a probability: of a yes, or of being
            judged better than the mean training response.
        uncertainty: Standard deviation of a rating about its reward, on the scale of the rewards;
            larger far from the training responses. NaN where it is not known: on the standard
            scale, and for objectives or models without it.
        adjusted: Rewards standardised and decorrelated from style.
        gating_weights: Non-negative, sum to one; from the prompt alone.
        gating_uncertainty: Standard deviation of each weight between the members of the gate, which
            were trained on other prompts each; zero under the caller's weights.
        contributions: Gating weight times adjusted reward.
        truncated: Whether the conversation was longer than the backbone reads, and was cut. One
            that is skipped instead (`on_overlong: skip`) has NaN everywhere.
        passes: Whether each reward is as good as its threshold; all, where there is none. One that
            is skipped does not pass a threshold.
        ranges: The ends of each objective's scale, lowest first, in the order of `objectives`:
            infinite on the standard scale, where the reference responses have mean 0 and
            variance 1.
        higher_is_better: Whether the good end of each is the high one. It always is but on the
            scale of the ratings.
    """

    objectives: tuple[str, ...]
    score: Float[Tensor, " batch"]
    rewards: Float[Tensor, "batch objectives"]
    uncertainty: Float[Tensor, "batch objectives"]
    adjusted: Float[Tensor, "batch objectives"]
    gating_weights: Float[Tensor, "batch objectives"]
    gating_uncertainty: Float[Tensor, "batch objectives"]
    contributions: Float[Tensor, "batch objectives"]
    truncated: Bool[Tensor, " batch"]
    passes: Bool[Tensor, " batch"]
    ranges: tuple[tuple[float, float], ...]
    higher_is_better: tuple[bool, ...]


Scale = Literal["raw", "rating", "standard"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Why one response is preferred to another.

    Attributes:
        probability: That the first response is preferred; with the other one's, one. It was fitted
            to what judges said of scores under the gate's weights, and is calibrated for these
            alone: under the caller's own it is no more than the same function of another score.
        score_difference: Score of the first minus score of the second.
        reasons: Difference of contributions per objective, the largest first; they sum to
            the score difference.
        changes: By how much the adjusted reward of the response with the lower score would have to
            rise for a tie, all else equal, by objective and in standard deviations, the smallest
            first. Objectives without a gating weight are left out: none of their rewards matter.
        rating_changes: The same on the scale of the ratings, at the same measured style; below zero
            where low ratings are the good ones. Only of objectives whose adjusted reward follows
            their own reward alone, along a line: not after `leace` or `penalty`, nor where the
            reward is a probability. A change that is wider than the scale cannot happen: the
            objective alone does not turn the preference round.
    """

    probability: float
    score_difference: float
    reasons: dict[str, float]
    changes: dict[str, float]
    rating_changes: dict[str, float]


SegmentKind = Literal["sentence", "turn"]


@dataclass(frozen=True, eq=False, slots=True)
class SegmentOutput:
    """What a response, or the assistant's part of a conversation, scores as it goes on.

    Attributes:
        texts: The segments; sentences join to the response.
        spans: Character offsets of each, first and after the last: of a sentence in the response,
            of a turn in itself.
        out: A row per segment: what would be the output if the conversation ended with it.
    """

    texts: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    out: RewardOutput

    @property
    def gains(self) -> Float[Tensor, "batch objectives"]:
        """Contributions after each segment less those after the one before; NaN for the first.

        Of sentences, they add up over objectives to what the score gains or loses by each. Turns
        have prompts and gating weights of their own, so theirs say less.
        """
        parts = self.out.contributions
        return torch.cat([torch.full_like(parts[:1], torch.nan), parts.diff(dim=0)])


@dataclass
class RewardModelOutput(ModelOutput):
    """What Transformers gets for token ids: tensors alone, on the device of the ids.

    Attributes:
        logits: The score, one column, in float32; a plain number, to which no softmax or sigmoid
            belongs.
        rewards: As in `RewardOutput`, like what follows.
        uncertainty: See there.
        adjusted: See there.
        gating_weights: See there.
        gating_uncertainty: See there.
        contributions: See there.
        truncated: See there.
    """

    logits: torch.Tensor | None = None
    rewards: torch.Tensor | None = None
    uncertainty: torch.Tensor | None = None
    adjusted: torch.Tensor | None = None
    gating_weights: torch.Tensor | None = None
    gating_uncertainty: torch.Tensor | None = None
    contributions: torch.Tensor | None = None
    truncated: torch.Tensor | None = None
