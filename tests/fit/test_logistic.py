"""Logistic heads, against scikit-learn and against SciPy on the formula written the slow way."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression, Ridge
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from armo.fit.logistic import THURSTONE, LabelledRows, fit_binary, fit_judgements

ALPHAS = [0.03, 1.0, 30.0]
FOLDS = 3


def draw(rows, dim, *, seed=0, soft=True, folds=FOLDS, signal=2.0):
    """Rows whose targets follow the first input, with weights, dealt out to folds."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, generator=generator, dtype=torch.float64)
    targets = (signal * x[:, 0] + noise).sigmoid()
    weights = 0.1 + 2.0 * torch.rand(rows, generator=generator, dtype=torch.float64)
    return LabelledRows(
        x, targets if soft else targets.round(), weights, torch.arange(rows) % folds
    )


def draw_ratings(rows, dim, *, seed=0):
    generator = torch.Generator().manual_seed(seed + 1)
    labelled = draw(rows, dim, seed=seed + 1)
    noise = 0.1 * torch.randn(rows, generator=generator, dtype=torch.float64)
    ratings = 0.5 + 0.1 * labelled.inputs[:, 0] + noise
    return LabelledRows(labelled.inputs, ratings, labelled.sample_weights, labelled.folds)


@st.composite
def problems(choose):
    """Rows of any shape, also wide, with an offset, a constant column, any targets."""
    dim = choose(st.integers(1, 10))
    rows = draw(
        choose(st.integers(6, 25)),
        dim,
        seed=choose(st.integers(0, 999)),
        soft=choose(st.booleans()),
        signal=choose(st.sampled_from([0.0, 2.0, 50.0])),
    )
    x = rows.inputs + choose(st.sampled_from([0.0, 10.0]))
    if choose(st.booleans()):
        x[:, -1] = 3.0
    targets = rows.targets.clone()
    targets[:4] = torch.tensor([0.3, 0.3, 0.6, 0.6])  # never all yes outside a fold
    return LabelledRows(x, targets, rows.sample_weights, rows.folds), draw_ratings(9, dim)


def select(rows, index):
    return LabelledRows(
        rows.inputs[index], rows.targets[index], rows.sample_weights[index], rows.folds[index]
    )


def source(rows, *, cuts=()):
    """A factory of batches, cut at some places."""
    ends = [0, *sorted(cuts), len(rows.targets)]
    return lambda: (select(rows, slice(*ends_of)) for ends_of in pairwise(ends))


def fit(kind, rows, ratings, *, cuts=(), **changes):
    arguments = {"folds": FOLDS, "alphas": [0.7]} | changes
    if kind == "binary":
        return fit_binary(source(rows, cuts=cuts), **arguments)
    batches = [ratings] if kind == "both" else []
    return fit_judgements(source(rows, cuts=cuts), batches, **arguments)


def objective(kind, theta, rows, ratings, *, alpha, noise=THURSTONE):
    """What is minimised, over the weights, the intercept and the logarithm of the scale."""
    weights, intercept, log_scale = theta[:-2], theta[-2], theta[-1]
    logits = rows.inputs @ weights + (intercept if kind == "binary" else 0.0)
    loss = cross_entropy(logits, rows.targets, rows.sample_weights, reduction="sum")
    if kind == "both":
        errors = log_scale.exp() * ratings.targets - ratings.inputs @ weights - intercept
        density = 0.5 * (errors / noise).square() - log_scale + math.log(noise)
        density = density + 0.5 * math.log(2.0 * math.pi)
        loss = loss + (ratings.sample_weights * density).sum()
    return loss + 0.5 * alpha * weights.square().sum()


def solve_slowly(kind, rows, ratings, **settings):
    """Minimise it with SciPy; return weights and intercept of the reward, and the scale."""

    used = torch.tensor([kind != "judgements", kind == "both"])

    def value(theta):
        theta = torch.as_tensor(theta)
        idle = torch.where(used, 0.0, theta[-2:]).square().sum()
        return objective(kind, theta, rows, ratings, **settings) + idle

    start = torch.zeros(rows.inputs.shape[1] + 2, dtype=torch.float64)
    result = minimize(
        value,
        start.numpy(),
        jac=lambda theta: torch.func.grad(value)(torch.as_tensor(theta)).numpy(),
        hess=lambda theta: torch.func.hessian(value)(torch.as_tensor(theta)).numpy(),
        method="trust-exact",
        options={"gtol": 1e-10, "maxiter": 1000},
    )
    theta = torch.from_numpy(result.x)
    scale = theta[-1].exp()
    return theta[:-2] / scale, theta[-2] / scale, scale


def assert_same(one, other, *, rtol=1e-6, atol=1e-7):
    torch.testing.assert_close(one.weights, other.weights, rtol=rtol, atol=atol)
    assert one.intercept == pytest.approx(other.intercept, rel=rtol, abs=atol)
    assert one.scale == pytest.approx(other.scale, rel=rtol)
    torch.testing.assert_close(one.loss, other.loss, rtol=rtol, atol=atol)
    assert one.baseline == pytest.approx(other.baseline, rel=rtol)
    for (weights, intercept), (other_weights, other_intercept) in zip(
        one.without, other.without, strict=True
    ):
        torch.testing.assert_close(weights, other_weights, rtol=rtol, atol=atol)
        assert intercept == pytest.approx(other_intercept, rel=rtol, abs=atol)


every_kind = pytest.mark.parametrize("kind", ["binary", "judgements", "both"])


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("shape", [(200, 5), (12, 30)])
@pytest.mark.parametrize("kind", ["binary", "judgements"])
def test_weights_equal_scikit_learns_on_rows_split_into_yes_and_no(kind, shape, alpha):
    rows = draw(*shape)
    choice = fit(kind, rows, None, alphas=[alpha])
    x, t, s = rows.inputs.numpy(), rows.targets.numpy(), rows.sample_weights.numpy()
    expected = LogisticRegression(
        C=1.0 / alpha, fit_intercept=kind == "binary", tol=1e-10, solver="newton-cholesky"
    ).fit(
        np.concatenate([x, x]),
        np.repeat([1, 0], len(x)),
        sample_weight=np.concatenate([s * t, s * (1.0 - t)]),
    )
    np.testing.assert_allclose(choice.weights.numpy(), expected.coef_[0], rtol=1e-5, atol=1e-7)
    assert choice.intercept == pytest.approx(expected.intercept_[0], rel=1e-5, abs=1e-7)


@every_kind
@given(problem=problems(), alpha=st.sampled_from(ALPHAS), noise=st.sampled_from([0.4, 1.2, 5.0]))
def test_weights_equal_scipys_on_the_formula(kind, problem, alpha, noise):
    rows, ratings = problem
    changes = {"noise": noise} if kind == "both" else {}
    choice = fit(kind, rows, ratings, alphas=[alpha], **changes)
    weights, intercept, scale = solve_slowly(kind, rows, ratings, alpha=alpha, **changes)
    torch.testing.assert_close(choice.weights, weights, rtol=1e-5, atol=1e-6)
    assert choice.intercept == pytest.approx(float(intercept), rel=1e-5, abs=1e-5)
    assert choice.scale == pytest.approx(float(scale), rel=1e-5)


@every_kind
@given(problem=problems(), alpha=st.sampled_from([1e-4, 1.0, 1e6]))
def test_the_gradient_vanishes_at_the_solution(kind, problem, alpha):
    rows, ratings = problem
    choice = fit(kind, rows, ratings, alphas=[alpha])
    intercept = torch.tensor([choice.intercept], dtype=torch.float64)
    scale = torch.tensor([choice.scale], dtype=torch.float64)
    solution = torch.cat([choice.scale * choice.weights, choice.scale * intercept, scale.log()])

    def slope(theta):
        gradient = torch.func.grad(lambda v: objective(kind, v, rows, ratings, alpha=alpha))(theta)
        return float(gradient.norm())

    assert slope(solution) <= 1e-6 * slope(torch.zeros_like(solution) + 0.1)


@every_kind
@given(problem=problems(), order=st.randoms(use_true_random=False), data=st.data())
def test_order_and_batches_change_nothing(kind, problem, order, data):
    rows, ratings = problem
    count = len(rows.targets)
    shuffled = order.sample(range(count), count)
    cuts = data.draw(st.lists(st.integers(0, count), max_size=4))
    one = fit(kind, rows, ratings)
    assert_same(one, fit(kind, select(rows, shuffled), ratings, cuts=cuts))


@every_kind
@given(problem=problems())
def test_rows_twice_are_rows_of_twice_the_weight(kind, problem):
    rows, ratings = problem
    twice = select(rows, torch.arange(len(rows.targets)).repeat(2))
    heavy = LabelledRows(rows.inputs, rows.targets, 2.0 * rows.sample_weights, rows.folds)
    assert_same(fit(kind, twice, ratings), fit(kind, heavy, ratings))


@every_kind
@given(problem=problems())
def test_rows_without_weight_count_for_nothing(kind, problem):
    rows, ratings = problem
    gone = torch.arange(len(rows.targets)) >= 5
    weights = torch.where(gone, 0.0, rows.sample_weights)
    without = LabelledRows(rows.inputs, rows.targets, weights, rows.folds)
    assert_same(fit(kind, without, ratings), fit(kind, select(rows, ~gone), ratings))


@pytest.mark.parametrize("kind", ["judgements", "both"])
@given(problem=problems(), data=st.data())
def test_swapping_the_responses_of_a_pair_changes_nothing(kind, problem, data):
    rows, ratings = problem
    count = len(rows.targets)
    swap = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    swapped = LabelledRows(
        torch.where(swap[:, None], -rows.inputs, rows.inputs),
        torch.where(swap, 1.0 - rows.targets, rows.targets),
        rows.sample_weights,
        rows.folds,
    )
    assert_same(fit(kind, rows, ratings), fit(kind, swapped, ratings))


@pytest.mark.parametrize("kind", ["binary", "judgements"])
def test_even_odds_everywhere_give_zero_weights(kind):
    rows = draw(40, 3)
    even = LabelledRows(rows.inputs, torch.full_like(rows.targets, 0.5), *_rest(rows))
    choice = fit(kind, even, None)
    assert choice.weights.abs().max() == 0.0
    assert choice.loss.tolist() == pytest.approx([math.log(2.0)])
    assert choice.baseline == pytest.approx(math.log(2.0))


@pytest.mark.parametrize("alpha", [0.01, 1.0, 1e9])
def test_inputs_that_never_change_get_no_weight(alpha):
    rows = draw(20_000, 1)
    constant = LabelledRows(torch.full_like(rows.inputs, 3.0), rows.targets, *_rest(rows))
    choice = fit("binary", constant, None, alphas=[alpha], max_passes=20)
    assert choice.weights.abs().max() < 1e-9
    share = (rows.sample_weights @ rows.targets) / rows.sample_weights.sum()
    assert choice.intercept == pytest.approx(float(share.logit()))


def _rest(rows):
    return rows.sample_weights, rows.folds


@every_kind
def test_separable_rows_converge_to_the_penalised_solution(kind):
    rows, ratings = draw(60, 4, soft=False, signal=1e9), draw_ratings(20, 4)
    choice = fit(kind, rows, ratings, alphas=[1e-4])
    weights, intercept, _ = solve_slowly(kind, rows, ratings, alpha=1e-4)
    torch.testing.assert_close(choice.weights, weights, rtol=1e-5, atol=1e-6)
    assert choice.intercept == pytest.approx(float(intercept), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kind", ["binary", "judgements"])
def test_rows_told_apart_beyond_the_rounding_of_probabilities_still_converge(kind):
    rows = draw(60, 4, soft=False, signal=1e9)
    long = LabelledRows(1000.0 * rows.inputs, rows.targets, *_rest(rows))
    choice = fit(kind, long, None, alphas=[1e-6], max_passes=200)
    signs = torch.where(rows.targets > 0.5, 1.0, -1.0) * rows.sample_weights
    logits = long.inputs @ choice.weights + choice.intercept
    wrong = (-logits * signs / rows.sample_weights).sigmoid()
    assert float(wrong.max()) < 1e-6
    # At the minimum, `alpha w` is the sum of inputs, each times the chance of the wrong answer.
    error = long.inputs.T @ (signs * wrong) - 1e-6 * choice.weights
    assert error.norm() < 1e-8 * (long.inputs.T @ signs).norm()


@pytest.mark.parametrize("seed", range(3))
@every_kind
def test_the_choice_is_that_of_a_loop_over_folds_and_penalties(kind, seed):
    rows, ratings = draw(45, 6, seed=seed, signal=0.7), draw_ratings(30, 6, seed=seed)
    choice = fit(kind, rows, ratings, alphas=ALPHAS)
    total = rows.sample_weights.sum() + (ratings.sample_weights.sum() if kind == "both" else 0.0)
    losses, models = torch.zeros(len(ALPHAS)), {}
    for k, alpha in enumerate(ALPHAS):
        for fold in range(FOLDS):
            outside = select(rows, rows.folds != fold), select(ratings, ratings.folds != fold)
            inside = select(rows, rows.folds == fold), select(ratings, ratings.folds == fold)
            weights, intercept, scale = solve_slowly(kind, *outside, alpha=alpha)
            theta = torch.cat([weights * scale, torch.stack([intercept * scale, scale.log()])])
            losses[k] += float(objective(kind, theta, *inside, alpha=0.0) / total)
            models[fold, k] = weights, intercept
    torch.testing.assert_close(choice.loss.float(), losses, rtol=1e-5, atol=1e-6)
    best = int(losses.argmin())
    assert choice.alpha == ALPHAS[best]
    for fold, (weights, intercept) in enumerate(choice.without):
        torch.testing.assert_close(weights, models[fold, best][0], rtol=1e-5, atol=1e-6)
        assert intercept == pytest.approx(float(models[fold, best][1]), rel=1e-5, abs=1e-6)
    constant = fit(kind, rows, ratings, alphas=[1e12]).loss
    assert choice.baseline == pytest.approx(float(constant), rel=1e-6)


def test_the_penalty_chosen_depends_on_the_signal():
    chosen = [
        fit("binary", draw(300, 30, signal=signal), None, alphas=ALPHAS).alpha
        for signal in (0.0, 20.0)
    ]
    assert chosen[0] > chosen[1]


def test_a_fold_without_rows_is_fitted_to_all_rows():
    rows = draw(30, 3, folds=2)
    two, three = fit("binary", rows, None, folds=2), fit("binary", rows, None, folds=3)
    torch.testing.assert_close(two.loss, three.loss)
    torch.testing.assert_close(three.without[2][0], three.weights)


@every_kind
def test_everything_is_float64_whatever_the_embeddings(kind):
    rows, ratings = draw(50, 4), draw_ratings(30, 4)
    narrow = [
        LabelledRows(r.inputs.bfloat16(), r.targets.float(), r.sample_weights.float(), r.folds)
        for r in (rows, ratings)
    ]
    wide = [
        LabelledRows(r.inputs.double(), r.targets.double(), r.sample_weights.double(), r.folds)
        for r in narrow
    ]
    assert fit(kind, *narrow).weights.dtype == torch.float64
    assert_same(fit(kind, *narrow), fit(kind, *wide), rtol=1e-12, atol=1e-12)


@given(st.integers(0, 99), st.sampled_from([0.1, 10.0]), st.sampled_from([0.5, 2.0]))
def test_ratings_beside_pairs_that_say_nothing_give_the_ridge_regression(seed, alpha, noise):
    ratings, pairs = draw_ratings(30, 5, seed=seed), draw(6, 5)
    silent = LabelledRows(torch.zeros_like(pairs.inputs), pairs.targets, *_rest(pairs))
    choice = fit("both", silent, ratings, alphas=[alpha], noise=noise)
    x, y, s = (v.numpy() for v in (ratings.inputs, ratings.targets, ratings.sample_weights))
    expected = Ridge(alpha=alpha * noise**2).fit(x, y, sample_weight=s)
    np.testing.assert_allclose(choice.weights.numpy(), expected.coef_, rtol=1e-6, atol=1e-9)
    assert choice.intercept == pytest.approx(expected.intercept_)
    squares = (
        s @ np.square(y - expected.predict(x)) + expected.alpha * np.square(expected.coef_).sum()
    )
    assert (noise / choice.scale) ** 2 == pytest.approx(squares / s.sum())


@given(problem=problems(), unit=st.sampled_from([0.1, 5.0]), zero=st.sampled_from([-3.0, 1.0]))
def test_the_unit_of_the_ratings_is_the_unit_of_the_reward(problem, unit, zero):
    rows, ratings = problem
    changed = LabelledRows(ratings.inputs, zero + unit * ratings.targets, *_rest(ratings))
    one, other = fit("both", rows, ratings), fit("both", rows, changed)
    torch.testing.assert_close(other.weights, unit * one.weights, rtol=1e-5, atol=1e-7)
    assert other.intercept == pytest.approx(zero + unit * one.intercept, rel=1e-5, abs=1e-5)
    assert other.scale == pytest.approx(one.scale / unit, rel=1e-5)
    gain, other_gain = one.baseline - one.loss, other.baseline - other.loss
    torch.testing.assert_close(gain, other_gain, rtol=1e-5, atol=1e-7)


def votes(rewards, *, voters, generator):
    """Share of voters who prefer the first of each pair: targets as of QuRating."""
    chances = (rewards[0::2] - rewards[1::2]).sigmoid().expand(voters, -1)
    return torch.bernoulli(chances, generator=generator).mean(0)


def test_a_known_direction_is_recovered_and_best_from_both_kinds_of_labels():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(20, generator=generator, dtype=torch.float64)
    x = torch.randn(1000, 20, generator=generator, dtype=torch.float64)
    voters, true_noise, true_scale = 4, 2.0, 20.0
    pairs = LabelledRows(
        x[0::2] - x[1::2],
        votes(x @ truth, voters=voters, generator=generator),
        torch.full((500,), voters, dtype=torch.float64),
        torch.arange(500) % FOLDS,
    )
    responses = torch.randn(500, 20, generator=generator, dtype=torch.float64)
    errors = true_noise * torch.randn(500, generator=generator, dtype=torch.float64)
    ratings = LabelledRows(
        responses,
        0.5 + (responses @ truth + errors) / true_scale,
        torch.ones(500),
        torch.arange(500) % FOLDS,
    )

    def match(weights):
        return float(torch.cosine_similarity(weights, truth, dim=0))

    noises = [0.2, 2.0, 20.0]
    every = [fit("both", pairs, ratings, alphas=ALPHAS, noise=noise) for noise in noises]
    both = min(every, key=lambda choice: float(choice.loss.min()))
    assert both is every[1], "the loss finds how noisy the ratings are"
    assert both.loss.min() < both.baseline
    assert both.scale == pytest.approx(true_scale, rel=0.1)
    torch.testing.assert_close(both.scale * both.weights, truth, rtol=0.0, atol=0.25)
    alone = match(fit("judgements", pairs, None, alphas=ALPHAS).weights)
    ridge = Ridge(alpha=1.0).fit(responses.numpy(), ratings.targets.numpy())
    assert alone > 0.99
    assert match(both.weights) > max(alone, match(torch.from_numpy(ridge.coef_)))


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_few_passes_are_enough_for_all_folds_and_penalties(offset):
    rows = draw(3000, 50, soft=False)
    rows = LabelledRows(rows.inputs + offset, rows.targets, *_rest(rows))
    choice = fit("binary", rows, None, folds=3, alphas=[0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0])
    counted = []

    def counting():
        counted.append(1)
        return [rows]

    again = fit_binary(counting, folds=3, alphas=[0.1, 100.0])
    assert again.passes == len(counted)
    assert choice.passes <= 20


def test_running_out_of_passes_is_an_error_that_names_the_penalties():
    rows = draw(60, 4, soft=False, signal=1e9)
    with pytest.raises(RuntimeError, match=r"after 6 passes for penalties \[1e-05\]"):
        fit("binary", rows, None, alphas=[1e-5, 1e9], max_passes=6)


@every_kind
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": 1.5}, "`targets` must be probabilities"),
        ({"targets": -0.5}, "`targets` must be probabilities"),
        ({"targets": math.nan}, "must be finite"),
        ({"inputs": math.inf}, "must be finite"),
        ({"sample_weights": -1.0}, "`sample_weights` must not be negative"),
        ({"folds": 3}, "at least 0 and below 3"),
        ({"folds": -1}, "at least 0 and below 3"),
    ],
)
def test_values_out_of_range_are_refused(kind, change, message):
    rows = draw(12, 2)
    parts = {name: getattr(rows, name).clone() for name in LabelledRows.__slots__}
    for name, value in change.items():
        parts[name][4] = value
    with pytest.raises(ValueError, match=message):
        fit(kind, LabelledRows(**parts), draw_ratings(12, 2))


@every_kind
def test_settings_out_of_range_are_refused(kind):
    rows, ratings = draw(12, 2), draw_ratings(12, 2)
    with pytest.raises(ValueError, match="`alphas` must be positive"):
        fit(kind, rows, ratings, alphas=[1.0, 0.0])
    same = LabelledRows(rows.inputs, rows.targets, rows.sample_weights, 0 * rows.folds)
    with pytest.raises(ValueError, match="at least two parts"):
        fit(kind, same, ratings)
    with pytest.raises(ValueError, match="at least two parts"):
        fit(kind, select(rows, slice(0)), ratings)


def test_labels_that_leave_nothing_to_fit_are_refused():
    rows, ratings = draw(12, 2), draw_ratings(12, 2)
    sure = LabelledRows(rows.inputs, (rows.folds == 0).double(), *_rest(rows))
    with pytest.raises(ValueError, match="all 0 or all 1"):
        fit("binary", sure, None)
    for values in (0 * ratings.targets + 0.3, (ratings.folds == 0).double()):
        flat = LabelledRows(ratings.inputs, values, *_rest(ratings))
        with pytest.raises(ValueError, match="all the same"):
            fit("both", rows, flat)
    with pytest.raises(ValueError, match="all the same"):
        fit("both", rows, select(ratings, ratings.folds == 0))
    with pytest.raises(ValueError, match="`noise` must be positive"):
        fit("both", rows, ratings, noise=0.0)
