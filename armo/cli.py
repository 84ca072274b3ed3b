"""The `armo` command: configuration becomes objects, objects go to the stages."""

import importlib.util
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.progress import track
from rich.table import Table
from rich.text import Text

from armo import data_cli
from armo.command import (
    CONFIG,
    build,
    columns_of,
    fail,
    in_one_line,
    make_console,
    one_line,
    quieten,
)
from armo.sweeps import JobError, held_out_results, show_jobs

USAGE = """armo: interpretable, multi-objective reward models

usage: armo VERB [OVERRIDES ...]

  train    rated responses and preference pairs in, a scoring model out
  score    score the rows of a file with a model
  evaluate models side by side on test sets: tables, pictures, one page
  explain  say why one response of a pair is preferred, and what would change that
  verify   check that a model scores its golden conversations as it did when made
  import   make a model folder of a published ArmoRM or QRM checkpoint
  export   write a model in a format that other programs read
  serve    score over HTTP, for other programs
  data     check a data set, annotate it with a model, or make pairs of its ratings

`armo VERB --help` lists a verb's settings. A setting is changed by `name=value`, as in
`armo train experiment=demo fit.gating.hidden_dim=32`; Hydra reads the command line.
`armo train -m` runs one job for each combination of values given as `name=value,value`.
"""

logger = logging.getLogger("armo")


def main() -> None:
    """Run `armo VERB`; exit with 0 when done, 1 when it failed, 2 for wrong usage."""
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb in ("-h", "--help", "help"):
        print(USAGE)
        sys.exit(0)
    if verb == "--version":
        from importlib.metadata import version

        print(version("armo"))
        sys.exit(0)
    if verb not in VERBS:
        print(USAGE, file=sys.stderr)
        print(f"armo: unknown verb {verb!r}" if verb else "armo: a verb is needed", file=sys.stderr)
        sys.exit(2)
    command = VERBS[verb]
    if isinstance(command, dict):
        after = sys.argv[2] if len(sys.argv) > 2 else ""
        if after in ("-h", "--help", "help"):
            print(f"usage: armo {verb} {'|'.join(command)} [OVERRIDES ...]\n\n{USAGE}")
            sys.exit(0)
        if after not in command:
            print(f"armo {verb} needs one of {', '.join(command)}, got {after!r}", file=sys.stderr)
            sys.exit(2)
        verb, command = f"{verb} {after}", command[after]
    sys.argv = [f"armo {verb}", *sys.argv[1 + len(verb.split()) :]]
    # Progress bars of libraries for a model of a few megabytes only hide ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Hydra prints its own errors over many lines, unless it is asked to raise them.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        command()
    except HydraException as error:
        fail(error)
    except JobError as error:
        # Hydra ends a sweep's callbacks with the sweep, not when one of its jobs failed.
        show_jobs(error.sweep)
        fail(error)
    except KeyboardInterrupt:
        print("armo: interrupted", file=sys.stderr)
        sys.exit(130)


@hydra.main(**CONFIG, config_name="train")
@in_one_line
def train(cfg: DictConfig) -> float | None:
    """Run the stages of a training run.

    Returns:
        What an optimiser is to make small: the gate's loss on held-out training prompts, where
        the gate was among the stages.
    """
    from armo import stages
    from armo.artifacts import exclusive
    from armo.data.mixture import section_files
    from armo.data.objectives import ObjectiveSet
    from armo.data.sources import BUILTIN_FILES
    from armo.embed.extract import outer_rank

    quieten()  # once more: Lightning sets its own log level when it is imported
    unknown = [name for name in cfg.stages if name not in stages.STAGES]
    if unknown:
        raise ValueError(f"`stages` knows {', '.join(stages.STAGES)}, not {', '.join(unknown)}")
    if "gating" in cfg.stages:
        _check_logger(cfg.fit.logger)
        if cfg.fit.trainer.devices not in (1, "1") and cfg.fit.trainer.strategy == "auto":
            # Lightning's own choice starts this command again, which would embed once more.
            raise ValueError(
                "several devices for the gate need `fit.trainer.strategy=ddp_spawn` as well"
            )
    _check_benchmark(cfg.data.benchmark)
    rank = outer_rank() or 0
    run = stages.Run(
        folder=_output_folder(cfg),
        console=make_console(),
        seed=cfg.seed,
        rank=rank,
        stages=tuple(cfg.stages),
        source=Path(cfg.from_run) if cfg.from_run is not None else None,
    )
    embed: Any = OmegaConf.to_container(cfg.embed, resolve=True)
    run.check_source(embed=_lasting(embed))
    plain: Callable[[Any], Any] = lambda section: OmegaConf.to_container(  # noqa: E731
        section, resolve=True, throw_on_missing=True
    )
    lists, benchmark = cfg.data.lists, cfg.data.benchmark
    backbone = cfg.embed.backbone
    source_weights = plain(cfg.fit)["source_weights"] or {}
    for name, weight in source_weights.items():
        if not isinstance(weight, int | float) or not 0.0 <= weight < float("inf"):
            raise ValueError(
                f"`source_weights` must be finite numbers from 0 on, got {weight!r} for {name}"
            )
    fixed_weights = plain(cfg.report)["fixed_weights"]
    if fixed_weights is not None and {"embed", "report"} <= set(cfg.stages):
        # Before hours of work, not after them.
        if not isinstance(fixed_weights, dict) or any(
            not isinstance(weight, int | float) for weight in fixed_weights.values()
        ):
            raise ValueError(
                f"`report.fixed_weights` must be numbers by objective, {{OBJECTIVE: 2, ...}}, got "
                f"{fixed_weights!r}"
            )
        try:
            ObjectiveSet.from_mapping(plain(cfg.data.objectives)).mix(fixed_weights)
        except ValueError as error:
            raise ValueError(f"`report.fixed_weights`: {error}") from None
    decorrelation = plain(cfg.fit.decorrelation)
    tasks: dict[str, Callable[[], None]] = {
        "embed": lambda: stages.run_embed(
            run,
            settings={"data": plain(cfg.data), "embed": _lasting(plain(cfg.embed))},
            objectives=ObjectiveSet.from_mapping(plain(cfg.data.objectives)),
            files=[
                file
                for kind in BUILTIN_FILES
                for file in section_files(plain(cfg.data[kind]), kind=kind)
            ]
            + _strength_files(plain(cfg.data.noise)),
            stream_ratings=build(cfg.data.ratings),
            stream_pairs=build(cfg.data.pairs),
            stream_lists=build(lists) if lists._target_ is not None else None,
            stream_benchmark=build(benchmark) if benchmark._target_ is not None else None,
            backbone=build(backbone),
            team=build(cfg.embed.trainer),
            backbone_id=(plain(backbone)["spec"]["id"], backbone.spec.revision),
            test_fraction=cfg.data.test_fraction,
            min_ratings=cfg.data.min_ratings,
            shard_rows=cfg.embed.shard_rows,
            changes=[
                build(section)
                for section in (cfg.data.noise, cfg.data.augment)
                if section._target_ is not None
            ],
        ),
        "heads": lambda: stages.run_heads(
            run,
            settings=plain(cfg.fit.heads),
            reweighted=decorrelation["features"] if "reweight" in decorrelation["methods"] else (),
            fit=build(cfg.fit.heads),
            source_weights=source_weights,
        ),
        "decorrelation": lambda: stages.run_decorrelation(
            run,
            settings=plain(cfg.fit.decorrelation),
            fit=build(cfg.fit.decorrelation),
            source_weights=source_weights,
        ),
        "gating": lambda: stages.run_gating(
            run,
            settings={
                "gating": {k: v for k, v in plain(cfg.fit.gating).items() if k != "progress"},
                "trainer": plain(cfg.fit.trainer),
            },
            fit=build(cfg.fit.gating, trainer=build(cfg.fit.trainer), logger=build(cfg.fit.logger)),
            source_weights=source_weights,
        ),
        "model": lambda: stages.run_model(run, backbone=build(backbone)),
        "report": lambda: stages.run_report(run, settings=plain(cfg.report), **plain(cfg.report)),
    }
    if rank > 0:
        # Started by `torchrun` or SLURM beside the first process, to help with the embedding.
        if "embed" in cfg.stages:
            tasks["embed"]()
        return None
    with exclusive(run.folder):
        for name in stages.STAGES:
            if name in cfg.stages:
                tasks[name]()
    return held_out_results(run.folder)["loss"] if "gating" in cfg.stages else None


@hydra.main(**CONFIG, config_name="score")
@in_one_line
def score(cfg: DictConfig) -> None:
    """Score the rows of a file."""
    from armo.artifacts import replacing
    from armo.data.sources import load_scorable
    from armo.model.reward_model import ArmoRewardModel

    rows = load_scorable(cfg.input, columns=columns_of(cfg))
    model = ArmoRewardModel.from_pretrained(
        cfg.model, device=cfg.device, batch_tokens=cfg.batch_tokens
    )
    options = {
        "weights": OmegaConf.to_container(cfg.weights) if cfg.weights is not None else None,
        "scale": cfg.scale,
        "thresholds": OmegaConf.to_container(cfg.thresholds) if cfg.thresholds else None,
    }
    mixed = [model.objectives.names[k] for k in model.objectives.mixed_indices]
    console = make_console()
    shown: list[dict[str, Any]] = []
    results = _score_rows(model, rows, options)
    progress = track(results, total=len(rows), description="scoring", console=console)
    if cfg.output is None:
        shown = [result for result, _ in zip(progress, range(len(rows)), strict=True)]
    else:
        with replacing(Path(cfg.output)) as temporary, temporary.open("w") as file:
            for number, result in enumerate(progress):
                file.write(json.dumps(result, ensure_ascii=False) + "\n")
                if number < SHOWN_ROWS:
                    shown.append(result)
    console.print(_score_table(shown[:SHOWN_ROWS], mixed))
    if len(rows) > SHOWN_ROWS:
        console.print(f"the first {SHOWN_ROWS} of {len(rows)} rows")
    if cfg.output is not None:
        console.print(f"saved {cfg.output}")


@hydra.main(**CONFIG, config_name="evaluate")
@in_one_line
def evaluate(cfg: DictConfig) -> None:
    """Evaluate models on test sets, side by side."""
    from armo.data.benchmarks import Benchmark
    from armo.model.pretrained import download_folder, load_folder
    from armo.model.reward_model import ArmoRewardModel
    from armo.report.bias import probe_lists
    from armo.report.card import fill_card
    from armo.report.pages import print_tables, save_pages
    from armo.report.suite import (
        DETAILS,
        TestSets,
        check_sets,
        evaluate_models,
        headlines,
        model_names,
        save_scores,
        score_models,
    )

    paths, names = _one_or_several(cfg.model) or [], _one_or_several(cfg.names)
    names = model_names(paths, names)
    if cfg.probes < 0:
        raise ValueError(f"`probes` must be 0 or more, got {cfg.probes}")
    here = [Path(path).expanduser() for path in paths]
    if cfg.card and (remote := [str(path) for path in here if not path.is_dir()]):
        raise ValueError(f"`card` writes into folders; {remote[0]} is none")
    folders = [path if path.is_dir() else download_folder(str(path)) for path in here]
    for folder in folders:  # all of them, before hours of embedding
        load_folder(folder)
    if cfg.data.benchmark.get("_partial_") or cfg.data.benchmark._target_ is None:
        raise ValueError(
            "`data/benchmark`: this one is lists for a training run; to evaluate on your own pairs "
            "or lists, data/benchmark=pairs data.benchmark.path=..."
        )
    built = build(cfg.data.benchmark)
    best_of_n = cfg.data.best_of_n
    sets = TestSets(
        (built,) if isinstance(built, Benchmark) else tuple(built),
        rated=None if best_of_n._target_ is None else build(best_of_n),
    )
    if cfg.probes:
        sets = replace(sets, probes=probe_lists(sets.judged, most=cfg.probes, seed=cfg.seed))
    check_sets(sets)
    models = {
        name: partial(
            ArmoRewardModel.from_pretrained,
            folder,
            device=cfg.device,
            batch_tokens=cfg.batch_tokens,
        )
        for name, folder in zip(names, folders, strict=True)
    }
    output, console = Path(cfg.output_dir), make_console(width=132)
    scored = score_models(models, sets.rows, output)
    evaluation = evaluate_models(sets, scored, seed=cfg.seed)
    of_sets = ", ".join(each.title for each in sets.benchmarks)
    title = f"{', '.join(names)} on {of_sets}"
    save_pages(evaluation, output, title=title)
    save_scores(output, sets, scored)
    shown = [
        _few_sizes(table) if table.name == "best_of_n" else table
        for table in evaluation.tables
        if table.name not in DETAILS
    ]
    print_tables(shown, console)
    if cfg.card:
        for name, folder in zip(names, folders, strict=True):
            fill_card(
                folder,
                shown,
                title=f"Evaluation on {of_sets}",
                name=name,
                accuracies=headlines(sets, evaluation, name),
            )
            console.print(f"filled the card of {folder}")
    console.print(f"saved {output / 'report.html'}")


def _one_or_several(value: Any) -> list[str] | None:
    """A text alone is a list of one."""
    if value is None:
        return None
    return [value] if isinstance(value, str) else [str(each) for each in value]


def _few_sizes(table: Any) -> Any:
    """Leave most sizes of the choice to the saved report."""
    size = table.columns.index("n")
    largest = max(row[size] for row in table.rows)
    return replace(table, rows=tuple(row for row in table.rows if row[size] in (1, 4, largest)))


@hydra.main(**CONFIG, config_name="explain")
@in_one_line
def explain(cfg: DictConfig) -> None:
    """Explain the preference in each pair of a file."""
    from armo.artifacts import write_text
    from armo.data.sources import load_scorable
    from armo.model.reward_model import ArmoRewardModel
    from armo.report.explain import explain_pairs
    from armo.report.explain_page import NO_RUN, explanation_page
    from armo.report.pages import print_tables

    rows = load_scorable(cfg.input, responses=2, columns=columns_of(cfg))
    if cfg.nearest < 1:
        raise ValueError(f"`nearest` must be at least 1, got {cfg.nearest}")
    model = ArmoRewardModel.from_pretrained(
        cfg.model, device=cfg.device, batch_tokens=cfg.batch_tokens
    )
    weights: Any = OmegaConf.to_container(cfg.weights) if cfg.weights is not None else None
    console = make_console(width=132)
    with tempfile.TemporaryDirectory(prefix="armo-") as texts:
        training = None
        if cfg.run is not None:
            training = _training_prompts(Path(cfg.run), model, texts=Path(texts))
        # Only what is shown is explained.
        explained = rows[:SHOWN_ROWS] if cfg.output is None else rows
        explanations = explain_pairs(
            model,
            explained,
            weights=weights,
            scale=cfg.scale,
            training=training,
            nearest=cfg.nearest,
        )
        progress = track(explanations, total=len(explained), description="scoring", console=console)
        kept = list(progress)
    for each in kept[:SHOWN_ROWS]:
        title = f"{each.id}: {each.verdict}"
        tables = [replace(each.objectives, title=title, note="")]
        print_tables(tables + ([each.nearest] if each.nearest else []), console)
    if len(rows) > SHOWN_ROWS:
        console.print(f"the first {SHOWN_ROWS} of {len(rows)} pairs")
    if cfg.run is None:
        console.print(Text(NO_RUN))
    if cfg.output is not None:
        write_text(Path(cfg.output), explanation_page(kept, title=f"Pairs of {cfg.input}"))
        console.print(f"saved {cfg.output}")


def _training_prompts(run: Path, model: Any, *, texts: Path) -> Any:
    """Open the training prompts of a run, with their texts if its rows are as they were."""
    from armo.artifacts import MANIFEST, ArtifactError, read_json
    from armo.data.augment import change_pairs
    from armo.data.objectives import ObjectiveSet
    from armo.data.sources import DataError
    from armo.report.explain import TrainingPrompts, read_texts_again
    from armo.stages import FOLDERS, two_right

    folder = run / FOLDERS["embed"]
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"`run`: {run} has no finished `embed` stage")
    training = TrainingPrompts.load(folder, model=model)
    data = read_json(folder / MANIFEST)["settings"]["data"]
    kinds = [data.get(kind) or {} for kind in ("ratings", "pairs", "lists", "benchmark")]
    changing = [data[kind] for kind in ("noise", "augment") if data.get(kind)]
    # A run is data: what it names is called only where it is armo's own way to read rows.
    if not all(name.startswith("armo.data.") for name in _targets([kinds, changing])):
        return training
    objectives = ObjectiveSet.from_mapping(data["objectives"])
    ratings, pairs, lists, benchmark = (
        instantiate(section, _convert_="all") if section.get("_target_") else lambda **_: ()
        for section in kinds
    )
    try:
        changes = [
            instantiate(section, _convert_="all")
            for section in changing
            if section["_target_"] is not None
        ]
        text = read_texts_again(
            training.data,
            texts,
            objectives=objectives,
            ratings=ratings(objectives=objectives),
            pairs=change_pairs(
                lambda: pairs(objectives=objectives),
                changes,
                others=lambda: chain(
                    ratings(objectives=objectives), lists(), two_right(benchmark())
                ),
                test_fraction=data["test_fraction"],
            ),
            lists=lists(),
            benchmark=two_right(benchmark()),
            test_fraction=data["test_fraction"],
        )
    except (DataError, OSError) as error:
        logger.warning("the texts of the training prompts cannot be read: %s", one_line(error))
        return training
    return replace(training, text=text)


def _targets(section: Any) -> Iterator[str]:
    """Yield what a section of a configuration would call, at any depth."""
    if isinstance(section, dict):
        if section.get("_target_") is not None:
            yield str(section["_target_"])
        section = [*section.values()]
    if isinstance(section, list):
        for value in section:
            yield from _targets(value)


@hydra.main(**CONFIG, config_name="verify")
@in_one_line
def verify(cfg: DictConfig) -> None:
    """Score a model's golden conversations again."""
    from armo.model.reward_model import ArmoRewardModel

    model = ArmoRewardModel.from_pretrained(
        cfg.model, device=cfg.device, batch_tokens=cfg.batch_tokens
    )
    deviation = model.verify()
    make_console().print(f"ok: golden outputs of {cfg.model} deviate by {deviation:.1e} at most")


@hydra.main(**CONFIG, config_name="import")
@in_one_line
def import_(cfg: DictConfig) -> None:
    """Make a model folder of a published checkpoint."""
    from armo.data.objectives import ObjectiveSet
    from armo.model.armorm import import_published, save_imported
    from armo.model.plain import refuse_existing

    source = str(cfg.source)
    output = Path(cfg.output or Path("checkpoints") / Path(source.rstrip("/")).name)
    refuse_existing(output)
    settings: Any = OmegaConf.to_container(cfg, throw_on_missing=True)
    names = ("revision", "beta", "max_tokens", "max_prompt_tokens", "dtype", "device")
    model = import_published(
        source,
        objectives=ObjectiveSet.from_mapping(settings["objectives"]),
        batch_tokens=cfg.batch_tokens,
        **{name: settings[name] for name in names},
    )
    save_imported(model, output, source=source)
    console = make_console()
    console.print(f"saved {output}: {len(model.objectives.names)} objectives, from {source}")
    console.print(f"the checkpoint stays where it is, as the backbone {model.backbone.spec.id}")


@hydra.main(**CONFIG, config_name="export")
@in_one_line
def export(cfg: DictConfig) -> None:
    """Write a model in a format that other programs read."""
    from armo.data.sources import load_pairs
    from armo.model.export import FORMATS, check_format, export_model
    from armo.model.plain import refuse_existing
    from armo.model.reward_model import ArmoRewardModel
    from armo.report.metrics import bootstrap_interval

    check_format(cfg.format)
    refuse_existing(Path(cfg.output))
    weights: Any = OmegaConf.to_container(cfg.weights) if cfg.weights is not None else None
    pairs = load_pairs(cfg.input) if cfg.input is not None else []
    model = ArmoRewardModel.from_pretrained(
        cfg.model, device=cfg.device, batch_tokens=cfg.batch_tokens
    )
    report = export_model(model, cfg.output, format=cfg.format, weights=weights, pairs=pairs)
    console = make_console()
    console.print(f"saved {report.folder}: {FORMATS[cfg.format]}")
    console.print(
        f"loaded again with plain Transformers: right to {report.deviation:.1e} on "
        f"{report.checked} conversations"
    )
    if report.weights:
        shown = ", ".join(f"{name} {weight:.3f}" for name, weight in report.weights.items())
        console.print(Text(f"weights: {shown}"))
    for sentence in report.lost:
        console.print(Text(f"not in this format: {sentence}"))
    cost = report.cost
    if cost is None:
        console.print("what it costs in accuracy was not measured: give preference pairs, `input`")
        return
    table = Table(title=f"Accuracy on {len(cost.own)} pairs", title_justify="left")
    for name in ("score", "accuracy", "low", "high"):
        table.add_column(name, justify="left" if name == "score" else "right")
    for name, values in (
        ("the model", cost.own),
        ("with the gate's weights" if cfg.format == "labels" else "the export", cost.exported),
        ("the model is ahead by", cost.own - cost.exported),
    ):
        interval = bootstrap_interval(values, cost.groups)
        numbers = (interval.mean, interval.low, interval.high)
        table.add_row(name, *(f"{number:.3f}" for number in numbers))
    console.print(table)
    console.print(f"{cost.reordered:.1%} of the pairs are ranked otherwise")


@hydra.main(**CONFIG, config_name="serve")
@in_one_line
def serve(cfg: DictConfig) -> None:
    """Serve a model over HTTP until told to stop."""
    missing = [name for name in SERVE_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"`armo serve` needs {', '.join(missing)}; `pip install 'armo[serve]'`"
        )
    from armo.model.reward_model import ArmoRewardModel
    from armo.report.suite import model_names
    from armo.serve.client import PoolingClient, load_split
    from armo.serve.server import serve as serve_model
    from armo.serve.service import ServerSettings

    settings: Any = OmegaConf.to_container(cfg.server, resolve=True)
    key_file = settings.pop("api_key_file")
    key = Path(key_file).read_text().strip() if key_file else os.environ.get(API_KEY)
    settings = ServerSettings(host=cfg.host, port=cfg.port, api_key=key, **settings)
    if (url := cfg.backbone.url) is not None:
        client = PoolingClient(
            url,
            model=cfg.backbone.model,
            api_key=os.environ.get(BACKBONE_KEY),
            timeout_s=settings.timeout_s,
        )
        model = load_split(
            cfg.model, client, tokenizer=cfg.backbone.tokenizer, batch_tokens=cfg.batch_tokens
        )
    else:
        model = ArmoRewardModel.from_pretrained(
            cfg.model, device=cfg.device, batch_tokens=cfg.batch_tokens
        )
    name = cfg.name or model_names([str(cfg.model)])[0]
    serve_model(model, name=name, settings=settings)


VERBS: dict[str, Callable[[], Any] | dict[str, Callable[[], Any]]] = {
    "train": train,
    "score": score,
    "evaluate": evaluate,
    "explain": explain,
    "verify": verify,
    "import": import_,
    "export": export,
    "serve": serve,
    "data": data_cli.VERBS,
}

SERVE_PACKAGES = ("fastapi", "prometheus_client", "uvicorn")
API_KEY = "ARMO_API_KEY"
BACKBONE_KEY = "ARMO_BACKBONE_KEY"

# What Lightning's loggers import, any one of them.
LOGGER_PACKAGES = {
    "TensorBoardLogger": ("tensorboard", "tensorboardX"),
    "WandbLogger": ("wandb",),
    "MLFlowLogger": ("mlflow",),
}
SHOWN_ROWS = 20
CHUNK_ROWS = 1024


def _strength_files(noise: Mapping[str, Any]) -> list[Path]:
    """Return what the treatment of noise reads, to notice when it changes."""
    from armo.data.sources import data_files

    return data_files(noise["strengths"]["paths"], builtin_file="") if "strengths" in noise else []


def _output_folder(cfg: DictConfig) -> Path:
    """Return the folder of this run: `output_dir`, or in a sweep the folder of this job."""
    context = HydraConfig.get()
    if context.mode == RunMode.MULTIRUN:
        return Path(context.sweep.dir) / context.sweep.subdir
    return Path(cfg.output_dir)


def _check_benchmark(section: DictConfig) -> None:
    """Refuse a benchmark that `armo evaluate` loads; a run's report knows counterfactual pairs."""
    if section.get("_target_") is not None and not section.get("_partial_"):
        choice = HydraConfig.get().runtime.choices["data/benchmark"]
        raise ValueError(
            f"`data/benchmark={choice}` is for `armo evaluate`; a training run knows builtin, "
            f"jsonl and none"
        )


def _check_logger(section: DictConfig) -> None:
    """Refuse a logger whose package is missing before anything runs, not after the embedding."""
    name = str(section._target_).rpartition(".")[2]
    packages = LOGGER_PACKAGES.get(name, ())
    found = [importlib.util.find_spec(package) for package in packages]
    # Without an origin, it is a folder of that name here, as W&B makes one, and no package.
    if packages and not any(spec is not None and spec.origin is not None for spec in found):
        raise ModuleNotFoundError(
            f"`fit/logger`: {name} needs a package that is missing; `pip install {packages[0]}`"
        )


def _lasting(embed: dict[str, Any]) -> dict[str, Any]:
    """Leave out the settings that do not change an embedding."""
    backbone = {k: v for k, v in embed["backbone"].items() if k not in ("device", "batch_tokens")}
    return {"backbone": backbone}


def _score_rows(
    model: Any, rows: Sequence[Any], options: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield one result per row; rows are scored in chunks, so memory stays bounded."""
    from armo.embed.spec import BackboneError

    columns_of = ["rewards", "gating_weights", "contributions"]
    if model.uncertainty is not None:
        columns_of.insert(1, "uncertainty")
    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = rows[start : start + CHUNK_ROWS]
        conversations = [each for row in chunk for each in row.conversations]
        try:
            out = model.score(conversations, **options)
        except BackboneError as error:
            if error.group is None:
                raise
            ids = [row.id for row in chunk for _ in row.responses]
            reason = str(error).removeprefix(f"conversation {error.group}: ")
            raise BackboneError(f"row {ids[error.group]!r}: {reason}") from None
        position = 0
        for row in chunk:
            part = slice(position, position + len(row.responses))
            position += len(row.responses)
            result: dict[str, Any] = {"id": row.id, "score": _values(out.score[part])}
            for name in columns_of:
                columns = [_values(column) for column in getattr(out, name)[part].T]
                result[name] = dict(zip(out.objectives, columns, strict=True))
            result["truncated"] = out.truncated[part].tolist()
            if options["thresholds"]:
                result["passes"] = out.passes[part].tolist()
            if row.single:
                for name in {"score", "truncated", "passes"} & {*result}:
                    result[name] = result[name][0]
                for name in columns_of:
                    result[name] = {k: values[0] for k, values in result[name].items()}
            yield result


def _values(column: Any) -> list[float | None]:
    """Turn a column into JSON values; null for a response that was skipped as too long."""
    return [None if value != value else value for value in column.tolist()]


def _score_table(results: Sequence[Mapping[str, Any]], objectives: Sequence[str]) -> Table:
    table = Table(title="Scores, and what each objective contributes", title_justify="left")
    table.add_column("id")
    for name in ("score", *objectives):
        table.add_column(name, justify="right")
    if judged := any("passes" in result for result in results):
        table.add_column("passes", justify="right")
    for result in results:
        single = not isinstance(result["score"], list)
        scores = [result["score"]] if single else result["score"]
        for k, value in enumerate(scores):
            parts = [result["contributions"][name] for name in objectives]
            values = parts if single else [part[k] for part in parts]
            label = result["id"] if single else f"{result['id']} [{k}]"
            shown = ["skipped" if v is None else f"{v:+.3f}" for v in (value, *values)]
            if judged:
                passes = result["passes"] if single else result["passes"][k]
                shown.append("yes" if passes else "no")
            table.add_row(Text(label), *shown)
    return table


if __name__ == "__main__":
    main()
