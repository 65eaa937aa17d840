"""Per-sample Fisher by hooks against one plain forward and backward, a loop of single samples and `torch.func`, in CPU time.

    python benchmarks/speed_fisher.py --rounds 5

Every round runs all four once, one after the other, so that what else the machine does hits them alike; the ratios are taken
within a round and their median is printed. Each computes the sum of squared gradients of all parameters of the blocks for every
sample of a batch of a ViT-Tiny; the values are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from layerwise.analyzers.fisher_information import FisherInformationAnalyzer, SquaredGradients
from layerwise.data import Batch
from layerwise.model import UniversalModel
from layerwise.sweep import Sweep
from layerwise.task import Classification


def subject(size: int) -> tuple[UniversalModel, Batch]:
    """A ViT-Tiny with random weights and a batch of `size` random images."""
    torch.manual_seed(0)
    module = timm.create_model("vit_tiny_patch16_224", num_classes=100).eval()
    batch = Batch((torch.randn(size, 3, 224, 224),), {}, torch.randint(0, 100, (size,)))
    return UniversalModel(module, task=Classification(), example=batch.narrow(0, 2)), batch


def losses(model: UniversalModel, batch: Batch) -> Tensor:
    """Each sample's loss, with a graph."""
    assert model.task is not None
    return model.task.likelihood(model.output(batch), batch, torch.Generator().manual_seed(0))


def plain(model: UniversalModel, batch: Batch) -> None:
    """One forward and backward with the gradient of every parameter: what a training step costs."""
    model.module.zero_grad(set_to_none=True)
    losses(model, batch).sum().backward()


def hooks(model: UniversalModel, batch: Batch) -> Callable[[], Tensor]:
    """The sweep, warm: which sample a gradient belongs to has been checked on an earlier batch."""
    statistic = FisherInformationAnalyzer().statistic(model)
    assert isinstance(statistic, SquaredGradients)
    sweep = Sweep(model, [statistic])
    sweep.batch(batch, 0)

    def again() -> Tensor:
        before = statistic.moments.sums[2]
        statistic.moments.sums = statistic.moments.sums.clone()
        sweep.batch(batch, 0)
        return statistic.moments.sums[2] - before

    return again


def loop(model: UniversalModel, batch: Batch) -> Tensor:
    """One forward and backward per sample."""
    totals = torch.zeros(len(model.layers), dtype=torch.float64)
    for n in range(batch.size):
        plain(model, batch.narrow(n, n + 1))
        for layer in model.layers:
            totals[layer.index] += sum(p.grad.double().square().sum() for p in layer.module.parameters() if p.grad is not None)
    return totals


def func(model: UniversalModel, batch: Batch) -> Tensor:
    """`torch.func`: vmap of grad over the samples, all gradients of all blocks at once."""
    own = {n: p.detach() for n, p in model.module.named_parameters() if n.startswith("blocks.")}
    assert batch.labels is not None

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(functional_call(model.module, parameters, (image[None],)), label[None])

    with sdpa_kernel(SDPBackend.MATH):
        found = vmap(grad(loss), in_dims=(None, 0, 0))(own, batch.args[0], batch.labels)
    totals = torch.zeros(len(model.layers), dtype=torch.float64)
    for name, gradient in found.items():
        totals[int(name.split(".")[1])] += gradient.double().square().sum()
    return totals


def seconds(work: Callable[[], object]) -> float:
    """CPU time of all threads."""
    started = time.process_time()
    work()
    return time.process_time() - started


def measure(size: int, rounds: int) -> dict[str, list[float]]:
    """What → one ratio per round to the plain forward and backward of that round."""
    model, batch = subject(size)
    by_hooks = hooks(model, batch)
    works: dict[str, Callable[[], object]] = {
        "hooks": by_hooks,
        "loop": lambda: loop(model, batch),
        "vmap": lambda: func(model, batch),
    }
    expected = loop(model, batch)
    for name, found in (("hooks", by_hooks()), ("vmap", func(model, batch))):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0.0, msg=f"{name} differs from the loop")
    plain(model, batch)
    ratios: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        base = seconds(lambda: plain(model, batch))
        for name, work in works.items():
            ratios[name].append(seconds(work) / base)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"CPU time, as multiples of one forward and backward; ViT-Tiny, batch {given.batch}, {given.threads} thread(s)")
    for name, ratios in measure(given.batch, given.rounds).items():
        low, high = min(ratios), max(ratios)
        print(f"  {name:6} median {statistics.median(ratios):.2f}  ({low:.2f} to {high:.2f} over {len(ratios)} rounds)")


if __name__ == "__main__":
    main()
