"""Metrics with intervals over prompts, since responses to one prompt are not independent."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from armo.fit.decorrelation import deviate, spearman

__all__ = [
    "Interval",
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
    _, inverse, counts = groups.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, inverse, values.double())
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(draws, dtype=torch.float64)
    for k in range(draws):
        drawn = torch.randint(len(counts), (len(counts),), generator=generator)
        means[k] = sums[drawn].sum() / counts[drawn].sum()
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(values.double().mean()), low, high)


def rank_correlation(first: Float[Tensor, " batch"], second: Float[Tensor, " batch"]) -> float:
    """Spearman's rank correlation; ties share their mean rank; 0 if either is constant."""
    return spearman(first, second)


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
    return spearman(both[:, 0], both[:, 1])
