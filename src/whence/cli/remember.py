"""A model that remembers the pictures it made, so that methods and checks that ask for the same one share it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..run import Run, Settings

BATCH = 16


class Remembering:
    """Stands before an adapter and offers what it offers.

    Pictures that were asked for together (`generate_many`) are kept by their settings; one asked for alone or under a
    tape is always made, so that a replay is a replay. ``advance(n)`` is told of denoising steps, one per picture.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._made: dict[Settings, Run] = {}
        self.advance: Callable[[int], object] = lambda n: None
        self.runs = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, settings: Settings, tape: Any = None, advance: Any = None) -> Run:
        """Make the pictures of these settings."""
        self.runs += settings.images
        run: Run = self._model.generate(settings, tape, lambda n=1, note="": self.advance(n * settings.images))
        return replace(run, model=self)

    def generate_many(self, many: Sequence[Settings], tape: Any = None, *args: Any, **more: Any) -> list[Run]:
        """Make pictures together; those that were made before are not made again."""
        if tape is not None:
            self.runs += sum(s.images for s in many)
            return [replace(r, model=self) for r in self._model.generate_many(many, tape, *args, **more)]
        missing = list(dict.fromkeys(s for s in many if s not in self._made))
        for settings in (s for s in many if s in self._made):
            self.advance(self._model.calls(settings) * settings.images)
        for i in range(0, len(missing), BATCH):
            batch = missing[i : i + BATCH]
            pictures = sum(s.images for s in batch)
            at_once = min(pictures, BATCH)
            made = self._model.generate_many(batch, advance=lambda n=1, note="", p=at_once: self.advance(n * p))
            self._made |= {s: replace(r, model=self) for s, r in zip(batch, made, strict=True)}
            self.runs += pictures
        return [self._made[s] for s in many]

    def remembered(self, settings: Settings) -> Run | None:
        """The run of these settings if it was made."""
        return self._made.get(settings)
