"""Mixtures: rows of several sets, each with its weight and how many of it."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from armo.data.adapters.pairs import PAIR_SETS, stream_adapted_pairs
from armo.data.adapters.ratings import RATING_SETS, stream_adapted_ratings
from armo.data.conversation import PreferencePair, RatedResponse
from armo.data.objectives import ObjectiveSet
from armo.data.published import local_files
from armo.data.sources import BUILTIN_FILES, data_files, stream_pairs, stream_ratings

RowT = TypeVar("RowT", RatedResponse, PreferencePair)


def stream_mixed_ratings(
    sources: Mapping[str, Mapping[str, Any] | None], *, objectives: ObjectiveSet
) -> Iterator[RatedResponse]:
    """Read rated responses of several sets, one set after the other.

    Args:
        sources: By a name of your own, which its ids begin with, the settings of a set: `dataset`,
            a published set, and what else `stream_adapted_ratings` takes; or those of
            `stream_ratings`, for native rows. The name of a published set needs no `dataset`.
            `weight` multiplies the weights of its rows, 1 by default, and `limit` is how many rows
            to take from its beginning.
        objectives: The declared objectives. Published sets may rate others; native rows may not.

    Raises:
        DataError: As of the functions that read the sets.
        ValueError: If a source has a setting that is unknown or wrong.
    """
    return _mixed(
        sources,
        known=RATING_SETS,
        adapted=partial(stream_adapted_ratings, objectives=objectives),
        native=partial(stream_ratings, objectives=objectives),
    )


def stream_mixed_pairs(
    sources: Mapping[str, Mapping[str, Any] | None], *, objectives: ObjectiveSet | None = None
) -> Iterator[PreferencePair]:
    """Read preference pairs of several sets, one set after the other.

    Args:
        sources: As of `stream_mixed_ratings`, with the settings of `stream_adapted_pairs` or
            `stream_pairs`.
        objectives: The declared objectives; pairs may judge any of them. Without, any objective.

    Raises:
        DataError: As of the functions that read the sets.
        ValueError: If a source has a setting that is unknown or wrong.
    """
    return _mixed(
        sources,
        known=PAIR_SETS,
        adapted=partial(stream_adapted_pairs, objectives=objectives),
        native=partial(stream_pairs, objectives=objectives),
    )


def section_files(section: Mapping[str, Any], *, kind: str) -> list[Path]:
    """Return the files that a section of the settings reads, of a mixture those of all sources.

    Args:
        section: One of `data`: `_target_` says how its rows are read, `path` or `sources` where
            they are. Sets on the hub have no files.
        kind: `ratings`, `pairs`, `lists` or `benchmark`.

    Raises:
        DataError: If there is no such file or folder.
    """
    published: Mapping[str, Collection[str]] = {"ratings": RATING_SETS, "pairs": PAIR_SETS}
    known = published.get(kind, ())
    sources = section.get("sources")
    if sources is None:
        native = str(section["_target_"]).startswith("armo.data.sources.")
        places = [(section.get("path"), native)]
    else:
        given = {name: source for name, source in sources.items() if isinstance(source, Mapping)}
        places = [
            (source.get("path"), "dataset" not in source and name not in known)
            for name, source in given.items()
        ]
    files: list[Path] = []
    for path, native in places:
        if path is not None and native:
            files += data_files(path, builtin_file=BUILTIN_FILES[kind])
        elif path is not None:
            files += local_files(path)
    return files


def _mixed(
    sources: Mapping[str, Mapping[str, Any] | None],
    *,
    known: Collection[str],
    adapted: Callable[..., Iterator[RowT]],
    native: Callable[..., Iterator[RowT]],
) -> Iterator[RowT]:
    opened = []
    for name, given in sources.items():
        if not isinstance(given, Mapping | None):
            raise ValueError(f"source {name!r} must be {{path: ..., weight: ...}}, got {given!r}")
        settings = {**(given or {})}
        weight, limit = settings.pop("weight", 1.0), settings.pop("limit", None)
        _check_share(name, weight, limit)
        dataset = settings.pop("dataset", name if name in known else None)
        try:
            rows = native(**settings) if dataset is None else adapted(dataset, **settings)
        except TypeError as error:
            raise ValueError(f"source {name!r}: {error}") from None
        # The ids of a published set begin with its name.
        beginning = "" if dataset is None else f"{dataset}/"
        opened.append((name, islice(rows, limit), weight, beginning))
    if not opened:
        raise ValueError("`sources` is empty; name some, {NAME: {path: ..., weight: 0.5}, ...}")
    for name, rows, weight, beginning in opened:
        for row in rows:
            id = f"{name}/{row.id.removeprefix(beginning)}"
            yield replace(row, id=id, weight=row.weight * weight)


def _check_share(name: str, weight: Any, limit: Any) -> None:
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ValueError(f"source {name!r}: `weight` must be a number, got {weight!r}")
    if not 0.0 <= weight < math.inf:
        raise ValueError(f"source {name!r}: `weight` must be finite and from 0 on, got {weight}")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"source {name!r}: `limit` must be a whole number from 1 on, got {limit}")
