"""Words that a text-to-image model is taught from pictures: one vector each, everything else held still.

    v* = argmin over v of  E over t, eps of  || m * (s(x_t, t, c(v)) - s*) ||^2 / mean(m),   x_t = a_t x_0 + b_t eps

s is what the denoiser says and s* what it should say (eps, v or x_0, as its scheduler has it), c the text encoder's
states of a caption with the new words in it, m a mask on the picture (1 where none is given).

The words are put in from outside, and not as new rows of the embedding table: a copy of the tokenizer knows them, and
hooks on the embedding layer give their vectors. So the table, the tokenizer and the model's fingerprint are untouched
while a word is on, and taking it off is exact because there is nothing to restore but a reference. A saved file is a
plain safetensors file {word: vector}, which `load_textual_inversion` of diffusers reads too.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import ModelError, OutputError, PromptError, RunError
from .attention import AttentionTape, LayerMaps
from .capture import Plan
from .descent import cosine, descend
from .progress import Advance
from .prompts import split_words
from .randomness import seed_of, stream, torch_stream

if TYPE_CHECKING:
    from numpy.typing import NDArray

Penalty = Callable[[Mapping[str, Tensor], Sequence["Example"], Sequence[Sequence[LayerMaps]]], Tensor]
"""``penalty(vectors, examples, maps)``: a further loss of one step. ``maps[example]``: cross-attention of its caption's
words, one entry for each grid, with gradients; empty unless the training looks at attention."""


@dataclass(frozen=True)
class Example:
    """A caption with new words, the picture it says, latents [channel, y, x], and where the loss counts, [y, x] 0..1
    (None: everywhere)."""

    caption: str
    latents: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class Teaching:
    """How words are learned: Adam steps of ``batch`` examples, at a ``rate`` that falls to a tenth along a cosine, with
    timesteps drawn from ``span`` of the schedule, from clean (0) to noise (1), with a density that goes as
    1 - ``tilt`` cos(pi t): uniform at 0, noisier ones more often up to 1."""

    steps: int = 60
    batch: int = 4
    rate: float = 0.01
    span: tuple[float, float] = (0.3, 1.0)
    seed: int = 0
    tilt: float = 0.0


@dataclass(frozen=True)
class Learned:
    """Learned words: ``vectors[word]``, [width]. Belongs to the model with this ``fingerprint``."""

    vectors: Mapping[str, Tensor]
    fingerprint: str
    model_name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    losses: tuple[float, ...] = ()
    seconds: float = 0.0

    @contextmanager
    def on(self, model: Any) -> Iterator[Any]:
        """The model with these words while inside, and exactly as it was behind it. Raises ModelError for another model
        than the one they were learned on, PromptError for a word that it knows already."""
        if model.fingerprint != self.fingerprint:
            raise ModelError(
                f"the words {', '.join(self.vectors)} on {model.name}", f"they were learned on {self.model_name} "
                f"({self.fingerprint}), this is {model.fingerprint}", "the model they were learned on, unchanged",
            )  # fmt: skip
        with spoken(model, self.vectors):
            yield model

    def random(self, key: object = 0) -> Learned:
        """The same words with random vectors of the same norms."""
        own = self.vectors
        drawn = {w: torch.randn(v.shape, generator=torch_stream("random word", key, w)).to(v) for w, v in own.items()}
        vectors = {w: d * (own[w].norm() / d.norm()) for w, d in drawn.items()}
        return replace(self, vectors=vectors, settings={**self.settings, "random": str(key)}, losses=(), seconds=0.0)

    def only(self, *words: str) -> Learned:
        """Some of the words. Raises PromptError for one that is not among them."""
        if unknown := [w for w in words if w not in self.vectors]:
            raise PromptError(f"the learned word {unknown[0]!r}", "no such word", ", ".join(self.vectors))
        return replace(self, vectors={w: self.vectors[w] for w in words})

    def save(self, path: Path) -> Path:
        """Write a safetensors file, whole or not at all. Raises OutputError."""
        about = {"fingerprint": self.fingerprint, "model_name": self.model_name, "settings": dict(self.settings)}
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {w: v.detach().contiguous().cpu() for w, v in self.vectors.items()}
            save_file(tensors, part, {"whence": json.dumps(about)})
            os.replace(part, path)
        except OSError as error:
            raise OutputError(f"learned words in {path}", error.strerror or str(error), "a folder of yours") from None
        finally:
            with suppress(OSError):
                part.unlink()
        return path

    @classmethod
    def load(cls, path: Path) -> Learned:
        """Read what :meth:`save` wrote. Raises RunError where the file is none of these."""
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["whence"])
                vectors = {word: file.get_tensor(word) for word in file.keys()}  # noqa: SIM118, it is no mapping
            return cls(vectors, about["fingerprint"], about["model_name"], about["settings"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise RunError(
                f"learned words in {path}", f"cannot be read: {error}", "a file that Learned.save wrote"
            ) from None


@contextmanager
def spoken(model: Any, vectors: Mapping[str, Tensor]) -> Iterator[None]:
    """The model reads these words, whatever model they are of. Raises PromptError for a word that it knows already, or
    that is no word; ModelError for a model with several text encoders."""
    pipeline = model.pipeline
    encoder, tokenizer, lexicon = getattr(pipeline, "text_encoder", None), pipeline.tokenizer, model.lexicon
    if encoder is None or getattr(pipeline, "text_encoder_2", None) is not None:
        raise ModelError(f"learned words on {model.name}", "it has not just one text encoder", "Stable Diffusion 1, 2")
    table = encoder.get_input_embeddings()
    _check(model, vectors, table.weight.shape[1])
    fresh = copy.deepcopy(tokenizer)
    added = type(next(iter(tokenizer.added_tokens_decoder.values())))  # of a library that only models/ may import
    fresh.add_tokens([added(word, single_word=True) for word in vectors])
    own = {fresh.convert_tokens_to_ids(word): word for word in vectors}
    asked: list[Tensor] = []

    def known(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        asked[:] = [args[0]]
        ids = args[0]
        for number in own:
            ids = torch.where(ids == number, torch.zeros_like(ids), ids)
        return (ids, *args[1:])

    def give(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        for number, word in own.items():
            here = (asked[0] == number)[..., None]
            out = torch.where(here, vectors[word].to(out), out) if bool(here.any()) else out
        return out

    with ExitStack() as stack:
        stack.callback(setattr, pipeline, "tokenizer", tokenizer)
        stack.callback(setattr, model, "lexicon", lexicon)
        # The later of two sets of words is asked first, so that each sees the numbers that it added itself.
        stack.callback(table.register_forward_pre_hook(known, prepend=True).remove)
        stack.callback(table.register_forward_hook(give).remove)
        pipeline.tokenizer = fresh
        if lexicon is not None:
            model.lexicon = replace(lexicon, words=lexicon.words | set(vectors))
        yield


def _check(model: Any, vectors: Mapping[str, Tensor], width: int) -> None:
    for word, vector in vectors.items():
        if split_words(word) != (word,) or word != word.lower():
            raise PromptError(
                f"the new word {word!r}", "no single word in small letters", "letters and digits, as sks1"
            )
        pieces = model.pipeline.tokenizer.tokenize(word)
        if len(pieces) < 2 or (model.lexicon and word in model.lexicon.words):
            raise PromptError(f"the new word {word!r}", "the model knows it already", "a word of your own, as sks1")
        if tuple(vector.shape) != (width,):
            found = f"a vector of shape {tuple(vector.shape)}"
            raise ModelError(f"the word {word!r} on {model.name}", found, f"a model with vectors of {vector.numel()}")


def start(model: Any, word: str) -> Tensor:
    """The vector, [width], of a word that the model knows as one token. Raises PromptError for another."""
    ids = model.pipeline.tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise PromptError(f"to begin with the vector of {word!r}", f"{len(ids)} tokens", "a word of one token")
    return model.pipeline.text_encoder.get_input_embeddings().weight[ids[0]].detach().clone()  # type: ignore[no-any-return]


def learn(
    model: Any,
    objective: Any,
    vectors: Mapping[str, Tensor],
    examples: Sequence[Example],
    teaching: Teaching,
    *,
    penalty: Penalty | None = None,
    attention: bool = False,
    mapper: nn.Module | None = None,
    settings: Mapping[str, Any] | None = None,
    path: Path | None = None,
    advance: Advance | None = None,
) -> Learned:
    """Learn words from examples, from the vectors they begin with.

    ``objective``: the model's denoising loss (`models/objectives.py`); ``attention``: record the words' maps for the
    penalty; ``mapper``: a module that gives the vectors of further words, {word: vector}, and is trained with them;
    ``path``: a safetensors file that a stopped training goes on from. Deterministic by ``teaching.seed``. Raises
    RunError where there is nothing to learn, or ``path`` is of another training.
    """
    missing = [w for w in vectors if not any(w in split_words(e.caption) for e in examples)]
    if not examples or not vectors or missing or teaching.steps < 1 or teaching.batch < 1:
        found = f"{len(examples)} pictures, {teaching.steps} steps"
        found += f", no caption says {', '.join(missing)}" if missing else ""
        raise RunError(f"learn {', '.join(vectors) or 'no word'}", found, "pictures captioned with every new word")
    v = {w: nn.Parameter(x.detach().clone().float()) for w, x in vectors.items()}
    inner = dict(mapper.named_parameters(prefix="mapper")) if mapper else {}
    taught = {**v, **inner}
    sums = [float(e.latents.double().sum()) + (0 if e.mask is None else float(e.mask.double().sum())) for e in examples]
    begins = [float(x.double().sum()) for x in (*vectors.values(), *(p.detach() for p in inner.values()))]
    captions = [e.caption for e in examples]
    about = seed_of("learned token", teaching, dict(settings or {}), model.fingerprint, captions, sums, begins)
    frozen = [(p, p.requires_grad) for m in (objective.module, model.pipeline.text_encoder) for p in m.parameters()]
    fingerprint = model.fingerprint
    began = time.perf_counter()
    try:
        for p, _ in frozen:
            p.requires_grad_(False)
        said: dict[str, Tensor] = {**v, **(mapper() if mapper else {})}

        def loss(step: int) -> Tensor:
            said.update(mapper() if mapper else {})
            return _loss(model, objective, said, examples, teaching, step, penalty, attention)

        rate = cosine(teaching.rate, teaching.steps)
        with spoken(model, said):
            losses = descend(taught, loss, teaching.steps, rate, about, still=True, path=path, advance=advance)
    finally:
        for p, before in frozen:
            p.requires_grad_(before)
    end = {w: x.detach().clone() for w, x in {**v, **(mapper() if mapper else {})}.items()}
    return Learned(end, fingerprint, model.name, dict(settings or {}), tuple(losses), time.perf_counter() - began)


def noised(
    objective: Any, examples: Sequence[Example], teaching: Teaching, step: int
) -> tuple[list[Example], Tensor, Tensor, Tensor]:
    """The examples of a step, their noised latents x_t, their timesteps and what the denoiser should say of each."""
    rng = stream("learned token", teaching.seed, step)
    # No example twice before all others came once.
    rounds = [rng.permutation(len(examples)) for _ in range(-(-teaching.batch // len(examples)))]
    batch = [examples[i] for order in rounds for i in order][: teaching.batch]
    total = len(objective.alphas)
    t = torch.from_numpy(_times(teaching, rng.random(len(batch))) * total).long().clamp(max=total - 1)
    x0 = torch.stack([e.latents for e in batch])
    noise = torch.randn(x0.shape, generator=torch_stream("learned token", teaching.seed, step)).to(x0)
    alpha = objective.alphas[t].to(x0).view(-1, 1, 1, 1)
    a, b = alpha.sqrt(), (1 - alpha).sqrt()
    want = {"epsilon": noise, "v_prediction": a * noise - b * x0, "sample": x0}[objective.kind]
    return batch, a * x0 + b * noise, t.to(x0.device), want


def _times(teaching: Teaching, u: NDArray[np.float64]) -> NDArray[np.float64]:
    """Timesteps, of the schedule, for uniform numbers 0..1."""
    low, high = teaching.span
    if not teaching.tilt:
        return low + (high - low) * u
    t = np.linspace(low, high, 1001)
    mass = t - teaching.tilt * np.sin(np.pi * t) / np.pi
    return np.asarray(np.interp(mass[0] + u * (mass[-1] - mass[0]), mass, t))


def error_of(said: Tensor, want: Tensor, batch: Sequence[Example]) -> Tensor:
    """The squared error of what the denoiser said, where each example's mask has it count."""
    error = ((said - want) ** 2).mean(1)
    if any(e.mask is not None for e in batch):
        ones = torch.ones(error.shape[1:])
        mask = torch.stack([ones if e.mask is None else e.mask.float() for e in batch]).to(error)
        error = error * mask / mask.mean((1, 2), keepdim=True).clamp(min=1e-6)
    return error.mean()


def _loss(
    model: Any, objective: Any, v: Mapping[str, Tensor], examples: Sequence[Example], teaching: Teaching, step: int,
    penalty: Penalty | None, attention: bool,
) -> Tensor:  # fmt: skip
    batch, x_t, t, want = noised(objective, examples, teaching, step)
    captions = list(dict.fromkeys(e.caption for e in batch))
    rows = [captions.index(e.caption) for e in batch]
    condition = model.encode(captions, "", False).condition[rows]

    def call() -> Tensor:
        said: Tensor = objective.module(x_t, t, encoder_hidden_states=condition)[0]
        return said

    maps: list[list[LayerMaps]] = []
    if attention:
        scale = model.pipeline.vae_scale_factor
        layers = model.layers(x_t.shape[2] * scale, x_t.shape[3] * scale)
        places = tuple(model.columns(model.words(e.caption)) for e in batch)
        tape = AttentionTape(mode="grad")
        with tape.on(Plan(objective.module, layers, condition, places, 1)):
            said = call()
        maps = [tape.layers(i) for i in range(len(batch))]
    else:
        said = call()
    loss = error_of(said, want, batch)
    return loss if penalty is None else loss + penalty(v, batch, maps)
