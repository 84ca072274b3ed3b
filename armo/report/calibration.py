"""Are preference probabilities to be believed: how often what is called likely comes true."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from armo.report.metrics import Interval, resampled
from armo.report.tables import Table

__all__ = ["Calibration", "ReliabilityBin", "calibration_error", "calibration_tables"]


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Pairs of about the same confidence.

    Attributes:
        predicted: Mean probability of the response that is preferred by the model, from 0.5 on.
        observed: How often it was preferred.
        count: Number of pairs.
    """

    predicted: float
    observed: float
    count: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """How far probabilities are from what happened.

    Attributes:
        error: The expected calibration error, with its 95 % interval. The low end is zero unless
            the error is above `null.high`.
        null: What a perfectly calibrated model would show on as many such pairs: above zero, since
            no bin's share of so few is exact. Mean, and the middle 95 %.
        bins: The reliability curve, least confident first.
    """

    error: Interval
    null: Interval
    bins: tuple[ReliabilityBin, ...]


def calibration_error(
    probabilities: Float[Tensor, " pairs"],
    outcomes: Float[Tensor, " pairs"],
    prompts: Int[Tensor, " pairs"],
    *,
    bins: int = 5,
    seed: int = 0,
    draws: int = 2000,
) -> Calibration:
    """Expected calibration error: the mean distance of predicted from observed shares, over bins.

    Which response is the first is arbitrary, so pairs are folded: `f = max(p, 1 - p)` is the
    probability of the response that the model prefers. They are cut into bins of about as many
    pairs, by quantiles of `f`, and the error is `sum_b |mean f - mean outcome| n_b / n`. It is
    never below zero, so chance alone makes it positive, the more so the more bins there are and
    the fewer pairs: few bins, and `null` to compare with.

    Both intervals resample whole prompts. A resample's bins are off by what the true ones are and
    by chance twice over, so `error` has the resamples' spread about their own mean, not their
    values; and `null` is made of each bin's deviation from its own value in the data, which is
    chance alone, however the pairs of a prompt hang together.

    Args:
        probabilities: That the first response is preferred, from 0 to 1.
        outcomes: Share of judges who preferred it, from 0 to 1; 0.5 is a tie.
        prompts: Prompt group of each pair; drawn with replacement, all pairs of it together.
        bins: Number of bins; fewer where many pairs have the same probability.
        seed: Of the resampling.
        draws: Number of resamples.

    Raises:
        ValueError: If there are no pairs, a value is not from 0 to 1, or `bins` is not positive.

    References:
        Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI 2015;
        Roelofs et al., "Mitigating Bias in Calibration Error Estimation", AISTATS 2022, for bins of
        equal mass and the estimator's bias.

    Example:
        >>> likely, preferred = torch.tensor([1.0, 0.25, 0.75]), torch.tensor([1.0, 0.0, 0.0])
        >>> calibration_error(likely, preferred, torch.arange(3), bins=1).bins[0].predicted
        0.8333333333333334
    """
    if not len(probabilities):
        raise ValueError("`probabilities` is empty.")
    if bins < 1:
        raise ValueError(f"`bins` must be at least 1, got {bins}.")
    for name, values in (("probabilities", probabilities), ("outcomes", outcomes)):
        if not bool(((values >= 0.0) & (values <= 1.0)).all()):
            raise ValueError(f"`{name}` must be from 0 to 1.")
    p, y = probabilities.double(), outcomes.double()
    folded = torch.maximum(p, 1.0 - p)
    # Of an even pair neither response is preferred by the model: either could be the first.
    observed = torch.where(p > 0.5, y, torch.where(p < 0.5, 1.0 - y, 0.5))
    edges = folded.quantile(torch.linspace(0.0, 1.0, bins + 1, dtype=torch.float64))
    _, place = torch.searchsorted(edges[1:-1], folded).unique(return_inverse=True)
    used = int(place.max()) + 1
    _, group = prompts.unique(return_inverse=True)
    count = int(group.max()) + 1
    # Per prompt and bin: pairs, and what was predicted and observed of them.
    pairs = torch.stack([torch.ones_like(folded), folded, observed], dim=1)
    sums = torch.zeros(count * used, 3, dtype=torch.float64)
    sums = sums.index_add_(0, group * used + place, pairs).view(count, used, 3)
    rows, predicted, right = sums.sum(0).T
    error = float((predicted - right).abs().sum() / len(folded))
    gaps = (predicted - right) / rows
    again = resampled(sums.flatten(1), seed=seed, draws=draws).view(draws, used, 3)
    drawn, off = again[:, :, 0], again[:, :, 1] - again[:, :, 2]
    found = torch.stack([off, off - gaps * drawn]).abs().sum(2) / drawn.sum(1)
    sides = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = (error + found[0].quantile(sides) - found[0].mean()).tolist()
    null = Interval(float(found[1].mean()), *found[1].quantile(sides).tolist())
    return Calibration(
        error=Interval(error, max(low, 0.0) if error > null.high else 0.0, min(high, 1.0)),
        null=null,
        bins=tuple(
            ReliabilityBin(predicted=shares[0], observed=shares[1], count=int(shares[2]))
            for shares in torch.stack([predicted / rows, right / rows, rows], 1).tolist()
        ),
    )


def calibration_tables(
    probabilities: Mapping[str, Float[Tensor, " pairs"]],
    outcomes: Float[Tensor, " pairs"],
    prompts: Int[Tensor, " pairs"],
    *,
    seed: int = 0,
) -> list[Table]:
    """Show the calibration of some models: their errors, and their reliability curves.

    Args:
        probabilities: Of each model, by its name.
        outcomes: As for `calibration_error`.
        prompts: The same.
        seed: Of the resampling.
    """
    found = {
        name: calibration_error(values, outcomes, prompts, seed=seed)
        for name, values in probabilities.items()
    }
    return [
        Table(
            "calibration",
            "Preference probabilities: are they to be believed?",
            ("model", "pairs", "error", "low", "high", "if calibrated", "at most"),
            tuple(
                (
                    name,
                    len(outcomes),
                    *(each.error.mean, each.error.low, each.error.high),
                    *(each.null.mean, each.null.high),
                )
                for name, each in found.items()
            ),
            "Expected calibration error over bins of about as many pairs, with 95 % bootstrap "
            "intervals over prompts. By chance a calibrated model shows an error too, the more so "
            "the fewer pairs there are: if calibrated, on average and at most, in 97.5 % of cases.",
        ),
        Table(
            "reliability",
            "Of the pairs with such a probability, how many went that way?",
            ("model", "predicted", "observed", "pairs"),
            tuple(
                (name, each.predicted, each.observed, each.count)
                for name, one in found.items()
                for each in one.bins
            ),
            "By the probability of the response that the model prefers; a tie counts half.",
        ),
    ]
