"""The files of an export: written for plain Transformers, and read back with it."""

import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from armo.artifacts import read_json, write_json
from armo.data.conversation import Conversation
from armo.embed.boundary import PromptGroup
from armo.model.conversations import parse_messages
from armo.model.pretrained import GOLDEN
from armo.model.published import (
    SECTION,
    PublishedParts,
    published_score,
    read_parts,
    tensor_files,
)
from armo.model.reward_model import ArmoRewardModel

Format = Literal["armorm", "labels", "single"]

TOKENIZER = "tokenizer_config.json"
SHARD = "5GB"
# Largest deviation of a reloaded export, in units of the largest value, by dtype.
SAME = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}

# Every export is checked on these, beside the golden conversations of the model.
CHECKS = (
    [("user", "Is honey safe for babies?"), ("assistant", "Not before their first birthday.")],
    [("user", "Hi"), ("assistant", "Hello! What can I do for you?")],
    [
        ("user", "Name a prime number."),
        ("assistant", "Seven."),
        ("user", "And another one, with two digits, please."),
        ("assistant", "- eleven\n- **thirteen**"),
    ],
)

ScoreOf = Callable[[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"]], Tensor]


class ExportError(ValueError):
    """A format cannot carry a model, or an export does not give what it should."""


@dataclass(eq=False, slots=True)
class Plan:
    """What a format makes of a model.

    Attributes:
        heads: Tensors beside the trunk's.
        config: Settings beside the trunk's.
        outputs: What it gives for embeddings of responses and prompts.
        score: The score that comes of it.
        lost: What it lacks.
        weights: Constant weights, if it has them.
    """

    heads: dict[str, Tensor]
    config: dict[str, Any]
    outputs: ScoreOf
    score: ScoreOf
    lost: list[str] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)


def refuse_existing(folder: Path) -> None:
    """Refuse to write into a folder that holds anything.

    Raises:
        ExportError: If it does.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ExportError(f"{folder} exists already; choose another `output`, or delete it")


def write_export(model: ArmoRewardModel, folder: Path, plan: Plan, *, format: Format) -> None:
    """Write trunk, heads, configuration and tokenizer.

    Raises:
        ExportError: If Transformers has no plain sequence classification of this backbone, or the
            backbone's files are gone.
    """
    trunk = model.backbone.model
    source = Path(str(trunk.name_or_path))
    if not source.is_dir():
        raise ExportError(
            f"the files that {model.backbone.spec.id} was loaded from are not at {source} any more"
        )
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    assert model.backbone.planner.conversations is not None
    tokenizer.chat_template = model.backbone.planner.conversations.template
    pad = _pad_token(model, tokenizer)
    vocabulary = max(int(trunk.config.vocab_size), pad + 1)

    config = read_json(source / "config.json")
    for name in ("auto_map", "num_labels", "num_quantiles", "_name_or_path"):
        config.pop(name, None)
    config |= plan.config | {"pad_token_id": pad, "vocab_size": vocabulary}
    if format == "armorm":
        _spell_as_before(config)
    elif "rope_theta" in (ropes := config.get("rope_parameters") or {}):
        # Transformers 4 would take its default, and say nothing.
        config |= {"rope_theta": ropes["rope_theta"], "rope_scaling": _scaling(ropes)}
    config["dtype" if "dtype" in config else "torch_dtype"] = str(trunk.dtype).split(".")[1]
    write_json(folder / "config.json", config)

    shell, prefix = _shell(model, folder)
    if format != "armorm":
        config["architectures"] = [type(shell).__name__]
    state = {f"{prefix}{name}": tensor for name, tensor in trunk.state_dict().items()}
    inputs = trunk.get_input_embeddings()
    name = next(f"{prefix}{n}.weight" for n, module in trunk.named_modules() if module is inputs)
    if vocabulary > len(state[name]):
        more = state[name].new_zeros(vocabulary - len(state[name]), state[name].shape[1])
        state[name] = torch.cat([state[name], more])
    state |= {name: tensor.float().contiguous() for name, tensor in plan.heads.items()}
    shell.save_pretrained(folder, state_dict=state, max_shard_size=SHARD)
    write_json(folder / "config.json", config)  # as it was, not as this version spells it
    for file in folder.glob("*.safetensors"):  # which are written for their owner alone
        file.chmod((folder / "config.json").stat().st_mode & 0o777)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    # As Transformers 4 spells it, with which most servers still run; 5 reads that as well.
    spelt = read_json(folder / TOKENIZER)
    if spelt.get("tokenizer_class") == "TokenizersBackend":
        spelt["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("backend", "is_local", "local_files_only"):
        spelt.pop(name, None)
    if isinstance(spelt.get("extra_special_tokens"), list):
        spelt["additional_special_tokens"] = spelt.pop("extra_special_tokens")
    spelt["model_input_names"] = ["input_ids", "attention_mask"]  # 4 adds token types otherwise
    write_json(folder / TOKENIZER, spelt | {"chat_template": tokenizer.chat_template})


def _shell(model: ArmoRewardModel, folder: Path) -> tuple[PreTrainedModel, str]:
    """Make the sequence classification that the export is, without its weights."""
    name = model.backbone.spec.id
    config = type(model.backbone.model.config).from_pretrained(folder)
    try:
        with torch.device("meta"):
            shell = AutoModelForSequenceClassification.from_config(config)
    except ValueError:
        raise ExportError(
            f"Transformers has no sequence classification of {config.model_type!r} ({name})"
        ) from None
    score = getattr(shell, "score", None)
    if not isinstance(score, nn.Linear) or score.bias is not None:
        raise ExportError(
            f"{type(shell).__name__} has no plain layer `score`; no format can carry {name}"
        )
    return shell, f"{shell.base_model_prefix}."


def _spell_as_before(config: dict[str, Any]) -> None:
    """Name settings as Transformers 4 does, with which code of the published layout runs."""
    ropes = config.pop("rope_parameters", None)
    if ropes is not None:
        config["rope_theta"] = ropes["rope_theta"]
        config["rope_scaling"] = _scaling(ropes)
    config["torch_dtype"] = config.pop("dtype", None)
    config["use_cache"] = False


def _scaling(ropes: Mapping[str, Any]) -> dict[str, Any] | None:
    scaling = {name: value for name, value in ropes.items() if name != "rope_theta"}
    return None if ropes.get("rope_type") == "default" else scaling


def _pad_token(model: ArmoRewardModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a padding token that no conversation holds; add one if need be.

    Readers of these formats take the last token that is no padding for a response's last, or the
    one before the first padding: neither may stand in a conversation.
    """
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    used |= {token for ids in _ids(tokenizer, check_conversations(model)) for token in ids}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in used:
        name = "<|pad|>"
        while name in tokenizer.get_vocab():
            name = f"<{name[1:-1]}_>"
        tokenizer.add_special_tokens({"pad_token": name})
    return int(tokenizer.pad_token_id)


def check_export(
    model: ArmoRewardModel,
    folder: Path,
    plan: Plan,
    conversations: Sequence[Conversation],
    expected: Float[Tensor, "..."],
    *,
    format: Format,
) -> float:
    """Load an export with plain Transformers, and compare what it gives.

    Args:
        model: What was exported.
        folder: The export.
        plan: What was written.
        conversations: What to compare on, in one padded batch.
        expected: What it should give for them.
        format: Of the export.

    Returns:
        The largest deviation.

    Raises:
        ExportError: If it is too large.
    """
    trunk = model.backbone.model
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    texts = [_render(tokenizer, conversation) for conversation in conversations]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    inputs = {name: batch[name].to(trunk.device) for name in ("input_ids", "attention_mask")}
    kind = AutoModel if format == "armorm" else AutoModelForSequenceClassification
    loaded, info = kind.from_pretrained(
        folder, dtype=trunk.dtype, output_loading_info=True, trust_remote_code=False
    )
    if info["missing_keys"]:
        raise ExportError(f"the export lacks {', '.join(sorted(info['missing_keys']))}")
    outputs = loaded.eval().to(trunk.device)(**inputs)
    if format == "armorm":
        got = _score_states(
            read_parts(
                folder, config=read_json(folder / "config.json"), files=tensor_files(folder)
            ),
            outputs.last_hidden_state.cpu().double(),
            inputs["input_ids"].tolist(),
            pad=int(tokenizer.pad_token_id),
            pattern=plan.config[SECTION]["gating_pattern"],
        )
    else:
        got = outputs.logits.cpu().double()
    deviation = float((got - expected).abs().max())
    allowed = SAME[trunk.dtype] * max(1.0, float(expected.abs().max()))
    if not deviation <= allowed:  # nor NaN
        raise ExportError(
            f"loaded with plain Transformers, the export deviates by {deviation:.2g} on "
            f"{len(texts)} conversations, more than {allowed:.2g}: it reads this backbone otherwise"
        )
    return deviation


def _score_states(
    parts: PublishedParts,
    states: Float[Tensor, "batch tokens dim"],
    ids: Sequence[Sequence[int]],
    *,
    pad: int,
    pattern: Sequence[int],
) -> Float[Tensor, " batch"]:
    """Score as code of the published layout does: positions by padding and by pattern."""
    size, last, ends = len(pattern), [], []
    for row in ids:
        last.append((list(row).index(pad) if pad in row else 0) - 1)
        found = [j for j in range(len(row)) if list(row[j : j + size]) == list(pattern)]
        if not found:
            raise ExportError("the opening of the answer is not found in a conversation")
        ends.append(found[-1])
    each = torch.arange(len(ids))
    return published_score(
        parts, states[each, torch.tensor(last)], states[each, torch.tensor(ends)]
    )


def check_conversations(model: ArmoRewardModel) -> list[Conversation]:
    """Return what to check on: some fixed ones, and golden ones that every reader takes whole."""
    found = fixed_conversations()
    path = model.folder / GOLDEN if model.folder is not None else None
    if path is not None and path.is_file():
        for given in read_json(path)["conversations"]:
            messages = parse_messages(given)
            if messages[0].role != "system":
                found.append(Conversation(messages[:-1], messages[-1].content))
    assert model.backbone.planner.conversations is not None
    tokens = model.backbone.planner.conversations.tokenise(
        [PromptGroup(c.prompt, (c.response,)) for c in found]
    )
    spec = model.backbone.spec
    return [
        conversation
        for conversation, group in zip(found, tokens, strict=True)
        if len(group.prompt) <= spec.max_prompt_tokens
        and len(group.responses[0].ids) <= spec.max_tokens
    ]


def fixed_conversations() -> list[Conversation]:
    """Return the conversations that every export is checked on."""
    turns = [parse_messages([{"role": r, "content": c} for r, c in check]) for check in CHECKS]
    return [Conversation(messages[:-1], messages[-1].content) for messages in turns]


def _render(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> str:
    turns = [{"role": m.role, "content": m.content} for m in conversation.prompt]
    answer = {"role": "assistant", "content": conversation.response}
    return str(tokenizer.apply_chat_template([*turns, answer], tokenize=False))


def _ids(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]
) -> list[list[int]]:
    texts = [_render(tokenizer, conversation) for conversation in conversations]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, which takes the place of `folder` when the block succeeds."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
