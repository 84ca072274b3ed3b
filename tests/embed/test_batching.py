import pytest
from hypothesis import given
from hypothesis import strategies as st

from armo.embed.batching import token_batches

row_lengths = st.lists(st.integers(0, 60), max_size=40)
budgets = st.integers(1, 200)
row_limits = st.none() | st.integers(1, 8)


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


@given(row_lengths, budgets, row_limits)
def test_no_batch_has_room_for_the_next_row(lengths, max_tokens, max_rows):
    batches = list(token_batches(lengths, max_tokens=max_tokens, max_rows=max_rows))
    for batch in batches[:-1]:
        rows = len(batch) + 1
        full = max_rows is not None and rows > max_rows
        assert full or rows * max(1, lengths[batch[0]]) > max_tokens


@given(row_lengths, budgets)
def test_the_longest_rows_come_first(lengths, max_tokens):
    batches = token_batches(lengths, max_tokens=max_tokens)
    ordered = [lengths[row] for batch in batches for row in batch]
    assert ordered == sorted(lengths, reverse=True)


def test_a_row_beyond_the_budget_makes_a_batch_of_its_own():
    assert list(token_batches([3, 50, 3], max_tokens=10)) == [[1], [0, 2]]


@pytest.mark.parametrize("limits", [{"max_tokens": 0}, {"max_tokens": 9, "max_rows": 0}])
def test_limits_below_one_are_refused(limits):
    with pytest.raises(ValueError, match="must be positive"):
        list(token_batches([1], **limits))
