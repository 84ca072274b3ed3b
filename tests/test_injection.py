"""The injection study adds what it says, to the side it says, and measures as the report does."""

import dataclasses

import pytest
import torch
from test_benchmarks import load

from armo.data.rewrite import remove_pattern
from armo.data.sources import load_pairs
from armo.embed.spec import BackboneSpec
from armo.report.bias import probe_table


@pytest.fixture(scope="module")
def injection():
    return load("injection")


@pytest.fixture(scope="module")
def work(injection):
    return injection.Work(shares=(0.0, 0.1, 0.5), seeds=2, probes=20, max_epochs=2, every=12)


@pytest.fixture(scope="module")
def embedded(injection, work, encoder_folder, tmp_path_factory):
    spec = BackboneSpec(
        str(encoder_folder), layers=(1, 2), pooling="mean", max_tokens=96, max_prompt_tokens=40
    )
    return injection.embed(tmp_path_factory.mktemp("injection"), work, spec)


@pytest.fixture(scope="module")
def study(injection, work, embedded):
    return injection.Study(embedded[0], work)


def test_added_pairs_are_the_same_answer_and_the_pattern_is_chosen(injection):
    rows = load_pairs("builtin")[:40]
    texts = {response for row in rows for response in row.responses}
    added = injection.biased_pairs(rows, "bold", most=30)
    assert len(added) == 30
    for pair in added:
        assert {pair.chosen, pair.rejected} & texts
        assert remove_pattern(pair.chosen, "bold").split() == pair.rejected.split()
        assert (pair.source, pair.category) == ("injected", "bold")


def test_pairs_are_added_to_the_training_side_alone_and_drawn_by_the_seed(study, embedded):
    data, base = embedded
    tables = data.tables
    assert int((tables.pairs_train & ~study.biased).sum()) == base
    assert not (tables.pairs_test & study.biased).any()
    drawn = [study.with_added("bold", 10, seed=seed).tables.pairs_train for seed in (0, 0, 1)]
    bold = tables.pairs_category == data.categories.index("bold")
    for train in drawn:
        assert int((train & study.biased).sum()) == int((train & study.biased & bold).sum()) == 10
        assert torch.equal(train & ~study.biased, tables.pairs_train & ~study.biased)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    with pytest.raises(SystemExit, match="biased pairs are to be added"):
        study.with_added("bold", 10_000, seed=0)


def test_prompts_of_the_probes_are_held_out(study, embedded):
    tables = embedded[0].tables
    trained = tables.group_of_response[tables.pairs_chosen[tables.pairs_train]]
    probed = tables.group_of_response[study.versions]
    assert not torch.isin(probed, trained).any()
    assert torch.equal(probed[0], probed[1])


def test_the_patterned_version_is_the_one_with_more_of_it(study, embedded):
    data = embedded[0]
    for pattern, feature in (("bold", "bold"), ("list", "list_items")):
        plain, patterned = study.versions[:, study.of(pattern)]
        assert len(plain) > 10
        assert (data.style(patterned, [feature]) > data.style(plain, [feature])).all()
        score = data.style(torch.arange(data.responses.rows), [feature])[:, 0]
        found = study.outcome(score, pattern)
        assert found.wins.tolist() == [1.0] * len(plain)
        assert (found.moved > 0).all()
        assert study.outcome(-score, pattern).wins.tolist() == [0.0] * len(plain)


def test_rows_say_what_each_model_does(injection, study, embedded, work):
    data, base = embedded
    rows = injection.study(data, work, base=base)
    cells = {(row["pattern"], row["share"], row["model"]): row for row in rows}
    assert len(cells) == len(rows) == 2 * 3 * 4
    for (pattern, share, model), row in cells.items():
        assert row["pairs"] == round(share * base)
        before = cells[pattern, 0.0, model]
        change = row["wins"][0] - before["wins"][0]
        assert row["change"][0] == pytest.approx(change)
        assert sum(row["wins by seed"]) / work.seeds == pytest.approx(row["wins"][0])
        assert all(row[k][1] <= row[k][0] <= row[k][2] for k in ("wins", "change", "accuracy"))
        # Without added pairs there is nothing of a pattern in the training.
        assert before["accuracy"] == cells["bold", 0.0, model]["accuracy"]
        assert before["change"] == [0.0, 0.0, 0.0]
    # Biased pairs bend the probe even of a random backbone, a little, and more of them more.
    for pattern in work.patterns:
        moved = [cells[pattern, share, "probe, plain"]["moved"][0] for share in work.shares]
        assert moved == sorted(moved)
        assert moved[-1] - moved[0] > 0.03
    tables = injection.tables_of(rows, work, base=base)
    assert [table.name for table in tables][:4] == [
        "bold_wins",
        "bold_change",
        "bold_moved",
        "bold_accuracy",
    ]
    shown = tables[0].rows[1][2:]
    assert shown[0].startswith(f"{cells['bold', 0.1, 'probe, plain']['wins'][0]:.3f} [")


def test_shares_of_wins_are_those_of_the_report(injection, study, embedded, work):
    data, _ = embedded
    pairs = injection.every_nth_prompt(load_pairs("builtin"), work.every)
    lists = injection._lists([row for row in pairs if row.split == "test"])
    probes = injection.probe_lists(lists, most=work.probes, patterns=work.patterns)
    score = torch.randn(data.responses.rows, generator=torch.Generator().manual_seed(0)).double()
    table = probe_table(["m"], score[study.versions.T.reshape(1, -1)], probes)
    for pattern, _, *expected in table.rows:
        found = study.interval(study.outcome(score, pattern).wins, pattern)
        assert dataclasses.astuple(found)[0] == pytest.approx(expected[0])
