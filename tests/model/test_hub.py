"""Pushing a model to the hub and loading it from there, against a stand-in of the hub's API."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import conversation, make_model

REPO, COMMIT = "someone/model", "c" * 40
CONVERSATIONS = [conversation("Is it safe?", "Yes."), conversation("Hello", "- one\n- two")]


class Hub(ThreadingHTTPServer):
    """Keeps one repository; answers what `huggingface_hub` asks."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked, self.created = {}, [], None

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, value, status=200, **headers):
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self):
        hub = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.asked.append((self.command, self.path, self.headers.get("Authorization")))
        if self.path == "/api/repos/create":
            hub.created = json.loads(body)
            return self.answer({"url": f"{hub.address}/{REPO}", "name": REPO})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            return self.answer({"files": files})
        if "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    file = entry["value"]
                    hub.files[file["path"]] = base64.b64decode(file["content"])
            commit = {"commitOid": COMMIT, "commitUrl": f"{hub.address}/{REPO}/commit/{COMMIT}"}
            return self.answer({**commit, "success": True})
        return self.answer({"error": f"not known: {self.path}"}, 404)

    def do_GET(self):
        hub = self.server
        hub.asked.append((self.command, self.path, self.headers.get("Authorization")))
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{REPO}/tree/"):
            return self.answer(
                [
                    {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for n, c in hub.files.items()
                ]
            )
        if path.startswith(f"/api/models/{REPO}"):
            return self.answer(
                {
                    "id": REPO,
                    "modelId": REPO,
                    "sha": COMMIT,
                    "siblings": [{"rfilename": name} for name in hub.files],
                }
            )
        name = path.partition(f"/{REPO}/resolve/")[2].partition("/")[2]
        if name in hub.files:
            content = hub.files[name]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self.answer(content, ETag=etag, X_Repo_Commit=COMMIT)
        return self.answer({"error": "no entry"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def hub():
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


def run(code, *arguments, hub, home):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + str(hub.asked)
    return json.loads(done.stdout.splitlines()[-1])


PUSH = """
import json, sys, armo
model = armo.ArmoRewardModel.from_pretrained(sys.argv[1], device="cpu")
whole = sys.argv[2] == "whole"
print(json.dumps(model.push_to_hub("someone/model", token="hf_t", private=True,
                                   include_backbone=whole)))
"""
LOAD = """
import json, sys, armo
from transformers import AutoModelForSequenceClassification, pipeline
model = armo.ArmoRewardModel.from_pretrained("someone/model", device="cpu")
auto = AutoModelForSequenceClassification.from_pretrained("someone/model")
pipe = pipeline("text-classification", model="someone/model", function_to_apply="none")
conversations = json.loads(sys.argv[1])
texts = [pipe.tokenizer.apply_chat_template(c, tokenize=False) for c in conversations]
print(json.dumps([model.verify(), model.score(conversations).score.tolist(),
    auto.score(conversations).score.tolist(), [row["score"] for row in pipe(texts)]]))
"""


@pytest.mark.parametrize("whole", [True, False])
def test_a_pushed_model_is_the_folder_and_loads_by_its_name(encoder, tmp_path, hub, whole):
    made = make_model(encoder, covariates=("bold",))
    folder = tmp_path / "model"
    made.save_pretrained(folder, golden=CONVERSATIONS, card="# A card\n", include_backbone=whole)
    address = run(PUSH, folder, "whole" if whole else "bare", hub=hub, home=tmp_path / "one")
    assert address == f"{hub.address}/{REPO}/commit/{COMMIT}"
    assert "private" in str(hub.created)
    assert all(token == "Bearer hf_t" for method, _, token in hub.asked if method == "POST")
    pushed = {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }
    assert hub.files == pushed
    expected = made.score(CONVERSATIONS).score.tolist()
    # Pickles and code beside it are not even fetched.
    hub.files["pytorch_model.bin"] = hub.files["modeling.py"] = b"\x80"
    deviation, *scores = run(LOAD, json.dumps(CONVERSATIONS), hub=hub, home=tmp_path / "two")
    assert deviation < 1e-6
    for found in scores:
        assert found == pytest.approx(expected, abs=1e-5, rel=1e-6)
    assert not [path for _, path, _ in hub.asked if path.endswith((".bin", ".py"))]
