"""Rows of published sets as they were published: from the hub, or from files and folders.

A set is read from the hub through `datasets`, or from JSON Lines, JSON, Parquet or CSV files, or
from what `datasets` saved with `save_to_disk`. What the fields mean is for their readers to know.
"""

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from armo.data.conversation import Message
from armo.data.sources import (
    SUFFIXES,
    DataError,
    Paths,
    matching_files,
    read_rows,
)

FILES = (*SUFFIXES, ".json", ".json.gz")
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
# As sets on the hub call their splits.
SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev")


class PublishedRow(NamedTuple):
    """A row with its `place`, for messages, and its `key`, the split and the number in it."""

    place: str
    key: str
    fields: dict[str, Any]


def open_rows(
    path: Paths,
    *,
    splits: Sequence[str],
    hub: Sequence[str] | None = None,
    config: str | None = None,
    folder: str | None = None,
    revision: str | None = None,
    streaming: bool = True,
) -> Iterator[PublishedRow]:
    """Yield the rows of a published set, as they are asked for.

    Args:
        path: An id on the hub, or a file, a folder, a pattern (`rows/*.jsonl`), or a list of them.
            Of a folder, the files are read whose names have a split in them as a word
            (`train-00000-of-00002.parquet`), or that are in such a sub-folder; or all, if none has
            the name of any split. What is in the folder itself goes before its `data`.
        splits: Those to read.
        hub: Their names on the hub, if they differ.
        config: Configuration on the hub; in a folder, the sub-folder of that name, if there.
        folder: Folder of the set in its repository, on the hub and here, if there.
        revision: Commit, tag or branch on the hub.
        streaming: Read from the hub row by row; otherwise `datasets` downloads the set once and
            keeps it.

    Raises:
        DataError: If there is no such file, folder or set, or it cannot be read.
    """
    counts: Counter[str] = Counter()
    for entry in [path] if isinstance(path, str) else path:
        rows: Iterable[tuple[str, str, dict[str, Any]]]
        if _is_on_hub(entry):
            rows = chain.from_iterable(
                _hub_rows(
                    entry,
                    split,
                    config=config,
                    folder=folder,
                    revision=revision,
                    streaming=streaming,
                )
                for split in hub or splits
            )
        else:
            rows = _local_rows(entry, splits, folder or config)
        for split, place, row in rows:
            counts[split] += 1
            yield PublishedRow(place, f"{split}/{counts[split]}", row)


def local_files(path: Paths) -> list[Path]:
    """Return all files that rows of a set may be read from; none for a set on the hub.

    Raises:
        DataError: If there is no such file or folder.
    """
    files: list[Path] = []
    for entry in [path] if isinstance(path, str) else path:
        location = Path(entry).expanduser()
        if location.is_dir():
            endings = FILES
            files += sorted(file for file in location.rglob("*") if file.name.endswith(endings))
        elif not _is_on_hub(entry):
            files += _files_of(entry)
    return files


def split_files(folder: Path, splits: Sequence[str]) -> list[tuple[str, Path]]:
    """Return the files of some splits in a folder, or in its `data`, with their splits.

    Args:
        folder: The folder.
        splits: Words in the names of files, or of the sub-folders they are in.
    """
    for base in (folder, folder / "data"):
        named = [
            (match[1], file)
            for entry in _sorted_entries(base)
            if (match := _word(splits).search(entry.name))
            for file in (_row_files(entry) if entry.is_dir() else [entry])
            if _has_rows(file)
        ]
        if named:
            return named
    return []


def column_names(row: Iterable[str]) -> str:
    """Return the names of columns for a message, on one line whatever they hold."""
    return ", ".join(name if name.isprintable() else repr(name) for name in row)


def read_messages(value: Any, name: str) -> tuple[Message, ...]:
    """Read a conversation: a list of `{"role", "content"}`.

    Raises:
        ValueError: Naming the field, if it is none.
    """
    if not isinstance(value, list):
        raise ValueError(f"field `{name}` must be a list of messages, got {value!r:.60}")
    messages = []
    for k, turn in enumerate(value):
        if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
            raise ValueError(f"field `{name}[{k}]` needs `role` and `content`, got {turn!r:.60}")
        if not isinstance(turn["role"], str) or not isinstance(turn["content"], str):
            raise ValueError(f"field `{name}[{k}]`: `role` and `content` must be text")
        try:
            messages.append(Message(turn["role"], turn["content"]))
        except ValueError as error:
            raise ValueError(f"field `{name}[{k}]`: {error}") from None
    return tuple(messages)


def _is_on_hub(path: str) -> bool:
    return (
        not Path(path).expanduser().exists()
        and not path.endswith(FILES)
        and re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None
    )


def _files_of(entry: str) -> list[Path]:
    """Files that are named by their path, or by a pattern."""
    files = matching_files(entry) or [Path(entry).expanduser()]
    for file in files:
        if not file.is_file():
            raise DataError(f"No such file or folder: {file}")
        if not file.name.endswith(FILES):
            raise DataError(f"{file}: needs one of the endings {', '.join(FILES)}")
    return files


def _local_rows(
    entry: str, splits: Sequence[str], within: str | None
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    location = Path(entry).expanduser()
    if not location.is_dir():
        files = [(_stem(file), file) for file in _files_of(entry)]
    elif saved := [n for n in ("dataset_dict.json", "state.json") if (location / n).is_file()]:
        yield from _saved_rows(location, splits, several=saved[0] == "dataset_dict.json")
        return
    else:
        if within is not None and (location / within).is_dir():
            location = location / within
        files = split_files(location, splits) or _other_files(location, splits)
    for split, file in files:
        for place, row in _json_rows(file) if _is_array(file) else read_rows(file):
            yield split, place, row


def _other_files(folder: Path, splits: Sequence[str]) -> list[tuple[str, Path]]:
    """All files of a folder, or of its `data`, unless they are named after other splits."""
    files = _row_files(folder) or _row_files(folder / "data")
    if not files:
        raise DataError(f"{folder}: no {', '.join(FILES)} file in this folder")
    for file in files:
        if _word(SPLIT_NAMES).search(file.name):
            raise DataError(
                f"{folder}: {file.name} is of another split, and no file is named after "
                f"{', '.join(splits)}; name the files to read"
            )
    return [(_stem(file), file) for file in files]


def _word(names: Sequence[str]) -> re.Pattern[str]:
    """A pattern of names that letters and digits do not go on: `train` is not in `trainer`."""
    return re.compile(rf"(?<![A-Za-z0-9])({'|'.join(map(re.escape, names))})(?![A-Za-z0-9])")


def _sorted_entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _row_files(folder: Path) -> list[Path]:
    return [file for file in _sorted_entries(folder) if _has_rows(file)]


def _has_rows(file: Path) -> bool:
    return file.name.endswith(FILES) and file.name not in NOT_ROWS and file.is_file()


def _stem(file: Path) -> str:
    return next(file.name.removesuffix(end) for end in FILES if file.name.endswith(end))


def _is_array(file: Path) -> bool:
    if not file.name.endswith((".json", ".json.gz")):
        return False
    with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as data:
        return bool(data.read(64).lstrip().startswith(b"["))


def _json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as data:
        try:
            rows = json.load(data)
        except (ValueError, EOFError, OSError) as error:
            raise DataError(f"{file}: malformed JSON: {error}") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{file} row {number}: not a JSON object")
        yield f"{file} row {number}", row


def _saved_rows(
    folder: Path, splits: Sequence[str], *, several: bool
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    import datasets

    saved: Any = datasets.load_from_disk(str(folder))
    parts = {name: saved[name] for name in splits if name in saved} if several else {"": saved}
    if not parts:
        raise DataError(f"{folder}: has splits {', '.join(saved)}, not {', '.join(splits)}")
    for name, part in parts.items():
        for number, row in enumerate(part, start=1):
            split = f", split {name}" if name else ""
            yield name or folder.name, f"{folder}{split} row {number}", row


def _hub_rows(
    path: str,
    split: str,
    *,
    config: str | None,
    folder: str | None,
    revision: str | None,
    streaming: bool,
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    import datasets

    number = 0
    try:
        rows = datasets.load_dataset(
            path,
            name=config,
            data_dir=folder,
            split=split,
            revision=revision,
            streaming=streaming,
        )
        for number, row in enumerate(rows, start=1):
            yield split, f"{path}, split {split}, row {number}", row
    except Exception as error:  # of several libraries below, by what went wrong
        said = " ".join(str(error).split())
        scripted = "scripts are no longer supported" in said
        raise DataError(
            f"{path}, split {split}: is neither a file or folder here, nor can it be read from the "
            f"hub after row {number} ({type(error).__name__}: {said:.120}); give "
            f"{'`revision=refs/convert/parquet`, or ' if scripted else ''}a local folder with its "
            f"files as its `path`"
        ) from error
