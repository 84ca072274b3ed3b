import contextlib
import json
import logging
import os
import pickle
import resource
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from armo.artifacts import ArtifactError, write_tensors
from armo.embed.store import CovariateStore, Embeddings, EmbeddingStore, Shard

DIM = 3
SIZES = ((2, 3), (1, 4), (3, 2))  # prompts and responses of each shard
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def plan(sizes=SIZES):
    return tuple(Shard(*size, texts=f"words {number}") for number, size in enumerate(sizes))


def draw(rows, *, seed, dim=DIM, dtype=torch.float32):
    """Embeddings of `rows` texts, about a third cut and a third missing."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, dim, generator=generator).to(dtype)
    truncated, missing = torch.rand(2, rows, generator=generator) < 1 / 3
    values[missing] = torch.nan
    return Embeddings(values, truncated, missing)


def shard_embeddings(shard, size, **how):
    """Prompts and responses of a shard, the same on every call."""
    return {
        "prompts": draw(size[0], seed=2 * shard, **how),
        "responses": draw(size[1], seed=2 * shard + 1, **how),
    }


def create(folder, sizes=SIZES, **changes):
    return EmbeddingStore.create(
        folder, **{"dim": DIM, "fingerprint": "model", "shards": plan(sizes), **changes}
    )


def fill(folder, sizes=SIZES, *, dtype=torch.float32):
    """Write a whole store and open it; also return what it holds, by table."""
    store = create(folder, sizes)
    for shard in store.missing_shards():
        store.write(shard, **shard_embeddings(shard, sizes[shard], dtype=dtype))
    return EmbeddingStore.open(folder), content(sizes, dtype=dtype)


def content(sizes, *, dtype=torch.float32):
    parts = [shard_embeddings(shard, size, dtype=dtype) for shard, size in enumerate(sizes)]
    return {
        name: Embeddings(
            torch.cat([torch.zeros(0, DIM, dtype=dtype), *(part[name].values for part in parts)]),
            torch.cat([torch.zeros(0).bool(), *(part[name].truncated for part in parts)]),
            torch.cat([torch.zeros(0).bool(), *(part[name].missing for part in parts)]),
        )
        for name in ("prompts", "responses")
    }


def same(a, b):
    return (
        a.dtype == b.dtype
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(), b.nan_to_num())
    )


def path_of(folder, shard):
    return folder / f"shard-{shard:05d}.safetensors"


def kept(folder):
    return sorted(int(path.stem.removeprefix("shard-")) for path in folder.glob("shard-*"))


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def run_script(script, *arguments):
    """Run a script in a process of its own, after what all of them import; return what it says."""
    imports = """
        import json, os, random, signal, sys, time
        from pathlib import Path
        import torch
        from armo.embed.store import EmbeddingStore
        from tests.embed.test_store import SIZES, create, draw, plan
        folder = Path(sys.argv[1])
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(imports) + textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@contextlib.contextmanager
def largest_file(limit_bytes):
    """Let no file grow beyond a limit, which to a writer looks like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@st.composite
def reads(draw):
    sizes = draw(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=6))
    name = draw(st.sampled_from(["prompts", "responses"]))
    rows = sum(size[name == "responses"] for size in sizes)
    wanted = draw(st.lists(st.integers(0, rows - 1), max_size=30)) if rows else []
    integers = draw(st.sampled_from([torch.int64, torch.int32, torch.int16]))
    return sizes, name, torch.tensor(wanted, dtype=integers), draw(st.sampled_from(DTYPES))


@given(reads())
def test_reading_rows_equals_indexing_in_any_order_with_repeats(tmp_path_factory, problem):
    sizes, name, wanted, dtype = problem
    store, expected = fill(tmp_path_factory.mktemp("store"), sizes, dtype=dtype)
    table = getattr(store, name)
    assert (table.rows, table.dim) == (len(expected[name].values), DIM)
    values = table.read(wanted)
    # Only a store without shards knows no dtype.
    assert same(values if sizes else values.to(dtype), expected[name].values[wanted.long()])
    assert torch.equal(table.truncated(), expected[name].truncated)
    assert torch.equal(table.missing(), expected[name].missing)


@given(reads())
def test_batches_give_each_wanted_row_once_and_one_shard_at_a_time(tmp_path_factory, problem):
    sizes, name, wanted, dtype = problem
    store, expected = fill(tmp_path_factory.mktemp("store"), sizes, dtype=dtype)
    counts = torch.tensor([size[name == "responses"] for size in sizes], dtype=torch.int64)
    shard_of = torch.arange(len(sizes)).repeat_interleave(counts)
    seen, shards = [], []
    for positions, values in getattr(store, name).batches(wanted):
        assert same(values, expected[name].values[wanted[positions].long()])
        (shard,) = shard_of[wanted[positions].long()].unique().tolist()
        shards.append(shard)
        seen += positions.tolist()
    assert sorted(seen) == list(range(len(wanted)))
    assert shards == sorted(set(shards))


@pytest.mark.parametrize("row", [-1, 9])
def test_a_row_that_is_not_there_is_an_error(tmp_path, row):
    table = fill(tmp_path)[0].responses
    message = rf"`rows` must be at least 0 and below 9, the number of responses; got {row}\."
    with pytest.raises(IndexError, match=message):
        table.read(torch.tensor([0, row]))
    with pytest.raises(IndexError, match=message):
        next(table.batches(torch.tensor([0, row])))


def test_a_table_reads_the_same_in_another_process(tmp_path):
    store, expected = fill(tmp_path)
    table = pickle.loads(pickle.dumps(store.responses))
    assert same(table.read(torch.arange(9)), expected["responses"].values)
    assert pickle.loads(pickle.dumps(store)) == store


def test_what_was_read_can_be_changed_without_changing_the_store(tmp_path):
    store, expected = fill(tmp_path)
    store.responses.read(torch.arange(9)).zero_()
    for _, values in store.responses.batches(torch.arange(9)):
        values.zero_()
    assert same(store.responses.read(torch.arange(9)), expected["responses"].values)


def test_the_same_embeddings_make_the_same_files(tmp_path):
    for folder in ("first", "second"):
        fill(tmp_path / folder)
    for first in (tmp_path / "first").iterdir():
        assert first.read_bytes() == (tmp_path / "second" / first.name).read_bytes()


def test_a_store_of_the_same_embeddings_keeps_its_shards(tmp_path):
    _, expected = fill(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    store = create(tmp_path)
    assert store.missing_shards() == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")} == before
    assert same(store.prompts.read(torch.arange(6)), expected["prompts"].values)


@pytest.mark.parametrize("header", [None, "", "{", "[]", '{"rows": 5, "dim": 3}'])
def test_shards_are_kept_by_what_they_say_whatever_the_header_says(tmp_path, header):
    fill(tmp_path)
    (tmp_path / "store.json").unlink()
    if header is not None:
        (tmp_path / "store.json").write_text(header)
    assert create(tmp_path).missing_shards() == []
    assert EmbeddingStore.open(tmp_path).shards == plan()


@pytest.mark.parametrize("change", [{"fingerprint": "another model"}, {"dim": 4}], ids=str)
def test_shards_of_another_backbone_are_deleted_and_counted(tmp_path, change, caplog):
    fill(tmp_path)
    with caplog.at_level(logging.INFO, logger="armo"):
        assert create(tmp_path, **change).missing_shards() == [0, 1, 2]
    assert kept(tmp_path) == []
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("INFO", f"{tmp_path}: deleted 3 shards of other embeddings")
    ]


@pytest.mark.parametrize("change", [{"texts": "other"}, {"prompts": 2}, {"responses": 3}], ids=str)
def test_only_the_shard_whose_texts_changed_is_deleted(tmp_path, change):
    fill(tmp_path)
    shards = list(plan())
    shards[1] = replace(shards[1], **change)
    assert create(tmp_path, shards=shards).missing_shards() == [1]
    assert kept(tmp_path) == [0, 2]


def test_shards_beyond_the_plan_are_deleted(tmp_path):
    fill(tmp_path)
    shutil.copy(path_of(tmp_path, 0), path_of(tmp_path, 100_000))
    assert create(tmp_path, SIZES[:2]).missing_shards() == []
    assert kept(tmp_path) == [0, 1]


def test_shards_under_each_others_names_are_deleted(tmp_path):
    fill(tmp_path)
    path_of(tmp_path, 0).rename(tmp_path / "aside")
    path_of(tmp_path, 1).rename(path_of(tmp_path, 0))
    (tmp_path / "aside").rename(path_of(tmp_path, 1))
    assert create(tmp_path).missing_shards() == [0, 1]


@pytest.mark.parametrize(
    "metadata", [None, {"shard": "{"}, {"shard": "[]"}, {"other": "{}"}], ids=str
)
def test_a_shard_that_does_not_say_what_it_holds_is_deleted(tmp_path, metadata):
    fill(tmp_path)
    with safe_open(path_of(tmp_path, 1), framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    write_tensors(path_of(tmp_path, 1), tensors, metadata=metadata)
    assert create(tmp_path).missing_shards() == [1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_flipped_bit_is_found_and_the_shard_named(tmp_path, dtype, caplog):
    fill(tmp_path, dtype=dtype)
    flip(path_of(tmp_path, 1), -1)
    assert create(tmp_path).missing_shards() == [1]
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("WARNING", f"{path_of(tmp_path, 1)} is damaged; it is made again")
    ]
    assert kept(tmp_path) == [0, 2]


def test_a_flipped_bit_anywhere_in_a_shard_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # a thousand headers are written
    _, expected = fill(tmp_path, SIZES[:1])
    path = path_of(tmp_path, 0)
    whole = path.read_bytes()
    unharmed = []
    for position in range(len(whole)):
        path.write_bytes(whole)
        flip(path, position)
        store = create(tmp_path, SIZES[:1])
        if store.has(0):
            unharmed.append(whole[position])
            for name in ("prompts", "responses"):
                table = getattr(store, name)
                assert same(table.read(torch.arange(table.rows)), expected[name].values)
                assert torch.equal(table.missing(), expected[name].missing)
    # Nothing but the blanks that fill up the header to whole words says nothing.
    assert set(unharmed) <= {ord(" ")}


@pytest.mark.parametrize(
    ("said", "instead"),
    [(b'"F32"', b'"I32"'), (b"[2,3]", b"[3,2]"), (b'"prompts_missing"', b'"prompts_missinG"')],
    ids=["dtype", "shape", "name"],
)
def test_the_same_bytes_read_as_something_else_are_found(tmp_path, said, instead):
    fill(tmp_path)
    path = path_of(tmp_path, 0)
    assert said in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(said, instead))
    assert create(tmp_path).missing_shards() == [0]


@pytest.mark.parametrize(
    "harm",
    [
        lambda whole: whole[:-1],
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:4],
        lambda whole: b"",
        lambda whole: whole + b"\0",
        lambda whole: b"garbage",
        lambda whole: b"\xff" * 1000,
        lambda whole: bytes(len(whole)),
    ],
    ids=["cut", "half", "no header", "empty", "longer", "garbage", "ones", "zeros"],
)
def test_a_file_that_is_no_whole_shard_is_named_and_made_again(tmp_path, harm, caplog):
    fill(tmp_path)
    path = path_of(tmp_path, 1)
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(ArtifactError, match=r"shard-00001\.safetensors: damaged"):
        EmbeddingStore.open(tmp_path)
    assert create(tmp_path).missing_shards() == [1]
    assert [r.message for r in caplog.records] == [f"{path} is damaged; it is made again"]
    assert fill(tmp_path)[0].missing_shards() == []


def test_what_a_killed_process_left_half_written_is_deleted(tmp_path):
    fill(tmp_path)
    for name in (".shard-00001.safetensors.0123.tmp", ".store.json.4567.tmp"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".lock").touch()
    (tmp_path / "rows.json").touch()
    create(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith("shard-")} == {
        ".lock",
        "rows.json",
        "store.json",
    }


def test_the_header_is_json_that_anyone_can_read(tmp_path):
    create(tmp_path, SIZES[:1])
    assert json.loads((tmp_path / "store.json").read_text()) == {
        "dim": 3,
        "fingerprint": "model",
        "shards": [{"prompts": 2, "responses": 3, "texts": "words 0"}],
    }


def test_a_missing_shard_is_named(tmp_path):
    store, expected = fill(tmp_path)
    assert EmbeddingStore.open(tmp_path) == store
    path_of(tmp_path, 1).unlink()
    with pytest.raises(ArtifactError, match="shard 1 of 3 is missing"):
        EmbeddingStore.open(tmp_path)
    assert store.missing_shards() == [1]
    assert [store.has(shard) for shard in range(3)] == [True, False, True]
    assert same(store.responses.read(torch.tensor([8, 0])), expected["responses"].values[[8, 0]])
    with pytest.raises(ArtifactError, match=r"No such file: .*shard-00001"):
        store.responses.read(torch.tensor([8, 4]))


def test_a_missing_store_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"No such file: .*store\.json"):
        EmbeddingStore.open(tmp_path / "gone")


@pytest.mark.parametrize("header", ["[]", "3", "{}", '{"rows": 5, "dim": 3, "shard_rows": 2}'])
def test_a_header_of_another_kind_is_named(tmp_path, header):
    fill(tmp_path)
    (tmp_path / "store.json").write_text(header)
    with pytest.raises(ArtifactError, match=r"store\.json: not the header .*stages=\[embed\]"):
        EmbeddingStore.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fingerprint": "another model"}, "fingerprint"),
        ({"dim": 4}, "dim"),
        ({"shards": plan(((2, 3), (1, 5), (3, 2)))}, "responses"),
        ({"shards": plan(((2, 3), (2, 4), (3, 2)))}, "prompts"),
        ({"shards": [plan()[0], replace(plan()[1], texts="other"), plan()[2]]}, "texts"),
    ],
    ids=str,
)
def test_shards_that_are_not_the_headers_are_named_with_what_differs(tmp_path, change, named):
    fill(tmp_path)
    create(tmp_path / "other", **change)
    shutil.copy(tmp_path / "other" / "store.json", tmp_path)
    with pytest.raises(ArtifactError, match=rf"shard-0000\d\.safetensors: not .* see its {named}"):
        EmbeddingStore.open(tmp_path)


@pytest.mark.parametrize("name", ["prompts", "responses"])
@pytest.mark.parametrize("shape", [(1, 3), (2, 4), (0, 3)])
def test_rows_that_do_not_fit_the_shard_are_not_written(tmp_path, name, shape):
    store = create(tmp_path, ((2, 2),))
    parts = shard_embeddings(0, (2, 2))
    parts[name] = draw(shape[0], seed=0, dim=shape[1])
    with pytest.raises(ValueError, match=f"`{name}` of shard 0 must be 2 rows of width 3"):
        store.write(0, **parts)
    assert not store.has(0)


def test_a_full_disk_leaves_no_half_shard_and_the_earlier_ones(tmp_path):
    sizes = ((2, 3), (50, 100))
    store = create(tmp_path, sizes)
    store.write(0, **shard_embeddings(0, sizes[0]))
    before = sorted(tmp_path.iterdir())
    with largest_file(1_500), pytest.raises(OSError, match=r"too large: .*/shard-00001") as caught:
        store.write(1, **shard_embeddings(1, sizes[1]))
    assert caught.value.filename == str(path_of(tmp_path, 1))
    assert sorted(tmp_path.iterdir()) == before
    assert create(tmp_path, sizes).missing_shards() == [1]
    store.write(1, **shard_embeddings(1, sizes[1]))
    values = EmbeddingStore.open(tmp_path).responses.read(torch.arange(103))
    assert same(values, content(sizes)["responses"].values)


def test_a_killed_process_leaves_whole_shards_that_the_next_one_keeps(tmp_path):
    script = """
        sizes = [(1_000, 3_000)] * 4
        embeddings = {"prompts": draw(1_000, seed=0, dim=512),
                      "responses": draw(3_000, seed=1, dim=512)}
        store = create(folder, sizes, dim=512)
        halves = wholes = 0
        for _ in range(20):
            child = os.fork()
            if not child:
                while True:
                    for shard in range(4):
                        store.write(shard, **embeddings)
            time.sleep(random.uniform(0.0, 0.2))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            halves += len(list(folder.glob(".*.tmp")))
            before = len(list(folder.glob("shard-*")))
            store = create(folder, sizes, dim=512)
            there = [shard for shard in range(4) if store.has(shard)]
            assert len(there) == before, "a shard was not whole"
            assert not list(folder.glob(".*.tmp"))
            wholes += before
            for shard in there:
                rows = 3_000 * shard + torch.arange(3_000)
                values = store.responses.read(rows)
                assert torch.equal(values.nan_to_num(), embeddings["responses"].values.nan_to_num())
                store._path(shard).unlink()
        print(json.dumps([halves, wholes]))
    """
    halves, wholes = run_script(script, str(tmp_path))
    assert halves > 0  # otherwise no process was killed in the middle of a file
    assert wholes > 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_reading_takes_the_memory_of_what_is_read_not_of_the_store(tmp_path):
    sizes, dim = [(1, 10_000)] * 10, 1_000  # 400 MB
    store = create(tmp_path, sizes, dim=dim)
    parts = {"prompts": draw(1, seed=0, dim=dim), "responses": draw(10_000, seed=1, dim=dim)}
    for shard in range(10):
        store.write(shard, **parts)
    # Not getrusage: a process starts with the peak of the one that started it.
    script = """
        def peak_mb():
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) / 1_000

        table = EmbeddingStore.open(folder).responses
        every = torch.arange(table.rows)
        Path("/proc/self/clear_refs").write_text("5")
        peaks = [peak_mb()]
        table.read(every[:: len(every) // 8])
        peaks.append(peak_mb())
        for positions, values in table.batches(every):
            pass
        peaks.append(peak_mb())
        table.read(every)
        peaks.append(peak_mb())
        print(json.dumps([peak - peaks[0] for peak in peaks[1:]]))
    """
    few, streamed, whole = run_script(script, str(tmp_path))
    shutil.rmtree(tmp_path)
    assert few < 50
    assert streamed < 200
    assert whole > 390


# Covariates

NAMES = ("length", "lists")


def covariates_of(shard, rows):
    generator = torch.Generator().manual_seed(100 + shard)
    return torch.rand(rows, len(NAMES), generator=generator, dtype=torch.float64)


def create_covariates(folder, sizes=SIZES, **changes):
    return CovariateStore.create(
        folder, **{"names": NAMES, "version": 1, "shards": plan(sizes), **changes}
    )


def fill_covariates(folder, sizes=SIZES):
    store = create_covariates(folder, sizes)
    for shard in store.missing_shards():
        store.write(shard, covariates_of(shard, sizes[shard][1]))
    return store


def covariates_path(folder, shard):
    return folder / f"covariates-{shard:05d}.safetensors"


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=5))
def test_covariates_come_back_in_the_order_of_the_responses(tmp_path_factory, sizes):
    folder = tmp_path_factory.mktemp("store")
    fill_covariates(folder, sizes)
    expected = [covariates_of(shard, rows) for shard, (_, rows) in enumerate(sizes)]
    found = create_covariates(folder, sizes).read()
    assert torch.equal(found, torch.cat([torch.zeros(0, 2, dtype=torch.float64), *expected]))


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"names": ("length", "links")}, {"names": NAMES[::-1]}, {"names": NAMES[:1]}],
    ids=str,
)
def test_another_way_to_measure_deletes_the_covariates_and_keeps_the_embeddings(
    tmp_path, change, caplog
):
    fill(tmp_path)
    fill_covariates(tmp_path)
    with caplog.at_level(logging.INFO, logger="armo"):
        assert create_covariates(tmp_path, **change).missing_shards() == [0, 1, 2]
    assert create(tmp_path).missing_shards() == []
    assert [r.message for r in caplog.records] == [
        f"{tmp_path}: deleted 3 shards of other covariates"
    ]


def test_another_backbone_deletes_the_embeddings_and_keeps_the_covariates(tmp_path):
    fill(tmp_path)
    fill_covariates(tmp_path)
    assert create(tmp_path, fingerprint="another model").missing_shards() == [0, 1, 2]
    assert create_covariates(tmp_path).missing_shards() == []


@pytest.mark.parametrize("change", [{"texts": "other"}, {"responses": 3}], ids=str)
def test_covariates_of_other_texts_are_deleted(tmp_path, change):
    fill_covariates(tmp_path)
    shards = list(plan())
    shards[1] = replace(shards[1], **change)
    assert create_covariates(tmp_path, shards=shards).missing_shards() == [1]


@pytest.mark.parametrize(
    "harm", [lambda whole: whole[:-1], lambda whole: b""], ids=["cut", "empty"]
)
def test_damaged_covariates_are_named_and_made_again(tmp_path, harm, caplog):
    store = fill_covariates(tmp_path)
    path = covariates_path(tmp_path, 1)
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(ArtifactError, match=r"covariates-00001\.safetensors: damaged"):
        store.read()
    assert create_covariates(tmp_path).missing_shards() == [1]
    assert [r.message for r in caplog.records] == [f"{path} is damaged; it is made again"]


def test_a_flipped_bit_in_covariates_is_found(tmp_path):
    store = fill_covariates(tmp_path)
    flip(covariates_path(tmp_path, 2), -1)
    with pytest.raises(ArtifactError, match=r"covariates-00002\.safetensors: damaged"):
        store.read()
    assert create_covariates(tmp_path).missing_shards() == [2]


def test_missing_and_foreign_covariates_are_named(tmp_path):
    store = fill_covariates(tmp_path)
    with pytest.raises(ArtifactError, match=r"covariates-00000\.safetensors: stale"):
        replace(store, version=2).read()
    covariates_path(tmp_path, 1).unlink()
    assert store.missing_shards() == [1]
    with pytest.raises(ArtifactError, match=r"covariates-00001\.safetensors: missing"):
        store.read()


@pytest.mark.parametrize("shape", [(3, 2), (4, 1), (4, 3)])
def test_covariates_that_do_not_fit_the_shard_are_not_written(tmp_path, shape):
    store = create_covariates(tmp_path)
    with pytest.raises(ValueError, match=r"`covariates` of shard 1 must have the shape \(4, 2\)"):
        store.write(1, torch.zeros(shape))
    assert not store.has(1)


def test_a_full_disk_leaves_no_half_covariates(tmp_path):
    store = create_covariates(tmp_path, ((1, 500),))
    with largest_file(500), pytest.raises(OSError, match=r"too large: .*/covariates-00000"):
        store.write(0, covariates_of(0, 500))
    assert list(tmp_path.iterdir()) == []
