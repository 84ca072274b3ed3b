"""Rows that something is wrong with: refused by name, or left out and counted."""

import gzip
import json
import logging
import math
import random
import re
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armo.data.conversation import Conversation
from armo.data.objectives import Objective, ObjectiveSet
from armo.data.sources import (
    DataError,
    load_scorable,
    stream_lists,
    stream_pairs,
    stream_ranked_lists,
    stream_ratings,
)

OBJECTIVES = ObjectiveSet((Objective("honesty", 1, 5), Objective("safety", 1, 5)))
USER = {"role": "user", "content": "How do I boil an egg?"}
ANSWER = {"role": "assistant", "content": "In wäter."}
COMMON = {"id": "a", "source": "s", "category": "food", "split": "train", "weight": 2.0}
ROWS = {
    "ratings": {**COMMON, "messages": [USER, ANSWER], "ratings": {"honesty": 4, "safety": None}},
    "pairs": {
        **{**COMMON, "prompt": [USER], "chosen": "In wäter.", "rejected": "No."},
        **{"margin": 1.5, "preference": 0.75, "judgements": {"honesty": 0.5}},
    },
    "lists": {**COMMON, "prompt": [USER], "responses": ["yes", "no"], "correct": [0]},
    "ranked": {**COMMON, "prompt": [USER], "responses": ["yes", "no"], "ranks": [2, 1.5]},
}


def stream(kind, path, **options):
    if kind == "ratings":
        return stream_ratings(path, objectives=OBJECTIVES, **options)
    if kind == "pairs":
        return stream_pairs(path, objectives=OBJECTIVES, **options)
    return {"lists": stream_lists, "ranked": stream_ranked_lists}[kind](path, **options)


def said(row):
    """What a row says, spelt as its line would be."""
    turns = [{"role": turn.role, "content": turn.content} for turn in row.prompt]
    told = {"id": row.id, "source": row.source, "category": row.category, "split": row.split}
    told |= {"weight": row.weight, "prompt": turns}
    for name in ("chosen", "rejected", "margin", "preference", "judgements", "ratings"):
        if hasattr(row, name):
            told[name] = getattr(row, name)
    for name in ("correct", "ranks"):
        if getattr(row, name, None) is not None:
            told[name] = list(getattr(row, name))
    return told | {"responses": list(row.responses)}


def written(raw):
    """The same, of a line as it is, without any of armo's code."""
    told = {name: raw.get(name) for name in ("id", "source", "split")}
    told |= {"category": raw.get("category") or ""}
    told |= {"weight": 1.0 if raw.get("weight") is None else raw["weight"]}
    prompt = raw.get("prompt")
    if "messages" in raw:
        *prompt, answer = raw["messages"]
        told["responses"] = [answer["content"]]
    elif "chosen" in raw:
        told["responses"] = [raw["chosen"], raw["rejected"]]
        told |= {"chosen": raw["chosen"], "rejected": raw["rejected"], "margin": raw.get("margin")}
        told["preference"] = 1.0 if raw.get("preference") is None else raw["preference"]
    else:
        told["responses"] = raw["responses"]
    told["prompt"] = [{"role": turn["role"], "content": turn["content"]} for turn in prompt]
    for name in ("ratings", "judgements"):
        if name in raw or (name == "judgements" and "chosen" in raw):
            given = (raw.get(name) or {}).items()
            told[name] = {objective: value for objective, value in given if value is not None}
    for name in ("correct", "ranks"):
        if raw.get(name) is not None:
            told[name] = raw[name]
    return told


# --- a fuzzer ------------------------------------------------------------------------------------

NASTY = (
    *(None, True, False, 0, -1, 3, 1e308, 10**400, -0.0, math.nan, math.inf, -math.inf, 1e-320),
    *("", " ", "\x00", "\x1b[31m", "\u2028", "\ud800", "null", "NaN", "assistant", "user", "test"),
    *([], {}, [[]], [None], [{}], [USER], [ANSWER], {"honesty": "4"}, {"other": 3}, [0, 5], [0.5]),
)


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(each, (*path, key))


def changed(raw, rng):
    """A row with one value replaced, dropped, or under another name."""
    raw = json.loads(json.dumps(raw))
    path = rng.choice([path for path in places(raw) if path])
    holder = raw
    for key in path[:-1]:
        holder = holder[key]
    what = rng.randrange(4)
    if what == 0:
        del holder[path[-1]]
    elif what == 1 and isinstance(holder, dict):
        holder[f"{path[-1]}s"] = holder.pop(path[-1])
    else:
        holder[path[-1]] = rng.choice(NASTY)
    return json.dumps(raw).encode()


def scrambled(line, rng):
    """A line with some bytes dropped, doubled or replaced."""
    line = bytearray(line)
    for _ in range(rng.randrange(1, 4)):
        start = rng.randrange(len(line))
        stop = start + rng.randrange(6)
        line[start:stop] = rng.choice(
            [b"", bytes(rng.randbytes(2)), line[start:stop] * 2, b"\xff\xfe", b'"', b"\\ud800"]
        )
    return bytes(line)


def doubled(raw, rng):
    """A row with one key twice, at any depth."""
    text = json.dumps(raw)
    name = rng.choice(re.findall(r'"\w+": ', text))
    return text.replace(name, name + "1, " + name, 1).encode()


def monstrous(raw, rng):
    """A row that is deep, long, or has a number of thousands of digits."""
    name = rng.choice(list(raw))
    depth = rng.choice([50, 900, 995, 5_000, 100_000])
    value = rng.choice(["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "9" * 5000])
    return json.dumps({**raw, name: "HERE"}).replace('"HERE"', value).encode()


def fuzzed(raw, rng):
    line = json.dumps(raw, ensure_ascii=False).encode()
    kind = rng.randrange(20)
    if kind < 10:
        return changed(raw, rng)
    if kind < 16:
        return scrambled(line, rng)
    return monstrous(raw, rng) if kind == 16 else doubled(raw, rng)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize("kind", ROWS)
def test_fuzzed_rows_are_what_their_lines_say_or_one_error_that_names_the_line(
    tmp_path, kind, suffix
):
    """1,250 rows of each kind and format, 10,000 in all, every second of them fuzzed."""
    rng = random.Random(f"{kind} {suffix}")
    lines = []
    for number in range(1250):
        raw = {**ROWS[kind], "id": f"row {number}"}
        lines.append(json.dumps(raw).encode() if number % 2 else fuzzed(raw, rng))
    path = tmp_path / f"rows.{suffix}"
    content = b"\n".join(lines)
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    errors = []
    rows = list(stream(kind, str(path), on_bad_row=errors.append))
    lines = content.split(b"\n")
    assert len(rows) + len(errors) == sum(bool(line.strip()) for line in lines)
    assert 150 < len(errors) < 700
    for error in errors:
        assert re.match(rf"{re.escape(str(path))}:\d+: \S", str(error)), error
        assert "\n" not in str(error)
        assert len(str(error)) < len(str(path)) + 600
    read = set()
    for row in rows:
        number = int(row.place.removeprefix(f"{path}:"))
        raw = json.loads(lines[number - 1].decode("utf-8-sig"))
        assert said(row) == written(raw), lines[number - 1]
        read.add(raw["id"])
    assert {f"row {number}" for number in range(1, 1250, 2)} <= read
    with pytest.raises(DataError, match=re.escape(str(errors[0]))):
        list(stream(kind, str(path)))


@pytest.mark.parametrize("kind", ROWS)
def test_a_text_of_ten_megabytes_is_read_whole(tmp_path, kind):
    path, text = tmp_path / "rows.jsonl", "wörd " * 2_000_000
    raw = json.loads(json.dumps(ROWS[kind]).replace("boil an egg", "HERE"))
    turns = raw["messages" if kind == "ratings" else "prompt"]
    turns[0]["content"] = text
    path.write_text(json.dumps(raw) + "\n")
    [row] = stream(kind, str(path))
    assert row.prompt[0].content == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(data=st.data(), kind=st.sampled_from(list(ROWS)))
def test_whatever_a_field_holds_is_read_as_it_is_or_refused(tmp_path_factory, data, kind):
    field = data.draw(st.sampled_from(list(ROWS[kind])))
    raw = {**ROWS[kind], field: data.draw(JSON)}
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text(json.dumps(raw) + "\n")
    errors, rows = [], []
    with suppress(DataError):  # no rows, where all of them are bad
        rows.extend(stream(kind, str(path), on_bad_row=errors.append))
    assert len(rows) + len(errors) == 1
    if rows:
        assert said(rows[0]) == written(json.loads(json.dumps(raw)))
        assert load_scorable(str(path))[0].responses == rows[0].responses
    assert all(str(error).startswith(f"{path}:1: ") for error in errors)


@given(content=st.binary(max_size=60))
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet", "rows.csv"])
def test_whatever_a_file_holds_is_rows_or_one_error(tmp_path_factory, name, content):
    path = tmp_path_factory.mktemp("rows") / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.") as error:
        list(stream_pairs(str(path)))
    assert "\n" not in str(error.value)


# --- what becomes of them -----------------------------------------------------------------------


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_left_out_are_counted_and_the_first_are_named(tmp_path, caplog):
    rows = [{**ROWS["pairs"], "id": str(k)} for k in range(20)]
    for k in range(3, 11):
        rows[k]["chosen"] = k
    path = write(tmp_path / "rows.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        read = list(stream_pairs(path, on_bad_row="skip"))
    assert [row.id for row in read] == [str(k) for k in range(20) if not 3 <= k < 11]
    [message] = caplog.messages
    assert f"{path}: left out 8 of 20 rows that cannot be used: {path}:4: field `chosen`" in message
    assert f"{path}:8: " in message
    assert f"{path}:9: " not in message
    assert message.endswith("; and 3 more")


def test_nothing_is_said_where_nothing_is_left_out(tmp_path, caplog):
    path = write(tmp_path / "rows.jsonl", [ROWS["pairs"]])
    assert len(list(stream_pairs(path, on_bad_row="skip"))) == 1
    assert not caplog.messages


@pytest.mark.parametrize("how", ["skip", lambda error: None])
def test_a_row_whose_id_has_been_left_out_is_no_duplicate(tmp_path, how):
    rows = [{**ROWS["pairs"], "chosen": 1}, ROWS["pairs"], ROWS["pairs"]]
    path = write(tmp_path / "rows.jsonl", rows)
    assert [row.place for row in stream_pairs(path, on_bad_row=how)] == [f"{path}:2"]


def test_a_file_of_bad_rows_alone_is_an_error(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{**ROWS["pairs"], "chosen": 1}])
    with pytest.raises(DataError, match=r"no rows that can be used; .*rows\.jsonl:1: field `chos"):
        list(stream_pairs(path, on_bad_row="skip"))


def test_a_table_row_that_does_not_fit_its_header_is_left_out(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen,rejected\nWhy?,a,b\nWhy,then?,a,b\nHow?,c,d\n")
    errors = []
    rows = list(stream_pairs(str(path), on_bad_row=errors.append))
    assert [row.place for row in rows] == [f"{path} row 2", f"{path} row 4"]
    assert [str(error).partition(";")[0] for error in errors] == [
        f"{path} row 3: 4 cells under 3 columns"
    ]


@pytest.mark.usefixtures("no_type_checks")
def test_another_word_for_it_is_an_error(tmp_path):
    path = write(tmp_path / "rows.jsonl", [ROWS["pairs"]])
    with pytest.raises(ValueError, match="`on_bad_row` must be error or skip, got 'ignore'"):
        list(stream_pairs(path, on_bad_row="ignore"))


def test_a_key_that_stands_twice_is_named_wherever_it_is(tmp_path):
    line = json.dumps(ROWS["ratings"]).replace('"honesty": 4', '"honesty": 4, "honesty": 2')
    (tmp_path / "rows.jsonl").write_text(line)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: key 'honesty' stands twice in one object"):
        list(stream("ratings", str(tmp_path / "rows.jsonl")))


def test_one_line_in_another_encoding_does_not_cost_the_others(tmp_path):
    line = json.dumps(ROWS["ratings"], ensure_ascii=False)
    content = [line.replace('"a"', f'"{k}"').encode() for k in "012"]
    content[1] = line.replace('"a"', '"1"').encode("latin-1")
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(content))
    errors = []
    rows = list(stream("ratings", str(tmp_path / "rows.jsonl"), on_bad_row=errors.append))
    assert [row.id for row in rows] == ["0", "2"]
    assert rows[0].conversation == Conversation(rows[1].prompt, "In wäter.")
    assert "rows.jsonl:2: unreadable" in str(errors[0])
