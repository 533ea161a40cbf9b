"""Reports of a rendered scene: exact masks stand for a method's maps, so that no model is needed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from whence.engine.prompts import replace_word, split_words
from whence.explanation import Cost, Explanation
from whence.report.bundle import Bundle, Counterfactual, Trial
from whence.run import Run, Settings
from whence.units import Units
from whence.verdict import judge, judge_run, unmeasured
from whence.worlds.shapes.scenes import COLOURS, SHAPES, Scene, Thing, render
from whence.worlds.shapes.vocabulary import alternatives

SCENE = Scene(
    kind="relation",
    things=(Thing("red", "circle", "large", 1, 0, True), Thing("blue", "square", "small", 1, 2, False)),
    relation="left of", background="sand", fillers=("dax",), fillers_first=False, mark=(2, 1), frame=False,
    shift=(0, 1),
)  # fmt: skip


def words_of(prompt: str) -> Units:
    names = split_words(prompt)
    seen: dict[str, int] = {}
    occurrence = []
    for n in names:
        seen[n] = seen.get(n, 0) + 1
        occurrence.append(seen[n])
    return Units("word", names, tuple(((i + 1,),) for i in range(len(names))), tuple(occurrence))


def make_run(prompt: str = SCENE.caption, images: int = 1, scene: Scene = SCENE) -> Run:
    picture, _ = render(scene)
    return Run(
        settings=Settings(prompt, 7, 20, 4.0, 64, 64, images=images),
        images=np.stack([picture] * images),
        latents=np.zeros((images, 4, 16, 16), np.float32),
        words=words_of(prompt),
        model_name="shapes",
        family="UNet",
        fingerprint="sha256:0123456789abcdef",
        scheduler="DDIMScheduler",
        versions={"whence": "0.1.0", "torch": "2.13.0"},
    )


def blurred(mask: np.ndarray) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(mask.astype(np.float32), 3)


def part_of(word: str) -> str:
    if word in ("red", "circle", "large"):
        return "thing0"
    if word in ("blue", "square"):
        return "thing1"
    return {"dax": "mark"}.get(word, "background")


def explanations(run: Run) -> list[Explanation]:
    _, masks = render(SCENE)
    rng = np.random.default_rng(0)
    daam = np.stack(
        [blurred(masks[part_of(w)]) * (0.9 if part_of(w) != "background" else 0.12) + rng.uniform(0, 0.03, (64, 64))
         for w in run.words.names]
    ).astype(np.float32)  # fmt: skip
    tried = [i for i, w in enumerate(run.words.names) if alternatives(w)] or [0]
    causal = np.stack([masks[part_of(run.words.names[i])] * rng.uniform(0.1, 0.6) for i in tried]).astype(np.float32)
    return [
        Explanation("daam", run.words, daam * 0.4, ("word", "y", "x"), "attention to the word", "probability",
                    {"blocks": ("down", "mid", "up"), "image": 0}, Cost(1, 2.31), run=run),
        Explanation("leave_one_out", run.words.subset(tried), causal, ("word", "y", "x"), "change of pixels", "causal",
                    {"removal": "replace", "image": 0}, Cost(24, 14.2), spread=causal * 0.1,
                    notes=("no in-distribution alternative, so nothing is said of: a, of",), run=run),
    ]  # fmt: skip


def make_bundle(prompt: str = SCENE.caption, images: int = 1) -> Bundle:
    run = make_run(prompt, images)
    both = explanations(run)
    rng = np.random.default_rng(1)
    trials, others = [], []
    for i, (label, name) in enumerate(zip(run.words.labels, run.words.names, strict=True)):
        instead = alternatives(name)[:3]
        for other in instead:
            thing = SCENE.things[0 if part_of(name) == "thing0" else 1]
            field = "colour" if other in COLOURS else "shape" if other in SHAPES else ""
            new = replace(thing, **({field: other} if field else {"size": "small"}))
            things = tuple(new if t is thing else t for t in SCENE.things)
            changed = replace(SCENE, things=things) if name != "dax" else replace(SCENE, mark=None)
            others.append(Counterfactual(label, other, replace_word(prompt, i, other), render(changed)[0]))
        for e in both:
            claim = f"the word “{label}” drew what its {e.method} map marks"
            lines = {
                "evidence": f"maps by {e.method} ({e.kind}), {e.cost.runs} model runs",
                "intervention": f"at seed 7, {label!r} replaced by {', '.join(instead)}",
            }
            if not instead:
                if name != "a":
                    trials.append(
                        Trial(e.method, label, unmeasured(claim, "this run", "no alternative is known", 0.05))
                    )
                continue
            mean = {"red": 0.5, "blue": 0.4, "circle": 0.45, "square": 0.3, "dax": 0.6, "sand": 0.2}.get(name, 0.0)
            effects = np.clip(mean + rng.normal(0, 0.02, max(3, len(instead))), -1, 1)
            controls = {"sand": rng.normal(0.02, 0.02, 3), "large": rng.normal(0.03, 0.02, 3)}
            trials.append(Trial(e.method, label, judge_run(
                effects, controls, claim=claim, delta=0.05, chance=0.01, readout="share of the change inside the map",
                unit="beyond chance, 0..1", **lines)))  # fmt: skip
            if name == "red":
                trials.append(Trial(e.method, label, judge(
                    rng.normal(0.4, 0.1, 8), {"a random map": rng.normal(0, 0.1, 8)}, claim=claim, delta=0.05,
                    readout="share of the change inside the map", **lines)))  # fmt: skip
    return Bundle(run, both, trials, others)
