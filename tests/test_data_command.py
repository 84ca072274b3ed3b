"""`armo data check` as a user runs it."""

import json

import pytest
from planted_rows import BENCHMARK, FAULTS, OBJECTIVES, clean_rows, write_sets
from test_cli import _elsewhere, error_of, run, write_rows  # noqa: F401  (a fixture among them)


def declared():
    return [
        f"+data.objectives.{name}={json.dumps(fields).replace(' ', '').replace(chr(34), '')}"
        for name, fields in OBJECTIVES.items()
    ]


def check(*arguments):
    status, out, err = run("data", "check", *arguments)
    assert status == 0, err
    return " ".join(out.split())


def report(folder="checkpoints/data_check"):
    with open(f"{folder}/report.json", encoding="utf-8") as file:
        return json.load(file)


def test_a_clean_set_gives_tables_and_no_findings(tmp_path):
    write_sets(tmp_path, clean_rows())
    out = check(f"input={tmp_path}", "output_dir=out", "fail_on=note", *declared())
    assert out.endswith("no findings; saved out/report.html")
    assert {*report("out")} >= {"sources", "objectives", "histogram", "agreement", "lengths"}
    assert "findings" not in report("out")


def test_faults_are_printed_worst_first_and_saved_with_their_places(tmp_path):
    rows = clean_rows()
    names = ("a lost letter", "a rating off its scale", "a preference both ways")
    for name in names:
        FAULTS[name].plant(rows)
    paths = write_sets(tmp_path, rows)
    out = check(f"input={tmp_path}", *declared())
    lines = [
        f"error: rows that cannot be used (1): {paths['ratings']}:7: rating 6 of 'honesty' is",
        "warning: texts with a replacement character, where a letter was lost (1): ",
        "warning: circles of preferences that contradict one another (1): ",
        "1 error, 2 warnings; saved checkpoints/data_check/report.html",
    ]
    starts = [out.replace(" ", "").find(line.replace(" ", "")) for line in lines]
    assert -1 not in starts
    assert starts[0] < min(starts[1:])
    saved = report()["findings"]
    assert [row["severity"] for row in saved] == ["error", "warning", "warning"]
    assert saved[0]["places"].startswith(f"{paths['ratings']}:7: ")
    with open("checkpoints/data_check/report.html", encoding="utf-8") as file:
        page = file.read()
    assert "1 error and 2 warnings; the first error: rows that cannot be used (1)." in page


@pytest.mark.parametrize(
    ("fail_on", "fails"), [("error", False), ("warning", True), ("note", True)]
)
def test_fail_on_ends_with_an_error_after_the_report_is_saved(tmp_path, fail_on, fails):
    rows = clean_rows()
    FAULTS["a lost letter"].plant(rows)
    write_sets(tmp_path, rows)
    arguments = [f"input={tmp_path}", f"fail_on={fail_on}", *declared()]
    if not fails:
        check(*arguments)
        return
    line = error_of("data", "check", *arguments)
    assert f"1 findings are of severity {fail_on} or worse" in line
    assert len(report()["findings"]) == 1


def test_scales_are_observed_where_none_are_declared(tmp_path):
    write_sets(tmp_path, clean_rows())
    check(f"input={tmp_path}")
    rows = {row["objective"]: row for row in report()["objectives"]}
    assert {name: row["scale"] for name, row in rows.items()} == {
        "helpfulness": "1 to 5",
        "honesty": "1 to 5",
        "clarity": "0 to 10",
        "verbosity": "0 to 4",
    }


def test_sets_are_checked_as_training_reads_them():
    sets = ("data/objectives=builtin", "data/ratings=builtin", "data/lists=jsonl")
    check(*sets, "data.lists.path=builtin", "probe=false", "near_duplicates=null")
    rows = {row["kind"]: row["rows"] for row in report()["sources"]}
    assert rows == {"ratings": 4320, "lists": 480}


def test_texts_of_a_benchmark_are_found(tmp_path):
    rows = clean_rows()
    FAULTS["a benchmark's prompt"].plant(rows)
    paths = write_sets(tmp_path, {"pairs": rows["pairs"]})
    [(_, prompt, responses)] = BENCHMARK
    held_out = {"id": "b0", "source": "river", "prompt": [{"role": "user", "content": prompt}]}
    held_out |= {"chosen": responses[0], "rejected": responses[1]}
    path = write_rows(tmp_path / "river.jsonl", [held_out])
    check(f"input={paths['pairs']}", "data/benchmark=pairs", f"data.benchmark.path={path}")
    [found] = report()["findings"]
    assert found["finding"] == "texts that are in river too"
    assert found["places"].startswith(f"{paths['pairs']}:8 `prompt[0].content` has the prompt of")


def test_a_table_is_checked_by_a_map_of_its_columns(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("q,a,n\n" + "".join(f"Why {k}?,It is {k}.,{k % 4}\n" for k in range(40)))
    check(f"input={path}", "columns={prompt:q,response:a,ratings:{clarity:n}}")
    [row] = report()["objectives"]
    assert (row["objective"], row["ratings"], row["scale"]) == ("clarity", 40, "0 to 3")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to check; name files, input=FILE"),
        (["input=absent.jsonl"], "No such file or folder: absent.jsonl"),
        (["data/ratings=builtin"], "`data/ratings` needs `data/objectives`"),
        (["input=absent.jsonl", "fail_on=fatal"], "`fail_on` must be error, warning, note or null"),
    ],
)
def test_wrong_settings_are_one_line(arguments, words):
    assert words in error_of("data", "check", *arguments)


@pytest.mark.parametrize(("verb", "words"), [([], "got ''"), (["chekc"], "got 'chekc'")])
def test_a_missing_or_unknown_sub_verb_is_wrong_usage(verb, words):
    status, _, err = run("data", *verb)
    assert status == 2
    assert words in err


def test_rows_of_a_published_set_are_named_by_their_place(tmp_path):
    rows = [
        {
            "prompt": f"Why {k}?",
            "response": f"Because of {k}.",
            "helpfulness": k % 5,
            "verbosity": 1,
        }
        | dict.fromkeys(("correctness", "coherence", "complexity"), k % 3)
        for k in range(40)
    ]
    rows[7]["response"] += "\x07"
    path = write_rows(tmp_path / "train.jsonl", rows)
    check("data/ratings=helpsteer2", f"data.ratings.path={path}")
    places = {row["check"]: row["places"] for row in report()["findings"]}
    assert places["texts"] == f"{path}:8 `messages[1].content`"
