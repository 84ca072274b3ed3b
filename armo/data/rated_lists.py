"""Lists of responses that are each rated: what a choice by score is judged by."""

import logging
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from armo.data.builtin.compose import SOURCE, compose_candidates, utility
from armo.data.conversation import Message, Prompt, RatedResponse, ResponseList, prompt_group
from armo.data.objectives import Objective, ObjectiveSet
from armo.data.sources import DataError, Paths, stream_ratings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, slots=True)
class RatedLists:
    """Responses to each prompt, with what each is worth.

    Attributes:
        rows: The lists.
        gold: On [0, 1], 1 the good end, of all responses, one list after the other.
    """

    rows: tuple[ResponseList, ...]
    gold: Float[Tensor, " responses"]


def load_rated_lists(path: Paths, *, gold: Objective, min_responses: int = 4) -> RatedLists:
    """Group rated responses by their prompts.

    Rows are read as `armo.data.sources.stream_ratings` does. Rows without the gold rating, prompts
    of which a row says `"split": "train"`, and prompts with too few responses are left out, and
    counted in the log. A response that stands there twice has the mean of its ratings.

    Args:
        path: A file, a folder (all its files in name order), or a list of them.
        gold: The objective whose rating counts as the truth, with its scale and direction. Best one
            that no model was fitted on.
        min_responses: Distinct responses that a list needs, two or more.

    Raises:
        DataError: Naming file, row and field, at the first row that cannot be used; or if no prompt
            has enough responses.
        ValueError: If `min_responses` is below two.

    Example:
        >>> import json, tempfile
        >>> turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]
        >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        ...     for id, harm in (("a", 0), ("b", 10)):
        ...         turns[1]["content"] = id
        ...         row = {"id": id, "source": "s", "messages": turns, "ratings": {"harm": harm}}
        ...         print(json.dumps(row), file=file, flush=True)
        ...     harm = Objective("harm", 0, 10, higher_is_better=False)
        ...     load_rated_lists(file.name, gold=harm, min_responses=2).gold
        tensor([1., 0.], dtype=torch.float64)
    """
    if min_responses < 2:
        raise ValueError(f"`min_responses` must be 2 or more, got {min_responses}.")
    if not isinstance(gold, Objective):
        raise ValueError(f"`gold` must be {{name: ..., low: ..., high: ...}}, got {gold!r}")
    objectives = ObjectiveSet((replace(gold, bias=False),))
    lists: dict[Prompt, tuple[RatedResponse, dict[str, list[float]]]] = {}
    trained: set[str] = set()
    read = unrated = 0
    for row in stream_ratings(path, objectives=objectives, undeclared="leave_out"):
        read += 1
        if row.split == "train":
            trained.add(prompt_group(row.prompt))
        if gold.name not in row.ratings:
            unrated += 1
            continue
        _, responses = lists.setdefault(row.prompt, (row, {}))
        text = row.conversation.response.strip()
        responses.setdefault(text, []).append(gold.to_unit(row.ratings[gold.name]))
    rows: list[ResponseList] = []
    values: list[float] = []
    on_training_side = too_few = 0
    for first, responses in lists.values():
        if prompt_group(first.prompt) in trained:
            on_training_side += 1
        elif len(responses) < min_responses:
            too_few += 1
        else:
            rows.append(
                ResponseList(
                    id=first.id,
                    source=first.source,
                    prompt=first.prompt,
                    responses=tuple(responses),
                    category=first.category,
                    split=first.split,
                )
            )
            values += [sum(ratings) / len(ratings) for ratings in responses.values()]
    left_out = (
        f"{unrated} of {read} rows have no rating of {gold.name!r}, {on_training_side} prompts are "
        f"on the training side, {too_few} have fewer than {min_responses} responses"
    )
    if not rows:
        raise DataError(
            f"{path}: no list is left: {left_out}; lower `min_responses`, or name another `gold`"
        )
    logger.info("%d lists of %d responses; left out: %s", len(rows), len(values), left_out)
    return RatedLists(tuple(rows), torch.tensor(values, dtype=torch.float64))


def compose_rated_lists(responses: int = 64, *, prompts_per_kind: int | None = None) -> RatedLists:
    """Compose many responses to the test prompts of the built-in corpus, in memory.

    Their worth is the true quality, by the weights that the corpus' preferences are made by.

    Args:
        responses: Per prompt.
        prompts_per_kind: How many prompts of each of the six kinds; all test prompts, if None.
    """
    rows: list[ResponseList] = []
    gold: list[float] = []
    for prompt, composed in compose_candidates(responses, prompts_per_kind=prompts_per_kind):
        rows.append(
            ResponseList(
                id=f"{prompt['id']}-n",
                source=SOURCE,
                prompt=(Message("user", prompt["text"]),),
                responses=tuple(response.text for response in composed),
                category=prompt["kind"],
                split="test",
            )
        )
        gold += [utility(prompt["kind"], response.ratings) for response in composed]
    return RatedLists(tuple(rows), torch.tensor(gold, dtype=torch.float64))
