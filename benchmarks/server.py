"""What serving costs: throughput of many clients, overload, memory, and malformed requests.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/server.py --json PATH
    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/server.py --quick

A model of the demo's shape on MiniLM, `armo serve` in a process of its own, and clients in this
one; where both have one core, the clients' share of it is the server's loss.

`server_vs_offline_throughput`: rows per second of 64 clients with one conversation each, in a
closed loop over the built-in rated responses, over those of `model.score` of the same texts in one
call; turn by turn, the median over turns. `overload_lost`: requests that arrive at random, twice as
many as those clients had answered, and get neither a score nor a 503. `overload_p99_ratio`: the
99th percentile of the seconds until those with a score have it, over the tokens that may be pending
divided by the tokens per second of closed loops right before and after. `soak_memory_growth_mb`:
resident memory of the server in the last tenth of a soak, less that after a fifth of it; every
tenth request is malformed, and every tenth client goes away. `malformed_5xx`: malformed requests
without an answer or with one of 5xx. Half are our own, of which those that chance leaves valid may
get a 200; half are bodies against the OpenAPI page by Schemathesis (of `armo[dev]`), a 200 to which
counts as well.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil
import torch
from figures import Figure, save
from score import SPEC, build

from armo.data.objectives import ObjectiveSet
from armo.data.sources import load_ratings
from armo.embed.backbone import load_backbone
from armo.model.conversations import parse_conversations
from armo.model.reward_model import ArmoRewardModel
from armo.serve.rows import Row, RowReader

CLIENTS = 64
PORT = 8753
QUEUE_TOKENS = 16384
HEAD = "POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {n}\r\n\r\n"
PATHS = (
    "/score",
    "/compare",
    "/get_reward",
    "/classify",
    "/pooling",
    "/v1/embeddings",
    "/v1/score/evaluation",
)
FIELDS = (
    *("conversations", "prompt", "responses", "weights", "scale", "thresholds", "a", "b", "query"),
    *("prompts", "labels", "input", "messages", "task", "model", "dimensions", "encoding_format"),
    *("use_activation", "role", "content"),
)
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Size:
    """How much work there is."""

    rows: int
    turns: int
    overload_s: float
    soak_s: float
    malformed: int


FULL = Size(512, 3, 30.0, 600.0, 10_000)
QUICK = Size(192, 1, 8.0, 8.0, 500)
TINY = Size(64, 1, 2.0, 2.0, 50)


class Client:
    """One connection that is kept, and asks one thing at a time."""

    def __init__(self) -> None:
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: bytes, *, kind: str = "application/json") -> int:
        """Ask, and return the status; 0 if no answer came, for nothing is asked twice."""
        try:
            if self._streams is not None and self._streams[0].at_eof():
                self.close()
            if self._streams is None:
                self._streams = await asyncio.open_connection("127.0.0.1", PORT)
            reader, writer = self._streams
            writer.write(HEAD.format(path=path, kind=kind, n=len(body)).encode() + body)
            await writer.drain()
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.split(b"content-length: ", 1)[1].split(b"\r\n", 1)[0])
            await reader.readexactly(length)
            if b"connection: close" in head:
                self.close()
            return int(head.split(b" ", 2)[1])
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            return 0

    def close(self) -> None:
        """Hang up."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


@contextmanager
def serving(folder: Path) -> Iterator[psutil.Process]:
    """Run `armo serve` until the block ends."""
    command = [sys.executable, "-m", "armo.cli", "serve", f"model={folder}", f"port={PORT}"]
    command += ["device=cpu", f"server.queue_tokens={QUEUE_TOKENS}", "server.max_requests=4096"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL) as process:
        try:
            while asyncio.run(Client().post("/health", b"")) != 405:
                if process.poll() is not None:
                    raise SystemExit("the server did not start")
                time.sleep(0.2)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()


def timed(run: Callable[[], object]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


async def closed_loop(bodies: Sequence[bytes]) -> None:
    """Ask everything once, as fast as 64 clients get answers."""
    left = iter(bodies)

    async def ask() -> None:
        client = Client()
        for body in left:
            status = await client.post("/score", body)
            assert status == 200, status
        client.close()

    await asyncio.gather(*(ask() for _ in range(CLIENTS)))


@dataclass
class Overload:
    """What became of the requests of an overload."""

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)


async def overload(bodies: Sequence[bytes], *, per_s: float, for_s: float) -> Overload:
    """Ask at random times, whatever the answers."""
    result, idle, running = Overload(), [Client() for _ in range(CLIENTS)], set()
    draw = random.Random(0)

    async def ask(body: bytes) -> None:
        client = idle.pop() if idle else Client()
        start = time.perf_counter()
        status = await client.post("/score", body)
        result.statuses[status] += 1
        if status == 200:
            result.seconds.append(time.perf_counter() - start)
        idle.append(client)

    source = cycle(bodies)
    now = started = time.perf_counter()
    due = started
    while due < started + for_s:
        if (wait := due - (now := time.perf_counter())) > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(ask(next(source)))
        running.add(task)
        task.add_done_callback(running.discard)
        due += draw.expovariate(per_s)
        if now > due:
            await asyncio.sleep(0)
    await asyncio.gather(*running)
    for client in idle:
        client.close()
    return result


def malformed(draw: random.Random) -> tuple[str, bytes, str]:
    """Draw a path, a body that is wrong in some way, and a type for it."""

    def value(depth: int) -> Any:
        kind = draw.randrange(9 if depth < 4 else 6)
        plain = (None, draw.random() < 0.5, draw.randint(-(2**70), 2**70), float("nan"), 1e999)
        if kind < 5:
            return plain[kind]
        if kind == 5:
            words = ("user", "assistant", "\ud800", "", "x" * 50, "[SEP]", "<|im_end|>")
            return draw.choice(words)
        if kind < 8:
            return {draw.choice(FIELDS): value(depth + 1) for _ in range(draw.randrange(4))}
        return [value(depth + 1) for _ in range(draw.randrange(4))]

    body = json.dumps({draw.choice(FIELDS): value(0) for _ in range(draw.randrange(5))}).encode()
    how = draw.randrange(6)
    if how == 0:
        body = body[: draw.randrange(len(body))]
    elif how == 1:
        at = draw.randrange(len(body))
        body = body[:at] + draw.randbytes(3) + body[at:]
    elif how == 2:
        body = b"[" * draw.randrange(1, 5000)
    elif how == 3:
        body = json.dumps(value(0)).encode()
    kinds = ("application/json",) * 8 + (
        "text/plain",
        "multipart/form-data",
        "application/xml; \xe9",
    )
    return draw.choice(PATHS), body, draw.choice(kinds)


async def ask_malformed(count: int) -> Counter[int]:
    """Ask in several connections, each in turn."""
    statuses: Counter[int] = Counter()

    async def ask(seed: int, count: int) -> None:
        draw, client = random.Random(seed), Client()
        for _ in range(count):
            path, body, kind = malformed(draw)
            statuses[await client.post(path, body, kind=kind)] += 1
        client.close()

    parts = min(8, count)
    await asyncio.gather(*(ask(k, count // parts) for k in range(parts)))
    return statuses


def ask_against_page(count: int) -> tuple[int, int]:
    """Let Schemathesis ask what the OpenAPI page forbids; return requests and failures."""
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "run",
        f"http://127.0.0.1:{PORT}/openapi.json",
    ]
    command += ["--mode", "negative", "--phases", "coverage,fuzzing", "--continue-on-failure"]
    command += ["--checks", "not_a_server_error,negative_data_rejection", "--seed", "0"]
    command += ["--max-examples", str(max(1, count // len(PATHS))), "--include-method", "POST"]
    command += ["--report", "json", "--report-json-path", "report.json"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        cases = json.loads((Path(folder) / "report.json").read_text())["test_cases"]
    if done.returncode:
        print(done.stdout)
    return cases["generated"], cases["with_failures"] + cases["errored"]


async def soak(bodies: Sequence[bytes], server: psutil.Process, for_s: float) -> float:
    """Ask all the time, in all manners; return by how many megabytes the server grew."""
    started = time.perf_counter()
    sizes: list[tuple[float, float]] = []

    def passed() -> float:
        return (time.perf_counter() - started) / for_s

    async def ask(seed: int) -> None:
        draw, client = random.Random(seed), Client()
        while passed() < 1.0:
            manner = draw.random()
            if manner < 0.1:
                path, body, kind = malformed(draw)
                await client.post(path, body, kind=kind)
            elif manner < 0.2:
                asking = asyncio.create_task(client.post("/score", draw.choice(bodies)))
                await asyncio.sleep(draw.random() * 0.1)
                asking.cancel()
                client.close()
            else:
                await client.post("/score", draw.choice(bodies))
        client.close()

    async def watch() -> None:
        while passed() < 1.0:
            sizes.append((passed(), server.memory_info().rss / 2**20))
            await asyncio.sleep(for_s / 200)

    await asyncio.gather(watch(), *(ask(k) for k in range(CLIENTS)))
    early = [size for share, size in sizes if 0.2 <= share < 0.3]
    late = [size for share, size in sizes if share >= 0.9]
    return statistics.median(late) - statistics.median(early)


def conversations(count: int) -> list[Messages]:
    """The first built-in rated responses."""
    names = ("helpfulness", "honesty", "safety", "verbosity", "formatting")
    scales = {name: {"low": 0, "high": 100} for name in names}
    rows = load_ratings("builtin", objectives=ObjectiveSet.from_mapping(scales))[:count]
    return [
        [{"role": m.role, "content": m.content} for m in row.prompt]
        + [{"role": "assistant", "content": row.responses[0]}]
        for row in rows
    ]


def measure(model: ArmoRewardModel, folder: Path, size: Size) -> list[Figure]:
    """Measure everything against one server."""
    texts = conversations(size.rows)
    bodies = [json.dumps({"conversations": [text]}).encode() for text in texts]
    rows = RowReader(model.backbone).conversations(parse_conversations(texts))
    cost = statistics.mean(row.cost for row in rows if isinstance(row, Row))
    offline, online = [], []
    with serving(folder) as server:
        for turn in range(size.turns + 1):
            own = timed(lambda: model.score(texts))
            served = timed(lambda: asyncio.run(closed_loop(bodies)))
            if turn:  # the first warms up
                offline.append(len(texts) / own)
                online.append(len(texts) / served)
        ratio = statistics.median(a / b for a, b in zip(online, offline, strict=True))
        per_s = statistics.median(online)
        print(f"{cost:.0f} tokens; rows/s {per_s:.1f}, offline {statistics.median(offline):.1f}")
        over = asyncio.run(overload(bodies, per_s=2 * per_s, for_s=size.overload_s))
        print(f"overload: {dict(over.statuses)}")
        lost = sum(count for status, count in over.statuses.items() if status not in (200, 503))
        p99 = statistics.quantiles(over.seconds, n=100)[98]
        again = len(texts) / timed(lambda: asyncio.run(closed_loop(bodies)))
        bound_s = QUEUE_TOKENS / (cost * statistics.mean([online[-1], again]))
        wrong = asyncio.run(ask_malformed(size.malformed // 2))
        against, failed = ask_against_page(size.malformed // 2)
        print(f"malformed: {dict(wrong)}; against the page: {against}, {failed} failed")
        failed += sum(count for status, count in wrong.items() if not 200 <= status < 500)
        growth = asyncio.run(soak(bodies, server, size.soak_s))
    median = statistics.median(offline)
    return [
        Figure("server_vs_offline_throughput", ratio, "of offline rows/s", median, goal=0.85),
        Figure("overload_lost", float(lost), "requests", float(over.statuses.total()), goal=0.0),
        Figure("overload_p99_ratio", p99 / bound_s, "of bound / throughput", bound_s, goal=1.5),
        Figure("soak_memory_growth_mb", growth, "MB", size.soak_s, goal=16.0),
        Figure(
            "malformed_5xx", float(failed), "requests", float(against + wrong.total()), goal=0.0
        ),
    ]


def main() -> None:
    """Measure all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="less work, under a minute")
    parser.add_argument("--soak", type=float, help="seconds of the soak")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = TINY if options.tiny else QUICK if options.quick else FULL
    if options.soak:
        size = Size(size.rows, size.turns, size.overload_s, options.soak, size.malformed)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {size}")
    model = build(load_backbone(SPEC, device="cpu"))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        figures = measure(model, Path(folder), size)
    for figure in figures:
        print(
            f"{figure.name:<30}{figure.value:9.3f} {figure.unit:<24}goal {figure.goal:<8g}"
            f"beside {figure.baseline:.2f}"
        )
    if options.json:
        save(figures, options.json)


if __name__ == "__main__":
    main()
