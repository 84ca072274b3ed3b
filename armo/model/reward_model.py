"""The scoring model: conversations in, scores with their reasons out."""

import copy
import importlib.metadata
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from jaxtyping import Bool, Float
from torch import Tensor, nn

from armo.artifacts import ArtifactError, read_json, write_json, write_tensors, write_text
from armo.data.conversation import Conversation, Message, Prompt
from armo.data.objectives import ObjectiveSet
from armo.data.surface import SURFACE_FEATURES, surface_features
from armo.embed.backbone import Backbone, GroupEmbeddings, load_backbone
from armo.embed.boundary import PromptGroup
from armo.embed.spec import BackboneError
from armo.fit.decorrelation import RewardTransform
from armo.fit.gating import GatingNetwork, contributions
from armo.fit.heads import ObjectiveHeads
from armo.fit.judged import apply_links
from armo.model.pretrained import (
    CARD,
    CONFIG,
    GOLDEN,
    WEIGHTS,
    ModelConfig,
    load_weights,
    parse_messages,
)

logger = logging.getLogger(__name__)

# Responses that are tokenised and ordered by length together.
CHUNK_ROWS = 1024

Messages = Sequence[Mapping[str, str] | Message]

GOLDEN_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest deviation of a golden output, by the dtype that the backbone runs in."""


@dataclass(frozen=True, eq=False, slots=True)
class RewardOutput:
    """Scores and what they are made of; float64, rows in the order of the input.

    Attributes:
        objectives: Names of the columns.
        score: The number that ranks responses to a prompt: the sum of the contributions.
        rewards: What a rater would say, on [0, 1] or on each source's scale; not clipped. Of
            objectives learned from yes or no, or from judged pairs alone, a probability: of a yes,
            or of being judged better than the mean training response.
        adjusted: Rewards standardised and decorrelated from style.
        gating_weights: Non-negative, sum to one; from the prompt alone.
        contributions: Gating weight times adjusted reward.
        truncated: Whether the conversation was longer than the backbone reads, and was cut. One
            that is skipped instead (`on_overlong: skip`) has NaN everywhere.
    """

    objectives: tuple[str, ...]
    score: Float[Tensor, " batch"]
    rewards: Float[Tensor, "batch objectives"]
    adjusted: Float[Tensor, "batch objectives"]
    gating_weights: Float[Tensor, "batch objectives"]
    contributions: Float[Tensor, "batch objectives"]
    truncated: Bool[Tensor, " batch"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Why one response is preferred to another.

    Attributes:
        probability: That the first response is preferred.
        score_difference: Score of the first minus score of the second.
        reasons: Difference of contributions per objective, the largest first; they sum to
            the score difference.
    """

    probability: float
    score_difference: float
    reasons: dict[str, float]


class ArmoRewardModel(nn.Module):
    """An interpretable reward model: heads, reward transform and gate over a frozen backbone.

    Example:
        ```python
        model = ArmoRewardModel.from_pretrained("checkpoints/demo/model")
        out = model.score([[{"role": "user", "content": "Hi"},
                            {"role": "assistant", "content": "Hello."}]])
        out.score, out.rewards, out.gating_weights, out.contributions
        ```
    """

    def __init__(
        self,
        *,
        objectives: ObjectiveSet,
        backbone: Backbone,
        heads: ObjectiveHeads,
        transform: RewardTransform,
        gate: GatingNetwork,
        beta: float,
    ) -> None:
        """Join the fitted parts.

        Raises:
            ValueError: If the parts disagree on the objectives or on the embedding's width.
        """
        super().__init__()
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
        self.objectives = objectives
        self.backbone = backbone
        self.folder: Path | None = None
        self.covariates = transform.covariates
        self.links = heads.links
        self.gate = copy.deepcopy(gate).eval().requires_grad_(False).double()
        for name, tensor in {
            "head_weights": heads.weights,
            "head_intercepts": heads.intercepts,
            "adjusted_weights": transform.matrix,
            "adjusted_offset": transform.offset,
            "adjusted_style": transform.style,
            "beta": torch.tensor(beta),
        }.items():
            self.register_buffer(name, tensor.double())
        self.head_weights: Tensor
        self.head_intercepts: Tensor
        self.adjusted_weights: Tensor
        self.adjusted_offset: Tensor
        self.adjusted_style: Tensor
        self.beta: Tensor

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        device: str = "auto",
        batch_tokens: int | Literal["auto"] = "auto",
    ) -> "ArmoRewardModel":
        """Load a model folder, with the backbone that it names.

        Args:
            path: A folder, or a hub id.
            revision: Of the hub id.
            device: Of the backbone; `auto` is the first GPU, otherwise the CPU.
            batch_tokens: Padded tokens per batch; halved where memory runs out.

        Raises:
            ArtifactError: If a file or tensor is missing, unexpected or of another shape.
            BackboneError: If the backbone is not found or has another digest.
        """
        folder = Path(path).expanduser()
        if not folder.is_dir():
            folder = _download(str(path), revision=revision)
        config = ModelConfig.load(folder)
        gate = config.build_gate(folder / CONFIG)
        count, dim = len(config.objectives.names), gate.mean.shape[0]
        shapes: dict[str, Sequence[int]] = {
            "head_weights": [count, dim],
            "head_intercepts": [count],
            "adjusted_weights": [count, dim],
            "adjusted_offset": [count],
            "adjusted_style": [count, len(config.covariates)],
            "beta": [],
        }
        shapes |= {f"gate.{name}": list(t.shape) for name, t in gate.state_dict().items()}
        tensors = load_weights(folder / WEIGHTS, shapes)
        gate.double().load_state_dict(
            {name[5:]: t for name, t in tensors.items() if name.startswith("gate.")}, strict=True
        )
        names = config.objectives.names
        model = cls(
            objectives=config.objectives,
            backbone=load_backbone(config.backbone, device=device, batch_tokens=batch_tokens),
            heads=ObjectiveHeads(
                names, tensors["head_weights"], tensors["head_intercepts"], config.links
            ),
            transform=RewardTransform(
                names,
                tensors["adjusted_weights"],
                tensors["adjusted_offset"],
                config.covariates,
                tensors["adjusted_style"],
            ),
            gate=gate,
            beta=float(tensors["beta"]),
        )
        model.folder = folder
        return model

    def score(
        self,
        conversations: Sequence[Messages],
        *,
        weights: Mapping[str, float] | None = None,
        scale: Literal["unit", "rating"] = "unit",
        batch_size: int | None = None,
    ) -> RewardOutput:
        """Score conversations, each ending with the assistant's answer.

        Args:
            conversations: Lists of `{"role", "content"}`; any number, any length.
            weights: The caller's weights by objective, instead of the gate's; they are
                divided by their sum.
            scale: Of `rewards`: `unit` for [0, 1], `rating` for each source's own scale.
            batch_size: Conversations per batch at most; the token budget limits them anyway.

        Raises:
            ValueError: Naming the conversation that cannot be scored.
        """
        parsed = []
        for number, conversation in enumerate(conversations):
            try:
                if isinstance(conversation, str | Mapping | Message):
                    raise ValueError("must be a list of messages")
                messages = parse_messages(conversation)
                if not messages or messages[-1].role != "assistant":
                    raise ValueError("the last message must be the assistant's answer")
                parsed.append(Conversation(messages[:-1], messages[-1].content))
            except ValueError as error:
                raise ValueError(f"conversation {number}: {error}") from None
        return self._score(parsed, weights=weights, scale=scale, batch_size=batch_size)

    def score_responses(
        self,
        prompt: Messages | str,
        responses: Sequence[str],
        *,
        weights: Mapping[str, float] | None = None,
        scale: Literal["unit", "rating"] = "unit",
        batch_size: int | None = None,
    ) -> RewardOutput:
        """Score several responses to one prompt; all get the same gating weights.

        Args:
            prompt: The turns before the response, or the text of a single user turn.
            responses: The answers.
            weights: As for `score`.
            scale: As for `score`.
            batch_size: As for `score`.

        Raises:
            ValueError: If the prompt has no user turn, a response is empty, or `responses` is
                one text.
        """
        if isinstance(responses, str):
            raise ValueError("`responses` must be a list of texts, got one text.")
        turns = _parse_prompt(prompt)
        return self._score(
            [Conversation(turns, response) for response in responses],
            weights=weights,
            scale=scale,
            batch_size=batch_size,
        )

    def compare(self, prompt: Messages | str, a: str, b: str) -> Comparison:
        """Say how likely response `a` is preferred to `b`, and which objectives decide.

        Args:
            prompt: The turns before the response, or the text of a single user turn.
            a: The first response.
            b: The second response.
        """
        out = self.score_responses(prompt, [a, b])
        difference = out.contributions[0] - out.contributions[1]
        score_difference = float(out.score[0] - out.score[1])
        order = difference.abs().argsort(descending=True).tolist()
        return Comparison(
            probability=float(torch.sigmoid(self.beta * score_difference)),
            score_difference=score_difference,
            reasons={out.objectives[k]: float(difference[k]) for k in order},
        )

    @torch.no_grad()
    def score_embeddings(
        self,
        responses: Float[Tensor, "batch dim"],
        prompts: Float[Tensor, "batch dim"],
        *,
        texts: Sequence[str] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> RewardOutput:
        """Score embeddings, each response beside the embedding of its prompt.

        Args:
            responses: Embeddings of the responses, each read after its prompt.
            prompts: Embeddings of the prompts.
            texts: The responses themselves; needed if the model has `covariates`, the surface
                features that are measured on them.
            weights: As for `score`.

        Raises:
            ValueError: If the texts are needed and not given, or are not one per response.
        """
        h = responses.double()
        rewards = apply_links(h @ self.head_weights.T + self.head_intercepts, self.links)
        adjusted = h @ self.adjusted_weights.T + self.adjusted_offset
        if self.covariates:
            if texts is None or len(texts) != len(h):
                raise ValueError(
                    f"`texts` must be the {len(h)} responses themselves: this model measures "
                    f"{', '.join(self.covariates)} on them"
                )
            columns = [SURFACE_FEATURES.index(name) for name in self.covariates]
            measured = surface_features(texts)[:, columns].to(h.device)
            adjusted = adjusted + measured @ self.adjusted_style.T
        if weights is None:
            gating_weights = self.gate(prompts.double())
        else:
            gating_weights = self._fixed_weights(weights).expand(len(h), -1)
        parts = contributions(gating_weights, adjusted)
        return RewardOutput(
            objectives=self.objectives.names,
            score=parts.sum(dim=1),
            rewards=rewards,
            adjusted=adjusted,
            gating_weights=gating_weights,
            contributions=parts,
            truncated=torch.zeros(len(parts), dtype=torch.bool),
        )

    def save_pretrained(
        self, path: str | Path, *, golden: Sequence[Messages] = (), card: str | None = None
    ) -> None:
        """Write the model folder.

        Args:
            path: The folder; files of the same names are replaced.
            golden: A few conversations to store with their exact outputs, for `verify`.
            card: Text of the model card.

        Raises:
            ValueError: If a golden conversation has no score.
        """
        folder = Path(path)
        conversations = [
            [{"role": m.role, "content": m.content} for m in parse_messages(messages)]
            for messages in golden
        ]
        out = self.score(conversations)
        if bool(out.score.isnan().any()):
            number = int(out.score.isnan().nonzero()[0])
            raise ValueError(f"golden conversation {number} has no score: it is too long")
        config = ModelConfig(
            self.objectives, self.backbone.spec, self.gate.shape, self.covariates, self.links
        )
        write_json(folder / CONFIG, config.to_dict())
        write_tensors(folder / WEIGHTS, self.state_dict())
        write_json(
            folder / GOLDEN,
            {
                "made_with": {
                    name: importlib.metadata.version(name) for name in ("torch", "transformers")
                },
                "conversations": conversations,
                "score": out.score.tolist(),
                "rewards": out.rewards.tolist(),
                "adjusted": out.adjusted.tolist(),
                "gating_weights": out.gating_weights.tolist(),
                "beta": float(self.beta),
            },
        )
        if card is not None:
            write_text(folder / CARD, card)

    def verify(self) -> float:
        """Score the golden conversations of the folder this model was loaded from again.

        Returns:
            The largest absolute deviation of any score, reward, gating weight, or of `beta`.

        Raises:
            ArtifactError: If there are none, or the deviation is above `GOLDEN_TOLERANCE`.
        """
        if self.folder is None:
            raise ArtifactError("This model was not loaded from a folder; save and load it first.")
        golden = read_json(self.folder / GOLDEN)
        if not golden["conversations"]:
            raise ArtifactError(f"{self.folder / GOLDEN}: no golden conversations to verify with")
        out = self.score(golden["conversations"])
        pairs = [
            (getattr(out, name), torch.tensor(golden[name], dtype=torch.float64))
            for name in ("score", "rewards", "adjusted", "gating_weights")
        ]
        pairs.append((self.beta, torch.tensor(golden["beta"], dtype=torch.float64)))
        deviation = float(torch.stack([(now - then).abs().max() for now, then in pairs]).max())
        tolerance = GOLDEN_TOLERANCE[self.backbone.spec.dtype]
        if not deviation <= tolerance:  # nor NaN
            raise ArtifactError(
                f"{self.folder}: golden outputs deviate by {deviation:.2g}, more than "
                f"{tolerance:g}: the backbone, a library or a file is not what the model was made "
                f"with"
            )
        return deviation

    def _score(
        self,
        conversations: Sequence[Conversation],
        *,
        weights: Mapping[str, float] | None,
        scale: Literal["unit", "rating"],
        batch_size: int | None,
    ) -> RewardOutput:
        if scale not in ("unit", "rating"):
            raise ValueError(f"`scale` must be unit or rating, got {scale!r}.")
        prompts, responses, truncated = self._embed(conversations, batch_size=batch_size)
        texts = [conversation.response for conversation in conversations]
        out = self.score_embeddings(responses, prompts, texts=texts, weights=weights)
        skipped = responses.isnan().any(dim=1)
        weights_or_nan = out.gating_weights.masked_fill(skipped[:, None], torch.nan)
        out = replace(out, truncated=truncated, gating_weights=weights_or_nan)
        if scale == "unit":
            return out
        scales = torch.tensor([o.scale for o in self.objectives.objectives], dtype=torch.float64)
        return replace(out, rewards=scales[:, 0] + scales[:, 1] * out.rewards)

    def _embed(
        self, conversations: Sequence[Conversation], *, batch_size: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embed each distinct text once; return prompts, responses, and what was cut."""
        numbers: dict[Prompt, dict[str, int]] = {}
        for number, conversation in enumerate(conversations):
            numbers.setdefault(conversation.prompt, {}).setdefault(conversation.response, number)
        groups = [PromptGroup(prompt, tuple(texts)) for prompt, texts in numbers.items()]
        chunks = _chunks(groups)
        parts: list[GroupEmbeddings] = []
        try:
            parts.extend(self.backbone.embed_chunks(chunks, max_rows=batch_size))
        except BackboneError as error:
            if error.group is None:
                raise
            group = chunks[len(parts)][error.group]
            of_prompt = numbers[group.prompt]
            text = group.responses[error.response or 0]
            named = BackboneError(f"conversation {of_prompt[text]}: {error}")
            named.group = of_prompt[text]
            raise named from None
        places = {
            prompt: (k, {text: n for n, text in enumerate(texts)})
            for k, (prompt, texts) in enumerate(numbers.items())
        }
        starts = torch.tensor([0, *(len(group.responses) for group in groups)]).cumsum(0).tolist()
        prompt_rows, response_rows = [], []
        for conversation in conversations:
            k, texts = places[conversation.prompt]
            prompt_rows.append(k)
            response_rows.append(starts[k] + texts[conversation.response])
        cut = torch.cat([part.responses.truncated for part in parts])[response_rows]
        cut |= torch.cat([part.prompts.truncated for part in parts])[prompt_rows]
        missing = torch.cat([part.responses.missing for part in parts])[response_rows]
        for what, rows in (("cut, and scored as cut", cut), ("skipped, without a score", missing)):
            if count := int(rows.sum()):
                logger.warning(
                    "%d of %d conversations are longer than the backbone reads: %s",
                    count,
                    len(conversations),
                    what,
                )
        return (
            torch.cat([part.prompts.values for part in parts])[prompt_rows],
            torch.cat([part.responses.values for part in parts])[response_rows],
            cut,
        )

    def _fixed_weights(self, weights: Mapping[str, float]) -> Float[Tensor, " objectives"]:
        fixed = torch.zeros(len(self.objectives.names), dtype=torch.float64)
        for name, weight in weights.items():
            fixed[self.objectives.index(name)] = weight
        if not bool(((fixed >= 0.0) & fixed.isfinite()).all()) or float(fixed.sum()) <= 0.0:
            raise ValueError(
                f"`weights` must not be negative, must be finite and not all zero, got "
                f"{dict(weights)}."
            )
        return fixed / fixed.sum()


def _chunks(groups: Sequence[PromptGroup]) -> list[list[PromptGroup]]:
    """Cut groups into chunks of about `CHUNK_ROWS` responses; at least one, if it is empty."""
    chunks: list[list[PromptGroup]] = [[]]
    rows = 0
    for group in groups:
        if rows >= CHUNK_ROWS:
            chunks.append([])
            rows = 0
        chunks[-1].append(group)
        rows += len(group.responses)
    return chunks


def _parse_prompt(prompt: Messages | str) -> Prompt:
    if isinstance(prompt, str):
        return (Message(role="user", content=prompt),)
    return parse_messages(prompt)


def _download(id: str, *, revision: str | None) -> Path:
    """Fetch a model folder from the hub, or say plainly that there is none."""
    try:
        return Path(
            snapshot_download(id, revision=revision, allow_patterns=["*.json", WEIGHTS, CARD])
        )
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise ArtifactError(
            f"No model folder at {id}, and the hub could not give a model of that name "
            f"({type(error).__name__})"
        ) from None
