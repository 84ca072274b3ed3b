"""The scoring rules of benchmarks: which credit each prompt gets, and how credits add up."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a benchmark's table: a linear combination of the means of its parts.

    Attributes:
        label: `Chat Hard`, `overall`.
        depth: 0 for the headline, 1 for what it is the mean of, and so on.
        coefficients: How much the mean of each part counts.
    """

    label: str
    depth: int
    coefficients: tuple[float, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Credits:
    """What a rule gives for the scores of some models.

    Attributes:
        parts: Names of the parts, usually subsets.
        values: Credit of each unit in each part; NaN where the unit is not in that part. A unit
            is what the rule looks at together: usually the responses to one prompt.
        prompts: Number of the prompt group of each unit, to resample by.
        lines: What the table shows, in reading order.
    """

    parts: tuple[str, ...]
    values: Float[Tensor, "models units parts"]
    prompts: Int[Tensor, " units"]
    lines: tuple[Line, ...]
