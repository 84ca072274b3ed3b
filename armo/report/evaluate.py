"""Evaluation on held-out prompts: by objective, against rivals, by kind, and for style."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from armo.data.surface import FORMAT_FEATURES, MARKS
from armo.embed.extract import EmbeddedData
from armo.fit.decorrelation import RewardTransform, style_logits
from armo.fit.gating import GatingNetwork, diagnose
from armo.fit.heads import FittedHeads
from armo.fit.preferences import ranked_right
from armo.fit.training import GatingSummary
from armo.report.calibration import calibration_tables
from armo.report.metrics import (
    Interval,
    bootstrap_correlation,
    bootstrap_estimates,
    bootstrap_interval,
    pairwise_accuracy,
    rank_correlation,
    within_prompt_correlation,
)
from armo.report.tables import Evaluation, Table

GATED = "gated score"
"""What the model gives, by whatever weights it was decided to keep."""

DECIDED = 0.6
"""Preference probability from which style counts as deciding a counterfactual pair."""


@dataclass(frozen=True, eq=False, slots=True)
class Mix:
    """One way to make a score from embeddings, with its rivals from the same preferences.

    Attributes:
        transform: To adjusted rewards.
        gate: What mixes them.
        summary: How it was trained.
        probe: The linear probe; None without training pairs.
    """

    transform: RewardTransform
    gate: GatingNetwork
    summary: GatingSummary
    probe: RewardTransform | None = None

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
    deviation: float,
    fixed_weights: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Evaluation:
    """Evaluate a model on the test side of its data.

    Args:
        data: Embedded rows with their sides of the split.
        heads: The objective heads.
        mix: The model's transform and gate.
        undecorrelated: The same fitted without decorrelation, to compare with.
        deviation: Largest difference between scores from text and from stored embeddings.
        fixed_weights: The user's own weights, as one more rival.
        seed: Of the bootstrap.
    """
    after, before = _Scored(data, mix), _Scored(data, undecorrelated)
    tables = _objective_tables(data, heads, seed=seed)
    judgements = data.tables.pairs_judgements[data.tables.pairs_test]
    if bool(((judgements - 0.5).abs() > 0.0).any()):  # neither missing nor all ties
        tables.append(_judgement_table(data, heads, seed=seed))
    if len(_ordered_pairs(data)):
        tables += [
            _rival_table(data, after, before, fixed_weights, seed=seed),
            *_calibration_tables(data, after, seed=seed),
            *_weight_tables(data, after),
            _category_table(data, after, seed=seed),
            _quarter_table(data, after, before, seed=seed),
            _style_table(data, after, before),
        ]
        if pairs := _counterfactual_pairs(data):
            tables.append(_counterfactual_table(data, after, before, pairs))
    tested = data.tables.lists_test & ~data.tables.lists_benchmark
    if bool(tested.any()):
        tables.append(_list_table(data, after, tested, seed=seed))
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
        self.mix, self.summary = mix, mix.summary
        self.adjusted = torch.empty(count, len(data.objectives.names), dtype=torch.float64)
        self.probe = None if mix.probe is None else torch.empty(count, dtype=torch.float64)
        for rows, embeddings in data.responses.batches(torch.arange(count)):
            style = data.style(rows, mix.transform.covariates)
            self.adjusted[rows] = mix.transform.adjusted(embeddings, style)
            if mix.probe is not None and self.probe is not None:
                self.probe[rows] = mix.probe.adjusted(embeddings, style)[:, 0]
        shape = data.prompts.rows, len(data.objectives.names)
        self.prompt_weights = torch.empty(*shape, dtype=torch.float64)
        for rows, prompts in data.prompts.batches(torch.arange(data.prompts.rows)):
            self.prompt_weights[rows] = mix.weights(prompts).double()
        self.weights = self.prompt_weights[data.tables.prompt_of_response]
        self.score = (self.weights * self.adjusted).sum(1)
        constant = [mix.summary.constant_weights[name] for name in data.objectives.names]
        self.constant = self.adjusted @ torch.tensor(constant, dtype=torch.float64)


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


def _ordered_pairs(data: EmbeddedData) -> Int[Tensor, " pairs"]:
    """Return the test pairs of which one response is the better one, not ties."""
    tables = data.tables
    return (tables.pairs_test & (tables.pairs_preference > 0.5)).nonzero()[:, 0]


def _rival_table(
    data: EmbeddedData,
    after: _Scored,
    before: _Scored,
    fixed_weights: Mapping[str, float] | None,
    *,
    seed: int,
) -> Table:
    tables = data.tables
    test = _ordered_pairs(data)
    train = (tables.pairs_train & (tables.pairs_preference > 0.5)).nonzero()[:, 0]
    chosen, rejected = tables.pairs_chosen, tables.pairs_rejected
    objectives, single = data.objectives, after.summary.best_single
    formats = [data.covariates.index(name) for name in FORMAT_FEATURES]
    length = [data.covariates.index("log_length")]

    def style(columns: Sequence[int]) -> Float[Tensor, " test"]:
        covariates = tables.covariates[:, list(columns)]
        differences = covariates[chosen] - covariates[rejected]
        return style_logits(differences[train], differences[test])

    def mixed(weights: Mapping[str, float]) -> Float[Tensor, " responses"]:
        return after.adjusted @ torch.tensor(objectives.mix(weights), dtype=torch.float64)

    scores = {
        GATED: after.score,
        "best constant mix": after.constant,
        "uniform mix": mixed({objectives.names[k]: 1.0 for k in objectives.mixed_indices}),
        **({"fixed weights": mixed(fixed_weights)} if fixed_weights else {}),
        f"{single} alone": after.adjusted[:, objectives.index(single)],
        **({} if after.probe is None else {"linear probe": after.probe}),
        f"{GATED}, not decorrelated": before.score,
        **({} if before.probe is None else {"linear probe, not decorrelated": before.probe}),
    }
    rivals = {name: score[chosen[test]] - score[rejected[test]] for name, score in scores.items()}
    rivals |= {
        "length only": style(length),
        "format only": style(formats),
        "length and format": style([*length, *formats]),
    }
    groups = tables.group_of_response[chosen[test]]
    credits = torch.stack([pairwise_accuracy(differences) for differences in rivals.values()])
    whole = torch.ones(1, 1, dtype=torch.float64)
    found = bootstrap_estimates(credits[:, :, None], whole, groups, seed=seed)
    lines = torch.cat([found.mean, found.low, found.high], dim=1).tolist()
    # Ahead is the gate: the gain of a rival, from the other side.
    ahead = 0.0 - torch.cat([found.gain, found.gain_high, found.gain_low], dim=1)
    behind = dict(zip(rivals, ahead.tolist(), strict=True))
    rows = [
        (name, *line, *((*behind[name], p_value) if name != GATED else (*_NONE, None)))
        for name, line, p_value in zip(rivals, lines, found.p_value[:, 0].tolist(), strict=True)
    ]
    return Table(
        "rivals",
        "Which of two responses is preferred: accuracy",
        ("score", "accuracy", "low", "high", "gate is ahead by", "from", "to", "p"),
        tuple(rows),
        f"{len(test)} test pairs on {len(groups.unique())} prompts; 95 % bootstrap intervals over "
        f"prompts, paired for the difference, and p of no difference; a tie counts half. "
        f"{_verdict(after.summary, Interval(*behind['best constant mix']))}",
    )


def _verdict(summary: GatingSummary, gain: Interval) -> str:
    """Say plainly whether the gate is worth having on the test pairs."""
    if summary.kept == "constant":
        return f"In training: {summary.verdict}"
    shown = "is ahead of" if gain.low > 0.0 else "is NOT shown to be ahead of"
    return f"The gate {shown} the best constant mix here. In training: {summary.verdict}"


def _calibration_tables(data: EmbeddedData, scored: _Scored, *, seed: int) -> list[Table]:
    """How far preference probabilities are to be believed."""
    tables = data.tables
    test = tables.pairs_test
    chosen, rejected = tables.pairs_chosen[test], tables.pairs_rejected[test]
    differences = scored.score[chosen] - scored.score[rejected]
    return calibration_tables(
        {GATED: torch.sigmoid(scored.summary.beta * differences)},
        tables.pairs_preference[test],
        tables.group_of_response[chosen],
        seed=seed,
    )


def _weight_tables(data: EmbeddedData, scored: _Scored) -> list[Table]:
    """What the gate does with the prompts of the test pairs."""
    tables = data.tables
    test = _ordered_pairs(data)
    chosen, rejected = tables.pairs_chosen[test], tables.pairs_rejected[test]
    prompts, prompt_of = tables.prompt_of_response[chosen].unique(return_inverse=True)
    found = diagnose(
        scored.mix.gate,
        data.prompts.read(prompts),
        prompt_of=prompt_of,
        differences=scored.adjusted[chosen] - scored.adjusted[rejected],
        objectives=data.objectives.names,
    )
    constant = scored.summary.constant_weights
    order = sorted(found.mean, key=lambda name: -found.mean[name])
    note = f"{len(prompts)} prompts of the test pairs."
    return [
        Table(
            "weights",
            "Gating weights by objective",
            ("objective", "mean", "spread", "uncertainty", "constant mix"),
            tuple(
                (
                    name,
                    found.mean[name],
                    found.spread[name],
                    found.uncertainty[name],
                    constant[name],
                )
                for name in order
            ),
            f"{note} Spread: standard deviation over prompts. Uncertainty: standard deviation "
            f"between the members of the gate, each trained on other prompts; zero for a constant "
            f"mix.",
        ),
        Table(
            "gate",
            "Does the gate look at the prompt?",
            ("what", "value"),
            (
                ("effective number of objectives, of a prompt", found.effective),
                ("effective number of objectives, of the mean weights", found.effective_mean),
                ("entropy of a prompt's weights, nats", found.entropy),
                (
                    "share of the variance of score differences due to the prompt",
                    found.prompt_share,
                ),
            ),
            " ".join(
                [
                    f"{note} Effective number: the exponential of the entropy. Due to the prompt: "
                    f"what weights fixed at their means leave unexplained.",
                    *found.warnings,
                ]
            ),
        ),
    ]


def _list_table(
    data: EmbeddedData, scored: _Scored, tested: Bool[Tensor, " lists"], *, seed: int
) -> Table:
    """How well longer lists are ranked."""
    tables = data.tables
    here = tested[tables.lists_of]
    lists, position = tables.lists_of[here].unique(return_inverse=True)
    counts = torch.bincount(position)
    place = torch.arange(len(position)) - (counts.cumsum(0) - counts)[position]
    responses = tables.lists_response[here]
    ranks = torch.full((len(lists), int(counts.max())), torch.nan, dtype=torch.float64)
    ranks[position, place] = tables.lists_rank[here].double()
    best = ranks == ranks.nan_to_num(torch.inf).amin(1, keepdim=True)
    groups = tables.group_of_response[responses[place == 0]]
    # By chance: the mean over all choices, or over both orders of a pair.
    rows = []
    for name, score in ((GATED, scored.score), ("best constant mix", scored.constant)):
        scores = torch.full_like(ranks, -torch.inf)
        scores[position, place] = score[responses]
        top = best.gather(1, scores.argmax(1, keepdim=True))[:, 0].double()
        ordered = ranked_right(scores.nan_to_num(neginf=0.0), ranks)
        known = ~ordered.isnan()
        rows.append(
            (
                name,
                *_spread(bootstrap_interval(top, groups, seed=seed)),
                *(
                    _spread(bootstrap_interval(ordered[known], groups[known], seed=seed))
                    if bool(known.any())
                    else _NONE
                ),
            )
        )
    chance = float((best.sum(1) / counts).double().mean())
    rows.append(("by chance", chance, None, None, 0.5, None, None))
    return Table(
        "lists",
        "Which of several responses is best: accuracy",
        ("score", "best is first", "from", "to", "pairs in order", "pairs, from", "pairs, to"),
        tuple(rows),
        f"{len(lists)} test lists, 95 % bootstrap intervals over prompts.",
    )


def _category_table(data: EmbeddedData, scored: _Scored, *, seed: int) -> Table:
    tables = data.tables
    test = _ordered_pairs(data)
    names = data.objectives.names
    mixed = data.objectives.mixed_indices
    # The heaviest few say what a kind of prompt is about; a table of fifty columns does not.
    shown = sorted(mixed, key=lambda k: -float(scored.prompt_weights[:, k].nanmean()))[:8]
    shown = [k for k in mixed if k in shown]
    constant = scored.constant
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
    test = _ordered_pairs(data)
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
    columns: list[list[Interval]] = [[], []]
    if there:
        scores = torch.stack([before.score, after.score])
        credit = pairwise_accuracy((scores[:, chosen] - scores[:, rejected]).flatten())
        inside = torch.stack([quarters[name] for name in there], dim=1)
        parts = torch.where(inside, credit.reshape(2, -1, 1), torch.nan)
        contrasts = torch.tensor(list(rows.values()), dtype=torch.float64)
        found = bootstrap_estimates(parts, contrasts, groups, seed=seed)
        columns = [found.intervals(k) for k in range(2)]
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
    """Category, plain and styled response of each list of two of the benchmark."""
    tables = data.tables
    pairs = []
    for number in (tables.lists_test & tables.lists_benchmark).nonzero()[:, 0].tolist():
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
        probability = torch.sigmoid(scored.summary.beta * difference)
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
