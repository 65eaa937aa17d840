"""Run as a script, ``python -I onnx_child.py MODEL MEMORY``: what an ONNX file says about its tensors' data, as JSON.

A child with limited memory (bytes) reads the foreign file, so that the worst one ends only this process. It follows no path
of the file: external data is described, not opened. Imports nothing of layerwise: isolated, it need not be on the path.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Iterator
from typing import Any

BITS = {
    "FLOAT": 32, "UINT8": 8, "INT8": 8, "UINT16": 16, "INT16": 16, "INT32": 32, "INT64": 64, "BOOL": 8, "FLOAT16": 16,
    "DOUBLE": 64, "UINT32": 32, "UINT64": 64, "COMPLEX64": 64, "COMPLEX128": 128, "BFLOAT16": 16,
    "FLOAT8E4M3FN": 8, "FLOAT8E4M3FNUZ": 8, "FLOAT8E5M2": 8, "FLOAT8E5M2FNUZ": 8, "FLOAT8E8M0": 8,
    "UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2,
}  # fmt: skip


def tensors(message: Any) -> Iterator[Any]:
    """Every TensorProto below `message`: initializers, attributes, subgraphs, functions, sparse values."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        repeated = hasattr(value, "__len__") and not hasattr(value, "DESCRIPTOR")
        for part in value if repeated else [value]:
            yield from tensors(part)


def describe(tensor: Any, names: Any) -> dict[str, Any]:
    """Name, bytes that shape and type need (-1 for a negative size, None where unknown), bytes inside, external entries."""
    bits = BITS.get(names.get(tensor.data_type, ""))
    elements = -1 if any(size < 0 for size in tensor.dims) else math.prod(tensor.dims)
    need = None if bits is None else elements if elements < 0 else (elements * bits + 7) // 8
    typed = any(len(getattr(tensor, f"{kind}_data")) for kind in ("float", "int32", "string", "int64", "double", "uint64"))
    external = [[entry.key, entry.value] for entry in tensor.external_data]
    inside = None if typed else len(tensor.raw_data)
    is_external = tensor.data_location == 1
    return {"name": tensor.name, "need": need, "inside": inside, "external": external if is_external else None}


def main() -> None:
    """Describe the tensors whose data is outside the file or does not fit their shape; all others are in order."""
    limit = int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    import onnx  # under the limit

    model = onnx.load(sys.argv[1], load_external_data=False)
    names = {number: name for name, number in onnx.TensorProto.DataType.items()}
    found = [describe(tensor, names) for tensor in tensors(model)]
    odd = [d for d in found if d["external"] is not None or d["need"] == -1 or d["inside"] not in (None, d["need"])]
    graph = bool(model.graph.node or model.graph.initializer or model.functions)
    json.dump({"graph": graph, "tensors": odd}, sys.stdout)


if __name__ == "__main__":
    main()
