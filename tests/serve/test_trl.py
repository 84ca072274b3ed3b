"""Real trainers of TRL train a tiny random policy on our rewards."""

import pytest
import torch
from conftest import make_model, make_policy
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from armo.model.reward_model import ArmoRewardModel
from armo.serve.rewards import Rewards

TEXTS = ["How do I boil an egg?", "Is honey safe?", "Who are you?", "Count to 3."]
ROWS = {
    "standard": [{"prompt": text, "answer": text} for text in TEXTS],
    "conversational": [
        {
            "prompt": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": text},
            ],
            "answer": text,
        }
        for text in TEXTS
    ],
}


@pytest.fixture
def train(causal_folder, tmp_path):
    """Train for two steps; return the trainer."""

    def run(reward_funcs, rows, *, kind=(GRPOTrainer, GRPOConfig), given=None, **options):
        tokenizer = AutoTokenizer.from_pretrained(causal_folder)
        trainer_class, config_class = kind
        trainer = trainer_class(
            model=make_policy(tokenizer),
            reward_funcs=reward_funcs,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows),
            args=config_class(
                output_dir=str(tmp_path),
                per_device_train_batch_size=4,
                num_generations=2,
                max_completion_length=12,
                max_steps=2,
                logging_steps=1,
                learning_rate=1e-2,
                report_to="none",
                save_strategy="no",
                use_cpu=True,
                seed=0,
                **options,
            ),
            **(given or {}),
        )
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.train()
        after = trainer.model.parameters()
        assert any(not torch.equal(b, a) for b, a in zip(before, after, strict=True))
        return trainer

    return run


@pytest.mark.parametrize("kind", ["encoder", "causal"])
@pytest.mark.parametrize("form", sorted(ROWS))
def test_grpo_trains_on_the_score(form, kind, request, train):
    rewards = Rewards(make_model(request.getfixturevalue(kind)))
    trainer = train(rewards.score, ROWS[form])
    steps = [log for log in trainer.state.log_history if "rewards/score/mean" in log]
    assert len(steps) == 2
    for step in steps:
        assert step["rewards/score/mean"] == pytest.approx(step["reward"])
        assert 0.0 <= step["armo/weight/honesty"] <= 1.0
        assert {"armo/reward/harm", "armo/unscorable", "armo/truncated"} <= set(step)


def test_grpo_normalises_each_objective_and_runs_one_pass_per_batch(causal_model, train):
    rewards = Rewards(causal_model)
    passes = []
    answer = rewards._answer
    rewards._answer = lambda calls: passes.append(len(calls)) or answer(calls)
    trainer = train(
        rewards.objectives(),
        ROWS["conversational"],
        multi_objective_aggregation="normalize_then_sum",
        reward_weights=[1.0, 1.0, 2.0],
    )
    steps = [log for log in trainer.state.log_history if "reward" in log]
    assert passes == [1] * len(steps)
    for name in ("helpfulness", "honesty", "harm"):
        assert all(step[f"rewards/{name}/std"] > 0.0 for step in steps)


@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_the_model_itself_is_a_reward_module(kind, request, tmp_path, train, no_type_checks):
    """TRL renders conversations with the tokenizer of the folder and reads `logits[:, 0]`."""
    make_model(request.getfixturevalue(kind)).save_pretrained(tmp_path / "model")
    model = ArmoRewardModel.from_pretrained(tmp_path / "model", device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = [{**row, "prompt": row["prompt"][1:]} for row in ROWS["conversational"]]
    seen = []
    model.register_forward_hook(lambda _, args, out: seen.append(out.logits[:, 0]))
    trainer = train(model, rows, given={"reward_processing_classes": tokenizer})
    means = [log["rewards/model/mean"] for log in trainer.state.log_history if "reward" in log]
    assert means == pytest.approx([float(logits.mean()) for logits in seen], abs=1e-5)


def test_rloo_trains_on_score_and_objectives(causal_model, train):
    rewards = Rewards(causal_model)
    trainer = train(
        [rewards.score, *rewards.objectives(["honesty"])],
        ROWS["standard"],
        kind=(RLOOTrainer, RLOOConfig),
        beta=0.0,  # no reference model
    )
    assert "rewards/honesty/mean" in trainer.state.log_history[0]
    assert "armo/weight/honesty" in trainer.state.log_history[0]
