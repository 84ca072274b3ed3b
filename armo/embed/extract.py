"""The embedding pass: every distinct prompt and response once, and tables that point to them."""

import logging
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor
from torch.multiprocessing.spawn import ProcessRaisedException

from armo.artifacts import (
    ArtifactError,
    exclusive,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from armo.data.checks import check_objectives
from armo.data.conversation import PreferencePair, RatedResponse, ResponseList
from armo.data.objectives import ObjectiveSet
from armo.data.surface import SURFACE_FEATURES, SURFACE_VERSION, surface_features
from armo.embed.backbone import Backbone
from armo.embed.boundary import PromptGroup
from armo.embed.index import IndexedRows, RowIndexer, TextSpool, spans
from armo.embed.spec import BackboneError
from armo.embed.store import CovariateStore, EmbeddingStore, EmbeddingTable, Shard

logger = logging.getLogger(__name__)

ROWS = "rows.safetensors"
NAMES = "rows.json"
TEXTS = "texts"
# Of the row tables. Raise it when a column comes, goes or means something else.
ROWS_FORMAT = 2
LOG_EVERY_S = 60.0
LOOK_EVERY_S = 1.0

# Processes wait for the slowest shard, and for the first one to digest the weights of the model.
WAIT = timedelta(days=7)


@dataclass(frozen=True, eq=False, slots=True)
class RowTables:
    """Where the rows of each data set find their embeddings.

    Rows keep the order of their files, and a row that is left out keeps its place: it is neither
    on the training side nor on the test side. Distinct texts are embedded once, however many rows
    use them; the responses to one prompt are numbered side by side.

    Attributes:
        prompt_of_response: Prompt of each distinct response.
        group_of_prompt: Number of the split group of each distinct prompt.
        covariates: Surface features of each distinct response.
        ratings_response: Response of each rated row.
        ratings: Ratings on [0, 1]; NaN where missing.
        ratings_train: Whether the rated row is on the training side.
        ratings_test: Whether the rated row is on the test side.
        ratings_weight: How much the rated row counts.
        ratings_source: Index into the source names.
        pairs_chosen: Chosen response of each pair.
        pairs_rejected: Rejected response of each pair.
        pairs_category: Index into the category names.
        pairs_train: Whether the pair is on the training side.
        pairs_test: Whether the pair is on the test side.
        pairs_judgements: Probability that the chosen response is better, by objective; NaN where
            missing.
        pairs_weight: How much the pair counts.
        pairs_source: Index into the source names.
        pairs_preference: Probability in [0.5, 1] that the chosen response is the better one; 0.5
            is a tie.
        pairs_margin: By how much; NaN where missing.
        lists_response: Responses of all lists, one list after the other.
        lists_of: The list that each of `lists_response` belongs to.
        lists_rank: Rank of each of `lists_response` in its list, lower is better; equal ones tie.
        lists_category: Index into the category names, per list.
        lists_weight: How much the list counts.
        lists_source: Index into the source names, per list.
        lists_benchmark: Whether the list is of the benchmark, for the report alone.
        lists_train: Whether the list is on the training side; none of the benchmark is.
        lists_test: Whether the list is on the test side.
    """

    prompt_of_response: Int[Tensor, " responses"]
    group_of_prompt: Int[Tensor, " prompts"]
    covariates: Float[Tensor, "responses covariates"]
    ratings_response: Int[Tensor, " ratings"]
    ratings: Float[Tensor, "ratings objectives"]
    ratings_train: Bool[Tensor, " ratings"]
    ratings_test: Bool[Tensor, " ratings"]
    ratings_weight: Float[Tensor, " ratings"]
    ratings_source: Int[Tensor, " ratings"]
    pairs_chosen: Int[Tensor, " pairs"]
    pairs_rejected: Int[Tensor, " pairs"]
    pairs_category: Int[Tensor, " pairs"]
    pairs_train: Bool[Tensor, " pairs"]
    pairs_test: Bool[Tensor, " pairs"]
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
    lists_train: Bool[Tensor, " lists"]
    lists_test: Bool[Tensor, " lists"]

    @property
    def group_of_response(self) -> Int[Tensor, " responses"]:
        """Number of the split group of each distinct response."""
        return self.group_of_prompt[self.prompt_of_response]


@dataclass(frozen=True, eq=False, slots=True)
class EmbeddedData:
    """All rows of a run with their embeddings: what the `embed` stage leaves for the others.

    Attributes:
        objectives: Columns of `tables.ratings` and `tables.pairs_judgements`.
        covariates: Columns of `tables.covariates`.
        categories: Names that the category columns index.
        sources: Names that the source columns index.
        prompts: One embedding per distinct prompt.
        responses: One embedding per distinct response to a prompt.
        tables: Which row uses which embedding.
        examples: A few test conversations as text, with their response numbers.
    """

    objectives: ObjectiveSet
    covariates: tuple[str, ...]
    categories: tuple[str, ...]
    sources: tuple[str, ...]
    prompts: EmbeddingTable
    responses: EmbeddingTable
    tables: RowTables
    examples: list[dict[str, Any]]

    @classmethod
    def load(cls, folder: Path) -> "EmbeddedData":
        """Load what `embed_rows` wrote.

        Raises:
            ArtifactError: If a file is missing, damaged, or of another version.
        """
        names = read_json(folder / NAMES)
        if names.get("format") != ROWS_FORMAT:
            raise ArtifactError(
                f"{folder / NAMES}: row tables of another version of armo, not of format "
                f"{ROWS_FORMAT}. Make them again with `armo train stages=[embed]`; what is "
                f"embedded stays."
            )
        store = EmbeddingStore.open(folder)
        return cls(
            objectives=ObjectiveSet.from_dicts(names["objectives"]),
            covariates=tuple(names["covariates"]),
            categories=tuple(names["categories"]),
            sources=tuple(names["sources"]),
            prompts=store.prompts,
            responses=store.responses,
            tables=RowTables(**read_tensors(folder / ROWS)),
            examples=names["examples"],
        )

    def style(
        self, responses: Int[Tensor, " batch"], features: Sequence[str]
    ) -> Float[Tensor, "batch features"]:
        """Return some surface features of the given responses, by name.

        Raises:
            ValueError: If a feature is not measured.
        """
        if unknown := [name for name in features if name not in self.covariates]:
            raise ValueError(
                f"`features` knows {', '.join(self.covariates)}, not {', '.join(unknown)}"
            )
        columns = [self.covariates.index(name) for name in features]
        return self.tables.covariates[responses][:, columns]

    def prompt_embeddings(self, responses: Int[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        """Read the prompt embedding of each given response."""
        return self.prompts.read(self.tables.prompt_of_response[responses])


@dataclass(frozen=True, slots=True)
class Team:
    """The processes that share the embedding pass, as Lightning's Fabric launches them.

    Attributes:
        accelerator: `cpu`, `gpu`, or `auto` for a GPU if there is one.
        devices: Processes on this machine, each with a device of its own; `auto` for all GPUs,
            one process without.
        num_nodes: Machines; each is started by `torchrun` or SLURM with the same command, and all
            share the folder.
        strategy: Of Lightning; `auto` starts the processes that are not there already.
    """

    accelerator: str = "auto"
    devices: int | str = "auto"
    num_nodes: int = 1
    strategy: str = "auto"

    def fabric(self) -> Fabric:
        """Set up the processes, without starting them."""
        accelerator, _, number = self.accelerator.partition(":")
        if accelerator == "auto":
            accelerator = "gpu" if torch.cuda.is_available() else "cpu"
        outer = _outer_environment()
        devices: int | list[int]
        if self.devices != "auto":
            devices = int(self.devices)
        elif number and accelerator != "cpu":
            devices = [int(number)]
        elif outer is not None:
            devices = outer.world_size() // self.num_nodes
        else:
            devices = torch.cuda.device_count() if accelerator in ("gpu", "cuda") else 1
        strategy: str | DDPStrategy = self.strategy
        if strategy == "auto" and outer is not None:
            strategy = DDPStrategy(timeout=WAIT)
        elif strategy == "auto" and isinstance(devices, int) and devices > 1:
            strategy = DDPStrategy(start_method="spawn", timeout=WAIT)
        return Fabric(
            accelerator=accelerator,
            devices=devices,
            num_nodes=self.num_nodes,
            strategy=strategy,
        )


def outer_rank() -> int | None:
    """Rank of this process, if `torchrun` or SLURM started it beside others; otherwise None."""
    outer = _outer_environment()
    return None if outer is None else int(outer.global_rank())


def _outer_environment() -> ClusterEnvironment | None:
    for environment in (TorchElasticEnvironment, SLURMEnvironment):
        if environment.detect():
            return environment()
    return None


def embed_rows(
    folder: Path,
    *,
    load: Callable[..., Backbone],
    objectives: ObjectiveSet,
    ratings: Iterable[RatedResponse],
    pairs: Iterable[PreferencePair],
    lists: Iterable[ResponseList] = (),
    benchmark: Iterable[ResponseList] = (),
    test_fraction: float,
    min_ratings: int,
    shard_rows: int,
    team: Team | None = None,
    examples: int = 8,
) -> None:
    """Embed every distinct prompt and response of the rows, resuming at the last whole shard.

    Rows are read once, before anything is embedded; what stays in memory is numbers, while texts
    wait on disk. So rows may come from anything that yields them, of any length.

    Args:
        folder: Where to write; shards that are there already are not computed again.
        load: Loads the frozen language model, given `device`; with several processes, it and its
            arguments must be picklable.
        objectives: Columns of the rating table.
        ratings: Rated responses.
        pairs: Preference pairs.
        lists: Response lists, to train on or, on test prompts, to test what was trained.
        benchmark: Response lists for the report alone; those on training prompts are not used.
        test_fraction: Share of prompts on the test side, where rows do not say `split`.
        min_ratings: Training ratings and judgements that each objective needs; rows of weight zero
            do not count.
        shard_rows: Responses per shard, about: what a cut-off run loses at most.
        team: Processes that share the work; one, on the best device, by default.
        examples: How many test conversations to keep as text.

    Raises:
        ArtifactError: If another process is writing to the folder.
        BackboneError: If a text cannot be embedded, naming the row it comes from.
        DataError: If the rows contradict each other, or an objective cannot be learned.
    """
    with exclusive(folder):
        indexer = RowIndexer(folder / TEXTS, objectives, test_fraction=test_fraction)
        indexer.add_ratings(ratings)
        indexer.add_pairs(pairs)
        indexer.add_lists(lists)
        indexer.add_benchmark(benchmark)
        spool, index = indexer.finish()
        del indexer  # it has the number of every text, which nothing needs any more
        if index.unused_lists:
            logger.info("%d benchmark lists on training prompts are not used", index.unused_lists)
        test_of_response = index.test_of_group[index.group_of_prompt[spool.prompt_of_response]]
        rated = ~test_of_response[index.ratings_response] & (index.ratings_weight > 0)
        paired = ~test_of_response[index.pairs_chosen] & (index.pairs_weight > 0)
        check_objectives(
            index.ratings[rated],
            objectives,
            min_ratings=min_ratings,
            judgements=index.pairs_judgements[paired],
        )

        run_team(folder, load=load, team=team or Team(), shard_rows=shard_rows)

        store = EmbeddingStore.open(folder)
        covariates = covariate_store(folder, store.shards).read()
        tables = _tables(spool, index, covariates=covariates, missing=store.responses.missing())
        _log_left_out(store, tables)
        write_tensors(folder / ROWS, {f.name: getattr(tables, f.name) for f in fields(tables)})
        write_json(
            folder / NAMES,
            {
                "format": ROWS_FORMAT,
                "objectives": objectives.to_dicts(),
                "covariates": list(SURFACE_FEATURES),
                "categories": list(index.categories),
                "sources": list(index.sources),
                "examples": _examples(spool, tables, index.categories, limit=examples),
            },
        )
        shutil.rmtree(folder / TEXTS)


def run_team(folder: Path, *, load: Callable[..., Backbone], team: Team, shard_rows: int) -> None:
    """Embed the texts that wait in `folder`, together with the other processes of the team.

    Raises:
        BackboneError: If a text cannot be embedded, naming the row it comes from.
    """
    try:
        team.fabric().launch(partial(_embed_share, folder=folder, load=load, shard_rows=shard_rows))
    except ProcessRaisedException as error:
        # The error of another process is a traceback as text, which ends in what happened.
        text = str(error).strip()
        name = f"\n{BackboneError.__module__}.{BackboneError.__name__}: "
        _, ours, reason = text.rpartition(name)
        raise BackboneError(" ".join(reason.split()) if ours else text.splitlines()[-1]) from None


def _embed_share(
    fabric: Fabric, *, folder: Path, load: Callable[..., Backbone], shard_rows: int
) -> None:
    """Embed this process's share of the missing shards; each shard is one process's."""
    if multiprocessing.parent_process() is not None:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    fabric.barrier()  # until the texts are there
    spool = TextSpool.load(folder / TEXTS)
    shards = spool.shards(shard_rows=shard_rows)
    backbone = load(device=str(fabric.device))
    store = EmbeddingStore(folder, backbone.dim, backbone.spec.fingerprint, shards)
    covariates = covariate_store(folder, shards)
    if fabric.global_rank == 0:
        EmbeddingStore.create(
            folder, dim=store.dim, fingerprint=store.fingerprint, shards=store.shards
        )
        CovariateStore.create(
            folder, names=covariates.names, version=covariates.version, shards=shards
        )
    fabric.barrier()
    missing: list[int] = fabric.broadcast(
        sorted({*store.missing_shards(), *covariates.missing_shards()})
    )
    ranges = list(spans(shards))
    mine = missing[fabric.global_rank :: fabric.world_size]
    embedding = [shard for shard in mine if not store.has(shard)]

    def done(shard: int) -> bool:
        return store.has(shard) and covariates.has(shard)

    with _Progress(shards, missing, spool, done=done, hidden=fabric.global_rank > 0) as progress:
        number = 0

        def show(share: float) -> None:
            progress.show(embedding[number], share)

        def read() -> Iterator[list[PromptGroup]]:
            """Measure each shard as it is read: while the one before it is being embedded."""
            for shard in mine:
                groups = spool.groups(*ranges[shard])
                if not covariates.has(shard):
                    texts = [text for group in groups for text in group.responses]
                    covariates.write(shard, surface_features(texts))
                if store.has(shard):
                    progress.show(None, 1.0)
                else:
                    yield groups

        try:
            for embedded in backbone.embed_chunks(read(), progress=show):
                store.write(
                    embedding[number], prompts=embedded.prompts, responses=embedded.responses
                )
                number += 1
        except BackboneError as error:
            raise _naming_the_row(error, spool, *ranges[embedding[number]]) from None
        progress.wait()
    fabric.barrier()


def covariate_store(folder: Path, shards: Sequence[Shard]) -> CovariateStore:
    """Name the surface features beside the embeddings of a folder."""
    return CovariateStore(folder, SURFACE_FEATURES, SURFACE_VERSION, tuple(shards))


class _Progress:
    """Progress over all shards of the pass, with the time left; other processes' included."""

    def __init__(
        self,
        shards: Sequence[Shard],
        missing: Sequence[int],
        spool: TextSpool,
        *,
        done: Callable[[int], bool],
        hidden: bool,
    ) -> None:
        self._done = done
        self._pending = set(missing)
        self._hidden = hidden
        # Bytes, not rows, are the unit of work: rows differ in length a hundredfold.
        self._work = {
            shard: int(spool.response_bytes[rows.start : rows.stop].sum())
            for shard, (_, rows) in enumerate(spans(shards))
        }
        self._rows = {shard: shards[shard].responses for shard in self._work}
        self._all_rows = sum(self._rows.values())
        self._total = sum(self._work[shard] for shard in missing)
        self._started = self._looked = self._logged = time.monotonic()
        self._bar = Progress(
            TextColumn("embedding"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rows]} responses"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            disable=hidden,
        )
        kept = self._all_rows - sum(self._rows[shard] for shard in missing)
        if kept and not hidden:
            logger.info("%d of %d responses are there already", kept, self._all_rows)
        self._task = self._bar.add_task("", total=self._total, rows=f"{kept}/{self._all_rows}")

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show(self, shard: int | None, share: float) -> None:
        """Show how far the whole pass is, of which this process has done a share of a shard."""
        now = time.monotonic()
        if self._hidden or (now - self._looked < LOOK_EVERY_S and share < 1.0):
            return
        self._looked = now
        self._pending = {shard for shard in self._pending if not self._done(shard)}
        left = float(sum(self._work[pending] for pending in self._pending))
        if shard in self._pending:
            left -= self._work[shard] * share
        rows = self._all_rows - sum(self._rows[pending] for pending in self._pending)
        done = self._total - left
        self._bar.update(self._task, completed=done, rows=f"{rows}/{self._all_rows}")
        if not self._bar.console.is_terminal and now - self._logged > LOG_EVERY_S and done:
            self._logged = now
            left_s = (now - self._started) * left / done
            logger.info("%d of %d responses, about %.0f s left", rows, self._all_rows, left_s)

    def wait(self) -> None:
        """Wait until the other processes have finished their shards too."""
        while not self._hidden:
            self.show(None, 1.0)
            if not self._pending:
                return
            time.sleep(LOOK_EVERY_S)


def _naming_the_row(
    error: BackboneError, spool: TextSpool, prompts: range, responses: range
) -> BackboneError:
    """Say which row a text comes from, so that its author finds it."""
    if error.group is None:
        return error
    prompt = prompts[error.group]
    mine = (spool.prompt_of_response == prompt).nonzero()[:, 0].tolist()
    text, row = spool.responses([mine[error.response or 0]])[0]
    what = f"prompt {spool.prompt(prompt)[-1].content[:60]!r}"
    if error.response is not None:
        what = f"response {text[:60]!r} to {what}"
    return BackboneError(f"row {row!r}, {what}: {error}")


def _tables(
    spool: TextSpool,
    index: IndexedRows,
    *,
    covariates: Float[Tensor, "responses covariates"],
    missing: Bool[Tensor, " responses"],
) -> RowTables:
    """Point from each row to its embeddings, and say on which side it is, if it is there."""
    test = index.test_of_group[index.group_of_prompt[spool.prompt_of_response]]
    chosen, rejected, rated = index.pairs_chosen, index.pairs_rejected, index.ratings_response
    rated_there = ~missing[rated]
    pair_there = ~(missing[chosen] | missing[rejected])
    list_there = torch.ones(len(index.lists_category), dtype=torch.bool)
    list_there[index.lists_of[missing[index.lists_response]]] = False
    list_test = torch.zeros_like(list_there)
    list_test[index.lists_of] = test[index.lists_response]
    return RowTables(
        prompt_of_response=spool.prompt_of_response,
        group_of_prompt=index.group_of_prompt,
        covariates=covariates,
        ratings_response=rated,
        ratings=index.ratings,
        ratings_train=~test[rated] & rated_there,
        ratings_test=test[rated] & rated_there,
        ratings_weight=index.ratings_weight,
        ratings_source=index.ratings_source,
        pairs_chosen=chosen,
        pairs_rejected=rejected,
        pairs_category=index.pairs_category,
        pairs_train=~test[chosen] & pair_there,
        pairs_test=test[chosen] & pair_there,
        pairs_judgements=index.pairs_judgements,
        pairs_weight=index.pairs_weight,
        pairs_source=index.pairs_source,
        pairs_preference=index.pairs_preference,
        pairs_margin=index.pairs_margin,
        lists_response=index.lists_response,
        lists_of=index.lists_of,
        lists_rank=index.lists_rank,
        lists_category=index.lists_category,
        lists_weight=index.lists_weight,
        lists_source=index.lists_source,
        lists_benchmark=index.lists_benchmark,
        lists_train=~list_test & list_there,  # the benchmark's are gone already
        lists_test=list_test & list_there,
    )


def _log_left_out(store: EmbeddingStore, tables: RowTables) -> None:
    for name, table in (("prompts", store.prompts), ("responses", store.responses)):
        if cut := int(table.truncated().sum()):
            logger.info("%d of %d %s were cut to fit the backbone", cut, table.rows, name)
        if gone := int(table.missing().sum()):
            logger.warning("%d of %d %s were skipped: too long", gone, table.rows, name)
    for name, there in (
        ("rated rows", tables.ratings_train | tables.ratings_test),
        ("pairs", tables.pairs_train | tables.pairs_test),
        ("lists", tables.lists_train | tables.lists_test),
    ):
        if gone := int((~there).sum()):
            logger.warning("so %d of %d %s are left out", gone, len(there), name)


def _examples(
    spool: TextSpool, tables: RowTables, categories: Sequence[str], *, limit: int
) -> list[dict[str, Any]]:
    """Keep both responses of some test pairs, spread over the categories, with their numbers.

    Without a test pair, of training pairs: a model needs conversations to be verified by.
    """
    test = tables.pairs_test if bool(tables.pairs_test.any()) else tables.pairs_train
    by_category: dict[int, list[int]] = {}
    for pair in test.nonzero()[:, 0].tolist():
        by_category.setdefault(int(tables.pairs_category[pair]), []).append(pair)
    queues = [by_category[name] for name in sorted(by_category)]
    picked = [queue[turn] for turn in range(limit) for queue in queues if turn < len(queue)]
    examples = []
    for pair in picked[: max(1, limit // 2)]:
        numbers = [int(tables.pairs_chosen[pair]), int(tables.pairs_rejected[pair])]
        prompt = spool.prompt(int(tables.prompt_of_response[numbers[0]]))
        examples.append(
            {
                "prompt": [{"role": m.role, "content": m.content} for m in prompt],
                "category": categories[int(tables.pairs_category[pair])],
                "responses": [text for text, _ in spool.responses(numbers)],
                "numbers": numbers,
            }
        )
    return examples
