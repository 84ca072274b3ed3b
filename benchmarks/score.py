"""What a model costs beside its backbone: while scoring, loading, and importing.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/score.py --json PATH
    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/score.py --quick

`head_overhead_share`: the time of heads, transform, gate and what surrounds them for embeddings of
a batch of 32 responses of 256 tokens each, over the time of the default backbone for that batch;
both in the same turn, the median over turns. `load_overhead_s`: loading a folder less loading its
backbone alone, in the same process turn by turn. `import_overhead_s`: `import armo` after torch and
the top level of Transformers, in fresh processes.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from figures import Figure, save

from armo.data.objectives import Objective, ObjectiveSet
from armo.data.surface import SURFACE_FEATURES, surface_features
from armo.embed.backbone import Backbone, load_backbone
from armo.embed.plan import Plan, Span, TokenSequence
from armo.embed.spec import BackboneSpec
from armo.fit.decorrelation import RewardTransform
from armo.fit.gating import GatingNetwork
from armo.fit.heads import ObjectiveHeads, RewardUncertainty
from armo.model.reward_model import ArmoRewardModel

BATCH, TOKENS = 32, 256
NAMES = ("helpfulness", "honesty", "safety", "verbosity", "formatting")
SPEC = BackboneSpec(
    "sentence-transformers/all-MiniLM-L6-v2",
    revision="c9745ed1d9f207416be6d2e6f8de32d1f16199bf",
    layers=(3, 6),
    pooling="mean",
    max_tokens=512,
    max_prompt_tokens=128,
    dtype="float32",
)


def build(backbone: Backbone) -> ArmoRewardModel:
    """A model of random parts, in the shape of the demo's: five objectives, five gates.

    Its uncertainty is the dearest there is: no two objectives share a factor.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    objectives = ObjectiveSet(
        tuple(Objective(name, 1, 5, bias=name in NAMES[3:]) for name in NAMES)
    )
    count, dim = len(NAMES), backbone.dim
    heads = ObjectiveHeads(NAMES, draw(count, dim), draw(count))
    return ArmoRewardModel(
        objectives=objectives,
        backbone=backbone,
        heads=heads,
        transform=RewardTransform(
            NAMES,
            draw(count, dim),
            draw(count),
            SURFACE_FEATURES,
            draw(count, 15),
            torch.tensor([0.0, 1e3], dtype=torch.float64)[:, None].repeat(1, 15),
        ),
        gate=GatingNetwork(dim=dim, objectives=count, mixed=(0, 1, 2), members=5, hidden_dim=64),
        beta=1.0,
        uncertainty=RewardUncertainty(
            heads=heads,
            vectors=draw(count, dim, dim).float(),
            values=draw(count, dim).abs(),
            centres=draw(count, dim),
            shares=torch.full((count,), 1e-3, dtype=torch.float64),
            factor_of=torch.arange(count),
            alphas=torch.ones(count, dtype=torch.float64),
            sigmas=torch.ones(count, dtype=torch.float64),
            quantiles=torch.ones(count, dtype=torch.float64),
            miscoverage=0.1,
        ),
    )


def timed(run: Callable[[], object]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def head_figures(model: ArmoRewardModel, turns: int) -> list[Figure]:
    """Heads, gate and transform over embeddings of a batch, beside the backbone's own time."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(1000, 30000, (BATCH, TOKENS), generator=generator).tolist()
    plan = Plan(prompts=0, responses=BATCH)
    plan.sequences = [TokenSequence(row, (Span(k, 0, TOKENS),)) for k, row in enumerate(rows)]
    text = model.backbone.tokenizer.decode(rows[0][: TOKENS // 2])
    texts = [f"{text} {k}" for k in range(BATCH)]
    embeddings = model.backbone.runner.run_at_once(plan)

    def heads() -> None:
        model._read(embeddings, embeddings, measured=None, weights=None)

    measured: list[tuple[float, float, float]] = []
    with torch.inference_mode():
        for _ in range(turns + 1):
            backbone = timed(lambda: model.backbone.runner.run_at_once(plan))
            surface = timed(lambda: surface_features(texts))
            measured.append((backbone, timed(heads), surface))
    measured = measured[1:]
    took = statistics.median(backbone for backbone, _, _ in measured)
    share = statistics.median(h / backbone for backbone, h, _ in measured)
    measuring = statistics.median(s / backbone for backbone, _, s in measured)
    return [
        Figure("head_overhead_share", share, "of the backbone's time", took, goal=0.02),
        Figure("surface_share", measuring, "of the backbone's time", took),
    ]


def load_figure(folder: Path, turns: int) -> Figure:
    """Loading a folder, less loading the backbone alone."""
    more, alone = [], []
    for _ in range(turns + 1):
        backbone = timed(lambda: load_backbone(SPEC, device="cpu"))
        whole = timed(lambda: ArmoRewardModel.from_pretrained(folder, device="cpu"))
        alone.append(backbone)
        more.append(whole - backbone)
    value = statistics.median(more[1:])
    return Figure("load_overhead_s", max(0.0, value), "s", statistics.median(alone[1:]), goal=0.3)


def import_figure(turns: int) -> Figure:
    """`import armo` in a fresh process that has torch and Transformers' top level already."""
    code = (
        "import time; s = time.perf_counter(); import torch, transformers; m = time.perf_counter();"
        "import armo; print(m - s, time.perf_counter() - m)"
    )
    both = [
        [float(part) for part in subprocess.check_output([sys.executable, "-c", code]).split()]
        for _ in range(turns + 1)
    ][1:]
    base, more = (statistics.median(column) for column in zip(*both, strict=True))
    return Figure("import_overhead_s", more, "s", base, goal=0.2)


def main() -> None:
    """Measure all three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="less work, under a minute")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    turns = 1 if options.tiny else 3 if options.quick else 9
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {turns} turns")
    model = build(load_backbone(SPEC, device="cpu"))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        figures = [*head_figures(model, turns), load_figure(Path(folder), turns)]
    figures.append(import_figure(turns))
    for figure in figures:
        goal = "" if figure.goal is None else f"goal below {figure.goal:g}"
        print(
            f"{figure.name:<22}{figure.value:9.4f} {figure.unit:<24}{goal:<18}"
            f"beside {figure.baseline:.2f} s"
        )
    if options.json:
        save(figures, options.json)


if __name__ == "__main__":
    main()
