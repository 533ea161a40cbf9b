"""The words world: which word of the prompt drew the mark, asked of the embedded picture model.

Units are the words that have an alternative in the world; articles and "of" are no candidates. The outcome is read from
the picture by the oracle, at one and the same seed. `single`: one of two twin words draws the mark. `and`: one of two
pairs draws the frame, both of its words together. The sibling is the model with the embedding rows of the twins (and of
the pairs) exchanged, so that every word has the other's role exactly. Of the nulls one has the idle words' rows in
their place, so that nothing draws anything, and one has a denoiser that never learned. There is one model for all keys:
a key draws prompt, seed and roles. A question costs pictures, not microseconds: few draws per re-rendering.

"no" before a twin stops it, but with both twins behind a "no" of their own the model does not keep them apart: in none
of five tries did taking one "no" away bring back the mark of the twin that it stood before. So there is no
`suppression`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ...engine.prompts import replace_word, split_words
from ...engine.randomness import seed_of, stream
from ...errors import RunError
from ...units import Units
from ..ground import Draw, Planted, trouble
from . import oracle
from .scenes import COLOURS, KEY, PAIRS, SHAPES, TWINS, WORDS, framing_pair, marking_word
from .trials import settings_of
from .vocabulary import alternatives

if TYPE_CHECKING:
    from numpy.typing import NDArray

BATCH = 16
TRIES = 12
"""Prompts tried for a certified question before the world gives up."""


@lru_cache(maxsize=8)
def _model(rows: tuple[tuple[str, str], ...], untrained: bool = False) -> Any:
    """The embedded model with these words' embedding rows replaced: (word, whose row it gets); or one whose denoiser
    never learned."""
    import torch

    from ...models.loading import load
    from ...models.small_stable_diffusion import build_pipeline
    from . import model_directory

    adapter = load(model_directory())
    tokenizer = adapter.pipeline.tokenizer
    table = adapter.pipeline.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        was = table.clone()
        for word, other in rows:
            table[tokenizer(word).input_ids[1]] = was[tokenizer(other).input_ids[1]]
    if untrained:
        adapter.pipeline.unet.load_state_dict(build_pipeline(WORDS, seed=1).unet.state_dict())
    adapter.name = "shapes, untrained" if untrained else "shapes, roles changed" if rows else "shapes"
    return adapter


def _exchanged(*pairs: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((a, b) for x, y in pairs for a, b in ((x, y), (y, x)))


@dataclass(eq=False)
class PictureQuestion:
    """One prompt at one seed: is the mark (or the frame) there, as it was? Satisfies :class:`ground.Oracle`."""

    prompt: str
    seed: int
    part: str
    rows: tuple[tuple[str, str], ...]
    untrained: bool = False
    repeats: int = 4

    def __post_init__(self) -> None:
        self._asked, self._purpose = 0, ""
        self._known: dict[str, bool] = {}

    capabilities = frozenset({"ask"})

    @property
    def readout(self) -> str:
        """What is asked."""
        return f"1 if the {self.part} is there or missing as in the observed picture, else 0"

    @cached_property
    def _places(self) -> tuple[int, ...]:
        return tuple(i for i, word in enumerate(split_words(self.prompt)) if self._others(word))

    def _others(self, word: str) -> tuple[str, ...]:
        # A pair's word must not bring in the other pair's partner, which stands in the same prompt.
        idle = TWINS if self.part == "frame" else PAIRS[0] + PAIRS[1]
        return idle if word in (*TWINS, *PAIRS[0], *PAIRS[1]) else alternatives(word)

    @cached_property
    def units(self) -> Units:
        """The words that have an alternative."""
        words = split_words(self.prompt)
        names = tuple(words[i] for i in self._places)
        occurrence = tuple(names[: i + 1].count(name) for i, name in enumerate(names))
        return Units("word", names, tuple(((i,),) for i in self._places), occurrence)

    @cached_property
    def _observed(self) -> bool:
        return self._read([self.prompt])[0]

    def _read(self, prompts: list[str]) -> list[bool]:
        model = _model(self.rows, self.untrained)
        new = list(dict.fromkeys(p for p in prompts if p not in self._known))
        for i in range(0, len(new), BATCH):
            batch = new[i : i + BATCH]
            for prompt, run in zip(batch, model.generate_many([settings_of(p, self.seed) for p in batch]), strict=True):
                seen = oracle.read(run.images[0])
                self._known[prompt] = seen.frame if self.part == "frame" else seen.mark is not None
        return [self._known[p] for p in prompts]

    def _value(self, prompts: list[str]) -> NDArray[np.float64]:
        return np.array([float(found == self._observed) for found in self._read(prompts)])

    def _redrawn(self, keep: NDArray[np.bool_], rng: np.random.Generator) -> str:
        """The prompt with each word that is not kept drawn anew: half of the time itself, else one of its class."""
        prompt, words = self.prompt, split_words(self.prompt)
        for kept, place in zip(keep, self._places, strict=True):
            others = self._others(words[place])
            if not kept and rng.random() < 0.5:
                prompt = replace_word(prompt, place, others[rng.integers(len(others))])
        return prompt

    def restart(self, purpose: str) -> None:
        """See :func:`whence.worlds.ground.restart`."""
        self._asked, self._purpose = 0, purpose

    def ask(self, keep: NDArray[np.bool_]) -> NDArray[np.float64]:
        """See :meth:`whence.question.Question.ask`."""
        rng = stream("words", self.prompt, self.seed, self._purpose, self._asked)
        self._asked += len(keep)
        return self._value([self._redrawn(row, rng) for row in keep])

    def swap(self, which: NDArray[np.bool_]) -> NDArray[np.float64]:
        """See :meth:`whence.worlds.ground.Oracle.swap`: the words become others of their class, always the same."""
        words, prompts = split_words(self.prompt), []
        for row in which:
            prompt = self.prompt
            for out, place in zip(row, self._places, strict=True):
                if out:
                    others = self._others(words[place])
                    prompt = replace_word(prompt, place, others[seed_of(self.prompt, place) % len(others)])
            prompts.append(prompt)
        return self._value(prompts)


@dataclass(frozen=True)
class Words:
    """The world. Slow: a question costs pictures."""

    name: str = "words"
    structures: tuple[str, ...] = ("single", "and")

    def draw(self, key: str) -> Draw:
        """One certified question for each structure. Raises RunError where the model obeys too rarely."""
        return Draw(self.name, key, tuple(self._planted(key, s) for s in self.structures))

    def _planted(self, key: str, structure: str) -> Planted:
        why = ""
        for attempt in range(TRIES):
            planted = _propose(key, structure, attempt)
            why = trouble(planted)
            if not why:
                return planted
        raise RunError(
            f"a {structure} question of the words world, key {key!r}",
            f"none of {TRIES} prompts is certified; the last: {why}",
            "a better trained model",
        )


def _propose(key: str, structure: str, attempt: int) -> Planted:
    rng = stream("words", key, structure, attempt)
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    body = f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"
    real: tuple[str, ...]
    decoy: tuple[str, ...]
    if structure == "and":
        real, decoy = framing_pair(KEY), _idle_pair()
        part, idle = "frame", next(w for w in TWINS if w != marking_word(KEY))
    else:
        real = (marking_word(KEY),)
        decoy = tuple(w for w in TWINS if w not in real)
        part, idle = "mark", _idle_pair()[0]
    roles = _exchanged(*zip(real, decoy, strict=True))
    null = tuple((w, idle) for w in (*real, *decoy))
    arms = [real, decoy] if rng.integers(2) else [decoy, real]
    fillers = " ".join(w for arm in arms for w in arm)
    prompt = f"{fillers} {body}" if rng.integers(2) else f"{body} {fillers}"
    seed = int(rng.integers(2**31))
    # The key's coin: is it the shipped model that is asked first, or the one with its roles changed?
    rows: tuple[tuple[tuple[str, str], ...], ...] = ((), roles)
    first, second = rows if rng.integers(2) else rows[::-1]
    question = PictureQuestion(prompt, seed, part, first)
    acting, idling = (real, decoy) if not first else (decoy, real)

    return Planted(
        name=f"words/{key}/{structure}/{attempt}",
        structure=structure,
        question=question,
        arm=tuple(map(question.units.find, acting)),
        twin=tuple(map(question.units.find, idling)),
        sibling=PictureQuestion(prompt, seed, part, second),
        nulls=(PictureQuestion(prompt, seed, part, null), PictureQuestion(prompt, seed, part, (), untrained=True)),
    )


def _idle_pair() -> tuple[str, str]:
    return next(p for p in PAIRS if p != framing_pair(KEY))


WORLD = Words()
