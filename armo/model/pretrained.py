"""The model folder: `config.json`, `model.safetensors`, `golden.json`; strict both ways."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from safetensors import SafetensorError, safe_open
from torch import Tensor

from armo.artifacts import ArtifactError, read_json, read_tensors
from armo.data.conversation import Message
from armo.data.objectives import ObjectiveSet
from armo.data.surface import SURFACE_FEATURES, SURFACE_VERSION
from armo.embed.spec import BackboneSpec
from armo.fit.gating import GatingNetwork
from armo.fit.judged import Link

FORMAT = 2
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
GOLDEN = "golden.json"
CARD = "README.md"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a model folder declares about itself.

    Attributes:
        objectives: With scales, in column order.
        backbone: Which language model, and how it is read.
        gate: Shape of the gating network, as its constructor spells it.
        covariates: Surface features that the adjusted rewards are computed from beside the
            embedding, if any.
        links: From the linear part of each head to its reward, in column order.
    """

    objectives: ObjectiveSet
    backbone: BackboneSpec
    gate: dict[str, Any]
    covariates: tuple[str, ...]
    links: tuple[Link, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `config.json`."""
        return {
            "format": FORMAT,
            "model_type": "armo",
            "objectives": self.objectives.to_dicts(),
            "backbone": asdict(self.backbone),
            "gate": self.gate,
            "covariates": {"version": SURFACE_VERSION, "names": list(self.covariates)},
            "links": list(self.links),
        }

    @classmethod
    def load(cls, folder: Path) -> "ModelConfig":
        """Read `config.json`.

        Raises:
            ArtifactError: If it is missing, not JSON, of another format, or lacks a field.
        """
        path = folder / CONFIG
        if not folder.is_dir():
            raise ArtifactError(f"No model folder at {folder}")
        values = read_json(path)
        if (
            not isinstance(values, dict)
            or values.get("model_type") != "armo"
            or values.get("format") != FORMAT
        ):
            raise ArtifactError(f"{path}: not an armo model of format {FORMAT}")
        try:
            objectives = ObjectiveSet.from_dicts(values["objectives"])
            return cls(
                objectives=objectives,
                backbone=BackboneSpec(**values["backbone"]),
                gate=values["gate"],
                covariates=_covariates(**values["covariates"]),
                links=_links(values["links"], count=len(objectives.names)),
            )
        except KeyError as error:
            raise ArtifactError(f"{path}: field {error} is missing") from None
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{path}: {error}") from None

    def build_gate(self, path: Path) -> GatingNetwork:
        """Build the gate that `config.json` describes, its weights still to be loaded.

        Raises:
            ArtifactError: If the description does not fit the objectives.
        """
        try:
            gate = GatingNetwork(**self.gate)
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{path}: `gate`: {error}") from None
        mixed = tuple(gate.mixed.tolist())
        if gate.objectives != len(self.objectives.names) or mixed != self.objectives.mixed_indices:
            raise ArtifactError(
                f"{path}: `gate` mixes columns {list(mixed)} of {gate.objectives}, the objectives "
                f"are columns {list(self.objectives.mixed_indices)} of {len(self.objectives.names)}"
            )
        return gate


def _covariates(*, version: int, names: Sequence[str]) -> tuple[str, ...]:
    if names and version != SURFACE_VERSION:
        raise ValueError(
            f"`covariates` were measured by version {version} of the surface features, this is "
            f"version {SURFACE_VERSION}: install the armo that the model was made with"
        )
    if unknown := [name for name in names if name not in SURFACE_FEATURES]:
        raise ValueError(f"`covariates` are unknown: {', '.join(unknown)}")
    return tuple(names)


def _links(links: Any, *, count: int) -> tuple[Link, ...]:
    known = get_args(Link)
    if not isinstance(links, list) or len(links) != count or any(x not in known for x in links):
        raise ValueError(
            f"`links` must be a list of {count}, one of {', '.join(known)} for each objective, got "
            f"{links!r}"
        )
    return tuple(links)


def load_weights(path: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Read the tensors of a model, exactly those expected.

    Args:
        path: The safetensors file.
        shapes: Shape of each tensor that must be there.

    Raises:
        ArtifactError: Naming every tensor that is missing, unexpected or of another shape.
            Nothing is ever initialised in place of a missing tensor.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ArtifactError(f"No such file: {path}") from None
    except SafetensorError as error:
        raise ArtifactError(f"{path}: damaged safetensors file: {error}") from None
    problems = [f"missing {name}" for name in shapes if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in shapes]
    problems += [
        f"{name} has shape {found[name]}, needs {list(shapes[name])}"
        for name in shapes
        if name in found and list(found[name]) != list(shapes[name])
    ]
    if problems:
        raise ArtifactError(f"{path}: {'; '.join(problems)}")
    return read_tensors(path)


def parse_messages(messages: Sequence[Mapping[str, str] | Message]) -> tuple[Message, ...]:
    """Turn chat messages, as dicts or `Message`, into messages.

    Raises:
        ValueError: If one lacks a role or content, or has an unknown role.
    """
    parsed = []
    for k, message in enumerate(messages):
        if isinstance(message, Message):
            parsed.append(message)
            continue
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"message {k} needs `role` and `content`, got {message!r:.80}")
        if not isinstance(message["content"], str):
            raise ValueError(f"message {k}: `content` must be text")
        parsed.append(Message(role=message["role"], content=message["content"]))
    return tuple(parsed)
