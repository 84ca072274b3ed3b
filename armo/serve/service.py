"""The model behind the routes of a server: rows in, answers out, within limits."""

import asyncio
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from fastapi import HTTPException, Request
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from pydantic import BaseModel

from armo.model.pretrained import read_seal
from armo.model.reward_model import ArmoRewardModel
from armo.serve.completions import load_tokenizer
from armo.serve.engine import Answer, PassError, RequestTooLongError, RowScore, ScoringEngine
from armo.serve.rewards import LIMIT
from armo.serve.rows import Row, RowError, RowReader
from armo.serve.schemas import InfoReply, ObjectiveInfo

logger = logging.getLogger(__name__)

# Batches of the backbone that may wait, where `queue_tokens` is not given.
QUEUE_BATCHES = 64


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Limits and manners of a server.

    Attributes:
        host: Address to listen on.
        port: Port to listen on.
        api_key: What clients must send, if anything.
        queue_tokens: Tokens that wait or run at most, see `ScoringEngine`; if None, that follows
            from the backbone's batches.
        max_rows: Rows of a request.
        max_body_bytes: Bytes of a request.
        max_requests: Requests at once, waiting ones included.
        timeout_s: Until a request is answered.
        limit: How far a score may be from the mean in protocols of other programs, as of `Rewards`:
            those beyond are clipped, and `-limit` is that of a response that cannot have one, such
            as an empty one. If None, none is clipped, and such requests are refused.
        policy: Tokenizer, folder or hub id, whose chat template rendered the texts that
            other programs' protocols get, where that is not the backbone's.
        log_texts: Whether bodies are logged.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    queue_tokens: int | None = None
    max_rows: int = 1024
    max_body_bytes: int = 8 * 2**20
    max_requests: int = 512
    timeout_s: float = 120.0
    limit: float | None = LIMIT
    policy: str | None = None
    log_texts: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.host, str) and self.host.strip()):
            raise ValueError(f"`host` must be a name or an address, got {self.host!r}")
        if not (type(self.port) is int and 0 <= self.port < 2**16):
            raise ValueError(f"`port` must be a whole number up to 65535, got {self.port}")
        for name in ("queue_tokens", "max_rows", "max_body_bytes", "max_requests"):
            value = getattr(self, name)
            if value is None and name == "queue_tokens":
                continue
            if not (type(value) is int and value > 0):
                raise ValueError(f"`{name}` must be a positive whole number, got {value}")
        for name in ("timeout_s", "limit"):
            value = getattr(self, name)
            if value is None and name == "limit":
                continue
            if not (isinstance(value, int | float) and 0.0 < value < math.inf):
                raise ValueError(f"`{name}` must be a finite number above zero, got {value}")
        if not isinstance(self.log_texts, bool):
            raise ValueError(f"`log_texts` must be true or false, got {self.log_texts}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip()):
            raise ValueError("the API key must be text of ASCII characters, and not empty")


class Service:
    """The model behind the routes: rows in, answers out."""

    def __init__(self, model: ArmoRewardModel, *, name: str, settings: ServerSettings) -> None:
        """Start the engine.

        Args:
            model: The scoring model; the service alone uses it from here on.
            name: What answers call it.
            settings: Limits.
        """
        runner, spec = model.backbone.runner, model.backbone.spec
        longest = spec.max_tokens + spec.max_prompt_tokens
        default = max(QUEUE_BATCHES * runner.batch_tokens, 4 * longest)
        self.model = model
        self.name = name
        self.settings = settings
        self.beta = float(model.beta)
        self.engine = ScoringEngine(model, queue_tokens=settings.queue_tokens or default)
        policy = None if settings.policy is None else load_tokenizer(settings.policy)
        self.reader = RowReader(model.backbone, policy=policy)
        self._tokenising = ThreadPoolExecutor(max_workers=1, thread_name_prefix="armo-read")

    async def rate(
        self,
        request: Request,
        read: Callable[[RowReader], list[Row | RowError]],
        *,
        rows: int,
        weights: dict[str, float] | None = None,
    ) -> list[Answer]:
        """Score what a request has.

        Args:
            request: Of which it is noticed when its client goes away.
            read: Makes rows of it, on the thread that tokenises.
            rows: How many it will make.
            weights: As for `ArmoRewardModel.score`.

        Raises:
            HTTPException: If it is too large, or nobody waits for the answer.
            QueueFullError: If there is no room.
        """
        if rows > self.settings.max_rows:
            raise HTTPException(
                413, f"the request has {rows} rows, {self.settings.max_rows} are taken at most"
            )
        loop = asyncio.get_running_loop()
        made = await loop.run_in_executor(self._tokenising, read, self.reader)
        sound = [row for row in made if isinstance(row, Row)]
        try:
            future = self.engine.submit(sound, weights=weights) if sound else None
        except RequestTooLongError as error:
            raise HTTPException(413, str(error)) from None
        scores = iter(await _answers(request, future) if future is not None else ())
        return [row if isinstance(row, RowError) else next(scores) for row in made]

    def log(self, request: Request, body: BaseModel) -> None:
        """Log a body, if that was asked for."""
        if self.settings.log_texts:
            # In ASCII: half of a surrogate pair may be in a row that is still to be checked.
            logger.info("%s %s", request.url.path, json.dumps(body.model_dump(warnings=False)))

    def close(self) -> None:
        """Finish what was taken."""
        self.engine.stop()
        self._tokenising.shutdown()

    def info(self) -> InfoReply:
        """Say what is served."""
        model, settings = self.model, self.settings
        spec = model.backbone.spec
        names = ("id", "revision", "digest", "dtype", "max_tokens", "max_prompt_tokens")
        return InfoReply(
            model=self.name,
            version=version("armo"),
            fingerprint=None if model.folder is None else read_seal(model.folder),
            beta=self.beta,
            objectives=[ObjectiveInfo(**asdict(o)) for o in model.objectives.objectives],
            backbone={name: getattr(spec, name) for name in (*names, "on_overlong")}
            | {"device": str(model.backbone.model.device), "fingerprint": spec.fingerprint},
            limits={
                "queue_tokens": self.engine.queue_tokens,
                "max_rows": settings.max_rows,
                "max_body_bytes": settings.max_body_bytes,
                "max_requests": settings.max_requests,
                "timeout_s": settings.timeout_s,
                "limit": settings.limit,
            },
        )

    def collect(self) -> Iterator[Metric]:
        """Yield what the engine counts, for Prometheus."""
        counts = self.engine.counts
        for name, text in {
            "passes": "Passes over the backbone.",
            "rows": "Rows answered, with a score or an error.",
            "row_errors": "Rows answered with an error of the backbone.",
            "tokens": "Tokens of the rows answered, as if each were run alone.",
            "run_tokens": "Tokens run; shared prompts once.",
            "refused": "Requests refused since the queue was full.",
            "cancelled": "Requests whose clients went away before they were run.",
        }.items():
            yield CounterMetricFamily(f"armo_{name}", text, value=getattr(counts, name))
        for name, text in {
            "pending_tokens": "Tokens taken and not answered yet.",
            "pending_rows": "Rows taken and not answered yet.",
        }.items():
            yield GaugeMetricFamily(f"armo_{name}", text, value=getattr(counts, name))
        limit = self.engine.queue_tokens
        yield GaugeMetricFamily("armo_queue_tokens", "Tokens that may be pending.", value=limit)


def scored(answers: Sequence[Answer], *, rows: Sequence[str] | None = None) -> list[RowScore]:
    """Pick the rows that have a score.

    Args:
        answers: Of all rows.
        rows: What to call them instead of their numbers.

    Raises:
        HTTPException: Of the first row, if none has a score.
    """
    scores = [answer for answer in answers if isinstance(answer, RowScore)]
    if not scores:
        raise row_refusal(answers[0], row=rows[0] if rows else "0")
    return scores


def row_refusal(answer: Answer, *, row: str) -> HTTPException:
    """What a whole request is refused with because of a row."""
    status = 422
    if isinstance(answer, PassError):
        status = 503 if answer.away else 500
    return HTTPException(status, f"row {row}: {answer}")


async def _answers(request: Request, future: "Future[list[Answer]]") -> list[Answer]:
    """Wait for answers; if the client goes away, take the request back."""
    answers: asyncio.Future[list[Answer]] = asyncio.wrap_future(future)
    waited: set[asyncio.Future[Any]] = {answers}
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait(waited | {gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answers.done():
            raise HTTPException(499, "the client went away")
        return answers.result()
    finally:
        gone.cancel()
        answers.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
