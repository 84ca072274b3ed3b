"""Objective heads fitted from an embedding store, against scikit-learn on the rated rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from scipy.stats.mstats import winsorize
from sklearn.linear_model import Ridge

from armo.embed.store import Embeddings, EmbeddingStore, EmbeddingTable, Shard
from armo.fit.heads import (
    FittedHeads,
    ObjectiveHeads,
    as_targets,
    conformal_quantiles,
    deal_folds,
    draw_rows,
    fit_heads,
    order_blocks,
)
from armo.fit.ridge import RidgeSums

NAMES = ("helpfulness", "honesty", "verbosity")
ALPHAS = (0.1, 1.0, 10.0, 100.0)
FOLDS = 3


class Problem:
    """Ratings of some rows of a store of small shards, in an order of their own."""

    def __init__(self, folder, *, seed=0, missing=0.3, dim=6, rows=90, prompts=30):
        generator = torch.Generator().manual_seed(seed)
        embeddings = torch.randn(rows, dim, generator=generator)
        self.store = write_store(folder, embeddings)
        self.rows = torch.randperm(rows, generator=generator)[: rows - 10]
        self.groups = self.rows % prompts
        self.x = embeddings[self.rows].double()
        noise = torch.randn(len(self.rows), len(NAMES), generator=generator).double()
        truth = torch.randn(dim, len(NAMES), generator=generator).double()
        self.ratings = self.x @ truth * torch.tensor([1.0, 0.5, 0.0]) + noise
        gone = torch.rand(self.ratings.shape, generator=generator) < missing
        self.ratings[gone] = torch.nan
        self.prompts = prompts

    def fit(self, **changes):
        arguments = {
            "ratings": self.ratings,
            "objectives": NAMES,
            "group_count": self.prompts,
            "folds": FOLDS,
            "alphas": ALPHAS,
        }
        return fit_heads(self.store, self.rows, groups=self.groups, **(arguments | changes))


def write_store(folder, embeddings, *, shard_rows=7):
    parts = embeddings.split(shard_rows)
    shards = [Shard(0, len(part), f"text of shard {k}") for k, part in enumerate(parts)]
    dim = embeddings.shape[1]
    store = EmbeddingStore.create(folder, dim=dim, fingerprint="f", shards=shards)
    for shard, part in enumerate(parts):
        store.write(shard, prompts=_unmarked(part[:0]), responses=_unmarked(part))
    return EmbeddingStore.open(folder).responses


def _unmarked(values):
    nothing = torch.zeros(len(values), dtype=torch.bool)
    return Embeddings(values, truncated=nothing, missing=nothing)


def assert_is_ridge(heads, k, x, y, *, alpha, weights=None, intercept=True):
    weights = None if weights is None else (weights / weights.mean()).numpy()
    expected = Ridge(alpha=alpha, fit_intercept=intercept).fit(x.numpy(), y.numpy(), weights)
    np.testing.assert_allclose(heads.weights[k].numpy(), expected.coef_, rtol=1e-6, atol=1e-9)
    assert float(heads.intercepts[k]) == pytest.approx(expected.intercept_, rel=1e-6, abs=1e-9)


@settings(max_examples=15)
@given(seed=st.integers(0, 9999), missing=st.sampled_from([0.0, 0.3, 0.7]))
def test_each_head_is_the_ridge_regression_on_the_rows_that_rate_it(
    tmp_path_factory, seed, missing
):
    problem = Problem(tmp_path_factory.mktemp("store"), seed=seed, missing=missing)
    fitted = problem.fit()
    assert fitted.heads.objectives == NAMES
    for k, summary in enumerate(fitted.summaries):
        rated = ~problem.ratings[:, k].isnan()
        assert (summary.objective, summary.ratings) == (NAMES[k], int(rated.sum()))
        assert_is_ridge(
            fitted.heads, k, problem.x[rated], problem.ratings[rated, k], alpha=summary.alpha
        )


@pytest.mark.parametrize("weighted", [False, True])
def test_the_penalty_and_errors_are_those_of_a_loop_over_the_folds(tmp_path, weighted):
    problem = Problem(tmp_path)
    every = draw_weights(problem) if weighted else torch.ones(len(problem.rows)).double()
    fitted = problem.fit(sample_weights=every if weighted else None)
    fold_of_row = fitted.fold_of_group[problem.groups]
    for k, summary in enumerate(fitted.summaries):
        rated = ~problem.ratings[:, k].isnan()
        x, y, parts = problem.x[rated], problem.ratings[rated, k], fold_of_row[rated]
        x, y, parts = x.numpy(), y.numpy(), parts.numpy()
        w = (every[rated] / every[rated].mean()).numpy()
        errors, baseline = dict.fromkeys(ALPHAS, 0.0), 0.0
        for fold in range(FOLDS):
            inside = parts == fold
            mean = np.average(y[~inside], weights=w[~inside])
            baseline += w[inside] @ np.square(mean - y[inside])
            for alpha in ALPHAS:
                model = Ridge(alpha=alpha).fit(x[~inside], y[~inside], w[~inside])
                errors[alpha] += w[inside] @ np.square(model.predict(x[inside]) - y[inside])
        assert summary.alpha == min(errors, key=errors.get)
        assert summary.error == pytest.approx(min(errors.values()) / len(y))
        assert summary.explained == pytest.approx(1.0 - min(errors.values()) / baseline)


def draw_weights(problem, *, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(problem.rows), generator=generator).double() * 4.0 + 0.1


@settings(max_examples=10)
@given(seed=st.integers(0, 9999), intercept=st.booleans())
def test_weighted_heads_are_ridge_regressions_with_weights_of_mean_one(
    tmp_path_factory, seed, intercept
):
    problem = Problem(tmp_path_factory.mktemp("store"), seed=seed)
    weights = draw_weights(problem)
    weights[::7] = 0.0
    fitted = problem.fit(sample_weights=weights, intercept=intercept)
    fold_of_row = fitted.fold_of_group[problem.groups]
    for k, summary in enumerate(fitted.summaries):
        rated = ~problem.ratings[:, k].isnan() & (weights > 0)
        x, y, w = problem.x[rated], problem.ratings[rated, k], weights[rated]
        how = {"alpha": summary.alpha, "intercept": intercept}
        assert_is_ridge(fitted.heads, k, x, y, weights=w, **how)
        assert summary.ratings == int(rated.sum())
        for fold, heads in enumerate(fitted.without_fold):
            # Divided by the mean over all rows of the objective, not over those of the fit.
            used = fold_of_row[rated] != fold
            alpha = summary.alpha * float(w.mean() / w[used].mean())
            how = {"alpha": alpha, "intercept": intercept}
            assert_is_ridge(heads, k, x[used], y[used], weights=w[used], **how)


def test_only_the_ratios_of_weights_matter(tmp_path):
    problem = Problem(tmp_path)
    weights = draw_weights(problem)
    one, other = problem.fit(sample_weights=weights), problem.fit(sample_weights=weights * 1000.0)
    torch.testing.assert_close(one.heads.weights, other.heads.weights)
    assert [s.alpha for s in one.summaries] == [s.alpha for s in other.summaries]
    assert not torch.allclose(one.heads.weights, problem.fit().heads.weights, atol=1e-3)
    flat = problem.fit(sample_weights=torch.full_like(weights, 7.0))
    torch.testing.assert_close(flat.heads.weights, problem.fit().heads.weights)


def test_rows_of_weight_zero_are_as_if_they_were_not_there(tmp_path):
    problem = Problem(tmp_path)
    weights = torch.ones(len(problem.rows)).double()
    weights[problem.groups % 4 == 0] = 0.0
    zero = problem.fit(sample_weights=weights)
    kept = weights > 0
    problem.rows, problem.groups = problem.rows[kept], problem.groups[kept]
    gone = problem.fit(ratings=problem.ratings[kept])
    assert torch.equal(zero.heads.weights, gone.heads.weights)
    assert torch.equal(zero.fold_of_group, gone.fold_of_group)
    assert zero.summaries == gone.summaries
    assert torch.equal(zero.uncertainty.quantiles, gone.uncertainty.quantiles)


@pytest.mark.parametrize("wrong", [-0.1, torch.nan, torch.inf])
def test_sample_weights_that_are_negative_or_not_finite_are_refused(tmp_path, wrong):
    problem = Problem(tmp_path)
    weights = torch.ones(len(problem.rows))
    weights[5] = wrong
    with pytest.raises(ValueError, match=r"`sample_weights` must be finite .* in row 5"):
        problem.fit(sample_weights=weights)


@given(
    ratings=st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.55, 1.0]), min_size=1, max_size=30),
    gaps=st.integers(0, 3),
)
def test_ranks_are_scipys_mid_ranks_between_zero_and_one(ratings, gaps):
    column = torch.tensor(ratings + [torch.nan] * gaps, dtype=torch.float64)
    targets = as_targets(column[:, None], targets="ranks")[:, 0]
    expected = (rankdata(ratings, method="average") - 0.5) / len(ratings)
    np.testing.assert_allclose(targets[: len(ratings)].numpy(), expected)
    assert targets[len(ratings) :].isnan().all()
    assert ((expected > 0) & (expected < 1)).all()


@given(
    ratings=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=30),
    clip=st.sampled_from([0.0, 0.05, 0.2, 0.49]),
)
def test_clipping_moves_ratings_to_numpys_quantiles(ratings, clip):
    column = torch.tensor([*ratings, torch.nan], dtype=torch.float64)[:, None]
    targets = as_targets(column, targets="ratings", clip=clip)[:-1, 0]
    expected = np.clip(ratings, np.quantile(ratings, clip), np.quantile(ratings, 1.0 - clip))
    np.testing.assert_array_equal(targets.numpy(), expected)


def test_clipping_is_scipys_winsorising_where_the_quantiles_are_ratings():
    ratings = torch.randn(101, generator=torch.Generator().manual_seed(0)).double()
    clipped = as_targets(ratings[:, None], targets="ratings", clip=0.1)[:, 0]
    expected = winsorize(ratings.numpy(), limits=(0.1, 0.1))
    np.testing.assert_allclose(clipped.numpy(), np.asarray(expected), rtol=1e-12)


def test_heads_are_fitted_to_the_targets_asked_for(tmp_path):
    problem = Problem(tmp_path)
    fitted = problem.fit(targets="ranks", clip=0.1)
    for k, summary in enumerate(fitted.summaries):
        rated = ~problem.ratings[:, k].isnan()
        y = problem.ratings[rated, k].numpy()
        y = np.clip(y, *np.quantile(y, [0.1, 0.9]))
        ranks = torch.from_numpy((rankdata(y) - 0.5) / len(y))
        assert_is_ridge(fitted.heads, k, problem.x[rated], ranks, alpha=summary.alpha)


def test_ranks_do_not_change_when_ratings_are_stretched(tmp_path):
    problem = Problem(tmp_path)
    one = problem.fit(targets="ranks")
    other = problem.fit(targets="ranks", ratings=problem.ratings.exp())
    assert torch.equal(one.heads.weights, other.heads.weights)
    plain, stretched = problem.fit(), problem.fit(ratings=problem.ratings.exp())
    assert not torch.allclose(plain.heads.weights, stretched.heads.weights)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": "logits"}, "`targets` must be one of .*ranks"),
        ({"clip": 0.5}, "`clip` must be .* less than a half"),
        ({"clip": -0.1}, "`clip` must be at least 0"),
        ({"miscoverage": 0.0}, "`miscoverage` must be between 0 and 1"),
        ({"miscoverage": 1.0}, "`miscoverage` must be between 0 and 1"),
        ({"calibration_rows": 0}, "`calibration_rows` must be at least 1"),
    ],
)
def test_a_setting_out_of_range_is_named(tmp_path, no_type_checks, changes, words):
    with pytest.raises(ValueError, match=words):
        Problem(tmp_path).fit(**changes)


def test_heads_without_a_fold_never_saw_its_ratings(tmp_path):
    problem = Problem(tmp_path)
    fitted = problem.fit()
    fold_of_row = fitted.fold_of_group[problem.groups]
    assert len(fitted.without_fold) == FOLDS
    for fold, heads in enumerate(fitted.without_fold):
        for k, summary in enumerate(fitted.summaries):
            used = ~problem.ratings[:, k].isnan() & (fold_of_row != fold)
            assert_is_ridge(
                heads, k, problem.x[used], problem.ratings[used, k], alpha=summary.alpha
            )


def test_changing_a_prompts_ratings_leaves_the_heads_without_its_fold_alone(tmp_path):
    problem = Problem(tmp_path)
    before = problem.fit(alphas=[1.0])
    prompt = int(problem.groups[0])
    changed = torch.where((problem.groups == prompt)[:, None], problem.ratings + 5, problem.ratings)
    after = problem.fit(ratings=changed, alphas=[1.0])
    own = int(before.fold_of_group[prompt])
    for fold in range(FOLDS):
        same = torch.allclose(
            before.without_fold[fold].weights, after.without_fold[fold].weights, atol=1e-9
        )
        assert same == (fold == own)


def test_objectives_are_independent_of_one_another(tmp_path):
    problem = Problem(tmp_path)
    together = problem.fit()
    for k, name in enumerate(NAMES):
        alone = problem.fit(ratings=problem.ratings[:, [k]], objectives=[name])
        torch.testing.assert_close(alone.heads.weights[0], together.heads.weights[k])
        torch.testing.assert_close(alone.heads.intercepts[0], together.heads.intercepts[k])
        for one, all_of_them in zip(alone.without_fold, together.without_fold, strict=True):
            torch.testing.assert_close(one.weights[0], all_of_them.weights[k])
        assert alone.summaries[0].alpha == together.summaries[k].alpha


def test_the_size_of_a_shard_changes_nothing(tmp_path):
    problem = Problem(tmp_path / "small")
    whole = Problem(tmp_path / "again")
    embeddings = problem.store.read(torch.arange(problem.store.rows))
    whole.store = write_store(tmp_path / "whole", embeddings, shard_rows=1000)
    torch.testing.assert_close(problem.fit().heads.weights, whole.fit().heads.weights)


def test_rewards_are_the_affine_predictions_in_float64():
    generator = torch.Generator().manual_seed(0)
    heads = ObjectiveHeads(
        ("a", "b"),
        torch.randn(2, 4, generator=generator, dtype=torch.float64),
        torch.randn(2, generator=generator, dtype=torch.float64),
    )
    embeddings = torch.randn(3, 4, generator=generator).bfloat16()
    rewards = heads.rewards(embeddings)
    assert rewards.dtype == torch.float64
    for i in range(3):
        for k in range(2):
            slow = sum(embeddings[i, d].double() * heads.weights[k, d] for d in range(4))
            assert float(rewards[i, k]) == pytest.approx(float(slow + heads.intercepts[k]))


def test_save_then_load_is_the_identity(tmp_path):
    problem = Problem(tmp_path / "store")
    fitted = problem.fit()
    fitted.save(tmp_path / "heads")
    loaded = FittedHeads.load(tmp_path / "heads")
    assert loaded.summaries == fitted.summaries
    assert torch.equal(loaded.fold_of_group, fitted.fold_of_group)
    saved, read = (fitted.heads, *fitted.without_fold), (loaded.heads, *loaded.without_fold)
    for one, other in zip(saved, read, strict=True):
        assert one.objectives == other.objectives
        assert torch.equal(one.weights, other.weights)
        assert torch.equal(one.intercepts, other.intercepts)


def test_groups_without_ratings_are_dealt_out_only_when_named(tmp_path):
    problem = Problem(tmp_path)
    others = torch.tensor([30, 31, 31, 33])
    fitted = problem.fit(group_count=35, other_groups=others)
    dealt = fitted.fold_of_group >= 0
    assert dealt[problem.groups].all()
    assert dealt[30:].tolist() == [True, True, False, True, False]


def test_an_objective_without_ratings_is_named(tmp_path):
    problem = Problem(tmp_path)
    problem.ratings[:, 1] = torch.nan
    with pytest.raises(ValueError, match="honesty: 0 ratings"):
        problem.fit()


def test_an_objective_rated_on_prompts_of_one_fold_only_is_named(tmp_path):
    problem = Problem(tmp_path)
    fold_of_row = problem.fit().fold_of_group[problem.groups]
    problem.ratings[fold_of_row != 0, 2] = torch.nan
    with pytest.raises(ValueError, match=r"verbosity: .* one fold"):
        problem.fit()


@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=40),
    folds=st.integers(2, 6),
    order=st.randoms(use_true_random=False),
)
def test_folds_are_balanced_and_keep_prompts_whole(sizes, folds, order):
    rows = [group for group, size in enumerate(sizes) for _ in range(size)]
    order.shuffle(rows)
    groups = torch.tensor(rows, dtype=torch.int64)
    used = sum(size > 0 for size in sizes)
    if used < folds:
        with pytest.raises(ValueError, match=f"{used} distinct prompts cannot fill {folds} folds"):
            deal_folds(groups, folds=folds, group_count=len(sizes))
        return
    fold_of_group = deal_folds(groups, folds=folds, group_count=len(sizes))
    assert [fold >= 0 for fold in fold_of_group.tolist()] == [size > 0 for size in sizes]
    counts = torch.bincount(fold_of_group[groups], minlength=folds)
    assert counts.min() > 0
    assert counts.max() - counts.min() <= max(sizes)


@pytest.mark.parametrize("folds", [2, 3, 5])
@pytest.mark.parametrize("rows", [1, 2])
def test_sources_that_take_turns_do_not_land_in_one_fold_each(folds, rows):
    prompts = torch.arange(40 * folds)
    source = prompts % folds
    fold_of_group = deal_folds(
        prompts.repeat_interleave(rows), folds=folds, group_count=len(prompts)
    )
    shares = torch.zeros(folds, folds).index_put_(
        (source, fold_of_group), torch.full((len(prompts),), 1 / 40), accumulate=True
    )
    assert ((shares - 1 / folds).abs() < 0.25).all()
    other = deal_folds(prompts, folds=folds, group_count=len(prompts), seed=1)
    assert not torch.equal(fold_of_group, other)


# --- rows that objectives share -----------------------------------------------------------------


@given(
    rows=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=20),
)
def test_blocks_hold_each_objective_once_and_share_only_where_that_saves_rows(rows):
    rated = torch.tensor(rows)
    last, seen = None, []
    for columns, kept in order_blocks(rated):
        for column in columns:
            assert torch.equal(rated[:, column], rated[:, columns[0]])
        here = rated[:, columns[0]]
        if kept:
            assert int((here ^ last).sum()) < int(here.sum())
        last = here
        seen += columns
    assert sorted(seen) == [0, 1, 2, 3]


def test_objectives_of_disjoint_rows_share_nothing_and_nested_ones_do():
    first = torch.arange(10) < 4
    disjoint = torch.stack([first, ~first], dim=1)
    assert [kept for _, kept in order_blocks(disjoint)] == [False, False]
    nested = torch.stack([torch.arange(10) < 8, torch.ones(10, dtype=torch.bool)], dim=1)
    assert list(order_blocks(nested)) == [([1], False), ([0], True)]


def test_the_objective_that_saves_most_rows_comes_next_and_else_the_largest():
    row = torch.arange(20)
    rated = torch.stack([(row >= 10) & (row < 19), row < 10, row < 6, row < 8], dim=1)
    assert list(order_blocks(rated)) == [([1], False), ([3], True), ([2], True), ([0], False)]


def count_rows(monkeypatch, name):
    counted = []
    method = getattr(RidgeSums, name)

    def counting(self, embeddings, *rest):
        counted.append(len(embeddings))
        return method(self, embeddings, *rest)

    monkeypatch.setattr(RidgeSums, name, counting)
    return counted


def test_the_products_of_rows_that_objectives_share_are_taken_once(tmp_path, monkeypatch):
    problem = Problem(tmp_path, missing=0.0)
    problem.ratings[::10, 0] = torch.nan
    alone = [
        problem.fit(ratings=problem.ratings[:, [k]], objectives=[name])
        for k, name in enumerate(NAMES)
    ]
    entered, left = (count_rows(monkeypatch, name) for name in ("enter", "leave"))
    together = problem.fit()
    assert (sum(entered), sum(left)) == (80, 8)
    for k, one in enumerate(alone):
        torch.testing.assert_close(together.heads.weights[[k]], one.heads.weights)
        assert together.summaries[k].error == pytest.approx(one.summaries[0].error)
        assert together.summaries[k].sigma == pytest.approx(one.summaries[0].sigma)


def test_only_rows_that_are_rated_are_read(tmp_path, monkeypatch):
    problem = Problem(tmp_path, missing=0.0)
    source = torch.arange(len(problem.rows)) % 2
    problem.ratings[source == 0, 0] = torch.nan
    problem.ratings[source == 1, 1:] = torch.nan
    read = []
    batches = EmbeddingTable.batches

    def reading(self, rows):
        read.append(sorted(rows.tolist()))
        return batches(self, rows)

    monkeypatch.setattr(EmbeddingTable, "batches", reading)
    problem.fit()
    halves = [sorted(problem.rows[source == k].tolist()) for k in (0, 1)]
    assert sorted(read) == sorted(2 * halves), "once for the sums, once for the intervals"


@pytest.mark.parametrize("chunk", [1, 5, 50])
def test_how_many_rows_are_taken_at_a_time_changes_nothing(tmp_path, monkeypatch, chunk):
    problem = Problem(tmp_path)
    weights = draw_weights(problem)
    expected = problem.fit(sample_weights=weights)
    monkeypatch.setattr("armo.fit.heads.CHUNK_ROWS", chunk)
    fitted = problem.fit(sample_weights=weights)
    torch.testing.assert_close(fitted.heads.weights, expected.heads.weights)
    torch.testing.assert_close(fitted.uncertainty.quantiles, expected.uncertainty.quantiles)


# --- uncertainty --------------------------------------------------------------------------------


def design(x, *, intercept):
    return torch.cat([torch.ones(len(x), int(intercept)).double(), x], dim=1)


def slow_posterior(x, y, w, new, *, alpha, intercept):
    """Predictive deviations, sigma included, from the inverse of the whole matrix."""
    a, b = design(x, intercept=intercept), design(new, intercept=intercept)
    penalty = torch.eye(a.shape[1]).double() * alpha
    if intercept:
        penalty[0, 0] = 0.0
    inverse = torch.linalg.inv(a.T @ (w[:, None] * a) + penalty)
    residuals = y - a @ (inverse @ (a.T @ (w * y)))
    degrees = torch.trace(a @ inverse @ (a.T * w))
    variance = (w * residuals.square()).sum() / (len(y) - degrees)
    return (variance * (1.0 + ((b @ inverse) * b).sum(1))).sqrt(), variance.sqrt()


@settings(max_examples=15)
@given(
    seed=st.integers(0, 9999),
    missing=st.sampled_from([0.0, 0.3]),
    intercept=st.booleans(),
    weighted=st.booleans(),
)
def test_deviations_are_those_of_the_posterior_written_out(
    tmp_path_factory, seed, missing, intercept, weighted
):
    problem = Problem(tmp_path_factory.mktemp("store"), seed=seed, missing=missing)
    weights = draw_weights(problem) if weighted else torch.ones(len(problem.rows)).double()
    fitted = problem.fit(intercept=intercept, sample_weights=weights if weighted else None)
    new = 3.0 * torch.randn(11, 6, generator=torch.Generator().manual_seed(seed)).double()
    deviations = fitted.uncertainty.deviations(new)
    for k, summary in enumerate(fitted.summaries):
        rated = ~problem.ratings[:, k].isnan()
        w = weights[rated] / weights[rated].mean()
        expected, sigma = slow_posterior(
            problem.x[rated],
            problem.ratings[rated, k],
            w,
            new,
            alpha=summary.alpha,
            intercept=intercept,
        )
        torch.testing.assert_close(deviations[:, k], expected, rtol=1e-5, atol=0.0)
        assert summary.sigma == pytest.approx(float(sigma), rel=1e-6)


def test_deviations_grow_away_from_the_training_embeddings(tmp_path):
    problem = Problem(tmp_path)
    uncertainty = problem.fit().uncertainty
    direction = torch.ones(1, 6).double()
    steps = torch.cat([uncertainty.centres[:1] + k * direction for k in range(5)])
    assert (uncertainty.deviations(steps)[:, 0].diff() > 0).all()


def test_the_estimate_of_sigma_is_unbiased_under_its_own_model(tmp_path):
    found = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(60, 20, generator=generator)
        truth = 0.3 * torch.randn(20, 1, generator=generator) / 10.0**0.5
        y = x @ truth + 0.3 * torch.randn(60, 1, generator=generator)
        store = write_store(tmp_path / f"{seed}", x, shard_rows=60)
        fitted = fit_heads(
            *(store, torch.arange(60), y, torch.arange(60)),
            objectives=["a"],
            group_count=60,
            alphas=[10.0],
        )
        found.append(fitted.summaries[0].sigma ** 2)
    assert np.mean(found) == pytest.approx(0.09, rel=0.08)


@given(st.integers(1, 60), st.sampled_from([0.05, 0.1, 0.3]))
def test_the_conformal_quantile_is_the_one_of_the_paper(count, miscoverage):
    scores = torch.rand(count, 2, generator=torch.Generator().manual_seed(count)).double()
    quantiles = conformal_quantiles(scores, miscoverage)
    for column, quantile in zip(scores.T.tolist(), quantiles.tolist(), strict=True):
        # The least that leaves so few of n + 1 above it, were the new one above all others.
        allowed = miscoverage * (count + 1) + 1e-9
        enough = [s for s in column if 1 + sum(other > s for other in column) <= allowed]
        assert quantile == (min(enough) if enough else float("inf"))


def test_half_an_interval_is_the_quantile_of_residuals_out_of_fold_in_their_deviations(tmp_path):
    problem = Problem(tmp_path)
    fitted = problem.fit()
    fold_of_row = fitted.fold_of_group[problem.groups]
    new = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    low, high = fitted.uncertainty.interval(new)
    torch.testing.assert_close((low + high) / 2, fitted.heads.rewards(new))
    for k, summary in enumerate(fitted.summaries):
        rated = ~problem.ratings[:, k].isnan()
        x, y, parts = problem.x[rated], problem.ratings[rated, k], fold_of_row[rated]
        scores = torch.empty(len(y)).double()
        for fold, heads in enumerate(fitted.without_fold):
            used, here = parts != fold, parts == fold
            ones = torch.ones(int(used.sum())).double()
            deviations, sigma = slow_posterior(
                x[used], y[used], ones, x[here], alpha=summary.alpha, intercept=True
            )
            deviations = deviations / sigma * summary.sigma
            scores[here] = (heads.rewards(x[here])[:, k] - y[here]).abs() / deviations
        rank = int(np.ceil((len(y) + 1) * 0.9))
        half = scores.sort().values[rank - 1] * fitted.uncertainty.deviations(new)[:, k]
        torch.testing.assert_close((high - low)[:, k] / 2, half, rtol=1e-5, atol=0.0)


def noisy_ratings(x, groups, generator, *, truth):
    """Ratings whose noise grows with one feature, and is shared in part within a prompt."""
    own = torch.randn(len(x), generator=generator).double()
    shared = torch.randn(int(groups.max()) + 1, generator=generator).double()[groups]
    spread = 0.1 * (1.0 + x[:, 0].abs())
    return 0.5 + x @ truth + spread * (own + shared) / 2.0**0.5


@pytest.mark.parametrize("responses", [1, 4])
@pytest.mark.parametrize("rows", [120, 600])
def test_intervals_cover_nine_in_ten_new_ratings(tmp_path, responses, rows):
    covered = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        count = rows + 2000
        x = torch.randn(count, 30, generator=generator)
        truth = torch.randn(30, generator=generator).double() / 30.0
        groups = torch.arange(count) // responses
        y = noisy_ratings(x.double(), groups, generator, truth=truth)
        store = write_store(tmp_path / f"{seed}", x[:rows], shard_rows=rows)
        fitted = fit_heads(
            *(store, torch.arange(rows), y[:rows, None], groups[:rows]),
            objectives=["a"],
            group_count=rows,
        )
        low, high = fitted.uncertainty.interval(x[rows:])
        covered.append(((low[:, 0] <= y[rows:]) & (y[rows:] <= high[:, 0])).double().mean())
    assert 0.88 < np.mean(covered) < 0.92


def test_intervals_are_for_the_ratings_as_they_are_without_clipping(tmp_path):
    problem = Problem(tmp_path, missing=0.0)
    fitted = problem.fit(clip=0.3)
    low, high = fitted.uncertainty.interval(problem.x)
    inside = (low <= problem.ratings) & (problem.ratings <= high)
    assert (inside.double().mean(0) > 0.85).all()


def test_too_few_ratings_give_an_interval_without_ends(tmp_path):
    problem = Problem(tmp_path)
    problem.ratings[5:, 1] = torch.nan
    low, high = problem.fit().uncertainty.interval(problem.x)
    assert low[:, 1].isneginf().all()
    assert high[:, 1].isposinf().all()
    assert low[:, [0, 2]].isfinite().all()


def test_rows_for_the_intervals_are_drawn_by_the_seed(tmp_path, monkeypatch):
    chosen = torch.arange(30) % 3 > 0
    drawn = draw_rows(chosen, count=7, seed=1)
    assert len(drawn.unique()) == 7
    assert chosen[drawn].all()
    assert torch.equal(drawn, draw_rows(chosen, count=7, seed=1))
    assert not torch.equal(drawn, draw_rows(chosen, count=7, seed=2))
    assert torch.equal(draw_rows(chosen, count=20, seed=1), chosen.nonzero()[:, 0])
    problem = Problem(tmp_path)
    # The same folds for both, since they depend on the seed as well.
    folds = deal_folds(problem.groups, folds=FOLDS, group_count=problem.prompts)
    monkeypatch.setattr("armo.fit.heads.deal_folds", lambda groups, **how: folds)
    one, other = problem.fit(calibration_rows=20), problem.fit(calibration_rows=20, seed=1)
    assert torch.equal(one.heads.weights, other.heads.weights)
    assert not torch.equal(one.uncertainty.quantiles, other.uncertainty.quantiles)


def test_a_perfect_fit_has_deviations_all_the_same(tmp_path):
    problem = Problem(tmp_path, missing=0.0)
    fitted = problem.fit(ratings=torch.full_like(problem.ratings, 0.5))
    deviations = fitted.uncertainty.deviations(problem.x)
    assert (deviations > 0).all()
    low, high = fitted.uncertainty.interval(problem.x)
    torch.testing.assert_close(low, torch.full_like(low, 0.5))
    torch.testing.assert_close(high, torch.full_like(high, 0.5))


def test_uncertainty_is_saved_with_the_heads(tmp_path):
    problem = Problem(tmp_path / "store")
    fitted = problem.fit(miscoverage=0.2)
    fitted.save(tmp_path / "heads")
    loaded = FittedHeads.load(tmp_path / "heads")
    new = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    for one, other in zip(
        fitted.uncertainty.interval(new), loaded.uncertainty.interval(new), strict=True
    ):
        assert torch.equal(one, other)
    assert loaded.uncertainty.miscoverage == 0.2
    assert loaded.uncertainty.heads is loaded.heads


def test_heads_without_uncertainty_are_saved_and_loaded_without(tmp_path):
    problem = Problem(tmp_path / "store")
    fitted = replace(problem.fit(), uncertainty=None)
    fitted.save(tmp_path / "heads")
    assert FittedHeads.load(tmp_path / "heads").uncertainty is None
