"""Pairs of HelpSteer2 and HelpSteer3: strengths from -3 to 3 and the votes behind them, and edits.

The margin is the strength. The preference is the share of the votes that are for the better
response, a vote for neither counting half; a strength of 0 is a tie.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from armo.data.adapters.base import Adapter, Dropped, objects, text
from armo.data.adapters.helpsteer import helpsteer_turns
from armo.data.adapters.paired import (
    choice,
    messages,
    optional_text,
    pair,
)
from armo.data.conversation import Message, PreferencePair, Prompt

STRENGTHS = tuple(range(-3, 4))


def helpsteer2_preference(
    row: Mapping[str, Any], id: str, *, validation: bool
) -> Iterator[PreferencePair | Dropped]:
    """Make a pair of a row of HelpSteer2's preferences, which the hub has in one split.

    Args:
        row: `prompt`, a text that may hold several turns; `response_1`, `response_2`;
            `preference_strength`, below 0 if the first is better; `three_most_similar_preferences`,
            the votes that it is the mean of, if there; `split`, `train` or `val`.
        id: Of the row.
        validation: Which of the rows: those of the validation, or the others.
    """
    if text(row, "split").startswith("val") is not validation:
        yield Dropped("a row of the training split" if validation else "a row of the validation")
        return
    yield _voted(
        row,
        id,
        helpsteer_turns(text(row, "prompt")),
        responses=("response_1", "response_2"),
        overall="preference_strength",
        votes=("three_most_similar_preferences", "strength"),
    )


def helpsteer3_preference(row: Mapping[str, Any], id: str) -> Iterator[PreferencePair | Dropped]:
    """Make a pair of a row of HelpSteer3's configuration `preference`.

    Args:
        row: `context`, messages or the text of one user turn; `response1`, `response2`;
            `overall_preference`, below 0 if the first is better; `individual_preference`, the
            votes, if there; `domain`, if there.
        id: Of the row.
    """
    yield _voted(
        row,
        id,
        _context(row),
        responses=("response1", "response2"),
        overall="overall_preference",
        votes=("individual_preference", "score"),
    )


def helpsteer3_edit(row: Mapping[str, Any], id: str) -> Iterator[PreferencePair | Dropped]:
    """Make a pair of a row of HelpSteer3's configuration `edit`: the edit is better.

    Args:
        row: `context`, `edited_response`, `original_response`; `domain`, if there.
        id: Of the row.
    """
    better, worse = text(row, "edited_response"), text(row, "original_response")
    yield pair(id, _context(row), better, worse, category=optional_text(row, "domain"))


def helpsteer3_edit_quality(row: Mapping[str, Any], id: str) -> Iterator[PreferencePair | Dropped]:
    """Make a pair of a row of HelpSteer3's `edit_quality`: the edit that follows the feedback.

    Args:
        row: `context`, `good_edited_response`, `bad_edited_response`; `domain`, if there.
        id: Of the row.
    """
    better, worse = text(row, "good_edited_response"), text(row, "bad_edited_response")
    yield pair(id, _context(row), better, worse, category=optional_text(row, "domain"))


def _context(row: Mapping[str, Any]) -> Prompt:
    if isinstance(row.get("context"), str):
        return (Message("user", row["context"]),)
    return messages(row, "context")


def _voted(
    row: Mapping[str, Any],
    id: str,
    prompt: Prompt,
    *,
    responses: tuple[str, str],
    overall: str,
    votes: tuple[str, str],
) -> PreferencePair | Dropped:
    strength: int = choice(row, overall, STRENGTHS)
    field, each = votes
    given = objects(row, field) if row.get(field) is not None else []
    # A vote of -100 says that the annotator could not decide.
    usable = [vote[each] for vote in given if vote.get(each) in STRENGTHS]
    better = 1 if strength > 0 else 0
    preference = 0.5 if strength == 0 else 1.0
    if strength != 0 and usable:
        halves = sum(1 + (vote * strength > 0) - (vote * strength < 0) for vote in usable)
        preference = halves / (2 * len(usable))
        if preference < 0.5:
            return Dropped("votes and strength disagree")
    return pair(
        id,
        prompt,
        text(row, responses[better]),
        text(row, responses[1 - better]),
        margin=float(abs(strength)),
        preference=preference,
        category=optional_text(row, "domain"),
    )


ADAPTERS: tuple[Adapter[PreferencePair], ...] = (
    *(
        Adapter(
            name,
            "nvidia/HelpSteer2",
            ("prompt", "response_1", "response_2", "preference_strength", "split"),
            partial(helpsteer2_preference, validation=validation),
            folder="preference",
        )
        for name, validation in (
            ("helpsteer2_preference", False),
            ("helpsteer2_preference_validation", True),
        )
    ),
    Adapter(
        "helpsteer3_preference",
        "nvidia/HelpSteer3",
        ("context", "response1", "response2", "overall_preference"),
        helpsteer3_preference,
        config="preference",
    ),
    Adapter(
        "helpsteer3_edit",
        "nvidia/HelpSteer3",
        ("context", "original_response", "edited_response"),
        helpsteer3_edit,
        config="edit",
    ),
    Adapter(
        "helpsteer3_edit_quality",
        "nvidia/HelpSteer3",
        ("context", "good_edited_response", "bad_edited_response"),
        helpsteer3_edit_quality,
        config="edit_quality",
    ),
)
