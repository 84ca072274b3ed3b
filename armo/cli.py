"""The `armo` command: configuration becomes objects, objects go to the stages."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

CONFIG = {"version_base": "1.3", "config_path": "pkg://armo.conf"}

USAGE = """armo: interpretable, multi-objective reward models

usage: armo VERB [OVERRIDES ...]

  train    rated responses and preference pairs in, a scoring model out
  score    score the rows of a file with a model
  verify   check that a model scores its golden conversations as it did when made

`armo VERB --help` lists a verb's settings. A setting is changed by `name=value`, as in
`armo train experiment=demo fit.gating.hidden_dim=32`; Hydra reads the command line.
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
    sys.argv = [f"armo {verb}", *sys.argv[2:]]
    # Progress bars of libraries for a model of a few megabytes only hide ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Hydra prints its own errors over many lines, unless it is asked to raise them.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        VERBS[verb]()
    except HydraException as error:
        _fail(error)
    except KeyboardInterrupt:
        print("armo: interrupted", file=sys.stderr)
        sys.exit(130)


def _fail(error: Exception) -> NoReturn:
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"armo: error: {text}", file=sys.stderr)
    sys.exit(1)


def _in_one_line(task: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """Turn any error into one line and exit status 1; all of it with `hydra.verbose=true`."""

    @wraps(task)
    def run(cfg: DictConfig) -> None:
        _quieten()
        try:
            task(cfg)
        except KeyboardInterrupt:
            resumes = "; the same command goes on where it was" if task.__name__ == "train" else ""
            print(f"armo: interrupted{resumes}", file=sys.stderr)
            sys.exit(130)
        except MissingMandatoryValue as error:
            print(f"armo: {error.full_key} is needed: {error.full_key}=...", file=sys.stderr)
            sys.exit(2)
        except Exception as error:
            if HydraConfig.get().verbose:
                raise
            _fail(error)

    return run


@hydra.main(**CONFIG, config_name="train")
@_in_one_line
def train(cfg: DictConfig) -> None:
    """Run the stages of a training run."""
    from armo import stages
    from armo.artifacts import exclusive
    from armo.data.objectives import ObjectiveSet
    from armo.embed.extract import outer_rank

    _quieten()  # once more: Lightning sets its own log level when it is imported
    unknown = [name for name in cfg.stages if name not in stages.STAGES]
    if unknown:
        raise ValueError(f"`stages` knows {', '.join(stages.STAGES)}, not {', '.join(unknown)}")
    rank = outer_rank() or 0
    run = stages.Run(folder=Path(cfg.output_dir), console=_console(), seed=cfg.seed, rank=rank)
    plain: Callable[[Any], Any] = lambda section: OmegaConf.to_container(  # noqa: E731
        section, resolve=True, throw_on_missing=True
    )
    benchmark = cfg.data.benchmark
    backbone = cfg.embed.backbone
    source_weights = plain(cfg.fit)["source_weights"] or {}
    for name, weight in source_weights.items():
        if not isinstance(weight, int | float) or not 0.0 <= weight < float("inf"):
            raise ValueError(
                f"`source_weights` must be finite numbers from 0 on, got {weight!r} for {name}"
            )
    tasks: dict[str, Callable[[], None]] = {
        "embed": lambda: stages.run_embed(
            run,
            settings={"data": plain(cfg.data), "embed": _lasting(plain(cfg.embed))},
            objectives=ObjectiveSet.from_mapping(plain(cfg.data.objectives)),
            paths={
                "ratings": plain(cfg.data.ratings)["path"],
                "preferences": plain(cfg.data.pairs)["path"],
                "counterfactuals": plain(benchmark)["path"],
            },
            stream_ratings=_build(cfg.data.ratings),
            stream_pairs=_build(cfg.data.pairs),
            stream_lists=_build(benchmark) if benchmark.path is not None else None,
            backbone=_build(backbone),
            team=_build(cfg.embed.trainer),
            backbone_id=(plain(backbone)["spec"]["id"], backbone.spec.revision),
            test_fraction=cfg.data.test_fraction,
            min_ratings=cfg.data.min_ratings,
            shard_rows=cfg.embed.shard_rows,
        ),
        "heads": lambda: stages.run_heads(
            run,
            settings=plain(cfg.fit.heads),
            fit=_build(cfg.fit.heads),
            source_weights=source_weights,
        ),
        "decorrelation": lambda: stages.run_decorrelation(
            run,
            settings=plain(cfg.fit.decorrelation),
            fit=_build(cfg.fit.decorrelation),
            source_weights=source_weights,
        ),
        "gating": lambda: stages.run_gating(
            run,
            settings={"gating": plain(cfg.fit.gating), "trainer": plain(cfg.fit.trainer)},
            fit=_build(cfg.fit.gating, trainer=_build(cfg.fit.trainer)),
            source_weights=source_weights,
        ),
        "model": lambda: stages.run_model(run, backbone=_build(backbone)),
        "report": lambda: stages.run_report(run, settings=plain(cfg.report), **plain(cfg.report)),
    }
    if rank > 0:
        # Started by `torchrun` or SLURM beside the first process, to help with the embedding.
        if "embed" in cfg.stages:
            tasks["embed"]()
        return
    with exclusive(run.folder):
        for name in stages.STAGES:
            if name in cfg.stages:
                tasks[name]()


@hydra.main(**CONFIG, config_name="score")
@_in_one_line
def score(cfg: DictConfig) -> None:
    """Score the rows of a file."""
    from armo.artifacts import replacing
    from armo.data.sources import load_scorable
    from armo.model.reward_model import ArmoRewardModel

    rows = load_scorable(cfg.input)
    model = ArmoRewardModel.from_pretrained(
        cfg.model, device=cfg.device, batch_tokens=cfg.batch_tokens
    )
    options = {
        "weights": OmegaConf.to_container(cfg.weights) if cfg.weights is not None else None,
        "scale": cfg.scale,
    }
    mixed = [model.objectives.names[k] for k in model.objectives.mixed_indices]
    console = _console()
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


@hydra.main(**CONFIG, config_name="verify")
@_in_one_line
def verify(cfg: DictConfig) -> None:
    """Score a model's golden conversations again."""
    from armo.model.reward_model import ArmoRewardModel

    model = ArmoRewardModel.from_pretrained(
        cfg.model, device=cfg.device, batch_tokens=cfg.batch_tokens
    )
    deviation = model.verify()
    _console().print(f"ok: golden outputs of {cfg.model} deviate by {deviation:.1e} at most")


VERBS = {"train": train, "score": score, "verify": verify}

SHOWN_ROWS = 20
CHUNK_ROWS = 1024


def _build(section: DictConfig, **more: Any) -> Any:
    """Make the function that a section names, its settings filled in as plain values."""
    return instantiate(section, _convert_="all", **more)


def _lasting(embed: dict[str, Any]) -> dict[str, Any]:
    """Leave out the settings that do not change an embedding."""
    backbone = {k: v for k, v in embed["backbone"].items() if k not in ("device", "batch_tokens")}
    return {"backbone": backbone}


def _score_rows(
    model: Any, rows: Sequence[Any], options: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield one result per row; rows are scored in chunks, so memory stays bounded."""
    from armo.embed.spec import BackboneError

    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = rows[start : start + CHUNK_ROWS]
        conversations = [
            [*row.prompt, {"role": "assistant", "content": response}]
            for row in chunk
            for response in row.responses
        ]
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
            for name in ("rewards", "gating_weights", "contributions"):
                columns = [_values(column) for column in getattr(out, name)[part].T]
                result[name] = dict(zip(out.objectives, columns, strict=True))
            result["truncated"] = out.truncated[part].tolist()
            if row.single:
                result["score"] = result["score"][0]
                result["truncated"] = result["truncated"][0]
                for name in ("rewards", "gating_weights", "contributions"):
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
    for result in results:
        single = not isinstance(result["score"], list)
        scores = [result["score"]] if single else result["score"]
        for k, value in enumerate(scores):
            parts = [result["contributions"][name] for name in objectives]
            values = parts if single else [part[k] for part in parts]
            label = result["id"] if single else f"{result['id']} [{k}]"
            shown = ["skipped" if v is None else f"{v:+.3f}" for v in (value, *values)]
            table.add_row(Text(label), *shown)
    return table


def _console() -> Console:
    """A console; wide enough for the tables where the output is no terminal, but a file."""
    console = Console()
    return console if console.is_terminal else Console(width=110)


def _quieten() -> None:
    """Silence what libraries say about themselves; what armo says stays."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "httpx", "markdown_it"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("lightning", "torch"):
        warnings.filterwarnings("ignore", module=rf"{module}\..*")


if __name__ == "__main__":
    main()
