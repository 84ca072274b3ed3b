import dataclasses
import math
import sys
import threading
import time
from concurrent.futures import CancelledError, wait

import pytest
import torch
from conftest import conversation, make_model

from armo.embed.backbone import Backbone
from armo.model.conversations import parse_conversations
from armo.model.scorer import TENSORS
from armo.serve.engine import (
    LONGEST_WAIT_S,
    PASS_BATCHES,
    PassError,
    QueueFullError,
    RequestTooLongError,
    RowScore,
    ScoringEngine,
    StoppingError,
    gather,
)
from armo.serve.rows import RowError, RowReader

TEXTS = [conversation(f"Question {k % 3}?", f"Answer number {k}." * (1 + k % 4)) for k in range(14)]


@pytest.fixture(params=["causal", "encoder"])
def model(request):
    return make_model(request.getfixturevalue(request.param), covariates=("log_length", "bold"))


@pytest.fixture
def engine(model):
    made = ScoringEngine(model, queue_tokens=8192)
    yield made
    made.stop()


def read(model, conversations):
    return RowReader(model.backbone).conversations(parse_conversations(conversations))


def held(engine, monkeypatch):
    """Let passes wait until an event is set, and count the rows of each."""
    go, started, sizes, run = threading.Event(), threading.Event(), [], engine._embed

    def slow(rows):
        started.set()
        assert go.wait(30)
        sizes.append(len(rows))
        return run(rows)

    monkeypatch.setattr(engine, "_embed", slow)
    return go, started, sizes


def assert_same(out, expected, rows=slice(None)):
    for name in ("score", *TENSORS):
        got, wanted = getattr(out, name), getattr(expected, name)[rows]
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4, equal_nan=True)
    assert out.truncated.tolist() == expected.truncated[rows].tolist()


def test_the_engine_gives_what_score_gives(engine, model):
    expected = model.score(TEXTS)
    out = gather(engine.submit(read(model, TEXTS)).result(30))
    assert_same(out, expected)
    assert out.objectives == expected.objectives
    alone = [engine.submit(read(model, [text])).result(30)[0] for text in TEXTS]
    assert_same(gather(alone), expected)


def test_what_is_cut_is_marked(engine, model):
    long = [conversation("Why?", "word " * 300), conversation("Why? " * 90, "No."), TEXTS[0]]
    out = gather(engine.submit(read(model, long)).result(30))
    assert out.truncated.tolist() == [True, True, False]
    assert_same(out, model.score(long))


def test_what_is_cut_is_marked_with_the_row_of_its_own_request(engine, model, monkeypatch):
    go, started, sizes = held(engine, monkeypatch)
    first = engine.submit(read(model, TEXTS[:1]))
    assert started.wait(30)
    whole = engine.submit(read(model, TEXTS[1:3]), weights={"harm": 1.0})
    cut = engine.submit(read(model, [conversation("Why?", "word " * 300)]))
    go.set()
    wait([first, whole, cut], 30)
    assert sizes == [1, 3]
    assert gather(whole.result()).truncated.tolist() == [False, False]
    assert gather(cut.result()).truncated.tolist() == [True]


def test_concurrent_requests_share_a_pass_and_its_prompts(engine, model, monkeypatch):
    go, started, sizes = held(engine, monkeypatch)
    first = engine.submit(read(model, TEXTS[:1]))
    assert started.wait(30)
    same_prompt = [conversation("Question 1?", f"Number {k}.") for k in range(6)]
    futures = [engine.submit(read(model, [text])) for text in same_prompt]
    weighted = engine.submit(read(model, same_prompt[:1]), weights={"harm": 1.0})
    go.set()
    wait([first, weighted, *futures], 30)
    assert sizes == [1, 7]
    outs = [future.result()[0].out for future in futures]
    assert all(out is outs[0] for out in outs)
    counts = engine.counts
    assert (counts.passes, counts.rows) == (2, 8)
    if model.backbone.runner.shares:
        assert counts.run_tokens < 0.7 * counts.tokens
    expected = model.score(same_prompt[:1], weights={"harm": 1.0})
    assert_same(gather(weighted.result()), expected)


def test_responses_to_one_prompt_have_the_same_gating_weights(engine, model):
    rows = read(model, [conversation("Question?", f"Answer {k}." * 12) for k in range(40)])
    assert sum(row.cost for row in rows) > PASS_BATCHES * model.backbone.runner.batch_tokens
    out = gather(engine.submit(rows).result(60))
    spread = out.gating_weights.amax(0) - out.gating_weights.amin(0)
    assert float(spread.max()) < 1e-12


def test_a_pass_is_bounded_and_in_order(engine, model, monkeypatch):
    go, started, sizes = held(engine, monkeypatch)
    futures = [engine.submit(read(model, TEXTS[:1]))]
    assert started.wait(30)
    rows = [read(model, [conversation(f"Q{k}?", "word " * 60)])[0] for k in range(30)]
    done = []
    for k, row in enumerate(rows):
        futures.append(engine.submit([row]))
        futures[-1].add_done_callback(lambda _, k=k: done.append(k))
    go.set()
    wait(futures, 60)
    limit = PASS_BATCHES * model.backbone.runner.batch_tokens
    assert max(sizes) <= limit // rows[0].cost
    assert len(sizes) > 3
    assert done == sorted(done)


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(model, monkeypatch):
    engine = ScoringEngine(model, queue_tokens=200)
    go, _, _ = held(engine, monkeypatch)
    rows = read(model, [conversation(f"Q{k}?", "word " * 30) for k in range(9)])
    room = 200 // rows[0].cost
    taken = [engine.submit([row]) for row in rows[:room]]
    with pytest.raises(QueueFullError, match="try again in 1 s") as caught:
        engine.submit(rows[room : room + 1])
    assert caught.value.retry_after_s == 1
    with pytest.raises(QueueFullError):
        engine.check_room()
    assert engine.counts.refused == 2
    assert engine.counts.pending_tokens <= 200
    with pytest.raises(RequestTooLongError, match="200 are taken at once"):
        engine.submit(rows)
    go.set()
    assert all(isinstance(future.result(30)[0], RowScore) for future in taken)
    engine.check_room()
    assert isinstance(engine.submit(rows[:1]).result(30)[0], RowScore)
    engine.stop()
    assert (engine.counts.pending_tokens, engine.counts.pending_rows) == (0, 0)


@pytest.mark.parametrize(("lasts_s", "told_s"), [(1e9, LONGEST_WAIT_S), (9.5, 10), (1e-9, 1)])
def test_when_to_come_back_follows_from_what_waits(model, monkeypatch, lasts_s, told_s):
    engine = ScoringEngine(model, queue_tokens=200)
    go, started, _ = held(engine, monkeypatch)
    (row,) = read(model, [conversation("Q?", "word " * 20)])
    taken = [engine.submit([row]) for _ in range(200 // row.cost)]
    assert started.wait(30)
    engine._tokens_per_s = row.cost * len(taken) / lasts_s
    with pytest.raises(QueueFullError) as caught:
        engine.submit([row])
    assert caught.value.retry_after_s == told_s
    go.set()
    wait(taken, 30)
    engine.stop()


def test_a_queue_that_cannot_hold_the_longest_conversation_is_refused(model):
    with pytest.raises(ValueError, match="`queue_tokens` must be at least"):
        ScoringEngine(model, queue_tokens=100)


def test_stopping_finishes_what_was_taken(model, monkeypatch):
    engine = ScoringEngine(model, queue_tokens=4096)
    go, started, _ = held(engine, monkeypatch)
    futures = [engine.submit(read(model, [text])) for text in TEXTS]
    assert started.wait(30)
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    while engine.healthy:
        time.sleep(0.01)
    with pytest.raises(StoppingError):
        engine.submit(read(model, TEXTS[:1]))
    with pytest.raises(StoppingError):
        engine.check_room()
    go.set()
    stopping.join(30)
    assert not stopping.is_alive()
    assert all(isinstance(future.result(0)[0], RowScore) for future in futures)


def test_a_cancelled_request_is_not_run(engine, model, monkeypatch):
    go, started, sizes = held(engine, monkeypatch)
    first = engine.submit(read(model, TEXTS[:1]))
    assert started.wait(30)
    gone = engine.submit(read(model, TEXTS[1:6]))
    kept = engine.submit(read(model, TEXTS[6:8]))
    assert gone.cancel()
    assert first.cancel()  # it runs already: its answer is dropped
    go.set()
    assert len(kept.result(30)) == 2
    assert sizes == [1, 2]
    assert (engine.counts.cancelled, engine.counts.pending_tokens) == (1, 0)
    with pytest.raises(CancelledError):
        gone.result(0)


def test_a_row_that_the_model_fails_on_does_not_spoil_the_others(engine, model, monkeypatch):
    rows = read(model, TEXTS)
    run = engine._embed

    def picky(taken):
        if rows[5] in taken:
            raise RuntimeError("a fault of the device")
        return run(taken)

    monkeypatch.setattr(engine, "_embed", picky)
    answers = engine.submit(rows).result(30)
    assert [k for k, answer in enumerate(answers) if isinstance(answer, PassError)] == [5]
    assert "device" not in str(answers[5])
    kept = [k for k in range(len(TEXTS)) if k != 5]
    assert_same(gather([answers[k] for k in kept]), model.score(TEXTS), kept)
    assert engine.healthy
    assert isinstance(engine.submit([rows[5]]).result(30)[0], PassError)
    deadline = time.monotonic() + 10
    while engine.healthy and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.healthy
    assert isinstance(engine.submit([rows[0]]).result(30)[0], RowScore)


def test_a_score_that_is_no_number_is_an_error_of_its_row(engine, model, monkeypatch):
    rows, embed = read(model, TEXTS[:4]), engine._embed

    def overflow(taken):
        prompts, responses, truncated = embed(taken)
        return (
            prompts,
            responses.where(torch.tensor([[r is not rows[2]] for r in taken]), math.inf),
            truncated,
        )

    monkeypatch.setattr(engine, "_embed", overflow)
    answers = engine.submit(rows).result(30)
    assert [isinstance(answer, PassError) for answer in answers] == [False, False, True, False]


def test_a_request_that_is_cancelled_between_its_passes_leaves_nothing(engine, model, monkeypatch):
    go, started, sizes = held(engine, monkeypatch)
    rows = read(model, [conversation(f"Q{k}?", "word " * 60) for k in range(30)])
    gone, kept = engine.submit(rows), engine.submit(rows[:1])
    assert started.wait(30)
    assert gone.cancel()
    go.set()
    assert isinstance(kept.result(30)[0], RowScore)
    assert len(sizes) == 2
    assert sizes[0] < 30
    counts = engine.counts
    assert (counts.pending_tokens, counts.pending_rows, counts.cancelled) == (0, 0, 0)


def test_an_engine_whose_thread_died_takes_nothing(model, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    engine = ScoringEngine(model, queue_tokens=4096)
    monkeypatch.setattr(engine, "_run", lambda rows: sys.exit())
    lost = engine.submit(read(model, TEXTS[:1]))
    engine._thread.join(30)
    assert not engine.healthy
    with pytest.raises(StoppingError):
        engine.submit(read(model, TEXTS[:1]))
    with pytest.raises(StoppingError):
        engine.check_room()
    assert not lost.done()


def test_weights_that_cannot_be_mixed_are_refused(engine, model):
    with pytest.raises(ValueError, match="wit"):
        engine.submit(read(model, TEXTS[:1]), weights={"wit": 1.0})


def test_a_wrong_row_is_an_error_of_its_own(causal_model):
    reader = RowReader(causal_model.backbone)
    refused = [{"role": "tool", "content": "x"}, *TEXTS[1]]
    tool = parse_conversations([[*TEXTS[0], *refused[:1], *TEXTS[1]]])[0]
    rows = reader.conversations([*parse_conversations(TEXTS[:2]), RowError("none"), tool])
    kinds = [type(row).__name__ for row in rows]
    assert kinds[:3] == ["Row", "Row", "RowError"]


@pytest.mark.parametrize(
    ("text", "of_response"),
    [(conversation("Why?", "word " * 300), True), (conversation("Why? " * 90, "No."), False)],
)
def test_a_row_that_is_skipped_says_whether_the_response_is_why(causal, text, of_response):
    spec = dataclasses.replace(causal.spec, on_overlong="skip")
    backbone = Backbone(spec, model=causal.model, tokenizer=causal.tokenizer)
    (row,) = RowReader(backbone).conversations(parse_conversations([text]))
    assert isinstance(row, RowError)
    assert "longer than the backbone reads" in str(row)
    assert row.of_response is of_response
