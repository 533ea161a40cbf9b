"""Corrupt, restore, read out: which component carries what the prompt said? No papers in here.

A :class:`Row` is one picture of a pass: its settings, the text embedding that its conditional row gets in place of its
own (the corruption), the :class:`Site` s whose activation is put back as it was in a clean run, and the attention heads
whose keys and values are made of another prompt. Rows of different sites and seeds go through the denoiser together.
Hooks count the calls of each module: an activation is kept, and put back, by (module, call). The conditional rows are
those that carry the prompt's embeddings (`engine/capture.py`): nothing is guessed from the size of the batch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import MethodError, PromptError, RunError, WrongMapError
from ..run import Run, Settings
from .capture import Attention, Layer, Plan, Watch
from .journal import Journal
from .progress import Advance
from .prompts import drop_word, replace_word
from .randomness import stream, torch_stream

BUDGET = 1024 * 2**20
"""Bytes that kept activations may take, unless another budget is given."""
KINDS = {
    "cross-attention": r"\.attn2$",
    "self-attention": r"\.attn1$",
    "joint attention": r"\.attn$",
    "feed-forward": r"\.ff(_context)?$",
    "resnet": r"\.resnets\.\d+$",
    "stream": r"\.resnets\.\d+$",
    "block": r"(^|\.)(single_)?transformer_blocks\.\d+$",
}
"""Kinds of a denoiser's modules, by their names in diffusers. Each is what a module adds to the stream of activations;
"stream" and "block" are the stream itself after a resnet or a transformer block: at a bottleneck that is everything."""
ENCODER_KINDS = {"self-attention": r"(\.self_attn|\.SelfAttention)$", "feed-forward": r"(\.mlp|\.DenseReluDense)$"}
"""Kinds of a text encoder's modules, by their names in transformers."""
Readout = Callable[[Run], float]
Group = tuple["Site", ...]
_Tap = tuple[str, str]


@dataclass(frozen=True)
class Site:
    """A component whose activation can be put back: a module's output, one head of it, or some of its tokens.

    ``module``: its name in the denoiser, or in the pipeline for a text encoder. ``head``: of an attention, None: all.
    ``tokens``: places on the text axis, empty: all. ``steps``: denoiser passes from, up to and without; None: all.
    ``parameters``: weights of the module (a head: its share). ``depth``: in the order in which modules run.
    """

    module: str
    kind: str
    head: int | None = None
    tokens: tuple[int, ...] = ()
    place: str = ""
    steps: tuple[int, int] | None = None
    parameters: int = field(default=0, compare=False)
    depth: int = field(default=0, compare=False)
    channels: tuple[int, int] | None = field(default=None, compare=False)

    @property
    def label(self) -> str:
        """What a person calls it."""
        text = self.module + ("" if self.head is None else f" head {self.head}")
        text += f" at {self.place}" if self.place else ""
        return text + (f" steps {self.steps[0]}-{self.steps[1] - 1}" if self.steps else "")

    @property
    def tap(self) -> _Tap:
        """Where it is read and written: a module's output, or what goes into an attention's output projection."""
        if self.head is not None:
            return f"{self.module}.to_out.0", "in"
        # A resnet's output holds the whole stream; what it adds is that of its last convolution.
        return (f"{self.module}.conv2" if self.kind == "resnet" else self.module), "out"

    def at(self, step: int) -> bool:
        """Whether it is put back in this pass."""
        return self.steps is None or self.steps[0] <= step < self.steps[1]


def denoiser_sites(
    model: Any, kinds: Sequence[str] | None = None, heads: bool = False, steps: tuple[int, int] | None = None
) -> tuple[Site, ...]:
    """The denoiser's components in the order in which they run; ``heads``: attentions head by head.

    ``kinds`` of :data:`KINDS`; None: attentions, feed-forwards and resnets of a UNet, blocks of a transformer. Raises
    MethodError for a kind that the model lacks, WrongMapError for a compiled one.
    """
    denoiser = model.denoiser
    refuse_compiled(denoiser)
    names = list(denoiser.named_modules())
    if kinds is None:
        unet = any(re.search(KINDS["resnet"], n) for n, _ in names)
        kinds = tuple(k for k in KINDS if k not in ("stream", "block")) if unet else ("block",)
        kinds = tuple(k for k in KINDS if "attention" in k) if heads else kinds
    if unknown := [k for k in kinds if k not in KINDS]:
        raise MethodError(f"sites of kind {', '.join(unknown)}", "no such kind", ", ".join(KINDS))
    found: list[tuple[tuple[Any, ...], str, str, nn.Module]] = []
    for name, module in names:
        found += [(_order(name), name, k, module) for k in kinds if re.search(KINDS[k], name)]
    if heads:
        found = [f for f in found if _to_out(f[3]) is not None]
    if not found:
        have = sorted({k for k, p in KINDS.items() if any(re.search(p, n) for n, _ in names)})
        raise MethodError(f"sites of kind {', '.join(kinds)}", f"{model.family} has none of them", ", ".join(have))
    sites: list[Site] = []
    for depth, (_, name, kind, module) in enumerate(sorted(found, key=lambda f: f[0])):
        size = sum(p.numel() for p in module.parameters())
        if not heads:
            sites.append(Site(name, kind, steps=steps, parameters=size, depth=depth))
            continue
        width, n = _to_out(module).in_features, int(module.heads)  # type: ignore[union-attr,arg-type]
        each = width // n
        sites += [
            Site(name, kind, h, steps=steps, parameters=size // n, depth=depth, channels=(h * each, (h + 1) * each))
            for h in range(n)
        ]
    return tuple(sites)


def _to_out(module: nn.Module) -> nn.Linear | None:
    out = getattr(module, "to_out", None)
    first = out[0] if isinstance(out, nn.ModuleList) and len(out) else None
    return first if hasattr(first, "in_features") else None  # type: ignore[return-value]


def _order(name: str) -> tuple[Any, ...]:
    """Down, middle, up; in a block the resnet before the attentions of the same number (as UNet blocks run)."""
    stages = ("down_", "mid_", "up_", "transformer_", "single_")
    stage = next((i for i, start in enumerate(stages) if name.startswith(start)), len(stages))
    numbers = [int(n) for n in re.findall(r"\.(\d+)", name)]
    block = numbers[:1] if stage in (0, 2, 3, 4) else []
    inner = numbers[len(block) :]
    resnet = ".resnets." in name
    if stage == 1 and resnet:
        inner[0] -= 1  # the middle block runs a resnet, then an attention and a resnet in turns
        resnet = inner[0] < 0
    last = next((i for i, k in enumerate(("attn1", "attn2", "attn", "ff")) if name.endswith(k)), 9)
    return (stage, block, inner[:1], not resnet if stage != 1 else ".resnets." in name, inner[1:], last)


def encoder_sites(
    model: Any, prompt: str, kinds: Sequence[str] = ("self-attention", "feed-forward")
) -> tuple[Site, ...]:
    """Each layer of each text encoder at each word's last token, and at all places after the last word ("the end")."""
    if unknown := [k for k in kinds if k not in ENCODER_KINDS]:
        raise MethodError(f"sites of kind {', '.join(unknown)}", "no such kind", ", ".join(ENCODER_KINDS))
    words = model.words(prompt)
    sites: list[Site] = []
    for e, (name, encoder, length) in enumerate(_encoders(model)):
        refuse_compiled(encoder)
        places: list[tuple[str, tuple[int, ...]]] = [
            (label, (own[e][-1],)) for label, own in zip(words.labels, words.members, strict=True) if own[e]
        ]
        last = max((p[0] for _, p in places), default=0)
        places.append(("the end", tuple(range(last + 1, length))))
        depth = 0
        for path, module in encoder.named_modules():
            kind = next((k for k in kinds if re.search(ENCODER_KINDS[k], path)), None)
            if kind:
                size = sum(p.numel() for p in module.parameters())
                sites += [
                    Site(f"{name}.{path}", kind, tokens=at, place=label, parameters=size, depth=depth)
                    for label, at in places
                ]
                depth += 1
    if not sites:
        raise MethodError("layers of the text encoder", f"{model.family} has none that is known", "the denoiser")
    return tuple(sites)


def _encoders(model: Any) -> list[tuple[str, nn.Module, int]]:
    """The pipeline's text encoders in the order of ``model.encoders()``: name, module, tokens kept."""
    parts = sorted((n, m) for n, m in model.pipeline.components.items() if n.startswith("text_encoder"))
    modules = [(n, m) for n, m in parts if isinstance(m, nn.Module)]
    kept = list(model.encoders())
    # FLUX attends to its last encoder's tokens alone; the others give one pooled vector.
    return [(n, m, e.length) for (n, m), e in zip(modules[len(modules) - len(kept) :], kept, strict=True)]


def refuse_compiled(module: nn.Module) -> None:
    """Raises WrongMapError for compiled modules: their hooks may never run."""
    for name, part in module.named_modules():
        if type(part).__name__ == "OptimizedModule" or getattr(part, "_compiled_call_impl", None) is not None:
            raise WrongMapError(f"patch {name or 'the denoiser'}", "it is compiled", "the module before torch.compile")


# --- corruption ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corruption:
    """What is done to the text.

    ``how``: "noise" (Gaussian, ``scale`` times the embedding's standard deviation), "swap" (another prompt's embedding;
    ``other`` is the word that takes the word's place) or "drop" (the prompt without the word). ``after``: noise also on
    the places after the word, into which a causal encoder has written it too.
    """

    how: str = "noise"
    scale: float = 3.0
    other: str = ""
    after: bool = True

    def __post_init__(self) -> None:
        if self.how not in ("noise", "swap", "drop"):
            raise MethodError(f"corruption by {self.how!r}", "no such corruption", "noise, swap or drop")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise MethodError(f"noise of scale {self.scale}", "not a positive number", "3, in standard deviations")
        if self.how == "swap" and not self.other:
            raise MethodError("corruption by swap", "no word to put in the place", "other='blue'")

    def text(self, model: Any, settings: Settings, word: str) -> Tensor:
        """The corrupted text embedding, [token, feature], of one run."""
        prompt = settings.prompt
        index = model.words(prompt).find(word)
        if self.how != "noise":
            return encoded(model, self.prompt(prompt, index), settings)
        clean = encoded(model, prompt, settings).clone()
        places = model.columns(model.words(prompt))[index]
        if not places:
            raise PromptError(f"noise on {word!r}", "it has no place on the text axis", "another word")
        span = slice(places[0], None) if self.after else list(places)
        noise = torch.randn(clean[span].shape, generator=torch_stream("patch", "noise", word, settings.seed))
        clean[span] += (self.scale * clean.float().std() * noise.to(clean.device)).to(clean.dtype)
        return clean

    def prompt(self, prompt: str, index: int) -> str:
        """The prompt that is read in its place (swap, drop)."""
        return replace_word(prompt, index, self.other) if self.how == "swap" else drop_word(prompt, index)


def encoded(model: Any, prompt: str, settings: Settings) -> Tensor:
    """The text embedding, [token, feature], that the denoiser attends to."""
    with torch.no_grad():
        return model.encode([prompt], settings.negative_prompt, False).condition[0]  # type: ignore[no-any-return]


def restored_texts(
    model: Any, settings: Settings, word: str, corruption: Corruption, groups: Sequence[Group]
) -> tuple[Tensor, list[Tensor]]:
    """Text embeddings, [token, feature]: the corrupted one, and for each group that with its states put back.

    Noise goes onto the encoders' input embeddings of the word; by swap and drop they read the other prompt.
    """
    words = model.words(settings.prompt)
    index = words.find(word)
    encoders = _encoders(model)
    prompt = settings.prompt if corruption.how == "noise" else corruption.prompt(settings.prompt, index)
    modules = {f"{name}.{path}": part for name, m, _ in encoders for path, part in m.named_modules()}
    clean: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name in {s.module for g in groups for s in g}:
            stack.callback(modules[name].register_forward_hook(_keep(clean, name)).remove)
        encoded(model, settings.prompt, settings)
    with ExitStack() as stack:
        if corruption.how == "noise":
            for e, (name, encoder, _) in enumerate(encoders):
                hook = _noised(words.members[index][e], corruption.scale, ("patch", name, word, settings.seed))
                stack.callback(encoder.get_input_embeddings().register_forward_hook(hook).remove)  # type: ignore[operator]
        corrupted = encoded(model, prompt, settings)
        found = []
        for group in groups:
            with ExitStack() as own:
                for site in group:
                    hook = _put_back(clean[site.module], site.tokens)
                    own.callback(modules[site.module].register_forward_hook(hook).remove)
                found.append(encoded(model, prompt, settings))
    return corrupted, found


def _keep(into: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        into[name] = (output[0] if isinstance(output, tuple) else output).detach().clone()

    return hook


def _noised(places: Sequence[int], scale: float, names: tuple[object, ...]) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        out = output.clone()
        noise = torch.randn((len(places), out.shape[-1]), generator=torch_stream(*names)).to(out)
        out[..., list(places), :] += scale * output.std() * noise
        return out

    return hook


def _put_back(clean: Tensor, tokens: Sequence[int]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        out = (output[0] if isinstance(output, tuple) else output).clone()
        at = [t for t in tokens if t < out.shape[-2]]
        out[..., at, :] = clean[..., at, :]
        return (out, *output[1:]) if isinstance(output, tuple) else out

    return hook


# --- rows of a pass --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Row:
    """One picture to make. ``text`` [token, feature] stands in for its conditional embedding; ``restore``: sites that
    are put back as they were in clean picture number ``source``; ``feed[layer]``: heads of a cross-attention (None:
    all) whose keys and values go ``amount`` of the way from their own to those made of ``other`` [token, feature]; an
    amount below 0 leads away from it."""

    settings: Settings
    text: Tensor | None = None
    restore: Group = ()
    source: int = 0
    feed: Mapping[str, Sequence[int] | None] = field(default_factory=dict)
    other: Tensor | None = None
    amount: float = 1.0


class Kept:
    """Clean activations by (module, call): ``held[tap, call][picture]``."""

    def __init__(self) -> None:
        self.held: dict[tuple[_Tap, int], list[tuple[Tensor, ...]]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(t.numel() * t.element_size() for rows in self.held.values() for row in rows for t in row)

    @property
    def calls(self) -> dict[_Tap, int]:
        """How often each module was called in a run."""
        found: dict[_Tap, int] = {}
        for tap, call in self.held:
            found[tap] = max(found.get(tap, 0), call + 1)
        return found


class _Silent:
    """Sees attentions and changes nothing."""

    def wants(self, layer: Layer, step: int) -> bool:
        return False

    def edit(self, attention: Attention) -> Tensor | None:
        return None

    def seen(self, attention: Attention, lse: Tensor | None) -> None:
        return None


class Patcher:
    """Puts rows on the denoiser; given to ``model.generate_many(settings, tape=patcher)`` as a recorder.

    ``keep``: sites whose activations are kept in ``kept`` while the rows run.
    """

    def __init__(self, rows: Sequence[Row], kept: Kept | None = None, keep: Sequence[Site] = ()) -> None:
        self.rows, self.kept, self.keep = rows, kept or Kept(), {s.tap for s in keep}
        self._at = 0

    def rewind(self) -> None:
        """A new generation begins."""
        self._at = 0

    def check(self, layers: Sequence[Layer], words: int, images: int, calls: int) -> None:
        """Raises RunError where the rows are not those of the generation."""
        if images != len(self.rows):
            raise RunError(f"patch {images} pictures", f"{len(self.rows)} rows were given", "a row for each picture")

    @contextmanager
    def on(self, plan: Plan) -> Iterator[Watch]:
        """Patch one batch; all hooks come off at the end, also after an error."""
        batch = self.rows[self._at : self._at + len(plan.condition)]
        self._at += len(batch)
        watch, state = Watch(plan, _Silent()), _Pass(batch, self.kept, self.keep, len(plan.condition))
        state.texts(plan)
        with ExitStack() as stack:

            def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                watch.begin(module, args, kwargs)
                state.rows, state.step = watch.rows, watch.step
                return args, state.corrupted(kwargs)

            handle = plan.denoiser.register_forward_pre_hook(begin, with_kwargs=True)
            stack.callback(handle.remove)
            for (path, side), hook in state.hooks(plan.denoiser):
                module = plan.denoiser.get_submodule(path)
                add = module.register_forward_hook if side == "out" else module.register_forward_pre_hook
                stack.callback(add(hook).remove)
            yield watch
        if watch.step < 0:
            raise WrongMapError("patch a run", "no pass carried the prompt's embeddings", "a whole run of the pipeline")
        state.complete()


class _Pass:
    """The state of one batch: where its rows are now, and how often each module was called."""

    def __init__(self, batch: Sequence[Row], kept: Kept, keep: set[_Tap], images: int) -> None:
        self.batch, self.kept, self.keep, self.images = batch, kept, keep, images
        self.rows: slice | None = None
        self.step = -1
        self.calls: dict[_Tap, int] = {}
        self._last: tuple[Tensor, Tensor] | None = None
        self._texts: list[tuple[int, Tensor]] = []
        self._fed: dict[tuple[str, int], Tensor] = {}

    def texts(self, plan: Plan) -> None:
        self._texts = [(i, r.text.to(plan.condition)) for i, r in enumerate(self.batch) if r.text is not None]

    def corrupted(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        if self.rows is None or not self._texts:
            return kwargs
        given = kwargs["encoder_hidden_states"]
        if self._last is None or self._last[0] is not given:
            new = given.clone()
            for i, text in self._texts:
                new[self.rows.start + i] = text
            self._last = (given, new)
        return {**kwargs, "encoder_hidden_states": self._last[1]}

    def hooks(self, denoiser: nn.Module) -> Iterator[tuple[_Tap, Any]]:
        wanted: dict[_Tap, list[tuple[int, Site]]] = {tap: [] for tap in sorted(self.keep)}
        for i, row in enumerate(self.batch):
            for site in row.restore:
                wanted.setdefault(site.tap, []).append((i, site))
        for tap, sites in wanted.items():
            yield tap, self._on_output(tap, sites) if tap[1] == "out" else self._on_input(tap, sites)
        layers = dict.fromkeys(layer for row in self.batch for layer in row.feed)
        for layer in layers:
            for part in ("to_k", "to_v"):
                yield (f"{layer}.{part}", "out"), self._feeder(denoiser, layer)

    def _on_output(self, tap: _Tap, sites: list[tuple[int, Site]]) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            parts = output if isinstance(output, tuple) else (output,)
            new = self._exchange(tap, sites, parts)
            return None if new is None else new if isinstance(output, tuple) else new[0]

        return hook

    def _on_input(self, tap: _Tap, sites: list[tuple[int, Site]]) -> Any:
        def hook(module: nn.Module, args: Any) -> Any:
            new = self._exchange(tap, sites, args[:1])
            return None if new is None else (*new, *args[1:])

        return hook

    def _exchange(self, tap: _Tap, sites: list[tuple[int, Site]], parts: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.rows is None:
            return None
        call = self.calls.get(tap, 0)
        self.calls[tap] = call + 1
        if tap in self.keep:
            held = self.kept.held.setdefault((tap, call), [])
            own = [p[self.rows].detach().clone() for p in parts if isinstance(p, Tensor)]
            held += [tuple(p[i] for p in own) for i in range(self.images)]
        active = [(i, s) for i, s in sites if s.at(self.step)]
        if not active:
            return None
        new = [p.clone() if isinstance(p, Tensor) else p for p in parts]
        tensors = [p for p in new if isinstance(p, Tensor)]
        for i, site in active:
            clean = self.kept.held[tap, call][self.batch[i].source]
            for target, value in zip(tensors, clean, strict=True):
                here = target[self.rows.start + i]
                if site.channels is not None:
                    here[..., slice(*site.channels)] = value[..., slice(*site.channels)]
                else:
                    here.copy_(value)
        return tuple(new)

    def _feeder(self, denoiser: nn.Module, layer: str) -> Any:
        heads = int(denoiser.get_submodule(layer).heads)  # type: ignore[arg-type]
        project = getattr(denoiser, "caption_projection", None)

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            if self.rows is None:
                return None
            out = output.clone()
            made: dict[int, Tensor] = {}
            for i, row in enumerate(self.batch):
                if layer not in row.feed or row.other is None:
                    continue
                if id(row.other) not in made:
                    text = row.other.to(out)[None]
                    made[id(row.other)] = module.forward(text if project is None else project(text))[0]
                new, chosen, width = made[id(row.other)], row.feed[layer], out.shape[-1] // heads
                for h in range(heads) if chosen is None else chosen:
                    part = slice(h * width, (h + 1) * width)
                    at = self.rows.start + i
                    out[at, :, part] += row.amount * (new[:, part] - output[at, :, part])
            return out

        return hook

    def complete(self) -> None:
        """Every module must have been called as often as in the clean run."""
        known = self.kept.calls
        for row in self.batch:
            for site in row.restore:
                if self.calls.get(site.tap, 0) != known.get(site.tap, -1):
                    raise WrongMapError(
                        f"restore {site.label}",
                        f"it ran {self.calls.get(site.tap, 0)} times, {known.get(site.tap, 0)} in the clean run",
                        "the same model, without cached or compiled blocks",
                    )


def play(
    model: Any, rows: Sequence[Row], kept: Kept | None = None, keep: Sequence[Site] = (), batch: int = 32,
    advance: Advance | None = None,
) -> list[Run]:  # fmt: skip
    """Make the pictures of these rows, many in a pass."""
    if any(r.settings.images != 1 for r in rows):
        raise RunError("patch a run", "it makes several pictures", "images=1, and a seed for each")
    if not rows:
        return []
    refuse_compiled(model.denoiser)
    told = None
    if advance is not None:
        calls = -(-len(rows) // batch) * rows[0].settings.steps
        done = [0.0]

        def told(n: int = 1, note: str = "") -> None:  # denoiser passes as pictures
            before, done[0] = int(done[0]), done[0] + n * len(rows) / calls
            if int(done[0] + 1e-6) > before:
                advance(int(done[0] + 1e-6) - before, note)

    patcher = Patcher(rows, kept, keep)
    return model.generate_many([r.settings for r in rows], patcher, batch, told)  # type: ignore[no-any-return]


def keep_clean(
    model: Any, many: Sequence[Settings], sites: Sequence[Site], budget: int = BUDGET, batch: int = 32,
    advance: Advance | None = None,
) -> tuple[list[Run], Kept]:  # fmt: skip
    """Clean runs and their activations at the sites. Raises RunError where those do not fit the budget, before the
    runs: it says by how much, and how many sites or passes would fit (two steps of one picture are run to know)."""
    one, probe = Kept(), replace(many[0], steps=min(2, many[0].steps))
    play(model, [Row(probe)], one, sites)
    calls = int(model.calls(many[0]))
    need = one.nbytes * calls * len(many) // max(one.calls.values(), default=1)
    if need > budget:
        taps = len({s.tap for s in sites})
        raise RunError(
            f"activations of {taps} modules in {calls} passes of {len(many)} pictures",
            f"they take {need:,} bytes, {need - budget:,} more than the budget of {budget:,}",
            f"about {budget * taps // need} modules, or {budget * calls // need} steps, or "
            f"{budget * len(many) // need} seeds at a time; or budget={need}",
        )
    kept = Kept()
    return play(model, [Row(s) for s in many], kept, sites, batch, advance), kept


def random_groups(sites: Sequence[Site], like: Group, n: int, *names: object) -> list[Group]:
    """``n`` random groups of as many other sites as ``like`` has: the control of equal size."""
    others = [s for s in sites if s not in like]
    if len(others) < len(like):
        raise MethodError(f"random sites beside {len(like)}", f"{len(others)} others", "a smaller group")
    rng = stream("patch", "random", *names)
    return [tuple(others[i] for i in rng.choice(len(others), len(like), replace=False)) for _ in range(n)]


# --- the bench -------------------------------------------------------------------------------------------------------


class Bench:
    """Pictures, clean and corrupted, on which groups of sites are put back: what does that do to the readout?

    ``many``: settings of one picture each; ``words`` and ``corruptions``: one for each. ``readout``: any function of a
    Run; None: closeness of the latents to the clean picture's, 0 for the corrupted one, 1 for the clean. ``runs``
    counts pictures made. ``journal``: what was measured is kept there, and not measured again. Raises PromptError for a
    word that is not in the prompt and RunError for activations beyond the budget, before the runs.
    """

    def __init__(
        self, model: Any, many: Sequence[Settings], words: Sequence[str], corruptions: Sequence[Corruption],
        sites: Sequence[Site], readout: Readout | None = None, budget: int = BUDGET, batch: int = 32,
        journal: Journal | None = None, advance: Advance | None = None,
    ) -> None:  # fmt: skip
        self.model, self.many, self.words, self.corruptions = model, list(many), list(words), list(corruptions)
        self.sites, self.readout, self.batch = tuple(sites), readout, batch
        self.journal, self.advance = journal, advance
        if journal is not None and readout is not None and not getattr(readout, "name", ""):
            raise RunError("a journal of this readout", "it has no name to be known by", "a readout with a `name`")
        self.in_encoder = bool(sites and sites[0].tokens)
        self.kept: Kept | None = None
        if self.in_encoder:
            self._texts = [restored_texts(model, *asked, ())[0] for asked in self._asked()]
            self.clean = play(model, [Row(s) for s in self.many], batch=batch, advance=advance)
        else:
            self._texts = [c.text(model, s, w) for s, w, c in self._asked()]
            self.clean, self.kept = keep_clean(model, self.many, self.sites, budget, batch, advance)
        rows = [Row(s, text=t) for s, t in zip(self.many, self._texts, strict=True)]
        self.corrupted = play(model, rows, batch=batch, advance=advance)
        self.runs = 2 * len(self.many)
        self.shown: dict[tuple[Group, int], Run] = {}
        self._near: dict[tuple[Group, int], float] = {}
        ends = zip(self.clean, self.corrupted, strict=True)
        self.ends = [(self._read(a, i), self._read(b, i)) for i, (a, b) in enumerate(ends)]

    def _asked(self) -> Iterator[tuple[Settings, str, Corruption]]:
        return zip(self.many, self.words, self.corruptions, strict=True)

    @property
    def total(self) -> NDArray[np.float64]:
        """What the corruption took from the readout: total[picture]."""
        return np.array([a - b for a, b in self.ends])

    def closeness(self, run: Run, picture: int) -> float:
        """How far the latents went back to the clean picture's: 0 the corrupted picture, 1 the clean one."""
        clean, corrupted = self.clean[picture].latents, self.corrupted[picture].latents
        whole = float(np.linalg.norm(corrupted - clean))
        return 1 - float(np.linalg.norm(run.latents - clean)) / whole if whole > 0 else 0.0

    def _read(self, run: Run, picture: int) -> float:
        value = float(self.closeness(run, picture) if self.readout is None else self.readout(run))
        if not math.isfinite(value):
            raise RunError("the readout of a picture", f"it gave {value}", "a finite number for every picture")
        return value

    def measure(self, groups: Sequence[Group]) -> NDArray[np.float64]:
        """Indirect effects[group, picture]: readout with the group put back minus readout of the corrupted picture."""
        found = np.full((len(groups), len(self.many)), np.nan)
        todo = []
        for g, group in enumerate(groups):
            for i in range(len(self.many)):
                known = self.journal.get(*self._piece(group, i)) if self.journal else None
                if known is None:
                    todo.append((g, i))
                else:
                    found[g, i], self._near[group, i] = known
                    self._tell(1)
        for start in range(0, len(todo), self.batch):
            part = todo[start : start + self.batch]
            made = play(self.model, self._rows([(groups[g], i) for g, i in part]), self.kept, (), self.batch)
            self.runs += len(part)
            for (g, i), run in zip(part, made, strict=True):
                found[g, i] = self._read(run, i) - self.ends[i][1]
                self._near[groups[g], i] = self.closeness(run, i)
                if i == 0:
                    self.shown[groups[g], 0] = run
                if self.journal:
                    self.journal.put([found[g, i], self._near[groups[g], i]], *self._piece(groups[g], i))
            self._tell(len(part))
        return found

    def near(self, group: Group) -> float:
        """Mean closeness of the pictures with this group put back: near 1 the whole picture came back."""
        return float(np.mean([self._near[group, i] for i in range(len(self.many))]))

    def _tell(self, n: int) -> None:
        if self.advance:
            self.advance(n)

    def _piece(self, group: Group, picture: int) -> tuple[object, ...]:
        name = getattr(self.readout, "name", "latents")
        asked = (self.many[picture], self.words[picture], self.corruptions[picture])
        return ("trace", self.model.fingerprint, *asked, name, "+".join(s.label + s.kind for s in group))

    def _rows(self, part: Sequence[tuple[Group, int]]) -> list[Row]:
        if not self.in_encoder:
            return [Row(self.many[i], self._texts[i], group, i) for group, i in part]
        rows: list[Row | None] = [None] * len(part)
        for picture in dict.fromkeys(i for _, i in part):
            own = [k for k, (_, i) in enumerate(part) if i == picture]
            asked = (self.many[picture], self.words[picture], self.corruptions[picture])
            _, texts = restored_texts(self.model, *asked, [part[k][0] for k in own])
            for k, text in zip(own, texts, strict=True):
                rows[k] = Row(self.many[picture], text)
        return [r for r in rows if r is not None]

    def activation_norms(self) -> NDArray[np.float64]:
        """Mean root mean square of each denoiser site's clean activations: norm[site]."""
        assert self.kept is not None
        found = []
        for site in self.sites:
            rows = [row[0] for (tap, _), held in self.kept.held.items() if tap == site.tap for row in held]
            part = slice(None) if site.channels is None else slice(*site.channels)
            found.append(float(np.mean([r[..., part].float().pow(2).mean().sqrt().item() for r in rows])))
        return np.array(found)


def against_random(
    bench: Bench, group: Group, draws: int, *names: object
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[Group]]:
    """Effects[picture] of a group, the mean effects[picture] of ``draws`` random groups of equal size, and those."""
    others = random_groups(bench.sites, group, draws, *names)
    values = bench.measure([group, *others])
    return values[0], values[1:].mean(0), others


# --- search ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What a search found: ``effects[site, seed]`` (a site of a group that did not move the readout has the group's
    own), which sites were asked alone, and groups asked."""

    effects: NDArray[np.float64]
    alone: tuple[bool, ...]
    groups: int

    @property
    def order(self) -> list[int]:
        """Sites from the strongest down; those that were never asked alone come last."""
        mean = self.effects.mean(1)
        return sorted(range(len(mean)), key=lambda i: (not self.alone[i], -mean[i], i))


def one_by_one(measure: Callable[[Sequence[Group]], NDArray[np.float64]], sites: Sequence[Site]) -> Found:
    """Every site asked alone. ``measure(groups)`` gives effects[group, seed]."""
    return Found(measure([(s,) for s in sites]), (True,) * len(sites), len(sites))


def by_halves(
    measure: Callable[[Sequence[Group]], NDArray[np.float64]], sites: Sequence[Site], floor: float, first: int = 4
) -> Found:
    """Groups of neighbours first, then halves of the groups whose mean effect exceeds ``floor``.

    It saves runs where few sites matter. What it may miss: a site whose effect its neighbours cancel.
    """
    groups = [list(range(a, min(a + first, len(sites)))) for a in range(0, len(sites), first)]
    effects: NDArray[np.float64] | None = None
    alone, asked = [False] * len(sites), 0
    while groups:
        values = measure([tuple(sites[i] for i in g) for g in groups])
        asked += len(groups)
        if effects is None:
            effects = np.zeros((len(sites), values.shape[1]))
        halves: list[list[int]] = []
        for group, value in zip(groups, values, strict=True):
            effects[group] = value
            if len(group) == 1:
                alone[group[0]] = True
            elif value.mean() > floor:
                middle = len(group) // 2
                halves += [group[:middle], group[middle:]]
        groups = halves
    assert effects is not None
    return Found(effects, tuple(alone), asked)
