"""`RunConfig`: reading, overriding, writing back, and the safe loader's good side (its refusals: faults/test_config_cases.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from layerwise.config import RunConfig, config_to_yaml, describe, flag, load_config
from layerwise.errors import UsageError
from layerwise.yamlfile import read_entries


def written(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_keys_are_read_with_their_types(tmp_path: Path) -> None:
    config = load_config(
        written(
            tmp_path,
            "version: 1\nmodel: timm:resnet18\nlimit: 1_000\nratio: .5\nforce: yes\n"
            "targets: [size<=0.5x, 'accuracy>=0.98x']\nmethods: depth, random\nsplit: ~\n",
        )
    )
    assert (config.model, config.limit, config.ratio, config.force, config.split) == ("timm:resnet18", 1000, 0.5, True, None)
    assert config.targets == ("size<=0.5x", "accuracy>=0.98x")
    assert config.methods == ("depth", "random")
    assert config.all_targets == ["size<=0.5x", "accuracy>=0.98x", "size<=0.5x"]


def test_flags_win_over_the_file_and_none_does_not(tmp_path: Path) -> None:
    path = written(tmp_path, "model: a\nseed: 3\nlimit: 5\n")
    config = load_config(path, seed=7, limit=None)
    assert (config.model, config.seed, config.limit) == ("a", 7, 5)


def test_a_wrong_flag_is_placed_at_the_flag_and_not_in_the_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(written(tmp_path, "ratio: 0.5\n"), ratio=1.5)
    assert str(caught.value) == "LW-C09 --ratio: 1.5 is not possible: ratio must be less than 1."


def test_what_is_written_reads_back_equal(tmp_path: Path) -> None:
    config = RunConfig(
        model="timm:x", data="no", targets=("size<=0.5x",), export=("a.onnx",), out="a ${HOME} $$ $5 中", timeout=1e3,
        ratio=0.25, force=True, split="1e3", label_column="010", lang="zh",
    )  # fmt: skip
    assert load_config(written(tmp_path, config_to_yaml(config))) == config


def test_only_what_differs_from_the_default_is_written() -> None:
    assert config_to_yaml(RunConfig(model="m", seed=0)) == "version: 1\nmodel: m\n"


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("postgresql://me:s3cret@host/db", "postgresql://me@host/db"),
        ("postgresql://me:s3cr@t/s3cret@host/db", "postgresql://me@host/db"),
        ("postgresql://host/db?password=s3cret", "postgresql://host/db"),
        ("sqlite:///a/b.db", "sqlite:///a/b.db"),
    ],
)
def test_a_database_password_is_never_written(url: str, kept: str, tmp_path: Path) -> None:
    text = config_to_yaml(RunConfig(database=url))
    assert "s3cr" not in text
    assert load_config(written(tmp_path, text)).database == kept


def test_columns_by_role() -> None:
    assert RunConfig().columns is None
    assert RunConfig(text_column="sentence", label_column="y").columns == {"text": "sentence", "label": "y"}
    assert RunConfig(smiles_column="mol", label_columns=("p", "q")).columns == {"smiles": "mol", "label": ["p", "q"]}


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().seed = 3  # type: ignore[misc]  # that is the test


def test_variables_are_filled_and_typed_like_what_is_written(tmp_path: Path) -> None:
    path = written(tmp_path, 'data: ${PLACE}/x\nlimit: ${N}\nsplit: "${N}"\nout: $${PLACE}\n')
    entries = {key: entry.plain() for key, entry in read_entries(path, {"PLACE": "here", "N": "12"}).items()}
    assert entries == {"data": "here/x", "limit": 12, "split": "12", "out": "${PLACE}"}


def test_a_variable_is_not_shown_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "hunter2")
    with pytest.raises(Exception, match="limit") as caught:
        load_config(written(tmp_path, "limit: ${TOKEN}\n"))
    assert "hunter2" not in str(caught.value)
    assert "${TOKEN}" in str(caught.value)


def test_the_including_file_wins_and_later_includes_win_over_earlier(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    written(tmp_path, "seed: 1\nlimit: 1\nsplit: a\n", "one.yaml")
    written(tmp_path, "limit: 2\nsplit: b\ninclude: deeper.yaml\n", "sub/two.yaml")
    written(tmp_path, "task: fidelity\nsplit: c\n", "sub/deeper.yaml")
    config = load_config(written(tmp_path, "include: [one.yaml, sub/two.yaml]\nsplit: own\n"))
    assert (config.seed, config.limit, config.split, config.task) == (1, 2, "own", "fidelity")


def test_aliases_are_fine_in_small_numbers(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "model: &m timm:x\ndata: *m\n")).data == "timm:x"


def test_every_key_is_described_and_has_one_flag() -> None:
    rows = describe()
    assert [name for name, _, _ in rows] == list(RunConfig.model_fields)
    assert all(text for _, text, _ in rows)
    assert flag("batch_size") == "--batch-size"


def test_no_torch_is_imported() -> None:
    code = (
        "import sys, layerwise.config, layerwise.runfolder; print([m for m in ('torch', 'numpy', 'pandas') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
