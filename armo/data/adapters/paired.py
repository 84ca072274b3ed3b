"""What the adapters of pair sets share: fields of a published row, and pairs made of them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from armo.data.adapters.base import Dropped, is_prompt, rating, text
from armo.data.conversation import PreferencePair, Prompt
from armo.data.published import read_messages


def choice(row: Mapping[str, Any], name: str, allowed: Sequence[Any]) -> Any:
    """Return one of the values that the set documents.

    Raises:
        ValueError: Naming the field that is missing or has another value.
    """
    value = row.get(name)
    for option in allowed:
        # In CSV files a number is a text.
        if not isinstance(value, bool) and value in (option, str(option)):
            return option
    options = ", ".join(map(repr, allowed))
    raise ValueError(f"field `{name}` must be one of {options}, got {value!r:.60}")


def optional_text(row: Mapping[str, Any], name: str) -> str:
    """Return a text, empty if the row has none."""
    return text(row, name) if name in row else ""


def messages(row: Mapping[str, Any], name: str) -> Prompt:
    """Return a list of messages, without a system message that says nothing.

    Raises:
        ValueError: Naming the field that is none, or has an unknown role.
    """
    read = read_messages(row.get(name), name)
    return tuple(m for m in read if m.role != "system" or m.content.strip())


def difference(row: Mapping[str, Any], better: str, worse: str) -> float | None:
    """Return the difference of two scores; None if one is missing, or no number."""
    high, low = rating(row.get(better)), rating(row.get(worse))
    return None if high is None or low is None else high - low


def pair(
    id: str,
    prompt: Prompt,
    chosen: str,
    rejected: str,
    *,
    margin: float | None = None,
    preference: float = 1.0,
    category: str = "",
) -> PreferencePair | Dropped:
    """Make a pair, or say why these texts and this margin make none.

    Args:
        id: `SET/SPLIT/NUMBER`; the set is the pair's source.
        prompt: All turns up to the answer.
        chosen: The preferred response.
        rejected: The other one.
        margin: By how much, if known. Zero is no preference, unless `preference` says tie; below
            zero, what the margin is made of contradicts the label.
        preference: Probability that `chosen` is the better one.
        category: Kind of prompt.
    """
    if not prompt or not is_prompt(prompt):
        return Dropped("a prompt without a user turn at its end")
    if not chosen.strip() or not rejected.strip():
        return Dropped("an empty response")
    if chosen.strip() == rejected.strip():
        return Dropped("the same response twice")
    if margin is not None and margin <= 0.0 and preference > 0.5:
        return Dropped("label and scores disagree" if margin < 0.0 else "equal scores")
    return PreferencePair(
        id=id,
        source=id.partition("/")[0],
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        margin=margin,
        preference=preference,
        category=category,
    )


def ordered_pair(
    id: str,
    prompt: Prompt,
    responses: Sequence[str],
    *,
    first: float,
    margin: float | None = None,
    category: str = "",
) -> PreferencePair | Dropped:
    """Make a pair of two responses, of which the first is better with probability `first`.

    Args:
        id: As of `pair`.
        prompt: As of `pair`.
        responses: Two, in the order of the set; a tie keeps it.
        first: Probability that the first is better.
        margin: As of `pair`.
        category: As of `pair`.
    """
    a, b = responses
    chosen, rejected = (b, a) if first < 0.5 else (a, b)
    preference = max(first, 1.0 - first)
    return pair(
        id, prompt, chosen, rejected, margin=margin, preference=preference, category=category
    )


def ranked_pairs(
    id: str,
    prompt: Prompt,
    scored: Iterable[tuple[str, float | None]],
    *,
    category: str = "",
) -> Iterable[PreferencePair | Dropped]:
    """Make all pairs of responses with scores; the margin is the difference.

    Args:
        id: As of `pair`; the numbers of the two responses are added.
        prompt: As of `pair`.
        scored: Responses and their scores; one without a score is in no pair.
        category: As of `pair`.
    """
    numbered = [(k, response, score) for k, (response, score) in enumerate(scored, start=1)]
    rated = [(k, response, score) for k, response, score in numbered if score is not None]
    for _ in range(len(numbered) - len(rated)):
        yield Dropped("a response without a score")
    for place, (i, first, a) in enumerate(rated):
        for j, second, b in rated[place + 1 :]:
            chosen, rejected = (second, first) if b > a else (first, second)
            yield pair(
                f"{id}/{i}-{j}", prompt, chosen, rejected, margin=abs(a - b), category=category
            )
