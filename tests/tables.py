"""Tables with numbers and categories, and networks that read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CITIES = ("Oslo", "Lima", "Pune")


def rows(count: int = 12) -> list[dict[str, Any]]:
    """Area and rooms, a city, a heating of two kinds; the label says whether the area is above the middle."""
    areas = [30.0 + 7 * i for i in range(count)]
    return [
        {"city": CITIES[i % 3], "area": area, "rooms": 1 + i % 4, "heating": i % 2, "label": int(area > 70)}
        for i, area in enumerate(areas)
    ]


class FeatureTransformer(nn.Module):
    """One token per column and one for the answer, as in FT-Transformer (Gorishniy et al. 2021)."""

    def __init__(self, numeric: int = 2, categories: tuple[int, ...] = (3, 2), classes: int = 2, depth: int = 2) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(numeric, 8)), nn.Parameter(torch.randn(numeric, 8))
        self.tables = nn.ModuleList(nn.Embedding(count, 8) for count in categories)
        self.answer = nn.Parameter(torch.randn(1, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, dropout=0.0)
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(8, classes)

    def forward(self, x_num: Tensor, x_cat: Tensor) -> Tensor:
        tokens = [self.answer.expand(len(x_num), 1, 8), x_num[..., None] * self.scale + self.shift]
        tokens += [table(x_cat[:, i])[:, None] for i, table in enumerate(self.tables)]
        return self.head(self.blocks(torch.cat(tokens, 1))[:, 0])


class Described(FeatureTransformer):
    """Says itself which columns it reads."""

    tabular_cfg: dict[str, Any] = {  # noqa: RUF012  # a plain dict, as users write it
        "numeric": ["area", "rooms"],
        "categories": {"city": ["Lima", "Oslo", "Pune"], "heating": ["0", "1"]},
    }


def perceptron(width: int = 7) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
