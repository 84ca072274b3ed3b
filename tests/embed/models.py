"""Tiny random models in the manner of the common families, and the slow way to read with them.

Their weights are larger than those of a fresh model, in which a token hardly sees the others: here
a wrong position or a wrong mask changes a hidden state by more than a hundredth.
"""

from contextlib import contextmanager
from functools import cache
from unittest import mock

import torch
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2Model,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    MambaConfig,
    MambaModel,
    MistralConfig,
    MistralModel,
    Phi3Config,
    Phi3Model,
    Qwen2Config,
    Qwen2Model,
)

VOCABULARY = 600
POSITIONS = 512
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": POSITIONS,
}
SOME_WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
STRETCHED = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 10.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
    "original_max_position_embeddings": 64,
}
KINDS = {
    "llama": (LlamaModel, LlamaConfig, {}),
    "qwen2": (Qwen2Model, Qwen2Config, {}),
    "qwen2-windows": (Qwen2Model, Qwen2Config, SOME_WINDOWS),
    "gemma2": (Gemma2Model, Gemma2Config, {"sliding_window": 8, "head_dim": 16}),
    "mistral": (MistralModel, MistralConfig, {"sliding_window": 8}),
    "gpt2": (
        GPT2Model,
        GPT2Config,
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS},
    ),
    "bert": (BertModel, BertConfig, {}),
    "mamba": (MambaModel, MambaConfig, {"state_size": 4}),
    "phi3-stretched": (
        Phi3Model,
        Phi3Config,
        {
            "pad_token_id": 0,
            "original_max_position_embeddings": 64,
            "rope_parameters": STRETCHED,
        },
    ),
}
DECODERS = ("llama", "qwen2", "qwen2-windows", "gemma2", "mistral", "gpt2")


def build(kind, *, seed=0, **changes):
    """A random model of a kind, in float32."""
    make, configure, shape = KINDS[kind]
    torch.manual_seed(seed)
    model = make(configure(**{**SHAPE, **shape, **changes})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.ndim == 2:
                width = 1.0 if "embed" in name else weights.shape[1] ** -0.5
                weights.copy_(width * torch.randn(weights.shape, generator=generator))
    return model


@cache
def shared_model(kind):
    """One model of each kind, for tests that leave it as it is."""
    return build(kind)


@torch.no_grad()
def states_alone(model, ids, *, layers=(-1,)):
    """Hidden states of one sequence: a plain call of the model, layers side by side."""
    outputs = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return torch.cat([outputs.hidden_states[layer][0] for layer in layers], dim=-1).float()


def apart(values, expected):
    """The largest difference between two embeddings, relative to the norm of the second."""
    assert values.shape == expected.shape
    if not len(values):
        return 0.0
    difference = (values.double() - expected.double()).norm(dim=1)
    return float((difference / expected.double().norm(dim=1)).max())


@contextmanager
def answered_by(model, answer):
    """Let `answer(forward, inputs)` stand in for the model's own `forward(**inputs)`."""
    forward = model.forward
    with mock.patch.object(model, "forward", lambda **inputs: answer(forward, inputs)):
        yield


@contextmanager
def counted(model):
    """Collect the shape of each batch that is run, padding counted."""
    shapes = []

    def answer(forward, inputs):
        shapes.append(tuple(inputs["input_ids"].shape))
        return forward(**inputs)

    with answered_by(model, answer):
        yield shapes


def tokens_in(shapes):
    return sum(rows * columns for rows, columns in shapes)


def read_on(inputs):
    """Whether a call goes on from keys and values of an earlier one."""
    cache = inputs.get("past_key_values")
    return cache is not None and cache.get_seq_length() > 0


def reading_ahead(forward, inputs):
    """Let every token see those after it, and none see padding."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    columns = ids.shape[1] if mask is None else mask.shape[1]
    seen = torch.ones(len(ids), columns) if mask is None else mask
    hidden = (1 - seen.float()) * torch.finfo(torch.float32).min
    hidden = hidden[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
    return forward(**{**inputs, "attention_mask": hidden})


class Memory:
    """A memory that runs out where a batch has too many tokens."""

    def __init__(self, limit, *, error=None, cached=False):
        """Count padded tokens of a batch, and where `cached` those that it goes on from, too."""
        self.limit = limit
        self.error = error or torch.cuda.OutOfMemoryError("CUDA out of memory.")
        self.cached = cached
        self.refused = 0

    def __call__(self, forward, inputs):
        rows, columns = inputs["input_ids"].shape
        if self.cached and read_on(inputs):
            columns += inputs["past_key_values"].get_seq_length()
        if rows * columns > self.limit:
            self.refused += 1
            raise self.error
        return forward(**inputs)
