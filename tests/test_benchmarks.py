"""The benchmarks run, say all that they promise, and compare like with like; nothing is timed."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from armo.data.conversation import Message, PreferencePair
from armo.data.sources import load_ratings
from armo.embed.plan import Plan, SharedPrefix, Span, TokenSequence

FOLDER = Path(__file__).parents[1] / "benchmarks"
EMBED = {
    "minilm_vs_one_at_a_time",
    "minilm_vs_sentence_transformers",
    "minilm_gemm_share",
    "padding_waste",
    "llama_pairs_vs_one_at_a_time",
    "llama_best_of_16_vs_separate",
}
RIDGE = {"ridge_vs_sklearn_loop", "ridge_stream_peak_gb"}
EVALUATE = {
    "bootstrap_ten_models_s",
    "bootstrap_lines_s",
    "abstention_ten_models_s",
    "evaluate_overhead_share",
}
SERVER = {
    "server_vs_offline_throughput",
    "overload_lost",
    "overload_p99_ratio",
    "soak_memory_growth_mb",
    "malformed_5xx",
}
DATA = {"million_rows_s", "million_rows_peak_gb"}
GATE = {"gate_time_to_accuracy_vs_reference"}
EMBED_GPU = {"llama8b_tokens_per_s", "llama8b_gemm_share", "llama8b_vs_one_at_a_time"}


def load(name):
    """A benchmark as a module; it is a program, and in no package, beside what it imports."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def embed():
    return load("embed")


@pytest.fixture(scope="module")
def embed_gpu():
    return load("embed_gpu")


@pytest.fixture(scope="module")
def gate():
    return load("gate")


def run(name, folder):
    """Run a benchmark alone, from another folder, and return what it printed and wrote."""
    command = [sys.executable, FOLDER / f"{name}.py", "--tiny", "--json", "figures.json"]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "figures.json").read_text())


def check(figures):
    for figure in figures.values():
        assert set(figure) == {"value", "unit", "baseline", "goal"}
        assert math.isfinite(figure["value"])
        assert figure["value"] >= 0
        assert isinstance(figure["unit"], str)
        assert figure["baseline"] is None or math.isfinite(figure["baseline"])
        assert figure["goal"] is None or figure["goal"] > 0


def pair(number, prompt, chosen="good", rejected="bad"):
    return PreferencePair(f"{number}", "test", (Message("user", prompt),), chosen, rejected)


def test_embed_gives_every_figure_and_checks_that_both_ways_embed_alike(tmp_path):
    printed, figures = run("embed", tmp_path)
    expected = set(EMBED)
    if importlib.util.find_spec("sentence_transformers") is None:
        expected.remove("minilm_vs_sentence_transformers")
    assert set(figures) == expected
    assert all(name in printed for name in EMBED)
    check(figures)
    assert figures["padding_waste"]["value"] < figures["padding_waste"]["baseline"]


def test_embed_gpu_runs_a_tiny_shape_on_a_cpu(tmp_path):
    printed, figures = run("embed_gpu", tmp_path)
    assert set(figures) == EMBED_GPU
    assert "tiny" in printed
    check(figures)


def test_score_gives_every_figure(tmp_path):
    printed, figures = run("score", tmp_path)
    goals = {"head_overhead_share": 0.02, "load_overhead_s": 0.3, "import_overhead_s": 0.2}
    assert set(figures) == {*goals, "surface_share"}
    assert {name: figures[name]["goal"] for name in goals} == goals
    assert all(name in printed for name in figures)
    check(figures)


def test_server_gives_every_figure_loses_nothing_and_never_fails(tmp_path):
    printed, figures = run("server", tmp_path)
    assert set(figures) == SERVER
    assert all(name in printed for name in SERVER)
    assert figures["overload_lost"]["value"] == figures["malformed_5xx"]["value"] == 0
    assert figures["overload_lost"]["baseline"] > 10
    assert figures["server_vs_offline_throughput"]["value"] > 0.2


def test_evaluate_gives_every_figure_and_stops_where_the_loop_finds_other_intervals(tmp_path):
    printed, figures = run("evaluate", tmp_path)
    assert set(figures) == EVALUATE
    assert all(name in printed for name in EVALUATE)
    assert figures["bootstrap_ten_models_s"]["goal"] == 5.0
    assert figures["bootstrap_ten_models_s"]["baseline"] > 0.0
    check(figures)
    evaluate = load("evaluate")
    credits = (evaluate.draw_differences(evaluate.TINY) > 0.0).double()
    means, gains = evaluate.loop(credits, 50)
    whole, prompts = torch.ones(1, 1, dtype=torch.float64), torch.arange(60)
    found = evaluate.bootstrap_estimates(credits[..., None], whole, prompts, draws=50)
    evaluate.check_same(found, means, gains)
    with pytest.raises(SystemExit, match="do not give the same intervals"):
        evaluate.check_same(found, means, gains + 1e-9)


def test_ridge_gives_every_figure_and_checks_that_both_ways_choose_alike(tmp_path):
    printed, figures = run("ridge", tmp_path)
    assert set(figures) == RIDGE
    assert "19 of 19" in printed
    check(figures)


def test_other_penalties_or_weights_stop_the_ridge_comparison():
    ridge = load("ridge")
    one = ridge.Chosen([1.0, 10.0], np.eye(2))
    ridge.check_same(one, ridge.Chosen([1.0, 10.0], np.eye(2) + 1e-8))
    with pytest.raises(SystemExit, match="only 1 of 2 penalties"):
        ridge.check_same(one, ridge.Chosen([1.0, 1.0], np.eye(2)))
    with pytest.raises(SystemExit, match="weights part"):
        ridge.check_same(one, ridge.Chosen([1.0, 10.0], np.eye(2) + 1e-3))


def test_data_gives_every_figure_of_rows_that_are_written_again_as_they_are(tmp_path):
    printed, figures = run("data", tmp_path)
    assert set(figures) == DATA
    assert "carried on from 50 and 200 rows" in printed
    check(figures)
    data = load("data")
    assert data.carried_on([1_000, 2_000], [1.0, 3.0]) == pytest.approx(3.0 + 998 * 2.0)
    assert data.carried_on([data.MILLION], [7.0]) == 7.0
    data.write_rows(tmp_path / "rows.jsonl", 200)
    data.PROCESSES = 1
    data.check_file(tmp_path / "rows.jsonl")
    (tmp_path / "rows.again").rename(tmp_path / "again.jsonl")
    rows, again = (
        load_ratings(str(tmp_path / name), objectives=data.OBJECTIVES)
        for name in ("rows.jsonl", "again.jsonl")
    )
    assert rows == again


def test_gate_gives_its_figure_and_tells_the_accuracy_of_both(tmp_path):
    printed, figures = run("gate", tmp_path)
    assert set(figures) == GATE
    for line in ("at the end", "at best", "the best constant mix", "the true weights"):
        assert f"accuracy of {line}" in printed or f"accuracy {line}" in printed
    check(figures)


def trained(gate, accuracies, seconds):
    curve = gate.Curve(None, seconds=list(seconds), accuracies=list(accuracies))
    return gate.Trained(seconds[-1], accuracies[-1], curve)


def test_a_gate_that_is_never_as_good_as_the_reference_has_no_advantage(gate):
    reference = trained(gate, [0.8, 0.7], [10.0, 20.0])
    assert gate.advantage(trained(gate, [0.6, 0.7], [1.0, 2.0]), reference) == 10.0
    assert gate.advantage(trained(gate, [0.9, 0.69], [1.0, 2.0]), reference) == 0.0
    assert reference.curve.first(0.7) == 10.0
    assert reference.curve.first(0.81) == gate.NEVER
    assert gate.told(gate.NEVER, "s") == "never"


def test_a_missed_accuracy_is_shown_and_saved_as_zero(gate, monkeypatch, tmp_path):
    worse = trained(gate, [0.5], [1.0])
    summary = SimpleNamespace(constant_weights={f"{k}": 1 / 19 for k in range(19)}, kept="gate")
    worse = dataclasses.replace(worse, summary=summary)
    monkeypatch.setattr(gate, "train_ours", lambda *_, **__: worse)
    monkeypatch.setattr(gate, "train_reference", lambda *_, **__: trained(gate, [0.6], [9.0]))
    figures = gate.gate_figures(gate.TINY)
    assert "MISSED" in figures[0].note
    gate.save(figures, tmp_path / "figures.json")
    [saved] = json.loads((tmp_path / "figures.json").read_text()).values()
    assert saved == {"value": 0.0, "unit": "x", "baseline": 9.0, "goal": 5.0}


def test_the_reference_gate_weighs_objectives_and_drops_units_of_each_response_apart(gate):
    reference = gate.ReferenceGate(dim=8, hidden_dim=32)
    with torch.no_grad():
        reference.logit_scale.fill_(2.0)
    twice = torch.randn(5, 1, 8).repeat(1, 2, 1)
    torch.testing.assert_close(reference(twice).sum(-1), torch.full((5, 2), 2.0))
    chosen, rejected = reference(twice).unbind(1)
    assert (chosen != rejected).any()
    chosen, rejected = reference.eval()(twice).unbind(1)
    torch.testing.assert_close(chosen, rejected)


def test_both_gates_are_judged_on_prompts_that_neither_is_trained_on(gate):
    train, held = gate.draw_pairs(2_000, 32, seed=1)
    again, _ = gate.draw_pairs(2_000, 32, seed=1)
    assert len(train.prompt_of) == 1_600
    assert len(held.prompt_of) == 400
    torch.testing.assert_close(train.rewards, again.rewards, rtol=0, atol=0)
    for part in (train, held):
        assert part.prompt_of.unique().tolist() == list(range(len(part.prompts)))
        torch.testing.assert_close(part.weights.sum(1), torch.ones(len(part.weights)))
    assert not {tuple(row) for row in train.prompts.tolist()} & {
        tuple(row) for row in held.prompts.tolist()
    }
    assert train.accuracy(train.weights) > train.accuracy(train.weights.mean(0)) > 0.6


def test_preferences_of_the_gate_hold_the_pairs_that_the_reference_is_given(gate):
    train, _ = gate.draw_pairs(100, 16)
    batch = train.as_preferences()[torch.arange(80)]
    torch.testing.assert_close(batch.adjusted, train.rewards)
    torch.testing.assert_close(batch.prompts, train.prompts[train.prompt_of])


@pytest.mark.skipif(torch.cuda.is_available(), reason="refuses only where there is no GPU")
def test_embed_gpu_measures_nothing_without_a_gpu(embed_gpu, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["embed_gpu.py"])
    with pytest.raises(SystemExit, match="no GPU"):
        embed_gpu.main()


def test_without_sentence_transformers_its_line_says_so_and_the_file_leaves_it_out(
    embed, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    figures = embed.sentence_transformers_figure([], embed.TINY)
    assert [figure.value for figure in figures] == [None]
    assert "not installed" in figures[0].note
    embed.save(figures, tmp_path / "figures.json")
    assert json.loads((tmp_path / "figures.json").read_text()) == {}


def test_pairs_are_taken_from_each_file_in_turn(embed, tmp_path):
    for name, count in (("a", 3), ("b", 1), ("c", 2)):
        rows = [
            {"id": f"{name}{k}", "prompt": "Why?", "chosen": f"{k}", "rejected": "no"}
            for k in range(count)
        ]
        for row in rows:
            row |= {"source": name, "prompt": [{"role": "user", "content": "Why?"}]}
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    taken = [row.id for row in embed.mixed_pairs(str(tmp_path), 5)]
    assert taken == ["a0", "b0", "c0", "a1", "c1"]


def test_a_slice_has_all_rows_of_its_prompts_and_each_text_once(embed):
    rows = [pair(k, f"prompt {k % 10}", f"good {k % 20}") for k in range(40)]
    parts = embed.slices(rows, prompts=5, turns=2)
    for part in parts:
        assert len(part.groups) == 5
        assert len(part.conversations) == 5 * 4 * 2
        texts = [(group.prompt, text) for group in part.groups for text in group.responses]
        assert len(texts) == len(set(texts)) == 5 * 3
        prompts, responses = part.place()
        for (prompt, text), p, r in zip(part.conversations, prompts, responses, strict=True):
            assert part.groups[p].prompt == prompt
            assert texts[r] == (prompt, text)
    first, second = ({group.prompt for group in part.groups} for part in parts)
    assert not first & second


def test_other_embeddings_stop_a_comparison(embed):
    rows = torch.eye(3)
    embed.check_close(rows, rows + 1e-6)
    with pytest.raises(SystemExit, match="same embeddings"):
        embed.check_close(rows, rows + 1e-3)


def counted_flops(model, *lengths):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for length in lengths:
            model(input_ids=torch.zeros(1, length, dtype=torch.long))
    return counter.get_total_flops()


def test_flops_of_an_encoder_are_those_that_torch_counts(embed):
    config = BertConfig(
        vocab_size=10,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=40,
        attn_implementation="eager",
    )
    model = BertModel(config, add_pooling_layer=False)
    assert embed.encoder_flops(config, [7, 12]) == counted_flops(model, 7, 12)


def test_flops_of_a_plan_are_those_that_torch_counts_less_the_masked_half(embed_gpu):
    work = embed_gpu.TINY
    config = LlamaConfig(
        vocab_size=10,
        hidden_size=work.width,
        intermediate_size=work.feed,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_key_value_heads=work.kv_heads,
        attn_implementation="eager",
    )
    whole = Plan(1, 1, sequences=[TokenSequence([1] * 30, (Span(1, 29, 30),))])
    masked = work.layers * 2 * work.width * 30 * 30
    counted = counted_flops(LlamaModel(config), 30) - masked
    # Some versions make the rotary angles by a product as well, a ten-thousandth of the whole.
    assert embed_gpu.plan_flops(work, whole) == pytest.approx(counted, rel=2e-4)
    prefix = TokenSequence([1] * 20, (Span(0, 19, 20),))
    shared = Plan(1, 1, shared=[SharedPrefix(prefix, [TokenSequence([1] * 10, ())])])
    assert embed_gpu.plan_flops(work, shared) == embed_gpu.plan_flops(work, whole)


def test_lengths_are_drawn_alike_every_time(embed_gpu):
    groups = embed_gpu.draw_groups(50, seed=3)
    assert groups == embed_gpu.draw_groups(50, seed=3)
    assert groups != embed_gpu.draw_groups(50, seed=4)
    assert all(len(group.responses) in embed_gpu.RESPONSES for group in groups)


@pytest.fixture(scope="module")
def finished(encoder_folder, tmp_path_factory):
    """A finished run on sixty prompts: its folder."""
    from test_cli import run as armo
    from test_stages import write_data

    rows, folder = tmp_path_factory.mktemp("rows"), tmp_path_factory.mktemp("run")
    write_data(rows)
    status, _, err = armo(
        *("train", "experiment=smoke", "data/benchmark=none", f"output_dir={folder}"),
        *("data/ratings=jsonl", f"data.ratings.path={rows / 'ratings.jsonl'}"),
        *("data/pairs=jsonl", f"data.pairs.path={rows / 'pairs.jsonl'}"),
        *(f"embed.backbone.spec.id={encoder_folder}", "embed.backbone.spec.revision=null"),
        *("embed.backbone.spec.digest=null", "embed.backbone.spec.layers=[1,2]"),
        *("embed.backbone.spec.max_tokens=96", "embed.backbone.spec.max_prompt_tokens=40"),
        *("embed.backbone.device=cpu", "report.device=cpu", "fit.gating.progress=false"),
    )
    assert status == 0, err
    return folder


def designs(finished, folder, *more):
    """Run the comparison of gates; return what it printed and wrote."""
    command = [sys.executable, FOLDER / "gate_designs.py", "--run", finished, "--max-epochs", "20"]
    command += ["--json", folder / "figures.json", "--markdown", folder / "tables.md", *more]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "figures.json").read_text())


@pytest.mark.filterwarnings("default::armo.fit.decorrelation.DecorrelationWarning")
def test_gate_designs_are_compared_on_a_finished_run(finished, tmp_path):
    only = "layer 1,dim 16,clusters,one member,not reweighted by style"
    printed, figures = designs(
        finished, tmp_path, "--only", only, "--seeds", "2", "--plot", tmp_path / "designs.svg"
    )
    assert list(figures["setups"]) == ["decorrelated", "undecorrelated"]
    expected = {"default", "layer 1 alone", "mixes of 8 clusters of prompts", "hidden dim 16"}
    for setup, found in figures["setups"].items():
        rows = found["designs"]
        own = {"pairs not reweighted by style"} if setup == "decorrelated" else set()
        assert set(rows) == expected | {"one member"} | own
        assert all(0.0 <= row["accuracy"] <= 1.0 for row in rows.values())
        assert all(row["gain"][1] <= row["gain"][0] <= row["gain"][2] for row in rows.values())
        assert rows["default"]["over the default"] == [0.0, 0.0, 0.0]
        # It is the default, but for who scores; and nothing held out can judge the clusters.
        out = "out-of-fold accuracy gain"
        assert rows["one member"][out] == rows["default"][out]
        assert rows["mixes of 8 clusters of prompts"][out] is None
        assert set(found["references"]) == {
            *("constant mix of the default", "linear probe", "uniform mix", "length and format")
        }
    assert "hidden dim 16" in printed
    assert "| net | hidden dim 16 |" in (tmp_path / "tables.md").read_text()
    assert "<svg" in (tmp_path / "designs.svg").read_text()


@pytest.mark.filterwarnings("default::armo.fit.decorrelation.DecorrelationWarning")
@pytest.mark.parametrize(
    ("name", "settings", "columns"),
    [
        ("learning rate 0.003", {"learning_rate": 3e-3}, slice(None)),
        ("layer 2 alone", {}, slice(16, 32)),
    ],
)
def test_figures_of_a_gate_design_are_those_found_by_hand(
    finished, tmp_path, name, settings, columns
):
    import lightning as L

    from armo.embed.extract import EmbeddedData
    from armo.fit.decorrelation import load_transforms
    from armo.fit.heads import FittedHeads
    from armo.fit.training import fit_gating
    from armo.stages import training_preferences

    only = ("--setup", "decorrelated", "--only", name, "--seeds", "1")
    _, figures = designs(finished, tmp_path, *only)
    found = figures["setups"]["decorrelated"]["designs"][name]

    data = EmbeddedData.load(finished / "embeddings")
    heads = FittedHeads.load(finished / "heads")
    transforms = load_transforms(finished / "decorrelation")
    preferences = training_preferences(data, heads, transforms, source_weights={})
    gate, summary = fit_gating(
        dataclasses.replace(preferences, prompts=preferences.prompts[:, columns]),
        objectives=data.objectives.names,
        mixed=data.objectives.mixed_indices,
        folder=tmp_path,
        trainer=lambda **more: L.Trainer(accelerator="cpu", max_epochs=20, **more),
        progress=False,
        keep="gate",
        patience=4,
        **settings,
    )
    tables, right, constant_right, quarters = data.tables, [], [], {}
    features = transforms.transform.covariates
    constant = torch.tensor(list(summary.constant_weights.values()), dtype=torch.float64)
    for pair in tables.pairs_test.nonzero()[:, 0].tolist():
        two = torch.stack([tables.pairs_chosen[pair], tables.pairs_rejected[pair]])
        rewards = transforms.transform.adjusted(data.responses.read(two), data.style(two, features))
        with torch.no_grad():
            [weights] = gate(data.prompt_embeddings(two[:1])[:, columns]).double()
        right.append(float((rewards[0] - rewards[1]) @ weights > 0))
        constant_right.append(float((rewards[0] - rewards[1]) @ constant > 0))
        length = data.style(two, ["log_length"])[:, 0]
        marks = data.style(two, ["list_items", "bold"]).sum(1)  # the only ones in these texts
        for kind, values in (("length", length), ("marks", marks)):
            if values[0] != values[1]:
                quarters.setdefault((kind, bool(values[0] > values[1])), []).append(right[-1])
    accuracy = sum(right) / len(right)
    assert found["accuracy"] == pytest.approx(accuracy)
    assert found["constant mix"] == pytest.approx(sum(constant_right) / len(right))
    assert found["gain"][0] == pytest.approx(accuracy - sum(constant_right) / len(right))
    assert found["epoch"] == sum(summary.epochs) / len(summary.epochs)
    four = [sum(quarter) / len(quarter) for quarter in quarters.values()]
    assert found["mean of the four"] == pytest.approx(sum(four) / len(four))
    gain = summary.loss_gain
    assert found["out-of-fold loss gain"] == pytest.approx([gain.mean, gain.low, gain.high])
    assert gain.mean != 0.0


def test_gains_of_a_gate_design_are_over_its_own_constant_mix_and_over_the_default():
    from armo.fit.training import Gain

    program = load("gate_designs")

    class Drawn(program.Trial):
        """Four pairs of two prompts; the first objective is right in the first two."""

        def __init__(self):
            self.differences = torch.tensor([[1.0, -1.0]] * 2 + [[-1.0, 1.0]] * 2).double()
            self.probe = torch.tensor([1.0, 1.0, 1.0, -1.0])
            self.groups = torch.tensor([0, 0, 1, 1])

        def mean_of_four(self, credit):
            return float(credit.mean())

    first, second = torch.eye(2, dtype=torch.float64)
    summary = SimpleNamespace(
        accuracy_gain=Gain(0.02, 0.01), loss_gain=Gain(0.2, 0.1), epochs=(1, 2)
    )

    def fitted(*weights, constant):
        return program.Fitted(torch.stack(weights), constant, summary, 2.0)

    half = (first + second) / 2
    default = [fitted(first, first, first, first, constant=half)]
    fits = [
        fitted(first, first, second, second, constant=first),
        fitted(first, first, second, first, constant=first),
    ]
    variant = program.Variant("net", "drawn")
    found = program.figures_of(Drawn(), fits, variant=variant, default=default)
    assert found["accuracy"] == found["mean of the four"] == 0.875
    assert found["constant mix"] == 0.5
    assert found["gain"] == [0.375, 0.0, 0.75]  # all of it with the second prompt
    assert found["over the default"][0] == 0.375
    assert found["over the default's constant mix"][0] == 0.375  # all ties, which count half
    assert found["over the probe"][0] == 0.125
    assert found["deviation"] == 0.125
    assert found["out-of-fold accuracy gain"] == pytest.approx([0.02, 0.0004, 0.0396])
    assert (found["epoch"], found["seconds"]) == (1.5, 2.0)
    peeking = program.Variant("low rank", "drawn", peeks=True)
    found = program.figures_of(Drawn(), fits, variant=peeking, default=default)
    assert found["out-of-fold loss gain"] is None


def test_best_of_n_scores_by_the_run_and_keeps_prompts_that_it_was_not_fitted_on(
    finished, tmp_path
):
    from armo.artifacts import MANIFEST, read_json
    from armo.data.objectives import Objective
    from armo.data.rated_lists import load_rated_lists
    from armo.embed.extract import EmbeddedData
    from armo.embed.lists import embed_lists
    from armo.fit.training import load_gating
    from armo.model.reward_model import ArmoRewardModel
    from armo.report.scoring import score_lists

    program = load("best_of_n")
    manifest = read_json(finished / "embeddings" / MANIFEST)
    [path] = [path for path in manifest["inputs"] if path.endswith("ratings.jsonl")]
    read = load_rated_lists(path, gold=Objective("honesty", 1, 5), min_responses=2)
    lists = program.held_out(read, test_fraction=0.2)
    tested = EmbeddedData.load(finished / "embeddings").tables.ratings_test
    assert len(lists.gold) == int(tested.sum()) == 24

    model = ArmoRewardModel.from_pretrained(finished / "model", device="cpu")
    embedded = embed_lists(tmp_path / "lists", lists.rows, backbone=model.backbone)
    found = program.scores_of(finished, embedded)
    assert tuple(found) == tuple(name for name in program.SCORES)
    torch.testing.assert_close(
        found["gate"], score_lists(model, embedded).score, rtol=1e-5, atol=1e-6
    )
    _, summary = load_gating(finished / "gating", "gate")
    constant = model.score_embeddings(
        embedded.responses.read(embedded.response_of),
        embedded.prompts.read(embedded.prompt_of_response[embedded.response_of]),
        surface=embedded.surface,
        weights=summary.constant_weights,
    )
    torch.testing.assert_close(found["constant mix"], constant.score.double(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found["gate"], found["gate, plain"], atol=1e-3)


def test_prompts_that_the_hash_puts_on_the_training_side_are_no_test_of_a_run():
    from armo.data.conversation import ResponseList
    from armo.data.rated_lists import RatedLists

    program = load("best_of_n")
    rows = tuple(
        ResponseList(f"{k}", "test", (Message("user", f"prompt {k}"),), ("a", "b"))
        for k in range(400)
    )
    lists = RatedLists(rows, torch.arange(800).double())
    kept = program.held_out(lists, test_fraction=0.2)
    assert 50 < len(kept.rows) < 110
    numbers = [int(row.id) for row in kept.rows]
    assert kept.gold.tolist() == [value for k in numbers for value in (2.0 * k, 2.0 * k + 1)]


def test_best_of_n_compares_scores_and_says_where_the_gold_stops_rising(finished, tmp_path):
    command = [sys.executable, FOLDER / "best_of_n.py", "--run", finished, "--quick"]
    command += ["--json", "figures.json", "--markdown", "tables.md", "--plot", "curves.svg"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures) == ["best_of_n", "contrasts", "rises"]
    gold = {(row["model"], row["n"]): row["gold"] for row in figures["best_of_n"]}
    sizes = (1, 2, 4, 8, 16)
    rivals = ("random", "gold itself", "longer")
    program = load("best_of_n")
    assert set(gold) == {(name, n) for name in (*program.SCORES, *rivals) for n in sizes}
    for label, one, other in program.CONTRASTS:
        rows = [row for row in figures["contrasts"] if row["scores"] == label]
        assert [row["n"] for row in rows] == [2, 4, 8, 16]
        for row in rows:
            assert row["gold"] == pytest.approx(gold[one, row["n"]] - gold[other, row["n"]])
            assert row["low"] <= row["gold"] <= row["high"]
    for row in figures["rises"]:
        of, n, to = row["score"], row["n"], row["to"]
        assert row["gold rises"] == pytest.approx(gold[of, to] - gold[of, n])
        possible = gold["gold itself", to] - gold["random", to]
        share = (gold[of, to] - gold["random", to]) / possible
        assert row["of what is possible"] == pytest.approx(share)
    assert "12 prompts" in done.stdout.replace("\n", " ")
    assert "192 responses" in done.stdout
    assert "| gate, plain |" in (tmp_path / "tables.md").read_text()
    assert "<svg" in (tmp_path / "curves.svg").read_text()


def test_best_of_n_needs_a_scale_for_the_gold_of_a_file(tmp_path):
    command = [sys.executable, FOLDER / "best_of_n.py", "--run", tmp_path, "--lists", "rated.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--lists needs --gold, --low and --high" in done.stderr
