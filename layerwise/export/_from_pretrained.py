"""``python -m layerwise.export._from_pretrained FOLDER``: loads the folder by transformers alone and runs stored batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from layerwise.compacting import quiet
from layerwise.data import Batch
from layerwise.errors import ExportMismatch
from layerwise.model import UniversalModel
from layerwise.packing import pack, unpack
from layerwise.weights import save_weights

PATIENCE = 600  # seconds


def outputs_of(folder: Path, batches: Sequence[Batch]) -> list[Tensor]:
    """What a fresh process gets from the folder on `batches`. Raises `ExportMismatch` with its last words."""
    with tempfile.TemporaryDirectory(prefix="layerwise-parity-") as place:
        for number, batch in enumerate(batches):
            described, tensors = pack(batch)
            save_weights(Path(place) / f"{number}.safetensors", tensors)
            (Path(place) / f"{number}.json").write_text(json.dumps(described), encoding="utf-8")
        command = [sys.executable, "-m", "layerwise.export._from_pretrained", str(folder), place]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "HF_HUB_OFFLINE": "1"}
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
        if child.returncode:
            words = (child.stderr.strip().splitlines() or ["no word"])[-1]
            raise ExportMismatch(f"from_pretrained fails in a fresh process: {words}", place=str(folder), code="LW-V21")
        return [load_file(Path(place) / f"{number}.out")["output"] for number in range(len(batches))]


def main() -> None:
    """What the fresh process does."""
    import transformers

    folder, place = map(Path, sys.argv[1:])
    (name,) = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    with quiet():
        module: Any = getattr(transformers, name).from_pretrained(folder, local_files_only=True)
    model = UniversalModel(module.eval())
    for number in range(len(list(place.glob("*.json")))):
        tensors = {k: t.clone() for k, t in load_file(place / f"{number}.safetensors").items()}
        batch = unpack(json.loads((place / f"{number}.json").read_text(encoding="utf-8")), tensors)
        save_weights(place / f"{number}.out", {"output": model.predict(batch).contiguous()})


if __name__ == "__main__":
    main()
