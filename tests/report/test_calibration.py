import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve

from armo.report.calibration import calibration_error
from armo.report.metrics import resampled_counts


def simulate(pairs, *, slope=1.0, per_prompt=1, seed=0):
    """Probabilities, and what happens where the true log-odds are `slope` times theirs."""
    generator = torch.Generator().manual_seed(seed)
    odds = 2.0 * torch.randn(pairs, generator=generator, dtype=torch.float64)
    drawn = torch.rand(pairs, generator=generator, dtype=torch.float64)
    outcomes = (drawn < torch.sigmoid(slope * odds)).double()
    return torch.sigmoid(odds), outcomes, torch.arange(pairs) // per_prompt


def slow_error(probabilities, outcomes, *, bins):
    """One pair after the other; edges are NumPy's percentiles."""
    folded = []
    for p, y in zip(probabilities.tolist(), outcomes.tolist(), strict=True):
        folded.append((p, y) if p > 0.5 else (1.0 - p, 1.0 - y) if p < 0.5 else (p, 0.5))
    edges = np.percentile([p for p, _ in folded], np.linspace(0.0, 100.0, bins + 1))
    parts = [[] for _ in range(bins)]
    for p, y in folded:
        parts[sum(edge < p for edge in edges[1:-1])].append((p, y))
    curve = [(*np.mean(part, axis=0), len(part)) for part in parts if part]
    return sum(abs(p - y) * n for p, y, n in curve) / len(folded), curve


values = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.6, 0.9, 1.0]), min_size=1, max_size=40)


@given(probabilities=values, bins=st.integers(1, 8), data=st.data())
def test_the_error_is_that_of_a_slow_loop(probabilities, bins, data):
    count = len(probabilities)
    share = st.sampled_from([0.0, 0.3, 0.5, 1.0])
    outcomes = torch.tensor(data.draw(st.lists(share, min_size=count, max_size=count)))
    p = torch.tensor(probabilities).double()
    found = calibration_error(p, outcomes, torch.arange(count), bins=bins, draws=20)
    error, curve = slow_error(p, outcomes.double(), bins=bins)
    assert found.error.mean == pytest.approx(error, abs=1e-9)
    rows = [x for b in found.bins for x in (b.predicted, b.observed, b.count)]
    assert rows == pytest.approx([x for row in curve for x in row], abs=1e-9)


@pytest.mark.parametrize("bins", [1, 5, 10])
def test_the_curve_is_that_of_scikit_learn(bins):
    probabilities, outcomes, prompts = simulate(997, slope=0.7)
    found = calibration_error(probabilities, outcomes, prompts, bins=bins, draws=1)
    first = probabilities > 0.5
    observed, predicted = calibration_curve(
        torch.where(first, outcomes, 1.0 - outcomes),
        torch.where(first, probabilities, 1.0 - probabilities),
        n_bins=bins,
        strategy="quantile",
    )
    assert [b.observed for b in found.bins] == pytest.approx(observed.tolist())
    assert [b.predicted for b in found.bins] == pytest.approx(predicted.tolist())


@given(seed=st.integers(0, 99))
def test_which_response_is_the_first_does_not_matter(seed):
    probabilities, outcomes, prompts = simulate(60, per_prompt=3, seed=seed)
    probabilities[:5] = 0.5
    turned = torch.rand(60, generator=torch.Generator().manual_seed(seed)) < 0.5
    found = calibration_error(probabilities, outcomes, prompts, draws=50)
    again = calibration_error(
        torch.where(turned, 1.0 - probabilities, probabilities),
        torch.where(turned, 1.0 - outcomes, outcomes),
        prompts,
        draws=50,
    )
    assert again.error.mean == pytest.approx(found.error.mean)
    assert again.null.high == pytest.approx(found.null.high)
    assert [b.count for b in again.bins] == [b.count for b in found.bins]


@pytest.mark.parametrize(("pairs", "bins"), [(455, 5), (455, 10), (3000, 5)])
def test_null_is_what_outcomes_drawn_from_the_probabilities_show(pairs, bins):
    probabilities, outcomes, prompts = simulate(pairs)
    found = calibration_error(probabilities, outcomes, prompts, bins=bins)
    generator = torch.Generator().manual_seed(1)
    drawn = []
    for _ in range(400):
        outcomes = (torch.rand(pairs, generator=generator) < probabilities).double()
        drawn.append(slow_numpy(probabilities, outcomes, bins=bins))
    assert found.null.mean == pytest.approx(np.mean(drawn), rel=0.12)
    assert found.null.high == pytest.approx(np.quantile(drawn, 0.975), rel=0.12)
    assert found.null.low <= found.error.mean <= found.null.high


def slow_numpy(probabilities, outcomes, *, bins):
    gaps = torch.where(probabilities > 0.5, 1.0, -1.0) * (probabilities - outcomes)
    order = torch.maximum(probabilities, 1.0 - probabilities).argsort()
    return sum(abs(float(part.sum())) for part in gaps[order].tensor_split(bins)) / len(gaps)


def test_a_calibrated_model_is_as_far_off_as_null_says_and_its_interval_begins_at_zero():
    errors, nulls, lows, highs = [], [], [], []
    for seed in range(120):
        found = calibration_error(*simulate(400, seed=seed), draws=200)
        errors.append(found.error.mean)
        nulls.append(found.null.mean)
        lows.append(found.error.low)
        highs.append(found.error.high)
    assert np.mean(errors) == pytest.approx(np.mean(nulls), rel=0.1)
    assert np.mean(errors) > 0.02  # of a model without any error
    assert np.mean(np.array(lows) == 0.0) > 0.9
    assert np.mean(highs) < 0.07


@pytest.mark.parametrize(("slope", "pairs"), [(1.5, 455), (0.7, 455), (1.2, 2000)])
def test_the_interval_holds_the_error_of_many_pairs_about_as_often_as_it_says(slope, pairs):
    probabilities, _, _ = simulate(100_000, seed=999)
    odds = torch.logit(probabilities)
    true = float((torch.sigmoid(slope * odds) - probabilities).abs().mean())
    held = 0
    for seed in range(100):
        interval = calibration_error(*simulate(pairs, slope=slope, seed=seed), draws=200).error
        held += interval.low <= true <= interval.high
    assert held >= 85


def test_many_pairs_show_an_error_that_few_cannot():
    few, many = (
        calibration_error(*simulate(pairs, slope=1.2), draws=500) for pairs in (200, 20_000)
    )
    assert few.error.low == 0.0
    assert many.error.low > 0.02
    assert many.null.mean < 0.2 * few.null.mean


def test_copies_of_a_pair_in_one_prompt_add_no_certainty():
    probabilities, outcomes, prompts = simulate(300)
    once = calibration_error(probabilities, outcomes, prompts)
    nine = [values.repeat_interleave(9) for values in (probabilities, outcomes, prompts)]
    copied, alone = calibration_error(*nine), calibration_error(*nine[:2], torch.arange(2700))
    assert copied.error.mean == pytest.approx(once.error.mean, abs=2e-3)
    assert copied.null.mean == pytest.approx(once.null.mean, rel=0.05)
    assert alone.null.mean < 0.5 * once.null.mean


def test_the_same_seed_gives_the_same_intervals_and_ties_share_a_bin():
    given = simulate(50)
    assert calibration_error(*given, seed=3) == calibration_error(*given, seed=3)
    assert calibration_error(*given, seed=3).null != calibration_error(*given, seed=4).null
    half = torch.full((6,), 0.5)
    found = calibration_error(half, torch.ones(6), torch.arange(6), bins=3)
    assert [(b.predicted, b.observed, b.count) for b in found.bins] == [(0.5, 0.5, 6)]
    assert (found.error.mean, found.error.high, found.null.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("probabilities", "outcomes", "how", "words"),
    [
        ([], [], {}, "`probabilities` is empty"),
        ([1.2], [1.0], {}, "`probabilities` must be from 0 to 1"),
        ([math.nan], [1.0], {}, "`probabilities` must be from 0 to 1"),
        ([0.5], [-1.0], {}, "`outcomes` must be from 0 to 1"),
        ([0.5], [1.0], {"bins": 0}, "`bins` must be at least 1, got 0"),
    ],
)
def test_what_is_no_probability_is_refused(probabilities, outcomes, how, words):
    with pytest.raises(ValueError, match=words):
        calibration_error(
            torch.tensor(probabilities),
            torch.tensor(outcomes),
            torch.arange(len(probabilities)),
            **how,
        )


def test_intervals_are_those_of_a_slow_loop_over_prompts_of_unequal_sizes():
    probabilities, outcomes, _ = simulate(120, slope=0.0, seed=3)
    prompts = torch.repeat_interleave(torch.arange(15), torch.arange(1, 16))  # 120 pairs
    found = calibration_error(probabilities, outcomes, prompts, bins=3, seed=5, draws=300)
    folded = torch.maximum(probabilities, 1.0 - probabilities)
    observed = torch.where(probabilities > 0.5, outcomes, 1.0 - outcomes)
    edges = np.percentile(folded.numpy(), [100 / 3, 200 / 3])
    bin_of = np.searchsorted(edges, folded.numpy())
    off = (folded - observed).numpy()
    gap = np.array([off[bin_of == b].mean() for b in range(3)])
    errors, nulls = [], []
    for counts in torch.cat(list(resampled_counts(15, seed=5, draws=300))).numpy():
        often = counts[prompts.numpy()]
        sums = [(often * off)[bin_of == b].sum() for b in range(3)]
        drawn = [often[bin_of == b].sum() for b in range(3)]
        errors.append(np.abs(sums).sum() / often.sum())
        nulls.append(np.abs(np.array(sums) - gap * drawn).sum() / often.sum())
    low, high = found.error.mean + np.percentile(errors, [2.5, 97.5]) - np.mean(errors)
    assert found.error.mean > found.null.high  # so that the low end is the resamples' own
    assert (found.error.low, found.error.high) == pytest.approx((low, high))
    null = (found.null.mean, found.null.low, found.null.high)
    assert null == pytest.approx((np.mean(nulls), *np.percentile(nulls, [2.5, 97.5])))
