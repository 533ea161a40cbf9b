"""PromptQuestion: which parts of a prompt made a language model write these tokens?

The one object behind all methods for text: units are parts of the prompt, the target is a piece of the output, held
fixed. What was measured is remembered by version, so that no method asks the model twice for the same, and any piece of
the output can be chosen afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..engine.ablate import DRIFT, MEAN, MEGABYTES, Ablation, Version
from ..engine.narrow import fused, last_feed_forward, narrowed
from ..engine.progress import Advance
from ..engine.randomness import stream
from ..errors import MethodError, PromptError
from ..segments import LEVELS, Segments
from ..units import Units
from .asked import Asked
from .kept_states import KeptStates
from .recurrence import Implicit, implicit_attention
from .residual import FAMILIES, eager_attention, logit_parts
from .seq2seq import EncoderAblation
from .suppression import can_suppress

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..engine.decompose import LogitParts
    from ..text import TextRun
    from .text import LanguageModel

REMOVALS = ("drop", "mean")
_BEFORE, _AFTER = re.compile(r"\s+$"), re.compile(r"\s+")


class PromptQuestion:
    """A :class:`~whence.question.TextQuestion` of one run.

    ``level`` (or ``numbers``, segments of any levels that do not overlap) says which parts are the units; ``tokens``
    which tokens of the output are the target (None: all). ``removal``: "drop" cuts a unit's characters out (with the
    space beside it) and tokenises the rest again, so that all that follows moves up; "mean" leaves every token in its
    place and reads the mean of the prompt's embeddings instead of the unit's tokens. The value is the sum of the target
    tokens' log-probabilities. ``megabytes`` caps the memory of one pass. ``kept``: a file in which what was measured is
    kept, so that stopped work goes on.
    """

    removals: tuple[str, ...] = REMOVALS

    def __init__(
        self, adapter: LanguageModel, run: TextRun, segments: Segments, level: str = "sentence",
        numbers: Sequence[int] | None = None, tokens: range | None = None, removal: str = "drop",
        megabytes: float = MEGABYTES, advance: Advance | None = None, kept: Path | None = None,
        asked: Asked | None = None,
    ) -> None:  # fmt: skip
        if segments.text != run.prompt:
            raise PromptError("units of another text", "the segments are not of this run's prompt", "split(run.prompt)")
        if removal not in self.removals:
            raise MethodError(f"removal by {removal!r}", "no such removal", ", ".join(self.removals))
        self.adapter, self.run, self.segments, self.removal = adapter, run, segments, removal
        self.numbers = tuple(segments.at(level) if numbers is None else numbers)
        self.units: Units = segments.units(self.numbers)
        self.spans = [(segments.segments[i].start, segments.segments[i].end) for i in self.numbers]
        if any(b > c for (_, b), (c, _) in zip(sorted(self.spans), sorted(self.spans)[1:], strict=False)):
            raise PromptError("these units", "some of them overlap", "units of one level")
        self.tokens = range(len(run.output_ids)) if tokens is None else tokens
        self._megabytes, self.advance = megabytes, advance
        self._asked = Asked(run, kept) if asked is None else asked
        self.forwards = 0

    # -- what is asked ------------------------------------------------------------------------------------------------

    @property
    def readout(self) -> str:
        """The number that is explained."""
        a, b = self.run.output_spans[self.tokens[0], 0], self.run.output_spans[self.tokens[-1], 1]
        return f"log-probability of {self.run.text[a:b].strip()!r} (nats)"

    @property
    def capabilities(self) -> frozenset[str]:
        """See :class:`~whence.question.TextQuestion`."""
        found = {"text", "levels", "embeddings", "deterministic", "reword"}
        if not self.adapter.encodes:
            found |= {"gradients"}
            family = getattr(self.adapter.model.config, "model_type", "")
            found |= {"logit parts"} if family in FAMILIES else set()
            found |= {"implicit attention"} if family == "mamba" else set()
            if can_suppress(self.adapter.model):
                found |= {"attention", "suppression"}
        return frozenset(found)

    def ask(self, keep: NDArray[np.bool_]) -> NDArray[np.float64]:
        """value[coalition]: the sum of :meth:`ask_tokens`."""
        return np.asarray(self.ask_tokens(keep).sum(1))

    def ask_tokens(self, keep: NDArray[np.bool_]) -> NDArray[np.float64]:
        """logprob[coalition, token], see TextQuestion."""
        return self._measured([self.version(row) for row in np.asarray(keep, bool)])

    def suppress(self, factor: NDArray[np.float64], how: str = "multiply") -> NDArray[np.float64]:
        """logprob[coalition, token], see TextQuestion."""
        ids = tuple(int(i) for i in self.run.prompt_ids)
        target = self._target
        versions = []
        for row in np.asarray(factor, float):
            if len(row) != len(self.units) or (row <= 0).any() or not np.isfinite(row).all():
                raise MethodError("scaled attention", f"factors {row.tolist()}", "a number above 0 for each unit")
            scale = np.ones(len(ids) + len(target))
            for unit, places in enumerate(self.places):
                scale[list(places)] = row[unit]
            versions.append(Version(ids, target, tuple(scale.tolist())))
        return self._measured(versions, how)

    def version(self, keep: NDArray[np.bool_]) -> Version:
        """The prompt with these units kept, keep[unit], and the whole output after it."""
        if self.removal == "mean":
            ids = [int(i) for i in self.run.prompt_ids]
            for unit, places in enumerate(self.places):
                for place in places:
                    ids[place] = ids[place] if keep[unit] else MEAN
            return Version(tuple(ids), self._target)
        if all(keep):
            return Version(tuple(int(i) for i in self.run.prompt_ids), self._target)
        return Version(tuple(self.adapter.numbers(self.text(keep))), self._target)

    def text(self, keep: NDArray[np.bool_]) -> str:
        """The prompt without the units that are not kept."""
        text, out, at = self.run.prompt, "", 0
        for (start, end), kept in sorted(zip(self.spans, keep, strict=True)):
            if kept:
                continue
            out += text[at:start]
            if not out or out[-1].isspace():
                space = _AFTER.match(text, end)
                end = space.end() if space else end
            elif end < len(text) and text[end].isspace():
                out = _BEFORE.sub("", out)
            at = end
        return out + text[at:]

    @property
    def _target(self) -> tuple[int, ...]:
        return tuple(int(i) for i in self.run.output_ids)

    @property
    def places(self) -> list[tuple[int, ...]]:
        """Token positions of each unit: those that share a character with it."""
        starts, ends = self.run.prompt_spans[:, 0], self.run.prompt_spans[:, 1]
        return [tuple(np.flatnonzero((starts < b) & (ends > a)).tolist()) for a, b in self.spans]

    def _measured(self, versions: Sequence[Version], how: str = "") -> NDArray[np.float64]:
        new = list(dict.fromkeys(v for v in versions if self._asked.get(how, v) is None))
        if new:
            limit, longest = self.adapter.length, max(len(v.prompt) for v in new)
            room = limit and limit - (0 if self.adapter.encodes else len(self._target))
            if room is not None and longest > room:
                raise PromptError(f"a prompt of {longest} tokens", f"{self.adapter.name} has room for {room}",
                                  "shorter words in the place of others (nothing is cut silently)")  # fmt: skip
            self.forwards += len(new)
            with self._asked.keeping():
                self._ablation(how).logprobs(new, self.advance, partial(self._asked.put, how))
        found = [self._asked.get(how, v) for v in versions]
        return np.stack([v for v in found if v is not None])[:, self.tokens.start : self.tokens.stop]

    def _ablation(self, how: str = "") -> Ablation | EncoderAblation:
        """What asks the model; made once, so that its shortcuts are tried once."""
        known, name = self._asked.engines, (how, self.removal)
        if name not in known:
            model, mean = self.adapter.model, None
            if self.removal == "mean":
                with torch.no_grad():
                    ids = torch.as_tensor(self.run.prompt_ids, device=next(model.parameters()).device)
                    mean = model.get_input_embeddings()(ids).mean(0)
            known[name] = self._engine(how, mean)
        return known[name]

    def _engine(self, how: str, mean: Tensor | None) -> Ablation | EncoderAblation:
        model = self.adapter.model
        if self.adapter.encodes:
            start: int = self.adapter.start  # type: ignore[attr-defined]
            return EncoderAblation(model, start, self._megabytes, mean)
        return Ablation(model, self._megabytes, KeptStates.of(model, how), mean)

    # -- other targets and other units --------------------------------------------------------------------------------

    def _like(self, **changes: Any) -> PromptQuestion:
        given: dict[str, Any] = {
            "numbers": self.numbers, "tokens": self.tokens, "removal": self.removal, "megabytes": self._megabytes,
            "advance": self.advance, "asked": self._asked,
        }  # fmt: skip
        found: PromptQuestion = self.adapter.question(self.run, self.segments, **(given | changes))
        return found

    def removing(self, how: str) -> PromptQuestion:
        """The same question with another removal."""
        return self._like(removal=how)

    def over(self, start: int, stop: int) -> PromptQuestion:
        """See TextQuestion."""
        if not 0 <= start < stop <= len(self.tokens):
            raise PromptError(f"target tokens {start} to {stop}", f"there are {len(self.tokens)}",
                              f"0 <= start < stop <= {len(self.tokens)}")  # fmt: skip
        return self._like(tokens=self.tokens[start:stop])

    @property
    def levels(self) -> tuple[str, ...]:
        """See TextQuestion."""
        own = min(LEVELS.index(self.segments.segments[i].level) for i in self.numbers)
        return tuple(level for level in self.segments.levels if LEVELS.index(level) >= own)

    def refine(self, units: Iterable[int]) -> PromptQuestion:
        """See TextQuestion."""
        numbers = [child for unit in units for child in self.segments.children(self.numbers[unit])]
        if not numbers:
            raise MethodError("finer units", f"{self.units.kind}s have no parts that may be switched", "these units")
        return self._like(numbers=numbers)

    # -- inside -------------------------------------------------------------------------------------------------------

    def embeddings(self) -> NDArray[np.float64]:
        """See TextQuestion."""
        table = self.adapter.model.get_input_embeddings().weight.detach()
        ids = self.run.prompt_ids
        return np.stack([table[ids[list(p)]].double().mean(0).cpu().numpy() for p in self.places])

    @property
    def inputs(self) -> Tensor:
        """Embeddings of prompt and target, [1, token, width]."""
        return self._embedded(self.run.prompt_ids)

    def _embedded(self, prompt: NDArray[np.int64]) -> Tensor:
        model = self.adapter.model
        both = np.concatenate([prompt, self.run.output_ids[:-1]])
        ids = torch.as_tensor(both, device=next(model.parameters()).device)
        return model.get_input_embeddings()(ids)[None].detach()  # type: ignore[no-any-return]

    @property
    def unit_of(self) -> Tensor:
        """Unit of each entry of ``inputs``; -1 for what belongs to none."""
        x = self.inputs
        owner = torch.full((x.shape[1],), -1, device=x.device)
        for unit, places in enumerate(self.places):
            owner[list(places)] = unit
        return owner[None, :, None].expand(1, -1, x.shape[-1]).clone()

    def forward(self, inputs: Tensor) -> Tensor:
        """The value of embeddings [batch, token, width], differentiable."""
        return self._said(inputs)[0].sum(1)

    def slopes(self) -> Tensor:
        """slope[target token, token, width] of each target token's log-probability by the embeddings of prompt and
        target: one pass forwards for all, and one backwards for each."""
        x = self.inputs.requires_grad_()
        said, hidden = self._said(x)
        # The head treats each place by itself, so that it is gone back through once for all of them.
        slope = torch.autograd.grad(said.sum(), hidden)[0][0]
        each = torch.diag_embed(slope.T).permute(1, 2, 0)[:, None]  # [target, 1, place, width]: its own place alone
        return torch.stack([torch.autograd.grad(hidden, x, one, retain_graph=True)[0][0] for one in each])

    def _said(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """logprob[batch, target token] after these embeddings, and what the head read, [1, batch x token, width]."""
        model, n = self.adapter.model, len(self.tokens)
        if self._asked.narrow is None:
            self._asked.narrow = True
            with torch.no_grad():
                mine = self._said(self._embedded(self.run.prompt_ids))[0][0].double().cpu().numpy()
            there = self.run.logprobs[self.tokens.start : self.tokens.stop]
            self._asked.narrow = bool(np.abs(mine - there).max() <= DRIFT)
        first = len(self.run.prompt_ids) - 1 + self.tokens.start
        place = torch.arange(first, first + n, device=inputs.device)
        row = torch.arange(len(inputs), device=inputs.device).repeat_interleave(n)
        position = place.repeat(len(inputs))
        given, last = {"use_cache": False}, None
        with ExitStack() as inside:
            if self._asked.narrow:
                inside.enter_context(fused(model))
                last = last_feed_forward(model)
                if (keeper := KeptStates.of(model)) is not None:
                    inside.enter_context(keeper.attached())
                    given = keeper.given(0, 0, place.expand(len(inputs), -1), None)
            narrow = inside.enter_context(narrowed(model, row, position, last))
            made = model(inputs_embeds=inputs, **given).logits
        said = narrow.logits(made, row, position).float()
        target = torch.as_tensor(self.run.output_ids[self.tokens.start : self.tokens.stop], device=said.device)
        picked = said.gather(-1, target.repeat(len(inputs))[:, None])[:, 0] - said.logsumexp(-1)
        return picked.reshape(len(inputs), n), narrow.hidden[0]

    def background(self, n: int) -> Tensor:
        """``n`` times the input with the tokens of units dealt to each other's places: words of this prompt, in a
        senseless order."""
        rng = stream("background", self.run.prompt)
        places = np.array(sorted({p for unit in self.places for p in unit}))
        rows = []
        for _ in range(n):
            ids = self.run.prompt_ids.copy()
            ids[places] = ids[rng.permutation(places)]
            rows.append(self._embedded(ids)[0])
        return torch.stack(rows)

    def logit_parts(self, foil: int | str | None = None) -> LogitParts:
        """The target tokens' logits in exact parts, each less its foil's: a token number or its text; None: the
        likeliest other token at each place. Capability "logit parts"."""
        ids = [*map(int, self.run.prompt_ids), *map(int, self.run.output_ids)]
        first = len(self.run.prompt_ids) - 1
        places = [first + t for t in self.tokens]
        targets = [ids[p + 1] for p in places]
        if foil is None:
            with torch.no_grad():
                given = torch.tensor([ids[:-1]], device=next(self.adapter.model.parameters()).device)
                said = self.adapter.model(input_ids=given).logits[0, places].float()
            said[torch.arange(len(targets)), targets] = -torch.inf
            foils = [int(i) for i in said.argmax(-1)]
        else:
            found = [foil] if isinstance(foil, int) else self.adapter.encode_output(foil)[0]
            if len(found) != 1 and len(found) != len(targets):
                raise MethodError(f"the foil {foil!r}", f"{len(found)} tokens for {len(targets)} of the target",
                                  "a foil of one token, or of as many as the target")  # fmt: skip
            foils = found * len(targets) if len(found) == 1 else found
        owner = [-1] * (len(ids) - 1)
        for unit, members in enumerate(self.places):
            for place in members:
                owner[place] = unit
        return logit_parts(self.adapter.model, ids[:-1], places, targets, foils, owner)

    def implicit_attention(self) -> Implicit:
        """What each token of a recurrent model passes on to the others. Capability "implicit attention"."""
        ids = [*map(int, self.run.prompt_ids), *map(int, self.run.output_ids)][:-1]
        first = len(self.run.prompt_ids) - 1
        owner = np.full(len(ids), -1)
        for unit, members in enumerate(self.places):
            owner[list(members)] = unit
        return Implicit(implicit_attention(self.adapter.model, ids), owner, tuple(first + t for t in self.tokens))

    def reword(self, rows: Sequence[Mapping[int, str]]) -> NDArray[np.float64]:
        """value[row]: with these units' texts replaced, {unit: text}. Capability "reword"."""
        return np.asarray(self._measured([self._reworded(row) for row in rows]).sum(1))

    def reworded(self, row: Mapping[int, str]) -> str:
        """The prompt with these units' texts replaced."""
        text, out, at = self.run.prompt, "", 0
        for (start, end), unit in sorted((self.spans[u], u) for u in row):
            out += text[at:start] + row[unit]
            at = end
        return out + text[at:]

    def _reworded(self, row: Mapping[int, str]) -> Version:
        return Version(tuple(self.adapter.numbers(self.reworded(row))), self._target)

    def attention(self) -> NDArray[np.float64]:
        """mass[unit] of attention from the places that say the target, mean over them, layers and heads."""
        model = self.adapter.model
        with eager_attention(model), torch.no_grad():
            maps = torch.stack(model(inputs_embeds=self.inputs, output_attentions=True).attentions).double()
        first = len(self.run.prompt_ids) - 1 + self.tokens.start
        mass = maps[:, 0, :, first : first + len(self.tokens)].mean((0, 1, 2)).cpu().numpy()
        return np.array([mass[list(p)].sum() for p in self.places])
