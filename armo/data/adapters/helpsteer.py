"""The HelpSteer sets of NVIDIA: ratings by people from 0 to 4, feedback in words."""

import re
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

from armo.data.adapters.base import (
    Adapter,
    Dropped,
    listed,
    rated_response,
    rating,
    text,
)
from armo.data.conversation import Message, Prompt, RatedResponse
from armo.data.published import read_messages

ASPECTS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
DEGREES = {"not": 1, "slightly": 2, "partially": 3, "mostly": 4, "perfectly": 5}
_DEGREE = re.compile(rf"\bresponse is ({'|'.join(DEGREES)}) helpful", re.IGNORECASE)


def helpsteer_turns(prompt: str) -> Prompt:
    r"""Split a prompt whose turns stand in one text.

    The first piece is the user's, the others begin with a role: `a\n<extra_id_1>Assistant\nb`.

    Raises:
        ValueError: If a role is neither `User` nor `Assistant`.

    Example:
        >>> [turn.role for turn in helpsteer_turns("Hi\n<extra_id_1>Assistant\nHello.")]
        ['user', 'assistant']
    """
    first, *rest = prompt.split("<extra_id_1>")
    turns = [Message("user", first.rstrip("\n"))]
    for piece in rest:
        role, _, content = piece.partition("\n")
        if role not in ("User", "Assistant"):
            raise ValueError(f"field `prompt` has a turn of {role!r:.60}, not User or Assistant")
        turns.append(Message(role.lower(), content.rstrip("\n")))
    return tuple(turns)


def helpsteer_rows(row: Mapping[str, Any], id: str) -> Iterator[RatedResponse | Dropped]:
    """Read a row of HelpSteer: `prompt`, `response`, five ratings from 0 to 4."""
    ratings = {f"helpsteer-{aspect}": rating(row[aspect]) for aspect in ASPECTS}
    turns = helpsteer_turns(text(row, "prompt"))
    yield rated_response("helpsteer", id, turns, text(row, "response"), ratings)


def helpsteer2_rows(row: Mapping[str, Any], id: str) -> Iterator[RatedResponse | Dropped]:
    """Read a row of HelpSteer2, as HelpSteer; prompts may have several turns."""
    ratings = {f"helpsteer2-{aspect}": rating(row[aspect]) for aspect in ASPECTS}
    turns = helpsteer_turns(text(row, "prompt"))
    yield rated_response("helpsteer2", id, turns, text(row, "response"), ratings)


def disagreements_rows(row: Mapping[str, Any], id: str) -> Iterator[RatedResponse | Dropped]:
    """Read a row of HelpSteer2's disagreements: a list of ratings, of which the mean counts."""
    ratings = {}
    for aspect in ASPECTS:
        given = [x for x in map(rating, listed(row, aspect)) if x is not None]
        ratings[f"helpsteer2-{aspect}"] = fmean(given) if given else None
    turns = helpsteer_turns(text(row, "prompt"))
    yield rated_response("helpsteer2_disagreements", id, turns, text(row, "response"), ratings)


def helpsteer3_rows(row: Mapping[str, Any], id: str) -> Iterator[RatedResponse | Dropped]:
    """Read a row of HelpSteer3's feedback: two responses, up to three opinions on each.

    An opinion begins "The response is mostly helpful": from 1, not, to 5, perfectly; the rating is
    the mean of those that do. `context` is the conversation, or the text of its one turn.
    """
    context = row["context"]
    turns = context if isinstance(context, str) else read_messages(context, "context")
    for number in (1, 2):
        opinions = [_DEGREE.search(str(opinion)) for opinion in listed(row, f"feedback{number}")]
        degrees = [DEGREES[found[1].lower()] for found in opinions if found]
        yield rated_response(
            "helpsteer3",
            f"{id}/{number}",
            turns,
            text(row, f"response{number}"),
            {"helpsteer3-helpfulness": fmean(degrees) if degrees else None},
        )


HELPSTEER = Adapter(
    name="helpsteer",
    id="nvidia/HelpSteer",
    columns=("prompt", "response", *ASPECTS),
    rows=helpsteer_rows,
    objectives=tuple(f"helpsteer-{aspect}" for aspect in ASPECTS),
)
HELPSTEER2 = Adapter(
    name="helpsteer2",
    id="nvidia/HelpSteer2",
    columns=("prompt", "response", *ASPECTS),
    rows=helpsteer2_rows,
    objectives=tuple(f"helpsteer2-{aspect}" for aspect in ASPECTS),
)
HELPSTEER2_DISAGREEMENTS = Adapter(
    name="helpsteer2_disagreements",
    id="nvidia/HelpSteer2",
    columns=("prompt", "response", *ASPECTS),
    rows=disagreements_rows,
    folder="disagreements",
    objectives=HELPSTEER2.objectives,
)
HELPSTEER3 = Adapter(
    name="helpsteer3",
    id="nvidia/HelpSteer3",
    columns=("context", "response1", "response2", "feedback1", "feedback2"),
    rows=helpsteer3_rows,
    config="feedback",
    objectives=("helpsteer3-helpfulness",),
)
