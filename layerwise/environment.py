"""What a run ran on: Python, machine, package versions, threads. Plain data for ``environment.json``."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerwise.config import RunConfig

PACKAGES = (
    "layerwise", "torch", "numpy", "pandas", "safetensors", "timm", "transformers", "torchvision", "torchaudio", "torchao",
    "onnx", "onnxscript", "onnxruntime", "scikit-learn",
)  # fmt: skip
MATTERS = ("python", "machine", "cpu", "threads", "packages")  # what may change the last bits of a result


def environment(config: RunConfig) -> dict[str, Any]:
    """The software, the machine, the threads and the seed, without paths or names of users."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "device": config.device or "cpu",
        "seed": config.seed,
    }


def same_environment(saved: Path, here: dict[str, Any]) -> list[str]:
    """What differs from the environment in the file `saved` and may change results, in words."""
    try:
        then = json.loads(saved.read_text(encoding="utf-8"))
        return [f"{name} was {then[name]}, is {here[name]}" for name in MATTERS if then[name] != here[name]]
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{saved.name} is damaged"]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
