"""Metrics with intervals over prompts, since responses to one prompt are not independent."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from armo.fit.decorrelation import deviate, spearman, standard_ranks

__all__ = [
    "Estimates",
    "Interval",
    "bootstrap_contrasts",
    "bootstrap_correlation",
    "bootstrap_estimates",
    "bootstrap_interval",
    "pairwise_accuracy",
    "percentile_intervals",
    "rank_correlation",
    "resampled",
    "resampled_counts",
    "within_prompt_correlation",
]

COUNTS_AT_ONCE = 2**18
"""Resampling counts in memory at a time, few enough to stay in the cache."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, eq=False, slots=True)
class Estimates:
    """Lines of a table for several models, with 95 % bootstrap intervals, in float64.

    Attributes:
        mean: Each line of each model.
        low: Lower end of its interval.
        high: Upper end.
        gain: The line less that of the reference model.
        gain_low: Lower end of its interval.
        gain_high: Upper end.
        p_value: Of no difference from the reference model, see `bootstrap_estimates`.
    """

    mean: Float[Tensor, "models lines"]
    low: Float[Tensor, "models lines"]
    high: Float[Tensor, "models lines"]
    gain: Float[Tensor, "models lines"]
    gain_low: Float[Tensor, "models lines"]
    gain_high: Float[Tensor, "models lines"]
    p_value: Float[Tensor, "models lines"]

    def intervals(self, model: int) -> list[Interval]:
        """All lines of a model."""
        three = zip(self.mean[model], self.low[model], self.high[model], strict=True)
        return [Interval(float(mean), float(low), float(high)) for mean, low, high in three]


def pairwise_accuracy(differences: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """Credit per pair: 1 if the chosen response scores higher, 0.5 for a tie, else 0.

    Args:
        differences: Score of the chosen minus score of the rejected response.
    """
    return (differences > 0).double() + 0.5 * (differences == 0).double()


def bootstrap_estimates(
    values: Float[Tensor, "models units parts"],
    coefficients: Float[Tensor, "lines parts"],
    groups: Int[Tensor, " units"],
    *,
    reference: int = 0,
    seed: int = 0,
    draws: int = 2000,
) -> Estimates:
    """Linear combinations of means over parts of the units, for several models side by side.

    Prompts are drawn with replacement, all units of one together, and every model sees the same
    draws: the intervals of `gain` and its p-values are of paired differences. Intervals are the
    2.5th and 97.5th percentile.

    The p-value tests, two-sided, that the line of a model equals that of the reference in
    expectation over prompts. Of `B` resamples, `b` have a gain of zero or below and `a` of zero or
    above: `p = min(1, 2 (1 + min(a, b)) / (1 + B))`. It is the bootstrap interval read backwards:
    `p < 0.05` where zero is outside of `[gain_low, gain_high]`, up to interpolation. It is never
    zero, and is 1 where the models do not differ. With about ten prompts small ones come too
    often, as the intervals are too short; ties between models make large ones larger. Of `n`
    prompts it is at least `2^(1 - n)`, the least that turning their signs round can give: resamples
    of so few are all alike, which is no evidence.

    Args:
        values: One value per model, unit and part; NaN where the unit is not in that part, which
            is so for all models or for none.
        coefficients: How much the mean of each part counts, one row per line.
        groups: Prompt group of each unit.
        reference: The model that gains are over.
        seed: Of the resampling. The same groups and seed give the same draws in every call.
        draws: Number of resamples. One that leaves a part of a line empty is left out for that
            line; without any that is not, the intervals and p-values of the line are NaN.

    Raises:
        ValueError: If a part has no units, or has other units for one model than for another.

    References:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 8, 13 and 15.
        Davison and Hinkley, "Bootstrap Methods and their Application", 1997, chapter 4.
    """
    inside = ~values[reference].isnan()
    if bool((values.isnan() == inside).any()):
        raise ValueError("`values` has parts whose units differ between models.")
    if not bool(inside.any(0).all()):
        raise ValueError("`values` has a part without units.")
    models, parts = len(values), values.shape[2]
    filled = values.double().nan_to_num(0.0)
    # Differences are summed as such, so that equal values differ by exactly zero.
    over = filled - filled[reference]
    columns = torch.cat([over.transpose(0, 1).flatten(1), filled[reference], inside], dim=1)
    sums = _cluster_sums(columns, groups)
    coefficients = coefficients.double()
    uses = (coefficients != 0.0).double()

    # Prompts that have a part in each line.
    prompts = ((sums[:, -parts:] > 0.0).double() @ uses.T > 0.0).sum(0)

    def lines(
        drawn: Float[Tensor, "drawn columns"],
    ) -> tuple[Float[Tensor, "drawn lines models"], Float[Tensor, "drawn lines"]]:
        gains, own, units = drawn.split([models * parts, parts, parts], dim=1)
        empty = (units == 0.0).double() @ uses.T > 0.0
        units = units.clamp(min=1.0)
        gained = torch.einsum(
            "dmp,lp->dlm", gains.unflatten(1, (models, parts)) / units[:, None], coefficients
        )
        own = (own / units) @ coefficients.T
        return gained.masked_fill(empty[..., None], torch.nan), own.masked_fill(empty, torch.nan)

    gains, own = lines(resampled(sums, seed=seed, draws=draws))
    [gain], [mean] = lines(sums.sum(0, keepdim=True))
    kept = (~gains.isnan()).sum(0)
    zero = 1e-12 * float(filled.abs().max())  # below it, rounding
    tail = torch.minimum((gains <= zero).sum(0), (gains >= -zero).sum(0)).double()
    p_value = (2.0 * (1.0 + tail) / (1.0 + kept)).clamp(max=1.0)
    p_value = torch.maximum(p_value, torch.exp2(1.0 - prompts.double())[:, None])
    low, high = _percentiles(own[..., None] + gains)
    mean = mean[:, None] + gain
    mean, low, high = (each.masked_fill(each.abs() <= zero, 0.0) for each in (mean, low, high))
    gain_low, gain_high = _percentiles(gains)
    return Estimates(
        mean=mean.T,
        low=low.T,
        high=high.T,
        gain=gain.T,
        gain_low=gain_low.T,
        gain_high=gain_high.T,
        p_value=p_value.masked_fill(kept == 0, torch.nan).T,
    )


def bootstrap_interval(
    values: Float[Tensor, " batch"],
    groups: Int[Tensor, " batch"],
    *,
    seed: int = 0,
    draws: int = 2000,
) -> Interval:
    """Mean of values with a 95 % percentile interval, resampling whole prompts.

    Args:
        values: One value per row.
        groups: Prompt group of each row; drawn with replacement, all rows of it together.
        seed: Of the resampling.
        draws: Number of resamples.

    Raises:
        ValueError: If there are no values.
    """
    if not len(values):
        raise ValueError("`values` is empty.")
    whole = torch.ones(1, 1, dtype=torch.float64)
    return bootstrap_contrasts(values.double()[:, None], whole, groups, seed=seed, draws=draws)[0]


def bootstrap_contrasts(
    values: Float[Tensor, "batch parts"],
    contrasts: Float[Tensor, "contrasts parts"],
    groups: Int[Tensor, " batch"],
    *,
    seed: int = 0,
    draws: int = 2000,
) -> list[Interval]:
    """`bootstrap_estimates` of a single model.

    Args:
        values: One value per row and part; NaN where the row is not in that part.
        contrasts: Coefficients of the parts' means, one row per combination.
        groups: Prompt group of each row; drawn with replacement, all rows of it together.
        seed: Of the resampling.
        draws: Number of resamples.

    Raises:
        ValueError: If a part has no rows.
    """
    found = bootstrap_estimates(values[None], contrasts, groups, seed=seed, draws=draws)
    return found.intervals(0)


def bootstrap_correlation(
    first: Float[Tensor, " batch"],
    second: Float[Tensor, " batch"],
    groups: Int[Tensor, " batch"],
    *,
    seed: int = 0,
    draws: int = 2000,
) -> Interval:
    """Spearman's correlation with a 95 % percentile interval, resampling whole prompts.

    Ranks are those among all rows, also within a resample. A resample in which one side is
    constant is left out; without any that is not, the interval is everything.

    Args:
        first: One value per row.
        second: The same.
        groups: Prompt group of each row; drawn with replacement, all rows of it together.
        seed: Of the resampling.
        draws: Number of resamples.
    """
    x, y = standard_ranks(first), standard_ranks(second)
    moments = torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y], dim=1)
    drawn = resampled(_cluster_sums(moments, groups) / len(x), seed=seed, draws=draws)
    n, sx, sy, xx, yy, xy = drawn.T
    spread = ((xx - sx * sx / n) * (yy - sy * sy / n)).clamp(min=0.0).sqrt()
    varies = spread > 1e-12 / len(x)
    values = ((xy - sx * sy / n) / spread)[varies]
    if not len(values):
        return Interval(float(x @ y), -1.0, 1.0)
    return percentile_intervals((x @ y)[None], values[:, None])[0]


def percentile_intervals(
    whole: Float[Tensor, " figures"], drawn: Float[Tensor, "draws figures"]
) -> list[Interval]:
    """Put figures of the whole beside the 95 % percentiles of what resamples gave."""
    three = zip(whole, *_percentiles(drawn), strict=True)
    return [Interval(float(mean), float(low), float(high)) for mean, low, high in three]


def resampled_counts(
    clusters: int, *, seed: int, draws: int
) -> Iterator[Float[Tensor, "drawn clusters"]]:
    """Yield how often each cluster is in each resample, some resamples at a time.

    How many at a time is for memory alone: the draws are those of one after the other.
    """
    generator = torch.Generator().manual_seed(seed)
    one = torch.ones((), dtype=torch.float64)
    at_once = max(1, COUNTS_AT_ONCE // clusters)
    for start in range(0, draws, at_once):
        drawn = torch.randint(
            clusters, (min(at_once, draws - start), clusters), generator=generator
        )
        counts = torch.zeros(drawn.shape, dtype=torch.float64)
        yield counts.scatter_add_(1, drawn, one.expand(drawn.shape))


def _cluster_sums(
    columns: Float[Tensor, "rows columns"], groups: Int[Tensor, " rows"]
) -> Float[Tensor, "clusters columns"]:
    _, cluster = groups.unique(return_inverse=True)
    sums = torch.zeros(int(cluster.max()) + 1, columns.shape[1], dtype=torch.float64)
    return sums.index_add_(0, cluster, columns)


def resampled(
    sums: Float[Tensor, "clusters columns"], *, seed: int, draws: int
) -> Float[Tensor, "draws columns"]:
    """Sums over the clusters of each resample, drawn as many as there are with replacement."""
    return torch.cat(
        [counts @ sums for counts in resampled_counts(len(sums), seed=seed, draws=draws)]
    )


def _percentiles(
    drawn: Float[Tensor, "draws ..."],
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Both ends of the 95 % interval of what was drawn, NaN apart."""
    edges = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = drawn.nanquantile(edges, dim=0)
    return low, high


def rank_correlation(first: Float[Tensor, " batch"], second: Float[Tensor, " batch"]) -> float:
    """Spearman's rank correlation; ties share their mean rank; 0 if either is constant."""
    return float(spearman(first[:, None], second[:, None]))


def within_prompt_correlation(
    first: Float[Tensor, " batch"],
    second: Float[Tensor, " batch"],
    prompts: Int[Tensor, " batch"],
) -> float:
    """Spearman's correlation of deviations from each prompt's mean.

    What best-of-N and reinforcement learning see: they compare responses to one prompt.
    Prompts with a single response are left out.
    """
    both = deviate(torch.stack([first, second], dim=1).double(), prompts, scope="within_prompt")
    return float(spearman(both[:, :1], both[:, 1:]))
