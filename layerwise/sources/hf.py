"""``hf:ID_OR_DIR``: a Hugging Face model, from a folder or the local cache (the hub itself where being online is allowed).

Decision: the class is built from the configuration and the weights are read by `layerwise.weights`, which checks the files
first; the repository's own code is never run. A bare text encoder is wrapped so that it gives one embedding per sample.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import ModelFormatError, UsageError, missing_dependency
from layerwise.heads import PooledEncoder, PooledFrames
from layerwise.hugging import hears_waveforms, is_bare, reads_text_only
from layerwise.quiet import silence_import_noise
from layerwise.source import SOURCES, ModelSource, Opened, Source
from layerwise.sources._parts import FRESH, seeded, with_options
from layerwise.weights import read_weights
from layerwise.weights.problems import bad, listed

MODEL_TYPE = "vft"  # of layerwise.native.saving, which is imported only for such a folder
WEIGHTS = ("*.safetensors", "*.index.json", "*.bin")
NEEDED = ("*.json", "*.safetensors", "*.txt", "*.model")


@SOURCES.register("hf")
class HuggingFaceSource(ModelSource):
    """``hf:DIR`` or ``hf:owner/name``; ``hf:DIR?random=true`` asks for random weights where the folder has none."""

    def open(self, name: str, *, weights: str | Path | None) -> Opened:
        _transformers(name)
        plain, options = with_options(name)
        if options.keys() - {"random"}:
            raise UsageError(f"hf: does not know the option {min(options.keys() - {'random'})!r}.", remedy="Known: random.")
        folder = _folder(plain)
        if _is_native(folder):
            return _native(folder, weights)
        config = _config(folder)
        architecture = _architecture(config, folder)
        config.use_cache = False  # a cache would be one more output that grows, which neither replay nor export needs
        source = Source("hf", folder.name, {"architecture": architecture, "config": _plain(config)})
        where = Path(weights) if weights is not None else folder
        if weights is None and not any(True for p in WEIGHTS for _ in folder.glob(p)):
            if not options.get("random"):
                remedy = f"Add model.safetensors, give weights=FILE, or ask for random ones: hf:{plain}?random=true"
                raise UsageError("holds a configuration but no weights.", place=str(folder), remedy=remedy, code="LW-C05")
            return Opened(self.build(source), source, folder, notes=(FRESH,))
        return Opened(_wrapped(_read(source, config, where)), source, folder)

    def build(self, source: Source) -> nn.Module:
        _transformers(source.name)
        from transformers import CONFIG_MAPPING

        config = CONFIG_MAPPING[source.settings["config"]["model_type"]].from_dict(dict(source.settings["config"]))
        with seeded(), _default_dtype(config.dtype), _quiet():
            return _wrapped(_class(source.settings["architecture"])(config).eval())


def _transformers(name: str) -> None:
    silence_import_noise()
    try:
        import transformers  # noqa: F401  # only asks whether it is there
    except ImportError as error:
        raise missing_dependency("transformers", "text", f"hf:{name}") from error


def _folder(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path.absolute()
    if path.is_file():
        raise UsageError("is a file; hf: wants the folder it lies in.", place=str(path.absolute()), code="LW-C05")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:  # cannot be an owner/name
        raise UsageError(
            "There is no such folder.", place=str(path.absolute()), remedy="Give hf:DIR or hf:owner/name.", code="LW-C04"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(NEEDED)))
    except (OSError, ValueError) as error:  # its many errors for offline, unknown and forbidden derive from these
        what = f"The model {name!r} is neither a folder here, nor in the local cache, nor could it be fetched."
        remedy = f"Download it where there is a network, and give hf:DIR. Looked for {path.absolute()}."
        raise UsageError(what, remedy=remedy, code="LW-C04") from error


def _is_native(folder: Path) -> bool:
    """Whether the folder holds a model of `layerwise.native`, which needs no class of transformers."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == MODEL_TYPE
    except (OSError, ValueError, KeyError, TypeError):  # what is wrong with it, the next reader says
        return False


def _native(folder: Path, weights: str | Path | None) -> Opened:
    from layerwise.native import VFTModel

    module = VFTModel.from_pretrained(folder, weights)
    return Opened(module, Source("py", "layerwise.native:VFTModel", module.settings.to_dict()), folder)


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UsageError(
            "holds no config.json.", place=str(folder), remedy="Give a folder in Hugging Face layout.", code="LW-C05"
        )
    try:
        with _quiet():
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a hostile or broken config can fail anywhere in the library
        remedy = "Repair the file; a model that needs code of its own is not supported: that code is never run."
        what = f"is no configuration that transformers can read: {error}"
        raise ModelFormatError(what, place=str(folder / "config.json"), remedy=remedy) from error


def _architecture(config: Any, folder: Path) -> str:
    from transformers import MODEL_MAPPING

    named = (config.architectures or [""])[0]
    if not named and type(config) in MODEL_MAPPING:
        named = str(getattr(MODEL_MAPPING[type(config)], "__name__", ""))
    try:
        return _class(named).__name__
    except ModelFormatError as error:
        raise ModelFormatError(error.what, place=str(folder / "config.json"), remedy=error.remedy) from None


def _class(name: str) -> Any:
    import transformers

    found = getattr(transformers, name, None) if name else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        what = f"The architecture {name!r} is not a model class of transformers {transformers.__version__}."
        raise ModelFormatError(what, remedy="A model that needs code of its own is not supported: that code is never run.")
    return found


def _read(source: Source, config: Any, where: Path) -> nn.Module:
    """The class with the weights at `where`. Raises `ModelFormatError` LW-M55, 56 or 57 with the tensors' names."""
    tensors: Mapping[str, Tensor] = read_weights(where)
    with seeded(), _quiet():
        module, report = _class(source.settings["architecture"]).from_pretrained(
            None, config=config, state_dict=dict(tensors), output_loading_info=True, ignore_mismatched_sizes=True
        )
    _refuse(report, where)
    return module.eval()


def _refuse(report: Mapping[str, Any], where: Path) -> None:
    remedy = "The weights belong to another model, or the configuration names another class."
    wrong = sorted(f"{n}: file {tuple(a)}, model {tuple(b)}" for n, a, b in report["mismatched_keys"])
    if wrong:
        raise bad(57, where, f"has {len(wrong):,} tensors of another shape: {listed(wrong)}.", remedy)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise bad(55, where, f"lacks {len(missing):,} tensors: {listed(missing)}.", remedy)
    if report["unexpected_keys"]:
        unexpected = sorted(report["unexpected_keys"])
        raise bad(56, where, f"holds {len(unexpected):,} tensors that the model does not have: {listed(unexpected)}.", remedy)


def _wrapped(module: Any) -> nn.Module:
    """A bare encoder of text or speech gives hidden states, one per token or frame: pooled. What has a head stays as it is."""
    if module.config.pad_token_id is None and module.config.eos_token_id is not None:
        # classifiers on decoders look for the last token that is no padding; set afterwards, so that no embedding is frozen by it
        end = module.config.eos_token_id
        module.config.pad_token_id = end[0] if isinstance(end, list) else end
    if not is_bare(module) or module.config.is_encoder_decoder:
        return module
    wrapper = PooledEncoder if reads_text_only(module) else PooledFrames if hears_waveforms(module) else None
    return module if wrapper is None else wrapper(module).eval()


def _plain(config: Any) -> dict[str, Any]:
    """The whole configuration as JSON data."""
    return json.loads(config.to_json_string(use_diff=False))


@contextmanager
def _default_dtype(dtype: Any) -> Iterator[None]:
    """Inside, fresh parameters have this type; buffers that name their own type (rotary tables) keep it, unlike after ``.to``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype) if isinstance(dtype, str) else dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers neither logs nor draws bars: what matters of its report is raised or noted by us."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
