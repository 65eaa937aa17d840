"""What a walk leaves behind: nothing."""

from __future__ import annotations

import weakref

import pytest
import torch

import layerwise as lw
from layerwise.counts import Counts
from layerwise.data import Batch
from layerwise.walk import Walk
from tests.models import ResidualNet


@pytest.mark.parametrize("backward", [True, False])
def test_a_graph_is_freed_with_the_pass_that_built_it(backward: bool) -> None:
    """A hook that held what it fills would be held by it in turn, through the graph, where no collector finds it."""
    batch = Batch((torch.randn(4, 8),))
    model = lw.load(ResidualNet(), example=batch)
    walk = Walk(model, batch, 0, torch.arange(4), Counts())
    seen = walk.forward(batch, graph=True)
    assert seen.output is not None
    if backward:
        walk.backward(seen, seen.output)
    gone = weakref.ref(seen)
    del seen
    assert gone() is None
