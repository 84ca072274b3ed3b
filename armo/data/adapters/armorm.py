"""ArmoRM's merged ratings, as RLHFlow published them."""

from collections.abc import Iterator, Mapping
from typing import Any

from armo.data.adapters.argilla import CAPYBARA, INTEL_ORCA
from armo.data.adapters.base import Adapter, Dropped, rated_response, rating, text
from armo.data.adapters.helpsteer import HELPSTEER
from armo.data.adapters.prometheus import FEEDBACK_COLLECTION
from armo.data.adapters.safety import BEAVERTAILS
from armo.data.adapters.ultrafeedback import CODE_ULTRAFEEDBACK, ULTRAFEEDBACK
from armo.data.conversation import RatedResponse
from armo.data.published import read_messages

# In the order of the published model's heads.
OBJECTIVES = (
    *HELPSTEER.objectives,
    *ULTRAFEEDBACK.objectives,
    *BEAVERTAILS.objectives,
    *FEEDBACK_COLLECTION.objectives,
    *CAPYBARA.objectives,
    *INTEL_ORCA.objectives,
    *CODE_ULTRAFEEDBACK.objectives,
)


def merged_rows(row: Mapping[str, Any], id: str) -> Iterator[RatedResponse | Dropped]:
    """Read a row of the merged set: `messages`, and a column per objective, with labels on [0, 1].

    `dataset`, which not all versions have, is the source.
    """
    messages = read_messages(row["messages"], "messages")
    if not messages or messages[-1].role != "assistant":
        yield Dropped("a conversation without an answer")
        return
    labels = {name: row[name] for name in OBJECTIVES}
    ratings = {
        name: float(label) if isinstance(label, bool) else rating(label)
        for name, label in labels.items()
    }
    first = next((name for name, label in ratings.items() if label is not None), "")
    source = text({"dataset": None, **row}, "dataset") or first.partition("-")[0]
    yield rated_response(source, id, messages[:-1], messages[-1].content, ratings)


ARMORM = Adapter(
    name="armorm",
    id="RLHFlow/ArmoRM-Multi-Objective-Data-v0.1",
    columns=("messages", *OBJECTIVES),
    rows=merged_rows,
    objectives=OBJECTIVES,
    unit=True,
)
