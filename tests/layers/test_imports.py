"""Who may import whom. The picture in the design stays true because this test reads the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "whence"

NOUNS = "nouns"
METHODS = ("inputs", "parts", "ablations", "influence", "latents", "concepts", "edits")
MAY_IMPORT = {
    NOUNS: {NOUNS},
    "engine": {NOUNS, "engine"},
    "models": {NOUNS, "engine", "models"},
    "worlds": {NOUNS, "engine", "models", "worlds"},
    "inputs": {NOUNS, "engine", "models", "worlds"},
    "parts": {NOUNS, "engine", "models", "worlds"},
    "ablations": {NOUNS, "engine", "models", "worlds"},
    "latents": {NOUNS, "engine", "models", "worlds"},
    "concepts": {NOUNS, "engine", "models", "worlds"},
    "edits": {NOUNS, "engine", "models", "worlds"},
    "influence": {NOUNS, "engine", "models", "worlds"},
    "checks": {NOUNS, "engine", "models", "worlds", "checks"},
    "metrics": {NOUNS, "engine", "models", "worlds", "metrics"},
    "store": {NOUNS, "engine", "models", "worlds", "influence", "checks", "store"},
    "report": {NOUNS, "engine", "models", "worlds", *METHODS, "checks", "metrics", "store", "verbs", "report"},
    "verbs": {NOUNS, "engine", "models", "worlds", *METHODS, "checks", "metrics", "verbs"},
    "cli": {NOUNS, "engine", "models", "worlds", *METHODS, "checks", "metrics", "store", "report", "verbs", "cli"},
}
"""Layer -> layers. Methods import no method, worlds and checks none."""
DRAWING = ("whence.report.fragments", "whence.report.text_page")
"""What a noun may ask to draw it."""
FACADE = {"verbs": "verbs", "proving": "verbs"}
"""Plain files that stand above the methods: they look one up by its name and run it."""
ECOSYSTEM = {"diffusers", "transformers", "torch_geometric", "peft", "tokenizers"}
HEAVY = {"torch", *ECOSYSTEM}
UNSAFE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
NAMELESS = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    functions: tuple[str, ...]
    typing_only: bool


def files(*roots: str) -> list[Path]:
    return sorted(p for r in roots for p in (ROOT / r).rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf8"))


def imports_of(path: Path) -> Iterator[Import]:
    """Every import of a file, relative ones made absolute, with the functions around it."""
    inside = path.is_relative_to(ROOT / "src")
    package = path.relative_to(ROOT / "src" if inside else ROOT).parent.parts

    def visit(node: ast.AST, functions: tuple[str, ...], typing_only: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for a in child.names:
                    yield Import(a.name, child.lineno, functions, typing_only)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else ()
                stem = ".".join([*base, *([child.module] if child.module else [])])
                for a in child.names:
                    # `from . import verbs` and `from .checks.swap import swap` both name a module first.
                    module = f"{stem}.{a.name}" if not child.module or is_module(f"{stem}.{a.name}") else stem
                    yield Import(module, child.lineno, functions, typing_only)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from visit(child, (*functions, child.name), typing_only)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for part in child.body:
                    yield from visit(ast.Module([part], []), functions, True)
                for part in child.orelse:
                    yield from visit(ast.Module([part], []), functions, typing_only)
            else:
                yield from visit(child, functions, typing_only)

    yield from visit(tree_of(path), (), False)


def is_module(name: str) -> bool:
    place = ROOT / "src" / Path(*name.split("."))
    return place.with_suffix(".py").exists() or (place / "__init__.py").exists()


def layer_of(module: str) -> str:
    """The layer of ``whence.x.y``: its room, the facade's, or "nouns" for the plain files of the package."""
    parts = module.split(".")
    room = FACADE.get(parts[1], parts[1]) if len(parts) > 1 else NOUNS
    return room if room in MAY_IMPORT else NOUNS


def layer_of_file(path: Path) -> str:
    return layer_of(".".join(path.relative_to(ROOT / "src").with_suffix("").parts))


SOURCES = files("src")


def test_every_room_has_a_layer() -> None:
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir() and any(p.rglob("*.py"))}
    assert rooms <= set(MAY_IMPORT)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_only_what_its_layer_may(path: Path) -> None:
    layer = layer_of_file(path)
    wrong = []
    for found in imports_of(path):
        if not found.module.startswith("whence"):
            continue
        # A noun draws itself: the one look upwards, when the notebook asks. The front door names the verbs' types.
        drawing = found.functions[-1:] == ("_repr_html_",) and found.module.startswith(DRAWING)
        front_door = path == PACKAGE / "__init__.py" and found.typing_only
        if layer_of(found.module) not in MAY_IMPORT[layer] and not drawing and not front_door:
            wrong.append(f"line {found.line}: {layer} imports {found.module}")
    assert not wrong, f"{path.relative_to(ROOT)}: {'; '.join(wrong)}"


@pytest.mark.parametrize("room", METHODS)
def test_methods_import_no_method(room: str) -> None:
    for path in (PACKAGE / room).glob("*.py"):
        own = f"whence.{room}"
        assert not [i for i in imports_of(path) if i.module.startswith(own)], path


def test_only_models_import_the_model_libraries() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} line {i.line}: {i.module}"
        for path in SOURCES
        for i in imports_of(path)
        if i.module.split(".")[0] in ECOSYSTEM and layer_of_file(path) != "models"
    ]
    assert not wrong, wrong


def test_nouns_need_no_torch_to_be_imported() -> None:
    wrong = [
        f"{path.name} line {i.line}: {i.module}"
        for path in (*PACKAGE.glob("*.py"), PACKAGE / "cli" / "__init__.py", *(PACKAGE / "checks").glob("*.py"))
        for i in imports_of(path)
        if i.module.split(".")[0] in HEAVY and not i.functions and not i.typing_only
    ]
    assert not wrong, wrong


def loaded_by(code: str) -> set[str]:
    program = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return {m.split(".")[0] for m in done.stdout.split()}


@pytest.mark.parametrize(
    "code",
    [
        "import whence",
        "import whence; whence.Run, whence.Units, whence.Readout, whence.Explanation, whence.Verdict, whence.Card",
        "import whence; whence.catalogue()",
        "import whence.verdict, whence.score, whence.checks.swap, whence.verbs",
    ],
)
def test_importing_whence_loads_neither_torch_nor_the_model_libraries(code: str) -> None:
    assert not loaded_by(code) & HEAVY


def test_import_whence_alone_does_not_even_load_numpy() -> None:
    assert "numpy" not in loaded_by("import whence")


def test_nothing_unpickles() -> None:
    wrong = []
    for path in files("src", "tests", "benchmarks"):
        wrong += [f"{path}: {i.module}" for i in imports_of(path) if i.module.split(".")[0] in UNSAFE]
        for node in ast.walk(tree_of(path)):
            loads = isinstance(node, ast.Attribute) and node.attr in ("load", "read_pickle")
            if loads and ast.unparse(node) in ("torch.load", "pd.read_pickle"):
                wrong.append(f"{path} line {node.lineno}: {ast.unparse(node)}")
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                wrong.append(f"{path} line {node.value.lineno}: allow_pickle")
    assert not wrong, wrong


def test_every_module_has_a_name_that_says_what_it_does() -> None:
    named = {p: {*p.relative_to(ROOT).with_suffix("").parts} for p in files("src", "tests", "benchmarks")}
    assert not [p for p, parts in named.items() if NAMELESS & parts]


def test_the_reader_of_imports_sees_them() -> None:
    found = {(i.module, i.functions, i.typing_only) for i in imports_of(PACKAGE / "verdict.py")}
    assert ("whence.report.fragments", ("_repr_html_",), False) in found
    assert ("whence.errors", (), False) in found
    assert ("numpy", (), True) in found
    assert layer_of("whence.engine.prompts") == "engine"
    assert layer_of("whence.units") == NOUNS
