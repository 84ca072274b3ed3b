"""What the benchmarks measure, and the JSON that they write of it."""

import json
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of a benchmark's table; with a name, also one of its JSON file.

    Attributes:
        name: Its name, an identifier; or for a line that only explains, what it says.
        value: Median over turns; None where it could not be measured, infinite for what never came.
        unit: Of the value and the goal.
        baseline: What the baseline measured, in `baseline_unit`.
        baseline_unit: Unit of the baseline.
        goal: What the value is to reach.
        note: What it was compared with.
    """

    name: str
    value: float | None
    unit: str
    baseline: float | None = None
    baseline_unit: str = ""
    goal: float | None = None
    note: str = ""


def save(figures: Sequence[Figure], path: Path) -> None:
    """Write the named figures that were measured: name to value, unit, baseline and goal."""
    named = {
        figure.name: {
            "value": figure.value,
            "unit": figure.unit,
            "baseline": figure.baseline,
            "goal": figure.goal,
        }
        for figure in figures
        if figure.name.isidentifier() and figure.value is not None
    }
    path.write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")


def peak_gb() -> float:
    """Most memory that was resident at once, in units of 1e9 bytes.

    Not `ru_maxrss` where there is another: Linux starts that of a new process at the peak of the
    one that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
