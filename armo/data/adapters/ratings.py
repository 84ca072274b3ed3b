"""Published sets of rated responses, by the names that `data/ratings=` knows."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from armo.data.adapters import (
    argilla,
    helpsteer,
    oasst,
    prometheus,
    safety,
    summaries,
    ultrafeedback,
)
from armo.data.adapters.armorm import ARMORM
from armo.data.adapters.base import Adapter, find_adapter
from armo.data.conversation import RatedResponse
from armo.data.objectives import Objective, ObjectiveSet
from armo.data.sources import BadRows, DataError, OnBadRow, Paths

logger = logging.getLogger(__name__)

RATING_SETS: dict[str, Adapter[RatedResponse]] = {
    adapter.name: adapter
    for adapter in (
        helpsteer.HELPSTEER,
        helpsteer.HELPSTEER2,
        helpsteer.HELPSTEER2_DISAGREEMENTS,
        helpsteer.HELPSTEER3,
        ultrafeedback.ULTRAFEEDBACK,
        ultrafeedback.CLEANED,
        ultrafeedback.BINARIZED,
        ultrafeedback.CODE_ULTRAFEEDBACK,
        safety.BEAVERTAILS,
        safety.PKU_SAFERLHF,
        safety.WILDGUARDMIX,
        prometheus.FEEDBACK_COLLECTION,
        argilla.CAPYBARA,
        argilla.INTEL_ORCA,
        argilla.DISTILABEL_MATH,
        oasst.OASST2,
        summaries.SUMMARIZE_AXES,
        ARMORM,
    )
}


def stream_adapted_ratings(
    dataset: str | Adapter[RatedResponse],
    *,
    objectives: ObjectiveSet,
    path: Paths | None = None,
    revision: str | None = None,
    splits: Sequence[str] | None = None,
    streaming: bool = True,
    on_bad_row: OnBadRow = "error",
) -> Iterator[RatedResponse]:
    """Read rated responses of a published set, as they are asked for.

    Ratings are checked against the declared scales; those on an objective that is not declared are
    left out, and so are rows without any other. What the adapter drops is counted and logged.

    Args:
        dataset: Its name here, one of `RATING_SETS`, or an adapter of your own.
        objectives: The declared objectives, some of the set's among them.
        path: Id on the hub, or a file, a folder, a pattern, or a list of them, in the published
            form; the set on the hub, if None.
        revision: Commit, tag or branch on the hub.
        splits: Those to read; the training split, if None.
        streaming: Read from the hub row by row; otherwise `datasets` downloads the set once and
            keeps it.
        on_bad_row: As of `Adapter.read`.

    Raises:
        DataError: Naming file, row and field, at the first row that cannot be used.
        ValueError: If there is no such set, or none of its objectives is declared.
    """
    adapter = find_adapter(dataset, RATING_SETS)
    if not set(adapter.objectives) & set(objectives.names):
        raise ValueError(
            f"{adapter.name} rates {', '.join(adapter.objectives)}, none of which is declared in "
            f"`data.objectives`"
        )
    bad = BadRows(on_bad_row)
    rows = adapter.read(path, revision=revision, splits=splits, streaming=streaming, on_bad_row=bad)
    return _declared(rows, adapter, objectives, bad, adapter.id if path is None else path)


def _declared(
    rows: Iterable[tuple[str, RatedResponse]],
    adapter: Adapter[RatedResponse],
    objectives: ObjectiveSet,
    bad: BadRows,
    path: Paths,
) -> Iterator[RatedResponse]:
    by_name = {objective.name: objective for objective in objectives.objectives}
    others = used = 0
    for place, row in rows:
        try:
            ratings = {
                name: _on_scale(value, by_name[name], unit=adapter.unit)
                for name, value in row.ratings.items()
                if name in by_name
            }
        except ValueError as error:
            bad(DataError(f"{place}: {error}"))
            continue
        used += 1
        if ratings:
            yield replace(row, ratings=ratings)
        others += not ratings
    bad.tell(path, used=used)
    if others:
        logger.info("%s: %d rows rate none of the declared objectives", adapter.name, others)


def _on_scale(value: float, objective: Objective, *, unit: bool) -> float:
    """Return a rating on the declared scale; one on [0, 1] is mapped back to it."""
    if not unit:
        objective.to_unit(value)
        return value
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"label of {objective.name!r} must be in [0, 1], got {value}")
    return min(max(objective.from_unit(value), objective.low), objective.high)
