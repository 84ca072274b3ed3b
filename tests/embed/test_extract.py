import copy
import dataclasses
import io
import itertools
import logging
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import threading
import time
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.multiprocessing.spawn import ProcessRaisedException
from transformers import PreTrainedTokenizerFast

from armo.artifacts import ArtifactError, digest_file, read_json, write_json
from armo.data.conversation import (
    Conversation,
    Message,
    PreferencePair,
    RatedResponse,
    ResponseList,
)
from armo.data.objectives import Objective, ObjectiveSet
from armo.data.sources import DataError
from armo.data.surface import SURFACE_FEATURES, surface_features
from armo.embed import extract
from armo.embed.backbone import Backbone, load_backbone
from armo.embed.boundary import PromptGroup
from armo.embed.extract import EmbeddedData, Team, embed_rows
from armo.embed.index import RowIndexer
from armo.embed.spec import BackboneError, BackboneSpec
from armo.embed.store import Embeddings, EmbeddingStore

OBJECTIVES = ObjectiveSet(
    (
        Objective("honesty", 1, 5),
        Objective("harm", 0, 10, higher_is_better=False),
        Objective("verbosity", 0, 4, bias=True),
    )
)
EGG = (Message("user", "How do I boil an egg?"),)
BRIEF_EGG = (Message("system", "Be brief."), *EGG)
FOX = (Message("user", "Is the fox quick?"),)
DOG = (Message("user", "Is the dog lazy?"),)
SEVEN = "Put it in hot water for seven minutes."
LONG = "Warn of risks! " * 60
SPLITS = {EGG: "train", BRIEF_EGG: "train", FOX: "test", DOG: "train"}


def rate(id, prompt, response, *, split=None, **ratings):
    split = split or SPLITS.get(prompt)
    return RatedResponse(id, "raters", Conversation(prompt, response), ratings, split=split)


def pair(id, prompt, chosen, rejected, *, category):
    split = SPLITS.get(prompt)
    return PreferencePair(id, "raters", prompt, chosen, rejected, category=category, split=split)


# Prompts and responses come back in other rows, so that a row's number is not its text's number.
RATINGS = [
    rate("r0", EGG, SEVEN, honesty=5.0, harm=0.0),
    rate("r1", FOX, "No.", honesty=2.0, verbosity=1.0),
    rate("r2", EGG, "I cannot know.", harm=7.5),
    rate("r3", EGG, SEVEN, honesty=3.0, verbosity=4.0),
    rate("r4", BRIEF_EGG, SEVEN, harm=10.0),
    rate("r5", DOG, "- It **is**.\n- It sleeps!", honesty=1.0, harm=0.0, verbosity=0.0),
]
PAIRS = [
    pair("p0", FOX, "Yes, it jumps over the dog.", "No.", category="facts"),
    pair("p1", EGG, SEVEN, "I cannot know.", category="advice"),
    pair("p2", DOG, "Yes.", "- It **is**.\n- It sleeps!", category="facts"),
]
BENCHMARK = [
    ResponseList("l0", "raters", FOX, ("No.", "Yes.", "Warn the fox."), (1,), category="safety"),
    ResponseList("l1", "raters", EGG, (SEVEN, "Five words."), (0,), category="advice"),
    ResponseList("l2", "raters", FOX, ("Perhaps.", "No."), (0,), category="advice"),
]
USED_LISTS = [BENCHMARK[0], BENCHMARK[2]]  # the other is on a training prompt
ROWS = [*RATINGS, *PAIRS, *USED_LISTS]
PROMPTS = {row.prompt for row in ROWS}
CONVERSATIONS = {Conversation(row.prompt, text) for row in ROWS for text in row.responses}


class WatchedBackbone(Backbone):
    """Notes the shards it embeds, and gives up when it has embedded so many."""

    def __init__(self, backbone, *, shards=math.inf, **spec):
        super().__init__(
            dataclasses.replace(backbone.spec, **spec),
            model=backbone.model,
            tokenizer=backbone.tokenizer,
        )
        self.left = shards
        self.shards = []

    @property
    def prompts(self):
        return [group.prompt for shard in self.shards for group in shard]

    @property
    def conversations(self):
        groups = [group for shard in self.shards for group in shard]
        return [Conversation(group.prompt, text) for group in groups for text in group.responses]

    def embed_chunks(self, chunks, **options):
        read = []

        def reading():
            for chunk in chunks:
                read.append(chunk)
                yield chunk

        for number, embedded in enumerate(super().embed_chunks(reading(), **options)):
            if self.left == 0:
                raise RuntimeError("cut off")
            self.left -= 1
            self.shards.append(read[number])
            yield embedded


def embed(folder, backbone, *, ratings=RATINGS, pairs=PAIRS, benchmark=BENCHMARK, **options):
    defaults = {"test_fraction": 0.5, "min_ratings": 1, "shard_rows": 2, "team": Team("cpu")}
    embed_rows(
        folder,
        load=lambda device: backbone,
        objectives=OBJECTIVES,
        ratings=ratings,
        pairs=pairs,
        benchmark=benchmark,
        **{**defaults, **options},
    )
    return EmbeddedData.load(folder)


def embed_alone(backbone, prompt, response):
    """The embedding of a prompt and of a response to it, in a run of their own."""
    embedded = backbone.embed([PromptGroup(prompt, (response,))])
    return embedded.prompts.values[0], embedded.responses.values[0]


def corpus(prompts=16, *, answers=2):
    """Rated rows, pairs and a benchmark that share texts; every prompt fills a shard of two."""
    ratings, pairs, benchmark = [], [], []
    for k in range(prompts):
        prompt = (Message("user", f"Question {k}: is the fox {k} quick?"),)
        split = ("test", "train", "train", "train")[k % 4]
        texts = [f"Answer {k} {n}, " + "it warns of risks. " * (n + k % 5) for n in range(answers)]
        for n, text in enumerate(texts):
            rated = {"honesty": 1.0 + (k + n) % 5, "harm": k % 11, "verbosity": n % 5}
            ratings.append(rate(f"r{k}-{n}", prompt, text, split=split, **rated))
        fields = {"category": ("facts", "advice")[k % 2], "split": split}
        pairs.append(PreferencePair(f"p{k}", "s", prompt, texts[-1], texts[0], **fields))
        if split == "test":
            other = (texts[0], f"Else {k}.")
            benchmark.append(ResponseList(f"l{k}", "s", prompt, other, **fields))
    return {"ratings": ratings, "pairs": pairs, "benchmark": benchmark}


def digests(folder):
    """Digest of every file; a lock, which stays for the next run, is no part of the data."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): digest_file(path) for path in files}


def shard_digests(folder):
    return {path.name: digest_file(path) for path in folder.glob("shard-*.safetensors")}


def covariate_digests(folder):
    return {path.name: digest_file(path) for path in folder.glob("covariates-*.safetensors")}


def assert_same_files(folder, other):
    """The same bytes in every file, and the same tensors in them."""
    assert digests(folder) == digests(other)
    first, second = EmbeddedData.load(folder), EmbeddedData.load(other)
    for table in ("prompts", "responses"):
        every = torch.arange(getattr(first, table).rows)
        values = getattr(first, table).read(every), getattr(second, table).read(every)
        torch.testing.assert_close(*values, rtol=0, atol=0, equal_nan=True)
    for field in dataclasses.fields(first.tables):
        values = getattr(first.tables, field.name), getattr(second.tables, field.name)
        torch.testing.assert_close(*values, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(scope="module")
def folder(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embeddings")
    embed(folder, WatchedBackbone(encoder))
    return folder


@pytest.fixture(scope="module")
def data(folder):
    return EmbeddedData.load(folder)


@pytest.fixture(scope="module")
def undisturbed(encoder, tmp_path_factory):
    """The corpus, embedded in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    embed(folder, WatchedBackbone(encoder), **corpus())
    assert len(shard_digests(folder)) == 16
    return folder


@pytest.fixture(scope="module")
def columns(data):
    """For each column of response numbers, the conversations that it should point to."""
    tables = data.tables
    return {
        "ratings": (tables.ratings_response, [row.conversation for row in RATINGS]),
        "chosen": (tables.pairs_chosen, [Conversation(p.prompt, p.chosen) for p in PAIRS]),
        "rejected": (tables.pairs_rejected, [Conversation(p.prompt, p.rejected) for p in PAIRS]),
        "lists": (
            tables.lists_response,
            [Conversation(row.prompt, text) for row in USED_LISTS for text in row.responses],
        ),
    }


COLUMNS = pytest.mark.parametrize("column", ["ratings", "chosen", "rejected", "lists"])


@COLUMNS
def test_each_row_finds_the_embeddings_of_its_own_text(data, encoder, columns, column):
    numbers, conversations = columns[column]
    alone = [embed_alone(encoder, c.prompt, c.response) for c in conversations]
    prompts, responses = (torch.stack(parts) for parts in zip(*alone, strict=True))
    torch.testing.assert_close(data.responses.read(numbers), responses, atol=1e-5, rtol=0)
    torch.testing.assert_close(data.prompt_embeddings(numbers), prompts, atol=1e-5, rtol=0)


@COLUMNS
def test_a_shifted_or_dropped_row_would_be_noticed(data, encoder, columns, column):
    numbers, conversations = columns[column]
    responses = torch.stack([embed_alone(encoder, c.prompt, c.response)[1] for c in conversations])
    for wrong in (numbers.roll(1), torch.cat([numbers[1:], numbers[-1:]])):
        assert (data.responses.read(wrong) - responses).abs().max() > 1e-2


@COLUMNS
def test_each_row_finds_the_covariates_of_its_own_text(data, columns, column):
    numbers, conversations = columns[column]
    measured = torch.cat([surface_features([c.response]) for c in conversations])
    assert data.covariates == tuple(SURFACE_FEATURES)
    assert torch.equal(data.tables.covariates[numbers], measured)


def test_a_prompt_with_more_responses_than_a_shard_holds_stays_whole(encoder, tmp_path):
    ratings = [
        rate(f"r{k}", DOG, "- Yes!\n" * (k % 7) + f"**{k}**", honesty=1 + k % 5, harm=k % 11)
        for k in range(1100)
    ]
    rows = {"ratings": [*RATINGS, *ratings], "pairs": [], "benchmark": []}
    watched = WatchedBackbone(encoder)
    data = embed(tmp_path, watched, **rows)
    assert [len(shard) for shard in watched.shards] == [1, 2, 1]
    numbers = data.tables.ratings_response[len(RATINGS) :]
    measured = surface_features([row.responses[0] for row in ratings])
    assert torch.equal(data.tables.covariates[numbers], measured)
    assert len(data.tables.covariates) == data.responses.rows == 1105


def test_weights_judgements_and_sources_reach_the_tables(encoder, tmp_path):
    ratings = [dataclasses.replace(row, weight=k / 2) for k, row in enumerate(RATINGS, start=1)]
    ratings[3] = dataclasses.replace(ratings[3], source="a judge")
    pairs = [
        dataclasses.replace(PAIRS[0], judgements={"harm": 0.25, "verbosity": 1.0}, weight=3.0),
        dataclasses.replace(PAIRS[1], source="experts"),
        dataclasses.replace(PAIRS[2], judgements={"honesty": 0.5}, weight=0.0),
    ]
    data = embed(tmp_path, WatchedBackbone(encoder), ratings=ratings, pairs=pairs)
    assert data.sources == ("a judge", "experts", "raters")
    assert data.tables.ratings_source.tolist() == [2, 2, 2, 0, 2, 2]
    assert data.tables.pairs_source.tolist() == [2, 1, 2]
    assert data.tables.ratings_weight.tolist() == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert data.tables.pairs_weight.tolist() == [3.0, 1.0, 0.0]
    nan = math.nan
    expected = torch.tensor([[nan, 0.25, 1.0], [nan, nan, nan], [0.5, nan, nan]]).double()
    torch.testing.assert_close(
        data.tables.pairs_judgements, expected, equal_nan=True, rtol=0, atol=0
    )


def test_rows_weigh_one_where_nothing_else_is_said(data):
    assert data.sources == ("raters",)
    assert data.tables.ratings_weight.tolist() == [1.0] * 6
    assert data.tables.pairs_weight.tolist() == [1.0] * 3
    assert data.tables.pairs_judgements.isnan().all()
    assert data.tables.pairs_judgements.shape == (3, 3)


def test_an_objective_may_be_judged_in_pairs_alone(encoder, tmp_path):
    plain = [
        dataclasses.replace(row, ratings={n: r for n, r in row.ratings.items() if n != "verbosity"})
        for row in RATINGS
    ]
    judged = [dataclasses.replace(row, judgements={"verbosity": 0.9}) for row in PAIRS]
    with pytest.raises(DataError, match="'verbosity' has 0 ratings"):
        embed(tmp_path, WatchedBackbone(encoder), ratings=plain)
    data = embed(tmp_path, WatchedBackbone(encoder), ratings=plain, pairs=judged, min_ratings=2)
    assert data.tables.ratings[:, 2].isnan().all()
    # Two pairs are on the training side; and one that weighs nothing teaches nothing.
    with pytest.raises(DataError, match="'verbosity' has 0 ratings and 2 judgements"):
        embed(tmp_path, WatchedBackbone(encoder), ratings=plain, pairs=judged, min_ratings=3)
    judged[1] = dataclasses.replace(judged[1], weight=0.0)
    with pytest.raises(DataError, match="'verbosity' has 0 ratings and 1 judgements"):
        embed(tmp_path, WatchedBackbone(encoder), ratings=plain, pairs=judged, min_ratings=2)


def test_shared_prompts_and_responses_are_embedded_once(encoder, tmp_path):
    watched = WatchedBackbone(encoder)
    embed(tmp_path, watched)
    assert len(watched.prompts) == len(PROMPTS) == 4
    assert set(watched.prompts) == PROMPTS
    assert len(watched.conversations) == len(CONVERSATIONS) == 10
    assert set(watched.conversations) == CONVERSATIONS


def test_rows_with_the_same_text_share_an_embedding_and_others_do_not(data):
    first, _, _, again, other_prompt, _ = data.tables.ratings_response.tolist()
    assert first == again == data.tables.pairs_chosen[1]
    assert other_prompt != first
    assert data.tables.ratings_response[1] == data.tables.lists_response[0]
    every = torch.cat(
        [
            data.tables.ratings_response,
            data.tables.pairs_chosen,
            data.tables.pairs_rejected,
            data.tables.lists_response,
        ]
    )
    assert every.unique().tolist() == list(range(len(CONVERSATIONS)))


def test_prompts_that_differ_in_the_system_turn_alone_are_two_prompts_of_one_group(data):
    egg, fox, _, _, brief_egg, dog = data.tables.ratings_response.tolist()
    prompts = data.tables.prompt_of_response
    assert prompts[[egg, fox, brief_egg, dog]].unique().numel() == 4
    groups = data.tables.group_of_response
    assert groups[egg] == groups[brief_egg]
    assert groups[[egg, fox, dog]].unique().numel() == 3


def test_ratings_are_rescaled_and_missing_ones_are_nan(data):
    nan = math.nan
    expected = [
        [1.0, 1.0, nan],
        [0.25, nan, 0.25],
        [nan, 0.25, nan],
        [0.5, nan, 1.0],
        [nan, 0.0, nan],
        [0.0, 1.0, 0.0],
    ]
    table = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(data.tables.ratings, table, equal_nan=True, rtol=0, atol=0)


def test_each_row_is_on_the_side_that_it_says(data):
    tables = data.tables
    assert tables.ratings_test.tolist() == [False, True, False, False, False, False]
    assert torch.equal(tables.ratings_train, ~tables.ratings_test)
    assert tables.pairs_test.tolist() == [True, False, False]
    assert torch.equal(tables.pairs_train, ~tables.pairs_test)
    assert tables.lists_test.tolist() == [True, True]


def test_a_benchmark_on_training_prompts_is_left_out_and_counted(encoder, tmp_path, caplog):
    caplog.set_level(logging.INFO, "armo")
    watched = WatchedBackbone(encoder)
    embed(tmp_path, watched)
    assert Conversation(EGG, "Five words.") not in watched.conversations
    assert "1 benchmark lists on training prompts are not used" in caplog.text


@pytest.mark.parametrize("test_fraction", [0.2, 0.5, 0.8])
def test_rows_of_one_prompt_are_on_one_side_whatever_the_split(encoder, tmp_path, test_fraction):
    # One prompt says where it belongs, so that there is something to learn from.
    free = [dataclasses.replace(row, split=None) for row in [*RATINGS[1:2], *PAIRS, *BENCHMARK]]
    tables = embed(
        tmp_path,
        WatchedBackbone(encoder),
        ratings=[*RATINGS[:1], *free[:1], *RATINGS[2:]],
        pairs=free[1:4],
        benchmark=free[4:],
        test_fraction=test_fraction,
    ).tables
    side_of_group = {}
    for numbers, test in (
        (tables.ratings_response, tables.ratings_test),
        (tables.pairs_chosen, tables.pairs_test),
        (tables.pairs_rejected, tables.pairs_test),
        (tables.lists_response, tables.lists_test[tables.lists_of]),
    ):
        for group, side in zip(tables.group_of_response[numbers].tolist(), test, strict=True):
            assert side_of_group.setdefault(group, side) == side
    assert torch.equal(tables.ratings_train, ~tables.ratings_test)
    assert torch.equal(tables.pairs_train, ~tables.pairs_test)


def test_lists_and_categories_keep_the_order_of_their_rows(data):
    assert data.tables.lists_of.tolist() == [0, 0, 0, 1, 1]
    names = data.categories
    assert [names[k] for k in data.tables.pairs_category] == ["facts", "advice", "facts"]
    assert [names[k] for k in data.tables.lists_category] == ["safety", "advice"]


def test_examples_are_test_pairs_with_the_numbers_of_their_responses(data):
    assert data.examples == [
        {
            "prompt": [{"role": "user", "content": "Is the fox quick?"}],
            "category": "facts",
            "responses": ["Yes, it jumps over the dog.", "No."],
            "numbers": [data.tables.pairs_chosen[0], data.tables.pairs_rejected[0]],
        }
    ]


def test_without_test_pairs_examples_are_training_pairs(encoder, tmp_path):
    data = embed(tmp_path, WatchedBackbone(encoder), pairs=PAIRS[1:])
    assert {tuple(example["responses"]) for example in data.examples} == {
        (pair.chosen, pair.rejected) for pair in PAIRS[1:]
    }


def test_examples_are_spread_over_the_categories_and_limited(encoder, tmp_path):
    rows = corpus(prompts=40)
    watched = WatchedBackbone(encoder)
    data = embed(tmp_path, watched, **rows, shard_rows=100, examples=6)
    test = [row for row in rows["pairs"] if row.split == "test"]
    assert {row.category for row in test} == {"facts"}
    assert len(data.examples) == 3
    every = [dataclasses.replace(row, split="test") for row in rows["pairs"][::3]]
    data = embed(tmp_path, watched, pairs=every, ratings=RATINGS, examples=8)
    names = [example["category"] for example in data.examples]
    assert sorted(names) == ["advice", "advice", "facts", "facts"]


def test_pairs_and_lists_may_be_absent(encoder, tmp_path):
    data = embed(tmp_path, encoder, pairs=[], benchmark=[])
    assert data.tables.pairs_chosen.shape == data.tables.lists_response.shape == (0,)
    assert data.categories == ()
    assert data.examples == []


def test_texts_that_were_cut_are_marked_in_the_store(encoder, tmp_path, caplog):
    caplog.set_level(logging.INFO, "armo")
    long = rate("r1", FOX, "Warn of risks! " * 60, honesty=2.0)
    data = embed(tmp_path, encoder, ratings=[*RATINGS, long])
    marked = data.responses.truncated()[data.tables.ratings_response]
    assert marked.tolist() == [False] * 6 + [True]
    assert not data.responses.missing().any()
    assert bool(data.tables.ratings_test[-1])
    assert "1 of 11 responses were cut to fit the backbone" in caplog.text
    assert "skipped" not in caplog.text


# Ties, margins and lists to train on


def test_preferences_and_margins_reach_the_tables(encoder, tmp_path):
    pairs = [
        dataclasses.replace(PAIRS[0], preference=0.5),
        dataclasses.replace(PAIRS[1], preference=0.75, margin=2.0),
        PAIRS[2],
    ]
    tables = embed(tmp_path, WatchedBackbone(encoder), pairs=pairs).tables
    assert tables.pairs_preference.tolist() == [0.5, 0.75, 1.0]
    expected = torch.tensor([math.nan, 2.0, math.nan], dtype=torch.float64)
    torch.testing.assert_close(tables.pairs_margin, expected, equal_nan=True, rtol=0, atol=0)


LISTS = [
    ResponseList(
        "t0",
        "rankers",
        EGG,
        ("Five words.", SEVEN, "I cannot know."),
        ranks=(2.0, 1.0, 2.0),
        category="advice",
        weight=0.5,
    ),
    ResponseList("t1", "graders", FOX, ("Perhaps.", "Yes."), (1,), category="safety"),
    ResponseList("t2", "rankers", DOG, ("Yes.", "It sleeps."), (0,), split="train", weight=3.0),
]


@pytest.fixture(scope="module")
def listed(encoder, tmp_path_factory):
    return embed(tmp_path_factory.mktemp("listed"), WatchedBackbone(encoder), lists=LISTS)


def test_lists_to_train_on_are_on_both_sides_and_a_benchmark_on_the_test_side(listed):
    tables = listed.tables
    assert tables.lists_benchmark.tolist() == [False, False, False, True, True]
    assert tables.lists_train.tolist() == [True, False, True, False, False]
    assert torch.equal(tables.lists_test, ~tables.lists_train)


def test_each_list_finds_its_responses_ranks_weight_and_source(listed, encoder):
    tables = listed.tables
    rows = [*LISTS, *USED_LISTS]
    assert tables.lists_of.tolist() == [k for k, row in enumerate(rows) for _ in row.responses]
    alone = [embed_alone(encoder, row.prompt, text)[1] for row in rows for text in row.responses]
    found = listed.responses.read(tables.lists_response)
    torch.testing.assert_close(found, torch.stack(alone), atol=1e-5, rtol=0)
    assert (found.roll(1, 0) - torch.stack(alone)).abs().max() > 1e-2
    ranks = [[2.0, 1.0, 2.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0, 1.0], [0.0, 1.0]]
    assert tables.lists_rank.tolist() == [rank for row in ranks for rank in row]
    assert tables.lists_weight.tolist() == [0.5, 1.0, 3.0, 1.0, 1.0]
    assert [listed.sources[k] for k in tables.lists_source] == [row.source for row in rows]
    names = [listed.categories[k] for k in tables.lists_category]
    assert names == ["advice", "safety", "", "safety", "advice"]


def test_lists_to_train_on_share_prompts_and_texts_with_all_other_rows(encoder, tmp_path):
    watched = WatchedBackbone(encoder)
    data = embed(tmp_path, watched, lists=LISTS)
    assert set(watched.prompts) == PROMPTS
    assert len(watched.prompts) == len(PROMPTS)
    new = {Conversation(EGG, "Five words."), Conversation(DOG, "It sleeps.")}
    assert set(watched.conversations) == CONVERSATIONS | new
    assert len(watched.conversations) == data.responses.rows == len(CONVERSATIONS | new)
    assert data.tables.lists_response[1] == data.tables.ratings_response[0]
    assert data.tables.lists_response[5] == data.tables.pairs_chosen[2]


def test_without_lists_to_train_on_the_tables_say_so(data, listed):
    assert data.tables.lists_benchmark.all()
    assert not data.tables.lists_train.any()
    # The other rows do not depend on them.
    for name in ("ratings", "pairs_train", "pairs_test", "ratings_train", "ratings_test"):
        values = getattr(data.tables, name), getattr(listed.tables, name)
        torch.testing.assert_close(*values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("test_fraction", [0.2, 0.5, 0.8])
def test_lists_to_train_on_follow_the_side_of_their_prompt(encoder, tmp_path, test_fraction):
    names = [f"Question {k}?" for k in range(12)]
    lists = [
        ResponseList(f"t{k}", "s", (Message("user", name),), ("Yes.", "No."), ranks=(1, 2))
        for k, name in enumerate(names)
    ]
    pairs = [
        PreferencePair(f"p{k}", "s", (Message("user", name),), "Yes.", "No.")
        for k, name in enumerate(names)
    ]
    data = embed(tmp_path, encoder, pairs=pairs, lists=lists, test_fraction=test_fraction)
    tables = data.tables
    ours = ~tables.lists_benchmark
    assert torch.equal(tables.lists_test[ours], tables.pairs_test)
    assert torch.equal(tables.lists_train[ours], tables.pairs_train)
    assert tables.lists_train.any()
    assert tables.lists_test[ours].any()


def test_a_list_on_the_other_side_of_its_prompt_stops_before_anything_is_embedded(
    encoder, tmp_path
):
    watched = WatchedBackbone(encoder)
    lists = [dataclasses.replace(LISTS[1], split="train")]
    with pytest.raises(DataError, match=r"'r1' \(test\) and 't1' \(train\) share a prompt"):
        embed(tmp_path, watched, lists=lists)
    assert watched.shards == []


def test_a_list_to_train_on_with_a_skipped_response_is_on_neither_side(encoder, tmp_path, caplog):
    lists = [
        *LISTS[:1],
        ResponseList("long", "s", EGG, (SEVEN, LONG), ranks=(1.0, 2.0)),
        *LISTS[1:],
    ]
    backbone = WatchedBackbone(encoder, on_overlong="skip")
    tables = embed(tmp_path, backbone, lists=lists, benchmark=[]).tables
    assert tables.lists_train.tolist() == [True, False, False, True]
    assert tables.lists_test.tolist() == [False, False, True, False]
    assert "so 1 of 4 lists are left out" in caplog.text


@pytest.mark.parametrize("change", ["format of another version", "no format"])
def test_tables_of_another_version_are_named_and_made_again_without_embedding(
    encoder, folder, tmp_path, change
):
    embed(tmp_path, WatchedBackbone(encoder))
    names = read_json(tmp_path / extract.NAMES)
    assert names.pop("format") == extract.ROWS_FORMAT
    if change == "format of another version":
        names["format"] = extract.ROWS_FORMAT - 1
    write_json(tmp_path / extract.NAMES, names)
    with pytest.raises(
        ArtifactError, match=r"rows\.json: row tables of another .* `armo train stages=\[embed\]`"
    ):
        EmbeddedData.load(tmp_path)
    watched = WatchedBackbone(encoder, shards=0)
    embed(tmp_path, watched)
    assert watched.shards == []
    assert_same_files(tmp_path, folder)


# Streams


class Once:
    """Rows without a length that can be read once, and says when."""

    def __init__(self, rows, events, name):
        self.rows, self.events, self.name = iter(rows), events, name

    def __iter__(self):
        return self

    def __next__(self):
        self.events.append(self.name)
        return next(self.rows)


def test_rows_may_be_streams_without_a_length_and_are_read_once(encoder, folder, tmp_path):
    events = []
    rows = {
        "ratings": Once(RATINGS, events, "ratings"),
        "pairs": Once(PAIRS, events, "pairs"),
        "lists": Once([], events, "lists"),
        "benchmark": Once(BENCHMARK, events, "benchmark"),
    }
    watched = WatchedBackbone(encoder)
    embed(tmp_path, watched, **rows)
    assert events == ["ratings"] * 7 + ["pairs"] * 4 + ["lists"] + ["benchmark"] * 4
    assert_same_files(tmp_path, folder)


def test_no_row_is_kept_while_the_next_are_read(encoder, tmp_path):
    class Watched(RatedResponse):  # without slots: it can be referred to weakly
        pass

    references = []

    def stream():
        for row in corpus()["ratings"]:
            fields = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
            assert not [k for k, ref in enumerate(references[:-1]) if ref() is not None]
            watched = Watched(**fields)
            references.append(weakref.ref(watched))
            yield watched
            del watched

    embed(tmp_path, WatchedBackbone(encoder), ratings=stream(), pairs=[], benchmark=[])
    assert len(references) == 32


def test_a_streaming_data_set_of_the_datasets_library_can_be_embedded(
    encoder, undisturbed, tmp_path
):
    import datasets

    rows = corpus()

    def examples():
        for row in rows["ratings"]:
            messages = [{"role": m.role, "content": m.content} for m in row.prompt]
            yield {
                "id": row.id,
                "prompt": messages,
                "response": row.responses[0],
                "ratings": row.ratings,
                "split": row.split,
            }

    stream = datasets.IterableDataset.from_generator(examples)
    with pytest.raises(TypeError):
        len(stream)
    ratings = (
        rate(
            example["id"],
            tuple(Message(**message) for message in example["prompt"]),
            example["response"],
            split=example["split"],
            **example["ratings"],
        )
        for example in stream
    )
    embed(tmp_path, WatchedBackbone(encoder), **{**rows, "ratings": ratings})
    assert_same_files(tmp_path, undisturbed)


def test_a_stream_that_fails_leaves_the_folder_free_and_nothing_embedded(encoder, folder, tmp_path):
    def broken():
        yield from RATINGS[:3]
        raise DataError("rows.jsonl:4: malformed JSON")

    watched = WatchedBackbone(encoder)
    with pytest.raises(DataError, match="malformed JSON"):
        embed(tmp_path, watched, ratings=broken())
    assert watched.shards == []
    embed(tmp_path, watched)
    assert_same_files(tmp_path, folder)


NO_STYLE = rate("new", DOG, "Yes.", honesty=1.0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"ratings": [], "pairs": [], "benchmark": []}, "'honesty' has 0 ratings"),
        ({"ratings": RATINGS[:-1]}, "'verbosity' has the one rating 4"),
        ({"ratings": [*RATINGS[:3], NO_STYLE]}, "'verbosity' has 0 ratings"),
        ({"ratings": RATINGS[:3]}, "'honesty' has the one rating 5"),
        ({"min_ratings": 3}, "'verbosity' has 2 ratings .* `data.min_ratings=3`"),
        (
            {"pairs": [dataclasses.replace(PAIRS[0], split="train")]},
            r"'r1' \(test\) and 'p0' \(train\) share a prompt",
        ),
    ],
)
def test_data_that_cannot_be_learned_from_stops_before_anything_is_embedded(
    encoder, tmp_path, rows, message
):
    watched = WatchedBackbone(encoder)
    with pytest.raises(DataError, match=message):
        embed(tmp_path, watched, **rows)
    assert watched.shards == []


# Going on where it stopped


@pytest.mark.parametrize("shards", [0, 1, 9, 15])
def test_a_run_that_was_cut_off_goes_on_where_it_stopped(encoder, undisturbed, tmp_path, shards):
    cut_off = WatchedBackbone(encoder, shards=shards)
    with pytest.raises(RuntimeError, match="cut off"):
        embed(tmp_path, cut_off, **corpus())
    with pytest.raises(ArtifactError, match=r"missing|No such file"):
        EmbeddedData.load(tmp_path)
    kept = shard_digests(tmp_path)
    assert len(kept) == len(cut_off.shards) == shards
    assert kept.items() <= shard_digests(undisturbed).items()

    resumed = WatchedBackbone(encoder)
    embed(tmp_path, resumed, **corpus())
    assert len(resumed.shards) == 16 - shards
    assert set(cut_off.conversations).isdisjoint(resumed.conversations)
    assert set(cut_off.prompts).isdisjoint(resumed.prompts)
    assert_same_files(tmp_path, undisturbed)


def test_a_run_that_was_cut_off_says_what_is_there_already(encoder, tmp_path, caplog):
    with pytest.raises(RuntimeError, match="cut off"):
        embed(tmp_path, WatchedBackbone(encoder, shards=5), **corpus())
    caplog.clear()
    caplog.set_level(logging.INFO, "armo")
    embed(tmp_path, WatchedBackbone(encoder), **corpus())
    assert "12 of 36 responses are there already" in caplog.text


def test_a_finished_run_is_not_computed_again(encoder, folder):
    before = digests(folder)
    watched = WatchedBackbone(encoder, shards=0)
    embed(folder, watched)
    assert watched.shards == []
    assert digests(folder) == before


def test_texts_are_left_beside_the_shards_of_a_run_that_was_cut_off_alone(encoder, tmp_path):
    with pytest.raises(RuntimeError, match="cut off"):
        embed(tmp_path, WatchedBackbone(encoder, shards=1))
    assert (tmp_path / "texts" / "responses.jsonl").is_file()
    embed(tmp_path, WatchedBackbone(encoder))
    assert not (tmp_path / "texts").exists()


def test_a_corrected_text_is_embedded_again_with_its_shard_alone(encoder, undisturbed, tmp_path):
    rows = corpus()
    embed(tmp_path, WatchedBackbone(encoder), **rows)
    row = rows["ratings"][21]
    assert row.id == "r10-1"
    corrected = dataclasses.replace(row, conversation=Conversation(row.prompt, "It is quick."))
    rows["ratings"][21] = corrected
    rows["pairs"][10] = dataclasses.replace(rows["pairs"][10], chosen="It is quick.")
    watched = WatchedBackbone(encoder)
    data = embed(tmp_path, watched, **rows)
    assert set(watched.prompts) == {row.prompt}
    changed = shard_digests(tmp_path).items() ^ shard_digests(undisturbed).items()
    assert {name for name, _ in changed} == {"shard-00010.safetensors"}
    for numbers in (data.tables.ratings_response[21:22], data.tables.pairs_chosen[10:11]):
        stored = data.responses.read(numbers)[0]
        fresh = embed_alone(encoder, row.prompt, "It is quick.")[1]
        torch.testing.assert_close(stored, fresh, atol=1e-5, rtol=0)


def test_corrected_ratings_and_sides_embed_nothing_again(encoder, undisturbed, tmp_path):
    rows = corpus()
    embed(tmp_path, WatchedBackbone(encoder), **rows)
    rows["ratings"][5] = dataclasses.replace(rows["ratings"][5], ratings={"honesty": 1.0})
    for kind in ("ratings", "pairs"):
        rows[kind] = [
            dataclasses.replace(
                row, split="test" if "Question 1:" in row.prompt[0].content else row.split
            )
            for row in rows[kind]
        ]
    watched = WatchedBackbone(encoder, shards=0)
    data = embed(tmp_path, watched, **rows)
    assert watched.shards == []
    assert shard_digests(tmp_path) == shard_digests(undisturbed)
    assert data.tables.ratings[5, 0] == 0.0
    assert data.tables.ratings_test[2:4].all()
    assert data.tables.pairs_test[1]


def test_rows_that_are_added_keep_the_shards_before_them(encoder, undisturbed, tmp_path):
    rows = corpus()
    embed(tmp_path, WatchedBackbone(encoder), **rows)
    more = [*rows["ratings"], rate("new", (Message("user", "New?"),), "Yes.", split="train")]
    watched = WatchedBackbone(encoder)
    embed(tmp_path, watched, **{**rows, "ratings": more})
    kept = shard_digests(tmp_path).items() & shard_digests(undisturbed).items()
    assert len(kept) == 16
    assert watched.prompts == [(Message("user", "New?"),)]


def test_another_way_to_read_embeds_everything_again(encoder, folder, tmp_path, caplog):
    embed(tmp_path, WatchedBackbone(encoder))
    caplog.set_level(logging.INFO, "armo")
    watched = WatchedBackbone(encoder, max_tokens=90)
    embed(tmp_path, watched)
    assert set(watched.prompts) == PROMPTS
    assert "shards of other embeddings" in caplog.text
    assert not shard_digests(tmp_path).items() & shard_digests(folder).items()
    again = WatchedBackbone(encoder)
    embed(tmp_path, again)
    assert set(again.prompts) == PROMPTS
    assert_same_files(tmp_path, folder)


def test_another_size_of_shards_embeds_the_same(encoder, undisturbed, tmp_path):
    embed(tmp_path, WatchedBackbone(encoder), **corpus())
    data = embed(tmp_path, WatchedBackbone(encoder), **corpus(), shard_rows=7)
    assert len(shard_digests(tmp_path)) == 5
    reference = EmbeddedData.load(undisturbed)
    for table, other in ((data.prompts, reference.prompts), (data.responses, reference.responses)):
        every = torch.arange(other.rows)
        torch.testing.assert_close(table.read(every), other.read(every), atol=1e-5, rtol=0)
    assert torch.equal(data.tables.pairs_chosen, reference.tables.pairs_chosen)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "lose"])
def test_a_damaged_shard_is_named_and_made_again_and_the_others_are_kept(
    encoder, undisturbed, tmp_path, damage, caplog
):
    embed(tmp_path, WatchedBackbone(encoder), **corpus())
    shard = tmp_path / "shard-00007.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 0x40
    if damage == "lose":
        shard.unlink()
    else:
        shard.write_bytes({"flip": content, "cut": content[:-9], "empty": b""}[damage])
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.glob("shard-*") if p != shard}
    watched = WatchedBackbone(encoder)
    embed(tmp_path, watched, **corpus())
    assert len(watched.shards) == 1
    assert "Question 7:" in watched.prompts[0][0].content
    assert (f"{shard} is damaged; it is made again" in caplog.text) == (damage != "lose")
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert_same_files(tmp_path, undisturbed)


# Covariates, which are measured while the model runs


@pytest.fixture
def measured(monkeypatch):
    """The texts that are measured, in order, by shard."""
    shards = []

    def measure(texts):
        shards.append(list(texts))
        return surface_features(texts)

    monkeypatch.setattr(extract, "surface_features", measure)
    return shards


def test_each_text_is_measured_once_and_before_the_last_shard_is_embedded(
    encoder, tmp_path, measured
):
    class Noting(WatchedBackbone):
        def embed_chunks(self, chunks, **options):
            for embedded in super().embed_chunks(chunks, **options):
                counts.append(len(measured))
                yield embedded

    counts = []
    embed(tmp_path, Noting(encoder), **corpus())
    texts = [text for shard in measured for text in shard]
    assert len(texts) == len(set(texts)) == 36
    # At most one shard ahead; nothing is left to measure when the last one is embedded.
    assert all(done <= number + 2 for number, done in enumerate(counts, start=1))
    assert counts[-1] == len(measured) == 16


@pytest.mark.parametrize("shards", [0, 9])
def test_texts_that_were_measured_before_a_cut_are_not_measured_again(
    encoder, undisturbed, tmp_path, measured, shards
):
    with pytest.raises(RuntimeError, match="cut off"):
        embed(tmp_path, WatchedBackbone(encoder, shards=shards), **corpus())
    kept = covariate_digests(tmp_path)
    assert shards <= len(kept) == len(measured) < 16
    assert kept.items() <= covariate_digests(undisturbed).items()
    embed(tmp_path, WatchedBackbone(encoder), **corpus())
    assert len(measured) == 16
    assert_same_files(tmp_path, undisturbed)


@pytest.mark.parametrize("damage", ["flip", "lose"])
def test_covariates_that_are_damaged_are_measured_again_without_embedding(
    encoder, undisturbed, tmp_path, measured, damage, caplog
):
    embed(tmp_path, WatchedBackbone(encoder), **corpus())
    measured.clear()
    path = tmp_path / "covariates-00007.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x40
    path.unlink() if damage == "lose" else path.write_bytes(content)
    watched = WatchedBackbone(encoder, shards=0)
    embed(tmp_path, watched, **corpus())
    assert watched.shards == []
    assert len(measured) == 1
    assert (f"{path} is damaged; it is made again" in caplog.text) == (damage != "lose")
    assert_same_files(tmp_path, undisturbed)


@pytest.mark.parametrize("change", ["version", "names"])
def test_other_features_are_measured_without_embedding_again(
    encoder, undisturbed, tmp_path, monkeypatch, caplog, change
):
    caplog.set_level(logging.INFO, "armo")
    embed(tmp_path, WatchedBackbone(encoder), **corpus())
    if change == "version":
        names = SURFACE_FEATURES
        monkeypatch.setattr(extract, "SURFACE_VERSION", -1)
    else:
        names = ("characters", "letters e")
        monkeypatch.setattr(extract, "SURFACE_FEATURES", names)

    def measure(texts):
        rows = [[float(len(text)), float(text.count("e"))] for text in texts]
        return torch.tensor(rows, dtype=torch.float64).repeat(1, 8)[:, : len(names)]

    monkeypatch.setattr(extract, "surface_features", measure)
    watched = WatchedBackbone(encoder, shards=0)
    rows = corpus()
    data = embed(tmp_path, watched, **rows)
    assert watched.shards == []
    assert shard_digests(tmp_path) == shard_digests(undisturbed)
    assert "deleted 16 shards of other covariates" in caplog.text
    assert data.covariates == names
    found = data.tables.covariates[data.tables.ratings_response]
    assert torch.equal(found, measure([row.responses[0] for row in rows["ratings"]]))


def test_another_backbone_measures_nothing_again(encoder, tmp_path, measured):
    embed(tmp_path, WatchedBackbone(encoder), **corpus())
    measured.clear()
    watched = WatchedBackbone(encoder, max_tokens=90)
    embed(tmp_path, watched, **corpus())
    assert len(watched.shards) == 16
    assert measured == []


def test_a_text_that_is_too_long_to_embed_is_measured_all_the_same(encoder, tmp_path):
    long = rate("long", FOX, LONG, honesty=1.0)
    rows = {"ratings": [*RATINGS, long]}
    data = embed(tmp_path, WatchedBackbone(encoder, on_overlong="skip"), **rows)
    number = data.tables.ratings_response[-1:]
    assert data.responses.missing()[number].all()
    assert torch.equal(data.tables.covariates[number], surface_features([LONG]))


@pytest.mark.usefixtures("not_a_terminal")
def test_progress_is_shown_where_only_covariates_are_missing(
    encoder, tmp_path, caplog, monkeypatch
):
    embed(tmp_path, WatchedBackbone(encoder), **corpus())
    caplog.set_level(logging.INFO, "armo")
    monkeypatch.setattr(extract, "LOG_EVERY_S", 0.0)
    monkeypatch.setattr(extract, "LOOK_EVERY_S", 0.0)
    for path in sorted(tmp_path.glob("covariates-*"))[4:]:
        path.unlink()
    embed(tmp_path, WatchedBackbone(encoder, shards=0), **corpus())
    counts = [int(rows) for rows in re.findall(r"(\d+) of 36 responses, about", caplog.text)]
    assert counts == sorted(counts)
    assert len(set(counts)) > 8
    assert counts[-1] == 36


# Rows that are left out


def test_skipped_rows_keep_their_place_and_are_on_neither_side(encoder, folder, tmp_path, caplog):
    caplog.set_level(logging.INFO, "armo")
    fields = {"source": "s", "split": "test"}
    ratings = [*RATINGS[:2], rate("long", FOX, LONG, honesty=1.0), *RATINGS[2:]]
    pairs = [
        *PAIRS[:1],
        PreferencePair("long chosen", prompt=DOG, chosen=LONG, rejected="No.", source="s"),
        *PAIRS[1:],
        PreferencePair("long rejected", prompt=FOX, chosen="No.", rejected=LONG, **fields),
    ]
    benchmark = [
        *BENCHMARK[:1],
        ResponseList("long", prompt=FOX, responses=("No.", LONG), correct=(0,), **fields),
        *BENCHMARK[1:],
    ]
    rows = {"ratings": ratings, "pairs": pairs, "benchmark": benchmark}
    data = embed(tmp_path, WatchedBackbone(encoder, on_overlong="skip"), **rows)
    tables = data.tables
    left_out = {
        "ratings": (tables.ratings_train | tables.ratings_test).tolist(),
        "pairs": (tables.pairs_train | tables.pairs_test).tolist(),
        "lists": tables.lists_test.tolist(),
    }
    assert left_out == {
        "ratings": [True, True, False, True, True, True, True],
        "pairs": [True, False, True, True, False],
        "lists": [True, False, True],
    }
    assert not (tables.ratings_train & tables.ratings_test).any()
    # The others are what and where they are where nothing is too long.
    plain = EmbeddedData.load(folder)
    for numbers, there, reference in (
        (tables.ratings_response, left_out["ratings"], plain.tables.ratings_response),
        (tables.pairs_chosen, left_out["pairs"], plain.tables.pairs_chosen),
        (tables.pairs_rejected, left_out["pairs"], plain.tables.pairs_rejected),
    ):
        found = data.responses.read(numbers[torch.tensor(there)])
        torch.testing.assert_close(found, plain.responses.read(reference), atol=1e-5, rtol=0)
    assert tables.ratings[2, 0] == 0.0
    assert tables.ratings_test.tolist() == [False, True, *[False] * 5]
    assert tables.pairs_train.tolist() == [False, False, True, True, False]
    assert data.responses.missing()[tables.ratings_response].tolist() == [
        not there for there in left_out["ratings"]
    ]
    assert data.responses.read(tables.ratings_response[2:3]).isnan().all()
    assert not data.prompts.missing().any()
    assert all(LONG not in example["responses"] for example in data.examples)
    for words in (
        "2 of 13 responses were skipped: too long",
        "so 1 of 7 rated rows are left out",
        "so 2 of 5 pairs are left out",
        "so 1 of 3 lists are left out",
    ):
        assert words in caplog.text


def test_a_prompt_that_is_skipped_leaves_out_all_its_rows(encoder, tmp_path, caplog):
    long = (Message("user", LONG),)
    ratings = [
        rate("long 0", long, "Yes.", split="train", honesty=1.0),
        *RATINGS,
        rate("long 1", long, "No.", split="train", honesty=1.0),
    ]
    data = embed(tmp_path, WatchedBackbone(encoder, on_overlong="skip"), ratings=ratings)
    there = data.tables.ratings_train | data.tables.ratings_test
    assert there.tolist() == [False, *[True] * 6, False]
    assert data.prompts.missing().tolist() == [True, *[False] * 4]
    assert data.prompt_embeddings(data.tables.ratings_response[:1]).isnan().all()
    assert "1 of 5 prompts were skipped: too long" in caplog.text


def test_a_run_in_which_all_pairs_are_skipped_has_no_examples(encoder, tmp_path):
    pairs = [pair("long", FOX, LONG, LONG + "x", category="facts")]
    data = embed(tmp_path, WatchedBackbone(encoder, on_overlong="skip"), pairs=pairs)
    assert data.examples == []


# Rows that cannot be embedded


def test_a_row_that_cannot_be_embedded_is_named_by_its_id_and_text(encoder, tmp_path):
    strict = WatchedBackbone(encoder, on_overlong="error")
    embed(tmp_path, strict)
    long = rate("long", FOX, LONG, honesty=2.0)
    with pytest.raises(BackboneError) as caught:
        embed(tmp_path, strict, ratings=[*RATINGS, long])
    message = str(caught.value)
    assert message.startswith(
        "row 'long', response 'Warn of risks! Warn of risks! Warn of risks! Warn of risks! ' "
        "to prompt 'Is the fox quick?': the response has "
    )
    assert "raise `max_tokens` or set `on_overlong` to truncate or skip" in message
    assert "\n" not in message


def test_a_prompt_that_cannot_be_embedded_is_named_by_a_row_that_has_it(encoder, tmp_path):
    rows = corpus()
    prompt = (Message("user", "Is it safe? " * 60),)
    rows["ratings"][9] = rate("long", prompt, "Yes.", split="train")
    with pytest.raises(BackboneError, match=r"^row 'long', prompt '(Is it safe\? ){5}': the p"):
        embed(tmp_path, WatchedBackbone(encoder, on_overlong="error"), **rows)


def refusing(causal):
    """A backbone whose chat template refuses a word."""
    tokenizer = copy.deepcopy(causal.tokenizer)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if 'forbidden' in message['content'] %}"
        "{{ raise_exception('there are words\nnot to be said') }}{% endif %}{% endfor %}"
    ) + tokenizer.chat_template
    return SimpleNamespace(spec=causal.spec, model=causal.model, tokenizer=tokenizer)


def test_a_text_that_the_template_refuses_is_named_and_the_shards_before_it_stay(causal, tmp_path):
    rows = corpus()
    row = rows["ratings"][22]
    assert row.id == "r11-0"
    rows["pairs"].pop(11)
    rows["ratings"][22] = dataclasses.replace(
        row, conversation=Conversation(row.prompt, "A forbidden word\nor two.")
    )
    folder, whole = tmp_path / "embeddings", tmp_path / "whole"
    backbone = refusing(causal)
    watched = WatchedBackbone(backbone)
    with pytest.raises(BackboneError) as caught:
        embed(folder, watched, **rows)
    assert str(caught.value).startswith(
        "row 'r11-0', response 'A forbidden word\\nor two.' to prompt "
        "'Question 11: is the fox 11 quick?': the chat template refuses the messages: "
    )
    # All before it are whole: the run goes on there once the text is mended.
    assert len(watched.shards) == len(shard_digests(folder)) == 11
    rows["ratings"][22] = row
    resumed = WatchedBackbone(backbone)
    embed(folder, resumed, **rows)
    assert len(resumed.shards) == 5
    embed(whole, WatchedBackbone(backbone), **rows)
    assert_same_files(folder, whole)


@pytest.mark.parametrize("place", [0, 7, 15])
def test_a_prompt_that_the_template_refuses_is_named_wherever_it_is(causal, tmp_path, place):
    rows = corpus()
    del rows["pairs"][place]
    prompt = (Message("user", f"Question {place} of a forbidden kind?"),)
    rows["benchmark"] = []
    rows["ratings"] = [
        dataclasses.replace(row, conversation=Conversation(prompt, row.responses[0]))
        if f"Question {place}:" in row.prompt[0].content
        else row
        for row in rows["ratings"]
    ]
    with pytest.raises(BackboneError, match=rf"^row 'r{place}-0', prompt 'Question {place} of a"):
        embed(tmp_path, WatchedBackbone(refusing(causal)), **rows)
    assert len(shard_digests(tmp_path)) == place


# Other processes, killed at any moment


PROCESSES = multiprocessing.get_context("forkserver")


class SlowBackbone(Backbone):
    """Takes its time for each shard."""

    def embed_chunks(self, chunks, **options):
        for embedded in super().embed_chunks(chunks, **options):
            time.sleep(self.delay_s)
            yield embedded


def load_slowly(spec, delay_s, *, device):
    loaded = load_backbone(spec, device=device)
    backbone = SlowBackbone(spec, model=loaded.model, tokenizer=loaded.tokenizer)
    backbone.delay_s = delay_s
    return backbone


def embed_elsewhere(folder, load, rows):
    embed_rows(
        folder,
        load=load,
        objectives=OBJECTIVES,
        **rows,
        test_fraction=0.5,
        min_ratings=1,
        shard_rows=2,
        team=Team("cpu"),
    )


@pytest.fixture(scope="module")
def start():
    """Start a function in a process of its own; it costs one import for all of them."""
    PROCESSES.set_forkserver_preload(["armo.embed.extract", "hypothesis", "pytest", "datasets"])
    started = []

    def start(function, *arguments):
        process = PROCESSES.Process(target=function, args=arguments)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def wait_for(condition, *, process=None, timeout_s=60):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        if process is not None and not process.is_alive():
            return
        time.sleep(0.005)


def test_a_run_that_is_killed_over_and_over_ends_as_an_undisturbed_one(
    encoder, undisturbed, tmp_path, start
):
    moments = random.Random()
    expected = shard_digests(undisturbed)
    seen = []
    for _ in range(3):
        before = len(shard_digests(tmp_path)) if tmp_path.exists() else 0
        load = partial(load_slowly, encoder.spec, 0.02)
        process = start(embed_elsewhere, tmp_path, load, corpus())
        begun = tmp_path / ".lock.json"
        wait_for(begun.is_file, process=process)
        wait_for(lambda n=before: len(shard_digests(tmp_path)) > n, process=process)
        time.sleep(moments.uniform(0, 0.15))
        process.kill()
        process.join()
        # Whatever a reader finds under the name of a shard is the whole shard.
        found = shard_digests(tmp_path)
        assert found.items() <= expected.items()
        assert covariate_digests(tmp_path).items() <= covariate_digests(undisturbed).items()
        seen.append((process.exitcode, len(found)))
    assert seen[0][0] == -9
    assert seen[0][1] < 16
    resumed = WatchedBackbone(encoder)
    embed(tmp_path, resumed, **corpus())
    assert len(resumed.shards) == 16 - seen[-1][1]
    assert_same_files(tmp_path, undisturbed)


def test_a_second_run_into_the_folder_is_refused_and_the_first_is_not_disturbed(
    encoder, undisturbed, tmp_path, start
):
    load = partial(load_slowly, encoder.spec, 0.1)
    process = start(embed_elsewhere, tmp_path, load, corpus())
    wait_for(lambda: shard_digests(tmp_path), process=process)
    watched = WatchedBackbone(encoder)
    with pytest.raises(ArtifactError) as caught:
        embed(tmp_path, watched)
    message = f"process {process.pid} on {os.uname().nodename} is writing there"
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert watched.shards == []
    process.join(60)
    assert process.exitcode == 0
    assert_same_files(tmp_path, undisturbed)


class FullDisk(Backbone):
    """No file can grow beyond a few bytes once three shards are written."""

    def embed_chunks(self, chunks, **options):
        for number, embedded in enumerate(super().embed_chunks(chunks, **options)):
            if number == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
            yield embedded


def load_full_disk(spec, *, device):
    loaded = load_backbone(spec, device=device)
    return FullDisk(spec, model=loaded.model, tokenizer=loaded.tokenizer)


def embed_until_full(folder, spec, errors):
    try:
        embed_elsewhere(folder, partial(load_full_disk, spec), corpus())
    except OSError as error:
        errors.write_text(str(error))


def test_a_full_disk_is_said_in_one_line_and_the_shards_are_kept(
    encoder, undisturbed, tmp_path, start
):
    folder, errors = tmp_path / "embeddings", tmp_path / "errors"
    process = start(embed_until_full, folder, encoder.spec, errors)
    process.join(60)
    assert process.exitcode == 0
    shard = folder / "shard-00003.safetensors"
    assert re.fullmatch(rf"\[Errno \d+\] File too large: '{shard}'", errors.read_text())
    kept = shard_digests(folder)
    assert len(kept) == 3
    assert kept.items() <= shard_digests(undisturbed).items()
    assert not list(folder.glob(".*.tmp"))
    resumed = WatchedBackbone(encoder)
    embed(folder, resumed, **corpus())
    assert len(resumed.shards) == 13
    assert_same_files(folder, undisturbed)


# Memory


def many_rows(count, words):
    """Rows of long texts, a hundred characters to the token."""
    for k in range(count):
        prompt = (Message("user", f"Question {k}?"),)
        rated = {"honesty": 1.0 + k % 5, "harm": k % 11, "verbosity": k % 5}
        text = " ".join(f"{k}-{n}-{'x' * 90}" for n in range(words))
        yield rate(f"r{k}", prompt, text, split="train", **rated)


def report_peak(folder, spec, count, words, result):
    # They take much of the time, and nothing of the memory that lasts.
    extract.surface_features = lambda texts: torch.zeros(len(texts), len(SURFACE_FEATURES))
    embed_rows(
        folder,
        load=partial(load_backbone, spec),
        objectives=OBJECTIVES,
        ratings=many_rows(count, words),
        pairs=[],
        test_fraction=0.5,
        min_ratings=1,
        shard_rows=32,
        team=Team("cpu"),
    )
    result.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


@pytest.fixture
def word_spec(encoder_folder, tmp_path):
    """An encoder that reads a text word by word, all of them unknown: as fast as can be."""
    folder = shutil.copytree(encoder_folder, tmp_path / "word encoder")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordLevel({t: k for k, t in enumerate(special)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {f"{name.strip('[]').lower()}_token": name for name in special}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return BackboneSpec(str(folder), pooling="mean", max_tokens=96, max_prompt_tokens=40)


def test_more_rows_take_no_more_memory_than_their_numbers(word_spec, tmp_path, start):
    words, peaks = 40, {}
    for count in (1000, 4000):
        receiving, sending = PROCESSES.Pipe(duplex=False)
        start(report_peak, tmp_path / str(count), word_spec, count, words, sending)
        assert receiving.poll(60)
        peaks[count] = receiving.recv()
    growth = (peaks[4000] - peaks[1000]) / 3000
    # Each row has 4,000 characters; what stays in memory are numbers and digests.
    assert growth < 3000


# Several processes at once


class LoggedBackbone(Backbone):
    """Writes down which process embeds which prompts."""

    def embed_chunks(self, chunks, **options):
        read = []

        def reading():
            for chunk in chunks:
                read.append(chunk)
                yield chunk

        for number, embedded in enumerate(super().embed_chunks(reading(), **options)):
            with self.log.open("a") as file:
                for group in read[number]:
                    file.write(f"{os.getpid()} {group.prompt[0].content}\n")
            time.sleep(0.05)  # lest one has finished before the other has begun
            yield embedded


def load_logged(spec, log, *, device):
    torch.set_num_threads(1)  # those of a process that was forked are gone
    loaded = load_backbone(spec, device=device)
    backbone = LoggedBackbone(spec, model=loaded.model, tokenizer=loaded.tokenizer)
    backbone.log = log
    return backbone


def test_two_processes_share_the_shards_and_one_goes_on_when_they_were_cut_off(
    encoder, tmp_path, monkeypatch
):
    spec = dataclasses.replace(encoder.spec, on_overlong="error")
    folder, log = tmp_path / "embeddings", tmp_path / "log"
    load = partial(load_logged, spec, log)

    def measure(texts):
        with (tmp_path / "measured").open("a") as file:
            file.write("".join(f"{os.getpid()} {text}\n" for text in texts))
        return surface_features(texts)

    monkeypatch.setattr(extract, "surface_features", measure)
    rows, broken = corpus(), corpus()
    row = broken["ratings"][27]
    assert row.id == "r13-1"
    broken["ratings"][27] = dataclasses.replace(row, conversation=Conversation(row.prompt, LONG))
    del broken["pairs"][13], rows["pairs"][13]
    # Forked, they need not import everything first.
    team = Team(accelerator="cpu", devices=2, strategy="ddp_fork")
    options = {
        "objectives": OBJECTIVES,
        "test_fraction": 0.5,
        "min_ratings": 1,
        "shard_rows": 2,
    }
    with pytest.raises(BackboneError) as caught:
        embed_rows(folder, load=load, team=team, **broken, **options)
    # Raised in a child; what arrives is one line, without the child's traceback.
    assert str(caught.value).startswith("row 'r13-1', response 'Warn of risks! ")
    assert "\n" not in str(caught.value)
    kept = shard_digests(folder)
    lines = log.read_text().splitlines()
    assert 6 <= len(kept) <= len(lines) < 16
    assert len({line.split()[0] for line in lines}) == 2
    # Each measures its own shards, and none twice.
    texts = (tmp_path / "measured").read_text().splitlines()
    assert {line.split()[0] for line in texts} == {line.split()[0] for line in lines}
    assert len({line.split(maxsplit=1)[1] for line in texts}) == len(texts)
    assert len({line.split(maxsplit=1)[1] for line in lines}) == len(lines)

    strict = WatchedBackbone(encoder, on_overlong="error")
    embed(folder, strict, **rows)
    assert len(strict.shards) == 16 - len(kept)
    whole = tmp_path / "whole"
    embed(whole, WatchedBackbone(encoder, on_overlong="error"), **rows)
    assert_same_files(folder, whole)


@pytest.mark.parametrize(
    ("last_lines", "message"),
    [
        (
            "armo.embed.spec.BackboneError: row 'r1': the template refuses it:\nno such words",
            "row 'r1': the template refuses it: no such words",
        ),
        (
            "armo.embed.spec.BackboneError: row 'r1', response 'ValueError: x\\\\n': too long",
            "row 'r1', response 'ValueError: x\\\\n': too long",
        ),
        ("OSError: [Errno 28] No space left on device: 'a'", "[Errno 28] No space left on device"),
    ],
)
def test_the_error_of_another_process_arrives_whole_and_in_one_line(
    tmp_path, monkeypatch, last_lines, message
):
    def launch(share):
        raise ProcessRaisedException(
            "\n\n-- Process 1 terminated with the following error:\n"
            f'Traceback (most recent call last):\n  File "x.py", line 1\n{last_lines}\n',
            error_index=1,
            error_pid=7,
        )

    monkeypatch.setattr(Team, "fabric", lambda team: SimpleNamespace(launch=launch))
    with pytest.raises(BackboneError) as caught:
        extract.run_team(tmp_path, load=load_backbone, team=Team(), shard_rows=2)
    assert message in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_team_is_one_process_where_nothing_else_is_said():
    fabric = Team("cpu").fabric()
    assert (fabric.world_size, str(fabric.device)) == (1, "cpu")


def test_a_device_with_a_number_is_taken_as_it_is():
    """Where the configuration says `cuda:1`, or here `cpu:0`, a team runs on that."""
    fabric = Team("cpu:0").fabric()
    assert fabric.world_size == 1


# Progress


@pytest.fixture
def not_a_terminal(monkeypatch):
    monkeypatch.setattr("rich._console", Console(file=io.StringIO(), force_terminal=False))


@pytest.mark.usefixtures("not_a_terminal")
def test_progress_is_logged_where_there_is_no_terminal(encoder, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "armo")
    monkeypatch.setattr(extract, "LOG_EVERY_S", 0.0)
    monkeypatch.setattr(extract, "LOOK_EVERY_S", 0.0)
    embed(tmp_path, WatchedBackbone(encoder), **corpus())
    lines = re.findall(r"(\d+) of 36 responses, about (\d+) s left", caplog.text)
    counts = [int(rows) for rows, _ in lines]
    assert counts == sorted(counts)
    assert len(set(counts)) > 10
    assert counts[-1] == 36


@pytest.mark.usefixtures("not_a_terminal")
def test_progress_is_not_logged_more_often_than_asked(encoder, tmp_path, caplog):
    caplog.set_level(logging.INFO, "armo")
    embed(tmp_path, WatchedBackbone(encoder), **corpus())
    assert "s left" not in caplog.text


@pytest.fixture
def passing(tmp_path, encoder, monkeypatch):
    """A pass over the corpus with a clock of its own: its store, its texts, and the clock."""
    indexer = RowIndexer(tmp_path / "texts", OBJECTIVES, test_fraction=0.5)
    rows = corpus()
    indexer.add_ratings(rows["ratings"])
    spool, _ = indexer.finish()
    store = EmbeddingStore.create(
        tmp_path, dim=encoder.dim, fingerprint="f", shards=spool.shards(shard_rows=2)
    )
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now, sleep=time.sleep)
    monkeypatch.setattr(extract, "time", clock)
    return SimpleNamespace(store=store, spool=spool, clock=clock)


def write_shard(store, number):
    def nothing(rows):
        marks = torch.zeros(rows, dtype=torch.bool)
        return Embeddings(torch.zeros(rows, store.dim), truncated=marks, missing=marks)

    shard = store.shards[number]
    store.write(number, prompts=nothing(shard.prompts), responses=nothing(shard.responses))


def progress_of(passing, missing, *, hidden=False):
    store = passing.store
    return extract._Progress(store.shards, missing, passing.spool, done=store.has, hidden=hidden)


@pytest.mark.usefixtures("not_a_terminal")
def test_the_time_left_follows_from_the_work_left_of_all_processes(passing, caplog):
    caplog.set_level(logging.INFO, "armo")
    store, spool = passing.store, passing.spool
    work = spool.response_bytes.reshape(16, 2).sum(1).double()
    write_shard(store, 0)
    missing = store.missing_shards()
    with progress_of(passing, missing) as progress:
        assert "2 of 32 responses are there already" in caplog.text
        passing.clock.now = 100.0
        # This process is at shard 1; another one has written 2, and 4, which is long.
        write_shard(store, 2)
        write_shard(store, 4)
        progress.show(1, 0.25)
        done = float(work[2] + work[4] + 0.25 * work[1])
        left = float(work[1:].sum()) - done
        assert f"6 of 32 responses, about {100 * left / done:.0f} s left" in caplog.text
        caplog.clear()
        passing.clock.now = 130.0
        progress.show(1, 0.5)
        assert "left" not in caplog.text  # a minute has not passed
        passing.clock.now = 161.0
        progress.show(1, 0.75)
        assert "6 of 32 responses" in caplog.text


@pytest.mark.usefixtures("not_a_terminal")
def test_the_first_process_shows_progress_until_the_others_are_done(passing, monkeypatch):
    monkeypatch.setattr(extract, "LOOK_EVERY_S", 0.01)
    store = passing.store
    for number in range(15):
        write_shard(store, number)
    late = threading.Timer(0.2, write_shard, (store, 15))
    with progress_of(passing, [14, 15]) as progress:
        late.start()
        progress.wait()
    assert store.missing_shards() == []
    late.join()


def test_other_processes_show_nothing_and_do_not_wait(passing, caplog, capsys):
    caplog.set_level(logging.INFO, "armo")
    missing = passing.store.missing_shards()
    with progress_of(passing, missing, hidden=True) as progress:
        for number, share in itertools.product(range(3), (0.5, 1.0)):
            passing.clock.now += 100
            progress.show(number, share)
        progress.wait()
    assert caplog.text == ""
    assert capsys.readouterr() == ("", "")
