"""The embedding pass: every distinct prompt and response once, and tables that point to them."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from armo.artifacts import read_json, read_tensors, write_json, write_tensors
from armo.data.conversation import (
    Conversation,
    PreferencePair,
    Prompt,
    RatedResponse,
    ResponseList,
    Row,
    prompt_group,
)
from armo.data.objectives import ObjectiveSet
from armo.data.surface import SURFACE_FEATURES, surface_features
from armo.embed.backbone import Backbone, BackboneError, Embeddings
from armo.embed.store import EmbeddingStore

logger = logging.getLogger(__name__)

T = TypeVar("T")

ROWS = "rows.safetensors"
NAMES = "rows.json"
LOG_EVERY_S = 60.0


@dataclass(frozen=True, eq=False, slots=True)
class RowTables:
    """Where the rows of each data set find their embeddings.

    `response` indexes the response store, `prompt` the prompt store; rows keep the order of
    their files. Distinct texts are embedded once, however many rows use them.

    Attributes:
        prompt_of_response: Prompt of each distinct response.
        group_of_prompt: Number of the split group of each distinct prompt.
        covariates: Surface features of each distinct response.
        ratings_response: Response of each rated row.
        ratings: Ratings on [0, 1]; NaN where missing.
        ratings_test: Whether the rated row is on the test side.
        pairs_chosen: Chosen response of each pair.
        pairs_rejected: Rejected response of each pair.
        pairs_category: Index into the category names.
        pairs_test: Whether the pair is on the test side.
        lists_response: Responses of all lists, one list after the other.
        lists_of: The list that each of `lists_response` belongs to.
        lists_category: Index into the category names, per list.
        lists_test: Whether the list is on the test side.
    """

    prompt_of_response: Int[Tensor, " responses"]
    group_of_prompt: Int[Tensor, " prompts"]
    covariates: Float[Tensor, "responses covariates"]
    ratings_response: Int[Tensor, " ratings"]
    ratings: Float[Tensor, "ratings objectives"]
    ratings_test: Bool[Tensor, " ratings"]
    pairs_chosen: Int[Tensor, " pairs"]
    pairs_rejected: Int[Tensor, " pairs"]
    pairs_category: Int[Tensor, " pairs"]
    pairs_test: Bool[Tensor, " pairs"]
    lists_response: Int[Tensor, " list_responses"]
    lists_of: Int[Tensor, " list_responses"]
    lists_category: Int[Tensor, " lists"]
    lists_test: Bool[Tensor, " lists"]

    @property
    def group_of_response(self) -> Int[Tensor, " responses"]:
        """Number of the split group of each distinct response."""
        return self.group_of_prompt[self.prompt_of_response]


@dataclass(frozen=True, eq=False, slots=True)
class EmbeddedData:
    """All rows of a run with their embeddings: what the `embed` stage leaves for the others.

    Attributes:
        objectives: Columns of `tables.ratings`.
        covariates: Columns of `tables.covariates`.
        categories: Names that the category columns index.
        prompts: One embedding per distinct prompt.
        responses: One embedding per distinct response to a prompt.
        tables: Which row uses which embedding.
        examples: A few test conversations as text, with their response numbers.
    """

    objectives: ObjectiveSet
    covariates: tuple[str, ...]
    categories: tuple[str, ...]
    prompts: EmbeddingStore
    responses: EmbeddingStore
    tables: RowTables
    examples: list[dict[str, Any]]

    @classmethod
    def load(cls, folder: Path) -> "EmbeddedData":
        """Load what `embed_rows` wrote.

        Raises:
            ArtifactError: If a file is missing or damaged.
        """
        names = read_json(folder / NAMES)
        return cls(
            objectives=ObjectiveSet.from_dicts(names["objectives"]),
            covariates=tuple(names["covariates"]),
            categories=tuple(names["categories"]),
            prompts=EmbeddingStore.open(folder / "prompts"),
            responses=EmbeddingStore.open(folder / "responses"),
            tables=RowTables(**read_tensors(folder / ROWS)),
            examples=names["examples"],
        )

    def prompt_embeddings(self, responses: Int[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        """Read the prompt embedding of each given response."""
        return self.prompts.read(self.tables.prompt_of_response[responses])


def embed_rows(
    folder: Path,
    *,
    backbone: Backbone,
    objectives: ObjectiveSet,
    ratings: Sequence[RatedResponse],
    pairs: Sequence[PreferencePair],
    lists: Sequence[ResponseList],
    splits: dict[str, str],
    shard_rows: int,
    examples: int = 8,
) -> None:
    """Embed every distinct prompt and response of the rows, resuming at the last whole shard.

    Args:
        folder: Where to write; shards that are there already are not computed again.
        backbone: The frozen language model.
        objectives: Columns of the rating table.
        ratings: Rated responses.
        pairs: Preference pairs.
        lists: Response lists, for evaluation only.
        splits: `train` or `test` by prompt group, from `split_groups`.
        shard_rows: Rows per shard: what a cut-off run loses at most.
        examples: How many test conversations to keep as text.

    Raises:
        BackboneError: If a row cannot be embedded, naming it by its text.
    """
    index = _TextIndex()
    rated = [index.add(row) for row in ratings]
    paired = [index.add(row) for row in pairs]
    listed = [index.add(row) for row in lists]
    categories = sorted({row.category for row in pairs} | {row.category for row in lists})
    tables = RowTables(
        prompt_of_response=_integers(index.prompt_of_response),
        group_of_prompt=_integers(index.group_of_prompt),
        covariates=surface_features([text.response for text in index.conversations]),
        ratings_response=_integers(numbers[0] for numbers in rated),
        ratings=rating_table(ratings, objectives),
        ratings_test=_test_side(ratings, splits),
        pairs_chosen=_integers(numbers[0] for numbers in paired),
        pairs_rejected=_integers(numbers[1] for numbers in paired),
        pairs_category=_integers(categories.index(row.category) for row in pairs),
        pairs_test=_test_side(pairs, splits),
        lists_response=_integers(n for numbers in listed for n in numbers),
        lists_of=_integers(k for k, numbers in enumerate(listed) for _ in numbers),
        lists_category=_integers(categories.index(row.category) for row in lists),
        lists_test=_test_side(lists, splits),
    )
    _fill_store(
        folder / "prompts",
        index.prompts,
        backbone.embed_prompts,
        backbone=backbone,
        shard_rows=shard_rows,
        title="prompts",
    )
    _fill_store(
        folder / "responses",
        index.conversations,
        backbone.embed_responses,
        backbone=backbone,
        shard_rows=shard_rows,
        title="responses",
    )
    write_tensors(folder / ROWS, {f.name: getattr(tables, f.name) for f in fields(tables)})
    write_json(
        folder / NAMES,
        {
            "objectives": objectives.to_dicts(),
            "covariates": list(SURFACE_FEATURES),
            "categories": categories,
            "examples": _examples(pairs, paired, tables.pairs_test, limit=examples),
        },
    )


def rating_table(
    rows: Sequence[RatedResponse], objectives: ObjectiveSet
) -> Float[Tensor, "ratings objectives"]:
    """Rescale all ratings to [0, 1], NaN where a row does not rate an objective; float64."""
    table = torch.full((len(rows), len(objectives.names)), torch.nan, dtype=torch.float64)
    columns = {objective.name: k for k, objective in enumerate(objectives.objectives)}
    for number, row in enumerate(rows):
        for name, rating in row.ratings.items():
            column = columns[name]
            table[number, column] = objectives.objectives[column].to_unit(rating)
    return table


class _TextIndex:
    """Numbers the distinct prompts and responses in order of first appearance."""

    def __init__(self) -> None:
        self.prompts: list[Prompt] = []
        self.group_of_prompt: list[int] = []
        self.conversations: list[Conversation] = []
        self.prompt_of_response: list[int] = []
        self._groups: dict[str, int] = {}
        self._prompt_numbers: dict[Prompt, int] = {}
        self._response_numbers: dict[tuple[int, str], int] = {}

    def add(self, row: Row) -> list[int]:
        """Return the number of each response of a row."""
        if row.prompt not in self._prompt_numbers:
            self._prompt_numbers[row.prompt] = len(self.prompts)
            self.prompts.append(row.prompt)
            group = prompt_group(row.prompt)
            self.group_of_prompt.append(self._groups.setdefault(group, len(self._groups)))
        prompt = self._prompt_numbers[row.prompt]
        numbers = []
        for response in row.responses:
            key = (prompt, response)
            if key not in self._response_numbers:
                self._response_numbers[key] = len(self.conversations)
                self.conversations.append(Conversation(row.prompt, response))
                self.prompt_of_response.append(prompt)
            numbers.append(self._response_numbers[key])
        return numbers


def _fill_store(
    folder: Path,
    texts: Sequence[T],
    embed: Callable[[Sequence[T]], Embeddings],
    *,
    backbone: Backbone,
    shard_rows: int,
    title: str,
) -> None:
    store = EmbeddingStore.create(
        folder,
        rows=len(texts),
        dim=backbone.dim,
        shard_rows=shard_rows,
        fingerprint=backbone.spec.fingerprint,
        texts=_digest_texts(texts),
    )
    missing = [shard for shard in range(store.shards) if not store.has(shard)]
    kept = len(texts) - sum(len(store.shard_range(shard)) for shard in missing)
    if kept:
        logger.info("%s: %d of %d rows are there already", title, kept, len(texts))
    with Progress(
        TextColumn("embedding {task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rows]} rows"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        transient=False,
    ) as progress:
        # Characters, not rows, are the unit of work: rows differ in length a hundredfold.
        work = {shard: sum(_size(texts[n]) for n in store.shard_range(shard)) for shard in missing}
        total, done, rows = sum(work.values()), 0, kept
        task = progress.add_task(title, total=total, rows=f"{rows}/{len(texts)}")
        started = reported = time.monotonic()
        for shard in missing:
            numbers = store.shard_range(shard)
            part = [texts[n] for n in numbers]
            try:
                result = embed(part)
            except BackboneError as error:
                if error.row is None:
                    raise
                raise BackboneError(f"{_quote(part[error.row])}: {error}") from None
            store.write(shard, embeddings=result.values, truncated=result.truncated)
            now = time.monotonic()
            done, rows = done + work[shard], rows + len(numbers)
            rate = (rows - kept) / (now - started)
            progress.update(task, completed=done, rows=f"{rows}/{len(texts)}, {rate:.0f}/s")
            if not progress.console.is_terminal and now - reported > LOG_EVERY_S:
                reported = now
                left_s = (now - started) * (total - done) / done
                logger.info("%s: %d of %d rows, about %.0f s left", title, rows, len(texts), left_s)
    cut = int(store.truncated().sum())
    if cut:
        logger.info("%s: %d of %d rows were cut to fit the backbone", title, cut, len(texts))


def _quote(text: Any) -> str:
    """Name a text so that its author finds it."""
    if isinstance(text, Conversation):
        return f"response {text.response[:60]!r} to {_quote(text.prompt)}"
    return f"prompt {text[-1].content[:60]!r}"


def _size(text: Any) -> int:
    if isinstance(text, Conversation):
        return len(text.response) + _size(text.prompt)
    return sum(len(message.content) for message in text)


def _digest_texts(texts: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        prompt, response = (
            (text.prompt, text.response) if isinstance(text, Conversation) else (text, None)
        )
        turns = [[message.role, message.content] for message in prompt]
        digest.update(json.dumps([turns, response], ensure_ascii=False).encode())
    return digest.hexdigest()


def _test_side(rows: Sequence[Row], splits: dict[str, str]) -> Bool[Tensor, " rows"]:
    return torch.tensor(
        [splits[prompt_group(row.prompt)] == "test" for row in rows], dtype=torch.bool
    )


def _integers(values: Any) -> Int[Tensor, " values"]:
    return torch.tensor(list(values), dtype=torch.int64)


def _examples(
    pairs: Sequence[PreferencePair],
    numbers: Sequence[list[int]],
    test: Bool[Tensor, " pairs"],
    *,
    limit: int,
) -> list[dict[str, Any]]:
    """Keep both responses of some test pairs, spread over the categories, with their numbers.

    Without a test pair, of training pairs: a model needs conversations to be verified by.
    """
    by_category: dict[str, list[int]] = {}
    for k in (test if bool(test.any()) else ~test).nonzero()[:, 0].tolist():
        by_category.setdefault(pairs[k].category, []).append(k)
    queues = [by_category[name] for name in sorted(by_category)]
    picked = [queue[turn] for turn in range(limit) for queue in queues if turn < len(queue)]
    return [
        {
            "prompt": [{"role": m.role, "content": m.content} for m in pairs[k].prompt],
            "category": pairs[k].category,
            "responses": [pairs[k].chosen, pairs[k].rejected],
            "numbers": numbers[k],
        }
        for k in picked[: max(1, limit // 2)]
    ]
