"""Signals and deadlines: raised where they must be, and nothing left behind (no handler, no thread that fires later)."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from layerwise.cli import main
from layerwise.cli.stopping import Stopped, Timeout, deadline, exit_code, stoppable
from tests.projects import Project, make_project


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(5)


def endless() -> None:
    while True:
        pass


def guarded(work: Callable[[], None]) -> None:
    """Code that catches every exception it knows of, as many a forward does."""
    try:
        work()
    except Exception:
        pytest.fail("it was taken for an error of the model")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_becomes_an_exception_with_its_exit_code(number: signal.Signals, code: int) -> None:
    before = handlers()
    with pytest.raises(Stopped) as caught, stoppable():
        send(number)
    assert exit_code(caught.value) == code
    assert handlers() == before


def test_exceptions_of_a_model_cannot_swallow_the_signal() -> None:
    with pytest.raises(Stopped), stoppable():
        guarded(lambda: send(signal.SIGTERM))


def test_other_threads_leave_the_signals_alone() -> None:
    before, ran = handlers(), []

    def work() -> None:
        with stoppable(), deadline(0.01) as beat:
            beat()
            ran.append(handlers())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ran == [before]


def test_beats_hold_off_the_deadline() -> None:
    before = handlers()
    with deadline(0.3) as beat:
        for _ in range(8):
            time.sleep(0.1)
            beat()
    time.sleep(0.4)  # the watch has ended with its block: no signal comes later
    assert handlers() == before


def test_no_beat_ends_the_work_and_says_where() -> None:
    begun = time.monotonic()
    with pytest.raises(Timeout, match=r"No progress for 0\.2 s") as caught, deadline(0.2):
        guarded(endless)
    assert time.monotonic() - begun < 2
    assert caught.value.place.startswith(f"{__file__}:")
    assert (caught.value.code, caught.value.exit_code) == ("LW-R24", 4)


def test_without_seconds_nothing_is_watched() -> None:
    threads = threading.active_count()
    with deadline(None) as beat:
        beat()
        assert threading.active_count() == threads


@pytest.fixture
def project(tmp_path: Any) -> Project:
    return make_project(tmp_path / "project")


def test_an_interrupted_run_says_so_as_json(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerwise.engine.plan", lambda *args, **kwargs: send(signal.SIGTERM))
    assert main(project.run("out", "--json")) == 143
    said = json.loads(capsys.readouterr().out)
    assert said["exit"] == 143
    assert said["error"]["resume"] == f"layerwise run --resume {project.folder / 'out'}"


def test_an_interrupted_analysis_without_a_folder_promises_nothing(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerwise.engine.analyze", lambda *args, **kwargs: send(signal.SIGINT))
    assert main(["analyze", project.model, "--data", str(project.data)]) == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == "LW-R07 Interrupted."
