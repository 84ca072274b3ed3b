"""Metrics with intervals over prompts, since responses to one prompt are not independent."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from armo.fit.decorrelation import deviate, spearman, standard_ranks

__all__ = [
    "Interval",
    "bootstrap_contrasts",
    "bootstrap_correlation",
    "bootstrap_interval",
    "pairwise_accuracy",
    "rank_correlation",
    "within_prompt_correlation",
]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def pairwise_accuracy(differences: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """Credit per pair: 1 if the chosen response scores higher, 0.5 for a tie, else 0.

    Args:
        differences: Score of the chosen minus score of the rejected response.
    """
    return (differences > 0).double() + 0.5 * (differences == 0).double()


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

    References:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 8 and 13.
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
    """Linear combinations of means over parts of the rows, with intervals as above.

    Args:
        values: One value per row and part; NaN where the row is not in that part.
        contrasts: Coefficients of the parts' means, one row per combination.
        groups: Prompt group of each row; drawn with replacement, all rows of it together.
        seed: Of the resampling.
        draws: Number of resamples; one that leaves a part empty is left out.

    Raises:
        ValueError: If a part has no rows.
    """
    inside = ~values.isnan()
    if not bool(inside.any(0).all()):
        raise ValueError("`values` has a part without rows.")
    _, inverse = groups.unique(return_inverse=True)
    count = int(inverse.max()) + 1
    both = torch.cat([values.nan_to_num(0.0), inside.double()], dim=1)
    sums = torch.zeros(count, both.shape[1], dtype=torch.float64).index_add_(0, inverse, both)
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(draws, values.shape[1], dtype=torch.float64)
    for k in range(draws):
        drawn = torch.randint(count, (count,), generator=generator)
        total, rows = sums[drawn].sum(0).chunk(2)
        means[k] = total / rows
    combined = (means @ contrasts.T)[means.isfinite().all(1)]
    edges = combined.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    centre = contrasts @ (both.sum(0).chunk(2)[0] / both.sum(0).chunk(2)[1])
    return [
        Interval(*each)
        for each in zip(centre.tolist(), edges[0].tolist(), edges[1].tolist(), strict=True)
    ]


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
    _, inverse = groups.unique(return_inverse=True)
    count = int(inverse.max()) + 1
    moments = torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y], dim=1)
    sums = torch.zeros(count, 6, dtype=torch.float64).index_add_(0, inverse, moments)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack(
        [
            sums[torch.randint(count, (count,), generator=generator)].sum(0) / len(x)
            for _ in range(draws)
        ]
    )
    n, sx, sy, xx, yy, xy = drawn.T
    spread = ((xx - sx * sx / n) * (yy - sy * sy / n)).clamp(min=0.0).sqrt()
    varies = spread > 1e-12 / len(x)
    values = ((xy - sx * sy / n) / spread)[varies]
    if not len(values):
        return Interval(float(x @ y), -1.0, 1.0)
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(x @ y), low, high)


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
