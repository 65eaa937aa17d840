"""Questions are answered one by one; one that takes too much of the processor's time is given up, and the next is answered."""

from __future__ import annotations

import os
from pathlib import Path

from layerwise.benchmark.worker import Worker

SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from layerwise.benchmark import worker
worker.SECONDS = 1
def answer(question):
    while question == "endless":
        pass
    return {{"said": question}}
worker.serve(answer)
"""


def test_an_endless_question_is_given_up(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=os.getcwd()), encoding="utf-8")
    worker = Worker(script, folder=tmp_path)
    assert worker.ask("one") == {"said": "one"}
    assert "of the processor's time" in worker.ask("endless")
    assert worker.ask("two") == {"said": "two"}
    worker.stop()
