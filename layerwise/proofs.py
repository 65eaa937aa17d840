"""Compression is verified or it did not happen: the checks that every result carries.

1. *equivalence*, one per step: a structural cut computes what the uncut model computes with those layers masked; a method that
   changes values gives exactly the values it says; one that trains keeps the structure (`judged`, which the engine calls as the
   steps are carried out). Without these judgements, steps before the last are carried out again on a copy to compare against; the
   last is judged on the very model that is handed over, so that whatever went wrong on the way to it shows. What a training step
   gives cannot be carried out again, and is then said to be not judged.
2. *shrinkage*: what was promised and what was asked for, measured.
3. *reload*: saved, built again from source + plan + safetensors by a fresh process, and run: equal outputs, bit for bit.
4. *export parity* belongs to each artifact, see `layerwise.artifact`.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from layerwise.data import Batch, Data
from layerwise.errors import LayerwiseError
from layerwise.measure import compare
from layerwise.method import Check, CompressionMethod, apply_step_, method_of, unfolded
from layerwise.model import UniversalModel
from layerwise.plan import CompressionPlan, Step, asks_energy
from layerwise.reload_check import Reload, reload_in_fresh_process
from layerwise.result import Measurement, Proof
from layerwise.saved import load_saved, save_model
from layerwise.supplies import NOTHING, Supplies
from layerwise.tensors import state, unbounded_alike

BOUND = 1e-5  # of the largest output; float32 leaves 1e-7 per operation, and a layer that is really cut differs by 1e-2 or more
NARROW, EXACT = 1e-3, 1e-7  # what float32 may miss the bound by and be asked again in float64, and what is then allowed
BATCHES = 4


def prove(
    original: UniversalModel,
    compressed: UniversalModel,
    plan: CompressionPlan,
    data: Data,
    *,
    before: Measurement | None = None,
    after: Measurement | None = None,
    reload: bool = True,
    steps: Sequence[Proof] | None = None,
    supplies: Supplies = NOTHING,
) -> tuple[Proof, ...]:
    """Every proof of `compressed` = `plan` on `original`. Failed ones are returned, not raised.

    `before` and `after` are measured here when they are not given; `steps` are the judgements of the steps, made here with
    `supplies` when they are not given. `reload` may be left out, since it starts a process.
    """
    batches = [b.to(original.device) for b in islice(data, BATCHES)]
    original.see(batches[0])
    proofs = list(equivalence(original, compressed, plan, batches, supplies) if steps is None else steps)
    try:
        if before is None or after is None:
            before, after = compare(original, compressed, data, joules=asks_energy(plan))
        proofs.append(shrinkage(plan, before, after))
    except LayerwiseError as error:  # a result that does not run
        proofs.append(Proof("shrinkage", False, f"it cannot be measured: {error}"))
    if reload:
        proofs.append(reloads(original, compressed, batches[0]))
    return tuple(proofs)


def equivalence(
    original: UniversalModel,
    compressed: UniversalModel,
    plan: CompressionPlan,
    batches: Sequence[Batch],
    supplies: Supplies = NOTHING,
) -> Iterator[Proof]:
    """One proof per step, as far as steps can be carried out again."""
    stage, supplies = original, replace(supplies, teacher=supplies.teacher or original)
    for number, step in enumerate(plan.steps, start=1):
        last = number == len(plan.steps)
        if method_of(step).trains and not last:
            yield Proof("kept_structure", None, f"{step.method}: not judged: what it learned cannot be carried out again.")
            return
        changed = compressed if last else apply_step_(stage.clone(), step, supplies)[0]
        yield judged(stage, changed, step, batches, supplies)
        stage = changed


def judged(
    before: UniversalModel, after: UniversalModel, step: Step, batches: Sequence[Batch], supplies: Supplies = NOTHING
) -> Proof:
    """Whether `after` is what `step`, as it was carried out with `supplies`, should make of `before`."""
    method = method_of(step)
    name = "kept_structure" if method.trains else "masked_equivalence" if method.structural else "expected_values"
    try:
        if method.trains:
            return _kept_structure(before, after, step, method)
        if method.structural:
            return _masked_equivalence(before, after, step, batches, method, supplies)
        return _expected_values(before, after, step, batches, method, supplies)
    except LayerwiseError as error:  # a result so wrong that it does not run
        return Proof(name, False, f"{step.method}: {error}")


def _masked_equivalence(
    before: UniversalModel,
    after: UniversalModel,
    step: Step,
    batches: Sequence[Batch],
    method: CompressionMethod,
    supplies: Supplies,
) -> Proof:
    left = {layer.name for layer in after.layers}
    names = [layer.name for layer in before.layers if layer.name in left and layer.stream is not None]
    worst, first = _largest_difference(before, after, step, batches, names)
    detail = (
        f"{step.method} on {len(step.layers)} layers: largest difference from the uncut model with them masked, "
        f"relative to its largest output, over {sum(b.size for b in batches)} samples"
    )
    check = _same_ties(before.module, after.module) or method.check_on(before, after, step.layers, supplies)
    if worst <= BOUND and check is not None and not check.passed:
        return Proof("masked_equivalence", False, f"{step.method}: {check.detail}", check.measured, check.bound, check.place)
    if check is not None and not check.passed and any(check.place.startswith(f"{n}.") for n in _narrower(before, after, names)):
        first = check.place  # a layer whose outputs are fewer now cannot be compared
    if (
        BOUND < worst <= NARROW
        and (check is None or check.passed)
        and (finer := _in_double(before, after, step, batches)) is not None
    ):
        detail += f"; in float32 {worst:.2g}, over the bound of {BOUND:g} there, therefore asked again in float64"
        return Proof("masked_equivalence", finer <= EXACT, detail, finer, EXACT, "" if finer <= EXACT else first)
    return Proof("masked_equivalence", worst <= BOUND, detail, worst, BOUND, "" if worst <= BOUND else first)


def _largest_difference(
    before: UniversalModel, after: UniversalModel, step: Step, batches: Sequence[Batch], names: Sequence[str]
) -> tuple[float, str]:
    """Of `after` from `before` with the layers of `step` masked, and where it begins."""
    masked = method_of(step).masked_like(before, after, step.layers)
    assert masked is not None  # the contract of a structural method
    worst, first = 0.0, ""
    with masked:
        for batch in batches:
            error, layer = _first_difference(before, after, batch, names)
            if not error <= worst:  # NaN counts as the worst of all
                worst, first = error, layer or first
    return worst, first


def _in_double(before: UniversalModel, after: UniversalModel, step: Step, batches: Sequence[Batch]) -> float | None:
    """The largest difference in float64, which tells rounding from a wrong cut; None where the code does not run in it."""
    try:
        finer = [model.clone() for model in (before, after)]
        for model in finer:
            model.module.double()
        doubled = [b.map(lambda t: t.double() if t.is_floating_point() else t) for b in batches]
        return _largest_difference(finer[0], finer[1], step, doubled, ())[0]
    except Exception:  # whatever code raises that wants float32
        return None


def _narrower(before: UniversalModel, after: UniversalModel, names: Sequence[str]) -> list[str]:
    """The layers that give outputs of another shape than before, on the model's example."""
    with before.capture(names) as old, after.capture(names) as new:
        before.predict(before.example)
        after.predict(before.example)
    return [n for n in names if n in old and n in new and old[n][1].shape != new[n][1].shape]


def _first_difference(before: UniversalModel, after: UniversalModel, batch: Batch, names: Sequence[str]) -> tuple[float, str]:
    """The outputs' relative difference, and the first of the layers `names` whose outputs are further apart than the bound."""
    with before.capture(names) as wanted:
        expected = before.predict(batch)
    with after.capture(names) as found:
        output = after.predict(batch)
    pairs = {n: (found[n][1], wanted[n][1]) for n in names if n in wanted and n in found}
    # a cut layer may rightly give fewer features; then the next one whose shape stayed tells
    apart = (n for n, (a, b) in pairs.items() if a.shape == b.shape and not relative_error(a, b) <= BOUND)
    return relative_error(output, expected), next(apart, "the model's outputs")


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """max |a − b| / max |b|; infinite for another shape, NaN where one is not finite and the other not the same infinity."""
    if found.shape != wanted.shape:
        return float("inf")
    found, wanted = unbounded_alike(found.double(), wanted.double().to(found.device))
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    apart = float((found - wanted).abs().max()) if wanted.numel() else 0.0
    return apart / largest if largest else apart


def _expected_values(
    before: UniversalModel,
    after: UniversalModel,
    step: Step,
    batches: Sequence[Batch],
    method: CompressionMethod,
    supplies: Supplies,
) -> Proof:
    check = _same_modules(before.module, after.module) or _same_ties(before.module, after.module)
    check = check or method.check_on(before, after, step.layers, supplies)
    assert check is not None  # the contract of a method that is not structural
    detail = f"{step.method}: {check.detail}"
    if check.passed:  # otherwise it may not even run
        moved = relative_error(after.predict(batches[0]), before.predict(batches[0]))
        detail += f"; the outputs move by {moved:.2g} of the largest"
    return Proof("expected_values", check.passed, detail, float(check.measured), float(check.bound), check.place)


def _kept_structure(before: UniversalModel, after: UniversalModel, step: Step, method: CompressionMethod) -> Proof:
    """Training leaves modules, names and shapes alone; the method's own check may ask for more (masks, finite weights)."""
    check = _same_modules(before.module, after.module) or _same_shapes(before.module, after.module)
    check = check or _same_ties(before.module, after.module)
    check = check or method.check(before, after, step.layers) or Check(0, 0, "modules, names and shapes are as they were")
    return Proof("kept_structure", check.passed, f"{step.method}: {check.detail}", check.measured, check.bound, check.place)


def _same_shapes(before: nn.Module, after: nn.Module) -> Check | None:
    old, new = ({name: tuple(t.shape) for name, t in state(m).items()} for m in (before, after))
    other = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return Check(len(other), 0, "tensors of another shape than before training", other[0]) if other else None


def _same_ties(before: nn.Module, after: nn.Module) -> Check | None:
    """What was one tensor under several names still is: two copies are equal only until one of them is changed."""
    old, new = state(before), state(after)
    first = dict[int, str]()
    owners = {name: first.setdefault(id(tensor), name) for name, tensor in old.items()}
    apart = [n for n, owner in owners.items() if n in new and owner in new and new[n] is not new[owner]]
    return Check(len(apart), 0, "tensors that were one and are two", apart[0]) if apart else None


def _same_modules(before: nn.Module, after: nn.Module) -> Check | None:
    """A method that changes values leaves the modules alone."""
    old = {name: type(m) for name, m in before.named_modules()}
    new = {name: type(m) for name, m in after.named_modules()}
    other = [name for name in {**old, **new} if old.get(name) is not new.get(name)]
    return Check(len(other), 0, "modules that are not of the class they were", other[0]) if other else None


def shrinkage(plan: CompressionPlan, before: Measurement, after: Measurement) -> Proof:
    """Whether every promised cost fell and every target on a cost is met. Measured and bound are of the worst of them."""
    old, new = before.figures(), after.figures()
    promised = sorted({metric for step in plan.steps for metric in method_of(step).shrinks})
    bounds = [(metric, new[metric], old[metric] - 1, new[metric] < old[metric]) for metric in promised]  # all whole numbers
    bounds += [
        (str(t), new[t.metric], t.limit(old[t.metric]), t.met(old[t.metric], new[t.metric])) for t in plan.targets if t.is_cost
    ]
    detail = "; ".join([*_changes(before, after), speed_in_words(before, after)])
    if not bounds:
        share = 1 - after.nonzero / max(after.params, 1)
        return Proof("shrinkage", None, f"none was promised or asked for: {share:.1%} of the parameters are 0; {detail}")
    broken = [name for name, _, _, holds in bounds if not holds]
    _, measured, bound, _ = max(bounds, key=lambda b: (not b[3], b[1] / b[2] if b[2] else float("inf")))
    text = f"not kept: {', '.join(broken)}; {detail}" if broken else detail
    return Proof("shrinkage", not broken, text, measured, bound)


def _changes(before: Measurement, after: Measurement) -> list[str]:
    figures = {"parameters": (before.params, after.params), "bytes": (before.size, after.size), "MACs": (before.macs, after.macs)}
    return [f"{name} {old:,} → {new:,} ({new / max(old, 1):.2f}x)" for name, (old, new) in figures.items()]


def speed_in_words(before: Measurement, after: Measurement) -> str:
    """Faster or slower only when the medians are further apart than the spreads."""
    times = f"{before.latency:.3g} → {after.latency:.3g} ms per batch of {after.batch_size}"
    noise = before.latency_spread + after.latency_spread
    if after.latency < before.latency - noise:
        return f"{before.latency / after.latency:.2f}x faster ({times})"
    if after.latency > before.latency + noise:
        return f"no speed-up: {after.latency / before.latency:.2f}x slower on this device ({times})"
    return f"no speed-up shown: the two times differ by less than their spreads, together {noise:.3g} ms ({times})"


def reloads(original: UniversalModel, compressed: UniversalModel, batch: Batch) -> Proof:
    """Saves to a temporary folder, builds the model again and compares its outputs on `batch` bit for bit."""
    with tempfile.TemporaryDirectory(prefix="layerwise-proof-") as place:
        folder = Path(place) / "model"
        try:
            save_model(compressed, folder)
            if unfolded(compressed.source)[0] is not None:
                reload = reload_in_fresh_process(folder, compressed, batch)
            else:
                reload = _in_this_process(folder, original, compressed, batch)
        except LayerwiseError as error:
            return Proof("reload", False, f"it cannot be saved and built again: {error}", bound=0.0)
    return Proof("reload", reload.equal, reload.detail, reload.difference, 0.0)


def _in_this_process(folder: Path, original: UniversalModel, compressed: UniversalModel, batch: Batch) -> Reload:
    """For a model given as a plain object: rebuilt on a copy of it whose weights are gone, so that nothing stale can pass."""
    blank = copy.deepcopy(original.module)
    for tensor in blank.state_dict(keep_vars=True).values():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            tensor.data = torch.full_like(tensor.data, torch.nan)
    again = load_saved(folder, module=blank, applied=len(unfolded(original.source)[1]))
    again.module.to(compressed.device)
    detail = "in this process, on a copy of the given object with its weights overwritten by NaN: a plain object has no source"
    return Reload.of(again.predict(batch), compressed.predict(batch), detail)


__all__ = ["BATCHES", "equivalence", "judged", "prove", "relative_error", "reloads", "shrinkage", "speed_in_words"]
