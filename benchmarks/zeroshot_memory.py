"""Peak memory while a checkpoint of 8 GB is scored tensor by tensor: ``python benchmarks/zeroshot_memory.py [GB]``.

Writes a sharded folder of random weights (bfloat16, float16, float32) into a temporary folder, scores it in a fresh process with
all four zero-shot methods, removes it, and writes ``results/zeroshot_memory.json``. The bound, 1.3 times the largest tensor and
300 MB, is on what the process grows by after everything is imported; the absolute peak is told beside it, and what the process
holds before it begins (importing torch alone takes most of that, about half of it file pages that processes share).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from layerwise.config import RunConfig
from layerwise.environment import environment
from layerwise.files import write_atomic

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "zeroshot_memory.json"
TYPES = {"attn": torch.float32, "up": torch.bfloat16, "down": torch.float16}
SHAPES = {"attn": (256, 262_144), "up": (256, 65_536), "down": (65_536, 256)}  # 256, 32 and 32 MiB
CHILD = """
import json, re, sys, time
import layerwise as lw
from layerwise.engine import ZERO_SHOT

def now(what):  # VmRSS, its part RssFile (pages of the libraries' files), or its peak VmHWM, in bytes
    return int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

lw.analyze("weights:" + sys.argv[1], methods=ZERO_SHOT)  # what is loaded on first use
before, files, started = now("VmRSS"), now("RssFile"), time.perf_counter()
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here: that of the imports would hide ours
report = lw.analyze("weights:" + sys.argv[2], methods=ZERO_SHOT)
seconds = {name: round(report[name].seconds, 1) for name in report.methods}
print(json.dumps({"before": before, "before_file_pages": files, "peak": now("VmHWM"),
                  "seconds": round(time.perf_counter() - started, 1), "seconds_by_method": seconds,
                  "layers": len(report.layers)}))
"""


def checkpoint(folder: Path, size: int) -> int:
    """A sharded folder of about `size` bytes; gives the bytes of its largest tensor."""
    folder.mkdir()
    noise = torch.randn(256 * 262_144, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    placed: dict[str, str] = {}
    layer, written, largest = 0, 0, 0
    while written < size:
        shard = {f"layers.{layer}.{part}.weight": noise[: s[0] * s[1]].reshape(s).to(TYPES[part]) for part, s in SHAPES.items()}
        shard[f"layers.{layer}.norm.weight"] = torch.ones(256)
        name = f"model-{layer:05d}.safetensors"
        save_file(shard, folder / name)
        placed |= dict.fromkeys(shard, name)
        written += sum(tensor.nbytes for tensor in shard.values())
        largest = max(largest, *(tensor.nbytes for tensor in shard.values()))
        layer += 1
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return largest


def main() -> int:
    """0 when the growth is within the bound."""
    size = int(float(sys.argv[1]) * 1e9) if len(sys.argv) > 1 else 8_000_000_000
    with tempfile.TemporaryDirectory() as temporary:
        if shutil.disk_usage(temporary).free < 1.2 * size:
            raise SystemExit(f"{temporary} has less free space than {1.2 * size:,.0f} bytes")
        small, big = Path(temporary) / "small", Path(temporary) / "big"
        small.mkdir()
        save_file({f"h.{i}.{w}.weight": torch.randn(64, 96) for i in range(2) for w in "ab"}, small / "model.safetensors")
        largest = checkpoint(big, size)
        total = sum(file.stat().st_size for file in big.iterdir())
        command = [sys.executable, "-c", CHILD, str(small), str(big)]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    bound = int(1.3 * largest + 300e6)
    result = {
        "date": time.strftime("%Y-%m-%d"), "device": "cpu", "checkpoint_bytes": total, "largest_tensor_bytes": largest,
        "growth_bytes": found["peak"] - found["before"], "bound_bytes": bound, "within": found["peak"] - found["before"] <= bound,
        "absolute_peak_bytes": found["peak"], "absolute_within": found["peak"] <= bound, **found,
        "environment": environment(RunConfig()),
    }  # fmt: skip
    write_atomic(RESULTS, json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "environment"}, indent=1))
    return 0 if result["within"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
