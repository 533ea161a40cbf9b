"""Adapter of transformers' classifiers of texts (BERT and whatever else AutoModelForSequenceClassification loads).

Which words made it say this class?

What such a model writes is one token, the name of a class: so its runs are TextRuns, and all that explains texts
explains them. Nothing is drawn: it says its likeliest class, or is asked about another one (``forced``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..engine.ablate import Ablation, Version
from ..engine.decoding import Trace
from ..errors import MethodError, ModelError, PromptError, RunError
from ..text import TextRun, TextSettings
from .seq2seq import EncoderAblation
from .text import LanguageModel
from .text_question import REMOVALS, PromptQuestion

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..segments import Segments


class TextClassifier(LanguageModel):
    """A classifier of texts and its tokenizer. Raises ModelError for one that gives a number and no classes."""

    encodes = True

    def __init__(self, model: Any, tokenizer: Any, name: str = "") -> None:
        super().__init__(model, tokenizer, name)
        if len(self.classes) < 2:
            raise ModelError(f"the classes of {self.name}", "it gives one number, and no classes",
                             "a model with two classes or more")  # fmt: skip

    @property
    def classes(self) -> list[str]:
        """Their names."""
        return [str(label) for _, label in sorted(self.model.config.id2label.items())]

    @property
    def family(self) -> str:
        """Class of the model, without its ending."""
        return type(self.model).__name__.removesuffix("ForSequenceClassification")

    @property
    def length(self) -> int | None:
        """How many tokens the model can read; some kinds (RoBERTa) count positions from behind the padding's."""
        limit = super().length
        positions = getattr(getattr(self.model.base_model, "embeddings", None), "position_embeddings", None)
        padding = getattr(positions, "padding_idx", None)
        return limit if limit is None or padding is None else limit - int(padding) - 1

    def write(self, settings: TextSettings) -> TextRun:
        """Say the likeliest class of a text; ``forced``: the class of this name. Raises PromptError, RunError."""
        if settings.seed is not None:
            raise RunError("draw a class", "a classifier says its likeliest one", "no seed")
        prompt = self._prompt(settings)
        ids, spans = self.encode(prompt)
        limit = self.length
        if limit is not None and len(ids) > limit:
            raise PromptError(f"{len(ids)} tokens of text", f"{self.name} reads {limit}",
                              f"a text of at most {limit} tokens (nothing is cut silently)")  # fmt: skip
        if settings.forced and settings.forced not in self.classes:
            raise PromptError(f"the class {settings.forced!r}", "no such class", ", ".join(self.classes))
        asked = [Version(tuple(ids), (k,)) for k in range(len(self.classes))]
        said = np.concatenate(ClassAblation(self.model, 0).logprobs(asked))
        best = self.classes.index(settings.forced) if settings.forced else int(said.argmax())
        text = self.classes[best]
        return TextRun(
            settings=settings, prompt=prompt, text=text, prompt_ids=np.array(ids), output_ids=np.array([best]),
            prompt_spans=np.array(spans).reshape(-1, 2), output_spans=np.array([[0, len(text)]]),
            logprobs=said[[best]], model_name=self.name, family=self.family, fingerprint=self.fingerprint,
            versions=self.versions, model=self,
        )  # fmt: skip

    def trace(self, run: TextRun) -> Trace:
        """Raises MethodError: there is nothing to decode."""
        raise MethodError("a decoding trace", f"{self.name} names a class and writes nothing", "a language model")

    def question(self, run: TextRun, segments: Segments, **choices: Any) -> ClassQuestion:
        """What made the model say this class? See :class:`ClassQuestion`."""
        return ClassQuestion(self, run, segments, **choices)


class ClassQuestion(PromptQuestion):
    """As PromptQuestion; the value is the log-probability of the class. ``removal`` also "mask": the tokenizer's mask
    token in the place of each of a unit's tokens, which an encoder knows from its training."""

    removals = (*REMOVALS, "mask")

    @property
    def capabilities(self) -> frozenset[str]:
        """See :class:`~whence.question.TextQuestion`."""
        return frozenset(("text", "levels", "embeddings", "deterministic", "reword", "gradients"))

    def version(self, keep: NDArray[np.bool_]) -> Version:
        """The text with these units kept, keep[unit], and the class."""
        if self.removal != "mask":
            return super().version(keep)
        mask = self.adapter.tokenizer.mask_token_id
        if mask is None:
            raise MethodError("removal by 'mask'", f"the tokenizer of {self.adapter.name} has no mask token",
                              ", ".join(REMOVALS))  # fmt: skip
        ids = [int(i) for i in self.run.prompt_ids]
        for unit, places in enumerate(self.places):
            for place in places:
                ids[place] = ids[place] if keep[unit] else int(mask)
        return Version(tuple(ids), self._target)

    def _engine(self, how: str, mean: Tensor | None) -> Ablation | EncoderAblation:
        return ClassAblation(self.adapter.model, 0, self._megabytes, mean)

    def _said(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device)
        said = _laws(self.adapter.model, {"inputs_embeds": inputs}, mask)[:, self._target[0], None]
        # A place of its own for each row: what the last step back starts from.
        return said, said[None]

    def slopes(self) -> Tensor:
        """slope[1, token, width] of the class's log-probability by the embeddings of the text."""
        x = self.inputs.requires_grad_()
        return torch.autograd.grad(self.forward(x).sum(), x)[0]


@dataclass
class ClassAblation(EncoderAblation):
    """Asks a classifier again: many texts, one class each."""

    @property
    def _words(self) -> int:
        return int(self.model.config.num_labels)

    def _fits(self, rows: int, version: Version) -> bool:
        # A decoder that classifies looks for the last token that is no padding: without one there is one row at a time.
        return getattr(self.model.config, "pad_token_id", None) is not None and super()._fits(rows, version)

    def _logprob(self, given: dict[str, Any], mask: Tensor, target: Tensor) -> Tensor:
        return _laws(self.model, given, mask).gather(-1, target)


def _laws(model: Any, given: dict[str, Any], mask: Tensor) -> Tensor:
    """logprob[row, class]; where several classes may hold at once, each by itself."""
    logits = model(**given, attention_mask=mask).logits.float()
    if model.config.problem_type == "multi_label_classification":
        return torch.nn.functional.logsigmoid(logits)
    return logits.log_softmax(-1)  # type: ignore[no-any-return]
