"""What structured pruning without any effort does to a model: is it smaller, is the cut right, can it be built again?

`cut` prunes and saves; `rebuilt` runs in another process, which knows the class, the folder and a batch, and compares outputs.
"""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from layerwise.benchmark.architectures.enlivened import enliven_
from layerwise.benchmark.architectures.made import NotBuilt, brief
from layerwise.benchmark.catalogue import GROUPS, without_places
from layerwise.data import Data
from layerwise.errors import LayerwiseError
from layerwise.measure import costs
from layerwise.method import METHODS, CompressionMethod, apply_plan, step_of, untreated
from layerwise.model import UniversalModel
from layerwise.packing import pack, unpack
from layerwise.plan import CompressionPlan
from layerwise.proofs import BOUND, judged, relative_error
from layerwise.result import Proof
from layerwise.saved import load_saved, save_model
from layerwise.supplies import Supplies
from layerwise.tensors import parameter_count
from layerwise.weights import save_weights

METHOD = "structured_pruning"


def cut(group: str, name: str, folder: Path, ratio: float = 0.25) -> dict[str, Any]:
    """The record of one model: parameters before and after, the error of the masked equivalence, or why there is none.

    The pruned model is saved in ``folder/model``, a batch and its outputs beside it.
    """
    started = time.monotonic()
    record: dict[str, Any] = {"group": group, "name": name, "built": True, "ratio": ratio}
    try:
        record |= _cut(group, name, folder, METHODS[METHOD](ratio=ratio))  # type: ignore[call-arg]  # its settings are its own
    except NotBuilt as error:
        record |= {"built": False, "error": error.what}
    except LayerwiseError as error:
        record["error"] = str(error)
    except Exception as error:  # one model must not stop the run
        record["error"] = brief(error)
    gc.collect()
    return without_places(record) | {"seconds": round(time.monotonic() - started, 1)}


def _cut(group: str, name: str, folder: Path, method: CompressionMethod) -> dict[str, Any]:
    made = GROUPS[group].make(name)
    enliven_(made.module, made.example)
    model = UniversalModel(made.module, example=made.example, name=name)
    layers = [layer.name for layer in model.layers]
    refused = untreated(method, model, layers)
    treated = [layer for layer in layers if layer not in refused]
    found: dict[str, Any] = {"layers": len(layers), "treated": len(treated), "refused": dict(list(refused.items())[:3])}
    if not treated:
        return found | {"error": f"no layer can be treated: {next(iter(refused.values()), 'there is none')}"}
    proofs = list[Proof]()
    applied = apply_plan(
        model,
        CompressionPlan((step_of(method, treated),)),
        Supplies(calibration=Data.of([made.example])),
        watch=lambda before, after, step: proofs.append(judged(before, after, step, [made.example])),
    )
    (proof,) = proofs
    _leave(applied.model, folder)
    return found | {
        "parameters": [parameter_count(model.module), parameter_count(applied.model.module)],
        "macs": [int(costs(m)["macs"]) for m in (model, applied.model)],
        "equivalence": proof.measured,
        "equivalent": proof.passed is True,
        "in_double": "float64" in proof.detail,
        "said": "" if proof.passed else f"{proof.detail} {proof.layer}".strip(),
        "plain": (folder / "model" / "config.json").exists(),
    }


def _leave(model: UniversalModel, folder: Path) -> None:
    save_model(model, folder / "model", force=True)
    described, tensors = pack(model.example)
    save_weights(folder / "batch.safetensors", tensors | {"expected": model.predict(model.example).contiguous()})
    (folder / "batch.json").write_text(json.dumps(described), encoding="utf-8")


def rebuilt(group: str, name: str, folder: Path) -> dict[str, Any]:
    """Whether this process, which never saw the model, gives its outputs: by our loader and, where the folder is a plain one of
    transformers, by `from_pretrained`. ``reload`` and ``from_pretrained`` are relative errors; a failure is in ``error``.
    """
    found: dict[str, Any] = {}
    try:
        tensors = load_file(folder / "batch.safetensors")
        expected = tensors.pop("expected")
        batch = unpack(json.loads((folder / "batch.json").read_text(encoding="utf-8")), tensors)
        module = GROUPS[group].make(name).module
        again = load_saved(folder / "model", module=module)
        found["reload"] = relative_error(again.predict(batch), expected)
        if (folder / "model" / "config.json").exists():
            alone = type(module).from_pretrained(folder / "model").eval()  # type: ignore[attr-defined]  # config.json: transformers'
            found["from_pretrained"] = relative_error(UniversalModel(alone, example=batch).predict(batch), expected)
    except Exception as error:  # one model must not stop the run
        found["error"] = str(error) if isinstance(error, LayerwiseError) else brief(error)
    gc.collect()
    return without_places(found)


def works(record: dict[str, Any]) -> bool:
    """Smaller, equivalent and rebuilt to the same outputs by every way that is offered."""
    return not why_not(record)


def why_not(record: dict[str, Any]) -> str:
    """The first thing that fails, in words; '' if nothing does."""
    if record.get("error"):
        return record["error"]
    before, after = record["parameters"]
    if after >= before:
        return f"did not shrink: {before:,} parameters before, {after:,} after"
    if not record["equivalent"]:
        return f"not equivalent: {record['said']}"
    for way in ("reload", "from_pretrained"):
        if not record.get(way, 0.0) <= BOUND:
            return f"{way}: the outputs differ by {record[way]:.2g} of the largest"
    return ""


__all__ = ["METHOD", "cut", "rebuilt", "why_not", "works"]
