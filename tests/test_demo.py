"""What the demo must show: a model that gates, is decorrelated, and scores the same everywhere."""

import json
import subprocess
import sys

import pytest
import torch

import armo
from armo.data.sources import load_pairs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo_model(demo_folder):
    return armo.ArmoRewardModel.from_pretrained(demo_folder / "model")


@pytest.fixture(scope="module")
def test_pairs():
    return [pair for pair in load_pairs("builtin") if pair.split == "test"]


@pytest.fixture(scope="module")
def report(demo_folder):
    return json.loads((demo_folder / "report" / "report.json").read_text())


@pytest.fixture(scope="module")
def conversations(test_pairs):
    return [
        [*pair.prompt, {"role": "assistant", "content": response}]
        for pair in test_pairs[::8]
        for response in (pair.chosen, pair.rejected)
    ]


@pytest.fixture(scope="module")
def scored(demo_model, conversations):
    return demo_model.score(conversations)


def rows_by_name(rows, key):
    return {row[key]: row for row in rows}


def test_contributions_sum_to_the_score(scored):
    torch.testing.assert_close(scored.contributions.sum(1), scored.score, atol=1e-5, rtol=0)


def test_gating_weights_are_a_mix_of_the_objectives(scored):
    assert bool((scored.gating_weights >= 0).all())
    sums = scored.gating_weights.sum(1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_both_responses_of_a_pair_get_the_same_weights(scored):
    assert torch.equal(scored.gating_weights[0::2], scored.gating_weights[1::2])


def test_weights_differ_between_kinds_of_prompts(report):
    kinds = rows_by_name(report["kinds"], "kind")
    assert kinds["factual"]["honesty"] > kinds["writing"]["honesty"] + 0.3
    assert kinds["code"]["helpfulness"] > kinds["advice"]["helpfulness"] + 0.3
    assert kinds["safety"]["safety"] > kinds["code"]["safety"] + 0.2


def test_scores_do_not_depend_on_batch_size_or_order(demo_model, conversations, scored):
    alone = demo_model.score(conversations[:24], batch_size=1).score
    together = demo_model.score(conversations[:24][::-1], batch_size=64).score.flip(0)
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone, scored.score[:24], atol=1e-5, rtol=0)


def test_a_second_process_gives_the_same_scores(demo_folder, conversations, scored, tmp_path):
    rows = [
        {
            "messages": [
                turn if isinstance(turn, dict) else {"role": turn.role, "content": turn.content}
                for turn in conversation
            ]
        }
        for conversation in conversations[:16]
    ]
    source, target = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    subprocess.run(
        [
            *(sys.executable, "-m", "armo.cli", "score", f"model={demo_folder / 'model'}"),
            *(f"input={source}", f"output={target}"),
        ],
        check=True,
        capture_output=True,
        cwd=tmp_path,
    )
    fresh = torch.tensor([json.loads(line)["score"] for line in target.read_text().splitlines()])
    torch.testing.assert_close(fresh.double(), scored.score[:16], atol=1e-5, rtol=0)


def test_the_gate_beats_style_and_the_uniform_mix_with_the_intervals_apart(report):
    rivals = rows_by_name(report["rivals"], "score")
    for rival in ("length and format", "uniform mix"):
        assert rivals["gated score"]["low"] > rivals[rival]["high"]


def test_the_gate_is_no_worse_than_the_best_constant_mix(report):
    assert rows_by_name(report["rivals"], "score")["best constant mix"]["from"] > 0.0


def test_style_is_not_the_give_away_of_the_test_pairs(report):
    # A little format is content: only better answers about code quote any inline.
    for rival, most in (("length only", 0.56), ("format only", 0.6), ("length and format", 0.6)):
        assert 0.44 < rows_by_name(report["rivals"], "score")[rival]["accuracy"] < most


def test_decorrelation_halves_what_style_alone_does_to_the_score(report):
    every = rows_by_name(report["counterfactuals"], "pattern")["all"]
    assert every["pairs"] >= 100
    assert every["moved, after"] < 0.5 * every["moved, before"]


def test_answers_of_one_word_are_not_paid_for_being_short(demo_model, test_pairs):
    prompts = {pair.prompt: pair.chosen for pair in test_pairs}
    asked = [[*prompt, {"role": "assistant", "content": "No."}] for prompt in prompts]
    full = [[*p, {"role": "assistant", "content": text}] for p, text in prompts.items()]
    short, chosen = demo_model.score(asked), demo_model.score(full)
    assert float((short.score < chosen.score).double().mean()) > 0.6
    # Without an end to what is paid for being short it is 18 standard deviations.
    assert float(short.adjusted.max()) < 6.0


def test_the_exported_model_is_the_evaluated_one(report):
    assert report["applied"][0]["value"] < 1e-4


def test_the_golden_conversations_verify(demo_model):
    assert demo_model.verify() < 1e-4
