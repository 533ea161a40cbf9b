"""Run: what was made, with all that is needed to make it again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .units import Units


@dataclass(frozen=True)
class Settings:
    """How a picture was asked for. ``guidance`` is the classifier-free guidance scale (1: off); sizes in pixels."""

    prompt: str
    seed: int
    steps: int
    guidance: float
    height: int
    width: int
    negative_prompt: str = ""
    images: int = 1


class PictureModel(Protocol):
    """What a text-to-image adapter offers. Written by `models/`, held by a Run, used by methods and checks."""

    @property
    def name(self) -> str:
        """What a person calls the model."""

    @property
    def family(self) -> str:
        """Its kind, such as "Stable Diffusion"."""

    @property
    def fingerprint(self) -> str:
        """Hash of configuration and weights."""

    def words(self, prompt: str) -> Units:
        """The words of a prompt with the token positions of each text encoder. Raises PromptError if words are cut."""

    def generate(self, settings: Settings, tape: Any = None) -> Run:
        """Make the pictures of these settings, under a tape (an observer of `engine/`) if one is given."""

    def alternatives(self, prompt: str, word: int) -> tuple[str, ...]:
        """In-distribution words that can stand in the place of word number ``word``; empty if none is known."""


@dataclass(frozen=True)
class Run:
    """One generation.

    ``images``: uint8 [image, y, x, rgb]. ``latents``: float32 [image, channel, y, x], the last ones before decoding.
    ``model`` is the live adapter that made it; it is not part of the record and not compared.
    """

    settings: Settings
    images: NDArray[np.uint8]
    latents: NDArray[np.float32]
    words: Units
    model_name: str
    family: str
    fingerprint: str
    scheduler: str
    versions: dict[str, str]
    model: PictureModel | None = field(default=None, repr=False, compare=False)

    def again(self, **changes: Any) -> Run:
        """Run the same model with some settings changed: ``run.again(prompt=..., seed=...)``; with none, replay it."""
        if self.model is None:
            from .errors import RunError

            raise RunError("run again", "this Run has no live model", "load the model and generate")
        return self.model.generate(replace(self.settings, **changes))

    def replays(self) -> bool:
        """Make it again and tell whether every latent and pixel has the same bits."""
        other = self.again()
        return bool((other.latents == self.latents).all() and (other.images == self.images).all())

    def must_match(self, replay: Run) -> None:
        """Raise WrongMapError if ``replay`` shows another picture: a map of it would not be this run's.

        A run made in a batch replays up to rounding, so pixels may be 2 of 255 levels apart.
        """
        apart = int(abs(replay.images.astype(int) - self.images.astype(int)).max())
        if apart > 2:
            from .errors import WrongMapError

            raise WrongMapError(
                "maps of this run",
                f"its replay gave another picture (pixels up to {apart} of 255 apart)",
                "a run made by this model, unchanged since",
            )

    def record(self) -> dict[str, Any]:
        """The JSON record, without pixels."""
        from dataclasses import asdict

        return {
            "model": self.model_name,
            "family": self.family,
            "fingerprint": self.fingerprint,
            "scheduler": self.scheduler,
            "settings": asdict(self.settings),
            "words": list(self.words.labels),
            "versions": dict(self.versions),
        }

    def _repr_html_(self) -> str:
        from .report.fragments import run_html

        return run_html(self)

    def __str__(self) -> str:
        s = self.settings
        return (
            f"{s.images} picture(s) {s.width}x{s.height} of {s.prompt!r} by {self.model_name} ({self.family}), "
            f"seed {s.seed}, {s.steps} steps, guidance {s.guidance:g}, {self.scheduler.partition(' ')[0]}"
        )
