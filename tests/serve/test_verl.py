"""`compute_score` as verl 0.9.1 finds and calls it.

verl is not installed here; what its code does around the call is written out, with the file of verl
that does it. `tests/programs/test_verl.py` runs verl itself.
"""

import asyncio
import importlib
import importlib.util
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import conversation, make_model

import armo.serve.verl
from armo.serve.rewards import LIMIT

PROMPT = [{"role": "user", "content": "Is honey safe for babies?"}]
TEXTS = ["Not before their first birthday.", "Yes, always!", "", "Ask a doctor."]


@pytest.fixture
def folder(causal_model, tmp_path):
    causal_model.save_pretrained(tmp_path)
    return str(tmp_path)


def find(how):
    """`load_module` of verl/utils/import_utils.py, for both kinds of path."""
    if how == "package":
        module = importlib.import_module("pkg://armo.serve.verl".removeprefix("pkg://"))
    else:
        spec = importlib.util.spec_from_file_location("custom_module", armo.serve.verl.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module.compute_score


def with_kwargs(raw, extra, *args, **kwargs):
    """`_call_with_kwargs` of verl/trainer/ppo/reward.py."""
    return raw(*args, **{**kwargs, **extra})


async def run_naive(compute_score, texts, extra_info, **extra):
    """`run_single` of verl/experimental/reward_loop/reward_manager/naive.py, rows at once."""
    loop = asyncio.get_running_loop()

    def call(text):
        return compute_score(
            data_source="chat",
            solution_str=text,
            ground_truth="",
            extra_info={**extra_info, "num_turns": 2, "rollout_reward_scores": {}},
            **extra,
        )

    return await asyncio.gather(*(loop.run_in_executor(None, partial(call, t)) for t in texts))


@pytest.mark.parametrize("how", ["package", "file"])
def test_scores_and_objectives_are_the_models_own(how, folder, causal_model):
    compute_score = partial(with_kwargs, find(how), {"model": folder, "limit": 1000.0})
    results = asyncio.run(run_naive(compute_score, TEXTS, {"raw_prompt": PROMPT, "index": 0}))
    # `_postprocess` of verl/experimental/agent_loop/agent_loop.py: the keys of the first row.
    columns = {key: np.array([row[key] for row in results]) for key in results[0]}
    assert set(columns) == {*causal_model.objectives.names, "score"}
    assert all(np.isfinite(column.astype(np.float32)).all() for column in columns.values())
    rows = [0, 1, 3]
    out = causal_model.score([conversation(PROMPT[0]["content"], TEXTS[k]) for k in rows])
    assert columns["score"][rows] == pytest.approx(out.score.numpy(), abs=1e-5)
    for name, values in zip(out.objectives, out.adjusted.T.numpy(), strict=True):
        assert columns[name][rows] == pytest.approx(values, abs=1e-5)
    assert columns["score"][2] == columns["honesty"][2] == -1000.0


def test_the_model_is_loaded_once_for_all_threads(folder, monkeypatch):
    loads = []
    load = armo.serve.verl.ArmoRewardModel.from_pretrained
    monkeypatch.setattr(
        armo.serve.verl.ArmoRewardModel,
        "from_pretrained",
        lambda *args, **options: loads.append(args) or load(*args, **options),
    )
    score = partial(with_kwargs, armo.serve.verl.compute_score, {"model": folder})
    results = asyncio.run(run_naive(score, TEXTS * 4, {"raw_prompt": PROMPT}))
    assert len(loads) == 1
    assert [row["score"] for row in results[:4]] == pytest.approx(
        [row["score"] for row in results[4:8]]
    )
    assert results[2]["score"] == -LIMIT


def test_each_limit_and_device_has_a_model_of_its_own(folder, monkeypatch):
    devices = []
    load = armo.serve.verl.ArmoRewardModel.from_pretrained
    monkeypatch.setattr(
        armo.serve.verl.ArmoRewardModel,
        "from_pretrained",
        lambda path, *, device: devices.append(device) or load(path, device="cpu"),
    )
    info = {"raw_prompt": PROMPT}
    for limit in (0.01, 0.02):
        for device in ("cpu", "cuda:1"):
            score = armo.serve.verl.compute_score(
                "chat", TEXTS[1], "", info, model=folder, limit=limit, device=device
            )
            assert abs(score["score"]) == pytest.approx(limit)
    assert devices == ["cpu", "cuda:1"] * 2


def test_the_score_is_the_score_whatever_an_objective_is_called(monkeypatch):
    out = SimpleNamespace(objectives=("score", "honesty"))
    batch = SimpleNamespace(out=out, adjusted=torch.tensor([[7.0, 8.0]]), score=torch.tensor([9.0]))
    rewards = SimpleNamespace(rate=lambda prompts, completions: batch)
    monkeypatch.setattr(armo.serve.verl, "_rewards", lambda *_: rewards)
    row = armo.serve.verl.compute_score("chat", "Fine.", "", {"raw_prompt": PROMPT}, model="any")
    assert row == {"score": 9.0, "honesty": 8.0}


def test_the_prompt_may_be_a_column_of_the_data(folder):
    """As parquet gives it, with the arguments of verl's own reward model beside it."""
    score = partial(with_kwargs, armo.serve.verl.compute_score, {"model": folder})
    router = {"reward_router_address": "127.0.0.1:1", "reward_model_tokenizer": None}
    expected = asyncio.run(run_naive(score, TEXTS[:1], {"raw_prompt": PROMPT}))
    array = np.array(PROMPT, dtype=object)
    assert asyncio.run(run_naive(score, TEXTS[:1], {"raw_prompt": array}, **router)) == expected
    named = partial(score, prompt_key="question")
    text = PROMPT[0]["content"]
    assert asyncio.run(run_naive(named, TEXTS[:1], {"question": text})) == expected


def test_wrong_configuration_is_refused(folder):
    with pytest.raises(ValueError, match=r"no prompt under 'raw_prompt', but \['index'\]"):
        armo.serve.verl.compute_score("chat", "Fine.", "", {"index": 3}, model=folder)
    with pytest.raises(TypeError, match="prompt_keys"):
        armo.serve.verl.compute_score("chat", "Fine.", "", {}, model=folder, prompt_keys="a")


def test_a_backbone_of_an_encoder_serves_too(encoder, tmp_path):
    make_model(encoder).save_pretrained(tmp_path)
    info = {"raw_prompt": PROMPT}
    row = armo.serve.verl.compute_score("chat", "Fine.", "", info, model=str(tmp_path))
    assert np.isfinite(list(row.values())).all()
