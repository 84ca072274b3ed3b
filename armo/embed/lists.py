"""The embedding pass over response lists alone, as an evaluation needs it."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jaxtyping import Bool, Float, Int
from torch import Tensor

from armo.artifacts import exclusive, read_json, read_tensors, write_json, write_tensors
from armo.data.conversation import ResponseList
from armo.data.surface import SURFACE_FEATURES
from armo.embed.backbone import Backbone
from armo.embed.extract import TEXTS, Team, covariate_store, run_team
from armo.embed.index import RowIndexer
from armo.embed.store import EmbeddingStore, EmbeddingTable

INDEX = "lists.safetensors"
HEADER = "lists.json"


@dataclass(frozen=True, eq=False, slots=True)
class EmbeddedLists:
    """Response lists with their embeddings, each distinct text embedded once.

    Attributes:
        prompts: One embedding per distinct prompt.
        responses: One embedding per distinct response to a prompt.
        covariates: Surface features of each distinct response.
        prompt_of_response: Prompt of each distinct response.
        response_of: Distinct response of each response of the lists, one list after the other.
        list_of: List of each response of the lists.
    """

    prompts: EmbeddingTable
    responses: EmbeddingTable
    covariates: Float[Tensor, "distinct covariates"]
    prompt_of_response: Int[Tensor, " distinct"]
    response_of: Int[Tensor, " responses"]
    list_of: Int[Tensor, " responses"]

    @property
    def surface(self) -> Float[Tensor, "responses covariates"]:
        """Surface features of each response of the lists."""
        return self.covariates[self.response_of]

    @property
    def missing(self) -> Bool[Tensor, " responses"]:
        """Whether each response of the lists was skipped as too long."""
        return self.responses.missing()[self.response_of]

    @property
    def truncated(self) -> Bool[Tensor, " responses"]:
        """Whether each response of the lists, or its prompt, was cut to fit."""
        cut = self.responses.truncated() | self.prompts.truncated()[self.prompt_of_response]
        return cut[self.response_of]


def embed_lists(
    folder: Path, rows: Sequence[ResponseList], *, backbone: Backbone, shard_rows: int = 1024
) -> EmbeddedLists:
    """Embed the rows, or go on where an earlier call stopped, or read what it finished.

    Args:
        folder: Where to write.
        rows: The lists; their sides of a split do not matter.
        backbone: The frozen language model.
        shard_rows: Responses per shard, about: what a cut-off call loses at most.

    Raises:
        ArtifactError: If another process is writing to the folder.
        BackboneError: If a text cannot be embedded, naming the row it comes from.
    """
    header = {"rows": _digest(rows), "fingerprint": backbone.spec.fingerprint}
    with exclusive(folder):
        if not (folder / HEADER).is_file() or read_json(folder / HEADER) != header:
            indexer = RowIndexer(folder / TEXTS)
            indexer.add_lists(replace(row, split=None) for row in rows)  # there are no sides here
            spool, index = indexer.finish()
            # One process, this one; the backbone stays on its own device.
            run_team(
                folder, load=lambda device: backbone, team=Team("cpu", 1), shard_rows=shard_rows
            )
            write_tensors(
                folder / INDEX,
                {
                    "prompt_of_response": spool.prompt_of_response,
                    "response_of": index.lists_response,
                    "list_of": index.lists_of,
                },
            )
            write_json(folder / HEADER, header)
            shutil.rmtree(folder / TEXTS)
    store = EmbeddingStore.open(folder)
    return EmbeddedLists(
        prompts=store.prompts,
        responses=store.responses,
        covariates=covariate_store(folder, store.shards).read(),
        **read_tensors(folder / INDEX),
    )


def _digest(rows: Sequence[ResponseList]) -> str:
    digest = hashlib.sha256(json.dumps(SURFACE_FEATURES).encode())
    for row in rows:
        turns = [[message.role, message.content] for message in row.prompt]
        digest.update(json.dumps([row.id, turns, row.responses]).encode())
    return digest.hexdigest()
