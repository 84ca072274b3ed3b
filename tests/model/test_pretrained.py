import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.errors
import pytest
import torch
from conftest import conversation, make_model
from safetensors.torch import load_file, save_file

from armo.artifacts import ArtifactError
from armo.data.conversation import Message
from armo.data.surface import SURFACE_VERSION
from armo.embed.backbone import Backbone, BackboneError
from armo.model.conversations import parse_messages
from armo.model.pretrained import FORMAT, ModelConfig, folder_seal
from armo.model.reward_model import ArmoRewardModel

FIELDS = ("score", "rewards", "adjusted", "gating_weights", "contributions")
GOLDEN = [
    conversation("How do I boil an egg?", "Put it in hot water for seven minutes."),
    conversation("Name a dog.", "The lazy one!"),
]
MORE = [*GOLDEN, conversation("Is it safe? " * 30, "- one\n- two " * 30)]
MEASURED = ("bold", "log_length")
FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "golden.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
TENSORS = (
    "head_weights",
    "head_intercepts",
    "adjusted_weights",
    "adjusted_offset",
    "adjusted_style",
    "beta",
    "gate.hidden.0.weight",
    "gate.hidden.0.bias",
    "gate.output.weight",
    "gate.output.bias",
    "gate.mean",
    "gate.scale",
)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(
    scope="module",
    params=[("encoder", ()), ("causal", MEASURED)],
    ids=["encoder", "causal, measuring"],
)
def made(request):
    backbone, covariates = request.param
    return make_model(request.getfixturevalue(backbone), covariates=covariates)


@pytest.fixture(scope="module")
def saved(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    model = make_model(encoder, covariates=MEASURED)
    model.save_pretrained(folder, golden=GOLDEN, card="# A card\n")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a saved model, to be damaged."""
    return shutil.copytree(saved, tmp_path / "model")


def load(folder):
    return ArmoRewardModel.from_pretrained(folder, device="cpu", batch_tokens=256)


def seal(folder, tensors):
    """Write tensors with the seal that fits, as who makes a model could."""
    values = json.loads((folder / "config.json").read_text())
    header = {"sha256": folder_seal(values, tensors)}
    save_file(tensors, folder / "model.safetensors", metadata=header)


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    seal(folder, tensors)


def change_config(folder, change):
    """Change `config.json` together with its seal, as who makes a model could."""
    change_json(folder / "config.json", change)
    seal(folder, load_file(folder / "model.safetensors"))


def change_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def error_of(folder):
    """The message of the one error that loading gives, which must fit on a line."""
    with pytest.raises(ArtifactError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_saving_and_loading_gives_the_same_bits(made, tmp_path):
    made.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model")
    before, after = made.score(MORE), loaded.score(MORE)
    assert before.objectives == after.objectives
    for name in FIELDS:
        assert torch.equal(getattr(before, name), getattr(after, name))
    assert made.compare("Hi", "Yes.", "No!") == loaded.compare("Hi", "Yes.", "No!")


def test_links_are_saved_loaded_and_verified_and_change_the_rewards_alone(encoder, tmp_path):
    links = ("logistic", "identity", "identity", "identity", "logistic")
    made, plain = make_model(encoder, links=links), make_model(encoder)
    made.save_pretrained(tmp_path / "model", golden=GOLDEN)
    loaded = load(tmp_path / "model")
    assert loaded.links == ModelConfig.load(tmp_path / "model").links == links
    assert loaded.verify() < 1e-5
    out, linear = loaded.score(MORE), plain.score(MORE)
    for name in FIELDS:
        assert torch.equal(getattr(out, name), getattr(made.score(MORE), name))
        assert torch.equal(getattr(out, name), getattr(linear, name)) == (name != "rewards")
    assert torch.equal(out.rewards[:, 1:4], linear.rewards[:, 1:4])
    torch.testing.assert_close(out.rewards[:, [0, 4]], linear.rewards[:, [0, 4]].sigmoid())
    # Without its links the model gives other rewards than it was saved with.
    change_config(tmp_path / "model", lambda c: c.update(links=["identity"] * 5))
    with pytest.raises(ArtifactError, match="golden outputs deviate"):
        load(tmp_path / "model").verify()


def test_saving_what_was_loaded_writes_the_same_files(saved, tmp_path):
    load(saved).save_pretrained(tmp_path, golden=GOLDEN, card="# A card\n")
    names = {file.name for file in saved.iterdir()}
    assert names == FILES
    assert names == {file.name for file in tmp_path.iterdir()}
    for name in names:
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


def test_a_second_process_gives_the_same_bits(saved):
    code = (
        "import json, sys, torch, armo\n"
        "torch.set_num_threads(int(sys.argv[2]))\n"
        "model = armo.ArmoRewardModel.from_pretrained(\n"
        "    sys.argv[1], device='cpu', batch_tokens=256)\n"
        "out = model.score(json.loads(sys.argv[3]))\n"
        f"print(json.dumps([getattr(out, name).tolist() for name in {FIELDS}]))\n"
    )
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, "-c", code, saved, threads, json.dumps(MORE)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    out = load(saved).score(MORE)
    fresh = json.loads(done.stdout.splitlines()[-1])
    assert fresh == [getattr(out, name).tolist() for name in FIELDS]


def test_the_golden_conversations_of_an_untouched_folder_verify(saved):
    assert load(saved).verify() <= 1e-6


@pytest.mark.parametrize("name", ["score", "rewards", "gating_weights"])
def test_a_changed_golden_output_does_not_verify(folder, name):
    def change(golden):
        row = golden[name]
        if name == "score":
            row[1] += 0.01
        else:
            row[1][0] += 0.01

    change_json(folder / "golden.json", change)
    with pytest.raises(ArtifactError, match=r"golden outputs deviate by 0\.01"):
        load(folder).verify()


def test_a_changed_golden_conversation_does_not_verify(folder):
    def change(golden):
        golden["conversations"][0][-1]["content"] = "Eat it raw."

    change_json(folder / "golden.json", change)
    with pytest.raises(ArtifactError, match="golden outputs deviate"):
        load(folder).verify()


@pytest.mark.parametrize("name", TENSORS)
def test_a_changed_tensor_does_not_verify(folder, name):
    def change(tensors):
        tensors[name] += torch.linspace(0.5, 1.5, tensors[name].numel()).view_as(tensors[name])

    change_tensors(folder, change)
    with pytest.raises(ArtifactError, match=r"golden outputs deviate|beta"):
        load(folder).verify()


def test_a_tensor_of_nan_is_named(folder):
    change_tensors(folder, lambda tensors: tensors["head_weights"].fill_(torch.nan))
    assert "model.safetensors: not finite: head_weights" in error_of(folder)


def test_a_folder_without_golden_conversations_does_not_verify(encoder, tmp_path):
    make_model(encoder).save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="no golden conversations"):
        load(tmp_path).verify()


def test_a_model_that_was_never_loaded_does_not_verify(made):
    with pytest.raises(ArtifactError, match="not loaded from a folder"):
        made.verify()


@pytest.mark.parametrize("name", TENSORS)
def test_a_missing_tensor_is_named(folder, name):
    change_tensors(folder, lambda tensors: tensors.pop(name))
    assert f"missing {name}" in error_of(folder)


def test_an_unexpected_tensor_is_named(folder):
    change_tensors(folder, lambda tensors: tensors.update(extra=torch.zeros(2)))
    assert "unexpected extra" in error_of(folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder):
    def change(tensors):
        tensors["head_weights"] = tensors["head_weights"][:, :-1].contiguous()

    change_tensors(folder, change)
    assert "head_weights has shape [5, 31], needs [5, 32]" in error_of(folder)


def test_all_tensors_that_are_wrong_are_named_at_once(folder):
    def change(tensors):
        del tensors["beta"]
        tensors["extra"] = torch.zeros(2)

    change_tensors(folder, change)
    message = error_of(folder)
    assert "missing beta" in message
    assert "unexpected extra" in message


def test_a_truncated_tensor_file_is_called_damaged(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    assert "damaged safetensors file" in error_of(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert f"No such file: {folder / name}" in error_of(folder)


@pytest.mark.parametrize("key", ["digest", "tokenizer_digest", "config_digest"])
def test_another_backbone_is_refused(folder, key):
    change_config(folder, lambda config: config["backbone"].update({key: "0" * 64}))
    with pytest.raises(BackboneError, match=r"expected 0{64}|not the expected one"):
        load(folder)


def test_a_backbone_that_is_nowhere_is_named(folder):
    change_json(
        folder / "config.json", lambda config: config["backbone"].update(id="no/such-model")
    )
    with pytest.raises(BackboneError, match="no backbone 'no/such-model'"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.pop("objectives"), "'objectives' is missing"),
        (lambda config: config.pop("backbone"), "'backbone' is missing"),
        (lambda config: config.pop("gate"), "'gate' is missing"),
        (lambda config: config["objectives"][0].pop("low"), "low"),
        (lambda config: config["backbone"].pop("id"), "id"),
        (lambda config: config["gate"].pop("dim"), "dim"),
        (lambda config: config["gate"].update(objectives=4), "objectives"),
        (lambda config: config["gate"].update(colour="red"), "colour"),
        (lambda config: config.update(format=FORMAT - 1), "make it again with this armo"),
        (lambda config: config.update(format=FORMAT + 1), "install a newer armo"),
        (lambda config: config.update(format=str(FORMAT)), "not an armo model of format"),
        (lambda config: config.update(model_type="bert"), "not an armo model of format"),
        (lambda config: config.pop("files"), "'files' is missing"),
        (lambda config: config.update(files=["tokenizer.json"]), "`files` must be digests"),
        (lambda config: config.update(files={"../up.json": "0"}), "`files` must be digests"),
        (lambda config: config.update(auto_map={"AutoModel": "x.Y"}), "unknown field 'auto_map'"),
        (lambda config: config.pop("links"), "'links' is missing"),
        (lambda config: config.update(links="identity"), "`links` must be a list of 5"),
        (lambda config: config["links"].pop(), "`links` must be a list of 5, one of identity, "),
        (lambda config: config["links"].append("identity"), "`links` must be a list of 5"),
        (lambda config: config["links"].__setitem__(0, "probit"), "`links` must be a list of 5"),
        (lambda config: config.pop("covariates"), "'covariates' is missing"),
        (lambda config: config["covariates"].pop("version"), "version"),
        (lambda config: config["covariates"].pop("names"), "names"),
        (
            lambda config: config["covariates"].update(version=SURFACE_VERSION - 1),
            f"version {SURFACE_VERSION - 1} of the surface features, this is version",
        ),
        (
            lambda config: config["covariates"].update(names=["bold", "charm"]),
            "`covariates` are unknown: charm",
        ),
    ],
)
def test_a_configuration_that_does_not_fit_names_the_field(folder, change, message):
    change_json(folder / "config.json", change)
    error = error_of(folder)
    assert str(folder / "config.json") in error
    assert message in error


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_configuration_that_is_no_json_object_is_named(folder, text):
    (folder / "config.json").write_text(text)
    assert str(folder / "config.json") in error_of(folder)


@pytest.mark.parametrize("path", ["/no/such/folder", "no-such-folder", "no-such/model"])
def test_a_model_that_is_nowhere_is_named(path):
    assert f"No model folder at {path}" in error_of(path)


def test_the_configuration_keeps_every_declaration(saved, encoder):
    config = ModelConfig.load(saved)
    assert config.objectives == make_model(encoder).objectives
    assert config.backbone == encoder.spec
    assert config.backbone.digest is not None
    assert config.gate == make_model(encoder).gate.shape
    assert config.covariates == MEASURED
    assert config.links == ("identity",) * 5


def test_covariates_that_are_fewer_than_their_coefficients_are_refused(folder):
    change_json(folder / "config.json", lambda config: config["covariates"].update(names=["bold"]))
    assert "adjusted_style has shape [5, 2], needs [5, 1]" in error_of(folder)


def test_covariates_in_another_order_do_not_verify(folder):
    change_config(folder, lambda config: config["covariates"]["names"].reverse())
    with pytest.raises(ArtifactError, match="golden outputs deviate"):
        load(folder).verify()


def test_no_covariates_are_kept_as_none_and_need_no_version(encoder, tmp_path):
    make_model(encoder).save_pretrained(tmp_path, golden=GOLDEN)
    assert load_file(tmp_path / "model.safetensors")["adjusted_style"].shape == (5, 0)
    change_config(tmp_path, lambda config: config["covariates"].update(version=0))
    loaded = load(tmp_path)
    assert loaded.covariates == ()
    assert loaded.adjusted_style.shape == (5, 0)
    assert loaded.verify() <= 1e-6


def test_a_golden_conversation_without_a_score_is_named_and_nothing_is_written(encoder, tmp_path):
    spec = dataclasses.replace(encoder.spec, on_overlong="skip")
    model = make_model(Backbone(spec, model=encoder.model, tokenizer=encoder.tokenizer))
    golden = [*GOLDEN, conversation("Hi", "word " * 500)]
    with pytest.raises(ValueError, match="golden conversation 2 has no score: it is too long"):
        model.save_pretrained(tmp_path / "model", golden=golden)
    assert not (tmp_path / "model").exists()


def test_a_backbone_that_gives_no_numbers_makes_no_model_folder(encoder, tmp_path):
    broken = copy.deepcopy(encoder.model)
    broken.get_input_embeddings().weight.data.fill_(torch.inf)
    model = make_model(Backbone(encoder.spec, model=broken, tokenizer=encoder.tokenizer))
    with pytest.raises(ValueError, match=r"conversation 0 has no score.* is not finite"):
        model.save_pretrained(tmp_path / "model", golden=GOLDEN)
    assert not (tmp_path / "model").exists()


def test_saving_over_another_model_leaves_nothing_of_it(causal, encoder, tmp_path):
    before = make_model(causal)
    before.save_pretrained(tmp_path, golden=GOLDEN, card="# A card\n", include_backbone=True)
    (tmp_path / "vocab.txt").write_text("of an older tokenizer")
    (tmp_path / "manifest.json").write_text("{}")
    make_model(encoder).save_pretrained(tmp_path, golden=GOLDEN)
    assert {f.name for f in tmp_path.iterdir()} == FILES - {"README.md"} | {"manifest.json"}
    assert load(tmp_path).verify() < 1e-5


def test_saving_into_a_folder_that_is_no_model_s_removes_nothing(encoder, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "backbone").mkdir()
    (tmp_path / "config.json").write_text("{")
    make_model(encoder).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / "backbone").is_dir()


def test_a_backbone_is_not_removed_from_under_its_model(encoder, tmp_path):
    make_model(encoder).save_pretrained(tmp_path, golden=GOLDEN, include_backbone=True)
    loaded = load(tmp_path)
    with pytest.raises(ArtifactError, match="is read from this folder; save to another one"):
        loaded.save_pretrained(tmp_path, include_backbone=False)
    loaded.save_pretrained(tmp_path)
    assert load(tmp_path).verify() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_was_cast_verifies_when_it_is_saved_and_loaded(saved, tmp_path, dtype):
    cast = load(saved)
    cast.to(dtype)
    assert cast.verify() < 5e-2
    cast.save_pretrained(tmp_path, golden=GOLDEN)
    loaded = load(tmp_path)
    assert loaded.dtype == (torch.float32 if dtype == torch.float64 else dtype)
    assert loaded.verify() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_was_cast_is_the_one_that_is_loaded_in_that_dtype(causal, tmp_path, dtype):
    make_model(causal).save_pretrained(tmp_path)
    cast = load(tmp_path).to(dtype)
    loaded = ArmoRewardModel.from_pretrained(tmp_path, device="cpu", batch_tokens=256, dtype=dtype)
    # The rotary frequencies are no weights: rounded, they would move all later positions.
    tables = dict(cast.language_model.named_buffers())
    assert tables
    for name, table in loaded.language_model.named_buffers():
        torch.testing.assert_close(tables[name], table, rtol=0, atol=0)
    long = [conversation("Why? " * 8, "Put it in hot water for seven minutes, then wait.")]
    assert torch.equal(cast.score(long).score, loaded.score(long).score)


def test_a_backbone_that_was_trained_is_not_dropped_unseen(saved, tmp_path):
    trained = load(saved)
    trained.to(torch.bfloat16).to(torch.float32)
    trained.save_pretrained(tmp_path / "cast")
    weights = trained.get_input_embeddings().weight.requires_grad_(True)
    optimizer = torch.optim.SGD([weights], lr=0.1)
    weights.sum().backward()
    optimizer.step()
    with pytest.raises(BackboneError, match=r"word_embeddings\.weight of .* was changed"):
        trained.save_pretrained(tmp_path / "trained")
    assert not (tmp_path / "trained").exists()


def test_options_for_the_hub_reach_the_backbone(saved, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    change_config(folder, lambda config: config["backbone"].update(id="no/such-model"))
    asked = []

    def download(*_, **options):
        asked.append(options)
        raise huggingface_hub.errors.LocalEntryNotFoundError("not there")

    monkeypatch.setattr("armo.embed.backbone.snapshot_download", download)
    with pytest.raises(BackboneError, match="no backbone"):
        ArmoRewardModel.from_pretrained(
            folder, token="hf_t", cache_dir=tmp_path / "cache", local_files_only=True
        )
    assert {str(options["cache_dir"]) for options in asked} == {str(tmp_path / "cache")}
    assert all(options["local_files_only"] for options in asked)
    assert asked[-1]["token"] == "hf_t"


def test_messages_are_parsed_alike_from_dicts_and_objects():
    turns = (Message("user", "Hi"), Message("assistant", "Hello"))
    assert parse_messages(conversation("Hi", "Hello")) == turns
    assert parse_messages(turns) == turns
