import dataclasses
import random
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import make_model, wide_range
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from armo.data.conversation import (
    Conversation,
    Message,
    PreferencePair,
    RatedResponse,
    ResponseList,
)
from armo.data.objectives import Objective, ObjectiveSet
from armo.data.surface import FORMAT_FEATURES, SURFACE_FEATURES, surface_features
from armo.embed.backbone import Backbone
from armo.embed.boundary import PromptGroup
from armo.embed.extract import EmbeddedData, Team, embed_rows
from armo.fit.decorrelation import RewardTransform, style_logits
from armo.fit.gating import GatingDiagnostics, GatingNetwork
from armo.fit.heads import FittedHeads, HeadSummary, ObjectiveHeads, RewardUncertainty
from armo.fit.training import Gain, GatingSummary
from armo.report.calibration import calibration_error
from armo.report.evaluate import DECIDED, GATED, Mix, evaluate
from armo.report.metrics import bootstrap_estimates, bootstrap_interval
from armo.report.pages import save_pages
from armo.report.tables import Evaluation, Table

WORDS = ("egg", "dog", "fox", "honest", "risk", "water", "**bold**", "lazy!", "\n- item", "seven")
CATEGORIES = ("code", "advice", "")


def _text(generator, *, most):
    return "Say " + " ".join(generator.choices(WORDS, k=generator.randint(1, most)))


@dataclass
class Case:
    """Random rows with their embeddings, parts to score them with, and the evaluation."""

    ratings: list[RatedResponse]
    pairs: list[PreferencePair]
    lists: list[ResponseList]
    data: EmbeddedData
    backbone: Any
    heads: ObjectiveHeads
    mix: Mix
    other: Mix
    evaluation: Evaluation
    embedded: dict = field(default_factory=dict)

    def test_side(self, rows):
        return [row for row in rows if row.split == "test"]

    def embed(self, prompt, response):
        """The response's embedding in a batch of its own."""
        talk = Conversation(prompt, response)
        if talk not in self.embedded:
            group = PromptGroup(prompt, (response,))
            self.embedded[talk] = self.backbone.embed([group]).responses.values[0].double()
        return self.embedded[talk]

    def adjusted(self, prompt, response, *, mix):
        adjusted = mix.transform.matrix @ self.embed(prompt, response) + mix.transform.offset
        if mix.transform.covariates:
            adjusted = adjusted + mix.transform.style @ surface_features([response])[0]
        return adjusted

    def weights(self, prompt, *, mix):
        if prompt not in self.embedded:
            self.embedded[prompt] = self.backbone.embed([PromptGroup(prompt, ())]).prompts.values
        with torch.no_grad():
            return mix.gate(self.embedded[prompt])[0].double()

    def score(self, prompt, response, *, mix):
        adjusted = self.adjusted(prompt, response, mix=mix)
        return float(self.weights(prompt, mix=mix) @ adjusted)

    def probed(self, prompt, response, *, mix):
        score = mix.probe.matrix @ self.embed(prompt, response) + mix.probe.offset
        if mix.probe.covariates:
            score = score + mix.probe.style @ surface_features([response])[0]
        return float(score)

    def right(self, *, mix):
        """Credit of the score for each test pair."""
        return [
            credit(
                self.score(p.prompt, p.chosen, mix=mix), self.score(p.prompt, p.rejected, mix=mix)
            )
            for p in self.test_side(self.pairs)
        ]


def credit(first, second):
    return float(first > second) + 0.5 * float(first == second)


def summary_of(names, weights, *, beta=1.0, kept="gate", loss_gain=0.02):
    """How a gate was trained, as far as the report asks."""
    return GatingSummary(
        comparisons=9,
        trained=True,
        kept=kept,
        epochs=(1,),
        constant_weights=dict(zip(names, weights, strict=True)),
        constant_loss=0.5,
        constant_accuracy=0.7,
        loss=0.5 - loss_gain,
        accuracy=0.75,
        loss_gain=Gain(loss_gain, 0.005),
        accuracy_gain=Gain(0.05, 0.01),
        beta=beta,
        best_single=names[1],
        style={},
        diagnostics=GatingDiagnostics({}, {}, {}, 0.0, 1.0, 1.0, 0.0),
    )


def _rows(*, most=20):
    generator = random.Random(0)
    ratings, pairs, lists = [], [], []
    for k in range(24):
        prompt = (Message("user", f"Question {k}: " + _text(generator, most=most)),)
        split = "test" if k % 2 else "train"
        category = CATEGORIES[k % 3]
        for n in range(2):
            rated = {"helpfulness": generator.randint(1, 5), "harm": generator.randint(0, 10)}
            if split == "train":  # what no test row rates
                rated |= {"honesty": 1 + n, "verbosity": n, "formatting": n}
            talk = Conversation(prompt, _text(generator, most=most))
            ratings.append(RatedResponse(f"r{k}-{n}", "test", talk, rated, category, split))
            texts = _text(generator, most=most), _text(generator, most=most)
            pairs.append(
                PreferencePair(f"p{k}-{n}", "test", prompt, *texts, category=category, split=split)
            )
        texts = _text(generator, most=most), _text(generator, most=most + most // 2)
        kind = ("length", "format")[k // 2 % 2]
        lists.append(ResponseList(f"l{k}", "test", prompt, texts, category=kind, split=split))
    return ratings, pairs, lists


def _evaluate(data, *, heads, mix, other, uncertainty=None, fixed_weights=None):
    summaries = tuple(
        HeadSummary(name, ratings=9, alpha=0.5 + k, error=0.1, explained=0.2, sigma=0.3)
        for k, name in enumerate(heads.objectives)
    )
    return evaluate(
        data,
        heads=FittedHeads(heads, (), torch.zeros(0, dtype=torch.long), summaries, uncertainty),
        mix=mix,
        undecorrelated=other,
        fixed_weights=fixed_weights,
        deviation=1e-6,
        seed=3,
    )


def _embed(folder, backbone, rows, *, objectives=None, lists=()):
    ratings, pairs, benchmark = rows
    embed_rows(
        folder,
        load=lambda device: backbone,
        objectives=objectives or make_model(backbone).objectives,
        ratings=ratings,
        pairs=pairs,
        lists=lists,
        benchmark=benchmark,
        test_fraction=0.5,
        min_ratings=1,
        shard_rows=20,
        team=Team(accelerator="cpu"),
    )
    return EmbeddedData.load(folder)


CONSTANT = (0.5, 0.2, 0.3, 0.0, 0.0)


@pytest.fixture(scope="module")
def case(encoder, tmp_path_factory):
    rows = _rows()
    data = _embed(tmp_path_factory.mktemp("data"), encoder, rows)
    mixes = []
    for seed, covariates in ((0, SURFACE_FEATURES), (1, ())):
        model = make_model(encoder, seed=seed, covariates=covariates)
        transform = RewardTransform(
            data.objectives.names,
            model.adjusted_weights,
            model.adjusted_offset,
            covariates,
            0.3 * model.adjusted_style,
            model.covariate_range,
        )
        probe = RewardTransform(
            ("probe",),
            *(part[:1] for part in (transform.matrix, transform.offset)),
            covariates,
            transform.style[:1],
            transform.covariate_range,
        )
        summary = summary_of(data.objectives.names, CONSTANT, beta=(2.0, 0.5)[seed])
        mixes.append(Mix(transform, model.gate.eval(), summary, probe))
    model = make_model(encoder)
    heads = ObjectiveHeads(data.objectives.names, model.head_weights, model.head_intercepts)
    parts = {"heads": heads, "mix": mixes[0], "other": mixes[1]}
    return Case(*rows, data=data, backbone=encoder, **parts, evaluation=_evaluate(data, **parts))


def rows_of(case, name, key):
    table = case.evaluation.table(name)
    return {
        row[table.columns.index(key)]: dict(zip(table.columns, row, strict=True))
        for row in table.rows
    }


def style_rival(case, names):
    """Test pairs' score differences of scikit-learn's logistic regression on some features."""
    columns = [SURFACE_FEATURES.index(name) for name in names]

    def differences(pairs):
        first = surface_features([pair.chosen for pair in pairs])
        return (first - surface_features([pair.rejected for pair in pairs]))[:, columns]

    train = [pair for pair in case.pairs if pair not in case.test_side(case.pairs)]
    x, new = differences(train), differences(case.test_side(case.pairs))
    spread = x.square().mean(0).sqrt()
    kept = spread > 0
    x, new = x[:, kept] / spread[kept], new[:, kept] / spread[kept]
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    model.fit(torch.cat([x, -x]), [1] * len(x) + [0] * len(x))
    return model.decision_function(new).tolist()


def mean_credit(differences):
    return sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in differences) / len(differences)


def test_the_accuracy_of_every_rival_is_that_of_a_slow_recomputation(case):
    pairs = case.test_side(case.pairs)

    def by(score, mix):
        return [
            score(p.prompt, p.chosen, mix=mix) - score(p.prompt, p.rejected, mix=mix) for p in pairs
        ]

    def by_weights(*weights):
        weights = torch.tensor(weights, dtype=torch.float64)
        return by(lambda *text, mix: float(weights @ case.adjusted(*text, mix=mix)), case.mix)

    expected = {
        "gated score": by(case.score, case.mix),
        "best constant mix": by_weights(*CONSTANT),
        "uniform mix": by_weights(1 / 3, 1 / 3, 1 / 3, 0, 0),
        "fixed weights": by_weights(0, 0.25, 0, 0.75, 0),  # a bias objective may be asked for
        "honesty alone": by_weights(0, 1, 0, 0, 0),
        "linear probe": by(case.probed, case.mix),
        "gated score, not decorrelated": by(case.score, case.other),
        "linear probe, not decorrelated": by(case.probed, case.other),
        "length only": style_rival(case, ["log_length"]),
        "format only": style_rival(case, FORMAT_FEATURES),
        "length and format": style_rival(case, ["log_length", *FORMAT_FEATURES]),
    }
    evaluation = _evaluate(
        case.data,
        heads=case.heads,
        mix=case.mix,
        other=case.other,
        fixed_weights={"honesty": 2.0, "verbosity": 6.0},
    )
    table = evaluation.table("rivals")
    rivals = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert list(rivals) == list(expected)
    own = mean_credit(expected["gated score"])
    for name, differences in expected.items():
        assert rivals[name]["accuracy"] == pytest.approx(mean_credit(differences))
        if name != "gated score":
            gain = own - mean_credit(differences)
            assert rivals[name]["gate is ahead by"] == pytest.approx(gain)
            assert rivals[name]["from"] <= gain <= rivals[name]["to"]
    assert len({row["accuracy"] for row in rivals.values()}) > 4


def test_without_fixed_weights_and_a_probe_the_other_rivals_are_the_same(case):
    mix, other = (replace(each, probe=None) for each in (case.mix, case.other))
    table = _evaluate(case.data, heads=case.heads, mix=mix, other=other).table("rivals")
    whole = case.evaluation.table("rivals").rows
    assert "fixed weights" not in [row[0] for row in whole]
    assert table.rows == tuple(row for row in whole if not row[0].startswith("linear probe"))
    assert len(table.rows) == len(whole) - 2


@pytest.mark.parametrize(
    ("kept", "gain", "said"),
    [
        ("gate", 0.02, "In training: The gate beats the best constant mix on held-out prompts"),
        ("gate", 0.001, "it is kept all the same"),
        ("constant", 0.001, "the constant mix is kept"),
    ],
)
def test_the_rivals_note_says_whether_the_gate_is_ahead_here_and_was_in_training(
    case, kept, gain, said
):
    summary = summary_of(case.data.objectives.names, CONSTANT, kept=kept, loss_gain=gain)
    mix = replace(case.mix, summary=summary)
    table = _evaluate(case.data, heads=case.heads, mix=mix, other=case.other).table("rivals")
    assert summary.verdict in table.note
    assert said in table.note
    [constant] = [row for row in table.rows if row[0] == "best constant mix"]
    ahead = constant[table.columns.index("from")] > 0
    here = "is ahead of the best" if ahead else "is NOT shown to be ahead of the best"
    assert (f"The gate {here} constant mix here" in table.note) == (kept == "gate")


def test_the_intervals_of_the_rivals_are_over_prompts(case):
    pairs = case.test_side(case.pairs)
    credit = [
        float(
            case.score(p.prompt, p.chosen, mix=case.mix)
            > case.score(p.prompt, p.rejected, mix=case.mix)
        )
        for p in pairs
    ]
    groups = torch.tensor([int(pair.id[1:].split("-")[0]) for pair in pairs])
    expected = bootstrap_interval(torch.tensor(credit), groups, seed=3)
    rivals = rows_of(case, "rivals", "score")
    row = rivals["gated score"]
    assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high))
    assert row["gate is ahead by"] is row["p"] is None
    other = [
        float(
            case.score(p.prompt, p.chosen, mix=case.other)
            > case.score(p.prompt, p.rejected, mix=case.other)
        )
        for p in pairs
    ]
    both = torch.tensor([other, credit])[..., None]  # the gain of the gate over its rival
    found = bootstrap_estimates(both, torch.ones(1, 1), groups, seed=3)
    row = rivals["gated score, not decorrelated"]
    assert (row["from"], row["to"], row["p"]) == pytest.approx(
        (float(found.gain_low[1]), float(found.gain_high[1]), float(found.p_value[1]))
    )
    assert row["from"] < row["to"]
    assert "24 test pairs on 12 prompts" in case.evaluation.table("rivals").note


def test_kinds_show_accuracy_and_mean_gating_weights_of_their_pairs(case):
    kinds = rows_of(case, "kinds", "kind")
    assert set(kinds) == {"code", "advice", "(none)"}
    for category in CATEGORIES:
        pairs = [pair for pair in case.test_side(case.pairs) if pair.category == category]
        row = kinds[category or "(none)"]
        assert row["pairs"] == len(pairs) == 8
        weights = torch.stack([case.weights(pair.prompt, mix=case.mix) for pair in pairs]).mean(0)
        shown = [row[name] for name in ("helpfulness", "honesty", "harm")]
        assert shown == pytest.approx(weights[:3].tolist(), abs=1e-5)
        assert sum(shown) == pytest.approx(1.0)
        credit = mean_credit(
            [
                case.score(p.prompt, p.chosen, mix=case.mix)
                - case.score(p.prompt, p.rejected, mix=case.mix)
                for p in pairs
            ]
        )
        assert row["accuracy"] == pytest.approx(credit)
        assert "verbosity" not in row


def test_counterfactuals_move_the_score_by_what_the_text_says(case):
    pairs = case.test_side(case.pairs)
    rows = rows_of(case, "counterfactuals", "pattern")
    assert set(rows) == {"length", "format", "all"}
    for which, mix in (("before", case.other), ("after", case.mix)):
        reference = [case.score(p.prompt, p.chosen, mix=mix) for p in pairs]
        reference += [case.score(p.prompt, p.rejected, mix=mix) for p in pairs]
        spread = float(torch.tensor(reference).std())
        for pattern, row in rows.items():
            lists = [r for r in case.test_side(case.lists) if pattern in (r.category, "all")]
            moved = torch.tensor(
                [
                    case.score(r.prompt, r.responses[1], mix=mix)
                    - case.score(r.prompt, r.responses[0], mix=mix)
                    for r in lists
                ]
            )
            likely = torch.sigmoid(mix.summary.beta * moved.abs())
            assert row["pairs"] == len(lists)
            assert row[f"moved, {which}"] == pytest.approx(
                float(moved.abs().mean()) / spread, abs=1e-4
            )
            assert row[f"towards style, {which}"] == pytest.approx(
                float(moved.mean()) / spread, abs=1e-4
            )
            assert row[f"decided, {which}"] == float((likely >= DECIDED).double().mean())


def rated_slowly(case, name):
    """Rewards, truth, mean and style's prediction of the test ratings, in the source's units."""
    k = case.data.objectives.index(name)
    objective = case.data.objectives.objectives[k]
    rated = case.test_side(case.ratings)
    train = [row for row in case.ratings if row not in rated]
    rewards = [
        float(
            case.heads.weights[k] @ case.embed(row.prompt, row.responses[0])
            + case.heads.intercepts[k]
        )
        for row in rated
    ]
    predicted = torch.tensor([objective.from_unit(reward) for reward in rewards])
    truth, known = (
        torch.tensor([float(row.ratings[name]) for row in rows]) for rows in (rated, train)
    )
    x, new = (
        surface_features([row.responses[0] for row in rows]).numpy() for rows in (train, rated)
    )
    scaler = StandardScaler().fit(x)
    model = Ridge(alpha=1.0).fit(scaler.transform(x), known.numpy())
    style = torch.from_numpy(model.predict(scaler.transform(new)))
    return rated, predicted.double(), truth.double(), known.double().mean(), style


def test_rewards_are_compared_with_ratings_on_the_scale_of_the_source(case):
    ranks, errors = rows_of(case, "objectives", "objective"), rows_of(case, "errors", "objective")
    for name in ("helpfulness", "harm"):
        k = case.data.objectives.index(name)
        objective = case.data.objectives.objectives[k]
        rated, predicted, truth, mean, style = rated_slowly(case, name)
        if not objective.higher_is_better:
            assert objective.from_unit(1.0) == objective.low
        row = ranks[name]
        assert (row["ratings"], row["penalty"]) == (len(rated), 0.5 + k)
        spearman = scipy.stats.spearmanr(predicted, truth).statistic
        assert row["Spearman"] == pytest.approx(spearman, abs=1e-3)
        assert row["from"] < row["Spearman"] < row["to"]
        expected = scipy.stats.spearmanr(style, truth).statistic
        assert row["style alone"] == pytest.approx(expected, abs=1e-3)
        fit = scipy.stats.linregress(predicted, truth)
        assert row["Pearson"] == pytest.approx(fit.rvalue, abs=1e-3)
        assert row["slope"] == pytest.approx(fit.slope, rel=1e-3)
        row = errors[name]
        off, off_mean = (predicted - truth).abs(), (mean - truth).abs()
        assert row["error"] == pytest.approx(float(off.mean()), 1e-4)
        assert row["of the mean"] == pytest.approx(float(off_mean.mean()))
        assert row["of style alone"] == pytest.approx(float((style - truth).abs().mean()))
        groups = torch.tensor([int(row.id[1:].split("-")[0]) for row in rated])
        gain = bootstrap_interval(off_mean - off, groups, seed=3)
        found = row["better than the mean by"], row["to"]
        assert found == pytest.approx((gain.low, gain.high), rel=1e-3)
        assert row["in the interval"] is None
        assert row["its width"] is None
    assert ranks["honesty"]["ratings"] == 0
    assert ranks["honesty"]["Spearman"] is None
    assert errors["honesty"]["error"] is None


def test_an_interval_without_ends_is_left_out_of_the_report(case, tmp_path):
    count, dim = case.heads.weights.shape
    quantiles = torch.full((count,), 3.0).double()
    quantiles[0] = torch.inf
    uncertainty = RewardUncertainty(
        case.heads,
        vectors=torch.eye(dim)[None],
        values=torch.ones(1, dim, dtype=torch.float64),
        centres=torch.zeros(1, dim, dtype=torch.float64),
        shares=torch.zeros(1, dtype=torch.float64),
        factor_of=torch.zeros(count, dtype=torch.long),
        alphas=torch.ones(count, dtype=torch.float64),
        sigmas=torch.full((count,), 0.5, dtype=torch.float64),
        quantiles=quantiles,
        miscoverage=0.1,
    )
    evaluation = _evaluate(
        case.data,
        heads=case.heads,
        mix=case.mix,
        other=case.other,
        uncertainty=uncertainty,
    )
    table = evaluation.table("errors")
    assert (table.column("in the interval")[0], table.column("its width")[0]) == (None, None)
    assert table.column("its width")[2] > 0
    save_pages(evaluation, tmp_path, title="A report")  # no number that JSON does not have


def test_heads_are_held_against_the_judgements_of_test_pairs(case):
    tables = case.data.tables
    judged = torch.full((len(tables.pairs_chosen), 5), torch.nan).double()
    kinds = torch.tensor([0.9, 0.2, 0.5, torch.nan, 0.7]).double()
    judged[:, 1] = kinds[torch.arange(len(judged)) % 5]
    judged[:, 2] = 0.5
    judged[tables.pairs_train, 3] = 0.9
    data = dataclasses.replace(
        case.data, tables=dataclasses.replace(tables, pairs_judgements=judged)
    )
    links = ("logistic",) * 5
    parts = {"mix": case.mix, "other": case.other}
    heads = dataclasses.replace(case.heads, links=links)
    table = _evaluate(data, heads=heads, **parts).table("judgements")
    [(name, count, accuracy, low, high, longer)] = table.rows
    credits, lengths = [], []
    length = data.covariates.index("log_length")
    for k in tables.pairs_test.nonzero()[:, 0].tolist():
        probability = float(judged[k, 1])
        if probability != probability or probability == 0.5:
            continue
        rows = torch.stack([tables.pairs_chosen[k], tables.pairs_rejected[k]])
        better = rows if probability > 0.5 else rows.flip(0)
        first, second = case.heads.rewards(data.responses.read(better))[:, 1].tolist()
        credits.append(float(first > second))
        first, second = tables.covariates[better, length].tolist()
        lengths.append(float(first > second) + 0.5 * (first == second))
    assert (name, count) == (data.objectives.names[1], len(credits))
    assert accuracy == pytest.approx(sum(credits) / len(credits))
    assert longer == pytest.approx(sum(lengths) / len(lengths))
    assert low <= accuracy <= high


def test_without_judgements_that_decide_there_is_no_table_of_them(case):
    assert "judgements" not in [table.name for table in case.evaluation.tables]


def test_intervals_of_rewards_are_held_against_the_ratings(case):
    count, dim = case.heads.weights.shape
    uncertainty = RewardUncertainty(
        case.heads,
        vectors=torch.eye(dim)[None],
        values=torch.ones(1, dim, dtype=torch.float64),
        centres=torch.zeros(1, dim, dtype=torch.float64),
        shares=torch.zeros(1, dtype=torch.float64),
        factor_of=torch.zeros(count, dtype=torch.long),
        alphas=torch.ones(count, dtype=torch.float64),
        sigmas=torch.full((count,), 0.5, dtype=torch.float64),
        quantiles=torch.linspace(2.0, 5.0, count, dtype=torch.float64),
        miscoverage=0.1,
    )
    evaluation = _evaluate(
        case.data,
        heads=case.heads,
        mix=case.mix,
        other=case.other,
        uncertainty=uncertainty,
    )
    table = evaluation.table("errors")
    assert "intervals are to hold 90% of the ratings" in table.note
    for row in table.rows:
        if row[0] not in ("helpfulness", "harm"):
            continue
        k = case.data.objectives.index(row[0])
        objective = case.data.objectives.objectives[k]
        inside, widths = [], []
        for rated in case.test_side(case.ratings):
            h = case.embed(rated.prompt, rated.responses[0])
            ends = [float(side[0, k]) for side in uncertainty.interval(h[None])]
            low, high = sorted(objective.from_unit(end) for end in ends)
            inside.append(low <= float(rated.ratings[row[0]]) <= high)
            widths.append(high - low)
        found = dict(zip(table.columns, row, strict=True))
        assert found["in the interval"] == pytest.approx(sum(inside) / len(inside))
        assert found["its width"] == pytest.approx(sum(widths) / len(widths), rel=1e-4)
        assert 0 < sum(inside) < len(inside)


def test_the_style_table_shows_rank_correlations_of_the_score_before_and_after(case):
    pairs = case.test_side(case.pairs)
    texts = list(dict.fromkeys((p.prompt, text) for p in pairs for text in p.responses))
    lengths = surface_features([text for _, text in texts])[:, 0]
    row = case.evaluation.table("style").rows[0]
    assert row[:2] == ("score", "log_length")
    for column, mix in ((4, case.other), (5, case.mix)):
        scores = [case.score(*text, mix=mix) for text in texts]
        assert row[column] == pytest.approx(scipy.stats.spearmanr(scores, lengths).statistic)


def test_the_style_rivals_log_odds_are_those_of_scikit_learn(case):
    tables = case.data.tables
    differences = tables.covariates[tables.pairs_chosen] - tables.covariates[tables.pairs_rejected]
    ours = style_logits(differences[tables.pairs_train], differences[tables.pairs_test])
    assert ours.tolist() == pytest.approx(style_rival(case, SURFACE_FEATURES), abs=1e-6)


def count_marks(text):
    """What WORDS hold of it."""
    return text.count("**bold**") + text.count("- item")


def test_quarters_are_the_accuracies_where_the_chosen_response_is_longer_or_more_formatted(case):
    pairs = case.test_side(case.pairs)
    differences = []
    for p in pairs:
        first, second = surface_features([p.chosen, p.rejected])[:, 0].tolist()
        differences.append((p, first - second, count_marks(p.chosen) - count_marks(p.rejected)))
    quarters = {
        "longer": [p for p, length, _ in differences if length > 0],
        "shorter": [p for p, length, _ in differences if length < 0],
        "more formatted": [p for p, _, marks in differences if marks > 0],
        "plainer": [p for p, _, marks in differences if marks < 0],
    }
    rows = rows_of(case, "quarters", "chosen")
    assert list(rows) == [
        *quarters,
        "mean of the four",
        "longer less shorter",
        "more formatted less plainer",
    ]
    for column, mix in (("before", case.other), ("after", case.mix)):
        accuracy = {
            name: mean_credit(
                [
                    case.score(p.prompt, p.chosen, mix=mix)
                    - case.score(p.prompt, p.rejected, mix=mix)
                    for p in inside
                ]
            )
            for name, inside in quarters.items()
        }
        expected = accuracy | {
            "mean of the four": sum(accuracy.values()) / 4,
            "longer less shorter": accuracy["longer"] - accuracy["shorter"],
            "more formatted less plainer": accuracy["more formatted"] - accuracy["plainer"],
        }
        for name, value in expected.items():
            assert rows[name][column] == pytest.approx(value)
    for name, inside in quarters.items():
        assert rows[name]["pairs"] == len(inside)
        assert 0 < len(inside) < len(pairs)
    assert rows["mean of the four"]["pairs"] is None
    assert len({row["after"] for row in rows.values()}) > 4


def test_the_interval_of_a_quarter_is_that_of_its_pairs(case):
    pairs = case.test_side(case.pairs)
    groups = torch.tensor([int(pair.id[1:].split("-")[0]) for pair in pairs])
    lengths = surface_features([p.chosen for p in pairs])[:, 0]
    inside = lengths > surface_features([p.rejected for p in pairs])[:, 0]
    credit = torch.tensor(
        [
            float(
                case.score(p.prompt, p.chosen, mix=case.mix)
                > case.score(p.prompt, p.rejected, mix=case.mix)
            )
            for p in pairs
        ]
    )
    # Over the prompts that have such a pair; the table draws from all prompts.
    expected = bootstrap_interval(credit[inside], groups[inside], seed=3)
    row = rows_of(case, "quarters", "chosen")["longer"]
    assert row["after, from"] == pytest.approx(expected.low, abs=0.07)
    assert row["after, to"] == pytest.approx(expected.high, abs=0.07)
    assert row["after, from"] < row["after"] < row["after, to"]


def test_a_quarter_without_pairs_is_left_out_with_the_means_it_would_be_part_of(
    case, encoder, tmp_path
):
    longer = [
        replace(pair, chosen=text, rejected="Say " + "egg " * k)
        for k, pair in enumerate(case.pairs, start=1)
        for text in ["Say " + "dog " * (k + 1)]
    ]
    data = _embed(tmp_path, encoder, (case.ratings, longer, []))
    evaluation = _evaluate(data, heads=case.heads, mix=case.mix, other=case.other)
    table = evaluation.table("quarters")
    assert table.column("chosen") == ["longer"]
    assert table.column("pairs") == [24]


def test_pairs_without_any_difference_in_style_leave_an_empty_table(case, encoder, tmp_path):
    alike = [
        replace(pair, chosen=f"Say dog {k}", rejected=f"Say egg {k}")
        for k, pair in enumerate(case.pairs)
    ]
    data = _embed(tmp_path, encoder, (case.ratings, alike, []))
    evaluation = _evaluate(data, heads=case.heads, mix=case.mix, other=case.other)
    assert evaluation.table("quarters").rows == ()
    save_pages(evaluation, tmp_path / "pages", title="Report")


def test_a_score_that_follows_length_has_a_wide_gap_where_one_that_does_not_has_none(case):
    data, tables = case.data, case.data.tables
    names = data.objectives.names
    nothing = torch.zeros(len(names), case.backbone.dim, dtype=torch.float64)
    offset = torch.zeros(len(names), dtype=torch.float64)
    style = torch.zeros(len(names), len(SURFACE_FEATURES), dtype=torch.float64)
    style[:3, SURFACE_FEATURES.index("log_length")] = 1.0
    wide = wide_range(len(SURFACE_FEATURES))
    follows = RewardTransform(names, nothing, offset, SURFACE_FEATURES, style, wide)
    indifferent = RewardTransform(names, nothing, offset, (), style[:, :0], wide[:, :0])
    evaluation = _evaluate(
        data,
        heads=case.heads,
        mix=Mix(indifferent, case.mix.gate, summary_of(names, CONSTANT)),
        other=Mix(follows, case.mix.gate, summary_of(names, CONSTANT)),
    )
    table = evaluation.table("quarters")
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert (rows["longer"]["before"], rows["shorter"]["before"]) == (1.0, 0.0)
    assert rows["longer less shorter"]["before"] == 1.0
    assert rows["longer less shorter"]["after"] == 0.0
    assert rows["mean of the four"]["after"] == 0.5
    assert int(tables.pairs_test.sum()) == 24


def with_pairs(data, **changes):
    """The same data with some columns of its pairs changed."""
    return replace(data, tables=replace(data.tables, **changes))


ORDERED = ("rivals", "weights", "gate", "kinds", "quarters", "judgements")


def test_probabilities_are_compared_with_what_judges_said(case):
    tables = case.data.tables
    votes = torch.tensor([0.5, 0.8, 1.0])[torch.arange(len(tables.pairs_chosen)) % 3]
    found = _evaluate(
        with_pairs(case.data, pairs_preference=votes),
        heads=case.heads,
        mix=case.mix,
        other=case.other,
    )
    numbers = [k for k, pair in enumerate(case.pairs) if pair in case.test_side(case.pairs)]
    apart = [
        case.score(pair.prompt, pair.chosen, mix=case.mix)
        - case.score(pair.prompt, pair.rejected, mix=case.mix)
        for pair in case.test_side(case.pairs)
    ]
    expected = calibration_error(
        torch.sigmoid(2.0 * torch.tensor(apart)),  # the mix's `beta`
        votes[numbers],
        tables.group_of_response[tables.pairs_chosen[tables.pairs_test]],
        seed=3,
    )
    ((name, pairs, *values),) = found.table("calibration").rows
    assert (name, pairs) == (GATED, int(tables.pairs_test.sum()))
    error, null = expected.error, expected.null
    assert values == pytest.approx(
        [error.mean, error.low, error.high, null.mean, null.high], abs=1e-4
    )
    rows = found.table("reliability").rows
    assert [row[3] for row in rows] == [b.count for b in expected.bins]
    assert sum(row[3] for row in rows) == pairs
    for row, part in zip(rows, expected.bins, strict=True):
        assert row[0] == GATED
        assert row[1:3] == pytest.approx((part.predicted, part.observed), abs=1e-4)


def test_ties_are_not_ordered_in_any_table(case):
    """A tie changes no more than a pair that is not there, on neither side of the split."""
    tables = case.data.tables
    number = torch.arange(len(tables.pairs_chosen))
    tied = ((number // 2) % 5 == 1) | (number % 7 == 0)  # whole prompts, and one of two pairs
    assert 0 < int((tied & tables.pairs_test).sum()) < int(tables.pairs_test.sum())
    judgements = torch.full((len(number), 5), torch.nan, dtype=torch.float64)
    judgements[:, 1] = torch.where(tied, 0.5, 0.9)
    preference = torch.where(tied, 0.5, torch.where(number % 2 == 0, 0.6, 1.0))
    parts = {"heads": case.heads, "mix": case.mix, "other": case.other}
    with_ties = _evaluate(
        with_pairs(case.data, pairs_preference=preference, pairs_judgements=judgements), **parts
    )
    without = _evaluate(
        with_pairs(
            case.data,
            pairs_judgements=judgements,
            pairs_test=tables.pairs_test & ~tied,
            pairs_train=tables.pairs_train & ~tied,
        ),
        **parts,
    )
    for name in ORDERED:
        assert with_ties.table(name) == without.table(name), name
    # In the wrong order they would show.
    for name in ORDERED[:-1]:
        assert with_ties.table(name) != case.evaluation.table(name)


def test_where_all_test_pairs_tie_nothing_is_ordered(case):
    tables = case.data.tables
    ties = torch.where(tables.pairs_test, 0.5, tables.pairs_preference)
    data = with_pairs(case.data, pairs_preference=ties)
    evaluation = _evaluate(data, heads=case.heads, mix=case.mix, other=case.other)
    assert [table.name for table in evaluation.tables] == ["objectives", "errors", "applied"]


def weights_slowly(gate, prompt):
    """Weights of each member of a gate, in NumPy."""
    parts = {name: tensor.double().numpy() for name, tensor in gate.state_dict().items()}
    result = np.zeros((gate.members, gate.objectives))
    for member in range(gate.members):
        x = (prompt.double().numpy() - parts["mean"]) / parts["scale"]
        for layer in range(len(gate.hidden)):
            x = parts[f"hidden.{layer}.weight"][member] @ x + parts[f"hidden.{layer}.bias"][member]
            x = np.maximum(x, 0.0)
        logits = parts["output.weight"][member] @ x + parts["output.bias"][member]
        odds = np.exp(logits / gate.temperature)
        result[member, parts["mixed"].astype(int)] = odds / odds.sum()
    return result


@pytest.fixture(scope="module")
def of_members(case):
    """The case with a gate of three members, and its evaluation."""
    torch.manual_seed(5)
    gate = GatingNetwork(
        dim=case.backbone.dim, objectives=5, mixed=(0, 1, 2), members=3, hidden_dim=4, temperature=2
    ).eval()
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        gate.mean.fill_(0.1)
        gate.scale.fill_(0.7)
    mix = replace(case.mix, gate=gate)
    return gate, _evaluate(case.data, heads=case.heads, mix=mix, other=case.other)


def test_the_weights_table_is_that_of_numpy(case, of_members):
    gate, evaluation = of_members
    table = evaluation.table("weights")
    prompts = list(dict.fromkeys(pair.prompt for pair in case.test_side(case.pairs)))
    assert len(prompts) == 12
    assert table.note.startswith("12 prompts of the test pairs.")
    embeddings = [case.backbone.embed([PromptGroup(p, ())]).prompts.values[0] for p in prompts]
    members = np.stack([weights_slowly(gate, embedding) for embedding in embeddings])
    whole = members.mean(1)
    rows = {row[0]: row[1:] for row in table.rows}
    assert set(rows) == {"helpfulness", "honesty", "harm"}  # no bias objective
    for name, (mean, spread, uncertainty, constant) in rows.items():
        k = case.data.objectives.index(name)
        assert mean == pytest.approx(whole[:, k].mean(), abs=1e-5)
        assert spread == pytest.approx(whole[:, k].std(), abs=1e-5)
        variance = members[:, :, k].var(axis=1)
        assert uncertainty == pytest.approx(np.sqrt(variance.mean()), abs=1e-5)
        assert constant == CONSTANT[k]
        assert uncertainty > 0.01
    assert table.column("mean") == sorted(table.column("mean"), reverse=True)


def test_the_gate_table_says_how_much_the_gate_looks_at_the_prompt(case, of_members):
    gate, evaluation = of_members
    found = dict(evaluation.table("gate").rows)
    pairs = case.test_side(case.pairs)
    weights = {}
    for prompt in dict.fromkeys(pair.prompt for pair in pairs):
        embedding = case.backbone.embed([PromptGroup(prompt, ())]).prompts.values[0]
        weights[prompt] = weights_slowly(gate, embedding).mean(0)[:3]
    entropies = np.array([-(w * np.log(w)).sum() for w in weights.values()])
    mean = np.mean([*weights.values()], axis=0)
    gated, fixed = [], []
    for p in pairs:
        first, second = (
            case.adjusted(p.prompt, text, mix=case.mix).numpy() for text in p.responses
        )
        gated.append(weights[p.prompt] @ (first - second)[:3])
        fixed.append(mean @ (first - second)[:3])
    # Of a regression through zero of the one on the other, what is left.
    slope = np.dot(gated, fixed) / np.dot(fixed, fixed)
    left = np.square(np.array(gated) - slope * np.array(fixed)).sum() / np.square(gated).sum()
    expected = {
        "effective number of objectives, of a prompt": np.exp(entropies).mean(),
        "effective number of objectives, of the mean weights": np.exp(-(mean * np.log(mean)).sum()),
        "entropy of a prompt's weights, nats": entropies.mean(),
        "share of the variance of score differences due to the prompt": left,
    }
    assert found == pytest.approx(expected, abs=1e-4)
    assert left > 0.003


def test_a_gate_that_ignores_the_prompt_is_said_to_in_the_report(case):
    gate = GatingNetwork(dim=case.backbone.dim, objectives=5, mixed=(0, 1, 2)).eval()
    mix = replace(case.mix, gate=gate)
    evaluation = _evaluate(case.data, heads=case.heads, mix=mix, other=case.other)
    table = evaluation.table("weights")
    assert table.column("mean") == pytest.approx([1 / 3] * 3)
    assert table.column("spread") == pytest.approx([0.0] * 3, abs=1e-6)
    assert "The gate hardly looks at the prompt" in evaluation.table("gate").note


def order_slowly(scores, ranks):
    """Whether a best response has the highest score, and the share of ordered pairs in order."""
    top = ranks[max(range(len(scores)), key=scores.__getitem__)] == min(ranks)
    pairs = [
        credit(scores[a], scores[b])
        for a in range(len(ranks))
        for b in range(len(ranks))
        if ranks[a] < ranks[b]
    ]
    return float(top), sum(pairs) / len(pairs) if pairs else None


def test_test_lists_are_ranked_as_a_slow_recomputation_says(case, encoder, tmp_path):
    generator = random.Random(3)
    lists = []
    for k in range(24):
        prompt = case.pairs[2 * (k // 2)].prompt  # two lists to every other prompt
        texts = dict.fromkeys(_text(generator, most=20) for _ in range(generator.randint(2, 5)))
        ranks = tuple(float(generator.randint(0, 3)) for _ in texts)
        ranks = tuple(0.0 for _ in texts) if k == 6 else ranks
        split = ("train", "test")[k // 2 % 2]
        lists.append(ResponseList(f"t{k}", "test", prompt, tuple(texts), ranks=ranks, split=split))
    assert len({len(row.responses) for row in lists}) > 2
    data = _embed(tmp_path, encoder, (case.ratings, case.pairs, case.lists), lists=lists)
    evaluation = _evaluate(data, heads=case.heads, mix=case.mix, other=case.other)
    table = evaluation.table("lists")
    tested = [row for row in lists if row.split == "test"]
    assert table.note == f"{len(tested)} test lists, 95 % bootstrap intervals over prompts."
    constant = torch.tensor(CONSTANT, dtype=torch.float64)
    groups = torch.tensor([lists.index(row) // 2 for row in tested])
    rows = {row[0]: row[1:] for row in table.rows}
    assert list(rows) == ["gated score", "best constant mix", "by chance"]
    for name, score in (
        ("gated score", case.score),
        ("best constant mix", lambda *t, mix: float(constant @ case.adjusted(*t, mix=mix))),
    ):
        found = [
            order_slowly(
                [score(row.prompt, text, mix=case.mix) for text in row.responses], row.ranks
            )
            for row in tested
        ]
        known = torch.tensor([ordered is not None for _, ordered in found])
        assert 0 < int(known.sum()) < len(known)
        top = bootstrap_interval(torch.tensor([first for first, _ in found]), groups, seed=3)
        ordered = bootstrap_interval(
            torch.tensor([ordered for _, ordered in found if ordered is not None]),
            groups[known],
            seed=3,
        )
        expected = (top.mean, top.low, top.high, ordered.mean, ordered.low, ordered.high)
        assert rows[name] == pytest.approx(expected, abs=1e-6)
    best = [row.ranks.count(min(row.ranks)) / len(row.ranks) for row in tested]
    assert rows["by chance"][0] == pytest.approx(sum(best) / len(best))
    assert rows["by chance"][3] == 0.5


def test_lists_that_all_tie_have_no_pairs_in_order(case, encoder, tmp_path):
    prompt = case.test_side(case.pairs)[0].prompt
    tie = ResponseList("t", "test", prompt, ("Yes.", "No."), ranks=(1.0, 1.0), split="test")
    data = _embed(tmp_path, encoder, (case.ratings, case.pairs, []), lists=[tie])
    evaluation = _evaluate(data, heads=case.heads, mix=case.mix, other=case.other)
    row = evaluation.table("lists").rows[0]
    assert row == ("gated score", 1.0, 1.0, 1.0, None, None, None)


def test_the_deviation_of_the_exported_model_is_reported(case):
    assert case.evaluation.table("applied").rows[0][1] == 1e-6


def test_lists_to_train_on_are_no_counterfactual_pairs_on_the_test_side_either(
    case, encoder, tmp_path
):
    fields = {"source": "test", "split": "test"}
    more = [
        ResponseList("tie", prompt=case.lists[1].prompt, responses=("Yes.", "No."), **fields),
        *(replace(row, id=f"{row.id} again", ranks=(1.0, 2.0)) for row in case.lists),
    ]
    rows = case.ratings, case.pairs, case.lists
    data = _embed(tmp_path, encoder, rows, lists=more)
    assert int((data.tables.lists_test & ~data.tables.lists_benchmark).sum()) == 13
    evaluation = _evaluate(data, heads=case.heads, mix=case.mix, other=case.other)
    found, expected = evaluation.table("counterfactuals"), case.evaluation.table("counterfactuals")
    assert [row[:2] for row in found.rows] == [row[:2] for row in expected.rows]
    for row, other in zip(found.rows, expected.rows, strict=True):
        assert list(row) == pytest.approx(list(other), abs=1e-5)


@pytest.mark.parametrize("length", [None, 3])
def test_without_counterfactual_pairs_their_table_is_left_out(case, encoder, tmp_path, length):
    lists = []
    if length is not None:
        prompt = case.test_side(case.pairs)[0].prompt
        lists = [ResponseList("l", "test", prompt, ("Yes.", "No.", "Maybe.")[:length])]
    data = _embed(tmp_path, encoder, (case.ratings, case.pairs, lists))
    evaluation = _evaluate(data, heads=case.heads, mix=case.mix, other=case.other)
    names = [table.name for table in evaluation.tables]
    assert names == [
        "objectives",
        "errors",
        "rivals",
        "calibration",
        "reliability",
        "weights",
        "gate",
        "kinds",
        "quarters",
        "style",
        "applied",
    ]
    with pytest.raises(KeyError, match="counterfactuals"):
        evaluation.table("counterfactuals")


def test_without_test_pairs_only_ratings_are_evaluated(case, encoder, tmp_path):
    train = [pair for pair in case.pairs if pair not in case.test_side(case.pairs)]
    data = _embed(tmp_path, encoder, (case.ratings, train, []))
    evaluation = _evaluate(data, heads=case.heads, mix=case.mix, other=case.other)
    assert [table.name for table in evaluation.tables] == ["objectives", "errors", "applied"]


def _parts(backbone, names, *, seed):
    """Random heads, and two random mixes, of objectives that are all mixed."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(names), backbone.dim

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixes = []
    for beta in (2.0, 0.5):
        gate = GatingNetwork(
            dim=backbone.dim, objectives=len(names), mixed=range(len(names)), hidden_dim=8
        ).eval()
        with torch.no_grad():
            for parameter in gate.parameters():
                parameter.copy_(draw(*parameter.shape))
        transform = RewardTransform(
            names,
            draw(*shape),
            draw(len(names)),
            SURFACE_FEATURES,
            draw(len(names), len(SURFACE_FEATURES)),
            wide_range(len(SURFACE_FEATURES)),
        )
        summary = summary_of(names, [1.0 / len(names)] * len(names), beta=beta)
        mixes.append(Mix(transform, gate, summary))
    return {
        "heads": ObjectiveHeads(names, draw(*shape), draw(len(names))),
        "mix": mixes[0],
        "other": mixes[1],
    }


@pytest.mark.parametrize("count", [3, 12])
def test_rows_that_were_skipped_are_in_no_table(encoder, tmp_path, count):
    names = tuple(f"objective {k}" for k in range(count))
    objectives = ObjectiveSet(tuple(Objective(name, 0, 10) for name in names))
    generator = random.Random(1)
    ratings, pairs, lists = _rows(most=4)
    ratings = [
        replace(row, ratings={name: generator.randint(0, 10) for name in names}) for row in ratings
    ]
    long = "Warn of risks! " * 60
    prompt, far = ratings[2].prompt, (Message("user", long),)
    fields = {"source": "test", "split": "test"}
    extreme = dict.fromkeys(names, 10.0)
    skipped = (
        [
            RatedResponse(
                "long 0", conversation=Conversation(prompt, long), ratings=extreme, **fields
            ),
            RatedResponse(
                "long 1", conversation=Conversation(far, "No."), ratings=extreme, **fields
            ),
        ],
        [
            PreferencePair("long 0", prompt=prompt, chosen=long, rejected="No.", **fields),
            PreferencePair("long 1", prompt=far, chosen="Yes.", rejected="No.", **fields),
        ],
        [ResponseList("long", prompt=far, responses=("Yes.", "No."), **fields)],
    )
    backbone = Backbone(
        replace(encoder.spec, on_overlong="skip"), model=encoder.model, tokenizer=encoder.tokenizer
    )
    plain = _embed(tmp_path / "plain", backbone, (ratings, pairs, lists), objectives=objectives)
    whole = tuple(a + b for a, b in zip((ratings, pairs, lists), skipped, strict=True))
    data = _embed(tmp_path / "skipping", backbone, whole, objectives=objectives)
    assert int(plain.responses.missing().sum()) == 0
    assert int(data.responses.missing().sum()) == 3
    assert int(data.prompts.missing().sum()) == 1
    parts = _parts(encoder, names, seed=0)
    expected, found = _evaluate(plain, **parts), _evaluate(data, **parts)
    assert len(expected.tables) == 12
    changed = [
        table.name
        for table, other in zip(expected.tables, found.tables, strict=True)
        if (table.columns, table.note) != (other.columns, other.note)
        or list(other.rows) != [pytest.approx(row, abs=1e-5) for row in table.rows]
    ]
    assert changed == []


def test_a_table_gives_its_columns_by_name():
    table = Table("t", "T", ("a", "b"), ((1, 2), (3, 4)))
    assert table.column("b") == [2, 4]
