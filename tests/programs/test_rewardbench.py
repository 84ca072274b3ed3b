"""RewardBench's command on an export, with the exact Transformers that it pins.

It pins an older one than armo runs with, so another process makes the export. It sends tokens to
CUDA whatever there is; here they stay.
"""

import json
import subprocess
from pathlib import Path

import pytest
import transformers
from conftest import conversation

pytest.importorskip("rewardbench", reason="it has its own environment: `make programs` makes it")

from rewardbench.rewardbench import Args, rewardbench

ROOT = Path(__file__).parents[2]
PAIRS = [
    ("How do I boil an egg?", "In hot water for seven minutes.", "No."),
    ("Is honey safe?", "Not for babies.", "Yes, always! " * 4),
    ("Count to 3.", "- 1\n- 2\n- 3", "3 2 1"),
]
MAKE = """
import json, sys
from conftest import conversation, make_model
from armo.embed.backbone import load_backbone
from armo.embed.spec import BackboneSpec
from armo.model.export import export_model

folder, out, pairs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
spec = BackboneSpec(folder, pooling="last", max_tokens=128, max_prompt_tokens=64)
model = make_model(load_backbone(spec, device="cpu"))
weights = {"helpfulness": 3, "honesty": 1}
export_model(model, out, format="single", weights=weights)
talks = [conversation(p, text) for p, *texts in pairs for text in texts]
print(json.dumps(model.score(talks, weights=weights).score.tolist()))
"""


def test_the_command_ranks_as_the_model_does(causal_folder, tmp_path, monkeypatch):
    assert transformers.__version__ == "4.51.0"
    monkeypatch.chdir(tmp_path)
    command = [ROOT / ".venv/bin/python", "-c", MAKE, causal_folder, tmp_path / "export"]
    made = subprocess.run(
        [*command, json.dumps(PAIRS)], cwd=ROOT / "tests", capture_output=True, check=True
    )
    scores = json.loads(made.stdout)
    rows = [
        {"chosen": conversation(p, chosen), "rejected": conversation(p, rejected)}
        for p, chosen, rejected in PAIRS
    ]
    Path("pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    to = transformers.BatchEncoding.to
    monkeypatch.setattr(transformers.BatchEncoding, "to", lambda batch, device: to(batch, "cpu"))
    rewardbench(
        Args(
            dataset="pairs.jsonl",
            load_json=True,
            model="export",
            not_quantized=True,
            torch_dtype="float32",
            max_length=4096,
            batch_size=2,
            save_all=True,
        )
    )
    offset = json.loads(Path("export/config.json").read_text())["armo"]["score_offset"]
    rewards = [
        json.loads(line) for line in Path("results/export_all.jsonl").read_text().split("\n")[:-1]
    ]
    found = [row[side][0] + offset for row in rewards for side in ("chosen", "rejected")]
    assert found == pytest.approx(scores, abs=1e-3)
    wins = [a > b for a, b in zip(scores[::2], scores[1::2], strict=True)]
    result = json.loads(Path("results/export.json").read_text())
    assert result["accuracy"] == pytest.approx(sum(wins) / len(wins))
    assert result["num_prompts"] == len(PAIRS)
