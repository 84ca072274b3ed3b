"""Which design of the gate is furthest ahead of the best constant mix, on a finished run.

    armo train experiment=demo && python benchmarks/gate_designs.py --run checkpoints/demo

Embeddings, heads and reward transforms are the run's. For every design the gate is trained anew on
the run's training prompts, and judged twice: by the members of its cross-validation on the training
prompts that each was held out of, and as a whole on the test prompts, which none of it has seen.
Sources count as they do without `fit.source_weights`.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F

from armo.artifacts import read_json
from armo.data.surface import FORMAT_FEATURES, MARKS
from armo.embed.extract import EmbeddedData
from armo.fit.constant import fit_constant_mix
from armo.fit.decorrelation import load_transforms, style_logits
from armo.fit.heads import FittedHeads
from armo.fit.preferences import Preferences
from armo.fit.probe import load_probe
from armo.fit.training import Gain, GatingSummary, fit_gating
from armo.report.metrics import Interval, bootstrap_contrasts, pairwise_accuracy
from armo.report.pages import print_tables, to_markdown
from armo.report.tables import Table
from armo.stages import training_preferences

# Epochs without improvement: in longer waits no member of the default was seen to improve.
PATIENCE = 4

# Ratings from which an objective is well rated, size of the set of heaviest ones, and parts that
# prompts are dealt to for mixes of their own.
RATINGS, HEAVIEST, CLUSTERS = 300, 16, 8
WELL_RATED = f"judged, or rated {RATINGS} times"

SETUPS = {"decorrelated": "gate", "undecorrelated": "undecorrelated"}

View = Callable[[Tensor], Tensor]


class Basis(NamedTuple):
    """What a gate mixes.

    Attributes:
        mixes: Weights over the objectives; one row each is all that a gate can choose from.
        mixed: The rows that it may choose.
    """

    mixes: Float[Tensor, "rows objectives"]
    mixed: list[int]


class Fitted(NamedTuple):
    """One gate of a design.

    Attributes:
        weights: Over the objectives, for the prompt of each test pair.
        constant: Of the best constant mix.
        summary: How it was trained.
        seconds: How long that took.
    """

    weights: Float[Tensor, "pairs objectives"]
    constant: Float[Tensor, " objectives"]
    summary: GatingSummary
    seconds: float


@dataclass(frozen=True, eq=False)
class Variant:
    """One design: the default but for what is named.

    Attributes:
        group: What kind of change it is.
        name: What is changed.
        settings: Arguments of `fit_gating`.
        view: Fitted to the training prompts, what the gate sees of a prompt.
        basis: What it mixes; the objectives, unless it says otherwise.
        methods: Of decorrelation in the weights of pairs; the run's, unless it says otherwise.
        balanced: Whether every source of pairs counts the same.
        one_member: Whether the first member scores alone.
        peeks: Whether something was fitted on all training prompts before the cross-validation,
            which then says nothing.
    """

    group: str
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    view: Callable[[Tensor], View] | None = None
    basis: Callable[["Trial", Preferences], Basis] | None = None
    methods: Sequence[Any] | None = None
    balanced: bool = False
    one_member: bool = False
    peeks: bool = False


class Trial:
    """A run's data, heads and transforms, on which designs are tried."""

    def __init__(self, folder: Path, *, setup: str, max_epochs: int) -> None:
        self.data = EmbeddedData.load(folder / "embeddings")
        self.heads = FittedHeads.load(folder / "heads")
        self.transforms = load_transforms(
            folder / "decorrelation", decorrelated=setup == "decorrelated"
        )
        self.trainer = partial(L.Trainer, accelerator="cpu", max_epochs=max_epochs)
        self.layers = _layers(folder)
        tables, transform = self.data.tables, self.transforms.transform
        self.test = (tables.pairs_test & (tables.pairs_preference > 0.5)).nonzero()[:, 0]
        self.chosen, self.rejected = (
            tables.pairs_chosen[self.test],
            tables.pairs_rejected[self.test],
        )
        self.groups = tables.group_of_response[self.chosen]
        self.prompts = self.data.prompt_embeddings(self.chosen).float()
        self.differences = self._apart(transform.adjusted)
        probe = load_probe(folder / "gating", SETUPS[setup], covariates=transform.covariates)
        if probe is None:
            raise SystemExit("a run without training pairs has no linear probe to compare with")
        self.probe = self._apart(probe.adjusted)[:, 0]

    def _apart(self, adjusted: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Rewards of the chosen less those of the rejected responses of the test pairs."""
        features = self.transforms.transform.covariates
        chosen, rejected = (
            adjusted(self.data.responses.read(rows), self.data.style(rows, features))
            for rows in (self.chosen, self.rejected)
        )
        return chosen - rejected

    def fit(self, variant: Variant, *, seed: int) -> Fitted:
        """Train the gate of a design on the training pairs."""
        transforms = self.transforms
        if variant.methods is not None:
            transforms = replace(transforms, methods=tuple(variant.methods))
        preferences = training_preferences(
            self.data,
            self.heads,
            transforms,
            source_weights=self.balance if variant.balanced else {},
        )
        view = (variant.view or _as_it_is)(preferences.prompts.float())
        basis = (variant.basis or partial(chosen_from, mixed=self.mixed))(self, preferences)
        seen = replace(
            preferences,
            prompts=view(preferences.prompts.float()),
            adjusted=preferences.adjusted @ basis.mixes.T,
        )
        names = [f"{k}" for k in range(len(basis.mixes))]
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            gate, summary = fit_gating(
                seen,
                objectives=names,
                mixed=basis.mixed,
                style_names=transforms.features,
                folder=Path(scratch),
                trainer=self.trainer,
                progress=False,
                keep="gate",
                seed=seed,
                **{"patience": PATIENCE, "nuisance": "nuisance" in transforms.methods}
                | dict(variant.settings),
            )
        seconds = time.perf_counter() - started
        with torch.no_grad():
            members = gate.member_weights(view(self.prompts))
        weights = members[0] if variant.one_member else members.mean(0)
        constant = torch.tensor([summary.constant_weights[name] for name in names])
        return Fitted(
            weights.double() @ basis.mixes, constant.double() @ basis.mixes, summary, seconds
        )

    @property
    def mixed(self) -> list[int]:
        """The objectives that may get weight."""
        return list(self.data.objectives.mixed_indices)

    @property
    def balance(self) -> dict[str, float]:
        """Weights by which every source of training pairs and lists counts the same."""
        tables = self.data.tables
        totals = torch.zeros(len(self.data.sources), dtype=torch.float64)
        for train, sources, weights in (
            (tables.pairs_train, tables.pairs_source, tables.pairs_weight),
            (tables.lists_train, tables.lists_source, tables.lists_weight),
        ):
            totals.index_add_(0, sources[train], weights[train].double())
        return {
            name: 1.0 / float(total)
            for name, total in zip(self.data.sources, totals, strict=True)
            if total > 0.0
        }

    def credits(self, fits: Sequence[Fitted]) -> tuple[Tensor, Tensor]:
        """Mean credit per test pair: of the gates, and of their constant mixes."""
        gated = [pairwise_accuracy((f.weights * self.differences).sum(1)) for f in fits]
        constant = [pairwise_accuracy(self.differences @ f.constant) for f in fits]
        return torch.stack(gated).mean(0), torch.stack(constant).mean(0)

    def references(self) -> dict[str, Tensor]:
        """Credit per test pair of what no gate is in."""
        tables = self.data.tables
        names = [*FORMAT_FEATURES, "log_length"]
        train = tables.pairs_train.nonzero()[:, 0]
        measured = self.data.style(tables.pairs_chosen[train], names)
        style = style_logits(
            measured - self.data.style(tables.pairs_rejected[train], names),
            self.data.style(self.chosen, names) - self.data.style(self.rejected, names),
        )
        scores = {
            "linear probe": self.probe,
            "uniform mix": self.differences[:, self.mixed].mean(1),
            "length and format": style,
        }
        return {name: pairwise_accuracy(score) for name, score in scores.items()}

    def mean_of_four(self, credit: Float[Tensor, " pairs"]) -> float:
        """Mean accuracy where the chosen one is longer, shorter, more formatted, plainer."""
        rows = self.data.tables.covariates
        apart = rows[self.chosen] - rows[self.rejected]
        longer = apart[:, self.data.covariates.index("log_length")]
        formatted = apart[:, [self.data.covariates.index(name) for name in MARKS]].sum(1)
        quarters = [longer > 0, longer < 0, formatted > 0, formatted < 0]
        return statistics.mean(float(credit[q].mean()) for q in quarters if bool(q.any()))


def _layers(folder: Path) -> Sequence[int]:
    """Layers of the backbone that are side by side in an embedding."""
    spec = read_json(folder / "model" / "config.json")["backbone"]
    return [int(layer) for layer in spec["layers"]]


# What the gate sees


def _as_it_is(prompts: Tensor) -> View:
    return lambda rows: rows


def part_of(prompts: Tensor, *, number: int, of: int) -> View:
    """Take one layer of several."""
    return lambda rows: rows.chunk(of, dim=1)[number]


def unit_length(prompts: Tensor) -> View:
    """Bring every prompt to length one, as for cosine similarity."""
    return lambda rows: F.normalize(rows)


def components(prompts: Tensor, *, count: int | None, whitened: bool = True) -> View:
    """Keep the first principal components of the standardised prompts.

    The gate standardises what it sees, so that components are always whitened to it. Without
    whitening they are turned back into the space that they came from.
    """
    mean, spread = prompts.mean(0), prompts.std(0, correction=0).clamp(min=1e-6)
    standard = ((prompts - mean) / spread).double()
    _, axes = torch.linalg.eigh(standard.T @ standard)
    axes = axes.flip(1)[:, : count or min(prompts.shape)]

    def view(rows: Tensor) -> Tensor:
        found = ((rows - mean) / spread).double() @ axes
        kept: Tensor = found if whitened else found @ axes.T
        return kept.float()

    return view


# What the gate mixes


def chosen_from(trial: Trial, preferences: Preferences, *, mixed: list[int]) -> Basis:
    """Some of the objectives."""
    return Basis(torch.eye(len(trial.data.objectives.names), dtype=torch.float64), mixed)


def heaviest(trial: Trial, preferences: Preferences, *, count: int) -> Basis:
    """The objectives with most weight in the best constant mix."""
    constant = _constant(trial, preferences, torch.arange(len(preferences)))
    top = constant.argsort(descending=True)[:count].tolist()
    return chosen_from(trial, preferences, mixed=[k for k in trial.mixed if k in top])


def by_group(trial: Trial, preferences: Preferences) -> Basis:
    """The best constant mix cut up by groups of objectives: a weight per group, not objective."""
    constant = _constant(trial, preferences, torch.arange(len(preferences)))
    group_of = [objective.group for objective in trial.data.objectives.objectives]
    rows = []
    for group in dict.fromkeys(group_of[k] for k in trial.mixed):
        inside = torch.tensor(
            [k in trial.mixed and group_of[k] == group for k in range(len(constant))]
        )
        part = torch.where(inside, constant.clamp(min=1e-9), 0.0)
        rows.append(part / part.sum())
    return Basis(torch.stack(rows), list(range(len(rows))))


def by_cluster(trial: Trial, preferences: Preferences, *, count: int) -> Basis:
    """The best constant mix of all prompts, and that of each cluster of prompts."""
    prompts = preferences.prompts.float().numpy()
    clusters = KMeans(count, n_init=1, random_state=0).fit(prompts)
    cluster_of = torch.from_numpy(clusters.labels_).long()[preferences.prompt_of]
    parts = [torch.arange(len(preferences))]
    parts += [(cluster_of == k).nonzero()[:, 0] for k in cluster_of.unique().tolist()]
    rows = [_constant(trial, preferences, part) for part in parts]
    return Basis(torch.stack(rows), list(range(len(rows))))


def _constant(trial: Trial, preferences: Preferences, rows: Int[Tensor, " batch"]) -> Tensor:
    return fit_constant_mix(preferences.comparisons(rows), mixed=trial.mixed).weights


# The designs


def variants_of(trial: Trial) -> list[Variant]:
    """All designs, the default first."""
    prompts = trial.data.prompts
    inputs = [
        Variant(
            "input",
            f"layer {layer} alone",
            view=partial(part_of, number=k, of=len(trial.layers)),
        )
        for k, layer in enumerate(trial.layers)
        if len(trial.layers) > 1
    ]
    counts = [count for count in (32, 128) if count < prompts.dim]
    inputs += [
        Variant("input", "length one", view=unit_length),
        *(
            Variant("input", f"{count} components, whitened", view=partial(components, count=count))
            for count in counts
        ),
        Variant("input", "all components, whitened", view=partial(components, count=None)),
        *(
            Variant(
                "input",
                f"{count} components, not whitened",
                view=partial(components, count=count, whitened=False),
            )
            for count in counts[:1]
        ),
    ]
    return [
        Variant("default", "default"),
        *_objective_sets(trial),
        *inputs,
        *_losses(trial),
        *_together(trial),
        *_networks(),
    ]


def _objective_sets(trial: Trial) -> list[Variant]:
    summaries, mixed = trial.heads.summaries, trial.mixed
    judged = [k for k in mixed if summaries[k].judgements]
    sets = {
        "rated ones alone": [k for k in mixed if k not in judged],
        "judged ones alone": judged,
        WELL_RATED: [k for k in mixed if k in judged or summaries[k].ratings >= RATINGS],
    }
    found = [
        Variant("objectives", name, basis=partial(chosen_from, mixed=columns))
        for name, columns in sets.items()
        if columns and columns != mixed
    ]
    if len(mixed) > HEAVIEST:
        found.append(
            Variant(
                "objectives",
                f"the {HEAVIEST} heaviest",
                basis=partial(heaviest, count=HEAVIEST),
                peeks=True,
            )
        )
    return [
        *found,
        Variant("low rank", "a weight per group of objectives", basis=by_group, peeks=True),
        Variant(
            "low rank",
            f"mixes of {CLUSTERS} clusters of prompts",
            basis=partial(by_cluster, count=CLUSTERS),
            peeks=True,
        ),
    ]


def _together(trial: Trial) -> list[Variant]:
    """Changes that look well each for itself."""
    wide = {"hidden_dim": 256, "dropout": 0.2, "learning_rate": 3e-3}
    fast = {"learning_rate": 3e-3}
    view = partial(components, count=32)
    found = [Variant("together", "32 components, 256 wide, dropout 0.2, rate 0.003", wide, view)]
    for of in _objective_sets(trial):
        if of.name == WELL_RATED:
            found += [
                Variant("together", f"{of.name}, rate 0.003", fast, basis=of.basis),
                Variant(
                    "together",
                    f"{of.name}, rate 0.003, length one, margins subtract",
                    fast | {"margins": "subtract"},
                    unit_length,
                    of.basis,
                ),
            ]
    return found


def _losses(trial: Trial) -> list[Variant]:
    methods = trial.transforms.methods
    plain = [method for method in methods if method not in ("reweight", "nuisance")]
    weighing = [
        Variant("loss", name, methods=chosen)
        for name, chosen in (
            ("pairs reweighted by style", [*plain, "reweight"]),
            ("pairs not reweighted by style", plain),
            ("pairs reweighted, style a nuisance", [*plain, "reweight", "nuisance"]),
            ("pairs not reweighted, style a nuisance", [*plain, "nuisance"]),
        )
        if set(chosen) != set(methods)
    ]
    settings: list[tuple[str, Sequence[Any]]] = [
        ("margins", ("ignore", "scale", "subtract")),
        ("label_smoothing", (0.05, 0.1, 0.2)),
        ("entropy", (0.01, 0.1)),
        ("style_penalty", (0.1, 1.0)),
    ]
    changed = [
        Variant("loss", f"{name.replace('_', ' ')} {value}", {name: value})
        for name, values in settings
        for value in values
        if (name, value) != ("margins", "scale")  # the default
    ]
    return [*changed, *weighing, Variant("loss", "sources count the same", balanced=True)]


def _networks() -> list[Variant]:
    settings: list[tuple[str, str, dict[str, Any]]] = [
        ("low rank", "hidden dim 4", {"hidden_dim": 4}),
        ("net", "hidden dim 16", {"hidden_dim": 16}),
        ("net", "hidden dim 256", {"hidden_dim": 256}),
        ("net", "no hidden layer", {"hidden_layers": 0}),
        ("net", "two hidden layers", {"hidden_layers": 2}),
        ("net", "dropout 0", {"dropout": 0.0}),
        ("net", "dropout 0.2", {"dropout": 0.2}),
        ("net", "weight decay 0", {"weight_decay": 0.0}),
        ("net", "weight decay 1", {"weight_decay": 1.0}),
        ("net", "temperature 3", {"temperature": 3.0}),
        ("net", "learning rate 0.0003", {"learning_rate": 3e-4}),
        ("net", "learning rate 0.003", {"learning_rate": 3e-3}),
        ("net", "batch size 1024", {"batch_size": 1024}),
        ("net", "patience 10", {"patience": 10}),
        ("ensemble", "10 folds", {"folds": 10}),
        # One epoch takes a minute, and the first ones are the best.
        (
            "net",
            "ArmoRM's: 3 x 1024, dropout 0.2, temperature 10, no decay",
            {
                "hidden_dim": 1024,
                "hidden_layers": 3,
                "dropout": 0.2,
                "temperature": 10.0,
                "weight_decay": 0.0,
                "patience": 1,
            },
        ),
    ]
    return [
        Variant("ensemble", "one member", one_member=True),
        *(Variant(group, name, changed) for group, name, changed in settings),
    ]


# Results


def figures_of(
    trial: Trial, fits: Sequence[Fitted], *, variant: Variant, default: Sequence[Fitted]
) -> dict[str, Any]:
    """Pick what decides between designs."""
    gated, constant = trial.credits(fits)
    rivals = [constant, *trial.credits(default), pairwise_accuracy(trial.probe)]
    against = bootstrap_contrasts(
        torch.stack([gated, *rivals], dim=1),
        torch.cat([torch.ones(4, 1), -torch.eye(4)], dim=1).double(),
        trial.groups,
    )
    alone = [float(trial.credits([fit])[0].mean()) for fit in fits]
    summaries = [fit.summary for fit in fits]
    gains: list[list[float] | None] = [
        None if variant.peeks else _mean_gain([getattr(s, name) for s in summaries])
        for name in ("accuracy_gain", "loss_gain")
    ]
    names = ("gain", "over the default", "over the default's constant mix", "over the probe")
    return {
        "group": variant.group,
        "out-of-fold accuracy gain": gains[0],
        "out-of-fold loss gain": gains[1],
        "accuracy": float(gated.mean()),
        "constant mix": float(constant.mean()),
        **{name: _listed(interval) for name, interval in zip(names, against, strict=True)},
        "deviation": statistics.pstdev(alone),
        "mean of the four": trial.mean_of_four(gated),
        "epoch": statistics.mean(statistics.mean(s.epochs) for s in summaries),
        "seconds": statistics.mean(fit.seconds for fit in fits),
    }


def references_of(trial: Trial, default: Sequence[Fitted]) -> dict[str, dict[str, Any]]:
    """Set what no gate is in beside the default."""
    gated, constant = trial.credits(default)
    rows = {}
    for name, credit in {"constant mix of the default": constant, **trial.references()}.items():
        [against] = bootstrap_contrasts(
            torch.stack([credit, gated], dim=1),
            torch.tensor([[1.0, -1.0]], dtype=torch.float64),
            trial.groups,
        )
        rows[name] = {
            "accuracy": float(credit.mean()),
            "over the default": _listed(against),
            "mean of the four": trial.mean_of_four(credit),
        }
    return rows


def _mean_gain(gains: Sequence[Gain]) -> list[float]:
    return [
        statistics.mean(getattr(gain, end) for gain in gains) for end in ("mean", "low", "high")
    ]


def _listed(interval: Interval) -> list[float]:
    return [interval.mean, interval.low, interval.high]


def tables_of(setup: str, found: Mapping[str, Any]) -> list[Table]:
    """Show the figures of one set-up, gains in points."""

    def points(values: Sequence[float] | None) -> str:
        if values is None:
            return ""
        mean, low, high = (100.0 * value for value in values)
        return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"

    def loss(values: Sequence[float] | None) -> str:
        return "" if values is None else f"{values[0]:+.4f}"

    designs = Table(
        "designs",
        f"Designs, {setup}",
        (
            "kind",
            "design",
            "out of fold: loss",
            "accuracy",
            "test: accuracy",
            "own constant mix",
            "ahead of it by",
            "spread",
            "of the four",
            "over the default",
            "over the default's constant mix",
            "over the probe",
            "epoch",
            "seconds",
        ),
        tuple(
            (
                row["group"],
                name,
                loss(row["out-of-fold loss gain"]),
                points(row["out-of-fold accuracy gain"]),
                f"{row['accuracy']:.3f}",
                f"{row['constant mix']:.3f}",
                points(row["gain"]),
                f"{100.0 * row['deviation']:.1f}",
                f"{row['mean of the four']:.3f}",
                "" if name == "default" else points(row["over the default"]),
                points(row["over the default's constant mix"]),
                points(row["over the probe"]),
                f"{row['epoch']:.1f}",
                f"{row['seconds']:.0f}",
            )
            for name, row in found["designs"].items()
        ),
        "Differences of accuracy in points, 95 % intervals over prompts. Out of fold: by how much "
        "members are ahead of constant mixes on training prompts that neither was fitted on. "
        "Spread: standard deviation of the accuracy between seeds, in points. Of the four: mean "
        "accuracy where the chosen response is longer, shorter, more formatted, plainer. Epoch: "
        "mean of the members' best.",
    )
    others = Table(
        "references",
        f"Beside them, {setup}",
        ("score", "test: accuracy", "of the four", "over the default gate"),
        tuple(
            (
                name,
                f"{row['accuracy']:.3f}",
                f"{row['mean of the four']:.3f}",
                points(row["over the default"]),
            )
            for name, row in found["references"].items()
        ),
    )
    return [designs, others]


def plot(setups: Mapping[str, Any], path: Path) -> None:
    """Draw what a design gains on test prompts against what it gains out of fold."""
    figure = Figure(figsize=(8, 5 * len(setups)), layout="constrained")
    drawn = figure.subplots(len(setups), squeeze=False)[:, 0]
    for axes, (setup, found) in zip(drawn, setups.items(), strict=True):
        for name, row in found["designs"].items():
            if row["out-of-fold accuracy gain"] is None:
                continue
            x, y = (100.0 * row[of][0] for of in ("out-of-fold accuracy gain", "gain"))
            axes.plot(x, y, "o")
            axes.annotate(name, (x, y), xytext=(5, 3), textcoords="offset points", fontsize=7)
        axes.set_title(setup)
        axes.set_xlabel("ahead of the constant mix on training prompts held out, points")
        axes.set_ylabel("on test prompts, points")
    figure.savefig(path)


def _sought(variant: Variant, only: str | None) -> bool:
    """Whether a design was asked for, by its name or its kind; the default always is."""
    parts = (only or "").split(",")
    return variant.name == "default" or any(
        part in variant.name or part == variant.group for part in parts
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--setup", choices=[*SETUPS, "both"], default="both")
    parser.add_argument("--only", help="kinds, or parts of names, beside default: one,another")
    parser.add_argument("--seeds", type=int, default=3, help="gates per design")
    parser.add_argument("--max-epochs", type=int, default=100, help="of a gate")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--markdown", type=Path, help="where to write the tables")
    parser.add_argument("--plot", type=Path, help="where to draw them, as SVG or PNG")
    arguments = parser.parse_args()
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "armo.fit.training"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    figures: dict[str, Any] = {"run": arguments.run.name, "seeds": arguments.seeds, "setups": {}}
    tables: list[Table] = []
    for setup in SETUPS if arguments.setup == "both" else [arguments.setup]:
        trial = Trial(arguments.run, setup=setup, max_epochs=arguments.max_epochs)
        found: dict[str, Any] = {"references": {}, "designs": {}}
        figures["setups"][setup] = found
        figures |= {"pairs": len(trial.test), "prompts": len(trial.groups.unique())}
        default: list[Fitted] = []
        variants = [v for v in variants_of(trial) if _sought(v, arguments.only)]
        for variant in track(variants, description=setup):
            fits = [trial.fit(variant, seed=seed) for seed in range(arguments.seeds)]
            default = default or fits
            found["references"] = found["references"] or references_of(trial, default)
            found["designs"][variant.name] = figures_of(
                trial, fits, variant=variant, default=default
            )
            if arguments.json:  # as far as it has come: the whole takes long on large data
                arguments.json.write_text(json.dumps(figures, indent=2))
        tables += tables_of(setup, found)
    print_tables(tables, Console(width=240))
    title = f"Gate designs on {arguments.run.name}"
    if arguments.markdown:
        arguments.markdown.write_text(to_markdown(tables, title=title))
    if arguments.plot:
        plot(figures["setups"], arguments.plot)


if __name__ == "__main__":
    main()
