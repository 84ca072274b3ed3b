"""What an evaluation costs beside embedding: intervals and p-values for ten models.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/evaluate.py --json PATH
    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/evaluate.py --quick

`bootstrap_ten_models_s`: 2,000 resamples of 10,000 prompts, one credit each, for ten models, with
intervals, paired differences and p-values. The baseline is the loop over resamples: draw prompts,
take the mean of each model's credits of them. It sees the same draws, in the same turn, and both
must agree. `bootstrap_lines_s`: the same for 28 lines of 23 parts, the size of RewardBench.
`abstention_ten_models_s`: as many resamples of the same pairs, each put in order anew.

`evaluate_overhead_share`: all that `armo evaluate` does beside embedding, from the start of Python
to the page, over embedding. The command runs twice in one folder, on the built-in test pairs with
their probes and 64 responses to each prompt to choose the best of; the second time every embedding
is there, and what it saves is embedding. Six minutes, and only once.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from figures import Figure, save
from torch import Tensor

from armo.data.benchmarks import load_builtin_test
from armo.report.abstention import risk_coverage
from armo.report.metrics import Estimates, bootstrap_estimates

EDGES = torch.tensor([0.025, 0.975], dtype=torch.float64)


@dataclass(frozen=True)
class Work:
    """How much of it."""

    models: int
    prompts: int
    parts: int
    lines: int
    draws: int
    turns: int
    pairs: int | None  # of the built-in test pairs; None for all
    settings: tuple[str, ...]  # of `armo evaluate`


FEW = ("data/best_of_n=builtin", "data.best_of_n.responses=4", "data.best_of_n.prompts_per_kind=1")
FULL = Work(
    models=10,
    prompts=10_000,
    parts=23,
    lines=28,
    draws=2_000,
    turns=9,
    pairs=None,
    settings=("data/best_of_n=builtin",),
)
QUICK = replace(FULL, turns=2, pairs=200, settings=("probes=0", *FEW))
TINY = Work(
    models=3,
    prompts=60,
    parts=4,
    lines=5,
    draws=50,
    turns=1,
    pairs=8,
    settings=("probes=0", *FEW),
)


def draw_differences(work: Work) -> Tensor:
    """Score differences of models of rising skill, which find the same prompts hard."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    skill = torch.linspace(0.3, 0.8, work.models, dtype=torch.float64)[:, None]
    return skill + draw(work.prompts) + draw(work.models, work.prompts)


def loop(credits: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Percentiles of means, and of what they gain over the first model's, one resample at a time.

    Returns:
        Lower and upper ends by model, of the means and of the gains.
    """
    generator = torch.Generator().manual_seed(0)
    count = credits.shape[1]
    drawn = []
    for _ in range(draws):
        prompts = torch.randint(count, (count,), generator=generator)
        drawn.append(torch.stack([own[prompts].mean() for own in credits]))
    means = torch.stack(drawn)
    return means.quantile(EDGES, dim=0), (means - means[:, :1]).quantile(EDGES, dim=0)


def check_same(found: Estimates, means: Tensor, gains: Tensor) -> None:
    """Stop where the two do not give the same intervals."""
    ours = torch.stack([found.low, found.high, found.gain_low, found.gain_high])[:, :, 0]
    if not torch.allclose(ours, torch.cat([means, gains]), rtol=0.0, atol=1e-12):
        raise SystemExit("The loop and `bootstrap_estimates` do not give the same intervals.")


def timed(run: Callable[[], object]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def figures_of(work: Work) -> list[Figure]:
    """Take all figures, turn by turn."""
    differences = draw_differences(work)
    credits = (differences > 0.0).double()
    prompts = torch.arange(work.prompts)
    part_of = prompts % work.parts
    inside = part_of[:, None] == torch.arange(work.parts)
    subsets = credits[:, :, None].masked_fill(~inside, torch.nan)
    lines = torch.rand(
        work.lines, work.parts, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    whole = torch.ones(1, 1, dtype=torch.float64)
    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: bootstrap_estimates(credits[:, :, None], whole, prompts, draws=work.draws),
        "loop": lambda: loop(credits, work.draws),
        "lines": lambda: bootstrap_estimates(subsets, lines, prompts, draws=work.draws),
        "abstention": lambda: [
            risk_coverage(own, prompts, draws=work.draws) for own in differences
        ],
    }
    found = bootstrap_estimates(credits[:, :, None], whole, prompts, draws=work.draws)
    check_same(found, *loop(credits, work.draws))
    took = [{name: timed(run) for name, run in runs.items()} for _ in range(work.turns)]
    median = {name: statistics.median(turn[name] for turn in took) for name in runs}
    return [
        Figure("bootstrap_ten_models_s", median["ours"], "s", median["loop"], goal=5.0),
        Figure("bootstrap_lines_s", median["lines"], "s"),
        Figure("abstention_ten_models_s", median["abstention"], "s"),
    ]


def overhead_figure(work: Work) -> Figure:
    """Run `armo evaluate` twice in one folder: with embedding, and with all of it there."""
    from score import SPEC, build

    from armo.embed.backbone import load_backbone

    with tempfile.TemporaryDirectory() as folder:
        build(load_backbone(SPEC, device="cpu")).save_pretrained(f"{folder}/model")
        command = [sys.executable, "-m", "armo.cli", "evaluate", f"model={folder}/model"]
        command += [f"output_dir={folder}/evaluation", "device=cpu", *work.settings]
        command += ["data/benchmark=pairs", f"data.benchmark.path={folder}/pairs.jsonl"]
        rows = load_builtin_test().rows[: work.pairs]
        lines = [json.dumps(asdict(row)) for row in rows]
        Path(folder, "pairs.jsonl").write_text("\n".join(lines) + "\n")

        def run() -> None:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"`armo evaluate` failed: {done.stderr}")

        def written() -> dict[Path, int]:
            shards = Path(folder, "evaluation", "embeddings").rglob("*.safetensors")
            return {shard: shard.stat().st_mtime_ns for shard in shards}

        first, kept, again = timed(run), written(), timed(run)
        if not kept or written() != kept:
            raise SystemExit("The second evaluation embedded again what was there.")
    # On a busy machine a tiny set may take no longer to embed than the rest of it varies.
    embedding = max(first - again, 1e-3)
    return Figure("evaluate_overhead_share", again / embedding, "of embedding", embedding, goal=0.1)


def main() -> None:
    """Measure all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="fewer turns, under a minute")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    work = TINY if options.tiny else QUICK if options.quick else FULL
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {work.turns} turns")
    figures = [*figures_of(work), overhead_figure(work)]
    for figure in figures:
        goal = "" if figure.goal is None else f"goal below {figure.goal:g}"
        beside = "" if figure.baseline is None else f"beside {figure.baseline:.3f} s"
        print(f"{figure.name:<26}{figure.value:9.3f} {figure.unit:<14}{goal:<18}{beside}")
    if options.json:
        save(figures, options.json)


if __name__ == "__main__":
    main()
