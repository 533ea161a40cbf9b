"""Shares on `shapes`: how often the model draws each of several phrases when a prompt says none of them, and the trial
of changing that. Counted by the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...change import Goal
from ...engine.randomness import seed_of, stream
from ...engine.rewording import reword
from ...errors import ModelError, RunError
from ...run import Settings
from ...verdict import judge as _judged
from ...verdict import t_interval
from ..measured import Measured
from . import oracle
from .editing import BATCH, GUIDANCE, STEPS, Probe, Tried, elsewhere, ours, shows
from .editing import pictures as drawn
from .scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...change import Change
    from ...engine.progress import Advance

EACH = 24
"""Pictures whose shares are one replicate."""
CONCEPTS = ("circle", "square")
FEW = 16
"""Pictures whose shares are one replicate of a trial of a user's own change."""
OTHER = "triangle"
"""A concept that no trial edits: its shares should stay."""


def examples(model: Any, phrase: str) -> tuple[str, ...]:
    """Prompts that have the phrase, where the model is of this world: alone, with a size and on each background. Else
    none."""
    if not ours(model):
        return ()
    model.words(phrase)
    sizes = ("", *SIZES) if phrase.split()[0] in SHAPES else ("",)
    grounds = ("", *(f" on {b}" for b in BACKGROUNDS if b))
    said = [f"{size} {phrase}".strip() for size in sizes]
    return tuple(f"{'an' if s[0] in 'aeiou' else 'a'} {s}{g}" for s in said for g in grounds)


def judge(model: Any, options: Sequence[str]) -> Callable[[Any], int | None]:
    """Which option a picture shows by the oracle: the number of the only one, else None. Raises ModelError for a model
    whose pictures it cannot read, PromptError for a phrase that it does not read."""
    if not ours(model):
        raise ModelError(
            f"which of {', '.join(options)} pictures of {model.name} show", "no oracle reads them",
            "a judge of your own: plan(model, goal, judge=...)",
        )  # fmt: skip
    shows(" ".join(options[0].split()), oracle.read(np.zeros((64, 64, 3), np.uint8)))

    def shown(image: Any) -> int | None:
        seen = oracle.read(image)
        there = [k for k, option in enumerate(options) if shows(option, seen)]
        return there[0] if len(there) == 1 else None

    return shown


def shares(model: Any, options: Sequence[str], prompts: Sequence[str], n: int, key: object) -> list[int | None]:
    """Which option each of ``n`` pictures shows, prompts and seeds drawn for ``key``."""
    which = judge(model, options)
    chosen = stream("shares", key).choice(list(prompts), n)
    many = [
        Settings(str(p), seed_of("shares", key, i) % 2**31, STEPS, GUIDANCE, *model.default_size)
        for i, p in enumerate(chosen)
    ]
    return [which(run.images[0]) for run in model.generate_many(many, batch=BATCH)]


def distance(shown: Sequence[int | None], wanted: NDArray[np.float64]) -> float:
    """The squared distance of the shares from those wanted, estimated without bias: over pairs of pictures, so that few
    pictures are not taken for unequal shares (it can come out below 0). A picture that shows none or several options
    lacks in all."""
    counts = np.array([sum(s == k for s in shown) for k in range(len(wanted))])
    n = len(shown)
    alike = (counts * (counts - 1)).sum() / (n * (n - 1))
    return float(alike - 2 * (counts @ wanted) / n + wanted @ wanted)


def try_shares(model: Any, change: Change, seeds: int = 12, shown: int = 6, advance: Advance | None = None) -> Tried:
    """Pictures of prompts that name none of the goal's options, before and after at the same seeds, ``seeds`` times
    FEW of them. ``rates`` of the result: the share that shows each option, and ``named``: prompts that name one show
    it. The verdict is on the distance from equal shares (or those the change wanted), against the same deltas at
    random matrices. Raises RunError for fewer than 8 seeds."""
    if seeds < 8:
        raise RunError(f"{seeds} seeds", "too few for a verdict", "8 or more")
    options, old = change.goal.options, change.goal.old
    prompts = change.goal.prompts or examples(model, old)
    wanted = np.asarray(change.settings.get("wanted") or [1 / len(options)] * len(options), float)
    which = judge(model, options)
    chosen = stream("try shares", change.key).choice(list(prompts), FEW * seeds)
    asked = [Probe(str(p), int(seed_of("try shares", change.key, i) % 2**31)) for i, p in enumerate(chosen)]
    named = [reword(str(p), old, options[i % len(options)]) or "" for i, p in enumerate(chosen[:seeds])]
    kept = [Probe(p, asked[i].seed) for i, p in enumerate(named)]
    made = {"before": drawn(model, asked + kept, advance=advance)}
    with change.on(model):
        made["after"] = drawn(model, asked + kept, advance=advance)
    with elsewhere(model, change, change.key).on(model):
        control = [which(x) for x in drawn(model, asked, advance=advance)]
    n = len(asked)
    seen = {when: [which(x) for x in own[:n]] for when, own in made.items()}
    held = {when: [p.holds(x) for p, x in zip(kept, own[n:], strict=True)] for when, own in made.items()}

    def apart(found: Sequence[int | None]) -> NDArray[np.float64]:
        return np.array([distance(found[i : i + FEW], wanted) for i in range(0, n, FEW)])

    def rate(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
        was, now = np.asarray(before, float), np.asarray(after, float)
        return {"before": float(was.mean()), "after": float(now.mean()), "moved": float((now - was).mean()),
                "interval": list(t_interval(now - was, 0.05)), "n": len(was)}  # fmt: skip

    rates = {o: rate(*([s == k for s in seen[when]] for when in seen)) for k, o in enumerate(options)}
    rates["named"] = rate(held["before"], held["after"])
    moved = [i for i in range(n) if seen["before"][i] != seen["after"][i]]
    images = tuple(
        {"group": f"draws another option now: {len(moved)} of {n}", "prompt": asked[i].prompt, "seed": asked[i].seed,
         "before": made["before"][i], "after": made["after"][i]}
        for i in moved[:shown]
    )  # fmt: skip
    was = apart(seen["before"])
    shares = ", ".join(f"{w:.0%}" for w in wanted)
    verdict = _judged(
        was - apart(seen["after"]), {"the same deltas at random matrices": was - apart(control)},
        claim=f"prompts with {old!r} that name none are drawn as {', '.join(options)} in shares nearer to {shares}",
        delta=0.02, readout=f"squared distance of {FEW} pictures' shares from these",
        unit="before less after",
        alpha=0.05, evidence=f"{change.method}: {change.extent}; strengths {change.settings['strengths']}",
        intervention=f"the same {n} seeds before and after; the same deltas at random matrices of equal size",
    )  # fmt: skip
    return Tried(rates, images, verdict)


def measure(verb: Any, replicates: int, model: Any = None, advance: Advance | None = None) -> Measured:
    """How much nearer to equal shares of six colours come prompts that name a shape and no colour: the squared
    distance before less that after. A replicate is EACH new pictures, half of the replicates of each of CONCEPTS.
    Controls: the same strengths given to other colours, and the same deltas at random other matrices of equal size. In
    the details: whether prompts that name a colour keep it, and how far the shares of another shape move."""
    if model is None:
        from ...models.loading import load
        from . import model_directory

        model = load(model_directory())
    arms: dict[str, list[float]] = {"own": [], "the same strengths for other colours": [],
                                    "the same deltas at random matrices": []}  # fmt: skip
    details: dict[str, Any] = {}
    for c, concept in enumerate(CONCEPTS):
        n = len(range(c, replicates, len(CONCEPTS)))
        options = [f"{colour} {concept}" for colour in COLOURS]
        goal, wanted = Goal(concept, " | ".join(options)), np.full(len(options), 1 / len(options))
        change = verb().plan(model, goal, advance=advance)
        turned = tuple(np.roll(change.settings["strengths"], 1 + c).tolist())
        tried: dict[str, Change] = {
            "own": change,
            "the same strengths for other colours": replace(verb(), strengths=turned).plan(model, goal),
            "the same deltas at random matrices": elsewhere(model, change, concept),
        }
        own, others = examples(model, concept), examples(model, OTHER)
        rest = [f"{colour} {OTHER}" for colour in COLOURS]
        said = [f"a {o}" if o[0] not in "aeiou" else f"an {o}" for o in options]
        kept = [Probe(p, int(seed_of("debias kept", concept, i) % 2**31)) for i, p in enumerate(said * 2)]

        def read() -> list[list[int | None]]:
            found = [shares(model, options, own, EACH, f"trial {concept} {i}") for i in range(n)]  # noqa: B023
            if advance:
                advance(n * EACH, concept)  # noqa: B023
            return found

        def stays() -> tuple[float, list[int | None]]:
            held = [p.holds(x) for p, x in zip(kept, drawn(model, kept), strict=True)]  # noqa: B023
            return float(np.mean(held)), shares(model, rest, others, 2 * EACH, f"rest {concept}")  # noqa: B023

        was, held = read(), stays()
        for arm, edit in tried.items():
            with edit.on(model):
                now = read()
                after = stays() if arm == "own" else None
            arms[arm] += [distance(a, wanted) - distance(b, wanted) for a, b in zip(was, now, strict=True)]
            if after:
                counts = [[sum(s == k for part in way for s in part) / (n * EACH) for k in range(len(options))]
                          for way in (was, now)]  # fmt: skip
                details[concept] = {
                    "colours": list(COLOURS), "before": counts[0], "after": counts[1],
                    "strengths": change.settings["strengths"], "named colours kept": [held[0], after[0]],
                    f"distance of {OTHER}": [distance(held[1], wanted), distance(after[1], wanted)],
                    "seconds to plan": change.seconds,
                }  # fmt: skip
    return Measured("shares nearer to equal ones", "squared distance before less after", f"{EACH} pictures",
                    tuple(arms.pop("own")), {k: tuple(v) for k, v in arms.items()}, details=details)  # fmt: skip
