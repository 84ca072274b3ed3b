"""Tiny random backbones and small fitted models, built here; nothing is downloaded."""

import os
import subprocess
import sys
from pathlib import Path

# Tensors here are tiny and tests run side by side: more threads only wait for one another. Before
# torch starts its own, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning  # noqa: F401  (before armo, so that only armo goes through the shape checker)
import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
)

# A busy machine draws examples slowly, which says nothing about the code.
settings.register_profile(
    "local", deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """`pytest -n auto` starts a worker for each processor that it may use, and no crowd of them."""
    return min(len(os.sched_getaffinity(0)), 8)


def pytest_collection_modifyitems(items):
    """Start with the tests of the demo: all others can be run while it is trained."""
    items.sort(key=lambda item: "demo_folder" not in item.fixturenames)


# A template in the manner of Llama 3: BOS, headers, end-of-turn tokens, contents trimmed.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start|>{{ message['role'] }}<|end|>\n\n{{ message['content'] | trim }}<|turn|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "How do I boil an egg? Put it in hot water for seven minutes.",
    "Honest answers say what they cannot know, and safe ones warn of risks!",
    "system user assistant\n\n- one\n- two\n**three** 1 2 3 4 5 6 7 8 9 0",
]


def _encoder_tokenizer():
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def _causal_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|start|>", "<|end|>", "<|turn|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    # The end of a turn is the end of text and pads, the case that breaks pooling by pad id.
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|turn|>",
        pad_token="<|turn|>",
        additional_special_tokens=["<|start|>", "<|end|>"],
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """A random two-layer BERT, width 16, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = _encoder_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_policy(tokenizer):
    """A random Llama of one layer, to be trained on rewards."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=256,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@pytest.fixture(scope="session")
def causal_folder(tmp_path_factory):
    """A random two-layer Llama, width 16, with a chat template and pad equal to end of turn."""
    folder = tmp_path_factory.mktemp("causal")
    tokenizer = _causal_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(encoder_folder):
    from armo.embed.backbone import load_backbone
    from armo.embed.spec import BackboneSpec

    return load_backbone(
        BackboneSpec(
            str(encoder_folder),
            layers=(1, 2),
            pooling="mean",
            max_tokens=96,
            max_prompt_tokens=40,
        ),
        device="cpu",
        batch_tokens=256,
    )


@pytest.fixture(scope="session")
def causal(causal_folder):
    from armo.embed.backbone import load_backbone
    from armo.embed.spec import BackboneSpec

    return load_backbone(
        BackboneSpec(str(causal_folder), pooling="last", max_tokens=128, max_prompt_tokens=64),
        device="cpu",
        batch_tokens=256,
    )


def wide_range(covariates):
    """Of covariates that are all within."""
    return torch.tensor([[-1e6], [1e6]], dtype=torch.float64).expand(2, covariates).clone()


def make_model(backbone, *, seed=0, covariates=(), links=()):
    """A reward model of random parts: three mixed objectives and two bias objectives.

    Its adjusted rewards are also made from `covariates`, if any are named; its rewards are linear
    without `links`.
    """
    from armo.data.objectives import Objective, ObjectiveSet
    from armo.fit.decorrelation import RewardTransform
    from armo.fit.gating import GatingNetwork
    from armo.fit.heads import ObjectiveHeads
    from armo.model.reward_model import ArmoRewardModel

    objectives = ObjectiveSet(
        (
            Objective("helpfulness", 1, 5),
            Objective("honesty", 1, 5),
            Objective("harm", 0, 10, higher_is_better=False),
            Objective("verbosity", 0, 4, bias=True),
            Objective("formatting", 0, 4, bias=True),
        )
    )
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    torch.manual_seed(seed)
    gate = GatingNetwork(dim=backbone.dim, objectives=5, mixed=(0, 1, 2), hidden_dim=8)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(draw(*parameter.shape))
    heads = ObjectiveHeads(objectives.names, draw(5, backbone.dim), draw(5), tuple(links))
    matrix, offset = draw(5, backbone.dim), draw(5)
    return ArmoRewardModel(
        objectives=objectives,
        backbone=backbone,
        heads=heads,
        transform=RewardTransform(
            objectives.names,
            matrix,
            offset,
            tuple(covariates),
            draw(5, len(covariates)),
            wide_range(len(covariates)),
        ),
        gate=gate,
        beta=2.0,
    )


@pytest.fixture
def model(encoder):
    return make_model(encoder)


@pytest.fixture
def causal_model(causal):
    return make_model(causal)


def conversation(prompt, response):
    """A one-turn conversation as chat messages."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


@pytest.fixture(scope="session")
def demo_folder():
    """The run that `make demo` leaves behind; trained here if it is not up to date."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "armo.cli", "train", "experiment=demo"]
    # One worker trains, the others wait and find the run up to date.
    with FileLock(root / "checkpoints" / ".demo.lock"):
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "checkpoints" / "demo"


@pytest.fixture
def no_type_checks():
    """Run armo as users do, so that a wrong choice reaches the code's own error message."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
