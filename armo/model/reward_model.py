"""The scoring model: conversations in, scores with their reasons out."""

import copy
import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import torch
from huggingface_hub import HfApi
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from armo.artifacts import (
    ArtifactError,
    digest_file,
    read_json,
    write_json,
    write_tensors,
    write_text,
)
from armo.data.conversation import Conversation, Message, Prompt
from armo.data.objectives import ObjectiveSet
from armo.data.segments import sentence_ends
from armo.data.surface import SURFACE_FEATURES, surface_features
from armo.embed.backbone import Backbone, GroupEmbeddings, load_backbone
from armo.embed.boundary import PromptGroup
from armo.embed.plan import Plan
from armo.embed.spec import BackboneError
from armo.fit.decorrelation import RewardTransform
from armo.fit.gating import GatingNetwork, contributions
from armo.fit.heads import UNCERTAINTY, ObjectiveHeads, RewardUncertainty
from armo.fit.judged import apply_links
from armo.model.config import ArmoConfig
from armo.model.golden import compare_golden, read_golden, write_golden
from armo.model.output import (
    Comparison,
    RewardModelOutput,
    RewardOutput,
    Scale,
    SegmentKind,
    SegmentOutput,
)
from armo.model.pretrained import (
    BACKBONE,
    CARD,
    CONFIG,
    GOLDEN,
    SEAL,
    WEIGHTS,
    ModelConfig,
    copy_backbone,
    download_folder,
    folder_seal,
    load_folder,
    parse_messages,
    place_backbone,
    read_uncertainty,
    refuse_own_backbone,
    remove_stale,
    write_tokenizer,
)
from armo.model.token_rows import TokenReader
from armo.model.tokenizer import ArmoTokenizer

logger = logging.getLogger(__name__)

# Responses that are tokenised and ordered by length together.
CHUNK_ROWS = 1024

Messages = Sequence[Mapping[str, str] | Message]

# The backbone's model among the modules of this one.
LANGUAGE_MODEL = "language_model"

# What the auto classes and pipelines of Transformers pass to every model that they load.
HANDED_DOWN = (
    "_commit_hash",
    "_from_auto",
    "_from_pipeline",
    "low_cpu_mem_usage",
    "torch_dtype",
)
SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")

# How far a row of the transform may be from a multiple of its head, as a share of its length, to
# count as one: more than rounding, less than any decorrelation that changes anything.
PARALLEL = 1e-6

_TENSORS = (
    "rewards",
    "uncertainty",
    "adjusted",
    "gating_weights",
    "gating_uncertainty",
    "contributions",
)

GOLDEN_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest deviation of a golden output, by the dtype that the backbone runs in."""


class ArmoRewardModel(PreTrainedModel):
    """An interpretable reward model: heads, reward transform and gate over a frozen backbone.

    It is a model of Transformers: `AutoModelForSequenceClassification` loads it once armo is
    imported. Heads and gate stay in float64 whatever the model is cast to, and it always is in
    evaluation mode. No gradients are kept unless parameters are told to require them.

    Example:
        ```python
        model = ArmoRewardModel.from_pretrained("checkpoints/demo/model")
        out = model.score([[{"role": "user", "content": "Hi"},
                            {"role": "assistant", "content": "Hello."}]])
        out.score, out.rewards, out.gating_weights, out.contributions
        ```
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
            "beta": torch.tensor(beta),
        }.items():
            self.register_buffer(name, tensor.detach().double())
        self.head_weights: Tensor
        self.head_intercepts: Tensor
        self.adjusted_weights: Tensor
        self.adjusted_offset: Tensor
        self.adjusted_style: Tensor
        self.beta: Tensor

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path: str | Path,
        *,
        config: ArmoConfig | None = None,
        revision: str | None = None,
        device: str = "auto",
        batch_tokens: int | Literal["auto"] = "auto",
        dtype: Any = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **more: Any,
    ) -> "ArmoRewardModel":
        """Load a model folder, with the backbone that it names or holds.

        Args:
            path: A folder, or a hub id.
            config: What `AutoConfig` made of the folder; it must be unchanged.
            revision: Of the hub id.
            device: Of the backbone; `auto` is the first GPU, otherwise the CPU. For the auto
                classes of Transformers it is the CPU, as theirs is.
            batch_tokens: Padded tokens per batch; halved where memory runs out.
            dtype: Of the backbone, instead of the one that it was trained with; heads and gate
                stay in float64.
            device_map: A device, or for a backbone in several places what Transformers takes.
            attn_implementation: Of the backbone, as Transformers spells it.
            token: For the hub; for the backbone too, as the next two.
            cache_dir: Of what comes from the hub.
            local_files_only: Whether to look in the hub's cache only.
            more: What the auto classes hand to every model; anything else is refused.

        Raises:
            ArtifactError: If a file or tensor is missing, unexpected, changed or of another shape.
            BackboneError: If the backbone is not found or has another digest.
            TypeError: If an option is not known.
            ValueError: If both `device` and `device_map` are given.
        """
        _refuse_options(more)
        folder = Path(path).expanduser()
        if not folder.is_dir():
            folder = download_folder(
                str(path),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        if config is not None:
            attn_implementation = attn_implementation or config._attn_implementation
        declared, gate, tensors = load_folder(folder, config)
        device, device_map = _placement(device, device_map, auto=bool(more.get("_from_auto")))
        spec = declared.backbone
        if (name := _dtype_name(dtype or more.get("torch_dtype"))) is not None:
            spec = replace(spec, dtype=name)
        names = declared.objectives.names
        heads = ObjectiveHeads(
            names, tensors["head_weights"], tensors["head_intercepts"], declared.links
        )
        model = cls(
            objectives=declared.objectives,
            backbone=load_backbone(
                place_backbone(spec, folder),
                device=device,
                batch_tokens=batch_tokens,
                device_map=device_map,
                attn_implementation=attn_implementation,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            ),
            heads=heads,
            transform=RewardTransform(
                names,
                tensors["adjusted_weights"],
                tensors["adjusted_offset"],
                declared.covariates,
                tensors["adjusted_style"],
            ),
            gate=gate,
            beta=float(tensors["beta"]),
            uncertainty=read_uncertainty(folder, declared, heads),
        )
        model.backbone.spec = replace(model.backbone.spec, id=spec.id, revision=spec.revision)
        model.folder = folder
        made = ArmoConfig(**read_json(folder / CONFIG)) if config is None else config
        model.config = copy.deepcopy(made)
        model.name_or_path = model.config.name_or_path = str(path)
        return model

    @classmethod
    def _from_config(cls, config: ArmoConfig, **more: Any) -> NoReturn:
        raise ValueError(
            "a reward model cannot be made from its configuration alone: its weights would be "
            "random; use `from_pretrained`"
        )

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        attention_mask: Num[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"] | None = None,
        token_type_ids: Int[Tensor, "batch tokens"] | None = None,
        *,
        surface: Float[Tensor, "batch covariates"] | None = None,
        return_dict: bool | None = None,
    ) -> RewardModelOutput | tuple[Tensor, ...]:
        """Score conversations given as token ids, each whole, as `score` does given as text.

        With a chat template, the ids are those of the text that it renders, prompt and response;
        special tokens that the tokenizer adds once more are ignored. For an encoder they are
        `[CLS] prompt [SEP] response [SEP]`: `tokenizer(prompt, response)`, or the template of the
        tokenizer in the model folder.

        The prompt ends where the template opens the last response. A response that writes the
        template's own control text cannot be told from further turns, as they are the same ids:
        give responses that are not trusted to `score`.

        Args:
            input_ids: One conversation per row, padded on either side.
            attention_mask: Not zero where a token counts; all do, if None.
            token_type_ids: Taken and not used.
            surface: Surface features of the responses, as the tokenizer of the model folder gives
                them; needed by an encoder's model with `covariates`.
            return_dict: False for a tuple.

        Raises:
            TokenRowError: Naming the row whose ids do not say where its prompt ends.
            ValueError: If `surface` is needed and not given.
        """
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        with torch.set_grad_enabled(trains):
            plan, measured = self._plan_rows(input_ids, attention_mask, surface)
            embeddings = self.backbone.runner.run_at_once(plan)
            prompts, responses = embeddings[: plan.prompts], embeddings[plan.prompts :]
            out = self._read(responses, prompts, measured=measured, weights=None)
        cut = [{k, plan.prompts + k} & plan.truncated for k in range(plan.prompts)]
        truncated = torch.tensor([bool(parts) for parts in cut]) & ~responses.isnan().any(1).cpu()
        values = [getattr(out, name) for name in _TENSORS]
        answer = RewardModelOutput(
            out.score[:, None].float().to(input_ids.device),
            *(value.to(input_ids.device) for value in (*values, truncated)),
        )
        return answer if return_dict is not False else answer.to_tuple()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _plan_rows(
        self, input_ids: Tensor, attention_mask: Tensor | None, surface: Tensor | None
    ) -> tuple[Plan, Tensor | None]:
        """Find prompts and responses in rows of ids, and what is measured on the responses."""
        if attention_mask is None:
            rows = input_ids.tolist()
        else:
            rows = [
                ids[mask].tolist() for ids, mask in zip(input_ids, attention_mask != 0, strict=True)
            ]
        plan, texts = self.rows.plan(rows, causal=self.backbone.runner.causal)
        if not self.covariates:
            return plan, None
        if surface is None and texts is None:
            raise ValueError(
                f"`surface` is needed: this model measures {', '.join(self.covariates)} on the "
                f"responses, which their ids do not say. The tokenizer in the model folder gives "
                f"it with the ids; `score` needs none"
            )
        if surface is None:
            surface = surface_features(texts or [])
        return plan, self._columns(surface)

    def train(self, mode: bool = True) -> "ArmoRewardModel":
        """Stay in evaluation mode: a score never depends on dropout."""
        super().train(False)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ArmoRewardModel":
        """Move everything, but cast the backbone alone: rounded heads give equal scores."""
        exact = {name: tensor.detach() for name, tensor in self._own_tensors().items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in self._own_tensors().items():
            if tensor.dtype != exact[name].dtype:
                tensor.data = exact[name].to(tensor.device)
        return self

    def _own_tensors(self) -> dict[str, Tensor]:
        """Heads, transform and gate: all but the backbone's."""
        tensors: dict[str, Tensor] = self.state_dict(keep_vars=True)
        return {k: t for k, t in tensors.items() if not k.startswith(f"{LANGUAGE_MODEL}.")}

    def score(
        self,
        conversations: Sequence[Messages],
        *,
        weights: Mapping[str, float] | None = None,
        scale: Scale = "raw",
        thresholds: Mapping[str, float] | None = None,
        batch_size: int | None = None,
    ) -> RewardOutput:
        """Score conversations, each ending with the assistant's answer.

        Args:
            conversations: Lists of `{"role", "content"}`; any number, any length.
            weights: The caller's weights by objective, instead of the gate's; they are
                divided by their sum.
            scale: Of `rewards`: `raw` for [0, 1], 1 the good end; `rating` for each source's own
                scale; `standard` for the adjusted rewards, standardised and free of style.
            thresholds: What `rewards` must reach, by objective and on that scale, for a response to
                pass; what they must not exceed, where low ratings are the good ones.
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
        return self._score(
            parsed, weights=weights, scale=scale, thresholds=thresholds, batch_size=batch_size
        )

    def score_responses(
        self,
        prompt: Messages | str,
        responses: Sequence[str],
        *,
        weights: Mapping[str, float] | None = None,
        scale: Scale = "raw",
        thresholds: Mapping[str, float] | None = None,
        batch_size: int | None = None,
    ) -> RewardOutput:
        """Score several responses to one prompt; all get the same gating weights.

        Args:
            prompt: The turns before the response, or the text of a single user turn.
            responses: The answers.
            weights: As for `score`.
            scale: As for `score`.
            thresholds: As for `score`.
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
            thresholds=thresholds,
            batch_size=batch_size,
        )

    def score_segments(
        self,
        prompt: Messages | str,
        response: str,
        *,
        by: SegmentKind = "sentence",
        weights: Mapping[str, float] | None = None,
        scale: Scale = "raw",
    ) -> SegmentOutput:
        """Score a response after every sentence, or a conversation after every assistant turn.

        What is scored is each beginning as if it were all: closed by the template as a whole
        response is, so that the last row is what `score` gives, and row by row the same as
        `score_responses` of the beginnings. A causal backbone reads the text once, and at each end
        only the few tokens that close a response; an encoder reads each beginning anew.

        Args:
            prompt: The turns before the response, or the text of a single user turn.
            response: The answer.
            by: `sentence`, see `sentence_ends`; or `turn`, each of the assistant's in the prompt
                after the turns before it, then the response.
            weights: As for `score`.
            scale: As for `score`.

        Raises:
            ValueError: If the prompt has no user turn, or a response is empty.
            BackboneError: Naming the segment that cannot be embedded.
        """
        if by not in get_args(SegmentKind):
            raise ValueError(f"`by` must be {' or '.join(get_args(SegmentKind))}, got {by!r}.")
        last = Conversation(_parse_prompt(prompt), response)
        if by == "sentence":
            ends = sentence_ends(response)
            spans = tuple(pairwise((0, *ends)))
            texts = tuple(response[start:end] for start, end in spans)
            parts = [Conversation(last.prompt, response[:end]) for end in ends]
        else:
            turns = [k for k, m in enumerate(last.prompt) if m.role == "assistant"]
            parts = [Conversation(last.prompt[:k], last.prompt[k].content) for k in turns]
            parts.append(last)
            texts = tuple(part.response for part in parts)
            spans = tuple((0, len(text)) for text in texts)
        out = self._score(
            parts, weights=weights, scale=scale, thresholds=None, batch_size=None, along=True
        )
        return SegmentOutput(texts, spans, out)

    def compare(self, prompt: Messages | str, a: str, b: str) -> Comparison:
        """Say how likely response `a` is preferred to `b`, which objectives decide, and what would.

        Args:
            prompt: The turns before the response, or the text of a single user turn.
            a: The first response.
            b: The second response.
        """
        return self.compare_rows(self.score_responses(prompt, [a, b]), 0, 1)

    def compare_rows(self, out: RewardOutput, a: int, b: int) -> Comparison:
        """Compare two responses to one prompt that are scored already.

        Args:
            out: What this model gave, on any scale.
            a: Row of the first response.
            b: Row of the second response.

        Raises:
            ValueError: If the rows have other gating weights: their prompts are not the same.
        """
        weights = out.gating_weights[a]
        if bool(((weights - out.gating_weights[b]).abs() > 1e-9).any()):  # not so where NaN
            raise ValueError(f"rows {a} and {b} have other gating weights: not of one prompt")
        difference = out.contributions[a] - out.contributions[b]
        score_difference = float(out.score[a] - out.score[b])
        order = difference.abs().argsort(descending=True).tolist()
        changes = {
            name: abs(score_difference) / weight
            for name, weight in sorted(
                zip(out.objectives, weights.tolist(), strict=True), key=lambda item: -item[1]
            )
            if weight > 0.0 and not math.isnan(score_difference)
        }
        slopes = self._rating_slopes()
        return Comparison(
            probability=float(torch.sigmoid(self.beta * score_difference)),
            score_difference=score_difference,
            reasons={out.objectives[k]: float(difference[k]) for k in order},
            changes=changes,
            rating_changes={n: change * slopes[n] for n, change in changes.items() if n in slopes},
        )

    def _rating_slopes(self) -> dict[str, float]:
        """Ratings per standard deviation of an adjusted reward that follows its own head alone."""
        slopes = {}
        for k, objective in enumerate(self.objectives.objectives):
            head, adjusted = self.head_weights[k], self.adjusted_weights[k]
            # The multiple of the head that comes closest to the row of the transform.
            per_reward = float(head @ adjusted) / max(float(head @ head), 1e-300)
            apart = float((adjusted - per_reward * head).norm())
            follows = per_reward > 0.0 and apart <= PARALLEL * float(adjusted.norm())
            if follows and self.links[k] == "identity":
                slopes[objective.name] = objective.scale[1] / per_reward
        return slopes

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
        return replace(out, **{name: getattr(out, name).cpu() for name in ("score", *_TENSORS)})

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
            adjusted = adjusted + measured.to(device, torch.float64) @ self.adjusted_style.T
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

    def save_pretrained(  # type: ignore[override]
        self,
        path: str | Path,
        *,
        golden: Sequence[Messages] | None = None,
        card: str | None = None,
        include_backbone: bool | None = None,
    ) -> None:
        """Write the model folder.

        Args:
            path: The folder; of a model that was there, nothing is left.
            golden: A few conversations to store with their exact outputs, for `verify`. If None,
                those of the folder that the model was loaded from.
            card: Text of the model card; if None, likewise.
            include_backbone: Whether to copy the backbone's files too, so that the folder needs
                nothing else; if None, likewise.

        Raises:
            ValueError: If a golden conversation has no score.
            BackboneError: If the backbone was trained, which no folder would hold.
            ArtifactError: If the backbone's files are to be copied and are not those it was loaded
                from; or are in this very folder, and not to be in it.
        """
        folder, source = Path(path), self.folder
        if golden is None and source is not None:
            golden = read_json(source / GOLDEN)["conversations"]
        if card is None and source is not None and (source / CARD).is_file():
            card = (source / CARD).read_text(encoding="utf-8")
        if include_backbone is None:
            include_backbone = source is not None and (source / BACKBONE).is_dir()
        conversations = [
            [{"role": m.role, "content": m.content} for m in parse_messages(messages)]
            for messages in golden or ()
        ]
        self.backbone.check_unchanged()
        out = self.score(conversations)
        if bool(out.score.isnan().any()):
            number = int(out.score.isnan().nonzero()[0])
            raise ValueError(f"golden conversation {number} has no score: it is too long")
        if include_backbone:
            copy_backbone(self.backbone, folder)
        else:
            refuse_own_backbone(self.backbone, folder)
        files = write_tokenizer(self.backbone, folder, measures=bool(self.covariates))
        if self.uncertainty is not None:
            self.uncertainty.save(folder / UNCERTAINTY)
            files[UNCERTAINTY] = digest_file(folder / UNCERTAINTY)
        kept = [
            name for name, own in ((CARD, card is not None), (BACKBONE, include_backbone)) if own
        ]
        remove_stale(folder, written=[*files, *kept])
        # It may have been cast since it was loaded; one of float64 is as good as of float32.
        dtype = _dtype_name(self.backbone.model.dtype)
        spec = self.backbone.spec
        config = ModelConfig(
            self.objectives,
            replace(spec, dtype=dtype) if dtype in GOLDEN_TOLERANCE else spec,
            self.gate.shape,
            self.covariates,
            self.links,
            files=files,
        )
        values, tensors = config.to_dict(), self._own_tensors()
        write_json(folder / CONFIG, values)
        write_tensors(folder / WEIGHTS, tensors, metadata={SEAL: folder_seal(values, tensors)})
        write_golden(folder / GOLDEN, conversations, out, beta=float(self.beta))
        if card is not None:
            write_text(folder / CARD, card)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        include_backbone: bool | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload an armo reward model",
    ) -> str:
        """Upload the model folder to the hub.

        Args:
            repo_id: Where; made if it is not there.
            include_backbone: As for `save_pretrained`.
            private: Whether a repository that is made is private; the hub's default if None.
            token: For the hub.
            revision: Branch to upload to.
            commit_message: Of the upload.

        Returns:
            Address of the commit.
        """
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, include_backbone=include_backbone)
            commit = api.upload_folder(
                repo_id=repo, folder_path=folder, revision=revision, commit_message=commit_message
            )
        return str(commit.commit_url)

    def verify(self) -> float:
        """Score the golden conversations of the folder this model was loaded from again.

        Returns:
            The largest absolute deviation of any score, reward, gating weight, or of `beta`.

        Raises:
            ArtifactError: If there are none, or one deviates by more than `GOLDEN_TOLERANCE`,
                naming the first row and field that does.
        """
        if self.folder is None:
            raise ArtifactError("This model was not loaded from a folder; save and load it first.")
        golden = read_golden(self.folder / GOLDEN, self.objectives.names)
        out = self.score(golden["conversations"])
        dtype = _dtype_name(self.backbone.model.dtype) or "float32"
        tolerance = GOLDEN_TOLERANCE.get(dtype, GOLDEN_TOLERANCE["float32"])
        return compare_golden(self.folder, golden, out, beta=float(self.beta), tolerance=tolerance)

    def _score(
        self,
        conversations: Sequence[Conversation],
        *,
        weights: Mapping[str, float] | None,
        scale: Scale,
        thresholds: Mapping[str, float] | None,
        batch_size: int | None,
        along: bool = False,
    ) -> RewardOutput:
        if scale not in get_args(Scale):
            raise ValueError(f"`scale` must be {' or '.join(get_args(Scale))}, got {scale!r}.")
        limits = self._limits(thresholds or {})
        prompts, responses, truncated = self._embed(
            conversations, batch_size=batch_size, along=along
        )
        texts = [conversation.response for conversation in conversations]
        out = self.score_embeddings(responses, prompts, texts=texts, weights=weights)
        out = replace(out, truncated=truncated)
        return self._pass(self._rescale(out, scale), limits)

    def _rescale(self, out: RewardOutput, scale: Scale) -> RewardOutput:
        """Put rewards, which are on [0, 1], on another scale."""
        if scale == "raw":
            return out
        declared = self.objectives.objectives
        if scale == "standard":
            ranges = ((-math.inf, math.inf),) * len(declared)
            unknown = torch.full_like(out.uncertainty, torch.nan)
            return replace(out, rewards=out.adjusted, uncertainty=unknown, ranges=ranges)
        scales = torch.tensor([o.scale for o in declared], dtype=torch.float64)
        return replace(
            out,
            rewards=scales[:, 0] + scales[:, 1] * out.rewards,
            uncertainty=scales[:, 1].abs() * out.uncertainty,
            ranges=tuple((float(o.low), float(o.high)) for o in declared),
            higher_is_better=tuple(o.higher_is_better for o in declared),
        )

    def _limits(self, thresholds: Mapping[str, float]) -> dict[int, float]:
        """Thresholds by column."""
        if wrong := {n: value for n, value in thresholds.items() if not math.isfinite(value)}:
            raise ValueError(f"`thresholds` must be finite, got {wrong}.")
        return {self.objectives.index(name): value for name, value in thresholds.items()}

    @staticmethod
    def _pass(out: RewardOutput, limits: Mapping[int, float]) -> RewardOutput:
        passes = torch.ones_like(out.passes)
        for column, limit in limits.items():
            values = out.rewards[:, column]
            passes &= values >= limit if out.higher_is_better[column] else values <= limit
        return replace(out, passes=passes)

    def _embed(
        self, conversations: Sequence[Conversation], *, batch_size: int | None, along: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embed each distinct text once; return prompts, responses, and what was cut.

        Those that go `along` are beginnings of one conversation, which is read once.
        """
        numbers: dict[Prompt, dict[str, int]] = {}
        for number, conversation in enumerate(conversations):
            numbers.setdefault(conversation.prompt, {}).setdefault(conversation.response, number)
        groups = [PromptGroup(prompt, tuple(texts)) for prompt, texts in numbers.items()]
        chunks = _chunks(groups) if not along else [groups]
        parts: list[GroupEmbeddings] = []
        try:
            if along:
                parts.append(self.backbone.embed_along(groups))
            else:
                parts.extend(self.backbone.embed_chunks(chunks, max_rows=batch_size))
        except BackboneError as error:
            if error.group is None:
                raise
            group = chunks[len(parts)][error.group]
            of_prompt = numbers[group.prompt]
            text = group.responses[error.response or 0]
            what = "segment" if along else "conversation"
            named = BackboneError(f"{what} {of_prompt[text]}: {error}")
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
        return torch.tensor(self.objectives.mix(weights), dtype=torch.float64)


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


def _refuse_options(options: Mapping[str, Any]) -> None:
    """Refuse options that change something, other than those that the auto classes hand down."""
    handed = dict(options)
    if handed.get("use_safetensors") is True:  # nothing else is ever read
        del handed["use_safetensors"]
    if handed.get("_from_auto") and {*(handed.get("adapter_kwargs") or {})} <= {
        "token",
        "revision",
    }:
        handed.pop("adapter_kwargs", None)  # where peft is installed
    unknown = [
        name
        for name, value in handed.items()
        if name not in HANDED_DOWN and value is not None and value is not False and value != {}
    ]
    if unknown:
        raise TypeError(f"`from_pretrained` does not take {', '.join(unknown)}")


def _placement(device: str, device_map: Any, *, auto: bool) -> tuple[str, Any]:
    """Tell a single device from a map of several.

    Raises:
        ValueError: If both are given.
    """
    if device != "auto" and device_map is not None:
        raise ValueError("give `device` or `device_map`, not both")
    if isinstance(device_map, Mapping) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map is None:
        return ("cpu" if auto and device == "auto" else device), None
    if isinstance(device_map, int) and not isinstance(device_map, bool):
        return f"cuda:{device_map}", None
    if isinstance(device_map, Mapping) or device_map in SPREADING:
        return device, device_map
    return str(device_map), None


def _dtype_name(dtype: Any) -> str | None:
    return None if dtype in (None, "auto") else str(dtype).removeprefix("torch.")


AutoModelForSequenceClassification.register(ArmoConfig, ArmoRewardModel, exist_ok=True)
AutoTokenizer.register(ArmoConfig, fast_tokenizer_class=ArmoTokenizer, exist_ok=True)
