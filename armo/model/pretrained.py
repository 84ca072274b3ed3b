"""The model folder: `config.json`, `model.safetensors`, `golden.json`; strict both ways.

Beside them are the files of a tokenizer, whose digests `config.json` holds, and in `backbone` those
of the backbone, if it was asked for. A digest of `config.json` and of the tensors is in the header
of the tensors, so that neither is changed unseen. Nothing in a folder is ever executed.
"""

import copy
import hashlib
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from armo.artifacts import (
    ArtifactError,
    digest_file,
    digest_json,
    read_json,
    read_tensors,
    replacing,
)
from armo.data.objectives import ObjectiveSet
from armo.data.surface import SURFACE_FEATURES, SURFACE_VERSION
from armo.embed.backbone import Backbone, weights_digest
from armo.embed.spec import BackboneSpec
from armo.fit.gating import GatingNetwork
from armo.fit.heads import UNCERTAINTY, ObjectiveHeads, RewardUncertainty
from armo.fit.judged import Link
from armo.model.config import FIELDS, ArmoConfig
from armo.model.tokenizer import ArmoTokenizer

FORMAT = 6
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
GOLDEN = "golden.json"
CARD = "README.md"
BACKBONE = "backbone"
SEAL = "sha256"

# What is copied of a backbone, or fetched of a model from the hub: no code, no pickles.
PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
TOKEN_PROBE = "How do I boil an egg?\n\n1. Put it in *hot* water: 7 minutes; naïve, 犬 🙂."
# Names under which tokenizers are saved; those that a save does not write are another model's.
TOKENIZERS = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
# The folder of further chat templates, which armo never writes.
TEMPLATES = "additional_chat_templates"
PICKLES = ("pytorch_model.bin", "model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl")


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
        files: SHA-256 of the other files by name: those of the tokenizer, and of the uncertainty.
    """

    objectives: ObjectiveSet
    backbone: BackboneSpec
    gate: dict[str, Any]
    covariates: tuple[str, ...]
    links: tuple[Link, ...]
    files: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `config.json`."""
        return {
            "format": FORMAT,
            "model_type": "armo",
            "architectures": ["ArmoRewardModel"],
            "problem_type": "regression",
            "id2label": {"0": "score"},
            "label2id": {"score": 0},
            "objectives": self.objectives.to_dicts(),
            "backbone": asdict(self.backbone) | {"layers": list(self.backbone.layers)},
            "gate": self.gate,
            "covariates": {"version": SURFACE_VERSION, "names": list(self.covariates)},
            "links": list(self.links),
            "files": self.files,
        }

    @classmethod
    def load(cls, folder: Path) -> "ModelConfig":
        """Read `config.json`.

        Raises:
            ArtifactError: If it is missing, not JSON, of another format, lacks a field or has an
                unknown one.
        """
        path = folder / CONFIG
        if not folder.is_dir():
            raise ArtifactError(f"No model folder at {folder}")
        values = read_json(path)
        if not isinstance(values, dict) or values.get("model_type") != "armo":
            raise ArtifactError(f"{path}: not an armo model of format {FORMAT}")
        made = values.get("format")
        if made != FORMAT:
            newer = isinstance(made, int) and made > FORMAT
            raise ArtifactError(
                f"{path}: not an armo model of format {FORMAT}, but of {made!r}: "
                f"{'install a newer armo' if newer else 'make it again with this armo'}"
            )
        if unknown := sorted({*values} - {*FIELDS}):
            raise ArtifactError(f"{path}: unknown field {', '.join(map(repr, unknown))}")
        try:
            objectives = ObjectiveSet.from_dicts(values["objectives"])
            return cls(
                objectives=objectives,
                backbone=BackboneSpec(**values["backbone"]),
                gate=values["gate"],
                covariates=_covariates(**values["covariates"]),
                links=_links(values["links"], count=len(objectives.names)),
                files=_files(values["files"]),
            )
        except KeyError as error:
            raise ArtifactError(f"{path}: field {error} is missing") from None
        except (AttributeError, TypeError, ValueError) as error:
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


def _files(files: Any) -> dict[str, str]:
    if not isinstance(files, dict) or any(Path(name).name != name for name in files):
        raise ValueError("`files` must be digests by file name")
    return dict(files)


def folder_seal(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Digest what `config.json` says, but for where the backbone is to be found, and tensors."""
    backbone = {k: v for k, v in values["backbone"].items() if k not in ("id", "revision")}
    return digest_json([{**values, "backbone": backbone}, _tensors_digest(tensors)])


def read_seal(folder: Path) -> str | None:
    """Return the digest in a model folder of its configuration and tensors."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return (file.metadata() or {}).get(SEAL)


def _tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_folder(
    folder: Path, config: ArmoConfig | None = None
) -> tuple[ModelConfig, GatingNetwork, dict[str, Tensor]]:
    """Read all of a model folder but its backbone.

    Args:
        folder: The folder.
        config: What `AutoConfig` made of it, if it did.

    Returns:
        The configuration, the gate with its weights, and all tensors.

    Raises:
        ArtifactError: Naming what is missing, unexpected, changed or of another shape.
    """
    path = folder / CONFIG
    declared = ModelConfig.load(folder)
    values = read_json(path)
    if config is not None and config.num_labels != 1:
        raise ArtifactError(
            f"{folder}: `num_labels` is 1, the score, got {config.num_labels}; the "
            f"{len(declared.objectives.names)} objectives are columns of the output"
        )
    if config is not None and digest_json(config.declared()) != digest_json(values):
        raise ArtifactError(f"{folder}: `config` is not the one in {path}, or was changed")
    gate = declared.build_gate(path)
    count, dim = len(declared.objectives.names), gate.mean.shape[0]
    shapes: dict[str, Sequence[int]] = {
        "head_weights": [count, dim],
        "head_intercepts": [count],
        "adjusted_weights": [count, dim],
        "adjusted_offset": [count],
        "adjusted_style": [count, len(declared.covariates)],
        "covariate_range": [2, len(declared.covariates)],
        "beta": [],
    }
    gate.double()
    shapes |= {f"gate.{name}": list(t.shape) for name, t in gate.state_dict().items()}
    tensors = load_weights(folder / WEIGHTS, shapes)
    if not bool((tensors["gate.mixed"] == gate.mixed).all()):
        raise ArtifactError(f"{folder / WEIGHTS}: gate.mixed is not what {CONFIG} declares")
    if read_seal(folder) != folder_seal(values, tensors):
        raise ArtifactError(
            f"{folder}: {CONFIG} or {WEIGHTS} was changed after it was written, or {WEIGHTS} is "
            f"another model's: their digest is not the one in {WEIGHTS}"
        )
    for name, digest in declared.files.items():
        if not (folder / name).is_file():
            raise ArtifactError(f"No such file: {folder / name}")
        if digest_file(folder / name) != digest:
            raise ArtifactError(f"{folder / name}: changed after it was written")
    for name in (*TOKENIZERS, TEMPLATES):
        if name not in declared.files and (folder / name).exists():
            raise ArtifactError(
                f"{folder / name}: unexpected, as {CONFIG} has no digest of it, and tokenizers "
                f"would be read with it; remove it"
            )
    own = {name[5:]: t for name, t in tensors.items() if name.startswith("gate.")}
    gate.load_state_dict(own, strict=True)
    return declared, gate, tensors


def load_weights(path: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Read the tensors of a model, exactly those expected.

    Args:
        path: The safetensors file.
        shapes: Shape of each tensor that must be there.

    Raises:
        ArtifactError: Naming every tensor that is missing, unexpected, of another shape or type,
            or not finite. Nothing is ever initialised in place of a missing tensor.
    """
    if not path.is_file():
        pickled = [name for name in PICKLES if (path.parent / name).is_file()]
        reason = f"; {pickled[0]} is a pickle, which is not loaded" if pickled else ""
        raise ArtifactError(f"No such file: {path}{reason}")
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: part.get_shape() for name, part in parts.items()}
            types = {name: part.get_dtype() for name, part in parts.items()}
    except SafetensorError as error:
        with path.open("rb") as file:
            start = file.read(4)
        if start == b"PK\x03\x04" or start[:1] == b"\x80":
            raise ArtifactError(f"{path}: a pickle, not safetensors: it is not loaded") from None
        raise ArtifactError(f"{path}: damaged safetensors file: {error}") from None
    problems = [f"missing {name}" for name in shapes if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in shapes]
    problems += [
        f"{name} has shape {found[name]}, needs {list(shapes[name])}"
        for name in shapes
        if name in found and list(found[name]) != list(shapes[name])
    ]
    wanted = {name: "I64" if name == "gate.mixed" else "F64" for name in shapes}
    problems += [
        f"{name} has type {types[name]}, needs {wanted[name]}"
        for name in shapes
        if name in found and types[name] != wanted[name]
    ]
    if problems:
        raise ArtifactError(f"{path}: {'; '.join(problems)}")
    tensors = read_tensors(path)
    if infinite := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ArtifactError(f"{path}: not finite: {', '.join(sorted(infinite))}")
    return tensors


def read_uncertainty(
    folder: Path, declared: ModelConfig, heads: ObjectiveHeads
) -> RewardUncertainty | None:
    """Read the uncertainty of the heads, where the folder has one.

    Raises:
        ArtifactError: If it is not one of these heads.
    """
    if UNCERTAINTY not in declared.files:
        return None
    return RewardUncertainty.load(folder / UNCERTAINTY, heads=heads)


def download_folder(
    id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Fetch a model folder from the hub, or say plainly that there is none."""
    try:
        return Path(
            snapshot_download(
                id,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=[*PATTERNS, CARD],
            )
        )
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise ArtifactError(
            f"No model folder at {id}, and the hub could not give a model of that name "
            f"({type(error).__name__})"
        ) from None


def place_backbone(spec: BackboneSpec, folder: Path) -> BackboneSpec:
    """Point a backbone at the copy in the model folder, if there is one."""
    own = folder / BACKBONE
    return replace(spec, id=str(own), revision=None) if own.is_dir() else spec


def copy_backbone(backbone: Backbone, folder: Path) -> None:
    """Copy the files that a backbone was loaded from into a model folder.

    Raises:
        ArtifactError: If they are gone, or others by now.
    """
    source, target = Path(str(backbone.model.name_or_path)), folder / BACKBONE
    if not source.is_dir() or weights_digest(source) != backbone.spec.digest:
        raise ArtifactError(
            f"the files that {backbone.spec.id} was loaded from are not at {source} any more"
        )
    if source.resolve() == target.resolve():
        return
    shutil.rmtree(target, ignore_errors=True)
    for file in sorted({file for pattern in PATTERNS for file in source.glob(pattern)}):
        with replacing(target / file.name) as temporary:
            shutil.copyfile(file, temporary)


def refuse_own_backbone(backbone: Backbone, folder: Path) -> None:
    """Refuse to save without its backbone into the folder that the backbone is read from.

    Raises:
        ArtifactError: If that is the folder.
    """
    source = Path(str(backbone.model.name_or_path)).resolve()
    if (folder / BACKBONE).is_dir() and source == (folder / BACKBONE).resolve():
        raise ArtifactError(
            f"{folder}: the backbone is read from this folder; save to another one, or with "
            f"`include_backbone=True`"
        )


def remove_stale(folder: Path, *, written: Collection[str]) -> None:
    """Remove what another model left in its folder, of the names that models are saved under.

    A folder that is no model's keeps all it has.

    Args:
        folder: The model folder, before its `config.json` is replaced.
        written: What is the new model's own.
    """
    try:
        values = read_json(folder / CONFIG)
    except ArtifactError:
        return
    if not isinstance(values, dict) or values.get("model_type") != "armo":
        return
    for name in (*TOKENIZERS, UNCERTAINTY, CARD):
        if name not in written:
            (folder / name).unlink(missing_ok=True)
    if BACKBONE not in written:
        shutil.rmtree(folder / BACKBONE, ignore_errors=True)


def write_tokenizer(backbone: Backbone, folder: Path, *, measures: bool) -> dict[str, str]:
    """Write a tokenizer whose ids the model reads; return the digest of each file.

    That is the backbone's own where it has a chat template, which then renders the text that
    `score` reads. An encoder's gets one.
    """
    tokenizer = backbone.tokenizer
    if backbone.planner.conversations is None:
        tokenizer = ArmoTokenizer.of(tokenizer, measures=measures)
    else:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = backbone.planner.conversations.template
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
    digests = {}
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        again = type(tokenizer).from_pretrained(temporary)
        if again(TOKEN_PROBE)["input_ids"] != tokenizer(TOKEN_PROBE)["input_ids"]:
            raise ArtifactError(
                f"the tokenizer of {backbone.spec.id} does not survive being saved: read again, it "
                f"gives other tokens"
            )
        for file in sorted(path for path in Path(temporary).iterdir() if path.is_file()):
            with replacing(folder / file.name) as whole:
                shutil.copyfile(file, whole)
            digests[file.name] = digest_file(file)
    return digests
