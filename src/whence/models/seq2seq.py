"""Asks an encoder-decoder again: many prompts through the encoder, one fixed target through the decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.ablate import MEAN, MEGABYTES, Values, Version
from ..engine.progress import Advance
from ..errors import RunError


@dataclass
class EncoderAblation:
    """As :class:`~whence.engine.ablate.Ablation`; an encoder reads both ways, so no states can be shared."""

    model: Any
    start: int
    megabytes: float = MEGABYTES
    mean: Tensor | None = None
    passes: int = 0
    tokens: int = 0

    def _fits(self, rows: int, version: Version) -> bool:
        """Whether so many rows like this one, the longest, may go through at once: a single one always may."""
        c = self.model.config
        size = next(self.model.parameters()).element_size()
        token, target = size * c.hidden_size * 2 * (2 * c.num_hidden_layers + 12), (size + 4) * self._words
        needed: float = rows * (len(version.ids) * token + len(version.target) * target)
        return needed <= self.megabytes * 2**20

    @property
    def _words(self) -> int:
        """Logits of each target token."""
        return int(self.model.config.vocab_size)

    @property
    def _padding(self) -> int:
        """What stands behind the end of a shorter row, hidden by the mask."""
        return int(getattr(self.model.config, "pad_token_id", None) or 0)

    def logprobs(
        self, versions: Sequence[Version], advance: Advance | None = None,
        each: Callable[[Version, Values], None] | None = None,
    ) -> list[Values]:  # fmt: skip
        """logprob[token] of each version's target tokens, in nats. ``each`` gets every distinct version and its values
        as soon as they are known. Raises RunError where the model gives NaN."""
        unique = sorted(dict.fromkeys(versions), key=lambda v: (len(v.target), len(v.prompt), v.prompt))
        found: dict[Version, Values] = {}
        pack: list[Version] = []
        for v in [*unique, None]:
            # They come in the order of their lengths: the next one is the longest.
            if pack and (v is None or len(v.target) != len(pack[0].target) or not self._fits(len(pack) + 1, v)):
                for version, values in zip(pack, self._ask(pack), strict=True):
                    found[version] = values
                    if each:
                        each(version, values)
                if advance:
                    advance(len(pack))
                pack = []
            if v is not None:
                pack.append(v)
        return [found[v] for v in versions]

    def _ask(self, pack: Sequence[Version]) -> list[Values]:
        device = next(self.model.parameters()).device
        width = max(len(v.prompt) for v in pack)
        ids = torch.full((len(pack), width), self._padding, device=device)
        mask = torch.zeros_like(ids)  # 1 where there is a token
        for row, v in enumerate(pack):
            ids[row, : len(v.prompt)], mask[row, : len(v.prompt)] = torch.tensor(v.prompt), 1
        given: dict[str, Any] = {"input_ids": ids}
        if bool((ids == MEAN).any()):
            if self.mean is None:
                raise RunError("removal by 'mean'", "no mean embedding was given", "removal by 'drop'")
            embedded = self.model.get_input_embeddings()(ids.clamp(min=0))
            given = {"inputs_embeds": torch.where((ids == MEAN)[..., None], self.mean.to(embedded), embedded)}
        target = torch.tensor([v.target for v in pack], device=device)
        self.passes += 1
        self.tokens += ids.numel() + target.numel()
        with torch.inference_mode():
            values = self._logprob(given, mask, target).double().cpu().numpy()
        if np.isnan(values).any():
            raise RunError("log-probabilities of the target", "the model gives NaN",
                           "a model in float32, or weights that are not broken")  # fmt: skip
        return list(values)

    def _logprob(self, given: dict[str, Any], mask: Tensor, target: Tensor) -> Tensor:
        """logprob[row, token] of target[row, token]."""
        first = torch.full((len(target), 1), self.start, device=target.device)
        said = self.model(**given, attention_mask=mask, decoder_input_ids=torch.cat([first, target[:, :-1]], 1))
        logits = said.logits.float()
        return logits.gather(-1, target[..., None])[..., 0] - logits.logsumexp(-1)  # type: ignore[no-any-return]
