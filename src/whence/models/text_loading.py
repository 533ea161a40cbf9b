"""Loads a language model: a directory that transformers wrote, or a hub id. Never a pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError
from .loading import aligned, short_name, silently
from .text import EncoderDecoder, LanguageModel

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def is_text_model(model: str | Path) -> bool:
    """Whether this is a directory of a transformers model."""
    return Path(model).is_dir() and (Path(model) / "config.json").is_file()


def load_text(model: str | Path, device: str | None = None) -> LanguageModel:
    """The adapter of a language model: a directory with ``config.json``, safetensors and a fast tokenizer, or a hub id
    that is in the local cache or can be fetched. On a CPU weights become float32. Raises ModelError."""
    name, path = str(model), Path(model)
    if not is_text_model(path):
        if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
            found = "it has no config.json" if path.is_dir() else "no such directory, and not a hub id"
            raise ModelError(
                f"the language model {name!r}", found, "a directory that save_pretrained wrote, or 'owner/name'"
            )
        path = _from_hub(name)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"the language model {name!r}", f"config.json: {error}", "a complete directory") from None
    if not any(path.glob("*.safetensors")):
        pickles = [f.name for pattern in _PICKLES for f in path.glob(pattern)]
        found = f"only a pickle ({pickles[0]}), which can run code" if pickles else "no weights"
        raise ModelError(f"the language model {name!r}", found, "the same weights as .safetensors")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded, tokenizer = _load(path, name, config, device)
    kind = EncoderDecoder if config.get("is_encoder_decoder") else LanguageModel
    if _classifies(config):
        from .text_classifier import TextClassifier

        kind = TextClassifier
    return kind(loaded, tokenizer, short_name(name))


def _classifies(config: dict[str, Any]) -> bool:
    return any(str(kind).endswith("ForSequenceClassification") for kind in config.get("architectures") or ())


def _load(path: Path, name: str, config: dict[str, Any], device: str) -> tuple[Any, Any]:
    with silently():
        from transformers import (
            AutoModelForCausalLM,
            AutoModelForSeq2SeqLM,
            AutoModelForSequenceClassification,
            AutoTokenizer,
        )

    auto = AutoModelForSeq2SeqLM if config.get("is_encoder_decoder") else AutoModelForCausalLM
    auto = AutoModelForSequenceClassification if _classifies(config) else auto
    dtype: Any = torch.float32 if device == "cpu" else "auto"
    try:
        with silently():
            model = auto.from_pretrained(path, use_safetensors=True, dtype=dtype, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError, TypeError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(
            f"the language model {name!r}", f"transformers cannot load it: {first}",
            "a directory of a causal model, an encoder-decoder or a classifier of texts, with its tokenizer",
        ) from error  # fmt: skip
    aligned(model)
    return model.requires_grad_(False).to(device), tokenizer


def _from_hub(name: str) -> Path:
    """The directory of a hub model: from the local cache, else downloaded, without pickles."""
    from huggingface_hub import snapshot_download

    for local in (True, False):
        try:
            kinds = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
            return Path(snapshot_download(name, allow_patterns=kinds, local_files_only=local))
        except Exception as error:  # the hub's client raises what its many parts raise
            reason = type(error).__name__
    raise ModelError(
        f"the hub model {name!r}", f"it is not in the local cache and cannot be fetched ({reason})",
        "a network, or the path of a downloaded directory",
    )  # fmt: skip
