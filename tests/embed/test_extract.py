import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armo.artifacts import ArtifactError, digest_file
from armo.data.checks import split_groups
from armo.data.conversation import (
    Conversation,
    Message,
    PreferencePair,
    RatedResponse,
    ResponseList,
    prompt_group,
)
from armo.data.objectives import Objective, ObjectiveSet
from armo.data.surface import SURFACE_FEATURES, surface_features
from armo.embed.backbone import Backbone, BackboneError
from armo.embed.extract import EmbeddedData, embed_rows, rating_table

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


def rate(id, prompt, response, **ratings):
    return RatedResponse(id, "raters", Conversation(prompt, response), ratings)


def pair(id, prompt, chosen, rejected, *, category):
    return PreferencePair(id, "raters", prompt, chosen, rejected, category=category)


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
LISTS = [
    ResponseList("l0", "raters", DOG, ("No.", "Yes.", "Warn the fox."), (1,), category="safety"),
    ResponseList("l1", "raters", EGG, (SEVEN, "Five words."), (0,), category="advice"),
]
ROWS = [*RATINGS, *PAIRS, *LISTS]
SPLITS = {prompt_group(EGG): "train", prompt_group(FOX): "test", prompt_group(DOG): "train"}
PROMPTS = {row.prompt for row in ROWS}
CONVERSATIONS = {Conversation(row.prompt, text) for row in ROWS for text in row.responses}


class WatchedBackbone(Backbone):
    """Notes the texts it embeds, and gives up when it has embedded `calls` lots of responses."""

    def __init__(self, backbone, *, calls=math.inf):
        super().__init__(backbone.spec, model=backbone.model, tokenizer=backbone.tokenizer)
        self.calls = calls
        self.prompts = []
        self.responses = []

    def embed_prompts(self, prompts, *, max_rows=None):
        self.prompts += prompts
        return super().embed_prompts(prompts, max_rows=max_rows)

    def embed_responses(self, conversations, *, max_rows=None):
        if self.calls == 0:
            raise RuntimeError("cut off")
        self.calls -= 1
        self.responses += conversations
        return super().embed_responses(conversations, max_rows=max_rows)


def embed(folder, backbone, *, ratings=RATINGS, pairs=PAIRS, lists=LISTS, **options):
    embed_rows(
        folder,
        backbone=backbone,
        objectives=OBJECTIVES,
        ratings=ratings,
        pairs=pairs,
        lists=lists,
        **{"splits": SPLITS, "shard_rows": 2, **options},
    )
    return EmbeddedData.load(folder)


def digests(folder):
    return {str(p.relative_to(folder)): digest_file(p) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def folder(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embeddings")
    embed(folder, encoder)
    return folder


@pytest.fixture(scope="module")
def data(folder):
    return EmbeddedData.load(folder)


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
            [Conversation(row.prompt, text) for row in LISTS for text in row.responses],
        ),
    }


COLUMNS = pytest.mark.parametrize("column", ["ratings", "chosen", "rejected", "lists"])


@COLUMNS
def test_each_row_finds_the_embeddings_of_its_own_text(data, encoder, columns, column):
    numbers, conversations = columns[column]
    responses = torch.cat([encoder.embed_responses([c]).values for c in conversations])
    prompts = torch.cat([encoder.embed_prompts([c.prompt]).values for c in conversations])
    torch.testing.assert_close(data.responses.read(numbers), responses, atol=1e-5, rtol=0)
    torch.testing.assert_close(data.prompt_embeddings(numbers), prompts, atol=1e-5, rtol=0)


@COLUMNS
def test_a_shifted_or_dropped_row_would_be_noticed(data, encoder, columns, column):
    numbers, conversations = columns[column]
    responses = torch.cat([encoder.embed_responses([c]).values for c in conversations])
    for wrong in (numbers.roll(1), torch.cat([numbers[1:], numbers[-1:]])):
        assert (data.responses.read(wrong) - responses).abs().max() > 1e-2


@COLUMNS
def test_each_row_finds_the_covariates_of_its_own_text(data, columns, column):
    numbers, conversations = columns[column]
    measured = torch.cat([surface_features([c.response]) for c in conversations])
    assert data.covariates == tuple(SURFACE_FEATURES)
    assert torch.equal(data.tables.covariates[numbers], measured)


def test_shared_prompts_and_responses_are_embedded_once(encoder, tmp_path):
    watched = WatchedBackbone(encoder)
    embed(tmp_path, watched)
    assert len(watched.prompts) == len(PROMPTS) == 4
    assert set(watched.prompts) == PROMPTS
    assert len(watched.responses) == len(CONVERSATIONS) == 10
    assert set(watched.responses) == CONVERSATIONS


def test_rows_with_the_same_text_share_an_embedding_and_others_do_not(data):
    first, _, _, again, other_prompt, _ = data.tables.ratings_response.tolist()
    assert first == again == data.tables.pairs_chosen[1] == data.tables.lists_response[3]
    assert other_prompt != first
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


@given(st.lists(st.dictionaries(st.sampled_from(OBJECTIVES.names), st.floats(1, 4)), max_size=8))
def test_the_rating_table_can_be_mapped_back_to_the_ratings(ratings):
    rows = [rate("r", EGG, SEVEN, **row) for row in ratings]
    table = rating_table(rows, OBJECTIVES)
    assert table.shape == (len(rows), 3)
    for row, values in zip(rows, table.tolist(), strict=True):
        present = {
            objective.name: pytest.approx(objective.from_unit(value))
            for objective, value in zip(OBJECTIVES.objectives, values, strict=True)
            if not math.isnan(value)
        }
        assert row.ratings == present


def test_the_test_side_follows_the_splits(data):
    assert data.tables.ratings_test.tolist() == [False, True, False, False, False, False]
    assert data.tables.pairs_test.tolist() == [True, False, False]
    assert data.tables.lists_test.tolist() == [False, False]


def test_rows_of_one_prompt_are_on_one_side_whatever_the_split(encoder, tmp_path):
    splits = split_groups(ROWS, test_fraction=0.5)
    tables = embed(tmp_path, encoder, splits=splits).tables
    side_of_group = {}
    for numbers, test in (
        (tables.ratings_response, tables.ratings_test),
        (tables.pairs_chosen, tables.pairs_test),
        (tables.lists_response, tables.lists_test[tables.lists_of]),
    ):
        for group, side in zip(tables.group_of_response[numbers].tolist(), test, strict=True):
            assert side_of_group.setdefault(group, side) == side


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


@pytest.mark.parametrize("calls", [1, 3])
def test_a_run_that_was_cut_off_goes_on_where_it_stopped(encoder, folder, tmp_path, calls):
    cut_off = WatchedBackbone(encoder, calls=calls)
    with pytest.raises(RuntimeError, match="cut off"):
        embed(tmp_path, cut_off)
    with pytest.raises(ArtifactError, match=r"missing|No such file"):
        EmbeddedData.load(tmp_path)

    resumed = WatchedBackbone(encoder)
    embed(tmp_path, resumed)
    assert len(cut_off.responses) == 2 * calls
    assert resumed.prompts == []
    assert set(cut_off.responses).isdisjoint(resumed.responses)
    assert {*cut_off.responses, *resumed.responses} == CONVERSATIONS
    assert digests(tmp_path) == digests(folder)


def test_a_finished_run_is_not_computed_again(encoder, folder):
    before = digests(folder)
    watched = WatchedBackbone(encoder, calls=0)
    embed(folder, watched)
    assert watched.prompts == watched.responses == []
    assert digests(folder) == before


def test_rows_that_changed_after_a_run_are_computed_again(encoder, tmp_path):
    embed(tmp_path, encoder)
    changed = [*RATINGS[:-1], rate("r5", DOG, "It sleeps.", honesty=1.0)]
    data = embed(tmp_path, encoder, ratings=changed)
    fresh = encoder.embed_responses([changed[-1].conversation]).values
    stored = data.responses.read(data.tables.ratings_response[-1:])
    torch.testing.assert_close(stored, fresh, atol=1e-5, rtol=0)


def test_pairs_and_lists_may_be_absent(encoder, tmp_path):
    data = embed(tmp_path, encoder, pairs=[], lists=[])
    assert data.tables.pairs_chosen.shape == data.tables.lists_response.shape == (0,)
    assert data.categories == ()
    assert data.examples == []


def test_texts_that_were_cut_are_marked_in_the_store(encoder, tmp_path):
    long = rate("r1", FOX, "Warn of risks! " * 60, honesty=2.0)
    data = embed(tmp_path, encoder, ratings=[RATINGS[0], long])
    marked = data.responses.truncated()[data.tables.ratings_response]
    assert marked.tolist() == [False, True]


def test_a_row_that_cannot_be_embedded_is_named_by_its_text(encoder, tmp_path):
    strict = Backbone(
        dataclasses.replace(encoder.spec, on_overlong="error"),
        model=encoder.model,
        tokenizer=encoder.tokenizer,
    )
    long = rate("long", FOX, "Warn of risks! " * 60, honesty=2.0)
    embed(tmp_path, strict)
    with pytest.raises(BackboneError, match=r"the response has \d+ tokens") as caught:
        embed(tmp_path, strict, ratings=[*RATINGS, long])
    assert "Warn of risks!" in str(caught.value)
