"""`armo.serve.openrlhf` and `armo serve` in OpenRLHF itself: its data, executor and experiences.

What generates is stood in for by fixed texts, and vLLM, of which only names are imported, by
nothing.
"""

import asyncio
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import conversation, make_model
from datasets import Dataset
from transformers import AutoTokenizer

pytest.importorskip("openrlhf", reason="it has an environment of its own: `make programs` makes it")

from openrlhf.datasets.prompts_dataset import PromptDataset
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.length_penalty import apply_length_penalties
from openrlhf.utils.agent import SingleTurnAgentExecutor

from programs.server import armo_serve

QUESTIONS = ["Is honey safe for babies?", "How do I boil an egg? " * 4]
TEXTS = ["Not before their first birthday.", "Yes, always!", ""]


@pytest.fixture(scope="module")
def reference(causal):
    return make_model(causal)


@pytest.fixture(scope="module")
def folder(reference, causal_folder, tmp_path_factory):
    """A model folder, and the file of two lines beside it that README shows."""
    place = tmp_path_factory.mktemp("openrlhf")
    reference.save_pretrained(place / "model")
    (place / "my_reward.py").write_text(
        "from armo.serve.openrlhf import OpenRLHFReward\n"
        f"reward_func = OpenRLHFReward({str(place / 'model')!r}, policy={str(causal_folder)!r},"
        " limit=1000)\n"
    )
    return place


@pytest.fixture(scope="module")
def server(folder):
    with armo_serve(folder / "model", "server.limit=1000") as url:
        yield f"{url}/get_reward"


@pytest.fixture(scope="module")
def server_with_policy(folder, causal_folder):
    settings = ("server.limit=1000", f"server.policy={causal_folder}")
    with armo_serve(folder / "model", *settings) as url:
        yield f"{url}/get_reward"


@pytest.fixture(params=["file", "server", "server_with_policy"])
def remote_url(request, folder):
    """What `--reward.remote_url` names."""
    if request.param == "file":
        return str(folder / "my_reward.py")
    return request.getfixturevalue(request.param)


@pytest.fixture
def generator(monkeypatch):
    """OpenRLHF's own maker of experiences, which imports names of vLLM."""
    names = {"vllm": ["SamplingParams"], "vllm.inputs": ["TokensPrompt"]}
    names["vllm.utils"] = ["random_uuid"]
    for name, attributes in names.items():
        module = ModuleType(name)
        for attribute in attributes:
            setattr(module, attribute, None)
        monkeypatch.setitem(sys.modules, name, module)
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

    return object.__new__(SamplesGenerator)


@pytest.fixture
def tokenizer(causal_folder):
    return AutoTokenizer.from_pretrained(causal_folder)


def prompts_of(tokenizer, *, rendered=True):
    """The prompts as OpenRLHF's data set makes them."""
    data = SimpleNamespace(input_key="input", label_key=None, apply_chat_template=rendered)
    strategy = SimpleNamespace(args=SimpleNamespace(data=data), is_rank_0=lambda: False)
    rows = Dataset.from_list([{"input": question} for question in QUESTIONS])
    dataset = PromptDataset(rows, tokenizer, strategy)
    return [(prompt, label) for _, prompt, label, _ in (dataset[k] for k in range(len(dataset)))]


def execute(remote_url, tokenizer, prompts, texts, *, max_length=200):
    """Each text in answer to each prompt by the executor, all at once."""
    executor = SingleTurnAgentExecutor(remote_url)
    params = SimpleNamespace(max_tokens=60, logprobs=None)

    class Engine:
        def __init__(self, text):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            self.ids = [*ids, tokenizer.eos_token_id]

        async def generate(self, prompt_ids, sampling_params, multi_modal_data=None):
            output = SimpleNamespace(token_ids=self.ids, finish_reason="stop", logprobs=None)
            return SimpleNamespace(outputs=[output])

    async def together():
        return await asyncio.gather(
            *(
                executor.execute(prompt, label, params, max_length, tokenizer, Engine(text))
                for prompt, label in prompts
                for text in texts
            )
        )

    return asyncio.run(together())


def wanted(model):
    """Score and adjusted rewards of each text in answer to each question; the least for none."""
    worst = [-1000.0, *(0.0 if o.bias else -1000.0 for o in model.objectives.objectives)]
    rows = []
    for question in QUESTIONS:
        out = model.score([conversation(question, text) for text in TEXTS[:2]])
        rows += [*torch.cat([out.score[:, None], out.adjusted], 1).tolist(), worst]
    return rows


def test_experiences_have_the_models_rewards(remote_url, tokenizer, reference, generator):
    responses = execute(remote_url, tokenizer, prompts_of(tokenizer), TEXTS)
    made = [generator._process_response_into_experience(row, max_len=200) for row in responses]
    for experience, row in zip(made, wanted(reference), strict=True):
        assert experience.rewards.dtype == torch.float32
        assert experience.rewards.item() == pytest.approx(row[0], abs=1e-3)
        assert experience.info["reward"].item() == experience.rewards.item()
        # What dynamic filtering compares with its range.
        chance = torch.tensor(row[0] * float(reference.beta)).sigmoid()
        assert experience.scores[0].item() == pytest.approx(chance.item(), abs=1e-4)
        logs = [experience.info[name].item() for name in reference.objectives.names]
        assert logs == pytest.approx(row[1:], abs=1e-3)
    together = Experience.concat_experiences(made, tokenizer.pad_token_id)
    assert together.rewards.shape[0] == len(made)
    rewards = SimpleNamespace(overlong_buffer_len=None, stop_properly_penalty_coef=-0.5)
    together.truncated[0] = True
    apply_length_penalties([together], SimpleNamespace(reward=rewards))
    assert together.rewards[0].item() == -0.5
    assert together.rewards[1].item() == made[1].rewards.item()


def test_prompts_without_a_template_are_user_turns(remote_url, tokenizer, reference):
    prompts = prompts_of(tokenizer, rendered=False)
    rewards = [float(row["reward"][0]) for row in execute(remote_url, tokenizer, prompts, TEXTS)]
    assert rewards == pytest.approx([row[0] for row in wanted(reference)], abs=1e-3)


def test_a_prompt_that_openrlhf_cut_is_read_whole(remote_url, tokenizer, reference):
    """It leaves the end of a prompt in the query, and names all of it beside."""
    prompts = prompts_of(tokenizer)
    assert len(tokenizer(prompts[1][0])["input_ids"]) > 40
    rows = execute(remote_url, tokenizer, prompts, TEXTS[:2], max_length=90)
    rewards = [row["reward"] and float(row["reward"][0]) for row in rows]
    expected = wanted(reference)
    assert rewards == pytest.approx([expected[k][0] for k in (0, 1, 3, 4)], abs=1e-3)
