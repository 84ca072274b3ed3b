"""Rated sets, from hand-made rows in the published schema."""

import pytest

from armo.data.adapters.ratings import RATING_SETS

HELPSTEER = {
    "prompt": "Name a river.",
    "response": "The Nile.",
    "helpfulness": 3,
    "correctness": 4,
    "coherence": 4,
    "complexity": 1,
    "verbosity": 0,
}


def read(name, row):
    """All that an adapter makes of one row: rows that are used, reasons for those that are not."""
    made = [*RATING_SETS[name].rows(row, "id")]
    return [row for row in made if not hasattr(row, "reason")], [
        row.reason for row in made if hasattr(row, "reason")
    ]


@pytest.mark.parametrize("name", ["helpsteer", "helpsteer2"])
def test_helpsteer_rows_have_five_ratings(name):
    (row,), _ = read(name, HELPSTEER)
    assert (row.id, row.source, row.prompt[0].content) == ("id", name, "Name a river.")
    assert row.ratings == {
        f"{name}-helpfulness": 3,
        f"{name}-correctness": 4,
        f"{name}-coherence": 4,
        f"{name}-complexity": 1,
        f"{name}-verbosity": 0,
    }


def test_the_turns_of_helpsteer2_stand_in_one_text():
    prompt = "Hi\n\n<extra_id_1>Assistant\nHello.\nWell?\n<extra_id_1>User\nName a river.\n"
    (row,), _ = read("helpsteer2", {**HELPSTEER, "prompt": prompt})
    assert [(turn.role, turn.content) for turn in row.prompt] == [
        ("user", "Hi"),
        ("assistant", "Hello.\nWell?"),
        ("user", "Name a river."),
    ]
    with pytest.raises(ValueError, match="a turn of 'System'"):
        read("helpsteer2", {**HELPSTEER, "prompt": "Hi\n<extra_id_1>System\nBe brief."})
