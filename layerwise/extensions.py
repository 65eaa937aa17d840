"""`ComputerVisionExtension` and `ScientificComputingExtension`: a field's preset, from a model to a report in one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from layerwise.domains import DOMAINS, Domain, domain_named
from layerwise.engine import Methods, analyze
from layerwise.importance import ImportanceReport
from layerwise.loading import load, load_data
from layerwise.model import UniversalModel

# families by the name that people use → one of timm's of a common size
FAMILIES = {
    "resnet": "resnet50", "efficientnet": "efficientnet_b0", "vision transformer": "vit_base_patch16_224",
    "vit": "vit_base_patch16_224",
}  # fmt: skip
ROWS = 256  # of a field's own data set

Model = UniversalModel | nn.Module | str


@dataclass(frozen=True)
class ComputerVisionExtension:
    """Fields of vision: image classification, object detection, semantic segmentation, face recognition, image generation.

    `limit` rows of the field's data set are drawn with `seed`.
    """

    limit: int = ROWS
    seed: int = 0

    def analyze_vision_model(
        self, model_name: Model, task: str = "image_classification", data: Any = None, methods: Methods = "auto"
    ) -> ImportanceReport:
        """The layers of `model_name`: a timm name or family ("ResNet"), any spec of `load`, or a module.

        `task` is a field of `layerwise.domains`. Without `data` its data set is read. Raises `UsageError` for an unknown field
        and LW-C04 for a data set that is not there, with how to get it.
        """
        return analyze_in(domain_named(task, "vision"), _spelled_out(model_name), data, methods, self)


@dataclass(frozen=True)
class ScientificComputingExtension:
    """Fields of science: bioinformatics, chemistry, physics, climate, finance, medical, robotics, autonomous driving.

    `limit` rows of the field's data set are drawn with `seed`.
    """

    limit: int = ROWS
    seed: int = 0

    def analyze_model(
        self, model: Model, domain: str, data: Any = None, methods: Methods = "auto", *, dataset: str | None = None
    ) -> ImportanceReport:
        """The layers of `model` by the preset of `domain`, on `data` or on its data set (`dataset` chooses one by name).

        Raises `UsageError` for an unknown field or data set, and LW-C04 for one that is not there, with how to get it.
        """
        return analyze_in(domain_named(domain, "science"), model, data, methods, self, dataset)

    @staticmethod
    def domains() -> list[str]:
        """The fields."""
        return [name for name, domain in DOMAINS.items() if domain.area == "science"]


def analyze_in(
    domain: Domain,
    model: Model,
    data: Any,
    methods: Methods,
    settings: ComputerVisionExtension | ScientificComputingExtension,
    dataset: str | None = None,
) -> ImportanceReport:
    """The preset carried out; a task that the model already has goes before the field's."""
    chosen = domain.dataset(dataset)
    source = chosen.located() if data is None else data
    task = (chosen.task if data is None else "") or domain.task
    opened = model if isinstance(model, UniversalModel) and model.task is not None else load(model, task)
    columns = chosen.columns if data is None else {}
    batches = load_data(source, opened, limit=settings.limit, columns=columns, seed=settings.seed)
    return analyze(opened, batches, methods, seed=settings.seed)


def _spelled_out(name: Model) -> Model:
    """A family or a name of timm as a spec; what is a module, a spec or a path already stays as it is."""
    plain = isinstance(name, str) and ":" not in name and "/" not in name
    return f"timm:{FAMILIES.get(name.lower(), name)}" if isinstance(name, str) and plain else name


__all__ = ["ComputerVisionExtension", "ScientificComputingExtension"]
