"""Over-optimisation: what the best of N responses is worth, by scores of a finished run.

    armo train experiment=demo && python benchmarks/best_of_n.py --run checkpoints/demo

Four scores of the run choose the best of up to 64 responses to each prompt: the gated one and that
of the best constant mix, each decorrelated and not. The responses are composed to the test prompts
of the built-in corpus, where the quality is known, or, with `--lists`, rated ones of a file. Of its
prompts those count that a run fitted on it leaves out; all, with `--unseen`.
"""

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from armo.artifacts import MANIFEST, read_json
from armo.data.checks import GroupSplits
from armo.data.objectives import Objective
from armo.data.rated_lists import RatedLists, compose_rated_lists, load_rated_lists
from armo.data.surface import SURFACE_FEATURES
from armo.embed.lists import EmbeddedLists, embed_lists
from armo.fit.decorrelation import load_transforms
from armo.fit.training import load_gating
from armo.model.reward_model import ArmoRewardModel
from armo.report.best_of_n import Winners, best_of_n, best_of_n_table
from armo.report.drawing import PALETTE
from armo.report.metrics import bootstrap_contrasts
from armo.report.pages import print_tables, to_markdown
from armo.report.tables import Table

SCORES = ("gate", "constant mix", "gate, plain", "constant mix, plain")
"""Plain: not decorrelated."""

CONTRASTS = (
    ("decorrelated less plain, gate", "gate", "gate, plain"),
    ("decorrelated less plain, constant mix", "constant mix", "constant mix, plain"),
    ("gate less constant mix", "gate", "constant mix"),
    ("gate less constant mix, plain", "gate, plain", "constant mix, plain"),
)


def held_out(lists: RatedLists, *, test_fraction: float) -> RatedLists:
    """Keep the prompts that a run with that `data.test_fraction` keeps for its report."""
    splits = GroupSplits(test_fraction)
    groups = [splits.add(row) for row in lists.rows]
    test = splits.test()
    kept = [test[group] for group in groups]
    parts = lists.gold.split([len(row.responses) for row in lists.rows])
    return RatedLists(
        tuple(row for row, keep in zip(lists.rows, kept, strict=True) if keep),
        torch.cat([part for part, keep in zip(parts, kept, strict=True) if keep]),
    )


def scores_of(run: Path, embedded: EmbeddedLists) -> dict[str, Float[Tensor, " responses"]]:
    """Score all responses by the four mixes of a run, see `SCORES`."""
    distinct = torch.arange(len(embedded.prompt_of_response))
    responses = embedded.responses.read(distinct)
    prompts = embedded.prompts.read(embedded.prompt_of_response)
    scores = {}
    for suffix, decorrelated in (("", True), (", plain", False)):
        transform = load_transforms(run / "decorrelation", decorrelated=decorrelated).transform
        gate, summary = load_gating(run / "gating", "gate" if decorrelated else "undecorrelated")
        columns = [SURFACE_FEATURES.index(name) for name in transform.covariates]
        adjusted = transform.adjusted(responses, embedded.covariates[:, columns])
        constant = [summary.constant_weights[name] for name in transform.objectives]
        with torch.no_grad():
            scores[f"gate{suffix}"] = (gate(prompts).double() * adjusted).sum(1)
        scores[f"constant mix{suffix}"] = adjusted @ torch.tensor(constant, dtype=torch.float64)
    return {
        name: score[embedded.response_of].where(~embedded.missing, torch.nan)
        for name, score in scores.items()
    }


def contrasts_table(winners: Winners, names: Mapping[str, int]) -> Table:
    """What one score gets more than another, at each N."""
    rows = []
    for label, one, other in CONTRASTS:
        for j, size in enumerate(winners.sizes[1:], start=1):
            both = torch.stack(
                [
                    (values[names[one]] - values[names[other]])[:, j]
                    for values in (winners.gold, winners.words, winners.marks)
                ],
                dim=1,
            )
            gold, words, marks = bootstrap_contrasts(
                both, torch.eye(3, dtype=torch.float64), winners.prompts
            )
            intervals = (v for each in (gold, words, marks) for v in asdict(each).values())
            rows.append((label, size, *intervals))
    return Table(
        "contrasts",
        "One score less another: gold, length and format of the winner",
        ("scores", "n", "gold", "low", "high", "words", "from", "to", "marks", "from ", "to "),
        tuple(rows),
        "95 % bootstrap intervals over prompts, paired.",
    )


def rises_table(winners: Winners, names: Mapping[str, int]) -> Table:
    """Does the gold of the winner go on rising with N?"""
    rows = []
    ceiling = winners.gold[-1].mean(0)
    for name, k in names.items():
        rises = winners.gold[k].diff(dim=1)
        intervals = bootstrap_contrasts(
            rises, torch.eye(rises.shape[1], dtype=torch.float64), winners.prompts
        )
        mean = winners.gold[k].mean(0)
        for j, rise in enumerate(intervals):
            rows.append(
                (
                    name,
                    winners.sizes[j],
                    winners.sizes[j + 1],
                    float(winners.score[k].mean(0).diff()[j]),
                    *asdict(rise).values(),
                    float((mean[j + 1] - mean[0]) / (ceiling[j + 1] - mean[0])),
                )
            )
    return Table(
        "rises",
        "Does the gold of the winner go on rising with N?",
        ("score", "n", "to", "score rises", "gold rises", "low", "high", "of what is possible"),
        tuple(rows),
        "95 % bootstrap intervals over prompts. Of what is possible: what the score gains over a "
        "random choice, as a share of what the gold itself gains.",
    )


def plot(table: Table, path: Path) -> None:
    """Draw score, gold, length and format against the divergence from the drawing policy."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    names = list(dict.fromkeys(table.column("model")))
    for axes, column in zip(
        figure.subplots(2, 2).flat, ("score", "gold", "length", "format"), strict=True
    ):
        for k, name in enumerate(names):
            rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
            drawn = [row for row in rows if row["model"] == name and row[column] is not None]
            x = [row["KL"] ** 0.5 for row in drawn]
            axes.plot(x, [row[column] for row in drawn], "o-", color=PALETTE[k], label=name)
            if column == "gold":
                low, high = ([row[edge] for row in drawn] for edge in ("low", "high"))
                axes.fill_between(x, low, high, color=PALETTE[k], alpha=0.15, linewidth=0)
        axes.set_title(column)
        axes.set_xlabel("root of the divergence from a random choice, nats")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--prompts-per-kind", type=int, help="of the corpus; all 20 by default")
    parser.add_argument("--lists", help="rated responses, instead of the built-in corpus")
    parser.add_argument("--gold", help="the rating in --lists that counts as the truth")
    parser.add_argument("--low", type=float, help="lowest rating on its scale")
    parser.add_argument("--high", type=float, help="highest rating on its scale")
    parser.add_argument("--lower-is-better", action="store_true", help="turn the scale round")
    parser.add_argument("--min-responses", type=int, default=4, help="that a list needs")
    parser.add_argument("--unseen", action="store_true", help="the run was fitted on other data")
    parser.add_argument("--embeddings", type=Path, help="folder to keep embeddings in")
    parser.add_argument("--quick", action="store_true", help="16 responses to 12 prompts")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--markdown", type=Path, help="where to write the tables")
    parser.add_argument("--plot", type=Path, help="where to draw them, as SVG or PNG")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    start = time.perf_counter()
    if arguments.lists is None:
        lists = (
            compose_rated_lists(16, prompts_per_kind=2)
            if arguments.quick
            else compose_rated_lists(prompts_per_kind=arguments.prompts_per_kind)
        )
    else:
        if None in (arguments.gold, arguments.low, arguments.high):
            parser.error("--lists needs --gold, --low and --high")
        gold = Objective(
            arguments.gold,
            arguments.low,
            arguments.high,
            higher_is_better=not arguments.lower_is_better,
        )
        lists = load_rated_lists(arguments.lists, gold=gold, min_responses=arguments.min_responses)
        if not arguments.unseen:
            made_with = read_json(arguments.run / "embeddings" / MANIFEST)["settings"]["data"]
            lists = held_out(lists, test_fraction=made_with["test_fraction"])
    backbone = ArmoRewardModel.from_pretrained(arguments.run / "model").backbone
    with tempfile.TemporaryDirectory() as scratch:
        embedded = embed_lists(
            arguments.embeddings or Path(scratch) / "lists", lists.rows, backbone=backbone
        )
        scores = scores_of(arguments.run, embedded)
    names = {name: k for k, name in enumerate((*SCORES, "gold itself"))}
    stacked = torch.stack([*(scores[name] for name in SCORES), lists.gold])
    surface = embedded.surface.double()
    table = best_of_n_table(SCORES, stacked[:-1], lists.rows, lists.gold, surface)
    winners = best_of_n(stacked, lists.rows, lists.gold, surface)
    tables = [table, contrasts_table(winners, names), rises_table(winners, names)]
    print_tables(tables, Console(width=150))
    print(f"{time.perf_counter() - start:.0f} s for {len(lists.gold)} responses")
    if arguments.json:
        figures = {
            table.name: [dict(zip(table.columns, row, strict=True)) for row in table.rows]
            for table in tables
        }
        arguments.json.write_text(json.dumps(figures, indent=2))
    if arguments.markdown:
        arguments.markdown.write_text(to_markdown(tables, title="Best of N"))
    if arguments.plot:
        plot(table, arguments.plot)


if __name__ == "__main__":
    main()
