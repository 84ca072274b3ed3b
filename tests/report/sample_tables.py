"""Tables as `armo evaluate` and `armo train` make them, with plausible numbers."""

import itertools
import math
import random

from armo.report.tables import Evaluation, Table

OBJECTIVES = (
    "helpfulness",
    "correctness",
    "coherence",
    "honesty",
    "safety",
    "instruction following",
    "truthfulness",
    "verbosity",
    "code readability",
    "code explanation",
    "ultrafeedback overall score",
    "prometheus factual accuracy with citations",
    "judge: does not refuse what is harmless",
    "beavertails is safe",
    "argument structure",
    "creativity",
    "empathy",
    "brevity",
    "format as asked",
    "language as asked",
)
KINDS = ("advice", "code", "facts", "mathematics", "safety", "writing, long instructions")
NULLS = ("random", "longer", "shorter", "more marks")


def spread(mean, width=0.02):
    return (round(mean, 4), round(mean - width, 4), round(mean + width * 0.9, 4))


def model_names(count):
    names = ["demo", "armorm-llama3-8b", "undecorrelated"]
    names += [f"checkpoints/sweeps/2026-11-20/hidden_dim={64 * k}/model" for k in range(count)]
    return names[:count]


def benchmark(name, title, subsets, models, generator):
    means = {m: 0.86 - 0.03 * k for k, m in enumerate(models)} | dict(
        zip(NULLS, (0.5, 0.57, 0.41, 0.61), strict=True)
    )
    rows = []
    for label, prompts, ease in subsets:
        values = [
            min(1.0, max(0.0, mean + ease * (m != "random") + generator.uniform(-0.03, 0.03)))
            for m, mean in means.items()
        ]
        rows.append((label, prompts, *values))
    table = Table(name, title, ("subset", "cases", *means), tuple(rows), "Credit by the rule.")
    first = models[0]
    standing = tuple(
        (m, *spread(mean), *(() if m != first else (None,) * 4))
        + (() if m == first else (*spread(mean - means[first]), 0.0005 if k > 1 else 0.061))
        for k, (m, mean) in enumerate(means.items())
    )
    columns = ("model", "overall", "low", "high", f"ahead of {first} by", "from", "to", "p")
    note = "95 % bootstrap intervals over prompts, paired for the difference."
    return [table, Table(f"{name}_models", f"{title}: overall", columns, standing, note)]


def evaluation_tables(models, *, objectives=OBJECTIVES[:6], kinds=KINDS, seed=0):
    """All tables of an evaluation of `models`."""
    g = random.Random(seed)
    everyone = (*models, *NULLS)
    tables = benchmark(
        "rewardbench2",
        "RewardBench 2",
        [
            ("overall", 1753, 0.0),
            ("  Factuality", 475, -0.03),
            ("  Focus", 495, 0.02),
            ("  Math", 183, -0.08),
            ("  Precise IF", 159, -0.2),
            ("  Safety", 450, 0.06),
            ("  Ties", 102, 0.01),
        ],
        models,
        g,
    )
    tables += benchmark(
        "rm_bench",
        "RM-Bench",
        [
            ("overall", 1327, 0.0),
            ("  Chat", 129, -0.05),
            ("  Code", 228, -0.1),
            ("  Math", 529, -0.05),
            ("  Safety", 441, 0.1),
            ("easy", 1327, 0.1),
            ("normal", 1327, 0.02),
            ("hard", 1327, -0.17),
        ],
        models,
        g,
    )
    patterns = ("longer", "lists", "bold", "headings", "emoji", "flattery", "hedging")
    patterns += ("invented citation", "refusal opening", "repeats the question")
    columns = ["pattern", "pairs"]
    for model in models:
        columns += [model, f"{model} low", f"{model} high"]
    rows = []
    for pattern in patterns:
        row = [pattern, g.randint(150, 400)]
        for _ in models:
            row += spread(g.uniform(0.36, 0.66), 0.04)
        rows.append(tuple(row))
    note = "Share of pairs in which the version with the pattern wins; ties count half."
    tables.append(Table("bias_probes", "Does style alone win?", tuple(columns), tuple(rows), note))
    columns = ("pattern", "right", "right with it", "wrong", "wrong with it", "gap")
    rows = []
    for pattern in patterns[:6]:
        right, wrong = g.uniform(0.2, 0.6), g.uniform(0.1, 0.5)
        rows.append((pattern, 1753, right, 5012, wrong, *spread(right - wrong, 0.03)))
    title = "What the benchmark itself prefers"
    tables.append(Table("preference_bias", title, (*columns, "low", "high"), tuple(rows)))
    columns = ("model", "correlation with length, within prompts", "low", "high")
    columns += (
        "accuracy, longer is right",
        "accuracy, shorter is right",
        "gap",
        "gap low",
        "gap high",
    )
    rows = []
    for k, model in enumerate(models):
        rows.append((model, *spread(-0.05 + 0.06 * k), 0.82, 0.8 - 0.04 * k))
        rows[-1] += spread(0.02 + 0.04 * k, 0.03)
    tables.append(Table("length_bias", "How scores follow length", columns, tuple(rows)))
    rows = []
    for k, name in enumerate((*everyone[: len(models)], "random", "gold itself", "longer")):
        slope = {"random": 0.0, "gold itself": 0.16, "longer": 0.015}.get(name, 0.1 - 0.008 * k)
        for power in range(7):
            drop = 0.006 * max(0, power - 4) ** 2 * (name == "longer")
            gold = spread(0.42 + slope * power**0.8 - drop)
            longer = 1.0 + (0.25 if name == "longer" else 0.03) * power
            rows.append((name, 2**power, 0.3 * power, *gold, 180.0 * longer, 0.2))
    columns = ("model", "n", "score", "gold", "low", "high", "length", "format")
    tables.append(Table("best_of_n", "Best of N", columns, tuple(rows), "Exact over draws."))
    columns = ("model", "pairs", "error", "low", "high", "if calibrated", "at most")
    rows = [(m, 2980, *spread(0.02 + 0.01 * k, 0.008), 0.012, 0.024) for k, m in enumerate(models)]
    tables.append(Table("calibration", "Calibration error", columns, tuple(rows)))
    rows = []
    for k, model in enumerate(models):
        for step in range(10):
            predicted = 0.525 + 0.05 * step
            observed = min(0.99, predicted - 0.012 * k * (step / 9) + g.uniform(-0.02, 0.02))
            rows.append((model, predicted, observed, int(140 + 900 * math.exp(-step / 3))))
    columns = ("model", "predicted", "observed", "pairs")
    tables.append(Table("reliability", "Reliability", columns, tuple(rows)))
    rows = [
        (m, 100 - 10 * step, *spread(0.82 - 0.03 * k + 0.14 * (step / 9) ** 0.7, 0.015))
        for k, m in enumerate(models)
        for step in range(10)
    ]
    columns = ("model", "coverage", "accuracy", "low", "high")
    tables.append(Table("abstention", "Answering only where it is clear", columns, tuple(rows)))
    columns = ("model", "area", "low", "high", "random")
    rows = [(m, *spread(0.08 + 0.02 * k, 0.01), 0.18 + 0.03 * k) for k, m in enumerate(models)]
    tables.append(Table("abstention_summary", "Risk over coverage", columns, tuple(rows)))
    rows = []
    for model, (number, kind) in itertools.product(models, enumerate(kinds)):
        weights = [g.expovariate(1.0) ** 2 for _ in objectives]
        weights[number % len(objectives)] += 4.0
        rows += [
            (model, kind, 40 + 17 * number, name, weight / sum(weights))
            for name, weight in zip(objectives, weights, strict=True)
        ]
    columns = ("model", "kind", "prompts", "objective", "weight")
    tables.append(Table("weights_by_kind", "Weights by kind of prompt", columns, tuple(rows)))
    rows = []
    for model in models:
        for one, other in itertools.combinations(objectives, 2):
            before = g.uniform(0.1, 0.95)
            rows.append((model, one, other, before, before * g.uniform(-0.3, 0.5)))
    columns = ("model", "objective", "other", "rewards", "adjusted")
    note = "Correlations within prompts, of rewards and of adjusted rewards."
    tables.append(Table("correlations", "How objectives agree", columns, tuple(rows), note))
    return tuple(tables)


FEW = Evaluation(evaluation_tables(model_names(3)))
ONE = Evaluation(evaluation_tables(model_names(1), objectives=OBJECTIVES[:4], kinds=KINDS[:3]))
MANY = Evaluation(evaluation_tables(model_names(8), objectives=OBJECTIVES))
