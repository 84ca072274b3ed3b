"""Models side by side on test sets: every text embedded once, every table from the same scores."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from armo.artifacts import write_text
from armo.data.benchmarks import Benchmark
from armo.data.conversation import ResponseList
from armo.data.rated_lists import RatedLists
from armo.embed.lists import EmbeddedLists, embed_lists
from armo.model.reward_model import ArmoRewardModel
from armo.report.abstention import abstention_tables
from armo.report.benchmarks import benchmark_credits
from armo.report.best_of_n import best_of_n_table
from armo.report.bias import RIGHT, length_bias_table, preference_bias_table, probe_table
from armo.report.calibration import calibration_tables
from armo.report.drawing import BASELINES
from armo.report.lists import prompt_of_list
from armo.report.reasons import correlation_table, weights_table
from armo.report.reward_bench_files import MODEL_NAME, reward_bench_files
from armo.report.scoring import ScoredLists, score_lists
from armo.report.standings import standings
from armo.report.tables import Evaluation, Table

EMBEDDINGS = "embeddings"
SCORES = "scores"

# Tables that are for a picture or for another program, and too long for a terminal.
DETAILS = ("weights_by_kind", "correlations", "reliability", "abstention")

# What no model may be called: it is a row or column beside the models already.
RESERVED = {*BASELINES, RIGHT, "subset", "cases", "pattern", "pairs"}

# What no test set may be called: tables have these names, or scores are saved under them.
TAKEN = {
    *DETAILS,
    *("calibration", "abstention_summary", "preference_bias", "length_bias", "bias_probes"),
    *("probes", "best_of_n"),
}

# Pairs of a right and a wrong response that one list gives at most: all nine of RM-Bench's, and
# not the hundreds of a list of thirty.
PAIRS_OF_LIST = 9


@dataclass(frozen=True, slots=True)
class TestSets:
    """What models are evaluated on.

    Attributes:
        benchmarks: Test sets with their rules.
        probes: Responses beside copies that were rewritten in one pattern.
        rated: Lists with a gold rating of each response, to choose the best of.
    """

    __test__ = False  # no test case, whatever pytest makes of its name

    benchmarks: tuple[Benchmark, ...]
    probes: tuple[ResponseList, ...] = ()
    rated: RatedLists | None = None

    @property
    def judged(self) -> tuple[ResponseList, ...]:
        """The rows of all benchmarks, one after the other."""
        return tuple(row for benchmark in self.benchmarks for row in benchmark.rows)

    @property
    def rows(self) -> tuple[ResponseList, ...]:
        """All rows: of the benchmarks, the probes, and those with a rating."""
        return (*self.judged, *self.probes, *(self.rated.rows if self.rated is not None else ()))


@dataclass(frozen=True, eq=False, slots=True)
class ScoredModels:
    """All that some models say of all rows of the test sets.

    Attributes:
        scored: What each model says, by its name.
        beta: Scale of each model's score differences in its preference probability.
        surface: Surface features of the responses.
    """

    scored: dict[str, ScoredLists]
    beta: dict[str, float]
    surface: Float[Tensor, "responses covariates"]

    @property
    def scores(self) -> Float[Tensor, "models responses"]:
        """The scores alone, one row per model."""
        return torch.stack([scored.score for scored in self.scored.values()])


def model_names(paths: Sequence[str], names: Sequence[str] | None = None) -> list[str]:
    """Name models after their folders, or as asked; `checkpoints/demo/model` is `demo`.

    Raises:
        ValueError: If two would have the same name, or there are not as many names as models.
    """
    if not paths:
        raise ValueError("`model` names no model")
    if not all(paths):
        raise ValueError("`model` has an empty name")
    if names is None:
        parts = [Path(path).expanduser().resolve().parts for path in paths]
        # The stage folder that `armo train` makes says nothing.
        names = [part[-2] if part[-1] == "model" and len(part) > 2 else part[-1] for part in parts]
    if len(names) != len(paths):
        raise ValueError(f"`names` has {len(names)} names for {len(paths)} models")
    ends = {f"{name} {end}" for name in names for end in ("low", "high")}
    if reserved := sorted((RESERVED | ends) & set(names)):
        raise ValueError(
            f"`names`: {reserved[0]!r} is a row or column of the tables; choose another"
        )
    if not all(names):
        raise ValueError("`names` has an empty name")
    files = [_file_name(name) for name in names]
    if repeated := sorted(
        {n for n, file in zip(names, files, strict=True) if files.count(file) > 1}
    ):
        raise ValueError(f"two models would be called {repeated[0]!r}; say `names=[...]`")
    return list(names)


def _file_name(name: str) -> str:
    """The name of a model as that of a file, in a folder of its organisation if it names one."""
    if re.fullmatch(MODEL_NAME, name):
        return name
    return re.sub(r"^\.+|[^\w.-]+", "-", name)


def check_sets(sets: TestSets) -> None:
    """Apply the rule of each set to scores that are all alike, before hours of embedding.

    Raises:
        ValueError: If a rule cannot count the rows of its set, two sets or a set and a table have
            one name, or no list leaves anything to choose.
    """
    names = [benchmark.name for benchmark in sets.benchmarks]
    for benchmark in sets.benchmarks:
        if names.count(benchmark.name) > 1 or benchmark.name in TAKEN:
            raise ValueError(f"`name` of a test set: {benchmark.name!r} is taken; choose another")
        if not re.fullmatch(r"\w[\w.-]*", benchmark.name):
            raise ValueError(f"`name` of a test set must be that of a file, got {benchmark.name!r}")
        alike = torch.zeros(1, sum(len(row.responses) for row in benchmark.rows))
        try:
            benchmark_credits(benchmark, alike)
        except ValueError as error:
            raise ValueError(f"{benchmark.title}: {error}") from None
    if sets.rated is not None and not any(len(row.responses) > 1 for row in sets.rated.rows):
        raise ValueError("best of N needs a list of two responses, there is none")


def score_models(
    models: Mapping[str, Callable[[], ArmoRewardModel]], rows: Sequence[ResponseList], folder: Path
) -> ScoredModels:
    """Score all rows with every model, one after the other.

    Embeddings are kept in the folder: models of one backbone share them, and a call that was cut
    off goes on where it stopped.

    Args:
        models: Loads each, by its name.
        rows: The lists.
        folder: Where the embeddings are, or will be.

    Raises:
        BackboneError: Naming the row that cannot be embedded.
    """
    scored: dict[str, ScoredLists] = {}
    beta: dict[str, float] = {}
    lists: EmbeddedLists | None = None
    for name, load in models.items():
        model = load()
        place = folder / EMBEDDINGS / model.backbone.spec.fingerprint[:16]
        lists = embed_lists(place, rows, backbone=model.backbone)
        scored[name], beta[name] = score_lists(model, lists), float(model.beta)
        del model  # before the next backbone is loaded
    if lists is None:
        raise ValueError("There are no models to score with.")
    return ScoredModels(scored, beta, lists.surface)


def evaluate_models(sets: TestSets, models: ScoredModels, *, seed: int = 0) -> Evaluation:
    """Make every table that the test sets allow.

    Args:
        sets: The test sets.
        models: What each model says of `sets.rows`.
        seed: Of the resampling.
    """
    names, scores, surface = [*models.scored], models.scores, models.surface
    ends = _ends(sets.rows)
    tables: list[Table] = []
    start = 0
    for benchmark in sets.benchmarks:
        stop = start + len(benchmark.rows)
        here = slice(ends[start], ends[stop])
        tables += standings(benchmark, names, scores[:, here], surface[here], seed=seed)
        start = stop
    judged = slice(0, ends[start])
    inside = {name: scored.part(judged) for name, scored in models.scored.items()}
    tables += [
        *_pair_tables(sets.judged, models, judged, seed=seed),
        weights_table(sets.judged, inside),
        correlation_table(sets.judged, inside),
        preference_bias_table(sets.judged, seed=seed),
        length_bias_table(names, scores[:, judged], sets.judged, surface[judged], seed=seed),
    ]
    if sets.probes:
        here = slice(ends[start], ends[start + len(sets.probes)])
        tables.append(probe_table(names, scores[:, here], sets.probes, seed=seed))
    if sets.rated is not None:
        here = slice(ends[start + len(sets.probes)], ends[-1])
        rated = sets.rated
        tables.append(
            best_of_n_table(
                names, scores[:, here], rated.rows, rated.gold, surface[here], seed=seed
            )
        )
    return Evaluation(tuple(table for table in tables if table.rows))


def _pair_tables(
    rows: Sequence[ResponseList], models: ScoredModels, judged: slice, *, seed: int
) -> list[Table]:
    """How far preferences between right and wrong responses can be trusted."""
    right, wrong, prompts = right_and_wrong(rows)
    scores = models.scores[:, judged]
    differences = scores[:, right] - scores[:, wrong]
    there = ~differences.isnan().any(0)
    if not bool(there.any()):
        return []
    left_out = int((~there).sum())
    differences, prompts = differences[:, there], prompts[there]
    if len(prompts.unique()) == 1:  # of one prompt nothing is known but itself
        return []
    probabilities = {
        name: torch.sigmoid(models.beta[name] * difference)
        for name, difference in zip(models.scored, differences, strict=True)
    }
    right_wins = torch.ones(len(prompts), dtype=torch.float64)
    note = f" {left_out} pairs left out: too long for a model." if left_out else ""
    return [
        replace(table, note=table.note + note)
        for table in (
            *calibration_tables(probabilities, right_wins, prompts, seed=seed),
            *abstention_tables([*models.scored], differences, prompts, seed=seed),
        )
    ]


def headlines(sets: TestSets, evaluation: Evaluation, model: str) -> list[tuple[str, float]]:
    """Titles of the benchmarks with what a model gets overall."""
    found = []
    for benchmark in sets.benchmarks:
        table = evaluation.table(f"{benchmark.name}_models")
        overall = dict(zip(table.column("model"), table.column("overall"), strict=True))
        found.append((benchmark.title, float(overall[model])))
    return found


def save_scores(folder: Path, sets: TestSets, models: ScoredModels) -> None:
    """Write every score that an evaluation is made of, for other programs to read.

    One file per set and model, one line per prompt with its `id`, `category` and the `scores` of
    its responses in their order, null where one was skipped as too long; and for RewardBench the
    files of its own tools. Files of an earlier evaluation go.
    """
    for old in (folder / SCORES).rglob("*.json*"):
        old.unlink()
    parts: dict[str, Sequence[ResponseList]] = {each.name: each.rows for each in sets.benchmarks}
    parts |= {"probes": sets.probes, "best_of_n": sets.rated.rows if sets.rated else ()}
    start = 0
    for part, rows in parts.items():
        ends = [start + end for end in _ends(rows)]
        for name, scored in models.scored.items() if rows else ():
            values = [None if math.isnan(score) else score for score in scored.score.tolist()]
            lines = [
                {"id": row.id, "category": row.category, "scores": values[first:last]}
                for row, first, last in zip(rows, ends, ends[1:], strict=False)
            ]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_text(folder / SCORES / part / f"{_file_name(name)}.jsonl", text)
        start = ends[-1]
    start = 0
    for benchmark in sets.benchmarks:
        stop = start + _ends(benchmark.rows)[-1]
        if benchmark.rule.startswith("reward_bench"):
            for name, scored in models.scored.items():
                place = folder / SCORES / f"{benchmark.name}_files"
                file_name = _file_name(name)
                reward_bench_files(place, benchmark, file_name, scored.score[start:stop])
        start = stop


def right_and_wrong(
    rows: Sequence[ResponseList],
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Pair the right responses of each list with the wrong ones, `PAIRS_OF_LIST` at most.

    Returns:
        Number of the right response among all responses, of the wrong one, and of the prompt.
    """
    right: list[int] = []
    wrong: list[int] = []
    lists: list[int] = []
    start = 0
    for number, row in enumerate(rows):
        ranks = row.ranking
        pairs = [
            (start + i, start + j)
            for i in range(len(ranks))
            for j in range(len(ranks))
            if ranks[i] < ranks[j]
        ]
        start += len(ranks)
        # Evenly over all of them, so that no response of a long list is left out for its place.
        step = max(1.0, len(pairs) / PAIRS_OF_LIST)
        kept = [pairs[int(k * step)] for k in range(min(len(pairs), PAIRS_OF_LIST))]
        right += [i for i, _ in kept]
        wrong += [j for _, j in kept]
        lists += [number] * len(kept)
    return torch.tensor(right), torch.tensor(wrong), prompt_of_list(rows)[lists]


def _ends(rows: Sequence[ResponseList]) -> list[int]:
    """Where the responses of each list begin among those of all, and where the last one ends."""
    counts = torch.tensor([0, *(len(row.responses) for row in rows)])
    return [int(end) for end in counts.cumsum(0)]
