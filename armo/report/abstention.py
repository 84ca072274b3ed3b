"""Risk and coverage: how much is right if a model may pass on pairs that it finds close."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from armo.report.metrics import (
    Interval,
    pairwise_accuracy,
    percentile_intervals,
    resampled_counts,
)
from armo.report.tables import Table

COVERAGES = (100, 90, 80, 70, 60, 50, 40, 30, 20, 10)
"""Per cent of the pairs that are answered."""


def risk_coverage(
    differences: Float[Tensor, " pairs"],
    prompts: Int[Tensor, " pairs"],
    *,
    seed: int = 0,
    draws: int = 2000,
) -> tuple[list[Interval], Interval]:
    """Accuracy on the clearest pairs, with 95 % bootstrap intervals over prompts.

    A pair is the clearer, the larger the size of its score difference. Pairs as clear as each
    other are answered together or not at all: at a coverage of `c`, that is the clearest `c` of
    the pairs and all that are as clear as the last of these. Each resample is ordered anew.

    The area under the curve is the mean, over the pairs, of the accuracy among those that are at
    least as clear. It is the accuracy itself where clearness says nothing, and where all pairs are
    equally clear.

    Args:
        differences: Score of the right less score of the wrong response. A tie is right by half.
        prompts: Prompt group of each pair; drawn with replacement, all pairs of it together.
        seed: Of the resampling.
        draws: Number of resamples.

    Returns:
        The accuracy at each of `COVERAGES`, and the area.

    Raises:
        ValueError: If there are no pairs, or a difference is not a number.

    References:
        El-Yaniv and Wiener, "On the Foundations of Noise-free Selective Classification", JMLR 11,
        2010; Geifman and El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS
        2017 (curves of risk and coverage).
    """
    if not len(differences) or bool(differences.isnan().any()):
        raise ValueError("`differences` needs at least one pair, and numbers alone.")
    clearness, order = differences.double().abs().sort(descending=True)
    credit = pairwise_accuracy(differences[order])
    # For each pair, the last of those that are as clear.
    last = torch.searchsorted(-clearness, -clearness, right=True) - 1
    _, cluster = prompts[order].unique(return_inverse=True)
    shares = torch.tensor(COVERAGES, dtype=torch.float64) / 100.0

    def curve(counts: Float[Tensor, "drawn clusters"]) -> Float[Tensor, "drawn figures"]:
        copies = counts[:, cluster]
        answered, right = copies.cumsum(1), (copies * credit).cumsum(1)
        accuracy = (right / answered.clamp(min=1.0))[:, last]
        wanted = answered[:, -1:] * shares
        at = accuracy.gather(1, torch.searchsorted(answered, wanted))
        area = (copies * accuracy).sum(1, keepdim=True) / answered[:, -1:]
        return torch.cat([at, area], dim=1)

    clusters = int(cluster.max()) + 1
    whole = curve(torch.ones(1, clusters, dtype=torch.float64))[0]
    drawn = [curve(counts) for counts in resampled_counts(clusters, seed=seed, draws=draws)]
    *found, area = percentile_intervals(whole, torch.cat(drawn))
    return found, area


def abstention_tables(
    names: Sequence[str],
    differences: Float[Tensor, "models pairs"],
    prompts: Int[Tensor, " pairs"],
    *,
    seed: int = 0,
) -> list[Table]:
    """Compare what models get right when they answer clear pairs only, with random order.

    Args:
        names: Of the models.
        differences: Score of the right less score of the wrong response.
        prompts: Prompt group of each pair.
        seed: Of the resampling.

    Raises:
        ValueError: If there are no pairs, or a difference is not a number.
    """
    curves, areas = [], []
    for name, own in zip(names, differences, strict=True):
        found, area = risk_coverage(own, prompts, seed=seed)
        curves += [
            (name, coverage, each.mean, each.low, each.high)
            for coverage, each in zip(COVERAGES, found, strict=True)
        ]
        areas.append((name, area.mean, area.low, area.high, found[0].mean))
    pairs = f"{differences.shape[1]} pairs on {len(prompts.unique())} prompts"
    return [
        Table(
            "abstention",
            "Accuracy if only the clearest preferences count",
            ("model", "coverage", "accuracy", "low", "high"),
            tuple(curves),
            f"{pairs}, ordered by the size of the score difference; coverage: per cent of the "
            "pairs that are answered, the clearest first, those as clear as the last of them "
            "included. 95 % bootstrap intervals over prompts.",
        ),
        Table(
            "abstention_summary",
            "Does a model know when it is unsure?",
            ("model", "area", "low", "high", "random"),
            tuple(areas),
            f"{pairs}. Area: the mean accuracy over all coverages; random: the same with pairs in "
            "random order, which is the accuracy on all of them. 95 % bootstrap intervals over "
            "prompts.",
        ),
    ]
