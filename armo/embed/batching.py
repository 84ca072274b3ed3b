"""Batches by token budget: similar lengths together, little padding, bounded memory."""

from collections.abc import Iterator, Sequence

# Once a batch keeps the hardware busy, it rather stays small than pads its rows by more than this.
PADDING = 0.05


def token_batches(
    lengths: Sequence[int], *, max_tokens: int, enough: int, max_rows: int | None = None
) -> Iterator[list[int]]:
    """Yield batches of row numbers, longest rows first, each row exactly once.

    A batch holds as many rows as fit when all are padded to its longest one, or fewer where the
    next row would mean padding. Longest first, so that memory runs out at once or never.

    Args:
        lengths: Tokens of each row.
        max_tokens: Padded tokens per batch; a row that is longer makes a batch of its own.
        enough: Padded tokens that keep the hardware busy; a quarter of `max_tokens` does, too.
        max_rows: Rows per batch at most.

    Example:
        >>> list(token_batches([4, 9, 4, 9], max_tokens=20, enough=20))
        [[1, 3], [0, 2]]
    """
    if max_tokens < 1 or (max_rows is not None and max_rows < 1):
        raise ValueError("`max_tokens` and `max_rows` must be positive.")
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batch: list[int] = []
    used = 0
    for row in order:
        longest = lengths[batch[0]] if batch else lengths[row]
        padded = longest * (len(batch) + 1)
        full = padded > max_tokens or len(batch) == max_rows
        loose = longest * len(batch) >= min(enough, max_tokens // 4) and (
            padded - used - lengths[row] > PADDING * padded
        )
        if batch and (full or loose):
            yield batch
            batch, used = [], 0
        batch.append(row)
        used += lengths[row]
    if batch:
        yield batch


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Return the share of the tokens run in these batches that is padding.

    Example:
        >>> padding_share([4, 2], [[0, 1]])
        0.25
    """
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    run = sum(lengths[row] for batch in batches for row in batch)
    return (padded - run) / max(1, padded)
