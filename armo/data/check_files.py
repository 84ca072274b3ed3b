"""Files of which nothing is known yet: what kind of rows they hold, and on which scales."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from armo.data.columns import RATING_FIELDS, ColumnMap
from armo.data.objectives import ObjectiveSet
from armo.data.sources import BUILTIN_FILES, DataError, Paths, data_files, is_mapped, try_rows


def files_by_kind(path: Paths, *, columns: Mapping[str, Any] | None = None) -> dict[str, list[str]]:
    """Sort files by the kind of their rows: ratings, pairs or lists.

    Args:
        path: A file, a folder, a pattern, or a list of them.
        columns: Where the fields stand in rows that are not native; see `ColumnMap`.

    Returns:
        Files by kind, of each kind in their order; kinds that are not there are left out.

    Raises:
        DataError: If a file is not there, or nothing in it can be read.
    """
    found: dict[str, list[str]] = {}
    for file in data_files(path, builtin_file=BUILTIN_FILES["ratings"]):
        fields = columns or next((row for row in _raw_rows(file) if row), None)
        if fields is None:
            raise DataError(f"{file}: no rows that can be read")
        kind = "ratings"
        if "responses" in fields:
            kind = "lists"
        elif "chosen" in fields:
            kind = "pairs"
        found.setdefault(kind, []).append(str(file))
    return found


def observed_objectives(
    path: Paths, *, columns: Mapping[str, Any] | None = None
) -> ObjectiveSet | None:
    """Declare objectives as files have them: on a scale from the lowest to the highest rating.

    Args:
        path: As of `files_by_kind`; its rows are rated responses.
        columns: As of `files_by_kind`.

    Returns:
        The objectives in order of appearance; None if no row has a rating that is a number.

    Raises:
        DataError: If a file is not there or cannot be read.
    """
    mapped = ColumnMap(RATING_FIELDS, columns)
    ends: dict[str, tuple[float, float]] = {}
    for file in data_files(path, builtin_file=BUILTIN_FILES["ratings"]):
        for raw in _raw_rows(file):
            try:
                row = mapped.native(raw) if is_mapped(file, mapped) else raw
            except ValueError:
                continue  # for the check itself to name
            ratings = row.get("ratings")
            for name, rating in ratings.items() if isinstance(ratings, dict) else ():
                if type(rating) in (int, float) and abs(rating) < 1e300:
                    low, high = ends.get(name, (rating, rating))
                    ends[name] = min(low, rating), max(high, rating)
    declared = {
        name: {"low": low, "high": high if low < high else low + 1.0}
        for name, (low, high) in ends.items()
        if name
    }
    return ObjectiveSet.from_mapping(declared) if declared else None


def _raw_rows(file: Path) -> Iterator[dict[str, Any]]:
    return (row for _, row in try_rows(file) if isinstance(row, dict))
