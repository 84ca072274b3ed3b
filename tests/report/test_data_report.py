"""The check of a data set: silent on a clean one, and each planted fault found alone."""

import re

import numpy as np
import pytest
import scipy.stats
from planted_rows import BENCHMARK, FAULTS, FLIPPED, OBJECTIVES, clean_rows, write_sets

from armo.data.check_labels import Finding
from armo.data.check_overlap import BenchmarkGrams
from armo.data.check_rows import RowReader
from armo.data.conversation import Message, ResponseList
from armo.data.objectives import ObjectiveSet
from armo.data.sources import DataError, stream_lists, stream_pairs, stream_ratings
from armo.report.data_report import DataCheck, check_rows
from armo.report.tables import Evaluation

DECLARED = ObjectiveSet.from_mapping(OBJECTIVES)


def benchmark_rows():
    for name, prompt, responses in BENCHMARK:
        asked = (Message("user", prompt),)
        yield name, [ResponseList("b0", "river", asked, responses, correct=(0,))]


def check(folder, rows, *, probe=False, near=0.8, processes=1):
    paths = write_sets(folder, rows)
    benchmark = BenchmarkGrams(benchmark_rows())
    reader = RowReader(DECLARED, near=near is not None, benchmark=benchmark, processes=processes)
    reader.read("ratings", stream_ratings, path=paths["ratings"], objectives=DECLARED)
    reader.read("pairs", stream_pairs, path=paths["pairs"])
    reader.read("lists", stream_lists, path=paths["lists"])
    return check_rows(
        reader,
        DECLARED,
        near_duplicates=near,
        test_fraction=0.2,
        min_ratings=30,
        probe=probe,
    )


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_found_in_a_clean_set(tmp_path, seed):
    result = check(tmp_path, clean_rows(seed), probe=True)
    assert [str(finding) for finding in result.findings] == []
    assert "findings" not in [table.name for table in result.evaluation.tables]


@pytest.mark.parametrize("name", FAULTS)
def test_each_planted_fault_is_found_and_nothing_else(tmp_path, name):
    fault, rows = FAULTS[name], clean_rows()
    named = fault.plant(rows)
    result = check(tmp_path, rows, probe=fault.probe)
    [finding] = result.findings
    assert (finding.severity, finding.check) == (fault.severity, fault.check)
    assert fault.statement in finding.statement
    line = re.sub(rf"{re.escape(str(tmp_path))}/(\w+)\.jsonl", r"\1", str(finding))
    assert "\n" not in line
    for place in named:
        assert place in line
    assert bool(finding.places) == bool(named)
    [shown] = result.evaluation.table("findings").rows
    assert shown[:4] == (fault.severity, fault.check, finding.count, finding.statement)


def test_flipped_pairs_are_the_ones_that_are_named(tmp_path):
    rows = clean_rows()
    FAULTS["flipped pairs"].plant(rows)
    [finding] = check(tmp_path, rows, probe=True).findings
    lines = {int(re.search(r":(\d+) `chosen`", place)[1]) for place in finding.places}
    flipped = {number + 1 for number in FLIPPED}
    assert lines <= flipped
    assert len(lines) >= len(flipped) / 2


def test_all_faults_together_are_all_found_the_worst_first(tmp_path):
    rows = clean_rows()
    # Those that change the same rows hide one another.
    together = [
        *("another scale", "a rating off its scale", "a prompt on both sides", "a repeated pair"),
        *("two ratings of one text", "a preference both ways", "a circle of preferences"),
        *("a lost letter", "nearly the same response", "a benchmark's prompt"),
    ]
    for name in together:
        FAULTS[name].plant(rows)
    findings = check(tmp_path, rows).findings
    for name in together:
        assert any(FAULTS[name].statement in finding.statement for finding in findings), name
    severities = [finding.severity for finding in findings]
    assert severities == sorted(severities, key=("error", "warning", "note").index)


def test_several_processes_find_the_same(tmp_path):
    rows = clean_rows()
    for name in ("a lost letter", "nearly the same response", "a benchmark's prompt"):
        FAULTS[name].plant(rows)
    assert len(check(tmp_path, rows).findings) == 3
    assert check(tmp_path, rows, processes=2) == check(tmp_path, rows)


def test_no_process_is_an_error():
    with pytest.raises(ValueError, match="`processes` must be at least 1, got 0"):
        RowReader(processes=0)


def test_near_duplicates_are_not_looked_for_unless_asked(tmp_path):
    rows = clean_rows()
    FAULTS["nearly the same response"].plant(rows)
    assert check(tmp_path, rows, near=None).findings == ()


def test_a_stream_that_cannot_skip_ends_at_its_bad_row(tmp_path):
    path = write_sets(tmp_path, {"pairs": [clean_rows()["pairs"][0], "{", "{"]})["pairs"]
    reader = RowReader()
    reader.read("pairs", lambda: stream_pairs(path))
    [place] = reader.bad_rows.places
    assert place.startswith(f"{path}:2: malformed JSON at column ")
    assert place.endswith("; what follows was not read")
    assert len(reader.finish().places) == 1


def test_a_stream_of_which_nothing_can_be_read_is_an_error():
    with pytest.raises(DataError, match="No such file or folder: absent"):
        RowReader().read("pairs", stream_pairs, path="absent")


def test_a_file_of_bad_rows_alone_is_still_reported(tmp_path):
    path = write_sets(tmp_path, {"pairs": ["{", "["]})["pairs"]
    reader = RowReader()
    reader.read("pairs", stream_pairs, path=path)
    result = check_rows(
        reader, None, near_duplicates=0.8, test_fraction=0.2, min_ratings=None, probe=True
    )
    [finding] = result.findings
    assert finding.count == 2
    assert [table.name for table in result.evaluation.tables] == ["findings"]


def test_tables_are_counts_and_statistics_of_the_rows(tmp_path):
    rows = clean_rows()
    rows["ratings"] = rows["ratings"][:100]
    for row in rows["ratings"][:40]:
        row["ratings"]["honesty"] = None
    rows["ratings"][0]["split"] = rows["ratings"][1]["split"] = "test"
    rows["pairs"][0]["preference"] = 0.5
    tables = check(tmp_path, rows).evaluation
    assert tables.table("sources").rows == (
        ("ratings", "raters", 100, 50, 100, 0, 2, 0),
        ("pairs", "judges", 300, 300, 600, 0, 0, 1),
        ("lists", "rankers", 30, 30, 90, 0, 0, 0),
    )
    table = tables.table("objectives")
    by_name = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    given = {name: [row["ratings"][name] for row in rows["ratings"]] for name in OBJECTIVES}
    for name, values in given.items():
        values = np.array([value for value in values if value is not None], dtype=float)
        shown = by_name[name]
        assert shown["ratings"] == len(values)
        assert shown["missing"] == pytest.approx(1 - len(values) / 100)
        assert shown["mean"] == pytest.approx(values.mean(), rel=1e-5)
        assert shown["sd"] == pytest.approx(values.std(), rel=1e-5)
        assert (shown["lowest"], shown["highest"]) == (values.min(), values.max())
    histogram = {row[0]: row[1:] for row in tables.table("histogram").rows}
    assert {name: sum(counts) for name, counts in histogram.items()} == {
        name: by_name[name]["ratings"] for name in histogram
    }
    assert histogram["verbosity"][0] == given["verbosity"].count(0)
    agreement = {row[:2]: row[2:] for row in tables.table("agreement").rows}
    rows_of_both, spearman = agreement["helpfulness", "honesty"]
    reference = scipy.stats.spearmanr(given["helpfulness"][40:], given["honesty"][40:]).statistic
    assert rows_of_both == 60
    assert spearman == pytest.approx(reference)
    style = {row[:2]: row[2:] for row in tables.table("rating_style").rows}
    words = [len(row["messages"][1]["content"].split()) for row in rows["ratings"]]
    reference = scipy.stats.spearmanr(given["clarity"], words).statistic
    assert style["clarity", "words"][1] == pytest.approx(reference, abs=1e-6)
    lengths = {row[0]: row[1:] for row in tables.table("lengths").rows}
    assert lengths["ratings"][:2] == (100, min(words))
    assert lengths["ratings"][-1] == max(words)
    longer = [
        len(row["chosen"].split()) - len(row["rejected"].split()) for row in rows["pairs"][1:]
    ]
    clear = [apart for apart in longer if apart]
    [preferred] = tables.table("preferred_style").rows
    assert preferred[:2] == ("words", len(clear))
    assert preferred[2] == pytest.approx(np.mean([apart > 0 for apart in clear]))


def test_severities_are_counted_from_the_worst_down():
    findings = tuple(Finding(name, "c", "s") for name in ("error", "warning", "warning", "note"))
    result = DataCheck(findings, Evaluation(()))
    assert [result.at_least(name) for name in ("error", "warning", "note")] == [1, 3, 4]
    with pytest.raises(ValueError, match="`fail_on` must be error, warning, note or null"):
        result.at_least("fatal")
