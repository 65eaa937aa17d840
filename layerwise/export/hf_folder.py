"""A folder that transformers' ``from_pretrained`` loads by itself: ``NAME.hf/``. Dropped layers are gone from it, and what was
cut alike in all layers is in its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

from layerwise.artifact import EXPORTERS, Exporter, Parity, Written
from layerwise.configuring import write_configured
from layerwise.data import Data
from layerwise.errors import ExportMismatch, UserModelError
from layerwise.export._from_pretrained import outputs_of
from layerwise.export._parity import BOUNDS
from layerwise.files import write_manifest
from layerwise.model import UniversalModel
from layerwise.proofs import relative_error

BATCHES = 2


@EXPORTERS.register("hf_folder")
@dataclass(frozen=True)
class HuggingFaceFolder(Exporter):
    """``config.json``, ``model.safetensors`` and what the adapter needs; built by transformers alone in a fresh process, and run.
    What the class itself cannot be told (factored, packed or differently cut layers) is refused with the reason.
    """

    suffix: ClassVar[str] = ".hf"
    format: ClassVar[str] = "hf_folder"

    def write(self, model: UniversalModel, path: Path, data: Data, calibration: Data) -> Written:
        path.mkdir()
        model.adapter.save(path)
        compact = write_configured(model, path)
        if isinstance(compact, str):
            raise UserModelError(
                f"from_pretrained cannot be given this model: {compact}.",
                place=model.name,
                remedy="Save it with layerwise.saved.save_model.",
                code="LW-U79",
            )
        write_manifest(path)
        import transformers  # there, since the model is made of it

        bound = BOUNDS[str(next(model.module.parameters()).dtype).removeprefix("torch.")]
        parity = self._parity(model, path, data, bound)
        notes = [f"{n}: the layers {', '.join(map(str, k))} are left, in this order" for n, k in compact.kept.items()]
        return Written(parity, f"transformers {transformers.__version__}", tuple(notes))

    def _parity(self, model: UniversalModel, path: Path, data: Data, bound: float) -> Parity:
        batches = [b.to(model.device) for b in islice(data, BATCHES)]
        plain = UniversalModel(model.module, adapter=model.adapter)  # no task: the other process knows of none
        pairs = list(zip(outputs_of(path, batches), [plain.predict(b).cpu() for b in batches], strict=True))
        relative = max(relative_error(found, wanted) for found, wanted in pairs)
        if not relative <= bound:
            raise ExportMismatch(
                f"what from_pretrained gives differs by {relative:.3g} of the largest output.", place=str(path), code="LW-V21"
            )
        absolute = max(float((found.double() - wanted.double()).abs().max()) for found, wanted in pairs)
        return Parity(absolute, relative, bound, sum(b.size for b in batches))
