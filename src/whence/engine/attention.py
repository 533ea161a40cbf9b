"""The attention tape: how strongly each place of a picture attended to each word while it was made.

    a(place, word) = mean over the word's columns j of softmax(q k^T * scale)[place, j]

read from the model's own kernel calls (`capture.py`), so that the picture keeps every bit. Only the conditional rows
and the picture's queries are read; what is kept is places x words, never places x keys. The tape sums in place over
the axes that are not kept, under a budget of bytes. It can be *read* (:meth:`AttentionTape.layers`), *differentiated
through* (``mode="grad"``) and *written to* (``edits``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..errors import RunError, WrongMapError
from .capture import Attention, Layer, Plan, Watch, watching

AXES = ("step", "layer", "head")
KINDS = ("probability", "text-only softmax")
Edit = Callable[[Attention], Tensor | None]
"""Gives the new output [row, head, query, channel] of the conditional rows' picture queries, or None to leave it."""


@dataclass(frozen=True)
class LayerMaps:
    """Maps of one layer (or of all layers of one grid): ``values`` [step, head, word, y, x], means of what was summed.

    ``kind`` is that of the attention ("cross" or "joint"), ``map_kind`` says what the values are. ``steps`` are the
    denoiser passes that were recorded. ``merged`` counts the layers averaged in ``values``: weigh by it.
    """

    name: str
    kind: str
    height: int
    width: int
    values: Tensor
    steps: tuple[int, ...]
    map_kind: str
    merged: int = 1


@dataclass(frozen=True)
class Reweight:
    """An edit: the words' probabilities are multiplied by ``weights[word]`` in the conditional rows' picture queries.

    ``normalise`` (default): logits get log(weight), so that the row still sums to 1 and weight 0 is a masked word.
    Otherwise the word's values are scaled and the rest is left, as prompt-to-prompt re-weights. Weights of 1 change
    nothing at all. ``layers`` and ``steps`` choose where; None is everywhere.
    """

    weights: Mapping[int, float]
    layers: Callable[[Layer], bool] | None = None
    steps: Container[int] | None = None
    normalise: bool = True

    def __call__(self, attention: Attention) -> Tensor | None:
        chosen = (self.layers is None or self.layers(attention.layer)) and (
            self.steps is None or attention.step in self.steps
        )
        if not chosen or all(w == 1 for w in self.weights.values()):
            return None
        key = attention.key
        factors = torch.ones(len(attention.columns), key.shape[-2], dtype=key.dtype, device=key.device)
        for row, words in enumerate(attention.columns):
            for word, weight in self.weights.items():
                if word >= len(words):
                    raise RunError(f"re-weight word {word}", f"the prompt has {len(words)} words", "words from 0")
                factors[row, [attention.text.start + c for c in words[word]]] = weight
        if self.normalise:
            return attention.attend(bias=factors.log()[:, None, None, :])
        return attention.attend(value=attention.value[attention.rows] * factors[:, None, :, None])


@dataclass
class _Words:
    """Columns of one batch as tensors: ``index`` [image, piece], ``pool`` [image, piece, word] (1/pieces or 0)."""

    index: Tensor
    pool: Tensor
    single: bool

    @classmethod
    def of(cls, columns: Sequence[Sequence[Sequence[int]]], device: torch.device) -> _Words:
        words = max(map(len, columns))
        pieces = [[c for word in image for c in word] for image in columns]
        index = torch.zeros(len(columns), max(map(len, pieces)), dtype=torch.long)
        pool = torch.zeros(*index.shape, words)
        for i, image in enumerate(columns):
            index[i, : len(pieces[i])] = torch.tensor(pieces[i], dtype=torch.long)
            at = 0
            for w, word in enumerate(image):
                pool[i, at : at + len(word), w] = 1 / max(len(word), 1)
                at += len(word)
        single = bool((pool == torch.eye(words)).all()) if index.shape[1] == words else False
        return cls(index.to(device), pool.to(device), single)


@dataclass
class _Batch:
    """What one watched batch gave: sums [image, head, place, word] by (group, step)."""

    plan: Plan
    words: _Words
    sums: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    counts: dict[tuple[str, int], int] = field(default_factory=dict)
    steps: set[int] = field(default_factory=set)
    hits: dict[str, int] = field(default_factory=dict)


class AttentionTape:
    """Records the maps of one generation; give it to ``model.generate(settings, tape=tape)``.

    ``keep``: axes kept apart among "step", "layer", "head"; the others are averaged as they come. ``kind``:
    "probability" (softmax over all keys) or "text-only softmax" (over the text's keys alone; special and padding
    tokens are text keys too, unless the model masks them). ``every=k`` records each k-th denoiser pass. ``budget``:
    bytes that the kept maps may take. ``mode="grad"`` keeps the graph. ``edits`` change attention outputs; the maps
    are of the attention before them.
    """

    def __init__(
        self,
        keep: Sequence[str] = (),
        kind: str = "probability",
        every: int = 1,
        budget: int = 512 * 2**20,
        mode: str = "read",
        edits: Sequence[Edit] = (),
    ) -> None:
        if unknown := [axis for axis in keep if axis not in AXES]:
            raise RunError(f"keep {unknown}", "no such axis of the tape", ", ".join(AXES))
        if kind not in KINDS:
            raise RunError(f"maps of kind {kind!r}", "the tape cannot read these", ", ".join(KINDS))
        if mode not in ("read", "grad") or every < 1:
            raise RunError(f"mode {mode!r}, every {every}", "not a way to record", "mode 'read' or 'grad', every >= 1")
        self.keep, self.kind, self.every, self.budget = frozenset(keep), kind, every, budget
        self.mode, self.edits = mode, tuple(edits)
        self._batches: list[_Batch] = []
        self._watch: Watch | None = None

    # Before and during the run ------------------------------------------------------------------------------------

    def rewind(self) -> None:
        """Forget what was recorded: a tape holds one generation."""
        self._batches = []

    def bytes_needed(self, layers: Sequence[Layer], words: int, images: int, calls: int, keep: Sequence[str]) -> int:
        """Bytes of the kept maps of a run with these axes kept."""
        groups = {self._group(layer, keep): layer for layer in layers}
        places = sum(layer.grid * (layer.heads if "head" in keep else 1) for layer in groups.values())
        return 4 * places * words * images * (math.ceil(calls / self.every) if "step" in keep else 1)

    def check(self, layers: Sequence[Layer], words: int, images: int, calls: int) -> None:
        """Raises WrongMapError before any work if the kept maps exceed the budget, saying what would fit."""
        keep = [axis for axis in AXES if axis in self.keep]
        need = self.bytes_needed(layers, words, images, calls, keep)
        if need <= self.budget:
            return
        smaller = (list(c) for n in range(len(keep) - 1, -1, -1) for c in combinations(keep, n))
        fits = next((c for c in smaller if self.bytes_needed(layers, words, images, calls, c) <= self.budget), None)
        raise WrongMapError(
            f"maps of {words} words with {', '.join(keep) or 'no axis'} kept for {images} picture(s)",
            f"they take {need:,} bytes, the tape's budget is {self.budget:,}",
            f"budget={need}" + ("" if fits is None else f", or keep=({', '.join(map(repr, fits))})"),
        )

    @contextmanager
    def on(self, plan: Plan) -> Iterator[Watch]:
        """Watch one batch. Raises WrongMapError at the end if a layer was not seen as often as the others."""
        self._batches.append(_Batch(plan, _Words.of(plan.columns, plan.condition.device)))
        try:
            with watching(plan, self) as self._watch:
                yield self._watch
        finally:
            self._watch = None
        self._complete(self._batches[-1])

    def _complete(self, batch: _Batch) -> None:
        missed = [layer.name for layer in batch.plan.layers if batch.hits.get(layer.name, 0) != len(batch.steps)]
        if not batch.steps or missed:
            raise WrongMapError(
                "a record of the attention to words",
                f"{'no layer' if not batch.steps else 'not every layer'} was seen"
                + (f", missing {', '.join(missed[:3])}{' ...' if len(missed) > 3 else ''}" if batch.steps else ""),
                "a model whose attention runs through torch's kernel or diffusers' dispatcher, without cached, merged "
                "or compiled blocks",
            )

    def wants(self, layer: Layer, step: int) -> bool:
        """Whether an attention is to be recorded or may be edited."""
        return step % self.every == 0 or bool(self.edits)

    def edit(self, attention: Attention) -> Tensor | None:
        """The last edit that has something to say decides."""
        out = None
        for edit in self.edits:
            new = edit(attention)
            out = out if new is None else new
        return out

    def seen(self, attention: Attention, lse: Tensor | None) -> None:
        """Adds the words' maps of one attention, as it was before any edit."""
        layer, step, batch = attention.layer, attention.step, self._batches[-1]
        if step % self.every:
            return
        batch.steps.add(step)
        batch.hits[layer.name] = batch.hits.get(layer.name, 0) + 1
        heads = "head" in self.keep
        own = self.kind == "text-only softmax" and layer.kind == "joint"
        exact = lse is not None and not own and self.mode == "read"
        with torch.set_grad_enabled(self.mode == "grad"):
            if exact:
                assert lse is not None
                maps = _from_statistics(attention, lse, batch.words, heads)
            else:
                maps = _from_indicators(attention, batch.words, heads, own)
            key = (self._group(layer, self.keep), step if "step" in self.keep else -1)
            if key not in batch.sums:
                batch.sums[key] = maps.contiguous()
            elif self.mode == "grad":
                batch.sums[key] = batch.sums[key] + maps
            else:
                batch.sums[key].add_(maps)
        batch.counts[key] = batch.counts.get(key, 0) + 1

    def _group(self, layer: Layer, keep: Container[str]) -> str:
        if "layer" in keep:
            return layer.name
        heads = f", {layer.heads} heads" if "head" in keep else ""
        return f"{layer.kind} layers at {layer.height}x{layer.width}{heads}"

    # After the run ------------------------------------------------------------------------------------------------

    @property
    def images(self) -> int:
        """How many pictures were recorded."""
        return sum(len(batch.plan.columns) for batch in self._batches)

    @property
    def nbytes(self) -> int:
        """Bytes of the maps that are held."""
        return sum(t.numel() * t.element_size() for batch in self._batches for t in batch.sums.values())

    def layers(self, image: int = 0) -> list[LayerMaps]:
        """The maps of one picture, one entry for each layer (or grid, if layers are not kept), in the model's order."""
        for batch in self._batches:
            if image < len(batch.plan.columns):
                break
            image -= len(batch.plan.columns)
        else:
            raise WrongMapError(
                f"maps of picture {image}", f"the tape holds {self.images}", "record a generation first"
            )
        words = len(batch.plan.columns[image])
        steps = tuple(sorted(batch.steps))
        members: dict[str, list[Layer]] = {}
        for layer in batch.plan.layers:
            members.setdefault(self._group(layer, self.keep), []).append(layer)
        maps = []
        for name, group in members.items():
            keys = [(name, s) for s in steps] if "step" in self.keep else [(name, -1)]
            values = torch.stack([batch.sums[k][image] / batch.counts[k] for k in keys])
            first = group[0]
            grid = values[..., :words].transpose(-1, -2)
            grid = grid.reshape(*grid.shape[:-1], first.height, first.width)
            maps.append(LayerMaps(name, first.kind, first.height, first.width, grid, steps, self.kind, len(group)))
        return maps


def _from_statistics(a: Attention, lse: Tensor, words: _Words, heads: bool) -> Tensor:
    """exp(q k^T * scale + mask - lse) at the words' columns alone: [image, head or 1, place, word]."""
    index = words.index + a.text.start
    image = torch.arange(len(index), device=index.device)[:, None]
    query = a.query[a.rows][:, :, a.picture].float()
    key = a.key[a.rows].transpose(1, 2)[image, index].permute(0, 2, 3, 1).float()
    logits = (query @ key).mul_(a.scale)
    if a.mask is not None:
        mask = a.mask_rows()
        assert mask is not None
        at = index[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
        logits.add_(mask.expand(len(index), -1, -1, -1).gather(-1, at))
    return _pool(logits.sub_(lse[a.rows][:, :, a.picture, None]).exp_(), words, heads)


def _pool(p: Tensor, words: _Words, heads: bool) -> Tensor:
    p = p if heads else p.mean(1, keepdim=True)
    return p if words.single else p @ words.pool[:, None]


def _from_indicators(a: Attention, words: _Words, heads: bool, own: bool) -> Tensor:
    """The same from a second kernel call whose value columns are word indicators; ``own``: over text keys alone."""
    keys = a.text if own else slice(None)
    key = a.key[a.rows][:, :, keys]
    start = 0 if own else a.text.start
    images, count = words.pool.shape[0], words.pool.shape[-1]
    channel = key.shape[-1]
    width = math.ceil(count / channel) * channel  # as wide as the head, so that the kernel stays the fused one
    columns = torch.zeros(images, key.shape[-2], width, dtype=key.dtype, device=key.device)
    columns[..., :count].scatter_add_(
        1, (words.index + start)[..., None].expand(-1, -1, count), words.pool.to(key.dtype)
    )
    query, mask = a.query[a.rows][:, :, a.picture], a.mask_rows(keys)
    parts = [
        scaled_dot_product_attention(
            query, key, part[:, None].expand(-1, key.shape[1], -1, -1), attn_mask=mask, scale=a.scale
        )
        for part in torch.split(columns, channel, dim=-1)
    ]
    p = torch.cat(parts, -1)[..., :count]
    p = p if p.dtype == torch.float64 else p.float()
    return p if heads else p.mean(1, keepdim=True)
