"""Which of a real picture model's training pictures taught it more of a picture? Held against training it further.

The embedded `emoji` model (903 captioned pictures) is trained on, from where it is, on 32 random halves of its training
set: the same order, timesteps and noises for all, what is not in a half left out. The linear datamodelling score (LDS)
is Spearman's correlation, over halves, of the summed scores of a half's pictures with what its training made of a
held-out picture's denoising loss; mean over the 48 held-out pictures, 95 % interval over them. Training on is what a
few hundred steps on two cores can show; training anew (an hour and a half for each half) it is not.

Baselines that know no gradient: how alike the pictures are, how many words the captions share, and dice.

    python -m benchmarks.tda_emoji --json [--quick] [--work FOLDER]
"""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.recording import arguments, publish
from whence.checks.lds import correlations, score
from whence.engine.progress import progress
from whence.engine.randomness import stream, torch_stream
from whence.influence.d_trak import DTRAK
from whence.influence.eogp import EOGP
from whence.influence.logra import LoGRA
from whence.influence.lorif import LoRIF
from whence.models.loading import load
from whence.models.objectives import DiffusionObjective
from whence.score import Score
from whence.worlds import emoji
from whence.worlds.digits import halves
from whence.worlds.emoji.pictures import held_out, training_set

TIMESTEPS, BATCH, RATE = 3, 16, 3e-4
FORMS: dict[str, Any] = {
    "logra 16, int8": LoGRA(),
    "lorif 32, rank 1": LoRIF(),
    "eogp 1024 bits": EOGP(bits=1024),
    "d_trak": DTRAK(side=16),
}


def trained_on(model: Any, latents: torch.Tensor, read: torch.Tensor, keep: np.ndarray, steps: int, seed: int) -> Any:
    """The denoiser after ``steps`` steps on what is kept. An example that is not keeps its place and costs nothing."""
    unet = copy.deepcopy(model.pipeline.unet).train().requires_grad_(True)
    scheduler = model.pipeline.scheduler
    total = scheduler.config.num_train_timesteps
    optimiser = torch.optim.Adam(unet.parameters(), lr=RATE, fused=True)
    order = np.concatenate(
        [stream("tda_emoji", seed, e).permutation(len(keep)) for e in range(1 + steps * BATCH // len(keep))]
    )
    for step in range(steps):
        g = torch_stream("tda_emoji", seed, step)
        t = ((torch.arange(BATCH) + torch.rand(BATCH, generator=g)) / BATCH * total).long()
        noise = torch.randn((BATCH, *latents.shape[1:]), generator=g)
        pick = order[step * BATCH : (step + 1) * BATCH]
        own = torch.from_numpy(keep[pick])
        if not bool(own.any()):
            continue
        which = torch.from_numpy(pick)[own]
        x0, noise, t = latents[which], noise[own], t[own]
        v = unet(scheduler.add_noise(x0, noise, t), t, read[which], return_dict=False)[0]
        loss = ((v - scheduler.get_velocity(x0, noise, t)) ** 2).flatten(1).mean(1).sum() / (BATCH / 2)
        optimiser.zero_grad()
        loss.backward()
        for group in optimiser.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        optimiser.step()
    return unet.eval().requires_grad_(False)


def truth(model: Any, count: int, steps: int, work: Path, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(kept[half, example], output[half, query]: minus the loss), each training kept as it is made."""
    examples, queries = training_set(), list(held_out())
    objective = DiffusionObjective(model, TIMESTEPS)
    kept = halves(len(examples), count, "emoji")
    with torch.no_grad():
        latents = torch.stack([objective.latents(picture) for _, picture in examples])
        read = torch.stack([objective.read(caption) for caption, _ in examples])
    found = np.zeros((count, len(queries)))
    was = model.pipeline.unet
    with progress("training on halves", total=count, unit="halves") as advance:
        for j in range(count):
            path = work / f"{model.fingerprint}-{steps}-{seed}-{j}.npy"
            if not path.exists():
                model.pipeline.unet = trained_on(model, latents, read, kept[j], steps, seed)
                try:
                    with torch.no_grad():
                        losses = [float(objective.losses([q]).values.sum()) for q in queries]
                finally:
                    model.pipeline.unet = was
                part = path.with_suffix(".part.npy")
                np.save(part, np.array(losses))
                part.rename(path)
            found[j] = -np.load(path)
            advance(1)
    return kept, found


def alike(queries: Any, examples: Any) -> dict[str, np.ndarray]:
    """Scores of those who know no gradient, [query, example]."""
    q, x = (np.stack([p for _, p in own]).reshape(len(own), -1).astype(float) for own in (queries, examples))
    q, x = (own - 255 for own in (q, x))  # the ground is white
    q, x = (own / np.maximum(np.linalg.norm(own, axis=1, keepdims=True), 1) for own in (q, x))
    words = [[set(caption.split()) for caption, _ in own] for own in (queries, examples)]
    shared = [[len(a & b) / len(a | b) for b in words[1]] for a in words[0]]
    dice = stream("tda_emoji", "random").normal(size=(len(queries), len(examples)))
    return {"cosine similarity of pictures": q @ x.T, "words that captions share": np.array(shared), "random": dice}


def main() -> None:
    parser = arguments(str(__doc__))
    parser.add_argument("--quick", action="store_true", help="8 halves of 4 steps, one form")
    parser.add_argument("--halves", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60, help="of 16 pictures each, half of them kept")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "whence-tda-emoji")
    options = parser.parse_args()
    torch.set_num_threads(1)
    count, steps = (8, 4) if options.quick else (options.halves, options.steps)
    options.work.mkdir(parents=True, exist_ok=True)
    model = load(emoji.model_directory())
    kept, outputs = truth(model, count, steps, options.work)
    examples, queries = training_set(), list(held_out())
    scores, rows = alike(queries, list(examples)), {}
    told: dict[str, dict[str, Any]] = {name: {} for name in scores}
    for name, method in FORMS.items():
        if options.quick and not isinstance(method, LoGRA):
            continue
        began = time.perf_counter()
        objective = DiffusionObjective(model, TIMESTEPS, output="squared norm" if isinstance(method, DTRAK) else "loss")
        fitted = method.fit(objective, examples)
        scores[name] = fitted.scores(queries)
        planes = getattr(fitted.scheme, "planes", {})
        told[name] = {"seconds": round(time.perf_counter() - began, 1), "bytes per example": sum(planes.values())}
    pictures = correlations(scores["cosine similarity of pictures"], kept, outputs)
    for name, own in scores.items():
        beyond = correlations(own, kept, outputs) - pictures
        rows[name] = told[name] | {
            "lds": score(own, kept, outputs).record(),
            "beyond similarity of pictures": Score.of("LDS", "Spearman", beyond).record(),
        }
    publish("tda_emoji", {"halves": count, "steps": steps, "timesteps": TIMESTEPS, "rate": RATE, "rows": rows}, options)


if __name__ == "__main__":
    main()
