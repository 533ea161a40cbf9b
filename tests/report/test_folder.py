import errno
import io
import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from whence.errors import OutputError
from whence.report import bundle as module
from whence.report.bundle import Bundle, write_report
from whence.report.folder import check_folder

FILES = {"report.html", "image.png", "maps.npz", "explanation.json"}


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_the_folder_holds_what_the_run_was(bundle: Bundle, tmp_path: Path) -> None:
    out = write_report(bundle, tmp_path / "deep" / "out")
    assert {p.name for p in out.iterdir()} == FILES
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert (np.asarray(Image.open(out / "image.png")) == bundle.picture).all()
    maps = np.load(out / "maps.npz", allow_pickle=False)
    for e in bundle.explanations:
        assert np.array_equal(maps[e.method], e.scores)
        assert list(maps[f"{e.method}.words"]) == list(e.units.labels)
    assert json.loads((out / "explanation.json").read_text()) == json.loads(bundle.json())
    assert out.stat().st_mode & 0o055


def test_a_report_is_replaced_and_nothing_of_the_old_one_stays(bundle: Bundle, tmp_path: Path) -> None:
    out = write_report(bundle, tmp_path / "out")
    (out / "image-2.png").write_bytes(b"of an older run")
    write_report(bundle, out)
    assert {p.name for p in out.iterdir()} == FILES


@pytest.mark.parametrize("left", ["notes.txt", "report.html"])
def test_other_files_are_never_touched(bundle: Bundle, tmp_path: Path, left: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / left).write_text("mine")
    with pytest.raises(OutputError, match=f"no report wrote: {left}"):
        write_report(bundle, out)
    assert tree(tmp_path) == {f"out/{left}": b"mine"}


def test_a_foreign_file_beside_a_report_is_never_touched(bundle: Bundle, tmp_path: Path) -> None:
    out = write_report(bundle, tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"notes\.txt"):
        write_report(bundle, out)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("old", [False, True], ids=["fresh", "over an old report"])
@pytest.mark.parametrize("at", ["report.html", "image.png", "explanation.json"])
@pytest.mark.parametrize("trouble", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_trouble_half_way_leaves_what_was_there(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool, at: str, trouble: BaseException
) -> None:
    out = tmp_path / "new" / "out"
    if old:
        write_report(bundle, out)
    before, write = tree(tmp_path), module._write

    def fails(path: Path, content: bytes) -> None:
        if path.name == at:
            path.write_bytes(content[: len(content) // 2])
            raise trouble
        write(path, content)

    monkeypatch.setattr(module, "_write", fails)
    full = isinstance(trouble, OSError)
    with pytest.raises(OutputError if full else KeyboardInterrupt, match="disk is full" if full else None):
        write_report(bundle, out)
    assert tree(tmp_path) == before
    assert list(tmp_path.iterdir()) == ([tmp_path / "new"] if old else [])


def test_a_file_that_the_system_refuses_to_write_leaves_nothing(bundle: Bundle, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OutputError, match="too large"):
            write_report(bundle, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_trouble_at_the_last_moment_puts_the_old_report_back(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write_report(bundle, tmp_path / "out")
    before, rename = tree(tmp_path), Path.rename

    def fails(self: Path, target: Any) -> Path:
        if self.suffix == ".part":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(KeyboardInterrupt):
        write_report(bundle, out)
    assert tree(tmp_path) == before


def test_a_folder_that_cannot_be_is_refused_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/whence/out")):
        with pytest.raises(OutputError):
            check_folder(out)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputError, match="current directory"):
        check_folder(Path("."))
    assert check_folder(Path("~/whence-test-out")).is_absolute()
    assert tree(tmp_path) == {"file": b"mine"}
    assert not (tmp_path / "here" / "whence-out").exists()


def test_checking_a_folder_leaves_nothing(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b" / "c")
    assert list(tmp_path.iterdir()) == []


def test_pictures_of_a_run_are_files_of_their_own(tmp_path: Path) -> None:
    from synthetic import make_bundle

    out = write_report(make_bundle("a red circle", images=3), tmp_path / "out")
    assert {p.name for p in out.iterdir()} == FILES | {"image-2.png", "image-3.png"}
    assert Image.open(io.BytesIO((out / "image-3.png").read_bytes())).size == (64, 64)
