"""Each command on a small project: what people see, what programs get, the files between the steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from layerwise.cli import COMMANDS, main
from layerwise.files import verify_manifest
from layerwise.importance import ImportanceReport
from layerwise.plan import CompressionPlan
from tests.projects import Project, make_project

Json = Callable[..., Any]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("commands") / "project")


@pytest.fixture
def base(project: Project) -> list[str]:
    return ["--model", project.model, "--data", str(project.data), "--batch-size", "8"]


@pytest.fixture
def as_json(capsys: pytest.CaptureFixture[str]) -> Json:
    def call(*arguments: str, code: int = 0) -> Any:
        capsys.readouterr()
        assert main([*arguments, "--json"]) == code, capsys.readouterr()
        return json.loads(capsys.readouterr().out)

    return call


def test_inspect_shows_the_tree(base: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # in workers of pytest it is 80, which breaks the last column's words
    assert main(["inspect", *base]) == 0
    out = capsys.readouterr().out
    assert "net (other): 1,187 parameters" in out
    assert "└ blocks.3" in out
    assert out.count("keeps shape and type of its input") == 4
    assert "Outside all layers: 67 parameters, 5.644 % (stem.weight, stem.bias, head.weight, head.bias)" in out
    assert "\x1b" not in out  # a pipe gets no control codes


def test_inspect_as_json_and_filtered(base: list[str], as_json: Json, tmp_path: Path) -> None:
    found = as_json("inspect", *base, "--layers", r"\.[02]$", "--out", str(tmp_path / "layers.json"))
    assert [layer["name"] for layer in found["layers"]] == ["blocks.0", "blocks.2"]
    assert found["layers"][0].keys() == {
        "name", "index", "kind", "parameters", "macs", "shape", "skippable", "group", "reason",
    }  # fmt: skip
    assert found["layers"][0]["macs"] == 2 * 8 * 16
    assert found["outside"]["share"] == pytest.approx(67 / 1187)
    assert json.loads((tmp_path / "layers.json").read_text()) == found


def test_the_steps_one_by_one(base: list[str], as_json: Json, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """analyze → plan → compress → export, each from the file of the one before."""
    report, plan, model, artifact = (str(tmp_path / name) for name in ("report.json", "plan.yaml", "model", "model.onnx"))
    assert main(["analyze", *base, "--methods", "layer_ablation,depth", "--out", report]) == 0
    assert "most important first" in capsys.readouterr().out
    assert ImportanceReport.load(report).methods == ["layer_ablation", "depth"]

    assert main(["plan", *base, "--report", report, "--ratio", "0.8", "--compress-methods", "drop_layers", "--out", plan]) == 0
    assert "drop_layers" in capsys.readouterr().out
    assert [str(t) for t in CompressionPlan.load(plan).targets] == ["size<=0.8x"]

    result = as_json("compress", *base, "--plan", plan, "--out", model)
    assert result["after"]["size"] <= 0.8 * result["before"]["size"]
    verify_manifest(model)

    facts = as_json("export", model, "--data", base[3], "--out", artifact)
    assert facts["bytes"] == Path(artifact).stat().st_size
    assert as_json("inspect", model, "--data", base[3])["parameters"] == result["after"]["params"]


def test_compress_by_hand(base: list[str], as_json: Json, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.proofs.reloads", lambda *args: None)  # seconds of another process, tested above
    monkeypatch.setattr("layerwise.engine.prove", lambda *args, **kwargs: ())
    result = as_json("compress", *base, "--method", "drop_layers", "--layers", "blocks.[12]")
    assert result["plan"]["steps"] == [{"method": "drop_layers", "layers": ["blocks.1", "blocks.2"], "settings": {}}]
    assert result["after"]["params"] == result["before"]["params"] - 2 * (8 * 16 + 16 + 16 * 8 + 8)


def test_a_missed_target_exits_with_1(base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = str(tmp_path / "report.json")
    assert main(["analyze", *base, "--methods", "depth", "--out", report]) == 0
    assert main(["plan", *base, "--report", report, "--targets", "params<=0.01x", "--compress-methods", "drop_layers"]) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("LW-T")


def test_finer_granularity_is_a_flag_and_each_size_has_a_table(base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", *base, "--methods", "gradient_based", "--granularity", "block,channel"]) == 0
    said = capsys.readouterr().out
    assert " layers, most important first" in said
    assert " channels, most important first" in said
    assert main(["analyze", *base, "--granularity", "chanel"]) == 2
    assert "channel" in capsys.readouterr().err


def test_a_dash_has_a_reason_and_a_letter_a_method(base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The net has no attention; five methods are more than one line of the legend holds."""
    assert main(["analyze", *base, "--methods", "attention_analysis,depth,random,weight_norm,parameter_count"]) == 0
    lines = capsys.readouterr().out.splitlines()
    legend = [line for line in lines if line.startswith(("a = attention_analysis", "e = parameter_count"))]
    assert len(legend) == 2
    reasons = [line for line in lines if line.startswith("– a (")]
    assert len(reasons) == 1
    assert "attention" in reasons[0]


def test_weights_only_methods_need_no_data(project: Project, as_json: Json) -> None:
    timm = "timm:vit_tiny_patch16_224?img_size=8&patch_size=2&in_chans=1&embed_dim=64&depth=6&num_heads=4&num_classes=10"
    found = as_json("analyze", timm, "--methods", "depth,random,random(seed=1),random(seed=2)")
    assert list(found["scores"])[:2] == ["depth", "random"]
    for pair in found["disagreements"]:
        assert pair["rho"] < 0.4
        assert set(pair["contested"][0]) == {"layer", "first", "second"}
    assert found["disagreements"], "four orders at random"


def test_run_by_config_file_with_a_flag_on_top(
    project: Project, as_json: Json, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerwise.engine.prove", lambda *args, **kwargs: ())
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {project.model}\ndata: {project.data}\nmethods: [depth, weight_norm]\ntargets: [params<=0.9x]\n"
        f"compress_methods: [drop_layers]\nout: {tmp_path / 'no'}\nlang: zh\n"
    )
    said = as_json("run", "--config", str(config), "--out", str(tmp_path / "yes"))
    assert Path(said["folder"]) == tmp_path / "yes"
    assert not (tmp_path / "no").exists()
    assert 'lang="zh' in Path(said["report"]).read_text()

    board = as_json("leaderboard")
    assert [row["model"] for row in board] == ["net"]
    out = tmp_path / "board.csv"
    as_json("leaderboard", "--out", str(out))
    assert list(pd.read_csv(out)["model"]) == ["net"]


def test_an_unknown_method_is_told_before_anything_is_loaded(
    project: Project, base: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerwise.engine.load", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    assert main(project.run("out", "--methods", "fischer_information")) == 2
    assert "Did you mean 'fisher_information'?" in capsys.readouterr().err
    assert main(project.run("out2", "--export", "model.onx")) == 2
    assert "'.onnx'" in capsys.readouterr().err
    assert main(project.run("out3", "--targets", "sise<=1x")) == 2
    assert "Did you mean 'size'?" in capsys.readouterr().err
    assert main(project.run("out4", "--compress-methods", "weight_only(bit=4)")) == 2
    assert "Did you mean 'bits'?" in capsys.readouterr().err
    for flags in (["run", "--out", "out5", "--targets", "size<=1x", "--recover"], ["compress", "--method"]):
        verb, *rest = flags
        for wrong, said in (("fine_tunee", "Did you mean 'fine_tune'?"), ("fine_tune", "LW-C15 --train-data: fine_tune needs")):
            assert main([verb, *base, *rest, wrong]) == 2
            assert said in capsys.readouterr().err


def test_an_empty_leaderboard_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["leaderboard"]) == 0
    assert "Nothing is recorded yet." in capsys.readouterr().out


def test_methods_lists_every_registry_with_words(as_json: Json, capsys: pytest.CaptureFixture[str]) -> None:
    from layerwise.analyzer import ANALYZERS
    from layerwise.cli.methods import registries

    found = as_json("methods")
    assert list(found) == [registry.kind for registry in registries()]
    assert [row["name"] for row in found["analyzer"]] == list(ANALYZERS)
    assert all(len(row["about"]) > 10 for rows in found.values() for row in rows)
    assert main(["methods"]) == 0
    assert "drop_layers" in capsys.readouterr().out


def test_an_unexpected_error_is_one_line_and_a_traceback_only_on_request(
    base: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("the fault fired\nsecond line")

    monkeypatch.setattr("layerwise.engine.load", broken)
    assert main(["inspect", *base]) == 4
    err = capsys.readouterr().err
    assert err.startswith("LW-R00 Unexpected ZeroDivisionError: the fault fired ")
    assert len(err.splitlines()) == 1
    assert main(["inspect", *base, "--debug"]) == 4
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_the_common_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    for flag in ("--json", "--device", "--seed", "--out", "--debug", "--config"):
        assert flag in out
    assert " ".join(COMMANDS[command].split()) in " ".join(out.split())  # the list of commands and the command say the same


def test_export_with_8_bit_nodes_shows_both_files_side_by_side(
    base: list[str], project: Project, as_json: Json, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eight = ["export", *base, "--quantize", "static", "--keep", "head", "--calibration", str(project.data)]
    assert main([*eight, "--out", str(tmp_path / "a.onnx")]) == 0
    shown = capsys.readouterr().out
    assert "float32 and 8-bit in onnxruntime" in shown
    assert "without the roundings the largest relative difference is" in shown
    facts = as_json(*eight, "--out", str(tmp_path / "a.onnx"), "--force")
    assert list(facts["figures"]["kept"]) == ["head/Gemm"]
    for wrong in (["--quantize", "statik"], ["--keep", "head"], ["--calibration", str(project.data)]):
        assert as_json("export", *base, *wrong, "--out", str(tmp_path / "b.onnx"), code=2)["exit"] == 2
    missing = ["--quantize", "auto", "--calibration", str(tmp_path / "no.csv"), "--out", str(tmp_path / "b.onnx")]
    assert as_json("export", *base, *missing, code=2)["error"]["code"] == "LW-C04"
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]
