"""Evaluation on held-out prompts: by objective, against rivals, by kind, and for style."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from armo.data.objectives import ObjectiveSet
from armo.data.surface import FORMAT_FEATURES
from armo.embed.extract import EmbeddedData
from armo.fit.decorrelation import RewardTransform
from armo.fit.gating import GatingNetwork
from armo.fit.heads import ObjectiveHeads
from armo.report.metrics import (
    Interval,
    bootstrap_interval,
    pairwise_accuracy,
    rank_correlation,
    within_prompt_correlation,
)

DECIDED = 0.6
"""Preference probability from which style counts as deciding a counterfactual pair."""


@dataclass(frozen=True, slots=True)
class Table:
    """One result table: what is shown, saved as JSON and drawn."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""

    def column(self, name: str) -> list[Any]:
        """Return the values of a column."""
        return [row[self.columns.index(name)] for row in self.rows]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All tables of a report, in reading order."""

    tables: tuple[Table, ...]

    def table(self, name: str) -> Table:
        """Return a table by name.

        Raises:
            KeyError: If there is none of that name.
        """
        for table in self.tables:
            if table.name == name:
                return table
        raise KeyError(name)


@dataclass(frozen=True, eq=False, slots=True)
class Mix:
    """A transform with a gate and its scale: one way to make a score from embeddings."""

    transform: RewardTransform
    gate: GatingNetwork
    beta: float

    @torch.no_grad()
    def weights(self, prompts: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch objectives"]:
        """Gating weights, in the precision of the gate."""
        weights: Tensor = self.gate(prompts)
        return weights


def evaluate(
    data: EmbeddedData,
    *,
    heads: ObjectiveHeads,
    mix: Mix,
    undecorrelated: Mix,
    constant_weights: Float[Tensor, " objectives"],
    deviation: float,
    seed: int = 0,
) -> Evaluation:
    """Evaluate a model on the test side of its data.

    Args:
        data: Embedded rows with their sides of the split.
        heads: The objective heads.
        mix: The model's transform and gate.
        undecorrelated: The same fitted without decorrelation, to compare with.
        constant_weights: The best constant mix of the training pairs.
        deviation: Largest difference between scores from text and from stored embeddings.
        seed: Of the bootstrap.
    """
    after, before = _Scored(data, mix), _Scored(data, undecorrelated)
    tables = [_objective_table(data, heads)]
    if bool(data.tables.pairs_test.any()):
        tables += [
            _rival_table(data, after, before, constant_weights, seed=seed),
            _category_table(data, after, constant_weights, seed=seed),
            _style_table(data, after, before),
        ]
        if pairs := _counterfactual_pairs(data):
            tables.append(_counterfactual_table(data, after, before, pairs))
    tables.append(
        Table(
            "applied",
            "The exported model does what was evaluated",
            ("check", "value"),
            (("largest difference, score from text and from stored embeddings", deviation),),
        )
    )
    return Evaluation(tuple(tables))


def style_differences(
    covariates: Float[Tensor, "responses covariates"],
    chosen: Int[Tensor, " pairs"],
    rejected: Int[Tensor, " pairs"],
    train: Int[Tensor, " train"],
    test: Int[Tensor, " test"],
) -> Float[Tensor, " test"]:
    """Score differences of a logistic model that sees surface features alone.

    Args:
        covariates: The features to use, per response.
        chosen: Chosen response of each pair.
        rejected: Rejected response of each pair.
        train: Pairs to fit on.
        test: Pairs to predict.
    """
    differences = covariates[chosen] - covariates[rejected]
    spread = differences[train].square().mean(0).sqrt()
    if not bool((spread > 0).any()):
        return torch.zeros(len(test), dtype=torch.float64)  # nothing to tell them apart by
    differences = differences[:, spread > 0] / spread[spread > 0]
    x = differences[train].numpy()
    # Both orders of each pair: the model has no intercept, so order must not matter.
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    model.fit([*x, *-x], [1] * len(x) + [0] * len(x))
    return torch.from_numpy(differences[test].numpy() @ model.coef_[0])


class _Scored:
    """Scores of all responses under one mix."""

    def __init__(self, data: EmbeddedData, mix: Mix) -> None:
        count = data.responses.rows
        self.adjusted = torch.empty(count, len(data.objectives.names), dtype=torch.float64)
        for rows, embeddings in data.responses.batches(torch.arange(count)):
            self.adjusted[rows] = mix.transform.adjusted(embeddings)
        prompts = data.prompts.read(torch.arange(data.prompts.rows))
        self.prompt_weights = mix.weights(prompts).double()
        self.weights = self.prompt_weights[data.tables.prompt_of_response]
        self.score = (self.weights * self.adjusted).sum(1)
        self.beta = mix.beta


def _objective_table(data: EmbeddedData, heads: ObjectiveHeads) -> Table:
    tables, test = data.tables, data.tables.ratings_test
    rewards = heads.rewards(data.responses.read(tables.ratings_response[test]))
    rows: list[tuple[Any, ...]] = []
    for k, objective in enumerate(data.objectives.objectives):
        ratings, train = tables.ratings[test][:, k], tables.ratings[tables.ratings_train][:, k]
        rated = ~ratings.isnan()
        slope = abs(objective.scale[1])
        if int(rated.sum()) < 2:
            rows.append((objective.name, int(rated.sum()), None, None, None))
            continue
        truth, predicted = ratings[rated], rewards[rated, k]
        mean = train[~train.isnan()].mean()
        rows.append(
            (
                objective.name,
                int(rated.sum()),
                rank_correlation(predicted, truth),
                slope * float((predicted - truth).abs().mean()),
                slope * float((mean - truth).abs().mean()),
            )
        )
    return Table(
        "objectives",
        "Rewards against ratings",
        ("objective", "ratings", "Spearman", "error", "error of the mean"),
        tuple(rows),
        "Test prompts. Errors are mean absolute, on each source's own scale.",
    )


def _rival_table(
    data: EmbeddedData,
    after: _Scored,
    before: _Scored,
    constant_weights: Float[Tensor, " objectives"],
    *,
    seed: int,
) -> Table:
    tables = data.tables
    test = tables.pairs_test.nonzero()[:, 0]
    train = tables.pairs_train.nonzero()[:, 0]
    chosen, rejected = tables.pairs_chosen, tables.pairs_rejected
    uniform = _uniform(data.objectives)
    formats = [data.covariates.index(name) for name in FORMAT_FEATURES]
    length = [data.covariates.index("log_length")]

    def style(columns: Sequence[int]) -> Float[Tensor, " test"]:
        return style_differences(tables.covariates[:, list(columns)], chosen, rejected, train, test)

    def difference(scores: Float[Tensor, " responses"]) -> Float[Tensor, " test"]:
        return scores[chosen[test]] - scores[rejected[test]]

    rivals = {
        "gated score": difference(after.score),
        "best constant mix": difference(after.adjusted @ constant_weights),
        "uniform mix": difference(after.adjusted @ uniform),
        "gated score, not decorrelated": difference(before.score),
        "length only": style(length),
        "format only": style(formats),
        "length and format": style([*length, *formats]),
    }
    groups = tables.group_of_response[chosen[test]]
    own = pairwise_accuracy(rivals["gated score"])
    rows = []
    for name, differences in rivals.items():
        credit = pairwise_accuracy(differences)
        interval = bootstrap_interval(credit, groups, seed=seed)
        gain = bootstrap_interval(own - credit, groups, seed=seed)
        rows.append(
            (name, *_spread(interval), *(_spread(gain) if name != "gated score" else _NONE))
        )
    return Table(
        "rivals",
        "Which of two responses is preferred: accuracy",
        ("score", "accuracy", "low", "high", "gate is ahead by", "from", "to"),
        tuple(rows),
        f"{len(test)} test pairs on {len(groups.unique())} prompts; 95 % bootstrap intervals over "
        f"prompts, paired for the difference; a tie counts half.",
    )


def _category_table(
    data: EmbeddedData,
    scored: _Scored,
    constant_weights: Float[Tensor, " objectives"],
    *,
    seed: int,
) -> Table:
    tables = data.tables
    test = tables.pairs_test.nonzero()[:, 0]
    names = data.objectives.names
    mixed = data.objectives.mixed_indices
    # The heaviest few say what a kind of prompt is about; a table of fifty columns does not.
    shown = sorted(mixed, key=lambda k: -float(scored.prompt_weights[:, k].nanmean()))[:8]
    shown = [k for k in mixed if k in shown]
    constant = scored.adjusted @ constant_weights
    rows = []
    for number in tables.pairs_category[test].unique().tolist():
        pairs = test[tables.pairs_category[test] == number]
        chosen, rejected = tables.pairs_chosen[pairs], tables.pairs_rejected[pairs]
        groups = tables.group_of_response[chosen]
        credit = pairwise_accuracy(scored.score[chosen] - scored.score[rejected])
        interval = bootstrap_interval(credit, groups, seed=seed)
        rival = pairwise_accuracy(constant[chosen] - constant[rejected]).mean()
        weights = scored.weights[chosen].mean(0)
        rows.append(
            (
                data.categories[number] or "(none)",
                len(pairs),
                *_spread(interval),
                float(rival),
                *(float(weights[k]) for k in shown),
            )
        )
    columns = ("kind", "pairs", "accuracy", "low", "high", "constant mix")
    return Table(
        "kinds",
        "By kind of prompt: accuracy and mean gating weights",
        (*columns, *(names[k] for k in shown)),
        tuple(rows),
        "Test pairs."
        if len(shown) == len(mixed)
        else f"Test pairs. The {len(shown)} objectives of {len(mixed)} with most weight.",
    )


def _style_table(data: EmbeddedData, after: _Scored, before: _Scored) -> Table:
    tables = data.tables
    test = tables.pairs_test
    rows = torch.cat([tables.pairs_chosen[test], tables.pairs_rejected[test]]).unique()
    prompts = tables.prompt_of_response[rows]
    names = data.objectives.names
    values: dict[str, tuple[Tensor, Tensor]] = {"score": (before.score[rows], after.score[rows])}
    for k in data.objectives.mixed_indices:
        values[names[k]] = before.adjusted[rows, k], after.adjusted[rows, k]
    result = []
    for name, (old, new) in values.items():
        for column, covariate in enumerate(data.covariates):
            measured = tables.covariates[rows, column]
            if not bool((measured != measured[0]).any()):
                continue
            result.append(
                (
                    name,
                    covariate,
                    within_prompt_correlation(old, measured, prompts),
                    within_prompt_correlation(new, measured, prompts),
                    rank_correlation(old, measured),
                    rank_correlation(new, measured),
                )
            )
    return Table(
        "style",
        "Correlation with measured length and format, before and after decorrelation",
        ("of", "with", "within, before", "within, after", "across, before", "across, after"),
        tuple(result),
        "Spearman, responses of test pairs; within: deviations from the prompt's mean.",
    )


def _counterfactual_pairs(data: EmbeddedData) -> list[tuple[int, int, int]]:
    """Category, plain and styled response of each test list of two."""
    tables = data.tables
    pairs = []
    for number in tables.lists_test.nonzero()[:, 0].tolist():
        responses = tables.lists_response[tables.lists_of == number].tolist()
        if len(responses) == 2:
            pairs.append((int(tables.lists_category[number]), responses[0], responses[1]))
    return pairs


def _counterfactual_table(
    data: EmbeddedData,
    after: _Scored,
    before: _Scored,
    pairs: Sequence[tuple[int, int, int]],
) -> Table:
    tables = data.tables
    kinds = torch.tensor([pair[0] for pair in pairs])
    plain = torch.tensor([pair[1] for pair in pairs])
    styled = torch.tensor([pair[2] for pair in pairs])
    test = tables.pairs_test
    reference = torch.cat([tables.pairs_chosen[test], tables.pairs_rejected[test]])

    def change(scored: _Scored) -> tuple[Tensor, Tensor]:
        difference = scored.score[styled] - scored.score[plain]
        probability = torch.sigmoid(scored.beta * difference)
        decided = torch.maximum(probability, 1.0 - probability) >= DECIDED
        return difference / scored.score[reference].std(), decided.double()

    (old, old_decided), (new, new_decided) = change(before), change(after)
    rows = []
    for number in [*kinds.unique().tolist(), None]:
        here = torch.ones(len(kinds), dtype=torch.bool) if number is None else kinds == number
        rows.append(
            (
                "all" if number is None else data.categories[number],
                int(here.sum()),
                float(old[here].abs().mean()),
                float(new[here].abs().mean()),
                float(old[here].mean()),
                float(new[here].mean()),
                float(old_decided[here].mean()),
                float(new_decided[here].mean()),
            )
        )
    return Table(
        "counterfactuals",
        "The same content in another style: how far the score moves",
        (
            "pattern",
            "pairs",
            "moved, before",
            "moved, after",
            "towards style, before",
            "towards style, after",
            "decided, before",
            "decided, after",
        ),
        tuple(rows),
        "Counterfactual pairs of test prompts, in standard deviations of the score over test "
        f"pairs; decided: style alone makes one version preferred with {DECIDED:.0%} or more.",
    )


_NONE = (None, None, None)


def _spread(interval: Interval) -> tuple[float, float, float]:
    return interval.mean, interval.low, interval.high


def _uniform(objectives: ObjectiveSet) -> Float[Tensor, " objectives"]:
    weights = torch.zeros(len(objectives.names), dtype=torch.float64)
    weights[list(objectives.mixed_indices)] = 1.0 / len(objectives.mixed_indices)
    return weights
