"""Decorrelation against textbook formulas, and the reward transform against the slow way."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import pinv, sqrtm
from scipy.stats import spearmanr
from sklearn.linear_model import LinearRegression, LogisticRegression

from armo.data.surface import SURFACE_FEATURES
from armo.fit.decorrelation import (
    STYLE_FEATURES,
    DecorrelationWarning,
    FittedTransforms,
    RewardTransform,
    deviate,
    fit_penalties,
    fit_reward_transform,
    fit_transforms,
    leace_projection,
    least_squares,
    load_transforms,
    save_transforms,
    spearman,
    style_logits,
    style_weights,
)
from armo.fit.heads import FittedHeads, ObjectiveHeads

NAMES = ("helpfulness", "verbosity", "honesty", "formatting")
BIAS = (1, 3)
MIXED = (0, 2)
COVARIATES = ("log_length", "bold")
CHANGING = ("leace", "penalty", "residual")
COMBINATIONS = [m for k in range(4) for m in itertools.combinations(CHANGING, k)]
SCOPES = ("pooled", "within_prompt")


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
            "covariate_names": COVARIATES,
            "features": COVARIATES,
            "bias_indices": BIAS,
        }
        return fit_reward_transform(**(arguments | changes))

    def adjusted(self, transform):
        columns = [COVARIATES.index(name) for name in transform.covariates]
        return transform.adjusted(self.embeddings, self.covariates[:, columns])

    def style_left(self, transform, *, scope):
        """Largest correlation of a mixed objective with a covariate."""
        adjusted = deviate(self.adjusted(transform), self.groups, scope=scope)[:, list(MIXED)]
        covariates = deviate(self.covariates, self.groups, scope=scope)
        return float(correlation(adjusted, covariates).abs().max())


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
        problem.fit(methods=CHANGING)


@pytest.mark.parametrize("scope", ["pooled", "within_prompt"])
def test_erased_bias_objectives_do_not_get_penalties_made_of_rounding(scope):
    problem = Problem()
    exact = problem.rewards[:, list(BIAS)]  # leace then leaves nothing of the bias rewards
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DecorrelationWarning)
        _, summaries = problem.fit(covariates=exact, scope=scope, methods=("leace", "penalty"))
    for summary in summaries:
        assert all(abs(penalty) < 100.0 for penalty in summary.penalties.values())


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("methods", COMBINATIONS)
def test_adjusted_rewards_are_standardised_on_the_reference(methods, scope):
    problem = Problem()
    transform, _ = problem.fit(methods=methods, scope=scope)
    adjusted = problem.adjusted(transform)
    assert adjusted.dtype == torch.float64
    torch.testing.assert_close(adjusted.mean(0), torch.zeros(4).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(adjusted.std(0), torch.ones(4).double())


def test_without_methods_adjusted_rewards_are_standardised_rewards():
    problem = Problem()
    transform, summaries = problem.fit(methods=())
    expected = (problem.rewards - problem.rewards.mean(0)) / problem.rewards.std(0)
    torch.testing.assert_close(problem.adjusted(transform), expected)
    for summary in summaries:
        assert set(summary.penalties.values()) == {0.0}
        assert summary.kept == pytest.approx(1.0)


def standardised(rewards):
    return (rewards - rewards.mean(0)) / rewards.std(0)


@pytest.mark.parametrize("methods", COMBINATIONS)
@pytest.mark.parametrize("scope", SCOPES)
def test_the_folded_map_equals_erasing_scoring_and_subtracting_step_by_step(scope, methods):
    problem = Problem()
    transform, summaries = problem.fit(scope=scope, methods=methods)
    rewards = problem.rewards
    if "leace" in methods:
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
            assert (penalty != 0.0) == ("penalty" in methods)
        if "residual" in methods:
            z = problem.covariates.numpy()
            within = (deviate_slowly(part, problem.groups, scope=scope) for part in (z, slow[:, k]))
            model = LinearRegression(fit_intercept=False).fit(*within)
            slow[:, k] -= torch.from_numpy(z @ model.coef_)
    torch.testing.assert_close(problem.adjusted(transform), standardised(slow))
    assert transform.covariates == (COVARIATES if "residual" in methods else ())


def deviate_slowly(values, groups, *, scope):
    """Rows less the mean of their prompt, or of all rows, one row at a time."""
    values, rows = np.asarray(torch.as_tensor(values).tolist()), []
    for row, group in enumerate(groups.tolist()):
        there = [other for other, name in enumerate(groups.tolist()) if name == group]
        if scope == "pooled":
            there = list(range(len(groups)))
        if len(there) > 1:
            rows.append(values[row] - values[there].mean(0))
    return np.array(rows)


CASES = st.tuples(
    st.integers(0, 999),
    st.integers(1, 4),
    st.integers(2, 5),
    st.lists(st.sampled_from([-4.0, 0.0, 4.0]), min_size=4, max_size=4),
)
"""Seed, number of covariates, further dimensions, and powers of ten of the covariates' units."""


def make_reference(case):
    """Embeddings of prompts with one to six responses, heads, and covariates that follow them."""
    seed, columns, further, powers = case
    dim, units = columns + further, 10.0 ** torch.tensor(powers[:columns])
    sizes = torch.randint(1, 7, (30,), generator=torch.Generator().manual_seed(seed))
    groups = torch.arange(30).repeat_interleave(sizes)
    rows = len(groups)
    x = draw(rows, dim, seed=seed) + draw(30, dim, seed=seed + 1)[groups] + 2.0
    z = x @ draw(dim, columns, seed=seed + 2) + 2.0 * draw(rows, columns, seed=seed + 3)
    z = (z + 3.0 * draw(30, columns, seed=seed + 4)[groups]) * units.double()
    heads = ObjectiveHeads(NAMES, draw(4, dim, seed=seed + 5), draw(4, seed=seed + 6))
    return {
        "heads": heads,
        "embeddings": x,
        "covariates": z,
        "groups": groups,
        "covariate_names": SURFACE_FEATURES[:columns],
        "features": SURFACE_FEATURES[:columns],
        "bias_indices": BIAS,
    }


def adjust(reference, transform):
    """The adjusted rewards of the reference responses."""
    columns = [reference["covariate_names"].index(name) for name in transform.covariates]
    return transform.adjusted(reference["embeddings"], reference["covariates"][:, columns])


def fit_quietly(**arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DecorrelationWarning)
        return fit_reward_transform(**arguments)


def style_left(reference, transform, *, scope):
    """Correlations of the mixed objectives with each covariate."""
    adjusted = deviate(adjust(reference, transform), reference["groups"], scope=scope)
    covariates = deviate(reference["covariates"], reference["groups"], scope=scope)
    return correlation(adjusted[:, list(MIXED)], covariates).abs()


@given(CASES, st.sampled_from(SCOPES))
def test_residual_equals_scikit_learns_regression_on_the_deviations(case, scope):
    reference = make_reference(case)
    transform, _ = fit_quietly(**reference, methods=("residual",), scope=scope)
    rewards = reference["heads"].rewards(reference["embeddings"])
    z = reference["covariates"]
    spread = z.std(0)
    within = [
        deviate_slowly(part, reference["groups"], scope=scope) for part in (z / spread, rewards)
    ]
    coefficients = torch.from_numpy(LinearRegression(fit_intercept=False).fit(*within).coef_)
    expected = rewards.clone()
    for k in MIXED:
        expected[:, k] -= (z / spread) @ coefficients[k]
    torch.testing.assert_close(adjust(reference, transform), standardised(expected))
    scale = expected.std(0)[:, None] * spread
    torch.testing.assert_close(
        (transform.style * scale)[list(MIXED)], -coefficients[list(MIXED)] * spread / spread
    )


@given(
    CASES,
    st.sampled_from(SCOPES),
    st.sampled_from([("residual",), ("leace",), ("leace", "residual"), ("penalty", "residual")]),
)
def test_no_objective_is_correlated_with_a_covariate_in_the_scope(case, scope, methods):
    reference = make_reference(case)
    plain, _ = fit_quietly(**reference, methods=(), scope=scope)
    assert style_left(reference, plain, scope=scope).max() > 1e-3
    transform, summaries = fit_quietly(**reference, methods=methods, scope=scope)
    if min(summary.kept for summary in summaries) > 1e-6:  # or only rounding is left
        assert style_left(reference, transform, scope=scope).max() < 1e-8


@pytest.mark.parametrize("method", ["residual", "leace"])
@pytest.mark.parametrize("scope", SCOPES)
def test_the_scope_is_the_one_asked_for(scope, method):
    problem = Problem()
    problem.covariates = (
        problem.covariates
        + 6.0 * (draw(100, 2, seed=7) + draw(100, 8, seed=4)[:, :2])[problem.groups]
    )
    transform, _ = problem.fit(scope=scope, methods=(method,))
    left = {each: problem.style_left(transform, scope=each) for each in SCOPES}
    other = SCOPES[1 - SCOPES.index(scope)]
    assert left[scope] < 1e-8
    assert left[other] > 0.01


@given(CASES, st.sampled_from(SCOPES))
def test_residual_of_a_residual_changes_nothing(case, scope):
    reference = make_reference(case)
    once, _ = fit_quietly(**reference, methods=("residual",), scope=scope)
    again = dict(reference)
    again["heads"] = ObjectiveHeads(NAMES, torch.cat([once.matrix, once.style], 1), once.offset)
    again["embeddings"] = torch.cat([reference["embeddings"], reference["covariates"]], 1)
    twice, _ = fit_quietly(**again, methods=("residual",), scope=scope)
    torch.testing.assert_close(adjust(again, twice), adjust(reference, once), atol=1e-7, rtol=0)
    spread = reference["covariates"].std(0)
    assert (twice.style * spread).abs().max() < 1e-7


@given(CASES, st.sampled_from(SCOPES))
def test_residual_after_leace_has_nothing_left_to_do(case, scope):
    reference = make_reference(case)
    erased, _ = fit_quietly(**reference, methods=("leace",), scope=scope)
    both, summaries = fit_quietly(**reference, methods=("leace", "residual"), scope=scope)
    if min(summary.kept for summary in summaries) > 1e-6:
        assert (both.style * reference["covariates"].std(0)).abs().max() < 1e-7
        torch.testing.assert_close(both.matrix, erased.matrix)


@pytest.mark.parametrize("method", ["residual", "leace"])
@given(CASES, st.sampled_from(SCOPES))
def test_covariates_that_the_embeddings_do_not_follow_change_nothing(method, case, scope):
    reference = make_reference(case)
    counts = reference["groups"].bincount()
    kept = counts[reference["groups"]] > 1
    for name in ("embeddings", "covariates", "groups"):
        reference[name] = reference[name][kept]
    x, z = (
        deviate(reference[name], reference["groups"], scope=scope)
        for name in ("embeddings", "covariates")
    )
    reference["covariates"] = z - x @ torch.linalg.lstsq(x, z).solution
    plain, _ = fit_quietly(**reference, methods=(), scope=scope)
    transform, _ = fit_quietly(**reference, methods=(method,), scope=scope)
    torch.testing.assert_close(adjust(reference, transform), adjust(reference, plain))
    torch.testing.assert_close(transform.matrix, plain.matrix)


@given(CASES, st.sampled_from(SCOPES), st.integers(0, 99))
def test_residual_does_not_care_for_units_offsets_copies_and_constants(case, scope, seed):
    reference = make_reference(case)
    transform, _ = fit_quietly(**reference, methods=("residual",), scope=scope)
    z = reference["covariates"]
    units = 10.0 ** torch.randint(
        -6, 7, (z.shape[1],), generator=torch.Generator().manual_seed(seed)
    )
    constants = torch.tensor([0.0, 7.0, -1e5]).double().expand(len(z), 3)
    changed = torch.cat([z, constants, z * units, 2.0 * z[:, :1] + z[:, -1:]], 1)
    names = [f"covariate {k}" for k in range(changed.shape[1])]
    other = reference | {"covariates": changed, "covariate_names": names, "features": names}
    again, _ = fit_quietly(**other, methods=("residual",), scope=scope)
    torch.testing.assert_close(
        adjust(other, again), adjust(reference, transform), atol=1e-6, rtol=0
    )
    first = z.shape[1]
    assert not again.style[:, first : first + 3].any()
    assert again.style.isfinite().all()


@pytest.mark.parametrize("method", ["residual", "leace"])
def test_a_covariate_that_is_the_same_within_every_prompt_is_ignored_though_means_round(method):
    groups = torch.arange(280) % 40
    generator = torch.Generator().manual_seed(0)
    alike = torch.randn(40, 1, generator=generator, dtype=torch.float64)[groups]
    assert deviate(alike, groups, scope="within_prompt").any(), "rounding"
    x, z = draw(280, 8), draw(280, 1, seed=1)
    heads = ObjectiveHeads(("a", "b"), draw(2, 8, seed=2), draw(2, seed=3))
    adjusted = []
    for names, covariates in ((["z"], z), (["z", "alike"], torch.cat([z, alike], 1))):
        transform, _ = fit_reward_transform(
            *(heads, x, covariates, groups),
            **{"covariate_names": names, "features": names, "bias_indices": ()},
            methods=(method,),
        )
        adjusted.append(transform.adjusted(x, covariates[:, : len(transform.covariates)]))
    torch.testing.assert_close(*adjusted, atol=1e-8, rtol=0)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", ["residual", "leace"])
def test_a_feature_that_a_few_odd_responses_have_is_left_alone_and_named(method, scope, caplog):
    problem = Problem(rows=4000, prompts=1000)

    def fit(prompts):
        has = torch.zeros(4000, 1, dtype=torch.float64)
        has[:prompts] = 1.0
        with caplog.at_level("INFO"):
            fitted = fit_transforms(
                FittedHeads(problem.heads, (), torch.full((1000,), -1), ()),
                problem.embeddings,
                covariates=torch.cat([problem.covariates, has], dim=1),
                groups=problem.groups,
                covariate_names=("log_length", "bold", "affirmative"),
                bias_indices=BIAS,
                methods=(method,),
                features=("log_length", "bold", "affirmative"),
                scope=scope,
            )
        return fitted.transform

    few = fit(9)  # of a thousand prompts
    assert "too few responses have affirmative" in caplog.text
    caplog.clear()
    enough = fit(10)
    assert not caplog.text
    none = fit(0)
    torch.testing.assert_close(few.matrix, none.matrix)
    assert not torch.allclose(enough.matrix, none.matrix, rtol=1e-6)
    if method == "residual":
        assert not few.style[:, 2].any()
        assert bool(enough.style[list(MIXED), 2].all())


@given(CASES, st.sampled_from(SCOPES), st.sampled_from([-3.0, 0.01, 50.0]))
def test_adjusted_rewards_do_not_depend_on_the_scale_of_rewards_or_embeddings(case, scope, factor):
    reference = make_reference(case)
    for methods in (("residual",), ("leace",), ("leace", "residual")):
        expected = adjust(reference, fit_quietly(**reference, methods=methods, scope=scope)[0])
        heads = reference["heads"]
        scaled = ObjectiveHeads(NAMES, factor * heads.weights, factor * heads.intercepts + 1.0)
        changed = reference | {"heads": scaled}
        transform, summaries = fit_quietly(**changed, methods=methods, scope=scope)
        if min(summary.kept for summary in summaries) < 1e-6:
            continue
        torch.testing.assert_close(
            adjust(changed, transform), math.copysign(1.0, factor) * expected, atol=1e-6, rtol=0
        )
        smaller = ObjectiveHeads(NAMES, heads.weights / factor, heads.intercepts)
        changed = {"heads": smaller, "embeddings": factor * reference["embeddings"]}
        changed = reference | changed
        transform, _ = fit_quietly(**changed, methods=methods, scope=scope)
        torch.testing.assert_close(adjust(changed, transform), expected, atol=1e-6, rtol=0)


@given(CASES, st.sampled_from(SCOPES))
def test_residual_keeps_at_least_as_much_as_leace(case, scope):
    reference = make_reference(case)
    kept = {}
    for method in ("residual", "leace"):
        _, summaries = fit_quietly(**reference, methods=(method,), scope=scope)
        kept[method] = [summary.kept for summary in summaries]
    for residual, erased in zip(kept["residual"], kept["leace"], strict=True):
        assert residual >= erased - 1e-9


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("methods", COMBINATIONS)
def test_the_methods_of_the_gate_leave_the_rewards_alone(methods, scope):
    problem = Problem()
    plain, summaries = problem.fit(methods=methods, scope=scope)
    more, others = problem.fit(methods=(*methods, "nuisance", "reweight"), scope=scope)
    assert_same_transform(plain, more)
    assert summaries == others


@pytest.mark.parametrize("methods", COMBINATIONS)
def test_bias_objectives_are_standardised_but_keep_their_style(methods):
    problem = Problem()
    transform, summaries = problem.fit(methods=methods)
    bias = list(BIAS)
    torch.testing.assert_close(
        problem.adjusted(transform)[:, bias], standardised(problem.rewards)[:, bias]
    )
    assert not transform.style[bias].any()
    plain, _ = problem.fit(methods=())
    assert torch.equal(transform.matrix[bias], plain.matrix[bias])
    assert [summary.objective for summary in summaries] == ["helpfulness", "honesty"]


def test_the_penalties_before_a_residual_are_those_of_the_penalty_alone():
    problem = Problem()
    _, alone = problem.fit(methods=("penalty",))
    _, both = problem.fit(methods=("penalty", "residual"))
    assert [s.penalties for s in alone] == [s.penalties for s in both]


@pytest.mark.parametrize("methods", [m for m in COMBINATIONS if m])
def test_style_is_less_on_fresh_responses_with_a_method_than_without(methods):
    problem, fresh = Problem(rows=2000, prompts=500), Problem(rows=2000, prompts=500)
    fresh.embeddings = draw(2000, 8, seed=50) + 2.0
    fresh.rewards = fresh.heads.rewards(fresh.embeddings)
    fresh.covariates = fresh.rewards[:, list(BIAS)] + 4.0 * draw(2000, 2, seed=51)
    left = {
        which: fresh.style_left(problem.fit(methods=which)[0], scope="within_prompt")
        for which in ((), methods)
    }
    assert left[()] > 0.3
    assert left[methods] < 0.4 * left[()]


@pytest.mark.parametrize("methods", COMBINATIONS)
@pytest.mark.parametrize("scope", SCOPES)
def test_summaries_tell_rank_correlations_with_rewards_and_measurements(scope, methods):
    problem = Problem()
    transform, summaries = problem.fit(methods=methods, scope=scope)
    rewards, adjusted, covariates = (
        deviate_slowly(part, problem.groups, scope=scope)
        for part in (problem.rewards, problem.adjusted(transform), problem.covariates)
    )
    for summary in summaries:
        k = NAMES.index(summary.objective)
        against = {NAMES[b]: rewards[:, b] for b in BIAS}
        against |= {name: covariates[:, c] for c, name in enumerate(COVARIATES)}
        assert list(summary.before) == list(summary.after) == list(against)
        for name, values in against.items():
            assert summary.before[name] == pytest.approx(spearmanr(rewards[:, k], values)[0])
            expected = spearmanr(adjusted[:, k], values)[0]
            assert summary.after[name] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("method", ["residual", "leace"])
def test_only_the_features_asked_for_are_taken_out(method):
    problem = Problem()
    transform, summaries = problem.fit(methods=(method,), features=COVARIATES[1:])
    assert transform.covariates == (COVARIATES[1:] if method == "residual" else ())
    deviations = deviate(problem.covariates, problem.groups, scope="within_prompt")
    adjusted = deviate(problem.adjusted(transform), problem.groups, scope="within_prompt")
    left = correlation(adjusted[:, list(MIXED)], deviations).abs()
    assert left[:, 1].max() < 1e-8
    assert left[:, 0].max() > 0.1
    assert list(summaries[0].before) == ["verbosity", "formatting", "bold"]


def test_features_come_in_the_order_asked_for():
    problem = Problem()
    forth, _ = problem.fit(methods=("residual",))
    back, _ = problem.fit(methods=("residual",), features=COVARIATES[::-1])
    assert back.covariates == COVARIATES[::-1]
    torch.testing.assert_close(back.style, forth.style.flip(1))
    torch.testing.assert_close(problem.adjusted(back), problem.adjusted(forth))


def test_no_features_leave_the_rewards_alone():
    problem = Problem()
    plain, _ = problem.fit(methods=())
    for method in ("residual", "leace"):
        transform, summaries = problem.fit(methods=(method,), features=())
        torch.testing.assert_close(transform.matrix, plain.matrix)
        assert transform.covariates == ()
        assert list(summaries[0].after) == ["verbosity", "formatting"]


def test_style_features_are_among_those_that_are_measured():
    assert set(STYLE_FEATURES) < set(SURFACE_FEATURES)
    assert set(SURFACE_FEATURES) - set(STYLE_FEATURES) == {
        *("lines", "paragraphs"),  # which follow from length and lists
        *("inline_code", "questions"),  # which are as much content
    }


def test_adjusted_is_the_affine_map_written_row_by_row():
    transform = RewardTransform(
        ("a", "b"),
        draw(2, 3),
        draw(2, seed=1),
        COVARIATES,
        draw(2, 2, seed=2),
        torch.tensor([[-0.2, -0.2], [0.5, 1e9]], dtype=torch.float64),
    )
    h, z = draw(4, 3, seed=3).float(), draw(4, 2, seed=4).float()
    assert (z[:, 0] > 0.5).any()
    assert (z[:, 1] < -0.2).any()
    adjusted = transform.adjusted(h, z)
    assert adjusted.dtype == torch.float64
    for row in range(4):
        for k in range(2):
            expected = transform.offset[k] + sum(
                float(transform.matrix[k, d]) * float(h[row, d]) for d in range(3)
            )
            for c, most in enumerate((0.5, 1e9)):
                slope = float(transform.style[k, c])
                best = max(slope * -0.2, slope * most)
                expected += min(slope * float(z[row, c]), best)
            assert float(adjusted[row, k]) == pytest.approx(float(expected))


@given(st.integers(0, 999))
def test_style_that_no_reference_response_shows_is_not_paid_for(seed):
    problem = Problem(seed=seed)
    transform, _ = problem.fit(methods=("residual",))
    low, high = problem.covariates.amin(0), problem.covariates.amax(0)
    assert torch.equal(transform.covariate_range, torch.stack([low, high]))
    h = problem.embeddings[:1].expand(2, -1)
    beyond = torch.stack([low - 100.0, high + 100.0])
    at_the_end = torch.stack([low, high])
    far, near = transform.adjusted(h, beyond), transform.adjusted(h, at_the_end)
    assert bool((far <= near)[:, list(MIXED)].all())
    assert bool((far < near - 1.0)[:, list(MIXED)].any()), "what costs goes on costing"


@given(st.integers(0, 999), st.integers(1, 5))
def test_least_squares_equals_numpys_smallest_solution_in_units_of_the_spread(seed, columns):
    x, values = draw(50, columns, seed=seed), draw(50, 3, seed=seed + 1)
    x = torch.cat([1e3 * x, x[:, :1], torch.zeros(50, 1)], 1)  # a copy, and nothing
    scale = np.sqrt((x.numpy() ** 2).mean(0))
    scale[-1] = 1.0
    expected = np.linalg.lstsq(x.numpy() / scale, values.numpy(), rcond=1e-10)[0] / scale[:, None]
    found = least_squares(x, values)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-12)
    assert not found[-1].any()


@pytest.mark.parametrize("methods", [("penalty",), ("leace", "penalty")])
def test_adjusted_rewards_do_not_follow_any_bias_objective(methods):
    problem = Problem(signs=(1.0, -1.0))
    transform, summaries = problem.fit(methods=methods, tolerance=0.005)
    before = deviate(problem.rewards, problem.groups, scope="within_prompt")
    after = deviate(problem.adjusted(transform), problem.groups, scope="within_prompt")
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


def test_penalties_belong_to_the_rows_of_the_matrix_not_to_its_columns():
    problem = Problem()
    transform, summaries = problem.fit(methods=("penalty",))
    subtract = torch.eye(4, dtype=torch.float64)
    for summary in summaries:
        for name, penalty in summary.penalties.items():
            subtract[NAMES.index(summary.objective), NAMES.index(name)] = -penalty

    adjusted = problem.adjusted(transform)
    torch.testing.assert_close(adjusted, standardised(problem.rewards @ subtract.T))
    transposed, unapplied = standardised(problem.rewards @ subtract), standardised(problem.rewards)
    for wrong in (transposed, unapplied):
        assert (adjusted - wrong).abs().max() > 0.5


def directions(*transforms):
    """What each transform looks at, scale apart."""
    return [
        (both := torch.cat([t.matrix, t.style], dim=1)) / both.norm(dim=1, keepdim=True)
        for t in transforms
    ]


@pytest.mark.parametrize("methods", [("leace", "penalty"), ("residual",), CHANGING])
def test_what_only_depends_on_the_prompt_changes_nothing_within_prompts(methods):
    problem = Problem()
    moved = problem.embeddings + 3.0 * draw(100, 8, seed=9)[problem.groups]
    features = problem.covariates + 5.0 * draw(100, 2, seed=10)[problem.groups]
    results = {}
    for scope in ("within_prompt", "pooled"):
        before, _ = problem.fit(scope=scope, methods=methods)
        after, _ = problem.fit(scope=scope, methods=methods, embeddings=moved, covariates=features)
        results[scope] = torch.allclose(*directions(before, after), atol=1e-3)
    assert results == {"within_prompt": True, "pooled": False}


@pytest.mark.parametrize("methods", [("leace", "penalty"), ("residual",), CHANGING])
def test_prompts_with_one_response_only_do_not_count_within_prompts(methods):
    problem = Problem()
    alone = 100.0 * draw(3, 8, seed=9)
    transform, _ = problem.fit(methods=methods)
    more, _ = problem.fit(
        methods=methods,
        embeddings=torch.cat([problem.embeddings, alone]),
        covariates=torch.cat([problem.covariates, draw(3, 2, seed=10)]),
        groups=torch.cat([problem.groups, torch.tensor([1000, 2000, 3000])]),
    )
    torch.testing.assert_close(*directions(transform, more))


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
    first, second = torch.tensor(pairs, dtype=torch.float64).T[:, :, None]
    expected = spearmanr(first, second)[0]
    assert float(spearman(first, second)) == pytest.approx(expected, abs=1e-12)


@given(st.integers(0, 999), st.integers(1, 3), st.integers(1, 4))
def test_spearman_of_columns_equals_scipys_of_every_two(seed, columns, others):
    first, second = draw(20, columns, seed=seed), draw(20, others, seed=seed + 1).round()
    found = spearman(first, second)
    assert found.shape == (columns, others)
    for a in range(columns):
        for b in range(others):
            expected = spearmanr(first[:, a], second[:, b])[0]
            assert float(found[a, b]) == pytest.approx(expected, abs=1e-12)


def test_spearman_of_a_constant_is_zero():
    columns = torch.stack([torch.arange(4.0), torch.ones(4)], dim=1)
    assert spearman(torch.ones(4, 1), columns).tolist() == [[0.0, 0.0]]
    assert spearman(columns, columns)[0].tolist() == pytest.approx([1.0, 0.0])
    assert spearman(columns, columns[:, :0]).shape == (2, 0)


def fit_two_folds(problem, **changes):
    folds = [ObjectiveHeads(NAMES, draw(4, 8, seed=s), draw(4, seed=s)) for s in (5, 6)]
    heads = FittedHeads(problem.heads, tuple(folds), torch.arange(100) % 2, ())
    fitted = fit_transforms(
        heads,
        problem.embeddings,
        covariates=problem.covariates,
        covariate_names=COVARIATES,
        groups=problem.groups,
        bias_indices=BIAS,
        **({"features": COVARIATES} | changes),
    )
    return heads, fitted


def assert_same_transform(one, other):
    assert one.objectives == other.objectives
    assert torch.equal(one.matrix, other.matrix)
    assert torch.equal(one.offset, other.offset)
    assert one.covariates == other.covariates
    assert torch.equal(one.style, other.style)


@pytest.mark.parametrize("method", ["leace", "residual"])
def test_every_fold_gets_the_transform_of_its_own_heads(method):
    problem = Problem()
    how = {"scope": "pooled", "methods": (method, "reweight"), "features": COVARIATES[1:]}
    heads, fitted = fit_two_folds(problem, **how)
    transform, summaries = problem.fit(**how)
    assert_same_transform(fitted.transform, transform)
    assert fitted.summaries == tuple(summaries)
    assert (fitted.methods, fitted.features) == ((method, "reweight"), COVARIATES[1:])
    for own, of_fold in zip(heads.without_fold, fitted.without_fold, strict=True):
        expected, _ = problem.fit(heads=own, **how)
        assert_same_transform(of_fold, expected)


@pytest.mark.parametrize("methods", [("residual", "nuisance"), ("leace", "penalty", "reweight")])
def test_save_then_load_is_the_identity(tmp_path, methods):
    problem = Problem()
    saved = {
        True: fit_two_folds(problem, methods=methods)[1],
        False: fit_two_folds(problem, methods=())[1],
    }
    save_transforms(tmp_path, decorrelated=saved[True], undecorrelated=saved[False])
    for decorrelated, fitted in saved.items():
        loaded = load_transforms(tmp_path, decorrelated=decorrelated)
        assert isinstance(loaded, FittedTransforms)
        assert loaded.methods == fitted.methods == (methods if decorrelated else ())
        assert loaded.features == fitted.features == COVARIATES
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
    with pytest.raises(ValueError, match=r"`methods` knows leace, .*, reweight, not lowess"):
        Problem().fit(methods=("leace", "lowess"))


@pytest.mark.usefixtures("no_type_checks")
def test_an_unknown_scope_is_named():
    with pytest.raises(ValueError, match="`scope` must be pooled or within_prompt, got 'all'"):
        Problem().fit(scope="all")


def test_an_unknown_feature_is_named():
    with pytest.raises(ValueError, match="`features` knows log_length, bold, not charm"):
        Problem().fit(features=("bold", "charm"))


def test_leace_equals_the_package_of_its_authors():
    erasure = pytest.importorskip("concept_erasure")
    for seed in range(5):
        x = draw(200, 6, seed=seed) @ draw(6, 6, seed=seed + 1)
        z = x @ draw(6, 2, seed=seed + 2) + 3.0 * draw(200, 2, seed=seed + 3)
        eraser = erasure.LeaceFitter.fit(
            *(x, z), shrinkage=False, constrain_cov_trace=False, svd_tol=1e-9
        ).eraser
        torch.testing.assert_close(leace_projection(x, z), eraser.P, atol=1e-8, rtol=0)


# Preferences that style decides


def preferences(*, rows=8000, pull=1.0, seed=0):
    """Style of the chosen less that of the rejected responses, where judges give to style."""
    differences = torch.stack(
        [draw(rows, seed=seed), 3.0 * (draw(rows, seed=seed + 1) > 1.0).double()], dim=1
    )
    logits = differences @ torch.tensor([pull, 0.3 * pull]).double()
    uniform = torch.rand(rows, generator=torch.Generator().manual_seed(seed + 2))
    return differences * torch.where(uniform < torch.sigmoid(logits), 1.0, -1.0)[:, None]


def style_model(differences, weights=None):
    """Scikit-learn's logistic regression of both orders of each pair, without intercept."""
    x, y = [*differences.numpy(), *-differences.numpy()], [1] * len(differences)
    twice = None if weights is None else [*weights.tolist(), *weights.tolist()]
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    return model.fit(x, [*y, *[0] * len(y)], sample_weight=twice)


def test_style_weights_are_those_of_a_case_done_by_hand():
    # Of 40000 pairs the longer response is chosen in 30000, so that it is chosen with 3/4: weights
    # 1 / (2 * 3/4) = 2/3 and 1 / (2 * 1/4) = 2, whose mean is one.
    differences = torch.tensor([5.0] * 30000 + [-5.0] * 10000).double()[:, None]
    weights = style_weights(differences)
    assert weights[:30000].tolist() == pytest.approx([2.0 / 3.0] * 30000, rel=1e-3)
    assert weights[30000:].tolist() == pytest.approx([2.0] * 10000, rel=1e-3)
    assert float((weights * differences[:, 0]).mean()) == pytest.approx(0.0, abs=1e-2)


@given(st.integers(0, 99), st.sampled_from([0.5, 2.0]), st.sampled_from([1.2, 10.0]))
def test_style_weights_are_inverse_probabilities_of_scikit_learns_model(seed, pull, most):
    differences = preferences(rows=300, pull=pull, seed=seed)
    scaled = differences / differences.square().mean(0).sqrt()
    probability = style_model(scaled).predict_proba(scaled.numpy())[:, 1]
    expected = np.minimum(0.5 / probability, most)
    weights = style_weights(differences, most=most)
    np.testing.assert_allclose(weights.numpy(), expected / expected.mean(), rtol=1e-6)
    assert float(weights.mean()) == pytest.approx(1.0)
    assert (weights > 0).all()


def test_no_weight_is_larger_than_most_times_that_of_a_pair_without_style():
    differences = preferences(pull=4.0)
    differences[0] = 0.0
    weights = style_weights(differences, most=3.0)
    assert float(weights.max() / weights[0]) == pytest.approx(3.0)
    assert float(style_weights(differences, most=100.0).max() / weights[0]) > 10.0


def test_after_reweighting_style_no_longer_tells_what_was_chosen():
    differences = preferences()
    weights = style_weights(differences)
    before, after = style_model(differences).coef_[0], style_model(differences, weights).coef_[0]
    assert (before > 0.2).all()
    assert (np.abs(after) < 0.1 * before).all()
    means = differences.mean(0), (weights[:, None] * differences).mean(0)
    assert (means[1].abs() < 0.1 * means[0]).all()


def test_where_style_decides_nothing_all_pairs_weigh_about_the_same():
    weights = style_weights(preferences(pull=0.0))
    assert float((weights - 1.0).abs().max()) < 0.2
    assert style_weights(torch.zeros(3, 2).double()).tolist() == [1.0, 1.0, 1.0]


@given(st.integers(0, 99))
def test_style_logits_do_not_depend_on_units_and_change_sign_with_the_order(seed):
    train, test = preferences(rows=200, seed=seed), preferences(rows=50, seed=seed + 1)
    logits = style_logits(train, test)
    torch.testing.assert_close(style_logits(train, -test), -logits)
    torch.testing.assert_close(style_logits(train, test[:3]), logits[:3])
    units = torch.tensor([1e4, 1e-4]).double()
    torch.testing.assert_close(style_logits(train * units, test * units), logits)
    constant = torch.zeros(200, 1), torch.ones(50, 1)
    more = (torch.cat([a, b], 1) for a, b in zip((train, test), constant, strict=True))
    torch.testing.assert_close(style_logits(*more), logits)


def test_pairs_without_any_style_are_ties_for_a_model_of_style():
    train = torch.zeros(3, 2, dtype=torch.float64)
    assert style_logits(train, torch.ones(2, 2).double()).tolist() == [0.0, 0.0]
