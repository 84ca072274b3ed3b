"""How few biased pairs bend a reward model, and what decorrelation does about it.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/injection.py --folder checkpoints/injection

To the training preferences of the built-in corpus, in which style does not tell chosen from
rejected, pairs are added whose chosen response is the rejected one with a pattern put in: the same
content, in bold or as a list. Trained on them are a linear Bradley-Terry probe of the response
embedding, the plain reward model of the literature on a frozen backbone, and armo's gate over heads
that were fitted to ratings; both without decorrelation and with the default methods. What comes of
it is measured on prompts of the test side: how often the patterned version of an answer wins, how
far the pattern moves the score, and the accuracy on unbiased pairs.
"""

import argparse
import importlib.resources
import json
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from rich.console import Console
from rich.progress import track

from armo.data.conversation import PreferencePair, ResponseList
from armo.data.objectives import ObjectiveSet
from armo.data.rewrite import PATTERNS
from armo.data.sources import load_pairs, load_ratings
from armo.embed.backbone import load_backbone
from armo.embed.extract import EmbeddedData, Team, embed_rows
from armo.embed.spec import BackboneSpec
from armo.fit.decorrelation import DecorrelationWarning, FittedTransforms, fit_transforms
from armo.fit.heads import FittedHeads, fit_heads
from armo.fit.probe import fit_probe
from armo.fit.training import fit_gating
from armo.report.bias import probe_lists
from armo.report.metrics import Interval, bootstrap_interval, pairwise_accuracy
from armo.report.pages import print_tables
from armo.report.tables import Table
from armo.stages import probe_judgements, train_gate

INJECTED = "injected"
METHODS: dict[str, Sequence[Any]] = {"plain": (), "decorrelated": ("residual", "reweight")}
MODELS = tuple(f"{kind}, {how}" for kind in ("probe", "gate") for how in METHODS)


@dataclass(frozen=True)
class Work:
    """How much is done.

    Attributes:
        patterns: What the added pairs reward.
        shares: Added pairs, as shares of the unbiased ones.
        seeds: Draws of the added pairs, each with a gate of its own.
        probes: Test responses that the probes are made from.
        max_epochs: Of a gate.
        every: One in so many prompts of the corpus is used.
    """

    patterns: tuple[str, ...] = ("bold", "list")
    shares: tuple[float, ...] = (0.0, 0.005, 0.01, 0.02, 0.05, 0.25)
    seeds: int = 3
    probes: int = 300
    max_epochs: int = 100
    every: int = 1


QUICK = Work(shares=(0.0, 0.01, 0.1), seeds=1, probes=60, max_epochs=20, every=6)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one trained model does.

    Attributes:
        wins: Credit of the patterned version of each probe of the pattern.
        moved: Score of the patterned less the plain version, in standard deviations of the score
            over the responses of the test pairs.
        right: Credit on each unbiased test pair.
    """

    wins: torch.Tensor
    moved: torch.Tensor
    right: torch.Tensor


def every_nth_prompt(rows: Iterable[Any], every: int) -> list[Any]:
    """Keep the rows of one in so many prompts, counted as they come."""
    numbers: dict[Any, int] = {}
    return [row for row in rows if numbers.setdefault(row.prompt, len(numbers)) % every == 0]


def biased_pairs(
    rows: Sequence[PreferencePair], pattern: str, *, most: int
) -> list[PreferencePair]:
    """Pairs of the same answer from the responses of the rows: with the pattern is chosen."""
    pool = probe_lists(_lists(rows), most=2 * most, patterns=[pattern])
    return [
        PreferencePair(
            id=f"{INJECTED}/{each.id}",
            source=INJECTED,
            prompt=each.prompt,
            chosen=each.responses[1],
            rejected=each.responses[0],
            category=pattern,
            split=each.split,
        )
        for each in pool[:most]
    ]


def _lists(rows: Sequence[PreferencePair]) -> list[ResponseList]:
    return [
        ResponseList(row.id, row.source, row.prompt, row.responses, (0,), split=row.split)
        for row in rows
    ]


def embed(folder: Path, work: Work, spec: BackboneSpec) -> tuple[EmbeddedData, int]:
    """Embed the corpus, all pairs that may be added, and the probes; and count the former's.

    What is in the folder already is not embedded again.
    """
    objectives = ObjectiveSet.from_mapping(settings("data", "objectives", "builtin.yaml"))
    pairs = every_nth_prompt(load_pairs("builtin"), work.every)
    train = [row for row in pairs if row.split == "train"]
    test = [row for row in pairs if row.split == "test"]
    most = round(max(work.shares) * len(train))
    added = [row for name in work.patterns for row in biased_pairs(train, name, most=2 * most)]
    embed_rows(
        folder,
        load=partial(load_backbone, spec),
        objectives=objectives,
        ratings=every_nth_prompt(load_ratings("builtin", objectives=objectives), work.every),
        pairs=[*pairs, *added],
        benchmark=probe_lists(_lists(test), most=work.probes, patterns=work.patterns),
        test_fraction=0.2,
        min_ratings=30,
        shard_rows=1024,
        team=Team(accelerator="cpu", devices=1),
    )
    return EmbeddedData.load(folder), len(train)


class Study:
    """The embedded data, the heads, and what is trained on them."""

    def __init__(self, data: EmbeddedData, work: Work) -> None:
        self.data, self.work = data, work
        tables = data.tables
        self.biased = tables.pairs_source == data.sources.index(INJECTED)
        self.test = (tables.pairs_test & ~self.biased).nonzero()[:, 0]
        self.heads = self._heads()
        starts = torch.searchsorted(
            tables.lists_of.contiguous(), torch.arange(len(tables.lists_category))
        )
        assert bool((tables.lists_of.bincount() == 2).all())
        self.versions = tables.lists_response[torch.stack([starts, starts + 1])]
        self.trainer = partial(
            L.Trainer,
            accelerator="cpu",
            max_epochs=work.max_epochs,
            enable_model_summary=False,
        )

    def _heads(self) -> FittedHeads:
        """Fit the heads, to ratings alone: the added pairs do not touch them."""
        tables = self.data.tables
        rows = tables.ratings_response[tables.ratings_train]
        return fit_heads(
            self.data.responses,
            rows,
            tables.ratings[tables.ratings_train],
            tables.group_of_response[rows],
            objectives=self.data.objectives.names,
            group_count=int(tables.group_of_prompt.max()) + 1,
            other_groups=tables.group_of_response[tables.pairs_chosen[tables.pairs_train]],
        )

    def with_added(self, pattern: str, count: int, *, seed: int) -> EmbeddedData:
        """Take so many of the biased pairs of a pattern into the training pairs."""
        tables = self.data.tables
        category = tables.pairs_category == self.data.categories.index(pattern)
        pool = (self.biased & category & tables.pairs_train).nonzero()[:, 0]
        if count > len(pool):
            raise SystemExit(f"{pattern}: {count} biased pairs are to be added of {len(pool)}.")
        generator = torch.Generator().manual_seed(seed)
        train = tables.pairs_train & ~self.biased
        train[pool[torch.randperm(len(pool), generator=generator)[:count]]] = True
        return replace(self.data, tables=replace(tables, pairs_train=train))

    def transforms(self, data: EmbeddedData, methods: Sequence[Any]) -> FittedTransforms:
        """Fit the reward transforms on the responses of the training pairs, as a run does."""
        tables = data.tables
        train = tables.pairs_train
        reference = torch.cat([tables.pairs_chosen[train], tables.pairs_rejected[train]]).unique()
        return fit_transforms(
            self.heads,
            data.responses.read(reference),
            covariates=tables.covariates[reference],
            covariate_names=data.covariates,
            groups=tables.prompt_of_response[reference],
            bias_indices=data.objectives.bias_indices,
            methods=methods,
        )

    def scores(self, data: EmbeddedData, *, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Train all models, and score every response with each."""
        every = torch.arange(data.responses.rows)
        embeddings = data.responses.read(every)
        for how, methods in METHODS.items():
            transforms = self.transforms(data, methods)
            judgements = probe_judgements(data, transforms, source_weights={})
            probe = fit_probe(data, self.heads, transforms, judgements)
            style = data.style(every, probe.covariates)
            yield f"probe, {how}", probe.adjusted(embeddings, style)[:, 0]
            with tempfile.TemporaryDirectory() as scratch:
                gate, _ = train_gate(
                    data,
                    self.heads,
                    transforms,
                    fit=partial(fit_gating, trainer=self.trainer, progress=False, keep="gate"),
                    folder=Path(scratch),
                    seed=seed,
                )
            with torch.no_grad():
                weights = gate(data.prompts.read(torch.arange(data.prompts.rows))).double()
            adjusted = transforms.transform.adjusted(embeddings, style)
            yield f"gate, {how}", (weights[data.tables.prompt_of_response] * adjusted).sum(1)

    def outcome(self, scores: torch.Tensor, pattern: str) -> Outcome:
        """Measure a model on the test side."""
        tables = self.data.tables
        chosen, rejected = tables.pairs_chosen[self.test], tables.pairs_rejected[self.test]
        plain, patterned = self.versions[:, self.of(pattern)]
        difference = scores[patterned] - scores[plain]
        return Outcome(
            wins=pairwise_accuracy(difference),
            moved=difference / scores[torch.cat([chosen, rejected]).unique()].std(),
            right=pairwise_accuracy(scores[chosen] - scores[rejected]),
        )

    def of(self, pattern: str) -> torch.Tensor:
        """Which of the probes are of a pattern."""
        tables = self.data.tables
        return tables.lists_category == self.data.categories.index(pattern)

    def interval(self, values: torch.Tensor, pattern: str | None) -> Interval:
        """A mean over probes of a pattern, or test pairs, with an interval over prompts."""
        tables = self.data.tables
        responses = tables.pairs_chosen[self.test]
        if pattern is not None:
            responses = self.versions[0, self.of(pattern)]
        return bootstrap_interval(values, tables.group_of_response[responses])


def study(data: EmbeddedData, work: Work, *, base: int) -> list[dict[str, Any]]:
    """Train and measure everything; a row for each pattern, share and model."""
    found = Study(data, work)
    cells = [(pattern, share) for pattern in work.patterns for share in work.shares]
    outcomes: dict[tuple[str, float, str], list[Outcome]] = {}
    unbiased: dict[int, dict[str, torch.Tensor]] = {}
    for pattern, share in track(cells, description="trainings"):
        for seed in range(work.seeds):
            count = round(share * base)
            if count or seed not in unbiased:  # without added pairs the pattern does not matter
                trial = found.with_added(pattern, count, seed=seed)
                scores = dict(found.scores(trial, seed=seed))
                if not count:
                    unbiased[seed] = scores
            else:
                scores = unbiased[seed]
            for model, each in scores.items():
                key = pattern, share, model
                outcomes.setdefault(key, []).append(found.outcome(each, pattern))
    rows = []
    for (pattern, share, model), drawn in outcomes.items():
        mean = {
            name: torch.stack([getattr(each, name) for each in drawn]).mean(0)
            for name in ("wins", "moved", "right")
        }
        before = outcomes[pattern, min(work.shares), model]
        change = mean["wins"] - torch.stack([each.wins for each in before]).mean(0)
        rows.append(
            {
                "pattern": pattern,
                "share": share,
                "pairs": round(share * base),
                "model": model,
                "wins": _told(found.interval(mean["wins"], pattern)),
                "change": _told(found.interval(change, pattern)),
                "moved": _told(found.interval(mean["moved"], pattern)),
                "accuracy": _told(found.interval(mean["right"], None)),
                "wins by seed": [float(each.wins.mean()) for each in drawn],
                "accuracy by seed": [float(each.right.mean()) for each in drawn],
            }
        )
    return rows


def _told(interval: Interval) -> list[float]:
    return [interval.mean, interval.low, interval.high]


def tables_of(rows: Sequence[dict[str, Any]], work: Work, *, base: int) -> list[Table]:
    """Show, by pattern, what each share of added pairs does to each model."""
    titles = {
        "wins": "how often the patterned version wins",
        "change": "the change of that from no added pairs",
        "moved": "how far the pattern moves the score, in its standard deviations",
        "accuracy": "accuracy on unbiased test pairs",
    }
    tables = []
    for pattern in work.patterns:
        own = [row for row in rows if row["pattern"] == pattern]
        for what, title in titles.items():
            cells = {(row["share"], row["model"]): Interval(*row[what]) for row in own}
            tables.append(
                Table(
                    f"{pattern}_{what}",
                    f"Added pairs reward {pattern}: {title}",
                    ("added", "pairs", *MODELS),
                    tuple(
                        (
                            f"{share:.1%}",
                            round(share * base),
                            *(str(cells[share, model]) for model in MODELS),
                        )
                        for share in work.shares
                    ),
                    f"Added to {base} unbiased pairs. Means over {work.seeds} draws of the added "
                    "pairs, 95 % bootstrap intervals over test prompts.",
                )
            )
    return tables


def settings(*path: str) -> dict[str, Any]:
    """Read a file of the configuration."""
    text = importlib.resources.files("armo.conf").joinpath(*path).read_text()
    return dict(yaml.safe_load(text))


def minilm() -> BackboneSpec:
    """The default backbone."""
    spec = settings("embed", "minilm.yaml")["backbone"]["spec"]
    return BackboneSpec(**{name: value for name, value in spec.items() if name != "_target_"})


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to keep embeddings for another time")
    parser.add_argument("--patterns", nargs="+", choices=[*PATTERNS], default=[*Work.patterns])
    parser.add_argument("--seeds", type=int, help="draws of the added pairs")
    parser.add_argument("--quick", action="store_true", help="a quarter of the prompts, one draw")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=DecorrelationWarning)
    warnings.filterwarnings("ignore", module="lightning")
    work = replace(QUICK if arguments.quick else Work(), patterns=tuple(arguments.patterns))
    work = work if arguments.seeds is None else replace(work, seeds=arguments.seeds)
    with tempfile.TemporaryDirectory() as scratch:
        data, base = embed(arguments.folder or Path(scratch), work, minilm())
        rows = study(data, work, base=base)
    print_tables(tables_of(rows, work, base=base), Console(width=150))
    if arguments.json:
        arguments.json.write_text(json.dumps({"unbiased pairs": base, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
