"""The model folder in the hands of Transformers."""

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import conversation, make_model
from jinja2 import TemplateError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    pipeline,
)

import armo
from armo.artifacts import ArtifactError
from armo.data.conversation import Message
from armo.embed.backbone import Backbone
from armo.embed.boundary import PromptGroup
from armo.embed.spec import BackboneError, BackboneSpec
from armo.model.config import ArmoConfig
from armo.model.reward_model import ArmoRewardModel
from armo.model.token_rows import TokenReader, TokenRowError
from armo.model.tokenizer import ArmoTokenizer

MEASURED = ("bold", "log_length", "questions")
NAMES = ("rewards", "adjusted", "gating_weights", "gating_uncertainty", "contributions")
CONVERSATIONS = [
    conversation("How do I boil an egg?", "Put it in hot water.\n\n- seven minutes\n- **cool**"),
    conversation("How do I boil an egg?", "No."),
    conversation("Is this safe? " * 30, "It warns of risks, and says what it cannot know. " * 20),
    [
        {"role": "system", "content": "Be honest."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello!"},
        *conversation("The quick brown fox?", "It jumps over the lazy dog?"),
    ],
]
KINDS = [("encoder", ()), ("encoder", MEASURED), ("causal", ()), ("causal", MEASURED)]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]} {len(kind[1])}")
def made(request):
    backbone, covariates = request.param
    return make_model(request.getfixturevalue(backbone), covariates=covariates)


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder") / "model"
    made.save_pretrained(folder, golden=CONVERSATIONS[:2])
    return folder


@pytest.fixture(scope="module")
def every_folder(encoder, causal, tmp_path_factory):
    """A model folder of each kind: what a process of its own is started for, it does with all."""
    folders = []
    for name, covariates in KINDS:
        folders.append(tmp_path_factory.mktemp("every") / "model")
        backbone = {"encoder": encoder, "causal": causal}[name]
        made = make_model(backbone, covariates=covariates)
        made.save_pretrained(folders[-1], golden=CONVERSATIONS[:2])
    return folders


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def texts(tokenizer):
    return [tokenizer.apply_chat_template(c, tokenize=False) for c in CONVERSATIONS]


def pad(tokenizer, texts, *, side="right"):
    options = {"add_special_tokens": False, "return_tensors": "pt"}
    return tokenizer(texts, padding=True, padding_side=side, **options)


def test_the_auto_classes_give_the_model_with_its_configuration(folder, model, made):
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is type(model.config) is ArmoConfig
    assert type(model) is ArmoRewardModel
    assert isinstance(model, PreTrainedModel)
    assert config.num_labels == model.config.num_labels == 1
    assert config.problem_type == "regression"
    assert config.id2label == {0: "score"}
    assert config.objectives == made.objectives.to_dicts()
    assert model.base_model is model.backbone.model
    assert model.name_or_path == str(folder)


def test_a_configuration_saved_by_itself_is_the_same_file(folder, tmp_path):
    AutoConfig.from_pretrained(folder).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved == json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("side", ["right", "left"])
def test_token_ids_score_as_their_text_whatever_the_padding(model, tokenizer, texts, side):
    expected = model.score(CONVERSATIONS)
    out = model(**pad(tokenizer, texts, side=side))
    assert out.logits.shape == (4, 1)
    assert out.logits.dtype == torch.float32
    torch.testing.assert_close(out.logits[:, 0].double(), expected.score, atol=1e-5, rtol=1e-6)
    for name in NAMES:
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), atol=1e-5, rtol=0)
    assert out.truncated.tolist() == expected.truncated.tolist() == [False, False, True, False]
    for k, text in enumerate(texts):
        alone = model(**pad(tokenizer, [text]))
        torch.testing.assert_close(alone.logits[0], out.logits[k], atol=1e-5, rtol=1e-6)


def test_a_mask_of_booleans_or_none_is_taken_too(model, tokenizer, texts):
    ids = pad(tokenizer, texts[:2], side="left")
    expected = model(**ids).logits
    ids["attention_mask"] = ids["attention_mask"].bool()
    assert torch.equal(model(**ids).logits, expected)
    alone = pad(tokenizer, texts[:1])
    del alone["attention_mask"]
    torch.testing.assert_close(model(**alone).logits[0], expected[0], atol=1e-5, rtol=1e-6)


def test_a_tuple_is_given_where_one_is_asked_for(model, tokenizer, texts):
    ids = pad(tokenizer, texts)
    whole, parts = model(**ids), model(**ids, return_dict=False)
    assert torch.equal(parts[0], whole.logits)
    assert len(parts) == 8


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_pipeline_gives_scores(folder, model, texts, batch_size):
    pipe = pipeline(
        "text-classification", model=str(folder), function_to_apply="none", batch_size=batch_size
    )
    expected = model.score(CONVERSATIONS).score.tolist()
    for found in (pipe(texts), pipe(texts, function_to_apply=None)):
        assert [row["label"] for row in found] == ["score"] * 4
        assert [row["score"] for row in found] == pytest.approx(expected, abs=1e-5, rel=1e-6)


def test_a_tokenizer_saved_with_the_model_tokenises_as_the_backbone_does(made, tokenizer):
    for text in ("How do I boil an egg?", "- one\n- two\n**three**", "naïve 犬 🙂"):
        for added in (True, False):
            expected = made.backbone.tokenizer(text, add_special_tokens=added)["input_ids"]
            assert tokenizer(text, add_special_tokens=added)["input_ids"] == expected


def test_no_gradient_is_kept_unless_it_is_asked_for(folder, tokenizer, texts):
    model = ArmoRewardModel.from_pretrained(folder, device="cpu")
    ids = pad(tokenizer, texts)
    plain = model(**ids)
    assert not plain.logits.requires_grad
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.backbone.model.requires_grad_(True)
    out = model(**ids)
    torch.testing.assert_close(out.logits, plain.logits, atol=1e-5, rtol=1e-6)
    out.logits.sum().backward()
    weight = model.get_input_embeddings().weight
    assert bool((weight.grad != 0).any())
    with torch.no_grad():
        assert not model(**ids).logits.requires_grad
    # The slope is that of the score: a small step changes it by as much.
    step = 1e-3 * weight.grad / weight.grad.norm()
    with torch.no_grad():
        weight += step
        above = model(**ids).logits.double().sum()
        weight -= 2 * step
        below = model(**ids).logits.double().sum()
    slope = float((above - below) / (2 * 1e-3))
    assert slope == pytest.approx(float(weight.grad.norm()), rel=0.02)


def test_the_model_stays_in_evaluation_mode_and_its_heads_in_float64(folder, tokenizer, texts):
    model = ArmoRewardModel.from_pretrained(folder, device="cpu")
    ids = pad(tokenizer, texts)
    expected = model(**ids).logits
    heads = model.head_weights.clone()
    assert torch.equal(model.train()(**ids).logits, expected)
    model.to(torch.bfloat16)
    assert model.dtype == model.backbone.model.dtype == torch.bfloat16
    assert torch.equal(model.head_weights, heads)
    assert {t.dtype for t in model.gate.state_dict().values()} == {torch.float64, torch.int64}
    low = model(**ids).logits
    torch.testing.assert_close(low, expected, atol=0.3, rtol=0.1)
    assert not torch.equal(low, expected)


def test_backbone_options_reach_the_backbone_and_verify(folder):
    for options in ({"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"device": "cpu"}):
        eager = ArmoRewardModel.from_pretrained(folder, attn_implementation="eager", **options)
        assert eager.backbone.model.config._attn_implementation == "eager"
        assert eager.device.type == "cpu"
        assert eager.verify() < 1e-4
    auto = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager", num_labels=1
    )
    assert auto.backbone.model.config._attn_implementation == "eager"
    assert auto.backbone.spec.dtype == "bfloat16"
    assert auto.dtype == torch.bfloat16
    named = ArmoRewardModel.from_pretrained(folder, dtype="bfloat16", device="cpu")
    assert named.dtype == torch.bfloat16


def test_what_would_change_the_model_unseen_is_refused(folder):
    load = AutoModelForSequenceClassification.from_pretrained
    with pytest.raises(ArtifactError, match="`num_labels` is 1"):
        load(folder, num_labels=5)
    with pytest.raises(TypeError, match="does not take quantization_config"):
        load(folder, quantization_config={"load_in_4bit": True})
    for name in ("proxies", "force_download", "trust_remote_code", "adapter_kwargs", "subfolder"):
        with pytest.raises(TypeError, match=f"does not take {name}"):
            ArmoRewardModel.from_pretrained(folder, **{name: {"x": 1}})
    with pytest.raises(TypeError, match="does not take subfolder"):
        ArmoRewardModel.from_pretrained(folder, subfolder="")
    with pytest.raises(ValueError, match="`device` or `device_map`, not both"):
        ArmoRewardModel.from_pretrained(folder, device="cpu", device_map="cpu")
    config = AutoConfig.from_pretrained(folder)
    config.objectives[0]["high"] = 7
    with pytest.raises(ArtifactError, match="was changed"):
        load(folder, config=config)
    with pytest.raises(ValueError, match="its weights would be random"):
        AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder))


def test_options_that_change_nothing_are_taken(folder):
    load(folder, use_safetensors=True, trust_remote_code=False)
    ArmoRewardModel.from_pretrained(folder, device="cpu", subfolder=None, proxies={}, x=False)


def load(folder, **options):
    return AutoModelForSequenceClassification.from_pretrained(folder, **options)


def test_a_loaded_model_has_the_configuration_of_its_folder(folder, model):
    own = ArmoRewardModel.from_pretrained(folder, device="cpu", dtype="bfloat16")
    for loaded in (own, model):
        values = json.loads((folder / "config.json").read_text())
        assert loaded.config.declared() == values
        assert values["files"]
        assert loaded.num_labels == loaded.config.num_labels == 1


def run_alone(code, *arguments, **environment):
    """Run code in a fresh process, as users do; return what it printed last."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def scores_of(folder):
    return ArmoRewardModel.from_pretrained(folder, device="cpu").score(CONVERSATIONS).score.tolist()


def test_compiled_it_gives_the_same_scores(every_folder):
    folders = [every_folder[0], every_folder[3]]  # either backbone, with and without covariates
    code = """
import json, sys, torch, armo
from transformers import AutoTokenizer
*folders, conversations = sys.argv[1:]
found = []
for folder in folders:
    model = armo.ArmoRewardModel.from_pretrained(folder, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.apply_chat_template(c, tokenize=False) for c in json.loads(conversations)]
    ids = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    logits = compiled(**ids).logits[:, 0].tolist()
    fewer = compiled(**{name: values[:2] for name, values in ids.items()}).logits[:, 0].tolist()
    found.append([logits, fewer])
print(json.dumps(found))
"""
    found = run_alone(code, *folders, json.dumps(CONVERSATIONS))
    for folder, (logits, fewer) in zip(folders, found, strict=True):
        expected = scores_of(folder)
        assert logits == pytest.approx(expected, abs=1e-5, rel=1e-6)
        assert fewer == pytest.approx(expected[:2], abs=1e-5, rel=1e-6)


def test_scoring_needs_neither_training_nor_dataset_libraries(every_folder):
    code = """
import builtins, json, sys
for name in ("datasets", "lightning", "hydra", "omegaconf", "pytorch_lightning"):
    sys.modules[name] = None  # importing it raises ImportError
import armo
from transformers import AutoModelForSequenceClassification
*folders, conversations = sys.argv[1:]
conversations = json.loads(conversations)
found = []
for folder in folders:
    model = armo.ArmoRewardModel.from_pretrained(folder, device="cpu")
    auto = AutoModelForSequenceClassification.from_pretrained(folder)
    found.append([m.score(conversations).score.tolist() for m in (model, auto)])
print(json.dumps(found))
"""
    found = run_alone(code, *every_folder, json.dumps(CONVERSATIONS))
    for folder, (own, auto) in zip(every_folder, found, strict=True):
        assert own == auto == pytest.approx(scores_of(folder), abs=1e-6)


@pytest.mark.parametrize(
    "first",
    [
        "from transformers import AutoConfig; import armo",
        "import armo; from transformers import AutoConfig",
        "import armo.embed.backbone; from transformers import AutoConfig",
        "import armo.model.reward_model; from transformers import AutoConfig",
        "from transformers import AutoModel; import armo; from transformers import AutoConfig",
        "import armo, importlib.util as util\n"
        "util.find_spec('transformers.models.auto.configuration_auto')\n"
        "from transformers import AutoConfig",
    ],
)
def test_armo_is_known_to_transformers_whichever_is_imported_first(every_folder, first):
    code = f"""
{first}
import json, sys
from transformers import AutoModelForSequenceClassification, AutoTokenizer
found = []
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    found.append([type(x).__name__ for x in (config, model)] + [tokenizer.chat_template])
print(json.dumps(found))
"""
    found = run_alone(code, *every_folder)
    for folder, (config, model, template) in zip(every_folder, found, strict=True):
        assert (config, model) == ("ArmoConfig", "ArmoRewardModel")
        assert template == (folder / "chat_template.jinja").read_text()


def test_importing_armo_imports_neither_torch_nor_the_parts_of_transformers():
    code = """
import json, sys, armo
before = [name for name in sys.modules if name in ("torch", "transformers", "numpy")]
print(json.dumps([before, armo.Objective.__name__, armo.RewardOutput.__name__, dir(armo)]))
"""
    before, objective, output, names = run_alone(code)
    assert before == []
    assert (objective, output) == ("Objective", "RewardOutput")
    assert names == sorted(armo.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Rewards'"):
        armo.Rewards  # noqa: B018


def test_a_folder_with_its_backbone_needs_no_other(made, tmp_path, request):
    source = made.backbone.model.name_or_path
    shutil.copytree(source, tmp_path / "backbone")
    spec = dataclasses.replace(made.backbone.spec, id=str(tmp_path / "backbone"))
    from armo.embed.backbone import load_backbone

    mine = make_model(load_backbone(spec, device="cpu"), covariates=made.covariates)
    mine.save_pretrained(tmp_path / "bare", golden=CONVERSATIONS[:1])
    mine.save_pretrained(tmp_path / "whole", golden=CONVERSATIONS[:1], include_backbone=True)
    shutil.rmtree(tmp_path / "backbone")
    with pytest.raises(BackboneError, match="no backbone"):
        ArmoRewardModel.from_pretrained(tmp_path / "bare", device="cpu")
    (tmp_path / "whole").rename(tmp_path / "moved")
    moved = ArmoRewardModel.from_pretrained(tmp_path / "moved", device="cpu")
    assert moved.verify() < 1e-9
    with pytest.raises(ArtifactError, match="are not at"):
        mine.save_pretrained(tmp_path / "late", include_backbone=True)
    # Saved again, it keeps its backbone, its golden scores and its digest.
    moved.save_pretrained(tmp_path / "again")
    shutil.rmtree(tmp_path / "moved")
    assert ArmoRewardModel.from_pretrained(tmp_path / "again", device="cpu").verify() < 1e-9
    first, second = ((tmp_path / name / "config.json").read_text() for name in ("bare", "again"))
    assert first == second


def test_another_backbone_in_the_folder_is_refused(made, tmp_path):
    made.save_pretrained(tmp_path / "model", include_backbone=True)
    file = tmp_path / "model" / "backbone" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BackboneError, match="have SHA-256"):
        ArmoRewardModel.from_pretrained(tmp_path / "model", device="cpu")


# Rows of ids.


def test_special_tokens_added_once_more_change_nothing(causal, texts, model, tokenizer):
    if model.backbone.planner.conversations is None:
        cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        before, after = [cls], [sep]
    else:
        before, after = [], []
    row = tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    surface = pad(tokenizer, texts[:1]).get("surface")
    plain = model(torch.tensor([row]), surface=surface).logits
    doubled = model(torch.tensor([before + row + after]), surface=surface).logits
    assert torch.equal(plain, doubled)


def test_rows_of_an_encoder_may_be_pairs(encoder):
    model = make_model(encoder)
    cls, sep = encoder.tokenizer.cls_token_id, encoder.tokenizer.sep_token_id
    prompt, response = encoder.tokenizer(["Is it safe?", "Yes."])["input_ids"]
    out = model(torch.tensor([[cls, *prompt, sep, *response, sep]]))
    expected = model.score([conversation("Is it safe?", "Yes.")]).score
    torch.testing.assert_close(out.logits[:, 0].double(), expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("c p s r", "row 1 is not"),
        ("p s r s", "row 1 is not"),
        ("c p s r s r s", "row 1 is not .*it has 3"),
        ("c s r s", "row 1 is not"),
        ("c p r s", "row 1 is not .*it has 1"),
        ("c p s p s s s", "row 1 is not"),
    ],
)
def test_rows_that_are_no_pair_are_refused(encoder, row, message):
    model = make_model(encoder)
    tokenizer = encoder.tokenizer
    names = {"c": tokenizer.cls_token_id, "s": tokenizer.sep_token_id, "p": 200, "r": 201}
    good = torch.tensor([names[x] for x in "cpsrs"])
    rows = [good, torch.tensor([names[x] for x in row.split()])]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(r)) for r in rows], batch_first=True)
    with pytest.raises(TokenRowError, match=message):
        model(ids, mask)


def test_an_encoder_that_measures_text_asks_for_what_ids_do_not_say(encoder):
    model = make_model(encoder, covariates=MEASURED)
    row = [encoder.tokenizer.cls_token_id, 200, encoder.tokenizer.sep_token_id, 201]
    ids = torch.tensor([[*row, encoder.tokenizer.sep_token_id]])
    with pytest.raises(ValueError, match=r"`surface` is needed: .* bold, log_length, questions"):
        model(ids)
    with pytest.raises(ValueError, match="`surface` must have 15 columns"):
        model(ids, surface=torch.zeros(1, 3))


def test_the_tokenizer_measures_each_response_as_it_is_written(encoder):
    tokenizer = ArmoTokenizer.of(encoder.tokenizer, measures=True)
    from armo.data.surface import surface_features

    response = "**Yes**?\n\n- one\n- two"
    expected = surface_features([response])
    text = tokenizer.apply_chat_template(conversation("Hi", response), tokenize=False)
    assert torch.equal(tokenizer([text], return_tensors="pt")["surface"], expected)
    assert torch.equal(tokenizer("Hi", response, return_tensors="pt")["surface"], expected)
    assert tokenizer("Hi", response)["surface"] == expected[0].tolist()
    assert tokenizer("Hi", response, return_tensors=None)["surface"] == expected[0].tolist()
    pairs = [("Hi", response), ("Hello", "No.")]
    both = surface_features([response, "No."])
    assert torch.equal(tokenizer(pairs, padding=True, return_tensors="pt")["surface"], both)
    assert tokenizer(pairs)["surface"] == both.tolist()
    assert tokenizer(pairs)["input_ids"] == tokenizer(*zip(*pairs, strict=True))["input_ids"]
    assert "surface" not in tokenizer("Hi")
    assert "surface" not in tokenizer(["Hi", "you"], is_split_into_words=True)
    assert "surface" not in ArmoTokenizer.of(encoder.tokenizer, measures=False)("Hi", response)


def test_a_prompt_alone_is_what_comes_before_its_response_and_has_no_score(encoder):
    tokenizer = ArmoTokenizer.of(encoder.tokenizer, measures=False)
    turns = [*conversation("Hi", "Hello!"), *conversation("Are you?", "Yes.")]
    alone, whole = (tokenizer.apply_chat_template(t, tokenize=False) for t in (turns[:-1], turns))
    assert whole == f"{alone}Yes.{tokenizer.sep_token}"
    with pytest.raises(TokenRowError, match="separators"):
        make_model(encoder)(**pad(tokenizer, [alone]))
    empty = pad(tokenizer, [alone + tokenizer.sep_token])
    with pytest.raises(TokenRowError, match="row 0 has no response between its separators"):
        make_model(encoder)(**empty)


# Rows of ids by every family of chat templates.

sys.path.append(os.path.join(os.path.dirname(__file__), "..", "embed"))
from models import build  # noqa: E402
from templates import families, family  # noqa: E402

PROMPTS = [
    (Message("user", "How do I boil an egg?"),),
    (Message("user", "Hi"), Message("assistant", "Hello!"), Message("user", "Name\n\na dog ")),
    (Message("system", "Be honest."), Message("user", "  Is it safe?\n")),
]
RESPONSES = ("No.", "\n- one\n- two\n", " It warns.", "<think>\nHm.\n</think>\n\nYes?")


# Their templates write plain words where a response begins, or their tokenizers drop white space.
REFUSED = ("mistral-v0.2", "phi3")


def planner_of(tokenizer, position):
    from armo.embed.plan import TextPlanner
    from armo.embed.spec import BackboneSpec

    spec = BackboneSpec("a family", prompt_position=position, max_tokens=4096)
    return TextPlanner(spec, tokenizer)


@pytest.mark.parametrize("position", ["turn_end", "generation_prompt"])
@pytest.mark.parametrize("name", [f.name for f in families()])
def test_ids_are_planned_as_text_or_refused(name, position):
    planner = planner_of(family(name).tokenizer, position)
    reader = TokenReader(planner)
    for prompt in PROMPTS:
        for response in RESPONSES:
            group = PromptGroup(prompt, (response,))
            expected = planner.plan([group], causal=True, share=False)
            opening = planner.conversations.open(prompt)
            text = planner.conversations.join(opening, response)
            (encoding,) = planner.conversations.encode([text])
            try:
                plan, texts = reader.plan([encoding.ids], causal=True)
            except TokenRowError:
                assert name in REFUSED
                continue
            assert name not in REFUSED
            assert plan == expected
            if response.strip() in text:  # some templates leave out thoughts or write them anew
                assert texts[0].strip() == response.strip()


def dated(expression):
    """A tokenizer whose template prints a date."""
    tokenizer = copy.deepcopy(family("llama3").tokenizer)
    told = "{{ bos_token ~ 'Today is ' ~ " + expression + " ~ '. ' }}"
    assert "{{ bos_token }}" in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", told, 1)
    return tokenizer


RENDERED = {f.name: f.tokenizer for f in families()} | {
    "dated by a function": dated("strftime_now('%d %b %Y')"),
    "dated by a variable": dated("(date_string or 'unknown')"),
    "in lines": dated("''"),
}
RENDERED["in lines"].chat_template = "\n  " + RENDERED["in lines"].chat_template + "\n"


@pytest.mark.parametrize("name", RENDERED)
def test_the_tokenizer_of_the_folder_renders_what_score_reads(name, tmp_path):
    spec = BackboneSpec("a family", max_tokens=256, max_prompt_tokens=128)
    original = RENDERED[name].chat_template
    model = make_model(Backbone(spec, model=build("llama"), tokenizer=RENDERED[name]))
    model.save_pretrained(tmp_path)
    assert RENDERED[name].chat_template == original
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    folds = any(f.name == name and f.folds for f in families())
    for prompt in PROMPTS:
        for response in RESPONSES:
            turns = [{"role": m.role, "content": m.content} for m in prompt]
            turns.append({"role": "assistant", "content": response})
            expected = model.score([turns]).score
            if folds and prompt[0].role == "system":
                with pytest.raises(TemplateError, match="give system text to `score`"):
                    tokenizer.apply_chat_template(turns, tokenize=False)
                continue
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            ids = tokenizer([text], add_special_tokens=False, return_tensors="pt")["input_ids"]
            if name in REFUSED:
                with pytest.raises(TokenRowError):
                    model(ids)
                continue
            logits = model(ids).logits[:, 0].double()
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


ASKED = [("user", "What is the time?"), ("assistant", "I look it up.")]
MORE = {
    "tool": [*ASKED, ("tool", "07:00"), ("assistant", "It is seven.")],
    "tool, asked again": [*ASKED, ("tool", "07:00"), ("user", "And?"), ("assistant", "Seven.")],
    "system": [*ASKED, ("system", "Be brief."), ("user", "And?"), ("assistant", "Seven.")],
}
SHOWN = (
    "{% for m in messages %}{% if WHEN %}<|start_header_id|>{{ m.role }}: {{ m.content }}"
    "{% endif %}{% endfor %}"
)
LEAVING_OUT = {
    "tool": SHOWN.replace("WHEN", "m.role != 'tool'"),
    "system": SHOWN.replace("WHEN", "m.role != 'system' or loop.first"),
}


def rendered(tokenizer, turns):
    return tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns], tokenize=False
    )


def refusal(call):
    try:
        call()
    except (BackboneError, TemplateError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("turns", MORE.values(), ids=MORE)
@pytest.mark.parametrize("name", [*RENDERED, *(f"leaves out {role}" for role in LEAVING_OUT)])
def test_turns_that_score_refuses_the_tokenizer_of_the_folder_refuses_too(name, turns, tmp_path):
    role = name.removeprefix("leaves out ")
    tokenizer = copy.deepcopy(RENDERED.get(name, RENDERED["llama3"]))
    if role in LEAVING_OUT:
        tokenizer.chat_template = LEAVING_OUT[role]
    spec = BackboneSpec("a family", max_tokens=256, max_prompt_tokens=128)
    model = make_model(Backbone(spec, model=build("llama"), tokenizer=tokenizer))
    model.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": role, "content": content} for role, content in turns]
    by_score = refusal(lambda: model.score([messages]))
    by_tokenizer = refusal(lambda: rendered(saved, turns))
    left_out = turns[2][0] == role or (name, turns[2][0]) == ("phi3", "tool")
    if by_score is None:
        assert not left_out
        assert turns[2][1] in rendered(saved, turns)
    else:
        assert by_tokenizer is not None
        # Where system text is folded, the tokenizer refuses all of it.
        assert by_tokenizer in by_score or by_tokenizer == "give system text to `score`"
        assert "\n" not in by_tokenizer + by_score
    if left_out:
        # The template itself would have written the rest.
        assert turns[2][1] not in rendered(tokenizer, turns)
        assert by_tokenizer == "the chat template leaves out a system or tool turn"
        rendered(saved, [("system", "Be honest."), *ASKED] if role in LEAVING_OUT else ASKED)


def test_a_row_that_is_skipped_has_no_value_by_either_way(encoder):
    spec = dataclasses.replace(encoder.spec, on_overlong="skip")
    model = make_model(Backbone(spec, model=encoder.model, tokenizer=encoder.tokenizer))
    tokenizer = ArmoTokenizer.of(encoder.tokenizer, measures=False)
    long = [conversation("Is it safe?", "It warns. " * 200), CONVERSATIONS[1]]
    texts = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in long]
    out, expected = model(**pad(tokenizer, texts)), model.score(long)
    assert out.logits.isnan()[:, 0].tolist() == expected.score.isnan().tolist() == [True, False]
    for name in NAMES:
        found = getattr(out, name).isnan()
        assert torch.equal(found, getattr(expected, name).isnan())
        assert bool(found[0].all())
        assert not found[1].any()
