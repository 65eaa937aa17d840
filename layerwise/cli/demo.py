"""Train a small vision transformer on handwritten digits and do the whole walk with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from layerwise.cli import checks
from layerwise.cli.leaderboard import show_leaderboard
from layerwise.cli.options import verb
from layerwise.cli.screen import Screen
from layerwise.cli.stopping import Stopped
from layerwise.config import RunConfig
from layerwise.errors import ProofFailed
from layerwise.runfolder import CONFIG, final_of, partial_of, resume_command

if TYPE_CHECKING:
    from layerwise.data import Batch
    from layerwise.model import UniversalModel
    from layerwise.run import Outcome

TARGETS = ("size<=0.5x", "accuracy>=0.98x")
OUT = "runs/demo"
ENOUGH = 0.97  # accuracy on held-out digits, below which the network is no fair example


@verb("lang", "database", "timeout")
def command(config: RunConfig, screen: Screen) -> int:
    """Trains once (about half a minute) and keeps the weights in your cache folder; writes runs/demo, or --out."""
    from layerwise import engine
    from layerwise import run as walk
    from layerwise.cli.digits import one_thread

    checks.device(config.device)
    final = final_of(Path(config.out or OUT))
    with one_thread():
        weights = trained_weights(screen)
        screen.say(f"Asked for: {' and '.join(TARGETS)}, measured on held-out digits.")
        settings = demo_settings(config, weights, final)
        try:
            outcome = walk.run(settings, resume=(partial_of(final) / CONFIG).is_file(), listener=screen)
        except Stopped as stop:
            stop.resume = resume_command(final) if partial_of(final).is_dir() else ""
            raise
    screen.document({"folder": str(outcome.folder), "result": outcome.result.to_dict(), "missed": list(outcome.missed)})
    _tell(outcome, screen)
    screen.say("\nThe leaderboard (vision):")
    show_leaderboard(engine.leaderboard("vision", database=config.database), screen)
    screen.say(f"The report:  {outcome.folder / 'report.html'}")
    return 1 if outcome.missed else 0


def demo_settings(config: RunConfig, weights: Path, final: Path) -> RunConfig:
    """The walk's settings: ranked and planned on the training digits, judged on those held out."""
    from layerwise.cli.digits import DATA, SPEC

    return RunConfig(
        model=SPEC,
        weights=str(weights),
        data=DATA,
        split="train",
        limit=512,
        batch_size=64,
        eval_split="test",
        methods=("all",),
        targets=TARGETS,
        export=("model.onnx",),
        device=config.device,
        seed=config.seed,
        out=str(final),
        lang=config.lang,
        database=config.database,
        force=True,
    )


def trained_weights(screen: Screen) -> Path:
    """The demo network's weights file, from the cache or from a training now.

    Raises `ProofFailed` when the training does not reach 97 % on held-out digits.
    """
    from layerwise import engine
    from layerwise.cli import digits

    recipe = digits.Recipe()
    if found := digits.cached_weights(recipe):
        screen.say(f"The 8-block vision transformer for 8×8 digits was trained before: {found}")
        return found
    model = engine.load(digits.SPEC, "classification")
    train, test = ((b.args[0], b.labels) for b in (_all(model, "train"), _all(model, "test")))
    screen.say(f"Training an 8-block vision transformer on {len(train[0]):,} handwritten digits of 8×8 pixels ...")
    with screen.progress("Training") as progress:
        digits.train_(model, *train, recipe, progress)
    reached = digits.accuracy(model, *test)
    screen.say(f"It reads {reached:.1%} of {len(test[0])} held-out digits.")
    if reached < ENOUGH:
        raise ProofFailed(f"The training reached {reached:.1%}, less than {ENOUGH:.0%}.", place="demo", code="LW-V30")
    return digits.keep_weights(model.module, recipe)


def _all(model: UniversalModel, split: str) -> Batch:
    """All digits of one part as one batch, prepared as the walk will do it."""
    from layerwise import engine
    from layerwise.cli.digits import DATA

    return engine.load_data(DATA, model, split, batch_size=1 << 20)[0]


def _tell(outcome: Outcome, screen: Screen) -> None:
    """What came out, in words."""
    from layerwise.report import formats

    result = outcome.result
    before, after = result.before, result.after
    steps = [f"{step.method} on {len(step.layers) or 'all'} layers" for step in result.plan.steps]
    passed = sum(proof.passed is True for proof in result.proofs)
    ratio = formats.times
    first, then = before.metrics["accuracy"], after.metrics["accuracy"]
    screen.say("\nWhat came out:")
    screen.say(f"  size      {formats.size(before.size)} → {formats.size(after.size)} ({ratio(result.ratio)})")
    screen.say(f"  accuracy  {formats.percent(first)} → {formats.percent(then)} ({ratio(formats.quotient(first, then))})")
    speed = f"{formats.milliseconds(before.latency)} → {formats.milliseconds(after.latency)}"
    screen.say(f"  latency   {speed} per batch of {after.batch_size}")
    screen.say(f"  how       {'; '.join(steps) or 'nothing was cut'}")
    screen.say(f"  proofs    {passed} of {len(result.proofs)} checks passed, the rest do not apply")
    for artifact in outcome.artifacts:
        screen.say(f"  exported  {artifact['path']}, run and compared in {artifact['runtime']}")
    screen.say("  Both targets are met." if not outcome.missed else f"  Missed: {'; '.join(outcome.missed)}")
