"""Rows of ArmoRM's own sets, as RLHFlow published them: downloaded folders of Parquet files.

Its merged ratings have `messages` and a column per objective, with labels that are in [0, 1]
already. Its "standard" preference sets have two whole conversations, `chosen` and `rejected`.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from armo.data.conversation import (
    Conversation,
    Message,
    PreferencePair,
    Prompt,
    RatedResponse,
)
from armo.data.objectives import Objective, ObjectiveSet
from armo.data.sources import BUILTIN_FILES, DataError, Paths, data_files, read_rows

logger = logging.getLogger(__name__)


def stream_merged_ratings(path: Paths, *, objectives: ObjectiveSet) -> Iterator[RatedResponse]:
    """Read `RLHFlow/ArmoRM-Multi-Objective-Data-v0.1`: `messages` and a column per objective.

    Its labels are mapped back to the declared scales, so that rescaling them gives the labels. Rows
    without a label, and without an answer, are left out and counted.

    Args:
        path: A file, a folder, or a list of them.
        objectives: Declared under the names of the columns.

    Raises:
        DataError: If a declared objective has no column, or a label is not in [0, 1].
    """
    dropped = 0
    for file, number, place, row in _numbered(path):
        if absent := [name for name in ("messages", *objectives.names) if name not in row]:
            raise DataError(f"{place}: no column {', '.join(absent)}; there are {', '.join(row)}")
        try:
            ratings = {
                objective.name: _rating(row[objective.name], objective)
                for objective in objectives.objectives
                if row[objective.name] is not None
            }
            messages = _messages(row["messages"])
        except ValueError as error:
            raise DataError(f"{place}: {error}") from None
        conversation = _conversation(messages)
        if conversation is None or not ratings:
            dropped += 1
            continue
        yield RatedResponse(
            id=f"{file.name}:{number}",
            source=str(row.get("dataset") or next(iter(ratings)).partition("-")[0]),
            conversation=conversation,
            ratings=ratings,
        )
    if dropped:
        logger.warning("%s: left out %d rows without a label or an answer", path, dropped)


def stream_standard_pairs(
    path: Paths, *, objectives: ObjectiveSet | None = None
) -> Iterator[PreferencePair]:
    """Read `RLHFlow/...-standard` sets: `chosen` and `rejected`, both whole conversations.

    Pairs whose prompts differ, or whose answers are the same or empty, are left out and counted.

    Args:
        path: A file, a folder, or a list of them; the source of a row is the name of the data
            set's folder.
        objectives: Not needed.

    Raises:
        DataError: If a column is missing, or is no list of messages.
    """
    dropped = 0
    for file, number, place, row in _numbered(path):
        if absent := [name for name in ("chosen", "rejected") if name not in row]:
            raise DataError(f"{place}: no column {', '.join(absent)}; there are {', '.join(row)}")
        try:
            chosen, rejected = [
                _conversation(_messages(row[name])) for name in ("chosen", "rejected")
            ]
        except ValueError as error:
            raise DataError(f"{place}: {error}") from None
        if (
            chosen is None
            or rejected is None
            or chosen.prompt != rejected.prompt
            or chosen.response.strip() == rejected.response.strip()
        ):
            dropped += 1
            continue
        source = _source(file)
        yield PreferencePair(
            id=f"{source}/{file.name}:{number}",
            source=source,
            prompt=chosen.prompt,
            chosen=chosen.response,
            rejected=rejected.response,
        )
    if dropped:
        logger.warning(
            "%s: left out %d pairs with two prompts, or with equal or empty answers", path, dropped
        )


def _numbered(path: Paths) -> Iterator[tuple[Path, int, str, dict[str, Any]]]:
    for file in data_files(path, builtin_file=BUILTIN_FILES["ratings"]):
        for number, (place, row) in enumerate(read_rows(file), start=1):
            yield file, number, place, row


def _source(file: Path) -> str:
    """Name the data set: the folder, but for the `data` in which the hub keeps its files."""
    return file.parent.parent.name if file.parent.name == "data" else file.parent.name


def _rating(label: Any, objective: Objective) -> float:
    if isinstance(label, bool):
        label = float(label)
    if not isinstance(label, int | float) or not 0.0 <= label <= 1.0:
        raise ValueError(f"label of {objective.name!r} must be in [0, 1], got {label!r:.60}")
    return min(max(objective.from_unit(label), objective.low), objective.high)


def _messages(value: Any) -> Sequence[Message]:
    if not isinstance(value, list):
        raise ValueError(f"a conversation must be a list of messages, got {value!r:.60}")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(f"a message needs `role` and `content`, got {message!r:.60}")
        messages.append(Message(message["role"], message["content"]))
    return messages


def _conversation(messages: Sequence[Message]) -> Conversation | None:
    """Return what can be read as a prompt and an answer to it."""
    prompt: Prompt = tuple(messages[:-1])
    if not messages or messages[-1].role != "assistant":
        return None
    try:
        return Conversation(prompt, messages[-1].content)
    except ValueError:
        return None
