"""The swap check on a generator that obeys its words exactly, so that each word's pixels are known."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whence.checks.swap import agreement, chance, ranks, swap
from whence.engine.prompts import split_words
from whence.engine.randomness import stream
from whence.errors import MethodError, PromptError, WrongMapError
from whence.explanation import Cost, Explanation
from whence.run import Run, Settings
from whence.units import Units
from whence.verdict import REFUTED, RUNS_LIKE_THIS, SUPPORTED, THIS_RUN, UNDECIDED
from whence.worlds.controls import centre, random_maps, shuffled
from whence.worlds.shapes.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, marking_word, render
from whence.worlds.shapes.vocabulary import alternatives

PROMPT = "a red circle left of a blue square on sand"


class Planted:
    """Draws what the prompt says; places come from the seed alone. ``grain``: grey levels of noise that depends on
    every word, as a diffusion model's does."""

    name, family, fingerprint = "planted", "renderer", "0"

    def __init__(self, grain: float = 2.0, dead: tuple[str, ...] = ()) -> None:
        self.grain, self.dead, self.made = grain, dead, 0

    def words(self, prompt: str) -> Units:
        names = split_words(prompt)
        seen = [names[: i + 1].count(w) for i, w in enumerate(names)]
        return Units("word", names, tuple(((i,),) for i in range(len(names))), tuple(seen))

    def alternatives(self, prompt: str, word: int) -> tuple[str, ...]:
        return alternatives(split_words(prompt)[word])

    def scene(self, settings: Settings) -> Scene:
        words = split_words(settings.prompt)
        rng = np.random.default_rng(settings.seed)
        line, cells = int(rng.integers(3)), rng.permutation(3)
        spare, sizes = int(rng.integers(3)), rng.choice(["small", "large"], 3).tolist()
        shapes = [w for w in words if w in SHAPES]
        colours = ["red" if "red" in self.dead else w for w in words if w in COLOURS]
        if "left" in words or "right" in words:
            cells = np.sort(cells[:2])[:: 1 if "left" in words else -1]
        things = tuple(
            Thing(c, s, sizes[i], line, int(cells[i]), False)
            for i, (c, s) in enumerate(zip(colours, shapes, strict=True))
        )
        marked = marking_word() in words
        background = next((w for w in words if w in BACKGROUNDS), "")
        return Scene("", things, "", background, (), False, ((line + 1) % 3, spare) if marked else None, False, (0, 0))

    def generate(self, settings: Settings, tape: Any = None) -> Run:
        self.made += 1
        image = render(self.scene(settings))[0].astype(float)
        grain = stream("grain", settings.prompt, settings.seed).normal(size=image.shape) * self.grain
        pixels = np.clip(np.rint(image + grain), 0, 255).astype(np.uint8)[None]
        return Run(
            settings, pixels, np.zeros((1, 1, 1, 1), np.float32), self.words(settings.prompt), self.name, self.family,
            self.fingerprint, "none", {}, self,
        )  # fmt: skip


def truth(run: Run) -> Explanation:
    """Each word's pixels, as planted."""
    model = run.model
    assert isinstance(model, Planted)
    scene = model.scene(run.settings)
    masks = render(scene)[1]
    objects = [masks[f"thing{i}"] for i in range(len(scene.things))]
    maps, shapes, colours = [], 0, 0
    for word in run.words.names:
        if word in COLOURS:
            maps.append(objects[colours])
            colours += 1
        elif word in SHAPES:
            maps.append(objects[shapes])
            shapes += 1
        elif word in BACKGROUNDS:
            maps.append(masks["background"])
        elif word in ("left", "right"):
            maps.append(np.logical_or.reduce(objects))
        elif word == marking_word():
            maps.append(masks["mark"])
        else:
            maps.append(np.zeros_like(objects[0]))
    return Explanation(
        "truth", run.words, np.stack(maps).astype(np.float32), ("word", "y", "x"), "", "causal", {}, Cost(1, 0.0)
    )


def swapped_objects(run: Run) -> Explanation:
    """The maps of the two objects exchanged."""
    e = truth(run)
    names = list(e.units.names)
    scores = e.scores.copy()
    for kind in (COLOURS, SHAPES):
        a, b = (i for i, w in enumerate(names) if w in kind)
        scores[[a, b]] = scores[[b, a]]
    return replace(e, method="exchanged", scores=scores)


def made(prompt: str = PROMPT, seed: int = 0, **model: Any) -> Run:
    return Planted(**model).generate(Settings(prompt, seed, 1, 1.0, 64, 64))


OBJECT_WORDS = ("red", "circle", "blue", "square")


def words_of(explainer: Any, scope: str, pictures: int) -> list[str]:
    out = []
    for seed in range(pictures):
        run = made(seed=seed)
        more = {"explain": explainer} if scope == RUNS_LIKE_THIS else {}
        out += [v.word for v in swap(explainer(run), run, words=OBJECT_WORDS, scope=scope, **more)]
    return out


@pytest.mark.parametrize(("scope", "pictures"), [(THIS_RUN, 8), (RUNS_LIKE_THIS, 1)])
def test_only_the_planted_map_is_supported(scope: str, pictures: int) -> None:
    planted = words_of(truth, scope, pictures)
    assert planted.count(SUPPORTED) >= 0.9 * len(planted)
    for liar in (swapped_objects, random_maps, centre):
        told = words_of(liar, scope, pictures)
        # In one picture an object may stand in the middle by luck, and a centre map is then right about it.
        allowed = 0.15 if liar is centre and scope == THIS_RUN else 0.05
        assert told.count(SUPPORTED) <= allowed * len(told), liar
    assert set(words_of(swapped_objects, scope, 1)) == {REFUTED}


def test_every_kind_of_word_is_found_in_runs_like_this() -> None:
    run = made(f"{marking_word()} {PROMPT}")
    verdicts = swap(truth(run), run, scope=RUNS_LIKE_THIS, explain=truth)
    word = {v.details["of"]: v.word for v in verdicts}
    assert [v.details["of"] for v in verdicts] == list(run.words.labels)
    for known in (*OBJECT_WORDS, "left", "sand", marking_word()):
        assert word[known] == SUPPORTED, known
    for unknown in ("a", "of", "a#2", "on"):
        assert word[unknown] == UNDECIDED
    assert all("no in-distribution alternative" in v.line for v in verdicts if v.n == 0)


def test_shuffled_labels_are_not_supported_beyond_chance() -> None:
    run = made()
    explain = shuffled(truth)
    words = [v.word for v in swap(explain(run), run, words=OBJECT_WORDS, scope=RUNS_LIKE_THIS, explain=explain)]
    assert SUPPORTED not in words


@pytest.mark.parametrize("grain", [0.0, 2.0])
@pytest.mark.parametrize("scope", [THIS_RUN, RUNS_LIKE_THIS])
def test_a_word_that_does_nothing_is_refuted(grain: float, scope: str) -> None:
    run = made(grain=grain, dead=("red",))
    (v,) = swap(truth(run), run, words=["red"], scope=scope, explain=truth)
    assert v.word == REFUTED
    assert v.interval[1] < v.delta
    if grain == 0:
        assert (v.effect, v.details["change"]) == (0, 0)


def test_words_of_one_object_do_not_refute_each_other() -> None:
    for seed in range(4):
        run = made("a red circle", seed)
        for v in swap(truth(run), run, words=["red", "circle"]):
            assert v.word != REFUTED, v
        fillers = {"a filler appended": [f"a red circle {w}" for w in ("dax", "vel", "ema", "oru")]}
        assert [v.word for v in swap(truth(run), run, words=["red"], controls=fillers)] == [SUPPORTED]


# --- the number


def test_agreement_is_one_for_the_best_map_and_zero_for_one_that_knows_nothing() -> None:
    rng = np.random.default_rng(0)
    change = rng.exponential(size=(9, 7)) ** 3
    assert agreement(change, change) == pytest.approx(1)
    assert agreement(np.ones_like(change), change) == pytest.approx(0)
    assert agreement(change, np.zeros_like(change)) == 0
    assert agreement(change, np.ones_like(change)) == 0
    assert abs(np.mean([agreement(rng.normal(size=(9, 7)), change) for _ in range(800)])) < 0.03
    mask = np.zeros((10, 10))
    mask[:9] = 1
    assert agreement(mask, mask) == pytest.approx(1), "a background's map can be perfect too"


def test_agreement_is_the_ratio_of_ginis_covariances() -> None:
    rng = np.random.default_rng(1)
    change, scores = rng.random((6, 6)), rng.random((6, 6))
    covariance = [np.cov(change.ravel(), ranks(m).ravel())[0, 1] for m in (scores, change)]
    assert agreement(scores, change) == pytest.approx(covariance[0] / covariance[1])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([np.exp, np.cbrt, lambda m: 3 * m + 2]), st.floats(0.1, 10))
def test_agreement_does_not_depend_on_the_scale_of_map_or_change(seed: int, rescale: Any, factor: float) -> None:
    rng = np.random.default_rng(seed)
    scores, change = rng.normal(size=(6, 5)), rng.random((6, 5))
    g = agreement(scores, change)
    assert -1 - 1e-9 <= g <= 1 + 1e-9
    assert agreement(rescale(scores), factor * change) == pytest.approx(g, abs=1e-9)
    assert agreement(np.roll(scores, 2, 1), np.roll(change, 2, 1)) == pytest.approx(g, abs=1e-9)


def test_chance_is_the_share_of_all_placements() -> None:
    rng = np.random.default_rng(2)
    scores, changes = rng.normal(size=(5, 4)), [rng.random((5, 4)) ** 4, rng.random((5, 4))]
    changes[0] += scores - scores.min()

    def mean(m: Any) -> float:
        return float(np.mean([agreement(m, d) for d in changes]))

    flips = (scores, scores[::-1], scores[:, ::-1], scores[::-1, ::-1])
    every = [mean(np.roll(f, (i, j), (0, 1))) for f in flips for i in range(5) for j in range(4)]
    assert chance(scores, changes) == pytest.approx(np.mean(np.array(every) >= mean(scores) - 1e-9))
    assert chance(scores, [np.zeros((5, 4))]) == 1


# --- what it costs and says


def test_verdicts_are_the_same_whichever_words_are_asked_and_however_pictures_are_made() -> None:
    run = made()

    class Batched(Planted):
        def generate_many(self, many: list[Settings]) -> list[Run]:
            return [self.generate(s) for s in many]

    one = swap(truth(run), run, words=["red"], scope=RUNS_LIKE_THIS, explain=truth)[0]
    both = swap(truth(run), run, words=["blue", "red"], scope=RUNS_LIKE_THIS, explain=truth)[1]
    batched = Batched().generate(run.settings)
    many = swap(truth(batched), batched, words=["red"], scope=RUNS_LIKE_THIS, explain=truth)[0]
    assert one.details["per_seed"] == both.details["per_seed"] == many.details["per_seed"]
    assert one.word == both.word == many.word


@pytest.mark.parametrize("scope", [THIS_RUN, RUNS_LIKE_THIS])
def test_model_runs_are_counted(scope: str) -> None:
    run = made()
    model = run.model
    assert isinstance(model, Planted)
    before, steps = model.made, []
    free = lambda r: replace(truth(r), cost=Cost(0, 0.0))  # noqa: E731
    v = swap(truth(run), run, scope=scope, explain=free, advance=lambda n=1, note="": steps.append(n))[1]
    assert v.details["runs"] == model.made - before == sum(steps)
    assert v.details["a_a"] == 0


def test_the_verdict_reads_as_four_lines_and_as_json() -> None:
    run = made()
    v = swap(truth(run), run, words=["red"])[0]
    text = str(v)
    assert [line.split()[0] for line in text.splitlines()] == ["claim", "evidence", "intervention", "verdict"]
    assert "at seed 0, 'red' replaced by green, blue, yellow, purple, orange" in text
    json.dumps(v.record(), allow_nan=False)


def test_alternatives_may_be_handed_for_words_that_the_model_has_none_for() -> None:
    run = made()
    v = swap(truth(run), run, words=["red"], alternatives={"red": ["blue", "green", "orange"]})[0]
    assert (v.n, v.details["alternatives"]) == (3, ["blue", "green", "orange"])


def test_handing_all_of_the_models_own_alternatives_changes_nothing_and_evidence_of_the_same_swaps_is_named() -> None:
    run = made()
    own = swap(truth(run), run, words=["circle"])[0]
    handed = swap(truth(run), run, words=["circle"], alternatives={"circle": list(alternatives("circle"))})[0]
    assert handed.record() == own.record()
    used = replace(truth(run), details={"prompts": {"circle": ["a red cross left of a blue square on sand"]}})
    assert "only its controls are news" in str(swap(used, run, words=["circle"])[0])


def test_a_chance_hit_of_a_wide_map_is_not_support() -> None:
    run = made()
    wide = truth(run)
    half = np.zeros((64, 64), np.float32)
    half[:, :32] = 1
    own = wide.map_of("red") > 0
    half = half if own[:, :32].any() else half[:, ::-1]
    wide = replace(wide, scores=np.broadcast_to(half, wide.scores.shape).copy())
    v = swap(wide, run, words=["red"])[0]
    assert v.word != SUPPORTED
    assert v.p > 0.05


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"words": ["green"]}, PromptError),
        ({"scope": "always"}, MethodError),
        ({"scope": RUNS_LIKE_THIS}, MethodError),
        ({"scope": RUNS_LIKE_THIS, "explain": truth, "seeds": [1, 1, 2]}, MethodError),
    ],
)
def test_bad_questions_get_one_error_before_any_picture(change: dict[str, Any], error: type[Exception]) -> None:
    run = made()
    assert isinstance(run.model, Planted)
    before = run.model.made
    with pytest.raises(error, match="would work"):
        swap(truth(run), run, **change)
    assert run.model.made == before


def test_maps_that_do_not_fit_the_picture_are_refused() -> None:
    run = made()
    small = replace(truth(run), scores=np.zeros((len(run.words), 16, 16), np.float32))
    with pytest.raises(WrongMapError, match="picture's size"):
        swap(small, run)
    with pytest.raises(MethodError, match="without its model"):
        swap(truth(run), replace(run, model=None))
