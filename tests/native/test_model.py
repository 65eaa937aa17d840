"""`VFTModel`: text, images, frames and all together; cache, generation, folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.errors import ModelFormatError, UsageError, UserModelError
from layerwise.native import VFTModel, VFTSettings
from layerwise.native.costs import cache_floats
from layerwise.native.embedding import patched

SMALL: dict[str, Any] = {"d_model": 16, "n_layers": 2, "n_heads": 2, "rank": 4, "max_positions": 16}
TEXT = SMALL | {"vocab_size": 11}


def model(**settings: Any) -> VFTModel:
    torch.manual_seed(0)
    made = VFTModel(**settings).double().eval()
    for block in made.blocks:
        torch.nn.init.normal_(block.compensator.u, std=0.5)
    return made


def ids(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 11, (rows, length), generator=torch.Generator().manual_seed(1))


def test_each_kind_of_input_gives_its_kind_of_output() -> None:
    images, frames = torch.randn(2, 1, 4, 6).double(), torch.randn(2, 5, 3).double()
    assert model(**TEXT)(ids()).shape == (2, 9, 16)
    assert model(**TEXT, causal=True)(ids()).shape == (2, 9, 11)
    assert model(**TEXT, classes=3)(ids()).shape == (2, 3)
    assert model(**SMALL, image=(1, 4, 6, 2), classes=3)(images=images).shape == (2, 3)
    assert model(**SMALL, frame=3)(frames=frames).shape == (2, 5, 16)
    everything = model(**TEXT | {"max_positions": 32}, image=(1, 4, 6, 2), frame=3)
    assert everything(ids(), images, frames).shape == (2, 6 + 5 + 9, 16)
    assert everything.settings.modalities == ("vision", "audio", "text")
    assert everything(ids()).shape == (2, 9, 16)


def test_a_patch_is_the_square_it_was_cut_from() -> None:
    image = torch.arange(2 * 4 * 6.0).reshape(1, 2, 4, 6)
    cut = patched(image, 2)
    assert cut.shape == (1, 6, 8)
    assert torch.equal(cut[0, 4].reshape(2, 2, 2), image[0, :, 2:4, 2:4])


def test_the_kinds_of_several_inputs_are_told_apart() -> None:
    made = model(**SMALL, image=(1, 2, 2, 2), frame=4, positions="none")
    with torch.no_grad():
        made.embedding.frames.weight.copy_(made.embedding.patches.weight)
        made.embedding.frames.bias.copy_(made.embedding.patches.bias)
    x = torch.randn(1, 4).double()
    seen, heard = made(images=x.reshape(1, 1, 2, 2)), made(frames=x[None])
    assert not torch.allclose(seen, heard)


@pytest.mark.parametrize("causal", [False, True])
def test_what_padding_holds_changes_nothing(causal: bool) -> None:
    made, mask = model(**TEXT, classes=3, causal=causal), torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    changed = ids()
    changed[1, 5:] = 0
    torch.testing.assert_close(made(ids(), attention_mask=mask), made(changed, attention_mask=mask))
    torch.testing.assert_close(made(ids(), attention_mask=mask)[1:], made(ids()[1:, :5]))


def test_patches_need_no_mask_beside_padded_text() -> None:
    made, image = model(**TEXT, image=(1, 2, 2, 1), classes=2), torch.randn(1, 1, 2, 2).double()
    mask = torch.tensor([[1] * 5 + [0] * 4])
    torch.testing.assert_close(made(ids(1), image, attention_mask=mask), made(ids(1)[:, :5], image))


@pytest.mark.parametrize("positions", ["learned", "rope", "none"])
@pytest.mark.parametrize("more", [{}, {"window": 4}, {"kv_heads": 1}, {"scope": "head", "head_rank": 4}])
def test_token_by_token_equals_all_at_once(positions: str, more: dict[str, Any]) -> None:
    made = model(**TEXT, causal=True, positions=positions, **more)
    full, cache = made(ids()), made.new_cache()
    parts = [made(ids()[:, :4], cache=cache)] + [made(ids()[:, i : i + 1], cache=cache) for i in range(4, 9)]
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-10, rtol=0)


def test_the_cache_holds_r_numbers_per_token_and_layer() -> None:
    made = model(**TEXT, causal=True)
    cache = made.new_cache()
    made(ids(1), cache=cache)
    assert cache.floats == cache_floats(made.settings, 9) == 2 * 9 * 4
    assert cache.length == 9


def test_later_tokens_change_nothing_before_them() -> None:
    made, changed = model(**TEXT, causal=True), ids()
    changed[:, 6:] = 0
    assert torch.equal(made(ids())[:, :6], made(changed)[:, :6])


def test_generation_is_the_likeliest_token_again_and_again() -> None:
    made = model(**TEXT, causal=True)
    expected = ids(2, 3)
    for _ in range(5):
        expected = torch.cat((expected, made(expected)[:, -1].argmax(-1, keepdim=True)), 1)
    made.train()
    assert torch.equal(made.generate(ids(2, 3), 5), expected)
    assert made.training


def test_generation_of_prompts_padded_on_the_left_is_that_of_each_alone() -> None:
    made, prompts = model(**TEXT, causal=True), ids(2, 5)
    mask = torch.tensor([[1] * 5, [0] * 2 + [1] * 3])
    found = made.generate(prompts, 4, attention_mask=mask)
    assert torch.equal(found[1:, 2:], made.generate(prompts[1:, 2:], 4))
    assert torch.equal(found[:1], made.generate(prompts[:1], 4))


def test_drawn_tokens_are_of_the_likeliest_and_the_same_for_one_seed() -> None:
    made = model(**TEXT, causal=True)
    draws = [made.generate(ids(1, 3), 6, temperature=5.0, top_k=k, generator=torch.Generator().manual_seed(s)) for k, s in
             ((0, 0), (0, 0), (0, 1), (1, 2))]  # fmt: skip
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(draws[3], made.generate(ids(1, 3), 6))


def test_generation_ends_where_every_row_has_ended() -> None:
    made = model(**TEXT, causal=True)
    first = int(made.generate(ids(1, 3), 1)[0, -1])
    assert made.generate(ids(1, 3), 6, end=first).shape == (1, 4)


def test_a_model_goes_on_without_a_dropped_block() -> None:
    made = model(**TEXT, causal=True)
    made.blocks[0] = torch.nn.Identity()
    made.blocks[0].forward = lambda x, **_: x
    full, cache = made(ids()), made.new_cache()
    parts = [made(ids()[:, i : i + 1], cache=cache) for i in range(9)]
    torch.testing.assert_close(torch.cat(parts, 1), full)
    assert list(made.stack()) == ["blocks.1"]


def test_beams_are_reordered() -> None:
    made, order = model(**TEXT, causal=True), torch.tensor([1, 0])
    cache = made.new_cache()
    made(ids()[:, :5], cache=cache, attention_mask=torch.tensor([[1] * 5, [0] + [1] * 4]))
    cache.reorder_(order)
    found = made(ids()[:, 5:6], cache=cache)
    again = made.new_cache()
    made(ids()[order, :5], cache=again, attention_mask=torch.tensor([[0] + [1] * 4, [1] * 5]))
    torch.testing.assert_close(found, made(ids()[:, 5:6], cache=again))


@pytest.mark.parametrize("settings", [TEXT | {"causal": True}, SMALL | {"image": (1, 4, 4, 2), "classes": 3}])
def test_a_folder_gives_the_same_model_back(settings: dict[str, Any], tmp_path: Path) -> None:
    made = model(**settings).float()
    made.save_pretrained(tmp_path / "m")
    again = VFTModel.from_pretrained(tmp_path / "m")
    assert again.settings == made.settings
    assert not again.training
    assert {k: v.dtype for k, v in again.state_dict().items()} == {k: v.dtype for k, v in made.state_dict().items()}
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in made.state_dict().items())
    made.bfloat16().save_pretrained(tmp_path / "m")
    assert next(VFTModel.from_pretrained(tmp_path / "m").parameters()).dtype == torch.bfloat16


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelFormatError, match="bert"):
        VFTModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelFormatError, match="cannot be read"):
        VFTModel.from_pretrained(tmp_path)


def test_statistics_speak_of_every_block_and_leave_the_train_flags() -> None:
    made = model(**TEXT).train()
    found = made.statistics(ids())
    assert len(found) == 2
    assert all(0 < float(s.mean) <= float(s.largest) <= 1 and 0 <= float(s.share) <= 1 for s in found)
    assert made.training


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"n_layer": 2, "vocab_size": 5}, "Did you mean 'n_layers'"),
        ({}, "reads nothing"),
        ({"vocab_size": 5, "positions": "rotary"}, "rope"),
        ({"image": (1, 5, 4, 2)}, "divides"),
        ({"vocab_size": 5, "causal": True, "fraction": 0.5}, "fraction"),
    ],
)
def test_settings_that_make_no_model_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        VFTModel(**settings)


def test_settings_survive_json() -> None:
    s = VFTSettings(vocab_size=5, image=(3, 8, 8, 4), fraction=0.5)
    assert VFTSettings.of(json.loads(json.dumps(s.to_dict()))) == s


def test_wrong_use_is_refused_in_words() -> None:
    with pytest.raises(UsageError, match="causal=True"):
        model(**TEXT).new_cache()
    with pytest.raises(UsageError, match="next token"):
        model(**TEXT).generate(ids())
    with pytest.raises(UserModelError, match="reads text"):
        model(**TEXT)(frames=torch.randn(1, 2, 3).double())
    with pytest.raises(UserModelError, match="16 positions"):
        model(**TEXT)(ids(1, 17))
    with pytest.raises(UserModelError, match="16 positions"):
        model(**TEXT, causal=True).generate(ids(1, 10), 9)
