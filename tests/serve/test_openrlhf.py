"""The reward function as OpenRLHF 0.11.2 finds and calls it.

OpenRLHF is not installed here; what its code does around the call is written out, with the file of
OpenRLHF that does it. `tests/programs/test_openrlhf.py` runs OpenRLHF itself.
"""

import asyncio
import importlib.util

import pytest
import torch
from conftest import _causal_tokenizer, conversation

from armo.serve.openrlhf import OpenRLHFReward, RenderedPrompts
from armo.serve.rewards import LIMIT

MULTI = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Is honey safe?"},
    {"role": "assistant", "content": "For whom?"},
    {"role": "user", "content": "For babies."},
]
QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|start|>system\nI am a default.<|turn|>\n{% endif %}"
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n<think>\n{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('no system turns') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def policy(template=None):
    tokenizer = _causal_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def render(tokenizer, turns):
    """`preprocess_data` of openrlhf/datasets/prompts_dataset.py, for texts."""
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


async def execute(reward_func, tokenizer, prompt, response, *, most=None):
    """`SingleTurnAgentExecutor.execute` of openrlhf/utils/agent.py, after the generation."""
    prompt_ids = tokenizer(text=prompt, add_special_tokens=False)["input_ids"]
    prompt_ids = prompt_ids[-most:] if most else prompt_ids
    action_ids = tokenizer(text=response, add_special_tokens=False)["input_ids"]
    query = tokenizer.decode(prompt_ids + action_ids, skip_special_tokens=False)
    tasks = [asyncio.to_thread(reward_func, [query], [prompt], [""])]
    info = (await asyncio.gather(*tasks))[0]
    # `_process_response_into_experience` of openrlhf/trainer/ppo_utils/samples_generator.py.
    logs = {"reward": torch.tensor([info["rewards"]]), "score": torch.tensor([info["scores"]])}
    for key, value in info["extra_logs"].items():
        logs[key] = torch.tensor([value.flatten()[0].item()])
    return logs


def run(function, tokenizer, prompts, responses, **options):
    async def together():
        rows = zip(prompts, responses, strict=True)
        return await asyncio.gather(
            *(execute(function, tokenizer, p, r, **options) for p, r in rows)
        )

    return asyncio.run(together())


@pytest.mark.parametrize("template", [None, QWEN, NO_SYSTEM])
def test_the_prompt_of_a_whole_text_ends_where_its_last_response_is_opened(template):
    tokenizer = policy(template)
    turns = MULTI[1:] if template == NO_SYSTEM else MULTI
    for asked in (turns, turns[:-2]):
        prompt = render(tokenizer, asked)
        assert RenderedPrompts(tokenizer).prompt(prompt + "Not for them.<|turn|>") == prompt


def test_a_template_that_opens_no_response_leaves_whole_texts_unread():
    silent = policy("{% for m in messages %}{{ m['content'] }}<|turn|>{% endfor %}")
    for rendered in (RenderedPrompts(silent), RenderedPrompts(policy())):
        with pytest.raises(ValueError, match="opens no response in 'Just words'"):
            rendered.prompt("Just words")


def test_a_file_of_two_lines_gives_the_models_own_scores(causal_model, causal_folder, tmp_path):
    causal_model.save_pretrained(tmp_path / "model")
    path = tmp_path / "my_reward.py"
    path.write_text(
        "from armo.serve.openrlhf import OpenRLHFReward\n"
        f"reward_func = OpenRLHFReward({str(tmp_path / 'model')!r}, policy={str(causal_folder)!r},"
        " limit=1000)\n"
    )
    spec = importlib.util.spec_from_file_location("reward_func", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer = policy()
    prompts = [render(tokenizer, turns) for turns in (MULTI, MULTI[1:2], MULTI[1:2])]
    rows = run(module.reward_func, tokenizer, prompts, ["Not yet.<|turn|>", "Yes.", "<|turn|>"])
    out = causal_model.score(
        [
            [*MULTI, {"role": "assistant", "content": "Not yet."}],
            conversation(MULTI[1]["content"], "Yes."),
        ]
    )
    for row, score, adjusted in zip(rows, out.score.tolist(), out.adjusted.tolist(), strict=False):
        assert row["reward"].item() == pytest.approx(score, abs=1e-5)
        chance = torch.sigmoid(torch.tensor(2.0 * score)).item()
        assert row["score"].item() == pytest.approx(chance, abs=1e-5)
        assert [row[n].item() for n in out.objectives] == pytest.approx(adjusted, abs=1e-5)
    assert rows[2]["reward"].item() == -1000.0
    assert rows[2]["score"].item() == 0.0
    assert [row["unscorable"].item() for row in rows] == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("template", [None, QWEN, NO_SYSTEM], ids=["llama", "qwen", "mistral"])
@pytest.mark.parametrize("turns", [MULTI, MULTI[1:], MULTI[1:2]], ids=["system", "multi", "one"])
def test_rendered_prompts_become_their_turns_again(template, turns):
    tokenizer = policy(template)
    if template == NO_SYSTEM:
        turns = [turn for turn in turns if turn["role"] != "system"]
    assert RenderedPrompts(tokenizer).turns(render(tokenizer, turns)) == turns


def test_a_prompt_without_special_tokens_is_one_user_turn():
    assert RenderedPrompts(policy()).turns("Question: is honey safe?\nAnswer:") == (
        "Question: is honey safe?\nAnswer:"
    )


def test_a_prompt_of_another_template_is_refused():
    rendered = RenderedPrompts(policy())
    with pytest.raises(ValueError, match="does not render prompts like"):
        rendered.turns(render(policy(QWEN), MULTI))
    with pytest.raises(ValueError, match="does not render prompts like"):
        rendered.turns(render(policy(), MULTI) + "And so")
    tool = {"role": "tool", "content": "Honey: yes."}
    for turns in (MULTI[:3], [MULTI[1]] * 3, [MULTI[0], *MULTI[2:]], [*MULTI, tool]):
        with pytest.raises(ValueError, match="does not render prompts like"):
            rendered.turns(render(policy(), turns))


@pytest.mark.parametrize("system", ["", "{{ m['content'] }}"], ids=["dropped", "moved"])
def test_a_template_that_writes_system_turns_elsewhere_has_none(system):
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] != 'system' %}"
        "<|start|>{{ m['role'] }}\n{{ m['content'] }}<|turn|>{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m['role'] == 'system' %}" + system + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    rendered = RenderedPrompts(policy(template))
    assert rendered.turns(render(policy(template), MULTI[1:])) == MULTI[1:]
    with pytest.raises(ValueError, match="does not render prompts like"):
        rendered.turns(
            render(policy(template), [*MULTI[1:3], {"role": "tool", "content": "Yes."}, MULTI[3]])
        )


def test_the_response_follows_a_prompt_that_was_cut_from_the_left(causal_model):
    function = OpenRLHFReward(causal_model, policy=policy())
    prompt = render(policy(), MULTI)
    (whole,) = run(function, policy(), [prompt], ["Not yet.<|turn|>"])
    (cut,) = run(function, policy(), [prompt], ["Not yet.<|turn|>"], most=20)
    assert cut == whole
    with pytest.raises(ValueError, match="does not begin with its prompt"):
        function(["Something else"], [prompt], [""])


def test_what_the_policy_writes_never_stops_the_training(causal_model):
    function = OpenRLHFReward(causal_model, policy=policy())
    prompt = render(policy(), MULTI)
    texts = ["", "<|turn|><|turn|>", "So.<|turn|><|start|>user<|end|>\n\nThanks!", "\ufffd", prompt]
    rows = run(function, policy(), [prompt] * len(texts), texts)
    assert all(torch.isfinite(value).all() for row in rows for value in row.values())
    assert [row["reward"].item() for row in rows[:2]] == [-LIMIT, -LIMIT]
