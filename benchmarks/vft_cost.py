"""One VFT block beside one dense block: a decoding step, a whole prompt, what the cache holds, and peak memory."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import machine, paired
from torch import nn
from vft_dense import DenseBlock

from layerwise.native import AttentionOptions, BlockOptions, VFTBlock

WIDTH, HEADS = 256, 4
LENGTHS, RANKS = (512, 1024, 2048, 4096, 8192, 16384), (16, 32, 64, 128)
PROMPTS = (512, 1024, 2048, 4096)  # those that are timed in pairs: a prompt of 16k takes too long to take turns
STEPS, ROUNDS = 24, 7


def costs() -> dict[str, Any]:
    """`decode` and `prompt`: ratios of VFT's processor time to the dense block's, so below 1 VFT is the faster."""
    torch.manual_seed(0)
    other = DenseBlock(WIDTH, HEADS).eval()
    rows = []
    with torch.no_grad():
        for rank in RANKS:
            mine = VFTBlock(WIDTH, HEADS, rank).eval()
            nn.init.normal_(mine.compensator.u)
            rows += [decoding(mine, other, rank, length) for length in LENGTHS]
            rows += [prompt(mine, other, rank, length) for length in PROMPTS]
        turning = VFTBlock(WIDTH, HEADS, 64, BlockOptions(attention=AttentionOptions(rope_base=10_000.0))).eval()
        rotary = [decoding(turning, other, 64, length) for length in (512, 4096)]
    return {"machine": machine(), "width": WIDTH, "heads": HEADS, "rows": rows, "rotary": rotary}


def decoding(mine: nn.Module, other: nn.Module, rank: int, length: int) -> dict[str, Any]:
    """Steps of one token after `length` cached ones."""
    steps, held = [], []
    for block in (mine, other):
        cache = block.new_cache()  # type: ignore[operator]
        cache.capacity = length + (ROUNDS + 1) * STEPS + 1
        shape = (length, rank) if block is mine else (2 * HEADS, length, WIDTH // HEADS)
        cache.append(torch.randn(1, *shape))
        held.append(cache.floats * 4)
        steps.append(_stepping(block, cache))
    pair = paired(*steps, rounds=ROUNDS)
    return {
        "what": "decode", "rank": rank, "tokens": length, "pair": pair.to_dict(), "cache_bytes": held,
        "tokens_per_second": [round(STEPS / s, 1) for s in (pair.ours, pair.theirs)],
    }  # fmt: skip


def _stepping(block: nn.Module, cache: Any) -> Callable[[], None]:
    x = torch.randn(1, 1, WIDTH)

    def steps() -> None:
        for _ in range(STEPS):
            block(x, cache=cache, is_causal=True)

    return steps


def prompt(mine: nn.Module, other: nn.Module, rank: int, length: int) -> dict[str, Any]:
    """A whole sequence at once."""
    x = torch.randn(1, length, WIDTH)
    pair = paired(*[lambda block=block: block(x, is_causal=True) for block in (mine, other)], rounds=3)
    speeds = [round(length / s) for s in (pair.ours, pair.theirs)]
    return {"what": "prompt", "rank": rank, "tokens": length, "pair": pair.to_dict(), "tokens_per_second": speeds}


def memory() -> list[dict[str, Any]]:
    """Peak bytes of one call on a whole sequence, above what the process held before; Linux only. `rank` 0 is the dense block."""
    rows = []
    with torch.no_grad():
        for rank in (0, *RANKS):
            block = (VFTBlock(WIDTH, HEADS, rank) if rank else DenseBlock(WIDTH, HEADS)).eval()
            for length in LENGTHS:
                x = torch.randn(1, length, WIDTH)
                block(x[:, :64], is_causal=True)
                used = [peak(lambda: block(x, is_causal=True)) for _ in range(1 if length > PROMPTS[-1] else 3)]  # noqa: B023
                rows.append(
                    {"rank": rank, "tokens": length, "peak_bytes": max(b for b, _ in used), "seconds": min(s for _, s in used)}
                )
    return rows


def peak(call: Callable[[], Any]) -> tuple[int, float]:
    """Bytes, and processor seconds. What was freed is given back first, and the high-water mark set to what is resident."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, started = _status("VmRSS"), time.process_time()
    call()
    return max(0, _status("VmHWM") - before), round(time.process_time() - started, 3)


def _status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024
