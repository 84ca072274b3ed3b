"""Embeddings in, scores out: the fitted parts as one module, beside their backbone."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from armo.data.objectives import ObjectiveSet
from armo.data.surface import SURFACE_FEATURES, surface_features
from armo.embed.backbone import Backbone
from armo.fit.decorrelation import RewardTransform, style_part
from armo.fit.gating import GatingNetwork, contributions
from armo.fit.heads import ObjectiveHeads, RewardUncertainty
from armo.fit.judged import apply_links
from armo.model.config import ArmoConfig
from armo.model.output import RewardOutput
from armo.model.pretrained import ModelConfig
from armo.model.token_rows import TokenReader

# The backbone's model among the modules of this one.
LANGUAGE_MODEL = "language_model"

TENSORS = (
    "rewards",
    "uncertainty",
    "adjusted",
    "gating_weights",
    "gating_uncertainty",
    "contributions",
)
"""Columns of an output that are tensors, but for the score, in the order of `RewardModelOutput`."""


class EmbeddingScorer(PreTrainedModel):
    """Heads, reward transform and gate over the embeddings of a backbone.

    Heads and gate stay in float64 whatever the model is cast to, and it always is in evaluation
    mode.
    """

    config_class = ArmoConfig
    base_model_prefix = LANGUAGE_MODEL
    main_input_name = "input_ids"

    def __init__(
        self,
        *,
        objectives: ObjectiveSet,
        backbone: Backbone,
        heads: ObjectiveHeads,
        transform: RewardTransform,
        gate: GatingNetwork,
        beta: float,
        uncertainty: RewardUncertainty | None = None,
    ) -> None:
        """Join the fitted parts; `uncertainty` is that of the rewards of `heads`.

        Raises:
            ValueError: If the parts disagree on the objectives or on the embedding's width.
        """
        if not objectives.names == heads.objectives == transform.objectives:
            raise ValueError(
                f"The parts have other objectives: declared {objectives.names}, heads "
                f"{heads.objectives}, transform {transform.objectives}."
            )
        if heads.weights.shape[1] != backbone.dim:
            raise ValueError(
                f"The heads read embeddings of width {heads.weights.shape[1]}, the backbone gives "
                f"{backbone.dim}."
            )
        declared = ModelConfig(
            objectives, backbone.spec, gate.shape, transform.covariates, heads.links
        )
        super().__init__(ArmoConfig(**declared.to_dict()))
        self.num_labels = 1
        self.objectives = objectives
        self.backbone = backbone
        # Under its own name too, so that it goes where the model goes.
        self.add_module(LANGUAGE_MODEL, backbone.model)
        self.rows = TokenReader(backbone.planner)
        self.folder: Path | None = None
        self.uncertainty = uncertainty
        self.covariates = transform.covariates
        self.links = heads.links
        self.gate = copy.deepcopy(gate).eval().requires_grad_(False).double()
        for name, tensor in {
            "head_weights": heads.weights,
            "head_intercepts": heads.intercepts,
            "adjusted_weights": transform.matrix,
            "adjusted_offset": transform.offset,
            "adjusted_style": transform.style,
            "covariate_range": transform.covariate_range,
            "beta": torch.tensor(beta),
        }.items():
            self.register_buffer(name, tensor.detach().double())
        self.head_weights: Tensor
        self.head_intercepts: Tensor
        self.adjusted_weights: Tensor
        self.adjusted_offset: Tensor
        self.adjusted_style: Tensor
        self.covariate_range: Tensor
        self.beta: Tensor

    def train(self, mode: bool = True) -> "EmbeddingScorer":
        """Stay in evaluation mode: a score never depends on dropout."""
        super().train(False)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EmbeddingScorer":
        """Move everything, but cast the backbone's weights alone.

        Rounded heads give equal scores, and a rounded table of rotary frequencies reads positions
        otherwise than the model does that is loaded in that dtype.
        """
        exact = {name: tensor.detach() for name, tensor in self._exact_tensors().items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in self._exact_tensors().items():
            if tensor.dtype != exact[name].dtype:
                tensor.data = exact[name].to(tensor.device)
        return self

    def _exact_tensors(self) -> dict[str, Tensor]:
        """All that is never cast: our own tensors, and what the backbone computes and not loads."""
        weights = self.state_dict(keep_vars=True)
        tables = {name: t for name, t in self.named_buffers() if name not in weights}
        return tables | self._own_tensors()

    def _own_tensors(self) -> dict[str, Tensor]:
        """Heads, transform and gate: all but the backbone's."""
        tensors: dict[str, Tensor] = self.state_dict(keep_vars=True)
        return {k: t for k, t in tensors.items() if not k.startswith(f"{LANGUAGE_MODEL}.")}

    @torch.no_grad()
    def score_embeddings(
        self,
        responses: Float[Tensor, "batch dim"],
        prompts: Float[Tensor, "batch dim"],
        *,
        texts: Sequence[str] | None = None,
        surface: Float[Tensor, "batch covariates"] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> RewardOutput:
        """Score embeddings, each response beside the embedding of its prompt.

        Args:
            responses: Embeddings of the responses, each read after its prompt.
            prompts: Embeddings of the prompts.
            texts: The responses themselves; needed if the model has `covariates`, the surface
                features that are measured on them.
            surface: All surface features of the responses, instead of their texts.
            weights: As for `score`.

        Raises:
            ValueError: If the texts are needed and not given, or are not one per response.
        """
        measured = None
        if self.covariates and surface is not None:
            measured = self._columns(surface)
        elif self.covariates:
            if texts is None or len(texts) != len(responses):
                raise ValueError(
                    f"`texts` must be the {len(responses)} responses themselves: this model "
                    f"measures {', '.join(self.covariates)} on them"
                )
            measured = self._columns(surface_features(texts))
        out = self._read(responses, prompts, measured=measured, weights=weights)
        return replace(out, **{name: getattr(out, name).cpu() for name in ("score", *TENSORS)})

    def _columns(self, surface: Tensor) -> Tensor:
        """Pick the surface features that the adjusted rewards are computed from."""
        if surface.shape[1] != len(SURFACE_FEATURES):
            raise ValueError(f"`surface` must have {len(SURFACE_FEATURES)} columns.")
        return surface[:, [SURFACE_FEATURES.index(name) for name in self.covariates]]

    def _read(
        self,
        responses: Tensor,
        prompts: Tensor,
        *,
        measured: Tensor | None,
        weights: Mapping[str, float] | None,
    ) -> RewardOutput:
        """Compute scores on the device of the heads, gradients as they are asked for."""
        device = self.head_weights.device
        h = responses.to(device, torch.float64)
        rewards = apply_links(h @ self.head_weights.T + self.head_intercepts, self.links)
        adjusted = h @ self.adjusted_weights.T + self.adjusted_offset
        if measured is not None:
            covariates = measured.to(device, torch.float64)
            adjusted = adjusted + style_part(covariates, self.adjusted_style, self.covariate_range)
        if weights is None:
            members = self.gate.member_weights(prompts.to(device, torch.float64))
        else:
            members = self._fixed_weights(weights).to(device).expand(1, len(h), -1)
        # A response that was skipped has no score, and so no weights either.
        skipped = h.isnan().any(dim=1)[:, None]
        members = members.masked_fill(skipped, torch.nan)
        gating_weights = members.mean(0)
        parts = contributions(gating_weights, adjusted)
        return RewardOutput(
            objectives=self.objectives.names,
            score=parts.sum(dim=1),
            rewards=rewards,
            uncertainty=self._deviations(h).to(device),
            adjusted=adjusted,
            gating_weights=gating_weights,
            # Of equal members too, the root has no slope at zero that could be computed.
            gating_uncertainty=(members - gating_weights).detach().square().mean(0).sqrt(),
            contributions=parts,
            truncated=torch.zeros(len(parts), dtype=torch.bool),
            passes=torch.ones(len(parts), dtype=torch.bool),
            ranges=((0.0, 1.0),) * len(self.objectives.names),
            higher_is_better=(True,) * len(self.objectives.names),
        )

    @torch.no_grad()
    def _deviations(self, responses: Tensor) -> Tensor:
        if self.uncertainty is None:
            return responses.new_full((len(responses), len(self.objectives.names)), torch.nan)
        return self.uncertainty.deviations(responses.detach().cpu())

    def _fixed_weights(self, weights: Mapping[str, float]) -> Float[Tensor, " objectives"]:
        return torch.tensor(self.objectives.mix(weights), dtype=torch.float64)
