"""One subject examined: damages, every method's scores, curves and allocations as raw figures, piece by piece into a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from layerwise.analyzer import ImportanceAnalyzer
from layerwise.benchmark import contenders, measuring
from layerwise.benchmark.allocation import allocate, weights_of
from layerwise.benchmark.hurting import input_norms
from layerwise.benchmark.protocol import DAMAGES, MEAN_BITS, Protocol
from layerwise.benchmark.store import Store
from layerwise.benchmark.subjects import Parts, Subject
from layerwise.evaluation import Evaluation
from layerwise.model import UniversalModel
from layerwise.swapping import swapped

Progress = Callable[[str, int, int], None]  # what, done, in all


@dataclass(frozen=True)
class Study:
    """`examine` gives the subject's raw figures; whatever the store holds is not done again."""

    subject: Subject
    protocol: Protocol
    store: Store
    progress: Progress

    @cached_property
    def parts(self) -> Parts:
        return self.subject.open()

    @property
    def model(self) -> UniversalModel:
        return self.parts.model

    def examine(self, methods: Mapping[str, ImportanceAnalyzer]) -> dict[str, Any]:
        """Everything measured of this subject, as plain data."""
        about = self.store.once("about", self._about)
        damages = self.store.once("damages", self._damages)
        results = {}
        for done, (label, analyzer) in enumerate(methods.items(), start=1):
            results[label] = self._method(label, analyzer)
            self.progress("methods", done, len(methods))
        greedy = self.store.once("greedy", self._greedy)
        results["greedy"] = self._as_method(greedy)
        curves = self._curves(results, greedy)
        return about | {
            "damages": damages,
            "methods": results,
            "curves": curves,
            "allocation": self._allocations(results),
        }

    def _about(self) -> dict[str, Any]:
        evaluation = Evaluation(self.model.task)  # type: ignore[arg-type]  # settled by `parts`
        for batch in self.parts.evaluation:
            output = self.model.predict(batch)
            evaluation.add(output, batch, output)
        last = max(len(self.model.layers) - 1, 1)
        layers = [
            {"layer": x.name, "depth": x.index / last, "parameters": x.parameters, "kind": x.kind, "skippable": x.skippable}
            for x in self.model.layers
        ]
        return {
            "model": self.subject.name,
            "domain": self.subject.domain,
            "about": self.subject.about,
            "shares": self.subject.shares,
            "notes": list(self.parts.notes),
            "quality": evaluation.means(),
            "samples": {
                "calibration": self.parts.calibration.samples,
                "second": self.parts.second.samples,
                "evaluation": evaluation.samples,
            },
            "fingerprint": self.model.fingerprint,
            "layers": layers,
        }

    def _damages(self) -> dict[str, Any]:
        norms = input_norms(self.model, self.parts.calibration)
        return measuring.measure_damages(self.model, self.parts.evaluation, norms, DAMAGES, self._bar("damages"))

    def _method(self, label: str, analyzer: ImportanceAnalyzer) -> dict[str, Any]:
        """The scores from calibration A, and those from B and from weights drawn anew."""
        source = contenders.source_of(analyzer)

        def piece(which: str, make: Callable[[], Any]) -> Any:
            return self.store.once(f"method.{label}.{which}", make, source)

        seed, whole = self.protocol.seed, self.parts.calibration
        first = piece("a", lambda: contenders.judged(analyzer, self.model, whole, seed))
        if "failure" in first:
            return dict(first)
        second = piece("b", lambda: contenders.judged(analyzer, self.model, self.parts.second, seed))
        quarter = whole.head(max(whole.samples // 4, 8))
        noise = piece("noise", lambda: contenders.judged(analyzer, self._noise, quarter, seed))
        return first | {"second": second.get("scores", {}), "noise": noise.get("scores", {})}

    @cached_property
    def _noise(self) -> UniversalModel:
        return contenders.drawn_anew(self.model, self.protocol.seed)

    def _greedy(self) -> list[int]:
        data = self.parts.calibration.head(self.protocol.curve_samples)
        return measuring.greedy_order(self.model, data, self._bar("greedy order"))

    def _as_method(self, order: Sequence[int]) -> dict[str, Any]:
        names, count = [x.name for x in self.model.layers], len(order)
        missing = {x.name: f"cannot be skipped: {x.reason}" for x in self.model.layers if not x.skippable}
        scores = {names[index]: float(place) for place, index in enumerate(order)}
        return {"scores": scores, "missing": missing, "passes": count * (count + 1) / 2, "counts": {}}

    def _orders(self, results: Mapping[str, Any]) -> dict[str, list[int]]:
        """Label → skippable layers, least important first; layers without a score last, ties in the model's order."""
        able = [x for x in self.model.layers if x.skippable]
        return {
            label: [x.index for x in sorted(able, key=lambda x: (found["scores"].get(x.name, float("inf")), x.index))]
            for label, found in results.items()
            if "failure" not in found
        }

    def _curves(self, results: Mapping[str, Any], greedy: Sequence[int]) -> dict[str, Any]:
        """Label → the mean quality along its order; the random orders under ``random orders``."""
        generator = np.random.default_rng(self.protocol.seed)
        orders = self._orders(results) | {"greedy": list(greedy)}
        drawn = [generator.permutation(greedy).tolist() for _ in range(self.protocol.random_orders)]
        every = [*orders.values(), *drawn]
        wanted = {frozenset(order[:k]) for order in every for k in range(len(order) + 1)}
        found = self._qualities(wanted)

        def area(order: Sequence[int]) -> float:
            return float(np.mean([found[frozenset(order[:k])] for k in range(len(order) + 1)]))

        return {"methods": {k: area(v) for k, v in orders.items()}, "random orders": [area(order) for order in drawn]}

    def _qualities(self, wanted: set[frozenset[int]]) -> dict[frozenset[int], float]:
        """From the store where an earlier run has measured the set, else measured now."""
        known = {frozenset(s): q for s, q in self.store.once("sets", list)}
        todo = wanted - known.keys()
        if todo:
            data = self.parts.evaluation.head(self.protocol.curve_samples)
            known |= measuring.qualities(self.model, data, todo)
            self.store.replace("sets", [[sorted(s), q] for s, q in known.items()])
        return known

    def _allocations(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Label → dce with its bits; ``random`` rankings and one width everywhere beside them."""
        names = [x.name for x in self.model.layers]
        sizes = [sum(p.numel() for p in x.module.parameters() if p.dim() > 1) for x in self.model.layers]
        generator = np.random.default_rng(self.protocol.seed)
        bits = {k: allocate(weights_of(v["scores"], names), sizes) for k, v in results.items() if "failure" not in v}
        drawn = [allocate((generator.permutation(len(names)) + 1.0).tolist(), sizes) for _ in range(self.protocol.random_orders)]
        dce = self._losses([*bits.values(), *drawn, [MEAN_BITS] * len(names)])
        return {
            "methods": {k: {"bits": b, "dce": dce[tuple(b)]} for k, b in bits.items()},
            "random rankings": [dce[tuple(b)] for b in drawn],
            "one width": dce[(MEAN_BITS,) * len(names)],
        }

    def _losses(self, choices: Sequence[Sequence[int]]) -> dict[tuple[int, ...], float]:
        known = {tuple(b): loss for b, loss in self.store.once("allocations", list)}
        todo = {tuple(b) for b in choices} - known.keys()
        if todo:
            whole = self.store.once("whole", lambda: measuring.mean_loss(self.model, self.parts.evaluation))
            for done, bits in enumerate(sorted(todo), start=1):
                with swapped(measuring.allocated(self.model, bits)):
                    known[bits] = measuring.mean_loss(self.model, self.parts.evaluation) - whole
                self.progress("allocations", done, len(todo))
            self.store.replace("allocations", [[list(b), loss] for b, loss in known.items()])
        return known

    def _bar(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(what, done, total)
