"""Split serving: the backbone runs in another server, heads and gate here.

That server is vLLM or one that answers like its `/pooling` route: token ids in, the hidden state of
the last token after the final norm out, not normalised to length 1.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from armo.artifacts import digest_json
from armo.embed.backbone import Backbone, tokens_per_batch
from armo.embed.plan import Plan, TextPlanner
from armo.embed.spec import BackboneError, BackboneSpec
from armo.model.pretrained import BACKBONE, download_folder, load_folder
from armo.model.reward_model import ArmoRewardModel
from armo.serve.completions import load_tokenizer

# Requests at once: the other server makes batches of what it gets together.
CONNECTIONS = 8
# Of a request, where it is not said how many.
REQUEST_TOKENS = 8192
# Seconds before it is asked again: what a server that is busy, or a connection that breaks, needs.
RETRY_S = (0.5, 2.0)
BUSY = (429, 502, 503, 504)


class RemoteError(RuntimeError):
    """The other server cannot be reached, or does not answer with embeddings."""


class AwayError(RemoteError, ConnectionError):
    """The other server cannot be reached, or is busy: no request would be answered."""


class PoolingClient:
    """Asks a server for the last hidden states of token ids."""

    def __init__(
        self, url: str, *, model: str | None = None, api_key: str | None = None, timeout_s: float
    ) -> None:
        """Name the server.

        Args:
            url: Its address, without a route.
            model: What it calls the model, where it must be told.
            api_key: What it asks for, if anything.
            timeout_s: Of a request; after it none is sent again.

        Raises:
            ValueError: If `url` is no address of HTTP.
        """
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"the address of the backbone must be http:// or https://, got {url}")
        self.url = url.rstrip("/")
        self._model = model
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout_s = timeout_s

    def embed(self, rows: Sequence[list[int]]) -> Float[Tensor, "batch dim"]:
        """Give the hidden state of the last token of each row of ids.

        Raises:
            AwayError: If there is no answer, however often it is asked.
            RemoteError: If it refuses, or answers in another form.
        """
        body = {"input": rows, "task": "embed", "use_activation": False}
        if self._model is not None:
            body["model"] = self._model
        request = urllib.request.Request(
            f"{self.url}/pooling", json.dumps(body).encode(), self._headers
        )
        until = time.monotonic() + self._timeout_s
        for pause_s in RETRY_S:
            try:
                return self._states(self._ask(request), len(rows))
            except AwayError:
                if time.monotonic() + pause_s > until:
                    raise
                time.sleep(pause_s)
        return self._states(self._ask(request), len(rows))

    def _ask(self, request: urllib.request.Request) -> Any:
        place = request.full_url
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            reason = " ".join(error.read(500).decode(errors="replace").split())
            kind = AwayError if error.code in BUSY else RemoteError
            raise kind(f"{place} answers {error.code}: {reason}") from None
        except (OSError, http.client.HTTPException) as error:
            raise AwayError(f"{place} does not answer: {error}") from None
        except ValueError as error:
            raise RemoteError(f"{place} does not answer with JSON: {error}") from None

    def _states(self, answer: Any, count: int) -> Tensor:
        try:
            parts = sorted(answer["data"], key=lambda part: part["index"])
            numbers = [part["index"] for part in parts]
            values = torch.tensor([part["data"] for part in parts], dtype=torch.float32)
        except (KeyError, TypeError, ValueError):
            numbers, values = [], torch.empty(0)
        if values.ndim != 2 or numbers != list(range(count)):
            raise RemoteError(
                f"{self.url}/pooling does not answer with one embedding for each of {count} rows; "
                f"vLLM needs `--runner pooling --convert embed`"
            )
        if not bool(values.isfinite().all()):
            raise RemoteError(f"{self.url}/pooling answers with numbers that are not finite")
        return values


class _Elsewhere(nn.Module):
    """Stands for the language model among the modules: no weights, and a dtype all the same."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.device = torch.device("cpu")


class RemoteRunner:
    """Runs plans on another server; made to stand where a `Runner` does.

    Attributes:
        dim: Width of an embedding.
        batch_tokens: Tokens of a request.
        causal: False, so that a prompt's embedding is asked for by itself: the server gives no
            state but the last one.
        shares: False: the server keeps prefixes itself.
    """

    causal = False
    shares = False

    def __init__(self, client: PoolingClient, *, batch_tokens: int) -> None:
        """Ask the server how wide its embeddings are."""
        self.batch_tokens = batch_tokens
        self._client = client
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="armo-pooling")
        self.dim = client.embed([[1, 2]]).shape[1]

    def run(
        self,
        plan: Plan,
        *,
        max_rows: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Float[Tensor, "targets dim"]:
        """Run a plan, as `Runner.run` does.

        Raises:
            RemoteError: If the server does not answer with embeddings.
        """
        assert not plan.shared
        values = torch.full((plan.targets, self.dim), torch.nan)
        batches: list[list[int]] = []
        taken = 0
        for k, sequence in enumerate(plan.sequences):
            taken += len(sequence.ids)
            full = taken > self.batch_tokens or (batches and len(batches[-1]) == max_rows)
            if not batches or full:
                batches.append([])
                taken = len(sequence.ids)
            batches[-1].append(k)
        asked = [[plan.sequences[k].ids for k in batch] for batch in batches]
        for batch, states in zip(batches, self._pool.map(self._client.embed, asked), strict=True):
            if states.shape[1] != self.dim:
                raise RemoteError(
                    f"{self._client.url} now gives embeddings of width {states.shape[1]}, not of "
                    f"{self.dim} as at the start: another model runs there"
                )
            for k, state in zip(batch, states, strict=True):
                sequence = plan.sequences[k]
                (span,) = sequence.spans
                assert span.start == len(sequence.ids) - 1
                values[span.target] = state
            if progress is not None:
                progress(sum(len(plan.sequences[k].ids) for k in batch))
        return values


class RemoteBackbone(Backbone):
    """A backbone whose weights are on another server."""

    def __init__(
        self,
        spec: BackboneSpec,
        *,
        client: PoolingClient,
        tokenizer: PreTrainedTokenizerBase,
        batch_tokens: int,
    ) -> None:
        """Join a server and the tokenizer of its model.

        Raises:
            BackboneError: If the tokenizer is not the one that the spec names.
        """
        digest = digest_json([tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template])
        if spec.tokenizer_digest not in (None, digest):
            raise BackboneError(f"the tokenizer is not the one of {spec.id} that the model names")
        self.spec = spec
        self.model: Any = _Elsewhere(getattr(torch, spec.dtype, torch.float32))
        self.tokenizer = tokenizer
        self.planner = TextPlanner(spec, tokenizer)
        self.runner: Any = RemoteRunner(client, batch_tokens=batch_tokens)
        self._versions = {}


def load_split(
    path: str | Path,
    client: PoolingClient,
    *,
    tokenizer: str | Path | None = None,
    batch_tokens: int | Literal["auto"] = "auto",
) -> ArmoRewardModel:
    """Load heads and gate of a model, without the weights of its backbone, and check the server.

    The golden conversations of the model must have their scores, so that another model, another
    revision, or normalised embeddings are found at once.

    Args:
        path: Model folder, or hub id.
        client: Of the server that runs the backbone.
        tokenizer: Folder or hub id of the backbone's tokenizer; if None, where the model's
            `config.json` says the backbone is.
        batch_tokens: Tokens of a request to the server.

    Returns:
        A model that scores as any other; it cannot be saved or called with token ids.

    Raises:
        BackboneError: If the model does not read its backbone in a way that the server can.
        ValueError: If there is no such tokenizer.
        RemoteError: If the server does not answer with embeddings, or with normalised ones.
        ArtifactError: If the golden conversations have other scores.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = download_folder(str(path))
    declared, gate, tensors = load_folder(folder)
    spec = declared.backbone
    if spec.pooling != "last" or spec.layers != (-1,):
        raise BackboneError(
            f"the server gives the last layer's state at the last token; this model reads "
            f"layers {list(spec.layers)} with `pooling: {spec.pooling}`"
        )
    own = folder / BACKBONE
    place = tokenizer or (own if own.is_dir() else spec.id)
    revision = None if tokenizer is not None or own.is_dir() else spec.revision
    backbone = RemoteBackbone(
        replace(spec),
        client=client,
        tokenizer=load_tokenizer(place, revision=revision),
        batch_tokens=tokens_per_batch(batch_tokens, default=REQUEST_TOKENS),
    )
    lengths = client.embed([[1], [2], [1, 2]]).norm(dim=1)
    if bool((lengths - 1.0).abs().max() < 1e-3):
        raise RemoteError(
            f"{client.url} gives embeddings of length 1: they are normalised, which loses what "
            f"the heads read; switch that off in vLLM's `--pooler-config`"
        )
    model = ArmoRewardModel.assemble(
        folder, declared, gate=gate, tensors=tensors, backbone=backbone
    )
    model.verify()
    return model
