"""What stands before the routes: the key, the limits, the clock, and the counts of requests."""

import asyncio
import json
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator

from fastapi import HTTPException, Response
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Upper ends of the histogram of seconds; the last one is infinity.
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, float("inf"))


class Guard:
    """Wraps an application: refuses what it should not see, and measures what it does.

    Attributes:
        leaving: Whether clients are told to ask nothing more on their connections.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        check_room: Callable[[], "Refusal | None"],
        api_key: str | None,
        open_paths: frozenset[str],
        known_paths: frozenset[str],
        max_body_bytes: int,
        max_requests: int,
        timeout_s: float,
    ) -> None:
        """Wrap an application.

        Args:
            app: The application.
            check_room: Says why a request with a body is refused before it is read, if it is.
            api_key: What clients must send, if anything.
            open_paths: Paths that need no key.
            known_paths: Paths that are counted by name.
            max_body_bytes: Of a request.
            max_requests: At once.
            timeout_s: From the first byte of a request to its answer.
        """
        self.app = app
        self.leaving = False
        self._check_room = check_room
        self._api_key = None if api_key is None else api_key.encode()
        self._open_paths = open_paths
        self._known_paths = known_paths
        self._max_body_bytes = max_body_bytes
        self._max_requests = max_requests
        self._timeout_s = timeout_s
        self._running = 0
        self._answered: Counter[tuple[str, str]] = Counter()
        self._seconds: Counter[float] = Counter()
        self._seconds_sum = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500
        body = _Body(receive, self._max_body_bytes)

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                body.answered = True
                if self.leaving:
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        self._running += 1
        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await refusal.response()(scope, receive, watched)
            else:
                async with asyncio.timeout(self._timeout_s):
                    await self.app(scope, body.receive, watched)
        except TimeoutError:
            if body.answered:
                raise
            if body.whole:
                await Refusal(504, f"not done within {self._timeout_s:g} s").response()(
                    scope, receive, watched
                )
            else:
                await Refusal(408, "the body did not come in time").response()(
                    scope, receive, watched
                )
        finally:
            self._running -= 1
            took = time.perf_counter() - started
            path = scope["path"] if scope["path"] in self._known_paths else "other"
            self._answered[path, str(status)] += 1
            self._seconds[next(end for end in SECONDS if took <= end)] += 1
            self._seconds_sum += took

    def _refusal(self, scope: Scope) -> "Refusal | None":
        headers = dict(scope["headers"])
        if self._api_key is not None and scope["path"] not in self._open_paths:
            sent = headers.get(b"x-api-key", b"")
            scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() == b"bearer":
                sent = token.strip()
            if not secrets.compare_digest(sent, self._api_key):
                return Refusal(
                    401,
                    "the API key is missing or wrong; send `Authorization: Bearer KEY`",
                    ("www-authenticate", "Bearer"),
                )
        if scope["method"] != "POST":
            return None
        if self._running > self._max_requests:
            return Refusal(503, "too many requests at once", ("retry-after", "1"))
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            return Refusal(413, f"the body is larger than {self._max_body_bytes} bytes")
        return self._check_room()

    def collect(self) -> Iterator[Metric]:
        """Yield the counts, for Prometheus."""
        answered = CounterMetricFamily(
            "armo_requests", "Requests by path and status.", labels=("path", "status")
        )
        for labels, count in sorted(self._answered.items()):
            answered.add_metric(labels, count)
        yield answered
        below, buckets = 0, []
        for end in SECONDS:
            below += self._seconds[end]
            buckets.append(("+Inf" if end == SECONDS[-1] else str(end), below))
        yield HistogramMetricFamily(
            "armo_request_seconds",
            "Seconds from a request's head to its answer.",
            buckets=buckets,
            sum_value=self._seconds_sum,
        )


class Refusal:
    """An answer that says in one line why there is no other."""

    def __init__(self, status: int, detail: str, *headers: tuple[str, str]) -> None:
        """Say why."""
        self.status = status
        self.detail = detail
        self.headers = headers

    def response(self) -> Response:
        """Write it, in ASCII: a client's own words may be no valid Unicode."""
        return Response(
            json.dumps({"detail": self.detail, "error": {"message": self.detail}}),
            self.status,
            headers=dict(self.headers),
            media_type="application/json",
        )


class _Body:
    """Counts the bytes of a body as they come."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._bytes = 0
        self.whole = False
        self.answered = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            self.whole = not message.get("more_body", False)
            if self._bytes > self._limit:
                raise HTTPException(413, f"the body is larger than {self._limit} bytes")
        return message
