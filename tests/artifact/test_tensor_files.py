"""Tensor files: written by us, read by us and by the safetensors library, and the other way round."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from llmc.artifact.tensors import ALIGNMENT, TensorSpec, read_tensors, write_tensors
from llmc.spec.errors import ArtifactError, InternalError

pytestmark = pytest.mark.pure

DTYPES = {"float32": np.float32, "float16": np.float16, "int8": np.int8, "uint8": np.uint8,
          "int64": np.int64, "bfloat16": np.uint16, "bool": np.bool_}  # fmt: skip


def write(path, arrays):
    """`arrays`: name -> (dtype name, values)."""
    specs = [TensorSpec(name, dtype, values.shape) for name, (dtype, values) in arrays.items()]
    with path.open("wb") as file:
        write_tensors(file, specs, lambda name: arrays[name][1])


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=8), st.integers(0, 2**32 - 1))
def test_tensors_survive_the_round_trip_aligned(tmp_path_factory, entries, seed):
    rng = np.random.default_rng(seed)
    arrays = {
        f"t{index}": (dtype, rng.integers(0, 2, shape).astype(DTYPES[dtype]))
        for index, (dtype, shape) in enumerate(entries)
    }
    path = tmp_path_factory.mktemp("t") / "x.safetensors"
    write(path, arrays)
    views = read_tensors(path)
    assert list(views) == list(arrays)
    for name, (dtype, values) in arrays.items():
        assert views[name].dtype == dtype
        assert np.array_equal(views[name].data, values)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    for name, entry in header.items():
        if not name.startswith("__padding__"):
            assert (start + entry["data_offsets"][0]) % ALIGNMENT == 0
    assert start + max((e["data_offsets"][1] for e in header.values()), default=0) == len(data)


def test_the_safetensors_library_reads_what_we_write(tmp_path):
    arrays = {
        "odd": ("uint8", np.arange(5, dtype=np.uint8)),
        "b": ("float32", np.arange(6, dtype=np.float32).reshape(2, 3)),
        "a": ("int64", np.asarray(7)),
    }
    write(tmp_path / "x.safetensors", arrays)
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        for name, (_, values) in arrays.items():
            assert np.array_equal(file.get_tensor(name), values)


def test_we_read_what_the_safetensors_library_writes(tmp_path):
    values = {"b": np.arange(6, dtype=np.float16), "a": np.ones((2, 2), np.int8)}
    save_file(values, tmp_path / "x.safetensors", metadata={"format": "np"})
    views = read_tensors(tmp_path / "x.safetensors")
    assert {name: view.data.tolist() for name, view in views.items()} == {
        name: array.tolist() for name, array in values.items()
    }


def test_views_cannot_be_written(tmp_path):
    write(tmp_path / "x.safetensors", {"a": ("float32", np.zeros(4, np.float32))})
    with pytest.raises(ValueError, match="read-only"):
        read_tensors(tmp_path / "x.safetensors")["a"].data[0] = 1


def test_tensors_are_asked_for_once_and_in_order():
    asked = []

    def fetch(name):
        asked.append(name)
        return np.zeros(3, np.float32)

    specs = [TensorSpec(name, "float32", (3,)) for name in ("z", "a", "m")]
    write_tensors(io.BytesIO(), specs, fetch)
    assert asked == ["z", "a", "m"]


@pytest.mark.parametrize("values", [np.zeros(4, np.float32), np.zeros((3, 2), np.float32)[:, 0]])
def test_values_that_do_not_fit_their_spec_are_refused(values):
    with pytest.raises(InternalError, match="'a'"):
        write_tensors(io.BytesIO(), [TensorSpec("a", "float32", (3,))], lambda name: values)


def test_a_dtype_that_cannot_be_stored_is_named():
    with pytest.raises(InternalError, match="'quint4x2'"):
        write_tensors(io.BytesIO(), [TensorSpec("a", "quint4x2", (3,))], lambda name: np.zeros(3))


def header_of(**entry):
    return json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry}).encode()


@pytest.mark.parametrize(
    "header",
    [
        b"", b"[]", b"{", b"\xff\xff",
        header_of(dtype="F31"), header_of(shape=[3]), header_of(data_offsets=[4, 12]),
        header_of(data_offsets=[8, 0]), header_of(shape=[-2]), header_of(shape=[1, -2, -1]),
        header_of(data_offsets=[-8, 0]),
    ],
)  # fmt: skip
def test_headers_that_do_not_describe_the_file_are_refused(tmp_path, header):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ArtifactError, match=r"broken\.safetensors"):
        read_tensors(path)


@pytest.mark.parametrize("data", [b"", b"\x01", b"\xff" * 8, (10**9).to_bytes(8, "little") + b"{}"])
def test_files_without_a_header_are_refused(tmp_path, data):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError, match="header"):
        read_tensors(tmp_path / "x.safetensors")
