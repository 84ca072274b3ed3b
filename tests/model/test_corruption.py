"""Every way in which a model folder can be wrong is one clear error."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import conversation, make_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from armo.artifacts import ArtifactError
from armo.embed.backbone import load_backbone
from armo.embed.spec import BackboneError, BackboneSpec
from armo.model.pretrained import FORMAT, folder_seal
from armo.model.reward_model import ArmoRewardModel

GOLDEN = [conversation("How do I boil an egg?", "In hot water."), conversation("Hi", "Hello!")]


class Trap:
    """Says so if it is ever unpickled."""

    sprung = False

    def __reduce__(self):
        return setattr, (Trap, "sprung", True)


def tensors(change):
    def work(folder):
        file = folder / "model.safetensors"
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata()
        content = load_file(file)
        change(content)
        save_file({k: v.contiguous() for k, v in content.items()}, file, metadata=header)

    return work


def config(change, *, sealed=False):
    """Edit `config.json`; `sealed` together with its digest, as one who makes models could."""

    def work(folder):
        file = folder / "config.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
        if sealed:
            weights = folder / "model.safetensors"
            tensors = load_file(weights)
            save_file(tensors, weights, metadata={"sha256": folder_seal(content, tensors)})

    return work


def file(name, change):
    def work(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return work


def remove(name):
    return lambda folder: (folder / name).unlink()


def pickled(folder):
    weights = folder / "model.safetensors"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    weights.unlink()


def disguised(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap()))


def disguised_by_torch(folder):
    torch.save({"head_weights": Trap()}, folder / "model.safetensors")


def flip(content):
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


def other_weights(folder):
    """The weights of another model of the same shapes."""
    made = make_model(ENCODER[0], seed=1, links=("logistic",) + ("identity",) * 4)
    made.save_pretrained(folder / "other", golden=GOLDEN)
    (folder / "other" / "model.safetensors").replace(folder / "model.safetensors")
    shutil.rmtree(folder / "other")


def instead(name):
    """Put a folder in place of a file."""
    return lambda folder: ((folder / name).unlink(), (folder / name).mkdir())


def linked(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("nowhere")


def added(name, text):
    def work(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return work


ENCODER = []
WRONG = {
    "a missing tensor": (tensors(lambda t: t.pop("beta")), "missing beta"),
    "a missing tensor of the gate": (tensors(lambda t: t.pop("gate.mean")), "missing gate.mean"),
    "an extra tensor": (tensors(lambda t: t.update(x=torch.ones(1))), "unexpected x"),
    "a renamed tensor": (
        tensors(lambda t: t.update(head_weight=t.pop("head_weights"))),
        "missing head_weights; unexpected head_weight",
    ),
    "a truncated tensor": (
        tensors(lambda t: t.update(head_weights=t["head_weights"][:-1])),
        r"head_weights has shape \[4, 32\], needs \[5, 32\]",
    ),
    "a transposed tensor": (
        tensors(lambda t: t.update(head_weights=t["head_weights"].T)),
        r"head_weights has shape \[32, 5\], needs \[5, 32\]",
    ),
    "a rounded tensor": (
        tensors(lambda t: t.update(head_weights=t["head_weights"].half())),
        "head_weights has type F16, needs F64",
    ),
    "a tensor of nan": (
        tensors(lambda t: t["head_weights"].__setitem__((2, 3), torch.nan)),
        "not finite: head_weights",
    ),
    "tensors of infinity": (
        tensors(lambda t: [t[n].fill_(torch.inf) for n in ("beta", "gate.scale")]),
        "not finite: beta, gate.scale",
    ),
    "other columns in the gate": (
        tensors(lambda t: t["gate.mixed"].copy_(torch.tensor([0, 1, 3]))),
        "gate.mixed is not what config.json declares",
    ),
    "a truncated file": (file("model.safetensors", lambda b: b[:-20]), "damaged safetensors file"),
    "a file with more at its end": (
        file("model.safetensors", lambda b: b + b"0" * 8),
        "damaged safetensors file",
    ),
    "an empty file": (file("model.safetensors", lambda b: b""), "damaged safetensors file"),
    "no tensors": (remove("model.safetensors"), r"No such file: .*model\.safetensors$"),
    "a pickle beside": (pickled, r"pytorch_model\.bin is a pickle, which is not loaded"),
    "a pickle by that name": (disguised, "a pickle, not safetensors: it is not loaded"),
    "a pickle of torch by that name": (disguised_by_torch, "a pickle, not safetensors"),
    "one bit of a tensor": (
        tensors(lambda t: t["head_weights"].view(torch.int64)[1, 2].bitwise_xor_(1)),
        r"model\.safetensors was changed after it was written",
    ),
    "the sign of beta": (
        tensors(lambda t: t["beta"].neg_()),
        r"model\.safetensors was changed after it was written",
    ),
    "another model's tensors": (other_weights, r"model\.safetensors is another model's"),
    "no configuration": (remove("config.json"), r"No such file: .*config\.json"),
    "a newer format": (
        config(lambda c: c.update(format=FORMAT + 1)),
        f"not an armo model of format {FORMAT}, but of {FORMAT + 1}: install a newer armo",
    ),
    "an older format": (
        config(lambda c: c.update(format=FORMAT - 1)),
        f"format {FORMAT}, but of {FORMAT - 1}: make it again",
    ),
    "no format": (config(lambda c: c.pop("format")), "but of None"),
    "an edited scale": (config(lambda c: c["objectives"][0].update(high=10)), "changed after it"),
    "an edited meaning": (config(lambda c: c["objectives"][0].update(meaning="x")), "changed"),
    "an edited setting": (config(lambda c: c["backbone"].update(max_tokens=64)), "changed"),
    "objectives in another order": (
        config(lambda c: c["objectives"].insert(1, c["objectives"].pop(0))),
        "changed after it was written",
    ),
    "an objective twice": (
        config(lambda c: c["objectives"].append(c["objectives"][0])),
        "Objectives declared twice: helpfulness",
    ),
    "no objectives": (config(lambda c: c.update(objectives=[])), "At least one objective"),
    "an unknown field": (config(lambda c: c.update(auto_map={})), "unknown field 'auto_map'"),
    "an unknown setting": (config(lambda c: c["backbone"].update(colour=1)), "colour"),
    "another backbone": (
        config(lambda c: c["backbone"].update(digest="0" * 64), sealed=True),
        "expected 0{64}: another model or revision",
    ),
    "another tokenizer": (
        config(lambda c: c["backbone"].update(tokenizer_digest="0" * 64), sealed=True),
        "the tokenizer of .* is not the expected one",
    ),
    "another architecture": (
        config(lambda c: c["backbone"].update(config_digest="0" * 64), sealed=True),
        "the config.json of .* is not the expected one",
    ),
    "a backbone that is nowhere": (
        config(lambda c: c["backbone"].update(id="no/such-model")),
        "no backbone 'no/such-model'",
    ),
    "a folder by the name of the tensors": (instead("model.safetensors"), "No such file: "),
    "a folder by the name of the configuration": (instead("config.json"), "No such file: "),
    "a link to nothing": (linked, r"No such file: .*model\.safetensors$"),
    "a configuration without end": (file("config.json", lambda b: b"[" * 100_000), "too deeply"),
    "a backbone without a name": (
        config(lambda c: c["backbone"].update(id=None)),
        "`id` must be a text, got None",
    ),
    "a revision that is a number": (
        config(lambda c: c["backbone"].update(revision=-1)),
        "`revision` must be a text, got -1",
    ),
    "a gate of no width": (config(lambda c: c["gate"].update(dim=-1)), "`dim`, .*must be positive"),
    "an objective that is called by a number": (
        config(lambda c: c["objectives"][0].update(name=5)),
        "An objective needs a `name`, got 5",
    ),
    "special tokens beside the tokenizer's": (
        added("special_tokens_map.json", '{"sep_token": "[PAD]"}'),
        r"special_tokens_map\.json: unexpected",
    ),
    "another chat template": (
        added("additional_chat_templates/default.jinja", "{{ 'x' }}"),
        "additional_chat_templates: unexpected",
    ),
    "no tokenizer": (remove("tokenizer.json"), r"No such file: .*tokenizer\.json"),
    "an edited tokenizer": (file("tokenizer.json", flip), r"tokenizer\.json: changed after"),
    "an edited template": (
        file("chat_template.jinja", lambda b: b + b" "),
        r"chat_template\.jinja: changed after",
    ),
    "tokenizer settings edited": (
        file("tokenizer_config.json", lambda b: b.replace(b"true", b"false") + b" "),
        r"tokenizer_config\.json: changed after",
    ),
}


@pytest.fixture(scope="module")
def saved(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    ENCODER[:] = [encoder]
    make_model(encoder).save_pretrained(folder, golden=GOLDEN)
    return folder


@pytest.fixture
def folder(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return Path(shutil.copytree(saved, tmp_path / "model"))


def load(folder):
    return ArmoRewardModel.from_pretrained(folder, device="cpu")


def test_an_untouched_folder_loads_and_verifies(folder):
    assert load(folder).verify() < 1e-6


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.usefixtures("no_type_checks")
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_executed(folder, what):
    damage, message = WRONG[what]
    damage(folder)
    with pytest.raises((ArtifactError, BackboneError), match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert not Trap.sprung


EVIL = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Evil: pass\n"
EVIL_MAP = {
    "AutoConfig": "evil.Evil",
    "AutoModel": "evil.Evil",
    "AutoTokenizer": ["evil.Evil", "evil.Evil"],
}


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_backbone_is_neither_run_nor_asked_about(
    encoder_folder, tmp_path, monkeypatch, name
):
    evil = Path(shutil.copytree(encoder_folder, tmp_path / "evil"))
    (evil / "evil.py").write_text(EVIL)
    content = json.loads((evil / name).read_text())
    content |= {"auto_map": EVIL_MAP, "model_type": "evil", "tokenizer_class": "Evil"}
    (evil / name).write_text(json.dumps(content))

    def ask(*_):
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", ask)
    spec = BackboneSpec(str(evil), pooling="mean", max_tokens=96, max_prompt_tokens=40)
    if name == "config.json":
        with pytest.raises(BackboneError, match="code of its own is never run") as caught:
            load_backbone(spec, device="cpu")
        assert "\n" not in str(caught.value)
    else:  # Transformers knows the tokenizer of the model's own type
        load_backbone(spec, device="cpu")
    assert not (evil / "ran").exists()
    assert not [name for name in sys.modules if name.endswith(".evil")]


def test_where_the_backbone_is_may_be_changed_by_hand(folder, encoder_folder, tmp_path):
    moved = shutil.copytree(encoder_folder, tmp_path / "moved")
    config(lambda c: c["backbone"].update(id=str(moved), revision="main"))(folder)
    assert load(folder).verify() < 1e-6


def golden(change):
    def work(folder):
        path = folder / "golden.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return work


def add(content, *path, by):
    *way, last = path
    for step in way:
        content = content[step]
    content[last] += by


APART = {
    "a score": (golden(lambda g: add(g, "score", 1, by=0.01)), "first row 1, `score`: "),
    "a reward": (
        golden(lambda g: add(g, "rewards", 1, 2, by=0.01)),
        "first row 1, `rewards` of harm: ",
    ),
    "an adjusted reward": (
        golden(lambda g: add(g, "adjusted", 0, 4, by=-0.01)),
        "first row 0, `adjusted` of formatting: ",
    ),
    "a gating weight": (
        golden(lambda g: add(g, "gating_weights", 0, 1, by=0.01)),
        "first row 0, `gating_weights` of honesty: ",
    ),
    "beta": (golden(lambda g: add(g, "beta", by=0.01)), "first `beta`: 2 now, 2.01 when made"),
    "the first of several": (
        golden(lambda g: [add(g, "score", 1, by=5), add(g, "rewards", 0, 3, by=0.01)]),
        "deviate by 5, more than 0.0001; first row 0, `rewards` of verbosity: ",
    ),
    "no field": (golden(lambda g: g.pop("rewards")), "field 'rewards' is missing"),
    "a row too few": (golden(lambda g: g["score"].pop()), "`score` must have 2 rows"),
    "a column too few": (
        golden(lambda g: g["rewards"][1].pop()),
        "each row of `rewards` must have 5",
    ),
    "no number": (golden(lambda g: g["score"].__setitem__(0, "1")), "`score` must be numbers"),
    "no list of conversations": (
        golden(lambda g: g.update(conversations=5)),
        r"golden\.json: no golden conversations",
    ),
    "a text for a conversation": (
        golden(lambda g: g["conversations"].__setitem__(1, "Hi")),
        r"golden\.json: conversation 1: must be a list of messages",
    ),
    "an empty response": (
        golden(lambda g: g["conversations"][0][-1].update(content="")),
        r"golden\.json: conversation 0: ",
    ),
    "a folder": (instead("golden.json"), r"No such file: .*golden\.json"),
    "no beta": (golden(lambda g: g.update(beta=None)), "`beta` must be a number"),
    "no rows": (golden(lambda g: g["conversations"].clear()), "no golden conversations"),
    "a list": (file("golden.json", lambda b: b"[]"), "must be a JSON object"),
    "no file": (remove("golden.json"), "No such file"),
    "no JSON": (file("golden.json", lambda b: b[:-9]), "not valid JSON"),
}


@pytest.mark.parametrize("what", APART)
def test_verify_names_the_first_row_and_field_that_differ(folder, what, no_type_checks):
    damage, message = APART[what]
    damage(folder)
    model = load(folder)
    with pytest.raises(ArtifactError, match=message) as caught:
        model.verify()
    assert "\n" not in str(caught.value)


def test_the_tolerance_of_verify_is_that_of_the_dtype_it_runs_in(folder):
    golden(lambda g: add(g, "score", 1, by=1e-3))(folder)
    with pytest.raises(ArtifactError, match=r"more than 0\.0001"):
        load(folder).verify()
    golden(lambda g: add(g, "score", 1, by=10))(folder)
    low = ArmoRewardModel.from_pretrained(folder, device="cpu", dtype=torch.bfloat16)
    with pytest.raises(ArtifactError, match=r"more than 0\.05"):
        low.verify()
