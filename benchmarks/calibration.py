"""Are preference probabilities to be believed? Each pair is judged by a model that never saw it.

    armo train experiment=demo && python benchmarks/calibration.py --run checkpoints/demo

The prompts of a run, training and test side together, are cut into folds. For each fold, heads,
reward transform and gate are fitted on the prompts of the others, with the settings of the run, and
judge its pairs. So there are several times as many held-out pairs as on one test side.
"""

import argparse
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import astuple, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra.utils import instantiate
from rich.console import Console
from rich.progress import track
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from armo.artifacts import MANIFEST, finish_artifact, read_json, write_tensors
from armo.embed.extract import ROWS, EmbeddedData, RowTables
from armo.fit.decorrelation import load_transforms
from armo.fit.heads import deal_folds
from armo.fit.training import load_gating
from armo.report.calibration import calibration_error
from armo.report.metrics import bootstrap_interval
from armo.report.pages import print_tables
from armo.report.tables import Table
from armo.stages import Run, run_decorrelation, run_gating, run_heads

KINDS = 8


class Judged(NamedTuple):
    """Pairs of one fold, by a model that never saw their prompts."""

    odds: Tensor
    preference: Tensor
    groups: Tensor
    test: Tensor
    kind: Tensor


def with_fold(tables: RowTables, held: Tensor) -> RowTables:
    """Put the responses of a fold on the test side, and all others on the training side."""
    changed = {}
    for name, responses in (
        ("ratings", tables.ratings_response),
        ("pairs", tables.pairs_chosen),
    ):
        there = getattr(tables, f"{name}_train") | getattr(tables, f"{name}_test")
        changed |= {
            f"{name}_train": there & ~held[responses],
            f"{name}_test": there & held[responses],
        }
    of_lists = torch.zeros_like(tables.lists_train)
    of_lists[tables.lists_of] = held[tables.lists_response]
    there = tables.lists_train | tables.lists_test & ~tables.lists_benchmark
    changed |= {"lists_train": there & ~of_lists, "lists_test": there & of_lists}
    return replace(tables, **changed)


def judge(source: Path, embedded: Path, folder: Path, held: Tensor) -> Judged:
    """Fit the stages of a run without some responses, and judge the pairs of these."""
    whole = EmbeddedData.load(embedded).tables
    embeddings = folder / "embeddings"
    embeddings.mkdir()
    for file in embedded.iterdir():
        if file.name not in (ROWS, MANIFEST) and file.is_file():
            (embeddings / file.name).symlink_to(file.resolve())
    tables = with_fold(whole, held)
    write_tensors(embeddings / ROWS, {f.name: getattr(tables, f.name) for f in fields(tables)})
    finish_artifact(embeddings, key=folder.name, settings=None, inputs={})
    heads, decorrelation, gating = (
        read_json(source / stage / MANIFEST)["settings"]
        for stage in ("heads", "decorrelation", "gating")
    )
    build: Any = partial(instantiate, _convert_="all")
    run = Run(folder, Console(file=io.StringIO()), heads[1])
    run_heads(run, settings=0, fit=build(heads[0]), source_weights=heads[2], reweighted=heads[3])
    run_decorrelation(run, settings=0, fit=build(decorrelation[0]), source_weights=decorrelation[1])
    how, trainer = gating[0]["gating"], build(gating[0]["trainer"])
    fit = build(how, trainer=trainer, progress=False)
    run_gating(run, settings=0, fit=fit, source_weights=gating[2])

    data = EmbeddedData.load(embeddings)
    transform = load_transforms(folder / "decorrelation").transform
    gate, summary = load_gating(folder / "gating", "gate")
    pairs = tables.pairs_test
    chosen, rejected = tables.pairs_chosen[pairs], tables.pairs_rejected[pairs]
    first, second = (
        transform.adjusted(data.responses.read(rows), data.style(rows, transform.covariates))
        for rows in (chosen, rejected)
    )
    with torch.no_grad():
        weights = gate(data.prompts.read(tables.prompt_of_response[chosen])).double()
    return Judged(
        summary.beta * (weights * (first - second)).sum(1),
        tables.pairs_preference[pairs].double(),
        tables.group_of_response[chosen],
        whole.pairs_test[pairs],
        tables.pairs_category[pairs],
    )


def slope(judged: Judged) -> float:
    """What log-odds would have to be multiplied by to fit best: Cox's calibration slope."""
    odds, votes = judged.odds[:, None].numpy(), judged.preference.numpy()
    model = LogisticRegression(C=float("inf"), fit_intercept=False)
    model.fit(
        np.concatenate([odds, odds]),
        np.repeat([1, 0], len(odds)),
        sample_weight=np.concatenate([votes, 1.0 - votes]),
    )
    return float(model.coef_[0, 0])


def figures_of(judged: Judged) -> dict[str, Any]:
    """Everything that is printed of some pairs."""
    found = calibration_error(torch.sigmoid(judged.odds), judged.preference, judged.groups)
    return {
        "pairs": len(judged.odds),
        "prompts": len(judged.groups.unique()),
        "error": found.error.mean,
        "from": found.error.low,
        "to": found.error.high,
        "by chance": found.null.mean,
        "up to": found.null.high,
        "slope": slope(judged),
    }


def by_kind(judged: Judged, names: Sequence[str]) -> Table:
    """Whether what holds for all pairs holds for those of one kind of prompt; the largest few."""
    confident = torch.sigmoid(judged.odds.abs())
    right = torch.where(judged.odds > 0.0, judged.preference, 1.0 - judged.preference)
    kinds, counts = judged.kind.unique(return_counts=True)
    rows = []
    for kind in kinds[counts.argsort(descending=True)[:KINDS]].tolist():
        here = judged.kind == kind
        off = confident[here] - right[here]
        interval = bootstrap_interval(off, judged.groups[here])
        means = float(confident[here].mean()), float(right[here].mean())
        rows.append((names[kind] or "(none)", len(off), *means, *astuple(interval)))
    return Table(
        "kinds",
        "By kind of prompt: how sure, how often right",
        ("kind", "pairs", "predicted", "observed", "too sure by", "from", "to"),
        tuple(rows),
        f"The {len(rows)} kinds with most pairs.",
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--embeddings", type=Path, help="theirs, if `from_run` read them elsewhere")
    parser.add_argument("--folds", type=int, default=5, help="parts of the prompts")
    parser.add_argument("--seed", type=int, default=0, help="of the folds")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    embeddings = arguments.embeddings or arguments.run / "embeddings"
    data = EmbeddedData.load(embeddings)
    tables, groups = data.tables, data.tables.group_of_prompt
    fold_of_group = deal_folds(
        groups, folds=arguments.folds, group_count=int(groups.max()) + 1, seed=arguments.seed
    )
    parts = []
    for fold in track(range(arguments.folds), description="folds"):
        with tempfile.TemporaryDirectory(prefix="armo-") as folder:
            held = fold_of_group[tables.group_of_response] == fold
            parts.append(judge(arguments.run, embeddings, Path(folder), held))
    everything = Judged(*(torch.cat(values) for values in zip(*parts, strict=True)))
    rows = {"all pairs": figures_of(everything)}
    for name, side in (("train side", ~everything.test), ("test side", everything.test)):
        if bool(side.any()):
            rows[name] = figures_of(Judged(*(values[side] for values in everything)))
    table = Table(
        "calibration",
        f"Expected calibration error on held-out pairs of {arguments.run.name}",
        ("of", *rows["all pairs"]),
        tuple((name, *figures.values()) for name, figures in rows.items()),
        f"{arguments.folds} folds of the prompts, each judged by parts fitted on the others; 95 % "
        "intervals over prompts. By chance: what a calibrated model shows on as many, on average "
        "and in 97.5 % of cases. Slope: 1 is calibrated, above 1 surer would be right.",
    )
    kinds = by_kind(everything, data.categories)
    print_tables([table, kinds], Console(width=132))
    if arguments.json:
        found = {
            "calibration": rows,
            "kinds": [dict(zip(kinds.columns, row, strict=True)) for row in kinds.rows],
        }
        arguments.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
