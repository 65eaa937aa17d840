"""Boxes: how well two sets overlap, and which of one belongs to which of the other."""

from __future__ import annotations

import torch
from torch import Tensor


def corners(boxes: Tensor) -> Tensor:
    """(…, 4): centre x, centre y, width, height → left, top, right, bottom."""
    x, y, w, h = boxes.unbind(-1)
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """(n, m) in [−1, 1] of corner boxes (n, 4) and (m, 4): the share that both have, less the share of the hull that neither has.

    Rezatofighi et al. (2019), "Generalized intersection over union".
    """
    both = (torch.minimum(a[:, None, 2:], b[None, :, 2:]) - torch.maximum(a[:, None, :2], b[None, :, :2])).clamp_min(0).prod(-1)
    hull = (torch.maximum(a[:, None, 2:], b[None, :, 2:]) - torch.minimum(a[:, None, :2], b[None, :, :2])).clamp_min(0).prod(-1)
    either = _area(a)[:, None] + _area(b)[None] - both
    tiny = torch.finfo(a.dtype).tiny
    return both / either.clamp_min(tiny) - (hull - either) / hull.clamp_min(tiny)


def matched(cost: Tensor) -> tuple[Tensor, Tensor]:
    """The rows and columns of the assignment with the least total `cost` (n, m), by the Hungarian method, on the CPU."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cost.detach().double().cpu().numpy())
    return torch.as_tensor(rows, device=cost.device), torch.as_tensor(columns, device=cost.device)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp_min(0).prod(-1)
