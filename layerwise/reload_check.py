"""``python -m layerwise.reload_check FOLDER``: loads a saved model in a process that knows nothing else, and compares outputs.

The parent leaves two files beside the model folder: ``batch.safetensors`` (a batch and the outputs it should give) and
``batch.json`` (the batch's form, the device, the number of threads: sums are rounded in another order with other threads).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from layerwise.data import Batch
from layerwise.errors import LayerwiseError, ProofFailed
from layerwise.model import UniversalModel
from layerwise.packing import pack, unpack
from layerwise.saved import load_saved
from layerwise.weights import save_weights

PATIENCE = 600  # seconds; a model that takes longer to build than to compress is stuck
EXPECTED = "expected"


@dataclass(frozen=True)
class Reload:
    """Whether outputs are equal bit for bit, else the largest absolute difference."""

    equal: bool
    difference: float
    detail: str

    @classmethod
    def of(cls, found: Tensor, wanted: Tensor, detail: str) -> Reload:
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            return cls(False, float("inf"), f"{detail}; {tuple(found.shape)} {found.dtype} came back")
        same = torch.equal(found, wanted)
        apart = 0.0 if same else float((found.double() - wanted.double()).abs().max())
        words = "equal bit for bit" if same else f"the outputs differ by up to {apart:.3g}"
        return cls(same, apart, f"{words}, {detail}")


def reload_in_fresh_process(folder: Path, model: UniversalModel, batch: Batch) -> Reload:
    """Starts this module on `folder`, which lies in a folder of its own. Raises `ProofFailed` with the child's words."""
    described, tensors = pack(batch)
    wanted = model.predict(unpack(described, tensors)).cpu()
    save_weights(folder.parent / "batch.safetensors", tensors | {EXPECTED: wanted.contiguous()})
    about = {"batch": described, "device": str(model.device), "threads": torch.get_num_threads()}
    (folder.parent / "batch.json").write_text(json.dumps(about), encoding="utf-8")
    # the same places to import from: a source may name a module of the user's
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "layerwise.reload_check", str(folder)]
    try:
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired as error:
        raise ProofFailed(f"a fresh process did not build the model in {PATIENCE} s.") from error
    lines = child.stdout.strip().splitlines()
    if child.returncode != 0 or not lines:
        words = (lines or child.stderr.strip().splitlines() or [f"it ended with {child.returncode}"])[-1]
        raise ProofFailed(f"a fresh process failed: {words}")
    found = json.loads(lines[-1])
    return Reload(found["equal"], found["difference"], found["detail"])


def check(folder: Path) -> Reload:
    """What the fresh process does."""
    about = json.loads((folder.parent / "batch.json").read_text(encoding="utf-8"))
    torch.set_num_threads(about["threads"])
    # Not read_weights: a logit may well be -inf. Cloned, since matrix products round by how their operands lie in memory, and
    # what comes from a mapped file lies anywhere.
    tensors = {name: t.clone() for name, t in load_file(folder.parent / "batch.safetensors").items()}
    model = load_saved(folder)
    model.module.to(about["device"])
    output = model.predict(unpack(about["batch"], tensors)).cpu()
    return Reload.of(output, tensors[EXPECTED], "built from its source, plan and safetensors by a fresh process")


def main() -> int:
    try:
        found = check(Path(sys.argv[1]))
    except LayerwiseError as error:
        print(error)
        return error.exit_code
    print(json.dumps(vars(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
