"""What augmentation against shortcuts, and the treatment of noise, do on real preferences.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/augmentation.py DATA

`DATA` has the folders `ratings` and `preferences`, as for `armo train experiment=real_data`. From a
sample of both, models are trained on the training pairs as they are, with pairs added by
`armo.data.augment.augment_pairs`, and with the pairs that an ensemble doubts treated by
`treat_noise`; the latter once more where a fifth of the training labels was turned round on
purpose. The models are a linear Bradley-Terry probe of the response embedding, without
decorrelation, and armo's gate with its default methods. Measured on prompts of the test side:
accuracy on their pairs, how often the chosen response beats one to another prompt and its own
beginning, and what a pattern put into a response does to its score.
"""

import argparse
import importlib.resources
import json
import logging
import random
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import yaml
from rich.console import Console
from rich.progress import track
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_score

from armo.data.augment import AUGMENTED, Noise, augment_pairs, treat_noise
from armo.data.checks import GroupSplits
from armo.data.conversation import PreferencePair, RatedResponse, ResponseList
from armo.data.objectives import ObjectiveSet
from armo.data.sources import stream_pairs, stream_ratings
from armo.embed.backbone import load_backbone
from armo.embed.extract import EmbeddedData, Team, embed_rows
from armo.embed.spec import BackboneSpec
from armo.fit.decorrelation import DecorrelationWarning, fit_transforms
from armo.fit.heads import fit_heads
from armo.fit.probe import fit_probe
from armo.fit.training import fit_gating
from armo.report.metrics import Interval, bootstrap_interval, pairwise_accuracy
from armo.report.pages import print_tables
from armo.report.tables import Table
from armo.stages import probe_judgements, train_gate, training_judgements

KINDS = ("off_prompt", "truncated", "restyled")
MODELS: dict[str, Sequence[Any]] = {"probe": (), "gate": ("residual", "reweight")}
MEASURES = {
    "accuracy": "accuracy on test pairs",
    "off_prompt": "chosen beats one to another prompt",
    "truncated": "chosen beats its beginning",
    "restyled": "patterned version wins",
    "moved": "pattern moves the score by (absolute, in its standard deviations)",
}
JUDGED = ("preferred-helpful",)
TEST_FRACTION = 0.2
# Of the ensemble's probes, as inverse strength.
PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0)
# In the sample; an objective with fewer says little.
MIN_RATINGS = 60


@dataclass(frozen=True)
class Work:
    """How much is done.

    Attributes:
        pairs: In the sample.
        ratings: In the sample.
        share: Of the training pairs, to which one of each kind is added.
        planted: Share of training labels that are turned round on purpose.
        treated: Share of the pairs that may be flipped or dropped.
        members: Of the ensemble.
        seeds: Gates per variant, whose results are averaged.
        max_epochs: Of a gate.
    """

    pairs: int = 3000
    ratings: int = 3000
    share: float = 0.5
    planted: float = 0.2
    treated: float = 0.1
    members: int = 5
    seeds: int = 3
    max_epochs: int = 100


QUICK = Work(pairs=400, ratings=400, members=2, seeds=1, max_epochs=10)


def settings(*path: str) -> dict[str, Any]:
    """Read a file of the configuration."""
    text = importlib.resources.files("armo.conf").joinpath(*path).read_text()
    return dict(yaml.safe_load(text))


def sample(
    data: Path, work: Work
) -> tuple[ObjectiveSet, list[RatedResponse], list[PreferencePair]]:
    """Draw rows of both kinds, and keep the objectives that are rated or judged often enough."""
    declared = settings("data", "objectives", "public.yaml")
    judges = settings("experiment", "real_data.yaml")["data"]["pairs"]["judges"]
    objectives = ObjectiveSet.from_mapping(declared)
    ratings = _draw(stream_ratings(str(data / "ratings"), objectives=objectives), work.ratings)
    pairs = _draw(
        stream_pairs(str(data / "preferences"), objectives=objectives, judges=judges), work.pairs
    )
    training = on_side([*ratings, *pairs], test=False)
    counts = dict.fromkeys(objectives.names, 0)
    for row in [*ratings, *pairs]:
        given = row.ratings if isinstance(row, RatedResponse) else row.judgements
        for name in given if training(row) else ():
            counts[name] += 1
    kept = ObjectiveSet(tuple(o for o in objectives.objectives if counts[o.name] >= MIN_RATINGS))
    ratings = [
        replace(row, ratings={k: v for k, v in row.ratings.items() if k in kept.names})
        for row in ratings
    ]
    pairs = [
        replace(row, judgements={k: v for k, v in row.judgements.items() if k in kept.names})
        for row in pairs
    ]
    return kept, [row for row in ratings if row.ratings], pairs


def _draw(rows: Iterable[Any], count: int) -> list[Any]:
    every = list(rows)
    if count > len(every):
        raise SystemExit(f"{count} rows are to be drawn of {len(every)}.")
    return [every[k] for k in sorted(random.Random(0).sample(range(len(every)), count))]


def on_side(rows: Iterable[Any], *, test: bool) -> Callable[[Any], bool]:
    """Say whether a row is on the test side, or whether it is not."""
    splits = GroupSplits(TEST_FRACTION)
    for row in rows:
        splits.add(row)
    sides = splits.test()
    return lambda row: sides[splits.add(row)] == test


def embed(
    folder: Path, data: Path, work: Work
) -> tuple[EmbeddedData, list[PreferencePair], list[PreferencePair]]:
    """Embed the sample, all pairs that may be added, and the probes of the test side.

    What is in the folder already is not embedded again.

    Returns:
        The embedded rows; the pairs of the sample; these and the added ones, in their order there.
    """
    objectives, ratings, pairs = sample(data, work)
    whole = [*ratings, *pairs]
    make = partial(augment_pairs, judged=[name for name in JUDGED if name in objectives.names])
    pool = list(
        make(
            pairs,
            training=on_side(whole, test=False),
            off_prompt=work.share,
            truncated=work.share,
            restyled=work.share,
        )
    )
    probes = make(
        pairs, training=on_side(whole, test=True), off_prompt=1, truncated=1, restyled=1, seed=1
    )
    spec = settings("embed", "minilm.yaml")["backbone"]["spec"]
    spec = BackboneSpec(**{name: value for name, value in spec.items() if name != "_target_"})
    embed_rows(
        folder,
        load=partial(load_backbone, spec),
        objectives=objectives,
        ratings=ratings,
        pairs=pool,
        benchmark=[
            ResponseList(row.id, row.source, row.prompt, row.responses, (0,), row.source)
            for row in probes
            if row.source.startswith(AUGMENTED)
        ],
        test_fraction=TEST_FRACTION,
        min_ratings=1,
        shard_rows=1024,
        team=Team(accelerator="cpu", devices=1),
    )
    return EmbeddedData.load(folder), pairs, pool


class Study:
    """The embedded sample, and the variants of its training pairs."""

    def __init__(
        self,
        data: EmbeddedData,
        pairs: Sequence[PreferencePair],
        pool: Sequence[PreferencePair],
        work: Work,
    ) -> None:
        self.data, self.pairs, self.work = data, pairs, work
        tables = data.tables
        self.kinds = {
            kind: tables.pairs_source == data.sources.index(f"{AUGMENTED}/{kind}") for kind in KINDS
        }
        self.own = ~torch.stack(list(self.kinds.values())).any(0)
        self.places = self.own.nonzero()[:, 0]
        assert [pool[k].id for k in self.places.tolist()] == [row.id for row in pairs]
        self.test = (tables.pairs_test & self.own & (tables.pairs_preference > 0.5)).nonzero()[:, 0]
        starts = torch.searchsorted(
            tables.lists_of.contiguous(), torch.arange(len(tables.lists_category))
        )
        self.versions = tables.lists_response[torch.stack([starts, starts + 1])]
        self.trainer = partial(
            L.Trainer, accelerator="cpu", max_epochs=work.max_epochs, enable_model_summary=False
        )

    def with_added(self, kinds: Sequence[str], *, every: int = 1) -> EmbeddedData:
        """Keep the added pairs of some kinds, all or one in so many."""
        tables = self.data.tables
        kept = self.own.clone()
        for kind in kinds:
            kept[self.kinds[kind].nonzero()[::every, 0]] = True
        return replace(self.data, tables=replace(tables, pairs_train=tables.pairs_train & kept))

    def with_pairs(self, rows: Iterable[PreferencePair]) -> EmbeddedData:
        """Take the sample's pairs as they are after a treatment; those not there are dropped."""
        data = self.with_added(())
        tables = data.tables
        names = ("chosen", "rejected", "preference", "margin", "judgements", "train")
        new = {name: getattr(tables, f"pairs_{name}").clone() for name in names}
        after = {row.id: row for row in rows}
        for place, before in zip(self.places.tolist(), self.pairs, strict=True):
            row = after.get(before.id)
            if row is None:
                new["train"][place] = False
                continue
            if row.chosen != before.chosen:
                new["chosen"][place] = tables.pairs_rejected[place]
                new["rejected"][place] = tables.pairs_chosen[place]
            new["preference"][place] = row.preference
            new["margin"][place] = torch.nan if row.margin is None else row.margin
            for name, judgement in row.judgements.items():
                new["judgements"][place, data.objectives.index(name)] = judgement
        changed = {f"pairs_{name}": values for name, values in new.items()}
        return replace(data, tables=replace(tables, **changed))

    def training(self) -> Callable[[PreferencePair], bool]:
        """Whether a pair of the sample is on the training side."""
        train = self.data.tables.pairs_train[self.places].tolist()
        ids = {row.id for row, there in zip(self.pairs, train, strict=True) if there}
        return lambda row: row.id in ids

    def planted(self) -> list[PreferencePair]:
        """Turn the labels of some training pairs round, as `treat_noise` would."""
        training = self.training()
        rng = random.Random(0)
        wrong = {row.id for row in self.pairs if rng.random() < self.work.planted}
        odds = {row.id: -20.0 if row.id in wrong else 20.0 for row in self.pairs}
        return list(treat_noise(self.pairs, training=training, strengths=odds, share=1.0))

    def strengths(self, rows: Sequence[PreferencePair]) -> dict[str, float]:
        """Mean log-odds of each training pair, by probes that were fitted on other prompts.

        Each member is fitted on a resample of the other folds' pairs, in folds of its own.
        """
        training = self.training()
        data = self.with_pairs(rows).tables
        places = [
            k for k, row in zip(self.places.tolist(), self.pairs, strict=True) if training(row)
        ]
        read = self.data.responses.read
        chosen, rejected = data.pairs_chosen[places], data.pairs_rejected[places]
        differences = (read(chosen).double() - read(rejected).double()).numpy()
        groups = data.group_of_response[chosen].numpy()
        signs = np.where(np.arange(len(places)) % 2, 1.0, -1.0)
        signed = differences * signs[:, None]
        fresh = partial(LogisticRegression, fit_intercept=False, max_iter=1000)
        penalty = max(
            PENALTIES,
            key=lambda c: cross_val_score(
                fresh(C=c), signed, signs, groups=groups, cv=GroupKFold(5), scoring="neg_log_loss"
            ).mean(),
        )
        odds = np.zeros(len(places))
        for member in range(self.work.members):
            rng = np.random.default_rng(member)
            shuffled = rng.permutation(groups.max() + 1)[groups]
            for fit, held in GroupKFold(5).split(differences, groups=shuffled):
                drawn = rng.choice(fit, len(fit))
                probe = fresh(C=penalty).fit(signed[drawn], signs[drawn])
                odds[held] += probe.decision_function(differences[held]) / self.work.members
        ids = [row.id for row in self.pairs if training(row)]
        return dict(zip(ids, odds.tolist(), strict=True))

    def treated(
        self, rows: Sequence[PreferencePair], strengths: dict[str, float], how: Noise
    ) -> EmbeddedData:
        """Treat the noise in the training pairs."""
        return self.with_pairs(
            treat_noise(
                rows,
                training=self.training(),
                strengths=strengths,
                how=how,
                share=self.work.treated,
            )
        )

    def outcomes(self, data: EmbeddedData, *, margins: str = "scale") -> dict[str, dict[str, Any]]:
        """Train both models on a variant, and measure them; by model and measure."""
        every = torch.arange(data.responses.rows)
        embeddings = data.responses.read(every)
        found = {}
        for model, methods in MODELS.items():
            heads = self._heads(data, reweighted=bool(methods))
            reference = self.data.tables.pairs_train & self.own
            used = torch.cat(
                [
                    getattr(self.data.tables, f"pairs_{name}")[reference]
                    for name in ("chosen", "rejected")
                ]
            ).unique()
            transforms = fit_transforms(
                heads,
                data.responses.read(used),
                covariates=data.tables.covariates[used],
                covariate_names=data.covariates,
                groups=data.tables.prompt_of_response[used],
                bias_indices=data.objectives.bias_indices,
                methods=methods,
            )
            if model == "probe":
                judgements = probe_judgements(data, transforms, source_weights={})
                probe = fit_probe(data, heads, transforms, judgements)
                style = data.style(every, probe.covariates)
                found[model] = self.measure(probe.adjusted(embeddings, style)[:, 0])
                continue
            adjusted = transforms.transform.adjusted(
                embeddings, data.style(every, transforms.transform.covariates)
            )
            drawn = []
            for seed in range(self.work.seeds):
                with tempfile.TemporaryDirectory() as scratch:
                    gate, _ = train_gate(
                        data,
                        heads,
                        transforms,
                        fit=partial(
                            fit_gating,
                            trainer=self.trainer,
                            progress=False,
                            keep="gate",
                            margins=margins,
                        ),
                        folder=Path(scratch),
                        seed=seed,
                    )
                with torch.no_grad():
                    weights = gate(data.prompts.read(torch.arange(data.prompts.rows))).double()
                scores = (weights[data.tables.prompt_of_response] * adjusted).sum(1)
                drawn.append(self.measure(scores))
            found[model] = {
                name: torch.stack([each[name] for each in drawn]).mean(0) for name in MEASURES
            }
        return found

    def _heads(self, data: EmbeddedData, *, reweighted: bool) -> Any:
        tables = data.tables
        rows = tables.ratings_response[tables.ratings_train]
        features = settings("fit", "decorrelation", "verbosity_format.yaml")["features"]
        return fit_heads(
            data.responses,
            rows,
            tables.ratings[tables.ratings_train],
            tables.group_of_response[rows],
            objectives=data.objectives.names,
            group_count=int(tables.group_of_prompt.max()) + 1,
            other_groups=tables.group_of_response[tables.pairs_chosen[tables.pairs_train]],
            judgements=training_judgements(
                data, reweighted=features if reweighted else (), source_weights={}
            ),
        )

    def measure(self, scores: torch.Tensor) -> dict[str, torch.Tensor]:
        """Measure scores of all responses on the test side; a value for each pair."""
        tables = self.data.tables
        chosen, rejected = tables.pairs_chosen[self.test], tables.pairs_rejected[self.test]
        first, second = self.versions
        found = {"accuracy": pairwise_accuracy(scores[chosen] - scores[rejected])}
        for kind in KINDS:
            of = self.of(kind)
            ahead = scores[first[of]] - scores[second[of]]
            found[kind] = pairwise_accuracy(-ahead if kind == "restyled" else ahead)
            if kind == "restyled":
                spread = scores[torch.cat([chosen, rejected]).unique()].std()
                found["moved"] = ahead.abs() / spread
        return found

    def of(self, kind: str) -> torch.Tensor:
        """Which of the probes are of a kind."""
        number = self.data.categories.index(f"{AUGMENTED}/{kind}")
        return self.data.tables.lists_category == number

    def interval(self, values: torch.Tensor, measure: str) -> Interval:
        """A mean with a bootstrap interval over prompts."""
        responses = self.data.tables.pairs_chosen[self.test]
        if measure != "accuracy":
            responses = self.versions[0, self.of("restyled" if measure == "moved" else measure)]
        return bootstrap_interval(values, self.data.tables.group_of_response[responses])


def variants(study: Study) -> Iterable[tuple[str, str, EmbeddedData, str]]:
    """Yield each variant: its group, its name, its training data and the gate's `margins`.

    The first of a group is what the others are compared with.
    """
    yield "augmentation", "as they are", study.with_added(()), "scale"
    for kind in KINDS:
        yield "augmentation", kind, study.with_added([kind]), "scale"
    yield "augmentation", "all three", study.with_added(KINDS), "scale"
    for kind in ("off_prompt", "truncated"):
        yield "augmentation", f"{kind}, a fifth of it", study.with_added([kind], every=5), "scale"
    for group, rows in (("noise", list(study.pairs)), ("planted noise", study.planted())):
        strengths = study.strengths(rows)
        yield group, "as they are", study.with_pairs(rows), "scale"
        for how in ("flip", "drop", "smooth"):
            yield group, how, study.treated(rows, strengths, how), "scale"
        yield group, "margin", study.treated(rows, strengths, "margin"), "subtract"


def detected(study: Study) -> dict[str, int]:
    """Count the labels turned round on purpose, those that `flip` turns, and what is both."""
    planted = study.planted()
    wrong = {row.id for row, own in zip(planted, study.pairs, strict=True) if row != own}
    strengths = study.strengths(planted)
    treated = treat_noise(
        planted, training=study.training(), strengths=strengths, share=study.work.treated
    )
    flipped = {row.id for row, own in zip(treated, planted, strict=True) if row != own}
    return {"planted": len(wrong), "flipped": len(flipped), "both": len(wrong & flipped)}


def run(study: Study) -> list[dict[str, Any]]:
    """Train and measure all variants; a row for each and for each model."""
    rows = []
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for group, name, data, margins in track(list(variants(study)), description="trainings"):
        trained = study.outcomes(data, margins=margins)
        for model, found in trained.items():
            base = first.setdefault((group, model), found)
            rows.append(
                {
                    "group": group,
                    "variant": name,
                    "model": model,
                    "pairs": int(data.tables.pairs_train.sum()),
                    **{m: _told(study.interval(found[m], m)) for m in MEASURES},
                    "change": {m: _told(study.interval(found[m] - base[m], m)) for m in MEASURES},
                }
            )
    return rows


def _told(interval: Interval) -> list[float]:
    return [interval.mean, interval.low, interval.high]


def tables_of(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Show each group of variants."""
    tables = []
    for group in dict.fromkeys(row["group"] for row in rows):
        own = [row for row in rows if row["group"] == group]
        measures = list(MEASURES) if group == "augmentation" else ["accuracy"]
        tables.append(
            Table(
                group.replace(" ", "_"),
                f"{group.capitalize()}: what comes of it on the test side",
                ("model", "training pairs", "number", *measures, "change of accuracy"),
                tuple(
                    (
                        row["model"],
                        row["variant"],
                        row["pairs"],
                        *(str(Interval(*row[m])) for m in measures),
                        str(Interval(*row["change"]["accuracy"])),
                    )
                    for row in own
                ),
                "95 % bootstrap intervals over prompts. "
                + "; ".join(f"{m}: {MEASURES[m]}" for m in measures),
            )
        )
    return tables


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with `ratings` and `preferences`")
    parser.add_argument("--folder", type=Path, help="where to keep embeddings for another time")
    parser.add_argument("--quick", action="store_true", help="a small sample, one gate a variant")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("armo.data.augment").setLevel(logging.INFO)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=DecorrelationWarning)
    warnings.filterwarnings("ignore", module="lightning")
    work = QUICK if arguments.quick else Work()
    with tempfile.TemporaryDirectory() as scratch:
        data, pairs, pool = embed(arguments.folder or Path(scratch), arguments.data, work)
        study = Study(data, pairs, pool, work)
        rows, found = run(study), detected(study)
    console = Console(width=190)
    print_tables(tables_of(rows), console)
    console.print(f"labels turned round on purpose, and by `flip`: {found}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows, "detected": found}, indent=2))


if __name__ == "__main__":
    main()
