"""Rows of RLHFlow's "standard" preference sets: downloaded folders of Parquet files.

They have two whole conversations, `chosen` and `rejected`.
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
)
from armo.data.objectives import ObjectiveSet
from armo.data.published import read_messages
from armo.data.sources import BUILTIN_FILES, DataError, Paths, data_files, read_rows

logger = logging.getLogger(__name__)


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
                _conversation(read_messages(row[name], name)) for name in ("chosen", "rejected")
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


def _conversation(messages: Sequence[Message]) -> Conversation | None:
    """Return what can be read as a prompt and an answer to it."""
    prompt: Prompt = tuple(messages[:-1])
    if not messages or messages[-1].role != "assistant":
        return None
    try:
        return Conversation(prompt, messages[-1].content)
    except ValueError:
        return None
