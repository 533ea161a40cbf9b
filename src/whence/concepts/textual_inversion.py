"""Which word would make this model draw the thing on my pictures?

A new word S* has one vector v in the text encoder's embedding table. It is found by the model's own loss on three to
five pictures x of the thing, with everything else of the model frozen (Gal et al. 2023, section 3, eq. 2):

    v* = argmin over v of  E over z ~ E(x), y, eps ~ N(0, 1), t of  || eps - eps_theta(z_t, t, c_theta(y)) ||^2

where y is one of a few neutral captions that say S* and no more of the picture, c_theta the text encoder, z the latents
and z_t = sqrt(alpha_t) z + sqrt(1 - alpha_t) eps. v begins as the vector of a coarse descriptor, a word of one token.
S* then stands in any prompt as a word does. What the pictures share beside the thing is learned with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.learned_token import Example, Learned, Teaching, learn, start
from ..errors import RunError
from ..method import Card
from ..models.objectives import DiffusionObjective

if TYPE_CHECKING:
    from ..engine.progress import Advance

CARD = Card(
    name="textual_inversion",
    verb="TextualInversion",
    paper="Gal et al., An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion, "
    "ICLR 2023",
    systems=(),
    question="Which word would make this model draw the thing on my pictures?",
    units=("token",),
    works_on=("Stable Diffusion 1 and 2",),
    needs=("cross-attention",),
    cost="steps x batch denoiser rows with gradients; nothing beyond a plain run to use the word",
    claim="Prompts that say the learned word in a new context draw the thing of the pictures, its colour and shape at "
    "once, more often than with a word learned from other pictures.",
    falsifier={
        "trial": "shapes.concepts.inverted",
        "planted": "a colour and a shape that four drawn pictures share and no caption says",
        "expect": 0.3,
        "control": "a random vector of equal norm, the word it began with, the word learned from other pictures",
        "seconds": 150,
    },
    departs="Adam with a rate that falls along a cosine, some tens of steps instead of 5,000; timesteps from the "
    "noisier part of the schedule, as what a nearly clean picture shows needs no word; any prediction type.",
    avoid="Pictures with one background: the word learns it too. A thing that the model cannot draw with other words.",
)


@dataclass(frozen=True)
class TextualInversion:
    """Settings. ``word``: S*; ``initial``: the coarse descriptor; ``templates``: captions, "{}" where S* stands;
    ``steps``, ``batch``, ``rate``, ``span``, ``seed``: of the learning (`engine/learned_token.py`)."""

    word: str = "sks1"
    initial: str = "square"
    templates: tuple[str, ...] = ("a {}",)
    steps: int = 60
    batch: int = 4
    rate: float = 0.01
    span: tuple[float, float] = (0.3, 1.0)
    seed: int = 0

    def fit(
        self, model: Any, pictures: Sequence[Any], path: Path | None = None, advance: Advance | None = None
    ) -> Learned:
        """Learn S* from pictures of one thing, uint8 [y, x, rgb], or latents [channel, y, x].

        ``path``: a safetensors file that a stopped training goes on from. Raises RunError for no pictures or templates
        without a place for the word, PromptError for words that cannot be learned or begun with, ModelError for a model
        that takes more than a prompt and a time.
        """
        if not pictures or not self.templates or any("{}" not in t for t in self.templates):
            found = f"{len(pictures)} pictures, captions {self.templates}"
            raise RunError(f"learn {self.word!r}", found, 'pictures, and captions as "a {}"')
        objective = DiffusionObjective(model)
        z = [objective.latents(p) for p in pictures]
        examples = [Example(y.format(self.word), x) for y in self.templates for x in z]
        teaching = Teaching(self.steps, self.batch, self.rate, self.span, self.seed)
        v = {self.word: start(model, self.initial)}
        return learn(model, objective, v, examples, teaching, settings=asdict(self), path=path, advance=advance)
