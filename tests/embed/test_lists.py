"""Response lists are embedded once each, resumably, and keep their order."""

import dataclasses

import pytest
import torch

from armo.data.conversation import Message, ResponseList
from armo.data.surface import surface_features
from armo.embed.backbone import load_backbone
from armo.embed.boundary import PromptGroup
from armo.embed.lists import embed_lists
from armo.embed.spec import BackboneError

EGG = (Message("user", "How do I boil an egg?"),)
FOX = (Message("user", "Is the fox quick?"),)
ROWS = [
    ResponseList("a", "s", EGG, ("Seven minutes.", "I cannot know."), (0,), split="test"),
    ResponseList("b", "s", FOX, ("Yes.", "**No.**", "Yes."), (0, 2)),
    ResponseList("c", "s", EGG, ("- hot\n- water", "Seven minutes."), (1,), split="train"),
]
TEXTS = [response for row in ROWS for response in row.responses]


@pytest.fixture(params=["encoder", "causal"])
def backbone(request):
    return request.getfixturevalue(request.param)


def gathered(lists):
    responses = lists.responses.read(lists.response_of)
    return responses, lists.prompts.read(lists.prompt_of_response[lists.response_of])


def test_every_response_of_every_list_has_its_own_embedding(backbone, tmp_path):
    lists = embed_lists(tmp_path, ROWS, backbone=backbone)
    responses, prompts = gathered(lists)
    alone = [backbone.embed([PromptGroup(row.prompt, row.responses)]) for row in ROWS]
    torch.testing.assert_close(responses, torch.cat([part.responses.values for part in alone]))
    expected = [
        part.prompts.values.expand(len(row.responses), -1)
        for part, row in zip(alone, ROWS, strict=True)
    ]
    torch.testing.assert_close(prompts, torch.cat(expected))
    assert lists.list_of.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert torch.equal(lists.surface, surface_features(TEXTS))


def test_each_distinct_text_is_embedded_once(encoder, tmp_path):
    lists = embed_lists(tmp_path, ROWS, backbone=encoder)
    assert lists.prompts.rows == 2
    assert lists.responses.rows == 5  # the two answers of one minute, and of yes, are one each


def test_the_side_of_a_split_changes_nothing(encoder, tmp_path):
    bare = [dataclasses.replace(row, split=None) for row in ROWS]
    first = embed_lists(tmp_path / "a", ROWS, backbone=encoder)
    second = embed_lists(tmp_path / "b", bare, backbone=encoder)
    assert torch.equal(gathered(first)[0], gathered(second)[0])


def refuse(*args, **kwargs):
    raise AssertionError("embedded again")


def test_what_is_finished_is_read_not_embedded_again(encoder, tmp_path, monkeypatch):
    before = gathered(embed_lists(tmp_path, ROWS, backbone=encoder))
    monkeypatch.setattr(type(encoder), "embed_chunks", refuse)
    after = gathered(embed_lists(tmp_path, ROWS, backbone=encoder))
    assert all(map(torch.equal, before, after))


def test_a_call_that_was_cut_off_goes_on_at_its_shard(encoder, tmp_path, monkeypatch):
    whole = gathered(embed_lists(tmp_path / "whole", ROWS, backbone=encoder, shard_rows=1))
    real, embedded = type(encoder).embed_chunks, []

    def counting(self, chunks, **options):
        for part in real(self, chunks, **options):
            embedded.append(part)
            yield part
            if len(embedded) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(type(encoder), "embed_chunks", counting)
    with pytest.raises(KeyboardInterrupt):
        embed_lists(tmp_path / "cut", ROWS, backbone=encoder, shard_rows=1)
    resumed = gathered(embed_lists(tmp_path / "cut", ROWS, backbone=encoder, shard_rows=1))
    assert len(embedded) == 2  # one shard per prompt; the first was kept
    assert all(map(torch.equal, whole, resumed))


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: [*rows[1:], rows[0]],
        lambda rows: rows[:2],
        lambda rows: [dataclasses.replace(rows[0], prompt=FOX), *rows[1:]],
        lambda rows: [dataclasses.replace(rows[0], responses=("Six.", "Eight.")), *rows[1:]],
    ],
)
def test_other_rows_are_embedded_anew(encoder, tmp_path, change):
    embed_lists(tmp_path / "same", ROWS, backbone=encoder)
    rows = change(ROWS)
    after = gathered(embed_lists(tmp_path / "same", rows, backbone=encoder))
    fresh = gathered(embed_lists(tmp_path / "fresh", rows, backbone=encoder))
    assert all(map(torch.equal, after, fresh))


def test_another_backbone_does_not_get_these_embeddings(encoder, causal, tmp_path):
    embed_lists(tmp_path / "same", ROWS, backbone=encoder)
    after = gathered(embed_lists(tmp_path / "same", ROWS, backbone=causal))
    fresh = gathered(embed_lists(tmp_path / "fresh", ROWS, backbone=causal))
    assert all(map(torch.equal, after, fresh))


def test_a_row_that_cannot_be_embedded_is_named(encoder, tmp_path):
    spec = dataclasses.replace(
        encoder.spec, max_tokens=24, max_prompt_tokens=16, on_overlong="error"
    )
    strict = load_backbone(spec, device="cpu")
    long = ResponseList("long", "s", EGG, ("Fine.", "Warn of risks! " * 60), (0,))
    with pytest.raises(BackboneError, match="row 'long'"):
        embed_lists(tmp_path, [*ROWS, long], backbone=strict)


def test_what_is_skipped_or_cut_is_marked(encoder, tmp_path):
    long = ResponseList("long", "s", FOX, ("Yes, it is.", "Warn of risks! " * 60), (0,))
    marks = {}
    for on_overlong in ("skip", "truncate"):
        spec = dataclasses.replace(
            encoder.spec, max_tokens=48, max_prompt_tokens=24, on_overlong=on_overlong
        )
        backbone = load_backbone(spec, device="cpu")
        lists = embed_lists(tmp_path / on_overlong, [long], backbone=backbone)
        marks[on_overlong] = (lists.missing.tolist(), lists.truncated.tolist())
    assert marks["skip"][0] == [False, True]
    assert marks["truncate"] == ([False, False], [False, True])
