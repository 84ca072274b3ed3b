"""The gating network: a shallow MLP from the prompt embedding to weights over objectives."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class GatingNetwork(nn.Module):
    """Weights over objectives, from the prompt alone: `softmax((c + MLP(p)) / temperature)`.

    The weights are non-negative and sum to one over the mixed objectives; those of the others
    (bias objectives) are zero. The MLP's last layer starts at zero, so a new network gives the
    weights of the constant logits `c` to every prompt, and has to learn every departure from
    them.
    """

    def __init__(
        self,
        *,
        dim: int,
        objectives: int,
        mixed: Sequence[int],
        hidden_dim: int = 64,
        hidden_layers: int = 1,
        dropout: float = 0.5,
        temperature: float = 1.0,
    ) -> None:
        """Build the network.

        Args:
            dim: Width of a prompt embedding.
            objectives: Number of objectives.
            mixed: Columns of the objectives that may get weight.
            hidden_dim: Width of a hidden layer.
            hidden_layers: Number of hidden layers; 0 makes the logits linear in the prompt.
            dropout: Share of hidden units dropped in training.
            temperature: Divides the logits; higher is flatter.

        Raises:
            ValueError: If `mixed` is empty, or a size or the temperature is not positive.
        """
        super().__init__()
        if not mixed:
            raise ValueError("`mixed` must name at least one objective.")
        if len(set(mixed)) < len(mixed) or not set(mixed) <= set(range(objectives)):
            raise ValueError(
                f"`mixed` must be distinct columns of {objectives} objectives, got {list(mixed)}."
            )
        if temperature <= 0.0 or hidden_dim < 1 or hidden_layers < 0:
            raise ValueError(
                "`temperature` and `hidden_dim` must be positive, `hidden_layers` not negative."
            )
        self.objectives = objectives
        self.temperature = temperature
        widths = [dim, *[hidden_dim] * hidden_layers]
        self.hidden = nn.ModuleList(
            nn.Linear(wide, narrow) for wide, narrow in itertools.pairwise(widths)
        )
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(widths[-1], len(mixed), bias=False)
        nn.init.zeros_(self.output.weight)
        self.constant = nn.Parameter(torch.zeros(len(mixed)))
        self.register_buffer("mixed", torch.tensor(list(mixed)))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.mixed: Tensor
        self.mean: Tensor
        self.scale: Tensor

    def forward(self, prompts: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch objectives"]:
        """Return gating weights, one set per prompt embedding."""
        hidden = (prompts.to(self.mean.dtype) - self.mean) / self.scale
        for layer in self.hidden:
            hidden = self.dropout(F.relu(layer(hidden)))
        logits = (self.constant + self.output(hidden)) / self.temperature
        # The last axis is the objectives: any other one would mix prompts or responses.
        mixed = torch.softmax(logits, dim=-1)
        weights = mixed.new_zeros(*mixed.shape[:-1], self.objectives)
        return weights.index_copy(-1, self.mixed, mixed)

    @property
    def shape(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON: with the tensors, all there is to save."""
        return {
            "dim": len(self.mean),
            "objectives": self.objectives,
            "mixed": self.mixed.tolist(),
            "hidden_dim": self.output.in_features if len(self.hidden) else 1,
            "hidden_layers": len(self.hidden),
            "dropout": self.dropout.p,
            "temperature": self.temperature,
        }

    @torch.no_grad()
    def start_from(
        self,
        *,
        weights: Float[Tensor, " objectives"],
        prompts: Float[Tensor, "batch dim"],
    ) -> None:
        """Start at a constant mix, and standardise the input on the training prompts.

        Args:
            weights: Constant weights over all objectives, positive on the mixed ones.
            prompts: Embeddings of the training prompts.
        """
        self.constant.copy_(self.temperature * weights[self.mixed].clamp(min=1e-6).log())
        self.mean.copy_(prompts.mean(0))
        self.scale.copy_(prompts.std(0, correction=0).clamp(min=1e-6))


def contributions(
    weights: Float[Tensor, "batch objectives"], adjusted: Float[Tensor, "batch objectives"]
) -> Float[Tensor, "batch objectives"]:
    """What each objective adds to the score: its weight times its adjusted reward."""
    return weights * adjusted
