"""Did this word draw what its map shows? Swap it at the same seed and see where the picture changes.

The word is replaced by an in-distribution alternative (another colour for a colour), everything else is kept. With
D[y, x] the squared difference of the two pictures (mean over rgb: squared, so that the faint grain that every swap
leaves all over a picture does not drown an object) and R[y, x] the rank of the word's map, 0..1, the one primary number
is the Gini correlation of change and map (Schechtman and Yitzhaki 1987, in their covariance form):

    g = ( sum D R / sum D  -  1/2 ) / ( sum D R_D / sum D  -  1/2 ),     R_D the rank of D itself

1: no map could point better at this change; 0: the map knows nothing of it; below 0: the change is where the map is
low. Ranks make it the same for any rescaling of the map; the denominator makes small and large objects comparable. A
picture that does not change at all gives 0.

*This run*: the replicates are the alternatives. Controls: the other words are swapped, does that change fall on this
word's map too? And chance: all shifts and flips of the map, does one in twenty point as well at the change?
*Runs like this*: the replicates are seeds, with new pictures and new maps. Controls, per seed on the same change: the
other words' maps (their mean), the word's own map shifted and flipped at random, a centre map. The strongest of the
three on average is the control: being chosen by the data can only raise it, so it never helps the claim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.prompts import replace_word
from ..engine.randomness import stream
from ..errors import MethodError, WrongMapError
from ..method import Card
from ..verdict import (
    LOOK_ALPHA,
    LOOKS,
    RUNS_LIKE_THIS,
    THIS_RUN,
    UNDECIDED,
    Verdict,
    correct,
    judge,
    judge_run,
    unmeasured,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..engine.progress import Advance
    from ..explanation import Explanation
    from ..run import Run, Settings

CARD = Card(
    name="swap",
    verb="swap",
    paper="Schechtman and Yitzhaki, A measure of association based on Gini's mean difference, 1987 (the number); "
    "the trial is Whence's own",
    systems=(),
    question="Does the change fall where the map says when its word is replaced at the same seed?",
    units=("word",),
    works_on=("word maps of every text-to-image model",),
    needs=("generate",),
    cost="this run: one model run per alternative of each word, and one; runs like this: two per seed, and new maps",
    claim="A planted map is supported; another word's map, a random, a centre and a dead word's map are not.",
    falsifier={
        "trial": "tests/checks/test_swap.py::test_only_the_planted_map_is_supported",
        "planted": "a renderer that obeys its words exactly stands in for the model, so each word's pixels are known",
        "expect": 0.9,
        "control": "another word's map, a random map and a centre map, supported at most one time in twenty",
        "seconds": 10,
    },
    departs="Nothing to depart from: no paper has this trial. The nearest, deletion curves over pixels, leave the "
    "model's distribution.",
    avoid="For words without an in-distribution alternative (they stay undecided), and where a swap re-draws the whole "
    "picture: then every map scores near 0, which refutes the map as an account of the change, not the word's power.",
)

READOUT, UNIT = "where the picture changes when the word is swapped", "Gini correlation of change and map, -1..1"
DELTA = 0.2
"""Smallest effect worth having."""


def ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """Rank of each pixel, ties shared, spread evenly over 0..1 so that their mean is 1/2; same shape."""
    from scipy.stats import rankdata

    return np.asarray((rankdata(values).reshape(values.shape) - 0.5) / values.size)


def pointing(change: NDArray[Any]) -> NDArray[np.float64] | None:
    """Weights v with g = sum v (R - 1/2) for the ranks R of any map; None for a picture that did not change evenly."""
    total = float(change.sum())
    if total <= 0:
        return None
    weights = change / total
    best = float((weights * ranks(change)).sum() - 0.5)
    return None if best < 1e-9 else np.asarray(weights / best, np.float64)


def agreement(scores: NDArray[Any], change: NDArray[Any]) -> float:
    """g of a map and a change, both [y, x].

    >>> square = np.zeros((8, 8)); square[2:4, 2:4] = 1
    >>> round(agreement(square, square), 6), round(agreement(-square, square), 6), agreement(square, 0 * square)
    (1.0, -1.0, 0.0)
    """
    weights = pointing(change)
    return 0.0 if weights is None else float((weights * (ranks(scores) - 0.5)).sum())


def chance(scores: NDArray[Any], changes: Iterable[NDArray[Any]]) -> float:
    """Share of all shifts (wrapping around) and flips of a map that have at least its mean g."""
    found = [w for w in map(pointing, changes) if w is not None]
    if not found:
        return 1.0
    target = np.fft.rfft2(np.sum(found, axis=0))
    rank = ranks(scores) - 0.5
    flips = (rank, rank[::-1], rank[:, ::-1], rank[::-1, ::-1])
    placed = [np.fft.irfft2(target * np.fft.rfft2(r).conj(), s=rank.shape) for r in flips]
    own = placed[0][0, 0]
    return float(np.mean([p >= own - 1e-9 * abs(own) for p in placed]))


@dataclass(frozen=True)
class _Swaps:
    """What one word is replaced by, the prompts that result, and whether these are all alternatives there are."""

    label: str
    words: tuple[str, ...]
    prompts: tuple[str, ...]
    all: bool


def _swaps(
    run: Run, label: str, alternatives: Mapping[str, Sequence[str]] | None, at_most: int | None,
    used: Sequence[str] = (),
) -> _Swaps:  # fmt: skip
    index, prompt = run.words.find(label), run.settings.prompt
    assert run.model is not None
    own = run.model.alternatives(prompt, index)
    known: Sequence[str] = (alternatives or {}).get(label) or own
    # A map made of swaps is tried on others, where enough are left for a verdict.
    fresh = [w for w in known if replace_word(prompt, index, w) not in used]
    known = fresh if len(fresh) >= 3 else known
    n = min(len(known), at_most or len(known))
    chosen = tuple(known[i * len(known) // n] for i in range(n))
    prompts = tuple(replace_word(prompt, index, w) for w in chosen)
    return _Swaps(label, chosen, prompts, bool(own) and set(own) <= set(chosen))


def _make(run: Run, settings: Sequence[Settings], advance: Advance | None) -> list[Run]:
    many = getattr(run.model, "generate_many", None)
    out: list[Run] = []
    for i in range(0, len(settings), 16):
        block = list(settings[i : i + 16])
        out += many(block) if many else [run.again(prompt=s.prompt, seed=s.seed, images=s.images) for s in block]
        if advance:
            advance(len(block))
    return out


def _alone(run: Run, settings: Settings, advance: Advance | None) -> Run:
    made = run.again(prompt=settings.prompt, seed=settings.seed, images=settings.images)
    if advance:
        advance(1)
    return made


def _change(a: Run, b: Run, image: int = 0) -> NDArray[np.float64]:
    return np.asarray((((a.images[image].astype(float) - b.images[image].astype(float)) / 255) ** 2).mean(-1))


def _maps(explanation: Explanation, run: Run) -> Explanation:
    if explanation.scores.shape[1:] != run.images.shape[1:3]:
        raise WrongMapError(
            f"swap with the maps of {explanation.method}",
            f"scores of shape {explanation.scores.shape} for pictures of {run.images.shape[1:3]}",
            "one map per word at the picture's size, scores[word, y, x]",
        )
    return explanation


def _evidence(explanation: Explanation, label: str = "", prompts: Sequence[str] = ()) -> str:
    runs = explanation.cost.runs
    text = f"maps by {explanation.method} ({explanation.kind}), {runs} model run{'' if runs == 1 else 's'} a picture"
    if set(prompts) & set(explanation.details.get("prompts", {}).get(label, ())):
        text += "; made of swaps that the trial makes too, so that only its controls are news"
    return text


def swap(
    explanation: Explanation,
    run: Run,
    *,
    words: Sequence[str] | None = None,
    scope: str = THIS_RUN,
    delta: float = DELTA,
    alternatives: Mapping[str, Sequence[str]] | None = None,
    controls: Mapping[str, Sequence[str]] | None = None,
    explain: Callable[[Run], Explanation] | None = None,
    seeds: Sequence[int] = range(LOOKS[-1]),
    looks: Sequence[int] = LOOKS,
    image: int = 0,
    advance: Advance | None = None,
) -> list[Verdict]:
    """A verdict for each word (labels; None: all that have a map), in their order, corrected for their number.

    ``alternatives[label]`` replaces the model's own alternatives for a word. For *this run*, ``controls`` may add
    prompts by name to those that swap the other words (a filler appended, say). For *runs like this*, ``explain`` gives
    the maps of a fresh run and ``seeds`` has at least as many as the last of ``looks``. ``advance`` is told of each
    picture made. ``details["runs"]`` counts the model runs of the check, shared by its words; ``details["a_a"]`` is
    the mean squared change of the same picture made twice (0..1): no larger change counts as none.

    Raises MethodError for a run without its model, or no ``explain`` where it is needed; PromptError for a word that is
    not in the prompt; WrongMapError for scores that are no maps of this picture.
    """
    if run.model is None:
        raise MethodError("swap", "a run without its model", "load the model and generate")
    _maps(explanation, run)
    labels = [explanation.units.labels[explanation.units.find(w)] for w in (words or explanation.units.labels)]
    if scope == THIS_RUN:
        verdicts = _this_run(explanation, run, labels, delta, alternatives, controls or {}, image, advance)
    elif scope != RUNS_LIKE_THIS:
        raise MethodError(f"swap with scope {scope!r}", "no such scope", f"{THIS_RUN!r} or {RUNS_LIKE_THIS!r}")
    elif explain is None or len(set(seeds)) < max(looks):
        raise MethodError(
            f"swap for {RUNS_LIKE_THIS}",
            "no function that explains a fresh run" if explain is None else f"{len(set(seeds))} different seeds",
            f"explain=lambda run: whence.explain(run, by='daam'), and {max(looks)} seeds",
        )
    else:
        fresh = list(dict.fromkeys(seeds))
        verdicts = _runs_like_this(explain, run, labels, delta, alternatives, fresh, looks, advance)
    return _corrected(verdicts)


def _corrected(verdicts: list[Verdict]) -> list[Verdict]:
    measured = iter(correct([v for v in verdicts if v.n]))
    return [next(measured) if v.n else v for v in verdicts]


def _without(label: str, scope: str, delta: float, evidence: str) -> Verdict:
    why = "no in-distribution alternative is known for it; hand one: alternatives={'dog': ['cat', 'fox', 'owl']}"
    return unmeasured(_claim(label, scope), scope, why, delta, readout=READOUT, unit=UNIT, evidence=evidence, of=label)


def _claim(label: str, scope: str) -> str:
    return f"the word {label!r} drew what its map shows{'' if scope == THIS_RUN else ', in runs like this'}"


def _this_run(
    explanation: Explanation, run: Run, labels: list[str], delta: float,
    alternatives: Mapping[str, Sequence[str]] | None, controls: Mapping[str, Sequence[str]], image: int,
    advance: Advance | None,
) -> list[Verdict]:  # fmt: skip
    made_of: Mapping[str, Sequence[str]] = explanation.details.get("prompts", {})
    swaps = {w: _swaps(run, w, alternatives, 5 if w in labels else 3, made_of.get(w, ())) for w in run.words.labels}
    plan = {w: s.prompts for w, s in swaps.items()}
    plan |= {name: tuple(prompts) for name, prompts in controls.items()}
    settings = [replace(run.settings, prompt=p) for prompts in plan.values() for p in prompts]
    made = iter(_make(run, [run.settings, *settings], advance))
    same = float(_change(run, next(made), image).mean())
    changes = {name: [_change(run, next(made), image) for _ in prompts] for name, prompts in plan.items()}
    changes = {name: [d if d.mean() > same else 0 * d for d in ds] for name, ds in changes.items()}
    verdicts = []
    for label in labels:
        if not changes[label]:
            verdicts.append(_without(label, THIS_RUN, delta, _evidence(explanation)))
            continue
        own, used = explanation.map_of(label), swaps[label].words
        verdicts.append(
            judge_run(
                [agreement(own, d) for d in changes[label]],
                {name: [agreement(own, d) for d in ds] for name, ds in changes.items() if name != label},
                claim=_claim(label, THIS_RUN),
                delta=delta,
                chance=chance(own, changes[label]),
                tried_all=swaps[label].all,
                readout=READOUT,
                unit=UNIT,
                evidence=_evidence(explanation, label, plan[label]),
                intervention=f"at seed {run.settings.seed}, {label!r} replaced by {', '.join(used)}; "
                "and, as the control, each other word",
                control_name="the other words swapped",
                of=label,
                alternatives=list(used),
                change=float(np.mean(changes[label])),
                a_a=same,
                runs=(1 + len(settings)) * run.settings.images,
            )
        )
    return verdicts


def _runs_like_this(
    explain: Callable[[Run], Explanation], run: Run, labels: list[str], delta: float,
    alternatives: Mapping[str, Sequence[str]] | None, seeds: list[int], looks: Sequence[int], advance: Advance | None,
) -> list[Verdict]:  # fmt: skip
    plan = {w: _swaps(run, w, alternatives, None) for w in labels}
    tried = {w: len(s.prompts) for w, s in plan.items() if s.prompts}
    order = {w: stream("swap", run.settings.prompt, w).permutation(n) for w, n in tried.items()}
    effects: dict[str, list[float]] = {w: [] for w in order}
    control: dict[str, dict[str, list[float]]] = {w: {} for w in order}
    changed: dict[str, list[float]] = {w: [] for w in order}
    found: dict[str, Verdict] = {}
    evidence: dict[str, str] = {}
    runs, done, same = 0, 0, 0.0
    for k, look in enumerate(looks, 1):
        open_words = [w for w in order if w not in found or found[w].word == UNDECIDED]
        if not open_words:
            break
        fresh = [replace(run.settings, seed=s, images=1) for s in seeds[done:look]]
        # One by one: a method that replays its run compares bits, and a batch rounds in another way.
        bases = [_alone(run, s, advance) for s in fresh]
        if not done:
            same = float(_change(bases[0], _make(run, [fresh[0]] * 2, advance)[1]).mean())
            runs += 2
        swapped = iter(
            _make(
                run,
                [
                    replace(s, prompt=plan[w].prompts[order[w][(done + i) % len(order[w])]])
                    for i, s in enumerate(fresh)
                    for w in open_words
                ],
                advance,
            )
        )
        for base in bases:
            maps = _maps(explain(base), base)
            runs += 1 + len(open_words) + maps.cost.runs
            evidence |= {w: _evidence(maps, w, plan[w].prompts) for w in labels}
            for w in open_words:
                change = _change(base, next(swapped))
                if change.mean() <= same:
                    change = 0 * change
                changed[w].append(float(change.mean()))
                effects[w].append(agreement(maps.map_of(w), change))
                for name, value in _control_maps(maps, w, change, base).items():
                    control[w].setdefault(name, []).append(value)
        done = look
        for w in open_words:
            found[w] = judge(
                effects[w],
                control[w],
                claim=_claim(w, RUNS_LIKE_THIS),
                delta=delta,
                looks=tuple(looks[:k]),
                alpha=LOOK_ALPHA[len(looks)],
                readout=READOUT,
                unit=UNIT,
                evidence=evidence[w],
                intervention=f"at the same seeds, {w!r} replaced by {', '.join(plan[w].words)} in turn",
                of=w,
                alternatives=list(plan[w].words),
                change=float(np.mean(changed[w])),
                a_a=same,
                per_seed=list(effects[w]),
                seeds=seeds[:look],
            )
    return [
        replace(found[w], details={**found[w].details, "runs": runs})
        if w in found
        else _without(w, RUNS_LIKE_THIS, delta, evidence.get(w, ""))
        for w in labels
    ]


def _control_maps(maps: Explanation, label: str, change: NDArray[np.float64], run: Run) -> dict[str, float]:
    own = maps.map_of(label)
    others = [agreement(maps.map_of(w), change) for w in maps.units.labels if w != label]
    rng = stream("swap", "placement", run.settings.prompt, label, run.settings.seed)
    placed = np.roll(own[:: int(rng.choice((1, -1))), :: int(rng.choice((1, -1)))], rng.integers(own.shape), (0, 1))
    y, x = (np.linspace(-1, 1, n) for n in own.shape)
    out = {"the other words' maps": float(np.mean(others))} if others else {}
    return out | {
        "the map at a random place": agreement(placed, change),
        "a centre map": agreement(-(y[:, None] ** 2) - x[None] ** 2, change),
    }
