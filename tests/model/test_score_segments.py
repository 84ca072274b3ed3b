import math
from dataclasses import replace

import pytest
import torch
from conftest import conversation, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from armo.data.segments import sentence_ends
from armo.embed.backbone import Backbone
from armo.embed.forward import Runner
from armo.embed.plan import Plan, Span, TokenSequence
from armo.embed.spec import BackboneError

FIELDS = ("score", "rewards", "adjusted", "gating_weights", "contributions")
PROMPT = "How do I boil an egg?"
RESPONSE = (
    "Put it in hot water.  Seven minutes!\n\n- one\n- two **three**\nIs it safe? Yes, mostly. "
)
MEASURED = ("bold", "log_length", "questions")


def reading(backbone, **changes):
    spec = replace(backbone.spec, **changes)
    return Backbone(spec, model=backbone.model, tokenizer=backbone.tokenizer)


@pytest.fixture(scope="module", params=["encoder", "causal", "mean", "turn_end", "measuring"])
def model(request):
    causal = request.getfixturevalue("causal")
    if request.param == "encoder":
        return make_model(request.getfixturevalue("encoder"))
    if request.param == "mean":
        return make_model(reading(causal, pooling="mean"))
    if request.param == "turn_end":
        return make_model(reading(causal, prompt_position="turn_end"))
    return make_model(causal, covariates=MEASURED if request.param == "measuring" else ())


def assert_same(found, expected):
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), atol=2e-4, rtol=1e-4
        )
    assert torch.equal(found.truncated, expected.truncated)


def test_each_segment_scores_as_the_response_that_ends_with_it(model):
    found = model.score_segments(PROMPT, RESPONSE)
    prefixes = [RESPONSE[:end] for end in sentence_ends(RESPONSE)]
    assert len(prefixes) == 6
    assert_same(found.out, model.score_responses(PROMPT, prefixes))
    whole = model.score([conversation(PROMPT, RESPONSE)])
    assert float(found.out.score[-1]) == pytest.approx(float(whole.score[0]), abs=2e-4)
    # The beginnings do differ: a score of the whole repeated would not pass.
    assert float(found.out.score.diff().abs().min()) > 1e-3
    assert "".join(found.texts) == RESPONSE
    assert [RESPONSE[a:b] for a, b in found.spans] == [*found.texts]


def test_the_gains_of_the_sentences_add_up_to_the_score(model):
    found = model.score_segments(PROMPT, RESPONSE)
    assert bool(found.gains[0].isnan().all())
    total = found.out.score[0] + found.gains[1:].sum()
    assert float(total) == pytest.approx(float(found.out.score[-1]))
    steps = found.out.score.diff()
    torch.testing.assert_close(found.gains[1:].sum(1), steps)


TURNS = [
    {"role": "system", "content": "Be honest."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello! How do I know?"},
    {"role": "user", "content": PROMPT},
    {"role": "assistant", "content": "In water."},
    {"role": "user", "content": "Is it safe?"},
]


def test_each_turn_scores_as_the_conversation_that_ends_with_it(model):
    found = model.score_segments(TURNS, RESPONSE, by="turn")
    last = {"role": "assistant", "content": RESPONSE}
    assert_same(found.out, model.score([TURNS[:3], TURNS[:5], [*TURNS, last]]))
    assert found.texts == ("Hello! How do I know?", "In water.", RESPONSE)
    assert found.spans == tuple((0, len(text)) for text in found.texts)


WORDS = ("egg", "Yes.", "no!", "\n", "\n\n", "- ", "**a**", "risk?", " ", "犬。", "...")


@settings(max_examples=15)
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=20).map(" ".join))
def test_any_response_is_scored_as_its_beginnings_are(causal, text):
    if not text.strip():
        return
    model = make_model(causal)
    prefixes = [text[:end] for end in sentence_ends(text)]
    assert_same(model.score_segments("Hi", text).out, model.score_responses("Hi", prefixes))


def tokens_run(model, monkeypatch, call):
    """Tokens that go through the model in a call, padding counted."""
    counts = []
    states = Runner._states

    def counted(self, **inputs):
        counts.append(inputs["input_ids"].numel())
        return states(self, **inputs)

    monkeypatch.setattr(Runner, "_states", counted)
    call(model)
    monkeypatch.undo()
    return sum(counts)


def test_a_causal_backbone_reads_the_text_once(causal, monkeypatch):
    model = make_model(reading(causal, max_tokens=256))
    text = "It is hot. " * 12
    alone = tokens_run(model, monkeypatch, lambda m: m.score([conversation(PROMPT, text)]))
    found = tokens_run(model, monkeypatch, lambda m: m.score_segments(PROMPT, text))
    # Beyond the text: what closes each of the other beginnings.
    assert alone < found <= alone + 2 * 11


def test_a_model_that_cannot_read_on_scores_the_beginnings_apart(causal):
    apart = make_model(reading(causal))
    apart.backbone.runner.shares = False
    found = apart.score_segments(PROMPT, RESPONSE)
    assert_same(found.out, make_model(causal).score_segments(PROMPT, RESPONSE).out)


@pytest.mark.parametrize("on_overlong", ["truncate", "skip"])
def test_what_is_too_long_is_cut_or_skipped_as_ever(causal, on_overlong):
    model = make_model(reading(causal, on_overlong=on_overlong, max_tokens=70))
    text = "It is hot water. " * 12
    found = model.score_segments(PROMPT, text)
    prefixes = [text[:end] for end in sentence_ends(text)]
    expected = model.score_responses(PROMPT, prefixes)
    assert torch.equal(found.out.score.isnan(), expected.score.isnan())
    assert_same(
        replace(found.out, **{n: getattr(found.out, n).nan_to_num() for n in FIELDS}),
        replace(expected, **{n: getattr(expected, n).nan_to_num() for n in FIELDS}),
    )
    assert bool(
        expected.truncated.any()
        if on_overlong == "truncate"
        else math.isnan(float(found.out.score[-1]))
    )
    strict = make_model(reading(causal, on_overlong="error", max_tokens=70))
    with pytest.raises(BackboneError, match=r"^segment \d+: the response has \d+ tokens"):
        strict.score_segments(PROMPT, text)


@pytest.mark.usefixtures("no_type_checks")
def test_another_kind_of_segment_is_refused(causal):
    with pytest.raises(ValueError, match="`by` must be sentence or turn, got 'word'"):
        make_model(causal).score_segments("Hi", "Yes.", by="word")


def test_an_empty_response_has_no_segments(causal):
    with pytest.raises(ValueError, match="`response` is empty"):
        make_model(causal).score_segments("Hi", " ")


def test_the_callers_weights_and_scale_hold_for_segments(causal):
    model = make_model(causal)
    given = {"weights": {"honesty": 1.0}, "scale": "rating"}
    found = model.score_segments(PROMPT, RESPONSE, **given).out
    prefixes = [RESPONSE[:end] for end in sentence_ends(RESPONSE)]
    assert_same(found, model.score_responses(PROMPT, prefixes, **given))
    torch.testing.assert_close(found.score, found.adjusted[:, 1])


@settings(max_examples=15)
@given(st.data())
def test_sequences_run_along_the_longest_pool_as_they_do_apart(causal, data):
    ids = st.lists(st.integers(4, 7), min_size=1, max_size=12)
    rows = data.draw(st.lists(ids, min_size=1, max_size=5))
    # Some begin alike, some not at all.
    rows += [rows[0][: len(rows[0]) // 2 + 1] + row for row in rows]
    plan = Plan(prompts=1, responses=len(rows) - 1)
    for target, row in enumerate(rows):
        start = data.draw(st.integers(0, len(row) - 1))
        plan.sequences.append(TokenSequence(row, (Span(target, start, len(row)),)))
    found = causal.runner.run_along(plan)
    torch.testing.assert_close(found, causal.runner.run(plan), atol=1e-5, rtol=1e-4)


def test_memory_that_runs_out_is_said_in_one_line(causal, monkeypatch):
    def full(self, **inputs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    model = make_model(causal)
    monkeypatch.setattr(Runner, "_states", full)
    with pytest.raises(BackboneError, match=r"out of memory on a single sequence of \d+ tokens"):
        model.score_segments("Hi", "Yes. No.")
