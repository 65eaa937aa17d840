"""Weights are read as they were written, put where they belong, and refused when they are not numbers."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_file, save_model

from layerwise.errors import CorruptRun, DiskFull, ModelFormatError, NonFiniteWeights, UsageError
from layerwise.files import write_manifest
from layerwise.weights import check_finite, load_into, read_weights, save_weights, stream_weights
from layerwise.weights.pickle_scan import MAX_DEPTH, scan_pickles
from layerwise.weights.safetensors_file import ITEM_BYTES
from layerwise.weights.torch_file import DTYPES

DATA = Path(os.environ.get("LAYERWISE_DATA", Path(__file__).parents[2] / "shared" / "data"))


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 3)
        self.norm = torch.nn.BatchNorm1d(3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"a.weight": torch.randn(4, 3), "a.bias": torch.randn(4).half(), "count": torch.tensor(7), "flag": torch.tensor(True)}


# Reading.


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"state_dict": t, "epoch": 3}, lambda t: {"model": t, "step": 1}])
def test_torch_files(
    tmp_path: Path, tensors: dict[str, torch.Tensor], legacy: bool, wrap: Callable[[dict[str, torch.Tensor]], Any]
) -> None:
    torch.save(wrap(tensors), tmp_path / "m.bin", _use_new_zipfile_serialization=not legacy)
    assert equal(read_weights(tmp_path / "m.bin"), tensors)
    assert equal(dict(stream_weights(tmp_path / "m.bin")), tensors)


def test_slices_and_transposes_in_torch_files_are_no_giant_views(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    kept = {"whole": whole, "row": whole[1], "turned": whole.T, "empty": torch.empty(0, 3)}
    torch.save(kept, tmp_path / "m.bin")
    assert equal(read_weights(tmp_path / "m.bin"), kept)


def test_a_valid_sparse_tensor_is_read_and_loaded(tmp_path: Path) -> None:
    dense = torch.eye(3)
    torch.save({"weight": dense.to_sparse()}, tmp_path / "m.bin")
    module = torch.nn.Linear(3, 3, bias=False)
    load_into(module, read_weights(tmp_path / "m.bin"))
    assert torch.equal(module.weight.detach(), dense)


def test_every_dtype_goes_round(tmp_path: Path) -> None:
    every = {str(dtype): torch.ones(3).to(dtype) for dtype in DTYPES}
    save_weights(tmp_path / "m.safetensors", every)
    assert equal(read_weights(tmp_path / "m.safetensors"), every)
    torch.save(every, tmp_path / "m.bin")
    assert equal(read_weights(tmp_path / "m.bin"), every)
    assert len(ITEM_BYTES) == len(DTYPES)  # the two tables speak of the same dtypes


def test_the_name_of_the_file_does_not_matter(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_weights(tmp_path / "m.bin", tensors)
    assert equal(read_weights(tmp_path / "m.bin"), tensors)


def test_no_tensors_at_all(tmp_path: Path) -> None:
    save_weights(tmp_path / "m.safetensors", {})
    assert read_weights(tmp_path / "m.safetensors") == {}


def test_folder_with_an_index(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    shards = {"one.safetensors": ["a.weight", "flag"], "two.safetensors": ["a.bias", "count"]}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, tmp_path / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    assert equal(read_weights(tmp_path), tensors)
    assert equal(read_weights(index), tensors)
    assert equal(dict(stream_weights(tmp_path)), tensors)


@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors", "pytorch_model.bin", "net.pt"])
def test_folder_with_one_file(tmp_path: Path, tensors: dict[str, torch.Tensor], name: str) -> None:
    save_file(tensors, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    assert equal(read_weights(tmp_path), tensors)


def test_folder_with_several_files_and_no_index(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(ModelFormatError, match=r"LW-M60 .*'a\.safetensors', 'b\.safetensors'"):
        read_weights(tmp_path)


def test_a_folder_of_ours_is_verified_first(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_weights(tmp_path / "model.safetensors", tensors)
    write_manifest(tmp_path)
    assert equal(read_weights(tmp_path), tensors)
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-3] ^= 1  # loads without a word otherwise
    (tmp_path / "model.safetensors").write_bytes(content)
    read_weights(tmp_path / "model.safetensors")
    with pytest.raises(CorruptRun, match=r"LW-R11 .*changed model\.safetensors"):
        read_weights(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(CorruptRun, match="LW-R11"):
        read_weights(tmp_path)


def test_the_manifest_of_another_tool_is_let_be(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_weights(tmp_path / "model.safetensors", tensors)
    (tmp_path / "manifest.json").write_text('{"name": "web app"}')
    assert equal(read_weights(tmp_path), tensors)


def test_paths_that_hold_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"LW-C04 {tmp_path}/none: does not exist"):
        read_weights(tmp_path / "none")
    (tmp_path / "readme.md").touch()
    with pytest.raises(UsageError, match=r"LW-C05 .*holds no weights, only 'readme\.md'"):
        read_weights(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UsageError, match=r"LW-C05 .*is not a regular file"):
            read_weights(place)


def test_streaming_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Python's own memory and the tensors that are alive: of 32 MB never more than one tensor."""
    save_file({f"t{i}": torch.full((1 << 19,), float(i)) for i in range(16)}, tmp_path / "m.safetensors")
    tracemalloc.start()
    total, previous = 0.0, None
    for _, tensor in stream_weights(tmp_path / "m.safetensors"):
        assert previous is None or previous() is None, "the tensor before is still held"
        total += float(tensor[0])
        previous = weakref.ref(tensor)
        del tensor
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == sum(range(16))
    assert peak < 4 << 20


@pytest.mark.parametrize(
    "name", ["cifar10_resnets/resnet20.safetensors", "mlperf_tiny/resnet8_cifar10.safetensors", "stories260k"]
)
def test_real_checkpoints(name: str) -> None:
    if not (DATA / name).exists():
        pytest.skip(f"no test data {name}")
    read = read_weights(DATA / name)
    assert len(read) > 10
    assert equal(dict(stream_weights(DATA / name)), read)


# The pickle scan.


def test_scan_reads_storages_without_running_anything() -> None:
    class Writer(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, "7", "cpu", 3) if obj is Ellipsis else None

    for protocol in (2, 4, 5):
        buffer = io.BytesIO()
        Writer(buffer, protocol=protocol).dump({"x": [..., (1, 2.5, "s")], "y": {"deep": (os.system, b"b")}})
        scan = scan_pickles(buffer.getvalue())
        [(kind, storage, key, device, elements)] = scan.persistent
        assert (kind, storage.name.rpartition(".")[2], key, device, elements) == ("storage", "FloatStorage", "7", "cpu", 3)
        assert "posix.system" in scan.imports
        assert {"x", "y", "deep", "s"} <= scan.strings


def doubled(times: int) -> bytes:
    """A pickle of tuples of itself: (x, x) over and over, 2**times leaves in a few bytes."""
    return b"\x80\x02)" + b"2\x86" * times + b"."


def test_scan_refuses_tuples_without_end() -> None:
    assert scan_pickles(doubled(10)).imports == {}
    for bomb in (doubled(60), b"\x80\x02)" + b"\x85" * (MAX_DEPTH + 1) + b"."):
        with pytest.raises(ValueError, match="tuples within tuples without end"):
            scan_pickles(bomb)


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"\x80\x02\x86.", b"\x80\x02h\x05.", b"\x80\x02((\x86.", b"\x80\x02\xff"])
def test_scan_refuses_broken_pickles(content: bytes) -> None:
    with pytest.raises(ValueError):
        scan_pickles(content)


# Finite numbers.


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.running_mean", "2.bias"])
@pytest.mark.parametrize(("value", "text"), [(torch.nan, "(1 NaN, 0 Inf of"), (torch.inf, "(0 NaN, 1 Inf of")])
def test_one_bad_number_anywhere_is_found(name: str, value: float, text: str) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    check_finite(module)
    module.state_dict()[name].view(-1)[-1] = value
    for weights in (module, module.state_dict()):
        with pytest.raises(NonFiniteWeights) as caught:
            check_finite(weights, source="net.pt")
        assert caught.value.code == "LW-M04"
        assert caught.value.place == "net.pt"
        assert f"'{name}' {text}" in str(caught.value)
        assert "1 of 9 tensors" in str(caught.value)


def test_many_bad_tensors_are_counted() -> None:
    with pytest.raises(NonFiniteWeights, match="14 of 14 tensors") as caught:
        check_finite({f"t{i}": torch.tensor([torch.nan, torch.nan, -torch.inf, 0]) for i in range(14)})
    assert "'t9' (2 NaN, 1 Inf of 4) and 4 more tensors" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float64])
def test_nan_is_found_in_every_float(dtype: torch.dtype) -> None:
    with pytest.raises(NonFiniteWeights, match="1 NaN"):
        check_finite({"a": torch.tensor([1.0, torch.nan]).to(dtype)})


def test_what_is_no_fault_is_let_be() -> None:
    mask = torch.full((2, 4, 4), -torch.inf).triu(1)
    check_finite({"mask": mask, "count": torch.tensor(3), "empty": torch.empty(0), "meta": torch.empty(3, device="meta")})
    with pytest.raises(NonFiniteWeights):
        check_finite({"mask": mask.flip(-1)})
    with pytest.raises(NonFiniteWeights):
        check_finite({"sparse": torch.tensor([0.0, torch.nan]).to_sparse()})


# Into a module.


def test_load_into_without_strict_says_what_is_left(tensors: dict[str, torch.Tensor]) -> None:
    module = torch.nn.Linear(3, 4)
    before = module.bias.detach().clone()
    notes = load_into(module, {"weight": torch.ones(4, 3), "extra": torch.ones(1)}, strict=False)
    assert notes == ["missing 1 tensors: 'bias'", "1 unexpected tensors: 'extra'"]
    assert torch.equal(module.weight.detach(), torch.ones(4, 3))
    assert torch.equal(module.bias.detach(), before)
    with pytest.raises(ModelFormatError, match="LW-M57"):
        load_into(module, {"weight": torch.ones(4, 4)}, strict=False)


def test_load_into_says_that_it_converted() -> None:
    module = torch.nn.Linear(2, 1)
    notes = load_into(module, {"weight": torch.ones(1, 2).half(), "bias": torch.ones(1)})
    assert notes == ["converted 1 tensors, 'weight' from torch.float16 to torch.float32"]
    assert module.weight.dtype is torch.float32


def test_load_into_allows_absent_batch_counters() -> None:
    module = torch.nn.BatchNorm1d(2)
    given = {name: value for name, value in module.state_dict().items() if name != "num_batches_tracked"}
    assert load_into(module, given) == ["left 1 counters 'num_batches_tracked' as they are: the file has none"]


def test_load_into_keeps_flags_and_parameters() -> None:
    module = Tied().eval()
    module.norm.requires_grad_(False)
    parameters = dict(module.named_parameters())
    load_into(module, module.state_dict())
    assert dict(module.named_parameters()).keys() == parameters.keys()
    assert all(value is parameters[name] for name, value in module.named_parameters())
    assert not module.training
    assert not module.norm.weight.requires_grad


def test_load_into_a_module_without_memory() -> None:
    with torch.device("meta"):
        module = torch.nn.Linear(2, 2)
    with pytest.raises(UsageError, match="to_empty"):
        load_into(module, {"weight": torch.ones(2, 2), "bias": torch.ones(2)})


def test_load_into_a_lazy_module() -> None:
    module = torch.nn.LazyLinear(2)
    load_into(module, {"weight": torch.ones(2, 3), "bias": torch.ones(2)})
    assert module.weight.shape == (2, 3)


# Saving.


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    module = Tied()
    save_weights(tmp_path / "m.safetensors", module)
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert "head.weight" not in file.keys()  # noqa: SIM118 the file is no mapping
        assert file.metadata() == {"format": "pt", "head.weight": "embed.weight"}
    read = read_weights(tmp_path / "m.safetensors")
    assert equal(read, dict(module.state_dict()))
    assert read["head.weight"] is read["embed.weight"]
    again = Tied()
    assert load_into(again, read) == ["kept 'embed.weight', 'head.weight' tied"]
    assert again.head.weight is again.embed.weight
    assert torch.equal(again.head.weight, module.head.weight)


def test_ties_agree_with_safetensors_own_convention(tmp_path: Path) -> None:
    module, again = Tied(), Tied()
    save_weights(tmp_path / "ours.safetensors", module)
    assert load_model(again, tmp_path / "ours.safetensors") == (set(), [])
    assert torch.equal(again.head.weight, module.head.weight)
    save_model(module, str(tmp_path / "theirs.safetensors"))
    assert equal(read_weights(tmp_path / "theirs.safetensors"), dict(module.state_dict()))


def test_views_are_saved_as_tensors_of_their_own(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    views = {"whole": whole, "row": whole[1], "turned": whole.T, "wide": torch.ones(1).expand(3), "none": torch.empty(0)}
    save_weights(tmp_path / "m.safetensors", views)
    assert equal(read_weights(tmp_path / "m.safetensors"), views)


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.ones(2, dtype=torch.complex64), "LW-M54 .*'w': torch.complex64"),
        (torch.eye(2).to_sparse(), "LW-M54 .*'w': torch.float32, torch.sparse_coo"),
        (torch.empty(2, device="meta"), "LW-M42 .*'w': it has no data"),
        ("text", "LW-M42 .*'w': a str"),
    ],
)
def test_what_cannot_be_saved(tmp_path: Path, tensor: Any, text: str) -> None:
    with pytest.raises(ModelFormatError, match=text):
        save_weights(tmp_path / "m.safetensors", {"w": tensor})
    assert os.listdir(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_keeps_the_old_weights(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small_disk / "m.safetensors"
    save_weights(path, {"a": torch.ones(3)})
    big = {"a": torch.ones(1 << 20)}
    with pytest.raises(DiskFull, match=r"needs 4,194,304 bytes") as early:
        save_weights(path, big)
    assert early.value.__cause__ is None  # refused before anything was written
    monkeypatch.setattr("layerwise.files.atomic.need_space", lambda path, size: None)
    with pytest.raises(DiskFull, match=r"LW-R02 .*m\.safetensors: The disk is full: needs 4,194,304 bytes") as late:
        save_weights(path, big)
    assert getattr(late.value.__cause__, "errno", 0) == 28  # from the kernel, through the library's text
    assert torch.equal(read_weights(path)["a"], torch.ones(3))
    assert os.listdir(small_disk) == ["m.safetensors"]


def test_saving_leaves_the_weights_alone(tmp_path: Path) -> None:
    module = Tied()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    save_weights(tmp_path / "m.safetensors", module)
    assert equal(dict(module.state_dict()), before)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_saved_file_is_as_readable_as_any_other_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save_weights(tmp_path / "w.safetensors", {"a": torch.zeros(2)})
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
