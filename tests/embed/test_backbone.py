import copy
import dataclasses
import gc
import importlib.metadata
import json
import logging
import shutil
import threading
import time

import huggingface_hub.constants
import pytest
import torch
from conftest import conversation, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    DECODERS,
    Memory,
    answered_by,
    apart,
    build,
    counted,
    reading_ahead,
    shared_model,
    states_alone,
    tokens_in,
)
from templates import families, family
from transformers import AutoModel, AutoTokenizer

from armo.artifacts import digest_file
from armo.data.conversation import Message
from armo.embed import backbone as module
from armo.embed.backbone import (
    PACKAGED,
    Backbone,
    find_weights,
    load_backbone,
    weights_digest,
)
from armo.embed.boundary import PromptGroup
from armo.embed.plan import WORTH_SHARING
from armo.embed.spec import BackboneError, BackboneSpec

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SAME = 1e-5
SEEN = 1e-3
EGG = (Message("user", "How do I boil an egg?"),)
CHAT = (
    Message("system", "Be brief."),
    Message("user", "Is the fox quick?"),
    Message("assistant", "Yes, it is."),
    Message("user", "And the dog?"),
)
LONG = (Message("user", " ".join(f"Say {k} words of risk." for k in range(30))),)
GROUPS = [
    PromptGroup(
        EGG,
        (
            "Put it in hot water for seven minutes.",
            "No.",
            "Honest answers say what they cannot know. " * 12,
        ),
    ),
    PromptGroup(CHAT, ("It is lazy.\n\n- It sleeps.\n- It is **safe**.",)),
    PromptGroup(LONG, ("Words.", "Safe ones warn of risks! " * 12)),
    PromptGroup((Message("user", "No answer?"),), ()),
]
SHORT = [PromptGroup(EGG, GROUPS[0].responses[:2]), GROUPS[1]]
KINDS = pytest.mark.parametrize("backbone", ["encoder", "causal"], indirect=True)


@pytest.fixture(scope="module")
def backbone(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def tokenizer(causal):
    return causal.tokenizer


def respec(backbone, *, tokenizer=None, batch_tokens=None, **changes):
    """The same loaded model under a changed spec."""
    return Backbone(
        dataclasses.replace(backbone.spec, **changes),
        model=backbone.model,
        tokenizer=tokenizer or backbone.tokenizer,
        batch_tokens=batch_tokens or backbone.runner.batch_tokens,
    )


def backbone_of(kind, tokenizer, *, model=None, batch_tokens=256, **changes):
    """A backbone of a tiny random model."""
    limits = {"max_tokens": 128, "max_prompt_tokens": 64}
    pooling = "mean" if kind == "bert" else "last"
    return Backbone(
        BackboneSpec(kind, **{**limits, "pooling": pooling, **changes}),
        model=model or shared_model(kind),
        tokenizer=tokenizer,
        batch_tokens=batch_tokens,
    )


def response_of(prompt, response):
    return PromptGroup(prompt, (response,))


def middle_out(ids, limit):
    front = limit // 2
    return ids if len(ids) <= limit else ids[:front] + ids[front - limit :]


def slow_encoder(spec, tokenizer, prompt, response=None):
    """Tokens to read, and where pooling starts: at the response, or at the prompt's own row."""
    text = "\n\n".join(message.content for message in prompt)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    row = [tokenizer.cls_token_id, *middle_out(ids, spec.max_prompt_tokens), tokenizer.sep_token_id]
    if response is None:
        return row, 0
    answer = tokenizer(response, add_special_tokens=False)["input_ids"]
    answer = answer[: spec.max_tokens - len(row) - 1]
    return [*row, *answer, tokenizer.sep_token_id], len(row)


def slow_chat(spec, tokenizer, prompt, response=None):
    """The same of a templated conversation, which one token closes."""

    def encode(messages, **options):
        chat = [{"role": message.role, "content": message.content} for message in messages]
        text = tokenizer.apply_chat_template(chat, tokenize=False, **options)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ids = encode(prompt, add_generation_prompt=spec.prompt_position == "generation_prompt")
    row = middle_out(ids, spec.max_prompt_tokens)
    start = 0
    if response is not None:
        start = len(row)
        full = encode((*prompt, Message("assistant", response)))
        assert full[: len(ids)] == ids
        answer, room = full[len(ids) :], spec.max_tokens - len(row)
        row = row + (answer if len(answer) <= room else answer[: room - 1] + answer[-1:])
    return row, start if spec.pooling == "mean" else len(row) - 1


def slow(backbone, groups):
    """Embeddings the slow way: one text at a time, by Transformers alone."""
    spec, tokenizer = backbone.spec, backbone.tokenizer
    read = slow_chat if tokenizer.chat_template else slow_encoder

    def embed(*text):
        ids, start = read(spec, tokenizer, *text)
        return states_alone(backbone.model, ids, layers=spec.layers)[start:].mean(dim=0)

    prompts = [embed(group.prompt) for group in groups]
    responses = [embed(group.prompt, response) for group in groups for response in group.responses]
    nothing = torch.zeros(0, backbone.dim)
    return (
        torch.stack(prompts) if prompts else nothing,
        torch.stack(responses) if responses else nothing,
    )


def far(embedded, expected):
    """How far embeddings of groups are from those of the slow way, at most."""
    return max(
        apart(part.values, values)
        for part, values in zip((embedded.prompts, embedded.responses), expected, strict=True)
    )


WORDS = (
    "egg",
    "Put it in",
    "hot water",
    "- one\n",
    "**three**",
    "risks!",
    "\n\n",
    "犬",
    "fox",
    "7",
)


def words(at_least, at_most):
    chosen = st.lists(st.sampled_from(WORDS), min_size=at_least, max_size=at_most)
    return chosen.map(" ".join).filter(str.strip)


@st.composite
def drafts(draw):
    """Some prompts, and up to four responses to each."""
    return [
        (draw(words(1, 25)), draw(st.lists(words(1, 25), max_size=4)))
        for _ in range(draw(st.integers(1, 3)))
    ]


# Built outside of the strategy: the checks of its types draw random numbers of their own.
def groups_of(drafts):
    return [PromptGroup((Message("user", text),), responses) for text, responses in drafts]


# An embedding is that of its text alone.


@pytest.mark.parametrize("kind", DECODERS)
@settings(max_examples=15)
@given(
    drafts=drafts(),
    share=st.booleans(),
    batch_tokens=st.integers(1, 600),
    max_rows=st.none() | st.integers(1, 6),
    side=st.sampled_from(["left", "right"]),
    spec=st.fixed_dictionaries(
        {
            "pooling": st.sampled_from(["last", "mean"]),
            "prompt_position": st.sampled_from(["turn_end", "generation_prompt"]),
            "layers": st.sampled_from([(-1,), (0, 1, -1), (2,), (1,)]),
            "max_prompt_tokens": st.sampled_from([64, 33, 20]),
        }
    ),
)
def test_a_conversation_has_the_embedding_that_it_has_alone(
    kind, tokenizer, drafts, share, batch_tokens, max_rows, side, spec
):
    groups = groups_of(drafts)
    sided = copy.copy(tokenizer)
    sided.padding_side = side
    backbone = backbone_of(kind, sided, batch_tokens=batch_tokens, **spec)
    embedded = backbone.embed(groups, share=share, max_rows=max_rows)
    assert far(embedded, slow(backbone, groups)) < SAME
    assert not embedded.prompts.missing.any()
    assert not embedded.responses.missing.any()


@settings(max_examples=15)
@given(
    drafts=drafts(),
    share=st.booleans(),
    batch_tokens=st.integers(1, 600),
    max_rows=st.none() | st.integers(1, 6),
    side=st.sampled_from(["left", "right"]),
    layers=st.sampled_from([(-1,), (0, 1, -1), (2,), (1,)]),
    max_prompt_tokens=st.sampled_from([64, 33, 20]),
)
def test_an_encoder_gives_the_embedding_of_the_text_alone(
    encoder, drafts, share, batch_tokens, max_rows, side, layers, max_prompt_tokens
):
    groups = groups_of(drafts)
    sided = copy.copy(encoder.tokenizer)
    sided.padding_side = side
    backbone = backbone_of(
        "bert",
        sided,
        batch_tokens=batch_tokens,
        layers=layers,
        max_prompt_tokens=max_prompt_tokens,
    )
    embedded = backbone.embed(groups, share=share, max_rows=max_rows)
    assert far(embedded, slow(backbone, groups)) < SAME


@pytest.mark.parametrize("kind", [*DECODERS, "bert"])
@settings(max_examples=5)
@given(order=st.permutations(range(len(GROUPS))))
def test_the_order_of_groups_changes_nothing(kind, tokenizer, encoder, order):
    backbone = backbone_of(kind, encoder.tokenizer if kind == "bert" else tokenizer)
    shuffled = backbone.embed([GROUPS[k] for k in order])
    assert far(shuffled, slow(backbone, [GROUPS[k] for k in order])) < SAME


@KINDS
@pytest.mark.parametrize("max_prompt_tokens", [40, 41])
@pytest.mark.parametrize("share", [True, False])
def test_a_loaded_backbone_reads_as_a_plain_forward_does(backbone, max_prompt_tokens, share):
    backbone = respec(backbone, max_prompt_tokens=max_prompt_tokens)
    assert far(backbone.embed(GROUPS, share=share), slow(backbone, GROUPS)) < SAME


@pytest.mark.parametrize("name", [each.name for each in families()])
def test_templates_of_all_families_share_their_prompts_alike(name):
    # Some of these responses reach into the prompt with their first token.
    responses = ("\n\nCool it.", "Put it in.", "](two) x", "<think>\nHm.\n</think>\n\nYes.", "")
    groups = [PromptGroup(EGG, responses), PromptGroup((Message("user", "Why?"),), responses[:2])]
    backbone = backbone_of(
        "llama", family(name).tokenizer, max_tokens=500, max_prompt_tokens=250, layers=(1, 2)
    )
    together = backbone.embed(groups)
    separate = [backbone.embed([response_of(EGG, text)], share=False) for text in responses]
    apart_values = torch.cat([each.responses.values for each in separate])
    assert apart(together.responses.values[:5], apart_values) < SAME
    prompts = torch.cat([each.prompts.values for each in separate])
    assert apart(prompts, together.prompts.values[:1].expand(5, -1)) < SAME


@pytest.mark.parametrize("share", [True, False])
def test_a_model_that_stretches_long_texts_is_read_right_below_that(tokenizer, share):
    model = build("phi3-stretched")
    limits = {"max_tokens": 64, "max_prompt_tokens": 30}
    backbone = backbone_of("phi3-stretched", tokenizer, model=model, **limits)
    assert far(backbone.embed(GROUPS, share=share), slow(backbone, GROUPS)) < SAME


def test_a_model_that_stretches_long_texts_is_refused_beyond_that(tokenizer):
    # As Phi-3: one long row stretches the positions of all rows of its batch, and a long response
    # those of the prompt that it shares.
    model = build("phi3-stretched")
    limits = {"max_tokens": 65, "max_prompt_tokens": 30}
    with pytest.raises(BackboneError, match="beyond 64 positions"):
        backbone_of("phi3-stretched", tokenizer, model=model, **limits)


@KINDS
def test_different_texts_have_different_embeddings(backbone):
    values = backbone.embed(GROUPS).responses.values
    distances = torch.cdist(values, values) + torch.eye(len(values))
    assert distances.min() > 1e-2


def test_a_causal_model_pools_the_last_token_although_it_pads_with_the_end_of_turn(causal):
    tokenizer = causal.tokenizer
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert tokenizer.pad_token_id == turn
    chat = [{"role": m.role, "content": m.content} for m in CHAT]
    chat += [{"role": "assistant", "content": "Lazy."}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    states = states_alone(causal.model, ids)
    pooled = causal.embed([response_of(CHAT, "Lazy."), *GROUPS]).responses.values[0]
    torch.testing.assert_close(pooled, states[-1], atol=1e-5, rtol=1e-5)
    # Pooling at the first padding id would have taken the end of the system turn.
    assert not torch.allclose(pooled, states[ids.index(turn)], atol=1e-2)


@pytest.mark.parametrize("position", ["turn_end", "generation_prompt"])
def test_the_prompt_embedding_is_the_same_state_in_every_conversation(causal, position):
    backbone = respec(causal, prompt_position=position)
    responses = ("Lazy.", "\n\nI cannot know.")
    prompt = backbone.embed([PromptGroup(CHAT, responses)]).prompts.values[0]
    tokenizer = causal.tokenizer
    chat = [{"role": m.role, "content": m.content} for m in CHAT]
    for response in responses:
        answer = {"role": "assistant", "content": response}
        text = tokenizer.apply_chat_template([*chat, answer], tokenize=False)
        opened = text.rindex("<|start|>")
        end = opened if position == "turn_end" else text.rindex("<|end|>\n\n") + len("<|end|>\n\n")
        last = len(tokenizer(text[:end], add_special_tokens=False)["input_ids"]) - 1
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        states = states_alone(causal.model, ids)
        torch.testing.assert_close(prompt, states[last], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(prompt, states[last - 1], atol=1e-2)


@KINDS
def test_what_comes_twice_is_embedded_twice(backbone):
    groups = [PromptGroup(EGG, ("No.", "Yes.", "No.")), GROUPS[1], PromptGroup(EGG, ("No.",))]
    embedded = backbone.embed(groups)
    assert far(embedded, slow(backbone, groups)) < SAME
    assert embedded.responses.values.shape[0] == 5
    assert apart(embedded.prompts.values[2:], embedded.prompts.values[:1]) < SAME


@KINDS
@pytest.mark.parametrize("groups", [[], [PromptGroup(EGG, ())], [GROUPS[3], SHORT[0], GROUPS[3]]])
def test_groups_and_responses_may_be_missing(backbone, groups):
    embedded = backbone.embed(groups)
    responses = sum(len(group.responses) for group in groups)
    for part, rows in ((embedded.prompts, len(groups)), (embedded.responses, responses)):
        assert part.values.shape == (rows, backbone.dim)
        assert part.values.dtype == torch.float32
        assert part.truncated.shape == part.missing.shape == (rows,)
    assert far(embedded, slow(backbone, groups)) < SAME


@KINDS
def test_a_response_of_nothing_has_the_embedding_of_what_closes_it(backbone):
    groups = [PromptGroup(EGG, ("", "No.")), response_of(CHAT, "")]
    assert far(backbone.embed(groups), slow(backbone, groups)) < SAME


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_embeddings_have_the_dtype_of_the_model(kind, dtype, tokenizer, encoder):
    texts = encoder.tokenizer if kind == "bert" else tokenizer
    backbone = backbone_of(kind, texts, model=build(kind).to(dtype), pooling="mean")
    embedded = backbone.embed(GROUPS)
    assert embedded.prompts.values.dtype == embedded.responses.values.dtype == dtype
    assert far(embedded, slow(backbone_of(kind, texts, pooling="mean"), GROUPS)) < 0.05
    # The mean itself was taken in float32 and rounded once.
    assert far(embedded, slow(backbone, GROUPS)) < 0.02


@KINDS
def test_a_head_can_be_trained_on_embeddings(backbone):
    embedded = backbone.embed(GROUPS)
    for part in (embedded.prompts, embedded.responses):
        head = torch.nn.Linear(backbone.dim, 1)
        head(part.values).sum().backward()
        torch.testing.assert_close(head.weight.grad[0], part.values.sum(dim=0))


# A shared prompt is run once.


def tokens_run(backbone, groups, **how):
    """Tokens that the model gets to see, row by row, so that none is padding."""
    with counted(backbone.model) as shapes:
        backbone.embed(groups, max_rows=1, **how)
    return tokens_in(shapes)


def lengths(backbone, group):
    """Tokens of the prompt, and of each conversation with it."""
    read = slow_chat if backbone.tokenizer.chat_template else slow_encoder
    spec, tokenizer = backbone.spec, backbone.tokenizer
    prompt = read(spec, tokenizer, group.prompt)[0]
    rows = [read(spec, tokenizer, group.prompt, text)[0] for text in group.responses]
    return len(prompt), [len(row) for row in rows]


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("count", [2, 16])
def test_a_long_prompt_is_run_once_for_all_its_responses(kind, tokenizer, count):
    backbone = backbone_of(kind, tokenizer, max_tokens=400, max_prompt_tokens=300)
    group = PromptGroup(LONG, tuple(f"Say {k} words." for k in range(count)))
    prompt, rows = lengths(backbone, group)
    assert prompt > 10 * (max(rows) - prompt)
    assert tokens_run(backbone, [group]) == prompt + sum(row - prompt for row in rows)
    assert tokens_run(backbone, [group], share=False) == sum(rows)


def test_a_prompt_of_one_response_is_run_once_and_with_it(tokenizer):
    backbone = backbone_of("llama", tokenizer)
    group = response_of(CHAT, "It is lazy.")
    _, (row,) = lengths(backbone, group)
    assert tokens_run(backbone, [group]) == tokens_run(backbone, [group], share=False) == row


def test_short_prompts_are_run_with_each_response(tokenizer):
    # Shared, a prompt costs the copies of its keys and values, which less than a fiftieth does
    # not pay for.
    backbone = backbone_of("llama", tokenizer, max_tokens=500)
    for count, shares in ((400, False), (200, True)):
        texts = ("water " * count, "water " * (count - 1))
        group = PromptGroup((Message("user", "1"),), texts)
        prompt, rows = lengths(backbone, group)
        assert (prompt > WORTH_SHARING * sum(rows)) == shares
        assert tokens_run(backbone, [group]) == sum(rows) - prompt * shares


@pytest.mark.parametrize("kind", ["llama", "gemma2", "bert"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_model_with_a_template_may_read_ahead(kind, pooling, tokenizer):
    # Some embedding models are decoders without their mask; each prompt is then run on its own.
    model = build(kind)
    group = PromptGroup(CHAT, ("It is lazy.", "No.", "Yes."))
    with answered_by(model, reading_ahead):
        backbone = backbone_of(kind, tokenizer, model=model, pooling=pooling)
        assert not backbone.runner.causal
        assert far(backbone.embed(GROUPS), slow(backbone, GROUPS)) < SAME
        prompt, rows = lengths(backbone, group)
        assert tokens_run(backbone, [group]) == prompt + sum(rows)


def test_an_encoder_is_not_tried_out_before(encoder):
    with counted(encoder.model) as shapes:
        respec(encoder)
    # One token shows how wide its states are.
    assert tokens_in(shapes) <= 1


def test_an_encoder_runs_each_prompt_once_and_again_beside_each_response(encoder):
    group = PromptGroup(CHAT, ("It is lazy.", "No.", "Yes."))
    prompt, rows = lengths(encoder, group)
    assert tokens_run(encoder, [group]) == tokens_run(encoder, [group], share=False)
    assert tokens_run(encoder, [group]) == prompt + sum(rows)


# Scores.


@pytest.mark.parametrize("kind", DECODERS)
def test_scores_are_the_same_with_shared_prompts(kind, tokenizer):
    model = make_model(backbone_of(kind, tokenizer, max_tokens=400, max_prompt_tokens=300))
    pairs = [
        conversation(f"Say {k} words of risk. " * 4, f"{answer} {k} " * 3)
        for k in range(6)
        for answer in ("Yes.", "The fox is quick,")
    ]
    many = [f"Put {k} eggs in hot water. " * (1 + k % 5) for k in range(16)]
    best = [conversation(LONG[0].content, text) for text in many]
    for conversations in (pairs, best):
        with counted(model.backbone.model) as shapes:
            together = model.score(conversations)
        shared = tokens_in(shapes)
        with counted(model.backbone.model) as shapes:
            alone = torch.cat([model.score([each]).score for each in conversations])
        assert shared < tokens_in(shapes)
        assert alone.std() > 0.01
        assert (together.score - alone).abs().max() < 1e-4 * alone.std()


# What is too long.

TRUNCATED = ([False, False, True, False], [False, False, True, False, True, True])


@KINDS
def test_texts_that_were_cut_are_flagged(backbone):
    embedded = backbone.embed(GROUPS)
    prompts, responses = embedded.prompts.truncated, embedded.responses.truncated
    assert (prompts.tolist(), responses.tolist()) == TRUNCATED
    assert not embedded.prompts.missing.any()
    assert not embedded.responses.missing.any()


@KINDS
def test_a_prompt_loses_its_middle_and_a_response_its_end(backbone):
    def prompt(**changed):
        words = ["one", *["two"] * 200, "six"]
        for at, word in changed.items():
            words[{"first": 0, "middle": 100, "last": -1}[at]] = word
        return PromptGroup((Message("user", " ".join(words)),), ())

    prompts = [prompt(), prompt(middle="zebra"), prompt(first="zebra"), prompt(last="zebra")]
    same, middle, first, last = backbone.embed(prompts).prompts.values
    assert torch.allclose(same, middle, atol=1e-5)
    assert not torch.allclose(same, first, atol=1e-3)
    assert not torch.allclose(same, last, atol=1e-3)

    body = "water " * 200
    group = PromptGroup(EGG, (body, body + "zebra", "zebra " + body))
    same, end, start = backbone.embed([group]).responses.values
    assert torch.allclose(same, end, atol=1e-5)
    assert not torch.allclose(same, start, atol=1e-3)


@KINDS
def test_a_text_that_is_left_out_is_missing_and_no_other(backbone):
    skipping = respec(backbone, on_overlong="skip").embed(GROUPS)
    whole = backbone.embed(GROUPS)
    for part, same, missing in (
        (skipping.prompts, whole.prompts, TRUNCATED[0]),
        (skipping.responses, whole.responses, TRUNCATED[1]),
    ):
        assert part.missing.tolist() == missing
        assert not part.truncated.any()
        assert part.values.isnan().all(dim=1).tolist() == missing
        assert part.values.isnan().any(dim=1).tolist() == missing
        kept = ~part.missing
        assert apart(part.values[kept], same.values[kept]) < SAME


@KINDS
def test_an_overlong_text_is_an_error_that_names_its_place_when_asked(backbone):
    strict = respec(backbone, on_overlong="error")
    assert len(strict.embed(SHORT).responses.values) == 3
    for groups, part, place in (
        (SHORT + GROUPS[2:], "prompt", (2, None)),
        ([*SHORT, GROUPS[0]], "response", (2, 2)),
    ):
        with pytest.raises(BackboneError, match=rf"the {part} has \d+ tokens, \d+ fit") as caught:
            strict.embed(groups)
        assert (caught.value.group, caught.value.response) == place


def windowed(encoder, **changes):
    return backbone_of("bert", encoder.tokenizer, on_overlong="windows", **changes)


def test_windows_change_nothing_where_all_fits(encoder):
    groups = [GROUPS[0], GROUPS[1], GROUPS[3]]
    limits = {"max_tokens": 500, "max_prompt_tokens": 300, "layers": (1, 2)}
    embedded = windowed(encoder, **limits).embed(groups)
    cut = backbone_of("bert", encoder.tokenizer, **limits).embed(groups)
    for part, same in ((embedded.prompts, cut.prompts), (embedded.responses, cut.responses)):
        assert torch.equal(part.values, same.values)
        assert not part.truncated.any()
        assert not same.truncated.any()


@pytest.mark.parametrize("limits", [(40, 8), (60, 30), (37, 20)])
@pytest.mark.parametrize("max_rows", [None, 1])
def test_a_long_text_is_the_mean_over_the_tokens_of_its_windows(encoder, limits, max_rows):
    texts = ("water " * 70 + "zebra", "Honest answers say what they cannot know. " * 20, "No.")
    groups = [PromptGroup(LONG, texts), PromptGroup(EGG, texts)]
    spec = {"max_tokens": limits[0], "max_prompt_tokens": limits[1], "layers": (0, 2)}
    backbone = windowed(encoder, **spec)
    tokenizer, layers = encoder.tokenizer, spec["layers"]
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id

    def mean_over(context, ids):
        room = limits[0] - len(context) - 1
        count = max(1, -(-len(ids) // room))
        states = []
        for k in range(count):
            part = ids[len(ids) * k // count : len(ids) * (k + 1) // count]
            start = len(context) if len(context) > 1 else 0
            states += states_alone(backbone.model, [*context, *part, last], layers=layers)[start:]
        return torch.stack(states).mean(dim=0)

    prompts, responses = [], []
    for group in groups:
        ids = tokenizer(group.prompt[0].content, add_special_tokens=False)["input_ids"]
        prompts.append(mean_over([first], ids))
        context = [first, *middle_out(ids, limits[1]), last]
        for text in group.responses:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            responses.append(mean_over(context, ids))
    embedded = backbone.embed(groups, max_rows=max_rows)
    assert far(embedded, (torch.stack(prompts), torch.stack(responses))) < SAME
    # Cut instead, the end of a text changes nothing; in windows it does.
    changed = [PromptGroup(LONG, (texts[0] + " fox",)), PromptGroup(LONG, texts[:1])]
    here, there = backbone.embed(changed).responses.values
    assert apart(here[None], there[None]) > SEEN
    cut = backbone_of("bert", tokenizer, **spec).embed(changed).responses.values
    assert apart(cut[:1], cut[1:]) < SAME


def test_windows_need_an_encoder(tokenizer):
    with pytest.raises(BackboneError, match="`on_overlong: windows` needs an encoder"):
        backbone_of("llama", tokenizer, on_overlong="windows")


# Memory.


@pytest.mark.parametrize("kind", ["llama", "gemma2", "bert"])
def test_where_memory_runs_out_the_budget_is_halved_for_good(kind, tokenizer, encoder, caplog):
    texts = encoder.tokenizer if kind == "bert" else tokenizer
    backbone = backbone_of(kind, texts, model=build(kind), batch_tokens=1024, pooling="mean")
    expected = slow(backbone, GROUPS)
    told = []
    with answered_by(backbone.model, Memory(140)):
        embedded = backbone.embed(GROUPS, progress=told.append)
        again = backbone.embed(GROUPS)
    assert far(embedded, expected) < SAME
    assert far(again, expected) < SAME
    assert told[-1] == 1.0
    halved = [r for r in caplog.records if "out of memory; going on" in r.getMessage()]
    assert backbone.runner.batch_tokens == 1024 >> len(halved)
    assert 1 <= len(halved) <= 3


def test_a_text_that_no_memory_holds_is_an_error(tokenizer):
    backbone = backbone_of("llama", tokenizer, model=build("llama"))
    with (
        answered_by(backbone.model, Memory(20)),
        pytest.raises(BackboneError, match="out of memory on a single sequence"),
    ):
        backbone.embed(GROUPS)


@KINDS
def test_the_budget_can_be_found_by_trying(backbone):
    spec = backbone.spec
    found = Backbone(spec, model=backbone.model, tokenizer=backbone.tokenizer)
    assert found.runner.batch_tokens >= 1024
    assert far(found.embed(GROUPS), slow(backbone, GROUPS)) < SAME


# Chunks.


def assert_equal(one, other):
    for left, right in ((one.prompts, other.prompts), (one.responses, other.responses)):
        torch.testing.assert_close(left.values, right.values, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(left.truncated, right.truncated)
        assert torch.equal(left.missing, right.missing)


CHUNKS = [GROUPS[:2], [], GROUPS[2:], [GROUPS[1], GROUPS[0]], [GROUPS[3]]]


@KINDS
@pytest.mark.parametrize("on_overlong", ["truncate", "skip"])
def test_chunks_come_in_order_and_do_not_depend_on_each_other_to_the_last_bit(
    backbone, on_overlong
):
    backbone = respec(backbone, on_overlong=on_overlong)
    alone = [backbone.embed(chunk) for chunk in CHUNKS]
    for order in (range(5), (3, 0, 4, 2, 1), (2, 2)):
        found = list(backbone.embed_chunks(iter([CHUNKS[k] for k in order])))
        assert len(found) == len(order)
        for k, embedded in zip(order, found, strict=True):
            assert_equal(embedded, alone[k])


@KINDS
def test_no_chunks_give_nothing(backbone):
    assert list(backbone.embed_chunks([])) == []


def test_chunks_take_the_same_settings_as_one(causal):
    group = PromptGroup(CHAT, ("Yes.", "No.", "Lazy."))
    with counted(causal.model) as shapes:
        (embedded,) = causal.embed_chunks([[group]], share=False, max_rows=1)
    _, rows = lengths(causal, group)
    assert sorted(shapes) == sorted((1, row) for row in rows)
    assert far(embedded, slow(causal, [group])) < SAME


WAIT_S = 20


def armo_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("armo")]


@pytest.fixture
def no_threads_left():
    before = armo_threads()  # of tests in other files that hold on to a model
    yield
    gc.collect()
    assert [thread for thread in armo_threads() if thread not in before] == []


@pytest.mark.usefixtures("no_threads_left")
def test_the_next_chunk_is_tokenised_while_one_runs(tokenizer):
    backbone = backbone_of("llama", tokenizer, model=build("llama"))
    planned = [threading.Event() for _ in range(3)]
    plan, waited = backbone.planner.plan, []

    def watched(groups, **how):
        found = plan(groups, **how)
        next(event for event in planned if not event.is_set()).set()
        return found

    def answer(forward, inputs):
        # The first chunk does not get on before the second has been tokenised.
        waited.append(planned[1].wait(WAIT_S))
        return forward(**inputs)

    backbone.planner.plan = watched
    with answered_by(backbone.model, answer):
        found = list(backbone.embed_chunks([SHORT, SHORT, SHORT]))
    assert len(found) == 3
    assert waited
    assert all(waited)
    assert all(event.is_set() for event in planned)


@pytest.mark.usefixtures("no_threads_left")
def test_only_one_chunk_is_read_ahead(causal):
    read = []

    def chunks():
        for k in range(20):
            read.append(k)
            yield SHORT

    for k, _ in enumerate(causal.embed_chunks(chunks())):
        time.sleep(0.01)  # for one that reads on and on to get further
        assert len(read) <= k + 2
    assert len(read) == 20


@pytest.mark.usefixtures("no_threads_left")
def test_the_first_chunk_comes_before_the_last_is_there(causal):
    last = threading.Event()

    def chunks():
        yield SHORT
        yield SHORT
        assert last.wait(WAIT_S)
        yield SHORT

    found = causal.embed_chunks(chunks())
    next(found)
    last.set()
    assert len(list(found)) == 2


@KINDS
@pytest.mark.usefixtures("no_threads_left")
def test_an_error_comes_after_the_chunks_before_it_and_says_where(backbone):
    strict = respec(backbone, on_overlong="error")
    found = strict.embed_chunks([SHORT, SHORT[1:], [SHORT[0], GROUPS[0]], SHORT])
    assert_equal(next(found), strict.embed(SHORT))
    assert_equal(next(found), strict.embed(SHORT[1:]))
    with pytest.raises(BackboneError, match="the response has") as caught:
        next(found)
    assert (caught.value.group, caught.value.response) == (1, 2)
    assert list(found) == []


@pytest.mark.usefixtures("no_threads_left")
def test_an_error_of_the_source_comes_after_the_chunks_before_it(causal):
    def chunks():
        yield SHORT
        raise OSError("disk on fire")

    found = causal.embed_chunks(chunks())
    next(found)
    with pytest.raises(OSError, match="disk on fire"):
        next(found)


def divide_each(found):
    for _ in found:
        raise ZeroDivisionError


@pytest.mark.usefixtures("no_threads_left")
@pytest.mark.parametrize("ended", ["closed", "dropped", "failed"])
def test_what_is_not_read_to_its_end_leaves_no_thread_behind(causal, ended):
    found = causal.embed_chunks([SHORT] * 5)
    next(found)
    if ended == "closed":
        found.close()
    elif ended == "failed":
        with pytest.raises(ZeroDivisionError):
            divide_each(found)
    del found


# Progress.


@KINDS
@pytest.mark.parametrize("share", [True, False])
def test_progress_rises_to_one(backbone, share):
    told = []
    backbone.embed(GROUPS, share=share, max_rows=2, progress=told.append)
    assert len(told) > 3
    assert told == sorted(set(told))
    assert told[0] > 0
    assert told[-1] == 1.0
    first, again = [], []
    for _ in backbone.embed_chunks([SHORT, SHORT], progress=again.append):
        first = first or list(again)
    # Of each chunk anew.
    assert again == [*first, *first]


# What a model or a tokenizer lacks.


def test_a_prompt_that_the_template_refuses_is_named(causal):
    tokenizer = copy.deepcopy(causal.tokenizer)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if 'zebra' in message['content'] %}"
        "{{ raise_exception('No zebras') }}{% endif %}{% endfor %}" + tokenizer.chat_template
    )
    backbone = respec(causal, tokenizer=tokenizer)
    assert len(backbone.embed(SHORT).prompts.values) == 2
    with pytest.raises(BackboneError, match="No zebras") as caught:
        backbone.embed([*SHORT, PromptGroup((Message("user", "A zebra?"),), ("No.",))])
    assert (caught.value.group, caught.value.response) == (2, None)


@KINDS
@pytest.mark.parametrize("layers", [(3,), (-4,), (1, 9)])
def test_layers_out_of_range_are_refused(backbone, layers):
    assert respec(backbone, layers=(0, 2, -3)).dim == 48
    with pytest.raises(BackboneError, match="has layers 0 to 2"):
        respec(backbone, layers=layers)


@KINDS
def test_more_tokens_than_positions_are_refused(backbone):
    positions = backbone.model.config.max_position_embeddings
    assert respec(backbone, max_tokens=positions).spec.max_tokens == positions
    with pytest.raises(BackboneError, match=f"has only {positions} positions"):
        respec(backbone, max_tokens=positions + 1)


def test_pooling_the_last_token_needs_a_chat_template(encoder, causal):
    with pytest.raises(BackboneError, match="no chat template"):
        respec(encoder, pooling="last")
    tokenizer = copy.deepcopy(causal.tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(BackboneError, match="no chat template"):
        respec(causal, tokenizer=tokenizer)


def test_a_decoder_may_pool_the_mean_of_the_response(causal):
    backbone = respec(causal, pooling="mean")
    assert far(backbone.embed(GROUPS), slow(backbone, GROUPS)) < SAME
    last = causal.embed(GROUPS).responses.values
    assert apart(backbone.embed(GROUPS).responses.values, last) > SEEN


# Loading.


def test_loading_fills_in_what_the_spec_leaves_open(encoder, encoder_folder):
    assert encoder.spec.digest == digest_file(encoder_folder / "model.safetensors")
    assert encoder.spec.tokenizer_digest is not None
    assert encoder.spec.config_digest is not None
    assert encoder.spec.dtype == "float32"
    assert encoder.dim == 32
    again = load_backbone(encoder.spec, device="cpu")
    assert again.spec == encoder.spec


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_model_is_loaded_in_the_dtype_asked_for(causal, dtype):
    backbone = load_backbone(dataclasses.replace(causal.spec, dtype=dtype), device="cpu")
    assert backbone.spec.dtype == dtype
    assert {weights.dtype for weights in backbone.model.parameters()} == {getattr(torch, dtype)}
    assert backbone.embed(SHORT).responses.values.dtype == getattr(torch, dtype)


def test_a_loaded_backbone_takes_its_budget(causal):
    loaded = load_backbone(causal.spec, device="cpu", batch_tokens=77)
    assert loaded.runner.batch_tokens == 77
    assert load_backbone(causal.spec, device="cpu").runner.batch_tokens == module.CPU_BATCH_TOKENS


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("wrong", [0, -1, 2.5, "many", None])
def test_batches_without_tokens_are_refused(causal, wrong):
    with pytest.raises(BackboneError, match=f"^`batch_tokens` must be .*, got {wrong}"):
        load_backbone(causal.spec, device="cpu", batch_tokens=wrong)


def test_the_loaded_weights_are_those_of_the_folder(causal, causal_folder):
    model = AutoModel.from_pretrained(causal_folder, dtype=torch.float32).eval()
    ids = [5, 9, 40, 7]
    assert apart(states_alone(causal.model, ids), states_alone(model, ids)) == 0.0


def test_other_weights_are_refused(encoder):
    spec = dataclasses.replace(encoder.spec, digest="0" * 64)
    with pytest.raises(BackboneError, match=f"{encoder.spec.digest}, expected {'0' * 64}"):
        load_backbone(spec)


def test_another_tokenizer_is_refused(encoder):
    spec = dataclasses.replace(encoder.spec, tokenizer_digest="0" * 64)
    with pytest.raises(BackboneError, match=r"tokenizer of .* is not the expected one"):
        load_backbone(spec)


def test_pickled_weights_are_not_loaded(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(BackboneError, match="no safetensors file; pickled weights"):
        load_backbone(BackboneSpec(str(tmp_path)))


def test_the_digest_of_several_files_of_weights_changes_with_each(tmp_path):
    digests = set()
    for second in (b"2", b"3"):
        (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"1")
        (tmp_path / "model-00002-of-00002.safetensors").write_bytes(second)
        digests.add(weights_digest(tmp_path))
    assert len(digests) == 2


def test_a_copy_of_a_model_has_its_fingerprint_until_its_template_changes(
    causal, causal_folder, tmp_path
):
    folder = shutil.copytree(causal_folder, tmp_path / "copy")
    spec = dataclasses.replace(causal.spec, id=str(folder), tokenizer_digest=None)
    assert load_backbone(spec, device="cpu").spec.fingerprint == causal.spec.fingerprint
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(folder)
    assert load_backbone(spec, device="cpu").spec.fingerprint != causal.spec.fingerprint


def test_the_fingerprint_changes_with_the_architecture_around_the_same_weights(
    causal, causal_folder, tmp_path
):
    folder = shutil.copytree(causal_folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(BackboneError, match=r"config\.json"):
        load_backbone(dataclasses.replace(causal.spec, id=str(folder)), device="cpu")
    spec = dataclasses.replace(causal.spec, id=str(folder), config_digest=None)
    other = load_backbone(spec, device="cpu")
    values = [backbone.embed(SHORT).responses.values for backbone in (causal, other)]
    assert not torch.allclose(*values, atol=1e-4)
    assert other.spec.fingerprint != causal.spec.fingerprint


def test_what_a_library_adds_to_the_config_changes_no_fingerprint(causal, causal_folder, tmp_path):
    folder = shutil.copytree(causal_folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    added = {"transformers_version": "9", "torch_dtype": "float32", "_name_or_path": "x"}
    (folder / "config.json").write_text(json.dumps({**config, **added}))
    moved = dataclasses.replace(causal.spec, id=str(folder))
    assert load_backbone(moved, device="cpu").spec.fingerprint == causal.spec.fingerprint


def test_a_loaded_model_says_what_it_cannot_do(causal_folder, causal, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "armo")
    monkeypatch.setattr(module, "AutoModel", _Forgetful)
    backbone = load_backbone(causal.spec, device="cpu")
    assert not backbone.runner.shares
    assert "cannot read on" in caplog.text
    assert far(backbone.embed(GROUPS), slow(causal, GROUPS)) < SAME


class _Forgetful:
    """Loads a model that takes no keys and values."""

    @staticmethod
    def from_pretrained(folder, **options):
        model = AutoModel.from_pretrained(folder, **options)
        forward = model.forward

        def forgetful(**inputs):
            if inputs.pop("past_key_values", None) is not None:
                raise TypeError("unexpected keyword argument 'past_key_values'")
            return forward(**inputs)

        model.forward = forgetful
        return model


def test_a_local_folder_comes_before_the_hub_and_the_package(tmp_path, monkeypatch):
    (tmp_path / MINILM).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_weights(MINILM).resolve() == tmp_path / MINILM


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No network, and an empty hub cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("id", ["nobody/nothing", "nothing", "/no/such/folder", "./no/folder"])
def test_a_missing_model_is_refused_in_one_line_that_names_it(offline, id):
    with pytest.raises(BackboneError, match=f"no backbone '{id}': not a folder") as caught:
        find_weights(id)
    assert len(str(caught.value).splitlines()) == 1


def test_the_packaged_model_is_found_offline_and_has_the_expected_weights(offline):
    try:
        importlib.metadata.version(PACKAGED[MINILM])
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the package {PACKAGED[MINILM]} is not installed")
    assert weights_digest(find_weights(MINILM)) == (
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    )
