"""The embedding pass on a CPU, against what one would write or install instead.

    python benchmarks/embed.py --data FOLDER --json PATH
    OMP_NUM_THREADS=2 taskset -c 0,1 python benchmarks/embed.py --quick

Every figure is a ratio of two times of one process, taken turn by turn; what is shown is the median
over turns. A turn has its own prompts, spread evenly over the data, with all rows of each.
"""

import argparse
import importlib.resources
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import yaml
from figures import Figure, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModel, BertConfig, BertModel, LlamaConfig, LlamaModel
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers.utils import logging as transformers_logging

from armo.data.conversation import Message, PreferencePair, Prompt
from armo.data.sources import data_files, stream_pairs
from armo.embed.backbone import Backbone, GroupEmbeddings, find_weights, load_backbone
from armo.embed.boundary import PromptGroup
from armo.embed.plan import TokenSequence
from armo.embed.spec import BackboneSpec

PAIRS = 2000
SAME = 1e-4  # how far two ways to one embedding may part, relative to its norm
CHAT_TEMPLATE = (
    "<|bos|>{% for message in messages %}<|{{ message['role'] }}|>"
    "{{ message['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"]


@dataclass(frozen=True)
class Work:
    """How much is run; never what is compared with what."""

    turns: int
    minilm_prompts: int  # per turn
    llama_prompts: int  # per turn
    best_of_turns: int
    pairs: int = PAIRS
    llama_layers: int = 4
    llama_width: int = 1024
    vocabulary: int = 8192
    matmul_s: float = 0.5


FULL = Work(turns=5, minilm_prompts=120, llama_prompts=24, best_of_turns=5)
QUICK = Work(turns=2, minilm_prompts=8, llama_prompts=3, best_of_turns=1, pairs=500, matmul_s=0.1)
# For the test: everything runs, nothing is measured.
TINY = Work(1, 3, 3, 1, pairs=18, llama_layers=2, llama_width=64, vocabulary=600, matmul_s=0.01)


# --- data ---------------------------------------------------------------------------------------


def mixed_pairs(path: str, count: int) -> list[PreferencePair]:
    """Take pairs from each file in turn, in name order, until there are enough."""
    files = data_files(path, builtin_file="preferences.jsonl.gz")
    streams: list[Iterator[PreferencePair]] = [iter(stream_pairs(str(file))) for file in files]
    end = object()

    def taken() -> Iterator[PreferencePair]:
        left = streams
        while left:
            rows = [(stream, next(stream, end)) for stream in left]
            left = [stream for stream, row in rows if row is not end]
            yield from (row for _, row in rows if isinstance(row, PreferencePair))

    return list(islice(taken(), count))


@dataclass(frozen=True)
class Slice:
    """Some prompts with all rows that have them.

    Attributes:
        conversations: Each pair's two, in row order, as a loop over the rows meets them.
        groups: The same as the embedding pass sees them, each distinct text once.
    """

    conversations: list[tuple[Prompt, str]]
    groups: list[PromptGroup]

    @classmethod
    def of(cls, rows: Sequence[PreferencePair]) -> "Slice":
        """Number the distinct texts of some rows."""
        conversations = [(row.prompt, text) for row in rows for text in row.responses]
        texts: dict[Prompt, dict[str, None]] = {}
        for prompt, text in conversations:
            texts.setdefault(prompt, {})[text] = None
        return cls(conversations, [PromptGroup(p, tuple(t)) for p, t in texts.items()])

    def place(self) -> tuple[list[int], list[int]]:
        """Return for each conversation the number of its prompt and of its response."""
        prompts = {group.prompt: k for k, group in enumerate(self.groups)}
        keys = ((group.prompt, text) for group in self.groups for text in group.responses)
        responses = {key: k for k, key in enumerate(keys)}
        return [prompts[p] for p, _ in self.conversations], [
            responses[key] for key in self.conversations
        ]


def slices(rows: Sequence[PreferencePair], *, prompts: int, turns: int) -> list[Slice]:
    """Spread the prompts evenly over the turns; a slice has about `prompts` of them."""
    distinct = list(dict.fromkeys(row.prompt for row in rows))
    step = max(1, len(distinct) // prompts)
    result = []
    for turn in range(turns):
        chosen = set(distinct[(turn * step // turns) % step :: step])
        result.append(Slice.of([row for row in rows if row.prompt in chosen]))
    return result


def by_shard(groups: Sequence[PromptGroup], *, rows: int) -> Iterator[list[PromptGroup]]:
    """Cut groups into shards of about `rows` responses, as the embedding pass does."""
    shard: list[PromptGroup] = []
    for group in groups:
        shard.append(group)
        if sum(len(member.responses) for member in shard) >= rows:
            yield shard
            shard = []
    if shard:
        yield shard


# --- the plain loops ----------------------------------------------------------------------------


@dataclass
class Looped:
    """What a loop gives: one prompt and one response embedding per conversation."""

    prompts: list[torch.Tensor]
    responses: list[torch.Tensor]
    tokens: list[int]  # of each sequence that was run


@torch.inference_mode()
def encoder_loop(
    model: Any, tokenizer: Any, spec: BackboneSpec, conversations: Sequence[tuple[Prompt, str]]
) -> Looped:
    """One conversation at a time, each prompt run anew, as the public scripts do."""
    out = Looped([], [], [])

    def mean(ids: list[int], start: int) -> torch.Tensor:
        tensor = torch.tensor([ids])
        states = model(
            input_ids=tensor, attention_mask=torch.ones_like(tensor), output_hidden_states=True
        ).hidden_states
        out.tokens.append(len(ids))
        return torch.cat([states[layer] for layer in spec.layers], dim=-1)[0, start:].mean(dim=0)

    cls, sep, limit = tokenizer.cls_token_id, tokenizer.sep_token_id, spec.max_prompt_tokens
    for prompt, response in conversations:
        text = "\n\n".join(message.content for message in prompt)
        context = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(context) > limit:  # the pass cuts a prompt in its middle
            context = [*context[: limit // 2], *context[len(context) - (limit - limit // 2) :]]
        answer = tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"]
        answer = answer[: spec.max_tokens - len(context) - 3]
        out.prompts.append(mean([cls, *context, sep], 0))
        out.responses.append(mean([cls, *context, sep, *answer, sep], len(context) + 2))
    return out


def conversation_ids(tokenizer: Any, prompt: Prompt, response: str | None) -> list[int]:
    """Render and tokenise a conversation, or a prompt with the words that open a response."""
    messages = [{"role": message.role, "content": message.content} for message in prompt]
    if response is not None:
        messages.append({"role": "assistant", "content": response})
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=response is None
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


@torch.inference_mode()
def causal_loop(model: Any, tokenizer: Any, conversations: Sequence[tuple[Prompt, str]]) -> Looped:
    """One whole conversation at a time; both embeddings come from its one run."""
    out = Looped([], [], [])
    for prompt, response in conversations:
        end = len(conversation_ids(tokenizer, prompt, None))
        ids = torch.tensor([conversation_ids(tokenizer, prompt, response)])
        states = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        out.prompts.append(states[end - 1])
        out.responses.append(states[-1])
        out.tokens.append(ids.shape[1])
    return out


def check_same(ours: GroupEmbeddings, part: Slice, looped: Looped) -> None:
    """Stop where the pass and the loop do not give the same embeddings."""
    for table, numbers, rows in zip(
        (ours.prompts, ours.responses),
        part.place(),
        (looped.prompts, looped.responses),
        strict=True,
    ):
        check_close(table.values[numbers], torch.stack(rows))


def check_close(ours: torch.Tensor, other: torch.Tensor) -> None:
    """Stop where two ways to the same embeddings give others."""
    apart = ((ours - other).norm(dim=1) / other.norm(dim=1)).max().item()
    if not apart < SAME:
        sys.exit(f"the two ways do not give the same embeddings: they part by {apart:.1e}")


# --- timing -------------------------------------------------------------------------------------


def timed(run: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def turn_times(
    turn: int, runs: dict[str, Callable[[], Any]]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Run each once: how long it took, and what it gave. Every turn begins with another one."""
    names = list(runs)
    first = turn % len(names)
    spent, results = {}, {}
    for name in names[first:] + names[:first]:
        start = time.perf_counter()
        results[name] = runs[name]()
        spent[name] = time.perf_counter() - start
    return spent, results


def matmul_rates(layers: Sequence[tuple[int, int]], *, rows: int, seconds: float) -> list[float]:
    """FLOP/s of `rows` times these layers' weights: torch's own `linear`, and oneDNN's.

    Torch gives float32 products to MKL, which takes its slower path on processors that are not
    Intel's; oneDNN, which torch carries as well, does not. The faster of the two is what the
    cores can do.
    """
    weights = [torch.randn(out, into) for into, out in layers]
    inputs = {into: torch.randn(rows, into) for into, _ in layers}
    flops = sum(2 * rows * into * out for into, out in layers)

    def rate(product: Callable[[torch.Tensor, Any], object], packed: Sequence[Any]) -> float:
        def once() -> None:
            for weight, (into, _) in zip(packed, layers, strict=True):
                product(inputs[into], weight)

        once()
        spent = [timed(once)]
        while sum(spent) < seconds:
            spent.append(timed(once))
        return flops / statistics.median(spent)

    with torch.inference_mode():
        rates = [rate(torch.nn.functional.linear, weights)]
        try:
            reorder = torch.ops.mkldnn._reorder_linear_weight
            linear = torch.ops.mkldnn._linear_pointwise
            packed = [reorder(weight, None) for weight in weights]
            rates.append(rate(lambda x, w: linear(x, w, None, "none", [], ""), packed))
        except (AttributeError, RuntimeError):
            pass  # a build of torch without oneDNN
    return rates


def encoder_flops(config: Any, lengths: Sequence[int]) -> float:
    """Matrix-product FLOPs of sequences of `n` real tokens.

    `2 n (4 d^2 + 2 d f) + 4 n^2 d` per layer.

    Four projections of attention and two of the feed-forward part, of width `d` and `f`, and the
    products of queries with keys and of weights with values. Padding is not counted.
    """
    d, f = config.hidden_size, config.intermediate_size
    per_layer = sum(2 * n * (4 * d * d + 2 * d * f) + 4 * n * n * d for n in lengths)
    return float(config.num_hidden_layers * per_layer)


def tokens_through(model: torch.nn.Module, run: Callable[[], object]) -> int:
    """Count the tokens that a model is given, padding included."""
    count = 0

    def counted(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        nonlocal count
        count += inputs["input_ids"].numel()

    hook = model.register_forward_pre_hook(counted, with_kwargs=True)
    try:
        run()
    finally:
        hook.remove()
    return count


# --- the models ---------------------------------------------------------------------------------


def default_settings() -> tuple[BackboneSpec, int]:
    """Read the default backbone and its shard size from its configuration."""
    text = (importlib.resources.files("armo.conf") / "embed" / "minilm.yaml").read_text()
    settings = yaml.safe_load(text)
    spec = {k: v for k, v in settings["backbone"]["spec"].items() if not k.startswith("_")}
    return BackboneSpec(**spec), int(settings["shard_rows"])


def train_tokenizer(rows: Sequence[PreferencePair], *, size: int) -> FastTokenizer:
    """Train a byte-level tokenizer on the data, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    turns = (message.content for row in rows[:500] for message in row.prompt)
    answers = (text for row in rows[:500] for text in row.responses)
    tokenizer.train_from_iterator(chain(turns, answers), trainer)
    wrapped = FastTokenizer(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        additional_special_tokens=SPECIAL[1:-1],
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def llama(tokenizer: FastTokenizer, *, layers: int, width: int) -> LlamaModel:
    """Make a random Llama; the same one every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 256),
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaModel(config).eval()


LLAMA_SPEC = BackboneSpec(
    "random-llama", max_tokens=2048, max_prompt_tokens=1536, on_overlong="error", dtype="float32"
)


def fitting(rows: Sequence[PreferencePair], tokenizer: FastTokenizer) -> list[PreferencePair]:
    """Leave out the pairs that the random Llama's limits would cut."""
    return [
        row
        for row in rows
        if len(conversation_ids(tokenizer, row.prompt, None)) <= LLAMA_SPEC.max_prompt_tokens
        and all(
            len(conversation_ids(tokenizer, row.prompt, text)) <= LLAMA_SPEC.max_tokens
            for text in row.responses
        )
    ]


# --- the comparisons ----------------------------------------------------------------------------


def minilm_figures(rows: Sequence[PreferencePair], work: Work) -> list[Figure]:
    """MiniLM over slices of the data, against the loop and the matrix-product rate."""
    spec, _ = default_settings()
    backbone = load_backbone(spec, device="cpu")
    folder = find_weights(spec.id, revision=spec.revision)
    plain = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, config = backbone.tokenizer, plain.config
    wide, feed = config.hidden_size, config.intermediate_size
    shapes = [(wide, wide)] * 4 + [(wide, feed), (feed, wide)]
    warm = Slice.of(rows[:2])
    backbone.embed(warm.groups)
    encoder_loop(plain, tokenizer, spec, warm.conversations)
    turns: list[dict[str, float]] = []
    for turn, part in enumerate(slices(rows, prompts=work.minilm_prompts, turns=work.turns)):
        plan = backbone.planner.plan(part.groups, causal=False, share=False)
        loop = partial(encoder_loop, plain, tokenizer, spec, part.conversations)
        before = matmul_rates(shapes, rows=backbone.runner.batch_tokens, seconds=work.matmul_s)
        spent, results = turn_times(
            turn,
            {
                "ours": partial(backbone.embed, part.groups),
                "loop": loop,
                "once": partial(sequences_alone, plain, spec, plan.sequences),
            },
        )
        check_same(results["ours"], part, results["loop"])
        after = matmul_rates(shapes, rows=backbone.runner.batch_tokens, seconds=work.matmul_s)
        rates = [statistics.mean(pair) for pair in zip(before, after, strict=True)]
        useful = sum(results["loop"].tokens)
        flops = encoder_flops(config, [len(s.ids) for s in plan.sequences])
        turns.append(
            {
                "ratio": spent["loop"] / spent["ours"],
                "deduplication": spent["loop"] / spent["once"],
                "batching": spent["once"] / spent["ours"],
                "loop rate": useful / spent["loop"],
                "run less": useful / plan.tokens,
                "share": flops / spent["ours"] / max(rates),
                "share of linear": flops / spent["ours"] / rates[0],
                "loop share": encoder_flops(config, results["loop"].tokens)
                / spent["loop"]
                / rates[0],
                "rate": max(rates) / 1e9,
                "linear rate": rates[0] / 1e9,
            }
        )
        say(f"MiniLM turn {turn + 1}: {len(part.conversations)} conversations", spent)
    mid = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    return [
        Figure(
            "minilm_vs_one_at_a_time",
            mid["ratio"],
            "x",
            mid["loop rate"],
            "useful tokens/s",
            4.0,
            "the loop over conversations, its prompt run for each",
        ),
        Figure("  of it: each distinct text once", mid["deduplication"], "x"),
        Figure("  of it: batches, and the pass itself", mid["batching"], "x"),
        Figure("  tokens of the loop per token of ours", mid["run less"], "x"),
        Figure(
            "minilm_gemm_share",
            mid["share"],
            "share",
            mid["rate"],
            "GFLOP/s",
            0.8,
            "the faster of torch's two float32 matrix products",
        ),
        Figure(
            "  of the rate of torch's `linear`",
            mid["share of linear"],
            "share",
            mid["linear rate"],
            "GFLOP/s",
        ),
        Figure("  the loop, of that rate", mid["loop share"], "share"),
    ]


@torch.inference_mode()
def sequences_alone(model: Any, spec: BackboneSpec, sequences: Sequence[TokenSequence]) -> None:
    """Run token sequences one by one: what is left of the loop without repeated texts."""
    for sequence in sequences:
        ids = torch.tensor([sequence.ids])
        states = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True
        ).hidden_states
        span = sequence.spans[0]
        pooled = torch.cat([states[layer] for layer in spec.layers], dim=-1)
        pooled[0, span.start : span.end].mean(dim=0)


def sentence_transformers_figure(rows: Sequence[PreferencePair], work: Work) -> list[Figure]:
    """Plain texts through `SentenceTransformer.encode` and through ours."""
    name = "minilm_vs_sentence_transformers"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from sentence_transformers import SentenceTransformer
    except ImportError:
        note = "not measured: sentence-transformers is not installed (`armo[benchmarks]`)"
        return [Figure(name, None, "x", goal=1.0, note=note)]
    base, _ = default_settings()
    spec = replace(base, layers=(-1,), max_tokens=512, max_prompt_tokens=508)
    backbone = load_backbone(spec, device="cpu")
    folder = find_weights(spec.id, revision=spec.revision)
    other = SentenceTransformer(str(folder), device="cpu")
    other.max_seq_length = spec.max_tokens
    other.encode(["warm"])
    turns: list[dict[str, float]] = []
    for turn, part in enumerate(slices(rows, prompts=work.minilm_prompts, turns=work.turns)):
        # Cut beforehand, so that both see the same: one would cut at the end, one in the middle.
        whole = [text for group in part.groups for text in group.responses]
        texts = list(dict.fromkeys(cut_texts(backbone.tokenizer, whole, spec.max_prompt_tokens)))
        groups = [PromptGroup((Message("user", text),), ()) for text in texts]
        encode = partial(other.encode, texts, show_progress_bar=False)
        runs = {f"{size}": partial(encode, batch_size=size) for size in (32, 64, 128)}
        spent, results = turn_times(turn, {"ours": partial(backbone.embed, groups), **runs})
        check_close(
            torch.nn.functional.normalize(results["ours"].prompts.values, dim=1),
            torch.nn.functional.normalize(torch.from_numpy(results["32"]), dim=1),
        )
        plan = backbone.planner.plan(groups, causal=False, share=False)
        best = min(spent[size] for size in ("32", "64", "128"))
        turns.append(
            {
                "ratio": spent["32"] / spent["ours"],
                "best": best / spent["ours"],
                "rate": plan.tokens / spent["32"],
            }
        )
        say(f"sentence-transformers turn {turn + 1}: {len(texts)} texts", spent)
    mid = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
    note = "encode, its own sorting and batch size (32)"
    return [
        Figure(name, mid["ratio"], "x", mid["rate"], "tokens/s", 1.0, note),
        Figure("  at its best batch size of 32, 64, 128", mid["best"], "x"),
    ]


def cut_texts(tokenizer: Any, texts: Sequence[str], limit: int) -> list[str]:
    """Cut texts after so many tokens."""
    encodings = tokenizer(list(texts), add_special_tokens=False, verbose=False).encodings
    return [
        text if len(encoding) <= limit else text[: encoding.offsets[limit - 1][1]]
        for text, encoding in zip(texts, encodings, strict=True)
    ]


def padding_figures(rows: Sequence[PreferencePair], tokenizer: FastTokenizer) -> list[Figure]:
    """Count padding at the input of one-layer models, over all the data, shard by shard."""
    spec, shard_rows = default_settings()
    real = load_backbone(spec, device="cpu")
    groups = Slice.of(rows).groups
    config = BertConfig(
        vocab_size=real.model.config.vocab_size,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    encoder = Backbone(
        replace(spec, layers=(-1,)), model=BertModel(config), tokenizer=real.tokenizer
    )
    small = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=4096,
    )
    causal = Backbone(
        replace(LLAMA_SPEC, on_overlong="truncate"), model=LlamaModel(small), tokenizer=tokenizer
    )
    waste = [padding(encoder, groups, shard_rows=shard_rows)]
    waste += [padding(causal, groups, shard_rows=shard_rows, share=s) for s in (True, False)]
    plan = encoder.planner.plan(groups, causal=False, share=False)
    lengths = [len(sequence.ids) for sequence in plan.sequences]
    naive = sum(len(part) * max(part) for part in chunked(lengths, 32))
    note = "the encoder's pass; baseline: 32 rows at a time, in the order of the data"
    return [
        Figure("padding_waste", waste[0], "share", 1 - sum(lengths) / naive, "share", 0.05, note),
        Figure("  the causal pass, prompts shared", waste[1], "share"),
        Figure("  the causal pass, nothing shared", waste[2], "share"),
    ]


def padding(
    backbone: Backbone, groups: Sequence[PromptGroup], *, shard_rows: int, share: bool = True
) -> float:
    """Return the share of the tokens that go through a model and are padding."""
    shards = list(by_shard(groups, rows=shard_rows))
    runner = backbone.runner
    plans = [
        backbone.planner.plan(s, causal=runner.causal, share=share and runner.shares)
        for s in shards
    ]

    def run() -> None:
        for plan in plans:
            runner.run(plan)

    return 1 - sum(plan.tokens for plan in plans) / tokens_through(backbone.model, run)


def chunked(values: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Cut a sequence into parts of one size."""
    return (values[start : start + size] for start in range(0, len(values), size))


def llama_figures(
    rows: Sequence[PreferencePair], tokenizer: FastTokenizer, work: Work
) -> list[Figure]:
    """A random Llama over slices of the data, with and without shared prompts."""
    plain = llama(tokenizer, layers=work.llama_layers, width=work.llama_width)
    model = llama(tokenizer, layers=work.llama_layers, width=work.llama_width)
    backbone = Backbone(LLAMA_SPEC, model=model, tokenizer=tokenizer)
    fit = fitting(rows, tokenizer)
    warm = Slice.of(fit[:1])
    backbone.embed(warm.groups)
    causal_loop(plain, tokenizer, warm.conversations)
    turns: list[dict[str, float]] = []
    for turn, part in enumerate(slices(fit, prompts=work.llama_prompts, turns=work.turns)):
        distinct = [(group.prompt, text) for group in part.groups for text in group.responses]
        loop = partial(causal_loop, plain, tokenizer, part.conversations)
        spent, results = turn_times(
            turn,
            {
                "ours": partial(backbone.embed, part.groups),
                "apart": partial(backbone.embed, part.groups, share=False),
                "loop": loop,
                "once": partial(causal_loop, plain, tokenizer, distinct),
            },
        )
        check_same(results["ours"], part, results["loop"])
        useful = sum(results["loop"].tokens)
        plan = backbone.planner.plan(part.groups, causal=True, share=backbone.runner.shares)
        turns.append(
            {
                "ratio": spent["loop"] / spent["ours"],
                "apart": spent["loop"] / spent["apart"],
                "deduplication": spent["loop"] / spent["once"],
                "batching": spent["once"] / spent["apart"],
                "sharing": spent["apart"] / spent["ours"],
                "rate": useful / spent["loop"],
                "run less": useful / plan.tokens,
            }
        )
        say(f"Llama turn {turn + 1}: {len(part.conversations)} conversations", spent)
    mid = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
    note = f"the loop; {len(rows) - len(fit)} of {len(rows)} pairs are too long and left out"
    return [
        Figure(
            "llama_pairs_vs_one_at_a_time",
            mid["ratio"],
            "x",
            mid["rate"],
            "useful tokens/s",
            5.0,
            note,
        ),
        Figure("  nothing shared (share=False)", mid["apart"], "x"),
        Figure("  of it: each distinct text once", mid["deduplication"], "x"),
        Figure("  of it: batches, and the pass itself", mid["batching"], "x"),
        Figure("  of it: prompts shared", mid["sharing"], "x"),
        Figure("  tokens of the loop per token of ours", mid["run less"], "x"),
    ]


def best_of_figures(tokenizer: FastTokenizer, work: Work) -> list[Figure]:
    """Sixteen responses of 64 tokens to one prompt of 512."""
    plain = llama(tokenizer, layers=work.llama_layers, width=work.llama_width)
    model = llama(tokenizer, layers=work.llama_layers, width=work.llama_width)
    backbone = Backbone(LLAMA_SPEC, model=model, tokenizer=tokenizer)
    words = [
        word
        for word in (str(tokenizer.decode([number])) for number in range(len(tokenizer)))
        if word.startswith(" ") and word[1:].isalpha() and word.isascii()
    ]

    def text(count: int, seed: int) -> str:
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randint(len(words), (count,), generator=generator).tolist()
        return "".join(words[number] for number in numbers).strip()

    def sized(count: int, seed: int, length: Callable[[str], int]) -> str:
        # The first word loses its space, and with it sometimes its token.
        sizes = (text(size, seed) for size in range(count, 0, -1))
        return next(candidate for candidate in sizes if length(candidate) == count)

    prompt = (
        Message(
            "user",
            sized(512, 0, lambda t: len(conversation_ids(tokenizer, (Message("user", t),), None))),
        ),
    )
    responses = tuple(
        sized(64, k, lambda t: len(conversation_ids(tokenizer, prompt, t)) - 512)
        for k in range(1, 17)
    )
    group = PromptGroup(prompt, responses)
    part = Slice([(prompt, response) for response in responses], [group])
    turns: list[dict[str, float]] = []
    for turn in range(work.best_of_turns):
        spent, results = turn_times(
            turn,
            {
                "ours": partial(backbone.embed, [group]),
                "apart": partial(backbone.embed, [group], share=False),
                "loop": partial(causal_loop, plain, tokenizer, part.conversations),
            },
        )
        check_same(results["ours"], part, results["loop"])
        turns.append(
            {
                "ratio": spent["apart"] / spent["ours"],
                "loop": spent["loop"] / spent["ours"],
                "rate": 16 * 576 / spent["apart"],
            }
        )
        say(f"best of 16, turn {turn + 1}", spent)
    mid = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
    note = "16 whole sequences in batches (share=False); at most 6.0 by tokens"
    return [
        Figure(
            "llama_best_of_16_vs_separate",
            mid["ratio"],
            "x",
            mid["rate"],
            "useful tokens/s",
            4.5,
            note,
        ),
        Figure("  against the loop", mid["loop"], "x"),
    ]


# --- where the time goes ------------------------------------------------------------------------

KINDS = {
    "linear layers": ("addmm", "::mm", "_linear_pointwise", "mkldnn_linear"),
    "attention": ("scaled_dot_product", "_softmax", "::bmm", "::baddbmm"),
    "activations, norms, sums": (
        "gelu", "silu", "layer_norm", "::add", "::mul", "::pow", "::mean", "rsqrt", "::neg"
    ),
    "copies": ("copy_", "::cat", "index_select", "::index", "::embedding", "clone"),
}  # fmt: skip


def profile(backbone: Backbone, groups: Sequence[PromptGroup], *, title: str) -> None:
    """Print where the time of a pass over some groups goes."""
    runner, inside = backbone.runner, [0.0]
    plan = backbone.planner.plan(groups, causal=runner.causal, share=runner.shares)
    runner.run(plan)
    planned = timed(
        lambda: backbone.planner.plan(groups, causal=runner.causal, share=runner.shares)
    )
    hooks = [
        backbone.model.register_forward_pre_hook(
            lambda *_: inside.__setitem__(0, inside[0] - time.perf_counter())
        ),
        backbone.model.register_forward_hook(
            lambda *_: inside.__setitem__(0, inside[0] + time.perf_counter())
        ),
    ]
    ran = timed(lambda: runner.run(plan))
    for hook in hooks:
        hook.remove()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as record:
        runner.run(plan)
    events = record.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    shares = dict.fromkeys(KINDS, 0.0)
    for event in events:
        kind = next((k for k, ops in KINDS.items() if any(op in event.key for op in ops)), None)
        if kind is not None:
            shares[kind] += event.self_cpu_time_total / total
    whole = planned + ran
    print(f"\n{title}: {plan.tokens} tokens in {whole:.1f} s")
    print(f"  {'rendering and tokenising':42} {planned / whole:6.1%}")
    print(f"  {'the model':42} {inside[0] / whole:6.1%}")
    print(f"  {'batches, padding, pooling':42} {(ran - inside[0]) / whole:6.1%}")
    for kind, share in {**shares, "the rest": 1 - sum(shares.values())}.items():
        print(f"  {'of the run: ' + kind:42} {share:6.1%}")
    chunks = [groups[k::4] for k in range(4)]
    plans = [backbone.planner.plan(c, causal=runner.causal, share=runner.shares) for c in chunks]
    alone = timed(lambda: [runner.run(p) for p in plans])
    ahead = timed(lambda: list(backbone.embed_chunks(chunks)))
    print(f"  four chunks: {alone:.2f} s run alone, {ahead:.2f} s with tokenising ahead of them")


def profiles(rows: Sequence[PreferencePair], tokenizer: FastTokenizer, work: Work) -> None:
    """Print where the time of both passes goes."""
    spec, _ = default_settings()
    part = slices(rows, prompts=work.minilm_prompts, turns=1)[0]
    profile(load_backbone(spec, device="cpu"), part.groups, title="MiniLM")
    part = slices(fitting(rows, tokenizer), prompts=work.llama_prompts, turns=1)[0]
    model = llama(tokenizer, layers=work.llama_layers, width=work.llama_width)
    profile(Backbone(LLAMA_SPEC, model=model, tokenizer=tokenizer), part.groups, title="Llama")


# --- the table ----------------------------------------------------------------------------------


def say(text: str, spent: dict[str, float]) -> None:
    """Show progress, apart from the results."""
    times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in spent.items())
    print(f"{text}: {times}", file=sys.stderr, flush=True)


def show(figures: Sequence[Figure]) -> None:
    """Print the table."""
    print(f"{'':42} {'value':>14} {'goal':>8} {'baseline':>24}")
    for figure in figures:
        value = "-" if figure.value is None else f"{figure.value:.3f} {figure.unit}"
        sign = "<" if figure.name == "padding_waste" else ">"
        goal = "" if figure.goal is None else f"{sign} {figure.goal:g}"
        base = "" if figure.baseline is None else f"{figure.baseline:,.6g} {figure.baseline_unit}"
        print(f"{figure.name:42} {value:>14} {goal:>8} {base:>24}  {figure.note}".rstrip())


def main() -> None:
    """Run all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="builtin", help="folder of preference files")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="less work, under a minute")
    parser.add_argument("--profile", action="store_true", help="also show where the time goes")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    work = TINY if options.tiny else QUICK if options.quick else FULL
    rows = mixed_pairs(options.data, work.pairs)
    tokenizer = train_tokenizer(rows, size=work.vocabulary)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {len(rows)} pairs")
    start, load = time.perf_counter(), os.getloadavg()[0]
    figures = [
        *minilm_figures(rows, work),
        *sentence_transformers_figure(rows, work),
        *padding_figures(rows, tokenizer),
        *llama_figures(rows, tokenizer, work),
        *best_of_figures(tokenizer, work),
    ]
    show(figures)
    took = (time.perf_counter() - start) / 60
    print(f"{took:.1f} minutes; load of the machine {load:.1f}, then {os.getloadavg()[0]:.1f}")
    if options.json:
        save(figures, options.json)
    if options.profile:
        profiles(rows, tokenizer, work)


if __name__ == "__main__":
    main()
