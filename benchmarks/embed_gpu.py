"""The embedding pass on one GPU with a model of Llama 3 8B's shape, in bfloat16.

    python benchmarks/embed_gpu.py --json PATH
    python benchmarks/embed_gpu.py --tiny            a tiny shape on the CPU, to see that it runs

Weights are random and made on the device; texts are random words, one token each, whose lengths
are drawn like those of public preference data. Nothing is downloaded, no file is read.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, LlamaConfig
from transformers import PreTrainedTokenizerFast as FastTokenizer

from armo.data.conversation import Message
from armo.embed.backbone import Backbone
from armo.embed.boundary import PromptGroup
from armo.embed.plan import Plan
from armo.embed.spec import BackboneSpec

WORDS = 1000
SPECIAL = ["<|bos|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "<|bos|>{% for message in messages %}<|{{ message['role'] }}|>"
    "{{ message['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Median and spread of the logarithm of the tokens of 2,000 pairs of public preference data, and
# how many responses a prompt has there: two, seldom more.
PROMPT, RESPONSE = (65.0, 1.37), (120.0, 1.53)
RESPONSES = (2, 2, 2, 2, 2, 2, 2, 2, 2, 4)
ALIKE = 0.74  # correlation of the logarithms of the lengths of two responses to one prompt
MAX_PROMPT, MAX_RESPONSE = 1500, 1500
SAME = 0.1  # how far bfloat16 may take two ways to one embedding apart, relative to its norm


@dataclass(frozen=True)
class Work:
    """The model's shape, and how much is run."""

    layers: int
    width: int
    feed: int
    heads: int
    kv_heads: int
    vocabulary: int
    prompts: int  # per turn
    loop_prompts: int  # of these, so many for the loop
    turns: int
    matmul_rows: int
    matmul_s: float

    @property
    def linear_layers(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the linear layers of one block."""
        keys = self.width * self.kv_heads // self.heads
        square = (self.width, self.width)
        up, down = (self.width, self.feed), (self.feed, self.width)
        return [square, (self.width, keys), (self.width, keys), square, up, up, down]


FULL = Work(32, 4096, 14336, 32, 8, 128256, 1000, 60, 3, 16384, 1.0)
TINY = Work(2, 64, 128, 4, 2, 2000, 6, 2, 1, 256, 0.01)


def make_backbone(work: Work, device: torch.device) -> Backbone:
    """Make a random model on the device, and a tokenizer of one token per word."""
    vocabulary = {word: k for k, word in enumerate([*SPECIAL, "<|unknown|>", *words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = FastTokenizer(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        unk_token="<|unknown|>",
        additional_special_tokens=SPECIAL[1:3],
    )
    wrapped.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=work.vocabulary,
        hidden_size=work.width,
        intermediate_size=work.feed,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_key_value_heads=work.kv_heads,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModel.from_config(config, dtype=torch.bfloat16)
    spec = BackboneSpec(
        "random-llama-8b",
        max_tokens=4096,
        max_prompt_tokens=2048,
        on_overlong="error",
        dtype="bfloat16",
    )
    return Backbone(spec, model=model, tokenizer=wrapped)


def words() -> list[str]:
    """Return the words that texts are made of."""
    return [f"w{k}" for k in range(WORDS)]


def draw_groups(count: int, *, seed: int) -> list[PromptGroup]:
    """Draw prompts with two or more responses, of lengths like those of preference data."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = words()

    def normal() -> float:
        return torch.randn((), generator=generator).item()

    def text(of: tuple[float, float], z: float, most: int) -> str:
        length = min(most, max(1, round(of[0] * torch.tensor(of[1] * z).exp().item())))
        chosen = torch.randint(WORDS, (length,), generator=generator).tolist()
        return " ".join(vocabulary[k] for k in chosen)

    groups = []
    for _ in range(count):
        prompt = (Message("user", text(PROMPT, normal(), MAX_PROMPT)),)
        number = RESPONSES[torch.randint(len(RESPONSES), (), generator=generator)]
        common = normal()
        lengths = [ALIKE**0.5 * common + (1 - ALIKE) ** 0.5 * normal() for _ in range(number)]
        groups.append(PromptGroup(prompt, [text(RESPONSE, z, MAX_RESPONSE) for z in lengths]))
    return groups


def conversation_ids(backbone: Backbone, group: PromptGroup) -> tuple[int, list[list[int]]]:
    """Return where the prompt ends, and the tokens of each whole conversation."""
    tokenizer: Any = backbone.tokenizer
    messages = [{"role": turn.role, "content": turn.content} for turn in group.prompt]

    def ids(turns: list[dict[str, str]], opened: bool) -> list[int]:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=opened)
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    answers = [{"role": "assistant", "content": text} for text in group.responses]
    return len(ids(messages, True)), [ids([*messages, answer], False) for answer in answers]


@torch.inference_mode()
def one_at_a_time(backbone: Backbone, groups: Sequence[PromptGroup]) -> list[torch.Tensor]:
    """Run each conversation on its own, for its two embeddings."""
    model, rows = backbone.model, []
    for group in groups:
        end, conversations = conversation_ids(backbone, group)
        for ids in conversations:
            states = model(
                input_ids=torch.tensor([ids], device=model.device), use_cache=False
            ).last_hidden_state[0]
            rows.append(states[[end - 1, -1]].float().cpu())
    return rows


def check_same(backbone: Backbone, groups: Sequence[PromptGroup]) -> float:
    """Stop where the pass gives other embeddings than the loop; return how far they part."""
    ours = backbone.embed(groups)
    places = [k for k, group in enumerate(groups) for _ in group.responses]
    pairs = torch.stack([ours.prompts.values[places], ours.responses.values], dim=1).float()
    other = torch.stack(one_at_a_time(backbone, groups))
    apart = ((pairs - other).norm(dim=-1) / other.norm(dim=-1)).max().item()
    if not apart < SAME:
        sys.exit(f"the pass and the loop do not give the same embeddings: {apart:.1e}")
    return apart


def plan_flops(work: Work, plan: Plan) -> float:
    """Matrix-product FLOPs of a plan: `2 t w + 4 d (t p + t^2 / 2)` per layer and sequence.

    `t` real tokens after `p` of a shared prompt, `w` weights of a layer's linear layers, width
    `d`; of attention, the half that a causal model needs. Padding is not counted.
    """
    runs = [(len(s.ids), 0) for s in plan.sequences]
    for group in plan.shared:
        prompt = len(group.prefix.ids)
        runs += [(prompt, 0), *((len(tail.ids), prompt) for tail in group.tails)]
    weights = sum(into * out for into, out in work.linear_layers)
    return float(
        sum(work.layers * (2 * t * weights + 4 * work.width * (t * p + t * t / 2)) for t, p in runs)
    )


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return how long a call takes, until the device is done with it."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def matmul_rate(work: Work, device: torch.device) -> float:
    """FLOP/s of bfloat16 products of the model's own shapes."""
    rows = work.matmul_rows
    shapes = work.linear_layers
    weights = [torch.randn(o, i, device=device, dtype=torch.bfloat16) for i, o in shapes]
    inputs = {
        i: torch.randn(rows, i, device=device, dtype=torch.bfloat16) for i in {i for i, _ in shapes}
    }

    def once() -> None:
        for weight, (into, _) in zip(weights, shapes, strict=True):
            torch.nn.functional.linear(inputs[into], weight)

    for _ in range(3):
        once()
    spent = [timed(once, device)]
    while sum(spent) < work.matmul_s:
        spent.append(timed(once, device))
    return sum(2 * rows * into * out for into, out in shapes) / statistics.median(spent)


def measure(work: Work, device: torch.device) -> dict[str, dict[str, Any]]:
    """Run all turns; return the figures by name."""
    backbone = make_backbone(work, device)
    print(f"causal: {backbone.runner.causal}, prompts shared: {backbone.runner.shares}")
    warm = draw_groups(work.prompts, seed=1000)
    print(f"pass and loop part by {check_same(backbone, warm[: work.loop_prompts]):.1e} at most")
    backbone.embed(warm)  # finds the batch that fits, and warms up what is chosen by shape
    turns: list[dict[str, float]] = []
    for turn in range(work.turns):
        groups = draw_groups(work.prompts, seed=turn)
        some = groups[: work.loop_prompts]
        rates = [matmul_rate(work, device)]
        runs = [partial(backbone.embed, groups), partial(one_at_a_time, backbone, some)]
        spent = [0.0, 0.0]
        for number in (0, 1) if turn % 2 == 0 else (1, 0):
            spent[number] = timed(runs[number], device)
        rates.append(matmul_rate(work, device))
        plan = backbone.planner.plan(
            groups, causal=backbone.runner.causal, share=backbone.runner.shares
        )
        useful, looped = (
            sum(len(ids) for group in part for ids in conversation_ids(backbone, group)[1])
            for part in (groups, some)
        )
        turns.append(
            {
                "ours": useful / spent[0],
                "run": plan.tokens / spent[0],
                "loop": looped / spent[1],
                "ratio": useful / spent[0] / (looped / spent[1]),
                "rate": statistics.mean(rates) / 1e12,
                "share": plan_flops(work, plan) / spent[0] / statistics.mean(rates),
            }
        )
        print(f"turn {turn + 1}: {turns[-1]}", file=sys.stderr, flush=True)
    mid = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    print(f"{mid['run']:,.0f} tokens/s were run: a prompt counts once for all its responses")
    print(f"batches of {backbone.runner.batch_tokens} padded tokens")
    return {
        "llama8b_tokens_per_s": figure(mid["ours"], "useful tokens/s", mid["loop"], None),
        "llama8b_gemm_share": figure(mid["share"], "share", mid["rate"], 0.6),
        "llama8b_vs_one_at_a_time": figure(mid["ratio"], "x", mid["loop"], None),
    }


def figure(value: float, unit: str, baseline: float, goal: float | None) -> dict[str, Any]:
    """Put one figure together; a baseline is in tokens/s, or in TFLOP/s for the share."""
    return {"value": value, "unit": unit, "baseline": baseline, "goal": goal}


def main() -> None:
    """Run the benchmark on the first GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU, in seconds")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        sys.exit("no GPU here; `--tiny` runs a tiny shape on the CPU")
    device = torch.device("cpu" if options.tiny else "cuda:0")
    name = "the CPU, a tiny shape" if options.tiny else torch.cuda.get_device_name(device)
    print(f"torch {torch.__version__} on {name}")
    figures = measure(TINY if options.tiny else FULL, device)
    print(f"{'':28} {'value':>24} {'goal':>8} {'baseline':>12}")
    for key, row in figures.items():
        goal = "" if row["goal"] is None else f"> {row['goal']:g}"
        value = f"{row['value']:,.3f} {row['unit']}"
        print(f"{key:28} {value:>24} {goal:>8} {row['baseline']:>12,.3f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
