"""`armo train` on published sets: what a choice brings with it, and the whole way."""

import json
import random
import re
from pathlib import Path

import hydra
import pytest
from conftest import conversation
from omegaconf import OmegaConf
from test_cli import error_of, run

from armo.artifacts import read_json
from armo.data.adapters.pairs import PAIR_SETS
from armo.data.adapters.ratings import RATING_SETS
from armo.embed.extract import EmbeddedData

# A random backbone may leave an objective with little but style.
pytestmark = pytest.mark.filterwarnings("default::armo.fit.decorrelation.DecorrelationWarning")
WORDS = ("egg", "dog", "honest", "risk", "water", "seven", "**bold**", "\n- boil")
ASPECTS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def compose(*overrides):
    with hydra.initialize_config_module("armo.conf", version_base="1.3"):
        return OmegaConf.to_container(hydra.compose("train", [*overrides]).data)


# The configuration.


@pytest.mark.parametrize("name", RATING_SETS)
def test_a_set_brings_its_objectives_and_its_place_on_the_hub(name):
    data = compose(f"data/ratings={name}")
    assert {*data["objectives"]} == {*RATING_SETS[name].objectives}
    assert data["ratings"]["_target_"] == "armo.data.adapters.ratings.stream_adapted_ratings"
    assert data["ratings"]["path"] == RATING_SETS[name].id
    converted = "refs/convert/parquet" if name == "summarize_axes" else None
    assert data["ratings"]["revision"] == converted, "the hub's, of a set with a script"


def test_objectives_that_are_chosen_go_before_those_of_the_set():
    data = compose("data/ratings=helpsteer2", "data/objectives=public")
    assert "autoj-overall" in data["objectives"]
    data = compose("data/ratings=mixture", "data/objectives=[helpsteer2,feedback_collection]")
    assert [*data["objectives"]] == [f"helpsteer2-{x}" for x in ASPECTS] + ["prometheus-score"]


def test_the_pairs_of_armorm_are_ten_published_sets():
    sources = compose("data/pairs=armorm")["pairs"]["sources"]
    assert len(sources) == 10
    for name, settings in sources.items():
        assert settings == {"path": PAIR_SETS[name].id}


# The whole way.


@pytest.fixture
def sets(tmp_path):
    """A folder with HelpSteer2 in its published form, and one of pairs of our own."""
    generator = random.Random(0)
    rated, pairs = [], []
    for number in range(60):
        prompt = f"Prompt {number} {' '.join(generator.choices(WORDS, k=4))}"
        turns = f"{prompt}\n<extra_id_1>Assistant\nWhich?\n<extra_id_1>User\nAny.\n"
        answers = [" ".join(generator.choices(WORDS, k=generator.randint(2, 20))) for _ in "ab"]
        answers = [f"{answer} {k}" for k, answer in enumerate(answers)]
        for answer in answers:
            ratings = {aspect: generator.randint(0, 4) for aspect in ASPECTS}
            rated.append({"prompt": turns, "response": answer, **ratings})
        pair = {"id": f"p{number}", "source": "mine", "prompt": conversation(prompt, "x")[:1]}
        pairs.append({**pair, "chosen": max(answers, key=len), "rejected": min(answers, key=len)})
    for name, rows in (("steer/train", rated), ("steer/validation", rated), ("pairs", pairs)):
        file = tmp_path / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def arguments(sets, encoder_folder):
    return (
        *("train", "experiment=smoke", "data/benchmark=none", "data.min_ratings=5"),
        *("data/pairs=jsonl", f"data.pairs.path={sets / 'pairs.jsonl'}"),
        *(f"embed.backbone.spec.id={encoder_folder}", "embed.backbone.spec.revision=null"),
        *("embed.backbone.spec.digest=null", "embed.backbone.spec.layers=[2]"),
        *("embed.backbone.spec.max_tokens=96", "embed.backbone.spec.max_prompt_tokens=40"),
        *("embed.backbone.device=cpu", "report.device=cpu", "fit.gating.progress=false"),
        f"output_dir={sets / 'run'}",
    )


def test_train_goes_the_whole_way_on_a_local_folder_in_the_published_form(sets, arguments):
    chosen = ("data/ratings=helpsteer2", f"data.ratings.path={sets / 'steer'}")
    status, _, err = run(*arguments, *chosen)
    assert status == 0, err
    config = read_json(sets / "run" / "model" / "config.json")
    names = [objective["name"] for objective in config["objectives"]]
    assert names == [f"helpsteer2-{aspect}" for aspect in ASPECTS]
    data = EmbeddedData.load(sets / "run" / "embeddings")
    assert len(data.tables.ratings) == 120, "the training split alone"
    status, out, err = run(*arguments, *chosen)
    assert status == 0, err
    assert "embed: up to date" in out
    (sets / "steer" / "train.jsonl").open("a").write(
        json.dumps({"prompt": "New", "response": "Yes.", **dict.fromkeys(ASPECTS, 1)})
    )
    _, out, _ = run(*arguments, *chosen, "stages=[embed]")
    assert "embed: up to date" not in out


def test_train_takes_a_mixture_of_published_and_native_sets(sets, arguments):
    (sets / "more").mkdir()
    rated = {"messages": conversation("Prompt x", "Seven."), "ratings": {"helpsteer2-coherence": 3}}
    (sets / "more" / "a.jsonl").write_text(json.dumps({"id": "1", "source": "mine", **rated}))
    steer, more = sets / "steer", sets / "more" / "*.jsonl"
    sources = f"helpsteer2: {{path: {steer}, weight: 0.5, limit: 110}}, mine: {{path: '{more}'}}"
    status, _, err = run(
        *(*arguments, "stages=[embed,heads]", "data/ratings=mixture"),
        *("data/objectives=helpsteer2", f"data.ratings.sources={{{sources}}}"),
    )
    assert status == 0, err
    tables = EmbeddedData.load(sets / "run" / "embeddings").tables
    assert tables.ratings_weight.tolist() == [0.5] * 110 + [1.0]
    inputs = read_json(sets / "run" / "embeddings" / "manifest.json")["inputs"]
    assert {str(steer / "train.jsonl"), str(sets / "more" / "a.jsonl")} <= {*inputs}


def test_a_set_of_your_own_is_read_as_the_readme_says(sets, arguments, monkeypatch):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    blocks = re.findall(r"```(?:python|yaml)\n(# my_\S+(?:.|\n)*?)```", readme)
    ours = {block.split()[1].rstrip(";"): block for block in blocks}
    conf = sets / "my_conf" / "data"
    for name in ("ratings", "objectives"):
        (conf / name).mkdir(parents=True)
    (conf / "ratings" / "tickets.yaml").write_text(ours["my_conf/data/ratings/tickets.yaml"])
    (conf / "objectives" / "mine.yaml").write_text("quality: {low: 1, high: 10}")
    (sets / "my_sets.py").write_text(ours["my_sets.py"])
    monkeypatch.syspath_prepend(sets)
    (sets / "tickets").mkdir()
    rows = [
        {"question": f"{k}?", "reply": f"{WORDS[k % 8]} {k}", "stars": str(1 + k % 10)}
        for k in range(40)
    ]
    (sets / "tickets" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, _, err = run(
        *("train", "--config-dir", sets / "my_conf", *arguments[1:], "stages=[embed,heads]"),
        *("data/ratings=tickets", "data/objectives=mine"),
    )
    assert status == 0, err
    tables = EmbeddedData.load(sets / "run" / "embeddings").tables
    assert tables.ratings[:, 0].tolist() == pytest.approx([(k % 10) / 9 for k in range(40)])


def test_a_set_that_cannot_be_had_is_one_line_that_says_what_to_do(arguments, monkeypatch):
    import datasets

    def load_dataset(path, **_):
        raise ConnectionError(f"Couldn't reach {path}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    error = error_of(*arguments, "data/ratings=ultrafeedback")
    assert "openbmb/UltraFeedback, split train: is neither a file or folder here, nor" in error
    assert "give a local folder with its files as its `path`" in error


def test_a_wrong_choice_of_objectives_is_named(sets, arguments):
    chosen = ("data/ratings=helpsteer2", f"data.ratings.path={sets / 'steer'}")
    error = error_of(*arguments, *chosen, "data/objectives=builtin")
    assert "helpsteer2 rates helpsteer2-helpfulness, " in error
    assert "none of which is declared in `data.objectives`" in error
