import gc
import json
import math
import time
import tracemalloc
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armo.data.checks import GroupSplits
from armo.data.conversation import (
    Conversation,
    Message,
    PreferencePair,
    RatedResponse,
    ResponseList,
    prompt_group,
)
from armo.data.objectives import Objective, ObjectiveSet
from armo.data.sources import DataError
from armo.embed.boundary import PromptGroup
from armo.embed.index import PROMPTS, RESPONSES, RowIndexer, TextSpool, spans

OBJECTIVES = ObjectiveSet(
    (Objective("honesty", 1, 5), Objective("harm", 0, 10, higher_is_better=False))
)
# Of few texts, so that they come back: in other rows, other kinds of rows, and other prompts.
QUESTIONS = ("Is it so?", "is it  SO?", "Why?", "Who\nwas it?", "¿Cuándo?", "\u2028When?")
ANSWERS = ("Yes.", "No.", "yes.", "Yes.\n", '{"text": "Yes."}', "So\u2028so.", "🦊" * 3)
SPLITS = st.sampled_from((None, "train", "test"))


@st.composite
def plans(draw):
    """Of data sets in no order: per kind, what each row is made of.

    Rows of one group agree on their split. Rows are made by `build`, in the test.
    """
    split_of = {" ".join(text.casefold().split()): draw(SPLITS) for text in QUESTIONS}

    def row(kind, number, **fields):
        question = draw(st.sampled_from(QUESTIONS))
        split = split_of[" ".join(question.casefold().split())] if draw(st.booleans()) else None
        category = draw(st.sampled_from(("", "facts", "advice")))
        brief = draw(st.booleans())
        source = draw(st.sampled_from(("s", "raters", "a judge")))
        weight = draw(st.sampled_from((1.0, 0.0, 2.5)))
        return (
            {"id": f"{kind}{number}", "brief": brief, "question": question}
            | fields
            | {"split": split, "category": category, "source": source, "weight": weight}
        )

    answer = st.sampled_from(ANSWERS)
    rated = st.fixed_dictionaries(
        {}, optional={"honesty": st.integers(1, 5), "harm": st.integers(0, 10)}
    )
    judged = st.fixed_dictionaries(
        {}, optional={"honesty": st.floats(0, 1), "harm": st.sampled_from((0.0, 0.5, 1.0))}
    )
    two = st.tuples(answer, answer).filter(lambda pair: pair[0].strip() != pair[1].strip())
    preference = st.sampled_from((1.0, 0.5)) | st.floats(0.5, 1.0)
    margin = st.none() | st.floats(0.0, 9.0)

    def listed(kind, number, *, least):
        responses = tuple(draw(st.lists(answer, min_size=least, max_size=3)))
        size = len(responses)
        ranks = st.lists(st.sampled_from((-1.0, 0.0, 1.5, 2.0)), min_size=size, max_size=size)
        order = {"ranks": tuple(draw(ranks))}
        if draw(st.booleans()):
            order = {"correct": tuple(draw(st.sets(st.integers(0, size - 1))))}
        return row(kind, number, responses=responses, order=order)

    return (
        [
            row("r", number, response=draw(answer), ratings=draw(rated))
            for number in range(draw(st.integers(0, 8)))
        ],
        [
            row(
                "p",
                number,
                pair=draw(two),
                judgements=draw(judged),
                preference=draw(preference),
                margin=draw(margin),
            )
            for number in range(draw(st.integers(0, 8)))
        ],
        [listed("l", number, least=2) for number in range(draw(st.integers(0, 6)))],
        [listed("b", number, least=1) for number in range(draw(st.integers(0, 6)))],
    )


def build(plan):
    """Make the rated rows, pairs, lists to train on and lists of the benchmark of a plan."""
    ratings, pairs, lists, benchmark = [], [], [], []
    for kind in plan:
        for row in kind:
            fields = {name: row[name] for name in ("id", "category", "split", "source", "weight")}
            system = (Message("system", "Be brief."),) if row["brief"] else ()
            prompt = (*system, Message("user", row["question"]))
            if "response" in row:
                talk = Conversation(prompt, row["response"])
                fields |= {"ratings": row["ratings"]}
                ratings.append(RatedResponse(conversation=talk, **fields))
            elif "pair" in row:
                chosen, rejected = row["pair"]
                fields |= {name: row[name] for name in ("judgements", "preference", "margin")}
                pair = PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, **fields)
                pairs.append(pair)
            else:
                fields |= row["order"]
                listed = ResponseList(prompt=prompt, responses=row["responses"], **fields)
                (benchmark if kind is plan[3] else lists).append(listed)
    return ratings, pairs, lists, benchmark


def index(folder, ratings=(), pairs=(), lists=(), benchmark=(), *, test_fraction=0.4):
    indexer = RowIndexer(folder, OBJECTIVES, test_fraction=test_fraction)
    indexer.add_ratings(ratings)
    indexer.add_pairs(pairs)
    indexer.add_lists(lists)
    indexer.add_benchmark(benchmark)
    return indexer.finish()


class Slow:
    """The same numbers, found with lists and dictionaries of texts."""

    def __init__(self, ratings, pairs, lists, benchmark, *, test_fraction=0.4):
        splits = GroupSplits(test_fraction)
        rows = [*ratings, *pairs, *lists, *benchmark]
        groups = {prompt_group(row.prompt): splits.add(row) for row in rows}
        self.test = splits.test()
        kept = [row for row in benchmark if self.test[groups[prompt_group(row.prompt)]]]
        self.lists = [*lists, *kept]
        texts = {}
        for row in [*ratings, *pairs, *self.lists]:
            for response in row.responses:
                texts.setdefault(row.prompt, {}).setdefault(response, row.id)
        self.prompts = list(texts)
        self.group_of_prompt = [groups[prompt_group(prompt)] for prompt in texts]
        self.responses = [(prompt, text) for prompt in texts for text in texts[prompt]]
        self.rows = [texts[prompt][text] for prompt, text in self.responses]

    def numbers(self, rows):
        return [self.responses.index((row.prompt, text)) for row in rows for text in row.responses]


def rate(question, answer, *, id="r", **ratings):
    return RatedResponse(id, "s", Conversation((Message("user", question),), answer), ratings)


@given(plans())
def test_every_row_finds_its_own_text(tmp_path_factory, plan):
    ratings, pairs, *_ = rows = build(plan)
    spool, found = index(tmp_path_factory.mktemp("texts"), *rows)
    slow = Slow(*rows)
    columns = (
        (found.ratings_response, [(row, row.responses[0]) for row in ratings]),
        (found.pairs_chosen, [(row, row.chosen) for row in pairs]),
        (found.pairs_rejected, [(row, row.rejected) for row in pairs]),
        (found.lists_response, [(row, text) for row in slow.lists for text in row.responses]),
    )
    for numbers, expected in columns:
        texts = [text for text, _ in spool.responses(numbers.tolist())]
        assert texts == [text for _, text in expected]
        for number, (row, _) in zip(spool.prompt_of_response[numbers], expected, strict=True):
            assert spool.prompt(int(number)) == row.prompt


@given(plans())
def test_numbers_are_those_of_the_slow_way(tmp_path_factory, plan):
    ratings, pairs, *_ = rows = build(plan)
    spool, found = index(tmp_path_factory.mktemp("texts"), *rows)
    slow = Slow(*rows)
    assert found.ratings_response.tolist() == slow.numbers(ratings)
    chosen_rejected = torch.stack([found.pairs_chosen, found.pairs_rejected], dim=1)
    assert chosen_rejected.flatten().tolist() == slow.numbers(pairs)
    assert found.lists_response.tolist() == slow.numbers(slow.lists)
    assert found.group_of_prompt.tolist() == slow.group_of_prompt
    assert found.test_of_group.tolist() == slow.test
    assert [spool.prompt(k) for k in range(len(spool.prompt_offsets))] == slow.prompts
    texts = [text for _, text in slow.responses]
    assert spool.responses(range(len(texts))) == list(zip(texts, slow.rows, strict=True))
    of = [slow.prompts.index(prompt) for prompt, _ in slow.responses]
    assert spool.prompt_of_response.tolist() == of


@given(plans())
def test_distinct_texts_are_written_once_and_side_by_side(tmp_path_factory, plan):
    rows = build(plan)
    folder = tmp_path_factory.mktemp("texts")
    spool, found = index(folder, *rows)
    every = [(row.prompt, text) for kind in rows for row in kind for text in row.responses]
    # A benchmark's lists that are dropped were written before it was known: once as well.
    assert len((folder / PROMPTS).read_bytes().splitlines()) == len({p for p, _ in every})
    assert len((folder / RESPONSES).read_bytes().splitlines()) == len(set(every))
    # Of the texts that are used, none is there twice, and the numbers have no gap.
    of = spool.prompt_of_response.tolist()
    texts = [text for text, _ in spool.responses(range(len(of)))]
    assert len(set(zip(of, texts, strict=True))) == len(of)
    assert of == sorted(of)
    assert set(of) == set(range(len(spool.prompt_offsets)))
    used = torch.cat(
        [found.ratings_response, found.pairs_chosen, found.pairs_rejected, found.lists_response]
    )
    assert set(used.tolist()) == set(range(len(of)))


@given(plans())
def test_rows_keep_the_order_of_their_files(tmp_path_factory, plan):
    ratings, pairs, lists, benchmark = rows = build(plan)
    _, found = index(tmp_path_factory.mktemp("texts"), *rows)
    slow = Slow(*rows)
    expected = [
        [
            o.to_unit(row.ratings[o.name]) if o.name in row.ratings else math.nan
            for o in OBJECTIVES.objectives
        ]
        for row in ratings
    ]
    table = torch.tensor(expected, dtype=torch.float64).reshape(len(ratings), 2)
    torch.testing.assert_close(found.ratings, table, equal_nan=True, rtol=0, atol=0)
    names = found.categories
    assert list(names) == sorted({row.category for row in [*pairs, *lists, *benchmark]})
    assert [names[k] for k in found.pairs_category] == [row.category for row in pairs]
    assert [names[k] for k in found.lists_category] == [row.category for row in slow.lists]
    assert found.lists_of.tolist() == [k for k, r in enumerate(slow.lists) for _ in r.responses]
    assert found.unused_lists == len(lists) + len(benchmark) - len(slow.lists)


@given(plans())
def test_weights_sources_and_judgements_keep_their_rows(tmp_path_factory, plan):
    ratings, pairs, *_ = rows = build(plan)
    _, found = index(tmp_path_factory.mktemp("texts"), *rows)
    assert found.ratings_weight.tolist() == [row.weight for row in ratings]
    assert found.pairs_weight.tolist() == [row.weight for row in pairs]
    assert list(found.sources) == sorted({row.source for kind in rows for row in kind})
    assert [found.sources[k] for k in found.ratings_source] == [row.source for row in ratings]
    assert [found.sources[k] for k in found.pairs_source] == [row.source for row in pairs]
    expected = [[row.judgements.get(name, math.nan) for name in OBJECTIVES.names] for row in pairs]
    # As they are: that `chosen` is better means the good end, whichever end of the scale that is.
    table = torch.tensor(expected, dtype=torch.float64).reshape(len(pairs), 2)
    torch.testing.assert_close(found.pairs_judgements, table, equal_nan=True, rtol=0, atol=0)


@given(plans())
def test_preferences_and_margins_keep_their_pairs(tmp_path_factory, plan):
    _, pairs, *_ = rows = build(plan)
    _, found = index(tmp_path_factory.mktemp("texts"), *rows)
    assert found.pairs_preference.dtype == found.pairs_margin.dtype == torch.float64
    assert found.pairs_preference.tolist() == [row.preference for row in pairs]
    margins = [None if value != value else value for value in found.pairs_margin.tolist()]
    assert margins == [row.margin for row in pairs]


@given(plans())
def test_ranks_weights_and_sources_keep_their_lists(tmp_path_factory, plan):
    *_, lists, benchmark = rows = build(plan)
    _, found = index(tmp_path_factory.mktemp("texts"), *rows)
    slow = Slow(*rows)
    expected = [
        row.ranks[k] if row.ranks is not None else (0.0 if k in row.correct else 1.0)
        for row in slow.lists
        for k in range(len(row.responses))
    ]
    assert found.lists_rank.dtype == found.lists_weight.dtype == torch.float64
    assert found.lists_rank.tolist() == expected
    assert found.lists_weight.tolist() == [row.weight for row in slow.lists]
    assert [found.sources[k] for k in found.lists_source] == [row.source for row in slow.lists]
    assert found.lists_benchmark.tolist() == [row.id.startswith("b") for row in slow.lists]
    # What is to be trained on stays on either side; a benchmark on the test side alone.
    assert int((~found.lists_benchmark).sum()) == len(lists)
    assert int(found.lists_benchmark.sum()) == len(benchmark) - found.unused_lists


@pytest.mark.parametrize("kind", ["ratings", "pairs"])
def test_a_row_on_an_objective_that_is_not_declared_is_named(tmp_path, kind):
    rows = {
        "ratings": [rate("Why?", "Yes.", id="odd", humour=1)],
        "pairs": [
            PreferencePair(
                "odd", "s", (Message("user", "Why?"),), "Yes.", "No.", judgements={"humour": 1.0}
            )
        ],
    }
    with pytest.raises(DataError, match=r"row 'odd': objective 'humour' is not declared"):
        index(tmp_path, **{kind: rows[kind]})


def test_a_benchmark_on_training_prompts_is_not_embedded_and_lists_to_train_on_are(tmp_path):
    listed = [
        ResponseList("l0", "s", (Message("user", "Why?"),), ("A.", "B."), split="train"),
        ResponseList("l1", "s", (Message("user", "Who?"),), ("C.", "D."), split="test"),
        ResponseList("l2", "s", (Message("user", "When?"),), ("E.", "F."), split="train"),
    ]
    rated = [rate("Why?", "A.", honesty=3)]
    spool, found = index(tmp_path / "benchmark", rated, (), (), listed)
    assert found.unused_lists == 2
    assert [text for text, _ in spool.responses(range(3))] == ["A.", "C.", "D."]
    assert len(spool.response_offsets) == 3
    assert len(spool.prompt_offsets) == 2
    assert found.lists_of.tolist() == [0, 0]
    spool, found = index(tmp_path / "lists", rated, (), listed)
    assert found.unused_lists == 0
    assert len(spool.response_offsets) == 6
    assert found.lists_of.tolist() == [0, 0, 1, 1, 2, 2]


def test_benchmark_rows_that_ask_what_training_rows_ask_are_named(tmp_path, caplog):
    listed = [
        ResponseList(
            f"l{k}", "s", (Message("user", asked),), ("A.", "B."), split="train", place=f"b:{k}"
        )
        for k, asked in enumerate(["WHY?", "Who?", "Why ?", " why?", "When?"], start=1)
    ]
    index(tmp_path, [rate("Why?", "A.", honesty=3), rate("Who?", "A.", honesty=3)], (), (), listed)
    [message] = caplog.messages
    assert message == (
        "3 lists of the benchmark ask what training rows ask, and are left out: b:1; b:2; b:4"
    )
    caplog.clear()
    index(tmp_path / "other", [rate("Where?", "A.", honesty=3)], (), (), listed)
    assert not caplog.messages


def test_the_row_of_a_text_is_the_first_that_has_it(tmp_path):
    rated = [rate("Why?", "Yes.", id="first"), rate("Why?", "Yes.", id="second")]
    spool, _ = index(tmp_path, rated)
    assert spool.responses([0]) == [("Yes.", "first")]


def test_no_rows_are_an_index_of_nothing(tmp_path):
    spool, found = index(tmp_path)
    assert spool.shards(shard_rows=4) == ()
    assert found.ratings.shape == (0, 2)
    assert found.categories == ()


# Shards


def rows_of(counts, *, mark=""):
    """One rated row per response, `counts[k]` of them to prompt `k`, every text its own."""
    return [
        rate(f"Question {k}{mark}", f"Answer {k}-{n}{mark}", id=f"r{k}-{n}", honesty=3)
        for k, count in enumerate(counts)
        for n in range(count)
    ]


COUNTS = st.lists(st.integers(1, 7), min_size=1, max_size=20)


@given(COUNTS, st.integers(1, 12))
def test_shards_hold_every_prompt_once_with_all_its_responses(tmp_path_factory, counts, shard_rows):
    spool, _ = index(tmp_path_factory.mktemp("texts"), rows_of(counts))
    shards = spool.shards(shard_rows=shard_rows)
    prompts = [number for prompts, _ in spans(shards) for number in prompts]
    responses = [number for _, responses in spans(shards) for number in responses]
    assert prompts == list(range(len(counts)))
    assert responses == list(range(sum(counts)))
    starts = [0, *accumulate(counts)]
    for prompts, responses in spans(shards):
        assert (responses.start, responses.stop) == (starts[prompts.start], starts[prompts.stop])
        # No larger than asked for, but for the prompt that fills it; all but the last are full.
        assert len(responses) - counts[prompts[-1]] < shard_rows
        assert len(responses) >= shard_rows or prompts.stop == len(counts)


@given(COUNTS, st.integers(1, 12), st.data())
def test_a_changed_response_changes_the_digest_of_its_shard_alone(
    tmp_path_factory, counts, shard_rows, data
):
    rows = rows_of(counts)
    number = data.draw(st.integers(0, len(rows) - 1))
    changed = rows.copy()
    changed[number] = rate(rows[number].prompt[0].content, "corrected", id="other", harm=1)
    before, after = shards_of(tmp_path_factory, shard_rows, rows, changed)
    # One prompt's rows stand together here, so that a row's number is its response's.
    for (_, responses), old, new in zip(spans(before), before, after, strict=True):
        assert (old.prompts, old.responses) == (new.prompts, new.responses)
        assert (old.texts != new.texts) == (number in responses)


@given(COUNTS, st.integers(1, 12), st.data())
def test_a_changed_prompt_changes_the_digest_of_its_shard_alone(
    tmp_path_factory, counts, shard_rows, data
):
    number = data.draw(st.integers(0, len(counts) - 1))
    text = f"Question {number}"
    changed = [
        rate("Corrected", row.responses[0], id=row.id) if row.prompt[0].content == text else row
        for row in rows_of(counts)
    ]
    before, after = shards_of(tmp_path_factory, shard_rows, rows_of(counts), changed)
    for (prompts, _), old, new in zip(spans(before), before, after, strict=True):
        assert (old.texts != new.texts) == (number in prompts)


@given(COUNTS, st.integers(1, 12))
def test_what_is_no_text_changes_no_digest(tmp_path_factory, counts, shard_rows):
    rows = rows_of(counts)
    changed = [
        RatedResponse(f"new {k}", "other", row.conversation, {"harm": 2}, "category", "test")
        for k, row in enumerate(rows)
    ]
    before, after = shards_of(tmp_path_factory, shard_rows, rows, changed)
    assert before == after


@given(st.data())
def test_a_prompt_that_parts_into_two_changes_the_digest_of_its_shard_alone(tmp_path_factory, data):
    counts = [2] * 12
    number = data.draw(st.integers(0, 11))
    rows = rows_of(counts)
    changed = rows.copy()
    # The second answer to a question turns out to be one to another question.
    changed[2 * number + 1] = rate("Corrected", f"Answer {number}-1", id=f"r{number}-1")
    before, after = shards_of(tmp_path_factory, 4, rows, changed)
    differing = [k for k, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    assert differing == [number // 2]


def test_a_list_that_is_dropped_changes_no_digest(tmp_path_factory):
    rows = rows_of([2] * 6)
    prompt = (Message("user", "Question 0"),)
    tested = ResponseList("l", "s", (Message("user", "Tested"),), ("A.", "B."), split="test")
    dropped = ResponseList("d", "s", prompt, ("A.", "B."), split="train")
    plain, _ = index(tmp_path_factory.mktemp("texts"), rows, (), (), [tested])
    more, found = index(tmp_path_factory.mktemp("texts"), rows, (), (), [dropped, tested])
    assert found.unused_lists == 1
    assert plain.shards(shard_rows=4) == more.shards(shard_rows=4)


def test_responses_that_change_prompts_change_the_digest(tmp_path_factory):
    rows = [("A?", "1"), ("A?", "2"), ("B?", "3")]
    moved = [("A?", "1"), ("B?", "2"), ("B?", "3")]
    first, second = shards_of(
        tmp_path_factory, 8, [rate(*row) for row in rows], [rate(*row) for row in moved]
    )
    assert [(s.prompts, s.responses) for s in first] == [(s.prompts, s.responses) for s in second]
    assert first != second


def shards_of(tmp_path_factory, shard_rows, *data):
    spools = [index(tmp_path_factory.mktemp("texts"), ratings)[0] for ratings in data]
    return [spool.shards(shard_rows=shard_rows) for spool in spools]


# What is on disk

NASTY = {
    "lines": "one\ntwo\r\nthree\rfour\n\n",
    "separators": "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\x1dh\x1ei",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \U0010ffff",
    "controls": "\x00\x01\x07\x08\x1b[31m\x7f\x80",
    "quotes": '"\\\\" \\n \\u0041 {"text": "x"}\t',
    "right to left": "\u202eabc\u202c שלום",
    "marks": "\ufeffx\ufffe\uffff",
    "a megabyte": "lang 🦊\n" * (1024 * 1024 // 10),
}


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_nasty_text_comes_back_as_it_was(tmp_path, text):
    prompt = (Message("system", text), Message("user", text))
    rows = [
        RatedResponse("before", "s", Conversation((Message("user", "Why?"),), "Yes."), {}),
        RatedResponse("nasty\n\u2028", "s", Conversation(prompt, text), {}),
        RatedResponse("after", "s", Conversation(prompt, text + "."), {}),
    ]
    index(tmp_path, rows)
    spool = TextSpool.load(tmp_path)
    assert spool.prompt(1) == prompt
    assert spool.responses([2, 0, 1]) == [
        (text + ".", "after"),
        ("Yes.", "before"),
        (text, "nasty\n\u2028"),
    ]
    groups = spool.groups(range(2), range(3))
    assert groups[1] == PromptGroup(prompt, (text, text + "."))


@given(st.lists(st.text(min_size=1), min_size=1, max_size=6))
def test_any_text_comes_back_as_it_was(tmp_path_factory, texts):
    texts = [text for text in texts if text.strip()]
    rows = [rate(text, text, id=text) for text in texts]
    spool, found = index(tmp_path_factory.mktemp("texts"), rows)
    expected = [(text, text) for text in texts]
    assert spool.responses(found.ratings_response.tolist()) == expected


@given(plans())
def test_a_spool_is_the_same_when_it_is_loaded(tmp_path_factory, plan):
    folder = tmp_path_factory.mktemp("texts")
    spool, _ = index(folder, *build(plan))
    loaded = TextSpool.load(folder)
    assert loaded.shards(shard_rows=3) == spool.shards(shard_rows=3)
    assert torch.equal(loaded.response_bytes, spool.response_bytes)
    for prompts, responses in spans(spool.shards(shard_rows=3)):
        groups = loaded.groups(prompts, responses)
        assert [group.prompt for group in groups] == [spool.prompt(k) for k in prompts]
        texts = [text for group in groups for text in group.responses]
        assert texts == [text for text, _ in spool.responses(responses)]


@given(COUNTS)
def test_the_work_of_a_response_is_its_text_and_its_prompts(tmp_path_factory, counts):
    rows = rows_of(counts, mark=" é🦊")
    spool, _ = index(tmp_path_factory.mktemp("texts"), rows)
    for number, row in enumerate(rows):
        line = json.dumps({"row": row.id, "text": row.responses[0]}, ensure_ascii=False) + "\n"
        prompt = json.dumps([["user", row.prompt[0].content]], ensure_ascii=False) + "\n"
        expected = len(line.encode()) + len(prompt.encode())
        assert int(spool.response_bytes[number]) == expected


def test_an_index_is_made_anew_in_the_same_folder(tmp_path):
    index(tmp_path, rows_of([3, 3, 3]))
    spool, _ = index(tmp_path, rows_of([1]))
    assert spool.responses([0]) == [("Answer 0-0", "r0-0")]
    assert len((tmp_path / RESPONSES).read_bytes().splitlines()) == 1


# Memory


@pytest.mark.usefixtures("no_type_checks")
def test_twenty_thousand_rows_stay_on_disk(tmp_path):
    rows, long = 20_000, "x" * 700

    def stream():
        for k in range(rows):
            yield rate(f"Question {k} {long}", f"Answer {k} {long}", id=f"r{k}", honesty=3)

    indexer = RowIndexer(tmp_path, OBJECTIVES, test_fraction=0.5)
    gc.collect()
    tracemalloc.start()
    indexer.add_ratings(stream())
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A prompt, a response and a rating per row, of 1,400 characters.
    assert kept / rows < 1000
    assert peak / rows < 1300  # for a moment, while a dictionary grows
    spool, _ = indexer.finish()
    assert len(spool.response_offsets) == rows
    assert spool.responses([rows - 1]) == [(f"Answer {rows - 1} {long}", f"r{rows - 1}")]


def test_a_stream_of_rows_is_read_once_and_in_order(tmp_path):
    seen = []

    def stream(rows):
        for row in rows:
            seen.append(row.id)
            yield row

    rows = rows_of([2, 1, 3])
    indexer = RowIndexer(tmp_path, OBJECTIVES, test_fraction=0.5)
    indexer.add_ratings(stream(rows))
    assert seen == [row.id for row in rows]
    _, found = indexer.finish()
    assert seen == [row.id for row in rows]
    assert all(a <= b for a, b in pairwise(found.ratings_response.tolist()))


@pytest.mark.usefixtures("no_type_checks")
def test_cutting_into_shards_takes_little_of_the_time_of_reading(tmp_path):
    rows = rows_of([1] * 20_000)
    begun = time.process_time()
    spool, _ = index(tmp_path, rows)
    read = time.process_time()
    spool.shards(shard_rows=1024)
    assert time.process_time() - read < (read - begun) / 4
