"""The commands of `armo data` that write rows: with what a model says of them, or as pairs."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from armo.command import CONFIG, build, columns_of, in_one_line, make_console

logger = logging.getLogger(__name__)


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


VERBS: dict[str, Callable[[], Any]] = {"annotate": annotate, "pairs": pairs}
