"""vLLM itself, on a CPU: it runs the backbone of a split model, and serves exports."""

import json
import os
import sys
import urllib.request
from contextlib import contextmanager

import pytest
import torch
from conftest import conversation, make_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaModel

pytest.importorskip("vllm", reason="it has its own environment: `make programs` makes it")

from armo.embed.backbone import load_backbone
from armo.embed.spec import BackboneSpec
from armo.model.export import export_model
from armo.model.reward_model import ArmoRewardModel
from armo.serve.client import PoolingClient, load_split
from programs.server import armo_serve, serving

ROWS = [
    conversation("Is honey safe?", "Yes."),
    conversation("Is honey safe?", "No, not for small children."),
    [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hello."},
        *conversation("What can you not know?", "The future. " * 90),
    ],
]
# As `vllm serve`, whose script looks for the version under another name than that of the CPU build.
VLLM = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--runner", "pooling")
SIZE = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "16")


@contextmanager
def vllm(folder, convert):
    """The address of a vLLM server of a folder."""
    command = [*VLLM, *SIZE, "--convert", convert, "--model", str(folder), "--host", "127.0.0.1"]
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    quiet = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    with serving(command, port="--port={}", env=os.environ | own | quiet) as url:
        yield url


def post(url, body):
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


@pytest.fixture(scope="module")
def folder(causal_folder, tmp_path_factory):
    """A backbone whose heads have a size that vLLM knows, and a model on it."""
    place = tmp_path_factory.mktemp("vllm")
    tokenizer = AutoTokenizer.from_pretrained(causal_folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaModel(config).save_pretrained(place / "backbone")
    tokenizer.save_pretrained(place / "backbone")
    spec = BackboneSpec(str(place / "backbone"), max_tokens=200, max_prompt_tokens=80)
    make_model(load_backbone(spec, device="cpu")).save_pretrained(place / "model", golden=ROWS)
    return place


def test_a_backbone_in_vllm_gives_the_scores_of_one_that_is_here(folder):
    wanted = ArmoRewardModel.from_pretrained(folder / "model", device="cpu").score(ROWS)
    assert wanted.truncated.tolist() == [False, False, True]
    with vllm(folder / "backbone", "embed") as url:
        split = load_split(folder / "model", PoolingClient(url, timeout_s=60.0)).score(ROWS)
        with armo_serve(folder / "model", f"backbone.url={url}") as own:
            served = post(f"{own}/score", {"conversations": ROWS})
        # What vLLM does where it is not told otherwise, and what heads cannot read.
        body = {"input": [[1, 2, 3]], "task": "embed"}
        (embedding,) = post(f"{url}/pooling", body)["data"]
    torch.testing.assert_close(split.rewards, wanted.rewards, rtol=0.0, atol=1e-3)
    torch.testing.assert_close(split.score, wanted.score, rtol=0.0, atol=1e-3)
    assert split.truncated.tolist() == wanted.truncated.tolist()
    scores = [row["score"] for row in served["rows"]]
    assert scores == pytest.approx(wanted.score.tolist(), abs=1e-3)
    assert torch.tensor(embedding["data"]).norm() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("kind", ["labels", "single"])
def test_vllm_classifies_with_an_export(folder, tmp_path, kind):
    weights = {"honesty": 2.0, "helpfulness": 1.0} if kind == "single" else None
    model = ArmoRewardModel.from_pretrained(folder / "model", device="cpu")
    export_model(model, tmp_path / "export", format=kind, weights=weights)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    rows = ROWS[:2]  # a reader of plain models cuts nothing
    texts = [tokenizer.apply_chat_template(row, tokenize=False) for row in rows]
    ids = [tokenizer.apply_chat_template(row, return_tensors="pt")["input_ids"] for row in rows]
    with torch.inference_mode():
        wanted = torch.cat([plain(row).logits for row in ids]).tolist()
    with vllm(tmp_path / "export", "classify") as url:
        for more in ({}, {"use_activation": False}):
            of_texts = post(f"{url}/classify", {"input": texts, **more})["data"]
            assert [row["probs"] for row in of_texts] == [
                pytest.approx(w, abs=1e-3) for w in wanted
            ]
            for row, values in zip(rows, wanted, strict=True):
                (told,) = post(f"{url}/classify", {"messages": row, **more})["data"]
                assert told["probs"] == pytest.approx(values, abs=1e-3)
