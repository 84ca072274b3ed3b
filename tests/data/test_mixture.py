import json

import pytest
from conftest import conversation

from armo.data.mixture import section_files, stream_mixed_pairs, stream_mixed_ratings
from armo.data.objectives import ObjectiveSet
from armo.data.sources import DataError

OBJECTIVES = ObjectiveSet.from_mapping(
    {
        "helpsteer2-helpfulness": {"low": 0, "high": 4},
        "prometheus-score": {"low": 1, "high": 5},
        "clarity": {"low": 0, "high": 1},
    }
)
ASPECTS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
HELPSTEER = {"prompt": "Hi", "response": "Hello.", **dict.fromkeys(ASPECTS, 2)}
FEEDBACK = {"orig_instruction": "Hi", "orig_response": "Hello.", "orig_score": "5"}


def native(number, **more):
    row = {"id": f"r{number}", "source": "mine", "messages": conversation("Hi", "Hello.")}
    return {**row, "ratings": {"clarity": 0.5}, **more}


@pytest.fixture
def folder(tmp_path):
    def write(name, *rows):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("steer/train.jsonl", *[HELPSTEER] * 5)
    write("feedback/train.jsonl", FEEDBACK)
    write("mine/a.jsonl", native(1), native(2, weight=3))
    write("mine/b.jsonl", native(3))
    return tmp_path


def mixed(**sources):
    return [*stream_mixed_ratings(sources, objectives=OBJECTIVES)]


def test_sets_follow_one_another_with_their_weights_and_limits(folder):
    rows = mixed(
        helpsteer2={"path": str(folder / "steer"), "weight": 0.5, "limit": 2},
        judged={"dataset": "feedback_collection", "path": str(folder / "feedback")},
        mine={"path": str(folder / "mine" / "*.jsonl"), "weight": 2},
    )
    assert [(row.id, row.weight) for row in rows] == [
        ("helpsteer2/train/1", 0.5),
        ("helpsteer2/train/2", 0.5),
        ("judged/train/1", 1.0),
        ("mine/r1", 2.0),
        ("mine/r2", 6.0),
        ("mine/r3", 2.0),
    ]
    assert [row.source for row in rows[1:4]] == ["helpsteer2", "feedback_collection", "mine"]
    assert rows[0].ratings == {"helpsteer2-helpfulness": 2.0}


def test_one_set_may_stand_there_twice(folder):
    source = {"dataset": "helpsteer2", "path": str(folder / "steer")}
    rows = mixed(a={**source, "limit": 3}, b=source)
    assert len({row.id for row in rows}) == len(rows) == 8


def test_a_limit_beyond_the_set_takes_all_of_it(folder):
    assert len(mixed(mine={"path": str(folder / "mine"), "limit": 100})) == 3


def test_native_rows_in_a_mixture_are_read_with_their_settings(folder):
    (folder / "table.csv").write_text("q,a,c\nHi,Hello.,1\n")
    columns = {"prompt": "q", "response": "a", "ratings": {"clarity": "c"}}
    (row,) = mixed(table={"path": str(folder / "table.csv"), "columns": columns})
    assert row.ratings == {"clarity": 1.0}


def test_pairs_are_mixed_as_ratings_are(tmp_path):
    turns = conversation("Hi", "Hello.")
    standard = {"chosen": turns, "rejected": conversation("Hi", "What?")}
    pair = {"id": "p", "source": "mine", "prompt": turns[:1], "chosen": "a", "rejected": "b"}
    for name, rows in (("published", [standard] * 3), ("mine", [{**pair, "weight": 2}])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    sources = {
        "tulu_3_8b": {"path": str(tmp_path / "published.jsonl"), "limit": 1, "weight": 0.5},
        "mine": {
            "path": str(tmp_path / "mine.jsonl"),
            "weight": 0.25,
            "judges": {"clarity": ["mine"]},
        },
    }
    rows = [*stream_mixed_pairs(sources, objectives=OBJECTIVES)]
    assert [(row.id, row.weight, row.chosen) for row in rows] == [
        ("tulu_3_8b/published/1", 0.5, "Hello."),
        ("mine/p", 0.5, "a"),
    ]
    assert rows[1].judgements == {"clarity": 1.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "x.jsonl", "weight": -1}, "source 'mine': `weight` must be finite and from 0"),
        ({"path": "x.jsonl", "weight": float("inf")}, "`weight` must be finite"),
        ({"path": "x.jsonl", "weight": "half"}, "`weight` must be a number, got 'half'"),
        ({"path": "x.jsonl", "limit": 0}, "`limit` must be a whole number from 1 on, got 0"),
        ({"path": "x.jsonl", "limit": 1.5}, "`limit` must be a whole number"),
        ({"path": "x.jsonl", "colour": "red"}, "source 'mine': .* argument 'colour'"),
        ({}, "source 'mine': .* 'path'"),
        (None, "source 'mine': .* 'path'"),
        ("x.jsonl", "source 'mine' must be {path: ..., weight: ...}, got 'x.jsonl'"),
        ({"dataset": "helpsteer9"}, "`dataset` is 'helpsteer9'"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_a_setting_that_is_wrong_is_named_with_its_source(settings, message):
    with pytest.raises(ValueError, match=message):
        mixed(mine=settings)


def test_a_mixture_of_nothing_is_refused():
    with pytest.raises(ValueError, match="`sources` is empty"):
        mixed()


def test_a_bad_row_is_named_by_its_own_file(folder):
    (folder / "mine" / "b.jsonl").write_text(json.dumps(native(3, ratings={"clarity": 7})))
    with pytest.raises(DataError, match=r"b.jsonl:1: rating 7.* of 'clarity' is outside"):
        mixed(mine={"path": str(folder / "mine")})


def test_the_files_to_watch_are_those_that_rows_are_read_from(tmp_path):
    def touch(name):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        return tmp_path / name

    deep, flat = touch("steer/preference/train.jsonl"), touch("mine/a.jsonl")
    touch("mine/run/scores.jsonl")
    steer, mine = str(tmp_path / "steer"), str(tmp_path / "mine")

    def watched(kind, **section):
        files = section_files(section, kind=kind)
        return [file.name if "builtin" in str(file) else file for file in files]

    native = {"_target_": "armo.data.sources.stream_pairs", "path": [mine, "builtin"]}
    published = {"_target_": "armo.data.adapters.ratings.stream_adapted_ratings", "path": steer}
    assert watched("lists", _target_=None, path=None) == []
    assert watched("pairs", **native) == [flat, "preferences.jsonl.gz"], "not what is deeper"
    assert watched("ratings", **published) == [deep]
    assert watched("ratings", _target_="my_sets.stream_tickets", path="my-team/tickets") == []
    assert watched("ratings", _target_="my_sets.stream_other") == []
    sources = {
        "helpsteer2": {"path": steer},
        "ultrafeedback": None,
        "other": {"dataset": "helpsteer", "path": "nvidia/HelpSteer"},
        "mine": {"path": mine},
    }
    assert watched("ratings", _target_="x", sources=sources) == [deep, flat]
