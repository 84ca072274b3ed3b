import dataclasses
import io
import json
import math
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import conversation
from rich.console import Console
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from test_cli import error_of, run, write_rows
from transformers import AutoTokenizer

from armo.artifacts import digest_file, read_json, require_artifact
from armo.data.conversation import Message, prompt_group
from armo.data.surface import SURFACE_FEATURES, SURFACE_VERSION, surface_features
from armo.embed.extract import EmbeddedData, Team, outer_rank
from armo.fit.decorrelation import (
    METHODS,
    STYLE_FEATURES,
    DecorrelationSummary,
    load_transforms,
    style_weights,
)
from armo.fit.heads import FittedHeads, fit_heads
from armo.fit.logistic import LabelledRows, fit_judgements
from armo.fit.probe import PENALTIES, load_probe
from armo.fit.training import GatingTrainer, load_gating
from armo.model.reward_model import ArmoRewardModel
from armo.stages import (
    FOLDERS,
    STAGES,
    Run,
    decorrelation_table,
    out_of_fold_rewards,
    row_weights,
    train_gate,
    training_judgements,
    training_preferences,
)

# A random backbone may leave an objective with little but style.
pytestmark = pytest.mark.filterwarnings("default::armo.fit.decorrelation.DecorrelationWarning")

WORDS = (
    "egg",
    "dog",
    "fox",
    "honest",
    "risk",
    "water",
    "lazy!",
    "seven",
    "**bold**",
    "boil",
    "\n-",
)
FILES = {
    "embed": ("rows.safetensors", "rows.json", "store.json", "shard-00000.safetensors"),
    "heads": ("heads.safetensors", "heads.json"),
    "decorrelation": ("decorrelated.safetensors", "undecorrelated.safetensors"),
    "gating": ("gate.safetensors", "gate.json", "undecorrelated.safetensors"),
    "model": ("config.json", "model.safetensors", "golden.json", "README.md"),
    "report": ("report.json", "report.md", "report.html", "tables/rivals.csv"),
}


def write_data(folder):
    """Sixty prompts with two rated responses and a pair each; longer answers are better."""
    generator = random.Random(0)
    ratings, pairs = [], []
    for k in range(60):
        text = f"Prompt {k} {' '.join(generator.choices(WORDS, k=5))}"
        split = "test" if k % 5 == 0 else "train"
        common = {"source": "test", "split": split, "category": ("code", "advice")[k % 2]}
        answers = [" ".join(generator.choices(WORDS, k=generator.randint(2, 20))) for _ in "ab"]
        answers = [f"{n} {answer}" for n, answer in enumerate(answers)]
        for n, answer in enumerate(answers):
            rated = {
                "helpfulness": min(5, 1 + answer.count("o") // 2),
                "honesty": 1 + generator.randint(0, 4),
                "safety": 1 + generator.randint(0, 4),
                "verbosity": min(4, len(answer) // 30),
                "formatting": min(4, answer.count("*") // 4 + answer.count("-")),
            }
            messages = conversation(text, answer)
            ratings.append({"id": f"r{k}-{n}", **common, "messages": messages, "ratings": rated})
        answers.sort(key=lambda answer: answer.count("o"), reverse=True)
        pair = {"prompt": messages[:1], "chosen": answers[0], "rejected": answers[1]}
        pairs.append({"id": f"p{k}", **common, **pair})
    write_rows(folder / "ratings.jsonl", ratings)
    write_rows(folder / "pairs.jsonl", pairs)
    return ratings, pairs


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return folder, *write_data(folder)


@pytest.fixture(scope="module")
def arguments(rows, encoder_folder):
    return (
        *("train", "experiment=smoke", "data/benchmark=none"),
        *("data/ratings=jsonl", f"data.ratings.path={rows[0] / 'ratings.jsonl'}"),
        *("data/pairs=jsonl", f"data.pairs.path={rows[0] / 'pairs.jsonl'}"),
        *(f"embed.backbone.spec.id={encoder_folder}", "embed.backbone.spec.revision=null"),
        *("embed.backbone.spec.digest=null", "embed.backbone.spec.layers=[2]"),
        *("embed.backbone.spec.max_tokens=96", "embed.backbone.spec.max_prompt_tokens=40"),
        *("embed.backbone.device=cpu", "report.device=cpu", "embed.shard_rows=50"),
        "fit.gating.progress=false",
    )


@pytest.fixture(scope="module")
def trained(arguments, tmp_path_factory):
    """The folder of a whole run, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    status, out, err = run(*arguments, f"output_dir={folder}")
    assert status == 0, err
    return folder, out


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of the run, to be changed; the stages do not know where they stand."""
    return shutil.copytree(trained[0], tmp_path / "run")


def state_of(folder, stage):
    """Bytes and time of change of every file of a stage."""
    return {
        file: (digest_file(file), file.stat().st_mtime_ns)
        for file in (folder / FOLDERS[stage]).rglob("*")
        if file.is_file()
    }


def run_again(arguments, folder, *more):
    status, out, err = run(*arguments, f"output_dir={folder}", *more)
    assert status == 0, err
    return {stage for stage in STAGES if f"{stage}: up to date" not in out}


def flip_byte(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 0x40
    file.write_bytes(content)


def test_every_stage_leaves_its_whole_artifact(trained):
    folder, _ = trained
    for stage, names in FILES.items():
        manifest = require_artifact(folder / FOLDERS[stage], stage=stage)
        assert set(names) <= set(manifest["files"])
    assert {path.name for path in folder.iterdir()} >= set(FOLDERS.values())


def test_every_stage_shows_its_results(trained):
    _, out = trained
    for title in ("Data", "Heads", "Decorrelation", "Gate", "Rewards against ratings"):
        assert title in out
    assert "up to date" not in out


def test_the_second_run_does_nothing(trained, arguments):
    folder, _ = trained
    before = {stage: state_of(folder, stage) for stage in STAGES}
    assert run_again(arguments, folder) == set()
    assert {stage: state_of(folder, stage) for stage in STAGES} == before


def test_a_setting_of_the_gate_runs_only_what_depends_on_it_again(folder, arguments):
    before = {stage: state_of(folder, stage) for stage in STAGES}
    again = run_again(arguments, folder, "fit.gating.hidden_dim=8")
    assert again == {"gating", "model", "report"}
    for stage in ("embed", "heads", "decorrelation"):
        assert state_of(folder, stage) == before[stage]
    assert read_json(folder / "model" / "config.json")["gate"]["hidden_dim"] == 8


def test_the_device_of_the_backbone_changes_nothing(folder, arguments):
    assert run_again(arguments, folder, "embed.backbone.batch_tokens=512") == set()
    assert run_again(arguments, folder, "embed.trainer.devices=2", "embed.shard_rows=7") == set()


def test_a_changed_data_file_runs_everything_again(folder, rows, arguments, tmp_path):
    changed = [{**row, "ratings": {**row["ratings"], "honesty": 3}} for row in rows[1][:1]]
    write_rows(tmp_path / "ratings.jsonl", [*changed, *rows[1][1:]])
    again = run_again(arguments, folder, f"data.ratings.path={tmp_path / 'ratings.jsonl'}")
    assert again == set(STAGES)


def test_the_same_run_elsewhere_gives_the_same_bytes(trained, arguments, tmp_path):
    run_again(arguments, tmp_path / "run")
    for name in ("embeddings/rows.safetensors", "heads/heads.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (trained[0] / name).read_bytes()
    first, second = (
        ArmoRewardModel.from_pretrained(folder / "model", device="cpu").state_dict()
        for folder in (trained[0], tmp_path / "run")
    )
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-6, rtol=0)


@pytest.mark.parametrize("stage", ["heads", "report"])
def test_a_stage_before_its_inputs_names_the_stage_to_run(arguments, folder, stage):
    needed = STAGES[STAGES.index(stage) - 1]
    shutil.rmtree(folder / FOLDERS[needed])
    shutil.rmtree(folder / FOLDERS[stage])
    error = error_of(*arguments, f"stages=[{stage}]", f"output_dir={folder}")
    assert f"No finished `{needed}` artifact" in error
    assert f"armo train stages=[{needed}]" in error


def test_a_damaged_shard_is_noticed_by_the_stages_that_read_it(arguments, folder):
    shard = folder / "embeddings" / "shard-00001.safetensors"
    flip_byte(shard)
    error = error_of(*arguments, "stages=[heads]", f"output_dir={folder}")
    assert "shard-00001.safetensors changed after it was written" in error


@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_damaged_shard_is_named_and_made_again_by_the_next_run(
    trained, arguments, folder, with_manifest
):
    before = state_of(folder, "embed")
    shard = folder / "embeddings" / "shard-00001.safetensors"
    flip_byte(shard)
    if not with_manifest:
        (folder / "embeddings" / "manifest.json").unlink()
    status, out, err = run(*arguments, f"output_dir={folder}")
    assert status == 0, err
    said = "".join(((folder / "cli.log").read_text() + out).split())
    assert re.search(rf"{shard}(was|is)damaged;itismadeagain", said)
    # The manifest comes out as it was, so that no other stage has anything to do.
    assert all(f"{stage}: up to date" in out for stage in STAGES[1:])
    after = state_of(folder, "embed")
    assert {file: digest for file, (digest, _) in after.items()} == {
        file: digest for file, (digest, _) in before.items()
    }
    others = [file for file in after if file.name.startswith("shard-") and file != shard]
    assert len(others) == 2
    assert all(after[file] == before[file] for file in others)


def test_a_corrected_text_embeds_only_its_shard_again(trained, rows, arguments, folder, tmp_path):
    _, ratings, pairs = rows
    old = ratings[60]["messages"][1]["content"]
    assert sum(old in json.dumps(row) for row in ratings) == 1
    for name, kind in (("ratings", ratings), ("pairs", pairs)):
        text = "".join(json.dumps(row) + "\n" for row in kind)
        corrected = text.replace(json.dumps(old), json.dumps("0 what was meant"))
        (tmp_path / f"{name}.jsonl").write_text(corrected)
    before = state_of(folder, "embed")
    again = run_again(
        arguments,
        folder,
        f"data.ratings.path={tmp_path / 'ratings.jsonl'}",
        f"data.pairs.path={tmp_path / 'pairs.jsonl'}",
    )
    assert again == set(STAGES)
    after = state_of(folder, "embed")
    changed = {file.name for file in before if before[file] != after[file]}
    assert {name for name in changed if name.startswith("shard-")} == {"shard-00001.safetensors"}


def test_a_full_disk_is_one_line_and_the_next_run_is_undisturbed(trained, arguments, tmp_path):
    folder = tmp_path / "run"
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (6000, 9000, 14000):  # in the texts, then in what becomes of them
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            error = error_of(*arguments, f"output_dir={folder}")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert "File too large" in error
        assert not (folder / "embeddings" / "manifest.json").exists()
    run_again(arguments, folder, "stages=[embed]")
    for file in (trained[0] / "embeddings").iterdir():
        if file.name != ".lock":
            assert (folder / "embeddings" / file.name).read_bytes() == file.read_bytes()


# Ties, margins and lists to train on


@pytest.fixture(scope="module")
def listed(rows, tmp_path_factory):
    """Arguments that add lists to train on and a benchmark, the preferences a tie among them."""
    folder = tmp_path_factory.mktemp("lists")
    _, _, pairs = rows
    lists = [
        {
            "id": f"t{k}",
            "source": ("rankers", "graders")[k % 2],
            "prompt": pair["prompt"],
            "responses": [pair["rejected"], pair["chosen"], f"Perhaps {k}."],
            **({"ranks": [2, 1, 2]} if k % 2 else {"correct": [1]}),
            "weight": 1 + k % 3,
        }
        for k, pair in enumerate(pairs[:20])
    ]
    benchmark = [
        {**row, "id": "b", "responses": ["So.", "**So.**"], "correct": [0, 1], "ranks": None}
        for row in lists[:2]  # of a test prompt, and of one to train on
    ]
    benchmark[1]["id"] = "unused"
    marked = [{**pairs[0], "preference": 0.5, "margin": 0}, {**pairs[1], "margin": 2}, *pairs[2:]]
    for name, kind in (("lists", lists), ("benchmark", benchmark), ("pairs", marked)):
        write_rows(folder / f"{name}.jsonl", kind)
    arguments = (
        *("data/lists=jsonl", f"data.lists.path={folder / 'lists.jsonl'}"),
        *("data/benchmark=jsonl", f"data.benchmark.path={folder / 'benchmark.jsonl'}"),
        f"data.pairs.path={folder / 'pairs.jsonl'}",
    )
    return folder, lists, arguments


def test_lists_to_train_on_ties_and_margins_go_the_way_of_the_command_line(
    arguments, listed, tmp_path
):
    _, lists, more = listed
    command = (*arguments, *more, "stages=[embed]", f"output_dir={tmp_path / 'run'}")
    status, out, err = run(*command)
    assert status == 0, err
    data = EmbeddedData.load(tmp_path / "run" / "embeddings")
    tables = data.tables
    assert tables.lists_benchmark.tolist() == [False] * 20 + [True]
    # Every fifth prompt is a test prompt.
    assert tables.lists_train.tolist() == [k % 5 > 0 for k in range(20)] + [False]
    assert torch.equal(tables.lists_test, ~tables.lists_train)
    ranks = [[2.0, 1.0, 2.0] if k % 2 else [1.0, 0.0, 1.0] for k in range(20)]
    assert tables.lists_rank.tolist() == [rank for row in ranks for rank in row] + [0.0, 0.0]
    assert tables.lists_weight[:20].tolist() == [row["weight"] for row in lists]
    assert [data.sources[k] for k in tables.lists_source[:20]] == [row["source"] for row in lists]
    assert torch.equal(tables.lists_response[0:60:3], tables.pairs_rejected[:20])
    assert torch.equal(tables.lists_response[1:60:3], tables.pairs_chosen[:20])
    assert tables.pairs_preference.tolist() == [0.5] + [1.0] * 59
    assert tables.pairs_margin[:2].tolist() == [0.0, 2.0]
    assert tables.pairs_margin[2:].isnan().all()
    counts = {
        words[1]: words[2:]
        for words in (re.split(r" *[│|] *", line) for line in out.splitlines())
        if len(words) > 2
    }
    assert counts["response lists"][:3] == ["20", "16", "4"]
    assert counts["benchmark lists"][:3] == ["1", "0", "1"]
    assert "up to date" in run(*command)[1]


@pytest.fixture(scope="module")
def augmented(arguments, rows, tmp_path_factory):
    """A whole run with added pairs, and doubts about a training and a test row."""
    folder = tmp_path_factory.mktemp("augmented")
    write_rows(
        folder / "annotated.jsonl",
        [{"id": id, "armo_preference": 1e-4} for id in ("p0", "p2")]
        + [{"id": f"p{k}", "armo_preference": 0.9} for k in (1, *range(3, 20))],
    )
    command = (
        *arguments,
        *("data/augment=shortcuts", "data.augment.off_prompt=1", "data.augment.truncated=1"),
        *("data.augment.restyled=1", "data.augment.judged=[honesty]"),
        *("data/noise=strengths", f"data.noise.strengths.paths={folder / 'annotated.jsonl'}"),
        f"output_dir={folder / 'run'}",
    )
    status, out, err = run(*command)
    assert status == 0, err
    return folder, command, out


def test_augmentation_adds_to_the_training_side_alone(augmented, trained):
    folder, command, out = augmented
    data = EmbeddedData.load(folder / "run" / "embeddings")
    plain = EmbeddedData.load(trained[0] / "embeddings")
    tables = data.tables
    added = torch.tensor([data.sources[k].startswith("augmented/") for k in tables.pairs_source])
    assert set(data.sources) == {
        "test",
        *(f"augmented/{kind}" for kind in ("off_prompt", "truncated", "restyled")),
    }
    assert len(added) - int(added.sum()) == len(plain.tables.pairs_chosen) == 60
    assert torch.equal(tables.pairs_train[~added], plain.tables.pairs_train)
    assert torch.equal(tables.pairs_test[~added], plain.tables.pairs_test)
    assert tables.pairs_train[added].all()
    assert not tables.pairs_test[added].any()
    groups = tables.group_of_response
    test_groups = set(groups[tables.pairs_chosen[tables.pairs_test]].tolist())
    assert test_groups.isdisjoint(groups[tables.pairs_chosen[added]].tolist())
    ties = torch.tensor([data.sources[k].endswith("restyled") for k in tables.pairs_source])
    assert torch.equal(tables.pairs_preference == 0.5, ties)
    judged = tables.pairs_judgements[:, data.objectives.index("honesty")]
    assert torch.equal(judged == 1.0, added & ~ties)
    assert "off_prompt pairs added to 48 training pairs" in out
    assert "up to date" in run(*command, "stages=[embed]")[1]


def test_noise_flips_a_training_pair_and_never_a_test_pair(augmented, rows, tmp_path):
    folder, command, out = augmented
    assert "noise, flip: 1 of 48 training pairs changed, 32 without a strength stay" in out
    spool = folder / "run" / "embeddings"
    data = EmbeddedData.load(spool)
    tables = data.tables
    own = (tables.pairs_source == data.sources.index("test")).nonzero()[:, 0]
    lengths = tables.covariates[:, data.covariates.index("log_length")]
    for k in (0, 2):
        place = own[k]
        chosen, rejected = rows[2][k]["chosen"], rows[2][k]["rejected"]
        if k == 2:
            chosen, rejected = rejected, chosen
        measured = surface_features([chosen, rejected])[:, SURFACE_FEATURES.index("log_length")]
        of = torch.stack([tables.pairs_chosen[place], tables.pairs_rejected[place]])
        assert lengths[of].tolist() == pytest.approx(measured.tolist())
        assert measured[0] != measured[1]
    write_rows(tmp_path / "other.jsonl", [{"id": "p2", "armo_preference": 0.9}])
    more = (f"data.noise.strengths.paths={tmp_path / 'other.jsonl'}", "stages=[embed]")
    status, out, err = run(*command, *more, f"output_dir={tmp_path / 'run'}")
    assert status == 0, err
    assert "0 of 48 training pairs changed" in out
    again = (*command, *more, f"output_dir={tmp_path / 'run'}")
    assert "up to date" in run(*again)[1]
    write_rows(tmp_path / "other.jsonl", [{"id": "p2", "armo_preference": 0.1}])
    assert "1 of 48 training pairs changed" in run(*again, "data.noise.share=1")[1]


def test_the_texts_of_an_augmented_run_are_found_again(augmented, tmp_path):
    from armo import cli

    folder = augmented[0] / "run"
    model = ArmoRewardModel.from_pretrained(folder / "model", device="cpu")
    training = cli._training_prompts(folder, model, texts=tmp_path)
    assert training.text is not None
    assert training.text([0])[0][-1].role == "user"


def test_changed_lists_are_read_again_and_their_old_texts_are_not_embedded_again(
    arguments, listed, tmp_path
):
    _, lists, more = listed
    command = (*arguments, *more, "stages=[embed]", f"output_dir={tmp_path / 'run'}")
    run(*command)
    shards = set((tmp_path / "run" / "embeddings").glob("shard-*"))
    before = {file: file.stat().st_mtime_ns for file in shards}
    write_rows(tmp_path / "lists.jsonl", [{**row, "weight": 7} for row in lists])
    status, out, err = run(*command, f"data.lists.path={tmp_path / 'lists.jsonl'}")
    assert status == 0, err
    assert "up to date" not in out
    tables = EmbeddedData.load(tmp_path / "run" / "embeddings").tables
    assert tables.lists_weight.tolist() == [7.0] * 20 + [1.0]
    assert {file: file.stat().st_mtime_ns for file in shards} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": [1, 2], "correct": None}, "`ranks` has 2 numbers for 3 responses"),
        ({"responses": ["So.", "No.", "So."]}, "`responses[0]` and `responses[2]` are the same"),
        ({"id": "t0"}, "id 't0' stands at"),
    ],
)
def test_a_bad_list_is_one_line_before_anything_is_embedded(
    arguments, listed, tmp_path, change, message
):
    _, lists, more = listed
    file = write_rows(tmp_path / "lists.jsonl", [lists[0], {**lists[2], **change}])
    more = (*more, f"data.lists.path={file}", "stages=[embed]")
    error = error_of(*arguments, *more, f"output_dir={tmp_path / 'run'}")
    assert error.startswith(f"armo: error: {file}:2: ")
    assert message in error
    assert not list((tmp_path / "run").rglob("shard-*"))


def test_a_list_on_the_other_side_of_its_prompt_is_one_line(arguments, listed, tmp_path):
    _, lists, more = listed
    file = write_rows(tmp_path / "lists.jsonl", [{**lists[0], "split": "train"}])
    more = (*more, f"data.lists.path={file}", "stages=[embed]")
    error = error_of(*arguments, *more, f"output_dir={tmp_path / 'run'}")
    assert "(test) and 't0' (train) share a prompt" in error


def test_rows_of_another_version_are_one_line_that_says_what_to_run(arguments, folder):
    embeddings = folder / "embeddings"
    names = read_json(embeddings / "rows.json")
    del names["format"]
    (embeddings / "rows.json").write_text(json.dumps(names))
    manifest = read_json(embeddings / "manifest.json")
    manifest["files"]["rows.json"] = digest_file(embeddings / "rows.json")
    (embeddings / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(folder / "heads")
    error = error_of(*arguments, "stages=[heads]", f"output_dir={folder}")
    assert "rows.json: row tables of another version of armo" in error
    assert "armo train stages=[embed]" in error


def test_rows_of_another_version_are_made_again_and_nothing_is_embedded(
    folder, arguments, monkeypatch
):
    before = {
        file: state for file, state in state_of(folder, "embed").items() if "shard" in str(file)
    }
    for module in ("armo.stages", "armo.embed.extract"):
        monkeypatch.setattr(f"{module}.ROWS_FORMAT", 99)
    assert "embed" in run_again(arguments, folder, "stages=[embed]")
    after = state_of(folder, "embed")
    assert before
    assert {file: after[file] for file in before} == before
    assert read_json(folder / "embeddings" / "rows.json")["format"] == 99


# Preferences of every kind: soft ones and ties, margins, lists, sources that count less


def preferred_rows(rows):
    """Pairs and lists with all that they may say, on the prompts of the rows."""
    _, _, plain = rows
    pairs, lists = [], []
    for k, row in enumerate(plain):
        votes = k % 2 == 0
        said = {1: {"preference": 0.5}, 2: {"preference": 0.7}}.get(k % 7, {})
        margin = {} if k % 5 == 2 else {"margin": (1 + k % 3) * (1.0 if votes else 100.0)}
        weight = {"weight": 0.0} if k % 10 == 9 else {"weight": 1.0 + k % 3} if k % 4 else {}
        source = {"source": "votes" if votes else "points"}
        pairs.append({**row, **source, **said, **margin, **weight})
        if k % 6 == 1:  # its chosen response once more
            other = {"id": f"q{k}", "rejected": f"Never mind {k}."}
            pairs.append({**row, "source": "bare", **other})
        if k % 2 == 0:
            texts = [row["rejected"], row["chosen"], f"Perhaps {k}.", f"No idea, {k}."][: 2 + k % 3]
            ranks = [(k // 2 + 2 * n) % 3 for n in range(len(texts))]
            lists.append(
                {
                    "id": f"l{k}",
                    "source": ("rankers", "graders")[k // 2 % 2],
                    "split": row["split"],
                    "prompt": row["prompt"],
                    "responses": texts,
                    "ranks": [1 for _ in texts] if k % 22 == 0 else ranks,
                    "weight": 0.0 if k % 20 == 18 else 1 + k % 3,
                }
            )
    return pairs, lists


SOURCE_WEIGHTS = {"graders": 0.5, "points": 2.0}
FIXED = {"safety": 3.0, "helpfulness": 1.0}


@pytest.fixture(scope="module")
def preferred(rows, arguments, tmp_path_factory):
    """A run on preferences of every kind: its folder, pairs, lists and arguments."""
    folder = tmp_path_factory.mktemp("preferred")
    pairs, lists = preferred_rows(rows)
    write_rows(folder / "pairs.jsonl", pairs)
    write_rows(folder / "lists.jsonl", lists)
    more = (
        *arguments,
        *("data/lists=jsonl", f"data.lists.path={folder / 'lists.jsonl'}"),
        f"data.pairs.path={folder / 'pairs.jsonl'}",
        "fit.source_weights={graders: 0.5, points: 2.0}",
        "report.fixed_weights={safety: 3, helpfulness: 1}",
    )
    run_again(more, folder / "run", "fit/gating=mlp", "fit.trainer.max_epochs=3")
    return folder / "run", pairs, lists, more


@pytest.fixture(scope="module")
def fitted(preferred):
    """What the gate of that run was made from."""
    folder = preferred[0]
    return (
        EmbeddedData.load(folder / "embeddings"),
        FittedHeads.load(folder / "heads"),
        load_transforms(folder / "decorrelation"),
    )


def trained_on(rows):
    """Numbers of the rows that a gate is trained on."""
    return [
        k for k, row in enumerate(rows) if row["split"] == "train" and row.get("weight", 1.0) > 0
    ]


def test_comparisons_are_the_pairs_then_the_lists_with_their_prompts_and_responses(
    preferred, fitted
):
    _, pairs, lists, _ = preferred
    data, heads, transforms = fitted
    tables = data.tables
    found = training_preferences(*fitted, source_weights=SOURCE_WEIGHTS)
    used_pairs, used_lists = trained_on(pairs), trained_on(lists)
    assert len(used_pairs) < sum(row["split"] == "train" for row in pairs)
    assert len(used_lists) < sum(row["split"] == "train" for row in lists)
    assert len(found) == len(used_pairs) + len(used_lists)
    expected = [[int(tables.pairs_chosen[k]), int(tables.pairs_rejected[k])] for k in used_pairs]
    expected += [tables.lists_response[tables.lists_of == k].tolist() for k in used_lists]
    assert {len(responses) for responses in expected[len(used_pairs) :]} == {2, 3, 4}
    ranks = [[0.0, 1.0] for _ in used_pairs] + [lists[k]["ranks"] for k in used_lists]
    for row, (responses, order) in enumerate(zip(expected, ranks, strict=True)):
        there = found.responses[row] >= 0
        assert there.tolist() == [True] * len(responses) + [False] * (4 - len(responses))
        assert found.ranks[row].tolist()[: len(responses)] == order
        assert found.ranks[row][~there].isnan().all()
        for place, response in zip(found.responses[row].tolist(), responses, strict=False):
            adjusted = adjusted_slowly(data, heads, transforms, response)
            torch.testing.assert_close(found.adjusted[place], adjusted)
            style = data.style(torch.tensor([response]), transforms.features)[0]
            torch.testing.assert_close(found.style[place], style)
        prompt = int(tables.prompt_of_response[responses[0]])
        assert {int(tables.prompt_of_response[other]) for other in responses} == {prompt}
        [embedding] = data.prompts.read(torch.tensor([prompt]))
        assert torch.equal(found.prompts[found.prompt_of[row]], embedding)
        assert int(found.groups[row]) == int(tables.group_of_prompt[prompt])
    # Each prompt and each response is there once, however often it is compared.
    distinct = {response for responses in expected for response in responses}
    assert len(found.adjusted) == len(found.style) == len(distinct)
    assert len(distinct) < sum(map(len, expected))
    prompts = {int(tables.prompt_of_response[responses[0]]) for responses in expected}
    assert len(found.prompts) == len(prompts) < len(expected)
    assert not torch.equal(
        found.adjusted, adjusted_of(data, transforms, torch.tensor(sorted(distinct)))
    )


def test_a_vote_is_a_chance_that_the_pair_is_the_wrong_way_round(preferred, fitted):
    _, pairs, lists, _ = preferred
    found = training_preferences(*fitted, source_weights=SOURCE_WEIGHTS)
    expected = [1.0 - pairs[k].get("preference", 1.0) for k in trained_on(pairs)]
    assert {round(value, 6) for value in expected} == {0.0, 0.3, 0.5}
    count = len(trained_on(lists))
    assert found.flipped.tolist() == pytest.approx(expected + [0.0] * count)
    assert found.margins.tolist() == [0.0] * len(found)
    assert found.folds.tolist() == [0] * len(found)


def test_margins_are_multiples_of_the_mean_of_their_source(preferred, fitted):
    _, pairs, lists, _ = preferred
    found = training_preferences(*fitted, source_weights=SOURCE_WEIGHTS)
    used = [pairs[k] for k in trained_on(pairs)]
    expected = []
    for row in used:
        alike = [r["margin"] for r in used if r["source"] == row["source"] and "margin" in r]
        known = "margin" in row
        expected.append(row["margin"] / (sum(alike) / len(alike)) if known else float("nan"))
    expected += [float("nan")] * len(trained_on(lists))
    assert found.strengths.tolist() == pytest.approx(expected, nan_ok=True)
    known = [value for value in expected if value == value]
    # On a scale of a hundred or of one: neither source is louder than the other.
    assert max(known) < 3
    assert sum(known) / len(known) == pytest.approx(1.0)


def test_a_source_whose_margins_are_all_nought_says_nothing_of_them(preferred, fitted):
    data, heads, transforms = fitted
    tables = data.tables
    votes = tables.pairs_source == data.sources.index("votes")
    none = torch.where(votes, 0.0, tables.pairs_margin)
    data = dataclasses.replace(data, tables=dataclasses.replace(tables, pairs_margin=none))
    found = training_preferences(data, heads, transforms, source_weights=SOURCE_WEIGHTS)
    used = [preferred[1][k] for k in trained_on(preferred[1])]
    for row, strength in zip(used, found.strengths.tolist(), strict=False):
        known = row["source"] == "points" and "margin" in row
        assert (strength == strength) == known


@pytest.mark.parametrize("reweight", [True, False])
def test_a_comparison_counts_as_its_row_its_source_and_its_style_say(preferred, fitted, reweight):
    _, pairs, lists, _ = preferred
    data, heads, transforms = fitted
    assert "reweight" in transforms.methods
    if not reweight:
        transforms = dataclasses.replace(transforms, methods=("residual",))
    found = training_preferences(data, heads, transforms, source_weights=SOURCE_WEIGHTS)
    used = trained_on(pairs)

    def own(row):
        return row.get("weight", 1.0) * SOURCE_WEIGHTS.get(row["source"], 1.0)

    weights = torch.tensor([own(pairs[k]) for k in used], dtype=torch.float64)
    balance = torch.ones_like(weights)
    if reweight:  # what a tie says is not predicted by style
        decided = [n for n, k in enumerate(used) if pairs[k].get("preference", 1.0) > 0.5]
        assert len(decided) < len(used)
        columns = [SURFACE_FEATURES.index(name) for name in transforms.features]
        sides = [
            surface_features([pairs[used[n]][side] for n in decided])[:, columns]
            for side in ("chosen", "rejected")
        ]
        balance[decided] = style_weights(sides[0] - sides[1], weights[decided])
    of_lists = [own(lists[k]) for k in trained_on(lists)]
    assert found.balance.tolist() == pytest.approx(
        [*balance.tolist(), *(1.0 for _ in of_lists)], rel=1e-5
    )
    assert found.weights.tolist() == pytest.approx([*weights.tolist(), *of_lists], rel=1e-5)


def test_without_anything_to_train_on_the_settings_to_look_at_are_named(fitted):
    data, heads, transforms = fitted
    nothing = dict.fromkeys(data.sources, 0.0)
    with pytest.raises(ValueError, match=r"no training pair or list has a weight above zero; see"):
        training_preferences(data, heads, transforms, source_weights=nothing)


def model_of(folder):
    return ArmoRewardModel.from_pretrained(folder / "model", device="cpu")


def scored_by(folder, texts, **how):
    """What the exported model says of responses to prompts."""
    turns = [[*prompt, {"role": "assistant", "content": text}] for prompt, text in texts]
    return model_of(folder).score(turns, **how)


def report_of(folder):
    return read_json(folder / "report" / "report.json")


def credit_of(first, second):
    return float(first > second) + 0.5 * float(first == second)


def test_the_report_ranks_the_test_lists_as_the_exported_model_does(preferred):
    folder, _, lists, _ = preferred
    found = {row["score"]: row for row in report_of(folder)["lists"]}
    constant = load_gating(folder / "gating", "gate")[1].constant_weights
    tested = [row for row in lists if row["split"] == "test"]
    assert len(tested) == 6
    for name, how in (("gated score", {}), ("best constant mix", {"weights": constant})):
        best, ordered = [], []
        for row in tested:
            out = scored_by(folder, [(row["prompt"], text) for text in row["responses"]], **how)
            scores, ranks = out.score.tolist(), row["ranks"]
            best.append(ranks[scores.index(max(scores))] == min(ranks))
            places = [(a, b) for a, x in enumerate(ranks) for b, y in enumerate(ranks) if x < y]
            if places:
                right = [credit_of(scores[a], scores[b]) for a, b in places]
                ordered.append(sum(right) / len(right))
        assert found[name]["best is first"] == pytest.approx(sum(best) / len(best))
        assert found[name]["pairs in order"] == pytest.approx(sum(ordered) / len(ordered))
    chance = [row["ranks"].count(min(row["ranks"])) / len(row["ranks"]) for row in tested]
    assert found["by chance"]["best is first"] == pytest.approx(sum(chance) / len(chance))
    summary = load_gating(folder / "gating", "gate")[1]
    assert summary.comparisons == len(trained_on(preferred[1])) + len(trained_on(lists))


def ordered_pairs(pairs, split):
    return [row for row in pairs if row["split"] == split and row.get("preference", 1.0) > 0.5]


def test_the_rivals_are_what_the_exported_model_says_under_their_weights(preferred):
    """Ties apart: of them none is right."""
    folder, pairs, _, _ = preferred
    tested = ordered_pairs(pairs, "test")
    assert len(tested) < sum(row["split"] == "test" for row in pairs)
    texts = [(row["prompt"], row[side]) for row in tested for side in ("chosen", "rejected")]
    summary = load_gating(folder / "gating", "gate")[1]
    mixed = ("helpfulness", "honesty", "safety")
    rivals = {row["score"]: row for row in report_of(folder)["rivals"]}
    for name, how in {
        "gated score": {},
        "best constant mix": {"weights": summary.constant_weights},
        "uniform mix": {"weights": dict.fromkeys(mixed, 1.0)},
        "fixed weights": {"weights": FIXED},
        f"{summary.best_single} alone": {"weights": {summary.best_single: 1.0}},
    }.items():
        scores = scored_by(folder, texts, **how).score
        right = [credit_of(a, b) for a, b in zip(scores[::2], scores[1::2], strict=True)]
        assert rivals[name]["accuracy"] == pytest.approx(sum(right) / len(right)), name
    kinds = report_of(folder)["kinds"]
    assert sum(row["pairs"] for row in kinds) == len(tested)


def test_the_single_objective_is_the_one_that_ranks_most_training_comparisons_right(
    preferred, fitted
):
    found = training_preferences(*fitted, source_weights=SOURCE_WEIGHTS)
    summary = load_gating(preferred[0] / "gating", "gate")[1]
    margins = found.strengths.nan_to_num(1.0)
    share = {}
    for k, name in enumerate(("helpfulness", "honesty", "safety")):
        right = total = 0.0
        for row in range(len(found)):
            if float(found.flipped[row]) == 0.5:
                continue
            there = [n for n in range(4) if found.responses[row, n] >= 0]
            ranks = found.ranks[row].tolist()
            values = found.adjusted[found.responses[row], k].tolist()
            places = [(a, b) for a in there for b in there if ranks[a] < ranks[b]]
            if not places:
                continue
            weight = float(found.weights[row] * found.balance[row] * margins[row])
            ordered = [credit_of(values[a], values[b]) for a, b in places]
            right += weight * sum(ordered) / len(ordered)
            total += weight
        share[name] = right / total
    assert summary.best_single == max(share, key=share.__getitem__)
    assert len(set(share.values())) == 3


def probe_slowly(inputs, targets, weights, *, penalty):
    """Weights of scikit-learn's logistic regression with soft targets and no intercept."""
    model = LogisticRegression(C=1.0 / penalty, fit_intercept=False, tol=1e-10, max_iter=10_000)
    both = np.concatenate([inputs, inputs])
    answers = [1] * len(inputs) + [0] * len(inputs)
    model.fit(
        both, answers, sample_weight=np.concatenate([weights * targets, weights * (1 - targets)])
    )
    return model.coef_[0]


@pytest.fixture(scope="module")
def differences(preferred, fitted):
    """Of the training pairs: embeddings, votes, weights without regard to style, folds."""
    data, heads, _ = fitted
    used = trained_on(preferred[1])
    tables = data.tables
    chosen, rejected = tables.pairs_chosen[used], tables.pairs_rejected[used]
    inputs = data.responses.read(chosen).double() - data.responses.read(rejected).double()
    rows = [preferred[1][k] for k in used]
    targets = np.array([row.get("preference", 1.0) for row in rows])
    weights = [row.get("weight", 1.0) * SOURCE_WEIGHTS.get(row["source"], 1.0) for row in rows]
    folds = heads.fold_of_group[tables.group_of_response[chosen]].numpy()
    reference = torch.cat([chosen, rejected]).unique()
    return inputs.numpy(), targets, np.array(weights) / np.mean(weights), folds, reference


def test_the_probe_is_the_cross_validated_logistic_regression_of_scikit_learn(
    preferred, fitted, differences
):
    folder, data = preferred[0], fitted[0]
    inputs, targets, weights, folds, reference = differences
    losses = []
    for penalty in PENALTIES:
        total = 0.0
        for fold in sorted(set(folds.tolist())):
            out = folds == fold
            model = probe_slowly(inputs[~out], targets[~out], weights[~out], penalty=penalty)
            odds = inputs[out] @ model
            nats = targets[out] * np.logaddexp(0, -odds) + (1 - targets[out]) * np.logaddexp(
                0, odds
            )
            total += float(weights[out] @ nats)
        losses.append(total)
    penalty = PENALTIES[int(np.argmin(losses))]
    expected = torch.from_numpy(probe_slowly(inputs, targets, weights, penalty=penalty))
    probe = load_probe(folder / "gating", "undecorrelated", covariates=())
    assert probe.covariates == ()
    embeddings = data.responses.read(reference).double()
    scores = embeddings @ expected
    found = probe.adjusted(embeddings, embeddings[:, :0])[:, 0]
    standard = (scores - scores.mean()) / scores.std()
    torch.testing.assert_close(found, standard, atol=1e-3, rtol=0)


def within(values, prompts):
    """Deviations from the mean of the prompt, slowly."""
    result = values.clone()
    for prompt in prompts.unique().tolist():
        here = prompts == prompt
        result[here] = values[here] - values[here].mean(0)
    return result


def test_the_probe_of_the_decorrelated_run_does_not_follow_style_within_prompts(
    preferred, fitted, differences
):
    folder, (data, _, transforms), reference = preferred[0], fitted, differences[4]
    prompts = data.tables.prompt_of_response[reference]
    embeddings, style = data.responses.read(reference), data.style(reference, STYLE_FEATURES)
    z = within(style.double(), prompts)
    varies = z.abs().amax(0) > 1e-9
    assert int(varies.sum()) > 2
    worst = {}
    for name, covariates in (("gate", transforms.transform.covariates), ("undecorrelated", ())):
        probe = load_probe(folder / "gating", name, covariates=covariates)
        measured = data.style(reference, covariates)
        u = within(probe.adjusted(embeddings, measured)[:, 0], prompts)
        products = (u @ z[:, varies]) / (u.norm() * z[:, varies].norm(dim=0))
        worst[name] = float(products.abs().max())
    assert worst["gate"] < 1e-6
    assert worst["undecorrelated"] > 0.05


def test_the_probes_of_the_report_score_the_test_pairs(preferred, fitted):
    folder, pairs, _, _ = preferred
    data, _, transforms = fitted
    tested = [
        k
        for k, row in enumerate(pairs)
        if row["split"] == "test" and row.get("preference", 1.0) > 0.5
    ]
    rivals = {row["score"]: row for row in report_of(folder)["rivals"]}
    for rival, name, covariates in (
        ("linear probe", "gate", transforms.transform.covariates),
        ("linear probe, not decorrelated", "undecorrelated", ()),
    ):
        probe = load_probe(folder / "gating", name, covariates=covariates)
        first, second = (
            probe.adjusted(data.responses.read(rows), data.style(rows, covariates))[:, 0]
            for rows in (data.tables.pairs_chosen[tested], data.tables.pairs_rejected[tested])
        )
        right = [credit_of(a, b) for a, b in zip(first, second, strict=True)]
        assert rivals[rival]["accuracy"] == pytest.approx(sum(right) / len(right))


def without_pairs(pairs):
    """Those of the test side alone."""
    return [row for row in pairs if row["split"] == "test"]


def one_pair(pairs):
    first = next(row for row in pairs if row["split"] == "train")
    return [first, *without_pairs(pairs)]


def all_ties(pairs):
    return [{**row, "preference": 0.5} if row["split"] == "train" else row for row in pairs]


@pytest.mark.parametrize("change", [without_pairs, one_pair, all_ties])
def test_lists_alone_or_with_hardly_any_pairs_go_the_whole_way(preferred, tmp_path, change):
    _, pairs, lists, arguments = preferred
    file = write_rows(tmp_path / "pairs.jsonl", change(pairs))
    known = {row["source"] for row in change(pairs)} | {"graders"}
    weights = [f"{name}: {weight}" for name, weight in SOURCE_WEIGHTS.items() if name in known]
    run_again(
        arguments,
        *(tmp_path / "run", f"data.pairs.path={file}", "fit/gating=mlp"),
        f"fit.source_weights={{{', '.join(weights)}}}",
    )
    report = report_of(tmp_path / "run")
    names = [row["score"] for row in report["rivals"]]
    assert "lists" in report
    assert "linear probe" not in names
    summary = load_gating(tmp_path / "run" / "gating", "gate")[1]
    assert summary.comparisons == len(trained_on(change(pairs))) + len(trained_on(lists))
    assert model_of(tmp_path / "run").verify() < 1e-5


# Which mix is kept


@pytest.mark.parametrize("option", ["auto", "mlp", "constant"])
def test_the_mix_that_is_kept_is_the_one_that_was_asked_for_or_earned_it(
    trained, arguments, rows, tmp_path, option
):
    folder = tmp_path / "run"
    more = (f"from_run={trained[0]}", "stages=[gating,model,report]", f"fit/gating={option}")
    run_again(arguments, folder, *more, "fit.trainer.max_epochs=5")
    _, summary = load_gating(folder / "gating", "gate")
    kept = {"mlp": "gate", "constant": "constant"}.get(option)
    assert summary.kept == (kept or ("gate" if summary.better else "constant"))
    out = model_of(folder).score_responses
    weights = torch.cat([out(p["prompt"], [p["chosen"]]).gating_weights for p in rows[2][:10]])
    constant = torch.tensor([*summary.constant_weights.values()], dtype=torch.float64)
    if summary.kept == "constant":
        torch.testing.assert_close(weights, constant.expand(10, -1), atol=1e-6, rtol=0)
    else:
        assert float((weights - weights[0]).abs().max()) > 1e-4
    # The verdict is wherever someone may look for it.
    assert summary.verdict in (folder / "cli.log").read_text()
    assert summary.verdict in (folder / "model" / "README.md").read_text()
    assert summary.verdict in (folder / "report" / "report.md").read_text()
    shown = {row["objective"]: row for row in report_of(folder)["weights"]}
    for k, name in enumerate(("helpfulness", "honesty", "safety")):
        assert shown[name]["constant mix"] == pytest.approx(float(constant[k]))
        if summary.kept == "constant":
            assert shown[name]["mean"] == pytest.approx(float(constant[k]), abs=1e-6)
            assert shown[name]["spread"] == pytest.approx(0.0, abs=1e-6)
    if summary.kept == "constant":
        rivals = {row["score"]: row for row in report_of(folder)["rivals"]}
        assert rivals["gated score"]["accuracy"] == rivals["best constant mix"]["accuracy"]


# Fixed weights


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("{charm: 1}", "Unknown objective 'charm'"),
        ("{safety: -1}", "must not be negative"),
        ("{safety: 0}", "not all zero"),
        ("{safety: nan}", "must be finite"),
        ("{safety: much}", "fixed_weights"),
        ("[1, 2, 3]", "fixed_weights"),
        ("{}", "not all zero"),
    ],
)
def test_fixed_weights_that_cannot_be_are_one_line_before_anything_is_embedded(
    arguments, tmp_path, no_type_checks, weights, message
):
    error = error_of(
        *arguments, f"report.fixed_weights={weights}", f"output_dir={tmp_path / 'run'}"
    )
    assert message in error
    assert not list((tmp_path / "run").rglob("shard-*"))


def test_fixed_weights_run_the_report_alone_again(folder, arguments):
    assert run_again(arguments, folder, "report.fixed_weights={safety: 1}") == {"report"}
    rivals = {row["score"]: row for row in report_of(folder)["rivals"]}
    assert "fixed weights" in rivals


# Pairs that judge an objective by where they are from


JUDGING = "data.pairs.judges={honesty: [code/python, others], safety: [code]}"


@pytest.fixture(scope="module")
def judging(rows, arguments, tmp_path_factory):
    """A run in which some pairs judge `honesty`, which nothing rates, and others `safety`."""
    folder = tmp_path_factory.mktemp("judging")
    ratings = [
        {**row, "ratings": {k: v for k, v in row["ratings"].items() if k != "honesty"}}
        for row in rows[1]
    ]
    pairs = []
    for k, row in enumerate(rows[2]):
        category = ("code/python/web", "code", "coder", "advice")[k % 4]
        source = {"source": "others"} if k % 8 == 3 else {}
        vote = {"preference": 0.5} if k % 3 == 1 else {"preference": 0.8} if k % 3 == 2 else {}
        own = {"judgements": {"honesty": 0.1}} if k % 16 == 0 else {}
        pairs.append({**row, "category": category, **source, **vote, **own})
    write_rows(folder / "ratings.jsonl", ratings)
    write_rows(folder / "pairs.jsonl", pairs)
    more = (
        *arguments,
        f"data.ratings.path={folder / 'ratings.jsonl'}",
        f"data.pairs.path={folder / 'pairs.jsonl'}",
        "data.min_ratings=10",
    )
    run_again(more, folder / "run", JUDGING)
    return folder / "run", pairs, more


def test_pairs_of_a_source_or_kind_become_judgements_and_train_a_head(judging):
    folder, pairs, _ = judging
    data = EmbeddedData.load(folder / "embeddings")
    expected = []
    for k, row in enumerate(pairs):
        vote = row.get("preference", 1.0)
        honesty = vote if k % 4 == 0 or row["source"] == "others" else None
        honesty = 0.1 if k % 16 == 0 else honesty  # its own judgement
        expected.append([honesty, vote if k % 4 in (0, 1) else None])
    columns = [data.objectives.index(name) for name in ("honesty", "safety")]
    table = data.tables.pairs_judgements
    found = [[None if v != v else v for v in row] for row in table[:, columns].tolist()]
    assert found == expected
    others = [k for k in range(5) if k not in columns]
    assert table[:, others].isnan().all()
    train = [n for n, row in enumerate(pairs) if row["split"] == "train"]
    summaries = {s.objective: s for s in FittedHeads.load(folder / "heads").summaries}
    for k, name in enumerate(("honesty", "safety")):
        count = sum(expected[n][k] is not None for n in train)
        assert 5 < count == summaries[name].judgements
    assert summaries["honesty"].ratings == 0
    assert FittedHeads.load(folder / "heads").heads.links[1] == "logistic"
    assert model_of(folder).links[1] == "logistic"
    judged = {row["objective"]: row["judgements"] for row in report_of(folder)["judgements"]}
    test = [n for n, row in enumerate(pairs) if row["split"] == "test"]
    assert judged == {
        name: sum(expected[n][k] not in (None, 0.5) for n in test)
        for k, name in enumerate(("honesty", "safety"))
    }


@pytest.mark.parametrize(
    ("judges", "message"),
    [
        ("{charm: [code]}", "objective 'charm' is not declared"),
        ("{honesty: code}", "judges"),
        ("[honesty]", "judges"),
    ],
)
def test_judges_that_cannot_be_are_one_line_before_anything_is_embedded(
    judging, tmp_path, no_type_checks, judges, message
):
    _, _, arguments = judging
    error = error_of(*arguments, f"data.pairs.judges={judges}", f"output_dir={tmp_path / 'run'}")
    assert message in error
    assert not list((tmp_path / "run").rglob("shard-*"))


# Trainings that were cut off


class CutOffError(Exception):
    """As a killed process leaves it, without its end."""


def cut_off_at(monkeypatch, *, training, epoch, error):
    """Cut a training of the stage off, by its number; return the epochs that every one was in."""
    epochs, count = [], []
    start, end = GatingTrainer.on_train_start, GatingTrainer.on_validation_epoch_end

    def on_train_start(self):
        count.append(self)
        epochs.append([])
        start(self)

    def on_validation_epoch_end(self):
        if len(count) - 1 == training and self.current_epoch == epoch:
            raise error
        epochs[-1].append(self.current_epoch)
        end(self)

    monkeypatch.setattr(GatingTrainer, "on_train_start", on_train_start)
    monkeypatch.setattr(GatingTrainer, "on_validation_epoch_end", on_validation_epoch_end)
    return epochs


@pytest.fixture(scope="module")
def longer(trained, tmp_path_factory):
    """What a gating stage of six epochs leaves, undisturbed, and how to ask for it."""
    folder = tmp_path_factory.mktemp("longer") / "run"
    more = (f"from_run={trained[0]}", "stages=[gating]", "fit.trainer.max_epochs=6")
    return folder, (*more, "fit/gating=mlp", "fit.gating.patience=50")


@pytest.fixture
def undisturbed(longer, arguments):
    folder, more = longer
    if not folder.exists():
        run_again(arguments, folder, *more)
    names = read_json(folder / "gating" / "manifest.json")["files"]
    assert {*FILES["gating"]} <= {*names}
    return {name: (folder / "gating" / name).read_bytes() for name in names}


@pytest.mark.parametrize("training", [0, 1])
def test_a_gating_stage_that_was_cut_off_goes_on_and_leaves_the_same_bits(
    undisturbed, longer, arguments, tmp_path, monkeypatch, training
):
    folder, more = tmp_path / "run", longer[1]
    with monkeypatch.context() as patch:
        cut_off_at(patch, training=training, epoch=3, error=CutOffError("cut off"))
        assert "cut off" in error_of(*arguments, *more, f"output_dir={folder}")
    assert len(list((folder / "gating").rglob("*.ckpt"))) == 1
    assert not (folder / "gating" / "manifest.json").exists()
    epochs = cut_off_at(monkeypatch, training=9, epoch=9, error=CutOffError())
    run_again(arguments, folder, *more)
    assert epochs[training] == [3, 4, 5]
    found = {name: (folder / "gating" / name).read_bytes() for name in undisturbed}
    assert found == undisturbed
    assert not list((folder / "gating").rglob("*.ckpt"))


def test_a_gating_stage_that_was_interrupted_says_so_and_goes_on(
    undisturbed, longer, arguments, tmp_path, monkeypatch
):
    folder, more = tmp_path / "run", longer[1]
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        cut_off_at(patch, training=0, epoch=2, error=KeyboardInterrupt())
        status, _, err = run(*arguments, *more, f"output_dir={folder}")
    signal.signal(signal.SIGINT, handler)
    assert status == 130
    assert "armo: interrupted; the same command goes on where it was" in err
    epochs = cut_off_at(monkeypatch, training=9, epoch=9, error=CutOffError())
    run_again(arguments, folder, *more)
    assert epochs[0] == [2, 3, 4, 5]
    assert {name: (folder / "gating" / name).read_bytes() for name in undisturbed} == undisturbed


def test_a_training_of_other_settings_is_not_gone_on_with(
    undisturbed, longer, arguments, tmp_path, monkeypatch
):
    folder, more = tmp_path / "run", longer[1]
    with monkeypatch.context() as patch:
        cut_off_at(patch, training=0, epoch=3, error=CutOffError("cut off"))
        error_of(*arguments, *more, f"output_dir={folder}", "fit.gating.hidden_dim=3")
    epochs = cut_off_at(monkeypatch, training=9, epoch=9, error=CutOffError())
    run_again(arguments, folder, *more)
    assert epochs == [[*range(6)], [*range(6)]]
    assert {name: (folder / "gating" / name).read_bytes() for name in undisturbed} == undisturbed
    assert not list((folder / "gating").rglob("*.ckpt"))


@pytest.mark.slow
def test_a_killed_gating_stage_goes_on_and_leaves_the_same_bits(trained, arguments, tmp_path):
    more = (f"from_run={trained[0]}", "stages=[gating]", "fit/gating=mlp")
    more = (*more, "fit.trainer.max_epochs=100", "fit.gating.patience=1000")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_again(arguments, whole, *more)
    command = [sys.executable, "-m", "armo.cli", *arguments, *more, f"output_dir={killed}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as it:
        while not list(killed.rglob("*.ckpt")):
            assert it.poll() is None
            time.sleep(0.01)
        it.kill()
    assert not (killed / "gating" / "manifest.json").exists()
    assert list(killed.rglob("*.ckpt"))
    run_again(arguments, killed, *more)
    names = read_json(whole / "gating" / "manifest.json")["files"]
    assert read_json(killed / "gating" / "manifest.json")["files"] == names
    assert not list(killed.rglob("*.ckpt"))


# Seeds and devices of the gate


def test_a_seed_reaches_the_gate_and_the_same_one_leaves_the_same_bits(
    undisturbed, longer, arguments, tmp_path
):
    for name, seed in (("same", 0), ("other", 5)):
        run_again(arguments, tmp_path / name, *longer[1], f"seed={seed}")
    found = {
        name: {file: (tmp_path / name / "gating" / file).read_bytes() for file in undisturbed}
        for name in ("same", "other")
    }
    assert found["same"] == undisturbed
    for file in ("gate.safetensors", "undecorrelated.safetensors", "gate.json"):
        assert found["other"][file] != undisturbed[file]
    # What has no chance in it is no other.
    probes = [file for file in undisturbed if "probe" in file]
    assert len(probes) == 2
    for file in probes:
        assert found["other"][file] == undisturbed[file]


def test_devices_without_a_way_to_start_them_are_one_line(arguments, tmp_path):
    error = error_of(*arguments, "fit.trainer.devices=2", f"output_dir={tmp_path / 'run'}")
    assert "fit.trainer.strategy=ddp_spawn" in error
    assert not list((tmp_path / "run").rglob("shard-*"))


@pytest.mark.slow
def test_two_devices_train_the_gate_from_the_command_line(trained, arguments, tmp_path):
    folder = tmp_path / "run"
    more = (f"from_run={trained[0]}", "stages=[gating,model,report]", "fit/gating=mlp")
    more = (*more, "fit.trainer.devices=2", "fit.trainer.strategy=ddp_spawn")
    # In a process of its own: what the tests' shape checker wraps cannot be sent to workers.
    command = [sys.executable, "-m", "armo.cli", *arguments, *more, f"output_dir={folder}"]
    done = subprocess.run(
        [*command, "fit.trainer.max_epochs=5"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    _, summary = load_gating(folder / "gating", "gate")
    assert summary.comparisons == 48
    assert max(summary.epochs) > 0
    assert summary.loss <= summary.constant_loss
    assert model_of(folder).verify() < 1e-5
    assert not list(folder.rglob("*.ckpt"))


# Several processes


def assert_same_embeddings(folder, other):
    """The same rows in the same shards; what the model gave may round off by its threads."""
    names = {file.name for file in (folder / "embeddings").iterdir()}
    assert names == {file.name for file in (other / "embeddings").iterdir()}
    shards = {name for name in names if name.startswith("shard-")}
    assert len(shards) > 1
    for name in shards:
        ours, theirs = (load_file(run / "embeddings" / name) for run in (folder, other))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for name in names - shards - {"manifest.json"}:
        assert (folder / "embeddings" / name).read_bytes() == (
            other / "embeddings" / name
        ).read_bytes(), name
    ours, theirs = (read_json(run / "embeddings" / "manifest.json") for run in (folder, other))
    assert shards < ours["files"].keys()
    for manifest in (ours, theirs):
        for name in shards:
            del manifest["files"][name]
    assert ours == theirs


@pytest.mark.slow
def test_two_devices_give_the_same_embeddings_as_one(trained, arguments, tmp_path):
    folder = tmp_path / "run"
    run_again(arguments, folder, "stages=[embed]", "embed.trainer.devices=2")
    assert_same_embeddings(folder, trained[0])


TWICE = """
import sys
import torch.distributed
from armo import cli

arguments = sys.argv[1:]
for _ in range(2):
    sys.argv = ["armo", *arguments]
    cli.main()
    torch.distributed.barrier()
"""


@pytest.mark.slow
def test_processes_that_torchrun_starts_share_the_embedding_and_one_does_the_rest(
    trained, arguments, tmp_path
):
    folder = tmp_path / "run"
    (tmp_path / "twice.py").write_text(TWICE)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(tmp_path / "twice.py", *arguments, f"output_dir={folder}", "stages=[embed,heads]"),
        "embed.trainer.devices=2",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as processes:
        # Meanwhile, stopped for a moment, the folder is another run's.
        holder = folder / ".lock.json"
        while not holder.is_file():
            assert processes.poll() is None, processes.communicate()
            time.sleep(0.01)
        first = int(json.loads(holder.read_text())["pid"])
        os.kill(first, signal.SIGSTOP)
        try:
            error = error_of(*arguments, f"output_dir={folder}")
        finally:
            os.kill(first, signal.SIGCONT)
        assert f"process {first} on {os.uname().nodename} is writing there" in error
        out, err = processes.communicate(timeout=120)
    assert processes.returncode == 0, err
    assert out.count("rated responses") == out.count("error variance explained") == 1
    assert_same_embeddings(folder, trained[0])
    # The second time both find it done, and only the first says so.
    assert out.count("embed: up to date") == out.count("heads: up to date") == 1


def test_a_team_takes_all_processes_that_torchrun_started(monkeypatch):
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "none",
    }.items():
        monkeypatch.setenv(name, value)
    assert outer_rank() == 0
    fabric = Team(accelerator="cpu").fabric()
    assert (fabric.world_size, fabric.global_rank) == (2, 0)
    assert fabric.strategy.num_processes == 2


def test_without_torchrun_a_process_has_no_rank_among_others():
    assert outer_rank() is None


@pytest.fixture
def work(tmp_path):
    """Do a stage that writes one file, as one of several processes; return what was called."""

    def work(rank, *, settings="settings", help_with=True):
        called = []

        def write(folder):
            called.append("work")
            (folder / "file.json").write_text("{}")

        console = Console(file=io.StringIO())
        Run(tmp_path, console, seed=0, rank=rank).do(
            "embed",
            settings=settings,
            inputs={},
            work=write,
            fresh=False,
            help_with=(lambda folder: called.append(("help", folder))) if help_with else None,
        )
        return called, console.file.getvalue()

    return work


def test_other_processes_help_and_write_and_say_nothing(work, tmp_path):
    assert work(1) == ([("help", tmp_path / "embeddings")], "")
    assert work(1, help_with=False) == ([], "")
    assert not (tmp_path / "embeddings").exists()


def test_other_processes_do_nothing_where_the_stage_is_done(work, tmp_path):
    called, out = work(0)
    assert called == ["work"]
    assert "embed" in out
    assert work(1) == ([], "")
    assert work(0)[0] == []
    assert work(1, settings="others") == ([("help", tmp_path / "embeddings")], "")
    assert work(0)[0] == []  # which has left the finished stage alone


# Texts that are too long


def test_skipped_rows_are_left_out_of_the_whole_way(arguments, rows, causal_folder, tmp_path):
    folder = tmp_path / "run"
    run_again(
        [argument for argument in arguments if "layers" not in argument],
        *(folder, "embed=causal", f"embed.backbone.spec.id={causal_folder}"),
        *("embed.backbone.spec.layers=[-1]", "embed.backbone.spec.on_overlong=skip"),
        "embed.backbone.spec.max_tokens=70",
    )
    _, ratings, pairs = rows
    tokenizer = AutoTokenizer.from_pretrained(causal_folder)

    def fits(messages):
        return len(tokenizer.apply_chat_template(messages)["input_ids"]) <= 70

    def answered(pair, text):
        return [*pair["prompt"], {"role": "assistant", "content": text}]

    rated = [fits(row["messages"]) for row in ratings]
    paired = [fits(answered(p, p["chosen"])) and fits(answered(p, p["rejected"])) for p in pairs]
    assert 5 < rated.count(False) < 40
    tables = EmbeddedData.load(folder / "embeddings").tables
    for there, kind, train, test in (
        (rated, ratings, tables.ratings_train, tables.ratings_test),
        (paired, pairs, tables.pairs_train, tables.pairs_test),
    ):
        sides = [row["split"] == "test" for row in kind]
        assert test.tolist() == [a and b for a, b in zip(there, sides, strict=True)]
        assert train.tolist() == [a and not b for a, b in zip(there, sides, strict=True)]
    log = (folder / "cli.log").read_text()
    assert f"{rated.count(False)} of 120 responses were skipped: too long" in log
    assert f"so {rated.count(False)} of 120 rated rows are left out" in log
    assert f"so {paired.count(False)} of 60 pairs are left out" in log

    heads = FittedHeads.load(folder / "heads")
    for summary in heads.summaries:
        assert summary.ratings == int(tables.ratings_train.sum())
    report = json.loads((folder / "report" / "report.json").read_text())
    assert sum(row["pairs"] for row in report["kinds"]) == int(tables.pairs_test.sum())
    assert "NaN" not in (folder / "report" / "report.json").read_text()
    assert {row["ratings"] for row in report["objectives"]} == {int(tables.ratings_test.sum())}
    model = ArmoRewardModel.from_pretrained(folder / "model", device="cpu")
    assert model.verify() < 1e-5
    for tensor in model.state_dict().values():
        assert bool(tensor.isfinite().all())
    scores = model.score([row["messages"] for row in ratings]).score
    assert scores.isnan().tolist() == [not there for there in rated]


def test_a_run_that_was_cut_off_keeps_its_shards(arguments, folder):
    kept = folder / "embeddings" / "shard-00000.safetensors"
    before = digest_file(kept), kept.stat().st_mtime_ns
    lost = folder / "embeddings" / "shard-00001.safetensors"
    whole = digest_file(lost)
    lost.unlink()
    (folder / "embeddings" / "manifest.json").unlink()
    assert run_again(arguments, folder) == {"embed"}
    assert (digest_file(kept), kept.stat().st_mtime_ns) == before
    assert digest_file(lost) == whole


def test_no_prompt_is_on_both_sides_of_the_split(trained, rows):
    data = EmbeddedData.load(trained[0] / "embeddings")
    _, ratings, pairs = rows
    assert data.tables.ratings_test.tolist() == [row["split"] == "test" for row in ratings]
    assert data.tables.pairs_test.tolist() == [row["split"] == "test" for row in pairs]
    groups = data.tables.group_of_response
    test = set(groups[data.tables.ratings_response[data.tables.ratings_test]].tolist())
    train = set(groups[data.tables.ratings_response[data.tables.ratings_train]].tolist())
    assert len(test) == 12
    assert not test & train


def adjusted_of(data, transforms, rows):
    """Adjusted rewards of some responses, from what is stored of them."""
    transform = transforms.transform
    columns = [data.covariates.index(name) for name in transform.covariates]
    return transform.adjusted(data.responses.read(rows), data.tables.covariates[rows][:, columns])


def adjusted_slowly(data, heads, transforms, response):
    """Adjusted rewards of a response, by the transform of the fold that its prompt is in."""
    fold = int(heads.fold_of_group[data.tables.group_of_response[response]])
    assert fold >= 0
    transform = transforms.without_fold[fold]
    columns = [data.covariates.index(name) for name in transform.covariates]
    [h] = data.responses.read(torch.tensor([response])).double()
    z = data.tables.covariates[response][columns].double()
    return transform.matrix @ h + transform.style @ z + transform.offset


def test_the_gate_sees_rewards_of_heads_that_never_saw_the_prompt(trained):
    data = EmbeddedData.load(trained[0] / "embeddings")
    heads = FittedHeads.load(trained[0] / "heads")
    transforms = load_transforms(trained[0] / "decorrelation")
    tables = data.tables
    train = tables.pairs_train.nonzero()[:, 0]
    rows = torch.cat([tables.pairs_chosen[train], tables.pairs_rejected[train]])
    rewards = out_of_fold_rewards(data, heads, transforms, rows)
    assert "log_length" in transforms.without_fold[0].covariates
    for row, response in enumerate(rows.tolist()):
        expected = adjusted_slowly(data, heads, transforms, response)
        torch.testing.assert_close(rewards[row], expected)
    assert not torch.allclose(rewards, adjusted_of(data, transforms, rows), atol=1e-3)


def test_the_heads_that_score_a_pair_do_not_change_with_the_ratings_of_its_prompt(trained):
    data = EmbeddedData.load(trained[0] / "embeddings")
    tables = data.tables
    rows = tables.ratings_response[tables.ratings_train]
    ratings = tables.ratings[tables.ratings_train]
    groups = tables.group_of_response[rows]

    def fit(ratings):
        return fit_heads(
            *(data.responses, rows, ratings, groups),
            objectives=data.objectives.names,
            group_count=int(tables.group_of_prompt.max()) + 1,
            alphas=[1.0],
        )

    pair = tables.pairs_train.nonzero()[0, 0]
    group = tables.group_of_response[tables.pairs_chosen[pair]]
    changed = torch.where((groups == group)[:, None], 1.0 - ratings, ratings)
    before, after = fit(ratings), fit(changed)
    fold = int(before.fold_of_group[group])
    torch.testing.assert_close(before.without_fold[fold].weights, after.without_fold[fold].weights)
    assert not torch.allclose(before.heads.weights, after.heads.weights)


def test_the_saved_model_scores_text_as_the_parts_score_embeddings(trained, rows):
    folder, _ = trained
    data = EmbeddedData.load(folder / "embeddings")
    heads = FittedHeads.load(folder / "heads").heads
    transforms = load_transforms(folder / "decorrelation")
    gate, summary = load_gating(folder / "gating", "gate")
    model = ArmoRewardModel.from_pretrained(folder / "model", device="cpu")
    pairs = rows[2]
    out = model.score(
        [[*p["prompt"], {"role": "assistant", "content": p["chosen"]}] for p in pairs]
    )
    h = data.responses.read(data.tables.pairs_chosen)
    with torch.no_grad():
        weights = gate.double()(data.prompt_embeddings(data.tables.pairs_chosen).double())
    score = (weights * adjusted_of(data, transforms, data.tables.pairs_chosen)).sum(1)
    torch.testing.assert_close(out.score, score, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.rewards, heads.rewards(h), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.gating_weights, weights, atol=1e-5, rtol=0)
    assert float(model.beta) == pytest.approx(summary.beta)
    assert model.verify() < 1e-5


@pytest.fixture(scope="module")
def methods(trained, arguments, tmp_path_factory):
    """The folder of the run with each method of decorrelation alone, and with none."""
    folders = {}
    for method in (None, *METHODS):
        folders[method] = tmp_path_factory.mktemp(str(method)) / "run"
        shutil.copytree(trained[0], folders[method])
        chosen = "" if method is None else method
        again = run_again(
            arguments,
            folders[method],
            f"fit.decorrelation.methods=[{chosen}]",
            "fit.trainer.max_epochs=3",
        )
        assert again >= {"decorrelation", "gating", "model"}
    return folders


def score_texts(folder, pairs):
    """Scores of the exported model for chosen and rejected responses, in turn."""
    model = ArmoRewardModel.from_pretrained(folder / "model", device="cpu")
    out = model.score(
        [
            [*pair["prompt"], {"role": "assistant", "content": pair[side]}]
            for pair in pairs
            for side in ("chosen", "rejected")
        ]
    )
    return out.score


def length_followed(score, pairs):
    """Correlation of score differences with length differences of the pairs, in both orders."""
    texts = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    length = surface_features(texts)[:, SURFACE_FEATURES.index("log_length")]
    a, b = (values[::2] - values[1::2] for values in (score, length))
    return float(a @ b / (a.norm() * b.norm()))


# On 48 pairs that length nearly decides, reweighting has little to work with.
@pytest.mark.parametrize(
    ("method", "most"),
    [
        ("leace", 0.1),
        ("penalty", 0.3),
        ("residual", 0.01),
        ("nuisance", 0.9),
        ("reweight", 0.995),
    ],
)
def test_the_exported_model_follows_length_less_with_each_method_than_without(
    methods, rows, method, most
):
    pairs = [pair for pair in rows[2] if pair["split"] == "train"]
    with_none, with_it = (
        length_followed(score_texts(methods[which], pairs), pairs) for which in (None, method)
    )
    assert with_none > 0.5
    assert abs(with_it) < most * with_none


@pytest.mark.parametrize("method", [None, *METHODS])
def test_only_a_residual_needs_the_text_at_scoring(methods, method):
    config = read_json(methods[method] / "model" / "config.json")
    needed = list(STYLE_FEATURES) if method == "residual" else []
    assert config["covariates"] == {"version": SURFACE_VERSION, "names": needed}
    report = json.loads((methods[method] / "report" / "report.json").read_text())
    assert report["applied"][0]["value"] < 1e-5
    assert ArmoRewardModel.from_pretrained(methods[method] / "model", device="cpu").verify() < 1e-5


@pytest.mark.parametrize("method", [None, *METHODS])
def test_the_summary_of_the_gate_tells_what_judges_gave_to_style_with_nuisance_alone(
    methods, method
):
    _, summary = load_gating(methods[method] / "gating", "gate")
    _, plain = load_gating(methods[method] / "gating", "undecorrelated")
    assert list(summary.style) == (list(STYLE_FEATURES) if method == "nuisance" else [])
    assert plain.style == {}
    if method == "nuisance":
        assert summary.style["log_length"] > 0.1  # longer answers are better here


@pytest.mark.parametrize(
    "asked",
    [(), ("residual",), ("nuisance",), ("reweight",), ("nuisance", "reweight", "leace")],
)
def test_the_gate_is_given_style_and_weights_where_they_are_asked_for(trained, tmp_path, asked):
    data = EmbeddedData.load(trained[0] / "embeddings")
    heads = FittedHeads.load(trained[0] / "heads")
    features = ("bold", "log_length")
    transforms = dataclasses.replace(
        load_transforms(trained[0] / "decorrelation"), methods=asked, features=features
    )
    given, result = [], load_gating(trained[0] / "gating", "gate")

    def fit(preferences, **how):
        given.append((preferences, how))
        return result

    made = train_gate(data, heads, transforms, fit=fit, folder=tmp_path, seed=7)
    assert made is result
    [(preferences, how)] = given
    train = data.tables.pairs_train
    chosen, rejected = data.tables.pairs_chosen[train], data.tables.pairs_rejected[train]
    columns = [data.covariates.index(name) for name in features]
    covariates = data.tables.covariates[:, columns]
    style = covariates[chosen] - covariates[rejected]
    assert len(preferences) == len(style) == 48
    first, second = preferences.style[preferences.responses].unbind(1)
    torch.testing.assert_close(first - second, style)
    assert how["nuisance"] == ("nuisance" in asked)
    assert how["style_names"] == features
    # No pair has a weight of its own here.
    assert (preferences.weights == 1.0).all()
    balanced = style_weights(style) if "reweight" in asked else preferences.weights
    torch.testing.assert_close(preferences.balance, balanced)
    assert how["objectives"] == data.objectives.names
    assert how["mixed"] == data.objectives.mixed_indices
    assert (how["folder"], how["seed"]) == (tmp_path, 7)


def test_features_that_are_not_measured_are_named(arguments, folder):
    error = error_of(
        *arguments, f"output_dir={folder}", "fit.decorrelation.features=[log_length,charm]"
    )
    assert "`features` knows log_length, " in error
    assert "not charm" in error


def test_the_decorrelation_table_shows_the_worst_measured_style_before_and_after():
    summary = DecorrelationSummary(
        "honesty",
        penalties={"verbosity": 0.5},
        before={"verbosity": 0.9, "log_length": 0.2, "bold": -0.4},
        after={"verbosity": 0.01, "log_length": -0.1, "bold": 0.05},
        kept=0.75,
    )
    assert decorrelation_table([summary]).rows == (
        ("honesty", "verbosity", 0.5, 0.9, 0.01, 0.75),
        ("honesty", "measured style, at most (bold; log_length)", None, -0.4, -0.1, 0.75),
    )
    nothing = DecorrelationSummary("honesty", {}, {}, {}, 1.0)
    assert decorrelation_table([nothing]).rows[0][0] == "(nothing to decorrelate)"


def test_the_report_is_about_the_test_side_alone(trained, rows):
    report = json.loads((trained[0] / "report" / "report.json").read_text())
    assert [*report] == [
        "objectives",
        "errors",
        "rivals",
        "calibration",
        "reliability",
        "weights",
        "gate",
        "kinds",
        "quarters",
        "style",
        "applied",
    ]
    assert {row["kind"]: row["pairs"] for row in report["kinds"]} == {"advice": 6, "code": 6}
    assert report["applied"][0]["value"] < 1e-5
    model = ArmoRewardModel.from_pretrained(trained[0] / "model", device="cpu")
    right = [
        model.compare(p["prompt"], p["chosen"], p["rejected"]).score_difference > 0
        for p in rows[2]
        if p["split"] == "test"
    ]
    assert report["rivals"][0]["score"] == "gated score"
    assert report["rivals"][0]["accuracy"] == pytest.approx(sum(right) / len(right))


def test_golden_conversations_come_from_the_test_side(trained, rows):
    golden = read_json(trained[0] / "model" / "golden.json")["conversations"]
    test = {
        prompt_group((Message("user", p["prompt"][0]["content"]),))
        for p in rows[2]
        if p["split"] == "test"
    }
    assert len(golden) == 8
    assert all(prompt_group((Message(**messages[0]),)) in test for messages in golden)


def test_a_seed_reaches_the_folds_of_the_heads_and_nothing_before_it(folder, arguments):
    assert run_again(arguments, folder, "seed=1") == {*STAGES} - {"embed"}


def test_a_causal_backbone_goes_the_whole_way(arguments, causal_folder, tmp_path):
    run_again(
        [argument for argument in arguments if "layers" not in argument],
        *(tmp_path / "run", "embed=causal", f"embed.backbone.spec.id={causal_folder}"),
        "embed.backbone.spec.layers=[-1]",
    )
    model = ArmoRewardModel.from_pretrained(tmp_path / "run" / "model", device="cpu")
    assert model.backbone.spec.pooling == "last"
    assert model.verify() < 1e-5


# Judgements and yes-or-no ratings


@pytest.fixture(scope="module")
def judged(rows, arguments, tmp_path_factory):
    """A run with `honesty` judged alone, `helpfulness` judged and rated, `safety` yes or no."""
    folder = tmp_path_factory.mktemp("judged")
    ratings, pairs = [], []
    for row in rows[1]:
        rated = {name: r for name, r in row["ratings"].items() if name != "honesty"}
        rated["safety"] = 5 if "a" in row["messages"][1]["content"] else 1
        ratings.append({**row, "ratings": rated})
    for k, row in enumerate(rows[2]):
        longer = len(row["chosen"]) > len(row["rejected"])
        judgements = {"helpfulness": 0.8, "honesty": (0.2, 0.5, 0.9)[k % 3] if longer else 0.1}
        weight = 0.0 if k % 10 == 9 else 1.0 + k % 2
        without = {"judgements": {"honesty": None}} if k % 8 == 7 else {"judgements": judgements}
        pairs.append({**row, "weight": weight, **without})
    write_rows(folder / "ratings.jsonl", ratings)
    write_rows(folder / "pairs.jsonl", pairs)
    run_again(
        arguments,
        folder / "run",
        f"data.ratings.path={folder / 'ratings.jsonl'}",
        f"data.pairs.path={folder / 'pairs.jsonl'}",
        "fit.heads.logistic=[safety]",
    )
    return folder / "run", pairs


LINKS = ("identity", "logistic", "logistic", "identity", "identity")


def test_judgements_and_yes_or_no_go_the_whole_way(judged):
    folder, pairs = judged
    data = EmbeddedData.load(folder / "embeddings")
    fitted = FittedHeads.load(folder / "heads")
    assert data.objectives.names[:3] == ("helpfulness", "honesty", "safety")
    assert fitted.heads.links == LINKS
    used = [p for p in pairs if p["split"] == "train" and p["weight"] and len(p["judgements"]) == 2]
    assert 30 < len(used) < 48
    counts = [(s.ratings, s.judgements) for s in fitted.summaries]
    assert counts == [(96, len(used)), (0, len(used)), (96, 0), (96, 0), (96, 0)]
    groups = data.tables.group_of_response[data.tables.pairs_chosen[data.tables.pairs_train]]
    assert (fitted.fold_of_group[groups] >= 0).all(), "the gate needs heads without each pair"
    assert fitted.uncertainty.quantiles.isfinite().tolist() == [False, False, False, True, True]

    model = ArmoRewardModel.from_pretrained(folder / "model", device="cpu")
    assert model.links == LINKS
    assert model.verify() < 1e-5
    out = model.score(
        [[*p["prompt"], {"role": "assistant", "content": p["chosen"]}] for p in pairs]
    )
    h = data.responses.read(data.tables.pairs_chosen)
    torch.testing.assert_close(out.rewards, fitted.heads.rewards(h), atol=1e-5, rtol=0)
    assert ((out.rewards[:, 1:3] > 0) & (out.rewards[:, 1:3] < 1)).all()
    adjusted = adjusted_of(
        data, load_transforms(folder / "decorrelation"), data.tables.pairs_chosen
    )
    torch.testing.assert_close(out.adjusted, adjusted, atol=1e-5, rtol=0)


def test_judgements_reach_the_heads_with_the_weights_of_their_pairs(judged):
    folder, _ = judged
    data = EmbeddedData.load(folder / "embeddings")
    fitted = FittedHeads.load(folder / "heads")
    tables, k = data.tables, 1
    train = tables.pairs_train & (tables.pairs_weight > 0)
    train &= ~tables.pairs_judgements[:, k].isnan()
    chosen, rejected = tables.pairs_chosen[train], tables.pairs_rejected[train]
    weights = tables.pairs_weight[train].double()
    side = (tables.pairs_judgements[train, k] - 0.5).sign()
    decided = side != 0
    style = data.style(chosen, STYLE_FEATURES) - data.style(rejected, STYLE_FEATURES)
    better = side[decided, None] * style[decided]  # of the one that was judged better
    weights[decided] *= style_weights(better, weights[decided])
    assert len(weights.unique()) > 5
    rows = LabelledRows(
        data.responses.read(chosen).double() - data.responses.read(rejected).double(),
        tables.pairs_judgements[train, k],
        weights / weights.mean(),
        fitted.fold_of_group[tables.group_of_response[chosen]],
    )
    choice = fit_judgements(
        lambda: [rows], folds=len(fitted.without_fold), alphas=[fitted.summaries[k].alpha]
    )
    torch.testing.assert_close(fitted.heads.weights[k], choice.weights, rtol=1e-4, atol=1e-6)
    for heads, (weights, _) in zip(fitted.without_fold, choice.without, strict=True):
        torch.testing.assert_close(heads.weights[k], weights, rtol=1e-4, atol=1e-6)


def test_without_reweighting_judgements_count_as_their_pairs(judged):
    data = EmbeddedData.load(judged[0] / "embeddings")
    tables = data.tables
    found = training_judgements(data, reweighted=(), source_weights={"test": 3.0})
    known = ~tables.pairs_judgements.isnan()
    known &= (tables.pairs_train & (tables.pairs_weight > 0))[:, None]
    assert len(found.chosen) == int(known.sum())
    assert ((~found.probabilities.isnan()).sum(1) == 1).all()
    for row in range(len(found.chosen)):
        [k] = (~found.probabilities[row].isnan()).nonzero()[:, 0].tolist()
        pair = int((tables.pairs_chosen == found.chosen[row]).nonzero()[0, 0])
        assert int(found.rejected[row]) == int(tables.pairs_rejected[pair])
        assert float(found.probabilities[row, k]) == float(tables.pairs_judgements[pair, k])
        assert float(found.weights[row]) == 3.0 * float(tables.pairs_weight[pair])


def test_the_report_of_judged_objectives_says_what_is_known_of_them(judged):
    folder, pairs = judged
    report = json.loads((folder / "report" / "report.json").read_text())
    ranks = {row["objective"]: row for row in report["objectives"]}
    errors = {row["objective"]: row for row in report["errors"]}
    assert (ranks["honesty"]["ratings"], ranks["honesty"]["Spearman"]) == (0, None)
    assert ranks["safety"]["Spearman"] is not None
    assert errors["helpfulness"]["error"] > 0
    assert errors["helpfulness"]["its width"] is None
    assert errors["verbosity"]["its width"] > 0
    judged_rows = {row["objective"]: row["judgements"] for row in report["judgements"]}
    test = [p["judgements"] for p in pairs if p["split"] == "test" and len(p["judgements"]) == 2]
    decided = sum(judgements["honesty"] != 0.5 for judgements in test)
    assert judged_rows == {"helpfulness": len(test), "honesty": decided}


def test_the_weight_of_a_source_multiplies_those_of_its_rows(trained):
    data = EmbeddedData.load(trained[0] / "embeddings")
    data = dataclasses.replace(data, sources=("a", "b", "c"))
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    sources = torch.tensor([2, 0, 1, 2])
    made = row_weights(data, weights, sources, {"c": 0.5, "a": 0.0})
    assert made.tolist() == [0.5, 0.0, 3.0, 2.0]
    assert row_weights(data, weights, sources, {}).tolist() == weights.tolist()
    with pytest.raises(ValueError, match=r"`source_weights` names d; the sources are a, b, c"):
        row_weights(data, weights, sources, {"d": 1.0})


def test_the_gate_is_not_given_pairs_of_weight_nought(trained, tmp_path):
    data = EmbeddedData.load(trained[0] / "embeddings")
    heads = FittedHeads.load(trained[0] / "heads")
    transforms = load_transforms(trained[0] / "decorrelation")
    tables, given = data.tables, []
    sources = torch.arange(len(tables.pairs_source)) % 2
    data = dataclasses.replace(
        data, sources=("kept", "left"), tables=dataclasses.replace(tables, pairs_source=sources)
    )

    def fit(preferences, **how):
        given.append(preferences)
        return load_gating(trained[0] / "gating", "gate")

    how = {"fit": fit, "folder": tmp_path, "seed": 0}
    train_gate(data, heads, transforms, **how, source_weights={"left": 0.0, "kept": 0.5})
    train = tables.pairs_train & (sources == 0)
    [preferences] = given
    expected = data.prompt_embeddings(tables.pairs_chosen[train])
    torch.testing.assert_close(preferences.prompts[preferences.prompt_of], expected)
    assert len(preferences.weights) == len(preferences) == int(train.sum())


def test_the_weight_of_a_source_trains_the_heads_and_the_gate_again(arguments, folder):
    again = run_again(arguments, folder, "fit.source_weights={test: 2.0}")
    assert again == set(STAGES) - {"embed"}
    error = error_of(*arguments, f"output_dir={folder}", "fit.source_weights={nowhere: 2.0}")
    assert "`source_weights` names nowhere; the sources are test" in error


def test_parts_of_other_runs_are_not_joined(arguments, folder):
    """New folds under old transforms: the gate would train on heads that saw its prompts."""
    error = error_of(*arguments, f"output_dir={folder}", "seed=1", "stages=[heads,gating]")
    assert "was made from another `heads` than is there now" in error
    assert "armo train stages=[decorrelation]" in error
    assert run_again(arguments, folder, "seed=1") >= {"decorrelation", "gating", "model", "report"}


def test_style_is_weighed_out_of_the_pairs_as_they_count():
    """Two sources that pay for opposite lengths, one of which hardly counts."""
    longer = torch.cat([torch.ones(90), -torch.ones(10), -torch.ones(90), torch.ones(10)])
    own = torch.cat([torch.ones(100), torch.full((100,), 0.05)]).double()
    weights = own * style_weights(longer.double()[:, None], own)
    share = float(weights[longer > 0].sum() / weights.sum())
    assert abs(share - 0.5) < 0.06
    ignored = own * style_weights(longer.double()[:, None])
    assert float(ignored[longer > 0].sum() / ignored.sum()) > 0.8


def test_pairs_of_weight_nought_are_no_reference_and_without_any_other_it_is_said(
    arguments, folder
):
    error = error_of(*arguments, f"output_dir={folder}", "fit.source_weights={test: 0.0}")
    assert "weight" in error or "rating" in error


def test_ranks_are_not_compared_with_ratings_on_their_scale(arguments, folder):
    run_again(arguments, folder, "fit.heads.targets=ranks")
    report = read_json(folder / "report" / "report.json")
    assert all(row["slope"] is None for row in report["objectives"])
    assert any(row["Spearman"] is not None for row in report["objectives"])
    assert all(row["error"] is None for row in report["errors"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("fit.heads.folds=1", "`folds` must be 2 or more"),
        ("fit.heads.alphas=[]", "`alphas` not empty"),
        ("fit.heads.logistic=honesty", "`logistic` must be a list of names"),
        ("fit.source_weights={test: abc}", "`source_weights` must be finite numbers from 0 on"),
        ("fit.source_weights={test: -1.0}", "`source_weights` must be finite numbers from 0 on"),
        ("fit.source_weights={test: .inf}", "`source_weights` must be finite numbers from 0 on"),
    ],
)
def test_settings_that_cannot_be_are_one_line(arguments, folder, setting, message):
    assert message in error_of(*arguments, f"output_dir={folder}", setting)


def test_the_benchmark_of_methods_runs_on_a_finished_run(trained, tmp_path):
    program = Path(__file__).parents[1] / "benchmarks" / "decorrelation.py"
    command = [sys.executable, program, "--run", trained[0], "--only", "length alone"]
    command += ["--seeds", "1", "--max-epochs", "2"]
    command += ["--json", tmp_path / "methods.json", "--plot", tmp_path / "methods.svg"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "leace, length alone" in done.stdout
    means = read_json(tmp_path / "methods.json")["mean"]
    assert list(means) == ["none", "leace, length alone"]
    assert means["leace, length alone"]["length, within"] < means["none"]["length, within"]
    assert all(0.0 <= figures["accuracy"] <= 1.0 for figures in means.values())
    assert "<svg" in (tmp_path / "methods.svg").read_text()


def test_the_benchmark_of_calibration_judges_every_pair_by_parts_that_never_saw_it(
    trained, tmp_path
):
    program = Path(__file__).parents[1] / "benchmarks" / "calibration.py"
    before = {stage: state_of(trained[0], stage) for stage in STAGES}
    command = [sys.executable, program, "--run", trained[0], "--folds", "3"]
    done = subprocess.run(
        [*command, "--json", tmp_path / "calibration.json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Expected calibration error" in done.stdout
    found = read_json(tmp_path / "calibration.json")
    figures = found["calibration"]
    assert list(figures) == ["all pairs", "train side", "test side"]
    tables = EmbeddedData.load(trained[0] / "embeddings").tables
    sides = [int(side.sum()) for side in (tables.pairs_train, tables.pairs_test)]
    assert [row["pairs"] for row in figures.values()] == [sum(sides), *sides]
    for row in figures.values():
        assert row["from"] <= row["error"] <= row["to"]
        assert 0.0 < row["by chance"] <= row["up to"]
        assert math.isfinite(row["slope"])
    for row in found["kinds"]:
        assert row["too sure by"] == pytest.approx(row["predicted"] - row["observed"])
    assert sum(row["pairs"] for row in found["kinds"]) == sum(sides)
    assert {stage: state_of(trained[0], stage) for stage in STAGES} == before
    held = tables.group_of_response % 3 == 1
    folded = runpy.run_path(str(program))["with_fold"](tables, held)
    for name, responses in (
        ("ratings", tables.ratings_response),
        ("pairs", tables.pairs_chosen),
        ("pairs", tables.pairs_rejected),
    ):
        assert torch.equal(getattr(folded, f"{name}_train"), ~held[responses])
        assert torch.equal(getattr(folded, f"{name}_test"), held[responses])
    # What is of the benchmark is on neither side to train on.
    listed = ~tables.lists_benchmark
    assert not bool(folded.lists_train[tables.lists_benchmark].any())
    assert torch.equal(folded.lists_train | folded.lists_test, listed)


# Stages of another run


def test_the_stages_that_are_not_run_are_read_from_another_run_and_left_alone(
    trained, arguments, tmp_path
):
    source, _ = trained
    before = {stage: state_of(source, stage) for stage in STAGES}
    there = {path.name for path in source.iterdir()}
    folder = tmp_path / "run"
    more = (f"from_run={source}", "stages=[gating,model,report]")
    status, out, err = run(*arguments, f"output_dir={folder}", *more)
    assert status == 0, err
    assert f"from {source}: embed, heads, decorrelation" in " ".join(out.split())
    for name in ("gating/gate.safetensors", "gating/gate.json", "model/model.safetensors"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    for stage in ("gating", "model", "report"):
        ours, theirs = (read_json(f / stage / "manifest.json")["key"] for f in (folder, source))
        assert ours == theirs
    assert not set(FOLDERS.values()) & {path.name for path in folder.iterdir()} - {
        *("gating", "model", "report")
    }
    assert {stage: state_of(source, stage) for stage in STAGES} == before
    assert {path.name for path in source.iterdir()} == there
    _, out, _ = run(*arguments, f"output_dir={folder}", *more)
    assert out.count("up to date") == 3


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stages=[gating]", "is the folder of this run"),
        ("output_dir=run", "need no other; leave some out"),
        ("stages=[embed] output_dir=run", "need no other; leave some out"),
        ("stages=[heads] output_dir=run from_run=/no/such", "/no/such has no finished `embed`"),
        (
            "stages=[model] output_dir=run embed.backbone.spec.layers=[1]",
            "was embedded with other settings",
        ),
        (
            "stages=[heads,gating] output_dir=run fit.heads.folds=3",
            "decorrelation was made from another `heads` than is there now; add decorrelation to",
        ),
    ],
)
def test_another_run_that_cannot_stand_for_the_missing_stages_is_refused(
    trained, arguments, tmp_path, monkeypatch, setting, message
):
    monkeypatch.chdir(tmp_path)
    own = [f"from_run={trained[0]}", f"output_dir={trained[0]}", *setting.split()]
    given = {item.partition("=")[0]: item for item in own}
    assert message in error_of(*arguments, *given.values())


# Loggers


def test_a_logger_without_its_package_is_refused_before_anything_runs(
    arguments, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    error = error_of(*arguments, "fit/logger=wandb", f"output_dir={tmp_path / 'run'}")
    assert "pip install wandb" in error
    assert not (tmp_path / "run" / "embeddings").exists()


def test_the_logger_is_no_reason_to_train_again(folder, arguments):
    assert run_again(arguments, folder, "fit.logger.version=elsewhere") == set()


def test_logs_that_grow_do_not_damage_the_gate(folder, arguments):
    logs = list((folder / "gating").glob("*_training/**/metrics.csv"))
    assert logs
    for file in logs:
        file.write_text(file.read_text() + "\n")
    assert run_again(arguments, folder) == set()


@pytest.mark.parametrize(
    ("logger", "left"),
    [
        ("tensorboard", "gating/*/logs/events.*"),
        ("wandb", "gating/*/wandb/offline-run-*/*.wandb"),
        ("mlflow", "mlflow.db"),
    ],
)
def test_each_logger_of_another_package_leaves_its_logs(trained, arguments, tmp_path, logger, left):
    pytest.importorskip(logger)
    more = (f"from_run={trained[0]}", "stages=[gating]", f"output_dir={tmp_path / 'run'}")
    status, _, err = run(*arguments, *more, f"fit/logger={logger}")
    assert status == 0, err
    assert list((tmp_path / "run").glob(left))
    assert "gating: up to date" in run(*arguments, *more)[1]


# Sweeps


def sweep(arguments, source, folder, *more):
    """Run one job per combination of values; return the status, the jobs and what was printed."""
    status, out, err = run(
        *(arguments[0], "-m", *arguments[1:]),
        *("stages=[gating]", f"output_dir={folder}", f"from_run={source}", *more),
    )
    return status, read_json(Path(f"{folder}_sweep") / "jobs.json"), out, err


def test_a_sweep_gives_each_job_a_folder_and_ends_with_one_table(trained, arguments, tmp_path):
    folder = tmp_path / "run"
    status, jobs, out, err = sweep(arguments, trained[0], folder, "fit.gating.hidden_dim=4,8")
    assert status == 0, err
    assert not folder.exists()
    for number, (job, hidden_dim) in enumerate(zip(jobs, (4, 8), strict=True)):
        assert job["job"] == number
        assert job["folder"] == f"{folder}_sweep/{number}"
        assert f"fit.gating.hidden_dim={hidden_dim}" in job["overrides"]
        saved = read_json(Path(job["folder"]) / "gating" / "gate.json")
        for name in ("loss", "accuracy"):
            assert job[name] == saved["summary"][name]
        assert f"fit.gating.hidden_dim={hidden_dim} " in out
        assert f"{job['loss']:.4f}" in out
    status, jobs, _, _ = sweep(arguments, trained[0], folder, "fit.gating.hidden_dim=4")
    assert (status, len(jobs)) == (0, 1)


def test_a_job_that_fails_is_named_and_the_others_run(trained, arguments, tmp_path):
    status, jobs, out, err = sweep(
        arguments, trained[0], tmp_path / "run", f"from_run=/no/such,{trained[0]}"
    )
    assert status == 1
    line = err.splitlines()[-1]
    assert line.startswith(f"armo: error: job 0 of the sweep {tmp_path / 'run'}_sweep: ")
    assert "/no/such has no finished `embed`" in line
    assert "Traceback" not in err
    assert [job["loss"] is None for job in jobs] == [True, False]
    assert "/no/such has no finished" in jobs[0]["error"]
    assert jobs[1]["error"] is None
    assert "lowest loss: job 1" in " ".join(out.split())


def test_a_sweep_of_other_stages_has_no_loss(trained, arguments, tmp_path):
    status, jobs, out, err = sweep(
        *(arguments, trained[0], tmp_path / "run", "stages=[heads]", "seed=0,1")
    )
    assert status == 0, err
    assert [(job["loss"], job["error"]) for job in jobs] == [(None, None), (None, None)]
    assert "lowest loss" not in out


@pytest.mark.slow
def test_joblib_gives_what_the_basic_launcher_gives(trained, arguments, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    values = "fit.gating.hidden_dim=4,8"
    _, jobs, _, _ = sweep(arguments, trained[0], tmp_path / "basic", values)
    # In a process of its own: what the tests' shape checker wraps cannot be sent to workers.
    more = (f"from_run={trained[0]}", "stages=[gating]", f"output_dir={tmp_path / 'joblib'}")
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    command = [sys.executable, "-m", "armo.cli", arguments[0], "-m", *arguments[1:]]
    done = subprocess.run(
        [*command, *more, values, *launcher], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    others = read_json(tmp_path / "joblib_sweep" / "jobs.json")
    for name in ("loss", "accuracy"):
        assert [job[name] for job in others] == pytest.approx([job[name] for job in jobs], abs=1e-5)


def test_optuna_is_told_the_loss_of_the_gate(trained, arguments, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    status, jobs, _, err = sweep(
        *(arguments, trained[0], tmp_path / "run", "hydra/sweeper=optuna"),
        *("hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1"),
        "fit.gating.learning_rate=tag(log,interval(0.001,0.1))",
    )
    assert status == 0, err
    found = (tmp_path / "run_sweep" / "optimization_results.yaml").read_text()
    best = float(re.search(r"best_value: (.*)", found)[1])
    assert best == pytest.approx(min(job["loss"] for job in jobs))


def test_the_worked_sweep_trains_a_gate_for_each_combination(trained, arguments, tmp_path):
    status, jobs, _, err = sweep(
        *(arguments, trained[0], tmp_path / "run", "sweep=gate", "fit.gating.hidden_dim=4")
    )
    assert status == 0, err
    asked = {item for job in jobs for item in job["overrides"] if "dropout" in item}
    assert asked == {"fit.gating.dropout=0.2", "fit.gating.dropout=0.5"}
    assert [job["error"] for job in jobs] == [None, None]


def test_explain_shows_the_training_prompts_of_a_run_as_long_as_its_rows_are_there(
    trained, rows, folder, tmp_path
):
    pair = next(pair for pair in rows[2] if pair["split"] == "train")
    asked = write_rows(tmp_path / "pairs.jsonl", [{**pair, "id": "asked"}])
    arguments = ("explain", f"model={trained[0] / 'model'}", f"input={asked}", "device=cpu")
    status, out, err = run(*arguments, f"run={trained[0]}", "nearest=2")
    assert status == 0, err
    assert "│      1.000 │    3 │ test " in out
    assert pair["prompt"][0]["content"].split("\n")[0] in out
    # A run is data: what it names is not called unless it is armo's own.
    manifest = folder / "embeddings" / "manifest.json"
    stored = json.loads(manifest.read_text())
    for changes in ({"_target_": "os.system"}, {"path": str(tmp_path / "gone.jsonl")}):
        changed = json.loads(json.dumps(stored))
        changed["settings"]["data"]["ratings"].update(changes)
        manifest.write_text(json.dumps(changed))
        status, out, err = run(*arguments, f"run={folder}", "nearest=2")
        assert status == 0, err
        assert "│      1.000 │    3 │ test " in out
        assert "Their texts are not known" in " ".join(out.split())
