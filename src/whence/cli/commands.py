"""What can be typed: names, options and their help. The work is in the modules beside, imported when it starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__

app = typer.Typer(
    help="Where did it come from? Explains what a generative model made, and puts every answer on trial.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON alone on standard output.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"whence {__version__}")
        raise typer.Exit


@app.callback()
def whence(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Where did it come from? Explains what a generative model made, and puts every answer on trial."""


@app.command()
def explain(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A diffusers or transformers directory, a hub id, or facts, the embedded language model; none: the "
            "embedded text-to-image model.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="What the picture is asked to show, or the text to go on with.", show_default=False)
    ] = "",
    prompt_file: Annotated[
        Path | None, typer.Option(help="Text: read the prompt from this file.", show_default=False)
    ] = None,
    context: Annotated[
        list[Path] | None,
        typer.Option(help="Text: a file to stand before the prompt, as one passage; may be given again."),
    ] = None,
    question: Annotated[
        str, typer.Option(help="Text: answer this from the passages that are found for it.", show_default=False)
    ] = "",
    passages: Annotated[
        Path | None,
        typer.Option(help='Text: the collection, lines {"text": ..., "name": ...}; with --question.'),
    ] = None,
    top_k: Annotated[int, typer.Option(help="Text: passages to read, the best ones; with --question.")] = 5,
    values: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C",
            show_default=False,
            help="Text: put the evidence on trial: other values that could stand in the place of --span.",
        ),
    ] = None,
    span: Annotated[
        str | None,
        typer.Option(help="Text: explain these words of the output, or its characters START:END.", show_default="all"),
    ] = None,
    units: Annotated[str, typer.Option(help="Text: passage, sentence, phrase, word or token.")] = "sentence",
    max_tokens: Annotated[int, typer.Option(help="Text: tokens to write at most.")] = 32,
    template: Annotated[bool, typer.Option("--template", help="Text: put the prompt into the chat template.")] = False,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the first noise, or of drawn tokens.", show_default="0; text: greedy")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps; else the model's own.", show_default=False)
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1: off.", show_default=False)] = None,
    negative_prompt: Annotated[str, typer.Option(help="What guidance leads away from.", show_default=False)] = "",
    size: Annotated[str | None, typer.Option(metavar="HxW", help="Height x width, pixels.", show_default=False)] = None,
    height: Annotated[int | None, typer.Option(help="Height, pixels.", show_default=False)] = None,
    width: Annotated[int | None, typer.Option(help="Width, pixels.", show_default=False)] = None,
    images: Annotated[int, typer.Option(help="Pictures to make; the first is explained.")] = 1,
    by: Annotated[
        str | None, typer.Option(help="Methods, with commas between; else what the model serves.", show_default=False)
    ] = None,
    swap: Annotated[
        list[str] | None,
        typer.Option(metavar="WORD=A,B,C", help="Words that may take WORD's place in its trial.", show_default=False),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds for a verdict on runs like this: 8 or more; 0: none.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the report; a report in it is replaced.")] = Path("whence-out"),
    json: Json = False,
) -> None:
    """Make a picture or a text, say which words it came from, and put each claim on trial."""
    from . import explain_text

    if explain_text.is_text(model, prompt_file, context or (), span, question or str(passages or "")):
        explain_text.explain(
            explain_text.Asked(
                model or "facts", prompt, prompt_file, context or (), span, units, by, max_tokens, seed, template,
                question, passages, top_k, values,
            ),
            out, json,
        )  # fmt: skip
        return
    from .explain import Asked, explain

    explain(
        Asked(
            model, prompt, seed or 0,
            steps, guidance, negative_prompt, size, height, width, images, by, swap or (), seeds
        ),
        out, json,
    )  # fmt: skip


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in full; none: a list.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """List the methods, or print one method's card: claim, falsifier, cost, when not to use it."""
    from .catalogue import methods

    methods(name, json)


@app.command()
def prove(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Methods, or file.py:function, an explainer of yours; none: all."),
    ] = None,
    world: Annotated[
        str | None,
        typer.Option(
            help="Try on this world of questions: twins, tokens, motifs, words, facts, or file.py:OBJECT.",
            show_default=False,
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="As many draws as the published numbers had.")] = False,
    key: Annotated[
        str | None, typer.Option(help="Draw the worlds from this key; else the published one.", show_default=False)
    ] = None,
    journal: Annotated[
        Path | None,
        typer.Option(help="Keep finished draws here, so that a stopped trial goes on.", show_default="with --full"),
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Record the results in docs/verdicts.json of a clone.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes that share the work.", show_default="cores, at most 4")
    ] = None,
    json: Json = False,
) -> None:
    """Put methods on trial in worlds where the cause was planted, against controls that must fail."""
    from .prove import Asked, prove

    prove(Asked(tuple(names or ()), world, full, key, journal, write, jobs or min(4, os.cpu_count() or 1)), json)


@app.command()
def index(
    model: Annotated[str, typer.Argument(help="shapes, emoji, facts, or a diffusers or transformers directory.")],
    data: Annotated[
        Path | None,
        typer.Argument(
            help="What it was trained on: .txt, .jsonl, a folder of captioned pictures, .npz.", show_default=False
        ),
    ] = None,
    world: Annotated[
        str | None, typer.Option(help="The training set of an embedded world, in place of DATA.", show_default=False)
    ] = None,
    out: Annotated[str, typer.Option("--out", "-o", help="Folder or URL of the index.")] = "whence-index",
    format: Annotated[
        str, typer.Option(help="What is kept of an example: auto, sketch:N, signs:N, bits:N, int8, lorif:C.")
    ] = "auto",
    size: Annotated[
        int | None,
        typer.Option(
            help="Numbers per side that a layer's gradient is projected to.", show_default="16; sketch: as many as fit"
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="An even share of so many examples.", show_default="all; shapes: 480")
    ] = None,
    timesteps: Annotated[
        int | None, typer.Option(help="Pictures: timesteps of the grid that a loss is taken over.", show_default="10")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Texts: tokens that are read, the rest is left out.", show_default="512")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Name patterns of the layers to track, with commas between.", show_default="all")
    ] = None,
    batch: Annotated[int, typer.Option(help="Examples at a time.")] = 16,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an index that was stopped.")] = False,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(help="Another checkpoint of the same training, asked together; repeatable.", show_default=False),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="Spread the work over Ray: local, local:N, auto or host:port.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Keep a compact form of each training example's gradient, so that outputs can be traced to examples."""
    from .index import Asked, index

    more = tuple(checkpoint or ())
    asked = Asked(model, data, world, out, format, size, limit, timesteps, length, layers, batch, resume, ray, more)
    index(asked, json)


@app.command()
def query(
    index: Annotated[str, typer.Argument(help="An index that `whence index` built: folder or URL.")],
    run: Annotated[
        Path | None, typer.Argument(help="Folder of a report whose output is asked about.", show_default=False)
    ] = None,
    prompt: Annotated[str, typer.Option(help="Or make the output of this prompt.", show_default=False)] = "",
    text: Annotated[
        str, typer.Option(help="Texts: ask about this output, not about what the model writes.", show_default=False)
    ] = "",
    seed: Annotated[
        int | None, typer.Option(help="Seed of the first noise, or of drawn tokens.", show_default="0; text: greedy")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Texts: tokens to write at most.")] = 32,
    top: Annotated[int, typer.Option(help="Examples to name.")] = 10,
    both_ends: Annotated[
        bool, typer.Option("--both-ends", help="Also the examples that made the output less likely.")
    ] = False,
    exact: Annotated[
        int | None,
        typer.Option(
            help="Score so many of each end once more by EK-FAC, from their gradients; 0: none.",
            show_default="what 10 s allow",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Put the answer on trial: a training step on the best against others.")
    ] = False,
    span: Annotated[
        str | None, typer.Option(help="Texts: ask about these words, or characters A:B, alone.", show_default=False)
    ] = None,
    per_token: Annotated[
        bool, typer.Option("--per-token", help="Texts: also the first examples of each token by itself.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Also write a page with the examples into this folder.", show_default=False)
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="Spread the scan over Ray: local, local:N, auto or host:port.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Say which training examples an output came from, and how far to trust the answer."""
    from .query import Asked, query

    asked = Asked(index, run, prompt, text, seed, max_tokens, top, both_ends, verify, out, exact, span, per_token, ray)
    query(asked, json)


@app.command()
def trace(
    model: Annotated[
        str | None,
        typer.Argument(help="shapes, the embedded model, or a diffusers directory or hub id.", show_default=False),
    ] = None,
    prompt: Annotated[str, typer.Option(help="What the picture is asked to show.", show_default=False)] = "",
    word: Annotated[str, typer.Option(help="The word of the prompt to trace.", show_default=False)] = "",
    swap: Annotated[
        str | None, typer.Option(help="The word that replaces it in the corrupted run.", show_default="one known")
    ] = None,
    corrupt: Annotated[
        str | None, typer.Option(help="swap, noise or drop.", show_default="swap where a word is known, else noise")
    ] = None,
    where: Annotated[str, typer.Option(help="denoiser, or text-encoder: its layers by token.")] = "denoiser",
    heads: Annotated[bool, typer.Option("--heads", help="Attentions head by head.")] = False,
    kinds: Annotated[
        str | None, typer.Option(help="Kinds of modules, with commas between.", show_default="all that add something")
    ] = None,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    seeds: Annotated[int, typer.Option(help="Seeds that sites are ranked on.")] = 4,
    fresh: Annotated[int, typer.Option(help="Other seeds for the verdict, 6 or more; 0: none.")] = 8,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default="8")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1: off.", show_default=False)] = None,
    search: Annotated[str, typer.Option(help="all sites one by one, or halves of groups that matter.")] = "all",
    journal: Annotated[
        Path | None, typer.Option(help="Keep what was measured here, so that a stopped trace goes on.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write a page into this folder.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Say which part of the network carries a word into the picture, and put the answer on trial on fresh seeds."""
    from .trace import Asked, trace

    asked = Asked(
        model, prompt, word, swap, corrupt, where, heads, kinds, seed, seeds, fresh, steps, guidance, search, journal,
        out,
    )  # fmt: skip
    trace(asked, json)


@app.command()
def train(
    world: Annotated[str, typer.Argument(help="The world whose model to train: emoji, facts or shapes.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder; an unfinished training in it is gone on with.", show_default="training/WORLD"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, data and order.")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Steps (shapes: of the denoiser); else the shipped model's.", show_default=False)
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            help="shapes, emoji: a trained pipeline to train on; else from nothing (emoji: from shapes' codec).",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="facts: folder of ordinary text.", show_default="$WHENCE_DATA, else ../shared/data"),
    ] = None,
    twin: Annotated[
        bool, typer.Option("--twin", help="facts: the twin that knows no town by heart, from the embedded model.")
    ] = False,
) -> None:
    """Train a world's model from nothing. Can be stopped and gone on with."""
    from .train import train

    train(world, out, seed, steps, start, data, twin)


@app.command()
def seeds(
    model: Annotated[
        str, typer.Argument(help="shapes, the embedded model, or a diffusers directory or hub id.")
    ] = "shapes",
    prompt: Annotated[str, typer.Option(help="What the pictures are asked to show.", show_default=False)] = "",
    seeds: Annotated[str, typer.Option(help="How many, a range A:B, or seeds with commas between.")] = "64",
    like: Annotated[
        list[str] | None,
        typer.Option(help="Another prompt of this kind; repeatable.", show_default="shapes: drawn from its words"),
    ] = None,
    prompts: Annotated[int, typer.Option(help="Prompts to choose seeds by, the asked one among them.")] = 4,
    held_out: Annotated[int, typer.Option(help="Other prompts to try the chosen ones on.")] = 4,
    top: Annotated[int, typer.Option(help="Seeds to keep; a verdict needs 8.")] = 8,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps; else the model's own.", show_default=False)
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1: off.", show_default=False)] = None,
    judge: Annotated[
        str,
        typer.Option(
            help="file.py:function that tells of (prompt, image) whether it is right.",
            show_default="shapes: its oracle",
        ),
    ] = "",
    batch: Annotated[int, typer.Option(help="Pictures at a time.")] = 16,
    journal: Annotated[
        Path | None,
        typer.Option(help="Keep finished batches here, so that a stopped bank goes on.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Also write a page with the pictures into this folder.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Was it the seed? Success of each seed, whether seeds matter, the best ones tried on other prompts."""
    from .seeds import Asked
    from .seeds import seeds as run

    run(
        Asked(
            model, prompt, seeds, tuple(like or ()), prompts, held_out, top, steps, guidance, judge, batch, journal, out
        ),
        json,
    )


@app.command()
def edit(
    model: Annotated[str, typer.Argument(help="shapes, emoji, a diffusers directory or a hub id.")],
    change: Annotated[
        str, typer.Option(help='What shall be drawn as what: "red -> blue"; "circle -> red circle | blue circle".')
    ],
    by: Annotated[
        str, typer.Option(help="diff_quickfix, uce, time, erase, or uce_debias for shares.")
    ] = "diff_quickfix",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the change and its report.")] = Path(
        "whence-edit"
    ),
    site: Annotated[
        str | None, typer.Option(help="diff_quickfix: the layer to edit, as layers.0.self_attn.out_proj.")
    ] = None,
    keep: Annotated[
        str | None, typer.Option(metavar="A,B,C", help="What must stay; else the other words of its kind.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt with the old phrase to plan with; may be given again.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds that it is tried on, before and after; 0: none.")] = 12,
    relearn: Annotated[int, typer.Option(help="Steps of fine-tuning back to the old concept; 0: none.")] = 6,
    apply: Annotated[
        Path | None, typer.Option(help="Also write an edited copy of the pipeline into this new folder.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is foreseen, and stop.")] = False,
    journal: Annotated[
        Path | None,
        typer.Option(
            help="erase, uce_debias: keep steps done here, so that a stopped one goes on.", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Change a model so that prompts with one phrase are drawn as another; foreseen, tried, and undone exactly."""
    from .edit import Asked, edit

    prompts = tuple(prompt or ())
    edit(Asked(model, change, by, out, site, keep, prompts, seeds, relearn, apply, dry_run, journal), json)


@app.command()
def undo(
    change: Annotated[Path, typer.Argument(help="The folder or file that `whence edit -o` wrote.")],
    model: Annotated[Path, typer.Argument(help="The pipeline's folder that the change is in.")],
    json: Json = False,
) -> None:
    """Take a change out of a pipeline's folder again, byte for byte."""
    from .edit import undo

    undo(change, model, json)
