"""The scenes that the `shapes` model was trained on, drawn again from their keys: (caption, picture)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...engine.randomness import stream
from . import scenes
from .train import Training


@dataclass(frozen=True)
class Scenes:
    """``every``: one of so many scenes; there are 24,000. Nothing is held in memory."""

    every: int = 1
    settings: Training = field(default_factory=Training)

    def __len__(self) -> int:
        return -(-self.settings.scenes // self.every)

    def scene(self, number: int) -> scenes.Scene:
        """The scene of an example."""
        i, s = number * self.every, self.settings
        kind = scenes.KINDS[i % len(scenes.KINDS)]
        return scenes.draw_scene(stream("shapes", s.seed, "pool", i), kind, key=s.key)

    def __getitem__(self, number: int, /) -> tuple[str, Any]:
        drawn = self.scene(number)
        return drawn.caption, scenes.render(drawn)[0]

    def label(self, number: int) -> str:
        return self.scene(number).caption

    def fingerprint(self) -> str:
        return f"shapes-{self.settings.key}-{self.settings.seed}-{self.settings.scenes}-{self.every}"


def training_set(every: int = 1) -> Scenes:
    """One in ``every`` of the 24,000 scenes."""
    return Scenes(every)
