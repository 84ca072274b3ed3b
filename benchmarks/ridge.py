"""The closed-form heads on a CPU, against a loop over scikit-learn, and in bounded memory.

    OMP_NUM_THREADS=2 taskset -c 0,1 python benchmarks/ridge.py --json PATH
    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/ridge.py --quick

The loop is the published recipe's: for each objective an 80/20 split of its rows and one
`sklearn.linear_model.Ridge` per penalty, without intercept, on float32 embeddings; the penalty with
the least error on the 20 % is taken. Ours does the same on the same split, in float64. Both are
timed in one process, turn by turn; what is shown is the median over turns. Peak memory is that of a
process of its own, which reads the embeddings from disk.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import Figure, peak_gb, save
from sklearn.linear_model import Ridge
from sklearn.model_selection import train_test_split
from torch import Tensor

from armo.embed.store import Embeddings, EmbeddingStore, Shard
from armo.fit.heads import fit_heads
from armo.fit.ridge import RidgeStatistics, solve_ridge

ALPHAS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4)
SOURCES = (5, 5, 1, 3, 5)  # objectives of each; its rows rate them and no others
OBJECTIVES = sum(SOURCES)
SAME = 1e-6  # how far weights may part from those of the loop in float64, relative to their norm
RESPONSES = 4  # to a prompt


@dataclass(frozen=True)
class Work:
    """How much is run; never what is compared with what."""

    turns: int
    rows: int
    dim: int
    growth_rows: tuple[int, ...]
    growth_dims: tuple[int, ...]
    stream_rows: int
    stream_dim: int
    shard_rows: int = 1024


FULL = Work(
    turns=3,
    rows=20_000,
    dim=1024,
    growth_rows=(5_000, 10_000, 20_000, 40_000, 80_000),
    growth_dims=(256, 512, 1024, 2048, 4096),
    stream_rows=1_000_000,
    stream_dim=1024,
)
QUICK = Work(1, 5_000, 512, (2_500, 10_000), (256, 1024), 50_000, 512)
# For the test: everything runs, nothing is measured.
TINY = Work(1, 400, 16, (400,), (8,), 500, 16, shard_rows=64)


# --- data ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Embeddings, and the ratings that each source gives to its own rows; NaN elsewhere."""

    embeddings: Tensor
    ratings: Tensor


def sources(rows: int) -> Tensor:
    """Source of each row, one for all responses to a prompt."""
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(len(SOURCES), (rows // RESPONSES + 1,), generator=generator)
    return prompts[torch.arange(rows) // RESPONSES]


def draw_problem(rows: int, dim: int, *, seed: int = 0) -> Problem:
    """Draw embeddings whose variances fall off as a power, as those of language models do.

    Noise differs between objectives, and with it the penalty that is best.
    """
    generator = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, dim + 1) ** -0.5
    embeddings = torch.randn(rows, dim, generator=generator) * scales
    return Problem(embeddings, draw_ratings(embeddings, sources(rows), generator))


def draw_ratings(embeddings: Tensor, source: Tensor, generator: torch.Generator) -> Tensor:
    """Ratings from a random head per objective, with noise of its own size."""
    dim = embeddings.shape[1]
    truth = torch.randn(dim, OBJECTIVES, generator=generator)
    noise = 10.0 ** torch.linspace(-2.0, 2.0, OBJECTIVES)
    ratings = torch.full((len(embeddings), OBJECTIVES), torch.nan)
    for number, columns in enumerate(torch.arange(OBJECTIVES).split(SOURCES)):
        here = (source == number).nonzero()[:, 0]
        drawn = torch.randn(len(here), len(columns), generator=generator)
        values = 0.5 + 0.1 * (embeddings[here] @ truth[:, columns] + noise[columns] * drawn)
        ratings[here[:, None], columns] = values
    return ratings


def write_store(folder: Path, rows: int, dim: int, *, shard_rows: int) -> None:
    """Write random embeddings shard by shard; they are never in memory together."""
    starts = range(0, rows, shard_rows)
    sizes = [min(shard_rows, rows - start) for start in starts]
    shards = [Shard(0, size, f"shard {k}") for k, size in enumerate(sizes)]
    store = EmbeddingStore.create(folder, dim=dim, fingerprint="random", shards=shards)
    generator = torch.Generator().manual_seed(0)
    for number, size in enumerate(sizes):
        values = torch.randn(size, dim, generator=generator)
        store.write(number, prompts=unmarked(values[:0]), responses=unmarked(values))


def unmarked(values: Tensor) -> Embeddings:
    """Embeddings of texts of which none was cut or left out."""
    nothing = torch.zeros(len(values), dtype=torch.bool)
    return Embeddings(values, truncated=nothing, missing=nothing)


# --- the two ways -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """The penalty of each objective, and its weights."""

    alphas: list[float]
    weights: np.ndarray[Any, Any]


def sklearn_loop(problem: Problem, dtype: torch.dtype, objectives: Sequence[int]) -> Chosen:
    """Fit one model per objective and penalty, each from the rows."""
    alphas, weights = [], []
    for k in objectives:
        rated = ~problem.ratings[:, k].isnan()
        x = problem.embeddings[rated].to(dtype).numpy()
        y = problem.ratings[rated, k].to(dtype).numpy()
        x_fit, x_held, y_fit, y_held = train_test_split(x, y, test_size=0.2, random_state=42)
        tried = []
        for alpha in ALPHAS:
            model = Ridge(alpha=alpha, fit_intercept=False).fit(x_fit, y_fit)
            error = np.square(model.predict(x_held) - y_held).mean()
            tried.append((error, alpha, model.coef_))
        _, alpha, best = min(tried, key=lambda each: each[0])
        alphas.append(alpha)
        weights.append(best)
    return Chosen(alphas, np.stack(weights))


def shared_fits(problem: Problem) -> Chosen:
    """Fit all objectives and penalties of a source from the statistics of its rows."""
    alphas = [0.0] * OBJECTIVES
    weights = np.empty((OBJECTIVES, problem.embeddings.shape[1]))
    patterns, pattern_of = (~problem.ratings.isnan()).T.unique(dim=0, return_inverse=True)
    for number, rated in enumerate(patterns):
        columns = (pattern_of == number).nonzero()[:, 0]
        split = train_test_split(rated.nonzero()[:, 0].numpy(), test_size=0.2, random_state=42)
        fit, held = map(torch.from_numpy, split)
        targets = problem.ratings[:, columns]
        system = RidgeStatistics.of(problem.embeddings[fit], targets[fit])
        solutions = solve_ridge(system, alphas=ALPHAS, intercept=False)
        stacked = torch.stack([solution.weights for solution in solutions])
        rewards = stacked.flatten(0, 1) @ problem.embeddings[held].double().T
        rewards = rewards.view(len(ALPHAS), len(columns), len(held))
        errors = (rewards - targets[held].T.double()).square().mean(2)
        for position, best in enumerate(errors.argmin(0).tolist()):
            alphas[int(columns[position])] = ALPHAS[best]
            weights[columns[position]] = stacked[best, position]
    return Chosen(alphas, weights)


def check_same(ours: Chosen, other: Chosen) -> None:
    """Stop where the loop in float64 chooses other penalties, or gives other weights."""
    agreed = agreement(ours, other)
    if agreed < len(other.alphas):
        sys.exit(f"only {agreed} of {len(other.alphas)} penalties are those of the loop in float64")
    apart = np.linalg.norm(ours.weights - other.weights, axis=1)
    apart = (apart / np.linalg.norm(other.weights, axis=1)).max()
    if not apart < SAME:
        sys.exit(f"weights part from those of the loop in float64 by {apart:.1e}")


def agreement(ours: Chosen, other: Chosen) -> int:
    """Count the objectives for which both choose the same penalty."""
    return sum(a == b for a, b in zip(ours.alphas, other.alphas, strict=True))


# --- timing -------------------------------------------------------------------------------------


def turn_times(
    turn: int, runs: dict[str, Callable[[], Any]]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Run each once: how long it took, and what it gave. Every turn begins with another one."""
    names = list(runs)
    first = turn % len(names)
    spent, results = {}, {}
    for name in names[first:] + names[:first]:
        start = time.perf_counter()
        results[name] = runs[name]()
        spent[name] = time.perf_counter() - start
    return spent, results


def loop_figures(work: Work) -> list[Figure]:
    """The whole loop, turn by turn."""
    problem = draw_problem(work.rows, work.dim)
    every = range(OBJECTIVES)
    shared_fits(problem)
    sklearn_loop(problem, torch.float32, [0])
    turns: list[dict[str, float]] = []
    for turn in range(work.turns):
        spent, results = turn_times(
            turn,
            {
                "ours": partial(shared_fits, problem),
                "loop": partial(sklearn_loop, problem, torch.float32, every),
                "float64": partial(sklearn_loop, problem, torch.float64, every),
            },
        )
        check_same(results["ours"], results["float64"])
        turns.append(
            {
                "ratio": spent["loop"] / spent["ours"],
                "float64": spent["float64"] / spent["ours"],
                "ours": spent["ours"],
                "loop": spent["loop"],
                "loop float64": spent["float64"],
                "agreed": agreement(results["ours"], results["loop"]),
            }
        )
        say(f"turn {turn + 1}", spent)
    mid = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    size = f"{work.rows:,} x {work.dim:,}, {OBJECTIVES} objectives, {len(ALPHAS)} penalties"
    chosen = results["ours"].alphas
    return [
        Figure("ridge_vs_sklearn_loop", mid["ratio"], "x", mid["loop"], "s", 50.0, size),
        Figure("  ours", mid["ours"], "s"),
        Figure("  against the loop in float64", mid["float64"], "x", mid["loop float64"], "s"),
        Figure(
            "  penalties that both choose",
            mid["agreed"],
            f"of {OBJECTIVES}",
            note=f"{min(chosen):g} to {max(chosen):g}; with the loop in float64, {OBJECTIVES}",
        ),
    ]


def growth_figures(work: Work) -> list[Figure]:
    """Both ways at other sizes; the loop on one objective of each source, and multiplied."""
    sizes = [(rows, work.dim) for rows in work.growth_rows]
    sizes += [(work.rows, dim) for dim in work.growth_dims if dim != work.dim]
    starts = [sum(SOURCES[:k]) for k in range(len(SOURCES))]
    figures = []
    for rows, dim in sizes:
        problem = draw_problem(rows, dim)
        runs = {f"{n}": partial(sklearn_loop, problem, torch.float32, [n]) for n in starts}
        spent, _ = turn_times(0, {"ours": partial(shared_fits, problem), **runs})
        loop = sum(count * spent[f"{n}"] for n, count in zip(starts, SOURCES, strict=True))
        say(f"{rows:,} x {dim:,}", {"ours": spent["ours"], "loop, about": loop})
        name = f"  at {rows:,} x {dim:,}"
        figures.append(Figure(name, loop / spent["ours"], "x", spent["ours"], "s, ours"))
    return figures


# --- the whole fit, from disk -------------------------------------------------------------------


def stream_figures(work: Work) -> list[Figure]:
    """`fit_heads` on stored embeddings, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        small = fit_apart(Path(folder) / "small", work.rows, work.dim, work)
        large = fit_apart(Path(folder) / "large", work.stream_rows, work.stream_dim, work)
    say("fit_heads", {"small": small["seconds"], "large": large["seconds"]})
    note = "resident pages of a process of its own, those of mapped files included"
    sizes = [
        f"{r:,} x {d:,}, 5 folds"
        for r, d in ((work.rows, work.dim), (work.stream_rows, work.stream_dim))
    ]
    return [
        Figure("  fit_heads", small["seconds"], "s", small["peak_gb"], "GB", note=sizes[0]),
        Figure(
            "ridge_stream_peak_gb",
            large["peak_gb"],
            "GB",
            large["before_gb"],
            "GB before",
            1.5,
            note,
        ),
        Figure(
            "  fit_heads", large["seconds"], "s", large["store_gb"], "GB on disk", note=sizes[1]
        ),
    ]


def fit_apart(folder: Path, rows: int, dim: int, work: Work) -> dict[str, float]:
    """Write a store, and fit it in another process."""
    write_store(folder, rows, dim, shard_rows=work.shard_rows)
    command = [sys.executable, __file__, "--fit", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def fit_stored(folder: Path) -> dict[str, float]:
    """Fit heads to a store: how long it took, and how much memory."""
    table = EmbeddingStore.open(folder).responses
    generator = torch.Generator().manual_seed(1)
    source = sources(table.rows)
    ratings = torch.rand(table.rows, OBJECTIVES, generator=generator)
    for number, columns in enumerate(torch.arange(OBJECTIVES).split(SOURCES)):
        ratings[(source != number).nonzero(), columns] = torch.nan
    rows = torch.arange(table.rows)
    before, start = peak_gb(), time.perf_counter()
    fit_heads(
        *(table, rows, ratings, rows // RESPONSES),
        objectives=[f"objective {k}" for k in range(OBJECTIVES)],
        group_count=table.rows // RESPONSES + 1,
        alphas=ALPHAS,
    )
    seconds = time.perf_counter() - start
    stored = sum(path.stat().st_size for path in folder.iterdir())
    return {
        "seconds": seconds,
        "peak_gb": peak_gb(),
        "before_gb": before,
        "store_gb": stored / 1e9,
    }


# --- what is shown ------------------------------------------------------------------------------


def say(text: str, spent: dict[str, float]) -> None:
    """Show progress, apart from the results."""
    times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in spent.items())
    print(f"{text}: {times}", file=sys.stderr, flush=True)


def show(figures: Sequence[Figure]) -> None:
    """Print the table."""
    print(f"{'':36} {'value':>14} {'goal':>8} {'baseline':>18}")
    for figure in figures:
        value = f"{figure.value:.3g} {figure.unit}"
        sign = "<" if figure.unit == "GB" else ">"
        goal = "" if figure.goal is None else f"{sign} {figure.goal:g}"
        base = "" if figure.baseline is None else f"{figure.baseline:.3g} {figure.baseline_unit}"
        print(f"{figure.name:36} {value:>14} {goal:>8} {base:>18}  {figure.note}".rstrip())


def main() -> None:
    """Run all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="less work, under a minute")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--fit", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fit:
        print(json.dumps(fit_stored(options.fit)))
        return
    work = TINY if options.tiny else QUICK if options.quick else FULL
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    start, load = time.perf_counter(), os.getloadavg()[0]
    figures = [*loop_figures(work), *growth_figures(work), *stream_figures(work)]
    show(figures)
    took = (time.perf_counter() - start) / 60
    print(f"{took:.1f} minutes; load of the machine {load:.1f}, then {os.getloadavg()[0]:.1f}")
    if options.json:
        save(figures, options.json)


if __name__ == "__main__":
    main()
