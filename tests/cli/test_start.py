"""Starting costs next to nothing, and every flag and key is documented."""

from __future__ import annotations

import re
import resource
import subprocess
import sys

import pytest
import typer

from layerwise.cli import COMMANDS, Commands, app, main
from layerwise.config import FILE_ONLY, RunConfig, describe, flag
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")


def cpu_of_children() -> float:
    """Seconds of processor time: what a command takes by itself, whatever else the machine is doing meanwhile."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_answers_at_once_without_torch() -> None:
    code = (
        "import sys; from layerwise.cli import main; main(['--help']);"
        "bad = {'torch', 'numpy', 'pandas', 'pydantic', 'rich', 'yaml'} & set(sys.modules); print('imported', sorted(bad))"
    )
    seconds = []
    for _ in range(5):
        before = cpu_of_children()
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(cpu_of_children() - before)
        assert run.stdout.strip().splitlines()[-1] == "imported []"
    assert min(seconds) < 0.3


@pytest.mark.parametrize("command", ["run", "inspect"])
def test_the_help_of_a_command_needs_no_torch_either(command: str) -> None:
    code = f"import sys; from layerwise.cli import main; main(['{command}', '--help']); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip().splitlines()[-1] == "False"


def flags_of(command: str) -> set[str]:
    group = typer.main.get_command(app)
    assert isinstance(group, Commands)
    found = group.get_command(None, command)
    return {name for parameter in found.params for name in parameter.opts if name.startswith("--")}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_documented(command: str) -> None:
    assert f"`layerwise {command}" in PAGE
    missing = {name for name in flags_of(command) - {"--help"} if f"`{name}" not in PAGE}
    assert missing == set()


def test_every_key_is_a_flag_of_run_and_in_the_page_with_its_words() -> None:
    flags = flags_of("run")
    for key, text, default in describe():
        assert flag(key) in flags
        row = f"| `{key}` | `{flag(key)}` | {text} | {default} |"
        assert row in PAGE, row
    assert set(re.findall(r"^\| `(\w+)` \| `--", PAGE, re.MULTILINE)) == set(RunConfig.model_fields)
    for key in FILE_ONLY:
        assert f"`{key}`" in PAGE


def test_every_exit_code_is_documented() -> None:
    for code in (0, 1, 2, 3, 4, 130, 143):
        assert f"| {code} |" in PAGE


def test_the_module_is_the_command() -> None:
    run = subprocess.run([sys.executable, "-m", "layerwise", "--version"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"layerwise \d+\.\d+\.\d+\n", run.stdout)


@pytest.mark.parametrize("arguments", ["methods", "methods --json", "--help"])
def test_a_reader_that_goes_away_is_no_error(arguments: str) -> None:
    command = f"set -o pipefail; {sys.executable} -m layerwise {arguments} | true"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_library_that_calls_exit_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("layerwise.cli.methods.registries", lambda: sys.exit(0))
    assert main(["methods"]) == 4
    assert "LW-R00 Unexpected SystemExit" in capsys.readouterr().err
