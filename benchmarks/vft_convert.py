"""`convert_to_tva` on two pretrained models: parameters and quality by what is kept of each head."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from layerwise.benchmark.subjects import SUBJECTS, _encoder
from layerwise.data import Data
from layerwise.evaluation import Evaluation
from layerwise.loading import load_data
from layerwise.model import UniversalModel
from layerwise.native import convert_to_tva
from layerwise.task import Fidelity

KEPT = (1.0, 0.75, 0.5)  # of each head
ENERGIES = (0.99, 0.95)
SENTENCES = 64


def stories(folder: Path) -> tuple[UniversalModel, Data, Data]:
    """stories260K; fitted on text that it wrote itself, judged by the loss on five real stories."""
    parts = SUBJECTS["stories260k"].open()
    return parts.model, parts.calibration, parts.evaluation


def minilm(folder: Path) -> tuple[UniversalModel, Data, Data]:
    """MiniLM-L6; fitted on sentences of SST-2, judged by 1 − cosine to the original's embeddings of others."""
    model = _encoder()
    model.task = Fidelity(kind="cosine")
    table = pd.read_parquet(folder / "sst2" / "train.parquet").sample(2 * SENTENCES, random_state=0)
    texts = [{"text": text[:160]} for text in table["text"]]
    fitting, judging = (load_data(part, model, batch_size=16) for part in (texts[:SENTENCES], texts[SENTENCES:]))
    return model, fitting, judging


MODELS: Mapping[str, Callable[[Path], tuple[UniversalModel, Data, Data]]] = {"stories260k": stories, "MiniLM": minilm}


def conversions(name: str, folder: Path) -> dict[str, Any]:
    """Attention alone, and with the feed-forward; fitted on some rows, judged on others."""
    torch.manual_seed(0)
    model, fitting, judging = MODELS[name](folder)
    rows = [{"kept": "the original", **_judged(model, model, judging)}]
    whole = convert_to_tva(model, fitting.head(2), 10**6, feed_forward=False)
    size = max(whole.heads.values())
    wanted = [(f"{share:.0%} of each head", {"rank": round(size * share)}) for share in KEPT]
    wanted += [(f"{energy:.0%} of the energy", {"energy": energy}) for energy in ENERGIES]
    for (words, setting), both in itertools.product(wanted, (False, True)):
        found = convert_to_tva(model, fitting, feed_forward=both, **setting)
        row = {"kept": words, "feed_forward": both, "head_ranks": list(found.heads.values())}
        row["matrix_ranks"] = list(found.matrices.values())
        rows.append(row | _judged(model.around(found.module, source=None), model, judging))
        print(name, rows[-1], flush=True)
    return {"about": MODELS[name].__doc__, "fitted_on": fitting.samples, "judged_on": judging.samples, "rows": rows}


def _judged(model: UniversalModel, original: UniversalModel, data: Data) -> dict[str, Any]:
    assert model.task is not None  # both have one
    seen = Evaluation(model.task)
    for batch in data:
        seen.add(model.predict(batch), batch, original.predict(batch))
    return {"parameters": sum(p.numel() for p in model.module.parameters()), "loss": round(float(seen.means()["loss"]), 6)}
