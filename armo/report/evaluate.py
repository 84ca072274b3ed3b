"""Evaluation on held-out prompts: by objective, against rivals, by kind, and for style."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from armo.data.objectives import ObjectiveSet
from armo.data.surface import FORMAT_FEATURES
from armo.embed.extract import EmbeddedData
from armo.fit.decorrelation import RewardTransform, style_logits
from armo.fit.gating import GatingNetwork
from armo.fit.heads import FittedHeads
from armo.report.metrics import (
    Interval,
    bootstrap_contrasts,
    bootstrap_correlation,
    bootstrap_interval,
    pairwise_accuracy,
    rank_correlation,
    within_prompt_correlation,
)

MARKS = (
    "list_items",
    "bold",
    "italic",
    "headings",
    "links",
    "code_blocks",
    "inline_code",
    "tables",
    "emoji",
)
"""Surface features whose sum says which of two responses is more formatted."""

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
    heads: FittedHeads,
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
    tables = _objective_tables(data, heads, seed=seed)
    judgements = data.tables.pairs_judgements[data.tables.pairs_test]
    if bool(((judgements - 0.5).abs() > 0.0).any()):  # neither missing nor all ties
        tables.append(_judgement_table(data, heads, seed=seed))
    if bool(data.tables.pairs_test.any()):
        tables += [
            _rival_table(data, after, before, constant_weights, seed=seed),
            _category_table(data, after, constant_weights, seed=seed),
            _quarter_table(data, after, before, seed=seed),
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


class _Scored:
    """Scores of all responses under one mix."""

    def __init__(self, data: EmbeddedData, mix: Mix) -> None:
        count = data.responses.rows
        self.adjusted = torch.empty(count, len(data.objectives.names), dtype=torch.float64)
        for rows, embeddings in data.responses.batches(torch.arange(count)):
            style = data.style(rows, mix.transform.covariates)
            self.adjusted[rows] = mix.transform.adjusted(embeddings, style)
        prompts = data.prompts.read(torch.arange(data.prompts.rows))
        self.prompt_weights = mix.weights(prompts).double()
        self.weights = self.prompt_weights[data.tables.prompt_of_response]
        self.score = (self.weights * self.adjusted).sum(1)
        self.beta = mix.beta


def _objective_tables(data: EmbeddedData, fitted: FittedHeads, *, seed: int) -> list[Table]:
    """How well each head ranks, and how far it is off, beside the mean and a model of style."""
    tables = data.tables
    test, train = tables.ratings_test, tables.ratings_train
    responses = tables.ratings_response[test]
    embeddings = data.responses.read(responses)
    groups = tables.group_of_response[responses]
    rewards = fitted.heads.rewards(embeddings)
    uncertainty = fitted.uncertainty
    low, high = (rewards, rewards) if uncertainty is None else uncertainty.interval(embeddings)
    ranking: list[tuple[Any, ...]] = []
    errors: list[tuple[Any, ...]] = []
    for k, objective in enumerate(data.objectives.objectives):
        ratings, known = tables.ratings[test][:, k], tables.ratings[train][:, k]
        rated, trained = ~ratings.isnan(), ~known.isnan()
        count, penalty = int(rated.sum()), fitted.summaries[k].alpha
        ranked = fitted.summaries[k].targets == "ranks"
        if count < 2 or not bool(trained.any()):
            ranking.append((objective.name, count, penalty, *([None] * 6)))
            errors.append((objective.name, *([None] * 7)))
            continue
        truth, predicted, prompts = ratings[rated], rewards[rated, k], groups[rated]
        mean = known[trained].mean()
        style = _style_ridge(
            tables.covariates[tables.ratings_response[train][trained]],
            known[trained],
            tables.covariates[responses[rated]],
        )
        off, mean_off, style_off = (
            abs(objective.scale[1]) * (guess - truth).abs() for guess in (predicted, mean, style)
        )
        centred = predicted - predicted.mean()
        products = float(centred @ (truth - truth.mean()))
        spread = float(centred.norm())
        ranking.append(
            (
                objective.name,
                count,
                penalty,
                *_spread(bootstrap_correlation(predicted, truth, prompts, seed=seed)),
                rank_correlation(style, truth),
                products / max(spread * float((truth - truth.mean()).norm()), 1e-30),
                products / max(spread**2, 1e-30),
            )
        )
        gain = bootstrap_interval(mean_off - off, prompts, seed=seed)
        # Heads that are not plain ridge, or have too few ratings, have none.
        bounded = uncertainty is not None and bool(uncertainty.quantiles[k].isfinite())
        inside = (low[rated, k] <= truth) & (truth <= high[rated, k])
        width = abs(objective.scale[1]) * (high - low)[rated, k]
        if ranked:  # a rank is on no source's scale
            ranking[-1] = (*ranking[-1][:-1], None)
            errors.append((objective.name, *([None] * 7)))
            continue
        errors.append(
            (
                objective.name,
                float(off.mean()),
                float(mean_off.mean()),
                float(style_off.mean()),
                gain.low,
                gain.high,
                float(inside.double().mean()) if bounded else None,
                float(width.mean()) if bounded else None,
            )
        )
    return [
        Table(
            "objectives",
            "Rewards against ratings: do they rank alike?",
            (
                "objective",
                "ratings",
                "penalty",
                "Spearman",
                "from",
                "to",
                "style alone",
                "Pearson",
                "slope",
            ),
            tuple(ranking),
            "Test prompts, 95 % bootstrap intervals over prompts. Style alone: Spearman of a ridge "
            "regression on measured length and format. Slope of the ratings on the rewards: 1 is "
            "calibrated, below 1 rewards are too extreme.",
        ),
        Table(
            "errors",
            "Rewards against ratings: how far off?",
            (
                "objective",
                "error",
                "of the mean",
                "of style alone",
                "better than the mean by",
                "to",
                "in the interval",
                "its width",
            ),
            tuple(errors),
            "Test prompts. Errors are mean absolute, on each source's own scale"
            + (
                "."
                if uncertainty is None
                else f"; intervals are to hold {1 - uncertainty.miscoverage:.0%} of the ratings."
            ),
        ),
    ]


def _judgement_table(data: EmbeddedData, fitted: FittedHeads, *, seed: int) -> Table:
    """How often each head, and length, rank the two responses of a pair as judges did."""
    tables = data.tables
    test = tables.pairs_test
    chosen, rejected = tables.pairs_chosen[test], tables.pairs_rejected[test]
    groups = tables.group_of_response[chosen]
    # Of the linear parts: a link changes no order, but probabilities near one can round to it.
    embeddings = data.responses.read(chosen).double() - data.responses.read(rejected).double()
    differences = embeddings @ fitted.heads.weights.T
    longer = data.style(chosen, ["log_length"]) - data.style(rejected, ["log_length"])
    rows = []
    for k, name in enumerate(data.objectives.names):
        side = (tables.pairs_judgements[test, k] - 0.5).sign()
        decided = side.abs() > 0.0  # neither missing nor a tie
        if not bool(decided.any()):
            continue
        credit, length = (
            pairwise_accuracy((values * side)[decided])
            for values in (differences[:, k], longer[:, 0])
        )
        interval = bootstrap_interval(credit, groups[decided], seed=seed)
        rows.append((name, int(decided.sum()), *_spread(interval), float(length.mean())))
    return Table(
        "judgements",
        "Rewards against judgements of pairs: accuracy by objective",
        ("objective", "judgements", "accuracy", "low", "high", "longer wins"),
        tuple(rows),
        "Test pairs that were judged on the objective, ties left out; 95 % bootstrap intervals "
        "over prompts. Longer wins: what preferring the longer response gets.",
    )


def _style_ridge(
    covariates: Float[Tensor, "train covariates"],
    ratings: Float[Tensor, " train"],
    test: Float[Tensor, "test covariates"],
) -> Float[Tensor, " test"]:
    """Predict ratings from measured length and format alone."""
    model = make_pipeline(StandardScaler(), Ridge(alpha=1.0))
    model.fit(covariates.double().numpy(), ratings.numpy())
    return torch.from_numpy(model.predict(test.double().numpy()))


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
        covariates = tables.covariates[:, list(columns)]
        differences = covariates[chosen] - covariates[rejected]
        return style_logits(differences[train], differences[test])

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


def _quarter_table(data: EmbeddedData, after: _Scored, before: _Scored, *, seed: int) -> Table:
    tables = data.tables
    test = tables.pairs_test
    chosen, rejected = tables.pairs_chosen[test], tables.pairs_rejected[test]
    covariates = tables.covariates[chosen] - tables.covariates[rejected]
    longer = covariates[:, data.covariates.index("log_length")]
    formatted = covariates[:, [data.covariates.index(name) for name in MARKS]].sum(1)
    quarters = {
        "longer": longer > 0,
        "shorter": longer < 0,
        "more formatted": formatted > 0,
        "plainer": formatted < 0,
    }
    there = [name for name, pairs in quarters.items() if bool(pairs.any())]
    rows = {name: [float(name == other) for other in there] for name in there}
    if len(there) == len(quarters):
        rows |= {
            "mean of the four": [0.25] * 4,
            "longer less shorter": [1.0, -1.0, 0.0, 0.0],
            "more formatted less plainer": [0.0, 0.0, 1.0, -1.0],
        }
    groups = tables.group_of_response[chosen]
    columns = []
    for scored in (before, after) if there else ():
        credit = pairwise_accuracy(scored.score[chosen] - scored.score[rejected])
        inside = torch.stack([quarters[name] for name in there], dim=1)
        parts = torch.where(inside, credit[:, None], torch.nan)
        contrasts = torch.tensor(list(rows.values()), dtype=torch.float64)
        columns.append(bootstrap_contrasts(parts, contrasts, groups, seed=seed))
    return Table(
        "quarters",
        "Accuracy by the style of the chosen response, before and after decorrelation",
        ("chosen", "pairs", "before", "from", "to", "after", "after, from", "after, to"),
        tuple(
            (
                name,
                int(quarters[name].sum()) if name in quarters else None,
                *_spread(old),
                *_spread(new),
            )
            for name, old, new in zip(rows, *columns, strict=True)
        ),
        "Test pairs, 95 % bootstrap intervals over prompts. A score that follows style is right "
        f"where the judges did and wrong elsewhere. Formatting counts {', '.join(MARKS)}.",
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
                "all" if number is None else data.categories[number] or "(none)",
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
