"""The experiment `armorm_llama3_8b`: composed as the paper has it, and run on a tiny Llama."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from conftest import conversation
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from test_armorm import published_forward, write_checkpoint

from armo.data.objectives import ObjectiveSet
from armo.model.export import export_model
from armo.model.reward_model import ArmoRewardModel

EXPERIMENT = "experiment=armorm_llama3_8b"
# One for each objective.
WORDS = [
    "egg",
    "dog",
    "fox",
    "safe",
    "honest",
    "brief",
    "lazy",
    "quick",
    "brown",
    "water",
    "minutes",
    "never",
    "always",
    "seven",
    "hot",
    "cold",
    "jumps",
    "over",
    "two",
]


@pytest.fixture(scope="module")
def composed():
    with initialize_config_module("armo.conf", version_base="1.3"):
        cfg = compose("train", overrides=[EXPERIMENT])
        return OmegaConf.to_container(cfg)


def test_the_recipe_is_that_of_the_paper(composed):
    fit, spec = composed["fit"], composed["embed"]["backbone"]["spec"]
    assert spec["id"] == "sfairXC/FsfairX-LLaMA3-RM-v0.1"
    assert (spec["layers"], spec["pooling"], spec["prompt_position"]) == ([-1], "last", "turn_end")
    objectives = ObjectiveSet.from_mapping(composed["data"]["objectives"])
    assert len(objectives.names) == 19
    assert [objectives.names[k] for k in objectives.bias_indices] == ["helpsteer-verbosity"]
    assert fit["heads"]["alphas"] == [10.0**k for k in range(-4, 5)]
    assert fit["heads"]["intercept"] is False
    assert fit["decorrelation"]["methods"] == ["penalty"]
    gating = fit["gating"]
    assert (gating["hidden_layers"], gating["hidden_dim"]) == (3, 1024)
    assert (gating["temperature"], gating["learning_rate"]) == (10, 1e-3)
    assert (gating["batch_size"], gating["weight_decay"]) == (1024, 0.0)
    assert gating["keep"] == "gate"
    assert fit["trainer"]["max_steps"] == 10_000
    assert "ArmoRM-Multi-Objective-Data-v0.1" in composed["data"]["ratings"]["path"]
    assert len(composed["data"]["pairs"]["sources"]) == 10


def write_sets(folder, names):
    """Sets in the published form, in which the label of an objective is a share of some word."""
    rng = random.Random(0)

    def answer():
        return " ".join(rng.choices(WORDS, k=rng.randint(3, 9)))

    ratings, pairs = [], []
    for number in range(80):
        prompt = f"Tell me of {number} and {rng.choice(WORDS)}"
        for text in (answer(), answer()):
            labels = {
                name: 0.1 + 0.2 * min(4, text.count(WORDS[k]) + (len(text) > 30))
                for k, name in enumerate(names)
            }
            ratings.append({"messages": conversation(prompt, text), **labels})
        first, second = sorted([answer(), answer()], key=lambda text: text.count("egg"))
        # Some sets have scores, one has ratings.
        pairs.append(
            {
                **{"chosen": conversation(prompt, second), "chosen_score": 2, "chosen_rating": 2},
                **{"rejected": conversation(prompt, first), "rejected_score": 1},
                "rejected_rating": 1,
            }
        )
    paths = []
    for name, rows in (("Ratings/data", ratings), ("Pairs/data", pairs)):
        (folder / name).mkdir(parents=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name / "train.jsonl").write_text(text)
        paths.append(folder / name)
    return paths


@pytest.mark.slow
def test_the_recipe_runs_and_its_model_goes_into_the_published_layout(composed, tmp_path):
    ratings, pairs = write_sets(tmp_path / "sets", [*composed["data"]["objectives"]])
    backbone = write_checkpoint(tmp_path / "llama", shards=1)
    small = {
        "data.ratings.path": ratings,
        **{
            f"data.pairs.sources.{name}.path": pairs
            for name in composed["data"]["pairs"]["sources"]
        },
        "data.min_ratings": 2,
        "embed.backbone.spec.id": backbone,
        "embed.backbone.spec.max_tokens": 256,
        "embed.backbone.spec.max_prompt_tokens": 128,
        "embed.backbone.spec.dtype": "float32",
        "embed.backbone.device": "cpu",
        "fit.gating.hidden_dim": 16,
        "fit.trainer.max_steps": 5,
        "fit.gating.progress": "false",
        "output_dir": tmp_path / "run",
    }
    settings = [f"{name}={value}" for name, value in small.items()]
    done = subprocess.run(
        [sys.executable, "-m", "armo.cli", "train", EXPERIMENT, *settings],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    model = ArmoRewardModel.from_pretrained(tmp_path / "run" / "model", device="cpu")
    assert model.verify() < 1e-4
    assert bool((model.head_intercepts == 0).all())
    report = export_model(model, tmp_path / "out", format="armorm")
    # The published layout has all of it: raw rewards, penalties as its transform, a gate of three
    # hidden layers. What it lacks is a constant of the prompt, and one softmax for each member.
    assert not any("`rewards`" in sentence for sentence in report.lost)
    talks = [conversation("Is it safe?", "An egg, always."), conversation("Is it safe?", "Never.")]
    got = published_forward(tmp_path / "out", talks)
    out = model.score(talks)
    torch.testing.assert_close(got["rewards"], out.rewards, atol=1e-4, rtol=0)
    gap = (got["gating_output"] * out.adjusted).sum(1).diff()
    torch.testing.assert_close(got["score"].diff(), gap, atol=1e-3, rtol=0)
