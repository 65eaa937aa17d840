"""Reading a model's layers against one forward pass on the same batch: ``python benchmarks/speed_inspect.py``.

The forward runs once while it is read; what comes on top is watching every operator. Models of torchvision, random weights, two
images, processor time in pairs with one thread.
"""

from __future__ import annotations

import json

import torch
from timing import paired
from torchvision import models

from layerwise.data import Batch
from layerwise.structure import read_layers

NETS = ("resnet18", "densenet121", "vit_b_32", "mobilenet_v3_small")


def main(rounds: int = 5) -> dict[str, str]:
    """Network → the ratio (median, lowest and highest) and the milliseconds of a forward; prints and returns them."""
    torch.manual_seed(0)
    found = {}
    for name in NETS:
        network = models.get_model(name, weights=None).eval()
        batch = Batch((torch.randn(2, 3, 224, 224),))

        def forward(network: torch.nn.Module = network, batch: Batch = batch) -> None:
            with torch.no_grad():
                network(*batch.args)

        pair = paired(lambda network=network, batch=batch: read_layers(network, batch), forward, rounds)
        found[name] = f"{pair.ratio:.2f} ({pair.low:.2f} … {pair.high:.2f}) of a forward of {1000 * pair.theirs:.0f} ms"
    print(json.dumps(found, indent=2, ensure_ascii=False))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
