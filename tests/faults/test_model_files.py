"""Bad model files, cases 43 to 72: each is built, refused under its own code and with a way out, and nothing of it is run.

``safetensors`` and ``torch.load`` accept or crash on a good part of these files; where they do, a test proves that the file is
really bad by asking them.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import struct
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerwise.errors import LayerwiseError, ModelFormatError, NonFiniteWeights
from layerwise.weights import load_into, read_weights, stream_weights

onnx = pytest.importorskip("onnx")
SECONDS = 20.0
GROWTH = 400 << 10  # KiB of memory that a refusal may take: the largest bad file here has 50 MB

Builder = Callable[[Path], Path]


@dataclass(frozen=True)
class Case:
    """A bad file: `build` writes it into a folder; the error has the code of `number` and each of `says` in its text."""

    number: int
    build: Builder
    says: tuple[str, ...]
    error: type[LayerwiseError] = ModelFormatError

    @property
    def name(self) -> str:
        return f"{self.number}-{self.build.__name__}"


CASES: list[Case] = []


def case(number: int, *says: str, error: type[LayerwiseError] = ModelFormatError) -> Callable[[Builder], Builder]:
    def add(build: Builder) -> Builder:
        CASES.append(Case(number, build, says, error))
        return build

    return add


class Payload:
    """Unpickled by anyone, it leaves a file behind."""

    def __init__(self, folder: Path) -> None:
        self.command = f"touch {folder / 'RAN'}"

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def small() -> dict[str, torch.Tensor]:
    return {"first.weight": torch.arange(12.0).reshape(3, 4), "last.bias": torch.ones(3)}


def saved(path: Path, content: Any, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def container(path: Path, header: str | dict[str, Any], data: bytes = b"") -> Path:
    """A safetensors file with this header, right or wrong."""
    raw = (header if isinstance(header, str) else json.dumps(header)).encode()
    return write(path, struct.pack("<Q", len(raw)) + raw + data)


def entry(shape: list[int], first: int, last: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def rezip(path: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """Write the zip archive again with changed records and right checksums."""
    with zipfile.ZipFile(path) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records:
            archive.writestr(name, change(name, content))
    return path


# Not a weight file at all.


@case(43, "is empty (0 bytes)", "Download")
def empty(folder: Path) -> Path:
    return write(folder / "model.bin", b"")


@case(43, "is empty (0 bytes)")
def empty_safetensors(folder: Path) -> Path:
    return write(folder / "model.safetensors", b"")


@case(44, "is a web page", "<!DOCTYPE html>", "Download again: the server answered with a web page")
def html(folder: Path) -> Path:
    return write(folder / "model.bin", b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>")


@case(44, "is a web page")
def html_safetensors(folder: Path) -> Path:
    return write(folder / "model.safetensors", b"<html>{" + b"x" * 100)


@case(44, "is text", "Entry not found")
def message(folder: Path) -> Path:
    return write(folder / "model.safetensors", b"Entry not found")


@case(44, "is text", "Repository not found")
def json_message(folder: Path) -> Path:
    return write(folder / "model.bin", b'{"error": "Repository not found"}')


@case(45, "is a git-lfs pointer", "git lfs pull")
def lfs_pointer(folder: Path) -> Path:
    text = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 437951328\n"
    return write(folder / "model.safetensors", text)


def truncated(percent: float) -> Builder:
    def build(folder: Path) -> Path:
        path = saved(folder / "model.bin", {"first.weight": torch.ones(30_000)})
        os.truncate(path, int(path.stat().st_size * percent / 100))
        return path

    build.__name__ = f"zip_cut_at_{percent:g}"
    return build


for percent in (10, 50, 90, 99.9):
    case(46, "cut off", "Download or copy the file again")(truncated(percent))


@case(46, "cut off")
def legacy_cut(folder: Path) -> Path:
    path = saved(folder / "model.bin", {"first.weight": torch.ones(3000)}, legacy=True)
    os.truncate(path, path.stat().st_size - 100)
    return path


@case(46, "is cut off", "last.bias")
def safetensors_cut(folder: Path) -> Path:
    save_file(small(), folder / "model.safetensors")
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 4)
    return folder / "model.safetensors"


# Pickles that want to run something.


@case(47, "posix.system", "nothing was run", "safetensors.torch.save_file")
def raw_pickle(folder: Path) -> Path:
    return write(folder / "model.bin", pickle.dumps({"w": Payload(folder)}, protocol=2))


@case(47, "posix.system")
def pickle_protocol_4(folder: Path) -> Path:
    return write(folder / "model.bin", pickle.dumps({"w": Payload(folder)}, protocol=4))


@case(47, "posix.system")
def text_pickle(folder: Path) -> Path:
    return write(folder / "model.bin", pickle.dumps(Payload(folder), protocol=0))


@case(47, "posix.system")
def pickle_in_zip(folder: Path) -> Path:
    return saved(folder / "model.bin", {**small(), "x": Payload(folder)})


@case(47, "posix.system")
def pickle_in_legacy(folder: Path) -> Path:
    return saved(folder / "model.bin", {**small(), "x": Payload(folder)}, legacy=True)


@case(48, "is a whole module", "torch.nn.modules.linear.Linear", "torch.save(", ".state_dict()", "safetensors.torch.save_file(")
def whole_module(folder: Path) -> Path:
    return saved(folder / "model.pt", torch.nn.Linear(2, 2))


@case(48, "is a whole module", "that you trust")
def whole_module_legacy(folder: Path) -> Path:
    return saved(folder / "model.pt", torch.nn.Linear(2, 2), legacy=True)


@case(48, "is a TorchScript program", "torch.jit.load")
def torchscript(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still what people have
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), folder / "model.pt")
    return folder / "model.pt"


@case(49, "is called safetensors but is a pickle", "nothing was loaded")
def pickle_renamed(folder: Path) -> Path:
    return write(folder / "model.safetensors", pickle.dumps(Payload(folder), protocol=4))


@case(49, "is called safetensors but is a pickle")
def zip_renamed(folder: Path) -> Path:
    return saved(folder / "model.safetensors", {"x": Payload(folder)})


# Damaged and lying torch files.


@case(50, "checksum", "/data/0'")
def bad_crc(folder: Path) -> Path:
    path = saved(folder / "model.bin", {"first.weight": torch.full((1000,), 3.5)})
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack("<f", 3.5) * 10)] ^= 1
    return write(path, bytes(content))


@case(50, "compressed, encrypted or twice")
def bad_flags(folder: Path) -> Path:
    path = saved(folder / "model.bin", small())
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # "encrypted", in the table at the end
    return write(path, bytes(content))


@case(50, "compressed, encrypted or twice")
def compressed(folder: Path) -> Path:
    path = folder / "model.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", bytes(1 << 20))
    return path


@case(51, "sparse tensor whose indices do not fit", "to_dense()")
def sparse_coo(folder: Path) -> Path:
    indices = torch.tensor([[0, 100]])
    broken = torch.sparse_coo_tensor(indices, torch.ones(2), (3,), check_invariants=False)
    return saved(folder / "model.bin", {"first.weight": broken})


@case(51, "sparse tensor whose indices do not fit")
def sparse_csr(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse CSR is in beta state
        broken = torch.sparse_csr_tensor(
            torch.tensor([0, 1, 9]), torch.tensor([0, 7]), torch.ones(2), (2, 2), check_invariants=False
        )
    return saved(folder / "model.bin", {"first.weight": broken})


@case(52, "'first.weight'", "1099511627776", "as a view of 4", "contiguous()")
def giant_view(folder: Path) -> Path:
    return saved(folder / "model.bin", {"first.weight": torch.ones(1).expand(2**40)})


@case(52, "'first.weight'")
def giant_strided_view(folder: Path) -> Path:
    return saved(folder / "model.bin", {"first.weight": torch.ones(4).as_strided((2**20, 2**20), (0, 1 - 1))})


def claim_more(name: str, content: bytes) -> bytes:
    """The pickle's storage of 3 elements becomes one of 200: torch reads 788 bytes past the record's end."""
    if not name.endswith("data.pkl"):
        return content
    assert content.count(b"cpuq\x06K\x03tq") == 1
    return content.replace(b"cpuq\x06K\x03tq", b"cpuq\x06K\xc8tq")


@case(52, "claims 800 bytes for the storage '0', which has 12")
def lying_storage(folder: Path) -> Path:
    return rezip(saved(folder / "model.bin", {"last.bias": torch.ones(3)}), claim_more)


@case(52, "bytes of storage but has")
def lying_storage_legacy(folder: Path) -> Path:
    path = saved(folder / "model.bin", {"last.bias": torch.ones(3)}, legacy=True)
    content = path.read_bytes()
    assert content.count(b"cpuq\x06K\x03") == 1
    return write(path, content.replace(b"cpuq\x06K\x03", b"cpuq\x06J\xff\xff\xff\x7f"))


@case(53, "'last.bias' (1 NaN, 0 Inf of 3)", "1 of 2 tensors", error=NonFiniteWeights)
def nan_safetensors(folder: Path) -> Path:
    save_file(small() | {"last.bias": torch.tensor([1.0, torch.nan, 2.0])}, folder / "model.safetensors")
    return folder / "model.safetensors"


@case(53, "'first.weight' (0 NaN, 12 Inf of 12)", error=NonFiniteWeights)
def infinite_torch(folder: Path) -> Path:
    return saved(folder / "model.bin", small() | {"first.weight": torch.full((3, 4), -torch.inf)})


@case(54, "'first.weight'", "complex64", "view_as_real")
def complex_torch(folder: Path) -> Path:
    return saved(folder / "model.bin", {"first.weight": torch.ones(2, dtype=torch.complex64)})


@case(54, "'first.weight'", "qint8", "dequantize")
def quantised_torch(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still what people have
        tensor = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    return saved(folder / "model.bin", {"first.weight": tensor})


@case(54, "'first.weight'", "'C64'")
def complex_safetensors(folder: Path) -> Path:
    save_file({"first.weight": torch.ones(2, dtype=torch.complex64)}, folder / "model.safetensors")
    return folder / "model.safetensors"


@case(54, "'first.weight'", "'Z99'")
def unknown_dtype(folder: Path) -> Path:
    return container(folder / "model.safetensors", {"first.weight": entry([1], 0, 4, "Z99")}, bytes(4))


# Indexes.


def sharded(folder: Path, weight_map: dict[str, str], index: str = "model.safetensors.index.json") -> Path:
    for shard in set(weight_map.values()):
        if "/" not in shard:
            names = [name for name, place in weight_map.items() if place == shard]
            save_file({name: torch.ones(2) for name in names}, folder / shard)
    return write(folder / index, json.dumps({"metadata": {}, "weight_map": weight_map}).encode())


@case(60, "names 1 of 2 shards that are not there: 'b.safetensors'", "Download the missing shards")
def missing_shard(folder: Path) -> Path:
    index = sharded(folder, {"x": "a.safetensors", "y": "b.safetensors"})
    (folder / "b.safetensors").unlink()
    return index


@case(60, "promises 1 tensors that no shard holds: 'y'")
def missing_in_shard(folder: Path) -> Path:
    index = sharded(folder, {"x": "a.safetensors"})
    return write(index, json.dumps({"weight_map": {"x": "a.safetensors", "y": "a.safetensors"}}).encode())


@case(60, "without a weight_map")
def no_weight_map(folder: Path) -> Path:
    return write(folder / "model.safetensors.index.json", b'{"metadata": {}}')


@case(60, "is not a readable index")
def index_cut(folder: Path) -> Path:
    return write(folder / "model.safetensors.index.json", b'{"weight_map": {"x": ')


def outside(name: str, label: str) -> Builder:
    def build(folder: Path) -> Path:
        (folder / "inner").mkdir()
        save_file({"x": torch.ones(2)}, folder / "a.safetensors")
        return sharded(folder / "inner", {"x": name.replace("$", str(folder))})

    build.__name__ = f"index_{label}"
    return build


case(61, "outside its folder: '../a.safetensors'", "attack")(outside("../a.safetensors", "dotdot"))
case(61, "outside its folder")(outside("y/../../a.safetensors", "inner_dotdot"))
case(61, "outside its folder")(outside("$/a.safetensors", "absolute"))


@case(62, "both name the shard 'a.safetensors'", "other.safetensors.index.json")
def shard_in_two_indexes(folder: Path) -> Path:
    index = sharded(folder, {"x": "a.safetensors"})
    sharded(folder, {"x": "a.safetensors"}, "other.safetensors.index.json")
    return index


@case(62, "holds 'x', which belongs to 'a.safetensors'")
def tensor_in_two_shards(folder: Path) -> Path:
    index = sharded(folder, {"x": "a.safetensors", "y": "b.safetensors"})
    save_file({"x": torch.ones(2), "y": torch.ones(2)}, folder / "b.safetensors")
    return index


# safetensors headers.


@case(63, "claims a header of 1,000,000 bytes but has 10")
def header_past_end(folder: Path) -> Path:
    return write(folder / "model.safetensors", struct.pack("<Q", 1_000_000) + b"{}")


@case(63, "claims a header of")
def no_header(folder: Path) -> Path:
    return write(folder / "model.safetensors", b"\x01\x02\x03")


@case(63, "is not JSON")
def header_not_json(folder: Path) -> Path:
    return container(folder / "model.safetensors", '{"first.weight": ')


@case(63, "is not JSON")
def header_nested(folder: Path) -> Path:
    return container(folder / "model.safetensors", '{"a": ' + "[" * 100_000)


@case(63, "is not JSON")
def header_giant_number(folder: Path) -> Path:
    return container(folder / "model.safetensors", '{"a": {"dtype": "F32", "shape": [1' + "0" * 10_000 + "]}}")


@case(63, "something else than dtype, shape and data_offsets", "'first.weight'")
def header_odd_entry(folder: Path) -> Path:
    return container(folder / "model.safetensors", {"first.weight": {"shape": [1]}})


@case(64, "claims a header of 9,223,372,036,854,775,808 bytes")
def header_of_2_63(folder: Path) -> Path:
    return write(folder / "model.safetensors", struct.pack("<Q", 1 << 63) + b"{}")


@case(64, "claims a header of 18,446,744,073,709,551,615 bytes")
def header_of_2_64(folder: Path) -> Path:
    return write(folder / "model.bin", b"\xff" * 8 + b"{}")


@case(65, "overlap", "'a' ends at 8", "'b' begins at 4")
def overlap(folder: Path) -> Path:
    return container(folder / "model.safetensors", {"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12))


@case(65, "leave a hole", "'a' ends at 8", "'b' begins at 16")
def hole(folder: Path) -> Path:
    return container(folder / "model.safetensors", {"a": entry([2], 0, 8), "b": entry([2], 16, 24)}, bytes(24))


@case(65, "4 bytes after its last tensor 'a'")
def appendix(folder: Path) -> Path:
    return container(folder / "model.safetensors", {"a": entry([2], 0, 8)}, bytes(12))


@case(65, "'a' the data offsets [8, 0]")
def backwards(folder: Path) -> Path:
    return container(folder / "model.safetensors", {"a": entry([2], 8, 0)}, bytes(8))


@case(66, "'a'", "more bytes than can be addressed")
def shape_overflow(folder: Path) -> Path:
    return container(folder / "model.safetensors", {"a": entry([2**62, 2**62, 2**62], 0, 8)}, bytes(8))


@case(66, "'a'", "needs")
def shape_wraps_to_its_size(folder: Path) -> Path:
    """In 64 bits 2**62 * 4 wraps to 0 bytes: right by arithmetic that overflows."""
    return container(folder / "model.safetensors", {"a": entry([2**62], 0, 0)})


@case(66, "'a' the shape [-1]")
def shape_negative(folder: Path) -> Path:
    return container(folder / "model.safetensors", {"a": entry([-1], 0, 4)}, bytes(4))


@case(66, "'a' 8 bytes", "needs 12 bytes")
def shape_too_large(folder: Path) -> Path:
    return container(folder / "model.safetensors", {"a": entry([3], 0, 8)}, bytes(8))


@case(67, "names 'a' twice")
def duplicate_tensor(folder: Path) -> Path:
    one = json.dumps(entry([1], 0, 4))
    return container(folder / "model.safetensors", f'{{"a": {one}, "a": {one}}}', struct.pack("<f", 7.0))


@case(67, "names 'shape' twice")
def duplicate_field(folder: Path) -> Path:
    header = '{"a": {"dtype": "F32", "shape": [1], "shape": [2], "data_offsets": [0, 8]}}'
    return container(folder / "model.safetensors", header, bytes(8))


@case(67, "names 'x' twice")
def duplicate_in_index(folder: Path) -> Path:
    sharded(folder, {"x": "a.safetensors"})
    text = b'{"weight_map": {"x": "a.safetensors", "x": "a.safetensors"}}'
    return write(folder / "model.safetensors.index.json", text)


@case(68, "holds 1,000,000 tensors; at most 100,000")
def million_tensors(folder: Path) -> Path:
    one = '"t%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return container(folder / "model.safetensors", "{" + ",".join(one % i for i in range(1_000_000)) + "}")


@case(68, "has a header of 100,000,001 bytes")
def giant_header(folder: Path) -> Path:
    path = write(folder / "model.safetensors", struct.pack("<Q", 100_000_001) + b"{")
    os.truncate(path, 100_000_100)  # sparse: takes no room on the disk
    return path


# GGUF.


def gguf(path: Path, pairs: list[bytes], tensors: list[bytes], data: bytes = b"", counts: tuple[int, int] | None = None) -> Path:
    n_tensors, n_pairs = counts or (len(tensors), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_pairs) + b"".join(pairs) + b"".join(tensors)
    return write(path, head + bytes(-len(head) % 32) + data)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor_entry(name: str, shape: list[int], n_dims: int | None = None, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape) if n_dims is None else n_dims, *shape, 0, offset)


ALPHABET = text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")


@case(40, "is a GGUF model: an exported artifact", "Load the weights it was made from")
def sane_gguf(folder: Path) -> Path:
    alignment = text("general.alignment") + struct.pack("<II", 4, 32)
    return gguf(folder / "model.gguf", [alignment, ALPHABET], [tensor_entry("w", [3, 4])], bytes(48))


@case(69, "an array of 9,223,372,036,854,775,808 values at key 'tokens'")
def gguf_array(folder: Path) -> Path:
    return gguf(folder / "model.gguf", [text("tokens") + struct.pack("<IIQ", 9, 8, 1 << 63)], [])


@case(69, "an array of 9,223,372,036,854,775,808 values at key 'numbers'")
def gguf_number_array(folder: Path) -> Path:
    return gguf(folder / "model.bin", [text("numbers") + struct.pack("<IIQ", 9, 0, 1 << 63)], [])


@case(69, "a string of 4,611,686,018,427,387,904 bytes")
def gguf_string(folder: Path) -> Path:
    return gguf(folder / "model.gguf", [text("name") + struct.pack("<IQ", 8, 1 << 62)], [])


@case(69, "claims 9,223,372,036,854,775,808 tensors")
def gguf_tensor_count(folder: Path) -> Path:
    return gguf(folder / "model.gguf", [], [], counts=(1 << 63, 0))


@case(69, "nested arrays", "'deep'")
def gguf_nested(folder: Path) -> Path:
    return gguf(folder / "model.gguf", [text("deep") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 1000], [])


@case(69, "names the key 'tokens' twice")
def gguf_duplicate_key(folder: Path) -> Path:
    return gguf(folder / "model.gguf", [ALPHABET, ALPHABET], [])


@case(69, "left of the file")
def gguf_cut(folder: Path) -> Path:
    return write(folder / "model.gguf", b"GGUF\x03\x00")


@case(70, "gives 'w' 4,294,967,295 dimensions")
def gguf_dimensions(folder: Path) -> Path:
    return gguf(folder / "model.gguf", [], [tensor_entry("w", [3, 4], n_dims=2**32 - 1)], bytes(64))


@case(70, "gives 'w' the shape")
def gguf_shape(folder: Path) -> Path:
    return gguf(folder / "model.gguf", [], [tensor_entry("w", [2**63, 2**63])], bytes(64))


@case(70, "is cut off", "'w'")
def gguf_data_cut(folder: Path) -> Path:
    return gguf(folder / "model.gguf", [], [tensor_entry("w", [3, 4])], bytes(40))


# ONNX.


def onnx_model(path: Path, *, location: str = "", inline: bytes = b"", **entries: str) -> Path:
    """A model with one weight "w" of three floats, in the file or outside."""
    weight = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[3], raw_data=inline)
    if location:
        weight.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": location, **entries}.items():
            weight.external_data.add(key=key, value=value)
    value = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [3])
    node = onnx.helper.make_node("Identity", ["w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [], [value], [weight])
    return write(path, onnx.helper.make_model(graph).SerializeToString())


@case(40, "is an ONNX model: an exported artifact", "Load the PyTorch weights")
def sane_onnx(folder: Path) -> Path:
    return onnx_model(folder / "model.bin", inline=bytes(12))  # known without its name


@case(40, "is an ONNX model")
def sane_onnx_external(folder: Path) -> Path:
    write(folder / "w.data", bytes(24))
    return onnx_model(folder / "model.onnx", location="w.data", offset="12", length="12")


@case(71, "'w'", "outside its folder: '../secret'")
def onnx_dotdot(folder: Path) -> Path:
    write(folder / "secret", bytes(12))
    (folder / "inner").mkdir()
    return onnx_model(folder / "inner" / "model.onnx", location="../secret")


@case(71, "'w'", "outside its folder")
def onnx_absolute(folder: Path) -> Path:
    return onnx_model(folder / "model.onnx", location=str(write(folder / "secret", bytes(12))))


@case(71, "'w'", "behind a symbolic link")
def onnx_symlink(folder: Path) -> Path:
    (folder / "w.data").symlink_to(write(folder / "secret", bytes(12)))
    return onnx_model(folder / "model.onnx", location="w.data")


@case(71, "'w'", "behind a symbolic link")
def onnx_linked_folder(folder: Path) -> Path:
    (folder / "deep").mkdir()
    write(folder / "deep" / "w.data", bytes(12))
    (folder / "link").symlink_to(folder / "deep")
    return onnx_model(folder / "model.onnx", location="link/w.data")


@case(71, "'w'", "hard link")
def onnx_hard_link(folder: Path) -> Path:
    (folder / "w.data").hardlink_to(write(folder / "secret", bytes(12)))
    return onnx_model(folder / "model.onnx", location="w.data")


@case(72, "'w' 8 bytes", "need 12")
def onnx_short(folder: Path) -> Path:
    write(folder / "w.data", bytes(100))
    return onnx_model(folder / "model.onnx", location="w.data", offset="0", length="8")


@case(72, "'w' 8 bytes", "need 12")
def onnx_short_file(folder: Path) -> Path:
    write(folder / "w.data", bytes(8))
    return onnx_model(folder / "model.onnx", location="w.data")


@case(72, "puts 'w' past the end: 12 bytes at 96")
def onnx_past_end(folder: Path) -> Path:
    write(folder / "w.data", bytes(100))
    return onnx_model(folder / "model.onnx", location="w.data", offset="96", length="12")


@case(72, "the offset or length '-4'")
def onnx_negative(folder: Path) -> Path:
    write(folder / "w.data", bytes(100))
    return onnx_model(folder / "model.onnx", location="w.data", offset="-4", length="12")


@case(72, "misses the data file 'w.data'")
def onnx_missing(folder: Path) -> Path:
    return onnx_model(folder / "model.onnx", location="w.data")


@case(72, "gives 'w' 8 bytes of data, its shape needs 12")
def onnx_short_inline(folder: Path) -> Path:
    return onnx_model(folder / "model.onnx", inline=bytes(8))


@case(72, "damaged, cut off or too large")
def onnx_cut(folder: Path) -> Path:
    path = onnx_model(folder / "model.onnx", inline=bytes(12))
    os.truncate(path, path.stat().st_size - 5)
    return path


# Other formats.


@case(41, "HDF5")
def hdf5(folder: Path) -> Path:
    return write(folder / "model.h5", b"\x89HDF\r\n\x1a\n" + bytes(100))


@case(41, "unknown format")
def noise(folder: Path) -> Path:
    return write(folder / "model.bin", random.Random(0).randbytes(1000))


@case(41, "zip archive without weights")
def plain_zip(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "model.bin", "w") as archive:
        archive.writestr("arr.npy", b"x")
    return folder / "model.bin"


@case(42, "not tensors by name", "state_dict()")
def no_names(folder: Path) -> Path:
    return saved(folder / "model.bin", [torch.ones(2)])


@case(42, "entries that are not tensors: 'epoch'")
def mixed(folder: Path) -> Path:
    return saved(folder / "model.bin", {"w": torch.ones(2), "epoch": 3})


def check_error(error: LayerwiseError, folder: Path, expected: Case, path: Path) -> None:
    assert error.code == f"LW-M{expected.number}", str(error)
    assert error.exit_code == 3
    assert str(path.parent) in error.place
    line = str(error)
    for words in expected.says:
        assert words in line, line
    assert error.remedy
    assert line.isprintable()  # one line, nothing for a terminal to interpret
    assert len(line) < 3000
    assert not (folder / "RAN").exists(), "the payload ran"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("expected", CASES, ids=lambda c: c.name)
def test_bad_file(tmp_path: Path, expected: Case) -> None:
    path = expected.build(tmp_path)
    memory, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(expected.error) as caught:
        read_weights(path)
    assert time.monotonic() - begin < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < GROWTH, "allocated for a claim"
    check_error(caught.value, tmp_path, expected, path)
    with pytest.raises(expected.error) as streamed:
        list(stream_weights(path))
    assert streamed.value.code == caught.value.code


def test_the_payload_would_run(tmp_path: Path) -> None:
    """The marker works: whoever unpickles these files runs them."""
    for build in (raw_pickle, pickle_protocol_4, text_pickle, pickle_renamed):
        pickle.loads(build(tmp_path).read_bytes())
        assert (tmp_path / "RAN").exists()
        (tmp_path / "RAN").unlink()
    torch.load(pickle_in_zip(tmp_path), weights_only=False)
    assert (tmp_path / "RAN").exists()


def test_the_libraries_accept_some_of_them(tmp_path: Path) -> None:
    """Why our own checks are needed; when a library learns to refuse one of these, the check may go."""
    assert set(load_file(duplicate_tensor(tmp_path))) == {"a"}
    assert torch.load(giant_view(tmp_path), weights_only=True)["first.weight"].shape == (2**40,)
    assert load_file(nan_safetensors(tmp_path))["last.bias"].isnan().any()


def test_every_case_number_is_built() -> None:
    here = {each.number for each in CASES} | {55, 56, 57, 58, 59}  # those five below
    assert here >= set(range(43, 73))


# Files that are sane but do not fit.


class Net(torch.nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(4, 3)
        self.head = torch.nn.Linear(3, 4, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def fitted(folder: Path, tensors: dict[str, torch.Tensor], module: torch.nn.Module) -> tuple[LayerwiseError, Path]:
    path = folder / "model.safetensors"
    save_file(tensors, path)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ModelFormatError) as caught:
        load_into(module, read_weights(path), source=str(path))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items()), "half loaded"
    return caught.value, path


FIT: dict[int, tuple[dict[str, torch.Tensor], tuple[str, ...]]] = {
    55: ({"embed.weight": torch.ones(4, 3)}, ("missing 1 tensors: 'head.weight'",)),
    56: (
        {"embed.weight": torch.ones(4, 3), "head.weight": torch.ones(4, 3), "extra.bias": torch.ones(1)},
        ("1 unexpected tensors: 'extra.bias'",),
    ),
    57: (
        {"embed.weight": torch.ones(4, 3), "head.weight": torch.ones(5, 3)},
        ("'head.weight' is (5, 3), the module has (4, 3)",),
    ),
}


@pytest.mark.parametrize("number", FIT)
def test_file_that_does_not_fit(tmp_path: Path, number: int) -> None:
    tensors, says = FIT[number]
    error, path = fitted(tmp_path, tensors, Net())
    check_error(error, tmp_path, Case(number, empty, says), path)


def test_all_kinds_of_misfit_are_named_at_once(tmp_path: Path) -> None:
    tensors = {f"extra.{i}": torch.ones(1) for i in range(14)} | {"head.weight": torch.ones(5, 3)}
    error, _ = fitted(tmp_path, tensors, Net())
    assert error.code == "LW-M55"
    for words in (
        "missing 1 tensors: 'embed.weight'",
        "14 unexpected tensors",
        " and 4 more",
        "'head.weight' is (5, 3)",
    ):
        assert words in str(error)


def test_58_a_wrappers_prefix_is_stripped_and_said(tmp_path: Path) -> None:
    wrapped = {f"module._orig_mod.{name}": value for name, value in Net().state_dict().items()}
    save_file(wrapped, tmp_path / "model.safetensors")
    module = Net()
    notes = load_into(module, read_weights(tmp_path / "model.safetensors"))
    assert notes == ["stripped the prefix 'module.' from 2 names", "stripped the prefix '_orig_mod.' from 2 names"]
    assert torch.equal(module.head.weight, wrapped["module._orig_mod.head.weight"])


def test_58_a_prefix_that_the_module_has_stays(tmp_path: Path) -> None:
    module = torch.nn.DataParallel(Net())
    assert load_into(module, module.state_dict()) == []


@pytest.mark.parametrize("given", ["embed.weight", "head.weight"])
def test_59_tied_weights_stay_tied(tmp_path: Path, given: str) -> None:
    save_file({given: torch.full((4, 3), 2.0)}, tmp_path / "model.safetensors")
    module = Net(tied=True)
    [note] = load_into(module, read_weights(tmp_path / "model.safetensors"))
    assert note == f"kept 'embed.weight', 'head.weight' tied (the file has only '{given}')"
    assert module.head.weight is module.embed.weight
    assert torch.equal(module.head.weight.detach(), torch.full((4, 3), 2.0))


def test_59_two_values_for_one_tied_tensor(tmp_path: Path) -> None:
    tensors = {"embed.weight": torch.ones(4, 3), "head.weight": torch.zeros(4, 3)}
    error, path = fitted(tmp_path, tensors, Net(tied=True))
    check_error(error, tmp_path, Case(59, empty, ("'embed.weight', 'head.weight'", "different values")), path)


# Any damage at all.


def damaged(content: bytes, tries: int, seed: int) -> Iterator[bytes]:
    chance = random.Random(seed)
    for number in range(tries):
        if number % 3 == 0:
            yield content[: chance.randrange(len(content))]
        else:
            changed = bytearray(content)
            for _ in range(number % 3 * 2):
                changed[chance.randrange(min(len(changed), 700))] = chance.randrange(256)
            yield bytes(changed)


def safetensors_file(folder: Path) -> Path:
    save_file(small(), folder / "model.safetensors")
    return folder / "model.safetensors"


def torch_file(folder: Path) -> Path:
    return saved(folder / "model.bin", small())


def torch_file_without_checksums(folder: Path) -> Path:
    """Only the pickle, so that damage is not stopped by the archive's checksums."""
    return saved(folder / "model.bin", small(), legacy=True)


@pytest.mark.parametrize(
    ("build", "tries"),
    [(safetensors_file, 300), (torch_file, 150), (torch_file_without_checksums, 300), (sane_gguf, 300), (sane_onnx, 4)],
)
def test_random_damage_is_read_or_refused_in_words(tmp_path: Path, build: Builder, tries: int) -> None:
    path = build(tmp_path)
    refused: list[LayerwiseError] = []
    for content in damaged(path.read_bytes(), tries, seed=len(build.__name__)):
        path.write_bytes(content)
        try:
            read_weights(path)
        except LayerwiseError as error:
            refused.append(error)
    assert len(refused) > tries // 4, "the damage did not reach the reader"
    assert all(error.code.startswith("LW-M") and error.remedy for error in refused)
