import contextlib
import errno
import hashlib
import json
import math
import os
import resource
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from armo.artifacts import (
    ArtifactError,
    damaged_files,
    delete_temporaries,
    digest_file,
    digest_json,
    exclusive,
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


def test_two_writers_of_one_file_never_share_a_temporary_file(tmp_path):
    path = tmp_path / "file.txt"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("first")
        second.write_text("second, and longer")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_of_a_file_is_deleted_and_nothing_else(tmp_path):
    (tmp_path / "inner").mkdir()
    names = ["file.tmp", ".lock", "file.txt", "inner/.file.txt.0123.tmp"]
    for name in names:
        (tmp_path / name).write_text("kept")
    with replacing(tmp_path / "file.txt") as temporary:
        temporary.write_text("half")
        os.link(temporary, tmp_path / temporary.name.replace(".tmp", "0.tmp"))
    assert len(list(tmp_path.glob(".*.tmp"))) == 1
    delete_temporaries(tmp_path)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {
        tmp_path / name for name in names
    }


@contextlib.contextmanager
def largest_file(limit_bytes):
    """Let no file grow beyond a limit, which to a writer looks like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_text(path, "x" * 5_000),
        lambda path: write_json(path, ["x" * 5_000]),
        lambda path: write_tensors(path, {"weights": torch.zeros(5_000)}),
    ],
    ids=["text", "json", "tensors"],
)
def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, write):
    path = tmp_path / "file"
    write_text(path, "old")
    with largest_file(2_000), pytest.raises(OSError, match="too large") as caught:
        write(path)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_says_late_that_it_is_full_leaves_the_old_file(tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    write_text(path, "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_text(path, "new")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    with pytest.raises(IsADirectoryError) as caught:
        write_text(tmp_path, "text")
    assert caught.value.filename == str(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file", "input.jsonl"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        OSError("of some library"),
    ],
    ids=repr,
)
def test_an_error_that_is_not_about_the_file_stays_as_it_is(tmp_path, error):
    with pytest.raises(type(error)) as caught, replacing(tmp_path / "file"):
        raise error
    assert caught.value is error


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


def test_tensors_carry_metadata_and_make_the_same_bytes_every_time(tmp_path):
    tensors = {name: torch.eye(3) for name in "qwerty"}
    for name in ("first", "second"):
        write_tensors(tmp_path / name, tensors, metadata={"made": "by hand"})
    with safe_open(tmp_path / "first", framework="pt") as file:
        assert file.metadata() == {"made": "by hand"}
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_files_have_the_permissions_that_the_user_gives_new_files(tmp_path):
    (tmp_path / "plain").touch()
    write_tensors(tmp_path / "tensors", {"weights": torch.eye(3)})
    write_text(tmp_path / "text", "text")
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


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


def start(script, folder):
    """Start a process that runs a script on a folder."""
    imports = """
        import json, os, sys, time
        from pathlib import Path
        from armo.artifacts import ArtifactError, exclusive
        folder = Path(sys.argv[1])
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(imports) + textwrap.dedent(script), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_folder_held_by_another_process_is_refused_until_that_is_killed(tmp_path):
    hold = """
        with exclusive(folder):
            print("held", flush=True)
            time.sleep(60)
    """
    with start(hold, tmp_path) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            named = rf"process {holder.pid} on {socket.gethostname()} is writing there\."
            with pytest.raises(ArtifactError, match=named), exclusive(tmp_path):
                pass
        finally:
            holder.kill()
    with exclusive(tmp_path):
        pass


def test_of_processes_that_race_for_a_folder_exactly_one_wins(tmp_path):
    race = """
        children = []
        for _ in range(8):
            out, into = os.pipe()
            child = os.fork()
            if not child:
                time.sleep(max(0.0, 0.2 - time.monotonic() % 0.2))  # all at one moment
                try:
                    with exclusive(folder):
                        os.write(into, b"won")
                        time.sleep(1)
                except ArtifactError as error:
                    os.write(into, str(error).encode())
                os._exit(0)
            os.close(into)
            children.append((child, out))
        for child, _ in children:
            os.waitpid(child, 0)
        print(json.dumps({child: os.read(out, 1_000).decode() for child, out in children}))
    """
    with start(race, tmp_path) as process:
        said = json.loads(process.stdout.read())
    winners = [child for child, text in said.items() if text == "won"]
    assert len(said) == 8
    assert len(winners) == 1
    for child, text in said.items():
        assert child in winners or f"process {winners[0]} on" in text


def test_a_folder_is_free_after_the_block_and_after_an_error(tmp_path):
    folder = tmp_path / "new"
    with pytest.raises(RuntimeError, match="cut off"), exclusive(folder):
        raise RuntimeError("cut off")
    with exclusive(folder), exclusive(tmp_path):
        assert (folder / ".lock").is_file()
    with exclusive(folder):
        pass


def test_a_folder_is_held_once_even_by_one_process(tmp_path):
    mine = rf"process {os.getpid()} on .* is writing there"
    with exclusive(tmp_path):
        with pytest.raises(ArtifactError, match=mine), exclusive(tmp_path):
            pass
        # The refused block has not let go of what the outer one holds.
        with pytest.raises(ArtifactError, match=mine), exclusive(tmp_path):
            pass


@pytest.mark.parametrize("content", [None, "", "[]", "{}"])
def test_a_holder_that_does_not_say_who_it_is_holds_all_the_same(tmp_path, content):
    if content is not None:
        (tmp_path / ".lock.json").write_text(content)
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(ArtifactError, match="another process is writing there"),
        exclusive(tmp_path),
    ):
        pass


def test_a_held_folder_is_finished_without_the_lock(artifact):
    with exclusive(artifact):
        finish_artifact(artifact, key="key", settings={}, inputs={})
    assert set(require_artifact(artifact, stage="heads")["files"]) == {
        "heads.safetensors",
        "report/numbers.json",
    }
