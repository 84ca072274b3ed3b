"""`armo.serve.verl` in verl itself: its configuration, data set, agent loops and reward loop.

What generates is stood in for by fixed texts; what comes before and after is verl's.
"""

import asyncio
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model

pytest.importorskip("verl", reason="it has an environment of its own: `make programs` makes it")

import ray
import verl.experimental.agent_loop.agent_loop as old_loop
import verl.trainer.ppo.v1.agent_loop_tq as new_loop
from datasets import Dataset
from hydra import compose, initialize_config_module
from transformers import AutoTokenizer
from verl import DataProto
from verl.experimental.reward_loop.reward_loop import RewardLoopManager, RewardLoopWorker
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.reward import extract_reward
from verl.utils.dataset.rl_dataset import collate_fn, get_dataset_class
from verl.utils.tensordict_utils import assign_non_tensor_data, get_tensordict
from verl.workers.rollout.replica import TokenOutput

from programs.server import armo_serve

# One for all: a manager of verl keeps what belongs to the first loop that it ran in.
LOOP = asyncio.Runner()
README = (Path(__file__).parents[2] / "README.md").read_text()
COMMAND = next(block for block in README.split("```")[1::2] if "verl.trainer" in block)
PROMPTS = [
    [{"role": "user", "content": "Is honey safe for babies?"}],
    [
        {"role": "user", "content": "How do I boil an egg?"},
        {"role": "assistant", "content": "How soft?"},
        {"role": "user", "content": "Soft."},
    ],
]
ENGINE = ["actor_rollout_ref.rollout.name=vllm", "reward.reward_model.rollout.name=vllm"]
TEXTS = [["Not before their first birthday.", "Yes, always!"], ["Four minutes.", ""]]


@pytest.fixture
def reference(causal):
    return make_model(causal)


@pytest.fixture
def place(reference, tmp_path, monkeypatch):
    """A folder with the model that README's command names."""
    monkeypatch.chdir(tmp_path)
    reference.save_pretrained("checkpoints/demo/model")
    return tmp_path


@pytest.fixture
def configured(place, causal_folder):
    """Verl's own configuration of its trainer, with README's settings and further ones."""

    def configure(*more, ours=True):
        words = [word for word in shlex.split(COMMAND) if "=" in word] if ours else []
        words += [f"actor_rollout_ref.model.path={causal_folder}", *ENGINE, *more]
        if ours:
            words.append("+reward.custom_reward_function.reward_kwargs.limit=1000")
        with initialize_config_module("verl.trainer.config", version_base=None):
            return compose("ppo_trainer", overrides=words)

    return configure


def read(config, tokenizer, extra_info):
    """A batch of the trainer's data loader, of a file that verl reads."""
    rows = [
        {
            "data_source": "chat",
            "prompt": prompt,
            "reward_model": {"style": "model", "ground_truth": ""},
            "extra_info": {"index": k, **extra_info(prompt)},
        }
        for k, prompt in enumerate(PROMPTS)
    ]
    Dataset.from_list(rows).to_parquet("train.parquet")
    dataset = get_dataset_class(config.data)(
        data_files="train.parquet", tokenizer=tokenizer, config=config.data
    )
    return collate_fn([dataset[k] for k in range(len(dataset))])


class Engine:
    """Writes the texts to their prompts, in turn."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.left = {
            prompt[-1]["content"]: list(texts) for prompt, texts in zip(PROMPTS, TEXTS, strict=True)
        }

    async def generate(self, *, prompt_ids, **options):
        prompt = self.tokenizer.decode(prompt_ids)
        (texts,) = (texts for turn, texts in self.left.items() if turn in prompt)
        ids = self.tokenizer(texts.pop(0), add_special_tokens=False)["input_ids"]
        return TokenOutput(token_ids=[*ids, self.tokenizer.eos_token_id], extra_fields={})


class Local:
    """A reward loop worker in this process, called as if it were an actor of Ray's."""

    def __init__(self, config):
        worker = RewardLoopWorker(config)

        class compute_score:  # noqa: N801
            remote = staticmethod(worker.compute_score)

        self.compute_score = compute_score


def roll_out(config, tokenizer, batch, handles=None):
    """The old trainer's rollout of two responses to each prompt, with its rewards."""
    rows = DataProto.from_single_dict(batch)
    rows.non_tensor_batch["uid"] = np.array(["a", "b"], dtype=object)
    rows = rows.repeat(2, interleave=True)
    rows.pop(batch_keys=list(rows.batch.keys()))

    async def run():
        worker = old_loop.AgentLoopWorker(
            config, Engine(tokenizer), reward_loop_worker_handles=handles or [Local(config)]
        )
        return await worker.generate_sequences(rows)

    out = LOOP.run(run())
    out.non_tensor_batch["uid"] = rows.non_tensor_batch["uid"]
    return out


def rows(tokenizer, batch):
    """The texts as the trainer hands them to reward loop workers, when it has all of them."""
    texts = [text for texts in TEXTS for text in texts]
    ids = [
        tokenizer(f"{text}{tokenizer.eos_token}", return_tensors="pt").input_ids[0]
        for text in texts
    ]
    width = max(map(len, ids))
    prompts = torch.zeros(4, 3, dtype=torch.long)
    mask = torch.stack([(torch.arange(width) < len(row)).long() for row in ids])
    return DataProto.from_single_dict(
        {
            "prompts": prompts,
            "responses": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
            "attention_mask": torch.cat([torch.ones_like(prompts), mask], 1),
            "raw_prompt": batch["raw_prompt"].repeat(2),
        }
    )


def expected(model):
    """By text, the score and the adjusted rewards; those of the empty one are the worst."""
    pairs = [(PROMPTS[k], text) for k in range(2) for text in TEXTS[k]][:3]
    out = model.score([[*p, {"role": "assistant", "content": text}] for p, text in pairs])
    columns = [out.score[:, None], out.adjusted]
    worst = [-1000.0, *(0.0 if o.bias else -1000.0 for o in model.objectives.objectives)]
    rows = [*torch.cat(columns, 1).tolist(), worst]
    names = ["score", *out.objectives]
    return {
        text: dict(zip(names, row, strict=True))
        for text, row in zip([*TEXTS[0], *TEXTS[1]], rows, strict=True)
    }


def in_extra_info(prompt):
    return {"raw_prompt": prompt}


def nothing(prompt):
    return {}


@pytest.fixture
def tokenizer(causal_folder):
    return AutoTokenizer.from_pretrained(causal_folder)


def check(out, tokenizer, model):
    wanted = expected(model)
    rewards, extra = extract_reward(out)
    assert set(extra) == {"score", *model.objectives.names}
    texts = tokenizer.batch_decode(out.batch["responses"], skip_special_tokens=True)
    assert sorted(texts) == sorted(wanted)
    last = out.batch["response_mask"].sum(1) - 1
    for k, text in enumerate(texts):
        assert float(rewards[k, last[k]]) == pytest.approx(wanted[text]["score"], abs=1e-4)
        assert int((rewards[k] != 0).sum()) == 1
        assert {name: float(extra[name][k]) for name in extra} == pytest.approx(
            wanted[text], abs=1e-4
        )


@pytest.mark.parametrize("manager", ["naive", "dapo", "gdpo", "rate_limited"])
def test_each_manager_of_the_old_trainer_gives_the_models_scores(
    manager, configured, tokenizer, reference
):
    config = configured(f"reward.reward_manager.name={manager}", "trainer.use_v1=False")
    batch = read(config, tokenizer, in_extra_info)
    check(roll_out(config, tokenizer, batch), tokenizer, reference)


@pytest.mark.parametrize("manager", ["naive", "rate_limited"])
def test_the_old_trainer_gives_the_prompt_itself_to_some_managers(
    manager, configured, tokenizer, reference
):
    config = configured(f"reward.reward_manager.name={manager}", "trainer.use_v1=False")
    batch = read(config, tokenizer, nothing)
    check(roll_out(config, tokenizer, batch), tokenizer, reference)


@pytest.mark.parametrize("manager", ["dapo", "gdpo"])
def test_other_managers_need_the_prompt_in_the_data(manager, configured, tokenizer):
    config = configured(f"reward.reward_manager.name={manager}", "trainer.use_v1=False")
    batch = read(config, tokenizer, nothing)
    with pytest.raises(ValueError, match="no prompt under 'raw_prompt'"):
        roll_out(config, tokenizer, batch)


class Queue:
    """What the trainer's transfer queue is given."""

    def __init__(self):
        self.rows, self.states = [], []

    def init(self):
        pass

    async def async_kv_put(self, *, key, partition_id, tag):
        self.states.append(tag["status"])

    async def async_kv_batch_put(self, *, keys, fields, tags, partition_id):
        self.rows += list(fields)


def roll_out_v1(config, tokenizer, batch, monkeypatch):
    """The rollout of the default trainer, two responses to each prompt: what it queues."""
    monkeypatch.setattr(new_loop, "tq", Queue())
    kind = new_loop.AgentLoopWorkerTQ.__ray_metadata__.modified_class
    rows = get_tensordict({**batch, "uid": np.array(["a", "b"], dtype=object)})
    assign_non_tensor_data(rows, "global_steps", 1)

    async def run():
        worker = kind(config, Engine(tokenizer), reward_loop_worker_handles=[Local(config)])
        await worker.generate_sequences(rows)
        await asyncio.gather(*worker.background_tasks)

    LOOP.run(run())
    return new_loop.tq


def test_the_default_trainer_gives_the_models_scores(configured, tokenizer, reference, monkeypatch):
    config = configured("actor_rollout_ref.rollout.n=2")
    batch = read(config, tokenizer, in_extra_info)
    queue = roll_out_v1(config, tokenizer, batch, monkeypatch)
    wanted = expected(reference)
    assert queue.states == ["running"] * 2 + ["finished"] * 2
    for row in queue.rows:
        text = tokenizer.decode(row["responses"], skip_special_tokens=True)
        assert float(row["rm_scores"][-1]) == pytest.approx(wanted[text]["score"], abs=1e-4)
        assert row["extra_fields"]["reward_extra_info"] == pytest.approx(wanted[text], abs=1e-4)


def test_the_default_trainer_needs_the_prompt_in_the_data(
    configured, tokenizer, monkeypatch, caplog
):
    config = configured("actor_rollout_ref.rollout.n=2")
    batch = read(config, tokenizer, nothing)
    queue = roll_out_v1(config, tokenizer, batch, monkeypatch)
    assert queue.states == ["running"] * 2 + ["failure"] * 2
    assert "no prompt under 'raw_prompt'" in caplog.text


def test_gdpo_normalises_each_objective_by_itself(configured, tokenizer, reference):
    """By the old trainer; the default one of verl 0.9.1 does not hand it the objectives."""
    keys = ["honesty", "harm"]
    config = configured(
        "trainer.use_v1=False",
        "algorithm.adv_estimator=gdpo",
        f"+algorithm.gdpo_reward_keys=[{','.join(keys)}]",
        "+algorithm.gdpo_reward_weights=[1,3]",
    )
    out = roll_out(config, tokenizer, read(config, tokenizer, in_extra_info))
    out.batch["token_level_rewards"] = out.batch["rm_scores"]
    done = compute_advantage(out, adv_estimator="gdpo", config=config.algorithm)
    advantages = done.batch["advantages"]
    # Of two responses each objective has a better and a worse one: plus and minus one over root 2.
    mixed = torch.zeros(4)
    for key, weight in zip(keys, [1, 3], strict=True):
        column = torch.tensor(out.non_tensor_batch[key].astype(np.float32)).reshape(2, 2)
        mixed += weight * (column - column.mean(1, keepdim=True)).sign().flatten() / 2**0.5
    mask = out.batch["response_mask"].bool()
    tokens = mixed[:, None].expand(mask.shape)[mask]
    wanted = (mixed - tokens.mean()) / tokens.std()
    assert advantages[:, 0].tolist() == pytest.approx(wanted.tolist(), abs=1e-3)


@pytest.fixture(scope="module")
def cluster():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=3, include_dashboard=False, object_store_memory=100_000_000)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("manager", ["naive", "remote"])
def test_processes_of_ray_give_the_models_scores(
    manager, configured, tokenizer, reference, place, cluster
):
    config = configured(
        f"reward.reward_manager.name={manager}",
        "reward.num_workers=1",
        f"++reward.custom_reward_function.reward_kwargs.model={place}/checkpoints/demo/model",
    )
    batch = read(config, tokenizer, in_extra_info)
    loop = RewardLoopManager(config)
    check(roll_out(config, tokenizer, batch, loop.reward_loop_worker_handles), tokenizer, reference)
    for worker in loop.reward_loop_workers:
        ray.kill(worker)


@pytest.mark.slow
def test_what_verl_asks_its_own_reward_model_armo_serve_answers(
    configured, tokenizer, reference, place
):
    with armo_serve(place / "checkpoints/demo/model", "server.limit=1000") as url:
        for engine in ("vllm", "sglang"):
            config = configured(
                "reward.reward_model.enable=True",
                "reward.reward_model.model_path=checkpoints/demo/model",
                f"reward.reward_model.rollout.name={engine}",
                ours=False,
            )
            batch = read(config, tokenizer, nothing)

            async def run(config=config, batch=batch):
                worker = RewardLoopWorker(config, url.removeprefix("http://"))
                return await worker.compute_score_batch(rows(tokenizer, batch))

            scores = [row["reward_score"] for row in LOOP.run(run())]
            wanted = expected(reference)
            assert scores == pytest.approx(
                [wanted[text]["score"] for texts in TEXTS for text in texts], abs=1e-4
            )
