"""What the attention tape costs: generation with the tape against plain generation, in one process, turn by turn.

    python -m benchmarks.words_overhead --json [--peer]

Prints one JSON object. Tiny untrained pipelines of every family (`whence.models.tiny`) stand in for the real ones, with
latents of 32 x 32 (UNets; 64 x 64 beside the peer) and picture sequences of 1,024 tokens
(transformers), heads of 32 to 64 channels. Tiny models exaggerate the cost: with few channels, attention is a larger
part of the work. Times are processor seconds of one thread; each ratio is the median over pairs that ran one after the
other. Memory, from tensor shapes: ``kept_bytes`` = 4 x places x words (x heads) over layers or grids, by the axes kept;
``passing_bytes`` = the largest layer's probabilities before they are added, 4 x heads x places x (pieces + words);
``full_matrices_bytes`` = 4 x heads x places x keys over layers, what all probabilities take (conditional rows, picture
queries, float32, summed over steps in place) takes. ``full_over_peak`` = full / (kept with no axis + passing).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.peers import PEERS, python_of
from benchmarks.recording import arguments, publish

PROMPT = "a red circle and the white dog over snow"
AIMS = {"sd": 1.05, "sdxl": 1.05, "pixart": 1.35, "sd3": 2.0, "flux": 1.35, "flux-schnell": 1.35}
SIZES: dict[str, dict[str, int]] = {
    "sd": {"size": 32, "width": 128},
    "sdxl": {"size": 32, "width": 128},
    "pixart": {"size": 64, "heads": 4, "channels": 64, "layers": 3},
    "sd3": {"size": 64, "heads": 4, "channels": 64, "layers": 3},
    "flux": {"size": 64, "heads": 4, "channels": 64, "layers": 1, "singles": 2},
    "flux-schnell": {"size": 64, "heads": 4, "channels": 64, "layers": 1, "singles": 2},
}
STEPS = 4
PEER_PACKAGE = PEERS["daam"][1]


def seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def family_row(family: str, repeats: int) -> dict[str, Any]:
    """One family: plain, tape, plain, tape, ..., plain; each taped run against its two neighbours."""
    from whence.engine.attention import AttentionTape
    from whence.models.loading import load
    from whence.models.tiny import tiny
    from whence.run import Settings

    model = load(tiny(family, **SIZES[family]))
    height, width = model.default_size
    settings = Settings(PROMPT, 7, STEPS, 1.0 if family == "flux-schnell" else 4.0, height, width)
    runs = [model.generate(settings)]
    tape = AttentionTape(keep=("layer", "head"))
    plain, taped = [seconds(lambda: model.generate(settings))], []
    for _ in range(repeats):
        taped.append(seconds(lambda: runs.append(model.generate(settings, tape))))
        plain.append(seconds(lambda: model.generate(settings)))
    ratios = [2 * t / (a + b) for t, a, b in zip(taped, plain, plain[1:], strict=False)]
    layers = model.layers(height, width)
    words = runs[0].words
    text = model._prompted([settings]).condition.shape[1]
    pieces = sum(map(len, model.columns(words)))
    kept = {
        ", ".join(keep) or "none": tape.bytes_needed(layers, len(words), 1, STEPS, keep)
        for keep in ((), ("layer",), ("layer", "head"))
    }
    assert kept["layer, head"] == tape.nbytes
    passing = max(4 * x.heads * x.grid * (pieces + len(words)) for x in layers)
    full = sum(4 * x.heads * x.grid * (text + (x.grid if x.kind == "joint" else 0)) for x in layers)
    return {
        "ratio": round(statistics.median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
        "aim": AIMS[family],
        "within_aim": statistics.median(ratios) <= AIMS[family],
        "identical": all(
            bool((r.latents == runs[0].latents).all() and (r.images == runs[0].images).all()) for r in runs
        ),
        "plain_seconds": round(statistics.median(plain), 3),
        "latents": [height // model.pipeline.vae_scale_factor, width // model.pipeline.vae_scale_factor],
        "layers": len(layers),
        "kept_bytes": kept,
        "passing_bytes": passing,
        "full_matrices_bytes": full,
        "full_over_peak": round(full / (kept["none"] + passing), 1),
    }


PEER_SCRIPT = r"""
import contextlib, json, statistics, sys, time
import torch
torch.set_num_threads(1)
from diffusers import StableDiffusionPipeline
from daam import trace
folder, prompt, steps, repeats = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
pipe = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True)
pipe.set_progress_bar_config(disable=True)
def make():
    out = pipe(prompt, num_inference_steps=steps, guidance_scale=4.0, generator=torch.Generator().manual_seed(7),
               output_type="np")
    return out.images
def traced():
    with trace(pipe) as tc:
        image = make()
        tc.compute_global_heat_map()
    return image
def seconds(work):
    start = time.process_time(); out = work(); return time.process_time() - start, out
plain = make()
ratios, change = [], 0.0
for _ in range(repeats):
    first, _a = seconds(make); taped, image = seconds(traced); last, _b = seconds(make)
    ratios.append(2 * taped / (first + last)); change = max(change, float(abs(image - plain).max()))
print(json.dumps({"ratio": round(statistics.median(ratios), 3), "range": [round(min(ratios), 3), round(max(ratios), 3)],
                  "identical": change == 0, "largest_pixel_change_of_255": round(change * 255, 5)}))
"""


def peer_row(repeats: int) -> dict[str, Any]:
    """The daam package (trace and global map) and our tape with its maps upscaled, on one saved model."""
    import torch

    from whence.engine.attention import AttentionTape
    from whence.models.loading import load
    from whence.models.tiny import tiny
    from whence.run import Settings

    python = python_of("daam")
    with TemporaryDirectory() as folder:
        tiny("sd", size=64, width=64, factor=8).save_pretrained(folder)
        call = [str(python), "-c", PEER_SCRIPT, folder, PROMPT, str(STEPS), str(repeats)]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"package": PEER_PACKAGE, "failed": done.stderr.strip().splitlines()[-1:]}
        theirs = json.loads(done.stdout.strip().splitlines()[-1])
        model = load(folder, device="cpu")
        settings = Settings(PROMPT, 7, STEPS, 4.0, 512, 512)
        model.generate(settings)
        ratios = []
        for _ in range(repeats):
            first = seconds(lambda: model.generate(settings))

            def taped() -> None:
                tape = AttentionTape(keep=("layer",))
                model.generate(settings, tape)
                for layer in tape.layers():
                    maps = layer.values.flatten(0, 1).mean(0, keepdim=True)
                    torch.nn.functional.interpolate(maps, (64, 64), mode="bicubic")

            with_tape = seconds(taped)
            ratios.append(2 * with_tape / (first + seconds(lambda: model.generate(settings))))
    return {"package": PEER_PACKAGE, "daam": theirs, "whence": {"ratio": round(statistics.median(ratios), 3)}}


def main() -> None:
    parser = arguments(str(__doc__))
    parser.add_argument("--peer", action="store_true", help="also the daam package, in an environment of its own")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--families", nargs="*", default=list(SIZES), choices=list(SIZES))
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    rows = {}
    for family in options.families:
        rows[family] = family_row(family, options.repeats)
        if not options.json:
            print(family, rows[family]["ratio"], "aim", rows[family]["aim"], file=sys.stderr)
    result = {"prompt": PROMPT, "steps": STEPS, "repeats": options.repeats, "clock": "process_time, 1 thread"}
    result |= {"torch": torch.__version__, "families": rows}
    if options.peer:
        result["peer"] = peer_row(options.repeats)
    publish("words_overhead", result, options)


if __name__ == "__main__":
    main()
