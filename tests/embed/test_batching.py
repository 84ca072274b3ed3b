import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from armo.embed.batching import ENOUGH, PADDING, padding_share, token_batches

row_lengths = st.lists(st.integers(0, 60), max_size=40)
budgets = st.integers(1, 600)
row_limits = st.none() | st.integers(1, 8)


def realistic_lengths(*, rows, seed, median=220, spread=0.8, longest=2048):
    """Lengths of conversations: most are short, few are very long."""
    draw = random.Random(seed)
    return [
        min(longest, max(8, round(median * draw.lognormvariate(0, spread)))) for _ in range(rows)
    ]


@given(row_lengths, budgets, row_limits)
def test_each_row_is_in_one_batch(lengths, max_tokens, max_rows):
    batches = list(token_batches(lengths, max_tokens=max_tokens, max_rows=max_rows))
    assert all(batches)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))


@given(row_lengths, budgets, row_limits)
def test_a_batch_of_several_rows_keeps_the_budget_when_padded(lengths, max_tokens, max_rows):
    for batch in token_batches(lengths, max_tokens=max_tokens, max_rows=max_rows):
        assert len(batch) == 1 or len(batch) * max(lengths[k] for k in batch) <= max_tokens
        assert max_rows is None or len(batch) <= max_rows


def may_end(lengths, batch, following, *, max_tokens, max_rows):
    """Whether a batch is full, or full enough that a row more would be padding."""
    longest = max(lengths[row] for row in batch)
    if len(batch) == max_rows or longest * (len(batch) + 1) > max_tokens:
        return True
    padding = sum(longest - lengths[row] for row in (*batch, following))
    enough = longest * len(batch) >= ENOUGH * max_tokens
    return enough and padding > PADDING * longest * (len(batch) + 1)


@given(row_lengths, budgets, row_limits)
def test_a_batch_ends_as_soon_as_it_is_full_or_a_row_more_would_be_padding(
    lengths, max_tokens, max_rows
):
    batches = list(token_batches(lengths, max_tokens=max_tokens, max_rows=max_rows))
    limits = {"max_tokens": max_tokens, "max_rows": max_rows}
    order = [row for batch in batches for row in batch]
    at = 0
    for batch in batches:
        for size in range(1, len(batch)):
            assert not may_end(lengths, batch[:size], batch[size], **limits)
        at += len(batch)
        assert at == len(order) or may_end(lengths, batch, order[at], **limits)


@given(row_lengths, budgets)
def test_the_longest_rows_come_first(lengths, max_tokens):
    batches = token_batches(lengths, max_tokens=max_tokens)
    ordered = [lengths[row] for batch in batches for row in batch]
    assert ordered == sorted(lengths, reverse=True)


@given(row_lengths, budgets, row_limits)
def test_rows_of_one_length_keep_their_order(lengths, max_tokens, max_rows):
    batches = token_batches(lengths, max_tokens=max_tokens, max_rows=max_rows)
    order = [row for batch in batches for row in batch]
    assert order == sorted(order, key=lambda row: (-lengths[row], row))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("rows", "max_tokens"), [(256, 4096), (1024, 4096), (4096, 16384)])
def test_less_than_a_twentieth_of_what_is_run_is_padding(rows, max_tokens, seed):
    lengths = realistic_lengths(rows=rows, seed=seed)
    batches = list(token_batches(lengths, max_tokens=max_tokens))
    assert padding_share(lengths, batches) < 0.05
    # Filling batches in the order of the rows wastes a good part.
    ordered = [list(range(k, k + 8)) for k in range(0, rows, 8)]
    assert padding_share(lengths, ordered) > 0.3


@pytest.mark.parametrize("seed", range(5))
def test_hardly_more_batches_are_made_than_the_budget_asks_for(seed):
    lengths = realistic_lengths(rows=1024, seed=seed)
    fewest = size = 0
    for length in sorted(lengths, reverse=True):
        size = max(0, size - 1)
        if size == 0:
            fewest, size = fewest + 1, 4096 // length
    assert len(list(token_batches(lengths, max_tokens=4096))) < 1.15 * fewest


@pytest.mark.parametrize("max_tokens", [4096, 16384])
def test_all_batches_but_the_last_are_a_quarter_full(max_tokens):
    lengths = realistic_lengths(rows=1024, seed=0)
    batches = list(token_batches(lengths, max_tokens=max_tokens))
    for batch in batches[:-1]:
        assert len(batch) * max(lengths[row] for row in batch) >= max_tokens / 4


def test_a_row_beyond_the_budget_makes_a_batch_of_its_own():
    assert list(token_batches([3, 50, 3], max_tokens=10)) == [[1], [0, 2]]


def test_no_rows_make_no_batch():
    assert list(token_batches([], max_tokens=10)) == []


@pytest.mark.parametrize(("lengths", "batches"), [([], []), ([0, 0], [[0, 1]])])
def test_where_nothing_is_run_nothing_is_padding(lengths, batches):
    assert padding_share(lengths, batches) == 0.0


@pytest.mark.parametrize("limits", [{"max_tokens": 0}, {"max_tokens": 9, "max_rows": 0}])
def test_limits_below_one_are_refused(limits):
    with pytest.raises(ValueError, match="must be positive"):
        list(token_batches([1], **limits))


@given(row_lengths, budgets, row_limits)
def test_the_padding_share_is_that_of_the_padded_rows(lengths, max_tokens, max_rows):
    batches = list(token_batches(lengths, max_tokens=max_tokens, max_rows=max_rows))
    cells = []
    for batch in batches:
        width = max(lengths[row] for row in batch)
        cells += [column >= lengths[row] for row in batch for column in range(width)]
    assume(cells)
    assert padding_share(lengths, batches) == pytest.approx(sum(cells) / len(cells))
