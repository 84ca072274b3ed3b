"""Benchmarks of reward models: rows of public test sets, and the rule that scores them."""

from dataclasses import dataclass

from armo.data.conversation import ResponseList


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A test set, ready to be scored.

    Attributes:
        name: As on the command line, `rm_bench`.
        title: As people write it, `RM-Bench`.
        rule: Which of the scoring rules in `armo.report.benchmarks` counts.
        rows: Responses to each prompt, with those that are right, and the subset as `category`.
    """

    name: str
    title: str
    rule: str
    rows: tuple[ResponseList, ...]
