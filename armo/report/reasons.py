"""What scores are made of: weights by kind of prompt, and how objectives hang together."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from armo.data.conversation import ResponseList, prompt_group
from armo.fit.decorrelation import deviate, spearman
from armo.report.lists import list_of_response
from armo.report.scoring import ScoredLists
from armo.report.tables import Table


def weights_table(rows: Sequence[ResponseList], models: Mapping[str, ScoredLists]) -> Table:
    """Mean gating weights of each model by kind of prompt, the objectives it weighs most first.

    Args:
        rows: The lists; the kind of a prompt is the part of its category before a slash.
        models: What each model says of their responses, by its name.
    """
    asked = [
        (row.category.partition("/")[0] or "(no kind)", prompt_group(row.prompt))
        for row in rows
        for _ in row.responses
    ]
    entries = []
    for name, scored in models.items():
        known = (~scored.score.isnan()).nonzero()[:, 0].tolist()
        # One response that has a score stands for its prompt: all have the same weights.
        one = {asked[k]: k for k in reversed(known)}
        kinds = [kind for kind, _ in one]
        weights = scored.gating_weights[list(one.values())]
        order = weights.mean(0).argsort(descending=True).tolist()
        for kind in sorted(set(kinds)):
            here = weights[torch.tensor([each == kind for each in kinds])]
            average = here.mean(0)
            entries += [
                (name, kind, len(here), scored.objectives[k], float(average[k]))
                for k in order
                if float(weights[:, k].max()) > 0.0  # not those that are never mixed
            ]
    return Table(
        "weights_by_kind",
        "What counts, by kind of prompt: mean gating weights",
        ("model", "kind", "prompts", "objective", "weight"),
        tuple(entries),
        "Over prompts, each counting once. Objectives without any weight are left out.",
    )


def correlation_table(rows: Sequence[ResponseList], models: Mapping[str, ScoredLists]) -> Table:
    """Correlate objectives within prompts, before and after decorrelation, model by model.

    Args:
        rows: The lists; those of one response say nothing.
        models: What each model says of their responses, by its name.
    """
    lists = list_of_response(rows)
    entries: list[tuple[str, str, str, float, float]] = []
    for name, scored in models.items():
        known = ~scored.score.isnan()
        before, after = (
            _within(values[known], lists[known]) for values in (scored.rewards, scored.adjusted)
        )
        names = scored.objectives
        entries += [
            (name, names[i], names[j], float(before[i, j]), float(after[i, j]))
            for i in range(len(names))
            for j in range(i)
        ]
    return Table(
        "correlations",
        "How objectives go together, before and after decorrelation",
        ("model", "objective", "other", "rewards", "adjusted"),
        tuple(entries),
        "Spearman's correlation between responses to one prompt: of the rewards, and of the "
        "adjusted rewards that the score is mixed from.",
    )


def _within(
    values: Float[Tensor, "responses objectives"], lists: Tensor
) -> Float[Tensor, "objectives objectives"]:
    deviations = deviate(values, lists, scope="within_prompt")
    return spearman(deviations, deviations)
