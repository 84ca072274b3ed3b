"""The embedding store: safetensors shards that say what they hold, so a cut-off run goes on."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from armo.artifacts import ArtifactError, delete_temporaries, read_json, write_json, write_tensors

logger = logging.getLogger(__name__)

HEADER = "store.json"
LABEL = "shard"
CHECKSUM = "sha256"


@dataclass(frozen=True, eq=False, slots=True)
class Embeddings:
    """Embeddings of some texts, rows in the order of the texts.

    Attributes:
        values: In the backbone's dtype; NaN where missing.
        truncated: Whether the text was cut to fit.
        missing: Whether the text was skipped.
    """

    values: Float[Tensor, "batch dim"]
    truncated: Bool[Tensor, " batch"]
    missing: Bool[Tensor, " batch"]


@dataclass(frozen=True, slots=True)
class Shard:
    """What a shard holds: some prompts, and all responses to them.

    Attributes:
        prompts: Number of prompts.
        responses: Number of responses.
        texts: Digest of its texts, in order.
    """

    prompts: int
    responses: int
    texts: str


@dataclass(frozen=True, slots=True)
class EmbeddingStore:
    """Embeddings of prompts and of responses on disk, one file per shard.

    Each file says what it holds, with a checksum of it, so that a shard can be trusted whatever
    became of the run that wrote it. Several processes may write, each its own shards.

    Attributes:
        folder: Where the shards are.
        dim: Width of an embedding.
        fingerprint: What made the embeddings, see `BackboneSpec.fingerprint`.
        shards: The rows of each shard; prompts and responses are numbered on through all of them.
    """

    folder: Path
    dim: int
    fingerprint: str
    shards: tuple[Shard, ...]

    @classmethod
    def create(
        cls, folder: Path, *, dim: int, fingerprint: str, shards: Sequence[Shard]
    ) -> "EmbeddingStore":
        """Open the store for writing; whole shards of the same embeddings are kept.

        Every other shard is deleted: one of another fingerprint, of other texts, with other rows,
        or damaged; and so is what a killed process left half written. One process does this,
        before any of them writes.
        """
        store = cls(folder, dim, fingerprint, tuple(shards))
        delete_temporaries(folder)
        labels = {store._path(shard): store._label(shard) for shard in range(len(store.shards))}
        if stale := _keep_whole(sorted(folder.glob("shard-*.safetensors")), labels):
            logger.info("%s: deleted %d shards of other embeddings", folder, stale)
        header = {"dim": dim, "fingerprint": fingerprint, "shards": [asdict(s) for s in shards]}
        write_json(folder / HEADER, header)
        return store

    @classmethod
    def open(cls, folder: Path) -> "EmbeddingStore":
        """Open a finished store for reading.

        Each shard's label is checked, not its checksum: that would read the whole store.

        Raises:
            ArtifactError: If it is missing, lacks a shard, or has one of another store.
        """
        header = read_json(folder / HEADER)
        try:
            shards = tuple(Shard(**shard) for shard in header["shards"])
            store = cls(folder, header["dim"], header["fingerprint"], shards)
        except (KeyError, TypeError):
            raise ArtifactError(
                f"{folder / HEADER}: not the header of an embedding store, or one of another "
                "version. Make it again with `armo train stages=[embed]`."
            ) from None
        for missing in store.missing_shards():
            raise ArtifactError(f"{folder}: shard {missing} of {len(shards)} is missing")
        for shard in range(len(shards)):
            with _opened(store._path(shard)) as file:
                found, expected = _label(file), store._label(shard)
            if wrong := [name for name in expected if found.get(name) != expected[name]]:
                raise ArtifactError(
                    f"{store._path(shard)}: not of this store, see its {' and '.join(wrong)}. "
                    "Make it again with `armo train stages=[embed]`."
                )
        return store

    @property
    def prompts(self) -> "EmbeddingTable":
        """Embeddings of the prompts."""
        ends = accumulate(shard.prompts for shard in self.shards)
        return EmbeddingTable(self, "prompts", torch.tensor([*ends], dtype=torch.int64))

    @property
    def responses(self) -> "EmbeddingTable":
        """Embeddings of the responses."""
        ends = accumulate(shard.responses for shard in self.shards)
        return EmbeddingTable(self, "responses", torch.tensor([*ends], dtype=torch.int64))

    def missing_shards(self) -> list[int]:
        """Return the numbers of the shards that are not written yet."""
        return [shard for shard in range(len(self.shards)) if not self.has(shard)]

    def has(self, shard: int) -> bool:
        """Whether a shard has been written."""
        return self._path(shard).is_file()

    def write(self, shard: int, *, prompts: Embeddings, responses: Embeddings) -> None:
        """Write one whole shard.

        Raises:
            ValueError: If the rows are not as many, or not as wide, as the shard's.
            OSError: If the disk is full; what was written of the shard is gone then.
        """
        plan = self.shards[shard]
        tensors: dict[str, Tensor] = {}
        for name, part, rows in (
            ("prompts", prompts, plan.prompts),
            ("responses", responses, plan.responses),
        ):
            shapes = [tuple(t.shape) for t in (part.values, part.truncated, part.missing)]
            if shapes != [(rows, self.dim), (rows,), (rows,)]:
                raise ValueError(
                    f"`{name}` of shard {shard} must be {rows} rows of width {self.dim} and their "
                    f"marks, got shapes {shapes}."
                )
            tensors[name] = part.values.detach().cpu().contiguous()
            tensors[f"{name}_truncated"] = part.truncated.cpu().to(torch.uint8)
            tensors[f"{name}_missing"] = part.missing.cpu().to(torch.uint8)
        _write_labelled(self._path(shard), tensors, self._label(shard))

    def _label(self, shard: int) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "dim": self.dim, **asdict(self.shards[shard])}

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors"


@dataclass(frozen=True, eq=False, slots=True)
class EmbeddingTable:
    """The prompts, or the responses, of a store, by row number.

    Attributes:
        store: Where they are.
        name: Which of the two.
        ends: The row after the last one of each shard.
    """

    store: EmbeddingStore
    name: Literal["prompts", "responses"]
    ends: Int[Tensor, " shards"]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def dim(self) -> int:
        """Width of an embedding."""
        return self.store.dim

    def read(self, rows: Int[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        """Read the embeddings of some rows, in the order asked for, any row any number of times.

        Raises:
            IndexError: If there is no such row.
        """
        result: Tensor | None = None
        for positions, values in self.batches(rows):
            if result is None:
                result = torch.empty(len(rows), self.dim, dtype=values.dtype)
            result[positions] = values
        if result is None:
            dtype = self._tensor(0, self.name).dtype if len(self.ends) else torch.float32
            return torch.empty(0, self.dim, dtype=dtype)
        return result

    def batches(
        self, rows: Int[Tensor, " batch"]
    ) -> Iterator[tuple[Int[Tensor, " part"], Float[Tensor, "part dim"]]]:
        """Yield positions in `rows` with their embeddings, one shard at a time.

        Rows are taken in the order they have on disk. The shard is mapped into memory, where only
        the pages of these rows are touched, and unmapped again before the next one.

        Raises:
            IndexError: If there is no such row.
        """
        rows = rows.to("cpu", torch.int64)
        wrong = rows[(rows < 0) | (rows >= self.rows)]
        if len(wrong):
            raise IndexError(
                f"`rows` must be at least 0 and below {self.rows}, the number of {self.name}; got "
                f"{int(wrong[0])}."
            )
        order = rows.argsort()
        shard_of = torch.searchsorted(self.ends, rows[order], right=True)
        shards, counts = shard_of.unique_consecutive(return_counts=True)
        for shard, here in zip(shards.tolist(), order.split(counts.tolist()), strict=True):
            start = int(self.ends[shard - 1]) if shard else 0
            yield here, self._tensor(shard, self.name)[rows[here] - start]

    def truncated(self) -> Bool[Tensor, " rows"]:
        """Whether the text of each row was cut to fit."""
        return self._marks("truncated")

    def missing(self) -> Bool[Tensor, " rows"]:
        """Whether the text of each row was skipped."""
        return self._marks("missing")

    def _marks(self, name: str) -> Bool[Tensor, " rows"]:
        parts = [self._tensor(shard, f"{self.name}_{name}") for shard in range(len(self.ends))]
        return torch.cat([torch.zeros(0, dtype=torch.uint8), *parts]).bool()

    def _tensor(self, shard: int, name: str) -> Tensor:
        return _tensor(self.store._path(shard), name)


@dataclass(frozen=True, slots=True)
class CovariateStore:
    """Covariates of the responses of an `EmbeddingStore`, in a file beside each of its shards.

    They are measured on the texts alone. So another backbone keeps them, and another way to
    measure keeps the embeddings.

    Attributes:
        folder: Where the shards are.
        names: Of the covariates, in column order.
        version: Of the way in which they are measured.
        shards: Those of the embeddings.
    """

    folder: Path
    names: tuple[str, ...]
    version: int
    shards: tuple[Shard, ...]

    @classmethod
    def create(
        cls, folder: Path, *, names: Sequence[str], version: int, shards: Sequence[Shard]
    ) -> "CovariateStore":
        """Open the store for writing; whole shards of the same covariates are kept.

        Every other one is deleted, see `EmbeddingStore.create`.
        """
        store = cls(folder, tuple(names), version, tuple(shards))
        labels = {store._path(shard): store._label(shard) for shard in range(len(store.shards))}
        if stale := _keep_whole(sorted(folder.glob("covariates-*.safetensors")), labels):
            logger.info("%s: deleted %d shards of other covariates", folder, stale)
        return store

    def missing_shards(self) -> list[int]:
        """Return the numbers of the shards that are not written yet."""
        return [shard for shard in range(len(self.shards)) if not self.has(shard)]

    def has(self, shard: int) -> bool:
        """Whether a shard has been written."""
        return self._path(shard).is_file()

    def write(self, shard: int, covariates: Float[Tensor, "responses covariates"]) -> None:
        """Write one whole shard.

        Raises:
            ValueError: If the rows or columns are not as many as the shard's.
            OSError: If the disk is full; what was written of the shard is gone then.
        """
        expected = (self.shards[shard].responses, len(self.names))
        if tuple(covariates.shape) != expected:
            raise ValueError(
                f"`covariates` of shard {shard} must have the shape {expected}, got "
                f"{tuple(covariates.shape)}."
            )
        _write_labelled(self._path(shard), {"covariates": covariates}, self._label(shard))

    def read(self) -> Float[Tensor, "responses covariates"]:
        """Read the covariates of all responses.

        Raises:
            ArtifactError: If a shard is missing, damaged, or of another store.
        """
        parts = [torch.zeros(0, len(self.names), dtype=torch.float64)]
        for shard in range(len(self.shards)):
            state = _state(self._path(shard), self._label(shard))
            if state != "whole":
                raise ArtifactError(
                    f"{self._path(shard)}: {state}. Make it again with `armo train stages=[embed]`."
                )
            parts.append(_tensor(self._path(shard), "covariates"))
        return torch.cat(parts)

    def _label(self, shard: int) -> dict[str, Any]:
        plan = self.shards[shard]
        return {
            "covariates": list(self.names),
            "version": self.version,
            "responses": plan.responses,
            "texts": plan.texts,
        }

    def _path(self, shard: int) -> Path:
        return self.folder / f"covariates-{shard:05d}.safetensors"


def _keep_whole(files: Iterable[Path], labels: Mapping[Path, dict[str, Any]]) -> int:
    """Delete what is not a whole shard with the label of its name; count those of other stores."""
    stale = 0
    for path in files:
        state = _state(path, labels[path]) if path in labels else "stale"
        if state == "damaged":
            logger.warning("%s is damaged; it is made again", path)
        if state != "whole":
            path.unlink()
        stale += state == "stale"
    return stale


def _state(path: Path, expected: dict[str, Any]) -> Literal["whole", "stale", "damaged", "missing"]:
    """Say whether a file is the whole shard that its label should say it is."""
    if not path.is_file():
        return "missing"
    try:
        with _opened(path) as file:
            label = _label(file)
            checksum = label.pop(CHECKSUM, None)
            if label != expected:
                return "stale"
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return "whole" if _checksum(tensors) == checksum else "damaged"
    except ArtifactError:
        return "damaged"


def _write_labelled(path: Path, tensors: Mapping[str, Tensor], label: dict[str, Any]) -> None:
    label = {**label, CHECKSUM: _checksum(tensors)}
    write_tensors(path, tensors, metadata={LABEL: json.dumps(label)})


def _tensor(path: Path, name: str) -> Tensor:
    with _opened(path) as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise ArtifactError(f"No such file: {path}") from None
    except SafetensorError as error:
        raise ArtifactError(f"{path}: damaged safetensors file: {error}") from None


def _label(file: Any) -> dict[str, Any]:
    """Return what an open shard says it holds; nothing, if it is no shard of this version."""
    try:
        label = json.loads((file.metadata() or {}).get(LABEL, "{}"))
    except json.JSONDecodeError:
        return {}
    return label if isinstance(label, dict) else {}


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
