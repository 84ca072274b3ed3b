"""Ridge regression from statistics, against scikit-learn and against sums over rows."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold

from armo.fit.ridge import (
    RidgeStatistics,
    RidgeSums,
    RidgeSystem,
    select_alpha,
    solve_ridge,
    squared_error,
)

ALPHAS = [0.1, 1.0, 30.0, 1000.0]


def draw(rows, dim, objectives, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    y = x[:, :1] + torch.randn(rows, objectives, generator=generator, dtype=torch.float64)
    return x, y


@st.composite
def problems(draw_value):
    """Embeddings and ratings of any shape, with an offset, constant columns and repeated rows."""
    rows, dim = draw_value(st.integers(1, 25)), draw_value(st.integers(1, 12))
    x, y = draw(rows, dim, draw_value(st.integers(1, 4)), seed=draw_value(st.integers(0, 999)))
    x = x + draw_value(st.sampled_from([0.0, 10.0]))
    if draw_value(st.booleans()):
        x[:, 0] = 3.0
    if draw_value(st.booleans()):
        x, y = torch.cat([x, x[:2]]), torch.cat([y, y[:2]])
    return x, y


@st.composite
def row_weights(draw_value, x):
    """Weights of rows: none, or some of them zero and others large."""
    if draw_value(st.booleans()):
        return None
    values = st.sampled_from([0.0, 0.5, 1.0, 3.0])
    weights = draw_value(st.lists(values, min_size=len(x), max_size=len(x)))
    assume(any(weight > 0.0 for weight in weights))
    return torch.tensor(weights, dtype=torch.float64)


def shifts(x):
    """Points to count from: none, or one near the mean."""
    return st.sampled_from([None, x.mean(0).round()])


def assert_near(value, expected, *, relative=1e-6):
    """Compare vectors relative to the norm of the expected one."""
    error = float((value - expected).norm())
    assert error <= relative * float(expected.norm()) + 1e-9


def slow_cross_validation(x, y, parts, *, alphas):
    """Mean squared errors per penalty and of the mean, and the models: one fit at a time."""
    errors, baseline, models = np.zeros(len(alphas)), 0.0, {}
    for part in np.unique(parts):
        inside = parts == part
        for k, alpha in enumerate(alphas):
            model = Ridge(alpha=alpha).fit(x[~inside], y[~inside])
            errors[k] += np.square(model.predict(x[inside]) - y[inside]).sum()
            models[part, alpha] = model
        baseline += np.square(y[~inside].mean() - y[inside]).sum()
    return errors / len(x), baseline / len(x), models


def folds_of(x, y, parts, *, count):
    return [RidgeStatistics.of(x[parts == part], y[parts == part]) for part in range(count)]


@pytest.mark.parametrize("intercept", [True, False])
@given(problems(), st.data())
def test_solve_ridge_equals_scikit_learn(intercept, problem, data):
    x, y = problem
    weights = data.draw(row_weights(x))
    statistics = RidgeStatistics.of(x, y, weights, shift=data.draw(shifts(x)))
    solutions = solve_ridge(statistics, alphas=ALPHAS, intercept=intercept)
    used = slice(None) if weights is None else weights > 0
    for alpha, solution in zip(ALPHAS, solutions, strict=True):
        model = Ridge(alpha=alpha, fit_intercept=intercept)
        model.fit(x[used].numpy(), y[used].numpy(), None if weights is None else weights[used])
        for k, coefficients in enumerate(np.atleast_2d(model.coef_)):
            assert_near(solution.weights[k], torch.from_numpy(coefficients))
        expected = torch.zeros(y.shape[1]) + torch.as_tensor(model.intercept_)
        assert_near(solution.intercepts, expected.double())


@pytest.mark.parametrize("shape", [(60, 200), (200, 60), (500, 300)])
@pytest.mark.parametrize("intercept", [True, False])
def test_solve_ridge_equals_scikit_learn_where_the_factorisation_works_in_blocks(shape, intercept):
    x, y = draw(*shape, 3)
    solutions = solve_ridge(RidgeStatistics.of(x, y), alphas=ALPHAS, intercept=intercept)
    for alpha, solution in zip(ALPHAS, solutions, strict=True):
        expected = Ridge(alpha=alpha, fit_intercept=intercept).fit(x.numpy(), y.numpy())
        np.testing.assert_allclose(solution.weights.numpy(), expected.coef_, rtol=1e-6, atol=1e-9)


def test_counting_from_near_the_mean_keeps_the_digits_that_a_far_constant_would_cost():
    x, y = draw(200, 4, 1)
    x[:, 0], x[:, 1] = 1e7, x[:, 1] + 1e7
    expected = torch.from_numpy(Ridge(alpha=0.1).fit(x.numpy(), y.numpy()).coef_).reshape(1, -1)
    [near] = solve_ridge(RidgeStatistics.of(x, y, shift=x[0]), alphas=[0.1])
    assert_near(near.weights, expected)
    with pytest.raises(ValueError, match="lost in rounding"):
        solve_ridge(RidgeStatistics.of(x, y), alphas=[0.1])


def test_solve_ridge_without_centring_would_differ():
    x, y = draw(20, 3, 1)
    x = x + 10.0
    [solution] = solve_ridge(RidgeStatistics.of(x, y), alphas=[1.0])
    without = Ridge(alpha=1.0, fit_intercept=False).fit(x.numpy(), y.numpy())
    assert not np.allclose(solution.weights.numpy(), np.atleast_2d(without.coef_), rtol=1e-2)


@given(problems())
def test_solve_ridge_treats_objectives_independently(problem):
    x, y = problem
    [together] = solve_ridge(RidgeStatistics.of(x, y), alphas=[1.0])
    for k in range(y.shape[1]):
        [alone] = solve_ridge(RidgeStatistics.of(x, y[:, [k]]), alphas=[1.0])
        torch.testing.assert_close(together.weights[[k]], alone.weights)
        torch.testing.assert_close(together.intercepts[[k]], alone.intercepts)


def test_solve_ridge_works_in_float64_whatever_the_embeddings():
    x, y = draw(50, 6, 2)
    [solution] = solve_ridge(RidgeStatistics.of(x.bfloat16(), y.float()), alphas=[1.0])
    expected = Ridge(alpha=1.0).fit(x.bfloat16().double().numpy(), y.float().double().numpy())
    np.testing.assert_allclose(solution.weights.numpy(), expected.coef_, rtol=1e-6)


SUMS = ("sum_x", "sum_y", "xx", "xy", "yy")


def assert_same_statistics(one, other):
    assert one.count == other.count
    assert one.weight == pytest.approx(other.weight)
    for name in SUMS:
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-9)


@given(problems(), st.data())
def test_statistics_are_sums_over_rows(problem, data):
    x, y = problem
    weights, shift = data.draw(row_weights(x)), data.draw(shifts(x))
    statistics = RidgeStatistics.of(x, y, weights, shift=shift)
    from_shift = x - (0 if shift is None else shift)
    w = torch.ones(len(x)).double() if weights is None else weights
    assert statistics.count == int((w > 0).sum())
    assert statistics.weight == pytest.approx(float(w.sum()))
    for name, expected in (
        ("sum_x", torch.einsum("n,ni->i", w, from_shift)),
        ("sum_y", torch.einsum("n,nk->k", w, y)),
        ("xx", torch.einsum("n,ni,nj->ij", w, from_shift, from_shift)),
        ("xy", torch.einsum("n,ni,nk->ik", w, from_shift, y)),
        ("yy", torch.einsum("n,nk,nk->k", w, y, y)),
    ):
        torch.testing.assert_close(getattr(statistics, name), expected, rtol=1e-9, atol=1e-9)


def test_the_sums_of_products_are_whole_where_they_are_many_blocks_wide():
    x, y = draw(20, 600, 1)
    statistics = RidgeStatistics.of(x, y)
    torch.testing.assert_close(statistics.xx, x.T @ x, rtol=1e-9, atol=1e-9)


@given(problems(), st.data())
def test_statistics_of_parts_add_up_and_can_be_taken_away(problem, data):
    x, y = problem
    cut = data.draw(st.integers(0, len(x)))
    first, rest = RidgeStatistics.of(x[:cut], y[:cut]), RidgeStatistics.of(x[cut:], y[cut:])
    total = RidgeStatistics.of(x, y)
    assert_same_statistics(first + rest, total)
    assert_same_statistics(total - first, rest)
    assert_same_statistics(total + RidgeStatistics.zero(x.shape[1], y.shape[1]), total)


@given(problems(), st.data())
def test_sums_of_one_regression_turn_into_those_of_the_next(problem, data):
    x, y = problem
    weights, shift = data.draw(row_weights(x)), data.draw(shifts(x))
    sides = st.lists(st.booleans(), min_size=len(x), max_size=len(x))
    before, now = (torch.tensor(data.draw(sides), dtype=torch.bool) for _ in range(2))
    sums = RidgeSums(x.shape[1], y.shape[1], shift=shift)

    def rows(chosen):
        return x[chosen], y[chosen, :1], None if weights is None else weights[chosen]

    sums.enter(x[before], y[before], None if weights is None else weights[before])
    sums.statistics()
    sums.restart(1)
    sums.enter(*rows(now & ~before))
    sums.stay(*rows(now & before))
    left = rows(before & ~now)
    sums.leave(left[0], left[2])
    assert_same_statistics(sums.statistics(), RidgeStatistics.of(*rows(now), shift=shift))


@given(problems(), st.sampled_from([0.1, 7.0]))
def test_scaled_statistics_are_those_of_scaled_weights(problem, factor):
    x, y = problem
    expected = RidgeStatistics.of(x, y, torch.full((len(x),), factor, dtype=torch.float64))
    assert_same_statistics(RidgeStatistics.of(x, y).scaled(factor), expected)


@given(problems(), st.data())
def test_a_row_of_weight_zero_is_left_out_and_one_of_weight_two_counts_twice(problem, data):
    x, y = problem
    weights = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=len(x), max_size=len(x))))
    assume(bool(weights.any()))
    weighted = RidgeStatistics.of(x, y, weights.double())
    repeated = RidgeStatistics.of(
        x.repeat_interleave(weights, dim=0), y.repeat_interleave(weights, dim=0)
    )
    assert weighted.count == int((weights > 0).sum())
    assert weighted.weight == pytest.approx(repeated.weight)
    for one, other in zip(
        solve_ridge(weighted, alphas=ALPHAS), solve_ridge(repeated, alphas=ALPHAS), strict=True
    ):
        torch.testing.assert_close(one.weights, other.weights, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(one.intercepts, other.intercepts, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("intercept", [True, False])
@given(problems(), st.data())
def test_leverages_are_the_posterior_variance_written_out(intercept, problem, data):
    x, y = problem
    weights, shift = data.draw(row_weights(x)), data.draw(shifts(x))
    system = RidgeSystem.of(RidgeStatistics.of(x, y, weights, shift=shift), intercept=intercept)
    w = torch.ones(len(x)).double() if weights is None else weights
    h, _ = draw(5, x.shape[1], 1, seed=1)
    design = torch.cat([torch.ones(len(x), int(intercept)).double(), x], dim=1)
    new = torch.cat([torch.ones(5, int(intercept)).double(), h], dim=1)
    leverages = system.leverages(h, ALPHAS)
    for k, alpha in enumerate(ALPHAS):
        penalty = torch.eye(design.shape[1]).double() * alpha
        penalty[0, 0] = 0.0 if intercept else alpha
        inverse = torch.linalg.inv(design.T @ (w[:, None] * design) + penalty)
        expected = ((new @ inverse) * new).sum(1)
        torch.testing.assert_close(leverages[:, k], expected, rtol=1e-6, atol=1e-9)


@given(problems())
def test_the_spectrum_is_that_of_the_centred_products(problem):
    x, y = problem
    values, vectors = RidgeSystem.of(RidgeStatistics.of(x, y)).spectrum()
    centred = x - x.mean(0)
    products = centred.T @ centred
    atol = 1e-9 * float(x.square().sum())
    torch.testing.assert_close((vectors * values) @ vectors.T, products, rtol=0, atol=atol)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(x.shape[1]).double())
    assert (values >= 0).all()
    assert (values.diff() >= 0).all()


@given(problems(), st.integers(0, 99))
def test_squared_error_equals_the_residual_sum_on_other_rows(problem, seed):
    x, y = problem
    [solution] = solve_ridge(RidgeStatistics.of(x, y), alphas=[0.3])
    other_x, other_y = draw(7, x.shape[1], y.shape[1], seed=seed)
    residuals = other_y - (other_x @ solution.weights.T + solution.intercepts)
    torch.testing.assert_close(
        squared_error(solution, RidgeStatistics.of(other_x, other_y)),
        residuals.square().sum(0),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("seed", range(5))
def test_select_alpha_equals_a_loop_over_grouped_folds(seed):
    x, y = draw(60, 20, 3, seed=seed)
    y[:, 1] = torch.randn(60, generator=torch.Generator().manual_seed(seed))  # nothing to learn
    groups = np.arange(60) // 3
    parts = np.empty(60, dtype=int)
    for part, (_, inside) in enumerate(GroupKFold(4).split(x, groups=groups)):
        parts[inside] = part
    choices = select_alpha(folds_of(x, y, parts, count=4), alphas=ALPHAS)
    assert len({choice.alpha for choice in choices}) > 1, "the penalty must matter here"
    for k, choice in enumerate(choices):
        errors, baseline, models = slow_cross_validation(
            x.numpy(), y[:, k].numpy(), parts, alphas=ALPHAS
        )
        np.testing.assert_allclose(choice.error.numpy(), errors, rtol=1e-9)
        assert choice.alpha == ALPHAS[errors.argmin()]
        assert choice.baseline == pytest.approx(baseline, rel=1e-9)
        for part, (weights, intercept) in enumerate(choice.without):
            expected = models[part, choice.alpha]
            np.testing.assert_allclose(weights.numpy(), expected.coef_, rtol=1e-6, atol=1e-9)
            assert intercept == pytest.approx(expected.intercept_, rel=1e-6)


def test_select_alpha_tolerates_a_fold_without_rows():
    x, y = draw(20, 3, 1)
    parts = torch.arange(20) % 2
    [two] = select_alpha(folds_of(x, y, parts, count=2), alphas=ALPHAS)
    [three] = select_alpha(folds_of(x, y, parts, count=3), alphas=ALPHAS)
    torch.testing.assert_close(two.error, three.error)
    assert two.baseline == pytest.approx(three.baseline)
    [all_rows] = solve_ridge(RidgeStatistics.of(x, y), alphas=[three.alpha])
    torch.testing.assert_close(three.without[2][0], all_rows.weights[0])


@pytest.mark.parametrize("alphas", [[0.0], [1.0, -2.0]])
def test_penalties_must_be_positive(alphas):
    with pytest.raises(ValueError, match="`alphas` must be positive"):
        solve_ridge(RidgeStatistics.of(*draw(5, 2, 1)), alphas=alphas)


def test_no_rows_cannot_be_fitted():
    with pytest.raises(ValueError, match="holds no rows"):
        solve_ridge(RidgeStatistics.zero(3, 1), alphas=[1.0])


def test_one_fold_cannot_choose_a_penalty():
    x, y = draw(5, 2, 1)
    with pytest.raises(ValueError, match="at least two parts"):
        select_alpha([RidgeStatistics.of(x, y), RidgeStatistics.zero(2, 1)], alphas=[1.0])


@pytest.mark.parametrize("wrong", [-1.0, torch.nan, torch.inf])
def test_weights_that_are_negative_or_not_finite_are_refused(wrong):
    weights = torch.tensor([1.0, 2.0, wrong, 1.0, -5.0])
    with pytest.raises(ValueError, match=r"`weights` must be finite .* in row 2"):
        RidgeStatistics.of(*draw(5, 2, 1), weights)


def test_statistics_from_different_points_do_not_add_up():
    x, y = draw(5, 2, 1)
    with pytest.raises(ValueError, match="`shift` is the same"):
        RidgeStatistics.of(x, y) + RidgeStatistics.of(x, y, shift=x[0])


@pytest.mark.parametrize("missing", ["embedding", "rating"])
def test_a_missing_value_among_the_rows_is_named(missing):
    x, y = draw(5, 2, 1)
    (x if missing == "embedding" else y)[3, 0] = torch.nan
    with pytest.raises(ValueError, match="an embedding or a rating is missing"):
        solve_ridge(RidgeStatistics.of(x, y), alphas=[1.0])


def test_a_penalty_that_rounding_swallows_is_refused():
    x, y = draw(4, 30, 1)
    with pytest.raises(ValueError, match="lost in rounding"):
        solve_ridge(RidgeStatistics.of(1e6 * x, y), alphas=[1e-9])
