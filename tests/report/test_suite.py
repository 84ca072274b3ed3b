"""Models side by side: every text once, the rows of each set where they belong."""

from dataclasses import replace

import pytest
import torch
from conftest import make_model

from armo.data.benchmarks import Benchmark
from armo.data.conversation import Message, ResponseList
from armo.data.rated_lists import RatedLists
from armo.report import suite
from armo.report.findings import summarize
from armo.report.pages import to_html
from armo.report.reasons import weights_table
from armo.report.suite import (
    PAIRS_OF_LIST,
    TestSets,
    check_sets,
    evaluate_models,
    model_names,
    right_and_wrong,
    save_scores,
    score_models,
)

ANSWERS = ("Seven minutes.", "No **idea** at all!", "- Boil water\n- Wait", "Ask a cook, please.")


def row(id, *, responses=2, correct=(0,), category="facts/eggs"):
    texts = tuple(f"{answer} {id}" for answer in ANSWERS[:responses])
    prompt = (Message("user", f"How do I boil egg number {id}?"),)
    return ResponseList(id, "s", prompt, texts, correct, category=category)


def make_sets():
    pairs = tuple(row(f"p{k}", category=("facts", "how")[k % 2]) for k in range(12))
    lists = tuple(row(f"l{k}", responses=4, correct=(1,)) for k in range(6))
    probes = tuple(row(f"x{k}", correct=(0, 1), category="bold") for k in range(6))
    rated = tuple(row(f"r{k}", responses=4) for k in range(5))
    return TestSets(
        (
            Benchmark("pairs", "Some pairs", "pairs", pairs),
            Benchmark("lists", "Some lists", "pairs", lists),
        ),
        probes=probes,
        rated=RatedLists(rated, torch.rand(20, dtype=torch.float64)),
    )


@pytest.fixture(scope="module")
def sets():
    return make_sets()


@pytest.fixture(scope="module")
def models(encoder):
    made = [make_model(encoder, seed=0), make_model(encoder, seed=1, covariates=("bold",))]
    return {name: (lambda model=model: model) for name, model in zip("ab", made, strict=True)}


@pytest.fixture(scope="module")
def scored(models, sets, tmp_path_factory):
    return score_models(models, sets.rows, tmp_path_factory.mktemp("evaluation"))


def test_every_model_scores_every_row_as_it_scores_text(models, sets, scored):
    texts = [
        [*({"role": m.role, "content": m.content} for m in each.prompt), answer]
        for each in sets.rows
        for answer in ({"role": "assistant", "content": text} for text in each.responses)
    ]
    for name, load in models.items():
        expected = load().score(texts).score
        torch.testing.assert_close(scored.scored[name].score, expected, atol=1e-5, rtol=0)


def test_models_of_one_backbone_share_their_embeddings(models, sets, tmp_path, monkeypatch):
    passes = []
    real = suite.embed_lists

    def counting(folder, rows, **options):
        fresh = not (folder / "lists.json").is_file()
        passes.append(fresh)
        return real(folder, rows, **options)

    monkeypatch.setattr(suite, "embed_lists", counting)
    score_models(models, sets.rows, tmp_path)
    assert passes == [True, False]


def test_the_tables_of_each_set_are_made_from_its_own_scores(sets, scored):
    evaluation = evaluate_models(sets, scored, seed=0)
    names = [table.name for table in evaluation.tables]
    assert len(set(names)) == len(names)
    starts = {"pairs": 0, "lists": 24}
    for benchmark in sets.benchmarks:
        start = starts[benchmark.name]
        credit = {}
        for name, one in scored.scored.items():
            right = []
            for k, each in enumerate(benchmark.rows):
                width = len(each.responses)
                scores = one.score[start + k * width : start + (k + 1) * width]
                best = scores[each.correct[0]]
                others = [s for j, s in enumerate(scores) if j not in each.correct]
                right.append(sum(float(best > s) + 0.5 * float(best == s) for s in others))
                right[-1] /= len(others)
            credit[name] = sum(right) / len(right)
        table = evaluation.table(f"{benchmark.name}_models")
        found = dict(zip(table.column("model"), table.column("overall"), strict=True))
        assert {name: found[name] for name in credit} == pytest.approx(credit)


@pytest.mark.parametrize(
    ("dropped", "absent"),
    [("probes", "bias_probes"), ("rated", "best_of_n")],
)
def test_a_set_that_is_not_there_has_no_table(sets, scored, dropped, absent):
    import dataclasses

    fewer = dataclasses.replace(sets, **{dropped: () if dropped == "probes" else None})
    start = sum(len(each.responses) for each in sets.judged)
    probes = slice(start, start + 2 * len(sets.probes))
    there = torch.ones(len(scored.surface), dtype=torch.bool)
    if dropped == "probes":
        there[probes] = False
    else:
        there[probes.stop :] = False
    kept = there.nonzero()[:, 0]
    part = dataclasses.replace(
        scored,
        scored={name: one.part(kept) for name, one in scored.scored.items()},
        surface=scored.surface[kept],
    )
    whole = {table.name: table for table in evaluate_models(sets, scored).tables}
    left = {table.name: table for table in evaluate_models(fewer, part).tables}
    assert absent in whole
    assert set(whole) - set(left) == {absent}
    assert all(left[name].rows == whole[name].rows for name in left)


def test_right_and_wrong_are_those_of_the_same_list():
    rows = [row("a"), row("b", responses=4, correct=(1, 3)), row("c", correct=(0, 1))]
    right, wrong, prompts = right_and_wrong(rows)
    pairs = set(zip(right.tolist(), wrong.tolist(), strict=True))
    assert pairs == {(0, 1), (3, 2), (3, 4), (5, 2), (5, 4)}
    assert prompts.tolist() == [0, 1, 1, 1, 1]


def test_a_long_list_gives_a_few_pairs_all_over_it():
    texts = tuple(f"answer {k}" for k in range(20))
    prompt = (Message("user", "Name a colour."),)
    long = ResponseList("long", "s", prompt, texts, tuple(range(10)))
    right, wrong, _ = right_and_wrong([long])
    assert len(right) == PAIRS_OF_LIST
    assert bool(((right < 10) & (wrong >= 10)).all())
    assert len(right.unique()) > PAIRS_OF_LIST // 2


def test_prompts_that_come_twice_are_one_to_resample_by():
    first, second = row("a"), row("b")
    twin = ResponseList("twin", "s", first.prompt, second.responses, (0,))
    assert right_and_wrong([first, second, twin])[2].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("paths", "names", "expected"),
    [
        (["checkpoints/demo/model"], None, ["demo"]),
        (["runs/a/model", "runs/b"], None, ["a", "b"]),
        (["org/reward-model"], None, ["reward-model"]),
        (["runs/a/model", "other/a/model"], ["old", "new"], ["old", "new"]),
    ],
)
def test_models_are_named_after_their_folders(paths, names, expected):
    assert model_names(paths, names) == expected


@pytest.mark.parametrize(
    ("paths", "names", "message"),
    [
        (["runs/a/model", "other/a/model"], None, "called 'a'"),
        (["runs/a"], ["x", "y"], "2 names for 1 models"),
        ([], None, "names no model"),
        ([""], None, "`model` has an empty name"),
        (["runs/a"], [""], "`names` has an empty name"),
        (["runs/a"], ["random"], "'random' is a row or column"),
        (["runs/a"], ["what is right"], "'what is right' is a row or column"),
        (["runs/a"], ["subset"], "'subset' is a row or column"),
        (["a", "b"], ["x", "x low"], "'x low' is a row or column"),
        (["a", "b"], ["x y", "x-y"], "two models would be called"),
    ],
)
def test_names_that_do_not_tell_models_apart_are_refused(paths, names, message):
    with pytest.raises(ValueError, match=message):
        model_names(paths, names)


def test_scores_are_saved_in_the_folder_whatever_models_are_called_and_no_old_ones_stay(
    sets, scored, tmp_path
):
    names = ["my model", "../../up"]
    models = replace(
        scored,
        scored=dict(zip(names, scored.scored.values(), strict=True)),
        beta=dict(zip(names, scored.beta.values(), strict=True)),
    )
    old = tmp_path / "out/scores/pairs/old.jsonl"
    old.parent.mkdir(parents=True)
    old.touch()
    save_scores(tmp_path / "out", sets, models)
    files = {path.name for path in tmp_path.rglob("*.jsonl")}
    assert files == {"my-model.jsonl", "--..-up.jsonl"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": (row("a", correct=(0, 1)),)}, "Some pairs: no list has an order"),
        ({"name": "calibration"}, "'calibration' is taken"),
        ({"name": "probes"}, "'probes' is taken"),
        ({"name": "../up"}, "must be that of a file"),
        ({"name": "lists"}, "'lists' is taken"),
    ],
)
def test_sets_that_cannot_be_counted_are_refused_before_they_are_embedded(sets, changes, message):
    first, *rest = sets.benchmarks
    check_sets(sets)
    with pytest.raises(ValueError, match=message):
        check_sets(replace(sets, benchmarks=(replace(first, **changes), *rest)))


def test_best_of_n_needs_a_choice(sets):
    rated = RatedLists((row("r", responses=1),), torch.zeros(1).double())
    with pytest.raises(ValueError, match="best of N needs a list of two"):
        check_sets(replace(sets, rated=rated))


def test_pairs_that_a_model_skipped_are_told_where_the_others_count(sets, scored):
    short = {name: replace(each, score=each.score.clone()) for name, each in scored.scored.items()}
    short["a"].score[0] = torch.nan
    evaluation = evaluate_models(sets, replace(scored, scored=short))
    for name in ("calibration", "abstention_summary"):
        assert "1 pairs left out" in evaluation.table(name).note
        assert "left out" not in evaluate_models(sets, scored).table(name).note


def test_one_prompt_has_no_interval_and_no_evidence(models, tmp_path):
    sets = TestSets((Benchmark("pairs", "One", "pairs", (row("p"),)),), probes=(row("x"),))
    evaluation = evaluate_models(sets, score_models(models, sets.rows, tmp_path))
    for _, _, low, high, _, start, end, p_value in evaluation.table("pairs_models").rows:
        assert (low, high, start, end) == (None,) * 4
        assert p_value in (None, 1.0)
    assert evaluation.table("bias_probes").rows[0][3:5] == (None, None)
    assert "calibration" not in [table.name for table in evaluation.tables]
    assert "biased on" not in str(summarize(evaluation))
    assert "<svg" in to_html(evaluation, title="One")


def test_weights_are_over_prompts_and_not_over_their_lists(sets, scored):
    twice = replace(sets.benchmarks[0], rows=sets.benchmarks[0].rows[:1] * 3)
    rows = slice(0, 2)
    models = {name: each.part(torch.arange(2).repeat(3)) for name, each in scored.scored.items()}
    once = weights_table(twice.rows[:1], {n: e.part(rows) for n, e in scored.scored.items()})
    assert {row[2] for row in once.rows} == {1}
    assert weights_table(twice.rows, models).rows == once.rows
