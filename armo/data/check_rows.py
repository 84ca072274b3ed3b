"""Rows read once: of each what the checks of a data set need, in memory of a fixed size per row."""

import hashlib
import inspect
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, UInt16, UInt64

from armo.data.check_examine import Examiner, Role, TextFacts, examine_apart, start_pool
from armo.data.check_near import BAND_ROWS, BANDS
from armo.data.check_overlap import BenchmarkGrams
from armo.data.check_probe import CHARACTERS, ProbePair
from armo.data.conversation import PreferencePair, RatedResponse, ResponseList, Row, prompt_group
from armo.data.objectives import ObjectiveSet
from armo.data.sources import DataError
from armo.data.surface import SURFACE_FEATURES

KINDS = ("ratings", "pairs", "lists")
PLACES = 20
"""Places that are kept of each kind of fault; the others are only counted."""

BATCH_ROWS = 256
"""Rows that are examined together; of a text that several of them have, once."""

SPLITS = (None, "train", "test")

Facts = Mapping[tuple[Role, str], TextFacts]


@dataclass(slots=True)
class Tally:
    """Counts something, and keeps where it was seen first."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.places) < PLACES:
            self.places.append(place)


@dataclass(frozen=True, eq=False, slots=True)
class RowTable:
    """Rows in reading order, and their responses ("entries"), those of a row side by side.

    Texts are known by their digests, white space folded. `_row` and `_entry` are numbers.

    Attributes:
        places: Where each row was read.
        kind: Of each row, a number in `KINDS`.
        source: Of each row, a number in `sources`.
        split: Of each row, a number in `SPLITS`.
        group: Of each row, the digest of the text by which splits keep rows together.
        prompt: Of each row, the digest of all turns before the answer.
        preference: Of each pair, from 0.5 on; NaN for other rows.
        start: The first entry of each row, and at the end the number of entries.
        entry_row: The row of each entry.
        entry_text: Its digest.
        entry_rank: Lower is better, within its row; NaN for rated responses.
        features: Surface features of each entry.
        words: Length of each entry in words.
        language: Script or language of each entry, a number in `languages`.
        prompt_language: The same of the last user turn, of each row.
        ratings: On [0, 1], a row per rated response, NaN where missing.
        signatures: Of each entry, and `prompt_signatures` of each row; None if near-duplicates are
            not looked for. Zeros where a text is too short to be compared.
        sources: Names.
        languages: Names.
    """

    places: list[str]
    kind: Int64[np.ndarray, " rows"]
    source: Int64[np.ndarray, " rows"]
    split: Int64[np.ndarray, " rows"]
    group: UInt64[np.ndarray, " rows"]
    prompt: UInt64[np.ndarray, " rows"]
    preference: Float[np.ndarray, " rows"]
    start: Int64[np.ndarray, " rows_and_one"]
    entry_row: Int64[np.ndarray, " entries"]
    entry_text: UInt64[np.ndarray, " entries"]
    entry_rank: Float[np.ndarray, " entries"]
    features: Float[np.ndarray, "entries features"]
    words: Float[np.ndarray, " entries"]
    language: Int64[np.ndarray, " entries"]
    prompt_language: Int64[np.ndarray, " rows"]
    ratings: Float[np.ndarray, "rated objectives"]
    signatures: UInt16[np.ndarray, "entries hashes"] | None
    prompt_signatures: UInt16[np.ndarray, "rows hashes"] | None
    sources: tuple[str, ...]
    languages: tuple[str, ...]

    def rows_of(self, kind: str) -> Int64[np.ndarray, " some"]:
        """Return the numbers of the rows of a kind."""
        return np.flatnonzero(self.kind == KINDS.index(kind))

    def place(self, row: Any, field: str = "") -> str:
        """Say where a row stands, and which field is meant."""
        return f"{self.places[int(row)]} `{field}`" if field else self.places[int(row)]

    def field_of(self, entry: Any) -> str:
        """Return the name of the field that a response stands in."""
        row = int(self.entry_row[entry])
        return response_field(KINDS[self.kind[row]], int(entry) - int(self.start[row]))


def response_field(kind: str, number: int) -> str:
    """Return the name of the field that a row's response of this number stands in."""
    if kind == "pairs":
        return ("chosen", "rejected")[number]
    return "messages" if kind == "ratings" else f"responses[{number}]"


class RowReader:
    """Reads streams of rows and keeps of each row what `RowTable` has, not its texts.

    Attributes:
        bad_rows: The rows that cannot be used.
        faults: By what is wrong with a text, the fields where it is.
        overlaps: By benchmark, rows that hold most of one of its texts.
        pairs: A sample of the pairs that are no ties, for the probe.
        judgements: How many pairs judge each objective.
    """

    def __init__(
        self,
        objectives: ObjectiveSet | None = None,
        *,
        near: bool = True,
        benchmark: BenchmarkGrams | None = None,
        sample_pairs: int = 20_000,
        seed: int = 0,
        processes: int = 1,
    ) -> None:
        """Start with no rows.

        Args:
            objectives: The declared objectives; without, there can be no ratings.
            near: Whether to sign texts, to find near-duplicates.
            benchmark: Texts that should not be there.
            sample_pairs: Pairs to keep for the probe.
            seed: Of that choice.
            processes: How many examine texts; with one, this process does.

        Raises:
            ValueError: If `processes` is below one.
        """
        if processes < 1:
            raise ValueError(f"`processes` must be at least 1, got {processes}")
        self.bad_rows = Tally()
        self.faults: dict[str, Tally] = {}
        self.overlaps: dict[str, Tally] = {}
        self.pairs: list[ProbePair] = []
        self.judgements: Counter[str] = Counter()
        declared = () if objectives is None else objectives.objectives
        self._columns = {o.name: (k, o) for k, o in enumerate(declared)}
        self._near = near
        self._examiner = Examiner(near, benchmark)
        self._processes = processes
        self._pool = start_pool(self._examiner, processes) if processes > 1 else None
        self._sample_pairs = sample_pairs
        self._rng = np.random.default_rng(seed)
        self._pairs_seen = 0
        self._places: list[str] = []
        self._numbers = {name: array("q") for name in ("kind", "source", "split", "start", "row")}
        self._numbers |= {name: array("q") for name in ("language", "prompt_language")}
        self._digests = {name: array("Q") for name in ("group", "prompt", "text")}
        self._floats = {name: array("f") for name in ("rank", "features", "ratings", "preference")}
        self._signatures = {name: bytearray() for name in ("entries", "prompts")}
        self._sources: dict[str, int] = {}
        self._languages: dict[str, int] = {"": 0}

    def read(self, kind: str, stream: Callable[..., Iterable[Row]], **options: Any) -> None:
        """Read all rows of a stream; what is wrong with those that cannot be used is kept.

        Args:
            kind: One of `KINDS`.
            stream: A function that yields rows. Where it takes `on_bad_row`, it reads on after a
                row that cannot be used; otherwise that row is the last.
            options: Its arguments.

        Raises:
            DataError: If nothing can be read.
        """
        if "on_bad_row" in inspect.signature(stream).parameters:
            options["on_bad_row"] = lambda error: self.bad_rows.add(str(error))
        self.add(kind, self._until_error(stream(**options)))

    def _until_error(self, rows: Iterable[Row]) -> Iterator[Row]:
        count = 0
        try:
            for count, row in enumerate(rows, start=1):  # noqa: B007 (read below)
                yield row
        except DataError as error:
            if not count and not self.bad_rows.count:
                raise  # no such file, no access: nothing to check
            if not self.bad_rows.count or "no rows" not in str(error):
                self.bad_rows.add(f"{error}; what follows was not read")

    def add(self, kind: str, rows: Iterable[Row]) -> None:
        """Keep what is needed of some rows."""
        for batch, facts in self._examined(_batches(rows)):
            for row in batch:
                self._keep(kind, row, facts)

    def _examined(self, batches: Iterable[list[Row]]) -> Iterator[tuple[list[Row], Facts]]:
        """Yield batches in their order with what is found in their texts."""
        if self._pool is None:
            for batch in batches:
                texts = _texts(batch)
                yield batch, dict(zip(texts, self._examiner(texts), strict=True))
            return
        waiting: deque[tuple[list[Row], list[tuple[Role, str]], Any]] = deque()
        for batch in batches:
            texts = _texts(batch)
            waiting.append((batch, texts, self._pool.submit(examine_apart, texts)))
            if len(waiting) > 2 * self._processes:
                first, keys, found = waiting.popleft()
                yield first, dict(zip(keys, found.result(), strict=True))
        for first, keys, found in waiting:
            yield first, dict(zip(keys, found.result(), strict=True))

    def _keep(self, kind: str, row: Row, facts: Facts) -> None:
        number = len(self._places)
        self._places.append(row.place or f"{row.source} row {row.id!r}")
        n, digests, floats = self._numbers, self._digests, self._floats
        n["kind"].append(KINDS.index(kind))
        n["source"].append(self._sources.setdefault(row.source, len(self._sources)))
        n["split"].append(SPLITS.index(row.split))
        n["start"].append(len(n["row"]))
        # As `GroupSplits` does, so that the side of the split follows.
        group = hashlib.sha256(prompt_group(row.prompt).encode()).digest()
        digests["group"].append(int.from_bytes(group[:8], "big"))
        turns = "\x1f".join(f"{turn.role}\x1e{turn.content}" for turn in row.prompt)
        digests["prompt"].append(_digest(turns))
        last = next(turn.content for turn in reversed(row.prompt) if turn.role == "user")
        n["prompt_language"].append(self._language(facts["turn", last]))
        preference, ranks = float("nan"), [float("nan")] * len(row.responses)
        if isinstance(row, PreferencePair):
            preference = row.preference
            ranks = [0.0, 0.0 if row.preference == 0.5 else 1.0]
            self.judgements.update(row.judgements)
            self._sample(number, row)
        elif isinstance(row, ResponseList):
            ranks = list(row.ranking)
        elif isinstance(row, RatedResponse):
            values = array("f", [float("nan")]) * len(self._columns)
            for name, rating in row.ratings.items():
                column, objective = self._columns[name]
                values[column] = objective.to_unit(rating)
            floats["ratings"].extend(values)
        floats["preference"].append(preference)
        floats["rank"].extend(ranks)
        for text in row.responses:
            n["row"].append(number)
            digests["text"].append(_digest(text))
            found = facts["response", text]
            n["language"].append(self._language(found))
            floats["features"].frombytes(found.features)
            self._signatures["entries"] += found.signature
        self._signatures["prompts"] += facts["group", prompt_group(row.prompt)].signature
        self._count_faults(kind, row, facts)

    def finish(self) -> RowTable:
        """Return what was kept; no more rows can be added."""
        if self._pool is not None:
            self._pool.shutdown()
        integers, digests, floats = (
            {name: np.frombuffer(values, dtype) for name, values in arrays.items()}
            for arrays, dtype in (
                (self._numbers, np.int64),
                (self._digests, np.uint64),
                (self._floats, np.float32),
            )
        )
        features = floats["features"].reshape(-1, len(SURFACE_FEATURES))
        signatures = {
            name: np.frombuffer(a, dtype=np.uint16).reshape(-1, BANDS * BAND_ROWS)
            for name, a in self._signatures.items()
        }
        rated = int((integers["kind"] == 0).sum())
        return RowTable(
            places=self._places,
            kind=integers["kind"],
            source=integers["source"],
            split=integers["split"],
            group=digests["group"],
            prompt=digests["prompt"],
            preference=floats["preference"],
            start=np.r_[integers["start"], len(integers["row"])],
            entry_row=integers["row"],
            entry_text=digests["text"],
            entry_rank=floats["rank"],
            features=features,
            words=np.expm1(features[:, SURFACE_FEATURES.index("log_length")]),
            language=integers["language"],
            prompt_language=integers["prompt_language"],
            ratings=floats["ratings"].reshape(rated, len(self._columns)),
            signatures=signatures["entries"] if self._near else None,
            prompt_signatures=signatures["prompts"] if self._near else None,
            sources=tuple(self._sources),
            languages=tuple(self._languages),
        )

    def _count_faults(self, kind: str, row: Row, facts: Facts) -> None:
        for role, where, text in _fields(kind, row):
            found, place = facts[role, text], f"{self._places[-1]} `{where}`"
            for name in found.faults:
                self.faults.setdefault(name, Tally()).add(place)
            for name, what in found.overlaps:
                self.overlaps.setdefault(name, Tally()).add(f"{place} has {what}")

    def _sample(self, number: int, row: PreferencePair) -> None:
        """Keep each pair so far with the same probability; a tie says nothing to learn from."""
        if row.preference == 0.5:
            return
        self._pairs_seen += 1
        place = len(self.pairs)
        if place == self._sample_pairs:
            place = int(self._rng.integers(self._pairs_seen))
        if place < self._sample_pairs:
            group = hashlib.sha256(prompt_group(row.prompt).encode()).hexdigest()
            texts = (text[:CHARACTERS] for text in row.responses)
            self.pairs[place : place + 1] = [ProbePair(number, group, *texts)]

    def _language(self, found: TextFacts) -> int:
        return self._languages.setdefault(found.language, len(self._languages))


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _texts(rows: Sequence[Row]) -> list[tuple[Role, str]]:
    """Return the distinct texts of some rows, with their roles."""
    texts: dict[tuple[Role, str], None] = {}
    for row in rows:
        texts["group", prompt_group(row.prompt)] = None
        texts.update(dict.fromkeys(("turn", turn.content) for turn in row.prompt))
        texts.update(dict.fromkeys(("response", text) for text in row.responses))
    return list(texts)


def _fields(kind: str, row: Row) -> Iterator[tuple[Role, str, str]]:
    """Yield the texts of a row with their roles and the fields that they stand in."""
    prompt = "messages" if kind == "ratings" else "prompt"
    for k, turn in enumerate(row.prompt):
        yield "turn", f"{prompt}[{k}].content", turn.content
    for k, text in enumerate(row.responses):
        field = f"messages[{len(row.prompt)}].content"
        yield "response", field if kind == "ratings" else response_field(kind, k), text


def _digest(text: str) -> int:
    folded = " ".join(text.split()).encode()
    return int.from_bytes(hashlib.blake2b(folded, digest_size=8).digest(), "little")
