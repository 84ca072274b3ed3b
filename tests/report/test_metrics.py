import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armo.report import metrics
from armo.report.metrics import (
    Interval,
    bootstrap_contrasts,
    bootstrap_correlation,
    bootstrap_estimates,
    bootstrap_interval,
    pairwise_accuracy,
    rank_correlation,
    resampled_counts,
    within_prompt_correlation,
)

ONE = torch.ones(1, 1, dtype=torch.float64)


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def width(interval):
    return interval.high - interval.low


def test_pairwise_accuracy_counts_a_tie_as_half():
    credit = pairwise_accuracy(torch.tensor([2.0, 0.0, -1.0, 1e-12]))
    assert credit.tolist() == [1.0, 0.5, 0.0, 1.0]


def test_the_bootstrap_agrees_with_scipy_where_each_row_is_its_own_group():
    values = draw(200)
    ours = bootstrap_interval(values, torch.arange(200))
    theirs = scipy.stats.bootstrap(
        (values.numpy(),), lambda x, axis: x.mean(axis), method="percentile", rng=0
    ).confidence_interval
    assert ours.mean == pytest.approx(float(values.mean()))
    assert ours.low == pytest.approx(theirs.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.high, abs=0.02)


def test_paired_gains_agree_with_scipy_where_each_row_is_its_own_group():
    values = draw(2, 200) + draw(200, seed=1)
    values[1] += 0.02
    found = bootstrap_estimates(values[..., None], ONE, torch.arange(200), draws=9999)
    theirs = scipy.stats.bootstrap(
        (values[1].numpy(), values[0].numpy()),
        lambda x, y, axis: (x - y).mean(axis),
        paired=True,
        method="percentile",
        rng=0,
    )
    interval, drawn = theirs.confidence_interval, theirs.bootstrap_distribution
    assert float(found.gain_low[1]) == pytest.approx(interval.low, abs=0.02)
    assert float(found.gain_high[1]) == pytest.approx(interval.high, abs=0.02)
    p_value = 2 * min((drawn <= 0).mean(), (drawn >= 0).mean())
    assert 0.02 < p_value < 0.5
    assert float(found.p_value[1]) == pytest.approx(p_value, abs=0.03)


def test_the_bootstrap_covers_a_known_mean_about_as_often_as_it_says():
    groups = torch.arange(40) // 2
    covered = 0
    for seed in range(200):
        # Rows of a group share half of their variance.
        values = 3.0 + draw(20, seed=seed)[groups] + draw(40, seed=1000 + seed)
        interval = bootstrap_interval(values, groups, seed=seed, draws=200)
        covered += interval.low <= 3.0 <= interval.high
    assert 0.85 < covered / 200 < 0.99


def test_copies_of_a_row_in_one_group_add_no_certainty():
    values, groups = draw(50), torch.arange(50)
    once = bootstrap_interval(values, groups)
    copied = bootstrap_interval(values.repeat(9), groups.repeat(9))
    assert copied.low == pytest.approx(once.low)
    assert copied.high == pytest.approx(once.high)
    as_rows = bootstrap_interval(values.repeat(9), torch.arange(450))
    assert width(copied) > 2.5 * width(as_rows)


def test_groups_weigh_by_their_rows():
    values, groups = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([7, 7, 7, 2])
    interval = bootstrap_interval(values, groups)
    assert interval == Interval(0.75, 0.0, 1.0)


def test_a_seed_decides_the_interval():
    values, groups = draw(30), torch.arange(30)
    assert bootstrap_interval(values, groups, seed=1) == bootstrap_interval(values, groups, seed=1)
    assert bootstrap_interval(values, groups, seed=1) != bootstrap_interval(values, groups, seed=2)


def test_equal_values_leave_no_interval():
    assert bootstrap_interval(torch.ones(5), torch.arange(5)) == Interval(1.0, 1.0, 1.0)


def test_no_values_have_no_interval():
    with pytest.raises(ValueError, match="`values` is empty"):
        bootstrap_interval(torch.zeros(0), torch.zeros(0, dtype=torch.long))


def slow_lines(values, coefficients, groups, *, seed, draws):
    """Lines of the whole and of each resample, [models][lines], row by row; NaN without rows."""
    names = sorted(set(groups.tolist()))
    rows_of = [[row for row in range(len(groups)) if int(groups[row]) == name] for name in names]
    generator = torch.Generator().manual_seed(seed)

    def combine(model, line, rows):
        total = 0.0
        for part, coefficient in zip(model.T.tolist(), line.tolist(), strict=True):
            there = [part[row] for row in rows if not math.isnan(part[row])]
            if coefficient and not there:
                return math.nan
            total += coefficient * sum(there) / max(len(there), 1)
        return total

    def table(rows):
        return [[combine(model, line, rows) for line in coefficients] for model in values]

    drawn = []
    for _ in range(draws):
        picked = torch.randint(len(names), (len(names),), generator=generator).tolist()
        drawn.append(table([row for k in picked for row in rows_of[k]]))
    return np.array(table(range(len(groups)))), np.array(drawn)


def drawn_parts(seed, share, *, models):
    """Values of thirty units of some prompts in three parts, and lines of the parts."""
    generator = torch.Generator().manual_seed(seed)
    groups = 5 * torch.randint(8, (30,), generator=generator)
    values = draw(models, 30, 3, seed=seed + 1)
    inside = torch.rand(30, 3, generator=generator) < share
    inside[seed % 30] = True
    lines = torch.tensor([[1.0, 0.0, 0.0], [1.0, -1.0, 0.0], [0.5, 0.25, 0.25]]).double()
    return values.where(inside, torch.nan), lines, groups


@settings(max_examples=10)
@given(seed=st.integers(0, 99), share=st.sampled_from([0.1, 0.4, 0.9]))
def test_contrasts_are_those_of_resampling_whole_prompts_row_by_row(seed, share):
    values, contrasts, groups = drawn_parts(seed, share, models=1)
    found = bootstrap_contrasts(values[0], contrasts, groups, seed=seed, draws=100)
    [means], drawn = slow_lines(values, contrasts, groups, seed=seed, draws=100)
    low, high = np.nanquantile(drawn[:, 0], [0.025, 0.975], axis=0)
    assert [each.mean for each in found] == pytest.approx(means)
    assert [each.low for each in found] == pytest.approx(low)
    assert [each.high for each in found] == pytest.approx(high)
    assert share == 0.1 or np.isnan(drawn).mean() < 0.1


@settings(max_examples=10)
@given(seed=st.integers(0, 99), share=st.sampled_from([0.1, 0.4, 0.9]), reference=st.integers(0, 2))
def test_estimates_of_several_models_are_those_of_the_same_prompts_drawn_row_by_row(
    seed, share, reference
):
    values, lines, groups = drawn_parts(seed, share, models=3)
    values[1] += 0.5  # some p-values are to be small
    found = bootstrap_estimates(values, lines, groups, reference=reference, seed=seed, draws=99)
    mean, drawn = slow_lines(values, lines, groups, seed=seed, draws=99)
    over, gains = mean - mean[reference], drawn - drawn[:, reference, None]
    below, above = (gains <= 1e-9).sum(0), (gains >= -1e-9).sum(0)
    used = lines.abs().double() @ (~values[0].isnan()).double().T > 0.0  # of each unit
    prompts = np.array([[len(groups[here].unique()) for here in used]])
    expected = {
        "mean": mean,
        "low": np.nanquantile(drawn, 0.025, axis=0),
        "high": np.nanquantile(drawn, 0.975, axis=0),
        "gain": over,
        "gain_low": np.nanquantile(gains, 0.025, axis=0),
        "gain_high": np.nanquantile(gains, 0.975, axis=0),
        "p_value": np.maximum(
            0.5 ** (prompts - 1),
            np.minimum(1.0, 2 * (1 + np.minimum(below, above)) / (1 + (~np.isnan(gains)).sum(0))),
        ),
    }
    for name, value in expected.items():
        assert getattr(found, name).numpy() == pytest.approx(value, abs=1e-12), name
    assert found.p_value[reference].tolist() == [1.0, 1.0, 1.0]


@given(at_once=st.integers(1, 2000), seed=st.integers(0, 9))
def test_estimates_do_not_depend_on_how_many_resamples_are_in_memory(at_once, seed):
    values, lines, groups = drawn_parts(seed, 0.4, models=2)
    expected = bootstrap_estimates(values, lines, groups, seed=seed, draws=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "COUNTS_AT_ONCE", at_once)
        found = bootstrap_estimates(values, lines, groups, seed=seed, draws=100)
    for name in ("mean", "low", "high", "gain", "gain_low", "gain_high", "p_value"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=0.0, atol=1e-12, equal_nan=True
        )


def test_counts_are_those_of_whole_draws_one_after_the_other(monkeypatch):
    monkeypatch.setattr(metrics, "COUNTS_AT_ONCE", 50)
    counts = list(resampled_counts(7, seed=3, draws=20))
    assert [len(some) for some in counts] == [7, 7, 6]
    generator = torch.Generator().manual_seed(3)
    for row in torch.cat(counts):
        drawn = torch.randint(7, (7,), generator=generator)
        assert row.tolist() == torch.bincount(drawn, minlength=7).tolist()


def test_p_values_are_about_uniform_where_two_models_are_alike():
    count, small = 400, 0
    groups = torch.arange(120) // 2
    generator = torch.Generator().manual_seed(0)
    p_values = []
    for seed in range(count):
        # Credits of two models that are right as often, and together on hard and easy prompts.
        easy = torch.rand(60, generator=generator)[groups]
        right = torch.rand(2, 120, 1, generator=generator) < easy[:, None]
        found = bootstrap_estimates(right.double(), ONE, groups, seed=seed, draws=400)
        p_values.append(float(found.p_value[1]))
        outside = found.gain_low[1] > 0 or found.gain_high[1] < 0
        small += outside
        assert bool(outside) == (p_values[-1] < 0.05) or abs(p_values[-1] - 0.05) < 0.02
    for level in (0.05, 0.1, 0.25, 0.5, 0.75):
        share = np.mean(np.array(p_values) <= level)
        assert abs(share - level) < 3.5 * math.sqrt(level * (1 - level) / count), level
    assert 0.02 < small / count < 0.09


def test_a_difference_that_is_there_has_a_small_p_value_and_never_zero():
    right = torch.zeros(2, 200, 1, dtype=torch.float64)
    right[1, ::4] = 1.0
    found = bootstrap_estimates(right, ONE, torch.arange(200), draws=1000)
    assert found.p_value[1].tolist() == [2 / 1001]
    worse = bootstrap_estimates(right, ONE, torch.arange(200), reference=1, draws=1000)
    assert worse.p_value[0].tolist() == [2 / 1001]


@pytest.mark.parametrize("prompts", [1, 2, 5, 9, 30])
def test_few_prompts_that_all_agree_are_no_more_evidence_than_a_sign_test_gives(prompts):
    values = torch.zeros(2, prompts, 1).double()
    values[1] = 1.0
    found = bootstrap_estimates(values, torch.ones(1, 1).double(), torch.arange(prompts))
    sign_test = scipy.stats.binomtest(prompts, prompts).pvalue
    assert float(found.p_value[1]) == pytest.approx(max(sign_test, 2 / 2001))


def test_a_mean_of_nothing_but_zeros_is_zero_and_not_what_rounding_leaves():
    values = torch.rand(2, 7, 3, generator=torch.Generator().manual_seed(0)).double()
    values[1] = 0.0
    found = bootstrap_estimates(values, torch.full((1, 3), 1 / 3).double(), torch.arange(7))
    assert found.mean[1].tolist() == found.low[1].tolist() == found.high[1].tolist() == [0.0]


def test_gains_are_paired_and_not_those_of_two_models_apart():
    shared = draw(300, seed=1)
    values = torch.stack([shared, shared + 0.05 + 0.01 * draw(300, seed=2)])[..., None]
    found = bootstrap_estimates(values, ONE, torch.arange(300))
    assert width(Interval(0.0, float(found.low[1]), float(found.high[1]))) > 0.15
    assert 0.045 < float(found.gain_low[1]) < float(found.gain_high[1]) < 0.055


def test_equal_models_differ_by_exactly_nothing():
    values = (draw(1, 90, 2, seed=5) / 3).expand(3, 90, 2)
    lines = torch.tensor([[0.3, 0.7], [1.0, -1.0]]).double()
    found = bootstrap_estimates(values, lines, torch.arange(90) // 3)
    for zeros in (found.gain, found.gain_low, found.gain_high):
        assert zeros.tolist() == [[0.0, 0.0]] * 3
    assert found.p_value.tolist() == [[1.0, 1.0]] * 3
    assert found.low[0].tolist() == found.low[2].tolist()


def test_models_see_the_same_draws_whoever_stands_beside_them():
    values, lines, groups = drawn_parts(3, 0.9, models=4)
    together = bootstrap_estimates(values, lines, groups)
    for k in range(4):
        alone = bootstrap_contrasts(values[k], lines, groups)
        assert [each.low for each in alone] == pytest.approx(together.low[k].tolist())
        assert [each.high for each in together.intervals(k)] == pytest.approx(
            [each.high for each in alone]
        )


def test_a_resample_that_leaves_a_part_empty_is_left_out_of_the_lines_with_that_part():
    values = torch.tensor([[1.0, torch.nan], [0.0, 5.0], [2.0, torch.nan]]).double()
    contrasts = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()
    _, drawn = slow_lines(values[None], contrasts, torch.arange(3), seed=0, draws=100)
    assert 10 < np.isnan(drawn[:, 0, 1]).sum() < 50
    common, rare = bootstrap_contrasts(values, contrasts, torch.arange(3), draws=100)
    assert rare == Interval(5.0, 5.0, 5.0)
    assert common == bootstrap_interval(values[:, 0], torch.arange(3), draws=100)


def test_a_line_that_no_resample_holds_has_no_interval():
    rare = 40
    values = torch.full((2, rare, rare), torch.nan).double()
    values[:, range(rare), range(rare)] = 1.0  # each part has one unit; no draw holds all forty
    lines = torch.stack([torch.full((rare,), 1.0 / rare), torch.eye(rare)[0]]).double()
    found = bootstrap_estimates(values, lines, torch.arange(rare), draws=50)
    assert found.mean.tolist() == pytest.approx(np.ones((2, 2)))
    assert found.low.isnan().tolist() == [[True, False]] * 2
    assert found.p_value.isnan().tolist() == [[True, False]] * 2


def test_parts_have_the_same_units_for_every_model():
    values = torch.zeros(2, 3, 1).double()
    values[1, 2] = torch.nan
    with pytest.raises(ValueError, match="units differ between models"):
        bootstrap_estimates(values, ONE, torch.arange(3))


def test_a_part_without_rows_is_refused():
    values = torch.tensor([[1.0, torch.nan], [0.0, torch.nan]]).double()
    with pytest.raises(ValueError, match="`values` has a part without units"):
        bootstrap_contrasts(values, torch.eye(2, dtype=torch.float64), torch.arange(2))


def interval_before_there_were_contrasts(values, groups, *, seed, draws):
    _, inverse, counts = groups.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, inverse, values.double())
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(draws, dtype=torch.float64)
    for k in range(draws):
        drawn = torch.randint(len(counts), (len(counts),), generator=generator)
        means[k] = sums[drawn].sum() / counts[drawn].sum()
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return [float(values.double().mean()), low, high]


@settings(max_examples=10)
@given(st.integers(0, 99), st.integers(1, 40))
def test_an_interval_is_the_contrast_of_one_part_and_what_it_was_before(seed, rows):
    values = draw(rows, seed=seed)
    groups = 3 * torch.randint(9, (rows,), generator=torch.Generator().manual_seed(seed))
    found = bootstrap_interval(values, groups, seed=seed, draws=200)
    whole = torch.ones(1, 1, dtype=torch.float64)
    assert [found] == bootstrap_contrasts(values[:, None], whole, groups, seed=seed, draws=200)
    expected = interval_before_there_were_contrasts(values, groups, seed=seed, draws=200)
    assert [found.mean, found.low, found.high] == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_a_gap_of_a_score_is_less_certain_than_either_side_unless_they_move_together():
    sides = draw(60, 2, seed=1)
    contrasts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]]).double()
    first, second, gap = bootstrap_contrasts(sides, contrasts, torch.arange(60))
    assert gap.mean == pytest.approx(first.mean - second.mean)
    assert width(gap) == pytest.approx(math.hypot(width(first), width(second)), rel=0.2)
    together = sides[:, :1] + 0.1 * sides
    *_, gap = bootstrap_contrasts(together, contrasts, torch.arange(60))
    assert width(gap) < 0.3 * width(first)


def test_an_interval_reads_as_a_figure_with_its_range():
    assert str(Interval(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=30))
def test_rank_correlation_agrees_with_scipy_ties_included(rows):
    first, second = torch.tensor(rows, dtype=torch.float64).T
    if len(first.unique()) == 1 or len(second.unique()) == 1:
        assert rank_correlation(first, second) == 0.0
    else:
        expected = scipy.stats.spearmanr(first, second).statistic
        assert rank_correlation(first, second) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=10)
@given(st.integers(0, 99), st.sampled_from([1, 4]))
def test_the_interval_of_a_correlation_is_that_of_resampling_ranks_row_by_row(seed, groups_of):
    first = draw(24, seed=seed).round(decimals=1)
    second = first + draw(24, seed=seed + 1)
    groups = 3 * (torch.arange(24) % (24 // groups_of))
    found = bootstrap_correlation(first, second, groups, seed=seed, draws=100)
    assert found.mean == pytest.approx(scipy.stats.spearmanr(first, second).statistic)
    names = groups.unique()
    ranks = [scipy.stats.rankdata(side) for side in (first, second)]
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(100):
        picked = names[torch.randint(len(names), (len(names),), generator=generator)]
        drawn = torch.cat([(groups == name).nonzero()[:, 0] for name in picked])
        values.append(np.corrcoef(*(side[drawn] for side in ranks))[0, 1])
    low, high = np.quantile(values, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


def test_a_constant_has_no_correlation_and_any_interval():
    found = bootstrap_correlation(torch.ones(6), torch.arange(6.0), torch.arange(6))
    assert found == Interval(0.0, -1.0, 1.0)


def test_within_prompt_correlation_is_that_of_deviations_from_the_mean_of_the_prompt():
    prompts = torch.tensor([4, 0, 4, 2, 0, 4, 2, 9])
    first, second = draw(8, seed=1), draw(8, seed=2)
    deviations = []
    for prompt in (0, 2, 4):  # prompt 9 has one response
        for row in (prompts == prompt).nonzero()[:, 0]:
            here = prompts == prompt
            deviations.append((first[row] - first[here].mean(), second[row] - second[here].mean()))
    expected = scipy.stats.spearmanr(deviations).statistic
    assert within_prompt_correlation(first, second, prompts) == pytest.approx(expected)


def test_within_prompt_correlation_ignores_offsets_of_prompts():
    prompts = torch.arange(60) // 3
    first = draw(60, seed=1)
    second = first + draw(60, seed=2)
    offset = 100.0 * draw(20, seed=3)[prompts]
    plain = within_prompt_correlation(first, second, prompts)
    assert plain > 0.4
    assert within_prompt_correlation(first + offset, second, prompts) == pytest.approx(plain)
    assert abs(rank_correlation(first + offset, second)) < 0.5 * plain
