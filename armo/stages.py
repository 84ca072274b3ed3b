"""The stages of `armo train`: each reads saved artifacts and writes its own folder, once.

A stage has a key: a digest of its settings, its inputs and this package's version. A finished
folder with the same key is left as it is; otherwise the stage runs.
"""

import importlib.metadata
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.console import Console
from torch import Tensor

from armo.artifacts import (
    MANIFEST,
    ArtifactError,
    damaged_files,
    digest_file,
    digest_json,
    finish_artifact,
    is_current,
    read_json,
    require_artifact,
)
from armo.data.augment import Change, change_pairs
from armo.data.conversation import PreferencePair, RatedResponse, ResponseList
from armo.data.objectives import ObjectiveSet
from armo.data.surface import SURFACE_FEATURES, SURFACE_VERSION
from armo.embed.backbone import Backbone, find_weights, weights_digest
from armo.embed.extract import (
    ROWS_FORMAT,
    EmbeddedData,
    RowTables,
    Team,
    embed_rows,
    run_team,
)
from armo.fit.decorrelation import (
    PARTS,
    DecorrelationSummary,
    FittedTransforms,
    load_transforms,
    save_transforms,
    style_weights,
)
from armo.fit.gating import GatingNetwork
from armo.fit.heads import FittedHeads, HeadSummary
from armo.fit.judged import Judgements
from armo.fit.preferences import Preferences
from armo.fit.probe import can_probe, fit_probe, load_probe, save_probe
from armo.fit.training import CHECKPOINTS, GatingSummary, load_gating, save_gating
from armo.model.pretrained import FORMAT
from armo.model.reward_model import GOLDEN_TOLERANCE, ArmoRewardModel
from armo.report.card import fill_card, new_card
from armo.report.evaluate import GATED, Mix, evaluate
from armo.report.pages import print_tables, save_pages
from armo.report.tables import Evaluation, Table

logger = logging.getLogger(__name__)

# Embeddings read at once.
READ_ROWS = 65536

STAGES = ("embed", "heads", "decorrelation", "gating", "model", "report")
# Of the report, in the model card.
CARD_TABLES = ("objectives", "errors", "judgements", "rivals", "quarters", "style")
FOLDERS = {"embed": "embeddings"} | {name: name for name in STAGES if name != "embed"}


@dataclass(frozen=True, slots=True)
class Run:
    """Where a run writes, and how it talks.

    Attributes:
        folder: The run's folder; each stage has one in it.
        console: For tables and headings.
        seed: Of everything random.
        rank: Of this process among those that share the embedding pass; only the first does
            anything else.
        stages: Those to run.
        source: Folder of another run, whose results stand for the stages that are not run here.
            Nothing is written to it.
    """

    folder: Path
    console: Console
    seed: int
    rank: int = 0
    stages: tuple[str, ...] = STAGES
    source: Path | None = None

    def stage_folder(self, stage: str) -> Path:
        """Return the folder of a stage."""
        if self.source is not None and stage not in self.stages:
            return self.source / FOLDERS[stage]
        return self.folder / FOLDERS[stage]

    def check_source(self, *, embed: Any) -> None:
        """Refuse a source that cannot stand for the stages that are not run here.

        Args:
            embed: The settings that this run would embed with.

        Raises:
            ValueError: If it is the folder of this run, or no stage needs it.
            ArtifactError: If it lacks a stage, or a model would get another backbone than its
                heads were fitted for.
        """
        if self.source is None:
            return
        if self.source.resolve() == self.folder.resolve():
            raise ValueError(
                f"`from_run` is the folder of this run, {self.source}; name another `output_dir`, "
                "or leave `from_run` out"
            )
        last = max((STAGES.index(stage) for stage in self.stages), default=0)
        needed = [stage for stage in STAGES[:last] if stage not in self.stages]
        if not needed:
            raise ValueError(
                f"`from_run` is for stages that are not in `stages`, and {', '.join(self.stages)} "
                "need no other; leave some out, as in `stages=[gating,model,report]`"
            )
        for stage in needed:
            if not (self.stage_folder(stage) / MANIFEST).is_file():
                raise ArtifactError(
                    f"`from_run`: {self.source} has no finished `{stage}`; finish that run first, "
                    "or add the stage to `stages`"
                )
        if "model" in self.stages and "embed" in needed:
            made_with = read_json(self.stage_folder("embed") / MANIFEST)["settings"]["embed"]
            if digest_json(made_with) != digest_json(embed):
                raise ArtifactError(
                    f"`from_run`: {self.source} was embedded with other settings than those of "
                    "`embed` here; give the `embed` overrides of that run"
                )
        if self.rank == 0:
            self.console.print(f"from {self.source}: {', '.join(needed)}")

    def key_of(self, stage: str) -> str:
        """Return the key of a finished stage.

        Raises:
            ArtifactError: If it is not finished, or was changed afterwards.
        """
        key: str = require_artifact(self.stage_folder(stage), stage=stage)["key"]
        return key

    def _check_ancestry(self, inputs: Mapping[str, str]) -> None:
        """Refuse inputs of which one was made from another state of the next."""
        for stage in STAGES:
            if stage not in inputs:
                continue
            made_from = read_json(self.stage_folder(stage) / MANIFEST)["inputs"]
            if stale := [
                name for name in STAGES if made_from.get(name) not in (None, inputs.get(name))
            ]:
                remedy = f"run `armo train stages=[{stage}]` again first, or all stages"
                if self.source is not None and stage not in self.stages:
                    remedy = f"add {stage} to `stages`, and what comes after it"
                raise ArtifactError(
                    f"{self.stage_folder(stage)} was made from another `{stale[0]}` than is there "
                    f"now; {remedy}"
                )

    def do(
        self,
        stage: str,
        *,
        settings: Any,
        inputs: Mapping[str, str],
        work: Callable[[Path], None],
        fresh: bool = True,
        help_with: Callable[[Path], None] | None = None,
    ) -> None:
        """Run a stage unless its finished folder has the same key.

        Args:
            stage: Name of the stage.
            settings: All settings its result depends on, as JSON.
            inputs: Digest or key of each input.
            work: Writes the artifact's files into the folder.
            fresh: Whether to start from an empty folder, or go on with what is there.
            help_with: What the other processes do meanwhile.
        """
        self._check_ancestry(inputs)
        folder = self.stage_folder(stage)
        version = importlib.metadata.version("armo")
        key = digest_json([version, settings, dict(inputs)])
        if is_current(folder, key):
            if self.rank > 0:
                return
            self.console.print(f"[bold]{stage}[/bold]: up to date, {folder}")
            return
        if self.rank > 0:
            if help_with is not None:
                help_with(folder)
            return
        self.console.rule(f"[bold]{stage}[/bold]", align="left")
        if fresh and folder.exists():
            shutil.rmtree(folder)
        if (folder / MANIFEST).is_file():
            # A shard that was kept must be the one that was written.
            for name in damaged_files(folder):
                self.console.print(f"{folder / name} was damaged; it is made again")
                (folder / name).unlink(missing_ok=True)
            (folder / MANIFEST).unlink()
        folder.mkdir(parents=True, exist_ok=True)
        work(folder)
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        finish_artifact(
            folder,
            key=key,
            settings=settings,
            inputs=inputs,
            versions={"armo": version, **versions},
        )


def run_embed(
    run: Run,
    *,
    settings: Any,
    objectives: ObjectiveSet,
    files: Iterable[Path],
    stream_ratings: Callable[..., Iterator[RatedResponse]],
    stream_pairs: Callable[..., Iterator[PreferencePair]],
    stream_lists: Callable[..., Iterator[ResponseList]] | None,
    stream_benchmark: Callable[..., Iterator[ResponseList]] | None,
    backbone: Callable[..., Backbone],
    backbone_id: tuple[str, str | None],
    team: Team,
    test_fraction: float,
    min_ratings: int,
    shard_rows: int,
    changes: Sequence[Change] = (),
) -> None:
    """Read and check the rows, and embed every distinct prompt and response.

    Args:
        run: The run.
        settings: The `data` and `embed` sections of the configuration.
        objectives: The declared objectives.
        files: All that the rows are read from, to notice when they change. Of a set on the hub,
            the settings have its revision.
        stream_ratings: Reads the rated responses, given `objectives`.
        stream_pairs: Reads the preference pairs, given `objectives`.
        stream_lists: Reads response lists to train on, if there are any.
        stream_benchmark: Reads response lists for the report, if there are any.
        backbone: Loads the backbone, given `device`.
        backbone_id: Its id and revision, to notice when its weights change.
        team: Processes that share the work.
        test_fraction: Share of prompts kept for the report.
        min_ratings: Training ratings that each objective needs.
        shard_rows: Responses per shard of the store, about.
        changes: Of the pairs of the training side; see `armo.data.augment.change_pairs`.
    """
    inputs = {str(file): digest_file(file) for file in files}
    folder, revision = backbone_id
    inputs["backbone"] = weights_digest(find_weights(folder, revision=revision))
    inputs["covariates"] = digest_json([SURFACE_FEATURES, SURFACE_VERSION])
    inputs["rows"] = digest_json(ROWS_FORMAT)

    lists = stream_lists or tuple
    benchmark = stream_benchmark or tuple

    def work(folder: Path) -> None:
        embed_rows(
            folder,
            load=backbone,
            objectives=objectives,
            ratings=stream_ratings(objectives=objectives),
            pairs=change_pairs(
                lambda: stream_pairs(objectives=objectives),
                changes,
                others=lambda: chain(
                    stream_ratings(objectives=objectives), lists(), two_right(benchmark())
                ),
                test_fraction=test_fraction,
            ),
            lists=lists(),
            benchmark=two_right(benchmark()),
            test_fraction=test_fraction,
            min_ratings=min_ratings,
            shard_rows=shard_rows,
            team=team,
        )
        print_tables([_data_table(EmbeddedData.load(folder))], run.console)

    def help_with(folder: Path) -> None:
        run_team(folder, load=backbone, team=team, shard_rows=shard_rows)

    run.do("embed", settings=settings, inputs=inputs, work=work, fresh=False, help_with=help_with)


def two_right(rows: Iterable[ResponseList]) -> Iterator[ResponseList]:
    """Keep what the report knows of lists: counterfactual pairs, two responses, both right."""
    left_out = 0
    for row in rows:
        if len(row.responses) == 2 and sorted(row.correct or ()) == [0, 1]:
            yield row
        else:
            left_out += 1
    if left_out:
        logger.info(
            "%d benchmark lists are not used: not two responses that are both correct", left_out
        )


def run_heads(
    run: Run,
    *,
    settings: Any,
    fit: Callable[..., FittedHeads],
    source_weights: Mapping[str, float],
    reweighted: Sequence[str] = (),
) -> None:
    """Fit the objective heads on the training ratings and judgements.

    Args:
        run: The run.
        settings: Those of the fit.
        fit: Fits the heads.
        source_weights: How much the rows of a source count.
        reweighted: Surface features that are not to tell which response was judged better.
    """
    inputs = {"embed": run.key_of("embed")}

    def work(folder: Path) -> None:
        data = EmbeddedData.load(run.stage_folder("embed"))
        tables = data.tables
        train = tables.ratings_train
        rows = tables.ratings_response[train]
        judgements = training_judgements(data, reweighted=reweighted, source_weights=source_weights)
        others = torch.cat(
            [
                tables.pairs_chosen[tables.pairs_train],
                tables.lists_response[tables.lists_train[tables.lists_of]],
            ]
        )
        fitted = fit(
            data.responses,
            rows,
            tables.ratings[train],
            tables.group_of_response[rows],
            objectives=data.objectives.names,
            group_count=int(tables.group_of_prompt.max()) + 1,
            other_groups=tables.group_of_response[others],
            judgements=judgements,
            sample_weights=row_weights(
                data, tables.ratings_weight[train], tables.ratings_source[train], source_weights
            ),
            seed=run.seed,
        )
        fitted.save(folder)
        print_tables([heads_table(fitted.summaries)], run.console)

    whole = [settings, run.seed, dict(source_weights), list(reweighted)]
    run.do("heads", settings=whole, inputs=inputs, work=work)


def training_judgements(
    data: EmbeddedData, *, reweighted: Sequence[str], source_weights: Mapping[str, float]
) -> Judgements:
    """Return the judgements of the training pairs, a row for each pair and objective."""
    tables = data.tables
    weights = row_weights(data, tables.pairs_weight, tables.pairs_source, source_weights)
    known = ~tables.pairs_judgements.isnan()
    known &= (tables.pairs_train & (weights > 0.0))[:, None]
    objective, pair = known.T.nonzero().T
    judged = torch.full((len(pair), known.shape[1]), torch.nan, dtype=torch.float64)
    judged[torch.arange(len(pair)), objective] = tables.pairs_judgements[pair, objective].double()
    weights = weights[pair]
    chosen, rejected = tables.pairs_chosen[pair], tables.pairs_rejected[pair]
    if reweighted:
        side = (tables.pairs_judgements[pair, objective] - 0.5).sign().double()
        style = data.style(chosen, reweighted) - data.style(rejected, reweighted)
        for k in objective.unique().tolist():
            decided = (objective == k) & (side != 0.0)
            if bool(decided.any()):
                better = side[decided, None] * style[decided]
                weights[decided] *= style_weights(better, weights[decided])
    return Judgements(chosen, rejected, judged, tables.group_of_response[chosen], weights)


def run_decorrelation(
    run: Run,
    *,
    settings: Any,
    fit: Callable[..., FittedTransforms],
    source_weights: Mapping[str, float],
) -> None:
    """Fit the reward transform on the responses of the training pairs and lists."""
    inputs = {stage: run.key_of(stage) for stage in ("embed", "heads")}

    def work(folder: Path) -> None:
        data = EmbeddedData.load(run.stage_folder("embed"))
        heads = FittedHeads.load(run.stage_folder("heads"))
        tables = data.tables
        weights = row_weights(data, tables.pairs_weight, tables.pairs_source, source_weights)
        train = tables.pairs_train & (weights > 0.0)
        of_lists = row_weights(data, tables.lists_weight, tables.lists_source, source_weights)
        listed = (tables.lists_train & (of_lists > 0.0))[tables.lists_of]
        reference = torch.cat(
            [
                tables.pairs_chosen[train],
                tables.pairs_rejected[train],
                tables.lists_response[listed],
            ]
        ).unique()
        embeddings = data.responses.read(reference)
        shared = {
            "covariates": tables.covariates[reference],
            "covariate_names": data.covariates,
            "groups": tables.prompt_of_response[reference],
            "bias_indices": data.objectives.bias_indices,
        }
        fitted = fit(heads, embeddings, **shared)
        plain = fit(heads, embeddings, **shared, methods=())
        save_transforms(folder, decorrelated=fitted, undecorrelated=plain)
        print_tables([decorrelation_table(fitted.summaries)], run.console)

    whole = [settings, dict(source_weights), list(PARTS)]
    run.do("decorrelation", settings=whole, inputs=inputs, work=work)


def run_gating(
    run: Run,
    *,
    settings: Any,
    fit: Callable[..., tuple[GatingNetwork, GatingSummary]],
    source_weights: Mapping[str, float],
) -> None:
    """Train the gate on the training pairs, once decorrelated and once not, to compare."""
    inputs = {stage: run.key_of(stage) for stage in ("embed", "heads", "decorrelation")}

    def work(folder: Path) -> None:
        data = EmbeddedData.load(run.stage_folder("embed"))
        heads = FittedHeads.load(run.stage_folder("heads"))
        _keep_unfinished_trainings(folder)
        summaries = {}
        for name, decorrelated, what in (
            ("gate", True, "the gate"),
            ("undecorrelated", False, "a gate without decorrelation, for the report to compare"),
        ):
            run.console.print(f"training {what}")
            transforms = load_transforms(
                run.stage_folder("decorrelation"), decorrelated=decorrelated
            )
            gate, summaries[name] = train_gate(
                data,
                heads,
                transforms,
                # A penalty on style decorrelates as well.
                fit=fit if decorrelated else partial(fit, style_penalty=0.0),
                folder=folder / f"{name}_training",
                seed=run.seed,
                source_weights=source_weights,
            )
            save_gating(folder, name, gate, summaries[name])
            judgements = probe_judgements(data, transforms, source_weights=source_weights)
            if can_probe(judgements, heads):
                run.console.print("fitting a linear probe, for the report to compare")
                save_probe(folder, name, fit_probe(data, heads, transforms, judgements))
        print_tables([gating_table(summaries["gate"])], run.console)

    whole = [settings, run.seed, dict(source_weights)]
    run.do("gating", settings=whole, inputs=inputs, work=work, fresh=False)


def _keep_unfinished_trainings(folder: Path) -> None:
    """Empty a folder but for trainings with a checkpoint, which go on if theirs is the same."""
    for path in folder.iterdir():
        if path.is_file() and not path.name.startswith("."):
            path.unlink()
        elif path.is_dir() and not (path / CHECKPOINTS).is_dir():
            shutil.rmtree(path)


def run_model(run: Run, *, backbone: Callable[[], Backbone]) -> None:
    """Join the parts to a model folder with golden scores and a model card."""
    inputs = {stage: run.key_of(stage) for stage in STAGES[:4]}

    def work(folder: Path) -> None:
        data = EmbeddedData.load(run.stage_folder("embed"))
        heads = FittedHeads.load(run.stage_folder("heads"))
        transforms = load_transforms(run.stage_folder("decorrelation"))
        gate, summary = load_gating(run.stage_folder("gating"), "gate")
        model = ArmoRewardModel(
            objectives=data.objectives,
            backbone=backbone(),
            heads=heads.heads,
            transform=transforms.transform,
            gate=gate,
            beta=summary.beta,
            uncertainty=heads.uncertainty,
        )
        golden = [
            [*example["prompt"], {"role": "assistant", "content": response}]
            for example in data.examples
            for response in example["responses"]
        ]
        tables = [
            _objectives_table(data.objectives),
            heads_table(heads.summaries),
            decorrelation_table(transforms.summaries),
            gating_table(summary),
        ]
        card = new_card(tables, spec=model.backbone.spec, usage=_card_usage(model))
        model.save_pretrained(folder, golden=golden, card=card)
        run.console.print(f"saved {folder}")

    run.do("model", settings={"format": FORMAT}, inputs=inputs, work=work)


def run_report(
    run: Run,
    *,
    settings: Any,
    device: str = "auto",
    fixed_weights: Mapping[str, float] | None = None,
) -> None:
    """Evaluate the saved model on the test side, and write the report."""
    inputs = {stage: run.key_of(stage) for stage in STAGES[:5]}

    def work(folder: Path) -> None:
        data = EmbeddedData.load(run.stage_folder("embed"))
        model = ArmoRewardModel.from_pretrained(run.stage_folder("model"), device=device)
        heads = FittedHeads.load(run.stage_folder("heads"))
        gating, decorrelation = run.stage_folder("gating"), run.stage_folder("decorrelation")
        mixes = {}
        for name, decorrelated in (("gate", True), ("undecorrelated", False)):
            transforms = load_transforms(decorrelation, decorrelated=decorrelated)
            gate, summary = load_gating(gating, name)
            probe = load_probe(gating, name, covariates=transforms.transform.covariates)
            mixes[name] = Mix(transforms.transform, gate, summary, probe)
        deviation = text_deviation(model, data)
        if deviation > GOLDEN_TOLERANCE[model.backbone.spec.dtype]:
            raise ArtifactError(
                f"{run.stage_folder('model')}: scores from text differ from those of the stored "
                f"embeddings by {deviation:.2g}: the backbone runs differently now"
            )
        evaluation = evaluate(
            data,
            heads=heads,
            mix=mixes["gate"],
            undecorrelated=mixes["undecorrelated"],
            fixed_weights=fixed_weights,
            deviation=deviation,
            seed=run.seed,
        )
        save_pages(evaluation, folder, title=f"Report on {run.folder.name}")
        if run.source is None or "model" in run.stages:  # what another run made stays as it is
            _fill_card(run, evaluation)
        print_tables([_brief(table) for table in evaluation.tables], run.console)
        run.console.print(f"saved {folder / 'report.html'}")

    run.do("report", settings=[settings, run.seed], inputs=inputs, work=work)


def row_weights(
    data: EmbeddedData,
    weights: Float[Tensor, " rows"],
    sources: Int[Tensor, " rows"],
    source_weights: Mapping[str, float],
) -> Float[Tensor, " rows"]:
    """Multiply each row's own weight by that of its source, one where nothing is said."""
    if unknown := sorted(set(source_weights) - set(data.sources)):
        raise ValueError(
            f"`source_weights` names {', '.join(unknown)}; the sources are "
            f"{', '.join(data.sources)}"
        )
    of_source = torch.tensor(
        [source_weights.get(name, 1.0) for name in data.sources], dtype=torch.float64
    )
    return weights.double() * of_source[sources]


def train_gate(
    data: EmbeddedData,
    heads: FittedHeads,
    transforms: FittedTransforms,
    *,
    fit: Callable[..., tuple[GatingNetwork, GatingSummary]],
    folder: Path,
    seed: int,
    source_weights: Mapping[str, float] | None = None,
) -> tuple[GatingNetwork, GatingSummary]:
    """Train a gate on the training pairs, as the methods of decorrelation ask for."""
    preferences = training_preferences(data, heads, transforms, source_weights=source_weights or {})
    return fit(
        preferences,
        objectives=data.objectives.names,
        mixed=data.objectives.mixed_indices,
        nuisance="nuisance" in transforms.methods,
        style_names=transforms.features,
        folder=folder,
        seed=seed,
    )


def training_pairs(
    data: EmbeddedData, transforms: FittedTransforms, *, source_weights: Mapping[str, float]
) -> tuple[Int[Tensor, " pairs"], Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
    """Return the numbers of the training pairs, how much each counts, and its balance for style."""
    tables = data.tables
    weights = row_weights(data, tables.pairs_weight, tables.pairs_source, source_weights)
    train = (tables.pairs_train & (weights > 0.0)).nonzero()[:, 0]
    weights = weights[train]
    balance = torch.ones_like(weights)
    if "reweight" in transforms.methods:
        decided = tables.pairs_preference[train] > 0.5
        chosen, rejected = tables.pairs_chosen[train], tables.pairs_rejected[train]
        style = data.style(chosen, transforms.features) - data.style(rejected, transforms.features)
        balance[decided] = style_weights(style[decided], weights[decided])
    return train, weights, balance


def probe_judgements(
    data: EmbeddedData, transforms: FittedTransforms, *, source_weights: Mapping[str, float]
) -> Judgements:
    """Return the training pairs as judgements of a single objective, preference itself."""
    tables = data.tables
    train, weights, balance = training_pairs(data, transforms, source_weights=source_weights)
    chosen = tables.pairs_chosen[train]
    return Judgements(
        chosen,
        tables.pairs_rejected[train],
        tables.pairs_preference[train].double()[:, None],
        tables.group_of_response[chosen],
        weights * balance,
    )


def training_preferences(
    data: EmbeddedData,
    heads: FittedHeads,
    transforms: FittedTransforms,
    *,
    source_weights: Mapping[str, float],
) -> Preferences:
    """Gather the pairs and lists of the training side, their rewards out of fold.

    Raises:
        ValueError: If none has a weight above zero.
    """
    tables = data.tables
    train, weights, balance = training_pairs(data, transforms, source_weights=source_weights)
    pairs = torch.stack([tables.pairs_chosen[train], tables.pairs_rejected[train]], dim=1)
    votes = tables.pairs_preference[train].double()
    of_lists = row_weights(data, tables.lists_weight, tables.lists_source, source_weights)
    listed = (tables.lists_train & (of_lists > 0.0)).nonzero()[:, 0]
    lists, ranks = _padded_lists(tables, listed)
    if not len(pairs) + len(lists):
        raise ValueError(
            "no training pair or list has a weight above zero; see `weight` of the rows and "
            "`fit.source_weights`"
        )
    longest = max(2, lists.shape[1])
    rows = torch.cat([_widened(pairs, longest, -1), _widened(lists, longest, -1)])
    order = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(len(pairs), 2)
    # Each response once, whatever it is compared with.
    used, responses = rows.unique(return_inverse=True)
    padding = int(used[0] < 0)
    prompts, prompt_of = tables.prompt_of_response[rows[:, 0]].unique(return_inverse=True)
    none = torch.zeros(len(lists), dtype=torch.float64)
    return Preferences(
        prompts=data.prompts.read(prompts),
        adjusted=out_of_fold_rewards(data, heads, transforms, used[padding:]),
        style=data.style(used[padding:], transforms.features),
        prompt_of=prompt_of,
        responses=responses - padding,
        ranks=torch.cat([_widened(order, longest, torch.nan), _widened(ranks, longest, torch.nan)]),
        groups=tables.group_of_response[rows[:, 0]],
        weights=torch.cat([weights, of_lists[listed]]),
        balance=torch.cat([balance, none + 1.0]),
        strengths=torch.cat([_strengths(tables, train), none + torch.nan]),
        margins=torch.zeros(len(rows), dtype=torch.float64),
        flipped=torch.cat([1.0 - votes, none]),
        folds=torch.zeros(len(rows), dtype=torch.int64),
    )


def _padded_lists(
    tables: RowTables, listed: Int[Tensor, " lists"]
) -> tuple[Int[Tensor, "lists longest"], Float[Tensor, "lists longest"]]:
    """Responses and ranks of some lists, padded with -1 and NaN."""
    counts = torch.bincount(tables.lists_of, minlength=len(tables.lists_weight))
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(tables.lists_of)) - starts[tables.lists_of]
    shape = len(counts), int(counts.max()) if len(counts) else 0
    responses = torch.full(shape, -1)
    ranks = torch.full(shape, torch.nan, dtype=torch.float64)
    responses[tables.lists_of, place] = tables.lists_response
    ranks[tables.lists_of, place] = tables.lists_rank.double()
    longest = int(counts[listed].max()) if len(listed) else 0
    return responses[listed, :longest], ranks[listed, :longest]


def _widened(values: Tensor, width: int, padding: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=padding)


def _strengths(tables: RowTables, pairs: Int[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """Margins as multiples of their source's mean: each source has a scale of its own."""
    margins, sources = tables.pairs_margin[pairs].double(), tables.pairs_source[pairs]
    known = ~margins.isnan()
    count = int(sources.max()) + 1 if len(sources) else 0
    sums = torch.zeros(count, 2, dtype=torch.float64)
    both = torch.stack([margins[known], torch.ones_like(margins[known])], dim=1)
    sums.index_add_(0, sources[known], both)
    mean = sums[:, 0] / sums[:, 1]
    return torch.where(mean[sources] > 0.0, margins / mean[sources], torch.nan)


def out_of_fold_rewards(
    data: EmbeddedData, heads: FittedHeads, transforms: FittedTransforms, rows: Tensor
) -> Float[Tensor, "responses objectives"]:
    """Adjusted rewards of responses, of heads that never saw their prompts."""
    folds = heads.fold_of_group[data.tables.group_of_response[rows]]
    rewards = torch.empty(len(rows), len(data.objectives.names), dtype=torch.float64)
    for fold, transform in enumerate(transforms.without_fold):
        for here in (folds == fold).nonzero()[:, 0].split(READ_ROWS):
            style = data.style(rows[here], transform.covariates)
            rewards[here] = transform.adjusted(data.responses.read(rows[here]), style)
    return rewards


def text_deviation(model: ArmoRewardModel, data: EmbeddedData) -> float:
    """Largest difference between scores of the examples' text and of their stored embeddings."""
    largest = 0.0
    for example in data.examples:
        numbers = torch.tensor(example["numbers"])
        stored = model.score_embeddings(
            data.responses.read(numbers),
            data.prompt_embeddings(numbers),
            texts=example["responses"],
        )
        fresh = model.score_responses(example["prompt"], example["responses"])
        largest = max(largest, float((stored.score - fresh.score).abs().max()))
    return largest


def _fill_card(run: Run, evaluation: Evaluation) -> None:
    """Put the main tables of the report into the card of the model."""
    measured = [_brief(table) for table in evaluation.tables if table.name in CARD_TABLES]
    fill_card(
        run.stage_folder("model"),
        measured,
        title="Measured on held-out prompts",
        name=run.folder.name,
        accuracies=[
            (f"held-out pairs of {run.folder.name}", row[1])
            for table in measured
            if table.name == "rivals"
            for row in table.rows
            if row[0] == GATED
        ],
    )


def _brief(table: Table) -> Table:
    """Leave the style of single objectives to the saved report."""
    if table.name != "style":
        return table
    return replace(table, rows=tuple(row for row in table.rows if row[0] == "score"))


def heads_table(summaries: Sequence[HeadSummary]) -> Table:
    """Show how the heads were fitted."""
    return Table(
        "heads",
        "Heads",
        ("objective", "ratings", "judgements", "penalty", "error variance explained", "deviation"),
        tuple(
            (s.objective, s.ratings, s.judgements, f"{s.alpha:g}", s.explained, s.sigma)
            for s in summaries
        ),
        "Penalty chosen and variance explained by cross-validation over training prompts (where "
        "rewards are probabilities, the share of cross-entropy); standard deviation of a rating "
        "about the reward, on [0, 1].",
    )


def decorrelation_table(summaries: Sequence[DecorrelationSummary]) -> Table:
    """Show what decorrelation did to the objectives."""
    rows: list[tuple[Any, ...]] = []
    for s in summaries:
        rows += [
            (s.objective, bias, s.penalties[bias], s.before[bias], s.after[bias], s.kept)
            for bias in s.penalties
        ]
        measured = [name for name in s.before if name not in s.penalties]
        if measured:
            before, after = (
                max(measured, key=lambda name: abs(side[name])) for side in (s.before, s.after)
            )
            what = f"measured style, at most ({before}; {after})"
            rows.append((s.objective, what, None, s.before[before], s.after[after], s.kept))
    return Table(
        "decorrelation",
        "Decorrelation",
        ("objective", "from", "penalty", "Spearman before", "Spearman after", "spread kept"),
        tuple(rows) or (("(nothing to decorrelate)", "", None, None, None, None),),
        "Reference responses: those of the training pairs and lists.",
    )


def gating_table(summary: GatingSummary) -> Table:
    """Show how the gate compares with the best constant mix."""
    loss, accuracy = summary.loss_gain, summary.accuracy_gain
    return Table(
        "gating",
        "Gate",
        ("mix", "loss", "accuracy"),
        (
            ("best constant", summary.constant_loss, summary.constant_accuracy),
            *(
                (
                    ("gate", summary.loss, summary.accuracy),
                    ("gate is ahead by", loss.mean, accuracy.mean),
                    ("from", loss.low, accuracy.low),
                    ("to", loss.high, accuracy.high),
                )
                if summary.trained
                else ()
            ),
        ),
        f"{summary.verdict} {summary.comparisons} pairs and lists of training prompts, each judged "
        f"by a member that was not trained on it; best epochs "
        f"{', '.join(map(str, summary.epochs))}, 0 being the constant mix itself; beta "
        f"{summary.beta:.3g}; 95 % intervals.",
    )


def _objectives_table(objectives: ObjectiveSet) -> Table:
    return Table(
        "objectives",
        "Objectives",
        ("objective", "scale", "mixed into the score", "meaning"),
        tuple(
            (o.name, f"{o.low:g} to {o.high:g}", "no" if o.bias else "yes", o.meaning)
            for o in objectives.objectives
        ),
    )


def _data_table(data: EmbeddedData) -> Table:
    tables = data.tables
    rows = [
        (name, len(test), int(train.sum()), int(test.sum()))
        for name, train, test in (
            ("rated responses", tables.ratings_train, tables.ratings_test),
            ("preference pairs", tables.pairs_train, tables.pairs_test),
            *(
                (name, tables.lists_train[kind], tables.lists_test[kind])
                for name, kind in (
                    ("response lists", ~tables.lists_benchmark),
                    ("benchmark lists", tables.lists_benchmark),
                )
            ),
        )
    ]
    return Table(
        "data",
        "Data",
        ("rows", "all", "train", "test"),
        tuple(rows),
        f"{data.prompts.rows} distinct prompts, {data.responses.rows} distinct responses.",
    )


def _card_usage(model: ArmoRewardModel) -> str:
    spec = model.backbone.spec
    return f"""
## Use

```python
import armo

model = armo.ArmoRewardModel.from_pretrained("THIS FOLDER")
turns = [{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}]
out = model.score([turns])
out.score, out.rewards, out.gating_weights, out.contributions
```

The backbone is {spec.id} (SHA-256 of its weights {spec.digest}), which is not in this folder.
`armo verify model=THIS_FOLDER` scores the conversations of `golden.json` again.
"""
