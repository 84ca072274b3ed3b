import contextlib
import dataclasses
import gzip
import importlib
import inspect
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import yaml
from conftest import conversation, make_model
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from armo import cli
from armo.embed.backbone import Backbone
from armo.model.pretrained import SEAL, folder_seal

ROOT = Path(__file__).parents[1]
PROMPT = [{"role": "user", "content": "Is it safe?"}]
ROWS = [
    {"id": "talk", "messages": conversation("Is it safe?", "Yes."), "ratings": {"honesty": 3}},
    {"id": "pair", "prompt": PROMPT, "chosen": "Yes.", "rejected": "No, it warns of risks!"},
    {"id": "list", "prompt": PROMPT, "responses": ["One.", "Two.", "- three"], "correct": [0]},
    {"id": "one", "prompt": PROMPT, "responses": ["Yes."], "correct": []},
    {"messages": conversation("Name a dog.", "The lazy one.")},
]


def run(*arguments):
    """Run `armo ARGUMENTS` in this process; return exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    root, argv = logging.getLogger(), sys.argv
    handlers, level = root.handlers[:], root.level
    sys.argv = ["armo", *map(str, arguments)]
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.argv = argv
        root.handlers[:], root.level = handlers, level
    return status, out.getvalue(), err.getvalue()


def error_of(*arguments):
    """The one line that a failing command leaves on stderr."""
    status, _, err = run(*arguments)
    assert status == 1, err
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1, err
    return err


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Work in an empty folder: Hydra may write there."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def saved(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    golden = [conversation("Is it safe?", "Yes."), conversation("Hello", "- one\n- two")]
    make_model(encoder).save_pretrained(folder, golden=golden)
    return folder


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def scored(saved, rows_file, tmp_path_factory):
    """Status, stdout and the lines of the output file."""
    output = tmp_path_factory.mktemp("scores") / "scores.jsonl"
    status, out, _ = run(
        "score", f"model={saved}", f"input={rows_file}", f"output={output}", "device=cpu"
    )
    assert status == 0
    return out, output.read_text().splitlines()


def test_the_module_runs_as_a_command_and_an_unknown_verb_is_wrong_usage(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "armo.cli", "trian"],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "unknown verb 'trian'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("help",)])
def test_help_lists_every_verb(arguments):
    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == [*cli.VERBS]


def test_a_verb_is_needed():
    status, out, err = run()
    assert (status, out) == (2, "")
    assert "a verb is needed" in err


def test_the_version_is_printed():
    assert run("--version") == (0, f"{importlib.metadata.version('armo')}\n", "")


@pytest.mark.parametrize(
    ("verb", "setting"),
    [
        ("train", "stages"),
        ("score", "input"),
        ("explain", "nearest"),
        ("verify", "batch_tokens"),
        ("import", "source"),
        ("export", "format"),
    ],
)
def test_each_verb_has_help_that_shows_its_settings(verb, setting):
    status, out, _ = run(verb, "--help")
    assert status == 0
    assert f"{setting}:" in out


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        (("score",), "input"),
        (("score", "input=builtin"), "model"),
        (("explain",), "input"),
        (("verify",), "model"),
    ],
)
def test_a_setting_that_is_needed_and_missing_is_wrong_usage(arguments, setting):
    status, _, err = run(*arguments)
    assert (status, err) == (2, f"armo: {setting} is needed: {setting}=...\n")


def test_score_writes_one_object_per_row_in_order(scored):
    out, lines = scored
    results = [json.loads(line) for line in lines]
    assert [result["id"] for result in results] == ["talk", "pair", "list", "one", "4"]
    assert "saved" in out
    for result in results:
        parts = ["rewards", "gating_weights", "contributions"]
        assert list(result) == ["id", "score", *parts, "truncated"]


def test_score_gives_numbers_for_conversations_and_lists_for_several_responses(scored):
    results = [json.loads(line) for line in scored[1]]
    names = ["helpfulness", "honesty", "harm", "verbosity", "formatting"]
    for result, count in zip(results, (None, 2, 3, 1, None), strict=True):
        for part in ("rewards", "gating_weights", "contributions"):
            assert list(result[part]) == names
            for value in result[part].values():
                assert isinstance(value, float) if count is None else len(value) == count
        if count is None:
            assert sum(result["contributions"].values()) == pytest.approx(result["score"])
            continue
        for k, score in enumerate(result["score"]):
            parts = [result["contributions"][name][k] for name in names]
            assert sum(parts) == pytest.approx(score)


def test_score_writes_what_the_model_returns(scored, encoder):
    results = [json.loads(line) for line in scored[1]]
    out = make_model(encoder).score_responses("Is it safe?", ["One.", "Two.", "- three"])
    assert results[2]["score"] == pytest.approx(out.score.tolist(), abs=1e-5)
    assert results[2]["rewards"]["harm"] == pytest.approx(out.rewards[:, 2].tolist(), abs=1e-5)
    assert results[0]["score"] == pytest.approx(results[1]["score"][0], abs=1e-5)


def test_score_and_explain_read_tables_with_a_map_of_their_columns(scored, saved, tmp_path):
    text = "question,answer,other\nIs it safe?,Yes.,No.\nName a dog.,The lazy one.,None.\n"
    (tmp_path / "mine.csv").write_text(text)
    columns = "{prompt: question, response: answer}"
    options = (f"model={saved}", "input=mine.csv", "device=cpu")
    status, _, err = run("score", *options, f"columns={columns}", "output=scores.jsonl")
    assert (status, err) == (0, "")
    fresh = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    native = [json.loads(line) for line in scored[1]]
    expected = [native[0]["score"], native[4]["score"]]
    assert [row["score"] for row in fresh] == pytest.approx(expected, abs=1e-5)
    columns = "{prompt: question, chosen: answer, rejected: other}"
    status, out, _ = run("explain", *options, f"columns={columns}")
    assert status == 0
    assert "is preferred with probability" in out


def test_score_reads_gzip_and_gives_the_same_in_small_chunks(
    scored, saved, rows_file, tmp_path, monkeypatch
):
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(rows_file.read_bytes()))
    monkeypatch.setattr(cli, "CHUNK_ROWS", 2)
    run("score", f"model={saved}", "input=rows.jsonl.gz", "output=scores.jsonl", "device=cpu")
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    for fresh, line in zip(lines, scored[1], strict=True):
        fresh, line = json.loads(fresh), json.loads(line)
        assert fresh["id"] == line["id"]
        assert fresh["score"] == pytest.approx(line["score"], abs=1e-5)


def test_score_takes_weights_and_a_scale(scored, saved, rows_file, tmp_path):
    status, _, err = run(
        *("score", f"model={saved}", f"input={rows_file}", "output=scores.jsonl", "device=cpu"),
        *("weights={honesty: 3, harm: 1}", "scale=rating"),
    )
    assert status == 0, err
    result = json.loads((tmp_path / "scores.jsonl").read_text().splitlines()[0])
    unit = json.loads(scored[1][0])["rewards"]
    assert [*result["gating_weights"].values()] == pytest.approx([0, 0.75, 0.25, 0, 0])
    assert result["rewards"]["honesty"] == pytest.approx(1 + 4 * unit["honesty"], abs=1e-4)
    assert result["rewards"]["harm"] == pytest.approx(10 - 10 * unit["harm"], abs=1e-4)


def test_score_says_which_responses_pass_the_thresholds(scored, saved, rows_file, tmp_path):
    before = [json.loads(line) for line in scored[1]]
    assert all("passes" not in row for row in before)
    values = [
        value
        for row in before
        for value in (
            row["rewards"]["harm"]
            if isinstance(row["rewards"]["harm"], list)
            else [row["rewards"]["harm"]]
        )
    ]
    limit = sorted(values)[len(values) // 2]
    status, out, err = run(
        *("score", f"model={saved}", f"input={rows_file}", "output=scores.jsonl", "device=cpu"),
        f"thresholds={{harm: {limit - 1e-6}}}",
    )
    assert status == 0, err
    assert "passes" in out
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    for row in rows:
        rewards = row["rewards"]["harm"]
        single = not isinstance(rewards, list)
        expected = [r >= limit - 1e-6 for r in ([rewards] if single else rewards)]
        assert row["passes"] == (expected[0] if single else expected)
    passed = [
        p for row in rows for p in ([row["passes"]] if row["passes"] in (0, 1) else row["passes"])
    ]
    assert {True, False} == set(passed)
    assert "Unknown objective 'charm'" in error_of(
        *("score", f"model={saved}", f"input={rows_file}", "device=cpu", "thresholds={charm: 1}")
    )


LONG = "It warns of risks. " * 60
LONG_ROWS = [
    {"id": "short", "messages": conversation("Is it safe?", "Yes.")},
    {"id": "long", "messages": conversation("Is it safe?", LONG)},
    {"id": "pair", "prompt": PROMPT, "chosen": LONG, "rejected": "No."},
    {"id": "asked", "prompt": [{"role": "user", "content": LONG}], "responses": ["One.", "Two."]},
    {"id": "last", "messages": conversation("Is it safe?", "No.")},
]


def save_with(encoder, folder, **spec):
    """Save a model whose backbone reads long texts in another way."""
    spec = dataclasses.replace(encoder.spec, **spec)
    backbone = Backbone(spec, model=encoder.model, tokenizer=encoder.tokenizer)
    make_model(backbone).save_pretrained(folder)
    return folder


def refuse(constant):
    raise ValueError(f"{constant} is no JSON")


def score_long_rows(folder, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", LONG_ROWS)
    output = tmp_path / "scores.jsonl"
    status, out, err = run(
        "score", f"model={folder}", f"input={rows}", f"output={output}", "device=cpu"
    )
    assert status == 0, err
    lines = output.read_text().splitlines()
    return out, {row["id"]: row for row in (json.loads(x, parse_constant=refuse) for x in lines)}


def test_score_says_which_responses_were_cut(encoder, tmp_path):
    out, results = score_long_rows(save_with(encoder, tmp_path / "model"), tmp_path)
    assert [result["truncated"] for result in results.values()] == [
        False,
        True,
        [True, False],
        [True, True],
        False,
    ]
    assert "skipped" not in out
    assert "4 of 7 conversations are longer than the backbone reads: cut, and scored" in out


def test_score_writes_null_for_what_was_skipped_and_shows_it(encoder, tmp_path):
    folder = save_with(encoder, tmp_path / "model", on_overlong="skip")
    out, results = score_long_rows(folder, tmp_path)
    assert [row["id"] for row in LONG_ROWS] == list(results)
    assert results["long"]["score"] is None
    assert results["asked"]["score"] == [None, None]
    assert results["pair"]["score"][0] is None
    plain = make_model(encoder).score_responses("Is it safe?", ["Yes.", "No."])
    for id, row in (("short", 0), ("last", 1)):
        assert results[id]["score"] == pytest.approx(float(plain.score[row]), abs=1e-5)
    assert results["pair"]["score"][1] == pytest.approx(float(plain.score[1]), abs=1e-5)
    for part in ("rewards", "contributions"):
        assert set(results["long"][part].values()) == {None}
        assert all(chosen is None for chosen, _ in results["pair"][part].values())
        assert all(isinstance(rejected, float) for _, rejected in results["pair"][part].values())
    assert [result["truncated"] for result in results.values()] == [
        False,
        False,
        [False, False],
        [False, False],
        False,
    ]
    shown = {line.split("│")[1].strip(): line for line in out.splitlines() if line.count("│") > 2}
    for label in ("long", "pair [0]", "asked [0]", "asked [1]"):
        assert "skipped" in shown[label]
    for label in ("short", "pair [1]", "last"):
        assert "skipped" not in shown[label]
    assert "nan" not in out


def test_score_names_the_row_that_cannot_be_scored(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "CHUNK_ROWS", 2)
    folder = save_with(encoder, tmp_path / "model", on_overlong="error")
    rows = [{**row, "id": f"copy of {row['id']}"} for row in (LONG_ROWS[0], LONG_ROWS[4])]
    write_rows(tmp_path / "rows.jsonl", [*rows, LONG_ROWS[0], LONG_ROWS[1]])
    error = error_of("score", f"model={folder}", "input=rows.jsonl", "output=scores.jsonl")
    assert "the response has" in error
    assert "'long'" in error
    assert not (tmp_path / "scores.jsonl").exists()


def test_score_without_an_output_only_prints(saved, rows_file, tmp_path):
    status, out, _ = run("score", f"model={saved}", f"input={rows_file}", "device=cpu")
    assert status == 0
    assert "pair [1]" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"id": "a", ', "malformed JSON"),
        ("[1, 2]", "not a JSON object"),
        ({"messages": conversation("Hi", " ")}, "`response` is empty"),
        ({"messages": conversation("Hi", "Hello")[:1]}, "the last of `messages`"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "role 'robot'"),
        ({"messages": [{"role": "user"}]}, "field `content` is missing"),
        ({"prompt": PROMPT, "chosen": "Yes."}, "field `rejected` is missing"),
        ({"prompt": PROMPT, "responses": ["Yes.", ""]}, "`response` is empty"),
        ({"prompt": PROMPT, "responses": ["Yes.", 7]}, "responses"),
        ({"prompt": PROMPT, "responses": []}, "responses"),
        ({"id": "a"}, "needs `messages`"),
    ],
)
def test_a_bad_row_stops_score_before_any_work_and_names_its_line(row, message, tmp_path):
    text = row if isinstance(row, str) else json.dumps(row)
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(ROWS[0])}\n{text}\n")
    # No model is there: the rows are looked at first.
    error = error_of("score", "model=/no/such", "input=rows.jsonl", "output=scores.jsonl")
    assert error.startswith("armo: error: rows.jsonl:2: ")
    assert message in error
    assert not (tmp_path / "scores.jsonl").exists()


def test_a_file_that_is_not_there_is_named():
    assert "No such file or folder: /no/such.jsonl" in error_of(
        "score", "model=/no/such", "input=/no/such.jsonl"
    )


def test_a_model_that_is_not_there_is_named(rows_file):
    assert "No model folder at /no/such" in error_of("verify", "model=/no/such")
    assert "No model folder at /no/such" in error_of(
        "score", "model=/no/such", f"input={rows_file}"
    )


def test_verify_passes_on_a_good_model_and_fails_on_a_changed_one(saved, tmp_path):
    status, out, _ = run("verify", f"model={saved}", "device=cpu")
    assert status == 0
    assert out.startswith("ok: golden outputs")
    changed = tmp_path / "model"
    changed.mkdir()
    for file in saved.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    with safe_open(saved / "model.safetensors", framework="pt") as opened:
        header = opened.metadata()
    tensors = load_file(saved / "model.safetensors")
    tensors["head_intercepts"] += 1.0
    save_file(tensors, changed / "model.safetensors", metadata=header)
    assert "changed after it was written" in error_of("verify", f"model={changed}", "device=cpu")
    config = json.loads((changed / "config.json").read_text())
    resealed = {SEAL: folder_seal(config, tensors)}
    save_file(tensors, changed / "model.safetensors", metadata=resealed)
    assert "golden outputs deviate by 1" in error_of("verify", f"model={changed}", "device=cpu")
    del tensors["adjusted_offset"]
    save_file(tensors, changed / "model.safetensors")
    assert "missing adjusted_offset" in error_of("verify", f"model={changed}", "device=cpu")


@pytest.mark.parametrize(
    ("ratings", "message"),
    [
        ({"honesty": 6}, "rating 6 of 'honesty' is outside its scale 1 to 5"),
        ({"honesty": 3}, "objective 'helpfulness' has 0 ratings on training prompts"),
        ({"charm": 3}, "objective 'charm' is not declared"),
        ({"honesty": "good"}, "rating of 'honesty' is not a number"),
    ],
)
def test_bad_ratings_stop_train_before_the_backbone_runs(
    ratings, message, encoder_folder, tmp_path
):
    row = {"id": "a", "source": "s", "messages": conversation("Hi", "Hello"), "ratings": ratings}
    write_rows(tmp_path / "ratings.jsonl", [{**row, "split": "train"}])
    error = error_of(
        *("train", "data/ratings=jsonl", "data.ratings.path=ratings.jsonl"),
        *("data/benchmark=none", f"output_dir={tmp_path / 'run'}"),
        *(f"embed.backbone.spec.id={encoder_folder}", "embed.backbone.spec.digest=null"),
    )
    assert message in error
    assert not list((tmp_path / "run").rglob("shard-*"))


def test_an_unknown_stage_is_named(tmp_path):
    error = error_of("train", "stages=[embed,polish]", f"output_dir={tmp_path / 'run'}")
    assert "not polish" in error


@pytest.mark.parametrize(
    ("override", "name"),
    [("fit.gating.hidden_dims=8", "hidden_dims"), ("colour=red", "colour"), ("embed=mini", "mini")],
)
def test_an_unknown_setting_is_named(override, name, tmp_path):
    assert name in error_of("train", override, f"output_dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["rm_bench", "builtin_test"])
def test_a_training_run_refuses_a_benchmark_of_the_evaluation(name, tmp_path):
    error = error_of("train", f"data/benchmark={name}", f"output_dir={tmp_path / 'run'}")
    assert f"`data/benchmark={name}` is for `armo evaluate`" in error
    assert not (tmp_path / "run" / "embeddings").exists()


def targets(node, place):
    """Every `_target_` section below a node, with where it stands."""
    if isinstance(node, dict):
        if node.get("_target_"):
            yield place, node
        for name, child in node.items():
            yield from targets(child, f"{place}.{name}")


SECTIONS = [
    pytest.param(section, id=place)
    for file in sorted((ROOT / "conf").rglob("*.yaml"))
    for place, section in targets(
        yaml.safe_load(file.read_text()), str(file.relative_to(ROOT / "conf"))
    )
]


@pytest.mark.parametrize("section", SECTIONS)
def test_each_option_binds_to_the_signature_of_its_target(section):
    module, name = section["_target_"].rsplit(".", 1)
    signature = inspect.signature(getattr(importlib.import_module(module), name))
    settings = {key: value for key, value in section.items() if not key.startswith("_")}
    bound = (
        signature.bind_partial(**settings)
        if section.get("_partial_")
        else signature.bind(**settings)
    )
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    # Lightning's trainer takes named arguments alone as well: nothing may swallow a misspelling.
    if module == "lightning.pytorch.loggers" and inspect.Parameter.VAR_KEYWORD in kinds:
        return  # what it does not know goes on to the package of another project
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    assert set(bound.arguments) == set(settings)
    with pytest.raises(TypeError, match="no_such_setting"):
        signature.bind_partial(no_such_setting=1)


@pytest.mark.parametrize(
    ("option", "keep"), [("auto", "auto"), ("mlp", "gate"), ("constant", "constant")]
)
def test_the_options_of_the_gate_differ_in_what_is_kept_alone(option, keep):
    with hydra.initialize_config_module("armo.conf", version_base="1.3"):
        default, chosen = (
            OmegaConf.to_container(hydra.compose("train", overrides).fit.gating)
            for overrides in ([], [f"fit/gating={option}"])
        )
    assert chosen == {**default, "keep": keep}
    assert default["keep"] == "auto"


def test_every_layer_of_the_configuration_has_an_option_that_binds():
    names = {section.values[0]["_target_"] for section in SECTIONS}
    assert {"armo.fit.heads.fit_heads", "lightning.Trainer"} <= names
    assert len(names) >= 8


PAIRS = [
    ROWS[1],
    {"id": "[red]<b>&", "prompt": PROMPT, "responses": ["- one <script>", "Two & three"]},
]


def test_explain_prints_a_table_per_pair_and_writes_one_page(saved, tmp_path, encoder):
    write_rows(tmp_path / "pairs.jsonl", PAIRS)
    arguments = ("explain", f"model={saved}", "input=pairs.jsonl", "device=cpu")
    status, out, _ = run(*arguments, "output=page.html")
    assert status == 0
    comparison = make_model(encoder).compare("Is it safe?", "Yes.", "No, it warns of risks!")
    preferred = "A" if comparison.score_difference > 0 else "B"
    assert f"pair: {preferred} is preferred with probability" in out
    assert "[red]<b>&: " in out
    assert f"; it scores {abs(comparison.score_difference):.3f} more than " in out
    for name in ("helpfulness", "honesty", "harm", "verbosity", "formatting"):
        assert out.count(name) == 2
    assert "`run=FOLDER`" in out
    assert "saved page.html" in out
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 4
    assert "<script" not in page
    assert "&lt;b&gt;&amp;" in page
    printed = run(*arguments)[1]
    assert printed[printed.index("pair: ") :] == out[out.index("pair: ") : out.index("saved page")]


def test_explain_takes_weights_and_a_scale(saved, tmp_path, encoder):
    write_rows(tmp_path / "pairs.jsonl", PAIRS[:1])
    given = ("weights={honesty: 1}", "scale=rating")
    _, out, _ = run("explain", f"model={saved}", "input=pairs.jsonl", "device=cpu", *given)
    scored = make_model(encoder).score_responses(
        PROMPT, ["Yes.", "No, it warns of risks!"], weights={"honesty": 1}, scale="rating"
    )
    [row] = [line for line in out.splitlines() if "honesty" in line]
    numbers = [float(cell) for cell in row.replace("│", " ").split()[1:8]]
    rewards, adjusted = scored.rewards[:, 1].tolist(), scored.adjusted[:, 1].tolist()
    difference = float(scored.score[0] - scored.score[1])
    expected = [1.0, *rewards, *adjusted, difference, difference]
    assert numbers == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROWS[0], "rows.jsonl:2: needs 2 responses, has 1"),
        (ROWS[2], "rows.jsonl:2: needs 2 responses, has 3"),
        ({"id": "x", "prompt": PROMPT, "chosen": "Yes."}, "rows.jsonl:2: field `rejected`"),
    ],
)
def test_explain_names_the_line_of_a_row_that_is_no_pair(saved, tmp_path, row, message):
    write_rows(tmp_path / "rows.jsonl", [ROWS[1], row])
    assert message in error_of("explain", f"model={saved}", "input=rows.jsonl", "device=cpu")


def test_explain_refuses_a_run_that_cannot_serve(saved, tmp_path):
    write_rows(tmp_path / "pairs.jsonl", PAIRS)
    arguments = ("explain", f"model={saved}", "input=pairs.jsonl", "device=cpu")
    assert "no finished `embed` stage" in error_of(*arguments, "run=nowhere")
    assert "`nearest` must be at least 1, got 0" in error_of(*arguments, "nearest=0")


@pytest.mark.parametrize(
    ("section", "names"),
    [
        ([{"path": None}, {"_target_": None, "path": None}], []),
        ([{"_target_": "armo.data.sources.stream_pairs"}], ["armo.data.sources.stream_pairs"]),
        ([{"path": [{"_target_": "os.system"}], "_target_": "a.b"}], ["a.b", "os.system"]),
    ],
)
def test_all_that_a_stored_section_would_call_is_seen(section, names):
    assert [*cli._targets(section)] == names


def test_the_verbs_of_data_are_listed_by_its_help():
    status, out, _ = run("data", "--help")
    assert status == 0
    assert "check|annotate|pairs" in out
    status, _, err = run("data", "cheque")
    assert status == 2
    assert "check, annotate, pairs" in err
