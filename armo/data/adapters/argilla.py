"""Sets of argilla and distilabel: two responses to a prompt, each rated by GPT-4."""

from collections.abc import Iterator, Mapping
from typing import Any

from armo.data.adapters.base import (
    Adapter,
    Dropped,
    listed,
    rated_response,
    rated_sides,
    rating,
    text,
)
from armo.data.conversation import Message, RatedResponse

MATH_SCALE = (1.0, 10.0)


def capybara_rows(row: Mapping[str, Any], id: str) -> Iterator[RatedResponse | Dropped]:
    """Read a row of Capybara-Preferences: two conversations, each with a rating from 1 to 5."""
    sides = {side: (row[side], row[f"{side}_rating"]) for side in ("chosen", "rejected")}
    return rated_sides("capybara", id, sides, "argilla-overall_quality")


def intel_orca_rows(row: Mapping[str, Any], id: str) -> Iterator[RatedResponse | Dropped]:
    """Read a row of distilabel's Intel Orca: `rating[i]`, from 1 to 10, is of `generations[i]`.

    So it is not of `chosen` and `rejected`. Some rows have no rating.
    """
    generations, ratings = listed(row, "generations"), listed(row, "rating")
    if not ratings:
        yield Dropped("no rating")
        return
    if len(generations) != len(ratings):
        raise ValueError(f"field `rating` has {len(ratings)} for {len(generations)} `generations`")
    system = text(row, "system")
    turns = [Message("system", system)] if system.strip() else []
    prompt = (*turns, Message("user", text(row, "input")))
    for number, given in enumerate(ratings):
        if not isinstance(generations[number], str):
            raise ValueError(f"field `generations[{number}]` must be text")
        yield rated_response(
            "intel_orca",
            f"{id}/{number}",
            prompt,
            generations[number],
            {"argilla-judge_lm": rating(given)},
        )


def distilabel_math_rows(row: Mapping[str, Any], id: str) -> Iterator[RatedResponse | Dropped]:
    """Read a row of distilabel's math preferences: two responses, rated from 1 to 10.

    Ratings are means, and some are a little off the scale: they are moved to its ends. The name of
    `rejected_response` was not seen documented.
    """
    low, high = MATH_SCALE
    for side in ("chosen", "rejected"):
        given = rating(row[f"{side}_rating"])
        clipped = given if given is None else min(max(given, low), high)
        yield rated_response(
            "distilabel_math",
            f"{id}/{side}",
            text(row, "instruction"),
            text(row, f"{side}_response"),
            {"distilabel_math-quality": clipped},
        )


CAPYBARA = Adapter(
    name="capybara",
    id="argilla/Capybara-Preferences-Filtered",
    columns=("chosen", "rejected", "chosen_rating", "rejected_rating"),
    rows=capybara_rows,
    objectives=("argilla-overall_quality",),
)
INTEL_ORCA = Adapter(
    name="intel_orca",
    id="argilla/distilabel-intel-orca-dpo-pairs",
    columns=("system", "input", "generations", "rating"),
    rows=intel_orca_rows,
    objectives=("argilla-judge_lm",),
)
DISTILABEL_MATH = Adapter(
    name="distilabel_math",
    id="argilla/distilabel-math-preference-dpo",
    columns=(
        "instruction",
        "chosen_response",
        "rejected_response",
        "chosen_rating",
        "rejected_rating",
    ),
    rows=distilabel_math_rows,
    objectives=("distilabel_math-quality",),
)
