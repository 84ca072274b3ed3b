"""Import: published checkpoints of ArmoRM and QRM become scoring models.

Their score is ours, with the adjusted rewards `A = s T^T W`. What differs is folded in exactly, in
float64: the scale of the gate, quantiles of which the mean is taken, batch normalisation.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from armo.artifacts import ArtifactError
from armo.data.objectives import ObjectiveSet
from armo.embed.backbone import find_weights, load_backbone
from armo.embed.spec import BackboneSpec
from armo.fit.decorrelation import RewardTransform
from armo.fit.gating import GatingNetwork
from armo.fit.heads import ObjectiveHeads
from armo.model.published import (
    SECTION,
    TRUNK,
    Declared,
    PublishedParts,
    needed,
    read_config,
    read_declared,
    read_parts,
    some,
    tensor_files,
)
from armo.model.reward_model import ArmoRewardModel

GOLDEN_TURNS = (
    [("user", "Is honey safe for babies?"), ("assistant", "Not before their first birthday.")],
    [("user", "Is honey safe for babies?"), ("assistant", "Yes! **Always.**")],
    [
        ("user", "Name a prime number."),
        ("assistant", "Seven."),
        ("user", "And another one, with two digits, please."),
        ("assistant", "- eleven\n- thirteen"),
    ],
)


def import_published(
    source: str | Path,
    *,
    objectives: ObjectiveSet,
    revision: str | None = None,
    beta: float = 1.0,
    max_tokens: int | None = None,
    max_prompt_tokens: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    batch_tokens: int | Literal["auto"] = "auto",
) -> ArmoRewardModel:
    """Make a scoring model of a published ArmoRM or QRM checkpoint.

    Only its `config.json`, safetensors and tokenizer are read. The checkpoint itself stays where
    it is, as the backbone. Scores are those of the published forward pass, with the prompt read at
    the end of its last turn; found by the chat template, not by a pattern of token ids.

    Args:
        source: Its folder or hub id.
        objectives: Of its columns, all to be mixed; passed over where our export declares its own.
        revision: Of the hub id.
        beta: Scale of score differences in the preference probability, which the layout lacks.
        max_tokens: Tokens of a conversation at most; as many as the model has positions by default.
        max_prompt_tokens: Of its prompt; seven eighths of that by default.
        dtype: Of the backbone; `auto` as `BackboneSpec` has it.
        device: Of the backbone; `auto` is the first GPU, otherwise the CPU.
        batch_tokens: Padded tokens per batch.

    Raises:
        ArtifactError: If it is not of either layout, naming what is missing, unexpected or of
            another shape; or has only pickled weights, which are not loaded.
        BackboneError: If it is found nowhere.
    """
    folder = find_weights(str(source), revision=revision)
    config = read_config(folder)
    files = tensor_files(folder)
    parts = read_parts(folder, config=config, files=files)
    zeros = (0.0,) * len(objectives.names)
    declared = read_declared(config, folder) or Declared(objectives, zeros, zeros, (), beta)
    names = declared.objectives.names
    if len(names) != len(parts.regression):
        raise ArtifactError(
            f"{folder}: the checkpoint has {len(parts.regression)} objectives, {len(names)} are "
            f"declared; declare its own with `data/objectives@objectives=NAME` or a file"
        )
    if declared.objectives.bias_indices and SECTION not in config:
        raise ArtifactError(
            f"{folder}: the checkpoint weighs all objectives, so none can be declared "
            f"`bias: true`: {some([names[k] for k in declared.objectives.bias_indices])}"
        )
    limit = max_tokens or int(needed(config, "max_position_embeddings", folder))
    backbone = load_backbone(
        BackboneSpec(
            id=str(folder.resolve()) if Path(source).expanduser().is_dir() else str(source),
            revision=revision,
            layers=(-1,),
            pooling="last",
            prompt_position="turn_end",
            max_tokens=limit,
            max_prompt_tokens=max_prompt_tokens or limit * 7 // 8,
            dtype=dtype,
        ),
        device=device,
        batch_tokens=batch_tokens,
    )
    known = {name.removeprefix(TRUNK) for name in files}
    if absent := [name for name in backbone.model.state_dict() if name not in known]:
        raise ArtifactError(f"{folder}: missing {some([TRUNK + name for name in absent])}")
    adjusted = parts.logit_scale * parts.transform.T @ parts.regression
    return ArmoRewardModel(
        objectives=declared.objectives,
        backbone=backbone,
        heads=ObjectiveHeads(names, parts.regression, _vector(declared.intercepts), declared.links),
        transform=RewardTransform(
            names,
            adjusted,
            _vector(declared.offset),
            (),
            torch.zeros(len(names), 0, dtype=torch.float64),
            torch.zeros(2, 0, dtype=torch.float64),
        ),
        gate=_gate_of(parts, mixed=declared.objectives.mixed_indices),
        beta=declared.beta,
    )


def save_imported(model: ArmoRewardModel, folder: str | Path, *, source: str) -> None:
    """Write the model folder of an imported checkpoint, with golden scores and a card."""
    spec = model.backbone.spec
    rows = "".join(f"| {k} | {name} |\n" for k, name in enumerate(model.objectives.names))
    model.save_pretrained(
        folder,
        golden=[[{"role": r, "content": c} for r, c in turns] for turns in GOLDEN_TURNS],
        card=(
            f"# {Path(source).name}, imported\n\nThe heads and the gate of `{source}`, whose trunk "
            f"is the backbone (SHA-256 {spec.digest}). `beta`, {float(model.beta):g}, is not from "
            f"there: probabilities depend on it, scores do not.\n\n| column | objective |\n"
            f"| --- | --- |\n{rows}"
        ),
    )


def _gate_of(parts: PublishedParts, *, mixed: Sequence[int]) -> GatingNetwork:
    hidden, (weight, bias) = parts.layers[:-1], parts.layers[-1]
    gate = GatingNetwork(
        dim=parts.regression.shape[1],
        objectives=len(parts.regression),
        mixed=mixed,
        hidden_dim=len(hidden[0][1]) if hidden else 1,
        hidden_layers=len(hidden),
        dropout=0.0,
        temperature=parts.temperature,
    ).double()
    rows = list(mixed)
    with torch.no_grad():
        for layer, (w, b) in zip(
            [*gate.hidden, gate.output], [*hidden, (weight[rows], bias[rows])], strict=True
        ):
            layer.weight.copy_(w[None])
            layer.bias.copy_(b[None])
    return gate.eval()


def _vector(values: Sequence[float]) -> Float[Tensor, " objectives"]:
    return torch.tensor(values, dtype=torch.float64)
