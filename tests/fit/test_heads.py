"""Objective heads fitted from an embedding store, against scikit-learn on the rated rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from armo.embed.store import Embeddings, EmbeddingStore, Shard
from armo.fit.heads import FittedHeads, ObjectiveHeads, deal_folds, fit_heads

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


def assert_is_ridge(heads, k, x, y, *, alpha):
    expected = Ridge(alpha=alpha).fit(x.numpy(), y.numpy())
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


def test_the_penalty_and_errors_are_those_of_a_loop_over_the_folds(tmp_path):
    problem = Problem(tmp_path)
    fitted = problem.fit()
    fold_of_row = fitted.fold_of_group[problem.groups]
    for k, summary in enumerate(fitted.summaries):
        rated = ~problem.ratings[:, k].isnan()
        x, y, parts = problem.x[rated], problem.ratings[rated, k], fold_of_row[rated]
        x, y, parts = x.numpy(), y.numpy(), parts.numpy()
        errors, baseline = dict.fromkeys(ALPHAS, 0.0), 0.0
        for fold in range(FOLDS):
            inside = parts == fold
            baseline += np.square(y[~inside].mean() - y[inside]).sum()
            for alpha in ALPHAS:
                model = Ridge(alpha=alpha).fit(x[~inside], y[~inside])
                errors[alpha] += np.square(model.predict(x[inside]) - y[inside]).sum()
        assert summary.alpha == min(errors, key=errors.get)
        assert summary.error == pytest.approx(min(errors.values()) / len(y))
        assert summary.explained == pytest.approx(1.0 - min(errors.values()) / baseline)


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
