"""A safetensors header is a claim: what it says must be what the file holds, or the file is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from latmix.errors import DamagedError
from latmix.model.shards import HEADER, INDEX, read_header, stored_tensors

Header = dict[str, Any]


def write(path: Path, header: Header | bytes | str, body: bytes = b"\0" * 24, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
    return path


def two(**changes: Any) -> Header:
    """Two tensors in 24 bytes, the first one changed."""
    first = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}
    return {
        "a": first,
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
        "__metadata__": {"format": "pt"},
    }


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    kinds = (
        torch.float32,
        torch.bfloat16,
        torch.uint8,
        torch.float8_e4m3fn,
        torch.float64,
        torch.bool,
        torch.complex64,
    )
    tensors = {str(kind): torch.zeros(3, i, 2).to(kind) for i, kind in enumerate(kinds)}  # the first one is empty
    save_file(tensors, tmp_path / "model.safetensors")
    found = stored_tensors(tmp_path)
    assert {name: entry.shape for name, entry in found.items()} == {name: (*t.shape,) for name, t in tensors.items()}
    assert read_header(write(tmp_path / "two.safetensors", two())).keys() == {"a", "b"}


BAD: dict[str, tuple[Header | bytes | str, dict[str, Any]]] = {
    "empty file": (b"", {"length": 0, "body": b""}),
    "length past the end": (two(), {"length": 2**63 - 1}),
    "length past the limit": (two(), {"length": HEADER + 1}),
    "no JSON": (b"\x80\x04pickle", {}),
    "not UTF-8": (b'{"\xff": 1}', {}),
    "a list": ("[1, 2]", {}),
    "deep": ("[" * 100_000 + "]" * 100_000, {}),
    "a long number": ('{"a": ' + "9" * 5000 + "}", {}),
    "no entry": ({"a": 3}, {}),
    "negative side": (two(shape=[-2, -2]), {}),
    "a side that is no number": (two(shape=["4"]), {}),
    "a side that is true": (two(shape=[4, True]), {}),
    "huge shape": (two(shape=[2**62, 2**62, 0]), {}),
    "many axes": (two(shape=[2, 2, *[1] * 100_000]), {}),
    "shape is not the bytes": (two(shape=[2, 3]), {}),
    "dtype is not the bytes": (two(dtype="F64"), {}),
    "unknown dtype": (two(dtype="O"), {}),
    "backwards": (two(data_offsets=[16, 0]), {}),
    "overlap": (two(data_offsets=[8, 24]), {}),
    "three offsets": (two(data_offsets=[0, 16, 16]), {}),
    "fractions": (two(data_offsets=[0.0, 16.0]), {}),
    "outside": (two(data_offsets=[24, 40]), {}),
    "cut short": (two(), {"body": b"\0" * 23}),
    "too long": (two(), {"body": b"\0" * 25}),
}


@pytest.mark.parametrize("name", BAD)
def test_other_headers_are_refused(name: str, tmp_path: Path) -> None:
    header, options = BAD[name]
    file = write(tmp_path / "model.safetensors", header, **options)
    with pytest.raises(DamagedError, match=r"model\.safetensors' (has a damaged safetensors header|is cut short)"):
        read_header(file)


def test_an_index_says_where_tensors_are(tmp_path: Path) -> None:
    write(tmp_path / "one.safetensors", two())
    write(tmp_path / "two.safetensors", two())
    index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    assert {name: entry.shard.name for name, entry in stored_tensors(tmp_path).items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }
    index(tmp_path, {"a": "one.safetensors", "c": "two.safetensors"})
    with pytest.raises(DamagedError, match="two.safetensors' lacks the tensor 'c'"):
        stored_tensors(tmp_path)


def index(folder: Path, places: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize(
    "name", ["../one.safetensors", "/etc/passwd", "a/one.safetensors", "..", "", "a\\b.safetensors", "a\0.safetensors"]
)
def test_a_shard_lies_beside_its_index(name: str, tmp_path: Path) -> None:
    write(tmp_path / "one.safetensors", two())
    (tmp_path / "in").mkdir()
    index(tmp_path / "in", {"a": name})
    with pytest.raises(DamagedError, match="a shard is a .safetensors file beside the index"):
        stored_tensors(tmp_path / "in")


@pytest.mark.parametrize("places", [{}, [], None, "one.safetensors", {"a": 3}, {"a": None}])
def test_an_index_without_a_map_is_refused(places: Any, tmp_path: Path) -> None:
    index(tmp_path, places)
    with pytest.raises(DamagedError, match=r"has no weight_map|names the shard"):
        stored_tensors(tmp_path)
