"""Batches made from nothing for modules that say what they read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from layerwise.examples import candidates, example_of, failure, setting, table_of, tokens_of


class Config:
    """As transformers': a plain object with a type and settings."""

    model_type = "made up"

    def __init__(self, **settings: Any) -> None:
        vars(self).update(settings)


class Reads(nn.Module):
    """A stand-in for a class of transformers; `forward` of a subclass says what it reads."""

    main_input_name = "pixel_values"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.layer = nn.Linear(1, 1)


class Images(Reads):
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tensor:
        assert pixel_values.shape[1:] == (3, 20, 20), pixel_values.shape
        return pixel_values.mean((1, 2, 3))


class Frames(Reads):
    main_input_name = "input_features"

    def forward(self, input_features: Tensor, decoder_input_ids: Tensor | None = None) -> Tensor:
        if decoder_input_ids is None or input_features.shape[2] != 7:  # (samples, frames, bins)
            raise ValueError("not this")
        return input_features


def test_a_plain_module_says_nothing() -> None:
    assert list(candidates(nn.Linear(2, 2))) == []
    assert example_of(nn.Linear(2, 2)) is None


def test_the_size_of_images_comes_from_a_nested_configuration() -> None:
    batch = example_of(Images(Config(vision=Config(image_size=20))))
    assert batch is not None
    assert {k: tuple(v.shape) for k, v in batch.kwargs.items()} == {"pixel_values": (2, 3, 20, 20)}


def test_forms_and_arguments_are_tried_until_one_runs() -> None:
    batch = example_of(Frames(Config(num_mel_bins=7, vocab_size=30)))
    assert batch is not None
    assert set(batch.kwargs) == {"input_features", "decoder_input_ids"}
    assert batch.kwargs["input_features"].shape[2] == 7


def test_what_no_candidate_suits_gives_none_and_each_says_why() -> None:
    module = Images(Config(image_size=21))
    assert example_of(module) is None
    assert all("AssertionError" in str(failure(module, batch)) for batch in candidates(module))


def test_tokens_have_no_special_meaning_but_the_last_ends_the_text() -> None:
    class Text(Reads):
        main_input_name = "input_ids"

        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids.float()

    batch = example_of(Text(Config(vocab_size=6, pad_token_id=0, text=Config(image_token_id=3, eos_token_id=2))))
    assert batch is not None
    ids = batch.kwargs["input_ids"]
    assert set(ids[:, :-1].unique().tolist()) <= {1, 4, 5}
    assert (ids[:, -1] == 2).sum() in (0, 2)


def test_settings_are_found_breadth_first() -> None:
    config = Config(inner=Config(size=3, inner=Config(size=4)), flag=True)
    assert (setting(config, ("size",)), setting(config, ("flag",)), setting(config, ("absent",))) == (3, None, None)


def test_the_forward_runs_without_gradients_and_its_flags_stay() -> None:
    module = Images(Config(image_size=20)).train()
    assert example_of(module) is not None
    assert module.training
    assert all(p.grad is None for p in module.parameters())
    assert torch.is_grad_enabled()


def test_a_model_without_an_adapter_of_its_own_can_be_read_as_it_is() -> None:
    from layerwise.adapters.tensor import TensorAdapter
    from layerwise.model import UniversalModel

    module = Images(Config(image_size=20))
    assert UniversalModel(module, adapter=TensorAdapter()).example.kwargs["pixel_values"].shape == (2, 3, 20, 20)


def test_tokens_are_counted_in_the_table_or_by_the_configuration() -> None:
    class Several(Reads):
        def get_input_embeddings(self) -> nn.Module:
            raise NotImplementedError("several tables")

    class One(Reads):
        def get_input_embeddings(self) -> nn.Module:
            return nn.Embedding(9, 2)

    config = Config(text=Config(vocab_size=7))
    assert table_of(Several(config)) is None
    assert (tokens_of(Several(config)), tokens_of(One(config)), tokens_of(Reads(Config()))) == (7, 9, 2)
