"""Which of a real picture model's training pictures taught it more of a picture? Held against training it further.

The embedded `emoji` model (903 captioned pictures) is trained on, from where it is, on 32 random halves of its training
set: the same order, timesteps and noises for all, what is not in a half left out. The linear datamodelling score (LDS)
is Spearman's correlation, over halves, of the summed scores of a half's pictures with what its training made of a
held-out picture's denoising loss; mean over the 48 held-out pictures, 95 % interval over them. Training on is what a
few hundred steps on two cores can show; training anew (an hour and a half for each half) it is not.

Leave-k-out: for 12 of the held-out pictures it is trained on without the 50 training pictures that a form puts first,
too; by how much more their loss is then than without 50 drawn at random, as a share of what training on all makes of
it: mean over these pictures, 95 % interval over them.

Baselines that know no gradient: how alike the pictures are, how many words the captions share, and dice.

    python -m benchmarks.tda_emoji --json [--quick] [--work FOLDER]

A run that was stopped goes on: each training is kept in FOLDER.
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.recording import arguments, publish
from benchmarks.trained_again import of_each, once, without
from whence.checks.lds import correlations, score
from whence.engine.progress import progress
from whence.engine.randomness import stream, torch_stream
from whence.influence.d_trak import DTRAK
from whence.influence.eogp import EOGP
from whence.influence.logra import LoGRA
from whence.influence.lorif import LoRIF
from whence.influence.sketch import Sketch
from whence.models.loading import load
from whence.models.objectives import DiffusionObjective
from whence.score import Score
from whence.worlds import emoji
from whence.worlds.digits import halves
from whence.worlds.emoji.pictures import held_out, training_set

TIMESTEPS, BATCH, RATE = 3, 16, 3e-4
LEFT_OUT, ASKED = 50, 12
FORMS: dict[str, Any] = {
    "logra 16, int8": LoGRA(),
    "lorif 32, rank 1": LoRIF(),
    "eogp 1024 bits": EOGP(bits=1024),
    "sketch 1024 bits": Sketch(1024),
    "sketch 2048 bits": Sketch(),
    "sketch 2048, int8": Sketch(keep="int8"),
    "sketch 8192, int8": Sketch(8192, "int8"),
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


def outputs(model: Any, kept: np.ndarray, steps: int, work: Path, what: str, seed: int = 0) -> np.ndarray:
    """Minus the losses of the held-out pictures after training on what is kept, [training, query]."""
    examples, queries = training_set(), list(held_out())
    objective = DiffusionObjective(model, TIMESTEPS)
    with torch.no_grad():
        latents = torch.stack([objective.latents(picture) for _, picture in examples])
        read = torch.stack([objective.read(caption) for caption, _ in examples])
    found = np.zeros((len(kept), len(queries)))
    was = model.pipeline.unet

    def losses(keep: np.ndarray) -> np.ndarray:
        model.pipeline.unet = trained_on(model, latents, read, keep, steps, seed)
        try:
            with torch.no_grad():
                return np.array([float(objective.losses([q]).values.sum()) for q in queries])
        finally:
            model.pipeline.unet = was

    with progress(what, total=len(kept), unit="trainings") as advance:
        for j, keep in enumerate(kept):
            name = hashlib.sha256(repr((model.fingerprint, steps, seed)).encode() + np.packbits(keep).tobytes())
            found[j] = -once(work / f"{name.hexdigest()[:32]}.npy", lambda keep=keep: losses(keep))
            advance(1)
    return found


def left_out(model: Any, scores: dict[str, np.ndarray], asked: int, steps: int, work: Path) -> dict[str, np.ndarray]:
    """By how much larger a picture's loss is without what a form puts first than without others, as a share of the
    loss: [asked picture] of each form."""
    n = len(training_set())
    dice = stream("tda_emoji", "left out")
    gone = {name: np.argsort(-own[:asked], axis=1)[:, :LEFT_OUT] for name, own in scores.items() if name != "random"}
    gone["random"], gone["others"] = (
        np.stack([dice.permutation(n)[:LEFT_OUT] for _ in range(asked)]) for _ in range(2)
    )
    told = outputs(model, without(gone, n), steps, work, "training without them")
    value, whole = of_each(gone, told), -told[-1, :asked]
    others = value.pop("others")
    return {name: (others - own) / whole for name, own in value.items()}


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
    examples, queries = training_set(), list(held_out())
    kept = halves(len(examples), count, "emoji")
    learned = outputs(model, kept, steps, options.work, "training on halves")
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
    pictures = correlations(scores["cosine similarity of pictures"], kept, learned)
    for name, own in scores.items():
        beyond = correlations(own, kept, learned) - pictures
        rows[name] = told[name] | {
            "lds": score(own, kept, learned).record(),
            "beyond similarity of pictures": Score.of("LDS", "Spearman", beyond).record(),
        }
    asked = 2 if options.quick else ASKED
    for name, rise in left_out(model, scores, asked, steps, options.work).items():
        rows[name]["leave_k_out"] = Score.of("rise", "share of the loss", rise).record()
    publish(
        "tda_emoji",
        {"halves": count, "steps": steps, "timesteps": TIMESTEPS, "rate": RATE, "left out": LEFT_OUT, "rows": rows},
        options,
    )


if __name__ == "__main__":
    main()
