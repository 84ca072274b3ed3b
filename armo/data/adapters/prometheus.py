"""Feedback-Collection of Prometheus: one response, rated against a rubric of its own."""

from collections.abc import Iterator, Mapping
from typing import Any

from armo.data.adapters.base import Adapter, Dropped, rated_response, rating, text
from armo.data.conversation import RatedResponse


def feedback_rows(row: Mapping[str, Any], id: str) -> Iterator[RatedResponse | Dropped]:
    """Read a row of Feedback-Collection: `orig_score`, 1 to 5, a number or text.

    `instruction` is the whole prompt of a judge, and not read. Each row has criteria of its own, so
    the objective is one over unlike ones. The responses were written by GPT-4 to deserve a score.
    """
    yield rated_response(
        "feedback_collection",
        id,
        text(row, "orig_instruction"),
        text(row, "orig_response"),
        {"prometheus-score": rating(row["orig_score"])},
    )


FEEDBACK_COLLECTION = Adapter(
    name="feedback_collection",
    id="prometheus-eval/Feedback-Collection",
    columns=("orig_instruction", "orig_response", "orig_score"),
    rows=feedback_rows,
    objectives=("prometheus-score",),
)
