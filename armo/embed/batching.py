"""Batches by token budget: similar lengths together, little padding, bounded memory."""

from collections.abc import Iterator, Sequence


def token_batches(
    lengths: Sequence[int], *, max_tokens: int, max_rows: int | None = None
) -> Iterator[list[int]]:
    """Yield batches of row numbers, longest rows first, each row exactly once.

    A batch holds as many rows as fit when all are padded to its longest one. Longest first, so
    that memory runs out at once or never.

    Args:
        lengths: Tokens of each row.
        max_tokens: Padded tokens per batch; a row that is longer makes a batch of its own.
        max_rows: Rows per batch at most.

    Example:
        >>> list(token_batches([1, 5, 2, 5], max_tokens=10))
        [[1, 3], [2, 0]]
    """
    if max_tokens < 1 or (max_rows is not None and max_rows < 1):
        raise ValueError("`max_tokens` and `max_rows` must be positive.")
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    start = 0
    while start < len(order):
        rows = max(1, max_tokens // max(1, lengths[order[start]]))
        rows = rows if max_rows is None else min(rows, max_rows)
        yield order[start : start + rows]
        start += rows
