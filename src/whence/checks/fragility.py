"""How well do scores of training examples agree with training again, and does that last for deeper networks?

Basu, Pope & Feizi (2021) trained small networks of several depths, widths and weight decays, and held influence
estimates against what training again did: close for shallow ones with weight decay, often erroneous for others. Here,
for every setting a and seed s of a family, with f_q(theta_{a,s}(S)) the output of a query after training on S,

    rho_{a,s} = mean over q of Spearman_j( sum_{i in S_j} tau_{a,s}(q, i),  f_q(theta_{a,s}(S_j)) )

The S_j are random halves ("LDS", as in lds.py), or all examples but one ("leave one out", the paper's own measure).
Along an axis, all else being equal, the effect of a seed is the fall of the straight line through rho at its levels,
from the shallowest, narrowest or most decayed to the other end. It is held against two controls:

* shuffled: the same from scores given to other examples;
* noise of training: outputs of another seed agree with these by r_a. Were the scores as good everywhere as at the first
  level, noise alone would make rho fall as sqrt(r_a) does.

The replicate is the seed of training; halves, examples and queries are the same for all. The noise control takes r_a as
known, so where it decides narrowly it is not to be leant on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RunError
from ..method import Card
from ..verdict import Verdict, correct, judge
from .lds import correlations

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..engine.progress import Advance
    from ..score import Score

    Lines = list[list["Setting"]]
    BySetting = dict["Setting", NDArray[np.float64]]

CARD = Card(
    name="fragility",
    verb="fragility",
    paper="Basu, Pope & Feizi 2021, Influence Functions in Deep Learning Are Fragile",
    systems=("S003-09",),
    question="Do these influence scores agree with training again, and still so in deeper networks?",
    units=("training example",),
    works_on=("anything that can be trained again, at several depths, widths and weight decays",),
    needs=("training examples",),
    cost="settings x seeds x subsets trainings; once for any number of methods",
    claim="A fall of agreement that was planted along an axis is supported there and nowhere else.",
    falsifier={
        "trial": "tests/checks/test_fragility.py::test_a_fall_that_was_planted_is_supported_and_on_no_other_axis",
        "planted": "scores with noise that grows with depth, against outputs that are sums of known effects",
        "expect": 1.0,
        "control": "shuffled scores, and outputs whose own noise grows with depth: not supported",
        "seconds": 5,
    },
    departs="Small-scale: digits and networks of up to four hidden layers (benchmarks/fragility.py), not ImageNet. The "
    "scores are whatever method is handed in, where the paper has Hessian-vector products alone. Groups (LDS) beside "
    "single examples; those left out are random ones, the paper's are the most influential. Trained from the first "
    "weights, not on from the optimum. The second control is an addition. The paper was not at hand: its "
    "measures are told from memory. Found on digits with ekfac: the LDS falls with depth (.84 without hidden layers, "
    ".43 with four; noise explains two thirds of it) and with less decay (.70 at 1e-2, .47 at none); that it falls "
    "with width is refuted. For single examples, noise explains the fall with depth.",
    avoid="As a word on one query: agreement differs from query to query, and this is its mean.",
)

WORTH = 0.1
"""Smallest fall of a rank correlation worth having."""
LEAST = 0.01
"""Agreement between seeds below this is taken for this much."""
AXES: Mapping[str, tuple[str, bool]] = {
    "depth": ("the more hidden layers a network has", False),
    "width": ("the wider its layers are", False),
    "decay": ("the weaker its weight decay is", True),
}
"""The end of a claim, and whether levels go down."""


@dataclass(frozen=True, order=True)
class Setting:
    """Hidden layers, units in each, weight decay."""

    depth: int
    width: int
    decay: float


@dataclass(frozen=True, eq=False)
class Retrained:
    """``outputs``[subset, query] (larger: likelier) after training on ``subsets``[subset, example] from the first
    weights of the model that is explained; ``again``: the same from other first weights."""

    subsets: NDArray[np.bool_]
    outputs: NDArray[Any]
    again: NDArray[Any] | None = None


@dataclass(frozen=True, eq=False)
class Trained:
    """One seed of one setting: ``scores``[query, example] of its model, and truths by name ("LDS": halves)."""

    scores: NDArray[Any]
    truths: Mapping[str, Retrained]


@dataclass(frozen=True)
class Fragility:
    """``scores``: truth -> setting -> "agreement", "shuffled", "another seed", each over seeds. ``verdicts``: truth ->
    axis, for those axes along which something varies with all else equal."""

    scores: Mapping[str, Mapping[Setting, Mapping[str, Score]]]
    verdicts: Mapping[str, Mapping[str, Verdict]]

    def record(self) -> dict[str, Any]:
        """The JSON record."""
        rows = {
            truth: [asdict(s) | {k: v.record() for k, v in found.items()} for s, found in by.items()]
            for truth, by in self.scores.items()
        }
        verdicts = {truth: {axis: v.record() for axis, v in by.items()} for truth, by in self.verdicts.items()}
        return {"settings": rows, "verdicts": verdicts}

    def __str__(self) -> str:
        lines = []
        for truth, by in self.scores.items():
            for s, found in by.items():
                ends = {name: (score.mean, *score.interval) for name, score in found.items()}
                numbers = "; ".join(f"{name} {m:.2f} [{low:.2f}, {high:.2f}]" for name, (m, low, high) in ends.items())
                lines.append(f"{truth}, depth {s.depth}, width {s.width}, decay {s.decay:g}: {numbers}")
            lines += [str(verdict) for verdict in self.verdicts.get(truth, {}).values()]
        return "\n".join(lines)


def fragility(
    settings: Sequence[Setting],
    train: Callable[[Setting, int], Trained],
    seeds: Sequence[int] = range(8),
    delta: float = WORTH,
    advance: Advance | None = None,
) -> Fragility:
    """Agreement of each setting and the verdicts along each axis, replicated over seeds. ``train(setting, seed)`` gives
    a model's scores and what training again did. Raises RunError for fewer than two seeds, a setting named twice, or
    where no two settings differ in one thing alone."""
    different = set(settings)
    if len(seeds) < 2 or len(different) < len(settings) or not any(_lines(settings, axis) for axis in AXES):
        found = f"{len(seeds)} seeds of {len(settings)} settings, {len(different)} of them different"
        raise RunError("a trial of fragility", found, "two seeds or more, and settings that differ in one thing alone")
    told: dict[str, dict[str, dict[Setting, list[float]]]] = {}
    for setting in settings:
        for seed in seeds:
            trained = train(setting, seed)
            for truth, retrained in trained.truths.items():
                for kind, value in _agreement(trained.scores, retrained, seed).items():
                    told.setdefault(truth, {}).setdefault(kind, {}).setdefault(setting, []).append(value)
            if advance:
                advance(1, f"depth {setting.depth}, width {setting.width}, decay {setting.decay:g}")
    tables = {t: {k: {s: np.array(v) for s, v in by.items()} for k, by in kinds.items()} for t, kinds in told.items()}
    for truth, kinds in tables.items():
        some = [s for by in kinds.values() for s, values in by.items() if len(values) < len(seeds)]
        if some:
            raise RunError(f"the {truth} of {some[0]}", "some seeds have it, others not", "all seeds of a setting")
    judged = []
    for truth, kinds in tables.items():
        for axis in AXES:
            lines = _lines(list(kinds["agreement"]), axis)
            if lines:
                judged.append((truth, axis, _judge(truth, axis, lines, kinds, delta)))
    verdicts: dict[str, dict[str, Verdict]] = {truth: {} for truth in tables}
    for (truth, axis, _), verdict in zip(judged, correct([v for *_, v in judged]), strict=True):
        verdicts[truth][axis] = verdict
    return Fragility({truth: _scores(kinds) for truth, kinds in tables.items()}, verdicts)


def _agreement(scores: NDArray[Any], truth: Retrained, seed: int) -> dict[str, float]:
    from ..engine.randomness import stream

    order = stream("fragility", seed).permutation(np.asarray(scores).shape[1])
    found = {
        "agreement": correlations(scores, truth.subsets, truth.outputs),
        "shuffled": correlations(np.asarray(scores)[:, order], truth.subsets, truth.outputs),
    }
    if truth.again is not None:
        found["another seed"] = _rows_alike(truth.outputs, truth.again)
    return {name: float(values.mean()) for name, values in found.items()}


def _rows_alike(outputs: NDArray[Any], again: NDArray[Any]) -> NDArray[np.float64]:
    """Spearman's correlation over subsets of each query's outputs from two seeds."""
    from scipy.stats import spearmanr

    pairs = zip(np.asarray(outputs).T, np.asarray(again).T, strict=True)
    return np.array([spearmanr(a, b).statistic if np.ptp(a) and np.ptp(b) else 0.0 for a, b in pairs], float)


def _scores(kinds: Mapping[str, BySetting]) -> dict[Setting, dict[str, Score]]:
    from ..score import Score

    return {
        s: {kind: Score.of(kind, "Spearman", by[s]) for kind, by in kinds.items() if s in by}
        for s in kinds["agreement"]
    }


def _lines(settings: Sequence[Setting], axis: str) -> Lines:
    """Settings that differ along the axis alone, from the end where the claim says that agreement is best."""
    groups: dict[tuple[Any, ...], list[Setting]] = {}
    for setting in settings:
        rest = tuple(value for name, value in asdict(setting).items() if name != axis)
        groups.setdefault(rest, []).append(setting)
    down = AXES[axis][1]
    return [sorted(g, key=lambda s: getattr(s, axis), reverse=down) for g in groups.values() if len(g) > 1]


def _fall(lines: Lines, of: Callable[[list[Setting]], NDArray[np.float64]]) -> NDArray[np.float64]:
    """fall[seed]: of the least squares line through of(line)[level, seed], first level to last, mean over lines."""
    falls = []
    for line in lines:
        place = np.linspace(-0.5, 0.5, len(line))
        falls.append(-(place @ of(line)) / (place @ place))
    return np.asarray(np.mean(falls, 0))


def _judge(truth: str, axis: str, lines: Lines, kinds: Mapping[str, BySetting], delta: float) -> Verdict:
    own = kinds["agreement"]
    controls = {"shuffled": _fall(lines, lambda line: np.stack([kinds["shuffled"][s] for s in line]))}
    seeds = kinds.get("another seed", {})
    if all(s in seeds for line in lines for s in line):

        def by_noise(line: list[Setting]) -> NDArray[np.float64]:
            share = np.array([max(seeds[s].mean(), LEAST) for s in line])
            return np.asarray(np.sqrt(share / share[0])[:, None] * own[line[0]])

        controls["noise of training"] = _fall(lines, by_noise)
    levels: dict[float, list[float]] = {}
    for setting in (s for line in lines for s in line):
        levels.setdefault(getattr(setting, axis), []).append(float(own[setting].mean()))
    means = ", ".join(f"{level:g}: {np.mean(values):.2f}" for level, values in sorted(levels.items()))
    return judge(
        _fall(lines, lambda line: np.stack([own[s] for s in line])), controls,
        claim=f"scores of training examples agree less with training again {AXES[axis][0]}",
        delta=delta, readout=f"fall of the {truth}", unit="Spearman", alpha=0.05,
        evidence=f"{truth} at each {axis}: {means}",
        intervention=f"trained again at {len(levels)} levels of {axis}, all else being equal",
    )  # fmt: skip
