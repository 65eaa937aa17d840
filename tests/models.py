"""Small models with fixed random weights, one of each family, and batches for them. Built afresh at each call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerwise.data import Batch, Data
from layerwise.model import UniversalModel
from layerwise.task import Task


@dataclass(frozen=True)
class Case:
    """A model and its data; `layers` and `skippable` are how many the structure must find."""

    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    layers: int
    skippable: int

    def model(self, task: Task | None = None) -> UniversalModel:
        torch.manual_seed(0)
        return UniversalModel(self.build().eval(), task=task, example=self.batch(2))

    def data(self, *sizes: int) -> Data:
        return Data.of([self.batch(n) for n in sizes or (5, 3)])


def images(size: int = 32, channels: int = 3, classes: int = 10) -> Callable[[int], Batch]:
    def batch(n: int) -> Batch:
        g = torch.Generator().manual_seed(n)
        labels = torch.randint(0, classes, (n,), generator=g)
        return Batch((torch.randn(n, channels, size, size, generator=g),), {}, labels)

    return batch


def tokens(labels: bool = False, decoder: bool = False) -> Callable[[int], Batch]:
    def batch(n: int) -> Batch:
        g = torch.Generator().manual_seed(n)
        mask = torch.ones(n, 9, dtype=torch.long)
        mask[0, 7:] = 0
        inputs: dict[str, Tensor] = {"input_ids": torch.randint(3, 100, (n, 9), generator=g), "attention_mask": mask}
        if decoder:
            inputs["decoder_input_ids"] = torch.randint(3, 100, (n, 5), generator=g)
        return Batch((), inputs, torch.randint(0, 2, (n,), generator=g) if labels else None)

    return batch


def vectors(features: int = 8, classes: int = 3) -> Callable[[int], Batch]:
    def batch(n: int) -> Batch:
        g = torch.Generator().manual_seed(n)
        return Batch((torch.randn(n, features, generator=g),), {}, torch.randint(0, classes, (n,), generator=g))

    return batch


def timm_model(name: str, **settings: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=10, **settings)

    return build


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    return BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=100, n_embd=32, n_layer=3, n_head=4, use_cache=False, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=100, d_model=32, d_ff=64, num_layers=3, num_heads=4, d_kv=8, decoder_start_token_id=0, use_cache=False
    )
    return T5ForConditionalGeneration(config)


def albert() -> nn.Module:
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(
        vocab_size=100, hidden_size=32, embedding_size=16, num_attention_heads=4, num_hidden_layers=3, intermediate_size=64
    )
    return AlbertModel(config)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (4, 16)), nn.TransformerEncoder(layer, 3, enable_nested_tensor=False))


class Residual(nn.Module):
    """x + W₂ relu(W₁ x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Attending(nn.Module):
    """x + W₂ attention(W₁ x), with two heads between the features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.up(x).reshape(len(x), 3, 2, -1, 1).unbind(1)
        return x + self.down(nn.functional.scaled_dot_product_attention(query, key, value).flatten(1))


class ResidualNet(nn.Module):
    """`depth` residual blocks between a stem and a head."""

    block: type[nn.Module] = Residual

    def __init__(self, depth: int = 4, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.blocks = nn.ModuleList(self.block(width) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class AttendingNet(ResidualNet):
    """The same with attention in each block."""

    block = Attending


CASES: dict[str, Case] = {
    "vit": Case(
        timm_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2), images(), 4, 4
    ),
    "resnet": Case(timm_model("resnet18"), images(), 8, 5),
    "convnext": Case(timm_model("convnext_atto"), images(), 12, 12),
    "mobilenet": Case(timm_model("mobilenetv3_small_050"), images(), 13, 7),
    "bert": Case(bert, tokens(labels=True), 3, 3),
    "gpt2": Case(gpt2, tokens(), 3, 3),
    "llama": Case(llama, tokens(), 3, 3),
    "t5": Case(t5, tokens(decoder=True), 6, 6),
    "albert": Case(albert, tokens(), 1, 1),
    "sequential": Case(plain, vectors(), 3, 2),
    "residual": Case(ResidualNet, vectors(), 4, 4),
    "attending": Case(AttendingNet, vectors(), 4, 4),
    "encoder": Case(encoder, vectors(64, 16), 3, 3),
}
