"""Trains the `shapes` model from nothing: picture codec, then caption reader, then denoiser.

1. *Codec*: the VAE learns to redraw scenes; its posterior's variance is held by a small Kullback-Leibler weight.
2. *Reader*: the text encoder learns to tell, at each noun, what the words so far say of it, at the word that ends a
   relation what its first object is (it stood too early to know its side), and at the end of the caption the whole
   factor table. Then it is frozen, as Stable Diffusion's is. The heads are thrown away; a denoiser's loss alone
   teaches reading ten times more slowly at this size.
3. *Denoiser*: the UNet on the v-prediction loss (Salimans & Ho 2022, eq. 11), captions from easy to hard, 10 % of them
   dropped for classifier-free guidance, exponential moving average of the weights. Two linear heads on its upward
   blocks learn beside it which object each place of the clean picture holds (an auxiliary loss on hidden features, as
   in Yu et al. 2025, with labels instead of another model's features); they too are thrown away. Half of the timesteps
   come from the part of the schedule in which it is decided where which object will be.

Every step draws from a random stream named by (seed, stage, step), so a resumed training goes on exactly as the
uninterrupted one would. Checkpoints are safetensors, written to a temporary name and renamed.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ...engine.progress import progress
from ...engine.randomness import seed_of, stream, torch_stream
from ...engine.training import Trainee, same_settings, save_tensors, steps
from ...errors import RunError
from ...models.small_stable_diffusion import build_pipeline
from . import scenes, vocabulary
from .scenes import BACKGROUNDS, COLOURS, KEY, KINDS, RELATIONS, SHAPES, SIZES, WORDS, Scene

EASY = {"one": 0.55, "two": 0.2, "relation": 0.05, "count": 0.2, "three": 0.0}
FULL = {"one": 0.11, "two": 0.18, "relation": 0.42, "count": 0.24, "three": 0.05}
DECISIVE = (0.65, 1.0)
"""Share of the schedule, from clean to noise, that half of the timesteps are drawn from."""
HELD = 20.0
"""Weight of a reader's squared distance from the states that the denoiser already knows, when a training goes on."""


@dataclass(frozen=True)
class Training:
    """Settings of one training. Steps are optimiser steps; ``checkpoint`` is in seconds.

    ``start``: a trained pipeline's directory whose weights are trained on, without codec steps, with a reader held near
    the states that the denoiser knows, and with captions of the full mixture at once ("": from nothing). ``compile``
    fuses the denoiser's kernels (needs a C++ compiler, and minutes to compile).
    """

    seed: int = 0
    key: str = KEY
    scenes: int = 24_000
    codec_steps: int = 3_000
    codec_batch: int = 16
    reader_steps: int = 1_500
    reader_batch: int = 96
    steps: int = 4_700
    batch: int = 48
    learning_rate: float = 1.5e-3
    object_weight: float = 8.0
    places_weight: float = 0.6
    checkpoint: float = 120.0
    start: str = ""
    compile: bool = False


def train(directory: Path, settings: Training | None = None, log: Any = sys.stderr) -> Path:
    """Train into ``directory`` and return the folder of the finished pipeline, ``directory/pipeline``.

    A directory that holds an unfinished training with the same settings is gone on with.
    """
    s = settings or Training()
    record = same_settings(directory, s, "shapes")
    record.write_text(json.dumps(asdict(s)))
    pipe = build_pipeline(WORDS, seed=seed_of("shapes", s.seed) % 2**31)
    if s.start:
        _load(pipe, Path(s.start))
    else:
        _codec(pipe, s, directory, log)
    pool = _pool(pipe, s, directory)
    _reader(pipe, s, pool, directory, log)
    _denoiser(pipe, s, pool, directory, log)
    fresh, final = directory / "pipeline.part", directory / "pipeline"
    shutil.rmtree(fresh, ignore_errors=True)
    for part in (pipe.vae, pipe.unet, pipe.text_encoder):
        part.to(torch.float16, memory_format=torch.contiguous_format)
    pipe.save_pretrained(fresh, safe_serialization=True)
    for path in fresh.rglob("*.json"):  # diffusers notes down the folder that a pipeline was loaded from
        config = json.loads(path.read_text(encoding="utf8"))
        if isinstance(config, dict) and config.pop("_name_or_path", None):
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf8")
    (fresh / "words.json").write_text(json.dumps(vocabulary.record(), indent=1))
    shutil.rmtree(final, ignore_errors=True)
    fresh.rename(final)
    return final


def _load(pipe: Any, directory: Path) -> None:
    """Take the weights of a trained pipeline. Raises RunError where they are missing or of another architecture."""
    for name, file in (
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
        ("unet", "diffusion_pytorch_model"),
    ):
        path = directory / name / f"{file}.safetensors"
        try:
            getattr(pipe, name).load_state_dict({k: v.float() for k, v in load_file(path).items()})
        except (OSError, RuntimeError) as error:
            what = str(error).splitlines()[0]
            raise RunError(f"train on from {directory}", what, "a pipeline that `whence train shapes` wrote") from None
    pipe.vae.requires_grad_(False).eval()


# --- 1. codec --------------------------------------------------------------------------------------------------------


def _pixels(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _codec(pipe: Any, s: Training, directory: Path, log: Any) -> None:
    t = Trainee({"vae": pipe.vae}, directory / "codec.safetensors", s.codec_steps, 2e-3, s.checkpoint)
    for step in steps(t, "codec", log):
        rng, g = stream("shapes", s.seed, "codec", step), torch_stream("shapes", s.seed, "codec", step)
        drawn = [scenes.render(scenes.draw_scene(rng, key=s.key)) for _ in range(s.codec_batch)]
        x = _pixels([image for image, _ in drawn])
        drawn_on = torch.from_numpy(np.stack([~masks["background"] for _, masks in drawn]))[:, None].float()
        near = nn.functional.max_pool2d(drawn_on, 3, 1, 1)
        if step < 0.8 * s.codec_steps:
            # The codec is convolutional: a quarter of the picture teaches it four times as fast.
            corners = rng.integers(0, 9, (s.codec_batch, 2)) * 4
            x, near = (
                torch.stack([v[:, i : i + 32, j : j + 32] for v, (i, j) in zip(w, corners, strict=True)])
                for w in (x, near)
            )
        posterior = pipe.vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=g)
        # A denoiser leaves errors behind; shapes must survive them.
        error = 0.25 * torch.rand(len(z), 1, 1, 1, generator=g) * posterior.mean.std().detach()
        y = pipe.vae.decode(z + error * torch.randn(z.shape, generator=g)).sample - x
        wrong = (y.abs() + y**2) * (1 + 4 * near)
        loss = wrong.mean() + 2e-4 * posterior.kl().mean() / z[0].numel()
        t.update(loss)
        if t.step % 100 == 0:
            print(f"codec loss {loss.item():.4f}", file=log, flush=True)
    t.use_average()
    pipe.vae.requires_grad_(False).eval()


# --- the scenes, encoded once ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pool:
    """Encoded scenes: ``latents[scene, channel, y, x]``, ``ids[scene, token]``, ``cover[scene, y, x]`` (0..1), and
    which class of object holds each place, ``coarse`` and ``fine`` [scene, y, x] (0: none)."""

    scenes: list[Scene]
    latents: Tensor
    ids: Tensor
    cover: Tensor
    coarse: Tensor
    fine: Tensor
    kinds: np.ndarray

    def choose(self, rng: np.random.Generator, n: int, done: float) -> np.ndarray:
        """Indices of ``n`` scenes; the mixture moves from easy to full over the first 30 % of the training."""
        f = min(1.0, done / 0.3)
        weight = {k: (1 - f) * EASY[k] + f * FULL[k] for k in KINDS}
        per_scene = np.array([weight[k] for k in KINDS])[self.kinds] / np.bincount(self.kinds)[self.kinds]
        return rng.choice(len(self.kinds), n, p=per_scene / per_scene.sum())


def _ids(pipe: Any, captions: list[str]) -> Tensor:
    encoded = pipe.tokenizer(captions, padding="max_length", truncation=False, return_tensors="pt")
    return encoded.input_ids  # type: ignore[no-any-return]


CLASSES = 1 + len(COLOURS) * len(SHAPES) + 2
"""Nothing, each colour of each shape, the mark, the frame."""


def _places(scene: Scene, masks: dict[str, np.ndarray], cells: int) -> np.ndarray:
    """The class of the object that covers at least a quarter of each cell, uint8 [y, x]."""
    size = scenes.SIZE // cells
    most, out = np.full((cells, cells), 0.25), np.zeros((cells, cells), np.uint8)
    for name, mask in masks.items():
        if name == "background":
            continue
        if name.startswith("thing"):
            thing = scene.things[int(name[5:])]
            label = 1 + list(COLOURS).index(thing.colour) * len(SHAPES) + SHAPES.index(thing.shape)
        else:
            label = CLASSES - 2 + ("mark", "frame").index(name)
        share = mask.reshape(cells, size, cells, size).mean((1, 3))
        out[share >= most] = label
        most = np.maximum(most, share)
    return out


def _pool(pipe: Any, s: Training, directory: Path) -> _Pool:
    kinds = np.arange(s.scenes) % len(KINDS)
    drawn = [scenes.draw_scene(stream("shapes", s.seed, "pool", i), KINDS[k], key=s.key) for i, k in enumerate(kinds)]
    path = directory / "pool.safetensors"
    if not path.exists():
        latents, cover = [], []
        places: dict[int, list[np.ndarray]] = {8: [], 16: []}
        with progress("encoding", total=s.scenes, unit="pictures") as advance, torch.no_grad():
            for i in range(0, s.scenes, 64):
                pictures = [scenes.render(x) for x in drawn[i : i + 64]]
                latents.append(pipe.vae.encode(_pixels([p for p, _ in pictures])).latent_dist.mode())
                on = torch.from_numpy(np.stack([~m["background"] for _, m in pictures]))[:, None].float()
                cover.append(nn.functional.max_pool2d(on, on.shape[-1] // latents[-1].shape[-1])[:, 0])
                for cells, found in places.items():
                    found += [_places(x, m, cells) for x, (_, m) in zip(drawn[i : i + 64], pictures, strict=True)]
                advance(len(pictures))
        z = torch.cat(latents)
        stored = {"latents": z / z.std(), "cover": torch.cat(cover), "scale": 1 / z.std()}
        save_tensors(path, stored | {str(n): torch.from_numpy(np.stack(x)) for n, x in places.items()}, 0)
    stored = load_file(path)
    pipe.vae.register_to_config(scaling_factor=float(stored["scale"]))
    ids = _ids(pipe, [x.caption for x in drawn])
    return _Pool(drawn, stored["latents"], ids, stored["cover"], stored["8"], stored["16"], kinds)


# --- 2. reader -------------------------------------------------------------------------------------------------------

_NOUNS = (*SHAPES, *scenes.PLURALS.values())
_OPPOSITE = [RELATIONS.index(r) for r in ("right of", "left of", "below", "above")]
_HEADS = {
    "colour": len(COLOURS) + 1, "shape": len(SHAPES) + 1, "size": len(SIZES) + 1,
    "relation": len(RELATIONS) + 1, "number": 3,
}  # fmt: skip
_TABLE = (*((len(COLOURS) + 1, len(SHAPES) + 1, len(SIZES) + 1) * 3), len(RELATIONS) + 1, 3, len(BACKGROUNDS), 2, 2)


def _facts(scene: Scene) -> list[int]:
    """The factor table as class numbers: three objects, then relation, number, background, mark and frame."""
    row: list[int] = []
    for i in range(3):
        t = scene.things[i] if i < len(scene.things) else None
        row += [
            list(COLOURS).index(t.colour) if t else len(COLOURS),
            SHAPES.index(t.shape) if t else len(SHAPES),
            list(SIZES).index(t.size) if t and t.said_size else len(SIZES),
        ]
    relation = RELATIONS.index(scene.relation) if scene.relation else len(RELATIONS)
    number = len(scene.things) - 1 if scene.kind == "count" else 0
    return [
        *row, relation, number, list(BACKGROUNDS).index(scene.background), int(scene.mark is not None),
        int(scene.frame),
    ]  # fmt: skip


def _reader(pipe: Any, s: Training, pool: _Pool, directory: Path, log: Any) -> None:
    width = pipe.text_encoder.config.hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("shapes", s.seed, "heads") % 2**31)
        heads = {"text_encoder": pipe.text_encoder, "noun": nn.Linear(width, sum(_HEADS.values()))}
        heads["end"] = nn.Linear(width, sum(_TABLE))
    t = Trainee(heads, directory / "reader.safetensors", s.reader_steps, 1e-3, s.checkpoint)
    facts = torch.tensor([_facts(x) for x in pool.scenes])
    noun_ids = torch.tensor([pipe.tokenizer(w).input_ids[1] for w in _NOUNS])
    last_ids = torch.tensor([pipe.tokenizer(r).input_ids[-2] for r in RELATIONS])
    end_id = pipe.tokenizer.eos_token_id
    known = None
    if s.start:
        with torch.no_grad():
            known = torch.cat([pipe.text_encoder(ids)[0] for ids in torch.split(pool.ids, 256)])
    for step in steps(t, "reader", log):
        rng = stream("shapes", s.seed, "reader", step)
        pick = torch.from_numpy(pool.choose(rng, s.reader_batch, 1.0))
        ids, fact = pool.ids[pick], facts[pick]
        hidden = pipe.text_encoder(ids)[0]
        is_noun = torch.isin(ids, noun_ids)
        which = is_noun.cumsum(1) - 1
        rows, columns = is_noun.nonzero(as_tuple=True)
        number = which[rows, columns]
        said = fact[rows, 9].where(number > 0, len(RELATIONS))  # the first noun stands before the relation
        noun_fact = torch.cat([fact[:, :9].view(-1, 3, 3)[rows, number], said[:, None], fact[rows, 10:11]], 1)
        losses = []
        guess = heads["noun"](hidden[rows, columns]).split(list(_HEADS.values()), -1)
        losses += [nn.functional.cross_entropy(g, noun_fact[:, i]) for i, g in enumerate(guess)]
        # "red circle left of": the same heads read the first object there, on the side that its relation gives it. The
        # second object's noun stands on the other side, so its relation is the first one's seen from there.
        is_last = torch.isin(ids, last_ids) & (fact[:, None, 9] < len(RELATIONS))
        rows, columns = is_last.nonzero(as_tuple=True)
        side = torch.tensor([*_OPPOSITE, 0])[fact[rows, 9]]
        guess = heads["noun"](hidden[rows, columns]).split(list(_HEADS.values()), -1)
        first = torch.cat([fact[rows, :3], side[:, None]], 1)
        losses += [nn.functional.cross_entropy(g, first[:, i]) for i, g in enumerate(guess[:4])]
        if known is not None:
            losses.append(HELD * ((hidden - known[pick]) ** 2)[~is_last].mean())
        # The end token itself, not the padding, which is the same token.
        end = (ids == end_id).int().argmax(1)
        guess = heads["end"](hidden[torch.arange(len(ids)), end]).split(list(_TABLE), -1)
        losses += [nn.functional.cross_entropy(g, fact[:, i]) for i, g in enumerate(guess)]
        t.update(torch.stack(losses).mean())
        if t.step % 100 == 0:
            print(f"reader loss {torch.stack(losses).mean().item():.4f}", file=log, flush=True)
    t.use_average()


# --- 3. denoiser -----------------------------------------------------------------------------------------------------


class _WithPlaces(nn.Module):
    """A UNet that also says which object each place of the clean picture holds: (v, coarse logits, fine logits)."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        blocks = unet.up_blocks[:2]
        widths = [b.upsamplers[0].conv.out_channels for b in blocks]
        self.heads = nn.ModuleList(nn.Conv2d(w, CLASSES, 1) for w in widths)
        self.seen: dict[int, Tensor] = {}
        self.hooks = []
        for i, block in enumerate(blocks):
            self.hooks.append(block.register_forward_hook(lambda _, __, out, i=i: self.seen.__setitem__(i, out)))

    def forward(self, x: Tensor, timestep: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v = self.unet(x, timestep, hidden, return_dict=False)[0]
        return v, self.heads[0](self.seen[0]), self.heads[1](self.seen[1])


def _timesteps(n: int, of: int, g: torch.Generator) -> Tensor:
    """``n`` timesteps, one from each of ``n`` equal strata (less variance than independent draws): half of them over
    the whole schedule, half over its :data:`DECISIVE` part."""
    u = (torch.arange(n) + torch.rand(n, generator=g)) / n
    low, high = DECISIVE
    half = u < 0.5
    u = torch.where(half, 2 * u, low + (high - low) * (2 * u - 1))
    return (u * of).long().clamp(max=of - 1)


def _denoiser(pipe: Any, s: Training, pool: _Pool, directory: Path, log: Any) -> None:
    pipe.text_encoder.requires_grad_(False).eval()
    with torch.no_grad():
        read = torch.cat([pipe.text_encoder(ids)[0] for ids in torch.split(pool.ids, 256)])
        empty = pipe.text_encoder(_ids(pipe, [""]))[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("shapes", s.seed, "places") % 2**31)
        both = _WithPlaces(pipe.unet)
    both.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = torch.compile(both) if s.compile else both
    modules = {"unet": pipe.unet, "heads": both.heads}
    t = Trainee(modules, directory / "denoiser.safetensors", s.steps, s.learning_rate, s.checkpoint)
    noised = pipe.scheduler.alphas_cumprod
    running = torch.zeros(3)
    for step in steps(t, "denoiser", log):
        rng, g = stream("shapes", s.seed, "denoiser", step), torch_stream("shapes", s.seed, "denoiser", step)
        pick = torch.from_numpy(pool.choose(rng, s.batch, 1.0 if s.start else step / s.steps))
        x0, cover, hidden = pool.latents[pick], pool.cover[pick], read[pick]
        hidden[torch.rand(s.batch, generator=g) < 0.1] = empty
        timestep = _timesteps(s.batch, len(noised), g)
        noise = torch.randn(x0.shape, generator=g)
        x = pipe.scheduler.add_noise(x0, noise, timestep)
        target = pipe.scheduler.get_velocity(x0, noise, timestep)
        v, coarse, fine = model(x.to(memory_format=torch.channels_last), timestep, hidden)
        # Objects cover a tenth of a picture. Their extra weight fades with the signal: where x0 is still uncertain it
        # would bias the posterior mean towards pictures with more objects.
        weight = 1 + s.object_weight * cover[:, None] * noised[timestep, None, None, None]
        losses = [
            (weight * (v - target) ** 2).mean(),
            nn.functional.cross_entropy(coarse, pool.coarse[pick].long()),
            nn.functional.cross_entropy(fine, pool.fine[pick].long()),
        ]
        t.update(losses[0] + s.places_weight * (losses[1] + losses[2]))
        now = torch.stack(losses).detach()
        running = 0.98 * running + 0.02 * now if running.any() else now
        if t.step % 100 == 0:
            parts = ", ".join(f"{w} {x:.4f}" for w, x in zip(("v", "coarse", "fine"), running.tolist(), strict=True))
            print(f"denoiser loss: {parts}", file=log, flush=True)
    for hook in both.hooks:
        hook.remove()
    t.use_average()
