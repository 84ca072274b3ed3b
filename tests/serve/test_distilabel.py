"""Real pipelines of distilabel run the step, with its other steps before and after."""

import hashlib
import json
import math
import multiprocessing
import pickle
from itertools import pairwise

import pytest
import torch
from conftest import conversation, make_model
from distilabel.pipeline import Pipeline
from distilabel.steps import FormatTextGenerationDPO, LoadDataFromDicts
from distilabel.utils.serialization import load_with_type_info

from armo.model.reward_model import ArmoRewardModel
from armo.serve.distilabel import OUTPUTS, ArmoScore

# distilabel's own, by the thousand.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "How do I boil an egg?"},
    {"role": "assistant", "content": "How soft?"},
    {"role": "user", "content": "Soft."},
]
SHORT = {"instruction": "Hi.", "response": "Hello."}
ANSWER = {"role": "assistant", "content": "Six minutes."}


@pytest.fixture
def folder(causal, tmp_path):
    make_model(causal).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def step(folder, no_type_checks):
    step = ArmoScore(model=str(folder), device="cpu", name="score")
    step.load()
    yield step
    step.unload()


@pytest.fixture
def run(tmp_path, folder, no_type_checks):
    """Run a pipeline over rows; return those of its end."""

    def run(rows, *after, use_cache=False, **options):
        with Pipeline("armo", cache_dir=tmp_path / "cache") as pipeline:
            steps = [LoadDataFromDicts(data=rows), ArmoScore(model=str(folder), **options)]
            steps += [each() for each in after]
            for first, second in pairwise(steps):
                first >> second
        return pipeline.run(use_cache=use_cache)["default"]["train"]

    return run


def process(step, rows):
    return next(step.process_applying_mappings([dict(row) for row in rows]))


def same(row, out, k, index=None):
    """Whether the columns of a row are row `k` of what the model says."""
    pick = (lambda name: row[name]) if index is None else (lambda name: row[name][index])
    assert pick("score") == pytest.approx(float(out.score[k]), abs=1e-6)
    assert pick("truncated") == bool(out.truncated[k])
    for name, values in {
        "rewards": pick("rewards"),
        "contributions": pick("contributions"),
        "gating_weights": row["gating_weights"],
    }.items():
        assert list(values) == list(out.objectives)
        assert list(values.values()) == pytest.approx(getattr(out, name)[k].tolist(), abs=1e-6)


def test_a_pipeline_scores_as_the_model_does(run, causal_model):
    """In a process of its own, over several batches, the first of them without any score."""
    rows = [{"instruction": "Who are you?", "response": ""} for _ in range(60)]
    rows += [{"instruction": "Who are you?", "response": f"Number {k}."} for k in range(20)]
    scored = run([*rows, {"instruction": "Who?", "response": "long " * 200}], weights=None)
    assert len(scored) == 81
    assert all(math.isnan(row["score"]) for row in scored.select(range(60)))
    assert set(scored["reason"][:60]) == {"`response` is empty"}
    out = causal_model.score([conversation("Who are you?", row["response"]) for row in rows[60:]])
    for k in range(20):
        same(scored[60 + k], out, k)
    assert scored["reason"][60:] == [""] * 21
    assert scored["truncated"][60:] == [False] * 20 + [True]
    assert multiprocessing.active_children() == []


def test_a_program_that_has_computed_before_may_run_one(run, monkeypatch):
    """Its threads are not in the process of the step, a fork, but their traces are."""
    load = ArmoRewardModel.from_pretrained

    def load_large(*args, **options):
        torch.ones(10**6).sum()
        return load(*args, **options)

    monkeypatch.setattr(ArmoRewardModel, "from_pretrained", load_large)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        torch.ones(10**6).sum()
        (row,) = run([{"instruction": "Who are you?", "response": "A model."}])
    finally:
        torch.set_num_threads(threads)
    assert row["reason"] == ""


def test_generations_become_pairs_in_distilabels_own_step(run, causal_model):
    texts = ["In hot water.", "No idea.", "Seven minutes, in hot water."]
    rows = [{"instruction": "How do I boil an egg?", "generations": texts, "system_prompt": "Hi."}]
    ratings = {"output_mappings": {"score": "ratings"}}
    (pair,) = run(rows, FormatTextGenerationDPO, **ratings)
    system = {"role": "system", "content": "Hi."}
    out = causal_model.score([[system, *conversation(rows[0]["instruction"], t)] for t in texts])
    assert pair["ratings"] == pytest.approx(out.score.tolist(), abs=1e-6)
    assert pair["chosen"][-1]["content"] == texts[int(out.score.argmax())]
    assert pair["rejected"][-1]["content"] == texts[int(out.score.argmin())]
    for k in range(3):
        same({**pair, "score": pair["ratings"]}, out, k, index=k)


def test_the_cache_is_used_until_the_model_is_another(run, folder, causal):
    rows = [{"instruction": "Who are you?", "response": "A model."}]
    first = run(rows, use_cache=True)["score"][0]
    config = (folder / "config.json").rename(folder / "away")  # without it, no model loads
    assert run(rows, use_cache=True)["score"][0] == first
    config.rename(folder / "config.json")
    other = make_model(causal, seed=1)
    other.save_pretrained(folder)
    expected = float(other.score([conversation("Who are you?", "A model.")]).score[0])
    assert run(rows, use_cache=True)["score"][0] == pytest.approx(expected, abs=1e-6)
    assert first != pytest.approx(expected, abs=1e-3)


def test_all_forms_of_rows_score_as_the_model_does(step, causal_model):
    rows = [
        {"instruction": "Soft?", "response": "Yes."},
        {"instruction": "Soft?", "response": "Yes.", "system_prompt": "Be kind."},
        {"instruction": "Soft?", "response": "Yes.", "system_prompt": None, "conversation": None},
        {"instruction": TURNS, "response": "Six minutes."},
        {"conversation": [*TURNS, ANSWER]},
        {"conversation": [*TURNS, ANSWER], "instruction": "Other.", "response": "Not read."},
    ]
    plain, system = conversation("Soft?", "Yes."), {"role": "system", "content": "Be kind."}
    whole = [*TURNS, ANSWER]
    out = causal_model.score([plain, [system, *plain], plain, whole, whole, whole])
    scored = process(step, rows)
    for k, row in enumerate(scored):
        same(row, out, k)
        assert row["reason"] == ""
        assert set(row) == {*rows[k], *OUTPUTS}
    several = {"conversation": TURNS, "generations": ["Six minutes.", "Now."]}
    (row,) = process(step, [several])
    same(row, causal_model.score_responses(TURNS, ["Six minutes.", "Now."]), 1, index=1)


def test_a_row_without_a_score_says_why_and_spoils_no_other(step, causal_model, caplog):
    reasons = {
        "needs `conversation`, or `instruction` with `response` or `generations`": {"a": 1},
        "the response is no text": {"instruction": "Hi.", "generations": [3]},
        "response is no text": {"instruction": "Hi.", "response": None},
        "`response` is empty": {"instruction": "Hi.", "response": " \n"},
        "`response` is no valid Unicode": {"instruction": "Hi.", "response": "\ud800"},
        "`instruction` cannot be of type int": {"instruction": 3, "response": "Hi."},
        "`system_prompt` cannot be of type int": {**SHORT, "system_prompt": 3},
        "`generations` cannot be of type str": {"instruction": "Hi.", "generations": "Hello."},
        "`conversation` cannot be of type dict": {"conversation": ANSWER},
        "the last message must be the assistant's answer": {"conversation": TURNS},
        "the prompt has no user turn with text": {"conversation": [ANSWER]},
        "message 0 needs `role` and `content`": {"conversation": [{"role": "user"}]},
        "the prompt ends with an assistant turn": {
            "conversation": [*TURNS, ANSWER],
            "generations": ["No."],
        },
    }
    step._logger.propagate = True
    scored = process(step, [SHORT, *reasons.values(), SHORT])
    out = causal_model.score([conversation("Hi.", "Hello.")])
    same(scored[0], out, 0)
    same(scored[-1], out, 0)
    for reason, row in zip(reasons, scored[1:-1], strict=True):
        assert reason in row["reason"]
        numbers = [row["score"], *row["gating_weights"].values()]
        if "generations" in row:
            assert row["score"] == [None]
            assert row["reason"].startswith("generation 0: ")
            numbers = [*row["gating_weights"].values()]
        assert all(math.isnan(number) for number in numbers)
    assert "13 of 15 responses have no score; 2 of them: the response is no text" in caplog.text


def test_a_generation_without_a_score_is_none_among_the_others(step, causal_model):
    rows = [{"instruction": "Hi.", "generations": ["Hello.", None, "Go."]}]
    (row,) = process(step, rows)
    out = causal_model.score_responses("Hi.", ["Hello.", "Go."])
    same(row, out, 0, index=0)
    same(row, out, 1, index=2)
    assert row["score"][1] is None
    assert set(row["rewards"][1].values()) == {None}
    assert row["reason"] == "generation 1: the response is no text"
    # Which would take NaN for the best and the worst of them.
    pairs = FormatTextGenerationDPO()
    pairs.load()
    with pytest.raises(TypeError):
        next(pairs.process([{**row, "ratings": row["score"]}]))
    assert process(step, [{"instruction": "Hi.", "generations": []}])[0]["score"] == []


def test_a_batch_is_one_pass_that_runs_a_prompt_once(step):
    texts = [f"Number {k}." for k in range(6)]
    process(step, [{"instruction": "Hi.", "response": text} for text in texts])
    together = step._scorer._engine.counts
    assert together.passes == 1
    process(step, [{"instruction": "Hi.", "response": texts[0]}])
    alone = step._scorer._engine.counts.run_tokens - together.run_tokens
    assert together.run_tokens < 6 * alone


def test_weights_of_the_caller_replace_those_of_the_gate(folder, causal_model, no_type_checks):
    step = ArmoScore(model=str(folder), device="cpu", weights={"honesty": 2.0, "harm": 1.0})
    step.load()
    (row,) = process(step, [{"instruction": "Hi.", "response": "Hello."}])
    out = causal_model.score([conversation("Hi.", "Hello.")], weights={"honesty": 2, "harm": 1})
    same(row, out, 0)
    engine = step._scorer._engine
    step.unload()
    assert not engine._thread.is_alive()
    wrong = ArmoScore(model=str(folder), device="cpu", weights={"kindness": 1.0})
    with pytest.raises(ValueError, match="kindness"):
        wrong.load()
    wrong.unload()  # as distilabel does then


def test_a_step_is_what_was_saved_of_it(folder):
    step = ArmoScore(model=str(folder), weights={"honesty": 2.0}, name="score")
    dumped = json.loads(json.dumps(step.dump()))
    again = load_with_type_info(dumped)
    assert isinstance(again, ArmoScore)
    assert again.signature == step.signature == pickle.loads(pickle.dumps(step)).signature
    assert len(bytes.fromhex(step.signature)) == hashlib.sha1().digest_size
    others = [
        ArmoScore(model=str(folder), weights={"honesty": 1.0}, name="score"),
        ArmoScore(model="hub/id", weights={"honesty": 2.0}, name="score"),
    ]
    assert len({step.signature, *(other.signature for other in others)}) == 3
