"""The commands of `armo data`: rows checked, annotated by a model, or made into pairs."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, track
from rich.text import Text

from armo.command import CONFIG, build, columns_of, in_one_line, make_console

logger = logging.getLogger(__name__)

COLORS = {"error": "bold red", "warning": "yellow", "note": "cyan"}
SHOWN_ROWS = 25
"""Longer tables are in the report alone."""


@hydra.main(**CONFIG, config_name="data_check")
@in_one_line
def check(cfg: DictConfig) -> None:
    """Check a data set: tables of what is in it, and findings that name file, row and field."""
    from armo.data.check_labels import SEVERITIES
    from armo.data.check_overlap import BenchmarkGrams
    from armo.data.check_rows import RowReader
    from armo.data.objectives import ObjectiveSet
    from armo.report.data_report import check_rows
    from armo.report.pages import print_tables, save_pages

    if cfg.fail_on not in (None, *SEVERITIES):
        raise ValueError(f"`fail_on` must be {', '.join(SEVERITIES)} or null, got {cfg.fail_on!r}")
    declared = cfg.data.get("objectives")
    objectives = None
    if declared is not None:
        objectives = ObjectiveSet.from_mapping(build(declared))
    streams, objectives = _streams(cfg, objectives)
    console = make_console(width=132)
    benchmark = cfg.data.get("benchmark")
    reader = RowReader(
        objectives,
        near=cfg.near_duplicates is not None,
        benchmark=None if benchmark is None else BenchmarkGrams(_benchmarks(build(benchmark))),
        sample_pairs=20_000 if cfg.probe else 0,
        seed=cfg.seed,
        processes=cfg.processes,
    )
    for kind, stream, options in streams:
        reader.read(kind, _tracked(stream, f"reading {kind}", console), **options)
    result = check_rows(
        reader,
        objectives,
        near_duplicates=cfg.near_duplicates,
        test_fraction=cfg.data.test_fraction,
        min_ratings=cfg.data.min_ratings if declared is not None else None,
        probe=cfg.probe,
        seed=cfg.seed,
    )
    tables = [table for table in result.evaluation.tables if table.name != "findings"]
    print_tables([table for table in tables if len(table.rows) <= SHOWN_ROWS], console)
    for finding in result.findings:
        console.print(
            Text(f"{finding.severity}: ", COLORS[finding.severity]).append(f"{finding}", "")
        )
    counts = Counter(finding.severity for finding in result.findings)
    total = ", ".join(f"{n} {name}{'s' if n > 1 else ''}" for name, n in counts.items())
    output = Path(cfg.output_dir)
    save_pages(result.evaluation, output, title=f"Data check: {total or 'no findings'}")
    console.print(f"{total or 'no findings'}; saved {output / 'report.html'}")
    if cfg.fail_on is not None and (count := result.at_least(cfg.fail_on)):
        raise ValueError(f"{count} findings are of severity {cfg.fail_on} or worse, see above")


def _streams(
    cfg: DictConfig, objectives: Any
) -> tuple[list[tuple[str, Callable[..., Any], dict[str, Any]]], Any]:
    """Return what is to be read, with its kind and arguments, and the objectives of the ratings."""
    from armo.data.check_files import files_by_kind, observed_objectives
    from armo.data.sources import stream_lists, stream_pairs, stream_ratings

    streams: list[tuple[str, Callable[..., Any], dict[str, Any]]] = []
    if cfg.input is not None:
        columns = columns_of(cfg)
        path: Any = cfg.input if isinstance(cfg.input, str) else [str(each) for each in cfg.input]
        files = files_by_kind(path, columns=columns)
        if "ratings" in files and objectives is None:
            objectives = observed_objectives(files["ratings"], columns=columns)
        readers: Mapping[str, Callable[..., Any]] = {
            "ratings": stream_ratings,
            "pairs": stream_pairs,
            "lists": stream_lists,
        }
        for kind, paths in files.items():
            streams.append((kind, partial(readers[kind], paths, columns=columns), {}))
    for kind in ("ratings", "pairs", "lists"):
        section = cfg.data.get(kind)
        if section is None or section._target_ is None:
            continue
        if kind == "ratings" and objectives is None:
            raise ValueError("`data/ratings` needs `data/objectives`, their scales")
        streams.append((kind, build(section), {}))
    if not streams:
        raise ValueError(
            "nothing to check; name files, input=FILE, or a set, data/ratings=NAME data/pairs=NAME"
        )
    for kind, _, options in streams:
        # Scales as observed say nothing about judgements.
        if kind == "ratings" or (kind == "pairs" and cfg.data.get("objectives") is not None):
            options["objectives"] = objectives
    return streams, objectives


def _benchmarks(built: Any) -> Iterator[tuple[str, Iterable[Any]]]:
    """Yield name and rows of what `data/benchmark` makes: test sets, or a stream of lists."""
    from armo.data.benchmarks import Benchmark

    if callable(built):
        yield "the benchmark", built()
        return
    for benchmark in (built,) if isinstance(built, Benchmark) else built:
        yield benchmark.title, benchmark.rows


def _tracked(
    stream: Callable[..., Iterable[Any]], text: str, console: Console
) -> Callable[..., Iterator[Any]]:
    """Show how many rows have been read."""

    @wraps(stream)
    def tracked(*args: Any, **options: Any) -> Iterator[Any]:
        return iter(track(stream(*args, **options), text, console=console))

    return tracked


@hydra.main(**CONFIG, config_name="data_annotate")
@in_one_line
def annotate(cfg: DictConfig) -> None:
    """Write a data set again, with what a model says of each row."""
    from armo.model.reward_model import ArmoRewardModel
    from armo.report.annotate import annotate as annotate_rows

    path: Any = cfg.input if isinstance(cfg.input, str) else [str(each) for each in cfg.input]
    output, columns = Path(cfg.output), columns_of(cfg)
    weights: Any = OmegaConf.to_container(cfg.weights) if cfg.weights is not None else None
    model = ArmoRewardModel.from_pretrained(
        cfg.model, device=cfg.device, batch_tokens=cfg.batch_tokens
    )
    console = make_console()
    rate = TextColumn("{task.completed:.0f} rows")
    with Progress(SpinnerColumn(), rate, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("annotating", total=None)
        result = annotate_rows(
            model,
            path,
            output,
            columns=columns,
            weights=weights,
            scale=cfg.scale,
            prefix=cfg.prefix,
            on_rows=lambda rows: progress.advance(task, rows),
        )
    console.print(f"saved {output}: {result.rows} rows, {result.rows - result.scored} not scored")
    for reason, count in result.reasons.items():
        console.print(Text(f"not scored: {count} x {reason}"))


@hydra.main(**CONFIG, config_name="data_pairs")
@in_one_line
def pairs(cfg: DictConfig) -> None:
    """Make preference pairs of ratings, or compare given pairs with them."""
    from armo.artifacts import replacing
    from armo.data.objectives import ObjectiveSet
    from armo.data.rated_pairs import agreements, pair_row, pairs_from_ratings
    from armo.data.sources import stream_pairs
    from armo.report.agreement import agreement_table
    from armo.report.pages import print_tables

    if (cfg.output is None) == (cfg.against is None):
        raise ValueError(
            "give `output`, a file of pairs to make of the ratings; or `against`, a file of pairs "
            "to compare with them"
        )
    declared: Any = OmegaConf.to_container(cfg.data.objectives, throw_on_missing=True)
    objectives = ObjectiveSet.from_mapping(declared)
    stream = build(cfg.data.ratings)
    by: Any = OmegaConf.to_container(cfg.by) if OmegaConf.is_config(cfg.by) else cfg.by
    console = make_console(width=132)
    if cfg.against is not None:
        rows = agreements(
            stream_pairs(cfg.against), stream(objectives=objectives), objectives=objectives, by=by
        )
        print_tables([agreement_table(rows)], console)
        return
    if by is None:
        raise ValueError("`by` is needed: an objective, or weights, by={OBJECTIVE: 2, ...}")
    made = pairs_from_ratings(
        lambda: stream(objectives=objectives),
        objectives=objectives,
        by=by,
        min_margin=cfg.min_margin,
        ties=cfg.ties,
        max_per_prompt=cfg.max_per_prompt,
        seed=cfg.seed,
    )
    count = 0
    output = Path(cfg.output)
    with replacing(output) as temporary, temporary.open("w", encoding="utf-8") as file:
        for pair in made:
            count += 1
            file.write(json.dumps(pair_row(pair), ensure_ascii=False) + "\n")
    console.print(f"saved {output}: {count} pairs")


VERBS: dict[str, Callable[[], Any]] = {"check": check, "annotate": annotate, "pairs": pairs}
