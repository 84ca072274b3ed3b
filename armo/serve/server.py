"""Scoring over HTTP: one engine behind a native interface and those of other programs."""

import asyncio
import logging
import math
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from types import FrameType
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, HTTPException, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPBearer
from prometheus_client import CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException

from armo.model.reward_model import ArmoRewardModel
from armo.model.scales import limits_of, passing, rescale
from armo.serve import schemas
from armo.serve.engine import QueueFullError, RowScore, StoppingError, gather
from armo.serve.guard import Guard, Refusal
from armo.serve.page import api_page
from armo.serve.protocols import protocol_routes
from armo.serve.rows import Row, RowError, RowReader
from armo.serve.service import ServerSettings, Service, scored

logger = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "::1", "localhost")
# Longer than clients keep a connection that is not in use, so that none asks while it is closed.
KEEP_ALIVE_S = 75
# What a row is made of, by objective.
COLUMNS = (
    "rewards",
    "uncertainty",
    "adjusted",
    "gating_weights",
    "gating_uncertainty",
    "contributions",
)


def create_app(model: ArmoRewardModel, *, name: str, settings: ServerSettings) -> Guard:
    """Make the application; its engine starts at once and stops with the application.

    Args:
        model: The scoring model.
        name: What answers call it.
        settings: Limits.
    """
    service = Service(model, name=name, settings=settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="armo",
        summary="Scores of conversations, by objective",
        version=version("armo"),
        lifespan=lifespan,
        responses=_errors(500),
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    registry = CollectorRegistry()
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(StarletteHTTPException, _wrong)
    app.add_exception_handler(QueueFullError, _no_room)
    app.add_exception_handler(StoppingError, _no_room)
    app.add_exception_handler(Exception, _failed)
    behind_key: dict[str, Any] = {}
    if settings.api_key is not None:  # the guard asks for it; this is what the page says of it
        behind_key = {"dependencies": [Security(HTTPBearer(auto_error=False))]}
    posted = _errors(400, 401, 408, 413, 422, 503, 504)
    for routes in (_native_routes(service), protocol_routes(service)):
        app.include_router(routes, responses=posted, **behind_key)
    app.include_router(_operations(service, registry), responses=_errors(401), **behind_key)
    app.include_router(_health(service))
    page = HTMLResponse(api_page(app.openapi()))
    app.add_route("/docs", lambda request: page)

    def refusal() -> Refusal | None:
        try:
            service.engine.check_room()
        except (QueueFullError, StoppingError) as error:
            return _refusal(error)
        return None

    guard = Guard(
        app,
        check_room=refusal,
        api_key=settings.api_key,
        open_paths=frozenset({"/health", "/docs", "/openapi.json"}),
        known_paths=frozenset({*app.openapi()["paths"], "/docs", "/openapi.json"}),
        max_body_bytes=settings.max_body_bytes,
        max_requests=settings.max_requests,
        timeout_s=settings.timeout_s,
    )
    registry.register(service)
    registry.register(guard)
    return guard


def _errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": schemas.ErrorReply} for code in codes}


def _native_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/score",
        summary="Conversations in, scores and what they are made of out",
        response_model_exclude_unset=True,
    )
    async def score(body: schemas.ScoreRequest, request: Request) -> schemas.ScoreReply:
        service.log(request, body)
        prompt, responses, conversations = body.prompt, body.responses, body.conversations
        neither = prompt is None and responses is None
        both = prompt is not None and responses is not None
        if not (both if conversations is None else neither):
            raise HTTPException(422, "send either `conversations`, or `prompt` with `responses`")
        try:
            limits = limits_of(service.model.objectives, body.thresholds or {})
            if body.weights is not None:
                service.model.objectives.mix(body.weights)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None

        def read(reader: RowReader) -> list[Row | RowError]:
            if conversations is not None:
                return reader.conversations([schemas.read_conversation(c) for c in conversations])
            assert prompt is not None
            assert responses is not None
            turns = schemas.messages(prompt)
            return reader.conversations([schemas.read_response(turns, r) for r in responses])

        rows = len(conversations if conversations is not None else responses or ())
        answers = await service.rate(request, read, rows=rows, weights=body.weights)
        scores = scored(answers)
        out = passing(rescale(gather(scores), service.model.objectives, scale=body.scale), limits)
        names = out.objectives
        columns = {column: getattr(out, column).tolist() for column in COLUMNS}
        places = iter(range(len(scores)))
        made = []
        for answer in answers:
            if not isinstance(answer, RowScore):
                made.append(schemas.ScoredRow(error=str(answer)))
                continue
            k = next(places)
            parts: dict[str, Any] = {c: _named(names, values[k]) for c, values in columns.items()}
            if service.model.uncertainty is None:
                parts.pop("uncertainty")
            if limits:
                parts["passes"] = bool(out.passes[k])
            made.append(
                schemas.ScoredRow(
                    score=float(out.score[k]),
                    truncated=bool(out.truncated[k]),
                    **parts,
                )
            )
        return schemas.ScoreReply(
            model=service.name,
            objectives=list(names),
            ranges={
                n: (_finite(a), _finite(b)) for n, (a, b) in zip(names, out.ranges, strict=True)
            },
            higher_is_better=dict(zip(names, out.higher_is_better, strict=True)),
            rows=made,
        )

    @router.post("/compare", summary="Why one response is preferred to another")
    async def compare(body: schemas.CompareRequest, request: Request) -> schemas.CompareReply:
        service.log(request, body)

        def read(reader: RowReader) -> list[Row | RowError]:
            turns = schemas.messages(body.prompt)
            return reader.conversations([schemas.read_response(turns, r) for r in (body.a, body.b)])

        answers = await service.rate(request, read, rows=2)
        for what, answer in zip("ab", answers, strict=True):
            scored([answer], rows=[what])
        comparison = service.model.compare_rows(gather(scored(answers)), 0, 1)
        return schemas.CompareReply(**asdict(comparison))

    return router


def _operations(service: Service, registry: CollectorRegistry) -> APIRouter:
    router = APIRouter()

    @router.get("/info", summary="What is served: objectives, scales, fingerprint, limits")
    def info() -> schemas.InfoReply:
        return service.info()

    @router.get(
        "/metrics",
        summary="Counts, as Prometheus reads them",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}},
    )
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    return router


def _health(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get(
        "/health",
        summary="Whether requests are taken",
        responses={503: {"model": schemas.HealthReply}},
    )
    async def health(response: Response) -> schemas.HealthReply:
        if service.engine.healthy:
            return schemas.HealthReply(status="ok")
        response.status_code = 503
        return schemas.HealthReply(status="stopping, or the last pass failed; see the log")

    return router


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        where = f"{first['ctx']['error']} at character {first['loc'][1]}"
        return Refusal(422, f"the body is no valid JSON: {where}").response()
    if first["loc"] == ("body",):
        detail = "the body must be a JSON object, sent with `Content-Type: application/json`"
        return Refusal(422, detail).response()
    return Refusal(422, schemas.first_error(error.errors())).response()


async def _wrong(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    return Refusal(error.status_code, str(error.detail), *(error.headers or {}).items()).response()


async def _no_room(request: Request, error: Exception) -> Response:
    return _refusal(error).response()


async def _failed(request: Request, error: Exception) -> Response:
    return Refusal(500, "the server failed; its log says why").response()


def _refusal(error: Exception) -> Refusal:
    if isinstance(error, QueueFullError):
        return Refusal(503, str(error), ("retry-after", str(error.retry_after_s)))
    return Refusal(503, str(error))


def _named(names: tuple[str, ...], values: list[float]) -> dict[str, Any]:
    return {name: _finite(value) for name, value in zip(names, values, strict=True)}


def _finite(value: float) -> float | None:
    """Null for what JSON cannot say: what is not known, and where a range has no end."""
    return value if math.isfinite(value) else None


def serve(model: ArmoRewardModel, *, name: str, settings: ServerSettings) -> None:
    """Serve a model until the process is told to stop; then finish what was taken.

    Args:
        model: The scoring model.
        name: What answers call it.
        settings: Address and limits.

    Raises:
        OSError: If the address cannot be listened on.
    """
    if settings.host not in LOOPBACK and settings.api_key is None:
        logger.warning("%s is open to others, and there is no API key", settings.host)
    with listen(settings) as listener, suppress(KeyboardInterrupt):
        server = Server(create_app(model, name=name, settings=settings), settings)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        port = listener.getsockname()[1]
        logger.info("serving %s on http://%s:%d; its page is /docs", name, host, port)
        server.run([listener])


def listen(settings: ServerSettings) -> socket.socket:
    """Take the address of a server.

    Raises:
        OSError: If there is none such, or another program has it.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.create_server((settings.host, settings.port), family=family)
    # Connections inherit it; asyncio sees to it only on those of its own sockets. Without it a head
    # and a body that are sent one by one are 40 ms apart.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


class Server(uvicorn.Server):
    """Serves an application; once told to stop, says so with each answer that it still gives."""

    def __init__(self, app: Guard, settings: ServerSettings) -> None:
        """Serve an application within limits."""
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(settings.timeout_s) + 1,
            )
        )
        self._guard = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop; uvicorn closes connections after their answers, and does not tell the clients."""
        self._guard.leaving = True
        super().handle_exit(sig, frame)
