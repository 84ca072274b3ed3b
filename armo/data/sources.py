"""Loading rows: JSON Lines, Parquet or CSV files, native or with a map of their columns."""

import csv
import glob
import gzip
import hashlib
import importlib.resources
import json
import logging
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from armo.data.columns import (
    LIST_FIELDS,
    PAIR_FIELDS,
    RATING_FIELDS,
    SCORABLE_FIELDS,
    ColumnMap,
)
from armo.data.conversation import (
    Conversation,
    Message,
    PreferencePair,
    Prompt,
    RatedResponse,
    ResponseList,
    check_text,
)
from armo.data.objectives import ObjectiveSet

BUILTIN = "builtin"
BUILTIN_FILES = {
    "ratings": "ratings.jsonl.gz",
    "pairs": "preferences.jsonl.gz",
    "lists": "counterfactuals.jsonl.gz",
    "benchmark": "counterfactuals.jsonl.gz",
}
CSV_SUFFIXES = (".csv", ".csv.gz")
ARROW = ".arrow"  # what `datasets` writes with `save_to_disk`
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ARROW, *CSV_SUFFIXES)

# The csv module's own limit on a cell, 131,072 characters, is less than a long conversation.
CELL_CHARACTERS = 2**24

SHOWN_ERRORS = 5
"""Rows left out that the log names; it counts them all."""

logger = logging.getLogger(__name__)

RowT = TypeVar("RowT", RatedResponse, PreferencePair, ResponseList)
Paths = str | Sequence[str]


class DataError(ValueError):
    """A data file cannot be used; the message says which file, which row, and why."""


OnBadRow = Literal["error", "skip"] | Callable[[DataError], None]
"""What becomes of a row that cannot be used: `error` stops there; `skip` leaves it out, and says at
the end how many there were and what was wrong with the first ones; a function is given each error.
"""


def load_ratings(
    path: Paths,
    *,
    objectives: ObjectiveSet,
    columns: Mapping[str, Any] | None = None,
    missing: Sequence[str] = ("",),
) -> list[RatedResponse]:
    """Load all that `stream_ratings` yields."""
    return list(stream_ratings(path, objectives=objectives, columns=columns, missing=missing))


def stream_ratings(
    path: Paths,
    *,
    objectives: ObjectiveSet,
    undeclared: Literal["refuse", "leave_out"] = "refuse",
    columns: Mapping[str, Any] | None = None,
    missing: Sequence[str] = ("",),
    on_bad_row: OnBadRow = "error",
) -> Iterator[RatedResponse]:
    """Read rated responses: `{"id", "source", "messages", "ratings"}`, the answer last.

    Ratings are checked against the declared scales but not rescaled; null means missing. A row may
    have a `weight`, 1 by default. Rows are read as they are asked for.

    Args:
        path: A file, a folder (all its files in name order), a pattern (`rows/*.jsonl`), a list of
            them, or `builtin`.
        objectives: The declared objectives; a row may rate any of them.
        undeclared: What to do with a rating on another objective.
        columns: Where the fields stand in rows that are not native; see `ColumnMap`. Then, and in
            CSV files, a row needs no id and no source: its place and its file stand in.
        missing: Cells that say nothing, with `columns` or in CSV files; see `ColumnMap`.
        on_bad_row: What becomes of a row that cannot be used; see `OnBadRow`.

    Raises:
        DataError: Naming file, row and field, at the first row that cannot be used.
        ValueError: If `columns` names a field that rated responses do not have.
    """

    def parse(row: dict[str, Any], place: str) -> RatedResponse:
        messages = _messages(row, "messages")
        if not messages or messages[-1].role != "assistant":
            raise ValueError("the last of `messages` must be the assistant's answer")
        ratings: dict[str, float] = {}
        for name, rating in _field(row, "ratings", dict).items():
            if rating is None or (undeclared == "leave_out" and name not in objectives.names):
                continue
            _check_declared(name, objectives)
            value = _number(rating, f"rating of {name!r:.60}")
            if not math.isfinite(value):
                raise ValueError(f"rating of {name!r} is {value}; leave a missing rating out")
            objectives.objectives[objectives.index(name)].to_unit(rating)
            ratings[name] = value
        return RatedResponse(
            **_common(row, place),
            conversation=Conversation(prompt=messages[:-1], response=messages[-1].content),
            ratings=ratings,
            weight=_weight(row),
        )

    mapped = ColumnMap(RATING_FIELDS, columns, missing)
    return _rows(path, parse, mapped, on_bad_row, builtin_file=BUILTIN_FILES["ratings"])


def load_pairs(
    path: Paths,
    *,
    objectives: ObjectiveSet | None = None,
    columns: Mapping[str, Any] | None = None,
    missing: Sequence[str] = ("",),
) -> list[PreferencePair]:
    """Load all that `stream_pairs` yields."""
    return list(stream_pairs(path, objectives=objectives, columns=columns, missing=missing))


def stream_pairs(
    path: Paths,
    *,
    objectives: ObjectiveSet | None = None,
    judges: Mapping[str, Sequence[str]] | None = None,
    columns: Mapping[str, Any] | None = None,
    missing: Sequence[str] = ("",),
    on_bad_row: OnBadRow = "error",
) -> Iterator[PreferencePair]:
    """Read preference pairs: `{"id", "source", "prompt", "chosen", "rejected", "margin"}`.

    A row may have `judgements`, by objective the probability that `chosen` is better on it (null
    means missing), a `preference`, the probability that it is better on the whole, and a `weight`,
    both 1 by default. Rows are read as they are asked for.

    Args:
        path: A file, a folder (all its files in name order), a pattern (`rows/*.jsonl`), a list of
            them, or `builtin`.
        objectives: The declared objectives; a row may judge any of them. Without, any objective.
        judges: By objective, the sources or categories whose pairs judge it: the preference of
            such a row is its judgement too, unless the row gives one. `safety` names the
            categories `safety` and `safety/...`.
        columns: Where the fields stand in rows that are not native; see `ColumnMap`. Then, and in
            CSV files, a row needs no id and no source: its place and its file stand in.
        missing: Cells that say nothing, with `columns` or in CSV files; see `ColumnMap`.
        on_bad_row: What becomes of a row that cannot be used; see `OnBadRow`.

    Raises:
        DataError: Naming file, row and field, at the first row that cannot be used.
        ValueError: If `judges` names an objective that is not declared, or `columns` a field that
            pairs do not have.
    """
    judges = check_judges(judges, objectives)

    def parse(row: dict[str, Any], place: str) -> PreferencePair:
        judgements: dict[str, float] = {}
        given = row.get("judgements")
        if given is not None and not isinstance(given, dict):
            raise ValueError(f"field `judgements` must be a dict, got {given!r:.60}")
        for name, judgement in (given or {}).items():
            if judgement is None:
                continue
            if objectives is not None:
                _check_declared(name, objectives)
            judgements[name] = _number(judgement, f"judgement of {name!r:.60}")
        common, preference = _common(row, place), 1.0
        if row.get("preference") is not None:
            preference = _number(row["preference"], "`preference`")
        for name in judging(judges, common["source"], common["category"]):
            judgements.setdefault(name, preference)
        return PreferencePair(
            **common,
            prompt=_messages(row, "prompt"),
            chosen=_field(row, "chosen", str),
            rejected=_field(row, "rejected", str),
            margin=None if row.get("margin") is None else _number(row["margin"], "`margin`"),
            judgements=judgements,
            weight=_weight(row),
            preference=preference,
        )

    mapped = ColumnMap(PAIR_FIELDS, columns, missing)
    return _rows(path, parse, mapped, on_bad_row, builtin_file=BUILTIN_FILES["pairs"])


def check_judges(
    judges: Mapping[str, Sequence[str]] | None, objectives: ObjectiveSet | None
) -> Mapping[str, Sequence[str]]:
    """Return `judges` of `stream_pairs`, if they are sources or categories by declared objective.

    Raises:
        ValueError: If they are not.
    """
    judges = {} if judges is None else judges
    if not isinstance(judges, Mapping) or any(isinstance(v, str) for v in judges.values()):
        raise ValueError(
            f"`judges` must be lists of sources or categories by objective, "
            f"{{OBJECTIVE: [SOURCE, ...]}}, got {judges!r}"
        )
    for name in judges:
        if objectives is not None:
            _check_declared(name, objectives)
    return judges


def judging(judges: Mapping[str, Sequence[str]], source: str, category: str) -> list[str]:
    """Return the objectives that pairs of a source and category judge."""
    # `a/b/c` is of the kinds `a`, `a/b` and `a/b/c`.
    parts = category.split("/")
    kinds = {source, *("/".join(parts[:k]) for k in range(1, len(parts) + 1))}
    return [name for name, those in judges.items() if not kinds.isdisjoint(those)]


def load_lists(
    path: Paths,
    *,
    columns: Mapping[str, Any] | None = None,
    missing: Sequence[str] = ("",),
) -> list[ResponseList]:
    """Load all that `stream_lists` yields."""
    return list(stream_lists(path, columns=columns, missing=missing))


def stream_lists(
    path: Paths,
    *,
    columns: Mapping[str, Any] | None = None,
    missing: Sequence[str] = ("",),
    on_bad_row: OnBadRow = "error",
) -> Iterator[ResponseList]:
    """Read response lists: `{"id", "source", "prompt", "responses", "correct", "category"}`.

    A row has either `correct`, the indices of the right responses, or `ranks`, a number per
    response, the lower the better; and may have a `weight`, 1 by default. Rows are read as they
    are asked for.

    Args:
        path: A file, a folder (all its files in name order), a pattern (`rows/*.jsonl`), a list of
            them, or `builtin`, the counterfactual pairs.
        columns: Where the fields stand in rows that are not native; see `ColumnMap`. Then, and in
            CSV files, a row needs no id and no source: its place and its file stand in.
        missing: Cells that say nothing, with `columns` or in CSV files; see `ColumnMap`.
        on_bad_row: What becomes of a row that cannot be used; see `OnBadRow`.

    Raises:
        DataError: Naming file, row and field, at the first row that cannot be used.
        ValueError: If `columns` names a field that lists do not have.
    """
    mapped = ColumnMap(LIST_FIELDS, columns, missing)
    return _rows(path, _response_list, mapped, on_bad_row, builtin_file=BUILTIN_FILES["benchmark"])


def stream_ranked_lists(
    path: Paths,
    *,
    columns: Mapping[str, Any] | None = None,
    missing: Sequence[str] = ("",),
    on_bad_row: OnBadRow = "error",
) -> Iterator[ResponseList]:
    """Read response lists to train on: as `stream_lists`, of two or more distinct responses.

    Args:
        path: A file, a folder (all its files in name order), a pattern (`rows/*.jsonl`), a list of
            them, or `builtin`, the counterfactual pairs, which tie.
        columns: As for `stream_lists`.
        missing: As for `stream_lists`.
        on_bad_row: As for `stream_lists`.

    Raises:
        DataError: Naming file, row and field, at the first row that cannot be used.
        ValueError: If `columns` names a field that lists do not have.
    """

    def parse(raw: dict[str, Any], place: str) -> ResponseList:
        row = _response_list(raw, place)
        if len(row.responses) < 2:
            raise ValueError("`responses` has one response alone; a list to train on needs two")
        places: dict[str, int] = {}
        for k, response in enumerate(row.responses):
            first = places.setdefault(response.strip(), k)
            if first != k:
                raise ValueError(
                    f"`responses[{first}]` and `responses[{k}]` are the same text; drop one of them"
                )
        return row

    mapped = ColumnMap(LIST_FIELDS, columns, missing)
    return _rows(path, parse, mapped, on_bad_row, builtin_file=BUILTIN_FILES["lists"])


@dataclass(frozen=True, slots=True)
class ScorableRow:
    """A prompt with the responses to score; `single` for a conversation, not a list of one."""

    id: str
    prompt: Prompt
    responses: tuple[str, ...]
    single: bool

    @property
    def conversations(self) -> list[list[Message]]:
        """The prompt with each of the responses."""
        return [[*self.prompt, Message("assistant", response)] for response in self.responses]


def load_scorable(
    path: Paths,
    *,
    responses: int | None = None,
    columns: Mapping[str, Any] | None = None,
) -> list[ScorableRow]:
    """Load rows to score: conversations (`messages`), pairs (`chosen`) or lists (`responses`).

    Ratings are not needed, nor an id: the row's number stands in for it.

    Args:
        path: A file, a folder (all its files in name order), or a list of them.
        responses: How many each row must have; any number, if None.
        columns: Where the fields stand in rows that are not native; see `ColumnMap`.

    Raises:
        DataError: Naming file, row and field, at the first row that cannot be scored.
        ValueError: If `columns` names a field that is not scored.
    """
    rows: list[ScorableRow] = []
    for place, _, row in stream_scorable(path, columns=columns):
        if isinstance(row, ScorableRow) and responses not in (None, len(row.responses)):
            row = ValueError(f"needs {responses} responses, has {len(row.responses)}")
        if isinstance(row, ValueError):
            raise DataError(f"{place}: {row}")
        rows.append(row)
    return rows


def stream_scorable(
    path: Paths, *, columns: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, dict[str, Any], ScorableRow | ValueError]]:
    """Yield each row as it is in the file, with its place, and as a row to score or what is wrong.

    Args:
        path: As for `load_scorable`.
        columns: As for `load_scorable`.

    Raises:
        DataError: If there are no rows, or a file cannot be read on.
        ValueError: If `columns` names a field that is not scored.
    """
    mapped = ColumnMap(SCORABLE_FIELDS, columns)
    number = 0
    for file in data_files(path, builtin_file=BUILTIN_FILES["ratings"]):
        for place, raw in read_rows(file):
            row: ScorableRow | ValueError
            try:
                native = mapped.native(raw) if is_mapped(file, mapped) else raw
                row = _scorable(native, number=number)
            except ValueError as error:
                row = error
            number += 1
            yield place, raw, row
    if not number:
        raise DataError(f"{path}: no rows")


def data_files(path: Paths, *, builtin_file: str) -> list[Path]:
    """Resolve `path` to the files to read, in order.

    Raises:
        DataError: If a path does not exist or a folder holds no data file.
    """
    files: list[Path] = []
    for entry in [path] if isinstance(path, str) else path:
        if entry == BUILTIN:
            with importlib.resources.as_file(
                importlib.resources.files("armo.data.builtin").joinpath(builtin_file)
            ) as packaged:
                files.append(packaged)
            continue
        location = Path(entry).expanduser()
        if location.is_dir():
            found = sorted(file for file in location.iterdir() if file.name.endswith(SUFFIXES))
            if not found:
                raise DataError(f"{location}: no {', '.join(SUFFIXES)} file in this folder")
            files += found
        elif location.is_file():
            if not location.name.endswith(SUFFIXES):
                raise DataError(f"{location}: needs one of the endings {', '.join(SUFFIXES)}")
            files.append(location)
        elif matching := matching_files(entry):
            files += data_files([str(file) for file in matching], builtin_file=builtin_file)
        else:
            raise DataError(f"No such file or folder: {location}")
    return files


def matching_files(pattern: str) -> list[Path]:
    """Return what matches a pattern such as `rows/*.jsonl`, in order; `**` is any folders."""
    found = glob.glob(str(Path(pattern).expanduser()), recursive=True)
    return [Path(file) for file in sorted(found)]


def read_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row of a file with its place, `file:line` or `file row n`.

    Rows of CSV files are numbered as spreadsheets do it, the header being row 1; their values are
    texts.

    Raises:
        DataError: At the first line that is not a JSON object, the first CSV row that does not fit
            the header, or for an unreadable file.
    """
    for place, row in try_rows(file):
        if isinstance(row, ValueError):
            raise DataError(f"{place}: {row}")
        yield place, row


def try_rows(file: Path) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """Yield each row with its place, or what is wrong with it where others can be read still."""
    if file.name.endswith(CSV_SUFFIXES):
        yield from _csv_rows(file)
    elif file.name.endswith((".parquet", ARROW)):
        yield from _table_rows(file)
    else:
        yield from _json_rows(file)


def _table_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets
    import pyarrow

    number = 0
    try:
        read = datasets.Dataset.from_file if file.suffix == ARROW else datasets.Dataset.from_parquet
        rows = read(str(file))
        for number, row in enumerate(rows, start=1):
            yield f"{file} row {number}", row
    except (
        datasets.exceptions.DatasetGenerationError,
        pyarrow.ArrowException,
        UnicodeDecodeError,
        OSError,
    ) as error:
        reason = " ".join(str(error).split())
        after = f" after row {number}" if number else ""
        raise DataError(f"{file}: unreadable{after}: {reason}") from None


def _json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    opener = gzip.open if file.suffix == ".gz" else open
    number = 0
    try:
        # As bytes, so that one line in another encoding does not end the file.
        with opener(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row: dict[str, Any] | ValueError
                try:
                    row = _json_row(line)
                except ValueError as error:
                    row = error
                yield f"{file}:{number}", row
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file}: unreadable after line {number}: {error}") from None


def _json_row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_distinct_keys)
    except UnicodeDecodeError as error:
        raise ValueError(f"unreadable: {error}; save it as UTF-8") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"malformed JSON at column {error.colno}: {error.msg}") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def _distinct_keys(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object, unless two of its fields have one name: either could be meant."""
    row = dict(fields)
    if len(row) < len(fields):
        names = [name for name, _ in fields]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r:.60} stands twice in one object; drop one of them")
    return row


def _csv_rows(file: Path) -> Iterator[tuple[str, dict[str, str] | ValueError]]:
    """Yield the rows of a CSV file by column; those that are all empty are left out."""
    csv.field_size_limit(max(csv.field_size_limit(), CELL_CHARACTERS))
    opener = gzip.open if file.suffix == ".gz" else open
    header: list[str] = []
    number = 0
    try:
        # Spreadsheets begin UTF-8 with a mark, and cells may hold line ends of any kind.
        with opener(file, "rt", encoding="utf-8-sig", newline="") as lines:
            for number, cells in enumerate(csv.reader(lines, strict=True), start=1):
                if not any(cell.strip() for cell in cells):
                    continue
                place = f"{file} row {number}"
                if not header:
                    header = _csv_header(cells, place)
                elif len(cells) != len(header):
                    yield (
                        place,
                        ValueError(
                            f"{len(cells)} cells under {len(header)} columns; cells with a comma, "
                            f"a quote or a line end must stand in quotes"
                        ),
                    )
                else:
                    yield place, {k: v for k, v in zip(header, cells, strict=True) if k}
    except csv.Error as error:
        raise DataError(
            f"{file} row {number + 1}: malformed CSV: {error}; is a quote left open?"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: unreadable after row {number}: {error}; save it as UTF-8"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file}: unreadable after row {number}: {error}") from None


def _csv_header(cells: Sequence[str], place: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(names) == 1 and (mark := next((c for c in ";\t|" if c in names[0]), None)):
        raise DataError(f"{place}: columns are separated by {mark!r}; save the file with commas")
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise DataError(f"{place}: column {twice[0]!r} stands there twice; rename one")
    return names


def is_mapped(file: Path, mapped: ColumnMap) -> bool:
    """Whether the rows are to be made native; those of the built-in corpus are."""
    if file.parent == Path(__file__).with_name(BUILTIN):
        return False
    return mapped.columns is not None or file.name.endswith(CSV_SUFFIXES)


def _rows(
    path: Paths,
    parse: Callable[[dict[str, Any], str], RowT],
    mapped: ColumnMap,
    on_bad_row: OnBadRow,
    *,
    builtin_file: str,
) -> Iterator[RowT]:
    bad = BadRows(on_bad_row)
    places: dict[bytes, str] = {}
    for file in data_files(path, builtin_file=builtin_file):
        source = next(file.name.removesuffix(end) for end in SUFFIXES if file.name.endswith(end))
        for place, raw in try_rows(file):
            try:
                if isinstance(raw, ValueError):
                    raise raw
                if is_mapped(file, mapped):
                    raw = {"id": place, "source": source, **mapped.native(raw)}
                row = parse(raw, place)
                # A digest, since ids may be long and rows many.
                key = hashlib.blake2b(row.id.encode(), digest_size=16).digest()
                if key in places:
                    raise ValueError(f"id {row.id!r:.60} stands at {places[key]} already")
            except ValueError as error:
                bad(DataError(f"{place}: {error}"))
                continue
            except RecursionError:
                bad(DataError(f"{place}: a field is nested too deeply"))
                continue
            places[key] = place
            yield row
    bad.tell(path, used=len(places))


class BadRows:
    """Does with rows that cannot be used what was asked for; see `OnBadRow`.

    Attributes:
        count: How many were left out.
        first: What is wrong with the first ones.
    """

    def __init__(self, on_bad_row: OnBadRow) -> None:
        """Start with no rows.

        Raises:
            ValueError: If `on_bad_row` is none of the choices.
        """
        if on_bad_row not in ("error", "skip") and not callable(on_bad_row):
            raise ValueError(f"`on_bad_row` must be error or skip, got {on_bad_row!r}")
        self._choice = on_bad_row
        self.count = 0
        self.first: list[str] = []

    def __call__(self, error: DataError) -> None:
        """Stop at a row, leave it out, or hand on what is wrong with it."""
        if self._choice == "error":
            raise error
        if callable(self._choice):
            self._choice(error)
            return
        self.count += 1
        if len(self.first) < SHOWN_ERRORS:
            self.first.append(str(error))

    def tell(self, path: Paths, *, used: int) -> None:
        """Log what was left out at the end of a set.

        Raises:
            DataError: If no row was used.
        """
        if self.count:
            self._log(path, of=self.count + used)
        if not used:
            bad = f" that can be used; {self.first[0]}" if self.first else ""
            raise DataError(f"{path}: no rows{bad}")

    def _log(self, path: Paths, *, of: int) -> None:
        more = self.count - len(self.first)
        logger.warning(
            "%s: left out %d of %d rows that cannot be used: %s%s",
            path,
            self.count,
            of,
            "; ".join(self.first),
            f"; and {more} more" if more else "",
        )


def _response_list(row: dict[str, Any], place: str) -> ResponseList:
    responses = _field(row, "responses", list)
    if not all(isinstance(response, str) for response in responses):
        raise ValueError("`responses` must be a list of strings")
    correct = ranks = None
    if row.get("ranks") is not None:
        given = _field(row, "ranks", list)
        ranks = tuple(_number(rank, f"`ranks[{k}]`") for k, rank in enumerate(given))
    elif row.get("correct") is None:
        raise ValueError("field `correct` is missing; give it, or `ranks`")
    if row.get("correct") is not None:
        correct = tuple(_field(row, "correct", list))
        if not all(type(index) is int for index in correct):
            raise ValueError("`correct` must be a list of whole numbers")
    return ResponseList(
        **_common(row, place),
        prompt=_messages(row, "prompt"),
        responses=tuple(responses),
        correct=correct,
        ranks=ranks,
        weight=_weight(row),
    )


def _scorable(row: dict[str, Any], *, number: int) -> ScorableRow:
    id = str(number) if row.get("id") is None else str(row["id"])
    check_text(id, "id")
    if "messages" in row:
        messages = _messages(row, "messages")
        if not messages or messages[-1].role != "assistant":
            raise ValueError("the last of `messages` must be the assistant's answer")
        Conversation(messages[:-1], messages[-1].content)
        return ScorableRow(id, messages[:-1], (messages[-1].content,), single=True)
    if "chosen" in row:
        responses = (_field(row, "chosen", str), _field(row, "rejected", str))
    elif "responses" in row:
        responses = tuple(_field(row, "responses", list))
    else:
        raise ValueError("needs `messages`, `chosen` and `rejected`, or `responses`")
    if not responses or not all(isinstance(response, str) for response in responses):
        raise ValueError("`responses` must be a list of strings, at least one")
    prompt = _messages(row, "prompt")
    for response in responses:
        Conversation(prompt, response)
    return ScorableRow(id, prompt, responses, single=False)


def _field(row: Mapping[str, Any], name: str, kind: type[Any]) -> Any:
    if name not in row:
        raise ValueError(f"field `{name}` is missing")
    if not isinstance(row[name], kind):
        raise ValueError(f"field `{name}` must be a {kind.__name__}, got {row[name]!r:.60}")
    if kind is str:
        check_text(row[name], name)
    return row[name]


def _check_declared(name: str, objectives: ObjectiveSet) -> None:
    if name not in objectives.names:
        raise ValueError(
            f"objective {name!r:.60} is not declared; add it to `data.objectives` with its scale"
        )


def _weight(row: Mapping[str, Any]) -> float:
    return 1.0 if row.get("weight") is None else _number(row["weight"], "`weight`")


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is not a number: {value!r:.60}")
    try:
        return float(value)
    except OverflowError:  # JSON has whole numbers of any length
        raise ValueError(f"{name} is too large") from None


def _common(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    split, category = row.get("split"), row.get("category")
    if category is not None and not isinstance(category, str):
        raise ValueError(f"`category` must be text, got {category!r:.60}")
    check_text(category or "", "category")
    if split not in (None, "train", "test"):
        raise ValueError(f"`split` must be train or test, got {split!r:.60}")
    return {
        "id": _field(row, "id", str),
        "source": _field(row, "source", str),
        "category": category or "",
        "split": split,
        "place": place,
    }


def _messages(row: Mapping[str, Any], name: str) -> Prompt:
    messages = []
    for k, message in enumerate(_field(row, name, list)):
        if not isinstance(message, dict):
            raise ValueError(f"`{name}[{k}]` must be an object with `role` and `content`")
        messages.append(
            Message(role=_field(message, "role", str), content=_field(message, "content", str))
        )
    return tuple(messages)
