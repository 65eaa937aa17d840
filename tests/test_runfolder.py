"""The folder of a run: what is kept, what is repeated, and how it becomes final."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from layerwise.errors import UsageError
from layerwise.files import verify_manifest
from layerwise.runfolder import RunFolder, final_of, key_of, new_folder, partial_of, resume_command, resumed_folder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = new_folder(tmp_path / "out", force=False)
    made.path("config.yaml").write_text("version: 1\n")
    made.path("a.txt").write_text("a")
    made.path("model").mkdir()
    made.path("model/w").write_text("w")
    made.record("first", "k1", ["a.txt", "model"], 0.5)
    return made


def test_a_recorded_stage_is_kept_also_in_another_process(folder: RunFolder) -> None:
    again, remarks = resumed_folder(folder.final)
    assert remarks == []
    assert again.kept("first", "k1") == (True, "")
    assert again.kept("second", "k2") == (False, "")


@pytest.mark.parametrize("name", ["a.txt", "model/w"])
def test_a_changed_or_missing_file_is_told(folder: RunFolder, name: str) -> None:
    folder.path(name).write_text("b")
    assert folder.kept("first", "k1") == (False, f"{name} is damaged")
    folder.path(name).unlink()
    assert folder.kept("first", "k1") == (False, f"{name} is missing")


def test_changed_settings_are_told(folder: RunFolder) -> None:
    assert folder.kept("first", "other") == (False, "its settings have changed")


def test_forgotten_stages_stay_forgotten(folder: RunFolder) -> None:
    folder.forget(["first", "never"])
    assert resumed_folder(folder.final)[0].stages == {}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stages": 3}', '{"stages": {"first": {"key": 1, "files": {}}}}'])
def test_a_damaged_record_repeats_everything_and_says_so(folder: RunFolder, text: str) -> None:
    folder.path("stages.json").write_text(text)
    again, remarks = resumed_folder(folder.final)
    assert again.stages == {}
    assert remarks == ["The record of finished stages (stages.json) is damaged; every stage is repeated."]


def test_a_record_that_points_out_of_the_folder_is_not_followed(folder: RunFolder) -> None:
    record = {"format": 1, "stages": {"first": {"key": "k1", "files": {"../a": "00"}}}}
    folder.path("stages.json").write_text(json.dumps(record))
    assert resumed_folder(folder.final)[1] != []


def test_finishing_removes_checkpoints_and_leaves_a_manifest_that_holds(folder: RunFolder) -> None:
    (folder.checkpoint("0" * 64) / "state").write_text("big")
    final = folder.finish(force=False)
    verify_manifest(final)
    assert sorted(p.name for p in final.iterdir()) == ["a.txt", "config.yaml", "manifest.json", "model", "stages.json"]
    assert not folder.partial.exists()


def test_finishing_over_an_older_run_needs_force(folder: RunFolder, tmp_path: Path) -> None:
    old = tmp_path / "out"
    old.mkdir()
    (old / "manifest.json").write_text("{}")
    (old / "old.txt").write_text("old")
    with pytest.raises(UsageError, match="output exists") as caught:
        folder.finish(force=False)
    assert caught.value.code == "LW-C07"
    assert (old / "old.txt").is_file()
    folder.finish(force=True)
    verify_manifest(old)
    assert not (old / "old.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_force_does_not_replace_a_folder_that_no_run_has_written(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="no run has written") as caught:
        new_folder(tmp_path / "out", force=True)
    assert caught.value.code == "LW-C07"


def test_checkpoints_of_other_settings_are_removed(folder: RunFolder) -> None:
    first = folder.checkpoint("a" * 64)
    second = folder.checkpoint("b" * 64)
    assert not first.exists()
    assert second == folder.checkpoint("b" * 64)
    assert second.is_dir()


def test_an_unfinished_run_is_not_overwritten_but_says_how_to_go_on(folder: RunFolder) -> None:
    with pytest.raises(UsageError, match="unfinished run") as caught:
        new_folder(folder.final, force=False)
    assert f"layerwise run --resume {folder.final}" in caught.value.remedy
    assert new_folder(folder.final, force=True).stages == {}
    assert not folder.path("a.txt").exists()


def test_resuming_what_is_unknown_or_finished(folder: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no unfinished run") as caught:
        resumed_folder(tmp_path / "elsewhere")
    assert caught.value.code == "LW-C13"
    folder.finish(force=False)
    with pytest.raises(UsageError, match="is finished") as caught:
        resumed_folder(folder.final)
    assert caught.value.code == "LW-C13"


def test_both_names_mean_the_same_run(tmp_path: Path) -> None:
    final = tmp_path / "a run"
    assert final_of(partial_of(final)) == final_of(final) == final
    assert resume_command(final) == f"layerwise run --resume '{final}'"


def test_a_key_changes_with_the_settings_and_with_the_stage_before() -> None:
    assert key_of({"a": ("x",)}, "k") == key_of({"a": ["x"]}, "k")
    assert len({key_of({"a": 1}, ""), key_of({"a": 2}, ""), key_of({"a": 1}, "k")}) == 3
