"""What all text-to-image adapters share: from Settings to a Run that replays bit for bit, one batch at a time.

A family adds its encoders, its layers over text, its call and its decoding. Noise is drawn on the CPU, one generator
for each picture: picture 0 of a run has the run's seed, as a plain call of the pipeline has; picture i the named
stream ("picture", seed, i).
"""

from __future__ import annotations

import hashlib
import json
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..engine.capture import Layer, Plan, Recorder
from ..engine.progress import Advance
from ..engine.randomness import seed_of
from ..errors import PromptError, RunError
from ..run import Run, Settings
from ..units import Units
from .kernels import refuse_caches, through_dispatcher, without_array_warning
from .moments import Moment, stop_at
from .steering import Steer, steered
from .words import Encoder, align, columns

_WHOLE = 256 * 2**20


@dataclass(frozen=True)
class Lexicon:
    """What a model that knows few words says about them: ``words.json`` in its directory.

    ``words``: all that it knows. ``alternatives[word]``: words that can stand in its place. ``defaults``: steps and
    guidance.
    """

    words: frozenset[str]
    alternatives: dict[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompted:
    """Encoded prompts, one row for each picture.

    ``condition`` [image, token, feature]: what the denoiser attends to. ``inputs``: the pipeline's arguments that
    carry the embeddings, ``condition`` included.
    """

    condition: Tensor
    inputs: dict[str, Any]

    def of(self, rows: Sequence[int]) -> Prompted:
        """These rows, in this order."""
        inputs = {k: v[list(rows)] if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        return Prompted(self.condition[list(rows)], inputs)


class Pictures(ABC):
    """A text-to-image pipeline as a `PictureModel`. Subclasses are the families.

    The pipeline's modules are put into evaluation mode: dropout would make every run another.
    """

    family: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    capabilities: frozenset[str]
    steps: int
    guidance: float

    def __init__(self, pipeline: Any, name: str | None = None, lexicon: Lexicon | None = None) -> None:
        self.pipeline, self.lexicon = pipeline, lexicon
        self.name = name or str(pipeline.config.get("_name_or_path") or type(pipeline).__name__)
        for module in self._modules().values():
            module.eval()
        defaults = lexicon.defaults if lexicon else {}
        self.steps = int(defaults.get("steps", self.steps))
        self.guidance = float(defaults.get("guidance", self.guidance))
        self._fingerprint: tuple[Any, str] | None = None

    # What a family says -------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def denoiser(self) -> Any:
        """The network that is called once for each step."""

    @abstractmethod
    def encoders(self) -> tuple[Encoder, ...]:
        """The text encoders whose tokens the denoiser attends to."""

    @abstractmethod
    def layers(self, height: int, width: int) -> tuple[Layer, ...]:
        """The attentions over text for a picture of this size in pixels."""

    @abstractmethod
    def encode(self, prompts: list[str], negative: str, guided: bool) -> Prompted:
        """Encodes prompts, [prompt, token, feature]."""

    def unpack(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Final latents as [image, channel, y, x]."""
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels -1..1 [image, rgb, y, x] of unpacked latents."""
        vae = self.pipeline.vae
        return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]  # type: ignore[no-any-return]

    def guided(self, settings: Settings) -> bool:
        """Whether the run has unconditional rows (classifier-free guidance)."""
        return settings.guidance > 1

    def arguments(self, settings: Settings) -> dict[str, Any]:
        """Further arguments of the pipeline's call."""
        return {}

    @property
    def multiple(self) -> int:
        """Heights and widths are multiples of this many pixels."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        size = self.denoiser.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.pipeline.vae_scale_factor, width * self.pipeline.vae_scale_factor

    # Words --------------------------------------------------------------------------------------------------------

    def words(self, prompt: str) -> Units:
        """The prompt's words; ``members[word][encoder]`` as in `words.py`. Raises PromptError (see ``align``)."""
        units = align(prompt, self.encoders(), self.lexicon.words if self.lexicon else None)
        convert = getattr(self.pipeline, "maybe_convert_prompt", None)
        tokenizer = getattr(self.pipeline, "tokenizer", None)
        if convert and tokenizer is not None and convert(prompt, tokenizer) != prompt:
            raise PromptError(
                f"the prompt {prompt!r}", "it has a learned word of several vectors", "learned words of one vector"
            )
        return units

    def columns(self, words: Units) -> tuple[tuple[int, ...], ...]:
        """Each word's places on the attention's text axis."""
        return columns(words, self.encoders())

    def alternatives(self, prompt: str, word: int) -> tuple[str, ...]:
        """In-distribution words that can stand in the place of word number ``word``; empty if none is known."""
        name = self.words(prompt).names[word].lower()
        known = self.lexicon.alternatives.get(name, ()) if self.lexicon else ()
        return tuple(w for w in known if w != name)

    # Pictures -----------------------------------------------------------------------------------------------------

    def picture(
        self,
        prompt: str,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        images: int = 1,
        tape: Recorder | None = None,
        advance: Advance | None = None,
    ) -> Run:
        """Make pictures; what is not said has the family's default."""
        tall, wide = self.default_size
        settings = Settings(
            prompt,
            seed,
            self.steps if steps is None else steps,
            self.guidance if guidance is None else guidance,
            height or tall,
            width or wide,
            negative_prompt,
            images,
        )
        return self.generate(settings, tape, advance)

    def generate(self, settings: Settings, tape: Recorder | None = None, advance: Advance | None = None) -> Run:
        """Make the pictures of these settings; ``advance`` is told of each denoiser pass."""
        return self.generate_many([settings], tape, advance=advance)[0]

    def generate_many(
        self,
        many: Sequence[Settings],
        tape: Recorder | None = None,
        batch: int = 16,
        advance: Advance | None = None,
        steer: Steer | None = None,
    ) -> list[Run]:
        """Several runs, denoised together in batches of at most ``batch`` pictures: equal to one-by-one up to rounding.

        Runs are batched with those of the same steps, guidance, size and negative prompt. The tape then holds the
        pictures of all runs, in their order. ``steer`` is shown the latents before each pass and may change them
        (`steering.py`). Raises RunError or PromptError before any work.
        """
        if steer is not None and tape is not None:
            found = "the passes that the steer looks at would be recorded with the picture's own"
            raise RunError("a tape over a steered run", found, "one of the two")
        if steer is not None:
            refuse_caches(self.denoiser)
        units = [self.words(s.prompt) for s in many]
        for settings in many:
            self.refuse(settings)
        places = [self.columns(u) for u in units]
        jobs: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
        for r, s in enumerate(many):
            alike = (s.steps, s.guidance, s.height, s.width, s.negative_prompt)
            jobs.setdefault(alike, []).extend((r, i) for i in range(s.images))
        if tape is not None:
            refuse_caches(self.denoiser)
            tape.rewind()
            if len(jobs) > 1:
                differ = "their steps, guidance, sizes or negative prompts differ"
                raise RunError("one tape over several runs", differ, "a tape each")
            layers = self.layers(many[0].height, many[0].width)
            images = sum(s.images for s in many)
            tape.check(layers, max(map(len, units)), images, self.calls(many[0]))
        latents: dict[tuple[int, int], NDArray[np.float32]] = {}
        pixels: dict[tuple[int, int], NDArray[np.uint8]] = {}
        for job in jobs.values():
            for start in range(0, len(job), batch):
                part = job[start : start + batch]
                made = self._batch([(many[r], i) for r, i in part], [places[r] for r, _ in part], tape, advance, steer)
                for key, one in zip(part, made, strict=True):
                    latents[key] = one.float().cpu().numpy()
                    pixels[key] = self._pixels(one[None])
        return [
            Run(
                settings,
                np.stack([pixels[r, i] for i in range(settings.images)]),
                np.stack([latents[r, i] for i in range(settings.images)]),
                units[r],
                self.name,
                self.family,
                self.fingerprint,
                self._scheduler(),
                _versions(),
                self,
            )
            for r, settings in enumerate(many)
        ]

    def moment(self, settings: Settings, step: int = 0) -> Moment:
        """Denoiser pass number ``step`` of a run, held still (see `moments.py`)."""
        if not 0 <= step < self.calls(settings):
            raise RunError(f"pass {step}", f"the run has {self.calls(settings)}", "a pass from 0")
        words = self.words(settings.prompt)
        self.refuse(settings)
        with torch.no_grad():
            prompted = self._prompted([settings] * settings.images)

        def run() -> None:
            self._batch([(settings, i) for i in range(settings.images)], [], None, None)

        args, kwargs = stop_at(self.denoiser, step, run)
        layers = self.layers(settings.height, settings.width)
        return Moment.of(self.denoiser, args, kwargs, prompted.condition, layers, self.columns(words))

    def _batch(
        self,
        pictures: list[tuple[Settings, int]],
        places: list[tuple[tuple[int, ...], ...]],
        tape: Recorder | None,
        advance: Advance | None,
        steer: Steer | None = None,
    ) -> Tensor:
        settings = pictures[0][0]
        with torch.no_grad(), _quiet(self.pipeline), _own_randomness(settings.seed):
            prompted = self._prompted([s for s, _ in pictures])
            watched = nullcontext() if tape is None else self.watch(tape, prompted, places, settings)
            shown = nullcontext() if steer is None else self._shown(steer, prompted, places, [s for s, _ in pictures])
            with watched, shown, _told(self.denoiser, advance):
                latents = self.pipeline(
                    **prompted.inputs,
                    **self.arguments(settings),
                    num_inference_steps=settings.steps,
                    guidance_scale=settings.guidance,
                    height=settings.height,
                    width=settings.width,
                    generator=[noise_generator(s.seed, i) for s, i in pictures],
                    output_type="latent",
                    return_dict=False,
                )[0]
            return self.unpack(latents, settings.height, settings.width)

    def _prompted(self, pictures: list[Settings]) -> Prompted:
        prompts = list(dict.fromkeys(s.prompt for s in pictures))  # each prompt is encoded once
        settings = pictures[0]
        with torch.no_grad():
            encoded = self.encode(prompts, settings.negative_prompt, self.guided(settings))
        return encoded.of([prompts.index(s.prompt) for s in pictures])

    @contextmanager
    def watch(
        self,
        tape: Recorder,
        prompted: Prompted,
        places: Sequence[tuple[tuple[int, ...], ...]],
        settings: Settings,
    ) -> Iterator[None]:
        """Puts the tape on the denoiser for one batch."""
        layers = self.layers(settings.height, settings.width)
        plan = Plan(self.denoiser, layers, prompted.condition, tuple(places), self.calls(settings))
        with tape.on(plan) as watch, through_dispatcher(watch):
            yield

    def _shown(
        self, steer: Steer, prompted: Prompted, places: Sequence[tuple[tuple[int, ...], ...]], many: list[Settings]
    ) -> AbstractContextManager[None]:
        settings, prompts = many[0], tuple(s.prompt for s in many)
        layers = self.layers(settings.height, settings.width)

        def of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Moment:
            return Moment.of(self.denoiser, args, kwargs, prompted.condition, layers, places[0])

        return steered(self.pipeline, self.denoiser, steer, of, prompts, tuple(places), self.calls(settings))

    def _pixels(self, latents: Tensor) -> NDArray[np.uint8]:
        # One picture at a time: memory stays small, and a picture's pixels do not depend on its neighbours.
        with torch.no_grad():
            image = self.pipeline.image_processor.postprocess(self.decode(latents), output_type="np")
        return (image[0] * 255).round().astype(np.uint8)  # type: ignore[no-any-return]

    def calls(self, settings: Settings) -> int:
        """The most denoiser passes that a run can take."""
        return settings.steps * int(getattr(self.pipeline.scheduler, "order", 1))

    def refuse(self, settings: Settings) -> None:
        """Raises RunError for settings that this model cannot serve."""
        size = f"{settings.width}x{settings.height}"
        if settings.steps < 1 or settings.images < 1 or min(settings.height, settings.width) < 1:
            raise RunError(
                f"{settings.images} picture(s) {size} in {settings.steps} steps", "nothing to make", "1 or more of each"
            )
        if settings.height % self.multiple or settings.width % self.multiple:
            raise RunError(
                f"pictures of {size} pixels", f"sizes are multiples of {self.multiple} here",
                f"{_near(settings.width, self.multiple)}x{_near(settings.height, self.multiple)}",
            )  # fmt: skip
        if not 0 <= settings.seed < 2**63:
            raise RunError(f"seed {settings.seed}", "not a seed", "0 to 2^63 - 1")
        if not np.isfinite(settings.guidance):
            raise RunError(f"guidance {settings.guidance}", "not a number", f"{self.guidance:g}")

    # The record ---------------------------------------------------------------------------------------------------

    def _modules(self) -> dict[str, torch.nn.Module]:
        parts = sorted(self.pipeline.components.items())
        return {name: part for name, part in parts if isinstance(part, torch.nn.Module)}

    @property
    def fingerprint(self) -> str:
        """sha256 over the components' configurations and weights, 16 hex digits.

        Weights of up to 256 MB are read whole; of larger models each tensor's name, shape and type and 4,096 of its
        values, evenly spread. Read again when a weight was changed in place or exchanged.
        """
        state = [(n, m.state_dict()) for n, m in self._modules().items()]
        key = tuple((k, t.data_ptr(), t._version) for _, weights in state for k, t in weights.items())
        if self._fingerprint is None or self._fingerprint[0] != key:
            self._fingerprint = (key, self._digest(state))
        return self._fingerprint[1]

    def _digest(self, state: list[tuple[str, dict[str, Tensor]]]) -> str:
        digest = hashlib.sha256()
        for name, part in sorted(self.pipeline.components.items()):
            config = getattr(part, "config", None)
            if config is not None:
                values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
                own = {k: v for k, v in values.items() if not k.startswith("_") and k not in _PASSING}
                digest.update(f"{name} {json.dumps(own, sort_keys=True, default=str)}".encode())
        whole = sum(t.numel() * t.element_size() for _, weights in state for t in weights.values()) <= _WHOLE
        for name, weights in state:
            for key, tensor in weights.items():
                digest.update(f"{name}.{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
                values = tensor.detach().flatten()
                if not whole and len(values) > 4096:
                    values = values[torch.linspace(0, len(values) - 1, 4096, device=values.device).long()]
                digest.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def _scheduler(self) -> str:
        scheduler = self.pipeline.scheduler
        config = {k: v for k, v in dict(scheduler.config).items() if not k.startswith("_")}
        return f"{type(scheduler).__name__} {json.dumps(config, sort_keys=True, default=str)}"


_PASSING = {"transformers_version", "dtype", "torch_dtype", "architectures", "name_or_path"}


def noise_generator(seed: int, image: int) -> torch.Generator:
    """The generator, on the CPU, of picture number ``image`` of a run with this seed."""
    return torch.Generator().manual_seed(seed if image == 0 else seed_of("picture", seed, image))


def _near(size: int, multiple: int) -> int:
    return max(round(size / multiple), 1) * multiple


@cache
def _versions() -> dict[str, str]:
    libraries = {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")}
    return {"python": platform.python_version(), **libraries}


@contextmanager
def _quiet(pipeline: Any) -> Iterator[None]:
    """No progress bar of the pipeline's own while inside, nor numpy's complaint about its scheduler."""
    before = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(disable=True)
    try:
        with without_array_warning():
            yield
    finally:
        pipeline._progress_bar_config = before


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Schedulers that draw from torch's global generator replay too, and leave it as it was."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed_of("scheduler", seed))
        yield


@contextmanager
def _told(module: torch.nn.Module, advance: Callable[..., None] | None) -> Iterator[None]:
    if advance is None:
        yield
        return
    handle = module.register_forward_hook(lambda *_: advance(1))
    try:
        yield
    finally:
        handle.remove()
