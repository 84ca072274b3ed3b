"""What the jobs of a sweep came to: one table, and the same as JSON, in the sweep's folder."""

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from rich.console import Console
from rich.table import Table
from rich.text import Text

from armo.artifacts import read_json, write_json

# One file per finished job; jobs may run in other processes, or on other machines.
RECORDS = ".jobs"


class JobError(RuntimeError):
    """A job of a sweep failed."""

    def __init__(self, reason: str, *, job: int, sweep: Path) -> None:
        """Say what happened.

        Args:
            reason: Why it failed, in one line.
            job: Number of the job.
            sweep: Folder of the sweep.
        """
        super().__init__(f"job {job} of the sweep {sweep}: {reason}")
        self.reason, self.job, self.sweep = reason, job, sweep

    def __reduce__(self) -> Any:
        """Let a launcher pass it on from another process."""
        return partial(JobError, job=self.job, sweep=self.sweep), (self.reason,)


class JobTable(Callback):
    """Hydra callback: notes what each job of a sweep came to, and shows all of them at its end."""

    def __init__(self) -> None:
        self.folder: Path | None = None

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        """Forget the jobs of an earlier sweep into the same folder."""
        self.folder = Path(config.hydra.sweep.dir).absolute()
        shutil.rmtree(self.folder / RECORDS, ignore_errors=True)
        (self.folder / RECORDS).mkdir(parents=True)

    def on_job_end(self, config: Any, job_return: JobReturn, **kwargs: Any) -> None:
        """Note a job, in the process that ran it."""
        if self.folder is None:
            return  # no sweep
        failed = job_return.status != JobStatus.COMPLETED
        record = {
            "job": config.hydra.job.num,
            "folder": config.hydra.runtime.output_dir,
            "overrides": list(job_return.overrides or ()),
            "loss": None,
            "accuracy": None,
            "error": _error_text(job_return) if failed else None,
        }
        if not failed and job_return.return_value is not None:
            record |= held_out_results(Path(record["folder"]))
        write_json(self.folder / RECORDS / f"{record['job']}.json", record)

    def on_multirun_end(self, config: Any, **kwargs: Any) -> None:
        """Show all jobs, and save them as `jobs.json`."""
        if self.folder is not None:
            show_jobs(self.folder)


def held_out_results(folder: Path) -> dict[str, float]:
    """Return loss and accuracy of a run's gate on held-out training prompts.

    Nothing here knows the test side, so a sweep may choose by these.
    """
    summary = read_json(folder / "gating" / "gate.json")["summary"]
    return {name: summary[name] for name in ("loss", "accuracy")}


def show_jobs(folder: Path) -> None:
    """Print the jobs of a sweep as one table, and save them in its folder as `jobs.json`."""
    records = [read_json(file) for file in (folder / RECORDS).glob("*.json")]
    if not records:
        return
    records.sort(key=lambda record: record["job"])
    write_json(folder / "jobs.json", records)
    # Apart from a terminal, as wide as it needs to be: nobody wants overrides cut off.
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    console.print(_jobs_table(records))
    rated = [record for record in records if record["loss"] is not None]
    if rated:
        best = min(rated, key=lambda record: record["loss"])
        console.print(f"lowest loss: job {best['job']}, {best['folder']}")
    console.print(f"saved {folder / 'jobs.json'}")


def _jobs_table(records: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="Jobs: the gate on held-out training prompts", title_justify="left")
    table.add_column("job", justify="right")
    table.add_column("overrides")
    for name in ("loss", "accuracy"):
        table.add_column(name, justify="right")
    shared = [
        item
        for item in records[0]["overrides"]
        if all(item in record["overrides"] for record in records)
    ]
    table.caption, table.caption_justify = Text(f"All with {' '.join(shared)}"), "left"
    for record in records:
        what = " ".join(item for item in record["overrides"] if item not in shared)
        if record["error"] is not None:
            what = f"{what} failed: {record['error']}".lstrip()
        figures = ("" if record[n] is None else f"{record[n]:.4f}" for n in ("loss", "accuracy"))
        table.add_row(str(record["job"]), Text(what), *figures)
    return table


def _error_text(job_return: JobReturn) -> str:
    error = job_return._return_value  # `return_value` raises it
    if isinstance(error, JobError):
        return error.reason
    return " ".join(str(error).split()) or type(error).__name__
