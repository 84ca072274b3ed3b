"""Ridge regression in closed form, from statistics that add up over any parts of the data.

The products and factorisations are SciPy's: torch gives them to MKL, which on processors that are
not Intel's takes three times as long.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.linalg import blas, eigh_tridiagonal, lapack
from torch import Tensor

Columns = NDArray[np.float64]


@dataclass(frozen=True, eq=False, slots=True)
class RidgeStatistics:
    """All that a ridge regression needs to know of its rows, in float64.

    Statistics of disjoint rows add up, and those of a part can be taken away again: each fold of
    a cross-validation costs one pass over its own rows. Embeddings count from `shift`: sums of
    squares about a point near their mean keep the digits that those about zero would lose.

    Attributes:
        count: Number of rows; those of weight zero are not counted.
        weight: Sum of the weights; the number of rows where there are none.
        shift: What was taken off every embedding before it was added.
        sum_x: Weighted sum of embeddings.
        sum_y: Weighted sum of ratings.
        xx: Weighted sum of outer products of embeddings.
        xy: Weighted sum of products of embeddings and ratings.
        yy: Weighted sum of squared ratings.
    """

    count: int
    weight: float
    shift: Float[Tensor, " dim"]
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
        weights: Float[Tensor, " batch"] | None = None,
        *,
        shift: Float[Tensor, " dim"] | None = None,
    ) -> "RidgeStatistics":
        """Accumulate rows that all rate all of these objectives.

        Args:
            embeddings: Response embeddings, any floating dtype.
            ratings: Ratings; none missing.
            weights: How much each row's squared error counts, one if not given; a row of weight
                zero is left out.
            shift: Where embeddings count from; zero if not given. Only statistics of the same
                `shift` add up.

        Raises:
            ValueError: If a weight is negative or not finite.
        """
        dim, objectives = embeddings.shape[1], ratings.shape[1]
        sums = RidgeSums(dim, objectives, shift=shift)
        sums.enter(embeddings, ratings, weights)
        return sums.statistics()

    @classmethod
    def zero(cls, dim: int, objectives: int) -> "RidgeStatistics":
        """Return the statistics of no rows."""
        return cls.of(torch.zeros(0, dim), torch.zeros(0, objectives))

    def __add__(self, other: "RidgeStatistics") -> "RidgeStatistics":
        return self._combine(other, 1)

    def __sub__(self, other: "RidgeStatistics") -> "RidgeStatistics":
        return self._combine(other, -1)

    def _combine(self, other: "RidgeStatistics", sign: int) -> "RidgeStatistics":
        if not torch.equal(self.shift, other.shift):
            raise ValueError("Statistics add up only if their `shift` is the same.")
        return RidgeStatistics(
            self.count + sign * other.count,
            self.weight + sign * other.weight,
            self.shift,
            self.sum_x + sign * other.sum_x,
            self.sum_y + sign * other.sum_y,
            self.xx + sign * other.xx,
            self.xy + sign * other.xy,
            self.yy + sign * other.yy,
        )

    def scaled(self, factor: float) -> "RidgeStatistics":
        """Return the statistics of the same rows with their weights times a factor."""
        return RidgeStatistics(
            self.count,
            self.weight * factor,
            self.shift,
            self.sum_x * factor,
            self.sum_y * factor,
            self.xx * factor,
            self.xy * factor,
            self.yy * factor,
        )


class RidgeSums:
    """Adds rows up in place, so that a pass over many chunks needs one square matrix.

    Where two regressions share rows, the sums of one turn into those of the other: what they
    share stays, and only the rows that enter or leave cost an outer product.

    Args:
        dim: Width of an embedding.
        objectives: Number of ratings of a row.
        shift: Where embeddings count from; zero if not given.
    """

    def __init__(
        self, dim: int, objectives: int, *, shift: Float[Tensor, " dim"] | None = None
    ) -> None:
        self.shift = torch.zeros(dim, dtype=torch.float64) if shift is None else shift.double()
        # In the order of Fortran, and its lower triangle alone: what BLAS adds to in place.
        self._xx = np.zeros((dim, dim), order="F")
        self.restart(objectives)

    def restart(self, objectives: int) -> None:
        """Begin the next regression: its rows stay or enter, all others leave."""
        dim = len(self.shift)
        self._count, self._weight = 0, 0.0
        self._sum_x = torch.zeros(dim, dtype=torch.float64)
        self._sum_y = torch.zeros(objectives, dtype=torch.float64)
        self._xy = torch.zeros(dim, objectives, dtype=torch.float64)
        self._yy = torch.zeros(objectives, dtype=torch.float64)

    def enter(
        self,
        embeddings: Float[Tensor, "batch dim"],
        ratings: Float[Tensor, "batch objectives"],
        weights: Float[Tensor, " batch"] | None = None,
    ) -> None:
        """Add rows.

        Raises:
            ValueError: If a weight is negative or not finite.
        """
        x, root = self._weighted(embeddings, weights)
        self._add_ratings(x, root, ratings)
        self._add_products(x, 1.0)

    def stay(
        self,
        embeddings: Float[Tensor, "batch dim"],
        ratings: Float[Tensor, "batch objectives"],
        weights: Float[Tensor, " batch"] | None = None,
    ) -> None:
        """Add rows that the regression before had as well, with the same weights."""
        x, root = self._weighted(embeddings, weights)
        self._add_ratings(x, root, ratings)

    def leave(
        self, embeddings: Float[Tensor, "batch dim"], weights: Float[Tensor, " batch"] | None = None
    ) -> None:
        """Take away rows that only the regression before had, with the same weights."""
        x, _ = self._weighted(embeddings, weights)
        self._add_products(x, -1.0)

    def statistics(self) -> RidgeStatistics:
        """Return the statistics of what was added; they share this object's memory."""
        sums = (self._sum_x, self._sum_y, _mirrored(self._xx), self._xy, self._yy)
        return RidgeStatistics(self._count, self._weight, self.shift, *sums)

    def _weighted(
        self, embeddings: Tensor, weights: Tensor | None
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, " batch"] | None]:
        """Embeddings from `shift` on, times the roots of the weights."""
        x = embeddings - self.shift  # in float64, as `shift` is
        if weights is None:
            return x, None
        check_weights(weights)
        root = weights.double().sqrt()
        return x.mul_(root[:, None]), root

    def _add_ratings(
        self,
        x: Float[Tensor, "batch dim"],
        root: Float[Tensor, " batch"] | None,
        ratings: Float[Tensor, "batch objectives"],
    ) -> None:
        root = torch.ones(len(x), dtype=torch.float64) if root is None else root
        y = ratings.double() * root[:, None]
        products = torch.from_numpy(torch.column_stack([root, y]).numpy().T @ x.numpy())
        self._count += int((root > 0).sum())
        self._weight += float(root.square().sum())
        self._sum_x += products[0]
        self._xy += products[1:].T
        self._sum_y += root @ y
        self._yy += y.square().sum(0)

    def _add_products(self, x: Float[Tensor, "batch dim"], sign: float) -> None:
        if len(x):
            self._xx = blas.dsyrk(sign, x.numpy().T, beta=1.0, c=self._xx, lower=1, overwrite_c=1)


def _mirrored(lower: Columns) -> Float[Tensor, "dim dim"]:
    """Fill the other triangle, in place, a block of columns at a time."""
    matrix = torch.from_numpy(lower.T)
    for start in range(0, len(matrix), 256):
        stop = start + 256
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T
        corner = matrix[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
    return matrix


def check_weights(weights: Float[Tensor, " batch"], *, name: str = "weights") -> None:
    """Refuse weights that are negative or not finite.

    Raises:
        ValueError: Naming the first of them.
    """
    wrong = ~(weights.isfinite() & (weights >= 0.0))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"`{name}` must be finite and not negative, got {float(weights[row])} in row {row}."
        )


@dataclass(frozen=True, eq=False, slots=True)
class RidgeSolution:
    """Weights and intercepts of one penalty, for all objectives; float64."""

    weights: Float[Tensor, "objectives dim"]
    intercepts: Float[Tensor, " objectives"]


@dataclass(frozen=True, eq=False, slots=True)
class RidgeSystem:
    """The equations of a ridge regression, reduced once so that every penalty is cheap.

    The centred `X^T X` is brought to `Q T Q^T` with a tridiagonal `T`; `T + alpha I` is then
    solved in time linear in its width. The reduction takes as long as five Cholesky
    factorisations, where one penalty needs one, and a third of the time of the eigenvectors.

    Attributes:
        centre: Weighted mean of the embeddings; zero where there is no intercept.
        mean_y: Weighted mean of the ratings; zero where there is no intercept.
        share: What the intercept adds to a leverage: one over the sum of weights, or zero.
        diagonal: Of `T`.
        beside: Next to the diagonal of `T`.
        rotated: `Q^T X^T y`.
        reflectors: Householder vectors whose product is `Q`.
        taus: Their factors.
    """

    centre: Float[Tensor, " dim"]
    mean_y: Float[Tensor, " objectives"]
    share: float
    diagonal: Columns
    beside: Columns
    rotated: Columns
    reflectors: Columns
    taus: Columns

    @classmethod
    def of(cls, statistics: RidgeStatistics, *, intercept: bool = True) -> "RidgeSystem":
        """Reduce the equations of some rows.

        Raises:
            ValueError: If there are no rows, or their sums are not finite.
        """
        s = statistics
        if s.count < 1:
            raise ValueError("`statistics` holds no rows.")
        if not bool(s.xx.diagonal().isfinite().all() and s.xy.isfinite().all()):
            raise ValueError(
                "`statistics` is not finite: an embedding or a rating is missing or infinite."
            )
        if intercept:
            mean_x, mean_y = s.sum_x / s.weight, s.sum_y / s.weight
            # A new tensor whatever happens: the reduction overwrites it.
            centred = torch.addr(s.xx, s.sum_x, mean_x, alpha=-1.0)
            xy = s.xy - torch.outer(s.sum_x, mean_y)
            centre, share = mean_x + s.shift, 1.0 / s.weight
        else:
            mean_y, share = torch.zeros_like(s.sum_y), 0.0
            centre = torch.zeros_like(s.sum_x)
            crossed = torch.outer(s.shift, s.sum_x)
            centred = s.xx + crossed + crossed.T + s.weight * torch.outer(s.shift, s.shift)
            xy = s.xy + torch.outer(s.shift, s.sum_y)
        reduced, diagonal, beside, taus = _tridiagonal(centred.numpy().T)
        # Reflector i acts on the rows below i: those of a QR factorisation, one row further down.
        reflectors = np.asfortranarray(reduced[1:, :-1])
        rotated = _rotated(reflectors, taus, xy.numpy(), way="T")
        return cls(centre, mean_y, share, diagonal, beside, rotated, reflectors, taus)

    def solve(self, alphas: Sequence[float]) -> list[RidgeSolution]:
        """Solve for each penalty and all objectives.

        Raises:
            ValueError: If a penalty is not positive, or is lost in rounding.
        """
        columns = np.concatenate([self._solve(self.rotated, alpha) for alpha in alphas], axis=1)
        stacked = torch.from_numpy(np.ascontiguousarray(self._back(columns).T))
        return [
            RidgeSolution(weights, self.mean_y - weights @ self.centre)
            for weights in stacked.split(len(self.mean_y))
        ]

    def leverages(
        self, embeddings: Float[Tensor, "batch dim"], alphas: Sequence[float]
    ) -> Float[Tensor, "batch alphas"]:
        """Variance of the reward at some embeddings, in units of the variance of a rating.

        `1/n + h~^T (X~^T X~ + alpha I)^-1 h~` for each penalty, with `~` for centred: the
        posterior's, of an even prior for the intercept and `N(0, sigma^2 / alpha)` for weights.
        """
        centred = (embeddings - self.centre).numpy().T
        rotated = _rotated(self.reflectors, self.taus, centred, way="T")
        columns = [(rotated * self._solve(rotated, alpha)).sum(0) for alpha in alphas]
        return torch.from_numpy(np.stack(columns, axis=1)) + self.share

    def spectrum(self) -> tuple[Float[Tensor, " dim"], Float[Tensor, "dim dim"]]:
        """Return the eigenvalues of `X^T X`, ascending, and its eigenvectors, in columns."""
        if len(self.diagonal) == 1:
            values, vectors = self.diagonal, np.ones((1, 1))
        else:
            values, vectors = eigh_tridiagonal(self.diagonal, self.beside)
        # Rounding can leave eigenvalues of a semi-definite matrix just below zero.
        values = np.maximum(values, 0.0)
        return torch.from_numpy(values), torch.from_numpy(self._back(vectors))

    def _back(self, columns: Columns) -> Columns:
        return _rotated(self.reflectors, self.taus, columns, way="N")

    def _solve(self, columns: Columns, alpha: float) -> Columns:
        if not alpha > 0.0:
            raise ValueError(f"`alphas` must be positive, got {alpha}.")
        if len(self.diagonal) == 1:
            solved: Columns = columns / (self.diagonal.clip(min=0.0) + alpha)
            return solved
        _, _, solved, info = lapack.dptsv(self.diagonal + alpha, self.beside, columns)
        if info != 0:
            raise ValueError(
                f"`alphas`: {alpha:g} is lost in rounding: too small a penalty for embeddings so "
                f"long, or so far from where they count from. Use larger penalties."
            )
        return solved


def _rotated(
    reflectors: Columns, taus: Columns, columns: Columns, *, way: Literal["N", "T"]
) -> Columns:
    """Multiply columns by `Q`, or by its transpose."""
    if not len(taus) or not columns.shape[1]:
        return columns
    below = np.asfortranarray(columns[1:])
    _, work, _ = lapack.dormqr("L", way, reflectors, taus, below, -1)
    below, _, info = lapack.dormqr("L", way, reflectors, taus, below, int(work[0]))
    assert info == 0
    return np.concatenate([columns[:1], below])


def _tridiagonal(matrix: Columns) -> tuple[Columns, ...]:
    """Reduce a symmetric matrix in the order of Fortran, in place.

    Returns:
        The matrix with the reflectors below its diagonal; the two diagonals; the factors.
    """
    if len(matrix) == 1:
        return matrix, matrix[0].copy(), np.zeros(0), np.zeros(0)
    work, _ = lapack.dsytrd_lwork(len(matrix), lower=1)
    *reduced, info = lapack.dsytrd(matrix, lower=1, lwork=int(work), overwrite_a=1)
    assert info == 0
    return tuple(reduced)


def solve_ridge(
    statistics: RidgeStatistics, *, alphas: Sequence[float], intercept: bool = True
) -> list[RidgeSolution]:
    """Solve ridge regressions for several penalties at once.

    For each objective the weights `w` and intercept `b` minimise
    `sum_i v_i (x_i w + b - y_i)^2 + alpha ||w||^2` with row weights `v`; the intercept is not
    penalised. All penalties and all objectives come from one factorisation.

    Args:
        statistics: Of the rows to fit; at least one.
        alphas: Penalties, in units of squared embedding length times row weight. Must be positive.
        intercept: Whether to fit `b`; zero otherwise.

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
    return RidgeSystem.of(statistics, intercept=intercept).solve(alphas)


def squared_error(
    solution: RidgeSolution, statistics: RidgeStatistics
) -> Float[Tensor, " objectives"]:
    """Weighted sum of squared errors of a solution on the rows of some statistics."""
    return squared_errors([solution], statistics)[0]


def squared_errors(
    solutions: Sequence[RidgeSolution], statistics: RidgeStatistics
) -> Float[Tensor, "solutions objectives"]:
    """Weighted sums of squared errors of several solutions on the same rows."""
    s = statistics
    w = torch.stack([solution.weights for solution in solutions])
    b = torch.stack([solution.intercepts for solution in solutions]) + w @ s.shift
    squares = ((w.flatten(0, 1) @ s.xx).view_as(w) * w).sum(2)
    products = (w * s.xy.T).sum(2) + b * s.sum_y
    return s.yy - 2.0 * products + squares + 2.0 * b * (w @ s.sum_x) + s.weight * b.square()


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


def without_each(
    parts: Sequence[RidgeStatistics], *, intercept: bool = True
) -> tuple[RidgeSystem, ...]:
    """Reduce, for each part, the equations of all the others.

    Raises:
        ValueError: If fewer than two parts hold rows.
    """
    if sum(part.count > 0 for part in parts) < 2:
        raise ValueError("`folds` needs rows in at least two parts.")
    total = sum(parts[1:], start=parts[0])
    return tuple(RidgeSystem.of(total - part, intercept=intercept) for part in parts)


def select_alpha(
    folds: Sequence[RidgeStatistics],
    *,
    alphas: Sequence[float],
    intercept: bool = True,
    systems: Sequence[RidgeSystem] | None = None,
) -> list[RidgeChoice]:
    """Choose one penalty per objective by cross-validation.

    Args:
        folds: Statistics of disjoint parts of the rows. For an honest choice all rows of a
            prompt are in one part.
        alphas: Penalties to choose from. Must be positive.
        intercept: Whether to fit one.
        systems: What `without_each` gave for these parts, if it is at hand.

    Returns:
        One choice per objective.

    Raises:
        ValueError: If fewer than two parts hold rows.
    """
    systems = without_each(folds, intercept=intercept) if systems is None else systems
    sum_y = torch.stack([fold.sum_y for fold in folds]).sum(0)
    weight = sum(fold.weight for fold in folds)
    error = torch.zeros(len(alphas), len(sum_y), dtype=torch.float64)
    baseline = torch.zeros(len(sum_y), dtype=torch.float64)
    solutions = []
    for fold, system in zip(folds, systems, strict=True):
        solutions.append(system.solve(alphas))
        error += squared_errors(solutions[-1], fold)
        mean = (sum_y - fold.sum_y) / (weight - fold.weight)
        baseline += fold.yy - 2.0 * mean * fold.sum_y + fold.weight * mean.square()
    error, baseline = error / weight, baseline / weight
    choices = []
    for k, best in enumerate(error.argmin(dim=0).tolist()):
        without = tuple((fit[best].weights[k], float(fit[best].intercepts[k])) for fit in solutions)
        choices.append(RidgeChoice(float(alphas[best]), without, error[:, k], float(baseline[k])))
    return choices
