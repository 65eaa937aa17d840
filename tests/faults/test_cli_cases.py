"""The command line, cases 1 to 14 and 74: code, exit code, one line that says what, where and how to mend; nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from layerwise.cli import main
from layerwise.cli.checks import compiled, matching, readable
from layerwise.errors import UsageError
from tests.projects import Project, make_project


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    made = make_project(tmp_path / "project")
    monkeypatch.chdir(made.folder)
    return made


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], code: str, exit_code: int = 2) -> str:
    """The line on stderr of a command that must fail with `code`; the same as JSON on stdout with ``--json``."""
    capsys.readouterr()
    before = sorted(Path.cwd().rglob("*"))
    assert main(arguments) == exit_code
    out, err = capsys.readouterr()
    line = err.strip().splitlines()[-1]
    assert line.startswith(f"{code} "), err
    assert "Traceback" not in err
    assert out == ""
    assert main([*arguments, "--json"]) == exit_code
    out, _ = capsys.readouterr()
    said = json.loads(out)
    assert said["error"]["code"] == code
    assert said["exit"] == exit_code
    assert [p for p in sorted(Path.cwd().rglob("*")) if p not in before and "__pycache__" not in p.parts] == []
    return line


def test_1_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "leaderboard" in capsys.readouterr().out


def test_2_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, ["analyse"], "LW-C02") == "LW-C02 Unknown command 'analyse'. Did you mean 'analyze'?"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--modle", "x"], "LW-C03 Unknown flag '--modle'. Did you mean '--model'?"),
        (["inspect", "--layer", "x"], "LW-C03 Unknown flag '--layer'. Did you mean '--layers'?"),
        (["run", "a", "b"], "LW-C03 Got unexpected extra argument(s) (b) See --help."),
        (["run", "--limit"], "LW-C03 Option '--limit' requires an argument. See --help."),
        (["inspect", "a", "--model", "b"], "LW-C03 --model: The model is given twice. Keep one of them."),
    ],
)
def test_3_unknown_flag(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"{said}\n"


@pytest.mark.parametrize("key", ["--model", "--data", "--weights"])
def test_4_missing_path_is_shown_absolute(key: str, project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["analyze", "--model", project.model, "--data", str(project.data), key, "no/such.thing"]
    line = refused(capsys, arguments, "LW-C04")
    assert f"{key}: {project.folder}/no/such.thing: There is no such file or folder." in line


@pytest.mark.parametrize("which", ["weights", "out-file", "out-folder", "config"])
def test_5_folder_for_a_file_and_the_other_way(which: str, project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    (project.folder / "folder").mkdir()
    base = ["--model", project.model, "--data", str(project.data)]
    arguments = {
        "weights": ["inspect", *base, "--weights", "folder"],
        "out-file": ["analyze", *base, "--out", "folder"],
        "out-folder": ["compress", *base, "--method", "drop_layers", "--out", "rows.csv2"],
        "config": ["run", "--config", "folder"],
    }[which]
    (project.folder / "rows.csv2").write_text("x")
    assert "folder" in refused(capsys, arguments, "LW-C05")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_6_unreadable_path(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.data.chmod(0)
    line = refused(capsys, ["inspect", "--model", project.model, "--data", str(project.data)], "LW-C06")
    assert "no permission" in line


def test_6_unreadable_path_as_the_system_tells_it(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(os, "access", lambda path, mode: bool(asked.append(mode)))
    with pytest.raises(UsageError, match="cannot be read: no permission") as caught:
        readable(project.data, "--data")
    assert (caught.value.code, asked) == ("LW-C06", [os.R_OK])


@pytest.mark.parametrize("command", ["analyze", "compress", "run"])
def test_7_existing_output_is_kept(command: str, project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    out = project.folder / "there"
    if command == "analyze":
        out.write_text("mine")
    else:
        out.mkdir()
    more = ["--method", "drop_layers"] if command == "compress" else []
    arguments = [command, "--model", project.model, "--data", str(project.data), "--out", "there", *more]
    line = refused(capsys, arguments, "LW-C07")
    assert "add --force" in line
    assert out.is_dir() or out.read_text() == "mine"


@pytest.mark.parametrize(
    ("out", "how"), [("images/run", "lies inside the input"), ("images", "is an input"), (".", "holds the input")]
)
def test_8_output_inside_an_input_or_around_it(out: str, how: str, project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    (project.folder / "images").mkdir()
    arguments = ["run", "--model", project.model, "--data", "images", "--out", out, "--force"]
    assert f"The output {how} {project.folder}" in refused(capsys, arguments, "LW-C08")


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--ratio", "1.5", "--ratio: 1.5 is not possible: ratio must be less than 1."),
        ("--ratio", "-1", "--ratio: -1.0 is not possible: ratio must be more than 0."),
        ("--ratio", "nan", "--ratio: nan is not possible: ratio takes a finite number."),
        ("--ratio", "inf", "--ratio: inf is not possible: ratio takes a finite number."),
        ("--ratio", "abc", "--ratio: 'abc' is not possible: ratio takes a number."),
        ("--limit", "0", "--limit: 0 is not possible: limit must be more than 0."),
        ("--limit", "1.5", "--limit: '1.5' is not possible: limit takes a whole number."),
        ("--seed", "-1", "--seed: -1 is not possible: seed must be at least 0."),
        ("--seed", "9" * 5000, "--seed: '99999"),
        ("--lang", "de", "--lang: 'de' is not possible: lang must be 'en' or 'zh'."),
        ("--timeout", "0", "--timeout: 0.0 is not possible: timeout must be more than 0."),
    ],
)
def test_9_out_of_range(flag: str, value: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, ["run", flag, value], "LW-C09")
    assert said in line
    assert len(line) < 200


def test_10_no_such_device_lists_those_there_are(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, ["inspect", "--model", project.model, "--device", "cuda:77"], "LW-C10")
    assert "'cuda:77'" in line
    assert "cpu" in line.partition("Here:")[2]


def test_11_bad_regular_expression(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, ["inspect", "--model", project.model, "--layers", "blocks["], "LW-C11")
    assert "--layers: 'blocks[' is not a regular expression: unterminated character set at position 6." in line


def test_12_pattern_that_matches_no_layer_shows_near_names(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["inspect", "--model", project.model, "--data", str(project.data), "--layers", "block_1"]
    line = refused(capsys, arguments, "LW-C12")
    assert "'block_1' matches none of the 4 layers. Near: blocks.1, blocks." in line
    names = [f"layer.{i}" for i in range(100)]
    with pytest.raises(UsageError) as caught:
        matching(compiled("leyer.7x"), names)
    assert len(caught.value.remedy.split(", ")) == 5


def test_13_resuming_what_is_unknown_or_finished(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert "There is no unfinished run here." in refused(capsys, ["run", "--resume", "nothing"], "LW-C13")
    (project.folder / "done").mkdir()
    (project.folder / "done" / "manifest.json").write_text("{}")
    assert "This run is finished" in refused(capsys, ["run", "--resume", "done"], "LW-C13")
    assert "takes the settings" in refused(capsys, ["run", "--resume", "done", "--out", "x"], "LW-C03")


def test_14_arguments_that_are_no_text(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert "argument 2: 'caf\\udce9' is not UTF-8." in refused(capsys, ["inspect", "caf\udce9"], "LW-C14")
    line = refused(capsys, ["inspect", "--model", project.model, "--data", "a\nb\x1b[31m.csv"], "LW-C04")
    assert "/a\\nb\\x1b[31m.csv: There is no such file" in line


def test_14_in_a_real_process() -> None:
    command = [os.fsencode(sys.executable), b"-m", b"layerwise", b"inspect", b"caf\xe9"]
    run = subprocess.run(command, capture_output=True, check=False)
    assert run.returncode == 2
    assert run.stderr == b"LW-C14 argument 2: 'caf\\udce9' is not UTF-8. Rename the file, or set a UTF-8 locale.\n"


def test_74_a_forward_that_never_ends(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    begun = time.monotonic()
    arguments = ["analyze", "--model", f"{project.folder / 'net.py'}:Endless", "--data", str(project.data), "--timeout", "1"]
    line = refused(capsys, arguments, "LW-R24", exit_code=4)
    assert time.monotonic() - begun < 20
    loop = next(i for i, text in enumerate((project.folder / "net.py").read_text().splitlines(), 1) if "while True" in text)
    assert f"{project.folder / 'net.py'}:{loop}" in line or f"{project.folder / 'net.py'}:{loop + 1}" in line
    assert "No progress for 1 s" in line


def test_74_a_forward_that_catches_everything_is_ended_with_its_process(project: Project) -> None:
    arguments = ["inspect", f"{project.folder / 'net.py'}:Deaf", "--data", str(project.data), "--timeout", "1"]
    code = "import sys\nfrom layerwise.cli import main, stopping\nstopping.GRACE = 1.0\nsys.exit(main(sys.argv[1:]))"
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 4
    assert "LW-R24" in run.stderr
    assert "Traceback" not in run.stderr
