"""Ask a language model again: the log-probability of fixed target tokens after many versions of a prompt.

All versions are collected, doubles removed, and put in the order of their token numbers, so that neighbours share the
longest beginnings. The states (keys and values) of a shared beginning are computed once and kept; each pass reads only
what differs, and the target, teacher-forced. Neighbours whose differing ends are of like length go through together,
up to a cap on memory. Only the logits of each version's own target tokens are made, and of those only the target's is
kept; in the last layer only what these logits need is computed.

What keeps the states and scales attention is a :class:`Keeper`, which knows the model's kind. The longest version is
asked both ways: shortcuts that give other numbers than a plain pass are never used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import RunError
from .narrow import fused, last_feed_forward, narrowed
from .progress import Advance

Ids = tuple[int, ...]
Values = NDArray[np.float64]
MEAN = -1
"""Stands for no token: the mean of the embeddings of the target's own prompt is read in its place."""
DRIFT = 1e-3
"""Log-probabilities (nats) with and without shortcuts may differ by so much (rounding; more in half precision)."""
MEGABYTES = 24.0
"""Memory for the states and activations of one pass, unless another cap is given."""
_TOKEN = np.dtype([("number", ">i4"), ("scale", ">f4")])
_SAME: dict[int, int] = {}


@dataclass(frozen=True)
class Version:
    """Token numbers of a prompt (MEAN: the mean embedding in the token's place) and of the target after it, and how
    attention to each of these tokens is scaled (None: not at all)."""

    prompt: Ids
    target: Ids
    scale: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        # Thousands of versions of a long prompt: each number is held once, not once in each.
        for name in ("prompt", "target"):
            object.__setattr__(self, name, tuple(_SAME.setdefault(i, i) for i in getattr(self, name)))

    @property
    def ids(self) -> Ids:
        """Prompt and target."""
        return self.prompt + self.target

    @property
    def key(self) -> bytes:
        """What the states of this version hang on, token by token: two versions share them as far as these agree."""
        found = np.empty(len(self.prompt) + len(self.target), _TOKEN)
        found["number"], found["scale"] = self.ids, 1.0 if self.scale is None else self.scale
        return found.tobytes()


class Keeper(Protocol):
    """Keeps the states of one beginning of a model, and scales its attention; see `models/kept_states.py`."""

    def attached(self) -> AbstractContextManager[None]:
        """Inside, the model's attention is the keeper's."""

    def make_room(self, longest: int) -> None:
        """For beginnings of so many tokens; what was kept is forgotten."""

    def given(self, shared: int, stored: int, places: Tensor | None, scale: Tensor | None) -> Mapping[str, Any]:
        """What the model gets beside the tokens of the next pass, which follow the ``shared`` first kept ones; of its
        last row so many tokens are ``stored``. ``places[row, target]``: the only positions asked (None: any may be);
        ``scale[row, key]`` of attention."""


@dataclass
class Ablation:
    """Asks one model. ``keeper``: keeps states and scales attention (None: each version is read whole);
    ``mean[width]``: the embedding that MEAN stands for.

    ``megabytes`` caps the memory of a pass. ``passes`` and ``tokens`` count what went through the model.
    ``shortcuts``: whether they gave what a plain pass gives (None: not tried yet).
    """

    model: Any
    megabytes: float = MEGABYTES
    keeper: Keeper | None = None
    mean: Tensor | None = None
    passes: int = 0
    tokens: int = 0
    shortcuts: bool | None = None
    _keeps: bool = False
    _known: bytes = b""

    def logprobs(
        self, versions: Sequence[Version], advance: Advance | None = None,
        each: Callable[[Version, Values], None] | None = None,
    ) -> list[Values]:  # fmt: skip
        """logprob[token] of each version's target tokens, in nats. ``each`` gets every distinct version and its values
        as soon as they are known. Raises RunError where the model gives NaN."""
        keys = {v: v.key for v in versions}
        unique = sorted(keys, key=keys.__getitem__)
        # One place for all values: small ones between the passes' large ones would leave holes in memory.
        room = np.empty((len(unique), max((len(v.target) for v in unique), default=0)))
        found = {v: place[: len(v.target)] for v, place in zip(unique, room, strict=True)}
        with torch.inference_mode():
            if self.shortcuts is None and len(unique) > 1:
                self.shortcuts = self._agrees(max(unique, key=lambda v: len(keys[v])))
            with self._shortened(max(map(len, keys.values()), default=0) // _TOKEN.itemsize):
                for pack in self._packs(unique, keys):
                    for version, values in zip(pack, self._ask(pack), strict=True):
                        found[version][:] = values
                        if each:
                            each(version, found[version])
                    if advance:
                        advance(len(pack))
        return [found[v] for v in versions]

    # -- packing ------------------------------------------------------------------------------------------------------

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Bytes of a kept token, of a token that goes through, and of a target token."""
        c = getattr(self.model.config, "get_text_config", lambda: self.model.config)()
        width, layers = int(c.hidden_size), int(c.num_hidden_layers)
        size = next(self.model.parameters()).element_size()
        inner = getattr(c, "intermediate_size", None) or getattr(c, "n_inner", None) or 4 * width
        heads = int(getattr(c, "num_attention_heads", 1) or 1)
        shared = int(getattr(c, "num_key_value_heads", None) or heads)
        # A token's states, queries and residuals in one layer; a target's logits, and what their sum needs.
        kept = 2 * size * layers * width * shared // heads
        return kept, size * (10 * width + 2 * int(inner)), (size + 4) * int(c.vocab_size)

    def _fits(self, rows: int, tokens: int, targets: int) -> bool:
        """Whether so many rows may go through at once: a single one always may."""
        _, token, target = self._sizes
        return rows * (tokens * token + targets * target) <= self.megabytes * 2**20

    @property
    def _call(self) -> int:
        """What one more pass costs beside its tokens, counted in tokens: the narrower a model, the more."""
        if self._device.type != "cpu":
            return 2_048
        c = getattr(self.model.config, "get_text_config", lambda: self.model.config)()
        return min(128, max(4, 3 * 2**20 // int(c.hidden_size) ** 2))

    def _packs(self, ordered: Sequence[Version], keys: Mapping[Version, bytes]) -> list[list[Version]]:
        """Neighbours that cost less together than one by one."""
        packs: list[list[Version]] = []
        cost = base = shared = longest = 0
        call, last = self._call, b""
        for v in ordered:
            key = keys[v]
            before = common(key, last) if self._keeps else 0
            length, last = len(key) // _TOKEN.itemsize, key
            alone = length - before
            if packs:
                n, both, most = len(packs[-1]) + 1, min(shared, before), max(longest, length)
                # What all of the pack share and nobody has read yet goes through once, in a pass of its own.
                together = n * (most - both) + min(n * max(0, both - base), max(0, both - base) + call)
                if together - cost <= call + alone and self._fits(n, most - both, len(v.target)):
                    packs[-1].append(v)
                    cost, shared, longest = together, both, most
                    continue
            packs.append([v])
            cost, base, shared, longest = alone, before, length, length
        return packs

    # -- asking -------------------------------------------------------------------------------------------------------

    @cached_property
    def _last(self) -> Any:
        return last_feed_forward(self.model)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    def _shortened(self, longest: int) -> AbstractContextManager[Any]:
        """Inside, passes are shortened, if that gives the same numbers; states are kept where they fit the cap."""
        self._keeps = False
        if not self.shortcuts:
            return nullcontext()
        inside = ExitStack()
        inside.enter_context(fused(self.model))
        if self.keeper is not None:
            inside.enter_context(self.keeper.attached())
            self._keeps = longest * self._sizes[0] <= self.megabytes * 2**20
            self.keeper.make_room(longest)
            self._known = b""
        return inside

    def _agrees(self, version: Version) -> bool:
        """Whether a pass with all shortcuts, after half of the prompt was read, gives what a plain one gives."""
        plain = self._ask([version])[0]
        self.shortcuts = True
        try:
            with self._shortened(len(version.ids)):
                if self._keeps:
                    self._grow(version, len(version.prompt) // 2)
                short = self._ask([version])[0]
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, IndexError, KeyError):
            return False  # a kind of model that the keeper does not know
        finally:
            self.shortcuts = self._keeps = False
        half_precision = next(self.model.parameters()).dtype in (torch.float16, torch.bfloat16)
        return bool(np.abs(plain - short).max() <= (50 if half_precision else 1) * DRIFT)

    def _grow(self, version: Version, tokens: int) -> None:
        """Read what is not known yet of a version's first tokens."""
        key = version.key[: tokens * _TOKEN.itemsize]
        same = common(self._known, key)
        if same < tokens:
            self._pass([version.ids[same:tokens]], [_scale(version)[:tokens]], same, [[tokens - 1 - same]])
            self._known = key

    def _ask(self, pack: Sequence[Version]) -> list[Values]:
        shared, first = 0, pack[0].key
        if self._keeps:
            # The last token of each prompt is read again: it says the first target token.
            last = pack[-1].key
            both = min(common(first, last), *(len(v.prompt) - 1 for v in pack)) if len(pack) > 1 else (
                len(pack[0].prompt) - 1
            )  # fmt: skip
            shared = min(common(self._known, first), both)
            if (len(pack) - 1) * (both - shared) > self._call:
                self._grow(pack[0], both)
                shared = both
        rows = [v.ids[shared:-1] for v in pack]
        wanted = [[len(v.prompt) - 1 - shared + t for t in range(len(v.target))] for v in pack]
        said = self._pass(rows, [_scale(v)[:-1] for v in pack], shared, wanted)
        if self._keeps:
            self._known = pack[-1].key[: -_TOKEN.itemsize]
        target = torch.tensor([t for v in pack for t in v.target], device=said.device)
        value = _logprob(said, target).double().cpu().numpy()
        if np.isnan(value).any():
            raise RunError("log-probabilities of the target", "the model gives NaN",
                           "a model in float32, or weights that are not broken")  # fmt: skip
        return np.split(value, np.cumsum([len(v.target) for v in pack])[:-1])

    def _pass(
        self, rows: Sequence[Sequence[int]], scales: Sequence[Sequence[float]], shared: int,
        wanted: Sequence[Sequence[int]],
    ) -> Tensor:  # fmt: skip
        """logits[place, word] at the wanted positions of each row, rows after one another. Rows are padded at the end,
        where a causal model's earlier tokens do not see it."""
        width = max(map(len, rows))
        ids = torch.tensor([[*r, *([r[-1]] * (width - len(r)))] for r in rows], device=self._device)
        given: dict[str, Any] = {"input_ids": ids}
        if bool((ids == MEAN).any()):
            if self.mean is None:
                raise RunError("removal by 'mean'", "no mean embedding was given", "removal by 'drop'")
            embedded = self.model.get_input_embeddings()(ids.clamp(min=0))
            given = {"inputs_embeds": torch.where((ids == MEAN)[..., None], self.mean.to(embedded), embedded)}
        self.passes += 1
        self.tokens += ids.numel()
        row = torch.tensor([i for i, w in enumerate(wanted) for _ in w], device=ids.device)
        position = torch.tensor([p for w in wanted for p in w], device=ids.device)
        scale = self._scaled(scales)
        if not self.shortcuts:
            return self._plainly(given, scale, row, position)
        if self.keeper is not None:
            even = len({len(w) for w in wanted}) == 1
            places = position.reshape(len(rows), -1) if even else None
            given |= self.keeper.given(shared, len(rows[-1]) if self._keeps else 0, places, scale)
        elif "use_cache" in _accepts(type(self.model)):
            given |= {"use_cache": False}
        with narrowed(self.model, row, position, self._last) as narrow:
            return narrow.logits(self.model(**given).logits, row, position)

    def _plainly(self, given: dict[str, Any], scale: Tensor | None, row: Tensor, position: Tensor) -> Tensor:
        """The same without shortcuts; of several rows all logits that any row asks for are made."""
        accepted = _accepts(type(self.model))
        some, at = torch.unique(position, return_inverse=True)
        known = "logits_to_keep" in accepted
        given |= ({"logits_to_keep": some} if known else {}) | ({"use_cache": False} if "use_cache" in accepted else {})
        with ExitStack() as inside:
            if scale is not None:
                assert self.keeper is not None
                inside.enter_context(self.keeper.attached())
                given |= self.keeper.given(0, 0, None, scale)
            logits: Tensor = self.model(**given).logits
        return logits[row, at if known else position]

    def _scaled(self, scales: Sequence[Sequence[float]]) -> Tensor | None:
        """scale[row, key]; None where none is scaled."""
        if all(s == 1 for row in scales for s in row):
            return None
        if self.keeper is None:
            raise RunError("scale attention", "this model's attention cannot be scaled", "removal by 'drop'")
        length = max(map(len, scales))
        return torch.tensor([[*s, *([1.0] * (length - len(s)))] for s in scales], device=self._device)


def _scale(version: Version) -> Sequence[float]:
    return version.scale or (1.0,) * len(version.ids)


def _logprob(logits: Tensor, target: Tensor, some: int = 256) -> Tensor:
    """logprob[place] of target[place]; the sum over all words is made for some places at a time."""
    total = torch.cat([part.float().logsumexp(-1) for part in torch.split(logits, some)])
    return logits.gather(-1, target[:, None])[:, 0].float() - total


def common(a: bytes, b: bytes) -> int:
    """How many tokens two keys have in common at their beginnings."""
    n = min(len(a), len(b)) // _TOKEN.itemsize
    if a[: n * _TOKEN.itemsize] == b[: n * _TOKEN.itemsize]:
        return n
    other = np.frombuffer(a, np.uint64, n) != np.frombuffer(b, np.uint64, n)
    return int(other.argmax())


def _accepts(model: type) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)  # type: ignore[attr-defined]
