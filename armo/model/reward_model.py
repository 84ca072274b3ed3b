"""The scoring model: conversations in, scores with their reasons out."""

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import torch
from huggingface_hub import HfApi
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from armo.artifacts import (
    ArtifactError,
    digest_file,
    read_json,
    write_json,
    write_tensors,
    write_text,
)
from armo.data.conversation import Conversation
from armo.data.surface import surface_features
from armo.embed.backbone import Backbone, load_backbone
from armo.embed.plan import Plan
from armo.fit.decorrelation import RewardTransform
from armo.fit.gating import GatingNetwork
from armo.fit.heads import UNCERTAINTY, ObjectiveHeads
from armo.model.comparison import compare_scored, rating_slopes
from armo.model.config import ArmoConfig
from armo.model.conversations import (
    Messages,
    beginnings,
    embed_conversations,
    parse_conversations,
    parse_messages,
    parse_prompt,
)
from armo.model.golden import compare_golden, read_golden, write_golden
from armo.model.options import dtype_name, placement, refuse_options
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
    place_backbone,
    read_uncertainty,
    refuse_own_backbone,
    remove_stale,
    write_tokenizer,
)
from armo.model.scales import limits_of, passing, rescale
from armo.model.scorer import TENSORS, EmbeddingScorer
from armo.model.tokenizer import ArmoTokenizer

GOLDEN_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest deviation of a golden output, by the dtype that the backbone runs in."""


class ArmoRewardModel(EmbeddingScorer):
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
        refuse_options(more)
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
        device, device_map = placement(device, device_map, auto=bool(more.get("_from_auto")))
        spec = declared.backbone
        if (name := dtype_name(dtype or more.get("torch_dtype"))) is not None:
            spec = replace(spec, dtype=name)
        backbone = load_backbone(
            place_backbone(spec, folder),
            device=device,
            batch_tokens=batch_tokens,
            device_map=device_map,
            attn_implementation=attn_implementation,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        backbone.spec = replace(backbone.spec, id=spec.id, revision=spec.revision)
        model = cls.assemble(folder, declared, gate=gate, tensors=tensors, backbone=backbone)
        if config is not None:
            model.config = copy.deepcopy(config)
        model.name_or_path = model.config.name_or_path = str(path)
        return model

    @classmethod
    def assemble(
        cls,
        folder: Path,
        declared: ModelConfig,
        *,
        gate: GatingNetwork,
        tensors: Mapping[str, Tensor],
        backbone: Backbone,
    ) -> "ArmoRewardModel":
        """Make the model of what `load_folder` found in a folder, on a backbone of the caller's."""
        names = declared.objectives.names
        heads = ObjectiveHeads(
            names, tensors["head_weights"], tensors["head_intercepts"], declared.links
        )
        model = cls(
            objectives=declared.objectives,
            backbone=backbone,
            heads=heads,
            transform=RewardTransform(
                names,
                tensors["adjusted_weights"],
                tensors["adjusted_offset"],
                declared.covariates,
                tensors["adjusted_style"],
                tensors["covariate_range"],
            ),
            gate=gate,
            beta=float(tensors["beta"]),
            uncertainty=read_uncertainty(folder, declared, heads),
        )
        model.folder = folder
        model.config = ArmoConfig(**read_json(folder / CONFIG))
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
        values = [getattr(out, name) for name in TENSORS]
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
        return self._score(
            parse_conversations(conversations),
            weights=weights,
            scale=scale,
            thresholds=thresholds,
            batch_size=batch_size,
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
        turns = parse_prompt(prompt)
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
        parts, texts, spans = beginnings(parse_prompt(prompt), response, by=by)
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
        return compare_scored(out, a, b, beta=self.beta, slopes=self._rating_slopes())

    def _rating_slopes(self) -> dict[str, float]:
        return rating_slopes(
            self.objectives, self.links, heads=self.head_weights, adjusted=self.adjusted_weights
        )

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
        if not bool(out.score.isfinite().all()):
            number = int((~out.score.isfinite()).nonzero()[0])
            raise ValueError(
                f"golden conversation {number} has no score: it is too long, or what the backbone "
                f"gives is not finite"
            )
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
        dtype = dtype_name(self.backbone.model.dtype)
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
        dtype = dtype_name(self.backbone.model.dtype) or "float32"
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
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        limits = limits_of(self.objectives, thresholds or {})
        prompts, responses, truncated = embed_conversations(
            self.backbone, conversations, batch_size=batch_size, along=along
        )
        texts = [conversation.response for conversation in conversations]
        out = self.score_embeddings(responses, prompts, texts=texts, weights=weights)
        out = replace(out, truncated=truncated)
        return passing(rescale(out, self.objectives, scale=scale), limits)


AutoModelForSequenceClassification.register(ArmoConfig, ArmoRewardModel, exist_ok=True)
AutoTokenizer.register(ArmoConfig, fast_tokenizer_class=ArmoTokenizer, exist_ok=True)
