"""What a model says of response lists, computed once, from which every table is made."""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from armo.embed.lists import EmbeddedLists
from armo.model.reward_model import ArmoRewardModel


@dataclass(frozen=True, eq=False, slots=True)
class ScoredLists:
    """Scores of all responses of some lists, one list after the other, with their reasons.

    Attributes:
        objectives: Names of the columns.
        score: NaN where a response was skipped as too long.
        rewards: As in `RewardOutput`, like what follows.
        adjusted: See there.
        gating_weights: See there.
        truncated: Whether the conversation was cut to fit the backbone.
    """

    objectives: tuple[str, ...]
    score: Float[Tensor, " responses"]
    rewards: Float[Tensor, "responses objectives"]
    adjusted: Float[Tensor, "responses objectives"]
    gating_weights: Float[Tensor, "responses objectives"]
    truncated: Bool[Tensor, " responses"]

    def part(self, rows: slice | Tensor) -> "ScoredLists":
        """What is said of some of the responses."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "objectives"}
        return ScoredLists(self.objectives, **{name: t[rows] for name, t in tensors.items()})


def score_lists(model: ArmoRewardModel, lists: EmbeddedLists) -> ScoredLists:
    """Score lists that the model's backbone has embedded."""
    distinct = len(lists.prompt_of_response)
    columns = len(model.objectives.names)
    score = torch.empty(distinct, dtype=torch.float64)
    wide = {
        name: torch.empty(distinct, columns, dtype=torch.float64)
        for name in ("rewards", "adjusted", "gating_weights")
    }
    for rows, embeddings in lists.responses.batches(torch.arange(distinct)):
        out = model.score_embeddings(
            embeddings,
            lists.prompts.read(lists.prompt_of_response[rows]),
            surface=lists.covariates[rows],
        )
        score[rows] = out.score
        for name, values in wide.items():
            values[rows] = getattr(out, name)
    of = lists.response_of
    return ScoredLists(
        model.objectives.names,
        score[of],
        **{name: values[of] for name, values in wide.items()},
        truncated=lists.truncated,
    )
