"""The pipeline as RewardBench 0.1.4 builds and calls it (rewardbench/rewardbench.py).

It is not installed here, so what it does around the pipeline is written out;
`tests/programs/test_rewardbench_scripts.py` runs RewardBench itself.
"""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import conversation, make_model
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from armo.model.reward_model import ArmoRewardModel
from armo.model.token_rows import TokenRowError
from armo.serve.reward_bench import RewardBenchPipeline

ROWS = [
    ("How do I boil an egg?", "In hot water for seven minutes.", "No."),
    ("Is honey safe?", "Not for babies.", "Yes, always! " * 12),
    ("Count to 3.", "- 1\n- 2\n- 3", "3 2 1"),
]


@pytest.fixture(params=["encoder", "causal"])
def model(request):
    return make_model(request.getfixturevalue(request.param))


def build(folder, builder=RewardBenchPipeline):
    """The script's own steps, with the settings of its command."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, revision=None)
    tokenizer.padding_side = "left"
    tokenizer.truncation_side = "left"  # --force_truncation
    model = ArmoRewardModel.from_pretrained(
        folder,
        device_map="auto",
        torch_dtype=torch.float32,
        attn_implementation="eager",
        revision=None,
        trust_remote_code=False,
    )
    pipe = builder("text-classification", model=model, tokenizer=tokenizer)
    if pipe.tokenizer.pad_token_id is None:
        pipe.tokenizer.pad_token_id = pipe.tokenizer.eos_token_id
    if pipe.model.config.pad_token_id is None:
        pipe.model.config.pad_token_id = pipe.tokenizer.pad_token_id
    AcceleratorState._reset_state(reset_partial_state=True)  # of what ran here before
    pipe.model = Accelerator(cpu=True).prepare(pipe.model)
    return pipe, tokenizer


SETTINGS = {
    "batch_size": 2,
    "truncation": True,
    "padding": True,
    "max_length": 8,
    "function_to_apply": "none",
    "return_token_type_ids": False,
}


def test_the_scripts_get_the_scores_of_the_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    pipe, tokenizer = build(tmp_path)
    rendered = [
        {
            f"text_{side}": tokenizer.apply_chat_template(conversation(p, t), tokenize=False)
            for side, t in (("chosen", chosen), ("rejected", rejected))
        }
        for p, chosen, rejected in ROWS
    ]
    scores = {"text_chosen": [], "text_rejected": []}
    for batch in DataLoader(rendered, batch_size=2, shuffle=False):
        for side, texts in batch.items():
            rewards = pipe(texts, **SETTINGS)
            assert not isinstance(rewards[0], dict)
            assert rewards.shape == (len(texts), 1)
            scores[side].extend(rewards.float().cpu().numpy().tolist())
    for side, k in (("text_chosen", 1), ("text_rejected", 2)):
        out = model.score([conversation(row[0], row[k]) for row in ROWS])
        assert [s for (s,) in scores[side]] == pytest.approx(out.score.tolist(), abs=1e-4)


def test_the_inputs_come_back_when_they_are_asked_for(model, tmp_path):
    model.save_pretrained(tmp_path)
    pipe, tokenizer = build(tmp_path)
    text = tokenizer.apply_chat_template(conversation(*ROWS[0][:2]), tokenize=False)
    logits, inputs = pipe([text], return_inputs=True, **SETTINGS)
    assert torch.equal(logits, pipe([text]))
    assert inputs["input_ids"].shape[0] == 1


def test_a_text_that_is_no_whole_conversation_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    pipe, tokenizer = build(tmp_path)
    text = tokenizer.apply_chat_template(conversation(*ROWS[0][:2]), tokenize=False)
    with pytest.raises(TokenRowError, match="row 1"):
        pipe([text, "Hello."], **SETTINGS)
