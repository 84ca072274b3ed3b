"""Writing rows as files, in chunks that are joined in the end: JSON Lines, CSV or Parquet."""

import csv
import gzip
import io
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from armo.data.sources import CSV_SUFFIXES, DataError, read_rows

LINES = (".jsonl", ".jsonl.gz")

Kind = Literal["number", "flag", "text", "numbers", "flags"]
"""What a column holds; any of it may be null."""


class RowFile(ABC):
    """Writes rows to chunks, and makes one file of these."""

    @abstractmethod
    def write(self, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
        """Write a chunk; equal rows give equal bytes."""

    @abstractmethod
    def join(self, chunks: Sequence[Path], path: Path) -> None:
        """Make one file of all chunks, in their order."""


def row_file(name: str, files: Sequence[Path], added: Mapping[str, Kind]) -> RowFile:
    """Choose how to write the rows of some files with columns added.

    Args:
        name: Of the file to write; its ending says the format.
        files: Those that the rows come from.
        added: The columns that are added to each row.

    Raises:
        DataError: If the files have other columns each, where the format wants them to be the same.
        ValueError: If the ending is not known; or one of a table, and not that of all files.
    """
    if name.endswith(LINES):
        return _Lines(compressed=name.endswith(".gz"))
    if name.endswith(CSV_SUFFIXES) and all(file.name.endswith(CSV_SUFFIXES) for file in files):
        return _Csv(_header(files, added), compressed=name.endswith(".gz"))
    if name.endswith(".parquet") and all(file.name.endswith(".parquet") for file in files):
        return _Parquet(_schema(files, added))
    raise ValueError(
        f"`output` must end with {' or '.join(LINES)}, or as all files of `input` do, got {name}"
    )


class _Lines(RowFile):
    def __init__(self, *, compressed: bool) -> None:
        self._compressed = compressed

    def write(self, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
        content = b"".join(_line(row) for row in rows)
        # A file may be made of several compressed ones; without the time, the bytes are the same.
        path.write_bytes(gzip.compress(content, mtime=0) if self._compressed else content)

    def join(self, chunks: Sequence[Path], path: Path) -> None:
        with path.open("wb") as file:
            _append(file, chunks)


class _Csv(RowFile):
    def __init__(self, header: Sequence[str], *, compressed: bool) -> None:
        self._header, self._compressed = header, compressed

    def write(self, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
        cells = [[_cell(row.get(name)) for name in self._header] for row in rows]
        path.write_bytes(self._packed(cells))

    def join(self, chunks: Sequence[Path], path: Path) -> None:
        with path.open("wb") as file:
            file.write(self._packed([self._header]))
            _append(file, chunks)

    def _packed(self, cells: Sequence[Sequence[str]]) -> bytes:
        text = io.StringIO(newline="")
        csv.writer(text).writerows(cells)
        content = text.getvalue().encode()
        return gzip.compress(content, mtime=0) if self._compressed else content


class _Parquet(RowFile):
    def __init__(self, schema: Any) -> None:
        self._schema = schema

    def write(self, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist(list(rows), schema=self._schema)
        pyarrow.parquet.write_table(table, path)

    def join(self, chunks: Sequence[Path], path: Path) -> None:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetWriter(path, self._schema) as file:
            for chunk in chunks:
                file.write_table(pyarrow.parquet.read_table(chunk, schema=self._schema))


def _line(row: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        # Half of a surrogate pair, which only its escape can spell.
        return json.dumps(row).encode() + b"\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _append(file: Any, chunks: Sequence[Path]) -> None:
    for chunk in chunks:
        with chunk.open("rb") as part:
            shutil.copyfileobj(part, file)


def _header(files: Sequence[Path], added: Mapping[str, Kind]) -> list[str]:
    headers = [list(next(read_rows(file), ("", {}))[1]) for file in files]
    if other := [file for file, header in zip(files, headers, strict=True) if header != headers[0]]:
        raise DataError(f"{other[0]}: has other columns than {files[0]}; write them as .jsonl")
    return [*headers[0], *added]


def _schema(files: Sequence[Path], added: Mapping[str, Kind]) -> Any:
    import pyarrow
    import pyarrow.parquet

    # What is said of the columns beside their types is not said of the added ones.
    schemas = [pyarrow.parquet.read_schema(file).remove_metadata() for file in files]
    for file, schema in zip(files, schemas, strict=True):
        if not schema.equals(schemas[0]):
            raise DataError(f"{file}: has other columns than {files[0]}; write them as .jsonl")
    types = {"number": pyarrow.float64(), "flag": pyarrow.bool_(), "text": pyarrow.string()}
    for kind in ("number", "flag"):
        types[f"{kind}s"] = pyarrow.list_(types[kind])
    fields = [pyarrow.field(name, types[kind]) for name, kind in added.items()]
    return pyarrow.schema([*schemas[0], *fields])
