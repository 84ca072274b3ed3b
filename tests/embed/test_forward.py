import logging
import random
import re
from itertools import takewhile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    DECODERS,
    VOCABULARY,
    Memory,
    answered_by,
    apart,
    build,
    counted,
    read_on,
    reading_ahead,
    shared_model,
    states_alone,
    tokens_in,
)
from templates import family

from armo.data.conversation import Message
from armo.embed.boundary import PromptGroup
from armo.embed.forward import Pooled, Runner, SpanSums, pad
from armo.embed.plan import Plan, SharedPrefix, Span, TextPlanner, TokenSequence
from armo.embed.spec import BackboneError, BackboneSpec

SAME = 1e-5
SEEN = 1e-3
ERRORS = {
    "gpu": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 9000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
}


def runner_of(model, *, layers=(-1,), batch_tokens=256, decoder=True):
    return Runner(model, layers=layers, batch_tokens=batch_tokens, decoder=decoder)


def ids_of(length, *, seed):
    return random.Random(seed).choices(range(5, VOCABULARY), k=length)


class Texts:
    """Random prompts with the tails that follow them, as a plan and one at a time."""

    def __init__(self, shape, *, pooling="last"):
        """Take `shape`: the length of each prompt and those of its tails."""
        self.pooling = pooling
        self.prompts = [ids_of(length, seed=k) for k, (length, _) in enumerate(shape)]
        self.tails = [
            [ids_of(n, seed=f"{k} {j}") for j, n in enumerate(lengths)]
            for k, (_, lengths) in enumerate(shape)
        ]

    def start(self, ids, begin=0):
        return begin if self.pooling == "mean" else len(ids) - 1

    def rows(self):
        """Each text with where pooling starts: prompts first, then the texts that follow them."""
        rows = [(ids, self.start(ids)) for ids in self.prompts]
        for prompt, tails in zip(self.prompts, self.tails, strict=True):
            rows += [(prompt + tail, self.start(prompt + tail, len(prompt))) for tail in tails]
        return rows

    def plan(self, *, share):
        rows = self.rows()
        plan = Plan(len(self.prompts), len(rows) - len(self.prompts))
        if not share:
            for target, (ids, start) in enumerate(rows):
                plan.sequences.append(TokenSequence(ids, (Span(target, start, len(ids)),)))
            return plan
        target = len(self.prompts)
        for k, (prompt, tails) in enumerate(zip(self.prompts, self.tails, strict=True)):
            prefix = TokenSequence(prompt, (Span(k, self.start(prompt), len(prompt)),))
            if not tails:
                plan.sequences.append(prefix)
                continue
            after = []
            for tail in tails:
                after.append(TokenSequence(tail, (Span(target, self.start(tail), len(tail)),)))
                target += 1
            plan.shared.append(SharedPrefix(prefix, after))
        return plan

    def alone(self, model, *, layers=(-1,)):
        """The slow way: one text, one call."""
        means = [
            states_alone(model, ids, layers=layers)[start:].mean(dim=0)
            for ids, start in self.rows()
        ]
        return torch.stack(means)


SHAPES = st.lists(
    st.tuples(st.integers(1, 30), st.lists(st.integers(1, 20), max_size=4)), min_size=1, max_size=4
)
MIXED = [(40, (3, 30, 17)), (13, (9, 2)), (25, (50, 5, 5, 31)), (7, (2,)), (21, ())]


# The same, whatever is run together.


@pytest.mark.parametrize("kind", DECODERS)
@settings(max_examples=12)
@given(
    shape=SHAPES,
    pooling=st.sampled_from(["last", "mean"]),
    share=st.booleans(),
    batch_tokens=st.integers(1, 300),
    max_rows=st.none() | st.integers(1, 5),
)
def test_what_is_run_together_changes_nothing(kind, shape, pooling, share, batch_tokens, max_rows):
    model, texts = shared_model(kind), Texts(shape, pooling=pooling)
    runner = runner_of(model, batch_tokens=batch_tokens)
    values = runner.run(texts.plan(share=share), max_rows=max_rows)
    assert apart(values, texts.alone(model)) < SAME
    assert runner.batch_tokens == batch_tokens


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_plan_of_many_lengths_gives_the_same_shared_and_apart(kind, pooling):
    model, texts = shared_model(kind), Texts(MIXED, pooling=pooling)
    expected = texts.alone(model)
    for share in (True, False):
        assert apart(runner_of(model).run(texts.plan(share=share)), expected) < SAME
    # A text and a neighbour of it are far apart, measured so.
    assert apart(expected, expected.roll(1, dims=0)) > 0.1


class Joined(Texts):
    """Texts whose prompts end within a tail: what is shared stops `back` tokens before."""

    def __init__(self, shape, *, back, pooling="last"):
        super().__init__(shape, pooling=pooling)
        self.back = back

    def plan(self, *, share):
        if not share:
            return super().plan(share=False)
        rows = self.rows()
        plan = Plan(len(self.prompts), len(rows) - len(self.prompts))
        target = len(self.prompts)
        for k, (prompt, tails) in enumerate(zip(self.prompts, self.tails, strict=True)):
            numbers = [k, *range(target, target + len(tails))]
            target += len(tails)
            cut = len(prompt) - self.back
            if cut < 1:
                for n in numbers:
                    ids, start = rows[n]
                    plan.sequences.append(TokenSequence(ids, (Span(n, start, len(ids)),)))
                continue
            before, after = [], []
            for n in numbers:
                ids, start = rows[n]
                if start < cut:
                    before.append(Span(n, start, cut))
                span = Span(n, max(start - cut, 0), len(ids) - cut)
                after.append(TokenSequence(ids[cut:], (span,)))
            plan.shared.append(SharedPrefix(TokenSequence(prompt[:cut], tuple(before)), after))
        return plan


@pytest.mark.parametrize("kind", DECODERS)
@settings(max_examples=12)
@given(
    shape=SHAPES,
    back=st.integers(1, 4),
    pooling=st.sampled_from(["last", "mean"]),
    batch_tokens=st.integers(1, 300),
    max_rows=st.none() | st.integers(1, 5),
)
def test_a_prompt_that_ends_in_a_tail_has_the_state_that_it_has_alone(
    kind, shape, back, pooling, batch_tokens, max_rows
):
    model, texts = shared_model(kind), Joined(shape, back=back, pooling=pooling)
    plan, told = texts.plan(share=True), []
    runner = runner_of(model, batch_tokens=batch_tokens)
    values = runner.run(plan, max_rows=max_rows, progress=told.append)
    assert apart(values, texts.alone(model)) < SAME
    assert sum(told) == plan.tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [(-1,), (0, 1, -1)])
def test_what_is_shared_may_have_nothing_to_pool(dtype, layers):
    model, texts = build("llama").to(dtype), Joined(MIXED, back=1)
    plan = texts.plan(share=True)
    assert len(plan.shared) == len(MIXED)
    assert all(group.prefix.spans == () for group in plan.shared)
    values = runner_of(model, layers=layers).run(plan)
    assert values.dtype == dtype
    within = SAME if dtype == torch.float32 else 0.05
    assert apart(values, texts.alone(model, layers=layers)) < within
    # Beside prompts that have something to pool, too.
    half = Texts(MIXED).plan(share=True)
    mixed = Plan(plan.prompts, plan.responses, sequences=half.sequences)
    mixed.shared = [*plan.shared[:2], *half.shared[2:]]
    assert apart(runner_of(model, layers=layers).run(mixed), values.float()) < within


def test_memory_that_runs_out_where_a_prompt_ends_in_a_tail_loses_nothing(caplog):
    model, texts = build("llama"), Joined(MIXED, back=2, pooling="mean")
    plan = texts.plan(share=True)
    runner, values, told = run_within(model, Memory(60), plan)
    assert apart(values, texts.alone(model)) < SAME
    assert sum(told) == plan.tokens
    assert runner.batch_tokens < 256


ASKED = (Message("user", "How do I boil an egg? Say it in seven words."),)


@pytest.mark.parametrize("name", ["qwen2.5", "gemma2"])
@pytest.mark.parametrize("kind", ["llama", "qwen2-windows", "gpt2"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize(
    "responses",
    [
        ("\n\nPut it in hot water.",),
        ("\n\nPut it in hot water.", "Wait.", "\n\n\n1", "Cool it."),
        ("\n\nPut it in.", "\n\nWait."),
    ],
)
def test_responses_that_begin_within_the_last_token_of_a_prompt_share_the_rest(
    name, kind, pooling, responses
):
    like, model = family(name), build(kind)
    texts = [like.head(ASKED, "generation_prompt")]
    texts += [like.conversation(ASKED, response) for response in responses]
    prompt, *rows = [like.encode(text) for text in texts]
    if name == "qwen2.5":
        assert any(row[: len(prompt)] != prompt for row in rows)
    limits = {"max_tokens": 400, "max_prompt_tokens": 300}
    planner = TextPlanner(BackboneSpec("tiny", pooling=pooling, **limits), like.tokenizer)
    runner, group = runner_of(model), PromptGroup(ASKED, responses)
    values, tokens = [], []
    for share in (True, False):
        plan = planner.plan([group], causal=True, share=share)
        assert len(plan.shared) == (share and tokens_saved(prompt, rows))
        values.append(runner.run(plan))
        tokens.append(plan.tokens)
    expected = []
    for k, ids in enumerate([prompt, *rows]):
        start = len(ids) - 1
        if pooling == "mean":
            pairs = zip(ids, prompt, strict=False)
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            start = shared if k else 0
        expected.append(states_alone(model, ids)[start:].mean(dim=0))
    for each in values:
        assert apart(each, torch.stack(expected)) < SAME
    assert tokens[0] < tokens[1] or not tokens_saved(prompt, rows)


def tokens_saved(prompt, rows):
    """Whether rows leave tokens to share: several do, and one that does not hold its prompt."""
    return len(rows) > 1 or rows[0][: len(prompt)] != prompt


@given(shape=SHAPES, batch_tokens=st.integers(1, 300), max_rows=st.none() | st.integers(1, 5))
@settings(max_examples=12)
def test_padding_changes_nothing_for_an_encoder(shape, batch_tokens, max_rows):
    model, texts = shared_model("bert"), Texts(shape, pooling="mean")
    runner = runner_of(model, batch_tokens=batch_tokens, decoder=False)
    values = runner.run(texts.plan(share=False), max_rows=max_rows)
    assert apart(values, texts.alone(model)) < SAME


@pytest.mark.parametrize("layers", [(-1,), (0,), (1,), (2,), (0, 1, -1), (-2, 0), (-3,)])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_layers_are_side_by_side_in_the_order_asked_for(layers, share, pooling):
    model, texts = shared_model("gemma2"), Texts(MIXED, pooling=pooling)
    runner = runner_of(model, layers=layers)
    assert runner.dim == 32 * len(layers)
    values = runner.run(texts.plan(share=share))
    assert apart(values, texts.alone(model, layers=layers)) < SAME


@pytest.mark.parametrize("share", [True, False])
def test_one_sequence_may_be_pooled_for_several_targets(share):
    model, ids = shared_model("llama"), ids_of(20, seed=0)
    spans = (Span(2, 0, 20), Span(0, 19, 20), Span(1, 4, 9))
    plan = Plan(3, int(share))
    if share:
        tail = TokenSequence([7, 8], (Span(3, 1, 2),))
        plan.shared.append(SharedPrefix(TokenSequence(ids, spans), [tail]))
    else:
        plan.sequences.append(TokenSequence(ids, spans))
    states = states_alone(model, ids)
    expected = torch.stack([states[19], states[4:9].mean(dim=0), states.mean(dim=0)])
    assert apart(runner_of(model).run(plan)[:3], expected) < SAME


def test_a_target_may_be_spread_over_several_sequences():
    model = shared_model("bert")
    rows = [ids_of(length, seed=length) for length in (30, 12, 4)]
    plan = Plan(1, 1, sequences=[TokenSequence(ids, (Span(0, 2, len(ids)),)) for ids in rows])
    plan.sequences.append(TokenSequence(rows[0], (Span(1, 0, 5),)))
    states = torch.cat([states_alone(model, ids)[2:] for ids in rows])
    expected = torch.stack([states.mean(dim=0), states_alone(model, rows[0])[:5].mean(dim=0)])
    for max_rows in (None, 1):
        runner = runner_of(model, decoder=False)
        assert apart(runner.run(plan, max_rows=max_rows), expected) < SAME


@pytest.mark.parametrize("share", [True, False])
def test_no_padding_has_a_position_beyond_those_of_the_texts(share):
    # Learned positions end; past them a GPU stops for good. Others stretch all that came before.
    texts = Texts([(50, (5, 6)), (4, (60, 2))], pooling="mean")
    for model in (build("gpt2", n_positions=64), build("phi3-stretched")):
        runner = runner_of(model, batch_tokens=4096)
        assert runner.shares
        assert apart(runner.run(texts.plan(share=share)), texts.alone(model)) < SAME


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [True, False])
def test_embeddings_come_in_the_dtype_of_the_model(dtype, share):
    model, texts = build("llama").to(dtype), Texts(MIXED)
    values = runner_of(model).run(texts.plan(share=share))
    assert values.dtype == dtype
    assert apart(values, texts.alone(model)) < 0.05
    assert runner_of(model).shares


def test_what_is_missing_is_nan_and_an_empty_plan_is_empty():
    model, ids = shared_model("llama"), ids_of(5, seed=0)
    plan = Plan(2, 1, sequences=[TokenSequence(ids, (Span(1, 4, 5),))], missing={0, 2})
    values = runner_of(model, layers=(0, 1)).run(plan)
    assert values.isnan().all(dim=1).tolist() == [True, False, True]
    assert not values[1].isnan().any()
    nothing = runner_of(model, layers=(0, 1)).run(Plan(2, 1, missing={0, 1, 2}))
    assert nothing.shape == (3, 64)
    assert nothing.isnan().all()
    assert runner_of(model).run(Plan(0, 0)).shape == (0, 32)


def test_running_leaves_the_plan_as_it_was():
    texts = Texts(MIXED)
    plan = texts.plan(share=True)
    runner = runner_of(shared_model("llama"))
    first = runner.run(plan)
    assert plan == texts.plan(share=True)
    assert torch.equal(runner.run(plan), first)


# What a mistake would look like. Each is made after the model was tried out.


def shifted(forward, inputs):
    """Count the positions after a prompt from one too far."""
    if read_on(inputs):
        inputs = {**inputs, "position_ids": inputs["position_ids"] + 1}
    return forward(**inputs)


def restarted(forward, inputs):
    """Count the positions after a prompt from nought."""
    if read_on(inputs):
        columns = torch.arange(inputs["input_ids"].shape[1])
        inputs = {**inputs, "position_ids": columns.expand_as(inputs["input_ids"])}
    return forward(**inputs)


def unmasked(forward, inputs):
    """Read the padding before a prompt as text."""
    if read_on(inputs):
        inputs = {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
    return forward(**inputs)


def swapped(forward, inputs):
    """Go on from the prompt of another row."""
    if read_on(inputs):
        for layer in inputs["past_key_values"].layers:
            layer.keys, layer.values = layer.keys.roll(1, dims=0), layer.values.roll(1, dims=0)
    return forward(**inputs)


MISTAKES = [shifted, restarted, unmasked, swapped]


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_reading_on_would_be_seen(kind, mistake):
    model, texts = build(kind), Texts([(12, (5, 9)), (4, (7, 3))])
    expected = texts.alone(model)
    runner = runner_of(model)
    with answered_by(model, mistake):
        assert apart(runner.run(texts.plan(share=True)), expected) > SEEN
    assert apart(runner.run(texts.plan(share=True)), expected) < SAME


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_padding_that_is_read_would_be_seen(kind):
    model, texts = build(kind), Texts([(30, ()), (4, ())], pooling="mean")
    runner = runner_of(model, decoder=False)

    def unmasked(forward, inputs):
        return reading_ahead(forward, {**inputs, "attention_mask": None})

    with answered_by(model, unmasked):
        assert apart(runner.run(texts.plan(share=False)), texts.alone(model)) > SEEN


# What a model can do is tried out.


@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_is_causal_and_reads_on(kind):
    runner = runner_of(shared_model(kind))
    assert (runner.causal, runner.shares) == (True, True)


def test_an_encoder_is_not_tried_out():
    model = shared_model("bert")
    with counted(model) as shapes:
        runner = runner_of(model, decoder=False)
    assert (runner.causal, runner.shares) == (False, False)
    # One token shows how wide its states are.
    assert tokens_in(shapes) <= 1


@pytest.mark.parametrize("kind", ["llama", "gemma2", "bert"])
def test_a_model_that_reads_ahead_is_noticed_and_reads_right(kind, caplog):
    caplog.set_level(logging.INFO, "armo")
    model, texts = build(kind), Texts(MIXED, pooling="mean")
    with answered_by(model, reading_ahead):
        runner = runner_of(model)
        assert (runner.causal, runner.shares) == (False, False)
        values = runner.run(texts.plan(share=False))
        assert apart(values, texts.alone(model)) < SAME
    assert "this model reads ahead" in caplog.text
    if kind != "bert":
        # Taken for a causal one, it would not.
        assert apart(values, texts.alone(model)) > SEEN


def forgetful(forward, inputs):
    """Read what follows a prompt as if there were none."""
    return forward(input_ids=inputs["input_ids"], attention_mask=None)


def refusing(error):
    def answer(forward, inputs):
        if inputs.get("past_key_values") is not None:
            raise error
        return forward(**inputs)

    answer.__name__ = type(error).__name__
    return answer


@pytest.mark.parametrize(
    "answer",
    [
        *MISTAKES,
        forgetful,
        refusing(TypeError("forward() got an unexpected keyword argument 'past_key_values'")),
        refusing(ValueError("uses cache of its own")),
        refusing(AttributeError("no attribute 'get_seq_length'")),
        refusing(NotImplementedError()),
        refusing(RuntimeError("The size of tensor a (14) must match the size of tensor b (7)")),
        refusing(IndexError("index out of range in self")),
    ],
    ids=lambda answer: answer.__name__,
)
def test_a_model_that_cannot_read_on_reads_each_text_at_once(answer, caplog):
    caplog.set_level(logging.INFO, "armo")
    model = build("llama")
    with answered_by(model, answer):
        runner = runner_of(model)
    assert (runner.causal, runner.shares) == (True, False)
    assert "this model cannot read on from cached prompts" in caplog.text


def test_a_model_that_keeps_its_state_elsewhere_reads_each_text_at_once():
    model, texts = shared_model("mamba"), Texts([(12, (5, 9)), (4, (7, 3))], pooling="mean")
    runner = runner_of(model)
    assert (runner.causal, runner.shares) == (True, False)
    assert apart(runner.run(texts.plan(share=False)), texts.alone(model)) < SAME


@pytest.mark.parametrize("error", ["gpu", "cpu"])
def test_memory_that_runs_out_while_a_model_is_tried_out_is_no_lack_of_the_model(error):
    model = build("llama")
    for answer in (Memory(0, error=ERRORS[error]), refusing(ERRORS[error])):
        with answered_by(model, answer), pytest.raises(RuntimeError, match="memory"):
            runner_of(model)


# What is asked of the model.


def test_a_shared_prompt_is_run_once():
    model, texts = shared_model("llama"), Texts([(60, (5,) * 16), (30, (4, 6))])
    runner = runner_of(model)
    with counted(model) as shapes:
        runner.run(texts.plan(share=True), max_rows=1)
    assert tokens_in(shapes) == 60 + 16 * 5 + 30 + 4 + 6
    with counted(model) as shapes:
        runner.run(texts.plan(share=False), max_rows=1)
    assert tokens_in(shapes) == 60 + 16 * 65 + 30 + 34 + 36


def test_batches_keep_the_budget_and_the_limit_of_rows():
    model, texts = shared_model("llama"), Texts([(20, (9,) * 7), (18, (8, 3)), (5, (11,))])
    for share in (True, False):
        for batch_tokens, max_rows in ((64, None), (10_000, 3), (40, 2)):
            runner = runner_of(model, batch_tokens=batch_tokens)
            with counted(model) as shapes:
                runner.run(texts.plan(share=share), max_rows=max_rows)
            for rows, columns in shapes:
                assert rows == 1 or rows * columns <= batch_tokens
                assert max_rows is None or rows <= max_rows
    runner = runner_of(model, batch_tokens=10_000)
    with counted(model) as shapes:
        runner.run(texts.plan(share=True))
    # All prompts in one batch, all that follows them in few.
    assert shapes[0] == (3, 20)
    assert len(shapes) < 6


def test_the_copies_of_a_prompt_are_limited_by_the_budget():
    model, texts = shared_model("llama"), Texts([(60, (1,) * 40)])
    runner = runner_of(model, batch_tokens=100)
    with counted(model) as shapes:
        runner.run(texts.plan(share=True))
    # 40 tokens are a small batch, but 40 copies of the prompt are 24 times the budget.
    assert max(rows for rows, _ in shapes) * 61 <= 4 * 100


def test_without_sharing_nothing_is_cached_and_no_hidden_states_are_kept():
    model, texts = shared_model("llama"), Texts(MIXED)
    runner = runner_of(model)
    outputs = []

    def answer(forward, inputs):
        outputs.append(forward(**inputs))
        return outputs[-1]

    with answered_by(model, answer):
        runner.run(texts.plan(share=False))
    assert outputs
    assert all(output.past_key_values is None for output in outputs)
    assert all(output.hidden_states is None for output in outputs)


def test_a_mask_is_made_only_where_padding_could_be_read():
    masks = []

    def answer(forward, inputs):
        masks.append(inputs.get("attention_mask"))
        return forward(**inputs)

    for kind, decoder, lengths, needed in (
        ("llama", True, (9, 5), False),
        ("bert", False, (9, 5), True),
        ("bert", False, (9, 9), False),
    ):
        model, texts = build(kind), Texts([(length, ()) for length in lengths])
        runner = runner_of(model, decoder=decoder)
        masks.clear()
        with answered_by(model, answer):
            runner.run(texts.plan(share=False))
        assert [mask is not None for mask in masks] == [needed]


def test_nothing_is_left_to_train():
    model = build("llama").train()
    values = runner_of(model).run(Texts(MIXED).plan(share=True))
    assert not model.training
    assert not any(weights.requires_grad for weights in model.parameters())
    assert not values.requires_grad


def test_progress_counts_each_token_once_and_no_padding():
    model, texts = shared_model("llama"), Texts(MIXED)
    for share in (True, False):
        plan, told = texts.plan(share=share), []
        runner_of(model, batch_tokens=64).run(plan, progress=told.append)
        assert sum(told) == plan.tokens
        assert min(told) > 0
        assert len(told) > 2


# Memory that runs out.


def budgets_told(caplog):
    found = [re.search(r"batches of (\d+) tokens", r.getMessage()) for r in caplog.records]
    return [int(match[1]) for match in found if match]


def run_within(model, memory, plan, *, batch_tokens=256, decoder=True):
    runner = runner_of(model, batch_tokens=batch_tokens, decoder=decoder)
    told = []
    with answered_by(model, memory):
        values = runner.run(plan, progress=told.append)
    return runner, values, told


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_where_memory_runs_out_smaller_batches_do_it(error, share, pooling, caplog):
    model, texts = build("llama"), Texts(MIXED, pooling=pooling)
    expected = texts.alone(model)
    plan, memory = texts.plan(share=share), Memory(80, error=ERRORS[error])
    runner, values, told = run_within(model, memory, plan)
    assert apart(values, expected) < SAME
    # Each row once: a batch that was tried in vain leaves nothing behind.
    assert sum(told) == plan.tokens
    # One line for each halving, and the budget stays.
    assert budgets_told(caplog) == [128, 64][: memory.refused]
    assert memory.refused in (1, 2)
    assert runner.batch_tokens == 256 >> memory.refused
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    refused = memory.refused
    with answered_by(model, memory):
        runner.run(plan)
    assert memory.refused == refused


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "MPS backend out of memory (MPS allocated: 17 GB, max allowed: 18 GB)",
    ],
)
def test_libraries_say_in_their_own_words_that_memory_ran_out(message):
    model, texts = build("llama"), Texts(MIXED)
    plan, memory = texts.plan(share=True), Memory(80, error=RuntimeError(message))
    runner, values, _ = run_within(model, memory, plan)
    assert apart(values, texts.alone(model)) < SAME
    assert runner.batch_tokens < 256


def test_enough_memory_is_left_alone(caplog):
    model, texts = build("llama"), Texts(MIXED)
    memory = Memory(256)
    runner, _, _ = run_within(model, memory, texts.plan(share=True))
    assert (memory.refused, runner.batch_tokens) == (0, 256)
    assert budgets_told(caplog) == []


@settings(max_examples=25)
@given(
    shape=SHAPES,
    share=st.booleans(),
    spare=st.integers(0, 60),
    batch_tokens=st.integers(1, 600),
)
def test_whatever_fits_alone_is_run_whatever_the_memory(shape, share, spare, batch_tokens):
    model, texts = shared_model("mistral"), Texts(shape, pooling="mean")
    plan = texts.plan(share=share)
    longest = max(len(ids) for ids, _ in texts.rows())
    runner, values, told = run_within(
        model, Memory(longest + spare), plan, batch_tokens=batch_tokens
    )
    assert apart(values, texts.alone(model)) < SAME
    assert sum(told) == plan.tokens
    assert 1 <= runner.batch_tokens <= batch_tokens


def test_memory_that_runs_out_after_the_prompts_loses_none_of_their_responses(caplog):
    model, texts = build("qwen2"), Texts([(10, (40,) * 6), (9, (3, 38))], pooling="mean")
    plan = texts.plan(share=True)
    memory = Memory(50)
    runner, values, told = run_within(model, memory, plan)
    assert apart(values, texts.alone(model)) < SAME
    assert sum(told) == plan.tokens
    assert budgets_told(caplog) == [128, 64]
    assert runner.batch_tokens == 64


def test_a_target_that_is_spread_over_several_sequences_counts_each_once():
    model = build("bert")
    rows = [ids_of(length, seed=length) for length in (30, 29, 28, 27, 26, 25)]
    plan = Plan(1, 0, sequences=[TokenSequence(ids, (Span(0, 2, len(ids)),)) for ids in rows])
    states = torch.cat([states_alone(model, ids)[2:] for ids in rows])
    _, values, told = run_within(model, Memory(60), plan, batch_tokens=240, decoder=False)
    assert apart(values, states.mean(dim=0)[None]) < SAME
    assert sum(told) == plan.tokens


def test_copies_of_a_long_prompt_that_do_not_fit_together_are_run_one_by_one():
    # What is cached takes memory, too: here as much as what is run.
    model, texts = build("llama"), Texts([(50, (10, 10, 10))])
    runner, values, _ = run_within(
        model, Memory(70, cached=True), texts.plan(share=True), batch_tokens=256
    )
    assert apart(values, texts.alone(model)) < SAME
    assert runner.batch_tokens >= 1


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("batch_tokens", [7, 64, 1000])
def test_a_single_sequence_that_does_not_fit_is_an_error_that_says_how_long_it_is(
    share, batch_tokens
):
    model = build("llama")
    plan = Texts([(50, (3,)), (8, (4, 2))]).plan(share=share)
    error = r"out of memory on a single sequence of (\d+) tokens; lower `max_tokens`"
    with pytest.raises(BackboneError, match=error) as caught:
        run_within(model, Memory(40), plan, batch_tokens=batch_tokens)
    assert int(re.search(error, str(caught.value))[1]) == 53


@pytest.mark.parametrize("batch_tokens", [7, 64, 1000])
def test_a_single_response_that_does_not_fit_is_an_error_that_says_how_long_it_is(batch_tokens):
    model = build("llama")
    plan = Texts([(8, (50, 2))]).plan(share=True)
    error = r"out of memory on a single sequence of (\d+) tokens"
    with pytest.raises(BackboneError, match=error) as caught:
        run_within(model, Memory(40), plan, batch_tokens=batch_tokens)
    assert int(re.search(error, str(caught.value))[1]) == 58


def test_no_memory_at_all_ends_in_an_error():
    model = build("llama")
    runner = runner_of(model)
    memory = Memory(0)
    with answered_by(model, memory), pytest.raises(BackboneError, match="out of memory"):
        runner.run(Texts(MIXED).plan(share=True))
    assert memory.refused < 20


@pytest.mark.parametrize("share", [True, False])
def test_other_errors_of_the_model_are_not_taken_for_lack_of_memory(share):
    model, texts = build("llama"), Texts(MIXED)
    memory = Memory(60, error=RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    runner = runner_of(model)
    with answered_by(model, memory), pytest.raises(RuntimeError, match="mat1 and mat2"):
        runner.run(texts.plan(share=share))
    assert runner.batch_tokens == 256


# Pooling.


@st.composite
def pooled_rows(draw):
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    targets = draw(st.integers(1, 5))
    spans = []
    for _ in range(rows):
        drawn = draw(st.lists(st.tuples(*[st.integers(0, columns - 1)] * 2), max_size=3))
        spans.append(
            [(min(pair), max(pair) + 1, draw(st.integers(0, targets - 1))) for pair in drawn]
        )
    return columns, targets, spans


@given(drawn=pooled_rows(), single=st.booleans(), seed=st.integers(0, 99))
def test_pooling_is_the_mean_of_the_states_in_the_spans(drawn, single, seed):
    columns, targets, spans = drawn
    if single:
        spans = [[(start, start + 1, target) for start, _, target in row] for row in spans]
    states = torch.randn(
        len(spans), columns, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float32
    )
    pooled = Pooled(targets, device=torch.device("cpu"))
    chosen = {target: [] for target in range(targets)}
    for part in range(0, len(spans), 2):
        flat = [
            tuple(Span(t, start, end) for start, end, t in row) for row in spans[part : part + 2]
        ]
        sums = SpanSums(states[part : part + 2], flat, 1)
        assert sums.sums.shape == (sum(map(len, flat)), 3)
        pooled.add(sums)
    for row, of_row in enumerate(spans):
        for start, end, target in of_row:
            chosen[target] += [states[row, column] for column in range(start, end)]
    expected = [
        torch.stack(found).mean(dim=0) if found else torch.full((3,), torch.nan)
        for found in chosen.values()
    ]
    torch.testing.assert_close(
        pooled.means(3), torch.stack(expected), equal_nan=True, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_of_which_nothing_is_pooled_add_nothing(dtype):
    pooled = Pooled(2, device=torch.device("cpu"))
    states = torch.full((2, 5, 3), torch.nan, dtype=dtype)
    part = SpanSums(states, [(), ()], 10)
    assert (part.tokens, part.sums.shape, part.sums.dtype) == (10, (0, 3), torch.float32)
    assert part.targets.dtype == torch.long
    for _ in range(2):
        pooled.add(part)
    pooled.add(SpanSums(torch.ones(1, 5, 3), [(Span(1, 2, 4),)], 5))
    means = pooled.means(3)
    assert means[0].isnan().all()
    assert means[1].tolist() == [1.0, 1.0, 1.0]


LAYOUTS = {
    "single": [(Span(0, 3, 4),), (Span(1, 4, 5),)],
    "one each": [(Span(0, 0, 4000),), (Span(1, 0, 4000),)],
    "several": [(Span(0, 0, 4000), Span(2, 5, 3000)), (Span(1, 0, 4000),)],
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_states_are_summed_in_float32(dtype, layout):
    # 4000 times 20 is beyond float16, and bfloat16 cannot count past 256.
    states = torch.full((2, 4096, 2), 20.0, dtype=dtype)
    pooled = Pooled(3, device=torch.device("cpu"))
    for _ in range(3):
        part = SpanSums(states, LAYOUTS[layout], 1)
        assert part.sums.dtype == torch.float32
        pooled.add(part)
    means = pooled.means(2)
    assert means.dtype == torch.float32
    assert means[:2].tolist() == [[20.0, 20.0], [20.0, 20.0]]


@pytest.mark.parametrize("beyond", [torch.nan, torch.inf])
@pytest.mark.parametrize("layout", ["single", "one each", "several"])
def test_what_stands_in_the_padding_does_not_matter(layout, beyond):
    # Attention over nothing but padding is NaN in some kernels, and float16 overflows anywhere.
    spans = {
        "single": [(Span(0, 3, 4),), (Span(1, 4, 5),)],
        "one each": [(Span(0, 2, 4),), (Span(1, 0, 5),)],
        "several": [(Span(0, 2, 4), Span(2, 3, 4)), (Span(1, 0, 5),)],
    }[layout]
    states = torch.ones(2, 6, 3)
    states[0, 4:] = states[0, :2] = beyond
    states[1, 5:] = beyond
    pooled = Pooled(3, device=torch.device("cpu"))
    pooled.add(SpanSums(states, spans, 1))
    assert pooled.means(3)[:2].tolist() == [[1.0] * 3] * 2


@given(rows=st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=5))
def test_padding_is_where_the_mask_is_nought(rows):
    for side in ("left", "right"):
        ids, mask = pad(rows, side=side)
        assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
        assert [i[m.bool()].tolist() for i, m in zip(ids, mask, strict=True)] == rows
        ordered = mask if side == "left" else mask.flip(1)
        assert bool((ordered.diff(dim=1) >= 0).all())
