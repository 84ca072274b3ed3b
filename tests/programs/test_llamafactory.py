"""LLaMA-Factory's PPO of a tiny policy, whose rewards are those of `armo serve`."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
from conftest import conversation, make_model, make_policy
from transformers import AutoTokenizer

pytest.importorskip("llamafactory", reason="it has its own environment: `make programs` makes it")

from programs.server import armo_serve

PROMPTS = ["Is honey safe?", "Who are you?"]


# The encoder's template is not the policy's.
@pytest.fixture(params=["causal", "encoder"])
def reference(request):
    return make_model(request.getfixturevalue(request.param))


@pytest.fixture
def place(reference, causal_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reference.save_pretrained("model")
    tokenizer = AutoTokenizer.from_pretrained(causal_folder)
    make_policy(tokenizer).save_pretrained("policy")
    tokenizer.save_pretrained("policy")
    rows = [{"instruction": text, "input": "", "output": ""} for text in PROMPTS * 4]
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    declared = {"prompts": {"file_name": "prompts.json"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(declared))
    return tmp_path


@pytest.fixture
def ppo(monkeypatch):
    """LLaMA-Factory's modules of PPO, in the versions of other packages that are there."""
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    # For sounds, of which there are none here; no build of it is for the CPU alone.
    torchaudio = ModuleType("torchaudio")
    torchaudio.__spec__ = ModuleSpec("torchaudio", None)
    monkeypatch.setitem(sys.modules, "torchaudio", torchaudio)
    from llamafactory.train.ppo import trainer, workflow

    return SimpleNamespace(trainer=trainer, workflow=workflow)


def test_ppo_trains_on_the_models_scores(place, reference, ppo, monkeypatch):
    from llamafactory.hparams import get_train_args

    asked = []
    ask = ppo.trainer.get_rewards_from_server

    def kept(url, messages):
        rewards = ask(url, messages)
        asked.extend(zip(messages, rewards, strict=True))
        return rewards

    monkeypatch.setattr(ppo.trainer, "get_rewards_from_server", kept)
    with armo_serve(place / "model", "server.limit=1000", f"server.policy={place}/policy") as url:
        settings = {
            "stage": "ppo",
            "do_train": True,
            "model_name_or_path": "policy",
            "reward_model": f"{url}/v1/score/evaluation",
            "reward_model_type": "api",
            "dataset": "prompts",
            "dataset_dir": ".",
            "finetuning_type": "full",
            "output_dir": "out",
            "max_new_tokens": 8,
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "use_cpu": True,
            "report_to": "none",
        }
        ppo.workflow.run_ppo(*get_train_args(settings))
    assert (place / "out" / "model.safetensors").exists()
    assert len(asked) == 8
    # Where the policy wrote no control text and ended nothing, the response is all that it wrote.
    plain = [(*text.partition("assistant<|end|>\n\n")[::2], reward) for text, reward in asked]
    plain = [row for row in plain if "<|" not in row[1] and row[1] == row[1].strip()]
    assert len(plain) > 2
    for head, text, reward in plain:
        (prompt,) = (prompt for prompt in PROMPTS if prompt in head)
        score = float(reference.score([conversation(prompt, text)]).score[0])
        assert float(reward) == pytest.approx(score, abs=1e-3)
