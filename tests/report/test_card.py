"""The card of a model: what is put in, where, and that nothing else of it changes."""

import pytest
from huggingface_hub import ModelCard

from armo.artifacts import MANIFEST, ArtifactError, damaged_files, finish_artifact
from armo.embed.spec import BackboneSpec
from armo.model.pretrained import CARD
from armo.report.card import fill_card, new_card
from armo.report.tables import Table

TABLE = Table("standings", "Who is right", ("model", "accuracy"), (("ours", 0.75),))
OTHER = Table("standings", "Who is right", ("model", "accuracy"), (("ours", 0.5),))


@pytest.fixture
def folder(tmp_path):
    card = new_card([TABLE], spec=BackboneSpec("org/model"), usage="\n## Use\n\nLoad it.\n")
    (tmp_path / CARD).write_text(card)
    return tmp_path


def filled(folder, table, *, title="Measured", accuracies=(("Pairs", 0.81234),)):
    fill_card(folder, [table], title=title, name="demo", accuracies=accuracies)
    return (folder / CARD).read_text()


def test_a_new_card_has_the_metadata_that_the_hub_reads(folder):
    data = ModelCard((folder / CARD).read_text()).data.to_dict()
    assert data["library_name"] == "armo"
    assert data["pipeline_tag"] == "text-classification"
    assert data["base_model"] == "org/model"


def test_a_backbone_in_a_folder_is_no_base_model(tmp_path):
    card = new_card([TABLE], spec=BackboneSpec(str(tmp_path)), usage="")
    assert "base_model" not in ModelCard(card).data.to_dict()


def test_the_section_stands_before_the_usage(folder):
    text = filled(folder, TABLE)
    assert text.index("## Measured") < text.index("| ours | 0.750 |", text.index("## Measured"))
    assert text.index("## Measured") < text.index("## Use")
    assert text.count("# An armo reward model") == 1


def test_a_section_is_replaced_by_one_of_its_title_alone(folder):
    filled(folder, TABLE, title="Other")
    before = filled(folder, TABLE)
    after = filled(folder, OTHER)
    assert after == before[::-1].replace("| 057.0 | sruo |", "| 005.0 | sruo |", 1)[::-1]
    assert after.count("## Measured") == after.count("## Other") == 1


def test_filling_twice_changes_nothing(folder):
    assert filled(folder, TABLE) == filled(folder, TABLE)


def test_results_of_several_benchmarks_stay_side_by_side(folder):
    filled(folder, TABLE)
    filled(folder, TABLE, title="Evaluation", accuracies=[("RM-Bench", 0.7)])
    results = ModelCard(filled(folder, OTHER, accuracies=[("Pairs", 0.5)])).data.eval_results
    assert {(r.dataset_name, r.metric_value) for r in results} == {
        ("RM-Bench", 0.7),
        ("Pairs", 0.5),
    }


@pytest.mark.parametrize("text", [None, "# Mine\n"])
def test_a_folder_without_a_card_or_metadata_gets_them_and_no_warning(tmp_path, caplog, text):
    if text is not None:
        (tmp_path / CARD).write_text(text)
    card = filled(tmp_path, TABLE, accuracies=[("JudgeBench, GPT-4o", 0.5)])
    assert "| ours | 0.750 |" in card
    data = ModelCard(card).data
    assert data.to_dict()["library_name"] == "armo"
    assert [each.dataset_type for each in data.eval_results] == ["judgebench-gpt-4o"]
    assert not caplog.text


def test_text_that_people_wrote_stays(folder):
    path = folder / CARD
    path.write_text(path.read_text() + "\nWritten by hand: é — ü.\n")
    assert filled(folder, TABLE).endswith("\nWritten by hand: é — ü.\n")


def test_the_artifact_stays_whole(folder):
    finish_artifact(folder, key="k", settings={}, inputs={})
    filled(folder, TABLE)
    assert (folder / MANIFEST).is_file()
    assert damaged_files(folder) == []


def test_unreadable_metadata_are_one_line(tmp_path):
    (tmp_path / CARD).write_text("---\na: [\n---\n\n# Mine\n")
    with pytest.raises(ArtifactError, match=r"README\.md: unreadable metadata"):
        filled(tmp_path, TABLE)
