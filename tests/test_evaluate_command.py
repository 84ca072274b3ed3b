"""`armo evaluate` as a user runs it, on tiny models and sets in their published schemas."""

import csv
import json
import shutil

import pytest
from conftest import make_model
from huggingface_hub import ModelCard
from test_cli import _elsewhere, error_of, run, write_rows  # noqa: F401  (a fixture among them)

from armo.embed.backbone import Backbone
from armo.model.reward_model import ArmoRewardModel


@pytest.fixture(scope="module")
def folders(encoder, tmp_path_factory):
    made = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("run") / f"seed{seed}" / "model"
        golden = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]]
        make_model(encoder, seed=seed).save_pretrained(folder, golden=golden)
        made.append(str(folder))
    return made


@pytest.fixture
def pairs(tmp_path):
    rows = [
        {
            "id": f"p{k}",
            "source": "judges",
            "prompt": [{"role": "user", "content": f"Which dog is number {k}?"}],
            "chosen": f"The lazy one, number {k}.",
            "rejected": "I cannot know that!",
            "category": ("facts", "chat")[k % 2],
        }
        for k in range(12)
    ]
    return write_rows(tmp_path / "pairs.jsonl", rows)


def evaluate(folders, *more):
    models = f"model=[{','.join(folders)}]"
    return run("evaluate", models, "output_dir=out", "probes=5", *more)


def test_two_models_side_by_side(folders, pairs, tmp_path):
    status, out, err = evaluate(folders, "data/benchmark=pairs", f"data.benchmark.path={pairs}")
    assert status == 0, err
    for name in ("seed0", "seed1", "longer", "facts", "saved out/report.html"):
        assert name in out
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {row["model"] for row in report["pairs_models"]} >= {"seed0", "seed1", "random"}
    overall = {row["model"]: row["overall"] for row in report["pairs_models"]}
    # From the texts themselves, the slow way.
    for name, folder in zip(("seed0", "seed1"), folders, strict=True):
        model = ArmoRewardModel.from_pretrained(folder, device="cpu")
        credit = []
        for row in map(json.loads, pairs.read_text().splitlines()):
            chosen, rejected = model.score_responses(
                row["prompt"], [row["chosen"], row["rejected"]]
            ).score
            credit.append(float(chosen > rejected))
        assert overall[name] == pytest.approx(sum(credit) / len(credit))
        scores = [json.loads(line) for line in (tmp_path / f"out/scores/pairs/{name}.jsonl").open()]
        assert [row["id"] for row in scores] == [f"p{k}" for k in range(12)]
        assert [float(a > b) for a, b in (row["scores"] for row in scores)] == credit
    with (tmp_path / "out/tables/pairs_models.csv").open(newline="") as file:
        rows = {row["model"]: row["overall"] for row in csv.DictReader(file)}
    assert float(rows["seed0"]) == pytest.approx(overall["seed0"])
    page = (tmp_path / "out/report.html").read_text()
    assert "<svg" in page
    assert "http-equiv" not in page


def test_what_is_embedded_is_not_embedded_again(folders, pairs, monkeypatch):
    options = ("data/benchmark=pairs", f"data.benchmark.path={pairs}")
    assert evaluate(folders[:1], *options)[0] == 0

    def refuse(*args, **kwargs):
        raise AssertionError("embedded again")

    monkeypatch.setattr(Backbone, "embed_chunks", refuse)
    status, _, err = evaluate(folders, *options)
    assert status == 0, err


def test_a_suite_of_benchmarks_in_their_published_schemas(folders, tmp_path):
    for name, row in {
        "reward-bench": {
            "id": 1,
            "prompt": "Which dog?",
            "chosen": "The lazy one.",
            "rejected": "None!",
            "subset": "alpacaeval-easy",
        },
        "RM-Bench": {
            "id": "1",
            "prompt": "Which fox?",
            "chosen": ["Quick.", "The quick one.", "The **quick** one."],
            "rejected": ["Slow.", "The slow one.", "The **slow** one."],
            "domain": "chat",
        },
    }.items():
        (tmp_path / "suite" / name).mkdir(parents=True)
        write_rows(tmp_path / "suite" / name / "rows.jsonl", [row])
    status, out, err = evaluate(
        folders, "data/benchmark=suite", f"data.benchmark.path={tmp_path / 'suite'}"
    )
    assert status == 0, err
    assert "RM-Bench" in out
    files = {str(path.relative_to(tmp_path)) for path in (tmp_path / "out/scores").rglob("*.json*")}
    assert "out/scores/rm_bench/seed0.jsonl" in files
    assert any(name.startswith("out/scores/reward_bench_files/eval-set/") for name in files)


def test_the_card_is_filled_from_the_same_numbers(folders, pairs, tmp_path):
    options = ("data/benchmark=pairs", f"data.benchmark.path={pairs}", "card=true")
    status, _, err = evaluate(folders, *options)
    assert status == 0, err
    report = json.loads((tmp_path / "out/report.json").read_text())
    overall = {row["model"]: row["overall"] for row in report["pairs_models"]}
    for name, folder in zip(("seed0", "seed1"), folders, strict=True):
        card = ModelCard.load(f"{folder}/README.md")
        (result,) = card.data.eval_results
        assert result.dataset_name == "pairs"
        assert result.metric_value == pytest.approx(overall[name], abs=1e-4)
        assert "## Evaluation" in card.text
        assert run("verify", f"model={folder}")[0] == 0


def test_best_of_rated_lists(folders, pairs, tmp_path):
    rows = [
        {
            "id": f"{prompt}-{k}",
            "source": "raters",
            "messages": [
                {"role": "user", "content": f"Which egg is number {prompt}?"},
                {"role": "assistant", "content": f"{'The ' * k}number {k}."},
            ],
            "ratings": {"quality": k},
        }
        for prompt in range(3)
        for k in range(4)
    ]
    rated = write_rows(tmp_path / "rated.jsonl", rows)
    status, _, err = evaluate(
        folders,
        "data/benchmark=pairs",
        f"data.benchmark.path={pairs}",
        "data/best_of_n=jsonl",
        f"data.best_of_n.path={rated}",
        "data.best_of_n.gold={name: quality, low: 0, high: 3}",
    )
    assert status == 0, err
    table = json.loads((tmp_path / "out/report.json").read_text())["best_of_n"]
    gold = {(row["model"], row["n"]): row["gold"] for row in table}
    assert gold["gold itself", 4] == pytest.approx(1.0)
    assert gold["seed0", 1] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data/benchmark=builtin"], "data/benchmark=pairs"),
        (["data/benchmark=none"], "data/benchmark=pairs"),
        (["names=[x]"], "1 names for 2 models"),
        (["names=[x,x]"], "two models would be called 'x'"),
        (["names=xy"], "1 names for 2 models"),
        (["model=null"], "`model` names no model"),
        (["probes=-1"], "`probes` must be 0 or more, got -1"),
        (["names=[random,x]"], "'random' is a row or column"),
        (["data/benchmark=pairs", "data.benchmark.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["data/benchmark=suite", "data.benchmark.path=nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_before_any_work(folders, changes, message):
    models = f"model=[{','.join(folders)}]"
    assert message in error_of("evaluate", models, "output_dir=out", *changes)


def test_a_model_that_is_damaged_stops_it_before_any_work(folders, tmp_path, pairs):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    models = f"model=[{folders[0]},{broken}]"
    options = ("data/benchmark=pairs", f"data.benchmark.path={pairs}", "output_dir=out")
    assert "broken" in error_of("evaluate", models, *options)
    assert not (tmp_path / "out").exists()


def test_the_card_of_a_model_on_the_hub_is_not_ours(pairs):
    options = ("data/benchmark=pairs", f"data.benchmark.path={pairs}", "card=true")
    assert "org/model is none" in error_of("evaluate", "model=org/model", *options)


def test_a_set_that_cannot_be_read_or_counted_is_told_in_its_own_words(folders, tmp_path):
    tied = {"id": "a", "source": "s", "prompt": [{"role": "user", "content": "Which?"}]}
    rows = [{**tied, "responses": ["One.", "Two."], "ranks": [1, 1]}]
    path = write_rows(tmp_path / "tied.jsonl", rows)
    options = ("data/benchmark=pairs", f"data.benchmark.path={path}", "output_dir=out")
    error = error_of("evaluate", f"model={folders[0]}", *options)
    assert error.strip() == "armo: error: tied: no list has an order: in each, all responses tie"
    assert not (tmp_path / "out").exists()
    path.write_text("{}\n")
    error = error_of("evaluate", f"model={folders[0]}", *options)
    assert "target" not in error
    assert error.startswith(f"armo: error: {path}:1: field")


def test_folders_with_spaces_and_an_interruption(folders, pairs, tmp_path, monkeypatch):
    spaced = tmp_path / "my model"
    shutil.copytree(folders[0], spaced)
    options = (
        f"model='{spaced}'",
        "output_dir='out of this'",
        "data/benchmark=pairs",
        f"data.benchmark.path={pairs}",
        "probes=0",
        "names=[with spaces]",
    )

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Backbone, "embed_chunks", interrupt)
        status, _, err = run("evaluate", *options)
    assert status == 130
    assert "goes on where it was" in err
    status, _, err = run("evaluate", *options)
    assert status == 0, err
    assert (tmp_path / "out of this/scores/pairs/with-spaces.jsonl").is_file()
    assert "bias_probes" not in json.loads((tmp_path / "out of this/report.json").read_text())


def test_sections_of_other_test_sets_stay_in_the_card(folders, pairs, tmp_path):
    folder = tmp_path / "card"
    shutil.copytree(folders[0], folder, ignore=shutil.ignore_patterns("README.md"))
    for name in ("first", "second", "second"):
        path = shutil.copy(pairs, tmp_path / f"{name}.jsonl")
        options = ("data/benchmark=pairs", f"data.benchmark.path={path}", "card=true")
        status, _, err = run("evaluate", f"model={folder}", "output_dir=out", "probes=0", *options)
        assert status == 0, err
        assert "metadata" not in err
    card = ModelCard.load(folder / "README.md")
    assert [each.dataset_name for each in card.data.eval_results] == ["first", "second"]
    assert card.text.count("## Evaluation on first\n") == 1
    assert card.text.count("## Evaluation on second\n") == 1


def test_help_names_the_test_sets():
    status, out, _ = run("evaluate", "--help")
    assert status == 0
    sets = ("builtin_test", "reward_bench", "reward_bench_2", "rm_bench", "judge_bench", "suite")
    assert all(name in out for name in sets)
