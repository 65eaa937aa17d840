"""Molecules, tables, a social graph and ratings: small networks trained on real data, held against the simplest rule.

    python benchmarks/fields.py --seeds 3 --out benchmarks/results/fields.json

Each field gives a model, training and test data, and what the simplest rule reaches on the test data (the mean, the commonest
class, the most popular items). Data that is absent (``LAYERWISE_DATA``) is left out, and said so.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.adapters.tabular import TabularModalityAdapter
from layerwise.data import Data
from layerwise.engine import analyze
from layerwise.loading import load, load_data
from layerwise.measure import evaluate
from layerwise.model import UniversalModel
from layerwise.scores import Status
from layerwise.task import task_named
from layerwise.trace import run as forwarded

TOXICITIES = (
    "NR-AR", "NR-AR-LBD", "NR-AhR", "NR-Aromatase", "NR-ER", "NR-ER-LBD", "NR-PPAR-gamma", "SR-ARE", "SR-ATAD5", "SR-HSE",
    "SR-MMP", "SR-p53",
)  # fmt: skip
METHODS = ("layer_ablation", "fisher_information", "gradient_based", "layer_correlation", "spectral_analysis")
HISTORY = 20  # items that a recommendation looks back on


@dataclass(frozen=True)
class Field:
    """A trained model with test data; `metric` is judged, and `rule` is what the simplest rule reaches in it."""

    name: str
    model: UniversalModel
    test: Data
    metric: str
    rule: float


class Perceptron(nn.Module):
    """x + W₂ relu(W₁ norm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


class TableNet(nn.Module):
    """Residual perceptrons over the columns of a table."""

    def __init__(self, columns: int, outputs: int, depth: int = 4, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Linear(columns, width)
        self.blocks = nn.ModuleList(Perceptron(width) for _ in range(depth))
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Messages(nn.Module):
    """x + GIN(norm(x)): each node takes the sum over its neighbours (Xu et al. 2019)."""

    def __init__(self, width: int) -> None:
        from torch_geometric.nn import GINConv

        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.conv = GINConv(nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return x + self.conv(self.norm(x), edge_index)


class MoleculeNet(nn.Module):
    """Message passing over atoms, then the sum and the mean of all atoms."""

    def __init__(self, outputs: int, depth: int = 4, width: int = 48) -> None:
        super().__init__()
        self.scale = nn.BatchNorm1d(9)
        self.stem = nn.Linear(9, width)
        self.blocks = nn.ModuleList(Messages(width) for _ in range(depth))
        self.head = nn.Linear(2 * width, outputs)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        from torch_geometric.nn import global_add_pool, global_mean_pool

        x = self.stem(self.scale(x))
        for block in self.blocks:
            x = block(x, edge_index)
        return self.head(torch.cat([global_add_pool(x, batch) / 16, global_mean_pool(x, batch)], 1))


class NextItem(nn.Module):
    """Self-attention over what a user took before, as SASRec (Kang, McAuley 2018): (samples, history) → (samples, items).

    Item 0 is padding, on the left. The outputs are log-odds that an item is the next one, so that they are answers of their own.
    """

    def __init__(self, items: int, depth: int = 2, width: int = 48) -> None:
        super().__init__()
        self.items = nn.Embedding(items, width, padding_idx=0)
        self.places = nn.Parameter(torch.zeros(HISTORY, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.2, batch_first=True, norm_first=True) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.items.weight, std=0.05)
        causal = torch.full((HISTORY, HISTORY), -math.inf).triu(1)
        self.register_buffer("causal", causal, persistent=False)

    def every_step(self, ids: Tensor) -> Tensor:
        """(samples, history, items): what each place says of the item after it."""
        x = self.items(ids) * self.items.embedding_dim**0.5 + self.places
        x = x * (ids > 0)[..., None]
        for block in self.blocks:
            x = block(x, src_mask=self.causal)
        return self.norm(x) @ self.items.weight.T

    def forward(self, ids: Tensor) -> Tensor:
        logs = self.every_step(ids)[:, -1].log_softmax(-1)
        return logs - torch.log1p(-logs.exp().clamp_max(1 - 1e-6))


def fit_(model: UniversalModel, data: Data, epochs: int, rate: float = 3e-3, loss: Callable[..., Tensor] | None = None) -> None:
    """Trains in place by the task's own likelihood, AdamW under a one-cycle schedule; order and dropout by torch's seed."""
    task = model.task
    assert task is not None, "a model to be trained has a task"
    parameters = list(model.module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * len(data))
    batches, noise = list(data), torch.Generator().manual_seed(0)
    model.module.train()
    for _ in range(epochs):
        for i in torch.randperm(len(batches)).tolist():
            batch = batches[i]
            if loss is None:
                error = task.likelihood(batch.by_sample(model.read(forwarded(model.module, batch))), batch, noise).mean()
            else:
                error = loss(model.module, batch)
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            schedule.step()
    model.module.eval()


def parted(data: Data, model: UniversalModel, seed: int, share: float = 0.8, batch_size: int = 32) -> tuple[Data, Data]:
    """Training and test data, drawn by row; `data` holds the prepared rows."""
    rows = [row for batch in data.batches for row in batch]
    order = np.random.default_rng(seed).permutation(len(rows))
    cut = int(share * len(rows))
    chosen = [[rows[i] for i in part] for part in (order[:cut], order[cut:])]
    made = [[part[i : i + batch_size] for i in range(0, len(part), batch_size)] for part in chosen]
    return Data(made[0], f"{data.name} (training)", model.adapter.collate), Data(made[1], data.name, model.adapter.collate)


def labels_of(data: Data) -> Tensor:
    return torch.cat([batch.labels for batch in data])


def folder(name: str) -> Path:
    """Where the data set is. Raises `FileNotFoundError`."""
    found = Path(os.environ.get("LAYERWISE_DATA", "data")) / name
    if not found.is_dir():
        raise FileNotFoundError(f"the data folder {found} is absent")
    return found


def esol(seed: int, rows: int | None = None, epochs: int = 40) -> Field:
    """The solubility of 1,128 molecules, log10 mol per litre."""
    torch.manual_seed(seed)
    model = load(MoleculeNet(1), "regression")
    columns = {"label": "measured log solubility in mols per litre"}
    data = load_data(folder("molecules") / "esol_delaney.parquet", model, limit=rows, columns=columns)
    train, test = parted(data, model, seed)
    fit_(model, train, epochs)
    wrong = labels_of(test) - labels_of(train).mean()
    return Field("ESOL", model, test, "rmse", float(wrong.square().mean().sqrt()))


def tox21(seed: int, rows: int | None = None, epochs: int = 12) -> Field:
    """Twelve toxicities of 8,014 molecules, of which a fifth is unknown."""
    torch.manual_seed(seed)
    model = load(MoleculeNet(12), "multi_label")
    data = load_data(folder("molecules") / "tox21.parquet", model, limit=rows, columns={"label": list(TOXICITIES)})
    train, test = parted(data, model, seed, batch_size=64)
    fit_(model, train, epochs)
    return Field("Tox21", model, test, "auc", 0.5)


def karate(seed: int, epochs: int = 60) -> Field:
    """Zachary's karate club: 34 members, four factions, one labelled member of each to learn from."""
    from torch_geometric.datasets import KarateClub
    from torch_geometric.nn import GCN

    torch.manual_seed(seed)
    club = KarateClub()[0]
    model = load(GCN(34, 16, 3, out_channels=4), "classification")
    train = load_data(club, model, split="train")
    club.test_mask = ~club.train_mask
    test = load_data(club, model, split="test")
    fit_(model, train, epochs, rate=1e-2)
    counts = torch.bincount(labels_of(test))
    return Field("Karate club", model, test, "accuracy", float(counts.max() / counts.sum()))


def table(name: str, task: str, outputs: int, metric: str, seed: int, epochs: int) -> Field:
    """A data set that scikit-learn carries, with its columns' names."""
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name}")()
    names = [str(n) for n in bunch.feature_names]
    rows = [
        dict(zip(names, map(float, x), strict=True)) | {"label": y.item()} for x, y in zip(bunch.data, bunch.target, strict=True)
    ]
    order = np.random.default_rng(seed).permutation(len(rows))
    parts = [[rows[i] for i in part] for part in (order[: int(0.8 * len(rows))], order[int(0.8 * len(rows)) :])]
    torch.manual_seed(seed)
    module = TableNet(len(names), outputs)
    model = UniversalModel(module, adapter=TabularModalityAdapter.fitted(module, parts[0]), task=task_named(task), name=name)
    train, test = (load_data(part, model, batch_size=32) for part in parts)
    fit_(model, train, epochs)
    known, asked = labels_of(train).float(), labels_of(test).float()
    if task == "regression":
        return Field(name, model, test, metric, float((asked - known.mean()).square().mean().sqrt()))
    return Field(name, model, test, metric, float((asked == known.mode().values).float().mean()))


def breast_cancer(seed: int, epochs: int = 15) -> Field:
    """569 tumours by 30 measures of their cells' nuclei: benign or malignant."""
    return table("breast_cancer", "classification", 2, "accuracy", seed, epochs)


def diabetes(seed: int, epochs: int = 40) -> Field:
    """442 patients by ten measures: how far their disease is a year later."""
    return table("diabetes", "regression", 1, "rmse", seed, epochs)


def histories(least: int = 20, users: int | None = None) -> tuple[list[list[int]], int]:
    """Each user's items in the order of time, and how many items there are with padding: items with `least` ratings or more,
    renumbered from 1, and users who rated 5 of them or more."""
    ratings = pd.read_parquet(folder("movietweetings100k") / "ratings.parquet")
    ratings = ratings[ratings.groupby("item")["user"].transform("count") >= least]
    ratings = ratings.assign(item=ratings["item"].astype("category").cat.codes + 1).sort_values(
        ["user", "timestamp"], kind="stable"
    )
    taken = [list(dict.fromkeys(items)) for _, items in ratings.groupby("user")["item"]]
    return [t for t in taken if len(t) >= 5][:users], int(ratings["item"].max()) + 1


def ratings(seed: int, users: int | None = None, epochs: int = 12) -> Field:
    """MovieTweetings: which film comes next. The last of each user is held out, among all films that the user has not seen."""
    torch.manual_seed(seed)
    taken, items = histories(users=users)
    rows = [{"input_ids": _left_padded(t[:-1]), "label": _answers(t, items)} for t in taken]
    model = load(NextItem(items), "recommendation")
    test = load_data(rows, model, batch_size=128)
    train = load_data([{"input_ids": _left_padded(t[:-1], HISTORY + 1)} for t in taken], model, batch_size=64)
    fit_(model, train, epochs, rate=4e-3, loss=next_item_loss)
    popular = np.bincount([i for t in taken for i in t[:-1]], minlength=items)
    return Field("MovieTweetings", model, test, "ndcg", popularity(popular, taken, items))


def next_item_loss(module: nn.Module, batch: Any) -> Tensor:
    """Cross entropy of every item but the first of a history, padding left out."""
    ids = batch.args[0]
    scores = module.every_step(ids[:, :-1])  # type: ignore[operator]  # only ever called with a NextItem
    return F.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)


def popularity(counts: np.ndarray, taken: Sequence[Sequence[int]], items: int) -> float:
    """NDCG at 10 of recommending everyone the most popular films that they have not seen."""
    found = []
    for history in taken:
        scores = counts.astype(float)
        scores[[0, *history[:-1]]] = -1
        rank = int((scores > scores[history[-1]]).sum()) + 1
        found.append(1 / math.log2(rank + 1) if rank <= 10 else 0.0)
    return float(np.mean(found))


def _left_padded(history: Sequence[int], length: int = HISTORY) -> list[int]:
    return [0] * (length - len(history)) + list(history[-length:])


def _answers(history: Sequence[int], items: int) -> list[float]:
    answers = np.zeros(items)
    answers[[0, *history[:-1]]] = np.nan
    answers[history[-1]] = 1
    return answers.tolist()


FIELDS: dict[str, Callable[[int], Field]] = {
    "esol": esol, "tox21": tox21, "karate": karate, "breast_cancer": breast_cancer, "diabetes": diabetes, "ratings": ratings,
}  # fmt: skip


def measured(make: Callable[[int], Field], seed: int, analyzed: bool) -> dict[str, Any]:
    """Figures of one trained network, with its layers' scores if `analyzed`."""
    started = time.perf_counter()
    field = make(seed)
    trained = time.perf_counter() - started
    figures = evaluate(field.model, field.test).means()
    found: dict[str, Any] = {
        "name": field.name, "seed": seed, "metric": field.metric, "value": figures[field.metric], "rule": field.rule,
        "metrics": figures, "samples": field.test.samples, "seconds_training": round(trained, 1),
    }  # fmt: skip
    if analyzed:
        started = time.perf_counter()
        report = analyze(field.model, field.test.head(128), list(METHODS))
        found["seconds_analysis"] = round(time.perf_counter() - started, 1)
        found["layers"] = {
            method: {n: s.value if s.status is Status.OK else s.reason for n, s in scores.entries.items()}
            for method, scores in report.scores.items()
        }
    return found


def as_table(runs: Sequence[dict[str, Any]]) -> str:
    """The figures as Markdown, for docs/domains.md: means and standard deviations over the seeds."""
    lines = ["| data | test samples | seeds | metric | network | simplest rule |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(run["name"] for run in runs):
        own = [run for run in runs if run["name"] == name]
        value, rule = (np.array([run[key] for run in own]) for key in ("value", "rule"))
        figures = f"{value.mean():.3f} ± {value.std(ddof=1):.3f} | {rule.mean():.3f}"
        lines.append(f"| {name} | {own[0]['samples']} | {len(own)} | `{own[0]['metric']}` | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(FIELDS), choices=list(FIELDS))
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    results = []
    for name in chosen.only:
        try:
            runs = [measured(FIELDS[name], seed, analyzed=seed == 0) for seed in range(chosen.seeds)]
        except FileNotFoundError as error:
            print(f"{name}: left out, {error}")
            continue
        print(_in_words(runs), flush=True)
        results += runs
        if chosen.out:
            _written(chosen.out, results)


def _in_words(runs: Sequence[dict[str, Any]]) -> str:
    value, rule, seconds = (np.array([run[key] for run in runs]) for key in ("value", "rule", "seconds_training"))
    spread = value.std(ddof=1) if len(runs) > 1 else math.nan
    first = runs[0]
    times = f"{seconds.mean():.0f} s to train, {first['seconds_analysis']} s to analyze"
    return f"{first['name']:<15} {first['metric']:<9} {value.mean():.3f} ± {spread:.3f}   rule {rule.mean():.3f}   {times}"


def _written(path: Path, runs: Sequence[dict[str, Any]]) -> None:
    """Beside what the file says of other fields; without the seconds, which a shared machine makes worthless."""
    before = json.loads(path.read_text())["runs"] if path.is_file() else []
    names = {run["name"] for run in runs}
    timeless = [{key: value for key, value in run.items() if not key.startswith("seconds")} for run in runs]
    every = [*(run for run in before if run["name"] not in names), *timeless]
    path.write_text(json.dumps({"threads": torch.get_num_threads(), "device": "cpu", "runs": every}, indent=1) + "\n")


if __name__ == "__main__":
    main()
