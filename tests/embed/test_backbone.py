import copy
import dataclasses
import importlib.metadata
import json
import shutil

import huggingface_hub.constants
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoTokenizer

from armo.artifacts import digest_file
from armo.data.conversation import Conversation, Message
from armo.embed.backbone import (
    PACKAGED,
    Backbone,
    BackboneError,
    BackboneSpec,
    find_weights,
    load_backbone,
    pool,
    weights_digest,
)
from armo.embed.boundary import split_tokens

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
EGG = (Message("user", "How do I boil an egg?"),)
CHAT = (
    Message("system", "Be brief."),
    Message("user", "Is the fox quick?"),
    Message("assistant", "Yes, it is."),
    Message("user", "And the dog?"),
)
LONG = (Message("user", " ".join(f"Say {k} words of risk." for k in range(30))),)
CONVERSATIONS = [
    Conversation(EGG, "Put it in hot water for seven minutes."),
    Conversation(EGG, "No."),
    Conversation(CHAT, "It is lazy.\n\n- It sleeps.\n- It is **safe**."),
    Conversation(LONG, "Words."),
    Conversation(EGG, "Honest answers say what they cannot know. " * 12),
    Conversation(LONG, "Safe ones warn of risks! " * 12),
]
SHORT = CONVERSATIONS[:3]
KINDS = pytest.mark.parametrize("backbone", ["encoder", "causal"], indirect=True)


@pytest.fixture(scope="module")
def backbone(request):
    return request.getfixturevalue(request.param)


def respec(backbone, **changes):
    """The same loaded model under a changed spec."""
    return Backbone(
        dataclasses.replace(backbone.spec, **changes),
        model=backbone.model,
        tokenizer=backbone.tokenizer,
        batch_tokens=backbone.batch_tokens,
    )


@torch.no_grad()
def hidden_states(folder, ids):
    """All hidden states of one sequence, by Transformers alone."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states


def middle_out(ids, limit):
    front = limit // 2
    return ids if len(ids) <= limit else ids[:front] + ids[front - limit :]


def slow_encoder(folder, spec, prompt, response=None):
    """Mean of layers 1 and 2 over the response and its separator, or over the prompt's row."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "\n\n".join(message.content for message in prompt)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    row = [tokenizer.cls_token_id, *middle_out(ids, spec.max_prompt_tokens), tokenizer.sep_token_id]
    start = 0
    if response is not None:
        start = len(row)
        answer = tokenizer(response, add_special_tokens=False)["input_ids"]
        row = [*row, *answer[: spec.max_tokens - len(row) - 1], tokenizer.sep_token_id]
    states = hidden_states(folder, row)
    return torch.cat([states[1][0, start:].mean(dim=0), states[2][0, start:].mean(dim=0)])


def slow_causal(folder, spec, prompt, response=None):
    """The last layer at the last token, of the templated conversation or its prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(messages, **options):
        chat = [{"role": message.role, "content": message.content} for message in messages]
        text = tokenizer.apply_chat_template(chat, tokenize=False, **options)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ids = encode(prompt, add_generation_prompt=True)
    row = middle_out(ids, spec.max_prompt_tokens)
    if response is not None:
        answer = encode((*prompt, Message("assistant", response)))[len(ids) :]
        row = (row + answer)[: spec.max_tokens]
    return hidden_states(folder, row)[-1][0, -1]


SLOW = {"encoder": slow_encoder, "causal": slow_causal}


@pytest.mark.parametrize("kind", SLOW)
@pytest.mark.parametrize("max_prompt_tokens", [40, 41])
def test_embeddings_equal_a_plain_forward_of_one_text_at_a_time(request, kind, max_prompt_tokens):
    folder = request.getfixturevalue(f"{kind}_folder")
    backbone = respec(request.getfixturevalue(kind), max_prompt_tokens=max_prompt_tokens)
    responses = backbone.embed_responses(CONVERSATIONS)
    prompts = backbone.embed_prompts([EGG, CHAT, LONG])
    slow = SLOW[kind]
    expected = [slow(folder, backbone.spec, c.prompt, c.response) for c in CONVERSATIONS]
    torch.testing.assert_close(responses.values, torch.stack(expected), atol=1e-5, rtol=1e-5)
    expected = [slow(folder, backbone.spec, prompt) for prompt in (EGG, CHAT, LONG)]
    torch.testing.assert_close(prompts.values, torch.stack(expected), atol=1e-5, rtol=1e-5)


@KINDS
@settings(max_examples=15)
@given(
    order=st.permutations(range(len(CONVERSATIONS))),
    max_rows=st.none() | st.integers(1, 6),
    batch_tokens=st.integers(1, 2000),
)
def test_an_embedding_does_not_depend_on_batch_order_or_max_rows(
    backbone, order, max_rows, batch_tokens
):
    alone = torch.cat([backbone.embed_responses([c]).values for c in CONVERSATIONS])
    other = Backbone(
        backbone.spec,
        model=backbone.model,
        tokenizer=backbone.tokenizer,
        batch_tokens=batch_tokens,
    )
    shuffled = other.embed_responses([CONVERSATIONS[k] for k in order], max_rows=max_rows)
    torch.testing.assert_close(shuffled.values, alone[order], atol=1e-5, rtol=0)
    prompts = [CONVERSATIONS[k].prompt for k in order]
    alone = torch.cat([backbone.embed_prompts([prompt]).values for prompt in prompts])
    shuffled = other.embed_prompts(prompts, max_rows=max_rows)
    torch.testing.assert_close(shuffled.values, alone, atol=1e-5, rtol=0)


@KINDS
def test_different_texts_have_different_embeddings(backbone):
    values = backbone.embed_responses(CONVERSATIONS).values
    distances = torch.cdist(values, values) + torch.eye(len(values))
    assert distances.min() > 1e-2


def test_a_causal_model_pools_the_last_token_although_it_pads_with_the_end_of_turn(
    causal, causal_folder
):
    tokenizer = causal.tokenizer
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert tokenizer.pad_token_id == turn
    chat = [{"role": m.role, "content": m.content} for m in CHAT]
    chat += [{"role": "assistant", "content": "Lazy."}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    states = hidden_states(causal_folder, ids)[-1][0]
    pooled = causal.embed_responses([Conversation(CHAT, "Lazy."), *CONVERSATIONS]).values[0]
    torch.testing.assert_close(pooled, states[-1], atol=1e-5, rtol=1e-5)
    # Pooling at the first padding id would have taken the end of the system turn.
    assert not torch.allclose(pooled, states[ids.index(turn)], atol=1e-2)


@pytest.mark.parametrize("position", ["turn_end", "generation_prompt"])
def test_the_prompt_embedding_is_the_same_state_in_every_conversation(
    causal, causal_folder, position
):
    backbone = respec(causal, prompt_position=position)
    prompt = backbone.embed_prompts([CHAT]).values[0]
    tokenizer = causal.tokenizer
    chat = [{"role": m.role, "content": m.content} for m in CHAT]
    for response in ("Lazy.", "\n\nI cannot know."):
        answer = {"role": "assistant", "content": response}
        text = tokenizer.apply_chat_template([*chat, answer], tokenize=False)
        opened = text.rindex("<|start|>")
        end = opened if position == "turn_end" else text.rindex("<|end|>\n\n") + len("<|end|>\n\n")
        last = len(tokenizer(text[:end], add_special_tokens=False)["input_ids"]) - 1
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        states = hidden_states(causal_folder, ids)[-1][0]
        torch.testing.assert_close(prompt, states[last], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(prompt, states[last - 1], atol=1e-2)


@KINDS
def test_texts_that_were_cut_are_flagged(backbone):
    cut = backbone.embed_responses(CONVERSATIONS).truncated
    assert cut.tolist() == [False, False, False, True, True, True]
    assert backbone.embed_prompts([EGG, LONG, CHAT]).truncated.tolist() == [False, True, False]


def count_tokens(backbone, conversation):
    """Tokens of the prompt and of the whole conversation, CLS and SEP included."""
    if backbone.spec.pooling == "last":
        split = split_tokens(backbone.tokenizer, conversation, position="generation_prompt")
        return len(split.prompt), len(split.prompt) + len(split.response)
    text = "\n\n".join(message.content for message in conversation.prompt)
    prompt, response = backbone.tokenizer([text, conversation.response], add_special_tokens=False)[
        "input_ids"
    ]
    return len(prompt), len(prompt) + len(response) + 3


@KINDS
def test_a_text_that_just_fits_is_not_cut(backbone):
    prompt, conversation = count_tokens(backbone, SHORT[2])
    for limit, cut in ((prompt, False), (prompt - 1, True)):
        embedded = respec(backbone, max_prompt_tokens=limit).embed_prompts([CHAT])
        assert embedded.truncated.tolist() == [cut]
    for limit, cut in ((conversation, False), (conversation - 1, True)):
        changes = {"max_tokens": limit, "max_prompt_tokens": prompt}
        embedded = respec(backbone, **changes).embed_responses([SHORT[2]])
        assert embedded.truncated.tolist() == [cut]


@KINDS
def test_a_prompt_loses_its_middle_and_a_response_its_end(backbone):
    def prompt(**changed):
        words = ["one", *["two"] * 200, "six"]
        for at, word in changed.items():
            words[{"first": 0, "middle": 100, "last": -1}[at]] = word
        return (Message("user", " ".join(words)),)

    same, middle, first, last = backbone.embed_prompts(
        [prompt(), prompt(middle="zebra"), prompt(first="zebra"), prompt(last="zebra")]
    ).values
    assert torch.allclose(same, middle, atol=1e-5)
    assert not torch.allclose(same, first, atol=1e-3)
    assert not torch.allclose(same, last, atol=1e-3)

    body = "water " * 200
    same, end, start = backbone.embed_responses(
        [Conversation(EGG, text) for text in (body, body + "zebra", "zebra " + body)]
    ).values
    assert torch.allclose(same, end, atol=1e-5)
    assert not torch.allclose(same, start, atol=1e-3)


@KINDS
def test_an_overlong_text_is_an_error_that_names_its_row_when_asked(backbone):
    strict = respec(backbone, on_overlong="error")
    assert len(strict.embed_responses(SHORT).values) == 3
    with pytest.raises(BackboneError, match=r"row 1: the prompt has \d+ tokens, \d+ fit"):
        strict.embed_prompts([EGG, LONG])
    with pytest.raises(BackboneError, match=r"row 2: the response has \d+ tokens, \d+ fit"):
        strict.embed_responses([*SHORT[:2], CONVERSATIONS[4]])


def test_a_prompt_that_the_template_refuses_is_named_by_its_row(causal):
    tokenizer = copy.deepcopy(causal.tokenizer)
    # As Gemma and Mistral do with a system turn.
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}" + tokenizer.chat_template
    )
    backbone = Backbone(causal.spec, model=causal.model, tokenizer=tokenizer)
    assert len(backbone.embed_prompts([EGG]).values) == 1
    with pytest.raises(BackboneError, match=r"row 1: .*System role not supported"):
        backbone.embed_prompts([EGG, CHAT])


@KINDS
def test_no_texts_give_no_rows(backbone):
    assert backbone.embed_prompts([]).values.shape == (0, backbone.dim)
    assert backbone.embed_responses([]).truncated.shape == (0,)


def test_pooling_is_the_mean_of_the_marked_states():
    states = torch.randn(4, 9, 5, generator=torch.Generator().manual_seed(0))
    marked = torch.rand(4, 9, generator=torch.Generator().manual_seed(1)) < 0.5
    expected = [
        torch.stack([states[b, t] for t in range(9) if marked[b, t]]).mean(dim=0) for b in range(4)
    ]
    torch.testing.assert_close(pool(states, marked), torch.stack(expected))


def test_pooling_many_states_in_float16_does_not_overflow():
    states = torch.full((1, 8192, 2), 20.0, dtype=torch.float16)
    pooled = pool(states, torch.ones(1, 8192, dtype=torch.bool))
    assert pooled.dtype == torch.float16
    assert pooled.tolist() == [[20.0, 20.0]]


def test_loading_fills_in_what_the_spec_leaves_open(encoder, encoder_folder):
    assert encoder.spec.digest == digest_file(encoder_folder / "model.safetensors")
    assert encoder.spec.tokenizer_digest is not None
    assert encoder.spec.dtype == "float32"
    assert encoder.dim == 32
    again = load_backbone(encoder.spec, device="cpu")
    assert again.spec == encoder.spec


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
        Backbone(causal.spec, model=causal.model, tokenizer=tokenizer)


def test_pooling_the_mean_needs_an_encoder(causal):
    with pytest.raises(BackboneError, match="is no encoder"):
        respec(causal, pooling="mean")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ()}, "`layers` needs at least one"),
        ({"max_prompt_tokens": 3}, "must be at least 4"),
        ({"max_tokens": 100, "max_prompt_tokens": 97}, "leave at least 4"),
        ({"dtype": "int8"}, "`dtype` must be"),
    ],
)
def test_a_spec_that_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        BackboneSpec("model", **change)


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "abc"},
        {"layers": (1,)},
        {"pooling": "mean"},
        {"prompt_position": "turn_end"},
        {"max_tokens": 4095},
        {"max_prompt_tokens": 2047},
        {"dtype": "bfloat16"},
        {"tokenizer_digest": "abc"},
    ],
    ids=str,
)
def test_the_fingerprint_changes_with_what_changes_an_embedding(change):
    spec = BackboneSpec("model")
    assert dataclasses.replace(spec, **change).fingerprint != spec.fingerprint


def test_the_fingerprint_ignores_where_the_model_was_found():
    spec = BackboneSpec("model", layers=(1, 2), digest="abc")
    moved = BackboneSpec("folder/model", revision="main", layers=[1, 2], digest="abc")
    assert moved.fingerprint == spec.fingerprint


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
    values = [backbone.embed_responses(SHORT).values for backbone in (causal, other)]
    assert not torch.allclose(*values, atol=1e-4)
    assert other.spec.fingerprint != causal.spec.fingerprint


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
