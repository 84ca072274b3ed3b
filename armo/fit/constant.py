"""The best constant mix: weights over objectives that do not look at the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from armo.fit.preferences import PreferenceBatch, on_first, plackett_luce_loss


@dataclass(frozen=True, eq=False, slots=True)
class ConstantMix:
    """The best weights that do not look at the prompt; float64.

    Attributes:
        weights: Over all objectives; zero for those that are not mixed.
        beta: Scale of score differences in the preference probability.
        style: Log-odds per unit of each surface feature; zero unless style is a nuisance.
    """

    weights: Float[Tensor, " objectives"]
    beta: float
    style: Float[Tensor, " features"]


def fit_constant_mix(
    batch: PreferenceBatch, *, mixed: Sequence[int], nuisance: bool = False, decay: float = 1e-4
) -> ConstantMix:
    """Fit the constant weights and `beta` that explain the preferences best.

    Minimises the mean loss (`plackett_luce_loss` of `beta score + style`) over weights that are
    non-negative and sum to one on the mixed objectives, by L-BFGS on their logits, plus `decay`
    times the squared logits, the squared log of `beta` and the squared style coefficients, which
    keeps them finite where an objective deserves no weight, or where the preferences can be told
    without error.

    Args:
        batch: What to explain; the prompts are not looked at.
        mixed: Columns that may get weight.
        nuisance: Whether the effect of style itself is estimated beside the weights.
        decay: Pull towards equal weights.
    """
    columns = list(mixed)
    counts = (~batch.ranks.isnan()).sum(1)
    # By length: one long list would pad every pair.
    parts = []
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero()[:, 0]
        measured = batch.style[rows, :count].double()
        parts.append(
            (
                batch.adjusted[rows, :count][..., columns].double(),
                measured if nuisance else measured[..., :0],
                on_first(batch.margins[rows].double(), count),
                batch.ranks[rows, :count],
                batch.flipped[rows].double(),
                batch.weights[rows].double(),
            )
        )
    total = batch.weights.double().sum()
    logits = torch.zeros(len(mixed), dtype=torch.float64, requires_grad=True)
    log_beta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    style = torch.zeros(
        batch.style.shape[2] if nuisance else 0, dtype=torch.float64, requires_grad=True
    )
    optimizer = torch.optim.LBFGS(
        [logits, log_beta, style], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        weights, beta = logits.softmax(dim=0), log_beta.exp()
        loss = decay * (logits - logits.mean()).square().sum() + decay * log_beta.square()
        loss = loss + decay * style.square().sum()
        for values, measured, ahead, ranks, flipped, counted in parts:
            odds = beta * (values @ weights) + measured @ style - ahead
            losses = plackett_luce_loss(odds, ranks, flipped=flipped)
            loss = loss + (losses * counted).sum() / total
        loss.backward()
        return loss

    optimizer.step(closure)
    mix = torch.zeros(batch.adjusted.shape[2], dtype=torch.float64)
    mix[columns] = logits.detach().softmax(dim=0)
    coefficients = torch.zeros(batch.style.shape[2], dtype=torch.float64)
    coefficients[: len(style)] = style.detach()
    return ConstantMix(mix, float(log_beta.detach().exp()), coefficients)
