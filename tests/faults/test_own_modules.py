"""The user's own modules, cases 73 and 75 to 80 of the fault list. Case 74 (a forward that never ends) is the command line's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.errors import LayerwiseError, UserModelError
from layerwise.loading import load
from layerwise.structure import coverage


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(block(), block())

    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("nothing of that name")  # line 29


class Chooses(nn.Module):
    """Runs the second half of its layers only for inputs that are not all zero."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self.layers)[: 4 if bool(x.any()) else 2]:
            x = x + layer(x)
        return x


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        once = block()
        self.layers = nn.ModuleList([once, block(), once])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class GivesText(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(block(), block())

    def forward(self, x: Tensor) -> Any:
        self.blocks(x)
        return {"answer": "42"}


ONE = torch.ones(2, 4)


def failure(action: Any) -> LayerwiseError:
    with pytest.raises(LayerwiseError) as caught:
        action()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    return caught.value


def test_73_forward_raises() -> None:
    error = failure(lambda: load(Raises(), example=ONE).layers)
    assert isinstance(error, UserModelError)
    assert str(error).startswith("LW-U73 ")
    assert f"{__file__}:{Raises.forward.__code__.co_firstlineno + 1}" in str(error)
    assert "KeyError: 'nothing of that name'" in str(error)


def test_75_no_parameters() -> None:
    error = failure(lambda: load(nn.Sequential(nn.ReLU(), nn.Flatten()), example=ONE).layers)
    assert str(error).startswith("LW-U75 The model has no parameters.")


def test_76_a_layer_that_ran_before_and_does_not_now() -> None:
    model = load(Chooses(), example=ONE)
    assert [layer.name for layer in model.layers] == [f"layers.{i}" for i in range(4)]
    error = failure(lambda: model.forward_with_hooks(torch.zeros(2, 4), 3))
    assert str(error).startswith("LW-U76 ")
    assert "layers.3" in str(error)
    assert set(model.forward_with_hooks(torch.zeros(2, 4), 1)) == {"input", "output", "model_output"}


def test_77_a_shared_submodule_is_counted_once() -> None:
    model = load(Shared(), example=ONE)
    assert [(layer.name, layer.calls) for layer in model.layers] == [("layers.0", 2), ("layers.1", 1)]
    assert sum(layer.parameters for layer in model.layers) == 2 * 76 == sum(p.numel() for p in model.module.parameters())
    assert coverage(model.module, model.layers) == 1.0


def test_78_an_output_without_a_tensor() -> None:
    error = failure(lambda: load(GivesText(), example=ONE).predict(ONE))
    assert str(error).startswith("LW-U78 ")
    assert "dict" in str(error)


USER_FILES = {
    "import error": ("import torch\nimport no_such_package_at_all\n", 2, "ModuleNotFoundError"),
    "syntax error": ("import torch\n\ndef build(:\n    pass\n", 3, "SyntaxError"),
    "sys.exit": ("import sys\nx = 1\nsys.exit(3)\n", 3, "called sys.exit(3)"),
    "exit in the factory": ("def build():\n    raise SystemExit('no')\n", 2, "called sys.exit('no')"),
    "factory raises": ("def build():\n    return 1 / 0\n", 2, "ZeroDivisionError"),
    "error deeper down": ("import json\n\n\ndef build():\n    return json.loads('{')\n", 5, "JSONDecodeError"),
}


@pytest.mark.parametrize(("code", "line", "named"), USER_FILES.values(), ids=USER_FILES)
def test_80_the_users_file_fails(tmp_path: Path, code: str, line: int, named: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(code)
    error = failure(lambda: load(f"{path}:build"))
    assert isinstance(error, UserModelError)
    assert str(error).startswith(f"LW-U80 {path}:{line}: ")
    assert named in str(error)
    assert error.remedy


def test_80_a_factory_that_is_not_there_or_gives_no_module(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def resnet20():\n    return 3\nsize = 4\n")
    missing = failure(lambda: load(f"{path}:resnet2"))
    assert str(missing).startswith("LW-U80 ")
    assert "Did you mean 'resnet20'?" in str(missing)
    assert "is not callable" in str(failure(lambda: load(f"{path}:size")))
    assert "gave int, not a torch.nn.Module" in str(failure(lambda: load(f"{path}:resnet20")))
