"""Fields of application: which adapter, task, metrics and public data sets suit each, as one table of advice.

Decision: presets, no classes. A field is a row: whoever knows one better tells `load`, `load_data` and `analyze` so. Data sets
that scikit-learn carries are there at once; all others are read from the user's own copy in one folder, and what is missing is
said with its name, its terms and its place. Nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerwise.errors import UsageError, nearest

HOME = "LAYERWISE_DATA"  # names the folder that holds data sets


@dataclass(frozen=True)
class Dataset:
    """A public data set: `spec` is what `load_data` takes, or a place below the data folder; `terms` as published, in short.

    `task` and `metric` where they are not the field's first; `form`: what lies at the place.
    """

    name: str
    spec: str
    terms: str
    form: str = "a folder of images, one subfolder per class"
    task: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bundled(self) -> bool:
        """Whether it comes with a package, so that there is nothing to get."""
        return self.spec.startswith("sklearn:")

    @property
    def there(self) -> bool:
        return self.bundled or (data_home() / self.spec).exists()

    def located(self) -> str | Path:
        """What `load_data` takes. Raises `UsageError` LW-C04 with how to get it and where it belongs."""
        if self.there:
            return self.spec if self.bundled else data_home() / self.spec
        raise UsageError(
            f"The data set {self.name} is not there.",
            place=str((data_home() / self.spec).absolute()),
            remedy=f"Get it from its publishers ({self.terms}) and put it there as {self.form}; {HOME} names the folder of all "
            "data sets. Or give data=.",
            code="LW-C04",
        )


@dataclass(frozen=True)
class Domain:
    """What suits a field. `adapter` and `task` are registered names, `metrics` what the task measures, best known first."""

    name: str
    area: str  # vision or science
    adapter: str
    task: str
    metrics: tuple[str, ...]
    datasets: tuple[Dataset, ...]
    notes: str = ""

    def dataset(self, name: str | None = None) -> Dataset:
        """The data set called `name`, or the first that is there, or else the first. Raises `UsageError` (nearest name)."""
        if name is None:
            return next((d for d in self.datasets if d.there), self.datasets[0])
        known = {d.name: d for d in self.datasets}
        if name not in known:
            raise UsageError(f"The field {self.name} knows no data set {name!r}.", remedy=nearest(name, known))
        return known[name]


TOXICITIES = (
    "NR-AR", "NR-AR-LBD", "NR-AhR", "NR-Aromatase", "NR-ER", "NR-ER-LBD", "NR-PPAR-gamma", "SR-ARE", "SR-ATAD5", "SR-HSE",
    "SR-MMP", "SR-p53",
)  # fmt: skip
TABLE = "a table (parquet or CSV)"
CLASSES = ("accuracy", "f1_score", "precision", "recall")
ERRORS = ("rmse", "mae", "r2")

ROWS = (
    Domain(
        "image_classification", "vision", "vision", "classification", CLASSES,
        (
            Dataset("digits", "sklearn:digits", "CC BY 4.0, inside scikit-learn"),
            Dataset("CIFAR-10", "cifar10/test", "no terms stated"),
            Dataset("ImageNet", "imagenet/val", "non-commercial research, after registration"),
        ),
    ),
    Domain(
        "object_detection", "vision", "vision", "detection", ("map", "map_50", "map_75", "mar_100"),
        (Dataset("COCO", "coco/val2017.parquet", "annotations CC BY 4.0, images under their owners' terms", TABLE),),
        "Set prediction only (DETR's family): see docs/tasks.md for the labels and for what is refused.",
    ),
    Domain(
        "semantic_segmentation", "vision", "vision", "segmentation", ("mean_iou", "pixel_accuracy", "dice"),
        (Dataset("Cityscapes", "cityscapes/val.parquet", "non-commercial, after registration", TABLE),),
        "Labels are masks (samples, rows, columns), 255 for pixels that do not count.",
    ),
    Domain(
        "face_recognition", "vision", "vision", "retrieval", ("mrr", "map", "recall_at_1"),
        (Dataset("LFW", "lfw", "for research; the photographs have owners of their own", "a folder of images per person"),),
        "A face is found again among the others by its embedding; labels are persons. Faces are personal data.",
    ),
    Domain(
        "image_generation", "vision", "tensor", "fidelity", ("divergence",),
        (Dataset("FFHQ", "ffhq", "CC BY-NC-SA 4.0", "a folder of images"),),
        "A generator reads noise: give batches of it as data. Judged is how far its pictures move, not how good they are.",
    ),
    Domain(
        "bioinformatics", "science", "text", "token_classification", ("accuracy", "f1_score"),
        (Dataset("CB513", "cb513/test.parquet", "no terms stated", "a table with text (residues apart) and labels per residue"),),
        "Protein language models are transformers' text models; secondary structure is a class per residue.",
    ),
    Domain(
        "chemistry", "science", "graph", "regression", ERRORS,
        (
            Dataset(
                "ESOL", "molecules/esol_delaney.parquet", "no terms stated; part of DeepChem, MIT", TABLE,
                columns={"label": "measured log solubility in mols per litre"},
            ),
            Dataset(
                "Tox21", "molecules/tox21.parquet", "no terms stated; part of DeepChem, MIT", TABLE, "multi_label",
                {"label": list(TOXICITIES)},
            ),
            Dataset("QM9", "molecules/qm9.parquet", "see its record", "a table with smiles and label"),
        ),
        "Molecules come as SMILES. A random split flatters: similar molecules stand on both sides.",
    ),
    Domain(
        "physics", "science", "tensor", "regression", ERRORS,
        (Dataset("PDEBench", "pdebench/test.parquet", "CC BY 4.0", "a table with x (the state) and label (the next state)"),),
        "Surrogates of simulations: several real targets per sample; an error of one step says little about many steps.",
    ),
    Domain(
        "climate", "science", "tensor", "regression", ERRORS,
        (Dataset("WeatherBench", "weatherbench/test.parquet", "Copernicus licence (ERA5)", "a table with x and label"),),
        "Neighbouring days are alike: split by years, and read the standard errors as too small.",
    ),
    Domain(
        "finance", "science", "tabular", "classification", CLASSES,
        (Dataset("German credit", "finance/german_credit.csv", "CC BY 4.0", TABLE + " with a column label"),),
        "Risk. Classes are unequal: read recall and f1_score beside accuracy.",
    ),
    Domain(
        "medical", "science", "tabular", "classification", CLASSES,
        (
            Dataset("breast_cancer", "sklearn:breast_cancer", "CC BY 4.0, inside scikit-learn"),
            Dataset("diabetes", "sklearn:diabetes", "inside scikit-learn", task="regression"),
            Dataset("MedMNIST", "medmnist/test", "CC BY 4.0 for most of its parts"),
        ),
        "Images by the adapter `vision`. The figures are of the data set, not of patients elsewhere.",
    ),
    Domain(
        "robotics", "science", "tensor", "regression", ERRORS,
        (Dataset("D4RL", "d4rl/test.parquet", "CC BY 4.0", "a table with x (observation) and label (action)"),),
        "Imitation of recorded actions. Returns need an environment: the task `reinforcement_learning`.",
    ),
    Domain(
        "autonomous_driving", "science", "vision", "detection", ("map", "map_50"),
        (Dataset("KITTI", "kitti/val.parquet", "CC BY-NC-SA 3.0", TABLE),),
        "As object detection; the frames of one drive are not independent samples.",
    ),
)  # fmt: skip
DOMAINS: Mapping[str, Domain] = {row.name: row for row in ROWS}


def domain_named(name: str, area: str | None = None) -> Domain:
    """The field called `name`, of one `area` (vision or science) if given. Raises `UsageError` with the nearest name."""
    known = {n: d for n, d in DOMAINS.items() if area in (None, d.area)}
    if name not in known:
        raise UsageError(f"Unknown field {name!r}.", remedy=nearest(name, known))
    return known[name]


def data_home() -> Path:
    """The folder of data sets: ``LAYERWISE_DATA``, else ``data`` in the current folder."""
    return Path(os.environ.get(HOME) or "data").expanduser()


def page() -> str:
    """The table as Markdown, for docs/domains.md."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "| field | area | adapter | task | metrics | data sets | notes |"
    yield "|---|---|---|---|---|---|---|"
    for domain in ROWS:
        metrics = ", ".join(f"`{m}`" for m in domain.metrics)
        sets = "; ".join(f"{d.name}: `{d.spec}` ({d.terms})" for d in domain.datasets)
        yield f"| `{domain.name}` | {domain.area} | `{domain.adapter}` | `{domain.task}` | {metrics} | {sets} | {domain.notes} |"


__all__ = ["DOMAINS", "Dataset", "Domain", "data_home", "domain_named", "page"]
