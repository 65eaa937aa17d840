"""Configuration, cases 15 to 28: `ConfigError` with its code, ``file:line:column``, the key, exit code 2, no traceback."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from layerwise.cli import main
from layerwise.config import load_config
from layerwise.errors import ConfigError, UsageError

BOMB = "a: &a [" + ", ".join(["x"] * 10) + "]\n" + "".join(
    f"{new}: &{new} [" + ", ".join([f"*{old}"] * 10) + "]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)  # fmt: skip

# case, file, place behind the file's name, a part of the message
CASES = [
    (15, "", "", "The file is empty."),
    (15, "# only a comment\n", "", "The file is empty."),
    (16, "model: x\nlimit: [1\nseed: 2\n", ":3:5", "expected ',' or ']', but got ':'"),
    (16, "model: 'x\n", ":2:1", "found unexpected end of stream"),
    (16, "model: a\n\tdata: b\n", ":2:1", "found character '\\t'"),
    (16, "a: x\nb: \x07\n", ":2", "special characters are not allowed"),
    (17, "seed: 1\nmodel: !!python/object/apply:os.system [touch x]\n", ":2:8", "!!python/object/apply:os.system' is refused"),
    (17, "model: !!python/name:os.system\n", ":1:8", "!!python/name:os.system"),
    (17, "model: !evil x\n", ":1:8", "'!evil' is refused"),
    (18, BOMB, ":1:23", "More than 10,000 values"),
    (18, "a: &a [*a]\n", ":1:4", "More than 10,000 values or 50 levels"),
    (18, "a: " + "[" * 20_000, "", "Nested too deeply"),
    (18, "#" * (1 << 20) + "\nmodel: x\n", "", "Larger than 1,048,576 bytes"),
    (19, "limit: 1\nseed: 2\nlimit: 3\n", ":3:1", "The key 'limit' stands twice: here and in line 1."),
    (20, "modle: x\n", ":1:8: modle", "Unknown key 'modle'. Did you mean 'model'?"),
    (20, "model: x\nbatchsize: 3\n", ":2:12: batchsize", "Did you mean 'batch_size'?"),
    (21, "limit: many\n", ":1:8: limit", "'many' is not possible: limit takes a whole number."),
    (21, "limit: 1.5\n", ":1:8: limit", "1.5 is not possible: limit takes a whole number"),
    (21, "model: [a]\n", ":1:8: model", "['a'] is not possible: model takes text."),
    (21, "methods: {a: b}\n", ":1:10: methods", "methods takes a list of names"),
    (21, "ratio: 1.5\n", ":1:8: ratio", "ratio must be less than 1"),
    (21, "lang: de\n", ":1:7: lang", "lang must be 'en' or 'zh'"),
    (21, "force: 1\n", ":1:8: force", "force takes true or false"),
    (21, "- a\n- b\n", ":1:1", "This is a list, not keys with values."),
    (21, "just text\n", ":1:1", "the text 'just text'"),
    (21, "version: one\n", ":1:10: version", "version takes a whole number"),
    (22, "lang: no\n", ":1:7: lang", "YAML reads no as false."),
    (22, "split: on\n", ":1:8: split", "YAML reads on as true."),
    (22, "limit: 1e3\n", ":1:8: limit", "YAML reads 1e3 as text. Write it out: 1000."),
    (22, "seed: 010\n", ":1:7: seed", "YAML reads 010 as the number 8."),
    (22, "limit: 1:30\n", ":1:8: limit", "YAML reads 1:30 as the number 90."),
    (22, "text_column: 12\n", ":1:14: text_column", 'Write "12" in quotes for the text.'),
    (22, "methods: [depth, no]\n", ":1:18: methods", "YAML reads no as false."),
    (23, "timeout: .nan\n", ":1:10: timeout", ".nan is not a finite number."),
    (23, "timeout: -.inf\n", ":1:10: timeout", "-.inf is not a finite number."),
    (23, "ratio: nan\n", ":1:8: ratio", "nan is not a finite number."),
    (23, "timeout: 1.0e+400\n", ":1:10: timeout", "1.0e+400 is not a finite number."),
    (24, "seed: 1" + "0" * 400 + "\n", ":1:7: seed", "a whole number of 401 characters does not fit into 64 bits."),
    (24, "seed: 9223372036854775808\n", ":1:7: seed", "9223372036854775808 does not fit into 64 bits."),
    (25, "model: a\ndata: ${LAYERWISE_NO_SUCH}/x\n", ":2:7: data", "'LAYERWISE_NO_SUCH' is not set."),
    (26, "include: ../base.yaml\n", ":1:10: include", "'../base.yaml' leads out of the folder"),
    (26, "include: /etc/hostname\n", ":1:10: include", "leads out of the folder"),
    (26, "include: run.yaml\n", ":1:10: include", "goes round in a circle: run.yaml -> run.yaml."),
    (26, "include: [absent.yaml]\n", ":1:11: include", "no such file"),
    (27, "version: 2\nmodle: x\n", ":1:10: version", "has version 2, this layerwise reads version 1."),
    (28, "\ufeffmodel: x\n", "", "UTF-8 with a byte order mark"),
    (28, "model: x\n".encode("utf-16"), "", "UTF-16, UTF-32 or binary"),
    (28, "model: x\n".encode("utf-16-le"), "", "UTF-16, UTF-32 or binary"),
    (28, b"model: x\ndata: caf\xe9\n", ":2", "The byte 0xe9 is not UTF-8."),
]  # fmt: skip


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run.yaml"


@pytest.mark.parametrize(("case", "content", "place", "said"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_the_case_is_refused_with_its_code_and_place(
    case: int, content: str | bytes, place: str, said: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    begun = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert time.process_time() - begun < 2  # a bomb is counted, not expanded
    assert (caught.value.code, caught.value.exit_code) == (f"LW-F{case}", 2)
    assert caught.value.place == f"{file}{place}"
    assert said in str(caught.value)

    assert main(["run", "--config", str(file)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"{caught.value}\n"  # one line, no traceback
    assert sorted(p.name for p in file.parent.iterdir()) == ["run.yaml"]  # nothing was written, no tag was run


def test_a_longer_circle_of_includes(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"include: {other}.yaml\n")
    with pytest.raises(ConfigError, match=r"circle: a.yaml -> b.yaml -> c.yaml -> a.yaml") as caught:
        load_config(tmp_path / "a.yaml")
    assert caught.value.place == f"{tmp_path / 'c.yaml'}:1:10: include"


def test_includes_that_double_with_every_level(tmp_path: Path) -> None:
    for level in range(20):
        (tmp_path / f"{level}.yaml").write_text(f"include: [{level + 1}.yaml, {level + 1}.yaml]\n")
    (tmp_path / "20.yaml").write_text("seed: 1\n")
    with pytest.raises(ConfigError, match="More than 50 files are included") as caught:
        load_config(tmp_path / "0.yaml")
    assert caught.value.code == "LW-F18"


def test_an_include_through_a_link_that_leads_out(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "secret.yaml").write_text("seed: 1\n")
    (tmp_path / "inner" / "link.yaml").symlink_to(tmp_path / "secret.yaml")
    (tmp_path / "inner" / "run.yaml").write_text("include: link.yaml\n")
    with pytest.raises(ConfigError, match="leads out of the folder"):
        load_config(tmp_path / "inner" / "run.yaml")


def test_a_mistake_in_an_included_file_is_placed_there(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("seed: 1\nlimit: many\n")
    (tmp_path / "run.yaml").write_text("include: base.yaml\n")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "run.yaml")
    assert caught.value.place == f"{tmp_path / 'base.yaml'}:2:8: limit"


@pytest.mark.parametrize(("make", "code"), [(lambda p: None, "LW-C04"), (lambda p: p.mkdir(), "LW-C05")])
def test_a_file_that_is_not_there_or_a_folder(make: object, code: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    make(path)  # type: ignore[operator]
    with pytest.raises(UsageError) as caught:
        load_config(path)
    assert (caught.value.code, caught.value.place) == (code, str(path))
