import dataclasses

import pytest

from armo.embed import spec as module
from armo.embed.spec import BackboneSpec

# One other value for each field; a field that is added has to be added here.
CHANGES = {
    "id": "other",
    "revision": "main",
    "digest": "abc",
    "layers": (1,),
    "pooling": "mean",
    "prompt_position": "turn_end",
    "max_tokens": 4095,
    "max_prompt_tokens": 2047,
    "on_overlong": "skip",
    "dtype": "bfloat16",
    "tokenizer_digest": "abc",
    "config_digest": "abc",
}
PLACES = ("id", "revision")


def test_every_field_has_a_change_to_try():
    assert list(CHANGES) == [field.name for field in dataclasses.fields(BackboneSpec)]


@pytest.mark.parametrize("name", [name for name in CHANGES if name not in PLACES])
def test_the_fingerprint_changes_with_what_changes_an_embedding(name):
    spec = BackboneSpec("model")
    assert dataclasses.replace(spec, **{name: CHANGES[name]}).fingerprint != spec.fingerprint


def test_no_two_changes_give_the_same_fingerprint():
    spec = BackboneSpec("model")
    changed = [dataclasses.replace(spec, **{name: value}) for name, value in CHANGES.items()]
    assert len({other.fingerprint for other in changed}) == len(CHANGES) - len(PLACES) + 1


def test_the_fingerprint_ignores_where_the_model_was_found():
    spec = BackboneSpec("model", layers=(1, 2), digest="abc")
    moved = BackboneSpec("folder/model", revision="main", layers=[1, 2], digest="abc")
    assert moved.fingerprint == spec.fingerprint


def test_the_fingerprint_changes_with_the_way_of_reading(monkeypatch):
    before = BackboneSpec("model").fingerprint
    monkeypatch.setattr(module, "READING", module.READING + 1)
    assert BackboneSpec("model").fingerprint != before


def test_the_order_of_layers_matters():
    first, second = (BackboneSpec("model", layers=layers) for layers in ((1, 2), (2, 1)))
    assert first.fingerprint != second.fingerprint


def test_lists_from_yaml_become_tuples():
    listed = BackboneSpec("model", layers=[0, 1, -1])
    assert listed.layers == (0, 1, -1)
    assert listed == BackboneSpec("model", layers=(0, 1, -1))
    assert hash(listed) == hash(BackboneSpec("model", layers=(0, 1, -1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ()}, "`layers` needs at least one"),
        ({"max_prompt_tokens": 3}, "`max_prompt_tokens` must be at least 4"),
        ({"max_tokens": 100, "max_prompt_tokens": 97}, "leave at least 4 of `max_tokens`.*97 of"),
        ({"dtype": "int8"}, "`dtype` must be auto, float32, bfloat16 or float16, got 'int8'"),
        ({"pooling": "max"}, "`pooling` must be mean or last, got 'max'"),
        ({"prompt_position": "end"}, "`prompt_position` must be turn_end or generation_prompt"),
        (
            {"on_overlong": "cut"},
            "`on_overlong` must be truncate, error, skip or windows, got 'cut'",
        ),
    ],
    ids=str,
)
def test_a_spec_that_cannot_work_is_refused(no_type_checks, change, message):
    with pytest.raises(ValueError, match=message):
        BackboneSpec("model", **change)


@pytest.mark.parametrize(
    "change",
    [
        {"max_prompt_tokens": 4, "max_tokens": 8},
        *(
            {name: choice}
            for name, choices in {
                "pooling": ("mean", "last"),
                "prompt_position": ("turn_end", "generation_prompt"),
                "on_overlong": ("truncate", "error", "skip", "windows"),
                "dtype": ("auto", "float32", "bfloat16", "float16"),
            }.items()
            for choice in choices
        ),
    ],
    ids=str,
)
def test_every_choice_is_taken(change):
    spec = BackboneSpec("model", **change)
    assert {name: getattr(spec, name) for name in change} == change
