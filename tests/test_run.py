"""The walk into a run folder: whole, interrupted, resumed, damaged, refused (faults F6, F7, F11, F23)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from layerwise import engine, observe
from layerwise import run as walk
from layerwise.cli import main
from layerwise.cli.stopping import Stopped
from layerwise.config import RunConfig, load_config
from layerwise.errors import CorruptRun, LayerwiseError, OutputBusy, ProofFailed, TargetMissed, UsageError
from layerwise.feeding import Feeder
from layerwise.files import output_lock, verify_manifest
from layerwise.proofs import prove
from layerwise.result import Proof
from layerwise.runfolder import partial_of
from tests.conftest import ROOT
from tests.projects import Project, make_project

VERBS = ("analyze", "plan", "compress", "track", "leaderboard")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return make_project(tmp_path / "project")


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each verb was called. The proof that starts a process of its own is left out: it takes seconds."""
    counted: Counter[str] = Counter()

    def counting(name: str, verb: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        counted[name] += 1
        return verb(*args, **kwargs)

    for name in VERBS:
        monkeypatch.setattr(engine, name, partial(counting, name, getattr(engine, name)))
    monkeypatch.setattr(engine, "prove", partial(prove, reload=False))
    return counted


def settings(project: Project, place: str = "out", **more: Any) -> RunConfig:
    base = RunConfig(
        model=project.model, data=str(project.data), batch_size=4, methods=("layer_ablation", "weight_norm"),
        compress_methods=("drop_layers",), targets=("params<=0.9x",), out=str(project.folder / place),
    )  # fmt: skip
    return base.model_copy(update=more)


class Notes(walk.Quiet):
    """Keeps what is said, and can stop the walk at the n-th sign of progress."""

    def __init__(self, stop_at: int = 0, stop: Callable[[], None] | None = None) -> None:
        self.said: list[str] = []
        self.left = stop_at
        self.stop = stop

    def note(self, text: str) -> None:
        self.said.append(text)

    @contextlib.contextmanager
    def progress(self, label: str) -> Iterator[walk.Progress]:
        def moved(done: int, total: int) -> None:
            self.left -= 1
            if self.left == 0 and self.stop:
                self.stop()

        yield moved


def interrupt() -> None:
    raise Stopped(signal.SIGTERM)


def scores_of(folder: Path) -> list[list[Any]]:
    """Everything in the scores but the seconds, floats to their last bit."""
    frame = pd.read_parquet(folder / "scores.parquet").drop(columns="seconds")
    return [[v.hex() if isinstance(v, float) else v for v in row] for row in frame.astype(object).to_numpy().tolist()]


def same_result(one: Path, other: Path) -> None:
    assert scores_of(one) == scores_of(other)
    assert (one / "plan.yaml").read_bytes() == (other / "plan.yaml").read_bytes()
    assert (one / "model/weights.safetensors").read_bytes() == (other / "model/weights.safetensors").read_bytes()


def test_the_whole_walk_leaves_one_complete_folder(project: Project) -> None:
    outcome = walk.run(settings(project, export=("onnx",)))
    folder = project.folder / "out"
    assert outcome.folder == folder
    verify_manifest(folder)
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml", "environment.json", "stages.json", "report.json", "scores.parquet", "plan.yaml", "model", "result.json",
        "artifacts", "artifacts.json", "report.html", "figures", "manifest.json",
    }  # fmt: skip
    assert {p.name for p in project.folder.iterdir()} - {"__pycache__"} == {"net.py", "rows.csv", "out"}  # no lock, no partial
    assert (folder / "artifacts" / "model.onnx").stat().st_size == outcome.artifacts[0]["size"]
    assert [p.name for p in outcome.result.proofs][-1] == "export_parity"
    board = engine.leaderboard()
    assert list(board["model"]) == ["net"]
    page = (folder / "report.html").read_text()
    assert "net" in page
    assert "of the largest output (bound 0.0001)" in page
    assert outcome.missed == ()


def test_the_written_configuration_does_the_same_run_again(project: Project) -> None:
    walk.run(settings(project))
    again = load_config(project.folder / "out" / "config.yaml", out=str(project.folder / "again"))
    walk.run(again)
    same_result(project.folder / "out", project.folder / "again")


def test_the_environment_names_versions_and_no_user(project: Project) -> None:
    walk.run(settings(project, seed=3))
    text = (project.folder / "out" / "environment.json").read_text()
    said = json.loads(text)
    assert said["seed"] == 3
    assert said["packages"]["torch"].startswith("2.")
    assert said["threads"] >= 1
    assert str(Path.home()) not in text
    assert str(project.folder) not in text


@pytest.mark.parametrize("failing", ["plan", "compress", "track"])
def test_finished_stages_are_not_repeated(
    failing: str, project: Project, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError("the fault fired")

    with monkeypatch.context() as patch:
        patch.setattr(engine, failing, broken)
        with pytest.raises(OSError, match="the fault fired"):
            walk.run(settings(project))
    before = Counter(calls)
    walk.run(settings(project), resume=True)
    order = ["analyze", "plan", "compress", "track"]
    for verb in order:
        assert calls[verb] == 1, (verb, before)
    assert before.keys() >= set(order[: order.index(failing)])


@pytest.mark.parametrize("at", [1, 4, 9, 11, 13])
def test_a_resumed_run_gives_the_same_bits_as_an_unbroken_one(
    at: int, project: Project, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observe, "SAVE_EVERY", 0.0)
    walk.run(settings(project, "unbroken"))
    calls.clear()
    with pytest.raises(Stopped):
        walk.run(settings(project), listener=Notes(at, interrupt))
    assert not (project.folder / "out").exists()
    seen = Notes()
    walk.run(settings(project), resume=True, listener=seen)
    same_result(project.folder / "unbroken", project.folder / "out")
    verify_manifest(project.folder / "out")


def test_resuming_goes_on_from_the_last_batch(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "SAVE_EVERY", 0.0)
    with pytest.raises(Stopped):
        walk.run(settings(project), listener=Notes(4, interrupt))
    fed: list[int] = []
    feed = Feeder.feed
    monkeypatch.setattr(Feeder, "feed", lambda self, index: (fed.append(index), feed(self, index)))
    walk.run(settings(project), resume=True)
    assert len(fed) == 10 - 4


def test_a_corrupt_checkpoint_is_skipped_and_named(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "SAVE_EVERY", 0.0)
    walk.run(settings(project, "unbroken"))
    with pytest.raises(Stopped):
        walk.run(settings(project), listener=Notes(6, interrupt))
    states = sorted((partial_of(project.folder / "out") / "checkpoints").rglob("*.safetensors"))
    assert states, "there is something to damage"
    for state in states:
        raw = bytearray(state.read_bytes())
        raw[-1] ^= 1
        state.write_bytes(raw)
    seen = Notes()
    walk.run(settings(project), resume=True, listener=seen)
    assert any("damaged checkpoint was skipped" in text and states[-1].parent.name in text for text in seen.said), seen.said
    same_result(project.folder / "unbroken", project.folder / "out")


@pytest.mark.parametrize("name", ["report.json", "plan.yaml"])
def test_a_damaged_file_of_a_finished_stage_is_made_again_and_named(
    name: str, project: Project, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine, "compress", partial(_raise, RuntimeError("the fault fired")))
        with pytest.raises(RuntimeError, match="the fault fired"):
            walk.run(settings(project))
    path = partial_of(project.folder / "out") / name
    path.write_bytes(path.read_bytes()[:-3])
    seen = Notes()
    walk.run(settings(project), resume=True, listener=seen)
    stage = {"report.json": "analyze", "plan.yaml": "plan"}[name]
    assert f"{stage} is done again: {name} is damaged." in seen.said
    assert calls[stage] == 2


def test_other_targets_keep_the_analysis(project: Project, calls: Counter[str]) -> None:
    with pytest.raises(TargetMissed):
        walk.run(settings(project, targets=("params<=0.01x",)))
    partial_folder = partial_of(project.folder / "out")
    assert (partial_folder / "report.html").is_file()  # what was found can be looked at
    assert not (project.folder / "out").exists()
    seen = Notes()
    walk.run(settings(project), resume=True, listener=seen)
    assert calls["analyze"] == 1
    assert calls["plan"] == 2
    assert "size" in (project.folder / "out" / "report.html").read_text()


def test_a_failed_proof_saves_no_model(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = (Proof("masked_equivalence", False, "off by 3", 3.0, 1e-5, "blocks.2"),)
    monkeypatch.setattr(engine, "prove", lambda *args, **kwargs: bad)
    with pytest.raises(ProofFailed, match="masked_equivalence: off by 3") as caught:
        walk.run(settings(project))
    assert caught.value.place == "blocks.2"
    left = partial_of(project.folder / "out")
    assert not (left / "model").exists()
    assert "off by 3" in (left / "report.html").read_text()
    assert engine.leaderboard().empty


def test_weights_that_changed_meanwhile_are_refused(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine, "plan", partial(_raise, RuntimeError("the fault fired")))
        with pytest.raises(RuntimeError, match="the fault fired"):
            walk.run(settings(project))
    source = project.folder / "net.py"
    source.write_text(source.read_text().replace("manual_seed(0)", "manual_seed(1)"))
    with pytest.raises(CorruptRun, match="not those that were analyzed"):
        walk.run(settings(project), resume=True)


def test_a_second_run_into_the_same_folder_is_told_the_pid(project: Project) -> None:
    with output_lock(project.folder / "out"), pytest.raises(OutputBusy, match=f"process {os.getpid()} ") as caught:
        walk.run(settings(project))
    assert (caught.value.code, caught.value.exit_code) == ("LW-R23", 4)
    assert not partial_of(project.folder / "out").exists()


def test_a_lock_of_a_dead_process_is_taken_over(project: Project) -> None:
    script = f"import os, layerwise.files as f\nwith f.output_lock({str(project.folder / 'out')!r}): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert (project.folder / "out.lock").is_file()
    walk.run(settings(project))
    assert not (project.folder / "out.lock").exists()


def test_an_artifact_cannot_be_written_outside_the_folder() -> None:
    assert walk.artifact_name("onnx") == "model.onnx"
    assert walk.artifact_name("small.onnx") == "small.onnx"
    for bad in ("../x.onnx", "/x.onnx", ".onnx", "a/b.onnx"):
        with pytest.raises(UsageError, match="not a plain file name"):
            walk.artifact_name(bad)


def test_an_interrupted_finish_is_finished_by_resuming(
    project: Project, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerwise import runfolder

    for place in ("_sync_tree", "write_manifest"):
        with monkeypatch.context() as patch:
            patch.setattr(runfolder, place, partial(_raise, Stopped()))
            with pytest.raises(Stopped):
                walk.run(settings(project), resume=partial_of(project.folder / "out").exists())
    assert not (project.folder / "out").exists()
    walk.run(settings(project), resume=True)
    verify_manifest(project.folder / "out")
    assert calls["analyze"] == calls["track"] == 1


def _raise(error: BaseException, *args: Any, **kwargs: Any) -> None:
    raise error


# real processes and real signals


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    here = {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-m", "layerwise", *arguments],
        env=os.environ | here | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool], child: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < end, "the moment to interrupt never came"
        time.sleep(0.01)


def has_state(partial_folder: Path) -> bool:
    return any((partial_folder / "checkpoints").rglob("manifest.json"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_real_signal_in_the_middle_of_the_analysis(
    number: signal.Signals, code: int, project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    child = start(project.run("out"), SLOW="0.05")
    wait_for(lambda: has_state(partial_of(project.folder / "out")), child)
    begun = time.monotonic()
    child.send_signal(number)
    out, err = child.communicate(timeout=15)
    assert child.returncode == code
    assert time.monotonic() - begun < 10
    assert out == ""
    if number is not signal.SIGKILL:
        line = err.strip().splitlines()[-1]
        assert line == f"LW-R07 Interrupted. Go on with: layerwise run --resume {project.folder / 'out'}"
    assert "Traceback" not in err
    assert not (project.folder / "out").exists()

    assert main(["run", "--resume", str(project.folder / "out")]) == 0  # the lock of a killed run is no hindrance
    assert main(project.run("unbroken")) == 0
    same_result(project.folder / "out", project.folder / "unbroken")
    assert "report.html" in capsys.readouterr().out


def test_a_second_signal_ends_at_once(project: Project) -> None:
    deaf = [arg.replace(":net", ":Deaf") for arg in project.run("out")]
    child = start([*deaf, "--debug"])
    wait_for(lambda: partial_of(project.folder / "out").joinpath("environment.json").exists(), child)
    time.sleep(1.0)  # until the forward runs; a signal before that would end the run at once as well
    child.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert child.poll() is None, "the first signal does not get through to such a model"
    begun = time.monotonic()
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=15)
    assert child.returncode == 130
    assert time.monotonic() - begun < 2


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_fifty_signals_at_fifty_points(project: Project) -> None:
    """F7: wherever a signal hits, the run goes on to the same bits, and each exit takes less than ten seconds."""
    assert main(project.run("unbroken")) == 0
    slowest, resumed, ends = 0.0, 0, Counter[str]()
    for point in range(50):
        out = project.folder / f"out{point}"
        number = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)[point % 3]
        child = start(project.run(out.name), SLOW="0.01")
        wait_for(lambda out=out: partial_of(out).is_dir() or out.is_dir(), child)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.1 + 0.16 * point)
        whole = out.is_dir()  # then Python may be shutting down, where a signal ends it in Python's own way
        begun = time.monotonic()
        child.send_signal(number)
        _, err = child.communicate(timeout=20)
        slowest = max(slowest, time.monotonic() - begun)
        ends[str(child.returncode)] += 1
        assert child.returncode in (0, 143, 130, -9, *((-2, -15) if whole else ())), err
        if not out.is_dir():  # else it had its final name before the signal came
            assert child.returncode != 0
            assert main(["run", "--resume", str(out)]) == 0
            resumed += 1
        same_result(project.folder / "unbroken", out)
    assert slowest < 10
    assert resumed > 25, "most signals must hit a run that is still going"
    said = {"signals": 50, "exit_codes": dict(ends), "slowest_exit_seconds": round(slowest, 2), "resumed_to_equal_bits": resumed}
    (ROOT / "benchmarks" / "results" / "signals.json").write_text(json.dumps(said, indent=1) + "\n")


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_eight_runs_at_once_into_one_folder(project: Project) -> None:
    """F23: one wins, seven are told its pid."""
    children = [start(project.run("out"), SLOW="0.02") for _ in range(8)]
    ends = [(child.communicate(timeout=300), child.returncode, child.pid) for child in children]
    winners = [pid for _, code, pid in ends if code == 0]
    assert len(winners) == 1
    for (_, err), code, _ in ends:
        if code:
            assert code in (2, 4), err  # 2: it came after the winner had finished
            assert f"process {winners[0]} " in err or "output exists" in err or "unfinished run" in err


def test_a_run_needs_a_place(project: Project) -> None:
    with pytest.raises(LayerwiseError, match="--out is missing"):
        walk.run(settings(project, out=None))
