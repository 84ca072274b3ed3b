"""Reward functions for reinforcement learning, as TRL's trainers call them."""

import math
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from armo.data.conversation import Conversation, Message
from armo.embed.spec import BackboneError
from armo.model.output import RewardOutput
from armo.model.reward_model import ArmoRewardModel
from armo.model.scorer import TENSORS
from armo.serve.completions import ControlText, Turns, parse_completion

LogMetric = Callable[[str, float], Any]

LIMIT = 5.0
"""No reward is further from the mean, in standard deviations."""


@dataclass(frozen=True, eq=False, slots=True)
class BatchRewards:
    """Rewards of a batch of completions, fit to train on: finite, whatever the policy wrote.

    Attributes:
        out: What the model says; NaN where there is no score.
        score: The score, clipped to the limit either way; its low end where there is none.
        adjusted: The adjusted reward of each objective, likewise; but bias objectives have no bad
            end, and are 0, the mean, where there is no score.
        unscorable: Completions without a score: empty, no Unicode, or refused by the backbone.
        disarmed: Completions that spell control text of the backbone, and were scored as if they
            only talked about it.
    """

    out: RewardOutput
    score: Float[Tensor, " batch"]
    adjusted: Float[Tensor, "batch objectives"]
    unscorable: Bool[Tensor, " batch"]
    disarmed: Bool[Tensor, " batch"]

    def metrics(self) -> dict[str, float]:
        """Means over the batch, to see in a log why a reward rises."""
        means = {
            "unscorable": self.unscorable,
            "truncated": self.out.truncated,
            "control_text": self.disarmed,
            "clipped": (self.score - self.out.score).abs() > 0.0,  # not so where NaN
        }
        named = {f"armo/{name}": float(values.double().mean()) for name, values in means.items()}
        scored = ~self.unscorable
        if bool(scored.any()):
            for what, values in (("reward", self.out.rewards), ("weight", self.out.gating_weights)):
                for name, mean in zip(self.out.objectives, values[scored].mean(0), strict=True):
                    named[f"armo/{what}/{name}"] = float(mean)
        return named


@dataclass(eq=False, slots=True)
class _Call:
    """A batch that waits for its rewards."""

    rows: tuple[Conversation | None, ...]
    disarmed: tuple[bool, ...]
    rewards: BatchRewards | None = None
    error: Exception | None = None


@dataclass(eq=False, slots=True)
class _Desk:
    """Where the threads meet that share a model."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    one_pass: threading.Lock = field(default_factory=threading.Lock)
    waiting: list[_Call] = field(default_factory=list)
    last: _Call | None = None
    logged: "weakref.ref[LogMetric] | None" = None


class RewardFunction:
    """One reward per completion; what `reward_funcs` of TRL's trainers takes.

    Attributes:
        __name__: What the trainer's log calls it.
    """

    def __init__(self, rewards: "Rewards", objective: int | None) -> None:
        """Give the rewards of one objective, or the score if None."""
        self._rewards = rewards
        self._objective = objective
        names = rewards.model.objectives.names
        self.__name__ = "score" if objective is None else names[objective]

    def __call__(
        self,
        prompts: Sequence[Turns],
        completions: Sequence[Turns],
        *,
        log_metric: LogMetric | None = None,
        **columns: Any,
    ) -> list[float]:
        """Give a finite reward for each completion.

        Args:
            prompts: One per completion.
            completions: What the policy wrote.
            log_metric: Called with the `BatchRewards.metrics` of the batch, by one of the functions
                that share a model.
            columns: What else the trainer gives; not used.

        Raises:
            ValueError: Naming the row whose prompt cannot be read. No completion raises.
        """
        batch = self._rewards.rate(prompts, completions)
        if log_metric is not None:
            self._rewards.log(batch, log_metric)
        values = batch.score if self._objective is None else batch.adjusted[:, self._objective]
        return [float(value) for value in values]


class Rewards:
    """Reward functions of one model, which share one pass per batch.

    The last batch is kept, so the functions of a step cost one pass together. Threads may call at
    once: what waits while a pass runs goes into the next one together.

    A policy finds what a reward function does with odd completions, so none pays:

    - Without a score (empty, no Unicode, too long where the backbone is set to skip or refuse) a
      completion gets the lowest reward, `-limit`, and no other gets less: otherwise saying nothing
      would be better than a bad answer. None, which the trainer would read as 0, the mean, is never
      returned.
    - No completion gets more than `limit`: heads are linear, and text unlike what they were trained
      on can be many standard deviations away. The share is logged, by the score.
    - A completion that is cut is scored as cut; the share is logged.
    - Control text of the backbone's own template is read as words, not as further turns.
    - Gating weights are those of the prompt in the data, whatever the policy writes. All responses
      to a prompt have the same ones, so where each objective is normalised by itself, they
      cancel out, and the trainer's `reward_weights` decide.

    Example:
        ```python
        rewards = Rewards("checkpoints/demo/model")
        GRPOTrainer(model=..., reward_funcs=rewards.score, ...)
        GRPOTrainer(model=..., reward_funcs=rewards.objectives(), ...)
        ```

    Attributes:
        model: The scoring model.
        limit: The largest reward, in standard deviations; less it, the lowest.
        score: The reward function that gives the score.
    """

    def __init__(self, model: ArmoRewardModel | str | Path, *, limit: float = LIMIT) -> None:
        """Make reward functions of a model, or of the folder of one.

        Args:
            model: Load it by `ArmoRewardModel.from_pretrained(path, device=...)` to choose its
                device, one of its own for each process.
            limit: How far a reward may be from the mean, in standard deviations.

        Raises:
            ValueError: If `limit` is not positive, or not finite.
        """
        if not 0.0 < limit < math.inf:
            raise ValueError(f"`limit` must be a finite number above zero, got {limit}.")
        if not isinstance(model, ArmoRewardModel):
            model = ArmoRewardModel.from_pretrained(model)
        self.model = model
        self.limit = limit
        self.score = RewardFunction(self, None)
        self._control = ControlText(model.backbone.tokenizer)
        self._desk = _Desk()

    def objectives(self, names: Sequence[str] | None = None) -> list[RewardFunction]:
        """Make one function per objective, of its adjusted reward: in standard deviations.

        Args:
            names: Which, in this order; all but the bias objectives if None.

        Raises:
            ValueError: If a name is unknown, or `names` is a single text.
        """
        declared = self.model.objectives
        if isinstance(names, str):
            raise ValueError("`names` must be a list of names, got one text.")
        if names is None:
            names = [o.name for o in declared.objectives if not o.bias]
        return [RewardFunction(self, declared.index(name)) for name in names]

    def rate(self, prompts: Sequence[Turns], completions: Sequence[Turns]) -> BatchRewards:
        """Score a batch, or answer with what it scored if it is the last one again.

        Args:
            prompts: One per completion: the text of one user turn, or messages.
            completions: Texts, or lists of messages.

        Raises:
            ValueError: Naming the row whose prompt cannot be read.
        """
        if len(prompts) != len(completions):
            raise ValueError(
                f"`prompts` and `completions` must be as many, got {len(prompts)} and "
                f"{len(completions)}."
            )
        call = self._parse(prompts, completions)
        desk = self._desk
        with desk.lock:
            if (last := desk.last) is not None and last.rows == call.rows:
                call.rewards = last.rewards
            else:
                desk.waiting.append(call)
        if call.rewards is None:
            with desk.one_pass:
                if call.rewards is None and call.error is None:
                    with desk.lock:
                        calls, desk.waiting = desk.waiting, []
                    self._answer(calls)
        if call.error is not None:
            raise call.error
        assert call.rewards is not None
        # The texts as they were given may differ in control text alone.
        return replace(call.rewards, disarmed=torch.tensor(call.disarmed, dtype=torch.bool))

    def log(self, batch: BatchRewards, log_metric: LogMetric) -> None:
        """Log the metrics of a batch, once for all functions that are called with `log_metric`.

        A trainer makes that anew for each batch, and gives the same one to all functions.
        """
        with self._desk.lock:
            if self._desk.logged is not None and self._desk.logged() is log_metric:
                return
            self._desk.logged = weakref.ref(log_metric)
        for name, value in batch.metrics().items():
            log_metric(name, value)

    def _parse(self, prompts: Sequence[Turns], completions: Sequence[Turns]) -> _Call:
        rows: list[Conversation | None] = []
        disarmed = []
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                row = parse_completion(prompt, completion)
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from None
            if row is not None:
                plain = replace(row, response=self._control.disarm(row.response))
            rows.append(row and plain)
            disarmed.append(row is not None and plain != row)
        return _Call(tuple(rows), tuple(disarmed))

    def _answer(self, calls: Sequence[_Call]) -> None:
        """Score the batches of several callers in one pass, and tell each of them."""
        rows = [row for call in calls for row in call.rows]
        scored = [number for number, row in enumerate(rows) if row is not None]
        try:
            out, refused = self._read([row for row in rows if row is not None])
        except Exception as error:
            for call in calls:
                call.error = error
            return
        out = _spread(out, scored, len(rows))
        errors = {scored[k]: error for k, error in refused.items()}
        start = 0
        for call in calls:
            end = start + len(call.rows)
            if wrong := sorted(number for number in errors if start <= number < end):
                call.error = ValueError(f"row {wrong[0] - start}: {errors[wrong[0]]}")
            else:
                call.rewards = self._clipped(_cut(out, start, end))
                with self._desk.lock:
                    self._desk.last = call
            start = end

    def _read(self, rows: Sequence[Conversation]) -> tuple[RewardOutput, dict[int, BackboneError]]:
        """Score rows; those that the backbone refuses are NaN, and named where the prompt is why.

        What it refuses, it finds before it runs, so halving the rows costs little.
        """
        messages = [[*row.prompt, Message(role="assistant", content=row.response)] for row in rows]
        try:
            return self.model.score(messages), {}
        except BackboneError as error:
            if error.group is None:
                raise
            if len(rows) == 1:
                refused = {0: error} if error.response is None else {}
                return _spread(self.model.score([]), [], 1), refused
        half = len(rows) // 2
        first, early = self._read(rows[:half])
        second, late = self._read(rows[half:])
        return _joined(first, second), early | {k + half: error for k, error in late.items()}

    def _clipped(self, out: RewardOutput) -> BatchRewards:
        bias = torch.tensor([o.bias for o in self.model.objectives.objectives])
        worst = torch.where(bias, 0.0, -self.limit).double()
        unscorable = out.score.isnan()
        adjusted = torch.where(unscorable[:, None], worst, out.adjusted)
        return BatchRewards(
            out=out,
            score=out.score.nan_to_num(nan=-self.limit).clamp(-self.limit, self.limit),
            adjusted=adjusted.clamp(-self.limit, self.limit),
            unscorable=unscorable,
            disarmed=torch.zeros_like(unscorable),
        )


_COLUMNS = ("score", *TENSORS, "truncated", "passes")


def _spread(out: RewardOutput, places: Sequence[int], size: int) -> RewardOutput:
    """Put rows at their places among `size`; the others are NaN, and False."""

    def among(values: Tensor) -> Tensor:
        empty = torch.nan if values.is_floating_point() else False
        spread = values.new_full((size, *values.shape[1:]), empty)
        spread[list(places)] = values
        return spread

    return _with(out, among)


def _cut(out: RewardOutput, start: int, end: int) -> RewardOutput:
    return _with(out, lambda values: values[start:end])


def _joined(first: RewardOutput, second: RewardOutput) -> RewardOutput:
    later = iter([getattr(second, name) for name in _COLUMNS])
    return _with(first, lambda values: torch.cat([values, next(later)]))


def _with(out: RewardOutput, function: Callable[[Tensor], Tensor]) -> RewardOutput:
    columns: dict[str, Any] = {name: function(getattr(out, name)) for name in _COLUMNS}
    return replace(out, **columns)
