"""The published layout of ArmoRM and QRM: what lies beside the trunk, read and computed.

Four things do: `regression_layer` (a row per objective, or in QRM one per objective and quantile),
`reward_transform_matrix`, `gating.layers` and `gating.logit_scale`. The score is
`sum_k s g_k (T^T W h)_k`, with gating weights `g` that sum to one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from armo.artifacts import ArtifactError, read_json
from armo.data.objectives import ObjectiveSet
from armo.fit.gating import GatingNetwork
from armo.fit.judged import Link

TRUNK = "model."
REGRESSION = "regression_layer.weight"
TRANSFORM = "reward_transform_matrix"
LOGIT_SCALE = "gating.logit_scale"
LAYER = "gating.layers."
# What the layout has no place for, in a section of `config.json` that other readers pass over.
SECTION = "armo"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
NORM_EPSILON = 1e-5  # of `torch.nn.BatchNorm1d`; the checkpoint does not say
# Which file holds which tensor; without one, all files count.
INDEX = "model.safetensors.index.json"
# Logits, before the temperature, of objectives that get no weight: their exponential is zero.
NEVER = -1e4


@dataclass(frozen=True, eq=False, slots=True)
class PublishedParts:
    """What a checkpoint of that layout holds beside its trunk; float64.

    Attributes:
        regression: Of the raw rewards, a row per objective; of QRM, the mean over quantiles.
        transform: Adjusted rewards are `rewards @ transform`.
        logit_scale: Factor of the gating weights.
        temperature: Divides the gate's logits.
        layers: Weight and bias of each layer of the gate, a ReLU between them; of QRM, with each
            batch normalisation folded into the layer after it.
    """

    regression: Float[Tensor, "objectives dim"]
    transform: Float[Tensor, "objectives objectives"]
    logit_scale: float
    temperature: float
    layers: tuple[tuple[Tensor, Tensor], ...]

    def tensors(self) -> dict[str, Tensor]:
        """Return them under their published names, as ArmoRM has them, in float32."""
        named = {
            REGRESSION: self.regression,
            TRANSFORM: self.transform,
            LOGIT_SCALE: torch.tensor([self.logit_scale]),
        }
        for k, (weight, bias) in enumerate(self.layers):
            named |= {f"{LAYER}{k}.weight": weight, f"{LAYER}{k}.bias": bias}
        return {name: tensor.float().contiguous() for name, tensor in named.items()}


@dataclass(frozen=True, slots=True)
class Declared:
    """What our own exports say in `config.json` beside the layout.

    Attributes:
        objectives: With their scales.
        intercepts: Of the raw rewards.
        offset: Of the adjusted rewards.
        links: From the linear part of each head to its reward.
        beta: Scale of score differences in the preference probability.
    """

    objectives: ObjectiveSet
    intercepts: tuple[float, ...]
    offset: tuple[float, ...]
    links: tuple[Link, ...]
    beta: float

    def __post_init__(self) -> None:
        count = len(self.objectives.names)
        for name, values in (
            ("reward_intercepts", self.intercepts),
            ("adjusted_offsets", self.offset),
        ):
            if len(values) != count or not all(_is_finite(value) for value in values):
                raise ValueError(f"`{name}` must be {count} finite numbers, got {list(values)}.")
        known = get_args(Link)
        if self.links and (len(self.links) != count or any(x not in known for x in self.links)):
            raise ValueError(
                f"`links` must be one of {', '.join(known)} for each of {count} objectives, got "
                f"{list(self.links)}."
            )
        if not _is_finite(self.beta) or self.beta < 0.0:
            raise ValueError(f"`beta` must be finite and not negative, got {self.beta!r}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the section's content."""
        return {
            "objectives": self.objectives.to_dicts(),
            "reward_intercepts": list(self.intercepts),
            "adjusted_offsets": list(self.offset),
            "links": list(self.links),
            "beta": self.beta,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Declared":
        """Read what `to_dict` returned.

        Raises:
            ValueError: If it does not fit the objectives, or holds what is no number.
        """
        return cls(
            ObjectiveSet.from_dicts(values["objectives"]),
            tuple(values["reward_intercepts"]),
            tuple(values["adjusted_offsets"]),
            tuple(values["links"]),
            values["beta"],
        )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def read_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of a checkpoint."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ArtifactError(f"{folder / 'config.json'}: not a JSON object")
    if config.get("model_type") == "armo":
        raise ArtifactError(f"{folder}: a model folder of armo already; nothing to import")
    return config


def read_declared(config: Mapping[str, Any], folder: Path) -> Declared | None:
    """Read what our own exports declare; None of others."""
    if SECTION not in config:
        return None
    try:
        return Declared.from_dict(config[SECTION])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{folder / 'config.json'}: `{SECTION}`: {error}") from None


def read_parts(
    folder: Path, *, config: Mapping[str, Any], files: Mapping[str, Path]
) -> PublishedParts:
    """Read the heads and the gate of a checkpoint.

    Args:
        folder: Of the checkpoint.
        config: Its `config.json`.
        files: Which file holds which tensor.

    Raises:
        ArtifactError: Naming every tensor that is missing, unexpected or of another shape.
    """
    count = int(needed(config, "num_objectives", folder))
    dim = int(needed(config, "hidden_size", folder))
    temperature = float(needed(config, "gating_temperature", folder))
    quantiles = int(config.get("num_quantiles") or 1)
    tensors = _load(
        {name: file for name, file in files.items() if not name.startswith(TRUNK)}, folder
    )
    layers = {name: tensors.pop(name) for name in [*tensors] if name.startswith(LAYER)}
    shapes = {
        REGRESSION: (quantiles * count, dim),
        TRANSFORM: (count, count),
        LOGIT_SCALE: (1,),
    }
    problems = [f"missing {name}" for name in shapes if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in shapes]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, needs {list(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if not layers:
        problems.append(f"missing {LAYER}0.weight")
    if not any(name.startswith(TRUNK) for name in files):
        problems.append(f"missing {TRUNK}*")
    if problems:
        raise ArtifactError(
            f"{folder}: not a checkpoint in the layout of ArmoRM or QRM: {some(problems, '; ')}"
        )
    return PublishedParts(
        # Quantiles of one objective stand together; the mean is taken of them, and is linear.
        regression=tensors[REGRESSION].reshape(count, quantiles, dim).mean(1),
        transform=tensors[TRANSFORM],
        logit_scale=float(tensors[LOGIT_SCALE]),
        temperature=temperature,
        layers=_fold(layers, wide=dim, narrow=count, folder=folder),
    )


def _fold(
    tensors: Mapping[str, Tensor], *, wide: int, narrow: int, folder: Path
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return the gate's linear layers, batch normalisations folded in.

    ArmoRM numbers its linear layers 0, 1, 2, ... QRM counts ReLU and batch normalisation as well:
    linear at 0, 3, 6, ..., normalisation at 2, 5, ..., after the ReLU. So what the normalisation
    does, `y -> scale y + shift`, is undone by nothing before the next linear layer.
    """
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, part = name.removeprefix(LAYER).partition(".")
        if not number.isdecimal():
            raise ArtifactError(f"{folder}: unexpected {name}")
        found.setdefault(int(number), {})[part] = tensor
    norms = [k for k, layer in found.items() if "running_mean" in layer]
    linear = sorted(set(found) - set(norms))
    count = len(linear)
    if not (
        (not norms and linear == list(range(count)))
        or (
            linear == list(range(0, 3 * count, 3))
            and sorted(norms) == list(range(2, 3 * count - 3, 3))
        )
    ):
        raise ArtifactError(
            f"{folder}: the gate's layers are numbered {sorted(found)}, as neither in ArmoRM "
            f"(linear 0, 1, 2, ...) nor in QRM (linear 0, 3, ..., normalisation 2, 5, ...)"
        )
    layers = []
    scale, shift = torch.ones(wide).double(), torch.zeros(wide).double()
    for place, k in enumerate(linear):
        given = found[k]
        if "weight" not in given:
            raise ArtifactError(f"{folder}: missing {LAYER}{k}.weight")
        width = narrow if place == count - 1 else given["weight"].shape[0]
        shapes = {"weight": (width, wide), "bias": (width,)}
        wrong = [p for p in given if p not in shapes or tuple(given[p].shape) != shapes[p]]
        if wrong:
            raise ArtifactError(
                f"{folder}: {LAYER}{k} has {_shapes(given)}, needs weight {[width, wide]} and at "
                f"most a bias {[width]}"
            )
        weight, bias = given["weight"], given.get("bias", torch.zeros(width).double())
        layers.append((weight * scale, bias + weight @ shift))
        scale, shift, wide = torch.ones(width).double(), torch.zeros(width).double(), width
        if k + 2 in norms:
            norm = found[k + 2]
            if set(norm) - set(NORM) or set(NORM[:4]) - set(norm):
                raise ArtifactError(f"{folder}: {LAYER}{k + 2} has {_shapes(norm)}")
            scale = norm["weight"] / (norm["running_var"] + NORM_EPSILON).sqrt()
            shift = norm["bias"] - scale * norm["running_mean"]
    if len({len(bias) for _, bias in layers[:-1]}) > 1:
        raise ArtifactError(f"{folder}: the gate's hidden layers are not all of the same width")
    return tuple(layers)


def merge_members(gate: GatingNetwork) -> tuple[tuple[tuple[Tensor, Tensor], ...], bool]:
    """Make one gate of the members of an ensemble, with plain layers over all objectives.

    Its logits are the members' mean logits, so its weights are the normalised geometric mean of
    theirs. The standardisation of the input goes into the first layer.

    Returns:
        Weight and bias of each layer, in float64, and whether the weights are exactly the same:
        so they are with one member, and where no weight depends on the prompt.
    """
    members = gate.members
    *hidden, (last, bias) = [
        [parameter.detach().double() for parameter in layer.parameters()]
        for layer in (*gate.hidden, gate.output)
    ]
    constant = not bool(last.any())
    if constant:
        mix = torch.softmax(bias / gate.temperature, dim=-1).mean(0)
        hidden, last = [], last.new_zeros(1, last.shape[1], len(gate.mean))
        bias = gate.temperature * mix.clamp(min=1e-30).log()[None]
    layers = []
    for place, (weight, shift) in enumerate(hidden):
        joined = torch.cat([*weight]) if place == 0 else torch.block_diag(*weight)
        layers.append((joined, shift.flatten()))
    if hidden:
        layers.append((torch.cat([*last], dim=1) / members, bias.mean(0)))
    else:
        layers.append((last.mean(0), bias.mean(0)))
    weight, shift = layers[0]
    scale, mean = gate.scale.double(), gate.mean.double()
    layers[0] = (weight / scale, shift - (weight / scale) @ mean)
    weight, shift = layers[-1]
    rows = gate.mixed.tolist()
    whole = weight.new_zeros(gate.objectives, weight.shape[1])
    whole[rows] = weight
    base = torch.full((gate.objectives,), NEVER * gate.temperature, dtype=torch.float64)
    base[rows] = shift
    layers[-1] = (whole, base)
    return tuple(layers), members == 1 or constant


def gating_output(parts: PublishedParts, prompts: Float[Tensor, "batch dim"]) -> Tensor:
    """Run a gate of plain layers, in float64: weights that add up to the logit scale."""
    x = prompts.double()
    for k, (weight, bias) in enumerate(parts.layers):
        x = nn.functional.linear(x if k == 0 else x.relu(), weight, bias)
    return parts.logit_scale * torch.softmax(x / parts.temperature, dim=-1)


def published_score(
    parts: PublishedParts,
    responses: Float[Tensor, "batch dim"],
    prompts: Float[Tensor, "batch dim"],
) -> Float[Tensor, " batch"]:
    """Score embeddings as the published model does, in float64."""
    adjusted = responses.double() @ parts.regression.T @ parts.transform
    return (gating_output(parts, prompts) * adjusted).sum(1)


def needed(config: Mapping[str, Any], name: str, folder: Path) -> Any:
    """Return a number that a configuration must have."""
    if isinstance(config.get(name), bool) or not isinstance(config.get(name), int | float):
        raise ArtifactError(
            f"{folder / 'config.json'}: `{name}` is missing or not a number; checkpoints in the "
            f"layout of ArmoRM or QRM have it"
        )
    return config[name]


def tensor_files(folder: Path) -> dict[str, Path]:
    """Find the file of each tensor."""
    if (folder / INDEX).is_file():
        try:
            files = {folder / name for name in read_json(folder / INDEX)["weight_map"].values()}
        except (AttributeError, KeyError, TypeError):
            raise ArtifactError(
                f"{folder / INDEX}: `weight_map` must name the file of each tensor"
            ) from None
    else:
        files = {*folder.glob("*.safetensors")}
    if not files:
        pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
        if not pickled:
            raise ArtifactError(f"{folder}: no safetensors file")
        raise ArtifactError(
            f"{folder}: only pickled weights ({some(pickled)}), which may run code when loaded, "
            f"and are not; convert each, where you trust it: safetensors.torch.save_file("
            f"torch.load('{pickled[0]}', weights_only=True), "
            f"'{Path(pickled[0]).stem}.safetensors')"
        )
    found: dict[str, Path] = {}
    for file in sorted(files):
        if not file.is_file():
            raise ArtifactError(f"No such file: {file}")
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= dict.fromkeys(tensors.keys(), file)
        except SafetensorError as error:
            raise ArtifactError(f"{file}: damaged safetensors file: {error}") from None
    return found


def _load(files: Mapping[str, Path], folder: Path) -> dict[str, Tensor]:
    """Read some tensors, in float64."""
    tensors = {}
    for file in sorted({*files.values()}):
        with safe_open(file, framework="pt") as opened:
            for name in (name for name in files if files[name] == file):
                tensors[name] = opened.get_tensor(name).double()
                if not bool(tensors[name].isfinite().all()):
                    raise ArtifactError(f"{folder}: {name} has values that are no numbers")
    return tensors


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())


def some(names: Sequence[str], separator: str = ", ") -> str:
    """Name the first few, and count the others."""
    shown = separator.join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
