import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armo.artifacts import ArtifactError
from armo.embed.store import EmbeddingStore

LAYOUT = {"rows": 5, "dim": 3, "shard_rows": 2, "fingerprint": "model", "texts": "words"}


def draw(rows, dim=3, *, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, dim, generator=generator).to(dtype)


def fill(folder, values, *, shard_rows):
    """Write `values` as a whole store, every third row marked as cut, and open it."""
    layout = {**LAYOUT, "rows": len(values), "dim": values.shape[1], "shard_rows": shard_rows}
    store = EmbeddingStore.create(folder, **layout)
    for shard in range(store.shards):
        rows = list(store.shard_range(shard))
        cut = torch.tensor([row % 3 == 0 for row in rows])
        store.write(shard, embeddings=values[rows], truncated=cut)
    return EmbeddingStore.open(folder)


@st.composite
def reads(draw):
    rows = draw(st.integers(1, 20))
    wanted = draw(st.lists(st.integers(0, rows - 1), max_size=30))
    return rows, draw(st.integers(1, 8)), torch.tensor(wanted, dtype=torch.int64)


@given(reads())
def test_reading_rows_equals_indexing_in_any_order_with_repeats(tmp_path_factory, problem):
    rows, shard_rows, wanted = problem
    values = draw(rows)
    store = fill(tmp_path_factory.mktemp("store"), values, shard_rows=shard_rows)
    assert torch.equal(store.read(wanted), values[wanted])


@given(reads())
def test_batches_give_each_wanted_row_once_and_one_shard_at_a_time(tmp_path_factory, problem):
    rows, shard_rows, wanted = problem
    values = draw(rows)
    store = fill(tmp_path_factory.mktemp("store"), values, shard_rows=shard_rows)
    seen = []
    for positions, part in store.batches(wanted):
        assert torch.equal(part, values[wanted[positions]])
        assert len((wanted[positions] // shard_rows).unique()) == 1
        seen += positions.tolist()
    assert sorted(seen) == list(range(len(wanted)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_store_keeps_the_dtype_and_the_marks_of_cut_texts(tmp_path, dtype):
    values = draw(5, dtype=dtype)
    store = fill(tmp_path, values, shard_rows=2)
    assert store.read(torch.arange(5)).dtype == dtype
    assert torch.equal(store.read(torch.arange(5)), values)
    assert store.truncated().tolist() == [True, False, False, True, False]


def test_a_store_without_rows_can_be_read(tmp_path):
    store = fill(tmp_path, torch.zeros(0, 3), shard_rows=2)
    assert store.shards == 0
    assert store.read(torch.tensor([], dtype=torch.int64)).shape == (0, 3)
    assert store.truncated().tolist() == []


def test_a_store_of_the_same_embeddings_keeps_its_shards(tmp_path):
    fill(tmp_path, draw(5), shard_rows=2)
    store = EmbeddingStore.create(tmp_path, **LAYOUT)
    assert [store.has(shard) for shard in range(3)] == [True, True, True]
    assert torch.equal(store.read(torch.arange(5)), draw(5))


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "another model"},
        {"texts": "other words"},
        {"rows": 6},
        {"dim": 4},
        {"shard_rows": 3},
    ],
    ids=str,
)
def test_a_store_of_other_embeddings_deletes_the_stale_shards(tmp_path, change):
    fill(tmp_path, draw(5), shard_rows=2)
    EmbeddingStore.create(tmp_path, **{**LAYOUT, **change})
    assert list(tmp_path.glob("*.safetensors")) == []
    with pytest.raises(ArtifactError, match="shard 0 of"):
        EmbeddingStore.open(tmp_path)


def test_shards_without_a_header_are_not_trusted(tmp_path):
    fill(tmp_path, draw(5), shard_rows=2)
    (tmp_path / "store.json").unlink()
    EmbeddingStore.create(tmp_path, **LAYOUT)
    assert list(tmp_path.glob("*.safetensors")) == []


def test_a_missing_shard_is_named(tmp_path):
    store = fill(tmp_path, draw(5), shard_rows=2)
    assert EmbeddingStore.open(tmp_path) == store
    (tmp_path / "shard-00001.safetensors").unlink()
    with pytest.raises(ArtifactError, match="shard 1 of 3 is missing"):
        EmbeddingStore.open(tmp_path)


def test_a_missing_store_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"No such file: .*store\.json"):
        EmbeddingStore.open(tmp_path / "gone")


@pytest.mark.parametrize("shape", [(1, 3), (2, 4)])
def test_a_shard_of_another_shape_is_not_written(tmp_path, shape):
    store = EmbeddingStore.create(tmp_path, **LAYOUT)
    with pytest.raises(AssertionError):
        store.write(0, embeddings=torch.zeros(shape), truncated=torch.zeros(shape[0]).bool())
    assert not store.has(0)
