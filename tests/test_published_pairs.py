"""`armo train` on published pair sets: every option, and the whole way on a local folder."""

import json
import random

import hydra
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from test_cli import run

from armo.data.adapters.pairs import PAIR_SETS
from armo.embed.extract import EmbeddedData

# A random backbone may leave an objective with little but style.
pytestmark = pytest.mark.filterwarnings("default::armo.fit.decorrelation.DecorrelationWarning")
WORDS = ("egg", "dog", "honest", "risk", "water", "seven", "**bold**", "\n- boil")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", PAIR_SETS)
def test_an_option_reads_its_set_on_the_hub_by_name(name, monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, **settings):
        asked.append((path, settings))
        return iter([dict.fromkeys(PAIR_SETS[name].columns)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with hydra.initialize_config_module("armo.conf", version_base="1.3"):
        section = hydra.compose("train", [f"data/pairs={name}"]).data.pairs
    with pytest.raises(ValueError, match=PAIR_SETS[name].id):
        [*instantiate(section, _convert_="all")()]
    ((path, settings),) = asked
    adapter = PAIR_SETS[name]
    assert path == adapter.id
    assert settings["streaming"]
    assert (settings["name"], settings["data_dir"]) == (adapter.config, adapter.folder)
    assert (settings["split"],) == adapter.splits
    assert settings["revision"] == OmegaConf.select(section, "revision")


@pytest.fixture
def folder(tmp_path):
    """A copy of HelpSteer2's repository with its preferences, ties among them."""
    generator, rows = random.Random(0), []
    for number in range(60):
        prompt = f"Prompt {number} {' '.join(generator.choices(WORDS, k=4))}"
        answers = [
            f"{' '.join(generator.choices(WORDS, k=generator.randint(2, 20)))} {k}" for k in "ab"
        ]
        strength = generator.randint(-3, 3)
        rows.append(
            {
                "split": "val" if number % 5 == 0 else "train",
                "prompt": f"{prompt}\n<extra_id_1>Assistant\nHow?\n<extra_id_1>User\nSo.",
                "response_1": answers[0],
                "response_2": answers[1],
                "preference_strength": strength,
                "three_most_similar_preferences": [{"strength": strength}] * 3,
            }
        )
    file = tmp_path / "HelpSteer2" / "preference" / "preference.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file.parents[1], rows


def test_train_goes_the_whole_way_on_preferences_in_the_published_form(
    folder, tmp_path, encoder_folder
):
    path, rows = folder
    status, _, err = run(
        *("train", "experiment=smoke", "data/benchmark=none", "data.min_ratings=5"),
        *("data/pairs=helpsteer2_preference", f"data.pairs.path={path}"),
        *(f"embed.backbone.spec.id={encoder_folder}", "embed.backbone.spec.revision=null"),
        *("embed.backbone.spec.digest=null", "embed.backbone.spec.layers=[2]"),
        *("embed.backbone.spec.max_tokens=96", "embed.backbone.spec.max_prompt_tokens=40"),
        *("embed.backbone.device=cpu", "report.device=cpu", "fit.gating.progress=false"),
        f"output_dir={tmp_path / 'run'}",
    )
    assert status == 0, err
    tables = EmbeddedData.load(tmp_path / "run" / "embeddings").tables
    strengths = [row["preference_strength"] for row in rows if row["split"] == "train"]
    assert tables.pairs_margin.tolist() == [abs(strength) for strength in strengths]
    assert (tables.pairs_preference == 0.5).tolist() == [strength == 0 for strength in strengths]
