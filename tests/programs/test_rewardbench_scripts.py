"""RewardBench's code around `armo.serve.reward_bench`, with the oldest Transformers of armo.

Two texts for docstrings that it imports from Transformers are no longer there; they are empty here.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from conftest import conversation, make_model
from transformers.models.llama import modeling_llama

from armo.model.reward_model import ArmoRewardModel
from armo.serve.reward_bench import RewardBenchPipeline

PAIRS = [
    ("How do I boil an egg?", "In hot water for seven minutes.", "No."),
    ("Is honey safe?", "Not for babies.", "Yes, always! " * 4),
    ("Count to 3.", "- 1\n- 2\n- 3", "3 2 1"),
]


pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("rewardbench") is None,
    reason="it has its own environment: `make programs` makes it",
)


@pytest.fixture
def rewardbench(monkeypatch):
    """Its package, as the docstring of `armo.serve.reward_bench` imports it."""
    for name in ("_CONFIG_FOR_DOC", "LLAMA_INPUTS_DOCSTRING"):
        monkeypatch.setattr(modeling_llama, name, "", raising=False)
    import rewardbench
    import rewardbench.rewardbench

    return rewardbench


@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_the_code_of_the_command_ranks_as_the_model_does(
    kind, rewardbench, request, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model = make_model(request.getfixturevalue(kind))
    model.save_pretrained("ours")
    entry = {
        "model_builder": ArmoRewardModel.from_pretrained,
        "pipeline_builder": RewardBenchPipeline,
        "quantized": False,
        "custom_dialogue": False,
        "model_type": "Seq. Classifier",
        "torch_dtype": torch.float32,
    }
    monkeypatch.setitem(rewardbench.REWARD_MODEL_CONFIG, "ours", entry)
    rows = [
        {"chosen": conversation(p, chosen), "rejected": conversation(p, rejected)}
        for p, chosen, rejected in PAIRS
    ]
    Path("pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    command = rewardbench.rewardbench
    args = command.Args(dataset="pairs.jsonl", load_json=True, model="ours", save_all=True)
    command.rewardbench(args)
    lines = Path("results/ours_all.jsonl").read_text().splitlines()
    found = [json.loads(line)[side][0] for line in lines for side in ("chosen", "rejected")]
    talks = [conversation(p, text) for p, *texts in PAIRS for text in texts]
    assert found == pytest.approx(model.score(talks).score.tolist(), abs=1e-4)
