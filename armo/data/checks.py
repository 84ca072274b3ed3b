"""Guards on the data as a whole: splits by prompt, objectives that can be learned."""

import hashlib

from jaxtyping import Float
from torch import Tensor

from armo.data.conversation import Row, prompt_group
from armo.data.objectives import ObjectiveSet
from armo.data.sources import DataError


class GroupSplits:
    """Assigns each group of rows that share a prompt to the training or the test side.

    A group goes where one of its rows says (`"split"`), otherwise to `test` with probability
    `test_fraction`, decided by a hash of the prompt: the same in every run, whatever the order
    of rows and files, and unchanged when data are added.
    """

    def __init__(self, test_fraction: float) -> None:
        """Start with no rows."""
        if not 0.0 < test_fraction < 1.0:
            raise ValueError(f"`test_fraction` must be between 0 and 1, got {test_fraction}.")
        self.test_fraction = test_fraction
        self._numbers: dict[bytes, int] = {}
        self._declared: dict[int, tuple[str, str]] = {}

    def add(self, row: Row) -> int:
        """Note a row and return the number of its group.

        Raises:
            DataError: If rows of one group declare different splits.
        """
        digest = hashlib.sha256(prompt_group(row.prompt).encode()).digest()[:16]
        group = self._numbers.setdefault(digest, len(self._numbers))
        if row.split is not None:
            other, split = self._declared.setdefault(group, (row.id, row.split))
            if split != row.split:
                raise DataError(
                    f"rows {other!r} ({split}) and {row.id!r} ({row.split}) share a prompt but "
                    f"are on different sides of the split; put both on one side"
                )
        return group

    def test(self) -> list[bool]:
        """Whether each group is on the test side, by its number."""
        sides = [
            int.from_bytes(digest[:8], "big") / 2**64 < self.test_fraction
            for digest in self._numbers
        ]
        for group, (_, split) in self._declared.items():
            sides[group] = split == "test"
        return sides


def check_objectives(
    ratings: Float[Tensor, "ratings objectives"],
    objectives: ObjectiveSet,
    *,
    min_ratings: int,
    judgements: Float[Tensor, "pairs objectives"] | None = None,
) -> None:
    """Check that each objective can be learned from the training ratings and judgements.

    Args:
        ratings: Ratings of training prompts on [0, 1]; NaN where missing.
        objectives: The columns.
        min_ratings: Ratings and judgements, counted together, that each objective needs.
        judgements: Judgements of training pairs in [0, 1], where 0.5 is a tie; NaN where missing.

    Raises:
        DataError: If an objective has fewer than `min_ratings` of them, or none that says more
            than another: ratings that are all equal, judgements that are all ties.
    """
    if judgements is None:
        judgements = ratings[:0]
    for k, objective in enumerate(objectives.objectives):
        given, judged = (table[:, k][~table[:, k].isnan()] for table in (ratings, judgements))
        if len(given) + len(judged) < max(1, min_ratings):
            also = f" and {len(judged)} judgements" if len(judged) else ""
            raise DataError(
                f"objective {objective.name!r} has {len(given)} ratings{also} on training prompts, "
                f"fewer than `data.min_ratings={min_ratings}`; add data or remove it from "
                f"`data.objectives`"
            )
        if bool((judged != 0.5).any()) or bool((given != given[:1]).any()):
            continue
        if len(given) == 0:
            raise DataError(
                f"objective {objective.name!r} has nothing but ties as judgements on all training "
                f"prompts; remove it from `data.objectives`"
            )
        raise DataError(
            f"objective {objective.name!r} has the one rating "
            f"{objective.from_unit(float(given[0])):g} on all training prompts; "
            f"remove it from `data.objectives`"
        )
