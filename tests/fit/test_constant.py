"""The best constant mix, against SciPy and scikit-learn."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression

from armo.fit.constant import fit_constant_mix
from armo.fit.decorrelation import style_weights
from armo.fit.preferences import Preferences


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ranked_pairs(weights, *, beta, rows=4000, seed=0):
    """Differences of pairs drawn from the Bradley-Terry model."""
    differences = draw(rows, len(weights), seed=seed).double()
    probability = torch.sigmoid(beta * differences @ torch.tensor(weights).double())
    uniform = torch.rand(rows, generator=torch.Generator().manual_seed(seed + 1))
    return differences * torch.where(uniform < probability, 1.0, -1.0)[:, None]


def fit_pairs(differences, *, mixed, nuisance=None, decay=1e-4, margins=None, **values):
    """The constant mix of pairs, with the style of the judges where a nuisance is given."""
    count = len(differences)
    pairs = Preferences.of_pairs(
        torch.zeros(count, 0), differences, torch.arange(count), style=nuisance, **values
    )
    batch = pairs[torch.arange(count)]
    if margins is not None:
        batch = batch._replace(margins=margins)
    return fit_constant_mix(batch, mixed=mixed, nuisance=nuisance is not None, decay=decay)


def scipy_mix(differences):
    """Weights and beta as direction and sum of the best non-negative logistic coefficients."""
    values = differences.numpy()

    def loss(coefficients):
        odds = values @ coefficients
        gradient = -(values / (1.0 + np.exp(odds))[:, None]).mean(0)
        return np.logaddexp(0.0, -odds).mean(), gradient

    start, bounds = np.full(values.shape[1], 0.3), [(0.0, None)] * values.shape[1]
    best = minimize(loss, start, jac=True, bounds=bounds, options={"ftol": 1e-15, "gtol": 1e-10}).x
    return best / best.sum(), best.sum()


@pytest.mark.parametrize("seed", range(3))
def test_the_constant_mix_equals_scipys_and_recovers_the_true_weights(seed):
    differences = ranked_pairs([0.5, 0.0, 0.2, 0.3], beta=3.0, seed=seed)
    mixed = (3, 0, 2)
    mix = fit_pairs(differences, mixed=mixed, decay=0.0)
    expected, expected_beta = scipy_mix(differences[:, list(mixed)])
    np.testing.assert_allclose(mix.weights[list(mixed)].numpy(), expected, atol=1e-5)
    assert mix.beta == pytest.approx(expected_beta, rel=1e-4)
    assert float(mix.weights[1]) == 0.0
    assert mix.style.shape == (0,)
    assert mix.weights.dtype == mix.style.dtype == torch.float64
    assert mix.weights.tolist() == pytest.approx([0.5, 0.0, 0.2, 0.3], abs=0.05)
    assert mix.beta == pytest.approx(3.0, rel=0.1)


def test_the_constant_mix_gives_an_objective_that_misleads_next_to_nothing():
    differences = ranked_pairs([0.8, -0.4, 0.2], beta=2.0)
    mix = fit_pairs(differences, mixed=(0, 1, 2))
    expected, expected_beta = scipy_mix(differences)
    assert expected[1] == 0.0
    np.testing.assert_allclose(mix.weights.numpy(), expected, atol=0.02)
    assert mix.beta == pytest.approx(expected_beta, rel=0.05)
    assert (mix.weights > 0).all()


def slow_mix(differences, nuisance, weights, *, decay, flipped=0.0, margins=0.0):
    """Weights, beta and style coefficients of the penalised loss, minimised by SciPy."""
    values, measured, each = differences.numpy(), nuisance.numpy(), weights.numpy()
    count = values.shape[1]

    def loss(parameters):
        logits, log_beta, style = np.split(parameters, [count, count + 1])
        odds = np.exp(log_beta[0]) * values @ softmax(logits) + measured @ style - margins
        penalty = ((logits - logits.mean()) ** 2).sum() + log_beta[0] ** 2 + (style**2).sum()
        losses = (1.0 - flipped) * np.logaddexp(0.0, -odds) + flipped * np.logaddexp(0.0, odds)
        return (losses * each).sum() / each.sum() + decay * penalty

    start = np.zeros(count + 1 + measured.shape[1])
    best = minimize(loss, start, method="BFGS", options={"gtol": 1e-9}).x
    return softmax(best[:count]), np.exp(best[count]), best[count + 1 :]


@pytest.mark.parametrize("decay", [1e-4, 0.02])
@pytest.mark.parametrize("seed", range(2))
def test_the_constant_mix_with_nuisance_weights_votes_and_margins_equals_scipys(seed, decay):
    differences = ranked_pairs([0.5, 0.1, 0.4, 0.6, -0.3], beta=2.0, rows=500, seed=seed)
    nuisance, differences = differences[:, 3:], differences[:, :3]
    weights = draw(500, seed=seed + 5).double().exp()
    flipped = (draw(500, seed=seed + 6).double() - 2.0).sigmoid()
    margins = draw(500, seed=seed + 7).double().abs()
    how = {"nuisance": nuisance, "weights": weights, "flipped": flipped, "margins": margins}
    mix = fit_pairs(differences, mixed=(0, 1, 2), decay=decay, **how)
    expected, beta, style = slow_mix(
        differences,
        nuisance,
        weights,
        decay=decay,
        flipped=flipped.numpy(),
        margins=margins.numpy(),
    )
    np.testing.assert_allclose(mix.weights.numpy(), expected, atol=1e-4)
    assert mix.beta == pytest.approx(beta, rel=1e-4)
    np.testing.assert_allclose(mix.style.numpy(), style, atol=1e-4)
    for name in how:
        without = {key: value for key, value in how.items() if key != name}
        other = fit_pairs(differences, mixed=(0, 1, 2), decay=decay, **without)
        moved = (other.weights - mix.weights).abs().max() + abs(other.beta - mix.beta)
        assert moved > 0.01, name


@given(st.integers(0, 99), st.integers(0, 3))
def test_one_objective_with_nuisance_is_scikit_learns_weighted_logistic_regression(seed, columns):
    differences = ranked_pairs([1.0, 0.6, -0.3, 0.1][: columns + 1], beta=1.5, rows=300, seed=seed)
    weights = draw(300, seed=seed + 5).double().exp()
    votes = (draw(300, seed=seed + 6).double() - 1.0).sigmoid()
    mix = fit_pairs(
        differences[:, :1],
        mixed=(0,),
        nuisance=differences[:, 1:],
        weights=weights,
        flipped=votes,
        decay=0.0,
    )
    model = LogisticRegression(fit_intercept=False, C=1e10, tol=1e-10, max_iter=1000)
    model.fit(
        differences.repeat(2, 1).numpy(),
        [1] * 300 + [0] * 300,
        sample_weight=torch.cat([weights * (1.0 - votes), weights * votes]).numpy(),
    )
    assert mix.weights.tolist() == [1.0]
    found, expected = [mix.beta, *mix.style.tolist()], model.coef_[0].tolist()
    if expected[0] > 0.05:  # beta is positive by construction
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("seed", range(2))
def test_the_constant_mix_of_lists_is_the_best_conditional_logit(seed):
    """One best of up to four: McFadden's conditional logit, minimised by SciPy."""
    lists, width, true = 400, 4, np.array([0.6, 0.3, 0.1])
    rng = np.random.default_rng(seed)
    rewards, counts = rng.normal(size=(lists, width, 3)), rng.integers(2, width + 1, lists)
    there = np.arange(width) < counts[:, None]
    utility = np.where(there, 3.0 * rewards @ true + rng.gumbel(size=(lists, width)), -np.inf)
    best = utility.argmax(1)
    ranks = torch.ones(lists, width, dtype=torch.float64)
    ranks[torch.arange(lists), torch.tensor(best)] = 0.0
    ranks[torch.tensor(~there)] = torch.nan
    none = torch.zeros(lists, dtype=torch.float64)
    responses = torch.arange(lists * width).reshape(lists, width)
    preferences = Preferences(
        prompts=torch.zeros(1, 2),
        adjusted=torch.tensor(rewards).reshape(-1, 3),
        style=torch.zeros(lists * width, 0, dtype=torch.float64),
        prompt_of=torch.zeros(lists, dtype=torch.int64),
        responses=responses.masked_fill(torch.tensor(~there), -1),
        ranks=ranks,
        groups=torch.arange(lists),
        weights=none + 1.0,
        balance=none + 1.0,
        strengths=none,
        margins=none,
        flipped=none,
        folds=torch.zeros(lists, dtype=torch.int64),
    )
    mix = fit_constant_mix(preferences[torch.arange(lists)], mixed=(0, 1, 2), decay=0.0)

    def loss(coefficients):
        odds = np.where(there, rewards @ coefficients, -np.inf)
        return (logsumexp(odds, axis=1) - odds[np.arange(lists), best]).mean()

    found = minimize(loss, np.ones(3), bounds=[(0.0, None)] * 3, options={"gtol": 1e-9}).x
    np.testing.assert_allclose(mix.weights.numpy(), found / found.sum(), atol=1e-3)
    assert mix.beta == pytest.approx(found.sum(), rel=1e-3)
    assert mix.weights.tolist() == pytest.approx(true.tolist(), abs=0.1)


def test_a_pair_of_weight_two_counts_as_two_pairs_and_one_of_no_weight_not_at_all():
    differences = ranked_pairs([0.8, 0.2], beta=2.0, rows=200)
    other = ranked_pairs([0.1, 0.9], beta=2.0, rows=200)
    both = torch.cat([differences, other])
    counts = torch.cat([torch.ones(100), torch.full((100,), 2.0), torch.zeros(200)])
    mix = fit_pairs(both, mixed=(0, 1), weights=counts)
    repeated = fit_pairs(both.repeat_interleave(counts.long(), dim=0), mixed=(0, 1))
    torch.testing.assert_close(mix.weights, repeated.weights, atol=1e-5, rtol=0)
    assert mix.beta == pytest.approx(repeated.beta, rel=1e-4)
    larger = fit_pairs(both, mixed=(0, 1), weights=7.0 * counts)
    torch.testing.assert_close(larger.weights, mix.weights, atol=1e-5, rtol=0)
    ignored = fit_pairs(both, mixed=(0, 1))
    assert (ignored.weights - mix.weights).abs().max() > 0.1


def test_permuting_objectives_permutes_the_weights():
    differences = ranked_pairs([0.5, 0.3, 0.2], beta=2.0, rows=300)
    order = [2, 0, 1]
    mix = fit_pairs(differences, mixed=(0, 1, 2))
    permuted = fit_pairs(differences[:, order], mixed=(0, 1, 2))
    torch.testing.assert_close(permuted.weights, mix.weights[order], atol=1e-5, rtol=0)


def test_the_prompts_are_not_looked_at():
    differences = ranked_pairs([0.5, 0.5], beta=2.0, rows=50)
    mixes = []
    for prompts in (torch.zeros(50, 3), draw(50, 3)):
        pairs = Preferences.of_pairs(prompts, differences, torch.arange(50))
        mixes.append(fit_constant_mix(pairs[torch.arange(50)], mixed=(0, 1)))
    assert torch.equal(mixes[0].weights, mixes[1].weights)


class Judged:
    """Pairs of judges who pay for two qualities and for length itself.

    The third objective follows length and has no quality of its own.
    """

    true = (0.7, 0.3, 0.0)

    def __init__(self, *, pay=1.5, rows=12000, seed=0):
        self.length = 2.0 * draw(rows, 1, seed=seed).double()
        qualities = draw(rows, 2, seed=seed + 1).double()
        follower = 0.8 * self.length / 2.0 + 0.6 * draw(rows, 1, seed=seed + 2).double()
        self.rewards = torch.cat([qualities, follower], dim=1)
        logits = 2.0 * self.rewards @ torch.tensor(self.true).double()
        logits = logits + pay * self.length[:, 0] / 2.0
        uniform = torch.rand(rows, generator=torch.Generator().manual_seed(seed + 3))
        order = torch.where(uniform < torch.sigmoid(logits), 1.0, -1.0)[:, None].double()
        self.differences, self.nuisance = order * self.rewards, order * self.length

    def follows(self, weights):
        """Rank correlation of the score with length, in whatever order."""
        return float(spearmanr((self.rewards * weights).sum(1), self.length[:, 0])[0])


def test_with_nuisance_the_constant_mix_finds_the_quality_that_judges_pay_for_and_without_not():
    judged = Judged()
    without = fit_pairs(judged.differences, mixed=(0, 1, 2))
    mix = fit_pairs(judged.differences, mixed=(0, 1, 2), nuisance=judged.nuisance)
    assert mix.weights.tolist() == pytest.approx(judged.true, abs=0.05)
    assert mix.beta == pytest.approx(2.0, rel=0.1)
    assert mix.style.tolist() == pytest.approx([0.75], rel=0.1)
    assert float(without.weights[2]) > 0.2
    assert abs(judged.follows(mix.weights)) < 0.1
    assert judged.follows(without.weights) > 0.3


def test_style_that_is_measured_but_no_nuisance_changes_nothing():
    judged = Judged(rows=500)
    pairs = Preferences.of_pairs(
        torch.zeros(500, 0), judged.differences, torch.arange(500), style=judged.nuisance
    )
    mix = fit_constant_mix(pairs[torch.arange(500)], mixed=(0, 1, 2))
    plain = fit_pairs(judged.differences, mixed=(0, 1, 2))
    assert mix.style.tolist() == [0.0]
    assert torch.equal(mix.weights, plain.weights)


def test_where_judges_pay_nothing_for_length_nuisance_changes_nothing():
    judged = Judged(pay=0.0)
    without = fit_pairs(judged.differences, mixed=(0, 1, 2))
    mix = fit_pairs(judged.differences, mixed=(0, 1, 2), nuisance=judged.nuisance)
    torch.testing.assert_close(mix.weights, without.weights, atol=0.03, rtol=0)
    assert mix.style.tolist() == pytest.approx([0.0], abs=0.05)


def test_reweighted_pairs_give_less_to_what_follows_length():
    judged = Judged()
    weights = style_weights(judged.nuisance)
    without = fit_pairs(judged.differences, mixed=(0, 1, 2))
    mix = fit_pairs(judged.differences, mixed=(0, 1, 2), weights=weights)
    assert float(mix.weights[2]) < 0.5 * float(without.weights[2])
    assert judged.follows(mix.weights) < 0.5 * judged.follows(without.weights)


def test_the_constant_mix_stays_finite_where_the_pairs_can_be_separated():
    differences = draw(50, 3).double().abs()
    mix = fit_pairs(differences, mixed=(0, 1), nuisance=differences[:, 2:])
    assert mix.weights.isfinite().all()
    assert float(mix.weights.sum()) == pytest.approx(1.0)
    assert math.isfinite(mix.beta)
    assert mix.style.isfinite().all()


def test_a_long_list_changes_nothing_for_the_pairs_beside_it():
    differences = ranked_pairs([0.5, 0.2, 0.3], beta=2.0, rows=300)
    pairs = Preferences.of_pairs(draw(300, 1), differences, torch.arange(300))
    wide = replace(
        pairs,
        responses=torch.nn.functional.pad(pairs.responses, (0, 6), value=-1),
        ranks=torch.nn.functional.pad(pairs.ranks.double(), (0, 6), value=torch.nan),
    )
    # One list of eight that counts for nothing.
    wide.responses[0] = torch.arange(8)
    wide.ranks[0] = torch.arange(8.0)
    weights = torch.ones(300, dtype=torch.float64)
    weights[0] = 0.0
    rows = torch.arange(300)
    found, alone = (
        fit_constant_mix(replace(data, weights=weights).comparisons(rows), mixed=(0, 1, 2))
        for data in (wide, pairs)
    )
    torch.testing.assert_close(found.weights, alone.weights, atol=1e-6, rtol=0)
    assert found.beta == pytest.approx(alone.beta, rel=1e-5)
