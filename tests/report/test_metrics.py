import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armo.report.metrics import (
    Interval,
    bootstrap_contrasts,
    bootstrap_correlation,
    bootstrap_interval,
    pairwise_accuracy,
    rank_correlation,
    within_prompt_correlation,
)


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


def slow_contrasts(values, contrasts, groups, *, seed, draws):
    """Means of the parts of whole prompts drawn with replacement, row by row."""
    names = sorted(set(groups.tolist()))
    rows_of = [[row for row in range(len(groups)) if int(groups[row]) == name] for name in names]
    generator = torch.Generator().manual_seed(seed)

    def combine(rows):
        means = []
        for part in values.T.tolist():
            there = [part[row] for row in rows if not math.isnan(part[row])]
            if not there:
                return None
            means.append(sum(there) / len(there))
        return [sum(c * m for c, m in zip(row, means, strict=True)) for row in contrasts.tolist()]

    drawn = []
    for _ in range(draws):
        picked = torch.randint(len(names), (len(names),), generator=generator).tolist()
        combined = combine([row for k in picked for row in rows_of[k]])
        if combined is not None:
            drawn.append(combined)
    low, high = np.quantile(np.array(drawn), [0.025, 0.975], axis=0)
    return combine(range(len(groups))), low.tolist(), high.tolist(), len(drawn)


@settings(max_examples=10)
@given(seed=st.integers(0, 99), share=st.sampled_from([0.1, 0.4, 0.9]))
def test_contrasts_are_those_of_resampling_whole_prompts_row_by_row(seed, share):
    generator = torch.Generator().manual_seed(seed)
    groups = 5 * torch.randint(8, (30,), generator=generator)
    values = draw(30, 3, seed=seed + 1)
    inside = torch.rand(30, 3, generator=generator) < share
    inside[seed % 30] = True
    values = values.where(inside, torch.nan)
    contrasts = torch.tensor([[1.0, 0.0, 0.0], [1.0, -1.0, 0.0], [0.5, 0.25, 0.25]]).double()
    found = bootstrap_contrasts(values, contrasts, groups, seed=seed, draws=100)
    means, low, high, used = slow_contrasts(values, contrasts, groups, seed=seed, draws=100)
    assert [each.mean for each in found] == pytest.approx(means)
    assert [each.low for each in found] == pytest.approx(low)
    assert [each.high for each in found] == pytest.approx(high)
    assert share == 0.1 or used > 90


def test_a_resample_that_leaves_a_part_empty_is_left_out():
    values = torch.tensor([[1.0, torch.nan], [0.0, 5.0], [2.0, torch.nan]]).double()
    contrasts = torch.eye(2, dtype=torch.float64)
    *_, used = slow_contrasts(values, contrasts, torch.arange(3), seed=0, draws=100)
    assert 50 < used < 90
    _, rare = bootstrap_contrasts(values, contrasts, torch.arange(3), draws=100)
    assert rare == Interval(5.0, 5.0, 5.0)


def test_a_part_without_rows_is_refused():
    values = torch.tensor([[1.0, torch.nan], [0.0, torch.nan]]).double()
    with pytest.raises(ValueError, match="`values` has a part without rows"):
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
