"""Best of N against all choices of N, one by one."""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armo.data.conversation import Message, ResponseList
from armo.data.surface import surface_features
from armo.report.best_of_n import (
    RIVALS,
    best_of_n,
    best_of_n_table,
    kl_of_best,
    winner_weights,
)
from armo.report.metrics import bootstrap_interval


def weights_by_hand(scores, size):
    """How often each response wins among all choices of `size`, ties sharing the win."""
    won = [0.0] * len(scores)
    draws = list(combinations(range(len(scores)), size))
    for draw in draws:
        best = max(scores[k] for k in draw)
        winners = [k for k in draw if scores[k] == best]
        for k in winners:
            won[k] += 1 / len(winners)
    return [share / len(draws) for share in won]


def lists_of(*counts, prompts=None):
    """Lists of that many responses, of as many words and bold marks as their number drawn."""
    generator = np.random.default_rng(0)
    rows = []
    for k, count in enumerate(counts):
        prompt = k if prompts is None else prompts[k]
        texts = tuple(
            " ".join(["word", *["**mark**"] * int(marks), *["more"] * int(words)])
            for words, marks in generator.integers(0, 9, size=(count, 2))
        )
        rows.append(ResponseList(f"{k}", "test", (Message("user", f"prompt {prompt}"),), texts))
    return rows


def problem(*counts, models=2, seed=0, prompts=None):
    rows = lists_of(*counts, prompts=prompts)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(models, sum(counts), generator=generator, dtype=torch.float64)
    gold = torch.rand(sum(counts), generator=generator, dtype=torch.float64)
    surface = surface_features([text for row in rows for text in row.responses])
    return scores, rows, gold, surface


# Few values, so that ties are common.
few_scores = st.lists(st.integers(0, 4).map(float), min_size=1, max_size=7)


@given(few_scores)
def test_the_winner_is_as_likely_as_among_all_choices_of_that_many(scores):
    sizes = range(1, len(scores) + 1)
    expected = torch.tensor([weights_by_hand(scores, size) for size in sizes]).double()
    found = winner_weights(torch.tensor(scores), sizes)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(1), torch.ones(len(scores)).double())


def test_the_winner_is_as_likely_as_in_a_simulation():
    generator = np.random.default_rng(0)
    scores, gold = generator.normal(size=(2, 64)).round(1)
    size, draws = 8, 20_000
    chosen = generator.permuted(np.tile(np.arange(64), (draws, 1)), axis=1)[:, :size]
    winners = chosen[
        np.arange(draws), scores[chosen].argmax(1)
    ]  # ties: the first of a random order
    [weights] = winner_weights(torch.from_numpy(scores), [size])
    error = gold[winners].std() / math.sqrt(draws)
    assert float(weights @ torch.from_numpy(gold)) == pytest.approx(
        gold[winners].mean(), abs=4 * error
    )


@given(few_scores, st.randoms())
def test_only_the_order_of_the_scores_counts_not_the_order_of_the_responses(scores, random):
    sizes = range(1, len(scores) + 1)
    plain = winner_weights(torch.tensor(scores), sizes)
    order = random.sample(range(len(scores)), len(scores))
    bent = torch.tensor(scores).exp()
    torch.testing.assert_close(winner_weights(bent[order], sizes), plain[:, order])


def test_many_responses_overflow_nothing():
    weights = winner_weights(torch.arange(3000.0), [1, 64, 3000])
    assert bool(weights.isfinite().all())
    assert float(weights[1, -1]) == pytest.approx(64 / 3000)
    assert weights[2].argmax() == 2999


def test_expectations_are_those_found_by_hand():
    scores, rows, gold, surface = problem(5, 4, 6)
    found = best_of_n(scores, rows, gold, surface)
    assert found.sizes == (1, 2, 4, 5)
    assert (found.too_short, found.unscored) == (1, 0)
    assert found.prompts.tolist() == [0, 2]
    used = {0: range(5), 2: range(9, 15)}
    texts = [text for row in rows for text in row.responses]
    words = torch.tensor([len(text.split()) for text in texts]).double()
    marks = torch.tensor([text.count("**mark**") for text in texts]).double()
    for model in range(2):
        means = {k: scores[model, list(part)].mean() for k, part in used.items()}
        squares = [
            float(scores[model, i] - means[k]) ** 2 for k, part in used.items() for i in part
        ]
        spread = math.sqrt(sum(squares) / len(squares))
        for j, (k, part) in enumerate(used.items()):
            part = list(part)
            for n, size in enumerate(found.sizes):
                weights = torch.tensor(weights_by_hand(scores[model, part].tolist(), size)).double()
                expected = {
                    "score": weights @ (scores[model, part] - means[k]) / spread,
                    "gold": weights @ gold[part],
                    "words": weights @ words[part],
                    "marks": weights @ marks[part],
                }
                for name, value in expected.items():
                    torch.testing.assert_close(getattr(found, name)[model, j, n], value)


@given(st.integers(0, 1000))
def test_the_score_rises_with_n_and_no_score_beats_the_gold_itself(seed):
    scores, rows, gold, surface = problem(6, 8, 7, seed=seed)
    found = best_of_n(torch.cat([scores, gold[None]]), rows, gold, surface)
    assert bool((found.score.diff(dim=2) > 0.0).all())
    assert bool((found.gold <= found.gold[-1] + 1e-12).all())
    # A choice of one is the same for all, and the mean of the list.
    torch.testing.assert_close(found.gold[:, :, 0], found.gold[:1, :, 0].expand(3, -1))
    torch.testing.assert_close(found.score[:, :, 0], torch.zeros(3, found.gold.shape[1]).double())


def test_scores_of_other_units_and_other_levels_per_prompt_are_shown_alike():
    scores, rows, gold, surface = problem(4, 4, models=1)
    shifted = 30.0 * scores + torch.tensor([100.0] * 4 + [-7.0] * 4)
    one, other = (best_of_n(each, rows, gold, surface) for each in (scores, shifted))
    torch.testing.assert_close(one.score, other.score)
    torch.testing.assert_close(one.gold, other.gold)


def test_equal_scores_choose_at_random():
    scores, rows, gold, surface = problem(4, 4, models=1)
    found = best_of_n(torch.full_like(scores, 0.1), rows, gold, surface)
    assert bool((found.score == 0.0).all())
    mean = gold.reshape(2, 4).mean(1)
    torch.testing.assert_close(found.gold[0], mean[:, None].expand(-1, 3))


@pytest.mark.parametrize(
    ("counts", "sizes", "too_short"),
    [
        ((64, 64, 80), (1, 2, 4, 8, 16, 32, 64), 0),
        ((100, 100), (1, 2, 4, 8, 16, 32, 64), 0),
        ((4, 4, 3, 2), (1, 2, 4), 2),  # half of the lists have 4
        ((4, 3, 3, 2), (1, 2, 3), 1),
        ((7, 1, 1, 1), (1, 2, 4, 7), 0),  # nothing to choose from one
        ((2, 9), (1, 2, 4, 8, 9), 1),
    ],
)
def test_the_largest_n_is_what_half_of_the_lists_have(counts, sizes, too_short):
    found = best_of_n(*problem(*counts))
    assert found.sizes == sizes
    assert found.too_short == too_short
    assert len(found.prompts) == sum(count >= sizes[-1] for count in counts)


def test_a_response_that_one_model_skipped_is_left_out_for_all():
    scores, rows, gold, surface = problem(5, 4)
    best = int(gold[:5].argmax())
    scores[1, best] = torch.nan
    found = best_of_n(scores, rows, gold, surface)
    assert found.unscored == 1
    assert found.sizes == (1, 2, 4)
    kept = [k for k in range(9) if k != best]
    texts = tuple(text for k, text in enumerate(rows[0].responses) if k != best)
    without = best_of_n(
        scores[:, kept], [replace(rows[0], responses=texts), rows[1]], gold[kept], surface[kept]
    )
    torch.testing.assert_close(found.gold, without.gold)
    torch.testing.assert_close(found.score, without.score)


def test_the_table_shows_models_then_rivals_with_intervals_over_prompts():
    scores, rows, gold, surface = problem(4, 5, 4, 4, prompts=(0, 0, 1, 2))
    table = best_of_n_table(["one", "two"], scores, rows, gold, surface, seed=3)
    names = ("one", "two", *RIVALS)
    assert [row[:2] for row in table.rows] == [(name, n) for name in names for n in (1, 2, 4)]
    found = best_of_n(scores, rows, gold, surface)
    assert found.prompts.tolist() == [0, 0, 1, 2]
    rows_of = {row[:2]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    for k, name in enumerate(("one", "two")):
        for j, size in enumerate((1, 2, 4)):
            shown = rows_of[name, size]
            interval = bootstrap_interval(found.gold[k, :, j], found.prompts, seed=3)
            assert (shown["gold"], shown["low"], shown["high"]) == pytest.approx(
                (interval.mean, interval.low, interval.high)
            )
            assert shown["score"] == pytest.approx(float(found.score[k, :, j].mean()))
            assert shown["length"] == pytest.approx(float(found.words[k, :, j].mean()))
            assert shown["format"] == pytest.approx(float(found.marks[k, :, j].mean()))
            assert shown["KL"] == kl_of_best(size)
    means = torch.stack([part.mean() for part in gold.split([4, 5, 4, 4])]).mean()
    assert [rows_of["random", n]["gold"] for n in (1, 2, 4)] == pytest.approx([float(means)] * 3)
    assert rows_of["random", 4]["score"] is None
    assert rows_of["gold itself", 4]["gold"] == max(row["gold"] for row in rows_of.values())
    assert rows_of["longer", 4]["length"] == max(row["length"] for row in rows_of.values())
    assert "4 prompts" in table.note
    assert "Left out" not in table.note


def test_the_table_counts_what_is_left_out():
    scores, rows, gold, surface = problem(4, 4, 3, 2)
    scores[0, 12] = torch.nan
    table = best_of_n_table(["one", "two"], scores, rows, gold, surface)
    assert table.note.endswith(
        "Left out: 1 lists of fewer than 4 responses, 1 responses that a model skipped as too long."
    )


@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_the_divergence_is_that_of_the_best_among_distinct_responses(size):
    # Of a policy that never says the same twice, a rank u in (0, 1) is drawn with density
    # size * u ** (size - 1); its divergence from the even density, by the midpoint rule:
    u = (np.arange(100_000) + 0.5) / 100_000
    log_density = np.log(size) + (size - 1) * np.log(u)
    divergence = np.mean(np.exp(log_density) * log_density)
    assert kl_of_best(size) == pytest.approx(divergence, abs=1e-4)


def test_a_missing_gold_rating_is_refused():
    scores, rows, gold, surface = problem(4, 4)
    gold[5] = torch.nan
    with pytest.raises(ValueError, match="`gold` of response 5 is nan; leave"):
        best_of_n(scores, rows, gold, surface)


def test_gold_ratings_of_other_lists_are_refused():
    scores, rows, gold, surface = problem(4, 4)
    with pytest.raises(ValueError, match="`gold` has 8 ratings for 4 responses"):
        best_of_n(scores, rows[:1], gold, surface)


def test_lists_without_a_choice_are_refused():
    scores, rows, gold, surface = problem(1, 2)
    scores[0, 2] = torch.nan
    with pytest.raises(ValueError, match="no list of two responses that are scored"):
        best_of_n(scores, rows, gold, surface)
