"""Logistic heads: from yes-or-no targets, from judgements of pairs, from those beside ratings.

Every loss here is convex, and its curvature is never above that of a quadratic known in advance:
a logistic loss bends at most a quarter as much as a squared one. One eigendecomposition of that
quadratic preconditions limited-memory BFGS for all folds and all penalties at once. They are the
columns of one matrix, so a pass over the data is two matrix products, whatever their number.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

# A logistic curve of slope 1.702 is within 0.01 of the normal distribution (Haley 1952), and the
# error of a difference is sqrt(2) times the error of one rating: Thurstone's Case V.
THURSTONE = 1.702 / math.sqrt(2.0)
HISTORY = 20


@dataclass(frozen=True, eq=False, slots=True)
class LabelledRows:
    """A batch of rows with one target each.

    Attributes:
        inputs: Response embeddings; for judgements, chosen minus rejected.
        targets: Probability of yes, probability that the chosen response is better, or rating.
        sample_weights: How often each row counts, for instance its number of votes; not negative.
        folds: Part of the cross-validation that each row belongs to, from 0.
    """

    inputs: Float[Tensor, "batch dim"]
    targets: Float[Tensor, " batch"]
    sample_weights: Float[Tensor, " batch"]
    folds: Int[Tensor, " batch"]


RowSource = Callable[[], Iterable[LabelledRows]]


@dataclass(frozen=True, eq=False, slots=True)
class LogisticChoice:
    """A head with the penalty chosen by cross-validation, and what led to it; float64.

    Attributes:
        alpha: Penalty with the least cross-validated loss.
        weights: Fitted on all rows with this penalty.
        intercept: The same.
        scale: Log-odds of a judgement per unit of reward difference; 1 without ratings, where
            rewards are log-odds themselves.
        without: For each part, the weights and intercept fitted on all the others.
        loss: Cross-validated mean loss of each penalty, in nats per unit of sample weight.
        baseline: That of the best constant predictor.
        passes: Passes over the rows that it took.
    """

    alpha: float
    weights: Float[Tensor, " dim"]
    intercept: float
    scale: float
    without: tuple[tuple[Float[Tensor, " dim"], float], ...]
    loss: Float[Tensor, " alphas"]
    baseline: float
    passes: int


def fit_binary(
    rows: RowSource, *, folds: int, alphas: Sequence[float], max_passes: int = 1000
) -> LogisticChoice:
    """Fit a logistic regression with intercept, its penalty chosen by cross-validation.

    The weights `w` and intercept `b` minimise, over rows with sample weight `s`, input `h` and
    target `t` in [0, 1], `sum s CE(t, sigmoid(w . h + b)) + alpha / 2 ||w||^2`, where
    `CE(t, p) = -t log p - (1 - t) log(1 - p)`. The reward `w . h + b` is in log-odds.

    Args:
        rows: Called once for each pass; yields the same rows each time, in batches of any size.
        folds: Parts of the cross-validation. For an honest choice, all rows of a prompt are in one.
        alphas: Penalties to choose from, in units of squared embedding length.
        max_passes: Passes after which to give up.

    Raises:
        ValueError: If a value is out of range, fewer than two parts hold rows, or the rows outside
            a part are all yes or all no.
        RuntimeError: If a gradient has not fallen to 1e-8 of its start, or to rounding, after
            `max_passes`.

    References:
        Böhning and Lindsay, "Monotonicity of Quadratic-Approximation Algorithms", Annals of the
        Institute of Statistical Mathematics 40(4), 1988: the bound on the curvature.
        Nocedal and Wright, "Numerical Optimization", 2006, section 7.2: L-BFGS.

    Example:
        >>> x, t = torch.tensor([[-1.0], [1.0]]).repeat(2, 1), torch.tensor([0.2, 0.8]).repeat(2)
        >>> rows = LabelledRows(x, t, torch.ones(4), torch.tensor([0, 0, 1, 1]))
        >>> fit_binary(lambda: [rows], folds=2, alphas=[1e-9, 1.0]).weights.exp()
        tensor([4.0000], dtype=torch.float64)
    """
    return _choose(
        rows, [], noise=1.0, intercept=True, folds=folds, alphas=alphas, max_passes=max_passes
    )


def fit_judgements(
    rows: RowSource,
    ratings: Iterable[LabelledRows] = (),
    *,
    folds: int,
    alphas: Sequence[float],
    noise: float = THURSTONE,
    max_passes: int = 1000,
) -> LogisticChoice:
    """Fit a head to judgements of pairs, and to ratings where there are any.

    Without ratings the weights `v` minimise, over pairs with sample weight `s`, difference `d` of
    embeddings and probability `t` that the chosen response is better (Bradley-Terry),
    `sum s CE(t, sigmoid(v . d)) + alpha / 2 ||v||^2`; there is no intercept.

    With ratings the reward stays on the rating scale: `r = w . h + b`. A rating is `r` plus a
    normal error of deviation `sigma`, and log-odds of a judgement are `scale` times the difference
    of rewards. How large `scale` is follows from the data once `noise = scale * sigma` is given,
    the error of a rating in log-odds of a judgement. With `v = scale w` and `c = scale b`, what is
    minimised over `v`, `c` and `scale` is the penalised likelihood of both kinds of labels,

        sum_ratings s [(scale y - v . h - c)^2 / (2 noise^2) - log(scale / noise)]
            + sum_judgements s CE(t, sigmoid(v . d)) + alpha / 2 ||v||^2,

    which is convex in all three, so that nothing has to be tuned in turns and the result is
    unique. Changing the unit of the ratings changes the unit of the reward and nothing else.
    Without judgements it is the ridge regression with penalty `alpha noise^2`, and `sigma^2` is
    what that minimises, divided by the number of ratings.

    The default of `noise` says that a judge compares two ratings with errors of their own. A
    larger one trusts judgements more. Losses of several can be compared: the best constant is as
    good for all of them.

    Args:
        rows: As for `fit_binary`; `inputs` are differences of embeddings.
        ratings: Rated responses, in batches; read once. Folds as those of `rows`.
        folds: As for `fit_binary`.
        alphas: As for `fit_binary`.
        noise: Deviation of a rating's error times `scale`. Must be positive.
        max_passes: As for `fit_binary`.

    Raises:
        ValueError: If a value is out of range, fewer than two parts hold rows, or the ratings
            outside a part are all the same.
        RuntimeError: As for `fit_binary`.

    References:
        Bradley and Terry, "Rank Analysis of Incomplete Block Designs", Biometrika 39, 1952.
        Wettig et al., "QuRating", ICML 2024: soft judgements, one head per criterion.
        Thurstone, "A Law of Comparative Judgment", Psychological Review 34, 1927: Case V.
        Olsen, "Note on the Uniqueness of the Maximum Likelihood Estimator for the Tobit Model",
        Econometrica 46(5), 1978: the change of variables that makes it convex.

    Example:
        >>> x, t = torch.tensor([[2.0], [2.0]]), torch.tensor([0.8, 0.8])
        >>> rows = LabelledRows(x, t, torch.ones(2), torch.tensor([0, 1]))
        >>> fit_judgements(lambda: [rows], folds=2, alphas=[1e-9]).weights.exp()
        tensor([2.0000], dtype=torch.float64)
    """
    if noise <= 0.0:
        raise ValueError(f"`noise` must be positive, got {noise}.")
    return _choose(
        rows,
        _add_up(ratings, folds=folds, probabilities=False),
        noise=noise,
        intercept=False,
        folds=folds,
        alphas=alphas,
        max_passes=max_passes,
    )


class _Moments(NamedTuple):
    """Weighted sums over rows, of 1, y, y^2, x, x y and x x^T."""

    weight: Tensor
    y: Tensor
    yy: Tensor
    x: Tensor
    xy: Tensor
    xx: Tensor

    def spread(self) -> Tensor:
        """Sum of squares of `y` about its mean."""
        return self.yy - self.y.square() / self.weight


def _add_up(batches: Iterable[LabelledRows], *, folds: int, probabilities: bool) -> list[_Moments]:
    """Sum up each part, checking the values; nothing if there are no batches."""
    parts: list[_Moments] = []
    for rows in batches:
        if bool((rows.sample_weights < 0.0).any()):
            raise ValueError("`sample_weights` must not be negative.")
        if bool(((rows.folds < 0) | (rows.folds >= folds)).any()):
            raise ValueError(f"`folds` of a row must be at least 0 and below {folds}.")
        if probabilities and bool(((rows.targets < 0.0) | (rows.targets > 1.0)).any()):
            raise ValueError("`targets` must be probabilities, from 0 to 1.")
        for fold in range(folds):
            own = rows.folds == fold
            x, y, s = (v[own].double() for v in (rows.inputs, rows.targets, rows.sample_weights))
            weighted = x * s[:, None]
            sums = (s.sum(), s @ y, s @ y.square(), s @ x, y @ weighted, weighted.T @ x)
            if len(parts) < folds:
                parts.append(_Moments(*sums))
            else:
                for total, value in zip(parts[fold], sums, strict=True):
                    total += value
    if not all(bool(total.isfinite().all()) for part in parts for total in part):
        raise ValueError("`inputs`, `targets` and `sample_weights` must be finite.")
    return parts


def _total(parts: Sequence[_Moments]) -> _Moments:
    return _Moments(*(functools.reduce(torch.add, sums) for sums in zip(*parts, strict=True)))


def _rests(parts: Sequence[_Moments]) -> list[_Moments]:
    """Return the moments of all rows but those of each part, and of all rows."""
    total = _total(parts)
    return [*(_Moments(*map(torch.sub, total, part)) for part in parts), total]


def _profile(ratings: _Moments, weights: Tensor, *, noise: float) -> tuple[Tensor, Tensor]:
    """Return the `scale` and `c` that fit the ratings best, per column of weights `v`."""
    n, along = ratings.weight, ratings.x @ weights
    half = 0.5 * (ratings.xy @ weights - ratings.y * along / n)
    # The positive root of `spread scale^2 - 2 half scale = noise^2 n`.
    root = (half.square() + noise**2 * n * ratings.spread()).sqrt()
    scale = (half + root) / ratings.spread()
    return scale, (scale * ratings.y - along) / n


def _rating_loss(
    ratings: _Moments, weights: Tensor, scale: Tensor, offset: Tensor, *, noise: float
) -> Tensor:
    """Sum the negative log densities of the ratings, per column."""
    squares = (
        scale.square() * ratings.yy
        + ((ratings.xx @ weights) * weights).sum(0)
        + offset.square() * ratings.weight
        - 2.0 * scale * (ratings.xy @ weights + offset * ratings.y)
        + 2.0 * offset * (ratings.x @ weights)
    )
    constant = math.log(noise) + 0.5 * math.log(2.0 * math.pi)
    return 0.5 * squares / noise**2 + ratings.weight * (constant - scale.log())


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    # Not `softplus`, which is off by 2e-9 beyond its threshold.
    return -(targets * F.logsigmoid(logits) + (1.0 - targets) * F.logsigmoid(-logits))


@dataclass(frozen=True, eq=False, slots=True)
class _Problem:
    """All folds and penalties, one column each, in coordinates where the bound is diagonal.

    Coordinates `u` stand for the weights `axes @ u[:-1]`, and for the intercept `u[-1]` of inputs
    less their mean.

    Attributes:
        rows: The rows with a logistic loss.
        rated: Moments of the ratings that each group of columns is fitted to; empty without.
        group: Of each column: the part that it leaves out, the number of parts for none.
        alphas: Penalty of each column.
        intercept: Whether the logistic loss has one.
        noise: See `fit_judgements`.
        mean: Mean input where there is an intercept; else zero.
        axes: Eigenvectors of the bound on the curvature from all rows.
        bound: Its eigenvalues, and its value for the intercept.
        rounding: Norm of a gradient within rounding of zero, for each column, over the root of the
            curvature for the intercept.
    """

    rows: RowSource
    rated: Sequence[_Moments]
    group: Tensor
    alphas: Tensor
    intercept: bool
    noise: float
    mean: Tensor
    axes: Tensor
    bound: Tensor
    rounding: Tensor

    @classmethod
    def of(
        cls,
        rows: RowSource,
        every: _Moments,
        rated: Sequence[_Moments],
        *,
        group: Tensor,
        alphas: Tensor,
        intercept: bool,
        noise: float,
    ) -> "_Problem":
        mean = every.x / every.weight * intercept
        bound, bend = 0.25 * (every.xx - torch.outer(mean, every.x)), 0.25 * every.weight
        size = every.xx.trace()
        if rated:
            last = rated[-1]
            bound += (last.xx - torch.outer(last.x, last.x) / last.weight) / noise**2
            bend = bend + last.weight / noise**2
            size = size + last.xx.trace() / noise**2
        values, axes = torch.linalg.eigh(bound)
        # Rounding can leave eigenvalues of a semi-definite matrix just below zero.
        bound = torch.cat([values.clamp(min=0.0), bend[None]])
        # Sums of residuals, times inputs for the weights, over the root of the least curvature;
        # ten times, to be safe.
        rounding = 10.0 * torch.finfo(torch.float64).eps * (size / alphas + 16.0).sqrt()
        return cls(rows, rated, group, alphas, intercept, noise, mean, axes, bound, rounding)

    def heads(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights, one column each, and intercepts."""
        weights = self.axes @ u[:-1]
        return weights, u[-1] - self.mean @ weights

    def evaluate(self, u: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, gradient and diagonal metric of some columns; one pass over the rows."""
        weights, intercepts = self.heads(u)
        group, alphas = self.group[columns], self.alphas[columns]
        loss, bend = 0.5 * alphas * u[:-1].square().sum(0), torch.zeros_like(alphas)
        slopes, slope = torch.zeros_like(weights), torch.zeros_like(alphas)
        for rows in self.rows():
            x, t = rows.inputs.double(), rows.targets.double()[:, None]
            s = rows.sample_weights.double()[:, None] * (rows.folds[:, None] != group)
            logits = x @ weights + intercepts
            p = logits.sigmoid()
            residuals = s * (p - t)
            loss += (s * _cross_entropy(logits, t)).sum(0)
            bend += (s * p * (1.0 - p)).sum(0)
            slopes += x.T @ residuals
            slope += residuals.sum(0)
        for number, rated in enumerate(self.rated):
            own = group == number
            scale, offset = _profile(rated, weights[:, own], noise=self.noise)
            loss[own] += _rating_loss(rated, weights[:, own], scale, offset, noise=self.noise)
            errors = rated.xx @ weights[:, own] + torch.outer(rated.x, offset)
            slopes[:, own] += (errors - torch.outer(rated.xy, scale)) / self.noise**2
            bend[own] += rated.weight / self.noise**2
        slope = slope * self.intercept
        rotated = self.axes.T @ (slopes - torch.outer(self.mean, slope)) + alphas * u[:-1]
        # The bound, scaled down to the mean curvature at this point: up to four times fewer passes.
        # Never to zero, where all rows are certain: there is no intercept, or it is far off.
        metric = torch.outer(self.bound, (bend / self.bound[-1]).clamp(min=1e-30))
        metric[:-1] += alphas
        return loss, torch.cat([rotated, slope[None]]), metric


def _minimise(problem: _Problem, u: Tensor, *, max_passes: int) -> tuple[Tensor, int]:
    """Minimise every column by L-BFGS, each with its own steps; return `u` and the passes.

    A column is done when the norm of its gradient has fallen to 1e-8 of what it was, or to
    rounding; it is left out of later passes. The norm is that of the metric at the same point:
    where all rows are nearly certain, a small gradient can be far from the minimum.
    """
    columns = torch.arange(u.shape[1])
    loss, gradient, metric = problem.evaluate(u, columns)
    target = 1e-8 * (gradient.square() / metric).sum(0).sqrt()
    history: list[tuple[Tensor, Tensor, Tensor]] = []
    direction, step = -gradient / metric, torch.ones_like(loss)
    for passes in range(1, max_passes + 1):
        floor = problem.rounding * metric[-1].sqrt()
        going = ~((gradient.square() / metric).sum(0).sqrt() <= target.maximum(floor))
        if not bool(going.any()):
            return u, passes
        if passes == max_passes:
            break
        trial, new_loss, new_gradient = u + step * direction, loss.clone(), gradient.clone()
        new_loss[going], new_gradient[:, going], new_metric = problem.evaluate(
            trial[:, going], columns[going]
        )
        slope, new_slope = (gradient * direction).sum(0), (new_gradient * direction).sum(0)
        # The second way in is for losses that differ by rounding alone (Hager and Zhang 2005).
        enough = new_loss <= loss + 1e-4 * step * slope
        close = (new_loss <= loss + 1e-10 * loss.abs()) & (new_slope <= -0.8 * slope)
        good = going & (enough | close)
        metric[:, going] = torch.where(good[going], new_metric, metric[:, going])
        moved, turned = trial - u, new_gradient - gradient
        bent = (moved * turned).sum(0)
        history.append((moved, turned, torch.where(good & (bent > 0.0), 1.0 / bent, 0.0)))
        del history[:-HISTORY]
        u, loss = torch.where(good, trial, u), torch.where(good, new_loss, loss)
        gradient = torch.where(good, new_gradient, gradient)
        # Elsewhere a step back, to where the slope would vanish if it were linear.
        shorter = step * (slope / (slope - new_slope)).clamp(0.1, 0.5)
        step = torch.where(good, 1.0, shorter)
        direction = torch.where(good, _direction(gradient, metric, history), direction)
    stuck = sorted(set(problem.alphas[going].tolist()))
    raise RuntimeError(
        f"Not converged after {max_passes} passes for penalties {stuck}; raise `max_passes`, or "
        "drop the smallest of `alphas`."
    )


def _direction(
    gradient: Tensor, metric: Tensor, history: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> Tensor:
    """Two-loop recursion of L-BFGS, for every column; a weight of zero skips a pair."""
    direction, along = -gradient, []
    for moved, turned, weight in reversed(history):
        along.append(weight * (moved * direction).sum(0))
        direction = direction - along[-1] * turned
    direction = direction / metric
    for (moved, turned, weight), forth in zip(history, reversed(along), strict=True):
        direction = direction + (forth - weight * (turned * direction).sum(0)) * moved
    return direction


def _choose(
    rows: RowSource,
    ratings: Sequence[_Moments],
    *,
    noise: float,
    intercept: bool,
    folds: int,
    alphas: Sequence[float],
    max_passes: int,
) -> LogisticChoice:
    if min(alphas) <= 0.0:
        raise ValueError(f"`alphas` must be positive, got {list(alphas)}.")
    parts = _add_up(rows(), folds=folds, probabilities=True)
    if sum(float(part.weight) > 0.0 for part in parts) < 2:
        raise ValueError("`rows` needs weight in at least two parts.")
    every, rated = _total(parts), _rests(ratings) if ratings else []
    parts = [part._replace(xx=part.weight) for part in parts]  # the only large one, used up
    rests = _rests(parts)
    share = torch.stack([rest.y / rest.weight for rest in rests])
    if intercept and not bool(((share > 0.0) & (share < 1.0)).all()):
        raise ValueError("`targets` outside one of the parts are all 0 or all 1; add rows.")
    if not all(bool(rest.spread() > 1e-12 * rest.yy) for rest in rated):
        raise ValueError("`ratings` outside one of the parts are all the same; add ratings.")
    group = torch.arange(folds + 1).repeat_interleave(len(alphas))
    penalties = torch.tensor(alphas, dtype=torch.float64).repeat(folds + 1)
    problem = _Problem.of(
        rows, every, rated, group=group, alphas=penalties, intercept=intercept, noise=noise
    )
    start = torch.zeros(len(problem.bound), len(group), dtype=torch.float64)
    if intercept:
        start[-1] = share.logit()[group]
    u, passes = _minimise(problem, start, max_passes=max_passes)

    weights, intercepts = problem.heads(u)
    loss, scales = torch.zeros_like(intercepts), torch.ones_like(intercepts)
    for batch in rows():
        logits = batch.inputs.double() @ weights + intercepts
        s = batch.sample_weights.double()[:, None] * (batch.folds[:, None] == group)
        loss += (s * _cross_entropy(logits, batch.targets.double()[:, None])).sum(0)
    constant = share.logit() if intercept else torch.zeros_like(share)
    baseline = sum(
        -float(part.y * F.logsigmoid(logit) + (part.weight - part.y) * F.logsigmoid(-logit))
        for part, logit in zip(parts, constant[:-1], strict=True)
    )
    nothing = torch.zeros(len(weights), 1, dtype=torch.float64)
    for number, rest in enumerate(rated):
        own = group == number
        scales[own], intercepts[own] = _profile(rest, weights[:, own], noise=noise)
        if number < folds:
            fit, mean = (scales[own], intercepts[own]), _profile(rest, nothing, noise=noise)
            loss[own] += _rating_loss(ratings[number], weights[:, own], *fit, noise=noise)
            baseline += float(_rating_loss(ratings[number], nothing, *mean, noise=noise))
    total = float(sum(part.weight for part in (*parts, *ratings)))
    error = loss.view(folds + 1, -1)[:folds].sum(0) / total
    best = int(error.argmin())
    heads = [
        (weights[:, k] / scales[k], float(intercepts[k] / scales[k]))
        for k in range(best, len(group), len(alphas))
    ]
    return LogisticChoice(
        alpha=float(alphas[best]),
        weights=heads[-1][0],
        intercept=heads[-1][1],
        scale=float(scales.view(folds + 1, -1)[-1, best]),
        without=tuple(heads[:-1]),
        loss=error,
        baseline=baseline / total,
        passes=passes + 2,
    )
