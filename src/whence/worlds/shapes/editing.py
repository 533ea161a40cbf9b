"""Trials of edits on `shapes`: what a Change does to the pictures of prompts that have the old phrase, and of others.

Every number is a rate that the oracle reads, before and after on the same seeds. Prompts are drawn from the world's own
captions, those of a trial never among those that a method plans with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ...change import Change, Goal
from ...engine.randomness import seed_of, stream
from ...engine.rewording import find, reword
from ...errors import PromptError, RunError
from ...run import Settings
from ...verdict import Verdict, judge, t_interval
from ..measured import Measured
from . import oracle
from .scenes import BACKGROUNDS, COLOURS, KINDS, PLURALS, SHAPES, SIZES, WORDS, draw_scene

if TYPE_CHECKING:
    from ...engine.progress import Advance

STEPS, GUIDANCE, BATCH = 8, 1.0, 32
"""Of a trial's pictures: without guidance eight steps draw colours as well as thirty with it, eight times as fast."""
PLANNED = 96
"""Captions that a method plans with."""
GROUPS = {
    "target": (("one", "two"), True),
    "paraphrases": (("count", "relation", "three"), True),
    "neighbours": (("one", "two"), False),
    "unrelated": (("relation", "count"), False),
}
"""Of probes: the kinds of captions, and whether they have the old phrase."""
CHANGES = (("red", "blue"), ("green", "purple"), ("yellow", "red"), ("blue", "orange"))


@lru_cache(maxsize=64)
def _captions(
    phrase: str, n: int, purpose: str, kinds: tuple[str, ...] = KINDS, without: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Captions of the world that have the phrase, and none of the words ``without``."""
    found: dict[str, None] = {}
    for i in range(400 * n):
        caption = draw_scene(stream("editing", purpose, phrase, i), kinds[i % len(kinds)], plain=i % 2 == 0).caption
        if find(caption, phrase) is not None and not set(without) & set(caption.split()):
            found[caption] = None
        if len(found) == n or (i > 1500 and not found):
            break
    return tuple(found)


def ours(model: Any) -> bool:
    """Does the model know exactly this world's words?"""
    lexicon = getattr(model, "lexicon", None)
    return lexicon is not None and lexicon.words == frozenset(WORDS)


def examples(model: Any, phrase: str) -> tuple[str, ...]:
    """Captions to plan with, where the model is of this world; else none. Raises PromptError where no caption of the
    world has the phrase."""
    if not ours(model):
        return ()
    model.words(phrase)  # refuses words that it never saw
    found = _captions(phrase, PLANNED, "plan")
    if not found:
        raise PromptError(
            f"the change of {phrase!r}", "no caption of the world has it", "a phrase such as 'red circle'"
        )
    return found


# --- what pictures show ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """A prompt at a seed, and what its picture must show. With a ``goal``: something that the new phrase says and
    nothing that the old one says. Without: what the prompt asks for, in these ``parts`` of the oracle's judgement."""

    prompt: str
    seed: int
    parts: tuple[str, ...] = ("colours",)
    goal: Goal | None = None

    def holds(self, image: Any) -> bool:
        """Does the picture show it?"""
        seen = oracle.read(image)
        if self.goal:
            return shows(self.goal.new, seen) and not shows(self.goal.old, seen)
        there = oracle.judge(oracle.parse(self.prompt), seen)
        return all(there[p] for p in self.parts)


_SINGULAR = {plural: shape for shape, plural in PLURALS.items()}


def shows(phrase: str, seen: oracle.Reading) -> bool:
    """Is there an object that has the phrase's colour, shape and size, or the background that it names? Raises
    PromptError for words that the oracle does not read."""
    words = [_SINGULAR.get(w, w) for w in phrase.lower().split() if w not in ("a", "an", "on")]
    if unread := [w for w in words if w not in (*COLOURS, *SHAPES, *SIZES, *BACKGROUNDS)]:
        raise PromptError(f"is {phrase!r} in the picture?", f"the oracle does not read {', '.join(unread)}",
                          "colours, shapes, sizes, backgrounds")  # fmt: skip
    if any(w in BACKGROUNDS for w in words):
        return seen.background in words
    return any(all(w in (t.colour, t.shape, t.size) for w in words) for t in seen.things)


def settings(probe: Probe, steps: int = STEPS, guidance: float = GUIDANCE) -> Settings:
    """How a trial makes the picture of a probe."""
    return Settings(probe.prompt, probe.seed, steps, guidance, 64, 64)


def pictures(model: Any, probes: Sequence[Probe], steps: int = STEPS, guidance: float = GUIDANCE,
             advance: Advance | None = None) -> list[Any]:  # fmt: skip
    """The picture, uint8 [y, x, rgb], of each probe."""
    found = []
    for i in range(0, len(probes), BATCH):
        part = [settings(p, steps, guidance) for p in probes[i : i + BATCH]]
        found += [run.images[0] for run in model.generate_many(part, batch=BATCH)]
        if advance:
            advance(len(part))
    return found


def probes(goal: Goal, n: int, purpose: str = "report") -> dict[str, list[Probe]]:
    """Groups of ``n`` probes each. ``target``: prompts with the old phrase must show the new one. ``paraphrases``: the
    same in captions of the kinds and with the words that planning saw least: counts, relations, three objects,
    backgrounds and fillers. ``neighbours``: prompts of other words of its kind stay. ``unrelated``: number, shapes and
    places stay in prompts without the phrase. Raises RunError where the world has too few captions."""
    found: dict[str, list[Probe]] = {}
    new = tuple(goal.new.split())
    for group, (kinds, has) in GROUPS.items():
        if has:
            prompts = _captions(goal.old, n, f"{purpose} {group}", kinds, new if len(new) == 1 else ())
        else:
            drawn = [draw_scene(stream("editing", purpose, group, str(goal), i), kinds[i % len(kinds)]).caption
                     for i in range(20 * n)]  # fmt: skip
            prompts = tuple(c for c in drawn if not set(c.split()) & set(goal.old.split()))[:n]
        if len(prompts) < n:
            raise RunError(f"{n} {group} prompts of {goal}", f"the world has {len(prompts)}", "fewer seeds")
        parts = ("number", "shapes", "relation", "background") if group == "unrelated" else ("colours",)
        found[group] = [
            Probe(p, int(seed_of("editing", purpose, group, i) % 2**31), parts, goal if has else None)
            for i, p in enumerate(prompts)
        ]
    return found


# --- the trial -------------------------------------------------------------------------------------------------------


def _sites(model: Any, change: Change, key: object) -> dict[str, str]:
    """For each edited matrix another one of the model of the same shape, drawn at random; where there are none left,
    one that is edited too."""
    free: dict[tuple[int, ...], list[str]] = {}
    for component in ("text_encoder", "unet"):
        for name, p in getattr(model.pipeline, component).named_parameters():
            if p.ndim == 2 and f"{component}.{name}" not in change.before and "embedding" not in name:
                free.setdefault(tuple(p.shape), []).append(f"{component}.{name}")
    rng = stream("editing", "sites", key)
    pools = {shape: list(rng.permutation(sorted(names))) for shape, names in free.items()}
    found: dict[str, str] = {}
    for name in sorted(change.before):
        shape = tuple(change.before[name].shape)
        others = [n for n in change.before if n != name and n not in found.values() and change.before[n].shape == shape]
        pool = pools.get(shape) or sorted(others)
        if pool:
            found[name] = str(pool.pop())
    return found


def elsewhere(model: Any, change: Change, key: object) -> Change:
    """The same deltas at other matrices of equal size, drawn at random."""
    weights = {
        f"{c}.{n}": p for c in ("text_encoder", "unet") for n, p in getattr(model.pipeline, c).named_parameters()
    }
    before, after = {}, {}
    for name, other in _sites(model, change, key).items():
        before[other] = weights[other].detach().clone()
        after[other] = before[other] + (change.after[name] - change.before[name])
    return replace(change, before=before, after=after)


def measure(verb: Any, replicates: int, model: Any = None, advance: Advance | None = None) -> Measured:
    """What an edit gains on its target, less what it costs others. A replicate is a seed with a target prompt and a
    prompt of other colours, each before and after one of CHANGES: 1 where the target is drawn as the new colour and was
    not before, less 1 where the other prompt had its colours and has lost them. Controls on the same seeds, their costs
    left out: the same deltas at random other matrices of equal size, and, for a method with a ``site``, its own solve
    at a random other one. A method may say with how few ``changes`` it wants to be tried."""
    model = model or _embedded()
    changes = CHANGES[: getattr(verb, "changes", len(CHANGES))]
    values: list[float] = []
    arms: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {k: [] for k in ("target before", "target after", "others before", "others after")}
    foreseen, sites, seconds = [], [], []
    for c, (old, new) in enumerate(changes):
        goal, method, n = Goal(old, new), verb(), len(range(c, replicates, len(changes)))
        if not n:
            continue
        drawn = probes(goal, n, "trial")
        target, others = drawn["target"], drawn["neighbours"]
        change = method.plan(model, goal)
        controls = {"the same deltas at random matrices": elsewhere(model, change, goal)}
        if hasattr(method, "site"):
            sites.append(_other_site(model, method.site, goal))
            own = replace(method, site=sites[-1], wanted=float("inf"))
            controls["its own solve at a random site"] = own.plan(model, goal)
        foreseen.append(change.predicted)
        seconds.append(change.seconds)

        def read(asked: list[Probe]) -> list[float]:
            return [float(p.holds(x)) for p, x in zip(asked, pictures(model, asked, advance=advance), strict=True)]

        was = read(target + others)
        with change.on(model):
            now = read(target + others)
        values += [now[i] - was[i] - max(0.0, was[n + i] - now[n + i]) for i in range(n)]
        for arm, control in controls.items():
            with control.on(model):
                arms.setdefault(arm, []).extend(a - b for a, b in zip(read(target), was, strict=False))
        for name, part in zip(rates, (was[:n], now[:n], was[n:], now[n:]), strict=True):
            rates[name] += part
    details: dict[str, Any] = {k: round(float(np.mean(v)), 4) for k, v in rates.items()}
    details |= {"foreseen": foreseen, "random sites": sites, "seconds to plan": seconds}
    own, against = tuple(values), {k: tuple(v) for k, v in arms.items()}
    return Measured("target gained less others lost", "share of seeds", "seed", own, against, details=details)


# --- the report of one change ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tried:
    """What a change did. ``rates[group]``: {"before", "after", "moved", "interval", "n"}, paired over seeds.
    ``images``: for some probes of each group the prompt, the seed and both pictures. ``verdict``: on the target,
    against the same deltas at random matrices. ``relearned``: see :func:`relearn`."""

    rates: dict[str, dict[str, Any]]
    images: tuple[dict[str, Any], ...]
    verdict: Verdict
    relearned: dict[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        """The JSON record, without pictures."""
        return {"rates": self.rates, "verdict": self.verdict.record(), "relearn": self.relearned}


def try_change(
    model: Any, change: Change, seeds: int = 12, relearn_steps: int = 0, shown: int = 3, advance: Advance | None = None
) -> Tried:
    """Pictures before and after at the same seeds, read by the oracle. Raises RunError for fewer than 8 seeds,
    PromptError for phrases that the oracle does not read."""
    if seeds < 8:
        raise RunError(f"{seeds} seeds", "too few for a verdict", "8 or more")
    groups = probes(change.goal, seeds)
    asked = [p for own in groups.values() for p in own]
    target = groups["target"]
    shows(change.goal.new, oracle.read(np.zeros((64, 64, 3), np.uint8)))  # refuses what it cannot read before any work
    made = {"before": pictures(model, asked, advance=advance)}
    with change.on(model):
        made["after"] = pictures(model, asked, advance=advance)
    with elsewhere(model, change, change.key).on(model):
        control = pictures(model, target, advance=advance)
    held = {when: [float(p.holds(x)) for p, x in zip(asked, own, strict=True)] for when, own in made.items()}
    rates, images = {}, []
    for g, (group, own) in enumerate(groups.items()):
        part = slice(g * seeds, (g + 1) * seeds)
        was, now = (np.array(held[when][part]) for when in ("before", "after"))
        moved = now - was
        rates[group] = {
            "before": float(was.mean()), "after": float(now.mean()), "moved": float(moved.mean()),
            "interval": list(t_interval(moved, 0.05)), "n": seeds,
        }  # fmt: skip
        images += [
            {"group": group, "prompt": own[i].prompt, "seed": own[i].seed, "before": made["before"][part][i],
             "after": made["after"][part][i], "held": [bool(was[i]), bool(now[i])]}
            for i in range(min(shown, seeds))
        ]  # fmt: skip
    was = np.array(held["before"][:seeds])
    there = np.array([float(p.holds(x)) for p, x in zip(target, control, strict=True)])
    verdict = judge(
        np.array(held["after"][:seeds]) - was, {"the same deltas at random matrices": there - was},
        claim=f"prompts with {change.goal.old!r} are drawn as {change.goal.new!r}", delta=0.8,
        readout="share of pictures drawn as the new phrase", unit="after less before", alpha=0.05,
        evidence=f"{change.method}: {change.extent}; foreseen: "
        f"{1 - change.predicted['edit']:.0%} of the way there, kept values move by {change.predicted['keep']:.1%}",
        intervention=f"the same {seeds} seeds before and after; the same deltas at random matrices of equal size",
    )  # fmt: skip
    learned = relearn(model, change, relearn_steps, advance=advance) if relearn_steps else None
    return Tried(rates, tuple(images), verdict, learned)


def relearn(model: Any, change: Change, steps: int = 8, pictures_each: int = 4, rate: float = 3e-4,
            advance: Advance | None = None) -> dict[str, Any]:  # fmt: skip
    """How fast does the old concept come back? The edited model learns, for some steps on its own former pictures, to
    draw the old concept at the old word; beside it the unedited model learns the same pictures at another word. Both
    train the keys and values of the attention over text; the share of the loss that the word had lost and has regained
    is counted on other pictures: 1 is the unedited model at the old word. A hidden concept comes back faster than a new
    one is learned."""
    import torch

    from ...models.objectives import DiffusionObjective

    goal, n = change.goal, pictures_each
    prompts = _captions(goal.old, 2 * n, "relearn", ("one", "two"), tuple(goal.new.split()))
    other = next(c for c in (*model.alternatives(goal.old.split()[0], 0), *COLOURS) if c not in (goal.old, goal.new))
    said = [reword(p, goal.old, other) or p for p in prompts]
    asked = [Settings(p, int(seed_of("relearn", i) % 2**31), STEPS, GUIDANCE, 64, 64) for i, p in enumerate(prompts)]
    own = [run.latents[0] for run in model.generate_many(asked, batch=BATCH)]
    trained = [p for name, p in model.pipeline.unet.named_parameters() if "attn2.to_k" in name or "attn2.to_v" in name]

    def loss(captions: Sequence[str], part: slice) -> Any:
        objective = DiffusionObjective(model, timesteps=3, seed=part.start or 0)
        return objective.losses(list(zip(captions[part], own[part], strict=True))).values.sum() / n

    def arm(captions: Sequence[str], goal_loss: float) -> list[float]:
        kept = [p.detach().clone() for p in trained]
        optimiser = torch.optim.AdamW(trained, lr=rate)
        train, test = slice(0, n), slice(n, 2 * n)
        curve: list[float] = []
        try:
            for _ in range(steps):
                if not curve:
                    with torch.no_grad():
                        curve.append(float(loss(captions, test)))
                for p, g in zip(trained, torch.autograd.grad(loss(captions, train), trained), strict=True):
                    p.grad = g
                optimiser.step()
                with torch.no_grad():
                    curve.append(float(loss(captions, test)))
                if advance:
                    advance(1)
        finally:
            with torch.no_grad():
                for p, was in zip(trained, kept, strict=True):
                    p.copy_(was)
                    p.grad = None
        lost = max(curve[0] - goal_loss, 1e-9)
        return [round((curve[0] - x) / lost, 4) for x in curve]

    with torch.no_grad():
        before = float(loss(prompts, slice(n, 2 * n)))
    fresh = arm(said, before)
    with change.on(model):
        edited = arm(prompts, before)
    return {"steps": steps, "edited word": edited, f"another word ({other})": fresh, "learning rate": rate}


def _other_site(model: Any, site: str, key: object) -> str:
    """Another linear layer of the text encoder of the same shape, drawn at random."""
    layers = dict(model.pipeline.text_encoder.named_modules())
    own = next(n for n in layers if n.endswith(site))
    shape = layers[own].weight.shape
    alike = [
        n for n, m in layers.items() if n != own and getattr(m, "weight", None) is not None and m.weight.shape == shape
    ]
    return str(stream("editing", "site", key).choice(sorted(alike)))


@lru_cache(maxsize=1)
def _embedded() -> Any:
    from ...models.loading import load
    from . import model_directory

    return load(model_directory())
