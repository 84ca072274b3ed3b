"""A million rated responses: read, checked, measured and written again, in bounded memory.

    OMP_NUM_THREADS=1 taskset -c 0,1 python benchmarks/data.py --json PATH
    OMP_NUM_THREADS=1 taskset -c 0,1 python benchmarks/data.py --quick
    OMP_NUM_THREADS=1 taskset -c 0,1 python benchmarks/data.py --rows 100000

Rows have 300 words each, four responses to a prompt, three objectives and a third of each kind of
format. One pass does what `armo data check near_duplicates=null processes=2` does to them (guards,
surface features, script and language, repeats, agreement, style), and writes each row again as a
native one; its memory is the sum of the peaks of the three processes, pages that they share counted
in each. The baseline reads the same file with `json` alone. Fewer rows than a million are run at
two sizes, and both figures carried on in a line; the table says so.
"""

import argparse
import dataclasses
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from figures import Figure, peak_gb, save

from armo.data.check_near import minhash
from armo.data.check_rows import RowReader
from armo.data.check_texts import word_hashes
from armo.data.conversation import RatedResponse
from armo.data.objectives import Objective, ObjectiveSet
from armo.data.rewrite import add_pattern
from armo.data.sources import stream_ratings
from armo.data.surface import surface_features
from armo.report.data_report import check_rows

MILLION = 1_000_000
QUICK_ROWS = 20_000
TINY_ROWS = 200
PROCESSES = 2  # that examine texts, beside the one that reads
WORDS = 300
RESPONSES = 4  # to a prompt
OBJECTIVES = ObjectiveSet(
    (
        Objective("helpfulness", 1, 5),
        Objective("honesty", 0, 1),
        Objective("verbosity", 0, 4, bias=True),
    )
)


# --- the rows -----------------------------------------------------------------------------------


def compose(rng: random.Random, words: Sequence[str]) -> str:
    """A response of 300 words: plain paragraphs, a list, or headings and bold spans."""
    drawn = [rng.choice(words) for _ in range(WORDS)]
    sentences = [" ".join(drawn[k : k + 15]).capitalize() + "." for k in range(0, WORDS, 15)]
    form = rng.randrange(3)
    if form == 0:
        return "\n\n".join(" ".join(sentences[k : k + 5]) for k in range(0, len(sentences), 5))
    if form == 1:
        items = "\n".join(f"- {sentence}" for sentence in sentences[4:14])
        return f"{' '.join(sentences[:4])}\n\n{items}\n\n{' '.join(sentences[14:])}"
    parts = [f"**{text[:10]}**{text[10:]}" for text in sentences[1:]]
    return f"## {sentences[0]}\n\n" + "\n\n".join(" ".join(parts[k : k + 6]) for k in (0, 6, 12))


def write_rows(path: Path, rows: int) -> None:
    """Write rated responses, no two of them alike."""
    rng = random.Random(0)
    letters = "bdfgklmnprst", "aeiou"
    words = [
        "".join(rng.choice(letters[k % 2]) for k in range(rng.randrange(2, 9)))
        for _ in range(30_000)
    ]
    prompt = ""
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            if number % RESPONSES == 0:
                prompt = " ".join(rng.choice(words) for _ in range(20)).capitalize() + "?"
            turns = [{"role": "user", "content": prompt}]
            turns += [{"role": "assistant", "content": compose(rng, words)}]
            ratings = {
                "helpfulness": rng.randint(1, 5),
                "honesty": rng.random() if number % 3 else None,
                "verbosity": rng.randint(0, 4),
            }
            row = {"id": f"row-{number}", "source": "drawn", "messages": turns, "ratings": ratings}
            file.write(json.dumps(row) + "\n")


# --- what is measured ---------------------------------------------------------------------------


def check_file(path: Path) -> dict[str, float]:
    """Read, check, measure and write again all rows of a file: how long, and how much memory."""
    start = time.perf_counter()
    reader = RowReader(OBJECTIVES, near=False, processes=PROCESSES)
    with path.with_suffix(".again").open("w", encoding="utf-8") as file:

        def rewritten() -> Iterator[RatedResponse]:
            for row in stream_ratings(str(path), objectives=OBJECTIVES):
                file.write(json.dumps(native(row), ensure_ascii=False) + "\n")
                yield row

        reader.read("ratings", rewritten)
    read = time.perf_counter() - start
    result = check_rows(
        reader, OBJECTIVES, near_duplicates=None, test_fraction=0.2, min_ratings=30, probe=False
    )
    if reader.bad_rows.count or result.findings:
        sys.exit(f"rows of the benchmark are not clean: {', '.join(map(str, result.findings))}")
    seconds = time.perf_counter() - start
    # The processes have ended with the last row; the largest of them stands for each.
    unit = 1 if sys.platform == "darwin" else 1024
    beside = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e9
    memory = peak_gb() + PROCESSES * beside
    return {"seconds": seconds, "checks": seconds - read, "peak_gb": memory, "own_gb": peak_gb()}


def native(row: RatedResponse) -> dict[str, Any]:
    """A row as its line would be."""
    turns = [dataclasses.asdict(turn) for turn in row.prompt]
    answer = {"role": "assistant", "content": row.conversation.response}
    told = {"id": row.id, "source": row.source, "messages": [*turns, answer]}
    return {**told, "ratings": row.ratings}


def read_plainly(path: Path) -> float:
    """Read all rows with `json` alone: how long."""
    start = time.perf_counter()
    with path.open("rb") as lines:
        for line in lines:
            json.loads(line)
    return time.perf_counter() - start


def per_row(path: Path, rows: int) -> dict[str, float]:
    """What single steps cost a row, in microseconds."""
    with path.open(encoding="utf-8") as lines:
        texts = [json.loads(next(lines))["messages"][-1]["content"] for _ in range(rows)]
    steps = {
        "surface features": lambda text: surface_features([text]),
        "signature for near-duplicates": lambda text: minhash(word_hashes(text)),
        "one style rewrite (bold)": lambda text: add_pattern(text, "bold"),
    }
    costs = {}
    for name, step in steps.items():
        start = time.perf_counter()
        for text in texts:
            step(text)
        costs[name] = (time.perf_counter() - start) / rows * 1e6
    return costs


def run_apart(path: Path) -> dict[str, float]:
    """Check a file in another process."""
    command = [sys.executable, __file__, "--file", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def carried_on(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Return the value at a million rows on the line through those at the sizes that were run."""
    if len(sizes) == 1:
        return values[0]
    slope = max(0.0, values[1] - values[0]) / (sizes[1] - sizes[0])  # noise does not pay off
    return values[1] + slope * (MILLION - sizes[1])


def run(rows: int) -> list[Figure]:
    """Measure at `rows`, and at a quarter of them where that is less than a million."""
    sizes = [rows] if rows == MILLION else [rows // 4, rows]
    results: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            path = Path(folder) / f"{size}.jsonl"
            write_rows(path, size)
            print(f"{size:,} rows, {path.stat().st_size / 1e9:.2f} GB", file=sys.stderr, flush=True)
            results.append({**run_apart(path), "plain": read_plainly(path)})
            path.with_suffix(".again").unlink()
        steps = per_row(path, min(rows, 500))
    at = {name: carried_on(sizes, [result[name] for result in results]) for name in results[0]}
    note = "measured" if rows == MILLION else f"carried on from {sizes[0]:,} and {sizes[1]:,} rows"
    return [
        Figure("million_rows_s", at["seconds"], "s", at["plain"], "s, json alone", 600.0, note),
        Figure("million_rows_peak_gb", at["peak_gb"], "GB", goal=2.0, note=note),
        Figure("  of them, the process that reads", at["own_gb"], "GB", note=note),
        Figure("  of the seconds, after the last row", at["checks"], "s", note=note),
        *(Figure(f"  {name}", cost, "us a row") for name, cost in steps.items()),
    ]


# --- what is shown ------------------------------------------------------------------------------


def show(figures: Sequence[Figure]) -> None:
    """Print the table."""
    print(f"{'':36} {'value':>14} {'goal':>8} {'baseline':>22}")
    for figure in figures:
        value = f"{figure.value:.3g} {figure.unit}"
        goal = "" if figure.goal is None else f"< {figure.goal:g}"
        base = "" if figure.baseline is None else f"{figure.baseline:.3g} {figure.baseline_unit}"
        print(f"{figure.name:36} {value:>14} {goal:>8} {base:>22}  {figure.note}".rstrip())


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROWS:,} rows")
    parser.add_argument("--rows", type=int, default=MILLION, help="fewer rows than a million")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.file:
        print(json.dumps(check_file(options.file)))
        return
    start, load = time.perf_counter(), os.getloadavg()[0]
    figures = run(TINY_ROWS if options.tiny else QUICK_ROWS if options.quick else options.rows)
    show(figures)
    took = (time.perf_counter() - start) / 60
    print(f"{took:.1f} minutes; load of the machine {load:.1f}, then {os.getloadavg()[0]:.1f}")
    if options.json:
        save(figures, options.json)


if __name__ == "__main__":
    main()
