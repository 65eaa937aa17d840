"""Tables: numbers and categories of named columns, in the order and on the scale of the training rows."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from layerwise.adapter import ADAPTERS, ModalityAdapter
from layerwise.adapters._labels import labels_of
from layerwise.adapters._schema import Schema, is_numeric, learnt
from layerwise.adapters._settings import json_file
from layerwise.data import Batch, Row
from layerwise.errors import DataError
from layerwise.heads import encoder_of
from layerwise.rows import place_of

SETTINGS = "tabular.json"
# what a forward may call the numbers and the codes of the categories
NUMBERS = ("x_num", "x_cont", "x_numer", "x_numerical", "numeric", "numerical", "continuous")
CODES = ("x_cat", "x_categ", "x_categorical", "categorical", "categories", "cats")


@ADAPTERS.register("tabular")
@dataclass(frozen=True)
class TabularModalityAdapter(ModalityAdapter):
    """Named columns as the `schema` says, which `fitted` learns from training rows and which is saved beside the weights.

    A forward that names both gets numbers (samples, numeric columns) float32 and codes (samples, categorical columns) int64
    under these `arguments`; one with a single argument gets the numbers followed by a 0/1 column per category.
    """

    schema: Schema = field(default_factory=Schema)
    arguments: tuple[str, str] = ("", "")
    modality: ClassVar[str] = "tabular"
    priority: ClassVar[int] = 5

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        return bool(_described(module)) or all(_arguments(module))

    @classmethod
    def left_in(cls, folder: Path) -> bool:
        return (folder / SETTINGS).is_file()

    @classmethod
    def of(cls, module: nn.Module, folder: Path | None = None) -> TabularModalityAdapter:
        saved = json_file(folder / SETTINGS) if folder else {}
        return cls(Schema.from_dict(saved or _described(module)), _arguments(module))

    @classmethod
    def fitted(
        cls,
        module: nn.Module,
        rows: Sequence[Row],
        *,
        label: str = "label",
        categorical: Sequence[str] = (),
        standardize: bool = True,
    ) -> TabularModalityAdapter:
        """For `module`, with the schema of training `rows` (dicts). Columns that hold text are categories, as are those named.

        Raises `DataError` LW-D29 without rows, LW-D32 or LW-D33 for values that are missing or no numbers.
        """
        if not rows:
            raise DataError("A schema is learnt from rows, and there are none.", remedy="Give training rows.", code="LW-D29")
        columns = [name for name in rows[0] if name != label]
        numeric = [name for name in columns if name not in categorical and is_numeric(rows, name)]
        rest = [name for name in columns if name not in numeric]
        return cls(learnt(rows, numeric, rest, standardize), _arguments(module))

    @property
    def columns(self) -> tuple[str, ...]:
        return self.schema.columns

    def collate(self, rows: Sequence[Row]) -> Batch:
        """Raises `DataError` naming row and column: LW-D31 missing, LW-D32 no number, LW-D33 NaN, LW-D39 unknown category."""
        if not self.columns:
            what = "Which columns the model reads is not known."
            remedy = "Use TabularModalityAdapter.fitted(module, rows), or give the module a tabular_cfg."
            raise DataError(what, place=place_of(rows[0], 0), remedy=f"{remedy} Its columns: {_names(rows[0])}.", code="LW-D31")
        places = [place_of(row, i) for i, row in enumerate(rows)]
        numbers = torch.tensor(np.array([self.schema.numbers(r, p) for r, p in zip(rows, places, strict=True)])).float()
        codes = torch.tensor([self.schema.codes(r, p) for r, p in zip(rows, places, strict=True)], dtype=torch.int64)
        return self._batch(numbers, codes, labels_of(rows))

    def _batch(self, numbers: Tensor, codes: Tensor, labels: Tensor | None) -> Batch:
        if all(self.arguments):
            return Batch((), dict(zip(self.arguments, (numbers, codes), strict=True)), labels)
        shown = [nn.functional.one_hot(codes[:, i], len(known)).float() for i, (_, known) in enumerate(self.schema.categories)]
        return Batch((torch.cat([numbers, *shown], 1),), {}, labels)

    def example(self, module: nn.Module) -> Batch | None:
        """Two rows of noise and the first category of each column; None where the columns are not known."""
        if not self.columns:
            return None
        numbers = torch.randn(2, len(self.schema.numeric), generator=torch.Generator().manual_seed(0))
        return self._batch(numbers, torch.zeros(2, len(self.schema.categories), dtype=torch.int64), None)

    def save(self, folder: Path) -> None:
        (folder / SETTINGS).write_text(json.dumps(self.schema.to_dict(), indent=1) + "\n", encoding="utf-8")


def _described(module: nn.Module) -> dict[str, Any]:
    """The module's own ``tabular_cfg``; empty where it has none."""
    found = getattr(encoder_of(module), "tabular_cfg", None)
    return found if isinstance(found, dict) else {}


def _arguments(module: nn.Module) -> tuple[str, str]:
    """The forward's names for numbers and codes, below a fitted head the encoder's; '' for what it does not name."""
    names = inspect.signature(encoder_of(module).forward).parameters
    first, second = (next((n for n in known if n in names), "") for known in (NUMBERS, CODES))
    return first, second


def _names(row: Any) -> str:
    return ", ".join(map(str, row))
