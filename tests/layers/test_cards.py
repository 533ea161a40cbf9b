"""Every method file carries a Card of literals that is complete and points at things that exist."""

from __future__ import annotations

import ast
import csv
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

from whence.method import ROOMS, Card, catalogue, load
from whence.proving import measured_by
from whence.worlds.registry import WORLDS, find

ROOT = Path(__file__).parents[2]
FILES = [p for room in ROOMS for p in sorted((ROOT / "src/whence" / room).glob("*.py")) if p.stem != "__init__"]
KEYS = {"trial", "planted", "expect", "control", "seconds"}
VERBS = {
    "inputs": ("explain",), "ablations": ("explain",), "parts": ("explain",), "latents": ("explain", "fit"),
    "influence": ("fit",), "concepts": ("fit",), "edits": ("write", "plan", "steer"),
}  # fmt: skip
"""Room -> what its methods answer by; checks and metrics are functions."""


def systems() -> dict[str, dict[str, str]]:
    with (ROOT / "docs" / "systems.tsv").open(encoding="utf8", newline="") as handle:
        return {row["id"]: row for row in csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE)}


def call_of(path: Path) -> ast.Call:
    found = [
        node.value
        for node in ast.parse(path.read_text(encoding="utf8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CARD" and isinstance(node.value, ast.Call)
    ]
    assert len(found) == 1, f"{path} needs one CARD = Card(...)"
    return found[0]


def test_the_roadmap_has_its_197_rows() -> None:
    rows = systems()
    assert len(rows) == 197
    assert all(None not in row and all(v is not None for v in row.values()) for row in rows.values())


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_method_file_has_a_card_with_all_fields_and_literals_only(path: Path) -> None:
    given = {k.arg: k.value for k in call_of(path).keywords}
    assert set(given) == {f.name for f in fields(Card)} - {"module"}
    values = {name: ast.literal_eval(node) for name, node in given.items()}
    for name, value in values.items():
        if name not in ("systems", "departs"):
            assert value, f"{path.stem}: {name} is empty"
    for name in ("systems", "units", "works_on", "needs"):
        assert isinstance(values[name], tuple), f"{path.stem}: {name} is no tuple; a comma may be missing"
    assert values["name"] == path.stem


@pytest.mark.parametrize("card", catalogue().values(), ids=lambda c: c.name)
def test_a_card_points_at_rows_and_verbs_that_exist(card: Card) -> None:
    unknown = set(card.systems) - set(systems())
    assert not unknown, f"{card.name}: {unknown} are not in docs/systems.tsv"
    verb = load(card.name)
    assert callable(verb)
    room = card.module.split(".")[1]
    verbs = VERBS.get(room, ())
    assert not verbs or any(hasattr(verb, v) for v in verbs), f"{card.name}: {room} answer by {' or '.join(verbs)}"
    assert "explain" in verbs or not hasattr(verb, "explain")


@pytest.mark.parametrize("card", catalogue().values(), ids=lambda c: c.name)
def test_a_falsifier_says_how_the_claim_could_be_shown_false(card: Card) -> None:
    falsifier = card.falsifier
    if falsifier.get("status") == "not shown":
        assert len(falsifier.get("reason", "")) > 20, f"{card.name} is not shown, without a reason"
        return
    assert set(falsifier) >= KEYS, f"{card.name}: missing {KEYS - set(falsifier)}"
    assert isinstance(falsifier["expect"], float | int)
    assert falsifier["seconds"] > 0
    trial = falsifier["trial"]
    if "::" in trial:  # a check is tried by a test of its own: it judges explanations, it gives none
        path, name = trial.split("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    elif measured_by(card) is None:
        world, name = trial.split(".")
        if world in WORLDS:
            assert name in find(world).structures
            return
        assert callable(getattr(import_module(f"whence.worlds.{world}.trials"), name))


def test_no_two_cards_share_a_name_and_none_is_imported_to_be_read() -> None:
    assert len(catalogue()) == len(FILES)


def test_every_error_has_a_page() -> None:
    tree = ast.parse((ROOT / "src/whence/errors.py").read_text(encoding="utf8"))
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    pages = {p.stem for p in (ROOT / "docs" / "errors").glob("*.md")} - {"README"}
    assert pages == classes
    for name in pages:
        assert f"({name}.md)" in (ROOT / "docs" / "errors" / "README.md").read_text(encoding="utf8")
