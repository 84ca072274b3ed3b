import json
import random
import shutil

import pytest
import torch
from conftest import conversation
from test_cli import error_of, run, write_rows

from armo.artifacts import digest_file, read_json, require_artifact
from armo.data.conversation import Message, prompt_group
from armo.embed.extract import EmbeddedData
from armo.fit.decorrelation import load_transforms
from armo.fit.heads import FittedHeads, fit_heads
from armo.fit.training import load_gating
from armo.model.reward_model import ArmoRewardModel
from armo.stages import FOLDERS, STAGES, out_of_fold_differences

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
    "embed": ("rows.safetensors", "rows.json", "prompts/store.json", "responses/store.json"),
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
    shard = folder / "embeddings" / "responses" / "shard-00001.safetensors"
    flip_byte(shard)
    error = error_of(*arguments, "stages=[heads]", f"output_dir={folder}")
    assert "responses/shard-00001.safetensors changed after it was written" in error


def test_a_damaged_shard_is_not_kept_by_the_next_run(trained, arguments, folder):
    name = "embeddings/responses/shard-00001.safetensors"
    flip_byte(folder / name)
    run_again(arguments, folder)
    assert digest_file(folder / name) == digest_file(trained[0] / name)


def test_a_run_that_was_cut_off_keeps_its_shards(arguments, folder):
    kept = folder / "embeddings" / "responses" / "shard-00000.safetensors"
    before = digest_file(kept), kept.stat().st_mtime_ns
    lost = folder / "embeddings" / "responses" / "shard-00001.safetensors"
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
    train = set(groups[data.tables.ratings_response[~data.tables.ratings_test]].tolist())
    assert len(test) == 12
    assert not test & train


def test_the_gate_sees_differences_of_heads_that_never_saw_the_prompt(trained):
    data = EmbeddedData.load(trained[0] / "embeddings")
    heads = FittedHeads.load(trained[0] / "heads")
    transforms = load_transforms(trained[0] / "decorrelation")
    tables = data.tables
    train = (~tables.pairs_test).nonzero()[:, 0]
    chosen, rejected = tables.pairs_chosen[train], tables.pairs_rejected[train]
    differences = out_of_fold_differences(data, heads, transforms, chosen=chosen, rejected=rejected)
    for row, (first, second) in enumerate(zip(chosen, rejected, strict=True)):
        fold = int(heads.fold_of_group[tables.group_of_response[first]])
        assert fold >= 0
        h = data.responses.read(torch.stack([first, second])).double()
        adjusted = h @ transforms.without_fold[fold].matrix.T
        torch.testing.assert_close(differences[row], adjusted[0] - adjusted[1])
    h, other = data.responses.read(chosen), data.responses.read(rejected)
    fitted = transforms.transform.adjusted(h) - transforms.transform.adjusted(other)
    assert not torch.allclose(differences, fitted, atol=1e-3)


def test_the_heads_that_score_a_pair_do_not_change_with_the_ratings_of_its_prompt(trained):
    data = EmbeddedData.load(trained[0] / "embeddings")
    tables = data.tables
    rows = tables.ratings_response[~tables.ratings_test]
    ratings = tables.ratings[~tables.ratings_test]
    groups = tables.group_of_response[rows]

    def fit(ratings):
        return fit_heads(
            *(data.responses, rows, ratings, groups),
            objectives=data.objectives.names,
            group_count=int(tables.group_of_prompt.max()) + 1,
            alphas=[1.0],
        )

    pair = (~tables.pairs_test).nonzero()[0, 0]
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
    transform = load_transforms(folder / "decorrelation").transform
    gate, summary = load_gating(folder / "gating", "gate")
    model = ArmoRewardModel.from_pretrained(folder / "model", device="cpu")
    pairs = rows[2]
    out = model.score(
        [[*p["prompt"], {"role": "assistant", "content": p["chosen"]}] for p in pairs]
    )
    h = data.responses.read(data.tables.pairs_chosen)
    with torch.no_grad():
        weights = gate.double()(data.prompt_embeddings(data.tables.pairs_chosen).double())
    score = (weights * transform.adjusted(h)).sum(1)
    torch.testing.assert_close(out.score, score, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.rewards, heads.rewards(h), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.gating_weights, weights, atol=1e-5, rtol=0)
    assert float(model.beta) == pytest.approx(summary.beta)
    assert model.verify() < 1e-5


def test_the_report_is_about_the_test_side_alone(trained, rows):
    report = json.loads((trained[0] / "report" / "report.json").read_text())
    assert [*report] == ["objectives", "rivals", "kinds", "style", "applied"]
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


def test_a_seed_reaches_the_gate_and_nothing_before_it(folder, arguments):
    assert run_again(arguments, folder, "seed=1") == {"gating", "model", "report"}


def test_a_causal_backbone_goes_the_whole_way(arguments, causal_folder, tmp_path):
    run_again(
        [argument for argument in arguments if "layers" not in argument],
        *(tmp_path / "run", "embed=causal", f"embed.backbone.spec.id={causal_folder}"),
        "embed.backbone.spec.layers=[-1]",
    )
    model = ArmoRewardModel.from_pretrained(tmp_path / "run" / "model", device="cpu")
    assert model.backbone.spec.pooling == "last"
    assert model.verify() < 1e-5
