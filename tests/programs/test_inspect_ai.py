"""Real evaluations with Inspect, of answers that are fixed, and its command line."""

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import mean, stdev

import pytest
from conftest import conversation, make_model

pytest.importorskip("inspect_ai", reason="`make programs` installs it")

import inspect_ai.log
from inspect_ai import Epochs, Task
from inspect_ai.dataset import Sample
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentImage,
    ContentReasoning,
    ContentText,
    ModelOutput,
    ModelUsage,
    get_model,
)
from inspect_ai.scorer import Target
from inspect_ai.solver import TaskState, generate, system_message

from armo.serve.inspect_ai import ROWS_AT_ONCE, armo_score
from armo.serve.row_scorer import shared_scorer

README = (Path(__file__).parents[2] / "README.md").read_text()
TASK = re.search(r"```python\n# task.py\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for line in README.splitlines() if line.startswith("inspect ")]
TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "How do I boil an egg?"},
    {"role": "assistant", "content": "How soft?"},
    {"role": "user", "content": "Soft."},
]
KINDS = {
    "system": ChatMessageSystem,
    "user": ChatMessageUser,
    "assistant": ChatMessageAssistant,
}


@pytest.fixture
def folder(causal, tmp_path):
    make_model(causal).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def score(folder, no_type_checks):
    """Score one state."""
    import anyio

    def run(messages, output, **options):
        state = TaskState("mockllm/model", "1", 1, "", messages, output=output)
        return anyio.run(armo_score(folder, "cpu", **options), state, Target(""))

    return run


def answering(*texts):
    """Outputs whose tokens are counted: Inspect would fetch a tokenizer to count them."""
    return [
        ModelOutput(model="mockllm", usage=ModelUsage(), choices=output.choices)
        for output in (ModelOutput.from_content("mockllm", text) for text in texts)
    ]


def messages(turns):
    return [KINDS[turn["role"]](content=turn["content"]) for turn in turns]


def evaluate(samples, outputs, folder, tmp_path, *, at_once=1, **options):
    (log,) = inspect_ai.eval(
        Task(
            dataset=[Sample(input=sample, id=k) for k, sample in enumerate(samples)],
            scorer=armo_score(model=folder, device="cpu"),
            **options,
        ),
        model=get_model("mockllm/model", custom_outputs=outputs),
        log_dir=str(tmp_path / "logs"),
        max_samples=at_once,
        max_connections=at_once,
        display="none",
    )
    assert log.status == "success", log.error
    return inspect_ai.log.read_eval_log(log.location)


def metrics(log):
    return {
        each.name: (each.metrics["mean"].value, each.metrics["stderr"].value, each.unscored_samples)
        for each in log.results.scores
    }


def same(value, out, k):
    expected = dict(zip(out.objectives, out.rewards[k].tolist(), strict=True))
    assert value == pytest.approx({**expected, "score": float(out.score[k])}, abs=1e-5)


def test_an_evaluation_has_the_models_scores_and_their_means(
    folder, causal_model, tmp_path, no_type_checks
):
    samples = ["Who are you?", messages(TURNS), messages(TURNS[1:2]), "Silent?", "Blocked?"]
    answers = ["A model.", "Six minutes.", "In hot water.", "", ""]
    outputs = answering(*answers)
    outputs[4].choices[0].stop_reason = "content_filter"
    log = evaluate(samples, outputs, folder, tmp_path)
    told = [sample.scores["armo_score"] for sample in log.samples]
    whole = [*TURNS, {"role": "assistant", "content": answers[1]}]
    rows = [
        conversation(samples[0], answers[0]),
        whole,
        conversation(TURNS[1]["content"], answers[2]),
    ]
    out = causal_model.score(rows)
    for k in range(3):
        same(told[k].value, out, k)
        assert told[k].answer == answers[k]
        assert told[k].metadata["truncated"] is False
        for name in ("gating_weights", "contributions", "adjusted"):
            expected = dict(zip(out.objectives, getattr(out, name)[k].tolist(), strict=True))
            assert told[k].metadata[name] == pytest.approx(expected, abs=1e-5)
    assert [math.isnan(each.value) for each in told[3:]] == [True, True]
    assert [each.reason for each in told] == [None, None, None, "no_response", "refusal"]
    columns = {"score": out.score, **dict(zip(out.objectives, out.rewards.T, strict=True))}
    for name, values in columns.items():
        values = values.tolist()
        error = stdev(values) / math.sqrt(3)
        assert metrics(log)[name] == pytest.approx((mean(values), error, 2), abs=1e-5)
    assert set(metrics(log)) == set(columns)


def test_solvers_may_change_the_prompt_and_epochs_are_reduced(
    folder, causal_model, tmp_path, no_type_checks
):
    answers = ["A model.", "Nobody.", "A model.", ""]
    log = evaluate(
        ["Who are you?"] * 2,
        answering(*answers),
        folder,
        tmp_path,
        solver=[system_message("Be kind."), generate()],
        epochs=Epochs(2, "max"),
    )
    system = {"role": "system", "content": "Be kind."}
    out = causal_model.score([[system, *conversation("Who are you?", a)] for a in answers[:2]])
    by_sample = {0: [], 1: []}
    for sample in log.samples:
        by_sample[sample.id].append(sample.output.completion)
        if sample.output.completion:
            same(sample.scores["armo_score"].value, out, answers.index(sample.output.completion))
    best = [max(float(out.score[answers.index(a)]) for a in own if a) for own in by_sample.values()]
    assert metrics(log)["score"][0] == pytest.approx(mean(best), abs=1e-5)


def test_samples_that_come_together_share_passes(folder, tmp_path, no_type_checks, monkeypatch):
    """One thread alone runs the model, however many samples there are."""
    count, at_once = 3 * ROWS_AT_ONCE, []
    engine = shared_scorer(folder, "cpu")._engine
    run = engine._score

    def run_slowly(rows):
        at_once.append((threading.current_thread().name, len(rows)))
        time.sleep(0.1)
        return run(rows)

    monkeypatch.setattr(engine, "_score", run_slowly)
    outputs = answering(*(f"Number {k}." for k in range(count)))
    log = evaluate(["Who are you?"] * count, outputs, folder, tmp_path, at_once=count)
    assert log.results.scores[0].scored_samples == count == engine.counts.rows
    assert {name for name, _ in at_once} == {"armo-engine"}
    assert max(rows for _, rows in at_once) <= ROWS_AT_ONCE
    assert len(at_once) < count / 4


def test_what_tools_and_reasoning_say_is_not_the_answer(score, causal_model):
    call = ChatMessageAssistant(content="Let me look.")
    thought = ContentReasoning(reasoning="Hm.")
    output = ModelOutput.from_content("m", [thought, ContentText(text="Six minutes.")])
    asked = messages(TURNS)
    asked[2] = ChatMessageAssistant(content=[thought, ContentText(text=TURNS[2]["content"])])
    said = [*asked, call, ChatMessageTool(content="6"), output.message]
    told = score(said, output)
    out = causal_model.score([[*TURNS, {"role": "assistant", "content": "Six minutes."}]])
    same(told.value, out, 0)
    assert told.answer == "Six minutes."
    later = score([*said, ChatMessageUser(content="Thanks.")], output)
    assert later.value == told.value


def test_an_explanation_says_what_the_score_is_made_of(score, causal_model):
    told = score(messages(TURNS[:2]), ModelOutput.from_content("m", "In hot water. " * 60))
    first, *parts = told.explanation.splitlines()
    assert "longer than the backbone reads, and was cut" in first
    found = [
        re.match(r"- (\w+) (\S+): weight (\S+) times (\S+) standard deviations$", p) for p in parts
    ]
    assert {match[1] for match in found} == {"helpfulness", "honesty", "harm"}
    values = [[float(match[k]) for k in (2, 3, 4)] for match in found]
    assert sum(value[0] for value in values) == pytest.approx(told.value["score"], abs=2e-3)
    assert [abs(value[0]) for value in values] == sorted((abs(v[0]) for v in values), reverse=True)
    for part, weight, adjusted in values:
        assert part == pytest.approx(weight * adjusted, abs=5e-3)
    assert first.startswith(f"Score {told.value['score']:+.3f}, ")


@pytest.mark.parametrize(
    ("asked", "answer", "why"),
    [
        ([ContentText(text="What is it?"), ContentImage(image="x")], "A cat.", "a block of image"),
        ("  ", "Fine.", "no user turn with text"),
        ("Who?", "\ud800", "no valid Unicode text"),
    ],
)
def test_what_cannot_be_scored_is_unscored_and_says_why(asked, answer, why, score):
    told = score([ChatMessageUser(content=asked)], ModelOutput.from_content("m", answer))
    assert math.isnan(told.value)
    assert told.reason == "scoring_failed"
    assert why in told.explanation
    assert told.answer == answer


def test_an_output_without_choices_and_a_failing_pass_are_unscored(score, folder, monkeypatch):
    told = score(messages(TURNS), ModelOutput(model="m", choices=[]))
    assert (math.isnan(told.value), told.reason) == (True, "no_response")
    engine = shared_scorer(folder, "cpu")._engine

    def fail(rows):
        raise MemoryError("no memory is left")

    monkeypatch.setattr(engine, "_score", fail)
    told = score(messages(TURNS), ModelOutput.from_content("m", "Fine."))
    assert (math.isnan(told.value), told.reason) == (True, "scoring_failed")
    assert "the model failed on this row" in told.explanation


def test_weights_of_the_caller_replace_those_of_the_gate(score, causal_model):
    weights = {"honesty": 2.0, "harm": 1.0}
    told = score(messages(TURNS[1:2]), ModelOutput.from_content("m", "No."), weights=weights)
    rows = [conversation(TURNS[1]["content"], "No.")]
    same(told.value, causal_model.score(rows, weights=weights), 0)
    assert "helpfulness" not in told.explanation


# Read by Python when it starts. Inspect would fetch a tokenizer to count the tokens of its mock.
COUNTED = """import tiktoken
class Words:
    def encode(self, text, **options):
        return text.split()
tiktoken.get_encoding = lambda name: Words()
"""


def inspect(*words, cwd):
    (cwd / "sitecustomize.py").write_text(COUNTED)
    done = subprocess.run(
        [sys.executable, "-m", "inspect_ai", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(cwd)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_command_line_finds_the_scorer_and_tasks_use_it(causal, tmp_path):
    """The README's task is evaluated, then the log of another one is scored afterwards."""
    model = make_model(causal)
    model.save_pretrained(tmp_path / "checkpoints/demo/model")
    (tmp_path / "task.py").write_text(TASK[1])
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"input": "Who are you?"}) + "\n")
    evaluate_words, score_words = (line.split()[1:] for line in COMMANDS)
    evaluate_words[evaluate_words.index("--model") + 1] = "mockllm/model"
    inspect(*evaluate_words, "--log-dir", "logs", "--display", "none", cwd=tmp_path)
    (location,) = (tmp_path / "logs").glob("*.eval")
    log = inspect_ai.log.read_eval_log(str(location))
    text = log.samples[0].output.completion
    out = model.score([conversation("Who are you?", text)])
    same(log.samples[0].scores["armo_score"].value, out, 0)
    # A log that has no such score yet.
    for sample in log.samples:
        sample.scores = None
    log.results = None
    log.eval.scorers = None
    inspect_ai.log.write_eval_log(log, str(tmp_path / "LOG.eval"))
    inspect(*score_words, "--action", "append", "--overwrite", "--display", "none", cwd=tmp_path)
    again = inspect_ai.log.read_eval_log(str(tmp_path / "LOG.eval"))
    same(again.samples[0].scores["armo_score"].value, out, 0)
    assert metrics(again)["score"][0] == pytest.approx(float(out.score[0]), abs=1e-5)


def test_inspect_starts_without_torch():
    """Each of its commands imports the module."""
    code = "import armo.serve.inspect_ai, sys; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
