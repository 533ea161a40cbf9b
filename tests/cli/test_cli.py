import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import whence
from whence.cli import commands, run

KNOWN = "a red circle"


def whence_says(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run(commands.app, list(map(str, arguments)))
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained pipeline of the embedded model's make that knows the words of `shapes`."""
    from whence.models.small_stable_diffusion import build_pipeline
    from whence.worlds.shapes import vocabulary
    from whence.worlds.shapes.scenes import WORDS

    path = tmp_path_factory.mktemp("model") / "tiny"
    build_pipeline(WORDS).save_pretrained(path)
    (path / "words.json").write_text(json.dumps(vocabulary.record()))
    return path


# What works --------------------------------------------------------------------------------------------------------


def test_explain_makes_a_report_of_the_very_run_and_prints_its_path_alone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, printed, told = whence_says(
        capsys, "explain", model, "--prompt", KNOWN, "--seed", 3, "--steps", 2, "--out", out
    )
    assert (code, printed) == (0, f"{out / 'report.html'}\n"), told
    assert {p.name for p in out.iterdir()} == {"report.html", "image.png", "maps.npz", "explanation.json"}
    for word in ("red", "circle", "daam", "leave_one_out"):
        assert word in told
    record = json.loads((out / "explanation.json").read_text())
    assert [e["method"] for e in record["explanations"]] == ["daam", "leave_one_out"]
    assert {(t["method"], t["word"]) for t in record["trials"]} == {
        (m, w) for m in ("daam", "leave_one_out") for w in ("red", "circle")
    }
    assert [(c["word"], c["replacement"]) for c in record["counterfactuals"]][:1] == [("red", "green")]

    from PIL import Image

    plain = whence.load(model).picture(KNOWN, seed=3, steps=2)
    assert (np.asarray(Image.open(out / "image.png")) == plain.images[0]).all()
    assert record["run"]["fingerprint"] == plain.fingerprint


def test_json_is_alone_on_standard_output_and_is_the_file(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["explain", model, "--prompt", KNOWN, "--steps", 1, "--by", "leave_one_out", "--json", "--images", 2]
    code, printed, told = whence_says(capsys, *arguments, "--out", tmp_path / "out")
    assert code == 0, told
    assert json.loads(printed) == json.loads((tmp_path / "out" / "explanation.json").read_text())
    assert (tmp_path / "out" / "image-2.png").exists()


def test_the_command_of_the_record_makes_the_same_record(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shlex

    first = [
        "explain",
        model,
        "--prompt",
        KNOWN,
        "--steps",
        2,
        "--swap",
        "circle=square,cross",
        "--by",
        "daam",
        "--json",
    ]
    a = json.loads(whence_says(capsys, *first, "--out", tmp_path / "a")[1])
    again = shlex.split(a["command"])[1:]
    b = json.loads(whence_says(capsys, *again, "--json", "--out", tmp_path / "b")[1])
    assert [c["replacement"] for c in a["counterfactuals"] if c["word"] == "circle"] == ["square", "cross"]
    for record in (a, b):
        for e in record["explanations"]:
            e["cost"].pop("seconds")
    assert a == b


def test_pictures_are_made_once_whoever_asks(model: Path) -> None:
    from dataclasses import replace

    from whence.cli.remember import Remembering

    adapter = whence.load(model)
    first = adapter.picture(KNOWN, seed=1, steps=2)
    remembering = Remembering(adapter)
    told: list[int] = []
    remembering.advance = told.append
    settings = [replace(first.settings, prompt=p) for p in ("a blue circle", "a red square", "a blue circle")]
    a, b = remembering.generate_many(settings), remembering.generate_many(settings[:2])
    assert remembering.runs == 2
    assert sum(told) == 2 * 2 + 2 * 2
    assert a[0] is b[0]
    assert a[0] is a[2]
    assert (a[0].images == adapter.generate_many(settings[:2])[0].images).all()
    assert a[0].again().model is remembering


def test_a_verdict_on_runs_like_this_comes_first_when_asked_for(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["explain", model, "--prompt", "circle", "--steps", 1, "--by", "daam", "--seeds", 8, "--json"]
    code, printed, told = whence_says(capsys, *arguments, "--out", tmp_path / "out")
    assert code == 0, told
    assert [(t["verdict"]["scope"], t["verdict"]["n"]) for t in json.loads(printed)["trials"]] == [
        ("runs like this", 8),
        ("this run", 3),
    ]


def test_methods_lists_every_card_and_prints_one(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = whence_says(capsys, "methods", "--json")
    assert code == 0
    assert {c["name"] for c in json.loads(printed)} == set(whence.catalogue())
    assert "leave_one_out" in whence_says(capsys, "methods")[1]
    one = whence_says(capsys, "methods", "daam")[1]
    assert "claim" in one
    assert "falsifier" in one
    assert json.loads(whence_says(capsys, "methods", "daam", "--json")[1])["name"] == "daam"


@pytest.mark.parametrize("arguments", [["--help"], ["methods"], ["explain", "--help"], ["--version"]])
def test_help_and_methods_are_quick_and_load_no_model_library(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom whence.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "found = {'torch', 'diffusers', 'transformers', 'scipy'} & set(sys.modules)\nassert not found, found"
    )
    began = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(Path(whence.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert time.perf_counter() - began < 5  # under 1 s on a machine that is not busy


# Bad input: exit code 2, three lines, nothing written ---------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], root: Path, *arguments: object) -> str:
    before = sorted(root.rglob("*"))
    code, printed, told = whence_says(capsys, *arguments)
    assert code == 2
    assert printed == ""
    lines = told.strip().splitlines()
    assert [line.split(":")[0] for line in lines] == ["asked", "found", "would work"], told
    assert sorted(root.rglob("*")) == before
    return told


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--by", "damm"], "'daam'"),
        (["--by", "daam,leave_one_uot"], "'leave_one_out'"),
        (["--by", "swap"], "a check"),
        (["--by", ""], "daam"),
        (["--prompt", " "], "the prompt is empty"),
        (["--images", "0"], "1 or more"),
        (["--steps", "0"], "1 or more"),
        (["--height", "-8"], "1 or more"),
        (["--size", "big"], "not height x width"),
        (["--size", "64x64", "--height", "64"], "--height or --width beside it"),
        (["--swap", "red"], "--swap dog=cat,fox,owl"),
        (["--swap", "red="], "--swap dog=cat,fox,owl"),
        (["--seeds", "5"], "8 or more"),
        (["--seeds", "-1"], "8 or more"),
    ],
)
def test_options_are_refused_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)

    def load(model: Any = None) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("whence.verbs.load", load)
    assert says in refused(capsys, tmp_path, "explain", "no/model", "--prompt", KNOWN, *options)


@pytest.mark.parametrize("kind", ["foreign", "file", "under a file"])
def test_a_folder_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("whence.verbs.load", lambda model=None: pytest.fail("a model was loaded"))
    out = tmp_path / "out"
    if kind == "foreign":
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    else:
        out.write_text("mine")
    out = out / "deeper" if kind == "under a file" else out
    assert str(out) in refused(capsys, tmp_path, "explain", "--prompt", KNOWN, "--out", out)


def test_models_that_are_none_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "model_index.json" in refused(capsys, tmp_path, "explain", "empty", "--prompt", KNOWN)
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04")
    assert "pickle" in refused(capsys, tmp_path, "explain", "model.ckpt", "--prompt", KNOWN)
    assert "no such directory" in refused(capsys, tmp_path, "explain", "nowhere", "--prompt", KNOWN)


def test_a_hub_model_without_a_network_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "a network" in refused(capsys, tmp_path, "explain", "nobody/nothing", "--prompt", KNOWN)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prompt", "a red giraffe"], "giraffe"),
        (["--prompt", "red " * 30], "red"),
        (["--size", "63x64"], "multiples"),
        (["--swap", "dog=cat"], "red, circle"),
        (["--by", "concept_attention"], "leave_one_out"),
        (["--guidance", "nan"], "not a number"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_what_the_model_cannot_do_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    options: list[str], says: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, tmp_path, "explain", model, "--prompt", KNOWN, "--steps", 1, *options)


@pytest.mark.parametrize(
    "arguments",
    [["methods", "damm"], ["prove", "damm"], ["train", "shape"], ["train", "shapes", "--steps", "0"],
     ["train", "shapes", "--seed", "-1"]],
)  # fmt: skip
def test_other_commands_refuse_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capsys, tmp_path, *arguments)


@pytest.mark.parametrize("arguments", [["explain", "--promt", "x"], ["nothing"], ["explain", "--seed", "x"]])
def test_mistyped_commands_say_how_and_exit_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code, printed, told = whence_says(capsys, *arguments)
    assert (code, printed) == (2, "")
    assert "Usage: whence" in told


@pytest.mark.parametrize("where", ["whence.verbs.load", "whence.verbs.explain", "whence.report.bundle._write"])
def test_ctrl_c_leaves_the_old_report_and_exits_with_130(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    arguments = ["explain", model, "--prompt", KNOWN, "--steps", 1, "--by", "daam", "--out", tmp_path / "out"]
    assert whence_says(capsys, *arguments)[0] == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, stop)
    code, printed, told = whence_says(capsys, *arguments)
    assert (code, printed) == (130, "")
    assert "stopped" in told
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_prove_prints_what_was_found_and_records_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trials themselves are tested elsewhere; here a row stands for one."""
    score = {"name": "pointing", "unit": "share", "mean": 0.9, "interval": [0.8, float("inf")], "n": 16}
    row = {"method": "daam", "word": "supported", "score": score, "expect": 0.75, "seconds": 3.2,
           "controls": {"random": score | {"mean": 0.5}, "shuffled": score | {"mean": 0.6}}}  # fmt: skip
    rows = [row, {"method": "swap", "word": "tested", "reason": "its falsifier is a test"}]
    monkeypatch.setattr("whence.proving.prove", lambda names, *_, **__: rows if not names else rows[:1])
    monkeypatch.chdir(tmp_path)
    assert "no docs folder" in refused(capsys, tmp_path, "prove", "--write")
    (tmp_path / "docs").mkdir()
    code, printed, _ = whence_says(capsys, "prove", "--json", "--write")
    assert code == 0
    assert json.loads(printed)[0]["score"]["interval"] == [0.8, None]
    assert whence_says(capsys, "prove", "daam", "--write", "--json")[0] == 0
    record = json.loads((tmp_path / "docs" / "verdicts.json").read_text())
    assert [r["method"] for r in record["methods"]] == ["daam", "swap"]
    assert [p.name for p in (tmp_path / "docs").iterdir()] == ["verdicts.json"]
    row["score"] = score | {"interval": [0.8, 1.0], "n": 6, "mean": 0.1}
    code, _, told = whence_says(capsys, "prove", "daam", "--write", "--json")
    assert "keeps 16 replicates" in told
    assert json.loads((tmp_path / "docs" / "verdicts.json").read_text())["methods"][0]["score"]["mean"] == 0.9
    row["score"] = score | {"interval": [0.8, 1.0], "n": 60, "mean": 0.7}
    assert whence_says(capsys, "prove", "daam", "--write", "--json")[2] == ""
    assert json.loads((tmp_path / "docs" / "verdicts.json").read_text())["methods"][0]["score"]["mean"] == 0.7
    row["score"] = score | {"interval": [0.8, 1.0]}
    printed = whence_says(capsys, "prove")[1]
    assert "0.600 shuffled" in printed
    assert "its falsifier is a test" in printed


def test_a_method_that_maps_no_pictures_is_refused_before_any_picture_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whence.verbs.load", lambda *_, **__: pytest.fail("loaded"))
    for name, found in (("saliency", "maps no pictures"), ("swap", "a check")):
        said = refused(capsys, tmp_path, "explain", "--prompt", "a red circle", "--by", name)
        assert found in said
        assert "concept_attention, daam, leave_one_out" in said
        assert "leave_one_out, swap" not in said
