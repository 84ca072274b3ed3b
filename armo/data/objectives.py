"""Objectives: the axes that a response is judged on, and the scales that raters used."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Objective:
    """One axis a response is judged on, and how its source rates it.

    Attributes:
        name: Unique name, as it stands in the `ratings` of a row.
        low: Lowest rating on the source's scale.
        high: Highest rating on the source's scale.
        higher_is_better: Whether `high` is the good end of the scale. Where it is not, the
            rescaled rating is turned round, so that 1 is always the good end.
        bias: Whether it describes style rather than quality: predicted and reported, but not
            mixed into the score.
        group: Name of the family it belongs to, for reports.
        meaning: What the rating says, in one line.
    """

    name: str
    low: float
    high: float
    higher_is_better: bool = True
    bias: bool = False
    group: str = ""
    meaning: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"An objective needs a `name`, got {self.name!r}.")
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(
                f"Objective {self.name!r}: `low` must be below `high`, got {self.low} and "
                f"{self.high}."
            )

    def to_unit(self, rating: float) -> float:
        """Rescale a rating from the source's scale to [0, 1], 1 the good end.

        Raises:
            ValueError: If the rating is outside the declared scale or not a number.
        """
        if not self.low <= rating <= self.high:
            raise ValueError(
                f"rating {rating} of {self.name!r} is outside its scale {self.low:g} to "
                f"{self.high:g}"
            )
        unit = (rating - self.low) / (self.high - self.low)
        return unit if self.higher_is_better else 1.0 - unit

    @property
    def scale(self) -> tuple[float, float]:
        """The affine map back to the source's scale: `rating = offset + slope * unit`."""
        if self.higher_is_better:
            return self.low, self.high - self.low
        return self.high, self.low - self.high

    def from_unit(self, unit: float) -> float:
        """Map a value on [0, 1] back to the source's scale; the inverse of `to_unit`."""
        offset, slope = self.scale
        return offset + slope * unit


@dataclass(frozen=True, slots=True)
class ObjectiveSet:
    """Objectives in column order."""

    objectives: tuple[Objective, ...]

    def __post_init__(self) -> None:
        if not self.objectives:
            raise ValueError("At least one objective is needed.")
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise ValueError(f"Objectives declared twice: {', '.join(repeated)}.")
        if all(objective.bias for objective in self.objectives):
            raise ValueError("At least one objective must have `bias: false`, to make a score of.")

    @classmethod
    def from_mapping(cls, declared: Mapping[str, Mapping[str, Any]]) -> "ObjectiveSet":
        """Build from `{name: {low, high, ...}}`, as configuration files spell it.

        Raises:
            ValueError: If a declaration lacks a field or has an unknown one.
        """
        objectives = []
        for name, fields in declared.items():
            try:
                objectives.append(Objective(name=name, **fields))
            except TypeError as error:
                raise ValueError(
                    f"Objective {name!r}: {error}; it takes low, high, higher_is_better, bias, "
                    f"group and meaning."
                ) from None
        return cls(tuple(objectives))

    @property
    def names(self) -> tuple[str, ...]:
        """Names in column order."""
        return tuple(objective.name for objective in self.objectives)

    @property
    def bias_indices(self) -> tuple[int, ...]:
        """Columns of the bias objectives."""
        return tuple(k for k, objective in enumerate(self.objectives) if objective.bias)

    @property
    def mixed_indices(self) -> tuple[int, ...]:
        """Columns of the objectives that the score is made of."""
        return tuple(k for k, objective in enumerate(self.objectives) if not objective.bias)

    def mix(self, weights: Mapping[str, float]) -> list[float]:
        """Return a caller's weights as a mix: one per objective, adding up to one.

        Args:
            weights: By name; objectives that are not named get none.

        Raises:
            ValueError: If a name is unknown, a weight negative or no finite number, or all are
                zero.
        """
        try:
            sum(weights.values())
        except (AttributeError, TypeError):
            raise ValueError(f"`weights` must be numbers by objective, got {weights!r}.") from None
        fixed = [0.0] * len(self.names)
        for name, weight in weights.items():
            fixed[self.index(name)] = weight
        total = sum(fixed)
        if min(fixed) < 0.0 or not 0.0 < total < math.inf:
            raise ValueError(
                f"`weights` must not be negative, must be finite and not all zero, got "
                f"{dict(weights)}."
            )
        return [weight / total for weight in fixed]

    def index(self, name: str) -> int:
        """Return the column of an objective.

        Raises:
            ValueError: If there is no objective of that name.
        """
        if name not in self.names:
            raise ValueError(f"Unknown objective {name!r}; there are {', '.join(self.names)}.")
        return self.names.index(name)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the declarations as JSON values."""
        return [asdict(objective) for objective in self.objectives]

    @classmethod
    def from_dicts(cls, declared: Iterable[Mapping[str, Any]]) -> "ObjectiveSet":
        """Build from what `to_dicts` returned."""
        return cls(tuple(Objective(**fields) for fields in declared))
