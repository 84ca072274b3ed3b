"""Preference pairs out of ratings, and whether given pairs agree with given ratings."""

import hashlib
import itertools
import logging
import math
import random
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

from armo.data.conversation import PreferencePair, Prompt, RatedResponse
from armo.data.objectives import ObjectiveSet
from armo.data.sources import DataError

logger = logging.getLogger(__name__)

Ties = Literal["drop", "keep"]

# Values on [0, 1] that are the same but for rounding, as weighted sums of ratings are.
_SAME = 1e-9


def pairs_from_ratings(
    read: Callable[[], Iterable[RatedResponse]],
    *,
    objectives: ObjectiveSet,
    by: str | Mapping[str, float],
    min_margin: float = 0.0,
    ties: Ties = "drop",
    max_per_prompt: int | None = None,
    seed: int = 0,
) -> Iterator[PreferencePair]:
    """Make preference pairs of rated responses to the same prompt, the better one chosen.

    The rows are read twice. In between, memory holds a few numbers per row; texts wait only until
    the other response of their pair is there. Pairs come in the order in which their second
    response is read. The margin is the difference of the values; the weight the product of the
    rows' weights. A response that is there several times has the mean of its values, and is paired
    where it is first. How many rows and pairs were left out, and why, goes to the log.

    Args:
        read: Reads the rated responses, each time from the first.
        objectives: The declared objectives.
        by: What makes a response better: an objective, or weights by objective, for the weighted
            mean; ratings count on [0, 1], 1 the good end. Rows without one of them are left out.
        min_margin: Pairs with a smaller margin are left out, but for ties.
        ties: What becomes of pairs of equal value: `keep` makes pairs of preference 0.5.
        max_per_prompt: At most so many pairs, drawn at random where there are more.
        seed: Of that draw; the same for a prompt whatever the others are.

    Raises:
        DataError: If the rows of a pair are on different sides of the split, or no pair is left.
        ValueError: If an objective is unknown or a setting out of range.

    Example:
        >>> from armo.data.conversation import Conversation, Message
        >>> from armo.data.objectives import Objective
        >>> prompt = (Message("user", "Hi"),)
        >>> rows = [
        ...     RatedResponse("a", "s", Conversation(prompt, "Hello."), {"quality": 5}),
        ...     RatedResponse("b", "s", Conversation(prompt, "What?"), {"quality": 2}),
        ... ]
        >>> objectives = ObjectiveSet((Objective("quality", 1, 5),))
        >>> [pair] = pairs_from_ratings(lambda: rows, objectives=objectives, by="quality")
        >>> pair.chosen, pair.rejected, pair.margin
        ('Hello.', 'What?', 0.75)
    """
    if ties not in get_args(Ties):
        raise ValueError(f"`ties` must be {' or '.join(get_args(Ties))}, got {ties!r}.")
    if not 0.0 <= min_margin <= 1.0:
        raise ValueError(f"`min_margin` must be from 0 to 1, got {min_margin}.")
    if max_per_prompt is not None and max_per_prompt < 1:
        raise ValueError(f"`max_per_prompt` must be 1 or more, got {max_per_prompt}.")
    value_of = _value(objectives, by)
    left_out: Counter[str] = Counter()
    prompts, rows_read = _worths(read(), value_of, left_out)
    # By the row that is read last, the other one and by how much that is the better one.
    wanted: dict[int, list[tuple[int, float]]] = defaultdict(list)
    needed: Counter[int] = Counter()
    for key, responses in prompts.items():
        kept = []
        entries = [(first, total / count) for first, total, count in responses.values()]
        for (first, a), (second, b) in itertools.combinations(entries, 2):
            ahead = a - b if abs(a - b) > _SAME else 0.0
            if ahead == 0.0 and ties == "drop":
                left_out["ties"] += 1
            elif 0.0 < abs(ahead) < min_margin - _SAME:
                left_out["below `min_margin`"] += 1
            else:
                kept.append((first, second, ahead))
        if max_per_prompt is not None and len(kept) > max_per_prompt:
            left_out["above `max_per_prompt`"] += len(kept) - max_per_prompt
            kept = random.Random(f"{seed}:{key.hex()}").sample(kept, max_per_prompt)
        for first, second, ahead in sorted(kept):
            wanted[second].append((first, ahead))
            needed[first] += 1
    count = sum(needed.values())
    why = ", ".join(f"{number} {reason}" for reason, number in left_out.items()) or "none"
    if not count:
        raise DataError(f"no pairs come of {rows_read} rated responses; left out: {why}")
    logger.info("%d pairs of %d rated responses; left out: %s", count, rows_read, why)
    waiting: dict[int, RatedResponse] = {}
    for number, row in enumerate(read()):
        for first, ahead in wanted.pop(number, ()):
            yield _pair(waiting[first], row, ahead)
            needed[first] -= 1
            if not needed[first]:
                del waiting[first]
        if needed[number]:
            waiting[number] = row


def _pair(first: RatedResponse, second: RatedResponse, ahead: float) -> PreferencePair:
    if {first.split, second.split} == {"train", "test"}:
        raise DataError(
            f"rows {first.id!r} ({first.split}) and {second.id!r} ({second.split}) share a prompt "
            f"but are on different sides of the split; put both on one side"
        )
    chosen, rejected = (first, second) if ahead >= 0.0 else (second, first)
    return PreferencePair(
        id=f"{chosen.id} over {rejected.id}",
        source=chosen.source,
        prompt=chosen.prompt,
        chosen=chosen.conversation.response,
        rejected=rejected.conversation.response,
        margin=abs(ahead),
        category=chosen.category,
        split=chosen.split or rejected.split,
        weight=chosen.weight * rejected.weight,
        preference=0.5 if ahead == 0.0 else 1.0,
    )


def pair_row(pair: PreferencePair) -> dict[str, Any]:
    """Return a pair as the native row that `armo.data.sources.stream_pairs` reads."""
    row: dict[str, Any] = {
        "id": pair.id,
        "source": pair.source,
        "prompt": [{"role": turn.role, "content": turn.content} for turn in pair.prompt],
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "margin": pair.margin,
        "category": pair.category,
    }
    optional: dict[str, tuple[Any, Any]] = {
        "split": (pair.split, None),
        "weight": (pair.weight, 1.0),
        "preference": (pair.preference, 1.0),
        "judgements": (pair.judgements, {}),
    }
    return row | {name: value for name, (value, usual) in optional.items() if value != usual}


class Agreement(NamedTuple):
    """What ratings say of a pair.

    Attributes:
        name: The objective, or `BY` for the value that pairs would be made by.
        source: Of the pair.
        group: Number of the pair's prompt.
        ahead: By how much the chosen response is rated better, on [0, 1].
        margin: The pair's own margin; NaN where it has none.
    """

    name: str
    source: str
    group: int
    ahead: float
    margin: float


BY = "all, weighted"


def agreements(
    pairs: Iterable[PreferencePair],
    ratings: Iterable[RatedResponse],
    *,
    objectives: ObjectiveSet,
    by: str | Mapping[str, float] | None = None,
) -> Iterator[Agreement]:
    """Compare given pairs with given ratings of the same responses to the same prompts.

    Yields one row for each pair and each objective that both its responses are rated on; pairs
    without any such go to the log, as do ties, which are no preference to agree with.

    Args:
        pairs: Preference pairs.
        ratings: Rated responses; several ratings of one response have their mean.
        objectives: The declared objectives.
        by: Weights by objective, for a weighted mean beside the objectives.

    Raises:
        DataError: If no response of the pairs is rated.
    """
    values: dict[str, Callable[[Mapping[str, float]], float | None]] = {
        name: _value(objectives, name) for name in objectives.names
    }
    if by is not None and not isinstance(by, str):
        values[BY] = _value(objectives, by)
    names = list(values)
    rated: dict[bytes, array[float]] = {}
    for row in ratings:
        key = _digest(_digest(_turns(row.prompt)), row.conversation.response.strip())
        sums = rated.setdefault(key, array("d", [0.0]) * (2 * len(names)))
        for k, name in enumerate(names):
            if (value := values[name](row.ratings)) is not None:
                sums[2 * k] += value
                sums[2 * k + 1] += 1.0
    groups: dict[bytes, int] = {}
    read = ties = compared = 0
    for pair in pairs:
        read += 1
        if pair.preference == 0.5:
            ties += 1
            continue
        prompt = _digest(_turns(pair.prompt))
        found = [rated.get(_digest(prompt, response.strip())) for response in pair.responses]
        before = compared
        for k, name in enumerate(names):
            means = [s[2 * k] / s[2 * k + 1] for s in found if s is not None and s[2 * k + 1]]
            if len(means) == 2:
                ahead = means[0] - means[1]
                compared = before + 1
                yield Agreement(
                    name,
                    pair.source,
                    groups.setdefault(prompt, len(groups)),
                    ahead if abs(ahead) > _SAME else 0.0,
                    math.nan if pair.margin is None else pair.margin,
                )
    if not compared:
        raise DataError(
            f"of {read} pairs, none has two responses that are rated on the same objective; the "
            f"prompts and responses must be the same texts"
        )
    logger.info(
        "%d of %d pairs compared; %d are ties, %d have no two ratings on one objective",
        compared,
        read,
        ties,
        read - ties - compared,
    )


def _value(
    objectives: ObjectiveSet, by: str | Mapping[str, float]
) -> Callable[[Mapping[str, float]], float | None]:
    """Return what a response is worth by its ratings, on [0, 1]; None where one is missing."""
    weights = {by: 1.0} if isinstance(by, str) else dict(by)
    try:
        mix = objectives.mix(weights)
    except ValueError as error:
        raise ValueError(f"`by`: {error}") from None
    used = [(each, mix[k]) for k, each in enumerate(objectives.objectives) if mix[k] > 0.0]

    def value(ratings: Mapping[str, float]) -> float | None:
        if any(objective.name not in ratings for objective, _ in used):
            return None
        return sum(weight * each.to_unit(ratings[each.name]) for each, weight in used)

    return value


def _worths(
    rows: Iterable[RatedResponse],
    value_of: Callable[[Mapping[str, float]], float | None],
    left_out: Counter[str],
) -> tuple[dict[bytes, dict[bytes, tuple[int, float, int]]], int]:
    """Sum the values of each response: by prompt and text, its first row, the sum and count."""
    prompts: dict[bytes, dict[bytes, tuple[int, float, int]]] = {}
    number = -1
    for number, row in enumerate(rows):
        value = value_of(row.ratings)
        if value is None:
            left_out["rows without a rating"] += 1
            continue
        responses = prompts.setdefault(_digest(_turns(row.prompt)), {})
        text = _digest(row.conversation.response.strip())
        first, total, count = responses.get(text, (number, 0.0, 0))
        responses[text] = first, total + value, count + 1
    return prompts, number + 1


def _turns(prompt: Prompt) -> str:
    return repr([(turn.role, turn.content) for turn in prompt])


def _digest(*parts: str | bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.digest()
