"""Trains the `emoji` model: picture codec (from a trained one), then caption reader, then denoiser.

1. *Codec*: the VAE of another world, by default the packaged `shapes` model's, goes on learning on the emoji.
2. *Reader*: the text encoder learns, from nothing, to tell at the end of a caption which training picture it is, and at
   each of the last 16 tokens (padding, mostly) what one region of the picture looks like, by a linear regression on its
   latents. Then it is frozen, as Stable Diffusion's is, and the heads are thrown away. So the layout of a picture is
   learned by the reader, and the denoiser learns where to look for it and the details.
3. *Denoiser*: a narrower UNet than that of `shapes`, from nothing, on the v-prediction loss alone (Salimans & Ho 2022,
   eq. 11); 10 % of the captions are dropped for classifier-free guidance; the average of the weights is kept.

There are few pictures: with enough steps the model learns them by heart, and is meant to. The held-out pictures
take part in none of the three. Each epoch shows every picture once. No picture is mirrored: names say left and right.

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

from ...engine.randomness import seed_of, stream, torch_stream
from ...engine.training import Trainee, same_settings, save_tensors, steps
from ...errors import RunError
from ...models.small_stable_diffusion import build_pipeline
from .. import shapes
from .pictures import KEY, Emoji, training_set, words

GRID = 4
"""The last GRID x GRID tokens of a padded caption each tell what one region of the picture looks like, row by row."""
DEFAULTS = {"steps": 20, "guidance": 2.0}


@dataclass(frozen=True)
class Training:
    """Settings of one training. Steps are optimiser steps; ``checkpoint`` is in seconds.

    ``start``: the directory of a pipeline whose codec the training starts from ("": the packaged `shapes` model).
    ``compile`` fuses the denoiser's kernels (needs a C++ compiler, and minutes to compile).
    """

    seed: int = 0
    key: str = KEY
    codec_steps: int = 620
    codec_batch: int = 16
    reader_steps: int = 480
    reader_batch: int = 64
    steps: int = 1_450
    batch: int = 16
    learning_rate: float = 1.2e-3
    checkpoint: float = 120.0
    start: str = ""
    compile: bool = False


def train(directory: Path, settings: Training | None = None, log: Any = sys.stderr) -> Path:
    """Train into ``directory`` and return the folder of the finished pipeline, ``directory/pipeline``.

    A directory that holds an unfinished training with the same settings is gone on with.
    """
    s = settings or Training()
    record = same_settings(directory, s, "emoji")
    pipe = untrained(seed_of("emoji", s.seed) % 2**31)
    _start(pipe, Path(s.start) if s.start else shapes.model_directory())
    record.write_text(json.dumps(asdict(s)))
    known = training_set(s.key)
    _codec(pipe, s, known, directory, log)
    latents = _latents(pipe, known, directory)
    ids = _ids(pipe, list(known.captions))
    _reader(pipe, s, latents, ids, directory, log)
    _denoiser(pipe, s, latents, ids, directory, log)
    return _write(pipe, directory)


def untrained(seed: int) -> Any:
    """The pipeline of `shapes` with this world's words, and a UNet narrow enough for both to fit into one package."""
    pipe = build_pipeline(words(), seed=seed)
    narrow = {"block_out_channels": (32, 64, 128), "transformer_layers_per_block": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = pipe.unet.from_config(dict(pipe.unet.config) | narrow)
    pipe.register_modules(unet=unet)
    return pipe


def _start(pipe: Any, directory: Path) -> None:
    """Take the codec's weights. Raises RunError where they are missing or of another architecture."""
    path = directory / "vae" / "diffusion_pytorch_model.safetensors"
    try:
        pipe.vae.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    except (OSError, RuntimeError) as error:
        what = str(error).splitlines()[0]
        raise RunError(f"start from the codec of {directory}", what, "a pipeline that `whence train` wrote") from None


# --- 1. codec --------------------------------------------------------------------------------------------------------


def _pixels(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def _codec(pipe: Any, s: Training, known: Emoji, directory: Path, log: Any) -> None:
    t = Trainee({"vae": pipe.vae}, directory / "codec.safetensors", s.codec_steps, 1.5e-3, s.checkpoint)
    pictures = _pixels(known.pictures)
    for step in steps(t, "codec", log):
        rng, g = stream("emoji", s.seed, "codec", step), torch_stream("emoji", s.seed, "codec", step)
        x = pictures[torch.from_numpy(rng.integers(0, len(pictures), s.codec_batch))]
        if step < 0.8 * s.codec_steps:
            # The codec is convolutional: a quarter of the picture teaches it four times as fast.
            corners = rng.integers(0, 9, (s.codec_batch, 2)) * 4
            x = torch.stack([v[:, i : i + 32, j : j + 32] for v, (i, j) in zip(x, corners, strict=True)])
        posterior = pipe.vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=g)
        # A denoiser leaves errors behind; pictures must survive them.
        error = 0.15 * torch.rand(len(z), 1, 1, 1, generator=g) * posterior.mean.std().detach()
        wrong = pipe.vae.decode(z + error * torch.randn(z.shape, generator=g)).sample - x
        loss = (wrong.abs() + wrong**2).mean() + 2e-4 * posterior.kl().mean() / z[0].numel()
        t.update(loss)
        if t.step % 50 == 0:
            print(f"codec loss {loss.item():.4f}, error {wrong.abs().mean().item():.4f}", file=log, flush=True)
    t.use_average()
    pipe.vae.requires_grad_(False).eval()


def _latents(pipe: Any, known: Emoji, directory: Path) -> Tensor:
    """What the denoiser is to draw: [picture, channel, y, x], of unit variance."""
    path = directory / "latents.safetensors"
    if not path.exists():
        with torch.no_grad():
            parts = [pipe.vae.encode(x).latent_dist.mode() for x in torch.split(_pixels(known.pictures), 64)]
        z = torch.cat(parts)
        save_tensors(path, {"latents": z / z.std(), "scale": 1 / z.std()}, 0)
    stored: dict[str, Tensor] = load_file(path)
    pipe.vae.register_to_config(scaling_factor=float(stored["scale"]))
    return stored["latents"]


def _shown(s: Training, stage: str, batch: int, n: int, step: int) -> np.ndarray:
    """Which pictures a step shows. Batches are cut from one shuffled row of epochs, so each is shown equally often."""
    first, last = step * batch, (step + 1) * batch - 1
    epochs = range(first // n, last // n + 1)
    order = np.concatenate([stream("emoji", s.seed, stage, "epoch", e).permutation(n) for e in epochs])
    return order[first % n : first % n + batch]


# --- 2. reader -------------------------------------------------------------------------------------------------------


def _ids(pipe: Any, captions: list[str]) -> Tensor:
    encoded = pipe.tokenizer(captions, padding="max_length", truncation=False, return_tensors="pt")
    return encoded.input_ids  # type: ignore[no-any-return]


def _reader(pipe: Any, s: Training, latents: Tensor, ids: Tensor, directory: Path, log: Any) -> None:
    n, channels, size, _ = latents.shape
    cell = size // GRID
    # looks[picture, region, number], regions row by row
    looks = latents.reshape(n, channels, GRID, cell, GRID, cell).permute(0, 2, 4, 1, 3, 5).reshape(n, GRID**2, -1)
    looks = looks - looks.mean(0)
    width = pipe.text_encoder.config.hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("emoji", s.seed, "heads") % 2**31)
        heads = {"looks": nn.Linear(width, looks.shape[-1]), "which": nn.Linear(width, n)}
    modules = {"text_encoder": pipe.text_encoder, **heads}
    t = Trainee(modules, directory / "reader.safetensors", s.reader_steps, 1.5e-3, s.checkpoint)
    end = (ids == pipe.tokenizer.eos_token_id).int().argmax(1)
    for step in steps(t, "reader", log):
        pick = torch.from_numpy(_shown(s, "reader", s.reader_batch, n, step))
        hidden = pipe.text_encoder(ids[pick])[0]
        wrong = ((heads["looks"](hidden[:, -(GRID**2) :]) - looks[pick]) ** 2).mean()
        last = hidden[torch.arange(len(pick)), end[pick]]
        identity = nn.functional.cross_entropy(heads["which"](last), pick)
        t.update(wrong + 0.02 * identity)
        if t.step % 50 == 0:
            print(f"reader looks {wrong.item():.4f}, which {identity.item():.4f}", file=log, flush=True)
    t.use_average()


# --- 3. denoiser -----------------------------------------------------------------------------------------------------


def _denoiser(pipe: Any, s: Training, latents: Tensor, ids: Tensor, directory: Path, log: Any) -> None:
    pipe.text_encoder.requires_grad_(False).eval()
    with torch.no_grad():
        read = torch.cat([pipe.text_encoder(part)[0] for part in torch.split(ids, 256)])
        empty = pipe.text_encoder(_ids(pipe, [""]))[0]
    pipe.unet.to(memory_format=torch.channels_last)
    model = torch.compile(pipe.unet) if s.compile else pipe.unet
    t = Trainee({"unet": pipe.unet}, directory / "denoiser.safetensors", s.steps, s.learning_rate, s.checkpoint)
    noise_levels = pipe.scheduler.config.num_train_timesteps
    running = 0.0
    for step in steps(t, "denoiser", log):
        g = torch_stream("emoji", s.seed, "denoiser", step)
        pick = torch.from_numpy(_shown(s, "denoiser", s.batch, len(ids), step))
        x0, hidden = latents[pick], read[pick]
        hidden[torch.rand(s.batch, generator=g) < 0.1] = empty
        # One timestep from each of equal strata: less variance than independent draws.
        timestep = ((torch.arange(s.batch) + torch.rand(s.batch, generator=g)) / s.batch * noise_levels).long()
        noise = torch.randn(x0.shape, generator=g)
        x = pipe.scheduler.add_noise(x0, noise, timestep).to(memory_format=torch.channels_last)
        v = model(x, timestep, hidden, return_dict=False)[0]
        loss = ((v - pipe.scheduler.get_velocity(x0, noise, timestep)) ** 2).mean()
        t.update(loss)
        running = 0.98 * running + 0.02 * loss.item() if running else loss.item()
        if t.step % 50 == 0:
            print(f"denoiser loss {running:.4f}", file=log, flush=True)
    t.use_average()


def _write(pipe: Any, directory: Path) -> Path:
    fresh, final = directory / "pipeline.part", directory / "pipeline"
    shutil.rmtree(fresh, ignore_errors=True)
    for part in (pipe.vae, pipe.unet, pipe.text_encoder):
        part.to(torch.float16, memory_format=torch.contiguous_format)
    pipe.save_pretrained(fresh, safe_serialization=True)
    record = {"words": words(), "alternatives": {}, "defaults": DEFAULTS}
    (fresh / "words.json").write_text(json.dumps(record, indent=1), encoding="utf8")
    shutil.rmtree(final, ignore_errors=True)
    fresh.rename(final)
    return final
