"""What is put into an index comes out of it, whatever the shards, the parts and the order; what does not fit is
refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from whence.engine.randomness import stream
from whence.errors import OutputError, RunError
from whence.store import Index, Manifest
from whence.store.contents import Contents

PLANES = {"bits": 9, "int8@checkpoint-1": 64}
N = 101


def manifest(**changes: Any) -> Manifest:
    made = Manifest(model="m1", data="d1", examples=N, planes=PLANES, method="lorif", settings={"rank": 1})
    return replace(made, **changes)


def codes(n: int = N) -> dict[str, np.ndarray]:
    return {p: stream("codes", p).integers(0, 256, (n, stride), dtype=np.uint8) for p, stride in PLANES.items()}


def cut(planes: dict[str, np.ndarray], a: int, b: int) -> dict[str, np.ndarray]:
    return {p: rows[a:b] for p, rows in planes.items()}


def build(place: Path, parts: int = 13, rows_per_shard: int = 32, **more: Any) -> dict[str, np.ndarray]:
    planes = codes()
    with Index.create(place, manifest(), rows_per_shard=rows_per_shard, **more) as index:
        for at in range(0, N, parts):
            index.append(cut(planes, at, at + parts), np.arange(N)[at : at + parts] + 1000)
    return planes


def joined(index: Index, plane: str, **how: Any) -> np.ndarray:
    return np.concatenate([rows for _, rows in index.blocks(plane, **how)])


def files(place: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(place.iterdir()) if p.name != "writer.lock"}


@pytest.mark.parametrize("rows_per_shard", [10, 32, 101, 500])
@pytest.mark.parametrize("rows", [None, 1, 7])
def test_rows_come_out_as_they_were_put_in_whatever_the_shards_and_blocks(
    tmp_path: Path, rows_per_shard: int, rows: int | None
) -> None:
    planes = build(tmp_path / "ix", rows_per_shard=rows_per_shard)
    index = Index.open(tmp_path / "ix", model="m1", data="d1")
    assert len(index) == index.done == N
    assert (index.ids == np.arange(N) + 1000).all()
    for plane, expected in planes.items():
        starts = [(start, len(block)) for start, block in index.blocks(plane, rows=rows)]
        assert [s for s, _ in starts] == np.cumsum([0, *(n for _, n in starts)])[:-1].tolist()
        assert (joined(index, plane, rows=rows) == expected).all()
        numbers = stream("numbers").integers(0, N, 40)
        assert (index.rows(plane, numbers) == expected[numbers]).all()
        assert (joined(index, plane, rows=rows, first=30, last=70) == expected[30:70]).all()


@pytest.mark.parametrize("parts", [1, 32, 33])
def test_the_bytes_on_disk_do_not_depend_on_the_parts_that_rows_came_in(tmp_path: Path, parts: int) -> None:
    build(tmp_path / "a", parts=50)
    build(tmp_path / "b", parts=parts)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_build_that_is_closed_and_opened_again_at_any_row_gives_the_same_bytes(tmp_path: Path) -> None:
    build(tmp_path / "once")
    planes = codes()
    Index.create(tmp_path / "often", manifest(), rows_per_shard=32).close()
    for a, b in ((0, 5), (5, 40), (40, 64), (64, 65), (65, 101)):
        with Index.open(tmp_path / "often") as index:
            assert index.done == a
            index.append(cut(planes, a, b), np.arange(a, b) + 1000)
            index.flush()
            assert index.done == b
    Index.open(tmp_path / "often").delete([])  # a writer clears away what no manifest lists any more
    assert files(tmp_path / "once") == files(tmp_path / "often")


def test_rows_are_views_of_the_files_and_cannot_be_written(tmp_path: Path) -> None:
    build(tmp_path / "ix")
    _, block = next(iter(Index.open(tmp_path / "ix").blocks("bits")))
    assert not block.flags.owndata
    assert not block.flags.writeable
    build(tmp_path / "wide", rows_per_shard=N)
    _, block = next(iter(Index.open(tmp_path / "wide").blocks("int8@checkpoint-1")))
    assert block.ctypes.data % 64 == 0


def test_deleted_rows_stay_deleted_and_come_back_only_when_asked(tmp_path: Path) -> None:
    planes = build(tmp_path / "ix")
    with Index.open(tmp_path / "ix") as index:
        index.delete([1003, 1031, 1032, 1100])
        index.delete([1003])
    index = Index.open(tmp_path / "ix")
    alive = np.ones(N, bool)
    alive[[3, 31, 32, 100]] = False
    assert (index.alive == alive).all()
    assert len(index) == N
    for plane, expected in planes.items():
        assert (joined(index, plane) == expected[alive]).all()
        for start, block in index.blocks(plane):
            assert (block == expected[start : start + len(block)]).all()
        assert (joined(index, plane, only_alive=False) == expected).all()
    with index:
        index.append(cut(planes, 0, 5), np.arange(5) + 5000)
        assert index.done == N  # they wait
    index = Index.open(tmp_path / "ix")
    assert len(index) == N + 5
    assert (index.alive == [*alive, *[True] * 5]).all()
    with index:
        index.restore([1003, 1031, 1032, 1100])
    assert Index.open(tmp_path / "ix").alive.all()


def test_an_unknown_example_is_not_deleted_in_silence(tmp_path: Path) -> None:
    build(tmp_path / "ix")
    with Index.open(tmp_path / "ix") as index, pytest.raises(RunError, match="2 ids are not in it: 7, 8"):
        index.delete([1003, 7, 8])
    assert Index.open(tmp_path / "ix").alive.all()


def test_rows_that_wait_can_be_deleted(tmp_path: Path) -> None:
    with Index.create(tmp_path / "ix", manifest()) as index:
        index.append(codes())
        index.delete([7])
    assert np.flatnonzero(~Index.open(tmp_path / "ix").alive).tolist() == [7]


def test_a_reader_sees_the_index_as_it_was_when_it_was_opened(tmp_path: Path) -> None:
    planes = build(tmp_path / "ix")
    reader = Index.open(tmp_path / "ix")
    with Index.open(tmp_path / "ix") as writer:
        writer.append(cut(planes, 0, 50))
        writer.delete([1000])
        writer.flush()
        assert (joined(reader, "bits") == planes["bits"]).all()
    assert (joined(reader, "bits") == planes["bits"]).all()
    assert len(Index.open(tmp_path / "ix")) == N + 50


def test_an_index_of_another_model_or_other_data_is_refused(tmp_path: Path) -> None:
    build(tmp_path / "ix")
    with pytest.raises(RunError, match="with the model m2\nfound: it was built of the model m1"):
        Index.open(tmp_path / "ix", model="m2")
    with pytest.raises(RunError, match="with the data d2\nfound: it was built of the data d1"):
        Index.open(tmp_path / "ix", model="m1", data="d2")


def test_an_index_of_an_unknown_version_is_refused(tmp_path: Path) -> None:
    build(tmp_path / "ix")
    path = tmp_path / "ix" / "manifest.json"
    contents = Contents.decode(path.read_bytes(), "")
    path.write_bytes(replace(contents, manifest=replace(contents.manifest, version=9)).encode())
    with pytest.raises(RunError, match=r"of version 9\nwould work: .*version 1"):
        Index.open(tmp_path / "ix")


def test_a_manifest_that_would_lead_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    build(tmp_path / "ix")
    path = tmp_path / "ix" / "manifest.json"
    whole = Contents.decode(path.read_bytes(), "")
    away = "../../somewhere"
    for changed in (
        replace(whole, manifest=replace(whole.manifest, planes={away: 9})),
        replace(whole, tensors={"file": away}),
        replace(whole, learned={"file": away}),
        replace(whole, deleted=away),
    ):
        path.write_bytes(changed.encode())
        with pytest.raises(RunError, match="is no manifest"):
            Index.open(tmp_path / "ix")


def test_a_place_without_an_index_and_a_place_with_one_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"there is no manifest\.json"):
        Index.open(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    build(tmp_path / "ix")
    before = files(tmp_path / "ix")
    with pytest.raises(OutputError, match="there is one already"):
        Index.create(tmp_path / "ix", manifest())
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError):
        Index.create(tmp_path / "file", manifest())
    with pytest.raises(RunError):
        Index.open(tmp_path / "file")
    assert files(tmp_path / "ix") == before


@pytest.mark.parametrize(
    ("planes", "ids", "found"),
    [
        ({"bits": np.zeros((2, 9), np.uint8)}, None, "the planes bits"),
        ({"bits": np.zeros((2, 9), np.uint8), "int8@checkpoint-1": np.zeros((3, 64), np.uint8)}, None, "2, 3 rows"),
        ({"bits": np.zeros((2, 8), np.uint8), "int8@checkpoint-1": np.zeros((2, 64), np.uint8)}, None, "bits: uint8"),
        ({"bits": np.zeros((2, 9), np.int8), "int8@checkpoint-1": np.zeros((2, 64), np.uint8)}, None, "bits: int8"),
        ({p: np.zeros((2, s), np.uint8) for p, s in PLANES.items()}, np.zeros(3, np.int64), "ids: int64"),
        ({p: np.zeros((2, s), np.uint8) for p, s in PLANES.items()}, np.zeros(2), "ids: float64"),
    ],
)
def test_rows_that_do_not_fit_are_refused_and_nothing_is_kept_of_them(
    tmp_path: Path, planes: dict[str, np.ndarray], ids: np.ndarray | None, found: str
) -> None:
    with Index.create(tmp_path / "ix", manifest()) as index:
        with pytest.raises(OutputError, match=found):
            index.append(planes, ids)
        index.append(codes())
    assert (joined(Index.open(tmp_path / "ix"), "bits") == codes()["bits"]).all()


def test_rows_that_are_not_there_are_refused(tmp_path: Path) -> None:
    build(tmp_path / "ix")
    index = Index.open(tmp_path / "ix")
    for numbers in ([0, N], [-1]):
        with pytest.raises(RunError, match="holds 101 rows, and not that one"):
            index.rows("bits", np.array(numbers))
    with pytest.raises(RunError, match="whole numbers"):
        index.rows("bits", np.ones(N, bool))
    with pytest.raises(RunError, match="would work: 'bits'"):
        index.blocks("bit")
    with pytest.raises(RunError, match="blocks of 0 rows"):
        index.blocks("bits", rows=0)
    assert index.rows("bits", []).shape == (0, 9)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"planes": {}}, "0 planes"),
        ({"planes": {"ids": 8}}, "'ids'"),
        ({"planes": {"../bits": 8}}, r"'\.\./bits'"),
        ({"planes": {"bits": 0}}, "0 bytes"),
        ({"settings": {"rate": float("nan")}}, "no JSON"),
        ({"settings": {"layers": {1, 2}}}, "no JSON"),
    ],
)
def test_a_manifest_that_no_index_can_have_is_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], found: str
) -> None:
    with pytest.raises(OutputError, match=found):
        Index.create(tmp_path / "ix", manifest(**changes))
    assert not (tmp_path / "ix").exists()


def test_settings_come_back_as_json_and_bind_the_rows(tmp_path: Path) -> None:
    settings = {"layers": ("a", "b"), "sizes": {10: 1, 9: 2}, "rate": 0.1}
    index = Index.create(tmp_path / "ix", manifest(settings=settings))
    with index:
        index.append(codes())
    again = Index.open(tmp_path / "ix")
    assert again.manifest == index.manifest
    assert again.manifest.settings == {"layers": ["a", "b"], "sizes": {"10": 1, "9": 2}, "rate": 0.1}
    assert (joined(again, "bits") == codes()["bits"]).all()


def test_tensors_come_back_each_when_asked_for(tmp_path: Path) -> None:
    tensors = {
        "basis": stream("basis").normal(size=(5, 7)).astype(np.float32),
        "spectrum/layer.0": np.arange(3, dtype=np.float64),
        "damping": np.array(0.25, np.float32),
        "nothing": np.zeros((0, 4), np.float16),
        "turned": np.arange(12, dtype=np.int32).reshape(3, 4).T,
    }
    build(tmp_path / "ix", tensors=tensors)
    index = Index.open(tmp_path / "ix")
    assert set(index.tensors) == set(tensors)
    for name, expected in tensors.items():
        assert index.tensors[name].dtype == expected.dtype
        assert index.tensors[name].shape == expected.shape
        assert (index.tensors[name] == expected).all()
    with pytest.raises(KeyError, match="basis"):
        index.tensors["bases"]


def test_tensors_that_came_after_the_rows_stand_before_those_that_came_first(tmp_path: Path) -> None:
    planes = build(tmp_path / "ix", tensors={"basis": np.zeros(3), "mean": np.ones(2)})
    rows = {name: data for name, data in files(tmp_path / "ix").items() if name.endswith(".rows")}
    with Index.open(tmp_path / "ix") as index:
        index.keep({"basis": np.full(4, 2.0)})
        index.append(cut(planes, 0, 3))
        index.keep({"spectrum": np.arange(5)})
    index = Index.open(tmp_path / "ix")
    found = {name: tensor.tolist() for name, tensor in index.tensors.items()}
    assert found == {"basis": [2.0] * 4, "mean": [1.0, 1.0], "spectrum": [0, 1, 2, 3, 4]}
    assert rows.items() <= files(tmp_path / "ix").items(), "rows that were made before stay as they are"
    assert index.verify() == []


def test_bytes_are_counted_plane_by_plane_and_tensors_apart(tmp_path: Path) -> None:
    build(tmp_path / "ix", tensors={"basis": np.zeros((50, 50), np.float32)})
    index, found = Index.open(tmp_path / "ix"), files(tmp_path / "ix")
    for plane, counted in index.nbytes.items():
        assert counted == sum(len(b) for name, b in found.items() if name.startswith(f"{plane}-"))
    assert index.tensor_bytes == sum(len(b) for name, b in found.items() if name.endswith(".safetensors"))
    assert "101 of 101 planned examples, bits 9 B" in str(index)


def test_the_manifest_is_json_that_other_tools_can_read(tmp_path: Path) -> None:
    build(tmp_path / "ix")
    found = json.loads((tmp_path / "ix" / "manifest.json").read_text())
    assert found["manifest"]["model"] == "m1"
    assert [s[:2] for s in found["shards"]] == [[0, 32], [32, 32], [64, 32], [96, 5]]


def test_the_store_needs_no_torch() -> None:
    program = "import sys, whence.store; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert "numpy" in done.stdout.split()
    assert not {"torch", "transformers", "scipy", "fsspec"} & set(done.stdout.split())
