"""The examples of README's "In other programs", as they stand there, on a tiny model and policy."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import conversation, make_model, make_policy
from transformers import AutoTokenizer

from armo.model.reward_model import ArmoRewardModel

README = (Path(__file__).parents[2] / "README.md").read_text()
SECTION = README.partition("\n## In other programs\n")[2].partition("\n## ")[0]
POLICY = "Qwen/Qwen3-0.6B"
BLOCKS = dict(re.findall(r"```python\n# (.+?)\n(.*?)```", SECTION, re.DOTALL))


@pytest.fixture
def place(causal_folder, causal, tmp_path, monkeypatch):
    """A folder with the model, the data and the policy that the examples name."""
    monkeypatch.chdir(tmp_path)
    make_model(causal).save_pretrained("checkpoints/demo/model")
    tokenizer = AutoTokenizer.from_pretrained(causal_folder)
    make_policy(tokenizer).save_pretrained("policy")
    tokenizer.save_pretrained("policy")
    prompts = [{"prompt": "Is honey safe?"}, {"prompt": "Who are you?"}]
    Path("prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in prompts))
    chats = [{"messages": conversation("Is honey safe?", f"{n} times no.")} for n in range(9)]
    Path("chats.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in chats))
    return tmp_path


def run(name, **replaced):
    source = BLOCKS[name].replace(POLICY, "policy")
    for old, new in replaced.items():
        assert old in source
        source = source.replace(old, new)
    values = {}
    exec(compile(source, f"README.md: {name}", "exec"), values)
    return values


def test_each_example_is_tested():
    # Inspect's, in tests/programs/test_inspect_ai.py.
    elsewhere = {"task.py"}
    assert set(BLOCKS) - elsewhere == {
        "trl",
        "my_reward.py",
        "distilabel",
        "best of n",
        "filtering",
    }
    assert all(len(source.splitlines()) <= 12 for source in BLOCKS.values())


def test_trl(place):
    smaller = 'output_dir="policy", max_completion_length=8, use_cpu=True'
    run("trl", **{'output_dir="policy"': smaller})
    assert list(Path("policy").glob("checkpoint-*"))


def test_openrlhf(place):
    tokenizer = AutoTokenizer.from_pretrained("policy")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Is honey safe?"}], tokenize=False, add_generation_prompt=True
    )
    answer = run("my_reward.py")["reward_func"]([f"{prompt}No.<|turn|>"], [prompt], [""])
    assert answer["rewards"].isfinite().all()
    assert 0.0 < float(answer["scores"][0]) < 1.0


def test_verl(place):
    command = next(block for block in SECTION.split("```")[1::2] if "verl" in block)
    words = [word.lstrip("+") for word in shlex.split(command) if "=" in word]
    prefix = "reward.custom_reward_function."
    options = dict(word.removeprefix(prefix).split("=") for word in words)
    module = importlib.import_module(options["path"].removeprefix("pkg://"))
    row = getattr(module, options["name"])(
        data_source="chat",
        solution_str="No.",
        ground_truth="",
        extra_info={"raw_prompt": [{"role": "user", "content": "Is honey safe?"}]},
        model=options["reward_kwargs.model"],
    )
    assert set(row) == {"helpfulness", "honesty", "harm", "verbosity", "formatting", "score"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_distilabel(place, no_type_checks):
    texts = ["Not before their first birthday.", "Yes, always!", "Ask a doctor."]
    row = {"instruction": "Is honey safe?", "generations": texts}
    Path("replies.jsonl").write_text(f"{json.dumps(row)}\n")
    cached = 'Pipeline(cache_dir="cache")'
    (pair,) = run("distilabel", **{"Pipeline()": cached})["distiset"]["default"]["train"]
    model = ArmoRewardModel.from_pretrained("checkpoints/demo/model", device="cpu")
    scores = model.score_responses("Is honey safe?", texts).score
    assert pair["ratings"] == pytest.approx(scores.tolist(), abs=1e-6)
    assert pair["chosen"][-1]["content"] == texts[int(scores.argmax())]
    assert pair["rejected"][-1]["content"] == texts[int(scores.argmin())]


def test_best_of_n(place):
    values = run("best of n")
    scores = values["rewards"].score([values["prompt"]] * 8, values["texts"])
    assert values["best"] == values["texts"][scores.index(max(scores))]


def test_filtering(place):
    values = run("filtering")
    rewards = values["out"].rewards
    good = (rewards[:, 0] >= 0.5) & (rewards[:, 1] >= 0.4)
    expected = [row for row, passes in zip(values["rows"], good.tolist(), strict=True) if passes]
    assert list(values["kept"]) == expected
