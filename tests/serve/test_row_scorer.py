"""Rows of many threads: scored as the model does, or refused one by one."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import conversation

from armo.data.conversation import Conversation, Message
from armo.embed.spec import BackboneSpec
from armo.model.reward_model import ArmoRewardModel
from armo.serve import row_scorer
from armo.serve.engine import RowScore
from armo.serve.row_scorer import RowScorer, shared_scorer
from armo.serve.rows import RowError

TEXTS = [f"Number {k}." for k in range(12)]


def row(text):
    return Conversation((Message("user", "Who are you?"),), text)


@pytest.fixture
def scorer(causal_model):
    scorer = RowScorer(causal_model)
    yield scorer
    scorer.close()


@pytest.mark.parametrize("weights", [None, {"honesty": 2.0, "harm": 1.0}])
def test_rows_score_as_the_model_does_and_errors_keep_their_places(scorer, causal_model, weights):
    error = RowError("no row at all")
    answers = scorer.score([error, *map(row, TEXTS), error], weights=weights)
    assert answers[0] is answers[-1] is error
    out = causal_model.score([conversation("Who are you?", t) for t in TEXTS], weights=weights)
    scores = [float(answer.out.score[answer.row]) for answer in answers[1:-1]]
    assert scores == pytest.approx(out.score.tolist(), abs=1e-6)
    assert scorer.score([]) == []
    assert scorer.score([error]) == [error]


def test_weights_that_cannot_be_mixed_are_refused(scorer):
    with pytest.raises(ValueError, match="kindness"):
        scorer.score([row("Fine.")], weights={"kindness": 1.0})


def test_a_row_that_the_backbone_refuses_spoils_no_other(causal_folder, causal_model):
    from armo.embed.backbone import load_backbone

    spec = BackboneSpec(
        str(causal_folder),
        pooling="last",
        max_tokens=40,
        max_prompt_tokens=30,
        on_overlong="error",
    )
    causal_model.backbone = load_backbone(spec, device="cpu", batch_tokens=256)
    scorer = RowScorer(causal_model)
    first, second, third = scorer.score([row("Fine."), row("long " * 99), row("Good.")])
    assert isinstance(first, RowScore)
    assert isinstance(third, RowScore)
    assert isinstance(second, RowError)
    assert "15 fit" in str(second)
    scorer.close()


def test_threads_share_passes_and_one_model(causal_model, tmp_path, monkeypatch):
    causal_model.save_pretrained(tmp_path)
    loads, load = [], ArmoRewardModel.from_pretrained
    monkeypatch.setattr(
        ArmoRewardModel,
        "from_pretrained",
        lambda *args, **options: loads.append(args) or load(*args, **options),
    )
    monkeypatch.setattr(row_scorer, "_LOADED", {})

    def rate(text):
        scorer = shared_scorer(str(tmp_path), "cpu")
        (answer,) = scorer.score([row(text)])
        return float(answer.out.score[answer.row])

    scorer = shared_scorer(str(tmp_path), "cpu")
    run = scorer._engine._score
    monkeypatch.setattr(scorer._engine, "_score", lambda rows: time.sleep(0.05) or run(rows))
    with ThreadPoolExecutor(len(TEXTS)) as threads:
        scores = list(threads.map(rate, TEXTS))
    out = causal_model.score([conversation("Who are you?", text) for text in TEXTS])
    assert scores == pytest.approx(out.score.tolist(), abs=1e-6)
    assert len(loads) == 1
    assert scorer._engine.counts.passes < len(TEXTS) / 2
    scorer.close()
