"""Decorrelation against textbook formulas, and the reward transform against the slow way."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import pinv, sqrtm
from scipy.stats import spearmanr

from armo.fit.decorrelation import (
    DecorrelationWarning,
    FittedTransforms,
    deviate,
    fit_penalties,
    fit_reward_transform,
    fit_transforms,
    leace_projection,
    load_transforms,
    save_transforms,
    spearman,
)
from armo.fit.heads import FittedHeads, ObjectiveHeads

NAMES = ("helpfulness", "verbosity", "honesty", "formatting")
BIAS = (1, 3)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def covariance(a, b):
    return (a - a.mean(0)).T @ (b - b.mean(0)) / len(a)


def correlation(a, b):
    return covariance(a, b) / torch.outer(a.std(0, correction=0), b.std(0, correction=0))


class Problem:
    """Four heads, two of them bias objectives that the others and the covariates follow."""

    def __init__(self, *, seed=0, rows=400, dim=8, prompts=100, signs=(1.0, -1.0)):
        self.groups = torch.arange(rows) % prompts
        self.embeddings = (
            draw(rows, dim, seed=seed) + 0.5 * draw(prompts, dim, seed=seed + 4)[self.groups] + 2.0
        )
        weights = draw(4, dim, seed=seed + 1)
        weights[0] += 0.7 * signs[0] * (weights[1] + weights[3])
        weights[2] += 0.7 * signs[1] * (weights[1] + weights[3])
        self.heads = ObjectiveHeads(NAMES, weights, draw(4, seed=seed + 2))
        self.rewards = self.heads.rewards(self.embeddings)
        self.covariates = self.rewards[:, list(BIAS)] + 4.0 * draw(rows, 2, seed=seed + 3)

    def fit(self, **changes):
        arguments = {
            "heads": self.heads,
            "embeddings": self.embeddings,
            "covariates": self.covariates,
            "groups": self.groups,
            "bias_indices": BIAS,
        }
        return fit_reward_transform(**(arguments | changes))


@st.composite
def erasures(draw_value):
    """Embeddings that mix their coordinates, and covariates that follow them."""
    seed, dim = draw_value(st.integers(0, 999)), draw_value(st.integers(2, 8))
    rotation = torch.linalg.qr(draw(dim, dim, seed=seed + 1)).Q
    x = (draw(100, dim, seed=seed) * torch.linspace(0.3, 3.0, dim)) @ rotation + 1.0
    columns = draw_value(st.integers(1, dim))
    z = x @ draw(dim, columns, seed=seed + 2) + 3.0 * draw(100, columns, seed=seed + 3)
    return x, z


@given(erasures())
def test_leace_leaves_no_covariance_with_the_covariates(problem):
    x, z = problem
    assert covariance(x, z).abs().max() > 1e-3
    projection = leace_projection(x, z)
    torch.testing.assert_close(
        covariance(x @ projection.T, z),
        torch.zeros(x.shape[1], z.shape[1]).double(),
        atol=1e-8,
        rtol=0,
    )


@given(erasures())
def test_leace_equals_the_textbook_formula(problem):
    x, z = problem
    whiten = np.linalg.inv(sqrtm(covariance(x, x).numpy()).real)
    basis = whiten @ covariance(x, z).numpy()
    onto = basis @ pinv(basis)
    expected = np.eye(x.shape[1]) - np.linalg.inv(whiten) @ onto @ whiten
    np.testing.assert_allclose(leace_projection(x, z).numpy(), expected, atol=1e-8)


@given(erasures())
def test_leace_of_one_covariate_equals_the_rank_one_formula(problem):
    x, z = problem
    cross = covariance(x, z[:, :1])
    inverse = torch.linalg.inv(covariance(x, x))
    removed = cross @ cross.T @ inverse / (cross.T @ inverse @ cross)
    expected = torch.eye(x.shape[1]).double() - removed
    torch.testing.assert_close(leace_projection(x, z[:, :1]), expected, atol=1e-8, rtol=0)


@given(erasures())
def test_leace_twice_is_leace_once(problem):
    projection = leace_projection(*problem)
    torch.testing.assert_close(projection @ projection, projection, atol=1e-8, rtol=0)


@given(erasures(), st.data())
def test_leace_ignores_units_and_offsets_of_the_covariates(problem, data):
    x, z = problem
    powers = data.draw(
        st.lists(st.sampled_from([-6, 0, 6]), min_size=z.shape[1], max_size=z.shape[1])
    )
    units = torch.tensor([10.0**power for power in powers]).double()
    changed = (z + data.draw(st.sampled_from([0.0, 5.0]))) * units
    torch.testing.assert_close(
        leace_projection(x, changed), leace_projection(x, z), atol=1e-6, rtol=0
    )


def test_leace_ignores_constant_covariates():
    x = draw(50, 4)
    z = x[:, :1] + draw(50, 1, seed=1)
    constant = torch.tensor([0.0, 7.3, 1e6]).double().expand(50, 3)
    identity = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(leace_projection(x, constant), identity)
    with_constant = leace_projection(x, torch.cat([constant, z], dim=1))
    torch.testing.assert_close(with_constant, leace_projection(x, z))
    assert not torch.allclose(with_constant, identity, atol=0.1)


@given(st.integers(0, 999), st.booleans())
def test_leace_erases_nothing_where_the_covariates_are_uncorrelated(seed, exactly):
    if exactly:
        x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).double()
        z = torch.tensor([[1.0], [-1.0], [-1.0], [1.0]]).double()
    else:  # to rounding: the residuals of a regression on the embeddings
        x, z = draw(60, 5, seed=seed), draw(60, 2, seed=seed + 1)
        design = torch.cat([x, torch.ones(60, 1)], dim=1)
        z = z - design @ torch.linalg.lstsq(design, z).solution
    identity = torch.eye(x.shape[1], dtype=torch.float64)
    torch.testing.assert_close(leace_projection(x, z), identity, atol=1e-6, rtol=0)


def test_leace_erases_what_only_a_direction_of_small_spread_follows():
    # Language models have a few coordinates hundreds of times larger than the others.
    z = draw(500, 1)
    small = 1e-3 * (z + 0.1 * draw(500, 1, seed=1))
    x = torch.cat([3.0 * draw(500, 3, seed=2), small], dim=1)
    assert abs(correlation(x, z)[3, 0]) > 0.9
    erased = x @ leace_projection(x, z).T
    assert covariance(erased, z).abs().max() < 1e-8


def test_leace_with_fewer_rows_than_coordinates_still_erases():
    x, z = draw(20, 40), draw(20, 1, seed=1)
    projection = leace_projection(x, z)
    assert covariance(x @ projection.T, z).abs().max() < 1e-8
    torch.testing.assert_close(projection @ projection, projection, atol=1e-8, rtol=0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_penalty_brings_the_correlation_to_zero_from_both_sides(sign):
    style = draw(500, 1)
    values = draw(500, seed=1) + sign * 0.8 * style[:, 0]
    penalty = fit_penalties(values, style, style, name="helpfulness", tolerance=0.005)
    assert float(penalty) * sign > 0.4
    assert abs(spearmanr(values - penalty * style[:, 0], style[:, 0])[0]) <= 0.005
    below = spearmanr(values - (penalty - 0.1) * style[:, 0], style[:, 0])[0]
    above = spearmanr(values - (penalty + 0.1) * style[:, 0], style[:, 0])[0]
    assert below > 0.005
    assert above < -0.005


@given(seed=st.integers(0, 999), biases=st.integers(1, 4), monotone=st.booleans())
def test_several_penalties_bring_all_correlations_within_tolerance(seed, biases, monotone):
    style = draw(600, biases, seed=seed)
    style = style + 0.4 * style.mean(1, keepdim=True)
    if monotone:  # skewed, so that least squares alone is not enough
        style = style.exp()
    values = draw(600, seed=seed + 1) + style @ draw(biases, seed=seed + 2)
    penalties = fit_penalties(values, style, style, name="helpfulness", tolerance=0.01)
    for b in range(biases):
        assert abs(spearmanr(values - style @ penalties, style[:, b])[0]) <= 0.01


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_an_unreachable_objective_is_named_in_a_warning_and_keeps_least_squares(share):
    style = draw(30, 1)
    values = draw(30, seed=1) + style[:, 0]
    subtracted = share * style  # nothing to subtract, or a tolerance finer than 30 ranks allow
    with pytest.warns(DecorrelationWarning, match=r"'honesty' keeps .* above `tolerance=1e-12`"):
        penalties = fit_penalties(values, subtracted, style, name="honesty", tolerance=1e-12)
    expected = np.linalg.lstsq(style - style.mean(0), values - values.mean(), rcond=None)[0]
    np.testing.assert_allclose(penalties.numpy(), share * expected, rtol=1e-9)


def test_a_reachable_objective_does_not_warn():
    problem = Problem()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem.fit()


@pytest.mark.parametrize("scope", ["pooled", "within_prompt"])
def test_erased_bias_objectives_do_not_get_penalties_made_of_rounding(scope):
    problem = Problem()
    exact = problem.rewards[:, list(BIAS)]  # leace then leaves nothing of the bias rewards
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DecorrelationWarning)
        _, summaries = problem.fit(covariates=exact, scope=scope)
    for summary in summaries:
        assert all(abs(penalty) < 100.0 for penalty in summary.penalties.values())


@pytest.mark.parametrize("scope", ["pooled", "within_prompt"])
@pytest.mark.parametrize("methods", [(), ("leace",), ("penalty",), ("leace", "penalty")])
def test_adjusted_rewards_are_standardised_on_the_reference(methods, scope):
    problem = Problem()
    transform, _ = problem.fit(methods=methods, scope=scope)
    adjusted = transform.adjusted(problem.embeddings)
    assert adjusted.dtype == torch.float64
    torch.testing.assert_close(adjusted.mean(0), torch.zeros(4).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(adjusted.std(0), torch.ones(4).double())


def test_without_methods_adjusted_rewards_are_standardised_rewards():
    problem = Problem()
    transform, summaries = problem.fit(methods=())
    expected = (problem.rewards - problem.rewards.mean(0)) / problem.rewards.std(0)
    torch.testing.assert_close(transform.adjusted(problem.embeddings), expected)
    for summary in summaries:
        assert set(summary.penalties.values()) == {0.0}
        assert summary.kept == pytest.approx(1.0)


@pytest.mark.parametrize("scope", ["pooled", "within_prompt"])
def test_the_folded_map_equals_erasing_scoring_and_subtracting_step_by_step(scope):
    problem = Problem()
    transform, summaries = problem.fit(scope=scope)
    projection = leace_projection(
        deviate(problem.embeddings, problem.groups, scope=scope),
        deviate(problem.covariates, problem.groups, scope=scope),
    )
    mean = problem.embeddings.mean(0)
    erased = torch.stack([mean + projection @ (h - mean) for h in problem.embeddings])
    rewards = problem.heads.rewards(erased)
    slow = problem.rewards.clone()  # bias objectives stay as they are
    for summary in summaries:
        k = NAMES.index(summary.objective)
        slow[:, k] = rewards[:, k]
        for name, penalty in summary.penalties.items():
            slow[:, k] -= penalty * rewards[:, NAMES.index(name)]
    slow = (slow - slow.mean(0)) / slow.std(0)
    torch.testing.assert_close(transform.adjusted(problem.embeddings), slow)


def test_bias_objectives_are_standardised_but_keep_their_style():
    problem = Problem()
    transform, summaries = problem.fit()
    bias = list(BIAS)
    expected = (problem.rewards - problem.rewards.mean(0)) / problem.rewards.std(0)
    torch.testing.assert_close(transform.adjusted(problem.embeddings)[:, bias], expected[:, bias])
    assert [summary.objective for summary in summaries] == ["helpfulness", "honesty"]


@pytest.mark.parametrize("methods", [("penalty",), ("leace", "penalty")])
def test_adjusted_rewards_do_not_follow_any_bias_objective(methods):
    problem = Problem(signs=(1.0, -1.0))
    transform, summaries = problem.fit(methods=methods, tolerance=0.005)
    before = deviate(problem.rewards, problem.groups, scope="within_prompt")
    after = deviate(transform.adjusted(problem.embeddings), problem.groups, scope="within_prompt")
    for summary in summaries:
        k = NAMES.index(summary.objective)
        for name in ("verbosity", "formatting"):
            style = before[:, NAMES.index(name)]
            raw, left = spearmanr(before[:, k], style)[0], spearmanr(after[:, k], style)[0]
            assert abs(raw) > 0.1, "there must be something to remove"
            assert abs(left) <= 0.0051
            assert summary.before[name] == pytest.approx(raw)
            assert summary.after[name] == pytest.approx(left)


def test_the_share_of_the_spread_kept_is_measured_within_prompts():
    problem = Problem()
    _, summaries = problem.fit(methods=("penalty",))
    rewards = deviate(problem.rewards, problem.groups, scope="within_prompt")
    for summary in summaries:
        before = rewards[:, NAMES.index(summary.objective)]
        after = before.clone()
        for name, penalty in summary.penalties.items():
            after -= penalty * rewards[:, NAMES.index(name)]
        assert summary.kept == pytest.approx(float(after.std() / before.std()))


def test_leace_leaves_adjusted_rewards_uncorrelated_with_the_covariates():
    problem = Problem()
    deviations = deviate(problem.covariates, problem.groups, scope="within_prompt")
    largest = {}
    for methods in ((), ("leace",), ("leace", "penalty")):
        transform, _ = problem.fit(methods=methods)
        adjusted = deviate(
            transform.adjusted(problem.embeddings), problem.groups, scope="within_prompt"
        )[:, [0, 2]]
        largest[methods] = float(correlation(adjusted, deviations).abs().max())
    assert largest[()] > 0.1
    assert largest["leace",] < 1e-8
    assert largest["leace", "penalty"] < 1e-8


def test_penalties_belong_to_the_rows_of_the_matrix_not_to_its_columns():
    problem = Problem()
    transform, summaries = problem.fit(methods=("penalty",))
    subtract = torch.eye(4, dtype=torch.float64)
    for summary in summaries:
        for name, penalty in summary.penalties.items():
            subtract[NAMES.index(summary.objective), NAMES.index(name)] = -penalty

    def standardised(rewards):
        return (rewards - rewards.mean(0)) / rewards.std(0)

    adjusted = transform.adjusted(problem.embeddings)
    torch.testing.assert_close(adjusted, standardised(problem.rewards @ subtract.T))
    transposed, unapplied = standardised(problem.rewards @ subtract), standardised(problem.rewards)
    for wrong in (transposed, unapplied):
        assert (adjusted - wrong).abs().max() > 0.5


def test_what_only_depends_on_the_prompt_changes_nothing_within_prompts():
    problem = Problem()
    moved = problem.embeddings + 3.0 * draw(100, 8, seed=9)[problem.groups]
    features = problem.covariates + 5.0 * draw(100, 2, seed=10)[problem.groups]
    results = {}
    for scope in ("within_prompt", "pooled"):
        before, _ = problem.fit(scope=scope)
        after, _ = problem.fit(scope=scope, embeddings=moved, covariates=features)
        directions = [t.matrix / t.matrix.norm(dim=1, keepdim=True) for t in (before, after)]
        results[scope] = torch.allclose(*directions, atol=1e-3)
    assert results == {"within_prompt": True, "pooled": False}


def test_prompts_with_one_response_only_do_not_count_within_prompts():
    problem = Problem()
    alone = 100.0 * draw(3, 8, seed=9)
    transform, _ = problem.fit()
    more, _ = problem.fit(
        embeddings=torch.cat([problem.embeddings, alone]),
        covariates=torch.cat([problem.covariates, draw(3, 2, seed=10)]),
        groups=torch.cat([problem.groups, torch.tensor([1000, 2000, 3000])]),
    )
    directions = [t.matrix / t.matrix.norm(dim=1, keepdim=True) for t in (transform, more)]
    torch.testing.assert_close(*directions)


def test_deviate_subtracts_each_prompts_mean_and_drops_single_responses():
    values = torch.tensor([[1.0], [10.0], [5.0], [3.0], [20.0]])
    groups = torch.tensor([7, 3, 99, 7, 3])
    within = deviate(values, groups, scope="within_prompt")
    assert within[:, 0].tolist() == [-1.0, -5.0, 1.0, 5.0]
    pooled = deviate(values, groups, scope="pooled")
    torch.testing.assert_close(pooled, values - 7.8)


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=30).filter(
        lambda pairs: all(len(set(side)) > 1 for side in zip(*pairs, strict=True))
    )
)
def test_spearman_equals_scipy_with_ties(pairs):
    first, second = torch.tensor(pairs, dtype=torch.float64).T
    assert spearman(first, second) == pytest.approx(spearmanr(first, second)[0], abs=1e-12)


def test_spearman_of_a_constant_is_zero():
    assert spearman(torch.ones(4), torch.arange(4.0)) == 0.0


def fit_two_folds(problem, **changes):
    folds = [ObjectiveHeads(NAMES, draw(4, 8, seed=s), draw(4, seed=s)) for s in (5, 6)]
    heads = FittedHeads(problem.heads, tuple(folds), torch.arange(100) % 2, ())
    fitted = fit_transforms(
        heads,
        problem.embeddings,
        covariates=problem.covariates,
        groups=problem.groups,
        bias_indices=BIAS,
        **changes,
    )
    return heads, fitted


def assert_same_transform(one, other):
    assert one.objectives == other.objectives
    assert torch.equal(one.matrix, other.matrix)
    assert torch.equal(one.offset, other.offset)


def test_every_fold_gets_the_transform_of_its_own_heads():
    problem = Problem()
    heads, fitted = fit_two_folds(problem, scope="pooled", methods=("leace",))
    transform, summaries = problem.fit(scope="pooled", methods=("leace",))
    assert_same_transform(fitted.transform, transform)
    assert fitted.summaries == tuple(summaries)
    for own, of_fold in zip(heads.without_fold, fitted.without_fold, strict=True):
        expected, _ = problem.fit(heads=own, scope="pooled", methods=("leace",))
        assert_same_transform(of_fold, expected)


def test_save_then_load_is_the_identity(tmp_path):
    problem = Problem()
    saved = {True: fit_two_folds(problem)[1], False: fit_two_folds(problem, methods=())[1]}
    save_transforms(tmp_path, decorrelated=saved[True], undecorrelated=saved[False])
    for decorrelated, fitted in saved.items():
        loaded = load_transforms(tmp_path, decorrelated=decorrelated)
        assert isinstance(loaded, FittedTransforms)
        assert loaded.summaries == fitted.summaries
        assert_same_transform(loaded.transform, fitted.transform)
        for one, other in zip(loaded.without_fold, fitted.without_fold, strict=True):
            assert_same_transform(one, other)


def test_an_objective_that_is_little_but_style_is_named_in_a_warning():
    problem = Problem()
    weights = problem.heads.weights.clone()
    weights[2] = weights[1] + 1e-3 * weights[0]
    with pytest.warns(DecorrelationWarning, match="'honesty' keeps .* of its spread"):
        problem.fit(
            heads=ObjectiveHeads(NAMES, weights, problem.heads.intercepts), methods=("penalty",)
        )


def test_an_objective_that_predicts_one_value_is_named():
    problem = Problem()
    weights = problem.heads.weights.clone()
    weights[2] = 0.0
    with (
        pytest.raises(ValueError, match="objective honesty predicts one value"),
        pytest.warns(DecorrelationWarning, match="honesty"),
    ):
        problem.fit(heads=ObjectiveHeads(NAMES, weights, problem.heads.intercepts), methods=())


def test_one_response_per_prompt_cannot_be_decorrelated_within_prompts():
    problem = Problem()
    with pytest.raises(ValueError, match="do not differ within any prompt"):
        problem.fit(groups=torch.arange(400))


@pytest.mark.usefixtures("no_type_checks")
def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="`methods` knows leace, penalty, not lowess"):
        Problem().fit(methods=("leace", "lowess"))


@pytest.mark.usefixtures("no_type_checks")
def test_an_unknown_scope_is_named():
    with pytest.raises(ValueError, match="`scope` must be pooled or within_prompt, got 'all'"):
        Problem().fit(scope="all")
