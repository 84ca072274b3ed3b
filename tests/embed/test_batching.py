import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from armo.embed.backbone import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS
from armo.embed.batching import PADDING, padding_share, token_batches
from armo.embed.forward import CPU_ENOUGH, GPU_ENOUGH

row_lengths = st.lists(st.integers(0, 60), max_size=40)
budgets = st.integers(1, 600)
sufficient = st.integers(0, 200)
row_limits = st.none() | st.integers(1, 8)


def realistic_lengths(*, rows, seed, median=220, spread=0.8, longest=2048):
    """Lengths of conversations: most are short, few are very long."""
    draw = random.Random(seed)
    return [
        min(longest, max(8, round(median * draw.lognormvariate(0, spread)))) for _ in range(rows)
    ]


@given(row_lengths, budgets, sufficient, row_limits)
def test_each_row_is_in_one_batch(lengths, max_tokens, enough, max_rows):
    batches = list(token_batches(lengths, max_tokens=max_tokens, enough=enough, max_rows=max_rows))
    assert all(batches)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))


@given(row_lengths, budgets, sufficient, row_limits)
def test_a_batch_of_several_rows_keeps_the_budget_when_padded(
    lengths, max_tokens, enough, max_rows
):
    for batch in token_batches(lengths, max_tokens=max_tokens, enough=enough, max_rows=max_rows):
        assert len(batch) == 1 or len(batch) * max(lengths[k] for k in batch) <= max_tokens
        assert max_rows is None or len(batch) <= max_rows


def may_end(lengths, batch, following, *, max_tokens, enough, max_rows):
    """Whether a batch is full, or full enough that a row more would be padding."""
    longest = max(lengths[row] for row in batch)
    if len(batch) == max_rows or longest * (len(batch) + 1) > max_tokens:
        return True
    padding = sum(longest - lengths[row] for row in (*batch, following))
    busy = longest * len(batch) >= min(enough, max_tokens // 4)
    return busy and padding > PADDING * longest * (len(batch) + 1)


@given(row_lengths, budgets, sufficient, row_limits)
def test_a_batch_ends_as_soon_as_it_is_full_or_a_row_more_would_be_padding(
    lengths, max_tokens, enough, max_rows
):
    batches = list(token_batches(lengths, max_tokens=max_tokens, enough=enough, max_rows=max_rows))
    limits = {"max_tokens": max_tokens, "enough": enough, "max_rows": max_rows}
    order = [row for batch in batches for row in batch]
    at = 0
    for batch in batches:
        for size in range(1, len(batch)):
            assert not may_end(lengths, batch[:size], batch[size], **limits)
        at += len(batch)
        assert at == len(order) or may_end(lengths, batch, order[at], **limits)


@given(row_lengths, budgets, sufficient)
def test_the_longest_rows_come_first(lengths, max_tokens, enough):
    batches = token_batches(lengths, max_tokens=max_tokens, enough=enough)
    ordered = [lengths[row] for batch in batches for row in batch]
    assert ordered == sorted(lengths, reverse=True)


@given(row_lengths, budgets, sufficient, row_limits)
def test_rows_of_one_length_keep_their_order(lengths, max_tokens, enough, max_rows):
    batches = token_batches(lengths, max_tokens=max_tokens, enough=enough, max_rows=max_rows)
    order = [row for batch in batches for row in batch]
    assert order == sorted(order, key=lambda row: (-lengths[row], row))


ON_A_CPU = {"max_tokens": CPU_BATCH_TOKENS, "enough": CPU_ENOUGH}
ON_A_GPU = {"max_tokens": GPU_BATCH_TOKENS, "enough": GPU_ENOUGH}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("rows", "limits"),
    [
        (256, ON_A_CPU),
        (1024, ON_A_CPU),
        (4096, {"max_tokens": 16384, "enough": 8192}),
        (16384, ON_A_GPU),
    ],
)
def test_less_than_a_twentieth_of_what_is_run_is_padding(rows, limits, seed):
    lengths = realistic_lengths(rows=rows, seed=seed)
    batches = list(token_batches(lengths, **limits))
    assert padding_share(lengths, batches) < 0.05
    # Filling batches in the order of the rows wastes a good part.
    ordered = [list(range(k, k + 8)) for k in range(0, rows, 8)]
    assert padding_share(lengths, ordered) > 0.3


@pytest.mark.parametrize("seed", range(5))
def test_hardly_more_batches_are_made_than_the_budget_asks_for(seed):
    # Where it takes a quarter of the budget to keep the hardware busy.
    lengths = realistic_lengths(rows=1024, seed=seed)
    fewest = size = 0
    for length in sorted(lengths, reverse=True):
        size = max(0, size - 1)
        if size == 0:
            fewest, size = fewest + 1, 4096 // length
    assert len(list(token_batches(lengths, max_tokens=4096, enough=4096))) < 1.15 * fewest


@pytest.mark.parametrize(
    ("max_tokens", "enough", "filled"),
    [
        (4096, 10**6, 1024),
        (4096, 1025, 1024),
        (4096, 1000, 1000),
        (4096, 256, 256),
        (16384, 8192, 4096),
        (65536, 8192, 8192),
    ],
)
def test_all_batches_but_the_last_are_enough_or_a_quarter_full(max_tokens, enough, filled):
    lengths = realistic_lengths(rows=4096, seed=0)
    batches = list(token_batches(lengths, max_tokens=max_tokens, enough=enough))
    sizes = [len(batch) * max(lengths[row] for row in batch) for batch in batches[:-1]]
    assert min(sizes) >= filled
    # And no fuller than that where a row more would be padding.
    assert min(sizes) < 2 * filled


@given(row_lengths, budgets, row_limits)
def test_a_quarter_of_the_budget_is_always_enough(lengths, max_tokens, max_rows):
    limits = {"max_tokens": max_tokens, "max_rows": max_rows}
    quarter = list(token_batches(lengths, enough=max_tokens // 4, **limits))
    for more in (max_tokens, 10**9):
        assert list(token_batches(lengths, enough=more, **limits)) == quarter


@pytest.mark.parametrize("seed", range(3))
def test_the_less_is_enough_the_less_is_padding(seed):
    lengths = realistic_lengths(rows=512, seed=seed)
    shares, counts = [], []
    for enough in (64, 512, 4096):
        batches = list(token_batches(lengths, max_tokens=16384, enough=enough))
        shares.append(padding_share(lengths, batches))
        counts.append(len(batches))
    assert shares == sorted(shares)
    assert counts == sorted(counts, reverse=True)
    assert shares[0] < shares[-1]
    assert counts[0] > counts[-1]


def test_where_nothing_is_too_little_no_batch_is_padded_by_more_than_a_twentieth():
    lengths = [100, 96, 95, 90, 50, 50, 49, 10]
    assert list(token_batches(lengths, max_tokens=1000, enough=0)) == [[0, 1, 2, 3], [4, 5, 6], [7]]
    assert list(token_batches(lengths, max_tokens=4000, enough=1000)) == [list(range(8))]


def test_a_row_beyond_the_budget_makes_a_batch_of_its_own():
    assert list(token_batches([3, 50, 3], max_tokens=10, enough=10)) == [[1], [0, 2]]


def test_no_rows_make_no_batch():
    assert list(token_batches([], max_tokens=10, enough=10)) == []


@pytest.mark.parametrize(("lengths", "batches"), [([], []), ([0, 0], [[0, 1]])])
def test_where_nothing_is_run_nothing_is_padding(lengths, batches):
    assert padding_share(lengths, batches) == 0.0


@pytest.mark.parametrize("limits", [{"max_tokens": 0}, {"max_tokens": 9, "max_rows": 0}])
def test_limits_below_one_are_refused(limits):
    with pytest.raises(ValueError, match="must be positive"):
        list(token_batches([1], enough=1, **limits))


@given(row_lengths, budgets, sufficient, row_limits)
def test_the_padding_share_is_that_of_the_padded_rows(lengths, max_tokens, enough, max_rows):
    batches = list(token_batches(lengths, max_tokens=max_tokens, enough=enough, max_rows=max_rows))
    cells = []
    for batch in batches:
        width = max(lengths[row] for row in batch)
        cells += [column >= lengths[row] for row in batch for column in range(width)]
    assume(cells)
    assert padding_share(lengths, batches) == pytest.approx(sum(cells) / len(cells))
