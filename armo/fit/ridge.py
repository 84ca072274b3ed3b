"""Ridge regression in closed form, from statistics that add up over any parts of the data."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class RidgeStatistics:
    """All that a ridge regression needs to know of its rows, in float64.

    Statistics of disjoint rows add up, and those of a part can be taken away again: each fold of
    a cross-validation costs one pass over its own rows.

    Attributes:
        count: Number of rows.
        sum_x: Sum of embeddings.
        sum_y: Sum of ratings.
        xx: Sum of outer products of embeddings.
        xy: Sum of products of embeddings and ratings.
        yy: Sum of squared ratings.
    """

    count: int
    sum_x: Float[Tensor, " dim"]
    sum_y: Float[Tensor, " objectives"]
    xx: Float[Tensor, "dim dim"]
    xy: Float[Tensor, "dim objectives"]
    yy: Float[Tensor, " objectives"]

    @classmethod
    def of(
        cls,
        embeddings: Float[Tensor, "batch dim"],
        ratings: Float[Tensor, "batch objectives"],
    ) -> "RidgeStatistics":
        """Accumulate rows that all rate all of these objectives."""
        x, y = embeddings.double(), ratings.double()
        return cls(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y, y.square().sum(0))

    @classmethod
    def zero(cls, dim: int, objectives: int) -> "RidgeStatistics":
        """Return the statistics of no rows."""
        return cls.of(torch.zeros(0, dim), torch.zeros(0, objectives))

    def __add__(self, other: "RidgeStatistics") -> "RidgeStatistics":
        return self._combine(other, 1)

    def __sub__(self, other: "RidgeStatistics") -> "RidgeStatistics":
        return self._combine(other, -1)

    def _combine(self, other: "RidgeStatistics", sign: int) -> "RidgeStatistics":
        return RidgeStatistics(
            self.count + sign * other.count,
            self.sum_x + sign * other.sum_x,
            self.sum_y + sign * other.sum_y,
            self.xx + sign * other.xx,
            self.xy + sign * other.xy,
            self.yy + sign * other.yy,
        )


@dataclass(frozen=True, eq=False, slots=True)
class RidgeSolution:
    """Weights and intercepts of one penalty, for all objectives; float64."""

    weights: Float[Tensor, "objectives dim"]
    intercepts: Float[Tensor, " objectives"]


def solve_ridge(statistics: RidgeStatistics, *, alphas: Sequence[float]) -> list[RidgeSolution]:
    """Solve ridge regressions with an intercept for several penalties at once.

    For each objective the weights `w` and intercept `b` minimise
    `||X w + b - y||^2 + alpha ||w||^2`; the intercept is not penalised. All penalties and all
    objectives come from one eigendecomposition of the centred `X^T X`.

    Args:
        statistics: Of the rows to fit; at least one.
        alphas: Penalties, in units of squared embedding length. Must be positive.

    Returns:
        One solution per penalty.

    Raises:
        ValueError: If there are no rows, or a penalty is not positive.

    References:
        Hoerl and Kennard, "Ridge Regression", Technometrics 12(1), 1970.

    Example:
        >>> x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0]])
        >>> [solution] = solve_ridge(RidgeStatistics.of(x, y), alphas=[0.5])
        >>> solution.weights, solution.intercepts
        (tensor([[0.5000]], dtype=torch.float64), tensor([0.2500], dtype=torch.float64))
    """
    if statistics.count < 1:
        raise ValueError("`statistics` holds no rows.")
    if min(alphas) <= 0.0:
        raise ValueError(f"`alphas` must be positive, got {list(alphas)}.")
    mean_x = statistics.sum_x / statistics.count
    mean_y = statistics.sum_y / statistics.count
    centred_xx = statistics.xx - torch.outer(statistics.sum_x, mean_x)
    centred_xy = statistics.xy - torch.outer(statistics.sum_x, mean_y)
    values, vectors = torch.linalg.eigh(centred_xx)
    # Rounding can leave eigenvalues of a semi-definite matrix just below zero.
    values = values.clamp(min=0.0)
    rotated = vectors.T @ centred_xy
    solutions = []
    for alpha in alphas:
        weights = (vectors @ (rotated / (values + alpha)[:, None])).T
        solutions.append(RidgeSolution(weights, mean_y - weights @ mean_x))
    return solutions


def squared_error(
    solution: RidgeSolution, statistics: RidgeStatistics
) -> Float[Tensor, " objectives"]:
    """Sum of squared errors of a solution on the rows of some statistics, per objective."""
    w, b, s = solution.weights, solution.intercepts, statistics
    return (
        s.yy
        - 2.0 * ((w * s.xy.T).sum(1) + b * s.sum_y)
        + ((w @ s.xx) * w).sum(1)
        + 2.0 * b * (w @ s.sum_x)
        + s.count * b.square()
    )


@dataclass(frozen=True, eq=False, slots=True)
class RidgeChoice:
    """The penalty chosen for one objective, and what led to it.

    Attributes:
        alpha: Penalty with the least cross-validated error.
        without: For each part, the weights and intercept fitted on all the others, with this
            penalty: what to predict the part's own rows with.
        error: Cross-validated mean squared error of each penalty.
        baseline: Cross-validated mean squared error of predicting the mean.
    """

    alpha: float
    without: tuple[tuple[Float[Tensor, " dim"], float], ...]
    error: Float[Tensor, " alphas"]
    baseline: float


def select_alpha(folds: Sequence[RidgeStatistics], *, alphas: Sequence[float]) -> list[RidgeChoice]:
    """Choose one penalty per objective by cross-validation.

    Args:
        folds: Statistics of disjoint parts of the rows. For an honest choice all rows of a
            prompt are in one part.
        alphas: Penalties to choose from. Must be positive.

    Returns:
        One choice per objective.

    Raises:
        ValueError: If fewer than two parts hold rows.
    """
    if sum(fold.count > 0 for fold in folds) < 2:
        raise ValueError("`folds` needs rows in at least two parts.")
    total = sum(folds[1:], start=folds[0])
    objectives = len(total.sum_y)
    error = torch.zeros(len(alphas), objectives, dtype=torch.float64)
    baseline = torch.zeros(objectives, dtype=torch.float64)
    solutions = []
    for fold in folds:
        rest = total - fold
        solutions.append(solve_ridge(rest, alphas=alphas))
        for k, solution in enumerate(solutions[-1]):
            error[k] += squared_error(solution, fold)
        mean = RidgeSolution(torch.zeros_like(total.xy.T), rest.sum_y / rest.count)
        baseline += squared_error(mean, fold)
    error, baseline = error / total.count, baseline / total.count
    choices = []
    for k, best in enumerate(error.argmin(dim=0).tolist()):
        without = tuple((fit[best].weights[k], float(fit[best].intercepts[k])) for fit in solutions)
        choices.append(RidgeChoice(float(alphas[best]), without, error[:, k], float(baseline[k])))
    return choices
