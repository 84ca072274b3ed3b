"""What an adapter is, and how one reads a set.

An adapter says where a set is and what a row of it means. Its `rows` is a pure function: from one
published row to rated responses, pairs or lists, or to `Dropped` with the reason.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from armo.data.conversation import (
    Conversation,
    Message,
    PreferencePair,
    Prompt,
    RatedResponse,
    ResponseList,
)
from armo.data.published import PublishedRow, column_names, open_rows, read_messages
from armo.data.sources import BadRows, DataError, OnBadRow, Paths

logger = logging.getLogger(__name__)

# As people write numbers: Python would also take `nan`, `inf` and `1_000`.
_NUMBER = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)

RowT = TypeVar("RowT", RatedResponse, PreferencePair, ResponseList)


@dataclass(frozen=True, slots=True)
class Dropped:
    """What a published row has instead of a row that can be used."""

    reason: str


@dataclass(frozen=True, slots=True)
class Adapter(Generic[RowT]):
    """How to read one published set.

    Attributes:
        name: Of the set here, `helpsteer2`; the source of its rows.
        id: On the hub.
        columns: Those that `rows` reads; the first row must have them.
        rows: Makes native rows of a published row and an id to begin theirs with. A ValueError
            names the field that is wrong.
        splits: Those that are read.
        files: Words in the names of files in a folder, where they are called otherwise.
        config: Configuration on the hub.
        folder: Folder of the set in its repository.
        objectives: Those that its rows rate.
        unit: Whether ratings are on [0, 1] already, 1 the good end, and not on a scale of raters.
        gather: Puts published rows together that only together make one, before `rows`.
    """

    name: str
    id: str
    columns: tuple[str, ...]
    rows: Callable[[Mapping[str, Any], str], Iterable[RowT | Dropped]]
    splits: tuple[str, ...] = ("train",)
    files: tuple[str, ...] = ()
    config: str | None = None
    folder: str | None = None
    objectives: tuple[str, ...] = ()
    unit: bool = False
    gather: Callable[[Iterator[PublishedRow]], Iterable[PublishedRow]] | None = None

    def read(
        self,
        path: Paths | None = None,
        *,
        revision: str | None = None,
        splits: Sequence[str] | None = None,
        streaming: bool = True,
        on_bad_row: OnBadRow | BadRows = "error",
    ) -> Iterator[tuple[str, RowT]]:
        """Yield native rows with their places. What is left out is counted and logged at the end.

        Args:
            path: As of `open_rows`; the set on the hub, if None.
            revision: On the hub.
            splits: Other splits than those of the adapter.
            streaming: As of `open_rows`.
            on_bad_row: What becomes of a row that cannot be used. One that `gather` needs for
                others stops the reading all the same, and so does a file that cannot be read.
                `BadRows` are told of by the caller, at the end.

        Raises:
            DataError: Naming what is wrong with which row or column.
        """
        path = self.id if path is None else path
        bad = on_bad_row if isinstance(on_bad_row, BadRows) else BadRows(on_bad_row)
        published = self._checked(
            open_rows(
                path,
                splits=(*self.splits, *self.files) if splits is None else splits,
                hub=self.splits if splits is None else splits,
                config=self.config,
                folder=self.folder,
                revision=revision,
                streaming=streaming,
            ),
            f"{path}" if revision is None else f"{path}, revision {revision}",
            bad,
        )
        dropped: Counter[str] = Counter()
        kept = 0
        try:
            for row in published if self.gather is None else self.gather(published):
                try:
                    for native in self.rows(row.fields, f"{self.name}/{row.key}"):
                        if isinstance(native, Dropped):
                            dropped[native.reason] += 1
                        else:
                            kept += 1
                            yield row.place, replace(native, place=row.place)
                except ValueError as error:
                    bad(DataError(f"{row.place}: {error}"))
        finally:  # also where the reader has enough of it
            if dropped:
                reasons = ", ".join(f"{why} ({count})" for why, count in dropped.most_common())
                logger.warning("%s: %d rows; left out: %s", path, kept, reasons)
        if bad is not on_bad_row:
            bad.tell(path, used=kept)

    def _checked(
        self, rows: Iterator[PublishedRow], path: str, bad: BadRows
    ) -> Iterator[PublishedRow]:
        for number, row in enumerate(rows):
            absent = [name for name in self.columns if name not in row.fields]
            if absent and not number:
                raise DataError(
                    f"{path}: no column {', '.join(absent)}, which {self.name} needs; there are "
                    f"{column_names(row.fields)}"
                )
            if absent:
                bad(DataError(f"{row.place}: field `{absent[0]}` is missing"))
                continue
            yield row


def find_adapter(dataset: str | Adapter[RowT], known: Mapping[str, Adapter[RowT]]) -> Adapter[RowT]:
    """Return the adapter of a set that is known by its name, or one of your own.

    Raises:
        ValueError: If there is no set of that name.
    """
    if isinstance(dataset, Adapter):
        return dataset
    if dataset not in known:
        raise ValueError(f"`dataset` is {dataset!r}; there are {', '.join(known)}")
    return known[dataset]


def rated_response(
    adapter: str,
    id: str,
    prompt: str | Prompt,
    response: str | None,
    ratings: Mapping[str, float | None],
    *,
    category: str = "",
) -> RatedResponse | Dropped:
    """Make a rated response, or say why there is none.

    Args:
        adapter: Name of the set, to be the source.
        id: Unique in the set.
        prompt: Messages, or the text of one user turn.
        response: The text that is rated.
        ratings: By objective; None where missing.
        category: Kind of prompt.
    """
    messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    known = {name: rating for name, rating in ratings.items() if rating is not None}
    if not known:
        return Dropped("no rating")
    if not response or not response.strip():
        return Dropped("an empty response")
    if not is_prompt(messages):
        return Dropped("a prompt without a user turn at its end")
    return RatedResponse(id, adapter, Conversation(messages, response), known, category)


def is_prompt(messages: Prompt) -> bool:
    """Whether messages ask for a response: a user's text, and no assistant's at the end."""
    asked = any(message.role == "user" and message.content.strip() for message in messages)
    return asked and messages[-1].role != "assistant"


def text(row: Mapping[str, Any], name: str) -> str:
    """Return a text, empty if it is null.

    Raises:
        ValueError: If it is missing or something else.
    """
    value = _present(row, name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"field `{name}` must be text, got {value!r:.60}")
    return value or ""


def rating(value: Any) -> float | None:
    """Read a rating, or None for what is no number: null, NaN, `N/A`, a comment."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return float(value)


def truth(row: Mapping[str, Any], name: str) -> bool:
    """Read true or false, also 0 or 1, and as CSV files spell them.

    Raises:
        ValueError: If it is missing or something else.
    """
    value = _present(row, name)
    known = {"true": True, "false": False, "1": True, "0": False}
    if str(value).lower() not in known:
        raise ValueError(f"field `{name}` must be true or false, got {value!r:.60}")
    return known[str(value).lower()]


def listed(row: Mapping[str, Any], name: str) -> list[Any]:
    """Return a list, empty if it is null.

    Raises:
        ValueError: If it is missing or something else.
    """
    value = _present(row, name)
    if value is not None and not isinstance(value, list):
        raise ValueError(f"field `{name}` must be a list, got {value!r:.60}")
    return value or []


def objects(row: Mapping[str, Any], name: str, *needed: str) -> list[Mapping[str, Any]]:
    """Return a list of objects that have some fields, empty if it is null.

    Raises:
        ValueError: If it is missing or something else.
    """
    for k, each in enumerate(listed(row, name)):
        if not isinstance(each, Mapping) or not set(needed) <= set(each):
            raise ValueError(f"field `{name}[{k}]` needs {' and '.join(needed)}, got {each!r:.60}")
    return listed(row, name)


def member(row: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return an object, empty if it is null or missing.

    Raises:
        ValueError: If it is something else.
    """
    value = row.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"field `{name}` must be an object, got {value!r:.60}")
    return value or {}


def rated_sides(
    adapter: str,
    id: str,
    sides: Mapping[str, tuple[Any, Any]],
    objective: str,
) -> Iterator[RatedResponse | Dropped]:
    """Make rated responses of whole conversations that end with them.

    Args:
        adapter: Name of the set.
        id: What theirs begin with.
        sides: By the field that it stands in, a list of messages and its rating.
        objective: What is rated.

    Raises:
        ValueError: If a field is no conversation.
    """
    for name, (conversation, given) in sides.items():
        messages = read_messages(conversation, name)
        if not messages or messages[-1].role != "assistant":
            yield Dropped("a conversation without an answer")
            continue
        prompt, answer = messages[:-1], messages[-1].content
        yield rated_response(adapter, f"{id}/{name}", prompt, answer, {objective: rating(given)})


def _present(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise ValueError(f"field `{name}` is missing; there are {column_names(row)}")
    return row[name]
