"""Trials of methods that say which component of the picture model carries a word: on `shapes` the oracle reads the
colour, the shape or the number back.

Sites are found on a few pictures and tried on others: prompts and seeds that the method has not seen. Every picture is
a clean run of one prompt and a corrupted one, whose word is replaced by another of its class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...engine.patch import Bench, Corruption, Group, Row, against_random, denoiser_sites, encoded, encoder_sites, play
from ...engine.prompts import replace_word
from ...engine.randomness import stream
from ...errors import RunError
from ...run import Run, Settings
from ..measured import Measured
from . import oracle
from .scenes import COLOURS, COUNTS, PLURALS, SHAPES, SIZE, SIZES, WORDS
from .trials import settings_of

if TYPE_CHECKING:
    from ...engine.progress import Advance

STEPS, GUIDANCE, BATCH = 8, 1.0, 32
"""Few steps and no guidance: the embedded model draws single objects as asked all the same, four times as fast."""
FINDING = 3
"""Pictures that the site is found on."""
Feed = Mapping[str, Sequence[int] | None]
"""Cross-attention layers and their heads (None: all) that read another prompt."""


@dataclass(frozen=True)
class ShareOf:
    """Share of the objects' area that is of objects with a colour, shape or size, 0..1; or, for a number word, whether
    so many objects are there. Without objects it is 0."""

    word: str

    @property
    def name(self) -> str:
        """What is read."""
        return f"{'right number of objects' if self.word in COUNTS else 'share of the objects'}: {self.word}"

    def __call__(self, run: Run) -> float:
        things = oracle.read(run.images[0]).things
        if self.word in COUNTS:
            return float(len(things) == COUNTS[self.word])
        word = next((s for s, p in PLURALS.items() if p == self.word), self.word)
        area = sum(int(t.mask.sum()) for t in things)
        return sum(int(t.mask.sum()) for t in things if word in (t.colour, t.shape, t.size)) / area if area else 0.0


def readout(model: Any, word: str, settings: Settings) -> ShareOf | None:
    """The oracle's readout of a word; None where the model is none of this world, or the word is nothing it reads."""
    lexicon = getattr(model, "lexicon", None)
    known = lexicon is not None and lexicon.words <= set(WORDS) and (settings.height, settings.width) == (SIZE, SIZE)
    read = {*COLOURS, *SHAPES, *PLURALS.values(), *SIZES, *COUNTS}
    return ShareOf(word) if known and word in read else None


@dataclass(frozen=True)
class Asked:
    """One picture of a trial: what it is asked to show, and the word that is replaced by ``other``."""

    settings: Settings
    word: str
    other: str


def asked(name: str, number: int, kind: str = "colour") -> Asked:
    """Picture ``number`` of the trial ``name``: one object, its colour or shape replaced; prompt, seed and the other
    word are drawn from streams of these names."""
    rng = stream("tracing", name, kind, number)
    colour, shape = (str(rng.choice(list(words))) for words in (COLOURS, SHAPES))
    own, words = (colour, list(COLOURS)) if kind == "colour" else (shape, list(SHAPES))
    other = str(rng.choice([w for w in words if w != own]))
    prompt = f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"
    settings = replace(settings_of(prompt, int(rng.integers(2**31))), steps=STEPS, guidance=GUIDANCE)
    return Asked(settings, own, other)


class _ByWord:
    """Reads each picture for its own word."""

    name = "share of the objects that have the picture's own word"

    def __init__(self, pictures: Sequence[Asked]) -> None:
        self._of = {(a.settings.prompt, a.settings.seed): ShareOf(a.word) for a in pictures}

    def __call__(self, run: Run) -> float:
        return self._of[run.settings.prompt, run.settings.seed](run)


def bench(model: Any, pictures: Sequence[Asked], sites: Group, advance: Advance | None = None) -> Bench:
    """Clean and corrupted runs of these pictures, held for the sites."""
    return Bench(
        model, [a.settings for a in pictures], [a.word for a in pictures],
        [Corruption("swap", other=a.other) for a in pictures], sites, _ByWord(pictures), batch=BATCH, advance=advance,
    )  # fmt: skip


def _shown(model: Any, name: str, n: int, kind: str = "colour") -> list[Asked]:
    """The first ``n`` pictures in which the model draws what is asked, clean and with the word replaced."""
    found: list[Asked] = []
    for start in range(0, 6 * n, n):
        new = [asked(name, start + k, kind) for k in range(n)]
        clean = model.generate_many([a.settings for a in new], batch=BATCH)
        prompts = [replace_word(a.settings.prompt, 1 if kind == "colour" else 2, a.other) for a in new]
        others = model.generate_many(
            [replace(a.settings, prompt=p) for a, p in zip(new, prompts, strict=True)], batch=BATCH
        )
        for a, one, other in zip(new, clean, others, strict=True):
            if ShareOf(a.word)(one) > 0.9 and ShareOf(a.other)(other) > 0.9:
                found.append(a)
        if len(found) >= n:
            return found[:n]
    raise RunError(f"{n} pictures for the trial {name}", f"{len(found)} drawn as asked", "a better trained model")


def _default(model: Any) -> Any:
    if model is not None:
        return model
    from ...models.loading import load
    from . import model_directory

    return load(model_directory())


def measure(verb: Any, replicates: int, model: Any = None, advance: Advance | None = None) -> Measured:
    """Denoiser: is a colour word's readout restored by the site that the method ranks first, on other prompts and
    seeds, beyond random sites, the site with most parameters, the last one, and that of largest activations?"""
    return _sites_tried(verb, "denoiser", replicates, _default(model), advance)


def measure_encoder(verb: Any, replicates: int, model: Any = None, advance: Advance | None = None) -> Measured:
    """The same of the text encoder's layers by token."""
    return _sites_tried(verb, "text encoder", replicates, _default(model), advance)


def _sites_tried(verb: Any, where: str, n: int, model: Any, advance: Advance | None) -> Measured:
    found_on = _shown(model, f"find {where}", FINDING)
    explanations = []
    for a in found_on:
        run = model.generate(a.settings)
        method = verb(word=a.word, where=where, corruption=Corruption("swap", other=a.other), seeds=1)
        explanations.append(method.explain(run, readout=ShareOf(a.word), advance=advance))
    mean = np.mean([e.scores for e in explanations], axis=0)
    best = int(mean.argmax())
    return _held_out(_sites(model, where, found_on[0].settings.prompt), best, mean, where, n, model, advance)


def _sites(model: Any, where: str, prompt: str) -> Group:
    """The same for all prompts of a trial: an article, a colour and a noun, each of one token."""
    if where == "denoiser":
        return denoiser_sites(model)
    places = ("the article", "the colour", "the noun", "the end")
    return tuple(replace(s, place=places[k % 4]) for k, s in enumerate(encoder_sites(model, prompt)))


def _held_out(
    sites: Group, best: int, mean: NDArray[np.floating], where: str, n: int, model: Any, advance: Advance | None
) -> Measured:
    pictures = _shown(model, f"try {where}", n)
    trial = bench(model, pictures, sites, advance)
    top = (sites[best],)
    values, random, _ = against_random(trial, top, 2, "trial", where)
    chosen: dict[str, int] = {
        "the site with most parameters": max(range(len(sites)), key=lambda i: sites[i].parameters),
        "the deepest site": max(range(len(sites)), key=lambda i: sites[i].depth),
    }
    if where == "denoiser":
        chosen["the site of largest activations"] = int(trial.activation_norms().argmax())
    other = trial.measure([(sites[i],) for i in chosen.values()])
    controls = {"random sites": tuple(map(float, random))}
    controls |= {name: tuple(map(float, row)) for name, row in zip(chosen, other, strict=True)}
    order = np.argsort(-mean, kind="stable")[:5]
    return Measured(
        f"readout that the first-ranked {where} site restores", "share of the objects that have the word's colour",
        "picture", tuple(map(float, values)), controls,
        details={
            "site": top[0].label, "taken by the corruption": float(trial.total.mean()),
            "closeness of the restored to the clean picture": trial.near(top),
            "ranked": {sites[i].label: round(float(mean[i]), 3) for i in order},
            "controls": {name: sites[i].label for name, i in chosen.items()},
            "found on": FINDING, "pictures made": trial.runs + FINDING * (len(sites) + 3) + 4 * (n + FINDING),
        },
    )  # fmt: skip


# --- direct effects --------------------------------------------------------------------------------------------------


def fed(model: Any, pictures: Sequence[Asked], feeds: Sequence[Feed], batch: int = BATCH) -> NDArray[np.float64]:
    """Direct effects[feed, picture]: what the word's readout loses when these heads read the other word's prompt."""
    rows = []
    for feed in feeds:
        for a in pictures:
            words = list(model.words(a.settings.prompt).names)
            text = encoded(model, replace_word(a.settings.prompt, words.index(a.word), a.other), a.settings)
            rows.append(Row(a.settings, feed=feed, other=text))
    read = _ByWord(pictures)
    clean = np.array([read(r) for r in model.generate_many([a.settings for a in pictures], batch=batch)])
    after = np.array([read(r) for r in play(model, rows, batch=batch)]).reshape(len(feeds), len(pictures))
    return np.asarray(clean - after)


def _fed_trial(
    name: str, pictures: Sequence[Asked], model: Any, top: Feed, controls: Mapping[str, Sequence[Feed]],
    details: Mapping[str, Any],
) -> Measured:  # fmt: skip
    """Direct effects of one feed against those of controls, each the mean of several feeds."""
    every = [top, *(f for feeds in controls.values() for f in feeds)]
    effects = fed(model, pictures, every)
    arms: dict[str, tuple[float, ...]] = {}
    at = 1
    for control, feeds in controls.items():
        arms[control] = tuple(map(float, effects[at : at + len(feeds)].mean(0)))
        at += len(feeds)
    unit = "share of the objects that loses the word's colour"
    return Measured(name, unit, "picture", tuple(map(float, effects[0])), arms, details=details)


def measure_window(verb: Any, replicates: int, model: Any = None, advance: Advance | None = None) -> Measured:
    """Is a colour taken away where the first-ranked cross-attention layer alone reads another colour word?"""
    model = _default(model)
    found_on = _shown(model, "find window", FINDING)
    explanations = [
        verb(word=a.word, other=a.other, width=1, seeds=1).explain(model.generate(a.settings), ShareOf(a.word), advance)
        for a in found_on
    ]
    mean = np.mean([e.scores for e in explanations], axis=0)
    layers = denoiser_sites(model, ("cross-attention",))
    best = int(mean.argmax())
    rest = [i for i in range(len(layers)) if i != best]
    feeds: list[Feed] = [{s.module: None} for s in layers]
    chance = stream("tracing", "window", "random").choice(rest, 2, replace=False)
    largest = max(range(len(layers)), key=lambda i: (layers[i].parameters, i))
    # The rank agreement with causal tracing, on the same pictures and layers.
    indirect = bench(model, found_on, layers, advance).measure([(s,) for s in layers]).mean(1)
    return _fed_trial(
        "colour lost where the first-ranked layer reads another word", _shown(model, "try window", replicates), model,
        feeds[best],
        {
            "random layers": [feeds[i] for i in chance],
            "the layer with most parameters": [feeds[largest]],
            "the first layer": [feeds[0]],
            "the last layer": [feeds[-1]],
        },
        {
            "layer": layers[best].label,
            "direct": {s.label: round(float(v), 3) for s, v in zip(layers, mean, strict=True)},
            "indirect (causal tracing)": {s.label: round(float(v), 3) for s, v in zip(layers, indirect, strict=True)},
            "same first layer": bool(indirect.argmax() == best),
        },
    )  # fmt: skip


def measure_heads(verb: Any, replicates: int, model: Any = None, advance: Advance | None = None) -> Measured:
    """Is a colour taken away where the two most relevant heads for colour alone read another colour word?"""
    model = _default(model)
    found_on = _shown(model, "find heads", FINDING)
    asked_of = {"colour": [(a.settings, a.word, a.other) for a in found_on]}
    found = verb(batch=BATCH).by_kind(model, asked_of, {"colour": _ByWord(found_on)}, advance)
    relevance = found.scores[:, 0]
    heads = denoiser_sites(model, ("cross-attention",), heads=True)
    order = np.argsort(-relevance, kind="stable")

    def feed(chosen: Sequence[int]) -> Feed:
        own: dict[str, list[int]] = {}
        for i in chosen:
            own.setdefault(heads[i].module, []).append(heads[i].head or 0)
        return own

    rng = stream("tracing", "heads", "random")
    pairs = [rng.choice(order[2:], 2, replace=False).tolist() for _ in range(3)]
    largest = sorted(range(len(heads)), key=lambda i: -heads[i].parameters)[:2]
    return _fed_trial(
        "colour lost where the two most relevant heads read another word", _shown(model, "try heads", replicates),
        model, feed(order[:2].tolist()),
        {
            "random pairs of heads": [feed(p) for p in pairs],
            "the two heads with most parameters": [feed(largest)],
            "the first two heads": [feed([0, 1])],
        },
        {
            "heads": [heads[i].label for i in order[:2]],
            "relevance": {heads[i].label: round(float(relevance[i]), 3) for i in order[:6]},
            "explained": found.details["explained"],
        },
    )  # fmt: skip
