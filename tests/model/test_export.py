"""Export: every format is read back with plain Transformers, or by the published forward pass."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import conversation, make_model
from safetensors.torch import load_file
from test_armorm import (
    CONVERSATIONS,
    PATTERN,
    all_tensors,
    change_config,
    load,
    published_forward,
    write_checkpoint,
)
from test_cli import run
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from armo.data.conversation import Message, PreferencePair
from armo.data.surface import SURFACE_FEATURES, surface_features
from armo.embed.backbone import load_backbone
from armo.embed.spec import BackboneSpec
from armo.fit.decorrelation import RewardTransform, style_part
from armo.fit.gating import GatingNetwork
from armo.fit.heads import ObjectiveHeads
from armo.model.export import export_model
from armo.model.plain import CHECKS, ExportError
from armo.model.published import merge_members
from armo.model.reward_model import ArmoRewardModel

EMBED = Path(__file__).parents[1] / "embed"
TALKS = [
    conversation("How do I boil an egg?", "Put it in hot water for seven minutes."),
    conversation("How do I boil an egg?", "No."),
    [
        {"role": "user", "content": "Name a dog."},
        {"role": "assistant", "content": "The lazy one."},
        {"role": "user", "content": "And a fox, which is not a dog?"},
        {"role": "assistant", "content": "The **quick** brown one!"},
    ],
    conversation("Is it safe? " * 5, "It depends. " * 6),
]
PAIRS = [
    PreferencePair(str(k), "s", (Message("user", f"Is {k} safe?"),), chosen, rejected)
    for k, (chosen, rejected) in enumerate(
        [("Yes.", "No."), ("No, **never**!", "Yes."), ("It warns of risks.", "- one\n- two")] * 4
    )
]


def read_with(folder, **changes):
    spec = {"prompt_position": "turn_end", "max_tokens": 128, "max_prompt_tokens": 64} | changes
    return load_backbone(BackboneSpec(str(folder), **spec), device="cpu", batch_tokens=256)


@pytest.fixture(scope="module")
def backbone(causal_folder):
    """A Llama whose padding token ends every turn, the case that breaks pooling by padding."""
    return read_with(causal_folder)


def model_of(backbone, *, members=1, hidden_layers=1, constant=False, offset=True, in_span=True):
    """A model of random parts, its gate an ensemble over standardised prompts."""
    parts = make_model(backbone)
    generator = torch.Generator().manual_seed(members)

    def some(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    gate = GatingNetwork(
        dim=backbone.dim,
        objectives=5,
        mixed=(0, 1, 2),
        members=members,
        hidden_dim=8,
        hidden_layers=hidden_layers,
        temperature=2.0,
    ).double()
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(some(*parameter.shape))
        if constant:
            gate.output.weight.zero_()
        gate.mean.copy_(some(backbone.dim))
        gate.scale.copy_(some(backbone.dim).abs() + 0.5)
    names = parts.objectives.names
    weights = parts.head_weights
    matrix = some(5, 5) @ weights if in_span else parts.adjusted_weights
    zeros = torch.zeros(5, dtype=torch.float64)
    return ArmoRewardModel(
        objectives=parts.objectives,
        backbone=backbone,
        heads=ObjectiveHeads(names, weights, parts.head_intercepts if offset else zeros),
        transform=RewardTransform(
            names,
            matrix,
            parts.adjusted_offset if offset else zeros,
            (),
            weights[:, :0],
            weights[:2, :0],
        ),
        gate=gate,
        beta=2.0,
    )


def configuration(folder):
    return json.loads((folder / "config.json").read_text())


def labels_of(folder, conversations, *, side="right", alone=False):
    """What plain Transformers gives for one padded batch, or for each conversation alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    batches = [[c] for c in conversations] if alone else [conversations]
    logits = []
    for batch in batches:
        inputs = tokenizer.apply_chat_template(
            batch, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            logits.append(model.eval()(**inputs).logits.double())
    return torch.cat(logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_published_checkpoint_goes_in_and_out_with_the_same_scores(tmp_path, side):
    source = write_checkpoint(tmp_path / "source")
    report = export_model(load(source), tmp_path / "out", format="armorm")
    assert report.lost == ()
    assert report.deviation < 1e-5
    expected = published_forward(source, CONVERSATIONS, side=side)
    got = published_forward(tmp_path / "out", CONVERSATIONS, side=side)
    torch.testing.assert_close(got["score"], expected["score"], atol=1e-5, rtol=0)
    torch.testing.assert_close(got["rewards"], expected["rewards"], atol=1e-5, rtol=0)
    before, after = all_tensors(source), all_tensors(tmp_path / "out")
    assert {name: t.shape for name, t in before.items()} == {n: t.shape for n, t in after.items()}
    old, new = configuration(source), configuration(tmp_path / "out")
    assert {**new, "auto_map": 0, "armo": 0, "label2id": 0} == {
        **old,
        "auto_map": 0,
        "armo": 0,
        "label2id": 0,
    }
    assert new["armo"]["gating_pattern"] == PATTERN


def test_a_checkpoint_of_qrm_becomes_one_of_armorm(tmp_path):
    source = write_checkpoint(tmp_path / "source", kind="qrm")
    export_model(load(source), tmp_path / "out", format="armorm")
    expected = published_forward(source, CONVERSATIONS)["score"]
    got = published_forward(tmp_path / "out", CONVERSATIONS)["score"]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("hidden_layers", [0, 1, 3])
def test_our_models_score_alike_in_the_published_layout(backbone, tmp_path, hidden_layers, side):
    model = model_of(backbone, hidden_layers=hidden_layers)
    report = export_model(model, tmp_path / "out", format="armorm")
    declared = configuration(tmp_path / "out")["armo"]
    pattern = declared["gating_pattern"]
    got = published_forward(tmp_path / "out", TALKS, side=side, pattern=pattern)
    out = model.score(TALKS)
    offsets, intercepts = [
        torch.tensor(declared[name], dtype=torch.float64)
        for name in ("adjusted_offsets", "reward_intercepts")
    ]
    near = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(got["gating_output"], out.gating_weights, **near)
    torch.testing.assert_close(got["score"] + got["gating_output"] @ offsets, out.score, **near)
    torch.testing.assert_close(got["rewards"] + intercepts, out.rewards, **near)
    assert bool((got["gating_output"][:, 3:] == 0).all()), "bias objectives get no weight"
    # What it lacks is said: a constant of the prompt, so responses to one prompt keep their gap.
    assert any("constant of the prompt" in sentence for sentence in report.lost)
    assert any("`rewards` lack the intercepts" in sentence for sentence in report.lost)
    assert any(str(pattern) in sentence for sentence in report.lost)
    gap = out.score[0] - out.score[1]
    torch.testing.assert_close(got["score"][0] - got["score"][1], gap, **near)


def test_padding_that_ends_turns_is_replaced_by_a_token_of_its_own(backbone, tmp_path):
    export_model(model_of(backbone), tmp_path / "out", format="armorm")
    before, after = backbone.model.config, configuration(tmp_path / "out")
    assert after["pad_token_id"] == after["vocab_size"] - 1 == before.vocab_size
    assert backbone.tokenizer.pad_token_id == before.pad_token_id != after["pad_token_id"]
    rows = all_tensors(tmp_path / "out")["model.embed_tokens.weight"]
    assert len(rows) == after["vocab_size"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token_id == after["pad_token_id"]
    assert len(backbone.model.embed_tokens.weight) == before.vocab_size, "the model stays"


def test_an_export_can_be_imported_again_with_all_that_the_layout_lacks(backbone, tmp_path):
    model = model_of(backbone)
    export_model(model, tmp_path / "out", format="armorm")
    again = load(tmp_path / "out", max_tokens=128, max_prompt_tokens=64)
    assert again.objectives == model.objectives
    assert float(again.beta) == 2.0
    ours, theirs = model.score(TALKS), again.score(TALKS)
    for name in ("score", "rewards", "adjusted", "gating_weights"):
        expected = getattr(ours, name)
        torch.testing.assert_close(getattr(theirs, name), expected, atol=1e-4, rtol=0)


def test_an_ensemble_becomes_one_gate_of_its_mean_logits_and_the_deviation_is_said(
    backbone, tmp_path
):
    model = model_of(backbone, members=3)
    report = export_model(model, tmp_path / "out", format="armorm")
    sentence = next(s for s in report.lost if "mean weights of 3" in s)
    prompts = torch.randn(6, backbone.dim).double()
    layers, exact = merge_members(model.gate)
    assert not exact
    # Slowly: the geometric mean of the members' weights, normalised.
    members = model.gate.member_weights(prompts)[..., :3]
    expected = members.log().mean(0).exp()
    expected = expected / expected.sum(1, keepdim=True)
    x = prompts
    for k, (weight, bias) in enumerate(layers):
        x = (x if k == 0 else x.relu()) @ weight.T + bias
    got = torch.softmax(x / 2.0, dim=1)
    torch.testing.assert_close(got[:, :3], expected)
    assert bool((got[:, 3:] == 0).all())
    said = float(sentence.split("deviate by ")[1].split()[0])
    assert said > 0.01
    pattern = configuration(tmp_path / "out")["armo"]["gating_pattern"]
    checks = [[{"role": r, "content": c} for r, c in check] for check in CHECKS[:2]]
    out = published_forward(tmp_path / "out", checks, pattern=pattern)["gating_output"]
    apart = float((out - model.score(checks).gating_weights).abs().max())
    assert said == pytest.approx(apart, rel=0.1)


def test_an_ensemble_of_constant_mixes_is_carried_exactly(backbone, tmp_path):
    model = model_of(backbone, members=3, constant=True, offset=False)
    report = export_model(model, tmp_path / "out", format="armorm")
    assert not any("mean weights" in sentence for sentence in report.lost)
    pattern = configuration(tmp_path / "out")["armo"]["gating_pattern"]
    got = published_forward(tmp_path / "out", TALKS, pattern=pattern)["score"]
    torch.testing.assert_close(got, model.score(TALKS).score, atol=1e-4, rtol=0)


def test_adjusted_rewards_that_no_matrix_makes_of_the_raw_ones_take_their_place(backbone, tmp_path):
    model = model_of(backbone, offset=False, in_span=False)
    report = export_model(model, tmp_path / "out", format="armorm")
    assert any("`rewards` are the adjusted rewards" in sentence for sentence in report.lost)
    pattern = configuration(tmp_path / "out")["armo"]["gating_pattern"]
    got = published_forward(tmp_path / "out", TALKS, pattern=pattern)
    out = model.score(TALKS)
    torch.testing.assert_close(got["score"], out.score, atol=1e-4, rtol=0)
    torch.testing.assert_close(got["rewards"], out.adjusted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("side", "alone"), [("left", False), ("right", False), ("right", True)])
def test_labels_are_the_adjusted_rewards_by_objective(backbone, tmp_path, side, alone):
    model = model_of(backbone, members=3)
    report = export_model(model, tmp_path / "out", format="labels")
    config = configuration(tmp_path / "out")
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert [config["id2label"][str(k)] for k in range(5)] == [*model.objectives.names]
    assert config["problem_type"] == "regression"
    assert "auto_map" not in config
    labels = labels_of(tmp_path / "out", TALKS, side=side, alone=alone)
    offsets = torch.tensor(config["armo"]["adjusted_offsets"], dtype=torch.float64)
    out = model.score(TALKS)
    torch.testing.assert_close(labels + offsets, out.adjusted, atol=1e-4, rtol=0)
    score = (out.gating_weights * (labels + offsets)).sum(1)
    torch.testing.assert_close(score, out.score, atol=1e-4, rtol=0)
    assert any(sentence.startswith("the gate") for sentence in report.lost)
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(sentence in card for sentence in report.lost)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_single_label_is_the_score_at_the_weights_given(backbone, tmp_path, side):
    model = model_of(backbone)
    weights = {"helpfulness": 3, "honesty": 1}
    report = export_model(model, tmp_path / "out", format="single", weights=weights)
    assert report.weights == {"helpfulness": 0.75, "honesty": 0.25}
    label = labels_of(tmp_path / "out", TALKS, side=side)[:, 0]
    constant = configuration(tmp_path / "out")["armo"]["score_offset"]
    expected = model.score(TALKS, weights=weights).score
    torch.testing.assert_close(label + constant, expected, atol=1e-4, rtol=0)
    assert configuration(tmp_path / "out")["id2label"] == {"0": "score"}


def test_the_tokenizer_can_be_read_by_older_libraries_as_well(backbone, tmp_path):
    export_model(model_of(backbone), tmp_path / "out", format="labels")
    spelt = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert spelt["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert spelt["chat_template"] == (tmp_path / "out" / "chat_template.jinja").read_text()
    assert spelt["model_input_names"] == ["input_ids", "attention_mask"]
    assert not isinstance(spelt.get("extra_special_tokens"), list)  # 4 takes names for them


def test_older_libraries_read_the_same_rotary_embedding(backbone, tmp_path):
    """Transformers 4 knows no `rope_parameters`, and would take its default of 10000."""
    ropes = backbone.model.config.rope_parameters
    export_model(model_of(backbone), tmp_path / "out", format="labels")
    written = configuration(tmp_path / "out")
    assert written["rope_theta"] == ropes["rope_theta"]
    assert written["rope_scaling"] is None


def test_all_files_may_be_read_by_whoever_may_read_the_configuration(backbone, tmp_path):
    export_model(model_of(backbone), tmp_path / "out", format="labels")
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "out" / "config.json").stat().st_mode & 0o777}


def test_objectives_that_hardly_differ_keep_their_score(backbone, tmp_path):
    made = model_of(backbone, offset=False)
    with torch.no_grad():
        made.head_weights[1] = made.head_weights[0] * (1 + 1e-9)
    report = export_model(made, tmp_path / "out", format="armorm")
    assert any("`rewards` are the adjusted rewards" in sentence for sentence in report.lost)
    pattern = configuration(tmp_path / "out")["armo"]["gating_pattern"]
    got = published_forward(tmp_path / "out", TALKS, pattern=pattern)["score"]
    torch.testing.assert_close(got, made.score(TALKS).score, atol=1e-4, rtol=0)


def test_a_single_label_takes_the_mean_weights_on_the_prompts_of_the_pairs(backbone, tmp_path):
    model = model_of(backbone, members=2)
    report = export_model(model, tmp_path / "out", format="single", pairs=PAIRS)
    talks = [conversation(p.prompt[0].content, p.chosen) for p in PAIRS]
    mean = model.score(talks).gating_weights.mean(0)
    assert [*report.weights.values()] == pytest.approx(mean[:3].tolist(), abs=1e-5)


def test_what_a_format_costs_is_counted_on_pairs(backbone, tmp_path):
    model = model_of(backbone, members=2)
    report = export_model(
        model, tmp_path / "out", format="single", weights={"harm": 1}, pairs=PAIRS
    )
    right, right_out, other = [], [], 0
    for pair in PAIRS:
        prompt = pair.prompt[0].content
        talks = [conversation(prompt, text) for text in (pair.chosen, pair.rejected)]
        ours, theirs = model.score(talks).score, labels_of(tmp_path / "out", talks)[:, 0]
        right.append(float(ours[0] > ours[1]))
        right_out.append(float(theirs[0] > theirs[1]))
        other += right[-1] != right_out[-1]
    assert report.cost.own.tolist() == right
    assert report.cost.exported.tolist() == right_out
    assert report.cost.reordered == pytest.approx(other / len(PAIRS))
    assert 0 < other < len(PAIRS), "the comparison can fail"


def test_without_weights_or_pairs_it_is_the_weights_of_the_average_training_prompt(
    backbone, tmp_path
):
    model = model_of(backbone, members=2)
    report = export_model(model, tmp_path / "out", format="single")
    expected = model.gate(model.gate.mean)[:3].tolist()
    assert [*report.weights.values()] == pytest.approx(expected)
    assert report.cost is None
    unknown = write_checkpoint(tmp_path / "source")
    with pytest.raises(ExportError, match=r"needs `weights=.*does not know its average"):
        export_model(load(unknown), tmp_path / "other", format="single")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("format", ["armorm", "labels", "single"])
def test_style_that_is_measured_on_the_text_is_said_to_be_lost_and_by_how_much(
    backbone, tmp_path, format
):
    parts = make_model(backbone, covariates=("bold", "log_length"))
    parts.covariate_range.copy_(torch.tensor([[5.0, 20.0], [6.0, 30.0]]))
    weights = {"honesty": 1} if format == "single" else None
    report = export_model(parts, tmp_path / "out", format=format, weights=weights)
    sentence = next(s for s in report.lost if s.startswith("style stays in the score"))
    assert "bold, log_length" in sentence
    checks = [[{"role": r, "content": c} for r, c in check] for check in CHECKS[:2]]
    columns = [SURFACE_FEATURES.index(name) for name in ("bold", "log_length")]
    measured = surface_features([talk[-1]["content"] for talk in checks])[:, columns].double()
    style = style_part(measured, parts.adjusted_style, parts.covariate_range)
    assert not torch.allclose(style, measured @ parts.adjusted_style.T)
    moved = parts.score(checks, weights=weights).gating_weights * style
    said = float(sentence.split("up to ")[1])
    assert said == pytest.approx(float(moved.sum(1).abs().max()), rel=0.1)


@pytest.mark.parametrize(
    ("kind", "template"), [("qwen2", "qwen2.5"), ("gemma2", "gemma2"), ("mistral", "mistral-v0.2")]
)
def test_other_families_are_exported_as_their_own_classes(kind, template, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EMBED))
    import models
    import templates

    wide = {"max_tokens": 400, "max_prompt_tokens": 300}
    family = next(f for f in templates.families() if f.name == template)
    folder = tmp_path / "backbone"
    models.build(kind, vocab_size=1000).save_pretrained(folder)
    family.tokenizer.save_pretrained(folder)
    model = model_of(read_with(folder, prompt_position="generation_prompt", **wide))
    report = export_model(model, tmp_path / "out", format="labels")
    assert report.deviation < 1e-3
    config = configuration(tmp_path / "out")
    assert config["architectures"][0].lower() == f"{kind}forsequenceclassification"
    offsets = torch.tensor(config["armo"]["adjusted_offsets"], dtype=torch.float64)
    labels = labels_of(tmp_path / "out", TALKS)
    torch.testing.assert_close(labels + offsets, model.score(TALKS).adjusted, atol=1e-3, rtol=0)
    with pytest.raises(
        ExportError, match=f"has a Llama trunk, .* is '{kind}'; use `format=labels`"
    ):
        export_model(model, tmp_path / "other", format="armorm")


def test_what_a_format_cannot_carry_is_refused_in_one_line(encoder, causal_folder, tmp_path):
    with pytest.raises(ExportError, match=r"is an encoder, .* no format can carry it"):
        export_model(make_model(encoder), tmp_path / "out", format="labels")
    middle = model_of(read_with(causal_folder, layers=(1,)))
    with pytest.raises(ExportError, match=r"the model reads last of layers \[1\]"):
        export_model(middle, tmp_path / "out", format="labels")
    opened = model_of(read_with(causal_folder, prompt_position="generation_prompt"))
    with pytest.raises(ExportError, match="this model at generation_prompt; train with"):
        export_model(opened, tmp_path / "out", format="armorm")
    assert not [*tmp_path.iterdir()]


def test_a_model_folder_that_holds_its_backbone_is_exported_without_the_original(
    causal_folder, tmp_path
):
    folder = shutil.copytree(causal_folder, tmp_path / "backbone")
    model_of(read_with(folder)).save_pretrained(tmp_path / "model", include_backbone=True)
    shutil.rmtree(folder)
    model = ArmoRewardModel.from_pretrained(tmp_path / "model", device="cpu", batch_tokens=256)
    assert export_model(model, tmp_path / "out", format="labels").deviation < 1e-3


def test_a_folder_that_is_in_use_is_not_written_to(backbone, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(ExportError, match="exists already"):
        export_model(model_of(backbone), tmp_path / "out", format="labels")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(ExportError, match="`weights` are for `format=single`"):
        export_model(model_of(backbone), tmp_path / "new", format="labels", weights={"harm": 1})


def test_an_export_that_does_not_give_what_it_should_is_not_left_behind(
    backbone, tmp_path, monkeypatch
):
    model = model_of(backbone)
    write = AutoTokenizer.from_pretrained

    def other(folder, **settings):
        tokenizer = write(folder, **settings)
        if Path(folder).parent == tmp_path:  # the export, read back
            tokenizer.chat_template = "{{ messages[-1]['content'] }}"
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", other)
    with pytest.raises(ExportError, match=r"deviates by .* on \d conversations"):
        export_model(model, tmp_path / "out", format="labels")
    assert not [*tmp_path.iterdir()]


def test_a_backbone_in_bfloat16_stays_in_it_and_its_heads_do_not(causal_folder, tmp_path):
    model = model_of(read_with(causal_folder, dtype="bfloat16"))
    export_model(model, tmp_path / "out", format="labels")
    tensors = all_tensors(tmp_path / "out")
    assert tensors["model.norm.weight"].dtype == torch.bfloat16
    assert tensors["score.weight"].dtype == torch.float32


def test_the_commands_import_verify_export_and_measure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write_checkpoint(tmp_path / "Some-RM")
    status, out, err = run("import", f"source={source}", "device=cpu")
    assert status == 0, err
    assert "saved checkpoints/Some-RM: 19 objectives" in out
    folder = tmp_path / "checkpoints" / "Some-RM"
    assert {file.name for file in folder.iterdir()} >= {"config.json", "golden.json", "README.md"}
    assert run("verify", f"model={folder}", "device=cpu")[0] == 0
    rows = [
        {
            "id": pair.id,
            "source": "s",
            "prompt": [{"role": "user", "content": pair.prompt[0].content}],
            "chosen": pair.chosen,
            "rejected": pair.rejected,
        }
        for pair in PAIRS
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for format in ("armorm", "labels", "single"):
        arguments = [f"model={folder}", f"format={format}", "device=cpu"]
        status, out, err = run(
            "export", *arguments, f"output={tmp_path / format}", "input=pairs.jsonl"
        )
        assert status == 0, err
        assert "loaded again with plain Transformers: right to" in out
        assert "the model is ahead by" in out
        assert "Accuracy on 12 pairs" in out
        assert (tmp_path / format / "config.json").exists()
    assert "weights: helpsteer-helpfulness" in out
    assert "not in this format: the gate" in out
    status, out, err = run(
        "export", *arguments[:1], "format=labels", f"output={tmp_path / 'more'}", "device=cpu"
    )
    assert "was not measured" in out
    for verb in (["import", f"source={source}"], ["export", *arguments, "output=labels"]):
        status, _, err = run(*verb)
        assert status == 1
        assert "exists already; choose another `output`" in err
    status, _, err = run("export", f"model={folder}", "format=onnx", f"output={tmp_path / 'x'}")
    assert status == 1
    assert "`format` must be armorm, labels, single, got 'onnx'" in err
    assert run("import")[0] == run("export", f"model={folder}")[0] == 2


def test_the_commands_name_what_is_wrong_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write_checkpoint(tmp_path / "rm")
    change_config(source, gating_temperature=None)
    status, _, err = run("import", f"source={source}", "device=cpu")
    assert status == 1
    assert "`gating_temperature` is missing" in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "checkpoints").exists()


def test_a_model_with_a_name_for_each_tensor_is_written_in_safetensors_alone(backbone, tmp_path):
    export_model(model_of(backbone), tmp_path / "out", format="armorm")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert load_file(tmp_path / "out" / "model.safetensors")["gating.logit_scale"].tolist() == [1.0]
    assert dataclasses.is_dataclass(
        export_model(model_of(backbone), tmp_path / "b", format="labels")
    )
