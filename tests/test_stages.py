import dataclasses
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import conversation
from rich.console import Console
from safetensors.torch import load_file
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
from armo.fit.training import load_gating
from armo.model.reward_model import ArmoRewardModel
from armo.stages import (
    FOLDERS,
    STAGES,
    Run,
    decorrelation_table,
    out_of_fold_differences,
    row_weights,
    train_gate,
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
    "report": ("report.json", "report.md", "report.html"),
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


def test_the_gate_sees_differences_of_heads_that_never_saw_the_prompt(trained):
    data = EmbeddedData.load(trained[0] / "embeddings")
    heads = FittedHeads.load(trained[0] / "heads")
    transforms = load_transforms(trained[0] / "decorrelation")
    tables = data.tables
    train = tables.pairs_train.nonzero()[:, 0]
    chosen, rejected = tables.pairs_chosen[train], tables.pairs_rejected[train]
    differences = out_of_fold_differences(data, heads, transforms, chosen=chosen, rejected=rejected)
    for row, (first, second) in enumerate(zip(chosen, rejected, strict=True)):
        fold = int(heads.fold_of_group[tables.group_of_response[first]])
        assert fold >= 0
        h = data.responses.read(torch.stack([first, second])).double()
        transform = transforms.without_fold[fold]
        adjusted = h @ transform.matrix.T
        columns = [data.covariates.index(name) for name in transform.covariates]
        adjusted += tables.covariates[torch.stack([first, second])][:, columns] @ transform.style.T
        assert "log_length" in transform.covariates
        torch.testing.assert_close(differences[row], adjusted[0] - adjusted[1])
    fitted = adjusted_of(data, transforms, chosen) - adjusted_of(data, transforms, rejected)
    assert not torch.allclose(differences, fitted, atol=1e-3)


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

    def fit(prompts, differences, groups, **how):
        given.append((prompts, differences, groups, how))
        return result

    made = train_gate(data, heads, transforms, fit=fit, folder=tmp_path, seed=7)
    assert made is result
    [(prompts, differences, groups, how)] = given
    train = data.tables.pairs_train
    chosen, rejected = data.tables.pairs_chosen[train], data.tables.pairs_rejected[train]
    columns = [data.covariates.index(name) for name in features]
    covariates = data.tables.covariates[:, columns]
    style = covariates[chosen] - covariates[rejected]
    assert len(prompts) == len(differences) == len(groups) == len(style) == 48
    if "nuisance" in asked:
        torch.testing.assert_close(how["nuisance"], style)
        assert tuple(how["nuisance_names"]) == features
    else:
        assert how["nuisance"] is None
        assert tuple(how["nuisance_names"]) == ()
    weights = torch.ones(48, dtype=torch.float64)  # no pair has a weight of its own here
    torch.testing.assert_close(
        how["weights"], style_weights(style) if "reweight" in asked else weights
    )
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
    rows = LabelledRows(
        data.responses.read(chosen).double() - data.responses.read(rejected).double(),
        tables.pairs_judgements[train, k],
        tables.pairs_weight[train] / tables.pairs_weight[train].mean(),
        fitted.fold_of_group[tables.group_of_response[chosen]],
    )
    choice = fit_judgements(
        lambda: [rows], folds=len(fitted.without_fold), alphas=[fitted.summaries[k].alpha]
    )
    torch.testing.assert_close(fitted.heads.weights[k], choice.weights, rtol=1e-4, atol=1e-6)
    for heads, (weights, _) in zip(fitted.without_fold, choice.without, strict=True):
        torch.testing.assert_close(heads.weights[k], weights, rtol=1e-4, atol=1e-6)


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

    def fit(prompts, differences, groups, **how):
        given.append((prompts, how["weights"]))
        return load_gating(trained[0] / "gating", "gate")

    how = {"fit": fit, "folder": tmp_path, "seed": 0}
    train_gate(data, heads, transforms, **how, source_weights={"left": 0.0, "kept": 0.5})
    train = tables.pairs_train & (sources == 0)
    expected = data.prompt_embeddings(tables.pairs_chosen[train])
    torch.testing.assert_close(given[0][0], expected)
    assert len(given[0][1]) == int(train.sum())


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
