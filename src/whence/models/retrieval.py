"""Finds passages by meaning: texts as points of an encoder (MiniLM, E5, BERT, whatever AutoModel loads).

A text's point is the mean of its token states, of length 1; a passage's score is the cosine with the question. Passages
beyond the encoder's length are read in windows, and the best window counts: nothing is cut.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..engine.progress import progress
from ..engine.retrieval import collection, ranked
from ..errors import ModelError
from ..reading import Passage, Ranking
from .loading import silently

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SENSIBLE = 100_000
"""A tokenizer that knows no length says a much larger number."""


class Dense:
    """A :class:`~whence.reading.Retriever` by an encoder and its tokenizer. ``batch``: texts of one pass."""

    def __init__(
        self, model: Any, tokenizer: Any, passages: Sequence[Passage | str], batch: int = 32, name: str = "dense"
    ) -> None:
        self.passages = collection(passages)
        self.model, self.tokenizer, self.batch, self.name = model.eval(), tokenizer, batch, name
        self._points, self._owner = self.points([p.text for p in self.passages])

    @property
    def length(self) -> int:
        """Tokens of a window."""
        told = getattr(self.tokenizer, "model_max_length", _SENSIBLE + 1)
        known = getattr(self.model.config, "max_position_embeddings", None)
        # RoBERTa counts its positions from the padding token's number on.
        padding = getattr(self.model.config, "pad_token_id", None) or 0
        shift = padding + 1 if "roberta" in str(getattr(self.model.config, "model_type", "")) else 0
        lengths = [told] if told <= _SENSIBLE else []
        return int(min([*lengths, *([known - shift] if isinstance(known, int) else [])], default=512))

    def points(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """point[window, feature] of length 1, and the text of each window."""
        found = self.tokenizer(list(texts), truncation=True, max_length=self.length, return_overflowing_tokens=True)
        ids = found["input_ids"]
        owner = np.array(found["overflow_to_sample_mapping"])
        device = next(self.model.parameters()).device
        points = np.zeros((len(ids), self.model.config.hidden_size), np.float32)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        with torch.inference_mode(), progress(self.name, total=len(ids), unit="texts") as advance:
            for at in range(0, len(order), self.batch):
                rows = order[at : at + self.batch]
                given = self.tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt").to(device)
                states = self.model(
                    input_ids=given["input_ids"], attention_mask=given["attention_mask"]
                ).last_hidden_state  # fmt: skip
                seen = given["attention_mask"][..., None].to(states)
                mean = ((states * seen).sum(1) / seen.sum(1)).float()
                points[rows] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
                advance(len(rows))
        return points, owner

    def rank(self, question: str) -> Ranking:
        """All passages, those nearest to the question first; all of them are found."""
        asked = self.points([question])[0]
        windows = (self._points @ asked.T).max(1)
        scores = np.full(len(self.passages), -np.inf)
        np.maximum.at(scores, self._owner, windows)
        return ranked(scores, len(self.passages), self.name)


def load_dense(directory: str | Path, passages: Sequence[Passage | str], batch: int = 32) -> Dense:
    """A dense retriever by the encoder of this directory (``config.json``, safetensors, a fast tokenizer).

    Raises ModelError where there is none, or only a pickle.
    """
    path, asked = Path(directory), f"the encoder {str(directory)!r}"
    would = "a directory that save_pretrained wrote: config.json, safetensors and a fast tokenizer"
    if not (path / "config.json").is_file():
        raise ModelError(asked, "it has no config.json" if path.is_dir() else "no such directory", would)
    if not any(path.glob("*.safetensors")):
        raise ModelError(asked, "no weights in safetensors (a pickle can run code)", would)
    with silently():
        from transformers import AutoModel, AutoTokenizer
    try:
        kind = json.loads((path / "config.json").read_text(encoding="utf8"))
        with silently():
            model = AutoModel.from_pretrained(path, use_safetensors=True, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError, TypeError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(asked, f"transformers cannot load it: {first}", would) from error
    if kind.get("is_encoder_decoder") or not getattr(tokenizer, "is_fast", False):
        raise ModelError(asked, "it is no encoder with a fast tokenizer", would)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Dense(model.float().requires_grad_(False).to(device), tokenizer, passages, batch, path.name)
