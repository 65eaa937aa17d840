"""torch.save files: ``weights_only=True`` with no way around it, and the checks that it leaves out.

All versions accept views of 2**40 elements over four bytes, and some believe the length that a pickle claims for a storage and
read past its record. So the archive and its pickle are checked first, and every tensor after.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from layerwise.errors import ModelFormatError
from layerwise.weights.pickle_scan import Imported, Scan, scan_pickles
from layerwise.weights.problems import AGAIN, RESAVE, bad, listed, short

MAX_PICKLE = 32 << 20  # bytes; the names and shapes of 200,000 tensors
_FLAGS = 0x808  # what torch sets: sizes after the data, names in UTF-8
_NESTED = ("state_dict", "model_state_dict", "model", "module", "ema_state_dict")
DTYPES = {
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
}  # fmt: skip
_STORAGE_BYTES = {
    **dict.fromkeys(["UntypedStorage", "ByteStorage", "CharStorage", "BoolStorage"], 1),
    **dict.fromkeys(["QInt8Storage", "QUInt8Storage", "QUInt4x2Storage", "QUInt2x4Storage"], 1),
    **dict.fromkeys(["HalfStorage", "BFloat16Storage", "ShortStorage"], 2),
    **dict.fromkeys(["FloatStorage", "IntStorage", "QInt32Storage"], 4),
    **dict.fromkeys(["DoubleStorage", "LongStorage", "ComplexFloatStorage"], 8),
    "ComplexDoubleStorage": 16,
}


def read_torch_zip(path: Path) -> dict[str, torch.Tensor]:
    """The named tensors of a file of ``torch.save``. Raises `ModelFormatError`."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise bad(48, path, "is a TorchScript program, not weights.", _trusted("torch.jit.load(path).state_dict()"))
            records = _checked_records(path, archive)
            prefix = next((name[: -len("data.pkl")] for name in records if name.endswith("/data.pkl")), "")
            if not prefix:
                raise bad(41, path, f"is a zip archive without weights of torch.save: {listed(records)}.", RESAVE)
            if records[f"{prefix}data.pkl"] > MAX_PICKLE:
                raise bad(68, path, f"has a table of tensors of more than {MAX_PICKLE:,} bytes.", "Save it in shards.")
            data = archive.read(f"{prefix}data.pkl")
    except (zipfile.BadZipFile, EOFError, zlib.error, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        # Python's zipfile reads the table at the end of the file; without it the file was cut off.
        raise bad(46, path, f"is a damaged zip archive, probably cut off: {error}.", AGAIN) from error
    scan = _scan(path, data, 1)
    _check_storages(path, scan, {name.removeprefix(f"{prefix}data/"): size for name, size in records.items()})
    return _load(path, scan)


def read_torch_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The named tensors of a file in torch's format before 1.6: five pickles, then the storages. Raises `ModelFormatError`."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        scan = _scan(path, handle.read(MAX_PICKLE), 5)
    if any(isinstance(claim, tuple) and claim[:1] == ("module",) for claim in scan.persistent):
        raise _refused(path, scan, ValueError("it holds source code of modules"))
    sizes = dict(_storage(path, claim) for claim in scan.persistent)
    if sum(sizes.values()) > size:
        what = f"claims {sum(sizes.values()):,} bytes of storage but has {size:,} bytes in all."
        raise bad(52, path, what, AGAIN)
    return _load(path, scan)


def _checked_records(path: Path, archive: zipfile.ZipFile) -> dict[str, int]:
    """The records and their sizes in bytes, all of them plain, named once, and with the right checksum."""
    records: dict[str, int] = {}
    for info in archive.infolist():
        odd = info.flag_bits & ~_FLAGS or info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size
        if odd or info.filename in records:
            what = f"has a record {listed([info.filename])} that torch.save does not write (compressed, encrypted or twice)."
            raise bad(50, path, what, AGAIN)
        records[info.filename] = info.file_size
    try:
        broken = archive.testzip()
    except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError, ValueError) as error:
        raise bad(50, path, f"is a damaged zip archive: {error}.", AGAIN) from error
    if broken is not None:
        raise bad(50, path, f"is damaged: the checksum of its record {listed([broken])} is wrong.", AGAIN)
    return records


def _scan(path: Path, data: bytes, most: int) -> Scan:
    try:
        return scan_pickles(data, most)
    except ValueError as error:
        raise bad(46, path, f"is damaged or cut off: {short(str(error))}.", AGAIN) from error


def _check_storages(path: Path, scan: Scan, records: Mapping[str, int]) -> None:
    for claim in scan.persistent:
        key, size = _storage(path, claim)
        if records.get(key) != size:
            what = f"claims {size:,} bytes for the storage {listed([key])}, which has {records.get(key, 0):,}."
            raise bad(52, path, what, RESAVE)


def _storage(path: Path, claim: Any) -> tuple[str, int]:
    """Key and claimed size in bytes of a storage, from its persistent id ("storage", class, key, device, elements, …)."""
    match claim:
        case ("storage", Imported(name), str(key), str(), int(elements), *_) if elements >= 0:
            size = _STORAGE_BYTES.get(name.rpartition(".")[2])
            if size is not None:
                return key, elements * size
    raise bad(46, path, "names a storage in a way torch.save does not.", AGAIN)


def _load(path: Path, scan: Scan) -> dict[str, torch.Tensor]:
    try:
        # Its warnings speak of storages and protocols, which are no affair of the user's.
        with warnings.catch_warnings(), torch.sparse.check_sparse_tensor_invariants():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(path, scan, error) from error
    except Exception as error:  # a hostile pickle makes torch raise nearly anything
        raise _broken(path, scan, error) from error
    return _named_tensors(path, content)


def _refused(path: Path, scan: Scan, error: Exception) -> ModelFormatError:
    imports = listed(name for name in scan.imports if not name.startswith(("torch._utils._rebuild", "collections.")))
    if {"_parameters", "_modules"} <= scan.strings:
        what = f"is a whole module, not weights: loading it would run code ({imports})."
        return bad(48, path, what, _trusted("torch.load(path, weights_only=False).state_dict()"))
    if scan.imports:
        what = f"is a pickle that would run code when loaded; nothing was run. It asks for {imports}."
        return bad(47, path, what, f"Do not load it unless you trust where it comes from. {RESAVE}")
    return bad(46, path, f"is damaged: {short(str(error))}", AGAIN)


def _trusted(weights: str) -> str:
    return (
        f"In an environment that you trust: torch.save({weights}, 'weights.pt'), "
        f"or safetensors.torch.save_file({weights}, 'model.safetensors')."
    )


def _broken(path: Path, scan: Scan, error: Exception) -> ModelFormatError:
    reason = short(str(error).splitlines()[0] if str(error) else type(error).__name__)
    if any("sparse" in name for name in scan.imports):
        return bad(51, path, f"holds a sparse tensor whose indices do not fit: {reason}.", "Save it dense: tensor.to_dense().")
    if "out of bounds for storage" in reason or "allocate" in reason or "memory" in reason:
        return bad(52, path, f"holds a tensor that is larger than its data: {reason}.", RESAVE)
    return bad(46, path, f"is damaged or cut off: {reason}.", AGAIN)


def _named_tensors(path: Path, content: Any) -> dict[str, torch.Tensor]:
    """The table of tensors, which a training checkpoint keeps under a name of its own."""
    if isinstance(content, dict):
        for name in _NESTED:
            if isinstance(content.get(name), dict):
                content = content[name]
                break
    if not isinstance(content, dict) or not content:
        raise bad(42, path, f"holds a {type(content).__name__}, not tensors by name.", "Save model.state_dict().")
    others = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor) or not isinstance(name, str)]
    if others:
        raise bad(42, path, f"holds entries that are not tensors: {listed(others)}.", "Save model.state_dict() alone.")
    for name, tensor in content.items():
        _check_tensor(path, name, tensor)
    return dict(content)


def _check_tensor(path: Path, name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in DTYPES:
        remedy = "Convert it (quantised: .dequantize(), complex: torch.view_as_real) and save it again."
        raise bad(54, path, f"holds {listed([name])} as {tensor.dtype}, which is not read.", remedy)
    if tensor.device.type == "meta":
        raise bad(52, path, f"holds {listed([name])} without any data (device meta).", "Save a model that has its weights.")
    if tensor.layout is not torch.strided:
        return  # its invariants were checked while loading
    size, have = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if size > have:
        what = f"holds {listed([name])} of shape {tuple(tensor.shape)}: {size:,} bytes as a view of {have:,}."
        raise bad(52, path, what, "Save tensor.contiguous() if that size is meant.")
