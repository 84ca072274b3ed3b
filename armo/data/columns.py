"""Column maps: rows of spreadsheets and of other tables, made native."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SHARED = ("id", "source", "category", "split", "weight")
RATING_FIELDS = (*_SHARED, "messages", "prompt", "response", "ratings")
PAIR_FIELDS = (*_SHARED, "prompt", "chosen", "rejected", "margin", "preference", "judgements")
LIST_FIELDS = (*_SHARED, "prompt", "responses", "correct", "ranks")
SCORABLE_FIELDS = ("id", "messages", "prompt", "response", "chosen", "rejected", "responses")

_TEXTS = ("prompt", "response", "chosen", "rejected")
_NUMBERS = ("weight", "margin", "preference")
_BY_OBJECTIVE = ("ratings", "judgements")
_LISTS = ("responses", "ranks")

# As people write numbers: Python would also take `nan`, `inf` and `1_000`.
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class ColumnMap:
    """Where the fields of a native row stand in the rows of a file.

    Attributes:
        fields: Those that a row of this kind can have. `prompt` may be the text of one user turn;
            with `response` it stands for `messages`.
        columns: By field, its column; of `ratings` and `judgements` also a column by objective, of
            `responses` and `ranks` also a list of columns. What is not named is not read. None for
            the columns that have the fields' own names.
        missing: Cells that say nothing, white space around them aside: no rating, no id, and so
            on, as null does.

    Example:
        >>> columns = {"prompt": "question", "response": "answer", "ratings": {"clarity": "clear"}}
        >>> row = {"question": "Why?", "answer": "Because.", "clear": "4", "comment": "good"}
        >>> ColumnMap(RATING_FIELDS, columns).native(row)["ratings"]
        {'clarity': 4.0}
    """

    fields: tuple[str, ...]
    columns: Mapping[str, Any] | None = None
    missing: Sequence[str] = ("",)

    def __post_init__(self) -> None:
        if isinstance(self.missing, str) or not all(isinstance(m, str) for m in self.missing):
            raise ValueError(f"`missing` must be a list of texts, got {self.missing!r:.60}")
        if self.columns is None:
            return
        if not isinstance(self.columns, Mapping) or not self.columns:
            raise ValueError(f"`columns` must be {{FIELD: COLUMN, ...}}, got {self.columns!r:.60}")
        if unknown := [field for field in self.columns if field not in self.fields]:
            raise ValueError(
                f"`columns` names {', '.join(unknown)}; the fields are {', '.join(self.fields)}"
            )
        for field, column in self.columns.items():
            _check_column(field, column)
        if "messages" in self.columns and {"prompt", "response"} & {*self.columns}:
            raise ValueError("`columns` has both `messages` and `prompt` or `response`; keep one")
        responses, ranks = self.columns.get("responses"), self.columns.get("ranks")
        listed = [len(each) for each in (responses, ranks) if not isinstance(each, str | None)]
        if ranks is not None and listed and listed != [len(ranks)] * 2:
            raise ValueError("`columns` must have as many columns for `ranks` as for `responses`")
        if listed and "correct" in self.columns:
            # Its numbers would mean others where a response is missing.
            raise ValueError("`columns` has a list of `responses`; give `ranks`, not `correct`")

    def native(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Make a native row, without the fields that are missing.

        Args:
            row: A value by column; texts, if it comes from a CSV file.

        Raises:
            ValueError: Naming the column that is not there, or that cannot be read.
        """
        columns = self.columns
        if columns is None:
            columns = {field: field for field in self.fields if field in row}
        named = [column for each in columns.values() for column in _columns_of(each)]
        there = ", ".join(map(repr, row))
        if absent := sorted({column for column in named if column not in row}):
            raise ValueError(f"no column {', '.join(map(repr, absent))}; there are {there}")
        native = {field: self._value(row, field, column) for field, column in columns.items()}
        if "responses" in columns and not isinstance(columns["responses"], str):
            self._drop_missing_responses(native, columns)
        native = {field: value for field, value in native.items() if value is not None}
        if "prompt" in native:
            native["prompt"] = _turns(native["prompt"], columns["prompt"])
        if "response" in native and "prompt" in native:
            answer = {"role": "assistant", "content": native.pop("response")}
            native["messages"] = [*native.pop("prompt"), answer]
        if {"messages", "chosen", "responses"}.isdisjoint(native):
            texts = [field for field in (*_TEXTS, "responses") if field in self.fields]
            raise ValueError(
                f"no {', '.join(texts)}; say in `columns` where they stand, there are {there}"
            )
        return native

    def _value(self, row: Mapping[str, Any], field: str, column: Any) -> Any:
        if isinstance(column, Mapping):
            return {name: self._number(row, each) for name, each in column.items()}
        if not isinstance(column, str):
            read = self._number if field == "ranks" else self._optional
            return [read(row, each) for each in column]
        if field in _NUMBERS:
            return self._number(row, column)
        if field in _TEXTS:
            value = row[column]
            if value is None or (isinstance(value, str) and not value.strip()):
                raise ValueError(f"column {column!r} is empty")
            return value
        value = self._optional(row, column)
        # Tables number their rows.
        return str(value) if field == "id" and type(value) is int else value

    def _optional(self, row: Mapping[str, Any], column: str) -> Any:
        value = row[column]
        return None if isinstance(value, str) and value.strip() in self.missing else value

    def _number(self, row: Mapping[str, Any], column: str) -> Any:
        value = self._optional(row, column)
        if not isinstance(value, str):
            return value
        if not _NUMBER.fullmatch(value.strip()):
            raise ValueError(
                f"column {column!r}: {value!r:.60} is not a number; add it to `missing` if it "
                f"stands for none"
            )
        return float(value)

    def _drop_missing_responses(self, native: dict[str, Any], columns: Mapping[str, Any]) -> None:
        """Leave out empty cells of a list of response columns, and their ranks."""
        there = [response is not None for response in native["responses"]]
        ranks = native.get("ranks") or [None] * len(there)
        for response, rank, first, second in zip(
            there, ranks, columns["responses"], columns.get("ranks") or there, strict=True
        ):
            if "ranks" in native and response is not (rank is not None):
                empty, other = (second, first) if response else (first, second)
                raise ValueError(f"column {empty!r} is empty, and {other!r} is not")
        for field in {"responses", "ranks"} & {*native}:
            kept = zip(native[field], there, strict=True)
            native[field] = [value for value, present in kept if present]


def _columns_of(column: Any) -> Sequence[str]:
    if isinstance(column, str):
        return [column]
    return [*column.values()] if isinstance(column, Mapping) else column


def _check_column(field: str, column: Any) -> None:
    needed = "the name of a column"
    allowed = isinstance(column, str)
    if field in _BY_OBJECTIVE:
        needed += ", or {OBJECTIVE: COLUMN, ...}"
        allowed = allowed or (
            isinstance(column, Mapping) and all(isinstance(each, str) for each in column.values())
        )
    elif field in _LISTS:
        needed += ", or a list of them"
        allowed = allowed or (
            isinstance(column, Sequence) and all(isinstance(each, str) for each in column)
        )
    if not allowed:
        raise ValueError(f"`columns.{field}` must be {needed}, got {column!r:.60}")


def _turns(prompt: Any, column: str) -> Sequence[Any]:
    """Return a prompt as messages; a text is one user turn."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        raise ValueError(
            f"column {column!r} must be text or a list of messages, got {prompt!r:.60}"
        )
    return prompt
