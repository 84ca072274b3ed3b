"""The gate on a CPU: time to the validation accuracy of the published recipe's training loop.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/gate.py --json PATH
    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/gate.py --quick

The reference is the recipe written anew, its softmax over the objectives: the gate of the chosen
and that of the rejected response are run apart, each with a dropout of its own, on batches drawn
with replacement, for a fixed number of steps. Ours is `fit_gating` as configured by default:
constant mixes, folds, early stopping, logging and checkpoints are all in its time. Both are given
the same pairs and judged on the same held-out prompts; judging is not in their times.

The figure is the time of the reference over ours where our accuracy is at least the reference's
after its last step, and 0 where it is not; the median over turns, of which the full size has one.
The reference may be best long before its last step, which its recipe does not look for: the other
lines of the table tell what that would change.
"""

import argparse
import logging
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from figures import Figure, save
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F

from armo.fit.preferences import Preferences
from armo.fit.training import GatingSummary, GatingTrainer, fit_gating

OBJECTIVES = 19
PAIRS = 5  # to a prompt
HELD_OUT = 0.2  # of the prompts
TOPICS = 24
DIRECTIONS = 8  # of the embedding, that weights depend on besides the topic
QUALITY = 0.2  # share of the variance of rewards that all objectives of a response have in common
BETA = 3.0  # of the judges
NEVER = math.inf


@dataclass(frozen=True)
class Work:
    """How much is run; never what is compared with what."""

    turns: int
    pairs: int
    dim: int
    hidden_dim: int
    steps: int
    batch_size: int
    judged_every: int
    max_epochs: int = 200


FULL = Work(1, 50_000, 1024, 1024, 2_000, 1_024, 50)
QUICK = Work(3, 10_000, 256, 256, 250, 512, 10)
# For the test: everything runs, nothing is measured.
TINY = Work(1, 500, 16, 16, 4, 32, 2, max_epochs=2)


# --- data ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Pairs of responses, and what judges really weigh.

    Attributes:
        prompts: Embedding of each prompt.
        weights: True weights of each prompt.
        prompt_of: Prompt of each pair.
        rewards: Adjusted rewards of the chosen and the rejected response of each pair.
    """

    prompts: Tensor
    weights: Tensor
    prompt_of: Tensor
    rewards: Tensor

    @property
    def differences(self) -> Tensor:
        """Rewards of the chosen minus those of the rejected responses."""
        return self.rewards[:, 0] - self.rewards[:, 1]

    def accuracy(self, weights: Tensor) -> float:
        """Share of the pairs that weights of each prompt, or one mix, rank right."""
        apart = (weights.expand(len(self.prompts), -1)[self.prompt_of] * self.differences).sum(1)
        return float((apart > 0).double().mean() + 0.5 * (apart == 0).double().mean())

    def as_preferences(self) -> Preferences:
        """Return the same as what `fit_gating` takes."""
        count = len(self.prompt_of)
        return Preferences(
            prompts=self.prompts,
            adjusted=self.rewards.flatten(0, 1),
            style=torch.zeros(2 * count, 0),
            prompt_of=self.prompt_of,
            responses=torch.arange(2 * count).view(count, 2),
            ranks=torch.tensor([0.0, 1.0]).repeat(count, 1),
            groups=self.prompt_of,
            weights=torch.ones(count),
            balance=torch.ones(count),
            strengths=torch.full((count,), torch.nan),
            margins=torch.zeros(count),
            flipped=torch.zeros(count),
            folds=torch.zeros(count, dtype=torch.int64),
        )


def draw_pairs(pairs: int, dim: int, *, seed: int = 0) -> tuple[Pairs, Pairs]:
    """Draw pairs to train on, and those of other prompts to judge by.

    Weights are a softmax of logits that depend on the prompt's topic, and smoothly on a few
    directions of its embedding; both are small beside the rest of the embedding, whose variances
    fall off as a power. Embeddings have a mean square of one, as the reference's layers expect.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator)
    count = pairs // PAIRS
    topics = torch.randint(TOPICS, (count,), generator=generator)
    smooth = draw(count, DIRECTIONS)
    told = torch.cat([draw(TOPICS, DIRECTIONS)[topics], smooth], dim=1)
    rotation, _ = torch.linalg.qr(draw(dim, dim))
    prompts = draw(count, dim) * torch.arange(1, dim + 1) ** -0.5 @ rotation
    prompts = prompts + told @ torch.linalg.qr(draw(dim, told.shape[1]))[0].T
    prompts = prompts / prompts.square().mean().sqrt()
    logits = 0.5 * draw(OBJECTIVES) + draw(TOPICS, OBJECTIVES)[topics]
    waves = torch.tanh(smooth @ draw(DIRECTIONS, 2 * DIRECTIONS) * DIRECTIONS**-0.5)
    logits = logits + waves @ draw(2 * DIRECTIONS, OBJECTIVES) * (2 * DIRECTIONS) ** -0.5
    weights = logits.softmax(dim=1)
    prompt_of = torch.arange(count).repeat_interleave(PAIRS)
    rewards = (1.0 - QUALITY) ** 0.5 * draw(len(prompt_of), 2, OBJECTIVES)
    rewards = rewards + QUALITY**0.5 * draw(len(prompt_of), 2, 1)
    scores = (weights[prompt_of, None] * rewards).sum(2)
    first = torch.sigmoid(BETA * (scores[:, 0] - scores[:, 1]))
    right = torch.bernoulli(first, generator=generator).bool()
    rewards = torch.where(right[:, None, None], rewards, rewards.flip(1))
    held = round(HELD_OUT * count)  # prompts have no order
    return (
        Pairs(
            prompts[held:],
            weights[held:],
            prompt_of[held * PAIRS :] - held,
            rewards[held * PAIRS :],
        ),
        Pairs(prompts[:held], weights[:held], prompt_of[: held * PAIRS], rewards[: held * PAIRS]),
    )


# --- the two ways -------------------------------------------------------------------------------


@dataclass
class Curve:
    """Accuracy on the held-out prompts after so many seconds of training."""

    validation: Pairs
    seconds: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)
    judging: float = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the start, less those spent on judging."""
        return time.perf_counter() - self.start - self.judging

    @torch.no_grad()
    def add(self, gate: nn.Module) -> None:
        """Judge a gate as it is now."""
        now, before = self.elapsed, time.perf_counter()
        training, _ = gate.training, gate.eval()
        self.accuracies.append(self.validation.accuracy(gate(self.validation.prompts)))
        gate.train(training)
        self.seconds.append(now)
        self.judging += time.perf_counter() - before

    def first(self, accuracy: float) -> float:
        """Seconds until an accuracy was reached."""
        reached = zip(self.seconds, self.accuracies, strict=True)
        return next((seconds for seconds, value in reached if value >= accuracy), NEVER)


@dataclass(frozen=True)
class Trained:
    """A training: how long it took, how good it is, and how it came there."""

    seconds: float
    accuracy: float
    curve: Curve
    summary: GatingSummary | None = None


class ReferenceGate(nn.Module):
    """The recipe's gate, its softmax over the last axis."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        """Build three hidden layers; the logits are divided by 10."""
        super().__init__()
        layers: list[nn.Module] = []
        for wide in (dim, hidden_dim, hidden_dim):
            layers += [nn.Linear(wide, hidden_dim), nn.ReLU(), nn.Dropout(0.2)]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden_dim, OBJECTIVES))
        self.logit_scale = nn.Parameter(torch.ones(()))

    def forward(self, prompts: Tensor) -> Tensor:
        """Return weights, times the scale."""
        weights: Tensor = torch.softmax(self.layers(prompts) / 10.0, dim=-1)
        return weights * self.logit_scale


def train_reference(train: Pairs, validation: Pairs, work: Work, *, seed: int) -> Trained:
    """Train as the recipe does."""
    torch.manual_seed(seed)
    curve = Curve(validation)
    gate = ReferenceGate(work.dim, work.hidden_dim)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=work.steps)
    wanted = torch.ones(work.batch_size)
    for step in range(1, work.steps + 1):
        rows = torch.randint(len(train.prompt_of), (work.batch_size,))
        # Of chosen and rejected: the same prompt, and dropout of its own.
        prompts = train.prompts[train.prompt_of[rows]][:, None].repeat(1, 2, 1)
        scores = (gate(prompts) * train.rewards[rows]).sum(-1)
        loss = F.binary_cross_entropy_with_logits(scores[:, 0] - scores[:, 1], wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % work.judged_every == 0 and step < work.steps:
            curve.add(gate)
        if step % (work.steps // 4) == 0:
            say(f"reference, step {step}", {"so far": curve.elapsed})
    seconds = curve.elapsed
    curve.add(gate)
    return Trained(seconds, curve.accuracies[-1], curve)


class JudgeEpochs(Callback):
    """Judges after each epoch what training would give if it stopped there."""

    def __init__(self, curve: Curve) -> None:
        """Take where to write it."""
        self.curve = curve

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Judge the members that are best so far."""
        assert isinstance(pl_module, GatingTrainer)
        self.curve.add(pl_module.best)


def train_ours(train: Pairs, validation: Pairs, work: Work, *, seed: int) -> Trained:
    """Train with all defaults, but no progress bar."""
    preferences = train.as_preferences()
    curve = Curve(validation)

    def trainer(*, callbacks: list[Callback], **settings: Any) -> L.Trainer:
        return L.Trainer(
            callbacks=[*callbacks, JudgeEpochs(curve)],
            accelerator="cpu",
            devices=1,
            max_epochs=work.max_epochs,
            log_every_n_steps=1,
            **settings,
        )

    with tempfile.TemporaryDirectory() as folder:
        gate, summary = fit_gating(
            preferences,
            objectives=[f"objective {k}" for k in range(OBJECTIVES)],
            mixed=range(OBJECTIVES),
            folder=Path(folder),
            trainer=trainer,
            progress=False,
            seed=seed,
        )
        seconds = curve.elapsed
    with torch.no_grad():
        accuracy = validation.accuracy(gate(validation.prompts))
    return Trained(seconds, accuracy, curve, summary)


# --- timing -------------------------------------------------------------------------------------


def advantage(ours: Trained, reference: Trained) -> float:
    """How many times sooner we are as good as the reference; 0 where we never are."""
    return reference.seconds / ours.seconds if ours.accuracy >= reference.accuracy else 0.0


def gate_figures(work: Work) -> list[Figure]:
    """Train both ways, turn by turn; every turn has seeds of its own, and begins with another."""
    train, validation = draw_pairs(work.pairs, work.dim)
    runs: dict[str, Callable[..., Trained]] = {"ours": train_ours, "reference": train_reference}
    turns = []
    for turn in range(work.turns):
        names = list(runs) if turn % 2 == 0 else list(runs)[::-1]
        both = {name: runs[name](train, validation, work, seed=turn) for name in names}
        say(f"turn {turn + 1}", {name: each.seconds for name, each in both.items()})
        turns.append((both["ours"], both["reference"]))

    def mid(value: Callable[[Trained, Trained], float]) -> float:
        return statistics.median(value(*turn) for turn in turns)

    missed = sum(ours.accuracy < other.accuracy for ours, other in turns)
    size = f"{len(train.prompt_of):,} pairs x {work.dim:,}, {work.steps:,} steps"
    size += f", {work.turns} turn{'s' if work.turns > 1 else ''}"
    summaries = [ours.summary for ours, _ in turns]
    constant = [
        validation.accuracy(torch.tensor(list(summary.constant_weights.values())))
        for summary in summaries
        if summary is not None
    ]
    epochs = max(len(ours.curve.seconds) for ours, _ in turns)
    kept = " and ".join(sorted({summary.kept for summary in summaries if summary is not None}))
    return [
        Figure(
            "gate_time_to_accuracy_vs_reference",
            mid(advantage),
            "x",
            mid(lambda ours, other: other.seconds),
            "s",
            5.0,
            f"MISSED THE ACCURACY in {missed} of {work.turns}; {size}" if missed else size,
        ),
        Figure(
            "  ours, whole",
            mid(lambda ours, other: ours.seconds),
            "s",
            note=f"up to {epochs} epochs; kept the {kept}",
        ),
        Figure(
            "  until as good as the reference's end",
            mid(lambda ours, other: ours.curve.first(other.accuracy)),
            "s",
            mid(lambda ours, other: other.curve.first(other.accuracy)),
            "s",
            note="both judged as they go",
        ),
        Figure(
            "  until as good as our end",
            mid(lambda ours, other: ours.curve.first(ours.accuracy)),
            "s",
            mid(lambda ours, other: other.curve.first(ours.accuracy)),
            "s",
        ),
        Figure(
            "  accuracy at the end",
            mid(lambda ours, other: ours.accuracy),
            "",
            mid(lambda ours, other: other.accuracy),
        ),
        Figure(
            "  accuracy at best",
            mid(lambda ours, other: max(ours.curve.accuracies)),
            "",
            mid(lambda ours, other: max(other.curve.accuracies)),
            note="chosen by the pairs it is told on",
        ),
        Figure("  accuracy of the best constant mix", statistics.median(constant), ""),
        Figure(
            "  accuracy of the true weights",
            validation.accuracy(validation.weights),
            "",
            note=f"of {len(validation.prompt_of):,} pairs of held-out prompts",
        ),
    ]


# --- what is shown ------------------------------------------------------------------------------


def say(text: str, spent: dict[str, float]) -> None:
    """Show progress, apart from the results."""
    times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in spent.items())
    print(f"{text}: {times}", file=sys.stderr, flush=True)


def told(value: float, unit: str) -> str:
    """Write a number with its unit; accuracies have none."""
    if value == NEVER:
        return "never"
    return f"{value:.3g} {unit}" if unit else f"{value:.4f}"


def show(figures: Sequence[Figure]) -> None:
    """Print the table."""
    print(f"{'':40} {'value':>10} {'goal':>8} {'reference':>10}")
    for figure in figures:
        goal = "" if figure.goal is None else f"> {figure.goal:g}"
        base = "" if figure.baseline is None else told(figure.baseline, figure.baseline_unit)
        value = told(figure.value, figure.unit)
        print(f"{figure.name:40} {value:>10} {goal:>8} {base:>10}  {figure.note}".rstrip())


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="less work, under a minute")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    work = TINY if options.tiny else QUICK if options.quick else FULL
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")  # the same as in training
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    start, load = time.perf_counter(), os.getloadavg()[0]
    show(figures := gate_figures(work))
    took = (time.perf_counter() - start) / 60
    print(f"{took:.1f} minutes; load of the machine {load:.1f}, then {os.getloadavg()[0]:.1f}")
    if options.json:
        save(figures, options.json)


if __name__ == "__main__":
    main()
