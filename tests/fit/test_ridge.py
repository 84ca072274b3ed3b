"""Ridge regression from statistics, against scikit-learn and against sums over rows."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold

from armo.fit.ridge import RidgeStatistics, select_alpha, solve_ridge, squared_error

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


@given(problems())
def test_solve_ridge_equals_scikit_learn(problem):
    x, y = problem
    solutions = solve_ridge(RidgeStatistics.of(x, y), alphas=ALPHAS)
    for alpha, solution in zip(ALPHAS, solutions, strict=True):
        expected = Ridge(alpha=alpha).fit(x.numpy(), y.numpy())
        weights = torch.from_numpy(np.atleast_2d(expected.coef_))
        intercepts = torch.from_numpy(np.atleast_1d(expected.intercept_))
        torch.testing.assert_close(solution.weights, weights, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(solution.intercepts, intercepts, rtol=1e-6, atol=1e-9)


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


@given(problems(), st.data())
def test_statistics_of_parts_add_up_and_can_be_taken_away(problem, data):
    x, y = problem
    cut = data.draw(st.integers(0, len(x)))
    first, rest = RidgeStatistics.of(x[:cut], y[:cut]), RidgeStatistics.of(x[cut:], y[cut:])
    total = RidgeStatistics.of(x, y)
    for combined, expected in (
        (first + rest, total),
        (total - first, rest),
        (total + RidgeStatistics.zero(x.shape[1], y.shape[1]), total),
    ):
        assert combined.count == expected.count
        for name in ("sum_x", "sum_y", "xx", "xy", "yy"):
            torch.testing.assert_close(
                getattr(combined, name), getattr(expected, name), rtol=1e-9, atol=1e-9
            )


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
