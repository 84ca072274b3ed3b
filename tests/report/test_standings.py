import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armo.data.benchmarks import REWARD_BENCH, Benchmark
from armo.data.conversation import Message, ResponseList
from armo.data.surface import surface_features
from armo.report.baselines import baseline_scores
from armo.report.metrics import bootstrap_estimates
from armo.report.standings import standings

ONE = torch.ones(1, 1, dtype=torch.float64)
NULL = ("random", "longer", "shorter", "more marks")
# By category, the right response and the wrong one; of the last, both have as many words and marks.
PAIRS = (
    [("chat/easy", "**Yes**, it does and it should.", "No.")] * 12
    + [("chat/hard", "Yes.", "- no, it does not\n- **never**")] * 8
    + [("math", "It is four.", "It is five.")] * 10
)
ROWS = tuple(
    ResponseList(
        f"{k}",
        "test",
        # Every prompt is asked twice.
        (Message("user", f"Question {k // 2}?"),),
        (right, wrong) if k % 3 else (wrong, right),
        correct=(0,) if k % 3 else (1,),
        category=category,
    )
    for k, (category, right, wrong) in enumerate(PAIRS)
)
BENCHMARK = Benchmark("drawn", "Drawn pairs", "pairs", ROWS, notes=("two rows were left out",))
SURFACE = surface_features([text for row in ROWS for text in row.responses])


def scores_of(credits):
    """Scores with which each pair gets its credit: 1, 0 or 0.5."""
    scores = torch.zeros(len(ROWS), 2, dtype=torch.float64)
    for row, credit in enumerate(credits):
        (right,) = ROWS[row].correct
        scores[row, right] = credit - 0.5
    return scores.flatten()


def drawn_credits(seed, *, models):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, (models, len(ROWS)), generator=generator) / 2.0


def tables_of(credits, **more):
    names = [f"model {k}" for k in range(len(credits))]
    return standings(BENCHMARK, names, torch.stack([*map(scores_of, credits)]), SURFACE, **more)


@settings(max_examples=10)
@given(st.integers(0, 99))
def test_means_are_those_of_the_pairs_of_each_category(seed):
    credits = drawn_credits(seed, models=2)
    table, _ = tables_of(credits)
    assert table.columns == ("subset", "cases", "model 0", "model 1", *NULL)
    categories = [category for category, _, _ in PAIRS]
    rows = {row[0]: row[1:4] for row in table.rows}
    assert list(rows) == ["overall", "  chat", "    chat/easy", "    chat/hard", "  math"]
    for label, (count, *means) in rows.items():
        name = label.strip().replace("overall", "")
        here = torch.tensor([category.startswith(name) for category in categories])
        assert count == int(here.sum())
        assert means == pytest.approx(credits[:, here].mean(1).tolist())


def test_baselines_stand_beside_the_models_with_what_length_and_marks_alone_get():
    table, models = tables_of(drawn_credits(0, models=1))
    rows = {row[0].strip(): dict(zip(table.columns, row, strict=True)) for row in table.rows}
    for baseline, (overall, easy, hard, tied) in {
        "longer": (17 / 30, 1.0, 0.0, 0.5),
        "shorter": (13 / 30, 0.0, 1.0, 0.5),
        "more marks": (17 / 30, 1.0, 0.0, 0.5),
    }.items():
        found = [rows[name][baseline] for name in ("overall", "chat/easy", "chat/hard", "math")]
        assert found == pytest.approx([overall, easy, hard, tied])
        assert models.rows[models.column("model").index(baseline)][1] == pytest.approx(overall)
    assert rows["overall"]["random"] == pytest.approx(0.5, abs=0.1)


def test_the_random_baseline_is_the_mean_credit_of_its_draws_under_the_rule():
    rows = tuple(
        ResponseList(f"{k}", "t", (Message("user", f"p{k}"),), ("a", "b", "c", "d"), (0,), "Focus")
        for k in range(200)
    )
    benchmark = Benchmark("best", "Best of four", "reward_bench_2", rows)
    surface = surface_features([text for row in rows for text in row.responses])
    scores = torch.eye(4)[0].repeat(200)[None]
    table, models = standings(benchmark, ["all right"], scores, surface, seed=5)
    random = baseline_scores(surface, seed=5)["random"].reshape(-1, 200, 4)
    expected = float((random.argmax(2) == 0).double().mean())
    overall = dict(zip(table.columns, table.rows[0], strict=True))
    assert overall["random"] == pytest.approx(expected)
    assert abs(expected - 0.25) < 0.03
    # All four responses are one letter, so the others share the top.
    assert [overall[name] for name in NULL[1:]] == [0.25] * 3
    assert models.column("overall")[0] == overall["all right"] == 1.0


@settings(max_examples=10)
@given(st.integers(0, 99))
def test_differences_and_p_values_are_paired_and_over_the_first_model(seed):
    credits = drawn_credits(seed, models=3)
    credits[2] = credits[0]
    _, table = tables_of(credits, seed=seed)
    assert table.name == "drawn_models"
    ahead = ("ahead of model 0 by", "from", "to", "p")
    assert table.columns == ("model", "overall", "low", "high", *ahead)
    assert table.column("model") == ["model 0", "model 1", "model 2", *NULL]
    groups = torch.arange(len(ROWS)) // 2
    found = bootstrap_estimates(credits.double()[..., None], ONE, groups, seed=seed)
    for k, row in enumerate(table.rows[:3]):
        expected = [found.mean, found.low, found.high]
        assert row[1:4] == pytest.approx([float(each[k]) for each in expected])
    first, second, same = (row[4:] for row in table.rows[:3])
    assert first == (None, None, None, None)
    expected = [found.gain, found.gain_low, found.gain_high, found.p_value]
    assert second == pytest.approx([float(each[1]) for each in expected])
    assert same == (0.0, 0.0, 0.0, 1.0)
    assert "15 prompts" in table.note


def test_a_model_that_is_far_ahead_of_the_baselines_is_so_in_the_table():
    _, table = tables_of(torch.ones(1, len(ROWS)))
    for row in table.rows[1:]:
        assert row[4] < row[6] < 0.0
        assert row[7] == pytest.approx(2 / 2001)


def test_a_skipped_response_counts_by_the_rule_and_is_noted():
    scores = torch.stack([scores_of(torch.ones(len(ROWS)))] * 2)
    scores[1, 0] = math.nan
    table, _ = standings(BENCHMARK, ["whole", "cut"], scores, SURFACE)
    assert table.rows[0][2:4] == (1.0, pytest.approx(1 - 0.5 / 30))
    assert "Two rows were left out. Up to 1 of 30 prompts have a response without a" in table.note


def test_where_no_resample_holds_all_subsets_there_is_a_mean_and_no_interval():
    subsets = [subset for subsets in REWARD_BENCH.values() for subset in subsets]
    rows = tuple(
        ResponseList(f"{k}", "t", (Message("user", f"p{k}"),), ("a", "b"), (0,), subset)
        for k, subset in enumerate(subsets)
    )
    benchmark = Benchmark("one", "One of each", "reward_bench", rows)
    surface = surface_features(["a", "b"] * len(rows))
    scores = torch.tensor([[1.0, 0.0] * len(rows), [0.0, 1.0] * len(rows)])
    _, models = standings(benchmark, ["right", "wrong"], scores, surface)
    assert models.rows[0] == ("right", pytest.approx(1.0), *[None] * 6)
    assert models.rows[1] == ("wrong", 0.0, None, None, pytest.approx(-1.0), None, None, None)


def test_a_model_is_not_named_as_a_baseline():
    with pytest.raises(ValueError, match="`names` has random, as a null baseline"):
        standings(BENCHMARK, ["random"], scores_of([1.0] * len(ROWS))[None], SURFACE)
