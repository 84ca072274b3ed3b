import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import conversation, make_model
from serving import serving

import armo.serve.client
from armo.artifacts import ArtifactError
from armo.data.conversation import Message
from armo.embed.backbone import load_backbone
from armo.embed.boundary import PromptGroup
from armo.embed.spec import BackboneError, BackboneSpec
from armo.model.reward_model import ArmoRewardModel
from armo.model.scorer import TENSORS
from armo.serve.client import AwayError, PoolingClient, RemoteError, load_split

ROWS = [
    conversation("How do I boil an egg?", "Seven minutes in hot water."),
    conversation("How do I boil an egg?", "No idea."),
    conversation("What can you not know?", "The future. " * 40),
]


@contextmanager
def pooling(model, *, change=lambda states: states, wrap=None, key=None, fail=lambda body: None):
    """A stand-in for vLLM's server, which answers from a local model in vLLM's shape.

    `fail` gives the status of an error instead, or 0 to hang up within the answer.
    """
    asked, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if key is not None and self.headers["authorization"] != f"Bearer {key}":
                self.send_error(401)
                return
            if (status := fail(body)) is not None:
                if status:
                    self.send_error(status)
                else:
                    self.send_response(200)
                    self.send_header("content-length", "100")
                    self.end_headers()
                    self.wfile.write(b"{")
                return
            data = []
            with lock, torch.inference_mode():
                asked.append((self.path, body))
                for k, ids in enumerate(body["input"]):
                    state = model(torch.tensor([ids])).last_hidden_state[0, -1]
                    data.append({"index": k, "object": "pooling", "data": change(state).tolist()})
            answer = {"id": "x", "object": "list", "model": body.get("model"), "data": data[::-1]}
            content = json.dumps(wrap(answer) if wrap else answer).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def _hasty(monkeypatch):
    monkeypatch.setattr(armo.serve.client, "RETRY_S", (0.0, 0.0))


@pytest.fixture(scope="module")
def whole(causal_folder, tmp_path_factory):
    """A model with its backbone here, loaded from a folder with golden scores."""
    spec = BackboneSpec(str(causal_folder), pooling="last", max_tokens=128, max_prompt_tokens=64)
    folder = tmp_path_factory.mktemp("whole") / "model"
    backbone = load_backbone(spec, device="cpu")
    make_model(backbone, covariates=("log_length",)).save_pretrained(folder, golden=ROWS)
    return ArmoRewardModel.from_pretrained(folder, device="cpu")


def split(model, url, **options):
    return load_split(model.folder, PoolingClient(url, model="m", timeout_s=10, **options))


def test_a_split_model_scores_as_a_whole_one(whole):
    with pooling(whole.backbone.model, key="k") as (url, asked):
        apart = split(whole, url, api_key="k")
        assert not list(apart.backbone.model.parameters())
        asked.clear()
        out, expected = apart.score(ROWS), whole.score(ROWS)
    for name in ("score", *TENSORS):
        torch.testing.assert_close(
            getattr(out, name), getattr(expected, name), atol=1e-4, rtol=1e-4, equal_nan=True
        )
    assert out.truncated.tolist() == [False, False, True]
    assert {path for path, _ in asked} == {"/pooling"}
    bodies = [body for _, body in asked]
    assert all(body["model"] == "m" and body["use_activation"] is False for body in bodies)
    # Two prompts, three conversations: each is asked for once.
    assert sum(len(body["input"]) for body in bodies) == 5


def test_a_split_model_is_served(whole):
    with pooling(whole.backbone.model) as (url, _), serving(split(whole, url)) as client:
        reply = client.post("/score", json={"conversations": ROWS}).json()
    expected = whole.score(ROWS).score.tolist()
    scores = [row["score"] for row in reply["rows"]]
    assert scores == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_many_rows_are_asked_for_in_parts(whole):
    rows = [conversation(f"Question {k}?", "word " * 20) for k in range(30)]
    with pooling(whole.backbone.model) as (url, asked):
        client = PoolingClient(url, timeout_s=10)
        apart = load_split(whole.folder, client, batch_tokens=128)
        asked.clear()
        scores = apart.score(rows).score
    torch.testing.assert_close(scores, whole.score(rows).score, atol=1e-4, rtol=1e-4)
    sizes = [sum(map(len, body["input"])) for _, body in asked]
    assert len(sizes) > 5
    assert max(sizes) <= 128
    with pooling(whole.backbone.model) as (url, asked):
        apart.backbone.runner._client.url = url
        apart.backbone.embed([PromptGroup((Message("user", "Q"),), list("abcdef"))], max_rows=3)
    assert sorted(len(body["input"]) for _, body in asked) == [1, 3, 3]


def test_normalised_embeddings_are_found_at_once(whole):
    with (
        pooling(whole.backbone.model, change=lambda s: s / s.norm()) as (url, _),
        pytest.raises(RemoteError, match="normalised"),
    ):
        split(whole, url)


def test_another_model_behind_the_server_is_found_at_once(whole):
    with (
        pooling(whole.backbone.model, change=lambda state: state * 1.01) as (url, _),
        pytest.raises(ArtifactError, match="deviate by"),
    ):
        split(whole, url)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda answer: {"data": answer["data"][:-1]}, "one embedding for each"),
        (lambda answer: {"error": "no"}, "one embedding for each"),
        (
            lambda answer: {"data": [{**part, "index": 0} for part in answer["data"]]},
            "one embedding for each",
        ),
        (lambda answer: [], "one embedding for each"),
        (
            lambda answer: {"data": [{**part, "data": [part["data"]]} for part in answer["data"]]},
            "--convert embed",
        ),
        (
            lambda answer: {"data": [{**p, "data": [float("nan")] * 16} for p in answer["data"]]},
            "not finite",
        ),
    ],
)
def test_an_answer_of_another_form_is_refused(whole, wrap, message):
    with (
        pooling(whole.backbone.model, wrap=wrap) as (url, _),
        pytest.raises(RemoteError, match=message),
    ):
        split(whole, url)


def test_a_server_that_refuses_or_is_not_there_is_named(whole):
    with (
        pooling(whole.backbone.model, key="k") as (url, _),
        pytest.raises(RemoteError, match=r"/pooling answers 401"),
    ):
        split(whole, url)
    with pytest.raises(RemoteError, match="does not answer"):
        split(whole, url)
    with pytest.raises(ValueError, match="http://"):
        PoolingClient("file:///etc/passwd", timeout_s=1)


@pytest.mark.parametrize("status", [0, 429, 503])
def test_a_server_that_is_busy_for_a_moment_is_asked_again(whole, status):
    left = [status, status]
    with pooling(whole.backbone.model, fail=lambda body: left.pop() if left else None) as (url, _):
        state = PoolingClient(url, timeout_s=10).embed([[3, 4]])
        assert state.shape == (1, whole.backbone.dim)
        assert not left
        left += [status] * 3
        with pytest.raises(AwayError):
            PoolingClient(url, timeout_s=10).embed([[3, 4]])
        assert not left


def test_a_server_that_refuses_or_hangs_is_not_asked_again(whole):
    asked = []

    def fail(body):
        asked.append(body)
        return 400 if body["input"] == [[1]] else time.sleep(0.3)

    with pooling(whole.backbone.model, fail=fail) as (url, _):
        client = PoolingClient(url, timeout_s=0.1)
        with pytest.raises(RemoteError, match="answers 400") as caught:
            client.embed([[1]])
        assert not isinstance(caught.value, AwayError)
        with pytest.raises(AwayError, match="timed out"):
            client.embed([[2]])
    assert len(asked) == 2


def test_another_model_that_takes_the_place_of_the_first_is_found(whole):
    narrow = []
    with pooling(whole.backbone.model, change=lambda s: s[:5] if narrow else s) as (url, _):
        apart = split(whole, url)
        narrow.append(True)
        with pytest.raises(RemoteError, match="width 5, not of 16"):
            apart.score(ROWS)


def test_a_server_that_is_away_fails_the_request_at_once_and_not_its_rows(whole, caplog):
    with pooling(whole.backbone.model) as (url, _):
        apart = split(whole, url)
    with serving(apart) as client:
        refused = client.post("/score", json={"conversations": ROWS})
        assert refused.status_code == 503
        assert "the backbone's server does not answer" in refused.json()["detail"]
        # Not one time for each row: each may take as long as the timeout.
        (failed,) = [r for r in caplog.records if "failed" in r.message]
        assert failed.message.startswith("3 rows of ")
        assert failed.message.count(url) == 1
        assert not failed.exc_info
        deadline = time.monotonic() + 10
        while client.get("/health").status_code != 503 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert client.get("/health").status_code == 503


def test_a_row_that_the_server_refuses_does_not_spoil_the_others(whole):
    def fail(body):
        return 400 if any(len(ids) > 100 for ids in body["input"]) else None

    with pooling(whole.backbone.model) as (url, _):
        apart = split(whole, url)
    with pooling(whole.backbone.model, fail=fail) as (url, _):
        apart.backbone.runner._client.url = url
        with serving(apart) as client:
            rows = client.post("/score", json={"conversations": ROWS}).json()["rows"]
    assert ["error" in row for row in rows] == [False, False, True]


def test_a_model_that_reads_more_than_the_last_state_is_refused(encoder, tmp_path):
    make_model(encoder).save_pretrained(tmp_path / "model")
    client = PoolingClient("http://127.0.0.1:9", timeout_s=1)
    with pytest.raises(BackboneError, match="pooling: mean"):
        load_split(tmp_path / "model", client, tokenizer="not/looked/for")


def test_a_tokenizer_that_is_not_there_is_named(whole, tmp_path):
    client = PoolingClient("http://127.0.0.1:9", timeout_s=1)
    with pytest.raises(ValueError, match=rf"^No tokenizer at {tmp_path}, and the hub"):
        load_split(whole.folder, client, tokenizer=tmp_path)


def test_another_tokenizer_is_refused(whole, encoder_folder):
    client = PoolingClient("http://127.0.0.1:9", timeout_s=1)
    with pytest.raises(BackboneError, match="tokenizer is not"):
        load_split(whole.folder, client, tokenizer=encoder_folder)
