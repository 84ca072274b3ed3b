"""The gating network: a shallow MLP from the prompt embedding to weights over objectives."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

# Effective number of objectives of the mean weights below which a gate counts as collapsed, and
# share of its score differences below which it counts as constant.
COLLAPSED = 1.5
UNCONDITIONAL = 0.001

# Prompts at once where no gradient is kept.
EVALUATED = 8192


class GatingNetwork(nn.Module):
    """Weights over objectives, from the prompt alone: the mean of several small networks.

    Each gives `softmax((c + MLP(p)) / temperature)` of the prompt embedding. The weights are
    non-negative and sum to one over the mixed objectives; those of the others (bias objectives)
    are zero. The networks, members of an ensemble, are run together. The last layer starts at
    zero, so a new network gives the weights of the constant logits `c` to every prompt, and has
    to learn every departure from them.
    """

    def __init__(
        self,
        *,
        dim: int,
        objectives: int,
        mixed: Sequence[int],
        members: int = 1,
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
            members: Number of networks whose weights are averaged.
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
        if temperature <= 0.0 or min(dim, hidden_dim, members) < 1 or hidden_layers < 0:
            raise ValueError(
                "`dim`, `temperature`, `hidden_dim` and `members` must be positive, "
                "`hidden_layers` not negative."
            )
        self.objectives = objectives
        self.temperature = temperature
        widths = [dim, *[hidden_dim] * hidden_layers]
        self.hidden = nn.ModuleList(
            Layers(members, wide, narrow) for wide, narrow in itertools.pairwise(widths)
        )
        self.dropout = nn.Dropout(dropout)
        self.output = Layers(members, widths[-1], len(mixed))
        nn.init.zeros_(self.output.weight)
        # The constant logits of each member.
        nn.init.zeros_(self.output.bias)
        self.register_buffer("mixed", torch.tensor(list(mixed)))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.mixed: Tensor
        self.mean: Tensor
        self.scale: Tensor

    def forward(self, prompts: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch objectives"]:
        """Return gating weights, one set per prompt embedding."""
        return self.member_weights(prompts).mean(0)

    def member_weights(
        self, prompts: Float[Tensor, "*batch dim"]
    ) -> Float[Tensor, "members *batch objectives"]:
        """Return the gating weights of each member; how far they are apart is uncertainty."""
        shape = prompts.shape[:-1]
        hidden = ((prompts.to(self.mean.dtype) - self.mean) / self.scale).reshape(
            -1, len(self.mean)
        )
        for layer in self.hidden:
            hidden = self.dropout(F.relu(layer(hidden)))
        logits = self.output(hidden) / self.temperature
        # The last axis is the objectives: any other one would mix prompts or responses.
        mixed = torch.softmax(logits, dim=-1).reshape(self.members, *shape, len(self.mixed))
        weights = mixed.new_zeros(*mixed.shape[:-1], self.objectives)
        return weights.index_copy(-1, self.mixed, mixed)

    def own_weights(
        self,
        prompts: Float[Tensor, "prompts dim"],
        prompt_of: Int[Tensor, " batch"],
        members: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch objectives"]:
        """Return the gating weights that one member gives to one prompt each; no dropout."""
        weights = self.mean.new_zeros(len(members), self.objectives)
        for member in range(self.members):
            for rows in (members == member).nonzero()[:, 0].split(EVALUATED):
                hidden = prompts[prompt_of[rows]].to(self.mean.dtype)
                hidden = (hidden - self.mean) / self.scale
                for layer in self.hidden:
                    assert isinstance(layer, Layers)
                    hidden = F.relu(F.linear(hidden, layer.weight[member], layer.bias[member]))
                logits = F.linear(hidden, self.output.weight[member], self.output.bias[member])
                mixed = torch.softmax(logits / self.temperature, dim=-1)
                weights[rows[:, None], self.mixed] = mixed
        return weights

    @property
    def members(self) -> int:
        """Number of networks whose weights are averaged."""
        return len(self.output.weight)

    @property
    def shape(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON: with the tensors, all there is to save."""
        return {
            "dim": len(self.mean),
            "objectives": self.objectives,
            "mixed": self.mixed.tolist(),
            "members": self.members,
            "hidden_dim": self.output.weight.shape[2] if len(self.hidden) else 1,
            "hidden_layers": len(self.hidden),
            "dropout": self.dropout.p,
            "temperature": self.temperature,
        }

    @torch.no_grad()
    def start_from(
        self,
        *,
        weights: Float[Tensor, "members objectives"],
        prompts: Float[Tensor, "batch dim"],
    ) -> None:
        """Start at constant mixes, and standardise the input on the training prompts.

        Args:
            weights: Constant weights of each member over all objectives, positive on the mixed
                ones.
            prompts: Embeddings of the training prompts.
        """
        logits = self.temperature * weights[:, self.mixed].clamp(min=1e-6).log()
        nn.init.zeros_(self.output.weight)
        self.output.bias.copy_(logits)
        self.mean.copy_(prompts.mean(0))
        self.scale.copy_(prompts.std(0, correction=0).clamp(min=1e-6))


class Layers(nn.Module):
    """One linear layer of each member of an ensemble, run together."""

    def __init__(self, members: int, wide: int, narrow: int) -> None:
        """Draw the weights as `torch.nn.Linear` does."""
        super().__init__()
        edge = wide**-0.5
        self.weight = nn.Parameter(torch.empty(members, narrow, wide).uniform_(-edge, edge))
        self.bias = nn.Parameter(torch.empty(members, narrow).uniform_(-edge, edge))

    def forward(
        self, inputs: Float[Tensor, "*members batch wide"]
    ) -> Float[Tensor, "members batch narrow"]:
        """Apply each member's layer to its inputs, or to inputs that all of them share."""
        if inputs.ndim == 2:  # one product, a quarter faster than one of each member
            together = F.linear(inputs, self.weight.flatten(0, 1), self.bias.flatten())
            return together.view(len(inputs), *self.bias.shape).transpose(0, 1)
        return torch.baddbmm(self.bias[:, None], inputs, self.weight.mT)


def contributions(
    weights: Float[Tensor, "batch objectives"], adjusted: Float[Tensor, "batch objectives"]
) -> Float[Tensor, "batch objectives"]:
    """What each objective adds to the score: its weight times its adjusted reward."""
    return weights * adjusted


@dataclass(frozen=True, slots=True)
class GatingDiagnostics:
    """What a gate does with the prompts of some comparisons.

    Attributes:
        mean: Mean weight by objective, over prompts.
        spread: Standard deviation of the weight over prompts.
        uncertainty: Standard deviation of the weight between members, root mean square over
            prompts.
        entropy: Mean entropy of a prompt's weights, in nats.
        effective: Effective number of objectives of a prompt, `exp(entropy)`, averaged.
        effective_mean: The same of the mean weights.
        prompt_share: Share of the variance of score differences that weights fixed at their means
            leave unexplained: what looking at the prompt does.
    """

    mean: dict[str, float]
    spread: dict[str, float]
    uncertainty: dict[str, float]
    entropy: float
    effective: float
    effective_mean: float
    prompt_share: float

    @property
    def warnings(self) -> list[str]:
        """What looks wrong, one sentence each."""
        found = []
        top = max(self.mean, key=lambda name: self.mean[name])
        if len(self.mean) > 1 and self.effective_mean < COLLAPSED:
            found.append(
                f"The gate has collapsed: {self.mean[top]:.0%} of the weight is on {top!r}, the "
                f"mean weights make {self.effective_mean:.2f} objectives."
            )
        if len(self.mean) > 1 and self.prompt_share < UNCONDITIONAL:
            found.append(
                f"The gate hardly looks at the prompt: constant weights explain all but "
                f"{self.prompt_share:.2%} of its score differences."
            )
        return found


@torch.no_grad()
def diagnose(
    gate: GatingNetwork,
    prompts: Float[Tensor, "batch dim"],
    *,
    prompt_of: Int[Tensor, " comparisons"],
    differences: Float[Tensor, "comparisons objectives"],
    objectives: Sequence[str],
) -> GatingDiagnostics:
    """Tell what a gate does.

    Args:
        gate: In evaluation mode.
        prompts: Embeddings of distinct prompts.
        prompt_of: Prompt of each comparison of two responses.
        differences: Adjusted rewards of one response minus those of the other.
        objectives: Names of the columns.
    """
    parts = [gate.member_weights(part) for part in prompts.split(EVALUATED)]
    weights = torch.cat(parts, dim=1)
    together = weights.mean(0).double()
    mixed = gate.mixed.tolist()
    entropy = torch.special.entr(together).sum(1)
    mean = together.mean(0)
    columns = {
        "mean": mean,
        "spread": together.std(0, correction=0),
        "uncertainty": weights.double().var(0, correction=0).mean(0).sqrt(),
    }
    gated = (together[prompt_of] * differences).sum(1)
    fixed = differences.double() @ mean
    product, squares = gated @ fixed, gated.square().sum() * fixed.square().sum()
    return GatingDiagnostics(
        **{
            name: {objectives[k]: float(values[k]) for k in mixed}
            for name, values in columns.items()
        },
        entropy=float(entropy.mean()),
        effective=float(entropy.exp().mean()),
        effective_mean=float(torch.special.entr(mean).sum().exp()),
        prompt_share=1.0 - float(product.square() / squares) if float(squares) > 0.0 else 0.0,
    )
