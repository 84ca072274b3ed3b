"""Routes that other programs know, answered in their own shapes."""

import base64
import math
import struct
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, HTTPException, Request

from armo.serve import schemas
from armo.serve.engine import Answer, RowScore
from armo.serve.openrlhf import UNSCORABLE
from armo.serve.rows import Row, RowError, RowReader
from armo.serve.service import Service, row_refusal


@dataclass(frozen=True, slots=True)
class Scored:
    """What protocols without a place for errors give of a row.

    Attributes:
        rewards: By objective, on [0, 1], 1 the good end, which they may leave.
        adjusted: The adjusted ones, within the limit, as is the score.
        score: The score.
        scorable: Whether it has a score.
    """

    rewards: list[float]
    adjusted: list[float]
    score: float
    scorable: bool

    @property
    def vector(self) -> list[float]:
        """Rewards, then the score."""
        return [*self.rewards, self.score]


def protocol_routes(service: Service) -> APIRouter:
    """Make the routes of other programs' protocols."""
    router = APIRouter()
    names = service.model.objectives.names
    bias = [objective.bias for objective in service.model.objectives.objectives]

    async def rate(
        request: Request, body: Any, texts: Sequence[str], prompts: Sequence[str] | None = None
    ) -> list[Scored]:
        service.log(request, body)

        def read(reader: RowReader) -> list[Row | RowError]:
            heads = prompts if prompts is not None else [None] * len(texts)
            return [reader.rendered(t, prompt=p) for t, p in zip(texts, heads, strict=True)]

        answers = await service.rate(request, read, rows=len(texts))
        return _scored(answers, bias=bias, limit=service.settings.limit)

    async def rate_pooled(request: Request, body: schemas.PooledRequest) -> list[Scored]:
        if (body.input is None) == (body.messages is None):
            raise HTTPException(422, "send either `input` or `messages`")
        if body.input is not None:
            texts = [body.input] if isinstance(body.input, str) else body.input
            if not texts:
                raise HTTPException(422, "input: there is no text in it")
            return await rate(request, body, texts)
        service.log(request, body)
        turns = [turn.model_dump() for turn in body.messages or ()]

        def read(reader: RowReader) -> list[Row | RowError]:
            return reader.conversations([schemas.read_conversation(turns)])

        answers = await service.rate(request, read, rows=1)
        return _scored(answers, bias=bias, limit=service.settings.limit)

    @router.post("/get_reward", summary="OpenRLHF's remote reward model")
    async def get_reward(
        body: schemas.GetRewardRequest, request: Request
    ) -> schemas.GetRewardReply:
        if body.prompts is not None and len(body.prompts) != len(body.query):
            raise HTTPException(
                422, f"{len(body.query)} `query` and {len(body.prompts)} `prompts`: one for each"
            )
        rows = await rate(request, body, body.query, body.prompts)
        logs = {name: [row.adjusted[k] for row in rows] for k, name in enumerate(names)}
        logs[UNSCORABLE] = [float(not row.scorable) for row in rows]
        return schemas.GetRewardReply(
            rewards=[row.score for row in rows],
            scores=[_sigmoid(service.beta * row.score) for row in rows],
            extra_logs=logs,
        )

    @router.post("/classify", summary="vLLM's classification: rewards, then the score")
    async def classify(body: schemas.ClassifyRequest, request: Request) -> schemas.ClassifyReply:
        if body.use_activation or body.activation:
            raise HTTPException(
                422,
                "use_activation: rewards and scores are plain numbers, to which no softmax or "
                "sigmoid belongs; send false",
            )
        rows = await rate_pooled(request, body)
        data = [
            schemas.ClassifyDatum(index=k, probs=row.vector, num_classes=len(row.vector))
            for k, row in enumerate(rows)
        ]
        return schemas.ClassifyReply(data=data, **_heading(service, "classify"))

    @router.post("/pooling", summary="vLLM's pooling: rewards, then the score")
    async def pooling(body: schemas.PoolingRequest, request: Request) -> schemas.PoolingReply:
        rows = await rate_pooled(request, body)
        data = [schemas.PoolingDatum(index=k, data=row.vector) for k, row in enumerate(rows)]
        return schemas.PoolingReply(data=data, **_heading(service, "pool"))

    @router.post("/v1/embeddings", summary="OpenAI's embeddings: rewards, then the score")
    async def embeddings(
        body: schemas.EmbeddingsRequest, request: Request
    ) -> schemas.EmbeddingsReply:
        if body.dimensions not in (None, len(names) + 1):
            raise HTTPException(422, f"dimensions: there are {len(names) + 1}, and no other number")
        rows = await rate_pooled(request, body)
        data = [
            schemas.EmbeddingDatum(
                index=k,
                embedding=row.vector if body.encoding_format == "float" else _packed(row.vector),
            )
            for k, row in enumerate(rows)
        ]
        return schemas.EmbeddingsReply(data=data, **_heading(service, "embd"))

    @router.post("/v1/score/evaluation", summary="LLaMA-Factory's score evaluation")
    async def evaluation(
        body: schemas.EvaluationRequest, request: Request
    ) -> schemas.EvaluationReply:
        rows = await rate(request, body, body.messages)
        return schemas.EvaluationReply(
            id=f"scoreval-{uuid.uuid4().hex}",
            model=service.name,
            scores=[row.score for row in rows],
        )

    return router


def _scored(
    answers: Sequence[Answer], *, bias: Sequence[bool], limit: float | None
) -> list[Scored]:
    """Give numbers alone, the lowest for responses that cannot have a score.

    Raises:
        HTTPException: Naming the row that is wrong otherwise.
    """
    rows = []
    for k, answer in enumerate(answers):
        if isinstance(answer, RowScore):
            out, row = answer.out, answer.row
            score, adjusted = out.score[row], out.adjusted[row]
            if limit is not None:
                score, adjusted = score.clamp(-limit, limit), adjusted.clamp(-limit, limit)
            rows.append(Scored(out.rewards[row].tolist(), adjusted.tolist(), float(score), True))
        elif limit is not None and isinstance(answer, RowError) and answer.of_response:
            # Bias objectives have no bad end: theirs is the mean.
            lowest = [0.0 if neutral else -limit for neutral in bias]
            rows.append(Scored([0.0] * len(bias), lowest, -limit, False))
        else:
            raise row_refusal(answer, row=str(k))
    return rows


def _heading(service: Service, kind: str) -> dict[str, Any]:
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": service.name,
    }


def _packed(values: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def _sigmoid(value: float) -> float:
    return 0.5 * (1.0 + math.tanh(0.5 * value))
