"""Which word map finds the object? Mean IoU of noun maps with the oracle's masks, and pointing at the twin that acts.

On pictures of the embedded model: for each noun that stands once in the prompt and that the oracle finds drawn, the
map's region (map >= tau max) against the mask of the objects of that shape, every map kind on the same pictures;
intervals are 95 % over pictures. Also the pixel average precision, which needs no tau. ``--peer`` adds the maps of the
`daam` package, made in its own environment.

    python -m benchmarks.word_maps --json [--pictures 300] [--peer]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

import whence
from benchmarks.peers import ROOT, python_of
from benchmarks.recording import arguments, publish
from whence.ablations.leave_one_out import LeaveOneOut
from whence.engine.progress import progress
from whence.engine.randomness import stream
from whence.explanation import Explanation
from whence.inputs.daam import DAAM, region
from whence.run import Run
from whence.score import Score
from whence.worlds import controls
from whence.worlds.shapes import model_directory, trials
from whence.worlds.shapes.scenes import SHAPES, draw_scene

TAUS = (0.3, 0.4, 0.5)
KINDS = ("one", "two", "relation", "three")


def queries(model, n: int, name: str = "word_maps"):
    """Runs with {noun: mask}: nouns that stand once in the prompt and that some object of the picture has."""
    found = []
    with progress("pictures", total=n, unit="pictures") as advance:
        for start in range(0, 20 * n, trials.BATCH):
            scenes = [draw_scene(stream(name, i), KINDS[i % len(KINDS)]) for i in range(start, start + trials.BATCH)]
            for run in trials.pictures(model, [s.caption for s in scenes], f"{name}{start}"):
                masks = {w: own for w, (own, _) in trials.drawn(run).items() if w in SHAPES}
                if masks:
                    found.append((run, masks))
                    advance()
                if len(found) == n:
                    return found
    raise SystemExit(f"only {len(found)} pictures of {20 * n} show a noun of their prompt")


def average_precision(scores: np.ndarray, mask: np.ndarray) -> float:
    order = np.argsort(-scores, axis=None, kind="stable")
    hit = mask.ravel()[order]
    return float((np.cumsum(hit) / np.arange(1, hit.size + 1))[hit].mean())


def measure(name: str, maps_of: Callable[[int, Run], dict[str, np.ndarray]], found) -> dict:
    iou: dict[float, list[float]] = {t: [] for t in TAUS}
    precision = []
    with progress(name, total=len(found), unit="pictures") as advance:
        for i, (run, masks) in enumerate(found):
            maps = maps_of(i, run)
            for tau in TAUS:
                regions = {w: region(maps[w], tau) for w in masks}
                iou[tau].append(np.mean([(regions[w] & m).sum() / (regions[w] | m).sum() for w, m in masks.items()]))
            precision.append(np.mean([average_precision(maps[w], m) for w, m in masks.items()]))
            advance()
    return {
        "mean IoU": {str(t): Score.of(name, "IoU", v).record() for t, v in iou.items()},
        "average precision": Score.of(name, "pixel average precision", precision).record(),
    }


def heads_that_point(model, n: int) -> dict[str, tuple[int, ...]]:
    """Heads whose maps of nouns find their objects best, chosen on ``n`` other pictures: from the best on, as many as
    raise the mean IoU (tau .4 and .5) of their mean map."""
    import torch

    from whence.engine.attention import AttentionTape

    maps: dict[tuple[str, int], list[np.ndarray]] = {}
    masks = []
    for run, found in queries(model, n, "choosing heads"):
        tape = AttentionTape(keep=("layer", "head"))
        model.generate(run.settings, tape=tape)
        masks += list(found.values())
        for layer in tape.layers(image=0):
            f = layer.values[0].float()  # head, word, y, x
            f = f[:, [run.words.find(w) for w in found]]
            f = torch.nn.functional.interpolate(f, run.images.shape[1:3], mode="bicubic").clamp(min=0)
            for head, of_words in enumerate(f.numpy()):
                maps.setdefault((layer.name, head), []).extend(of_words)

    def fit(heads: list[tuple[str, int]]) -> float:
        means = np.mean([maps[h] for h in heads], axis=0)
        regions = [(region(m, t), mask) for m, mask in zip(means, masks, strict=True) for t in (0.4, 0.5)]
        return float(np.mean([(r & mask).sum() / (r | mask).sum() for r, mask in regions]))

    ranked = sorted(maps, key=lambda h: -fit([h]))
    chosen = max((ranked[:k] for k in range(1, len(ranked) + 1)), key=fit)
    return {
        layer: tuple(sorted(h for name, h in chosen if name == layer)) for layer in dict.fromkeys(n for n, _ in chosen)
    }


def peer_maps(found) -> tuple[Callable[[int, Run], dict[str, np.ndarray]], dict]:
    """The package's maps of the same prompts and seeds, and how far its pictures are from ours (0..255)."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = Path(folder) / "jobs.npz"
        np.savez(
            jobs,
            prompts=[r.settings.prompt for r, _ in found],
            seeds=[r.settings.seed for r, _ in found],
            nouns=[" ".join(m) for _, m in found],
        )
        script = ROOT / "benchmarks" / "peer_daam.py"
        results = Path(folder) / "out.npz"
        subprocess.run([str(python_of("daam")), str(script), model_directory(), jobs, results], check=True)
        out = np.load(results)
        maps, images = dict(out), out["images"]
    gap = [int(abs(images[i].astype(int) - r.images[0]).max()) for i, (r, _) in enumerate(found)]
    note = {"pictures within 2/255 of ours": float(np.mean(np.array(gap) <= 2)), "largest difference of 255": max(gap)}
    return lambda i, run: {w: maps[f"{i}/{w}"] for w in found[i][1]}, note


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__)
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--choosing", type=int, default=60, help="other pictures, to choose heads on")
    parser.add_argument("--twins", type=int, default=40, help="pictures of the twin trial")
    parser.add_argument("--peer", action="store_true", help="also the daam package, in its own environment")
    options = parser.parse_args()
    model = whence.load()
    heads = heads_that_point(model, options.choosing)
    found = queries(model, options.pictures)

    def by(explain: Callable[[Run], Explanation]) -> Callable[[int, Run], dict[str, np.ndarray]]:
        def maps(i: int, run: Run) -> dict[str, np.ndarray]:
            only_nouns = explain is explainers["leave_one_out"]
            explanation = LeaveOneOut(at_most=2, words=tuple(found[i][1])).explain(run) if only_nouns else explain(run)
            return {w: explanation.map_of(w) for w in found[i][1]}

        return maps

    explainers = {
        "daam": DAAM().explain,
        "daam, heads chosen on other pictures": DAAM(heads=heads).explain,
        "daam with the middle block": DAAM(blocks=("down", "mid", "up")).explain,
        "leave_one_out": LeaveOneOut(at_most=2).explain,
        "random": controls.random_maps,
        "centre": controls.centre,
    }
    kinds = {name: measure(name, by(explain), found) for name, explain in explainers.items()}
    result = {"pictures": len(found), "nouns": sum(len(m) for _, m in found), "heads": heads, "kinds": kinds}
    if options.peer:
        maps, note = peer_maps(found)
        kinds["daam package 0.2.0"] = measure("daam package", maps, found) | note
    result["twins"] = {}
    for name, explain in explainers.items():
        try:
            result["twins"][name] = trials.twins(explain, options.twins, model).record()
        except whence.WhenceError as error:
            result["twins"][name] = str(error)
        print(name, result["twins"][name], file=sys.stderr)
    publish("word_maps", result, options)


if __name__ == "__main__":
    main()
