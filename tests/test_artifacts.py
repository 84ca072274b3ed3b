import hashlib
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armo.artifacts import (
    ArtifactError,
    damaged_files,
    digest_file,
    digest_json,
    finish_artifact,
    is_current,
    read_json,
    read_tensors,
    replacing,
    require_artifact,
    write_json,
    write_tensors,
    write_text,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # Lone surrogates are no text: UTF-8 cannot write them.
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from("abcdef"), inner),
    max_leaves=10,
)


@pytest.fixture
def artifact(tmp_path):
    """A finished artifact of two files, one of them in a subfolder."""
    write_tensors(tmp_path / "heads.safetensors", {"weights": torch.eye(2)})
    write_json(tmp_path / "report" / "numbers.json", {"accuracy": 0.5})
    finish_artifact(tmp_path, key="key", settings={"alpha": 1.0}, inputs={"ratings": "abc"}, rows=7)
    return tmp_path


def test_a_block_that_succeeds_replaces_the_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_text(path, "old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_block_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def write_half():
        with replacing(path) as temporary:
            temporary.write_text("half of the n")
            raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_refuses_what_is_no_number_and_keeps_the_old_file(tmp_path, value):
    path = tmp_path / "file.json"
    write_json(path, {"accuracy": 0.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"accuracy": value})
    assert read_json(path) == {"accuracy": 0.5}


@given(json_values)
def test_json_that_is_written_is_read_back_with_all_digits(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_that_are_written_are_read_back_exactly(tmp_path, dtype):
    values = (torch.randn(5, 3, generator=torch.Generator().manual_seed(0)) * 9).abs().to(dtype)
    # A transposed view, a slice and an empty tensor: none is laid out as a file stores it.
    tensors = {"turned": values.T, "slice": values[1:3], "none": values[:0]}
    write_tensors(tmp_path / "file.safetensors", tensors)
    read = read_tensors(tmp_path / "file.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], tensor)


@pytest.mark.parametrize("read", [read_json, read_tensors])
def test_a_missing_file_is_named(tmp_path, read):
    with pytest.raises(ArtifactError, match=r"No such file: .*gone"):
        read(tmp_path / "gone")


def test_broken_json_is_named_with_its_line(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text('{\n"a": 1,\n')
    with pytest.raises(ArtifactError, match=r"broken\.json: not valid JSON, line 3"):
        read_json(path)


def test_bytes_that_are_no_text_are_no_json(tmp_path):
    path = tmp_path / "broken.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match=r"broken\.json"):
        read_json(path)


@pytest.mark.parametrize("kept", [0, 4, -1])
def test_a_cut_off_safetensors_file_is_named(tmp_path, kept):
    path = tmp_path / "cut.safetensors"
    write_tensors(path, {"weights": torch.eye(3)})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match=r"cut\.safetensors: damaged"):
        read_tensors(path)


@given(st.binary(max_size=64))
def test_the_digest_of_a_file_is_the_sha256_of_its_bytes(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(content)
    assert digest_file(path) == hashlib.sha256(content).hexdigest()


def test_the_digest_of_settings_ignores_the_order_of_keys_but_no_value():
    digest = digest_json({"a": 1, "b": [1, 2]})
    assert digest == digest_json({"b": [1, 2], "a": 1})
    assert digest != digest_json({"a": 1, "b": [2, 1]})
    assert digest != digest_json({"a": 1, "b": [1, 2], "c": None})


def test_the_manifest_says_what_made_the_artifact_and_sums_every_file(artifact):
    (artifact / ".heads.safetensors.1.tmp").write_text("what a killed run left")
    assert require_artifact(artifact, stage="heads") == {
        "key": "key",
        "settings": {"alpha": 1.0},
        "inputs": {"ratings": "abc"},
        "rows": 7,
        "files": {
            name: hashlib.sha256((artifact / name).read_bytes()).hexdigest()
            for name in ("heads.safetensors", "report/numbers.json")
        },
    }


def test_an_artifact_is_current_under_its_own_key_alone(artifact):
    assert is_current(artifact, "key")
    assert not is_current(artifact, "another key")


def test_a_folder_without_a_manifest_is_not_current(artifact):
    (artifact / "manifest.json").unlink()
    assert not is_current(artifact, "key")
    with pytest.raises(ArtifactError, match=r"No finished `heads` artifact .*stages=\[heads\]"):
        require_artifact(artifact, stage="heads")


@pytest.mark.parametrize("name", ["heads.safetensors", "report/numbers.json"])
@pytest.mark.parametrize("harm", ["changed", "missing"])
def test_a_changed_or_missing_file_is_caught_and_named(artifact, name, harm):
    assert damaged_files(artifact) == []
    if harm == "changed":
        content = bytearray((artifact / name).read_bytes())
        content[-1] ^= 1
        (artifact / name).write_bytes(content)
    else:
        (artifact / name).unlink()
    assert damaged_files(artifact) == [name]
    assert not is_current(artifact, "key")
    with pytest.raises(ArtifactError, match=rf"{name} changed .*stages=\[heads\]"):
        require_artifact(artifact, stage="heads")


def test_a_manifest_is_json_that_anyone_can_read(artifact):
    text = (artifact / "manifest.json").read_text(encoding="utf-8")
    assert json.loads(text)["settings"] == {"alpha": 1.0}
