"""Preferences as tensors: the loss of pairs, ties, lists and rankings, and what measures them."""

import itertools
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from armo.fit.preferences import (
    Batches,
    Preferences,
    on_first,
    plackett_luce_loss,
    ranked_right,
    style_correlations,
)

NAN = math.nan
PAIR = torch.tensor([[0.0, 1.0]], dtype=torch.float64)


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def row(*values):
    return torch.tensor([values], dtype=torch.float64)


@st.composite
def comparisons(draw_from, *, most=5):
    """Logits and ranks of one comparison, without padding; ranks may tie."""
    count = draw_from(st.integers(2, most))
    logits = draw_from(st.lists(st.floats(-9, 9), min_size=count, max_size=count))
    ranks = draw_from(st.lists(st.sampled_from([0, 1, 2.5, 7]), min_size=count, max_size=count))
    return logits, ranks


def slow_loss(logits, ranks, flipped=0.0):
    """The documented loss of one comparison, draw by draw and response by response."""
    there = [k for k, rank in enumerate(ranks) if not math.isnan(rank)]
    distinct = sorted({ranks[k] for k in there})
    total = 0.0
    for rank in distinct[:-1] if len(distinct) > 1 else distinct:
        left = [k for k in there if ranks[k] >= rank]
        tied = [k for k in left if ranks[k] == rank]
        target = dict.fromkeys(left, 0.0)
        for best in tied:
            for k in left:
                share = 1.0 - flipped if k == best else flipped / (len(left) - 1)
                target[k] += share / len(tied)
        norm = math.log(sum(math.exp(logits[k]) for k in left))
        total -= sum(target[k] * (logits[k] - norm) for k in left)
    return total


# ---------------------------------------------------------------------------------- the loss


@given(st.floats(-20, 20), st.floats(-20, 20))
def test_the_loss_of_a_pair_is_minus_log_sigmoid_of_the_difference(first, second):
    expected = -math.log(1.0 / (1.0 + math.exp(second - first)))
    assert float(plackett_luce_loss(row(first, second), PAIR)) == pytest.approx(expected, abs=1e-12)
    swapped = plackett_luce_loss(row(second, first), row(1.0, 0.0))
    assert float(swapped) == pytest.approx(expected, abs=1e-12)


@given(st.floats(-20, 20), st.floats(-20, 20))
def test_a_tie_of_two_is_half_a_pair_either_way_round(first, second):
    logits = row(first, second)
    halves = 0.5 * (plackett_luce_loss(logits, PAIR) + plackett_luce_loss(logits, row(1.0, 0.0)))
    torch.testing.assert_close(plackett_luce_loss(logits, row(3.0, 3.0)), halves)
    half = torch.tensor([0.5], dtype=torch.float64)
    torch.testing.assert_close(plackett_luce_loss(logits, PAIR, flipped=half), halves)


@given(st.integers(2, 6), st.integers(0, 99))
def test_one_best_of_several_is_the_cross_entropy_of_torch(count, seed):
    logits = 3.0 * draw(8, count, seed=seed)
    best = torch.randint(count, (8,), generator=torch.Generator().manual_seed(seed))
    ranks = 1.0 - F.one_hot(best, count).double()
    found = plackett_luce_loss(logits, ranks)
    torch.testing.assert_close(found, F.cross_entropy(logits, best, reduction="none"))


@given(st.integers(2, 6), st.integers(0, 99), st.floats(0.01, 0.45))
def test_several_right_responses_share_the_target_and_smoothing_is_that_of_torch(
    count, seed, flipped
):
    logits = 3.0 * draw(8, count, seed=seed)
    best = torch.randint(count, (8,), generator=torch.Generator().manual_seed(seed))
    ranks = 1.0 - F.one_hot(best, count).double()
    found = plackett_luce_loss(logits, ranks, flipped=torch.full((8,), flipped).double())
    # Torch gives `smoothing / count` to every class, the right one too.
    smoothing = flipped * count / (count - 1)
    expected = F.cross_entropy(logits, best, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(found, expected)
    # With two right responses among others, the target is a half for each.
    if count > 2:
        ranks[:, 0] = ranks[:, 1] = -1.0
        target = F.pad(torch.full((8, 2), 0.5).double(), (0, count - 2))
        expected = F.cross_entropy(logits, target, reduction="none")
        ranks[:, 2:] = 0.0
        torch.testing.assert_close(plackett_luce_loss(logits, ranks), expected)


@given(st.integers(2, 5), st.integers(0, 99))
def test_the_probabilities_of_all_strict_rankings_are_luces_and_sum_to_one(count, seed):
    logits = 2.0 * draw(1, count, seed=seed)
    total = 0.0
    for order in itertools.permutations(range(count)):
        probability = 1.0
        for place in range(count):
            left = [math.exp(float(logits[0, k])) for k in order[place:]]
            probability *= left[0] / sum(left)
        ranks = torch.empty(1, count, dtype=torch.float64)
        ranks[0, list(order)] = torch.arange(count).double()
        found = math.exp(-float(plackett_luce_loss(logits, ranks)))
        assert found == pytest.approx(probability, rel=1e-9)
        total += found
    assert total == pytest.approx(1.0, rel=1e-9)


@given(comparisons(), st.floats(0.0, 1.0))
def test_the_loss_is_the_documented_one_written_out_draw_by_draw(comparison, flipped):
    logits, ranks = comparison
    found = plackett_luce_loss(
        row(*logits), row(*ranks), flipped=torch.tensor([flipped], dtype=torch.float64)
    )
    assert float(found) == pytest.approx(slow_loss(logits, ranks, flipped), rel=1e-9, abs=1e-9)
    plain = plackett_luce_loss(row(*logits), row(*ranks))
    assert float(plain) == pytest.approx(slow_loss(logits, ranks), rel=1e-9, abs=1e-9)


@given(comparisons(), st.randoms(use_true_random=False), st.floats(-50, 50))
def test_order_and_a_constant_change_nothing_and_only_the_order_of_ranks_counts(
    comparison, random, constant
):
    logits, ranks = comparison
    flipped = torch.tensor([0.2], dtype=torch.float64)
    expected = plackett_luce_loss(row(*logits), row(*ranks), flipped=flipped)
    order = random.sample(range(len(logits)), len(logits))
    permuted = row(*(logits[k] for k in order)), row(*(ranks[k] for k in order))
    torch.testing.assert_close(plackett_luce_loss(*permuted, flipped=flipped), expected)
    moved = plackett_luce_loss(row(*logits) + constant, row(*ranks), flipped=flipped)
    torch.testing.assert_close(moved, expected)
    other = plackett_luce_loss(row(*logits), 10.0 * row(*ranks).exp(), flipped=flipped)
    torch.testing.assert_close(other, expected)


@given(comparisons(), st.integers(1, 3), st.floats(-9, 9))
def test_padding_changes_neither_the_loss_nor_the_gradient(comparison, padding, value):
    logits, ranks = comparison
    flipped = torch.tensor([0.2], dtype=torch.float64)
    plain = row(*logits).requires_grad_()
    padded = row(*logits, *[value] * padding).requires_grad_()
    loss = plackett_luce_loss(plain, row(*ranks), flipped=flipped)
    same = plackett_luce_loss(padded, row(*ranks, *[NAN] * padding), flipped=flipped)
    torch.testing.assert_close(same, loss)
    loss.sum().backward()
    same.sum().backward()
    torch.testing.assert_close(padded.grad, F.pad(plain.grad, (0, padding)))


def test_rows_do_not_look_at_each_other_and_models_share_their_ranks():
    logits = draw(3, 4, 5)
    ranks = torch.tensor(
        [[0, 1, 2, 3, 4], [0, 0, 1, 1, NAN], [1, 0, NAN, NAN, NAN], [2, 2, 2, NAN, NAN]]
    ).double()
    flipped = torch.tensor([0.0, 0.1, 0.3, 0.5]).double()
    together = plackett_luce_loss(logits, ranks, flipped=flipped)
    for model, b in itertools.product(range(3), range(4)):
        expected = slow_loss(logits[model, b].tolist(), ranks[b].tolist(), float(flipped[b]))
        assert float(together[model, b]) == pytest.approx(expected)
        alone = plackett_luce_loss(logits[model, b : b + 1], ranks[b : b + 1], flipped=flipped[[b]])
        torch.testing.assert_close(alone[0], together[model, b])


@pytest.mark.parametrize(
    "ranks", [(0, 1, 2, 3), (0, 1, 1, 1), (0, 0, 1, 2), (1, 1, 1, 1), (2, 0, NAN, NAN)]
)
def test_the_gradient_is_that_of_finite_differences(ranks):
    order, flipped = row(*ranks), torch.tensor([0.15], dtype=torch.float64)
    logits = draw(2, 1, 4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda values: plackett_luce_loss(values, order, flipped=flipped), (logits,)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", [(0, 1, 2), (0, 0, 1), (1, 1, 1), (0, 1, NAN)])
def test_loss_and_gradient_are_finite_for_scores_far_apart(ranks, dtype):
    for signs in itertools.product([-1e6, 0.0, 1e6], repeat=3):
        logits = torch.tensor([signs], dtype=dtype, requires_grad=True)
        flipped = torch.tensor([0.1], dtype=dtype)
        for how in ({}, {"flipped": flipped}):
            loss = plackett_luce_loss(logits, row(*ranks).to(dtype), **how)
            assert loss.isfinite().all()
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
            assert gradient.isfinite().all()
    assert float(plackett_luce_loss(row(-1e6, 1e6), PAIR)) == pytest.approx(2e6)


@given(st.floats(-9, 9), st.floats(0.0, 1.0))
def test_a_pair_that_may_be_the_wrong_way_round_has_the_loss_of_both_ways(difference, flipped):
    found = plackett_luce_loss(
        row(difference, 0.0), PAIR, flipped=torch.tensor([flipped], dtype=torch.float64)
    )
    right, wrong = (-math.log(1 / (1 + math.exp(-way * difference))) for way in (1, -1))
    assert float(found) == pytest.approx((1 - flipped) * right + flipped * wrong, abs=1e-12)


@given(st.integers(0, 30))
def test_minimising_the_loss_with_votes_and_weights_is_scikit_learns_logistic_regression(seed):
    rows, differences = 60, draw(60, 2, seed=seed)
    votes = torch.rand(rows, generator=torch.Generator().manual_seed(seed)).double()
    weights = draw(rows, seed=seed + 1).exp()
    # Each pair is there both ways round, the second as often as it is the wrong one.
    model = LogisticRegression(fit_intercept=False, C=1e10, tol=1e-10, max_iter=1000)
    model.fit(
        differences.repeat(2, 1).numpy(),
        [1] * rows + [0] * rows,
        sample_weight=torch.cat([weights * (1.0 - votes), weights * votes]).numpy(),
    )
    coefficients = torch.tensor(model.coef_[0]).requires_grad_()
    odds = torch.stack([differences @ coefficients, torch.zeros(rows).double()], dim=1)
    losses = plackett_luce_loss(odds, PAIR.expand(rows, 2), flipped=votes)
    ((losses * weights).sum() / weights.sum()).backward()
    torch.testing.assert_close(coefficients.grad, torch.zeros_like(coefficients), atol=1e-4, rtol=0)


def test_the_loss_falls_as_the_chosen_response_gains():
    logits = torch.tensor([[-2.0, 0.0], [0.0, 0.0], [3.0, 0.0]], requires_grad=True)
    plackett_luce_loss(logits, torch.tensor([[0.0, 1.0]]).expand(3, 2)).sum().backward()
    expected = [-1.0 / (1.0 + math.exp(d)) for d in (-2.0, 0.0, 3.0)]
    assert logits.grad[:, 0].tolist() == pytest.approx(expected, rel=1e-5)
    assert logits.grad[:, 1].tolist() == pytest.approx([-g for g in expected], rel=1e-5)


def test_a_margin_on_the_first_response_is_taken_off_its_log_odds():
    margins = torch.tensor([1.5, 0.0]).double()
    assert on_first(margins, 3).tolist() == [[1.5, 0.0, 0.0], [0.0, 0.0, 0.0]]
    logits = draw(2, 2)
    found = plackett_luce_loss(logits - on_first(margins, 2), PAIR.expand(2, 2))
    expected = -F.logsigmoid(logits[:, 0] - logits[:, 1] - margins)
    torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------------------------- measures


@given(comparisons(), st.booleans())
def test_ranked_right_counts_the_ordered_pairs_one_by_one(comparison, rounded):
    scores, ranks = comparison
    scores = [float(round(s / 4)) for s in scores] if rounded else scores
    counted = []
    for i, j in itertools.permutations(range(len(scores)), 2):
        if ranks[i] < ranks[j]:
            apart = scores[i] - scores[j]
            counted.append(1.0 if apart > 0 else 0.5 if apart == 0 else 0.0)
    expected = sum(counted) / len(counted) if counted else NAN
    found = ranked_right(row(*scores), row(*ranks))
    assert float(found) == pytest.approx(expected, nan_ok=True)
    padded = ranked_right(row(*scores, 99.0, -99.0), row(*ranks, NAN, NAN))
    assert float(padded) == pytest.approx(expected, nan_ok=True)


def test_ranked_right_takes_several_models_at_once():
    scores, ranks = draw(3, 4, 3), torch.tensor([[0.0, 1.0, 1.0]]).double().expand(4, 3)
    together = ranked_right(scores, ranks)
    for model in range(3):
        torch.testing.assert_close(together[model], ranked_right(scores[model], ranks))
    assert together.unique().numel() > 1


@given(st.integers(0, 99))
def test_the_style_correlation_of_pairs_is_that_about_zero_of_their_differences(seed):
    scores, style = draw(20, 2, seed=seed), draw(20, 2, 3, seed=seed + 1)
    weights = draw(20, seed=seed + 2).exp()
    found = style_correlations(scores, style, PAIR.expand(20, 2), weights=weights)
    u, z, w = (scores[:, 0] - scores[:, 1]), (style[:, 0] - style[:, 1]), weights
    for f in range(3):
        product = float((w * u * z[:, f]).sum())
        expected = product / math.sqrt(float((w * u**2).sum() * (w * z[:, f] ** 2).sum()))
        assert float(found[f]) == pytest.approx(expected, rel=1e-9)


@given(st.integers(0, 99))
def test_the_style_correlation_of_lists_is_numpys_of_what_is_left_of_their_means(seed):
    counts = np.random.default_rng(seed).integers(2, 6, size=12)
    scores, style = draw(12, 6, seed=seed) + 5.0, draw(12, 6, 2, seed=seed + 1) - 9.0
    ranks = torch.arange(6).double().repeat(12, 1)
    for b, count in enumerate(counts):
        ranks[b, count:] = NAN
    # Weights of one or two are rows that come once or twice.
    repeats = torch.tensor(np.random.default_rng(seed + 1).integers(1, 3, size=12))
    u, z = [], []
    for b in torch.arange(12).repeat_interleave(repeats).tolist():
        n = counts[b]
        u.extend((scores[b, :n] - scores[b, :n].mean()).tolist())
        z.extend((style[b, :n] - style[b, :n].mean(0)).tolist())
    expected = [np.corrcoef(u, np.array(z)[:, f])[0, 1] for f in range(2)]
    found = style_correlations(scores, style, ranks, weights=repeats.double())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)
    both = style_correlations(
        torch.stack([scores, -scores]),
        style,
        ranks,
        weights=torch.stack([repeats.double(), 3.0 * repeats]),
    )
    np.testing.assert_allclose(both.numpy(), [expected, [-e for e in expected]], rtol=1e-9)


def test_what_is_constant_within_comparisons_correlates_with_nothing_and_has_finite_gradients():
    scores = torch.ones(4, 2, requires_grad=True)
    style = torch.randn(4, 2, 1, generator=torch.Generator().manual_seed(0))
    ranks = torch.tensor([[0.0, 1.0]]).expand(4, 2)
    found = style_correlations(scores, style, ranks, weights=torch.ones(4))
    assert found.tolist() == [0.0]
    found.square().sum().backward()
    assert scores.grad.isfinite().all()
    same = torch.ones(4, 2, 1)
    varied = torch.arange(8.0).reshape(4, 2)
    assert style_correlations(varied, same, ranks, weights=torch.ones(4)).tolist() == [0.0]
    # Without a comparison that counts, likewise.
    assert style_correlations(varied, style, ranks, weights=torch.zeros(4)).tolist() == [0.0]


# ------------------------------------------------------------------------------- preferences


def make_lists(lengths, *, width, seed=0, dim=3, features=2):
    """Lists of given lengths that share prompts and responses, padded to a given width."""
    count, pool = len(lengths), 9
    generator = torch.Generator().manual_seed(seed)
    responses = torch.stack([torch.randperm(pool, generator=generator) for _ in lengths])[:, :width]
    ranks = torch.rand(count, width, generator=generator, dtype=torch.float64)
    for b, length in enumerate(lengths):
        responses[b, length:], ranks[b, length:] = -1, NAN
    return Preferences(
        prompts=draw(4, dim, seed=seed),
        adjusted=draw(pool, 2, seed=seed + 1),
        style=draw(pool, features, seed=seed + 2),
        prompt_of=torch.randint(4, (count,), generator=generator),
        responses=responses,
        ranks=ranks,
        groups=torch.arange(count),
        weights=draw(count, seed=seed + 3).exp(),
        balance=draw(count, seed=seed + 6).exp(),
        strengths=draw(count, seed=seed + 4).exp(),
        margins=draw(count, seed=seed + 5),
        flipped=torch.rand(count, generator=generator, dtype=torch.float64),
        folds=torch.randint(3, (count,), generator=generator),
    )


@given(
    lengths=st.lists(st.integers(2, 6), min_size=1, max_size=8),
    features=st.integers(0, 2),
    data=st.data(),
)
def test_a_batch_holds_what_its_rows_name_and_pads_only_to_its_longest(lengths, features, data):
    preferences = make_lists(lengths, width=6, features=features)
    assert len(preferences) == len(lengths)
    every = st.sampled_from(range(len(lengths)))
    rows = data.draw(st.lists(every, min_size=1, max_size=6))
    batch = preferences[torch.tensor(rows)]
    longest = max(lengths[b] for b in rows)
    assert batch.adjusted.shape == (len(rows), longest, 2)
    assert batch.style.shape == (len(rows), longest, features)
    for place, b in enumerate(rows):
        n = lengths[b]
        assert torch.equal(batch.prompts[place], preferences.prompts[preferences.prompt_of[b]])
        for k in range(longest):
            response = int(preferences.responses[b, k])
            there = k < n
            assert (response >= 0) == there
            for found, every_one in (
                (batch.adjusted, preferences.adjusted),
                (batch.style, preferences.style),
            ):
                expected = every_one[response] if there else torch.zeros_like(every_one[0])
                assert torch.equal(found[place, k], expected)
        assert torch.equal(batch.ranks[place, :n], preferences.ranks[b, :n])
        assert batch.ranks[place, n:].isnan().all()
        for name in ("weights", "margins", "flipped", "folds"):
            assert getattr(batch, name)[place] == getattr(preferences, name)[b]


def test_comparisons_without_prompts_are_otherwise_the_same():
    preferences = make_lists([2, 4, 3], width=5)
    rows = torch.tensor([2, 1])
    whole, bare = preferences[rows], preferences.comparisons(rows)
    assert bare.prompts.shape == (2, 0)
    for name in set(whole._fields) - {"prompts"}:
        torch.testing.assert_close(getattr(bare, name), getattr(whole, name), equal_nan=True)


@pytest.mark.parametrize("extra", [False, True])
def test_pairs_of_differences_are_the_same_as_pairs_of_responses(extra):
    prompts, chosen, rejected = draw(5, 3), draw(5, 2, seed=1), draw(5, 2, seed=2)
    measured = (draw(5, 4, seed=3), draw(5, 4, seed=4)) if extra else (draw(5, 0), draw(5, 0))
    values = {
        "weights": draw(5, seed=5).exp(),
        "balance": draw(5, seed=8).exp(),
        "strengths": draw(5, seed=6).exp(),
        "flipped": draw(5, seed=7).sigmoid(),
    }
    groups = torch.tensor([4, 4, 2, 0, 1])
    given = values | {"style": measured[0] - measured[1]} if extra else {}
    found = Preferences.of_pairs(prompts, chosen - rejected, groups, **given)
    zeros = torch.zeros(5, dtype=torch.float64)
    ones = {"weights": zeros + 1.0, "balance": zeros + 1.0}
    usual = {**ones, "strengths": zeros + NAN, "flipped": zeros}
    explicit = Preferences(
        prompts=prompts,
        adjusted=torch.cat([chosen, rejected]),
        style=torch.cat(measured),
        prompt_of=torch.arange(5),
        responses=torch.arange(10).reshape(2, 5).T,
        ranks=PAIR.expand(5, 2),
        groups=groups,
        margins=zeros,
        folds=torch.zeros(5, dtype=torch.int64),
        **(values if extra else usual),
    )
    one, other = (p[torch.tensor([3, 0, 4])] for p in (found, explicit))
    for a, b in (("adjusted", one.adjusted), ("style", one.style)):
        wanted = getattr(other, a)
        torch.testing.assert_close(b[:, 0] - b[:, 1], wanted[:, 0] - wanted[:, 1])
    assert torch.equal(one.ranks.double(), other.ranks)
    for name in ("prompts", "weights", "margins", "flipped", "folds"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert torch.equal(found.balance, explicit.balance)
    assert torch.equal(found.groups, groups)
    torch.testing.assert_close(found.strengths, explicit.strengths, equal_nan=True)


def test_single_precision_changes_the_floats_only():
    preferences = make_lists([2, 4, 3], width=4)
    single = preferences.single()
    for field in fields(Preferences):
        before, after = (getattr(p, field.name) for p in (preferences, single))
        assert after.dtype == (torch.float32 if before.is_floating_point() else torch.int64)
        torch.testing.assert_close(after, before.to(after.dtype), equal_nan=True)


def test_the_digest_is_of_the_values_of_every_tensor():
    preferences = make_lists([2, 4, 3], width=4)
    same = make_lists([2, 4, 3], width=4)
    assert same.digest == preferences.digest
    for field in fields(Preferences):
        values = getattr(preferences, field.name).clone()
        values.view(-1)[0] += 1
        other = replace(preferences, **{field.name: values})
        assert other.digest != preferences.digest, field.name


@pytest.mark.parametrize("name", ["responses", "prompt_of", "weights"])
def test_the_digest_is_another_when_values_trade_places(name):
    preferences = Preferences.of_pairs(draw(6, 3), draw(6, 2, seed=1), torch.arange(6))
    values = getattr(replace(preferences, weights=draw(6, seed=2).exp()), name)
    preferences = replace(preferences, **{name: values})
    # The pairs the other way round, or prompts or weights in another order.
    other = replace(preferences, **{name: values.flip(-1).contiguous()})
    assert other.digest != preferences.digest


# ----------------------------------------------------------------------------------- batches


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_every_row_comes_once_per_epoch_in_batches_of_the_size(count, size, seed, epoch):
    batches = Batches(count, size=size, seed=seed)
    batches.set_epoch(epoch)
    found = list(batches)
    assert sorted(torch.cat(found).tolist()) == list(range(count))
    assert [len(rows) for rows in found[:-1]] == [size] * (len(found) - 1)
    assert 1 <= len(found[-1]) <= size
    assert len(found) == len(batches)


def test_without_a_seed_the_rows_keep_their_order():
    batches = Batches(7, size=3)
    batches.set_epoch(5)
    assert [rows.tolist() for rows in batches] == [[0, 1, 2], [3, 4, 5], [6]]


def test_the_order_depends_on_seed_and_epoch_only():
    def order(seed, epoch, size=4):
        batches = Batches(30, size=size, seed=seed)
        batches.set_epoch(epoch)
        torch.manual_seed(epoch)
        return tuple(torch.cat(list(batches)).tolist())

    orders = {order(seed, epoch) for seed in range(4) for epoch in range(5)}
    assert len(orders) == 20
    assert order(1, 3) == order(1, 3) == order(1, 3, size=30)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(Batches(30, size=4, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


@given(st.integers(2, 40), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2))
def test_several_processes_get_equal_shares_that_cover_every_row(count, size, world, epoch):
    shares = []
    for rank in range(world):
        batches = Batches(count, size=size, seed=0, rank=rank, world=world)
        batches.set_epoch(epoch)
        shares.append([rows.tolist() for rows in batches])
        assert len(shares[-1]) == len(batches)
    assert len({tuple(map(len, share)) for share in shares}) == 1
    rows = [row for share in shares for batch in share for row in batch]
    assert set(rows) == set(range(count))
    assert len(rows) == math.ceil(count / world) * world
