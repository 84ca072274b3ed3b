"""What each method of decorrelation does to the gated score, on the test prompts of a finished run.

    armo train experiment=demo && python benchmarks/decorrelation.py --run checkpoints/demo

Embeddings and heads are the run's. For every method the reward transform and the gate are fitted
anew on the run's training prompts, and judged on its test prompts, which none of them has seen.
"""

import argparse
import json
import logging
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from armo.data.surface import SURFACE_FEATURES
from armo.embed.extract import EmbeddedData
from armo.fit.decorrelation import (
    STYLE_FEATURES,
    DecorrelationWarning,
    FittedTransforms,
    fit_transforms,
)
from armo.fit.heads import FittedHeads
from armo.fit.training import fit_gating
from armo.report.evaluate import Mix, evaluate
from armo.report.pages import print_tables
from armo.report.tables import Evaluation, Table
from armo.stages import train_gate

WITH_LAYOUT = (*STYLE_FEATURES, "paragraphs", "lines")

# Functions of the features, for what is not linear in them: the score may follow the logarithm of a
# count, or length and lists together.
SMOOTH = tuple(f"{how} of {name}" for how in ("log", "root") for name in STYLE_FEATURES[1:])
PRODUCTS = tuple(
    f"{first} x {second}"
    for k, first in enumerate(("log_length", "list_items", "bold", "headings"))
    for second in ("log_length", "list_items", "bold", "headings")[k:]
)

# Label, methods, features: with `none`, what the others are compared with, first.
VARIANTS: list[tuple[str, Sequence[Any], Sequence[str]]] = [
    ("none", (), STYLE_FEATURES),
    ("nuisance", ("nuisance",), STYLE_FEATURES),
    ("reweight", ("reweight",), STYLE_FEATURES),
    ("penalty", ("penalty",), STYLE_FEATURES),
    ("penalty, nuisance", ("penalty", "nuisance"), STYLE_FEATURES),
    ("leace, length alone", ("leace",), ("log_length",)),
    ("leace", ("leace",), STYLE_FEATURES),
    ("leace, nuisance", ("leace", "nuisance"), STYLE_FEATURES),
    ("residual", ("residual",), STYLE_FEATURES),
    ("residual, nuisance", ("residual", "nuisance"), STYLE_FEATURES),
    ("residual, reweight", ("residual", "reweight"), STYLE_FEATURES),
    ("the same, and layout", ("residual", "reweight"), WITH_LAYOUT),
    ("the same, all features", ("residual", "reweight"), SURFACE_FEATURES),
    ("the same, smooth", ("residual", "reweight"), (*STYLE_FEATURES, *SMOOTH)),
    ("the same, quadratic", ("residual", "reweight"), (*STYLE_FEATURES, *PRODUCTS)),
    ("leace, quadratic", ("leace",), (*STYLE_FEATURES, *PRODUCTS)),
    ("leace, reweight", ("leace", "reweight"), STYLE_FEATURES),
    ("penalty, residual, reweight", ("penalty", "residual", "reweight"), STYLE_FEATURES),
]
COLUMNS = (  # of these, the second to the fourth are rows of the report's table of quarters
    "accuracy",
    "mean of the four",
    "longer less shorter",
    "more formatted less plainer",
    "length, within",
    "length, across",
    "style, at most",
    "objectives, at most",
    "decided by style",
)


class Trial:
    """A run's data and heads, on which methods are tried."""

    def __init__(self, folder: Path, *, max_epochs: int) -> None:
        self.data = _with_functions(EmbeddedData.load(folder / "embeddings"))
        self.heads = FittedHeads.load(folder / "heads")
        self.trainer = partial(L.Trainer, accelerator="cpu", max_epochs=max_epochs)

    def transforms(self, methods: Sequence[Any], features: Sequence[str]) -> FittedTransforms:
        """Fit the reward transforms on the responses of the training pairs, as the run does."""
        tables = self.data.tables
        train = tables.pairs_train
        reference = torch.cat([tables.pairs_chosen[train], tables.pairs_rejected[train]]).unique()
        return fit_transforms(
            self.heads,
            self.data.responses.read(reference),
            covariates=tables.covariates[reference],
            covariate_names=self.data.covariates,
            groups=tables.prompt_of_response[reference],
            bias_indices=self.data.objectives.bias_indices,
            methods=methods,
            features=features,
        )

    def mix(self, transforms: FittedTransforms, *, seed: int) -> Mix:
        """Train a gate on the training pairs."""
        with tempfile.TemporaryDirectory() as scratch:
            gate, summary = train_gate(
                self.data,
                self.heads,
                transforms,
                fit=partial(fit_gating, trainer=self.trainer, progress=False, keep="gate"),
                folder=Path(scratch),
                seed=seed,
            )
        return Mix(transforms.transform, gate, summary)


def _with_functions(data: EmbeddedData) -> EmbeddedData:
    """Add functions of the features as features of their own."""
    measured = dict(zip(data.covariates, data.tables.covariates.T, strict=True))
    for name in SMOOTH:
        how, _, of = name.partition(" of ")
        measured[name] = measured[of].log1p() if how == "log" else measured[of].sqrt()
    for name in PRODUCTS:
        first, _, second = name.partition(" x ")
        measured[name] = measured[first] * measured[second]
    tables = replace(data.tables, covariates=torch.stack(list(measured.values()), dim=1))
    return replace(data, covariates=tuple(measured), tables=tables)


def figures_of(evaluation: Evaluation) -> dict[str, float]:
    """Pick what decides between methods out of a report."""
    quarters = {row[0]: row[5] for row in evaluation.table("quarters").rows}
    style = evaluation.table("style").rows
    within: dict[str, dict[str, float]] = {}
    for of, feature, _, after, *_ in style:
        if feature in WITH_LAYOUT:
            within.setdefault(of, {})[feature] = after
    largest = {of: max(map(abs, values.values())) for of, values in within.items()}
    length = next(row for row in style if row[:2] == ("score", "log_length"))
    gated = next(row for row in evaluation.table("rivals").rows if row[0] == "gated score")
    figures = {
        "accuracy": gated[1],
        **{name: quarters[name] for name in COLUMNS[1:4] if name in quarters},
        "length, within": length[3],
        "length, across": length[5],
        "style, at most": largest.pop("score"),
        "objectives, at most": statistics.median(largest.values()),
    }
    if any(table.name == "counterfactuals" for table in evaluation.tables):
        figures["decided by style"] = evaluation.table("counterfactuals").rows[-1][-1]
    return figures


def plot(rows: dict[str, dict[str, float]], path: Path) -> None:
    """Draw what each method costs against what it leaves of style."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, figures in rows.items():
        x, y = figures["style, at most"], figures.get("mean of the four", figures["accuracy"])
        axes.plot(x, y, "o")
        axes.annotate(name, (x, y), xytext=(5, 3), textcoords="offset points", fontsize=8)
    axes.axvline(0.05, color="#555", linestyle=":", linewidth=1)
    axes.set_xlim(left=0.0)
    axes.set_xlabel("largest correlation of the score with a style feature, within prompts")
    axes.set_ylabel("accuracy, mean of the four quarters")
    figure.savefig(path)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--only", help="methods whose name has this in it, beside none")
    parser.add_argument("--seeds", type=int, default=3, help="gates per method")
    parser.add_argument("--max-epochs", type=int, default=100, help="of a gate")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--plot", type=Path, help="where to draw them, as SVG or PNG")
    arguments = parser.parse_args()
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=DecorrelationWarning)
    warnings.filterwarnings("ignore", module="lightning")
    trial = Trial(arguments.run, max_epochs=arguments.max_epochs)
    seeds = range(arguments.seeds)
    plain: dict[int, Mix] = {}
    rows: dict[str, dict[str, float]] = {}
    spreads: dict[str, dict[str, float]] = {}
    variants = [v for v in VARIANTS if (arguments.only or "") in v[0] or v[0] == "none"]
    for label, methods, features in track(variants, description="methods"):
        transforms = trial.transforms(methods, features)
        drawn = []
        for seed in seeds:
            mix = trial.mix(transforms, seed=seed)
            plain.setdefault(seed, mix)
            drawn.append(
                figures_of(
                    evaluate(
                        trial.data,
                        heads=trial.heads,
                        mix=mix,
                        undecorrelated=plain[seed],
                        deviation=0.0,
                    )
                )
            )
        values = torch.tensor([list(figures.values()) for figures in drawn])
        rows[label] = dict(zip(drawn[0], values.mean(0).tolist(), strict=True))
        spreads[label] = dict(zip(drawn[0], values.std(0, correction=0).tolist(), strict=True))
        if arguments.json:  # as far as it has come: the whole takes long on large data
            text = json.dumps(
                {"run": arguments.run.name, "mean": rows, "spread": spreads}, indent=2
            )
            arguments.json.write_text(text)
    shown = [name for name in COLUMNS if name in rows["none"]]
    table = Table(
        "methods",
        f"Methods of decorrelation, on the test prompts of {arguments.run.name}",
        ("method", *shown),
        tuple((label, *(figures[name] for name in shown)) for label, figures in rows.items()),
        f"Means over {arguments.seeds} gates, whose accuracies differ by "
        f"{max(spread['accuracy'] for spread in spreads.values()):.3f} (standard deviation) at "
        "most. Correlations: Spearman; of objectives, the median one's.",
    )
    print_tables([table], Console(width=180))
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
