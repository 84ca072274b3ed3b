"""Benchmarks of reward models: public test sets as response lists, from the hub or from disk.

Each set is read in the schema in which it was published: from the hub, or from a file or folder of
JSON Lines, JSON or Parquet, or what `datasets` saved with `save_to_disk`. How their scores count is
in `armo.report.benchmarks`.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from armo.data.checks import GroupSplits
from armo.data.conversation import Message, PreferencePair, Prompt, ResponseList
from armo.data.published import (
    PublishedRow,
    column_names,
    open_rows,
    read_messages,
    split_files,
)
from armo.data.sources import (
    BUILTIN,
    BUILTIN_FILES,
    DataError,
    Paths,
    data_files,
    read_rows,
    stream_lists,
    stream_pairs,
)

logger = logging.getLogger(__name__)

# Sections of RewardBench, their subsets and how many rows each has.
REWARD_BENCH: dict[str, dict[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 447,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}
# The test sets from before RewardBench that are its fifth section, where that is used.
PRIOR_SETS = ("anthropic_helpful", "anthropic_hhh", "shp", "summarize")

TIES = "Ties"
REWARD_BENCH_2 = ("Factuality", "Precise IF", "Math", "Safety", "Focus", TIES)

RM_BENCH = ("chat", "code", "math", "safety")

# Kind of task by how the name of JudgeBench's source begins.
JUDGE_BENCH = {
    "mmlu-pro": "knowledge",
    "livebench-reasoning": "reasoning",
    "livebench-math": "math",
    "livecodebench": "coding",
}
JUDGE_BENCH_MODELS = {"gpt": "GPT-4o", "claude": "Claude 3.5 Sonnet"}


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A test set, ready to be scored.

    Attributes:
        name: As on the command line, `rm_bench`.
        title: As people write it, `RM-Bench`.
        rule: Which of the scoring rules in `armo.report.benchmarks` counts.
        rows: Responses to each prompt, with those that are right, and the subset as `category`.
        notes: What a reader of the results must know, such as rows that were left out.
    """

    name: str
    title: str
    rule: str
    rows: tuple[ResponseList, ...]
    notes: tuple[str, ...] = ()


class EmptyTextError(ValueError):
    """A row has a text that is empty, which a model cannot score."""


def load_reward_bench(
    path: str = "allenai/reward-bench",
    *,
    revision: str | None = None,
    prior_sets: str | None = None,
    prior_sets_revision: str | None = None,
) -> Benchmark:
    """Load RewardBench 1, its `filtered` rows.

    Args:
        path: Id on the hub, or a file or folder. Of a folder, the files named after the split
            are read (`filtered-00000-of-00001.parquet`), or all if none is; also in `data/`.
        revision: Commit, tag or branch on the hub.
        prior_sets: Id on the hub (`allenai/preference-test-sets`) or folder of the test sets from
            before it, with files named after the sets. Without, there is no fifth section.
        prior_sets_revision: As `revision`.

    Raises:
        DataError: If the hub cannot be reached, or naming file, row and field, at the first row
            that cannot be used. Rows with an empty text are left out and counted.
    """
    sources = [open_rows(path, splits=("filtered",), revision=revision, streaming=False)]
    if prior_sets is not None:
        named = [
            _numbered(prior_sets, name, revision=prior_sets_revision)
            for name in PRIOR_SETS
            if not Path(prior_sets).is_dir() or split_files(Path(prior_sets), (name,))
        ]
        if not named:
            raise DataError(f"{prior_sets}: no file is named after {', '.join(PRIOR_SETS)}")
        sources += named
    rows, notes = _parse(chain(*sources), reward_bench_row, path=path)
    return Benchmark("reward_bench", "RewardBench", "reward_bench", rows, notes)


def reward_bench_row(row: Mapping[str, Any]) -> ResponseList:
    """Make a list of a row of RewardBench 1 or its prior sets: chosen, then rejected.

    Args:
        row: `prompt` (text, or messages), `chosen`, `rejected`, `subset`, `id`.

    Raises:
        ValueError: Naming the field that is missing or wrong.
    """
    subset = _text(row, "subset")
    known = {name for subsets in REWARD_BENCH.values() for name in subsets} | {*PRIOR_SETS}
    if subset not in known:
        raise ValueError(f"field `subset` is {subset!r}, which is no subset of RewardBench")
    return ResponseList(
        id=f"{subset}/{_identity(row, 'id')}",
        source="reward_bench",
        prompt=_prompt(row, "prompt"),
        responses=(_text(row, "chosen"), _text(row, "rejected")),
        correct=(0,),
        category=subset,
    )


def load_reward_bench_2(
    path: str = "allenai/reward-bench-2", *, revision: str | None = None
) -> Benchmark:
    """Load RewardBench 2, its split `test`; arguments and errors as of `load_reward_bench`."""
    source = open_rows(path, splits=("test",), revision=revision, streaming=False)
    rows, notes = _parse(source, reward_bench_2_row, path=path)
    return Benchmark("reward_bench_2", "RewardBench 2", "reward_bench_2", rows, notes)


def reward_bench_2_row(row: Mapping[str, Any]) -> ResponseList:
    """Make a list of a row of RewardBench 2: the right responses, then the wrong ones.

    Args:
        row: `prompt` (text, or messages), `chosen` and `rejected` (lists of text), `subset`, `id`
            (in Ties `ref:N` or `tied:N`); `num_correct` and `total_completions`, if given.

    Raises:
        ValueError: Naming the field that is missing or wrong.
    """
    subset, identity = _text(row, "subset"), _identity(row, "id")
    chosen, rejected = _texts(row, "chosen"), _texts(row, "rejected")
    if subset not in REWARD_BENCH_2:
        raise ValueError(f"field `subset` is {subset!r}, not one of {', '.join(REWARD_BENCH_2)}")
    if not chosen or not rejected:
        raise ValueError("fields `chosen` and `rejected` must have a response each")
    for name, count in (
        ("num_correct", len(chosen)),
        ("total_completions", len(chosen) + len(rejected)),
    ):
        if row.get(name) not in (None, count):
            raise ValueError(f"field `{name}` is {row[name]!r}, but there are {count}")
    if subset != TIES and len(chosen) != 1:
        raise ValueError(f"field `chosen` has {len(chosen)} responses, but {subset} needs one")
    if subset == TIES and not re.fullmatch(r"(ref|tied):\d+", identity):
        raise ValueError(f"field `id` is {identity!r}; {TIES} needs `ref:N` or `tied:N`")
    if identity.startswith("tied:") and subset == TIES and len(chosen) < 2:
        raise ValueError(f"field `chosen` has one response, but {identity!r} needs several")
    return ResponseList(
        id=f"{subset}/{identity}",
        source="reward_bench_2",
        prompt=_prompt(row, "prompt"),
        responses=(*chosen, *rejected),
        correct=tuple(range(len(chosen))),
        category=subset,
    )


def load_rm_bench(path: str = "THU-KEG/RM-Bench", *, revision: str | None = None) -> Benchmark:
    """Load RM-Bench.

    Args:
        path: Id on the hub, or a file or folder: `total_dataset.json`, or the files by domain
            (`chat_filtered.json`), whose name stands in for the field `domain`.
        revision: Commit, tag or branch on the hub.

    Raises:
        DataError: As of `load_reward_bench`.
    """
    source = open_rows(
        path,
        splits=("train", "total_dataset"),
        hub=("train",),
        revision=revision,
        streaming=False,
    )
    rows, notes = _parse(map(_with_domain, source), rm_bench_row, path=path)
    return Benchmark("rm_bench", "RM-Bench", "rm_bench", rows, notes)


def rm_bench_row(row: Mapping[str, Any]) -> ResponseList:
    """Make a list of a row of RM-Bench: three right responses, then three wrong ones.

    Args:
        row: `id`, `prompt`, `chosen` and `rejected` (each a list of a concise, a detailed and a
            detailed Markdown response), `domain` (`chat`, `code`, `math`, `safety-refuse` or
            `safety-response`).

    Raises:
        ValueError: Naming the field that is missing or wrong.
    """
    domain = _text(row, "domain")
    if domain.partition("-")[0] not in RM_BENCH:
        raise ValueError(f"field `domain` is {domain!r}, not one of {', '.join(RM_BENCH)}")
    responses = []
    for name in ("chosen", "rejected"):
        texts = _texts(row, name)
        if len(texts) != 3:
            raise ValueError(f"field `{name}` must have three responses, has {len(texts)}")
        responses += texts
    return ResponseList(
        id=f"{domain}/{_identity(row, 'id')}",
        source="rm_bench",
        prompt=_prompt(row, "prompt"),
        responses=tuple(responses),
        correct=(0, 1, 2),
        category=domain,
    )


def load_judge_bench(
    path: str = "ScalerLab/JudgeBench",
    *,
    revision: str | None = None,
    splits: Sequence[str] = tuple(JUDGE_BENCH_MODELS),
) -> tuple[Benchmark, ...]:
    """Load JudgeBench: a benchmark for each model whose responses are judged.

    Args:
        path: Id on the hub, or a file or folder.
        revision: Commit, tag or branch on the hub.
        splits: `gpt`, `claude` or both; published figures are mostly of `gpt` alone. Of a file or
            folder, a row belongs to the split with which its `response_model` begins.

    Raises:
        DataError: As of `load_reward_bench`.
    """
    if unknown := set(splits) - set(JUDGE_BENCH_MODELS):
        several = ", ".join(sorted(unknown))
        raise ValueError(f"`splits` knows {', '.join(JUDGE_BENCH_MODELS)}, not {several}")
    parts: dict[str, list[PublishedRow]] = {name: [] for name in splits}
    for row in open_rows(path, splits=splits, revision=revision, streaming=False):
        try:
            model = _text(row.fields, "response_model")
        except ValueError as error:
            raise DataError(f"{row.place}: {error}") from None
        name = next((name for name in JUDGE_BENCH_MODELS if model.startswith(name)), None)
        if name is None:
            raise DataError(f"{row.place}: field `response_model` is {model!r}, of neither split")
        if name in parts:
            parts[name].append(row)
    benchmarks = []
    for name, those in parts.items():
        if those:
            rows, notes = _parse(those, judge_bench_row, path=path)
            title = f"JudgeBench, {JUDGE_BENCH_MODELS[name]}"
            benchmarks.append(Benchmark(f"judge_bench_{name}", title, "judge_bench", rows, notes))
    if not benchmarks:
        raise DataError(f"{path}: no rows of {', '.join(splits)}")
    return tuple(benchmarks)


def judge_bench_row(row: Mapping[str, Any]) -> ResponseList:
    """Make a list of a row of JudgeBench: A, then B.

    Args:
        row: `pair_id`, `question`, `response_A`, `response_B`, `source`, and `label`, `A>B` or
            `B>A`.

    Raises:
        ValueError: Naming the field that is missing or wrong.
    """
    source, label = _text(row, "source"), _text(row, "label")
    kind = next((kind for start, kind in JUDGE_BENCH.items() if source.startswith(start)), None)
    if kind is None:
        raise ValueError(f"field `source` is {source!r}, which is none of JudgeBench")
    if label not in ("A>B", "B>A"):
        raise ValueError(f"field `label` is {label!r}; it must be 'A>B' or 'B>A'")
    return ResponseList(
        id=_identity(row, "pair_id"),
        source="judge_bench",
        prompt=_prompt(row, "question"),
        responses=(_text(row, "response_A"), _text(row, "response_B")),
        correct=(0 if label == "A>B" else 1,),
        category=kind if source in JUDGE_BENCH else f"{kind}/{source}",
    )


def load_preferences(
    path: Paths,
    *,
    columns: Mapping[str, Any] | None = None,
    name: str = "pairs",
    title: str | None = None,
) -> Benchmark:
    """Load preference pairs or response lists in armo's own format as a benchmark.

    Args:
        path: A file, a folder (all its files in name order) or a list of them; each file has
            either pairs (`chosen`, `rejected`) or lists (`responses`).
        columns: Where the fields stand in rows that are not native; see `ColumnMap`.
        name: Of the benchmark.
        title: How people write it; the name of the file or folder by default.

    Raises:
        DataError: Naming file, row and field, at the first row that cannot be used.
    """
    rows: list[ResponseList] = []
    for file in data_files(path, builtin_file=BUILTIN_FILES["pairs"]):
        _, first = next(read_rows(file), ("", {}))
        if "responses" in (columns or first):
            rows += stream_lists(str(file), columns=columns)
        else:
            rows += map(_pair_list, stream_pairs(str(file), columns=columns))
    only = path if isinstance(path, str) else ", ".join(path)
    return Benchmark(name, title or Path(only).name.partition(".")[0], "pairs", tuple(rows))


def load_builtin_test(*, test_fraction: float = 0.2) -> Benchmark:
    """Load the pairs of the built-in corpus that `armo train` keeps for its report.

    Args:
        test_fraction: Share of prompts kept, where rows do not say `split`; all of them do.
    """
    splits = GroupSplits(test_fraction)
    pairs = list(stream_pairs(BUILTIN))
    groups = [splits.add(pair) for pair in pairs]
    test = splits.test()
    rows = tuple(_pair_list(pair) for pair, group in zip(pairs, groups, strict=True) if test[group])
    return Benchmark("builtin_test", "Built-in corpus, test side", "pairs", rows)


def load_suite(path: str) -> tuple[Benchmark, ...]:
    """Load all benchmarks that are in a folder, each in a sub-folder of its name.

    The names are `reward_bench`, `reward_bench_2`, `rm_bench`, `judge_bench`, `pairs` and
    `preference_test_sets`, the prior sets of `reward_bench`; case and punctuation do not matter, so
    that the names on the hub will do.

    Args:
        path: The folder.

    Raises:
        DataError: If there is no such folder, a sub-folder is none of these, or a benchmark cannot
            be loaded.
    """
    if not Path(path).is_dir():
        raise DataError(f"No such folder: {path}")
    plain = {_letters(name): name for name in (*SUITE, "preference_test_sets")}
    found: dict[str, str] = {}
    for folder in sorted(Path(path).iterdir()):
        if folder.is_dir() and not folder.name.startswith("."):
            name = plain.get(_letters(folder.name))
            if name is None:
                known = ", ".join(plain.values())
                raise DataError(f"{folder}: no benchmark of that name; known are {known}")
            if name in found:
                raise DataError(f"{folder} and {found[name]} are the same benchmark; keep one")
            found[name] = str(folder)
    prior_sets = found.pop("preference_test_sets", None)
    if not found:
        raise DataError(f"{path}: no sub-folder with a benchmark; known are {', '.join(SUITE)}")
    benchmarks: list[Benchmark] = []
    for name in SUITE:
        if name in found:
            if name == "reward_bench":
                benchmarks.append(load_reward_bench(found[name], prior_sets=prior_sets))
                continue
            loaded = SUITE[name](found[name])
            benchmarks += [loaded] if isinstance(loaded, Benchmark) else loaded
    return tuple(benchmarks)


SUITE: dict[str, Callable[[str], Benchmark | tuple[Benchmark, ...]]] = {
    "reward_bench": load_reward_bench,
    "reward_bench_2": load_reward_bench_2,
    "rm_bench": load_rm_bench,
    "judge_bench": load_judge_bench,
    "pairs": load_preferences,
}


def _pair_list(pair: PreferencePair) -> ResponseList:
    """A pair as a list of two; a pair that ties has no order."""
    tied = pair.preference == 0.5
    return ResponseList(
        id=pair.id,
        source=pair.source,
        prompt=pair.prompt,
        responses=pair.responses,
        correct=None if tied else (0,),
        category=pair.category,
        ranks=(0.0, 0.0) if tied else None,
    )


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


def _parse(
    source: Iterable[PublishedRow],
    parse: Callable[[Mapping[str, Any]], ResponseList],
    *,
    path: str,
) -> tuple[tuple[ResponseList, ...], tuple[str, ...]]:
    """Make lists of rows, and notes on rows that are left out; an id seen before gets a number."""
    rows: list[ResponseList] = []
    seen: dict[str, int] = {}
    empty = 0
    for place, _, raw in source:
        try:
            row = parse(raw)
        except EmptyTextError as error:
            logger.warning("%s: left out: %s", place, error)
            empty += 1
            continue
        except ValueError as error:
            raise DataError(f"{place}: {error}") from None
        seen[row.id] = seen.get(row.id, 0) + 1
        if seen[row.id] > 1:
            if row.category == TIES:
                raise DataError(f"{place}: id {row.id!r} is there already; {TIES} needs it once")
            row = replace(row, id=f"{row.id} ({seen[row.id]})")
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: no rows")
    return tuple(rows), (f"{empty} rows with an empty text are left out",) if empty else ()


def _numbered(path: str, subset: str, *, revision: str | None) -> Iterator[PublishedRow]:
    """Rows of a prior set, which need no id and may use `subset` for something else."""
    rows = open_rows(path, splits=(subset,), revision=revision, streaming=False)
    for number, row in enumerate(rows):
        yield row._replace(fields={"id": number, **row.fields, "subset": subset})


def _with_domain(row: PublishedRow) -> PublishedRow:
    """Add the domain that RM-Bench's files by domain have in their names."""
    domain = re.fullmatch(r"([a-z-]+)_filtered/\d+", row.key)
    return row._replace(fields={"domain": domain[1], **row.fields}) if domain else row


def _text(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        raise ValueError(f"field `{name}` is missing; there are {column_names(row)}")
    return _checked(row[name], name)


def _texts(row: Mapping[str, Any], name: str) -> list[str]:
    if name not in row:
        raise ValueError(f"field `{name}` is missing; there are {column_names(row)}")
    if not isinstance(row[name], list):
        raise ValueError(f"field `{name}` must be a list of text, got {row[name]!r:.60}")
    return [_checked(text, f"{name}[{k}]") for k, text in enumerate(row[name])]


def _checked(text: Any, name: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"field `{name}` must be text, got {text!r:.60}")
    if not text.strip():
        raise EmptyTextError(f"field `{name}` is empty")
    return text


def _identity(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"field `{name}` must be text or a whole number, got {value!r:.60}")
    return str(value)


def _prompt(row: Mapping[str, Any], name: str) -> Prompt:
    """Text is one user turn; a list of messages has several."""
    if not isinstance(row.get(name), list):
        return (Message("user", _text(row, name)),)
    return read_messages(row[name], name)
