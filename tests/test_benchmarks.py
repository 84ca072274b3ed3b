"""The benchmarks run, say all that they promise, and compare like with like; nothing is timed."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from armo.data.conversation import Message, PreferencePair
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
EMBED_GPU = {"llama8b_tokens_per_s", "llama8b_gemm_share", "llama8b_vs_one_at_a_time"}


def load(name):
    """A benchmark as a module; it is a program, and in no package."""
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
