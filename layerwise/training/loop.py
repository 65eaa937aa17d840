"""`train_`: epochs of steps, each judged on validation data; saved, stopped, resumed."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor, nn

from layerwise.data import Batch, Data
from layerwise.errors import OutOfMemory, ProofFailed, UsageError
from layerwise.measure import evaluate
from layerwise.metric import METRICS
from layerwise.model import UniversalModel
from layerwise.progress import tracked
from layerwise.supplies import Supplies
from layerwise.tensors import wraps
from layerwise.trace import out_of_memory
from layerwise.training.crew import Crew, crew_for
from layerwise.training.objective import TASK_LOSS, Lesson, Objective
from layerwise.training.record import Epoch, Trained
from layerwise.training.settings import TrainingSettings
from layerwise.training.state import Progress, State, copied, put_

AfterStep = Callable[[nn.Module], None]
BeforeStep = Callable[[nn.Module, int, int], None]  # the module, the number of the step from 0, how many there are

SAVE_EVERY = 5.0  # seconds between checkpoints, or longer where saving itself takes long:
SAVING_SHARE = 0.05  # of the time at most
READ_EVERY = 16  # steps between looks at the loss on a GPU, where each look makes it wait
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def train_(
    model: UniversalModel,
    supplies: Supplies,
    objective: Objective = TASK_LOSS,
    settings: TrainingSettings | None = None,
    *,
    before_step: BeforeStep | None = None,
    after_step: AfterStep | None = None,
) -> Trained:
    """Trains ``model.module`` in place on ``supplies.training`` and says what happened.

    Trained are the parameters that require a gradient; submodules without any stay in eval mode (frozen batch normalization).
    `before_step` may change weights before each step, and does the same again where a step is repeated; `after_step` is called
    with the module after each (`KeptZeros`). Afterwards train flags, gradients and the random state
    are those of before. With ``supplies.checkpoint`` the state is saved every few seconds, after each epoch and on Ctrl-C, and a
    later call goes on from it: on the CPU to the same bits. After an error the model has the weights of the last whole step.

    Raises `UsageError` where nothing can be trained or learned from, `ProofFailed` (LW-V05) when the loss is not finite,
    `OutOfMemory`, `CorruptRun` (LW-R11) for a checkpoint of other work.
    """
    supplies.check("training", frozenset({"training"}))
    assert supplies.training is not None
    settings = settings or TrainingSettings()
    _check_trainable(model)
    model.see(supplies.training[0].to(model.device))
    with crew_for(supplies.executor, model.module) as crew, _restored(model.module):
        run = _Run(model, supplies, objective, settings, crew)
        run.before_step, run.after_step = before_step, after_step
        return run.whole()


class _Run:
    def __init__(
        self, model: UniversalModel, supplies: Supplies, objective: Objective, settings: TrainingSettings, crew: Crew
    ) -> None:
        assert supplies.training is not None
        self.model, self.supplies, self.settings, self.crew = model, supplies, settings, crew
        self.data: Data = supplies.training
        self.before_step: BeforeStep | None = None
        self.after_step: AfterStep | None = None
        self.key = _key(model, supplies, objective, settings) if supplies.checkpoint is not None else ""
        with seeded(settings.step_seed(-1), model.device):
            self.lesson: Lesson = objective.begin(model, supplies)
        self.parameters = [p for p in model.module.parameters() if p.requires_grad]
        if self.lesson.companion is not None:
            self.parameters += [p for p in self.lesson.companion.parameters() if p.requires_grad]
        self.optimizer = settings.optimizer_for(self.parameters)
        self.progress = Progress()
        self.state = State(model.module, self.lesson.companion, self.optimizer, self.progress)
        self.steps = settings.epochs * len(self.data)
        self.losses: dict[int, Tensor] = {}  # step, counted from 1 → its loss, while nobody has looked at it
        self.saved, self.saving = time.monotonic(), 0.0

    def whole(self) -> Trained:
        notes = [] if self.supplies.checkpoint is None else self.state.resume_(self.supplies.checkpoint, self.key)
        try:
            for _ in self._reported(self._steps()):
                pass
        except BaseException as stop:
            if not isinstance(stop, Exception):  # Ctrl-C: what a step began has been taken back
                self._save(alone=True)
            raise
        p = self.progress
        if self.settings.keep_best and p.best_weights:
            put_(self.model.module, p.best_weights)
        best = p.best if self.settings.keep_best else None
        return Trained(tuple(p.epochs), p.step, best, p.stopped, p.counts, tuple(notes))

    def _reported(self, steps: Iterator[int]) -> Iterator[int]:
        """The steps, each told to whoever wants to know; by default a bar on the terminal."""
        report = self.supplies.progress
        if not self.crew.first:
            yield from steps
        elif report is None:
            yield from tracked(steps, f"training {self.model.name}", total=self.steps - self.progress.step)
        else:
            for step in steps:
                report(step, self.steps)
                yield step

    def _steps(self) -> Iterator[int]:
        p, batches = self.progress, len(self.data)
        while not p.stopped:
            if p.step == batches * len(p.epochs):  # the epoch that ran last is not judged yet, or the model before training
                self._judge()
                self._save()
            elif p.step < self.steps:
                self._step()
                yield p.step
            else:
                return

    def _step(self) -> None:
        p, number = self.progress, self.progress.step
        index = self.settings.order(number // len(self.data), len(self.data))[number % len(self.data)]
        before = [(b, b.clone()) for b in self._buffers()]  # batch normalization writes while it runs
        if self.before_step is not None:
            self.before_step(self.model.module, number, self.steps)
        try:
            with training(self.model.module), seeded(self.settings.step_seed(number), self.model.device):
                loss = self._backward(self.data[index].to(self.model.device), index)
            with held_back():
                self._update(loss)
        except BaseException as error:
            if p.step == number:
                _put_back(before)
            if isinstance(error, Exception) and out_of_memory(error):
                raise OutOfMemory(
                    f"A step on batch {index} does not fit into memory.",
                    place=self.model.name,
                    remedy="Use smaller batches or shorter inputs; what is saved is kept.",
                ) from error
            raise
        if time.monotonic() - self.saved > max(SAVE_EVERY, self.saving / SAVING_SHARE):
            self._save()

    def _buffers(self) -> Iterator[Tensor]:
        yield from self.model.module.buffers()
        if self.lesson.companion is not None:
            yield from self.lesson.companion.buffers()

    def _backward(self, batch: Batch, index: int) -> Tensor:
        """The step's loss over all processes, and every parameter's gradient of it."""
        for parameter in self.parameters:
            parameter.grad = None
        part = self.crew.part(batch, index)
        total = torch.zeros((), dtype=torch.float64, device=self.model.device)
        if part is not None:
            loss = self.lesson.loss(*part) * part[1].share
            if loss.requires_grad:
                loss.backward()
            total += loss.detach()
        self.crew.gather_gradients_(self.parameters)
        self.crew.sum_([total])
        return total

    def _update(self, loss: Tensor) -> None:
        p, settings = self.progress, self.settings
        self.losses[p.step + 1] = loss
        if self.model.device.type == "cpu" or len(self.losses) >= READ_EVERY:
            self._look()
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate(p.step, self.steps)
        if settings.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, settings.clip)
        self.optimizer.step()
        if self.after_step is not None:
            self.after_step(self.model.module)
        self.crew.mean_([b for b in self.model.module.buffers() if b.is_floating_point()])
        p.step += 1
        p.counts.forwards += 1
        p.counts.backwards += 1

    def _look(self) -> None:
        """Reads the losses that have gathered. Raises `ProofFailed` for the first that is not finite."""
        steps, self.losses = self.losses, {}
        values = torch.stack(list(steps.values())).tolist() if steps else []
        for step, value in zip(steps, values, strict=True):
            if not math.isfinite(value):
                raise ProofFailed(
                    f"The loss became {value} in step {step} of {self.steps}.",
                    place=self.model.name,
                    remedy=f"Lower the learning rate ({self.settings.learning_rate:g}), warm up for longer, or clip gradients.",
                    code="LW-V05",
                )
            self.progress.loss += value

    def _judge(self) -> None:
        """Ends the epoch: its record, whether it is the best, whether to go on."""
        p, number = self.progress, len(self.progress.epochs)
        self._look()
        metrics = self._metrics()
        figures = self.lesson.figures() if number else {}
        p.epochs.append(Epoch(number, p.loss / len(self.data) if number else None, metrics, figures))
        p.loss = 0.0
        if not metrics:
            return
        name, higher = self._monitored(metrics)
        best = None if p.best is None else p.epochs[p.best].metrics[name]
        now = metrics[name]
        if best is None or best != best or (now > best if higher else now < best):  # NaN is worse than any
            p.best, p.worse = number, 0
            if self.settings.keep_best:
                p.best_weights = copied(self.model.module)
        else:
            p.worse += 1
            if self.settings.patience and p.worse >= self.settings.patience:
                p.stopped = f"no better {name} than {best:.6g} for {p.worse} epochs"

    def _metrics(self) -> dict[str, float]:
        """On the validation data; none where nothing hangs on them or, without labels and teacher, they say nothing."""
        validation, task, teacher = self.supplies.validation, self.model.task, self.supplies.teacher
        assert task is not None
        compares = task.name == "fidelity"
        if validation is None or not (self.settings.keep_best or self.settings.patience) or (compares and teacher is None):
            return {}
        self.progress.counts.forwards += len(validation)
        return evaluate(self.model, validation, reference=teacher if compares else None).means()

    def _monitored(self, metrics: Mapping[str, float]) -> tuple[str, bool]:
        task = self.model.task
        assert task is not None
        name = task.quality if self.settings.monitor == "quality" else self.settings.monitor
        if name not in metrics:
            raise UsageError(f"The task {task.name} has no metric {name!r}.", remedy=f"Known: {', '.join(sorted(metrics))}.")
        if name == task.quality:
            return name, task.higher_is_better
        return name, name in METRICS and METRICS[name].higher_is_better

    def _save(self, *, alone: bool = False) -> None:
        """`alone`: without waiting for other processes, which may be gone."""
        folder = self.supplies.checkpoint
        if folder is None:
            return
        self._look()
        started = time.monotonic()
        if self.crew.first:
            with held_back():
                self.state.save(folder, self.key)
        if not alone:
            self.crew.wait()
        self.saved = time.monotonic()
        self.saving = self.saved - started


def _check_trainable(model: UniversalModel) -> None:
    """Raises `UsageError` for weights that cannot be trained, with the reason."""
    if reason := untrainable(model.module):
        raise UsageError(f"{model.name} cannot be trained: {reason}.")


def untrainable(module: nn.Module) -> str:
    """'' or why the parameters of `module` cannot be trained."""
    named = list(module.named_parameters())
    for name, parameter in named:
        if wraps(parameter):
            return f"{name} is quantized; train before quantizing"
        if parameter.dtype in (torch.float16, torch.bfloat16):
            kind = str(parameter.dtype).removeprefix("torch.")
            return f"{name} is in {kind}, in which small steps round to nothing; train before half_precision"
    return "" if any(p.requires_grad for _, p in named) else "no parameter requires a gradient"


@contextmanager
def only_training(module: nn.Module, chosen: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, of the parameters that require a gradient only those in the `chosen` submodules do."""
    wanted = {id(p) for inner in chosen for p in inner.parameters()}
    frozen = [p for p in module.parameters() if p.requires_grad and id(p) not in wanted]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def _key(model: UniversalModel, supplies: Supplies, objective: Objective, settings: TrainingSettings) -> str:
    """What a checkpoint must agree with."""
    assert supplies.training is not None
    validation = "" if supplies.validation is None else supplies.validation.fingerprint
    frozen = ",".join(n for n, p in model.module.named_parameters() if not p.requires_grad)
    recipe = json.dumps(asdict(settings), sort_keys=True)
    return "|".join((model.fingerprint, supplies.training.fingerprint, validation, objective.key(supplies), recipe, frozen))


def _put_back(values: Iterable[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for tensor, value in values:
            tensor.copy_(value)


@contextmanager
def training(module: nn.Module) -> Iterator[None]:
    """Train mode inside, but for submodules with parameters of which none is trained; each flag is put back afterwards."""
    flags = [(m, m.training) for m in module.modules()]
    module.train()
    for inner in module.modules():
        own = list(inner.parameters())
        if own and not any(p.requires_grad for p in own):
            inner.eval()
    try:
        yield
    finally:
        for m, flag in flags:
            m.training = flag


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's random numbers begin at `seed`; its state is put back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """Afterwards every parameter has the gradient that it had."""
    before = [(p, p.grad) for p in module.parameters()]
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


@contextmanager
def held_back() -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM wait until the end: half an update could not be saved."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting = list[int]()
    before = {int(number): signal.signal(number, lambda n, frame: waiting.append(n)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number in waiting:
            signal.raise_signal(number)
