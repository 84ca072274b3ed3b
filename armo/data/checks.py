"""Guards on the data as a whole: splits by prompt, objectives that can be learned."""

import hashlib
from collections.abc import Iterable, Sequence

from armo.data.conversation import RatedResponse, Row, prompt_group
from armo.data.objectives import ObjectiveSet
from armo.data.sources import DataError


def split_groups(rows: Iterable[Row], *, test_fraction: float) -> dict[str, str]:
    """Assign each group of rows that share a prompt to `train` or `test`.

    A group goes where one of its rows says (`"split"`), otherwise to `test` with probability
    `test_fraction`, decided by a hash of the prompt: the same in every run, whatever the order
    of rows and files, and unchanged when data are added.

    Returns:
        `train` or `test` by `prompt_group`.

    Raises:
        DataError: If rows of one group declare different splits.
    """
    if not 0.0 < test_fraction < 1.0:
        raise ValueError(f"`test_fraction` must be between 0 and 1, got {test_fraction}.")
    declared: dict[str, Row] = {}
    splits: dict[str, str] = {}
    for row in rows:
        group = prompt_group(row.prompt)
        if row.split is None:
            share = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
            splits.setdefault(group, "test" if share < test_fraction else "train")
            continue
        other = declared.setdefault(group, row)
        if other.split != row.split:
            raise DataError(
                f"rows {other.id!r} ({other.split}) and {row.id!r} ({row.split}) share a prompt "
                f"but are on different sides of the split; put both on one side"
            )
        splits[group] = row.split
    return splits


def check_objectives(
    rows: Sequence[RatedResponse], objectives: ObjectiveSet, *, min_ratings: int
) -> None:
    """Check that each objective can be learned from the training rows.

    Raises:
        DataError: If an objective has fewer than `min_ratings` ratings, or all are equal.
    """
    for name in objectives.names:
        ratings = [row.ratings[name] for row in rows if name in row.ratings]
        if len(ratings) < max(1, min_ratings):
            raise DataError(
                f"objective {name!r} has {len(ratings)} ratings on training prompts, fewer than "
                f"`data.min_ratings={min_ratings}`; add data or remove it from `data.objectives`"
            )
        if min(ratings) == max(ratings):
            raise DataError(
                f"objective {name!r} has the one rating {ratings[0]:g} on all training prompts; "
                f"remove it from `data.objectives`"
            )
