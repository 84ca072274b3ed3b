"""UltraFeedback and its relatives: several responses to an instruction, rated by a model."""

from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

from armo.data.adapters.base import (
    Adapter,
    Dropped,
    member,
    objects,
    rated_response,
    rated_sides,
    rating,
    text,
)
from armo.data.conversation import RatedResponse

ASPECTS = ("instruction_following", "truthfulness", "honesty", "helpfulness")
CODE_ASPECTS = ("complexity", "style", "explanation", "instruction-following", "readability")


def ultrafeedback_rows(row: Mapping[str, Any], id: str) -> Iterator[RatedResponse | Dropped]:
    """Read a row of UltraFeedback: an instruction and the completions to it.

    Four aspects are rated from 1 to 5, as text or `N/A`, and `overall_score` from 1 to 10. It was
    10 for many completions that deserved 1, until that was mended in the set in December 2023: it
    is left out where it is 10 and the mean of the aspects is 2 or less. `custom_system_prompt` was
    for those who answered, not for who rated, and is not read.
    """
    for number, completion in enumerate(objects(row, "completions", "response")):
        annotations = member(completion, "annotations")
        aspects = {aspect: rating(member(annotations, aspect).get("Rating")) for aspect in ASPECTS}
        overall = rating(completion.get("overall_score"))
        mean = rating(completion.get("fine-grained_score"))
        rated = [value for value in aspects.values() if value is not None]
        if mean is None and rated:
            mean = fmean(rated)
        if overall is not None and overall >= 10 and mean is not None and mean <= 2:
            yield Dropped("overall_score alone, 10 beside aspects of 2 or less, a known bug")
            overall = None
        yield rated_response(
            "ultrafeedback",
            f"{id}/{number}",
            text(row, "instruction"),
            text(completion, "response"),
            {
                "ultrafeedback-overall_score": overall,
                **{f"ultrafeedback-{aspect}": value for aspect, value in aspects.items()},
            },
            category=text(row, "source"),
        )


def cleaned_rows(row: Mapping[str, Any], id: str) -> Iterator[RatedResponse | Dropped]:
    """Read a row of argilla's cleaned set: two conversations, the mean of four aspects for each."""
    sides = {side: (row[side], row[f"{side}-rating"]) for side in ("chosen", "rejected")}
    return rated_sides("ultrafeedback_cleaned", id, sides, "ultrafeedback-mean_aspect")


def binarized_rows(row: Mapping[str, Any], id: str) -> Iterator[RatedResponse | Dropped]:
    """Read a row of H4's binarized set, or of AllenAI's: two conversations with overall scores.

    Revisions before 2024 have the bug of `overall_score`, and nothing to tell it by.
    """
    sides = {side: (row[side], row[f"score_{side}"]) for side in ("chosen", "rejected")}
    return rated_sides("ultrafeedback_binarized", id, sides, "ultrafeedback-overall_score")


def code_rows(row: Mapping[str, Any], id: str) -> Iterator[RatedResponse | Dropped]:
    """Read a row of CodeUltraFeedback: responses and ratings, which are joined by the model.

    Each row is about one aspect, its `preference`; ratings are `1` to `5` as text, or `N/A`.
    """
    aspect = text(row, "preference")
    if aspect not in CODE_ASPECTS:
        raise ValueError(f"field `preference` is {aspect!r}, not one of {', '.join(CODE_ASPECTS)}")
    annotations = objects(row, "annotations", "model", "rating")
    given = {text(each, "model"): rating(each["rating"]) for each in annotations}
    for number, response in enumerate(objects(row, "responses", "model", "response")):
        yield rated_response(
            "code_ultrafeedback",
            f"{id}/{number}",
            text(row, "instruction"),
            text(response, "response"),
            {f"code-{aspect}": given.get(text(response, "model"))},
        )


ULTRAFEEDBACK = Adapter(
    name="ultrafeedback",
    id="openbmb/UltraFeedback",
    columns=("source", "instruction", "completions"),
    rows=ultrafeedback_rows,
    objectives=("ultrafeedback-overall_score", *(f"ultrafeedback-{aspect}" for aspect in ASPECTS)),
)
CLEANED = Adapter(
    name="ultrafeedback_cleaned",
    id="argilla/ultrafeedback-binarized-preferences-cleaned",
    columns=("chosen", "rejected", "chosen-rating", "rejected-rating"),
    rows=cleaned_rows,
    objectives=("ultrafeedback-mean_aspect",),
)
BINARIZED = Adapter(
    name="ultrafeedback_binarized",
    id="HuggingFaceH4/ultrafeedback_binarized",
    columns=("chosen", "rejected", "score_chosen", "score_rejected"),
    rows=binarized_rows,
    splits=("train_prefs",),
    objectives=("ultrafeedback-overall_score",),
)
CODE_ULTRAFEEDBACK = Adapter(
    name="code_ultrafeedback",
    id="coseal/CodeUltraFeedback",
    columns=("instruction", "preference", "responses", "annotations"),
    rows=code_rows,
    objectives=tuple(f"code-{aspect}" for aspect in CODE_ASPECTS),
)
