import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from armo.report.metrics import (
    Interval,
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
