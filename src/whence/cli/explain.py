"""`whence explain`: a picture, its maps, their trials, one report.

Everything that can be refused is refused before the model is loaded: method names, sizes, the output folder.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MethodError, PromptError, RunError
from ..method import card_of, catalogue, maps_pictures

if TYPE_CHECKING:
    from ..explanation import Explanation
    from ..report.bundle import Bundle, Counterfactual, Trial
    from ..run import Run
    from .remember import Remembering

SHOWN = 3
"""Pictures with a word replaced that the report shows per word."""


@dataclass(frozen=True)
class Asked:
    """The options of the command as typed."""

    model: str | None
    prompt: str
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str = ""
    size: str | None = None
    height: int | None = None
    width: int | None = None
    images: int = 1
    by: str | None = None
    swap: Sequence[str] = ()
    seeds: int = 0

    def checked(self) -> Checked:
        """The same as values. Raises the error of the first option that cannot be served."""
        if not self.prompt.strip():
            raise PromptError("--prompt ''", "the prompt is empty", "a few words, such as 'a red circle'")
        height, width = self.height, self.width
        if self.size is not None:
            match = re.fullmatch(r"\s*(\d+)\s*[xX×]\s*(\d+)\s*", self.size)
            if not match or height or width:
                found = "--height or --width beside it" if match else "not height x width"
                raise RunError(f"--size {self.size}", found, "--size 64x64, or --height 64 --width 64")
            height, width = int(match[1]), int(match[2])
        for name, value in (("images", self.images), ("steps", self.steps), ("height", height), ("width", width)):
            if value is not None and value < 1:
                raise RunError(f"--{name} {value}", "nothing to make", "1 or more")
        if self.seeds and self.seeds < 8:
            raise RunError(f"--seeds {self.seeds}", "too few for a verdict on runs like this", "0, or 8 or more")
        methods = [m.strip() for m in self.by.split(",")] if self.by is not None else []
        for name in methods:
            card, maps = card_of(name), [c.name for c in catalogue().values() if maps_pictures(c)]
            if card.module.startswith("whence.checks"):
                raise MethodError(f"--by {name}", "a check: it tries maps and makes none", ", ".join(maps))
            if not maps_pictures(card):
                found = "it scores the units of a Question and maps no pictures"
                raise MethodError(f"--by {name}", found, f"{', '.join(maps)}; or `whence prove {name}`")
        return Checked(height, width, tuple(dict.fromkeys(methods)), self._replacements())

    def _replacements(self) -> dict[str, tuple[str, ...]]:
        found = {}
        for text in self.swap:
            word, _, others = text.partition("=")
            names = tuple(dict.fromkeys(w.strip() for w in others.split(",") if w.strip()))
            if not word.strip() or not names:
                raise RunError(f"--swap {text}", "not a word and what may take its place", "--swap dog=cat,fox,owl")
            found[word.strip()] = names
        return found


@dataclass(frozen=True)
class Checked:
    """Options whose form is right. ``methods`` empty: those that the model serves."""

    height: int | None
    width: int | None
    methods: tuple[str, ...]
    replacements: Mapping[str, tuple[str, ...]]


def explain(asked: Asked, out: Path, json: bool) -> None:
    """Run the command and print: JSON alone, or a table (standard error) and the report's path."""
    checked = asked.checked()
    from ..report.folder import check_folder

    folder = check_folder(out)
    bundle = make(asked, checked)
    from ..report.page import write_report

    write_report(bundle, folder)
    if json:
        print(bundle.json())
        return
    from .table import print_table

    print_table(bundle)
    print(folder / "report.html")


def make(asked: Asked, checked: Checked) -> Bundle:
    """Load, generate, explain, try."""
    from .. import verbs
    from ..report.bundle import Bundle
    from .remember import Remembering

    if sys.stderr.isatty():
        print("loading the model", file=sys.stderr)
    adapter = verbs.load(asked.model)
    model = Remembering(adapter)
    steps = adapter.steps if asked.steps is None else asked.steps
    with _bar(model, "picture", steps * asked.images):
        run = adapter.picture(
            asked.prompt, asked.seed, steps, asked.guidance, asked.negative_prompt, checked.height, checked.width,
            asked.images, advance=lambda n=1, note="": model.advance(n * asked.images),
        )  # fmt: skip
    run = replace(run, model=model)
    replacements = _replacements(run, checked)
    methods = checked.methods or _served(run, replacements)
    explanations = []
    for name in methods:
        runs = sum(min(3, len(o)) for o in replacements.values()) if name == "leave_one_out" else 1
        with _bar(model, name, steps * asked.images * runs):
            explanations.append(verbs.explain(run, name, **_settings(name, run, replacements)))
    trials = [t for e in explanations for t in _trials(e, run, model, replacements, asked)]
    pictures = _counterfactuals(run, model, replacements)
    return Bundle(run, explanations, trials, pictures, command=_command(asked, methods, run))


def _replacements(run: Run, checked: Checked) -> dict[str, tuple[str, ...]]:
    """What may take the place of each word, by label; words for which nothing is known are left out."""
    assert run.model is not None
    for word in checked.replacements:
        run.words.find(word)
    known = {
        label: tuple(checked.replacements.get(label, ()) or run.model.alternatives(run.settings.prompt, i))
        for i, label in enumerate(run.words.labels)
    }
    return {label: others for label, others in known.items() if others}


def _served(run: Run, replacements: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The methods that the model serves: a reading of its attention, and the causal question."""
    has: frozenset[str] = getattr(run.model, "capabilities", frozenset())
    reading = "daam" if "cross-attention" in has else "concept_attention"
    readings = [reading] if reading in catalogue() else []
    return (*readings, *(["leave_one_out"] if replacements or not readings else []))


def _settings(name: str, run: Run, replacements: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Settings that a method gets from the command line: what leave_one_out may put in a word's place."""
    if name != "leave_one_out":
        return {}
    if not replacements:
        return {"removal": "drop"}
    names = dict(zip(run.words.labels, run.words.names, strict=True))
    return {"alternatives": {names[label]: others for label, others in replacements.items()}}


def _trials(
    e: Explanation, run: Run, model: Remembering, replacements: Mapping[str, tuple[str, ...]], asked: Asked
) -> list[Trial]:
    """The verdict on each word that has a map and a replacement; on runs like this first, if it was asked for."""
    from .. import verbs
    from ..checks.swap import swap
    from ..report.bundle import Trial
    from ..verdict import LOOKS, RUNS_LIKE_THIS

    words = [label for label in e.units.labels if label in replacements]
    if not words or e.axes[1:] != ("y", "x"):
        return []
    calls = run.settings.steps
    trials: list[Trial] = []
    if asked.seeds:
        looks = tuple(sorted({k for k in LOOKS if k < asked.seeds} | {asked.seeds}))[-5:]
        total = calls * asked.seeds * (2 + len(words) + e.cost.runs)
        with _bar(model, f"trial of {e.method}, {asked.seeds} seeds", total):
            verdicts = swap(
                e, run, words=words, scope=RUNS_LIKE_THIS, alternatives=replacements, looks=looks,
                seeds=range(asked.seed + 1, asked.seed + 1 + asked.seeds),
                explain=lambda r: verbs.explain(r, e.method, **_settings(e.method, r, replacements)),
            )  # fmt: skip
        trials += [Trial(e.method, w, v) for w, v in zip(words, verdicts, strict=True)]
    pictures = 1 + sum(min(5 if w in words else 3, len(o)) for w, o in replacements.items())
    with _bar(model, f"trial of {e.method}", calls * pictures * run.settings.images):
        verdicts = swap(e, run, words=words, alternatives=replacements)
    return trials + [Trial(e.method, w, v) for w, v in zip(words, verdicts, strict=True)]


def _counterfactuals(run: Run, model: Remembering, replacements: Mapping[str, tuple[str, ...]]) -> list[Counterfactual]:
    """Pictures of the same seed with one word replaced, out of those that methods and trials had made."""
    from ..engine.prompts import replace_word
    from ..report.bundle import Counterfactual

    found = []
    for i, label in enumerate(run.words.labels):
        shown = 0
        for other in replacements.get(label, ()):
            prompt = replace_word(run.settings.prompt, i, other)
            made = model.remembered(replace(run.settings, prompt=prompt))
            if made is not None and shown < SHOWN:
                found.append(Counterfactual(label, other, prompt, made.images[0]))
                shown += 1
    return found


def _command(asked: Asked, methods: Sequence[str], run: Run) -> str:
    s = run.settings
    words = [
        "whence", "explain", *([asked.model] if asked.model else []), "--prompt", s.prompt, "--seed", str(s.seed),
        "--steps", str(s.steps), "--guidance", f"{s.guidance:g}", "--size", f"{s.height}x{s.width}",
        *(["--negative-prompt", s.negative_prompt] if s.negative_prompt else []),
        *(["--images", str(s.images)] if s.images > 1 else []), "--by", ",".join(methods),
        *(part for text in asked.swap for part in ("--swap", text)),
        *(["--seeds", str(asked.seeds)] if asked.seeds else []),
    ]  # fmt: skip
    return shlex.join(words)


@contextmanager
def _bar(model: Remembering, what: str, total: int) -> Iterator[None]:
    from ..engine.progress import progress

    with progress(what, total=total, unit="steps") as advance:
        model.advance = advance
        try:
            yield
        finally:
            model.advance = lambda n: None
