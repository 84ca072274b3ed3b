"""The embedding store: row-ordered safetensors shards that a cut-off run can go on with."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from torch import Tensor

from armo.artifacts import ArtifactError, read_json, write_json, write_tensors

HEADER = "store.json"


@dataclass(frozen=True, slots=True)
class EmbeddingStore:
    """Embeddings on disk, row `i` in shard `i // shard_rows`.

    Attributes:
        folder: Where the shards are.
        rows: Number of rows in all.
        dim: Width of an embedding.
        shard_rows: Rows per shard; the last one may hold fewer.
        fingerprint: What made the embeddings, see `BackboneSpec.fingerprint`.
        texts: Digest of the texts that were embedded, in order.
    """

    folder: Path
    rows: int
    dim: int
    shard_rows: int
    fingerprint: str
    texts: str

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        rows: int,
        dim: int,
        shard_rows: int,
        fingerprint: str,
        texts: str,
    ) -> "EmbeddingStore":
        """Open the store for writing; whole shards of the same embeddings are kept.

        Shards of other embeddings (another fingerprint, other texts, another layout) are
        deleted: a store never mixes two.
        """
        store = cls(folder, rows, dim, shard_rows, fingerprint, texts)
        header = folder / HEADER
        if not header.is_file() or read_json(header) != store._header():
            header.unlink(missing_ok=True)
            for stale in folder.glob("shard-*.safetensors"):
                stale.unlink()
            write_json(header, store._header())
        return store

    @classmethod
    def open(cls, folder: Path) -> "EmbeddingStore":
        """Open a finished store for reading.

        Raises:
            ArtifactError: If it is missing or lacks a shard.
        """
        store = cls(folder, **read_json(folder / HEADER))
        for shard in range(store.shards):
            if not store.has(shard):
                raise ArtifactError(f"{folder}: shard {shard} of {store.shards} is missing")
        return store

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    def shard_range(self, shard: int) -> range:
        """Return the rows of a shard."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows))

    def has(self, shard: int) -> bool:
        """Whether a shard has been written."""
        return self._path(shard).is_file()

    def write(
        self,
        shard: int,
        *,
        embeddings: Float[Tensor, "batch dim"],
        truncated: Bool[Tensor, " batch"],
    ) -> None:
        """Write one whole shard."""
        assert embeddings.shape == (len(self.shard_range(shard)), self.dim)
        write_tensors(
            self._path(shard),
            {"embeddings": embeddings, "truncated": truncated.to(torch.uint8)},
        )

    def read(self, rows: Int[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        """Read the embeddings of some rows, in the order asked for, any row any number of times.

        Only the pages that hold these rows are read from the memory-mapped shards.
        """
        shard_of = rows // self.shard_rows
        result: Tensor | None = None
        for shard in shard_of.unique().tolist():
            here = (shard_of == shard).nonzero()[:, 0]
            values = self._tensor(shard, "embeddings")[rows[here] - shard * self.shard_rows]
            if result is None:
                result = torch.empty(len(rows), self.dim, dtype=values.dtype)
            result[here] = values
        return torch.empty(0, self.dim) if result is None else result

    def batches(
        self, rows: Int[Tensor, " batch"]
    ) -> Iterator[tuple[Int[Tensor, " part"], Float[Tensor, "part dim"]]]:
        """Yield positions in `rows` with their embeddings, one shard at a time."""
        shard_of = rows // self.shard_rows
        for shard in shard_of.unique().tolist():
            here = (shard_of == shard).nonzero()[:, 0]
            yield here, self.read(rows[here])

    def truncated(self) -> Bool[Tensor, " rows"]:
        """Whether the text of each row was cut to fit."""
        parts = [self._tensor(shard, "truncated").bool() for shard in range(self.shards)]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)

    def _tensor(self, shard: int, name: str) -> Tensor:
        with safe_open(self._path(shard), framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors"

    def _header(self) -> dict[str, str | int]:
        return {
            "rows": self.rows,
            "dim": self.dim,
            "shard_rows": self.shard_rows,
            "fingerprint": self.fingerprint,
            "texts": self.texts,
        }
