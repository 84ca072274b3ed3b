"""One pass over the rows: distinct texts go to disk, numbers that point to them stay."""

import hashlib
import json
import logging
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from armo.artifacts import naming, read_tensors, write_tensors
from armo.data.checks import GroupSplits
from armo.data.conversation import (
    Message,
    PreferencePair,
    Prompt,
    RatedResponse,
    ResponseList,
    Row,
)
from armo.data.objectives import Objective, ObjectiveSet
from armo.data.sources import DataError
from armo.embed.boundary import PromptGroup
from armo.embed.store import Shard

PROMPTS = "prompts.jsonl"
RESPONSES = "responses.jsonl"
OFFSETS = "texts.safetensors"
DIGEST_BYTES = 16
SHOWN_PLACES = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, slots=True)
class IndexedRows:
    """Where the rows of each kind find their texts; see `RowTables`."""

    group_of_prompt: Int[Tensor, " prompts"]
    test_of_group: Bool[Tensor, " groups"]
    ratings_response: Int[Tensor, " ratings"]
    ratings: Float[Tensor, "ratings objectives"]
    ratings_weight: Float[Tensor, " ratings"]
    ratings_source: Int[Tensor, " ratings"]
    pairs_chosen: Int[Tensor, " pairs"]
    pairs_rejected: Int[Tensor, " pairs"]
    pairs_category: Int[Tensor, " pairs"]
    pairs_judgements: Float[Tensor, "pairs objectives"]
    pairs_weight: Float[Tensor, " pairs"]
    pairs_source: Int[Tensor, " pairs"]
    pairs_preference: Float[Tensor, " pairs"]
    pairs_margin: Float[Tensor, " pairs"]
    lists_response: Int[Tensor, " list_responses"]
    lists_of: Int[Tensor, " list_responses"]
    lists_rank: Float[Tensor, " list_responses"]
    lists_category: Int[Tensor, " lists"]
    lists_weight: Float[Tensor, " lists"]
    lists_source: Int[Tensor, " lists"]
    lists_benchmark: Bool[Tensor, " lists"]
    categories: tuple[str, ...]
    sources: tuple[str, ...]
    unused_lists: int


@dataclass(frozen=True, eq=False, slots=True)
class TextSpool:
    """Distinct prompts and responses on disk, the responses to one prompt side by side.

    Attributes:
        folder: Where the texts are.
        prompt_offsets: Where each prompt begins in its file.
        response_offsets: Where each response begins in its file.
        response_bytes: Length of each response with its prompt.
        prompt_of_response: Prompt of each response; ascending.
        prompt_digests: Digest of each prompt's text.
        response_digests: Digest of each response's text.
    """

    folder: Path
    prompt_offsets: Int[Tensor, " prompts"]
    response_offsets: Int[Tensor, " responses"]
    response_bytes: Int[Tensor, " responses"]
    prompt_of_response: Int[Tensor, " responses"]
    prompt_digests: Tensor
    response_digests: Tensor

    @classmethod
    def load(cls, folder: Path) -> "TextSpool":
        """Load what `index_rows` wrote into the folder."""
        return cls(folder, **read_tensors(folder / OFFSETS))

    def save(self) -> None:
        """Save the numbers beside the texts."""
        write_tensors(
            self.folder / OFFSETS,
            {f.name: getattr(self, f.name) for f in fields(self) if f.name != "folder"},
        )

    def shards(self, *, shard_rows: int) -> tuple[Shard, ...]:
        """Cut the texts into shards of about `shard_rows` responses, between prompts."""
        counts = torch.bincount(self.prompt_of_response, minlength=len(self.prompt_offsets))
        shards: list[Shard] = []
        prompt = response = prompts = responses = 0
        for count in counts.tolist():
            prompts, responses = prompts + 1, responses + count
            last = prompt + prompts == len(counts)
            if responses >= shard_rows or last:
                digest = hashlib.sha256()
                digest.update(self.prompt_digests[prompt : prompt + prompts].numpy().tobytes())
                stop = response + responses
                digest.update(self.response_digests[response:stop].numpy().tobytes())
                digest.update(counts[prompt : prompt + prompts].numpy().tobytes())
                shards.append(Shard(prompts, responses, digest.hexdigest()))
                prompt, response = prompt + prompts, stop
                prompts = responses = 0
        return tuple(shards)

    def prompt(self, number: int) -> Prompt:
        """Read a prompt."""
        with (self.folder / PROMPTS).open("rb") as file:
            return _read_prompt(file, int(self.prompt_offsets[number]))

    def responses(self, numbers: Sequence[int]) -> list[tuple[str, str]]:
        """Read responses, each with the id of the first row that has it."""
        with (self.folder / RESPONSES).open("rb") as file:
            lines = [_line(file, offset) for offset in self.response_offsets[numbers].tolist()]
        return [(line["text"], line["row"]) for line in lines]

    def groups(self, prompts: range, responses: range) -> list[PromptGroup]:
        """Read the prompts of a shard with the responses to them."""
        texts: dict[int, list[str]] = {prompt: [] for prompt in prompts}
        numbers = list(responses)
        owners = self.prompt_of_response[responses.start : responses.stop].tolist()
        for owner, (text, _) in zip(owners, self.responses(numbers), strict=True):
            texts[owner].append(text)
        with (self.folder / PROMPTS).open("rb") as file:
            offsets = self.prompt_offsets[prompts.start : prompts.stop].tolist()
            turns = [_read_prompt(file, offset) for offset in offsets]
        return [
            PromptGroup(prompt, tuple(texts[number]))
            for number, prompt in zip(prompts, turns, strict=True)
        ]


class RowIndexer:
    """Numbers the distinct texts of a stream of rows, and writes each of them to disk once.

    What stays in memory is about 400 bytes per distinct text, and per row 8 for each objective.
    """

    def __init__(
        self, folder: Path, objectives: ObjectiveSet | None = None, *, test_fraction: float = 0.5
    ) -> None:
        """Start with no rows; texts go to files in `folder`. Lists alone need no objectives."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.splits = GroupSplits(test_fraction)
        declared = () if objectives is None else objectives.objectives
        self._columns = {o.name: (k, o) for k, o in enumerate(declared)}
        self._prompts = _Texts(folder / PROMPTS)
        self._responses = _Texts(folder / RESPONSES)
        self._group_of_prompt = array("q")
        self._prompt_of_response = array("q")
        self._trains = bytearray()
        self._benchmark_places: list[str] = []
        self._categories: dict[str, int] = {}
        self._sources: dict[str, int] = {}
        self._ratings = array("d")
        self._judgements = array("d")
        self._preferences = array("d")
        self._margins = array("d")
        self._ranks = array("d")
        self._weights = {kind: array("d") for kind in ("ratings", "pairs", "lists")}
        self._numbers = {
            name: array("q")
            for name in (
                "rated",
                "rated_source",
                "chosen",
                "rejected",
                "paired",
                "paired_source",
                "listed",
                "of",
                "list_category",
                "list_source",
                "list_group",
                "list_benchmark",
            )
        }

    def add_ratings(self, rows: Iterable[RatedResponse]) -> None:
        """Add rated responses."""
        for row in rows:
            self._numbers["rated"].extend(self._add(row)[0])
            self._numbers["rated_source"].append(self._source(row))
            self._weights["ratings"].append(row.weight)
            values = array("d", [float("nan")]) * len(self._columns)
            for name, rating in row.ratings.items():
                column, objective = self._column(name, row)
                values[column] = objective.to_unit(rating)
            self._ratings.extend(values)

    def add_pairs(self, rows: Iterable[PreferencePair]) -> None:
        """Add preference pairs."""
        for row in rows:
            chosen, rejected = self._add(row)[0]
            self._numbers["chosen"].append(chosen)
            self._numbers["rejected"].append(rejected)
            self._numbers["paired"].append(self._category(row))
            self._numbers["paired_source"].append(self._source(row))
            self._weights["pairs"].append(row.weight)
            self._preferences.append(row.preference)
            self._margins.append(float("nan") if row.margin is None else row.margin)
            values = array("d", [float("nan")]) * len(self._columns)
            for name, judgement in row.judgements.items():
                values[self._column(name, row)[0]] = judgement
            self._judgements.extend(values)

    def add_lists(self, rows: Iterable[ResponseList]) -> None:
        """Add response lists to train on, or to test what was trained."""
        self._add_lists(rows, benchmark=False)

    def add_benchmark(self, rows: Iterable[ResponseList]) -> None:
        """Add response lists to test on; those on training prompts are dropped at the end."""
        self._add_lists(rows, benchmark=True)

    def _add_lists(self, rows: Iterable[ResponseList], *, benchmark: bool) -> None:
        for row in rows:
            numbers, group = self._add(row, trains=not benchmark)
            if benchmark:
                self._benchmark_places.append(row.place or repr(row.id))
            self._numbers["of"].extend([len(self._numbers["list_group"])] * len(numbers))
            self._numbers["listed"].extend(numbers)
            self._ranks.extend(row.ranking)
            self._numbers["list_category"].append(self._category(row))
            self._numbers["list_source"].append(self._source(row))
            self._weights["lists"].append(row.weight)
            self._numbers["list_benchmark"].append(benchmark)
            self._numbers["list_group"].append(group)

    def close(self) -> None:
        """Close the files; no more rows can be added."""
        self._prompts.close()
        self._responses.close()

    def finish(self) -> tuple[TextSpool, IndexedRows]:
        """Number the texts that are used, responses to one prompt side by side, and save them."""
        self.close()
        n = {name: _tensor(values) for name, values in self._numbers.items()}
        test_of_group = torch.tensor(self.splits.test(), dtype=torch.bool)
        # Of a benchmark, lists on training prompts would be embedded in vain.
        benchmark = n["list_benchmark"] == 1
        list_used = test_of_group[n["list_group"]] | ~benchmark
        self._warn_of_training_prompts(n["list_group"][benchmark])
        entry_used = list_used[n["of"]]
        prompt_of = _tensor(self._prompt_of_response)
        used = torch.zeros(len(prompt_of), dtype=torch.bool)
        for numbers in (n["rated"], n["chosen"], n["rejected"], n["listed"][entry_used]):
            used[numbers] = True
        order = used.nonzero()[:, 0]
        order = order[prompt_of[order].sort(stable=True).indices]
        prompts = prompt_of[order].unique()
        new_response = _inverse(order, len(used))
        new_prompt = _inverse(prompts, len(self._group_of_prompt))
        spool = TextSpool(
            self.folder,
            prompt_offsets=_tensor(self._prompts.offsets)[prompts],
            response_offsets=_tensor(self._responses.offsets)[order],
            response_bytes=self._responses.sizes()[order] + self._prompts.sizes()[prompt_of[order]],
            prompt_of_response=new_prompt[prompt_of[order]],
            prompt_digests=self._prompts.digests()[prompts],
            response_digests=self._responses.digests()[order],
        )
        spool.save()
        categories, new_category = _by_name(self._categories)
        sources, new_source = _by_name(self._sources)
        return spool, IndexedRows(
            group_of_prompt=_tensor(self._group_of_prompt)[prompts],
            test_of_group=test_of_group,
            ratings_response=new_response[n["rated"]],
            ratings=_tensor(self._ratings).reshape(len(n["rated"]), len(self._columns)),
            ratings_weight=_tensor(self._weights["ratings"]),
            ratings_source=new_source[n["rated_source"]],
            pairs_chosen=new_response[n["chosen"]],
            pairs_rejected=new_response[n["rejected"]],
            pairs_category=new_category[n["paired"]],
            pairs_judgements=_tensor(self._judgements).reshape(
                len(n["chosen"]), len(self._columns)
            ),
            pairs_weight=_tensor(self._weights["pairs"]),
            pairs_source=new_source[n["paired_source"]],
            pairs_preference=_tensor(self._preferences),
            pairs_margin=_tensor(self._margins),
            lists_response=new_response[n["listed"][entry_used]],
            lists_of=_inverse(list_used.nonzero()[:, 0], len(list_used))[n["of"][entry_used]],
            lists_rank=_tensor(self._ranks)[entry_used],
            lists_category=new_category[n["list_category"][list_used]],
            lists_weight=_tensor(self._weights["lists"])[list_used],
            lists_source=new_source[n["list_source"][list_used]],
            lists_benchmark=benchmark[list_used],
            categories=categories,
            sources=sources,
            unused_lists=int((~list_used).sum()),
        )

    def _warn_of_training_prompts(self, groups: Int[Tensor, " lists"]) -> None:
        """Name the lists of the benchmark, of these groups, whose prompts are trained on."""
        test = self.splits.test()
        places = [
            place
            for place, group in zip(self._benchmark_places, groups.tolist(), strict=True)
            if self._trains[group] and not test[group]
        ]
        if places:
            logger.warning(
                "%d lists of the benchmark ask what training rows ask, and are left out: %s%s",
                len(places),
                "; ".join(places[:SHOWN_PLACES]),
                "; ..." if len(places) > SHOWN_PLACES else "",
            )

    def _add(self, row: Row, *, trains: bool = True) -> tuple[list[int], int]:
        """Return the number of each response of a row, and of the row's split group."""
        group = self.splits.add(row)
        if group == len(self._trains):
            self._trains.append(0)
        self._trains[group] |= trains
        turns = [[message.role, message.content] for message in row.prompt]
        prompt = self._prompts.add(turns)
        if prompt == len(self._group_of_prompt):
            self._group_of_prompt.append(group)
        numbers = []
        for text in row.responses:
            # By the prompt's text, not its number: that changes with the rows before it.
            number = self._responses.add([turns, text], {"row": row.id, "text": text})
            if number == len(self._prompt_of_response):
                self._prompt_of_response.append(prompt)
            numbers.append(number)
        return numbers, group

    def _category(self, row: PreferencePair | ResponseList) -> int:
        return self._categories.setdefault(row.category, len(self._categories))

    def _source(self, row: Row) -> int:
        return self._sources.setdefault(row.source, len(self._sources))

    def _column(self, name: str, row: Row) -> tuple[int, Objective]:
        if name not in self._columns:
            raise DataError(
                f"row {row.id!r}: objective {name!r} is not declared; add it to `data.objectives`"
            )
        return self._columns[name]


class _Texts:
    """A file of distinct texts, one JSON value per line."""

    def __init__(self, path: Path) -> None:
        self.offsets = array("q")
        self._path = path
        self._file = path.open("wb")
        self._end = 0
        self._numbers: dict[bytes, int] = {}

    def add(self, key: Any, line: Any = None) -> int:
        """Write what `key` stands for, unless it is there already; return its number."""
        text = json.dumps(key, ensure_ascii=False).encode()
        digest = hashlib.blake2b(text, digest_size=DIGEST_BYTES).digest()
        number = self._numbers.setdefault(digest, len(self._numbers))
        if number == len(self.offsets):
            self.offsets.append(self._file.tell())
            with naming(self._path):
                self._file.write(
                    text if line is None else json.dumps(line, ensure_ascii=False).encode()
                )
                self._file.write(b"\n")
        return number

    def digests(self) -> Tensor:
        """Return the digest of each text."""
        joined = bytearray(b"".join(self._numbers))
        flat = torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0)
        return flat.to(torch.uint8).reshape(-1, DIGEST_BYTES)

    def sizes(self) -> Tensor:
        """Return the length of each line in bytes."""
        return torch.diff(_tensor(self.offsets), append=torch.tensor([self._end]))

    def close(self) -> None:
        self._end = self._file.tell()
        with naming(self._path):
            self._file.close()


def spans(shards: Sequence[Shard]) -> Iterator[tuple[range, range]]:
    """Yield the prompt numbers and the response numbers of each shard."""
    prompt = response = 0
    for shard in shards:
        yield (
            range(prompt, prompt + shard.prompts),
            range(response, response + shard.responses),
        )
        prompt, response = prompt + shard.prompts, response + shard.responses


def _line(file: Any, offset: int) -> Any:
    file.seek(offset)
    return json.loads(file.readline())


def _read_prompt(file: Any, offset: int) -> Prompt:
    return tuple(Message(role, content) for role, content in _line(file, offset))


def _tensor(values: "array[Any]") -> Tensor:
    dtype = torch.float64 if values.typecode == "d" else torch.int64
    return torch.frombuffer(values, dtype=dtype).clone() if values else torch.empty(0, dtype=dtype)


def _by_name(numbers: Mapping[str, int]) -> tuple[tuple[str, ...], Tensor]:
    """Sort names that were numbered as they came; also return the new number of each old one."""
    names = sorted(numbers)
    places = {name: place for place, name in enumerate(names)}
    return tuple(names), torch.tensor([places[name] for name in numbers] or [0], dtype=torch.int64)


def _inverse(order: Tensor, size: int) -> Tensor:
    """Return the place of each number in `order`; -1 where it is not in it."""
    places = torch.full((size,), -1, dtype=torch.int64)
    places[order] = torch.arange(len(order))
    return places
