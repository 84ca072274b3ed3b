"""One thread that owns the model, and scores what many callers ask for in common passes."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from armo.embed.boundary import GroupTokens, ResponseTokens
from armo.embed.spec import BackboneError
from armo.model.output import RewardOutput
from armo.model.reward_model import ArmoRewardModel
from armo.model.scorer import TENSORS
from armo.serve.rows import Row, RowError

logger = logging.getLogger(__name__)

# Batches of the backbone in a pass: enough to put rows of like length together, and few enough that
# a pass, after which its rows are answered, takes seconds at most.
PASS_BATCHES = 4
LONGEST_WAIT_S = 60


class QueueFullError(Exception):
    """There is no room for a request.

    Attributes:
        retry_after_s: When there should be, in whole seconds.
    """

    def __init__(self, retry_after_s: int) -> None:
        """Say when to come back."""
        super().__init__(f"the queue is full; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class StoppingError(Exception):
    """The engine takes nothing more; what it took, it finishes."""


class RequestTooLongError(ValueError):
    """A request has more tokens than are ever taken at once."""


class PassError(RuntimeError):
    """A row could not be run, for no fault of its own; the log says why.

    Attributes:
        away: Whether the backbone runs on another server, which does not answer.
    """

    def __init__(self, *, away: bool) -> None:
        """Say it without what the log says."""
        what = "the backbone's server does not answer" if away else "the model failed on this row"
        super().__init__(f"{what}; the log says why")
        self.away = away


@dataclass(frozen=True, eq=False, slots=True)
class RowScore:
    """The output of a pass, and which row of it is meant."""

    out: RewardOutput
    row: int


Answer = RowScore | RowError | PassError


@dataclass(frozen=True, slots=True)
class EngineCounts:
    """What an engine has done so far, and what waits.

    Attributes:
        passes: Passes over the backbone.
        rows: Rows that were answered, with a score or an error.
        row_errors: Those of them with an error.
        tokens: Tokens of these rows, as if each were run alone.
        run_tokens: Tokens that were run, shared prompts once, padding not counted.
        refused: Requests that were refused since the queue was full.
        cancelled: Requests whose callers went away before they were run.
        pending_tokens: Tokens that were taken and are not answered yet.
        pending_rows: Likewise.
    """

    passes: int = 0
    rows: int = 0
    row_errors: int = 0
    tokens: int = 0
    run_tokens: int = 0
    refused: int = 0
    cancelled: int = 0
    pending_tokens: int = 0
    pending_rows: int = 0


@dataclass(eq=False, slots=True)
class _Request:
    """What a caller asked for."""

    rows: Sequence[Row]
    weights: Mapping[str, float] | None
    future: "Future[list[Answer]]"
    answers: list[Answer | None]
    left: int


@dataclass(frozen=True, eq=False, slots=True)
class _Part:
    """The rows of a request that have the same prompt; they are run in the same pass."""

    request: _Request
    numbers: list[int]
    cost: int


class ScoringEngine:
    """Scores rows of many callers at once, on one thread that alone touches the model.

    Whenever the thread is free it takes what waits, in the order in which it came, up to some
    batches of tokens: a lone request never waits for others, and under load passes fill by
    themselves. In a pass each distinct prompt is run once, and each distinct conversation.
    A score depends on its own row alone, beyond the rounding of the backbone's dtype
    (`GOLDEN_TOLERANCE`).

    Attributes:
        model: The scoring model; do not use it elsewhere.
        queue_tokens: Tokens that are taken and not answered, at most.
    """

    def __init__(self, model: ArmoRewardModel, *, queue_tokens: int) -> None:
        """Start the thread.

        Args:
            model: The scoring model.
            queue_tokens: Tokens that wait or run, at most; beyond, requests are refused.

        Raises:
            ValueError: If not even the longest conversation would fit.
        """
        needed = model.backbone.spec.max_tokens + model.backbone.spec.max_prompt_tokens
        if queue_tokens < needed:
            raise ValueError(
                f"`queue_tokens` must be at least {needed}, the longest conversation that the "
                f"backbone reads beside its prompt; got {queue_tokens}"
            )
        self.model = model
        self.queue_tokens = queue_tokens
        self._changed = threading.Condition()
        self._waiting: deque[_Part] = deque()
        self._counts = EngineCounts()
        self._stopping = False
        self._tokens_per_s = 0.0
        self._broken = False
        self._thread = threading.Thread(target=self._work, name="armo-engine", daemon=True)
        self._thread.start()

    def submit(
        self, rows: Sequence[Row], *, weights: Mapping[str, float] | None = None
    ) -> "Future[list[Answer]]":
        """Take rows to be scored.

        Args:
            rows: At least one; all are taken or none.
            weights: As for `ArmoRewardModel.score`.

        Returns:
            Answers in the order of the rows. To cancel it leaves out what is not run yet.

        Raises:
            QueueFullError: If there is no room.
            StoppingError: If the engine was stopped.
            RequestTooLongError: If they would never fit.
            ValueError: If the weights are none that can be mixed.
        """
        if weights is not None:
            self.model.objectives.mix(weights)
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for number, row in enumerate(rows):
            by_prompt.setdefault(row.prompt, []).append(number)
        cost = sum(row.cost for row in rows)
        if cost > self.queue_tokens:
            raise RequestTooLongError(
                f"the request has {cost} tokens, {self.queue_tokens} are taken at once at most; "
                f"send fewer rows"
            )
        future: Future[list[Answer]] = Future()
        request = _Request(rows, weights, future, [None] * len(rows), len(rows))
        with self._changed:
            self._check_running()
            if self._counts.pending_tokens + cost > self.queue_tokens:
                self._count(refused=1)
                raise QueueFullError(self._retry_after_s())
            self._count(pending_tokens=cost, pending_rows=len(rows))
            self._waiting.extend(
                _Part(request, numbers, sum(rows[k].cost for k in numbers))
                for numbers in by_prompt.values()
            )
            self._changed.notify()
        return future

    def check_room(self) -> None:
        """Refuse early, before a request is even read, while there is no room at all.

        Raises:
            QueueFullError: If a row of average length would have no room.
            StoppingError: If the engine was stopped.
        """
        with self._changed:
            self._check_running()
            counts = self._counts
            average = counts.pending_tokens / max(1, counts.pending_rows)
            if counts.pending_tokens + average > self.queue_tokens:
                self._count(refused=1)
                raise QueueFullError(self._retry_after_s())

    @property
    def counts(self) -> EngineCounts:
        """What it has done so far."""
        with self._changed:
            return self._counts

    @property
    def healthy(self) -> bool:
        """Whether it takes requests, and its last pass did not fail as a whole."""
        with self._changed:
            return self._thread.is_alive() and not self._stopping and not self._broken

    def stop(self) -> None:
        """Take nothing more, finish what was taken, and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _check_running(self) -> None:
        if self._stopping or not self._thread.is_alive():
            raise StoppingError("the server is stopping")

    def _retry_after_s(self) -> int:
        if self._tokens_per_s == 0.0:
            return 1
        seconds = math.ceil(self._counts.pending_tokens / self._tokens_per_s)
        return max(1, min(seconds, LONGEST_WAIT_S))

    def _count(self, **more: int) -> None:
        counts = self._counts
        self._counts = replace(counts, **{k: getattr(counts, k) + n for k, n in more.items()})

    def _work(self) -> None:
        while parts := self._take():
            started = time.perf_counter()
            rows = [(part.request, number) for part in parts for number in part.numbers]
            failed = self._run(rows)
            rate = sum(part.cost for part in parts) / max(time.perf_counter() - started, 1e-6)
            with self._changed:
                self._broken = failed
                # Of the last few passes; a single one may be small, or the first.
                self._tokens_per_s += (rate - self._tokens_per_s) * (
                    0.2 if self._tokens_per_s else 1.0
                )

    def _take(self) -> list[_Part]:
        """Wait for something to do; nothing, once all is done and the engine was stopped."""
        limit = PASS_BATCHES * self.model.backbone.runner.batch_tokens
        parts: list[_Part] = []
        with self._changed:
            while not parts:
                while not self._waiting and not self._stopping:
                    self._changed.wait()
                if not self._waiting:
                    break
                taken = 0
                while self._waiting and (not parts or taken + self._waiting[0].cost <= limit):
                    part = self._waiting.popleft()
                    if part.request.future.cancelled():
                        self._count(
                            cancelled=int(part.request.left == len(part.request.rows)),
                            pending_tokens=-part.cost,
                            pending_rows=-len(part.numbers),
                        )
                        part.request.left -= len(part.numbers)
                        continue
                    parts.append(part)
                    taken += part.cost
        return parts

    def _run(self, rows: list[tuple[_Request, int]]) -> bool:
        """Run rows in one pass, and where that fails in two, down to the rows that fail.

        Returns:
            Whether all of them failed, for no fault of theirs.
        """
        try:
            answers: Sequence[Answer] = self._score(rows)
        except Exception as error:
            # Where the backbone's own server is away, no part of them fares better.
            if len(rows) > 1 and not isinstance(error, ConnectionError):
                half = len(rows) // 2
                early, late = self._run(rows[:half]), self._run(rows[half:])
                return early and late
            if isinstance(error, BackboneError):
                answers = [RowError(str(error))]
            else:
                cost = sum(request.rows[number].cost for request, number in rows)
                away = isinstance(error, ConnectionError)
                message = "%d rows of %d tokens failed: %s"
                logger.error(message, len(rows), cost, error, exc_info=not away)
                answers = [PassError(away=away) for _ in rows]
        self._hand_out(rows, answers)
        return all(isinstance(answer, PassError) for answer in answers)

    def _score(self, rows: list[tuple[_Request, int]]) -> list[Answer]:
        taken = [request.rows[number] for request, number in rows]
        prompts, responses, truncated = self._embed(taken)
        by_weights: dict[tuple[tuple[str, float], ...] | None, list[int]] = {}
        for k, (request, _) in enumerate(rows):
            weights = None if request.weights is None else tuple(sorted(request.weights.items()))
            by_weights.setdefault(weights, []).append(k)
        answers: dict[int, Answer] = {}
        for weights, numbers in by_weights.items():
            out = self.model.score_embeddings(
                responses[numbers],
                prompts[numbers],
                texts=[taken[k].text for k in numbers],
                weights=None if weights is None else dict(weights),
            )
            # Of half-precision backbones that overflow; split passes tell which row it is.
            if not bool(out.score.isfinite().all()):
                raise FloatingPointError("the score is not a finite number")
            out = replace(out, truncated=truncated[numbers])
            answers |= {k: RowScore(out, row) for row, k in enumerate(numbers)}
        return [answers[k] for k in range(len(rows))]

    def _embed(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
        """Run each distinct prompt and conversation once; return prompts, responses, cuts."""
        groups: dict[tuple[int, ...], dict[tuple[int, ...], ResponseTokens]] = {}
        for row in rows:
            groups.setdefault(row.prompt, {}).setdefault(tuple(row.response.ids), row.response)
        backbone = self.model.backbone
        runner = backbone.runner
        plan = backbone.planner.plan_tokens(
            [GroupTokens(list(prompt), list(own.values())) for prompt, own in groups.items()],
            causal=runner.causal,
            share=runner.shares,
        )
        # A copy made outside of inference mode is a plain tensor.
        values = runner.run(plan).clone()
        places: dict[tuple[int, ...], tuple[int, dict[tuple[int, ...], int]]] = {}
        target = plan.prompts
        for k, (prompt, own) in enumerate(groups.items()):
            places[prompt] = k, {ids: target + n for n, ids in enumerate(own)}
            target += len(own)
        of_prompts = [places[row.prompt][0] for row in rows]
        of_responses = [places[row.prompt][1][tuple(row.response.ids)] for row in rows]
        pairs = zip(of_prompts, of_responses, strict=True)
        truncated = torch.tensor([not plan.truncated.isdisjoint(pair) for pair in pairs])
        with self._changed:
            self._count(passes=1, run_tokens=plan.tokens)
        return values[of_prompts], values[of_responses], truncated

    def _hand_out(self, rows: list[tuple[_Request, int]], answers: Sequence[Answer]) -> None:
        cost = sum(request.rows[number].cost for request, number in rows)
        with self._changed:
            self._count(
                rows=len(rows),
                row_errors=sum(not isinstance(answer, RowScore) for answer in answers),
                tokens=cost,
                pending_tokens=-cost,
                pending_rows=-len(rows),
            )
        for (request, number), answer in zip(rows, answers, strict=True):
            request.answers[number] = answer
            request.left -= 1
            if request.left == 0 and request.future.set_running_or_notify_cancel():
                request.future.set_result([a for a in request.answers if a is not None])


def gather(scores: Sequence[RowScore]) -> RewardOutput:
    """Put rows of several passes into one output; there is at least one."""
    columns: dict[str, Any] = {
        name: torch.stack([getattr(score.out, name)[score.row] for score in scores])
        for name in ("score", *TENSORS, "truncated", "passes")
    }
    return replace(scores[0].out, **columns)
