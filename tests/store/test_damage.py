"""A byte that changed anywhere is noticed before what it belongs to is used, and the file is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from whence.engine.randomness import stream
from whence.errors import RunError, WhenceError
from whence.store import Index, Manifest

N = 20


def build(place: Path, data: str = "d") -> None:
    rows = stream("damage").integers(0, 256, (N, 8), dtype=np.uint8)
    tensors = {"basis": np.arange(6, dtype=np.float32), "spectrum": np.ones((2, 3))}
    with Index.create(place, Manifest(model="m", data=data, examples=N, planes={"bits": 8}), tensors, 12) as index:
        index.append({"bits": rows}, np.arange(N) + 7)
        index.delete([8, 20])


def read_all(place: Path) -> None:
    """Use everything that an index has."""
    index = Index.open(place)
    assert index.ids.shape == index.alive.shape
    for plane in ("bits", "ids"):
        assert sum(len(rows) for _, rows in index.blocks(plane, only_alive=False)) == N
    assert all(index.tensors[name].size for name in index.tensors)


def regions(size: int) -> list[int]:
    """Bytes to flip: all of a small file and of every file's ends, a share of what lies between."""
    step = 1 if size <= 64 else 11
    return sorted({*range(0, size, step), *range(min(size, 20)), *range(max(0, size - 20), size)})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("damage") / "ix"
    build(place)
    (place / "writer.lock").unlink()
    read_all(place)
    return place


def test_a_flipped_byte_anywhere_is_refused_and_the_file_is_named(whole: Path) -> None:
    kinds = set()
    for path in sorted(whole.iterdir()):
        before = path.read_bytes()
        kinds.add(path.name.partition("-")[0])
        try:
            for at in regions(len(before)):
                flipped = bytearray(before)
                flipped[at] ^= 1 << at % 8
                path.write_bytes(flipped)
                with pytest.raises(RunError) as caught:
                    read_all(whole)
                assert path.name in str(caught.value), (path.name, at)
                assert not isinstance(caught.value.__context__, AssertionError)
        finally:
            path.write_bytes(before)
    assert kinds == {"bits", "ids", "deleted", "tensors", "manifest.json"}
    read_all(whole)


def cut_short(data: bytes) -> bytes:
    return data[:-1]


def made_longer(data: bytes) -> bytes:
    return data + b"\0"


def emptied(data: bytes) -> bytes:
    return b""


def zeroed(data: bytes) -> bytes:
    return bytes(len(data))


@pytest.mark.parametrize("harm", [cut_short, made_longer, emptied, zeroed])
def test_a_file_that_was_cut_or_emptied_or_zeroed_is_refused(whole: Path, harm: Callable[[bytes], bytes]) -> None:
    for path in sorted(whole.iterdir()):
        before = path.read_bytes()
        path.write_bytes(harm(before))
        try:
            with pytest.raises(RunError) as caught:
                read_all(whole)
            assert path.name in str(caught.value)
        finally:
            path.write_bytes(before)


def test_a_missing_file_is_refused_deletions_included(whole: Path, tmp_path: Path) -> None:
    for path in sorted(whole.iterdir()):
        moved = shutil.move(path, tmp_path / path.name)
        try:
            with pytest.raises(RunError) as caught:
                read_all(whole)
            assert path.name in str(caught.value)
        finally:
            shutil.move(moved, path)


def test_a_shard_of_another_index_is_refused_under_this_ones_name(whole: Path, tmp_path: Path) -> None:
    build(tmp_path / "other", data="other data")
    mine = next(whole.glob("bits-*"))
    other = next((tmp_path / "other").glob(mine.name[:25] + "*"))
    before = mine.read_bytes()
    assert other.name != mine.name
    mine.write_bytes(other.read_bytes())
    try:
        with pytest.raises(RunError, match="is damaged"):
            read_all(whole)
    finally:
        mine.write_bytes(before)


def test_damage_is_found_when_its_part_is_first_read_and_tells_the_row(tmp_path: Path) -> None:
    rows = stream("pieces").integers(0, 256, (100, 2048), dtype=np.uint8)
    with Index.create(tmp_path / "ix", Manifest(model="m", data="d", examples=100, planes={"codes": 2048})) as index:
        index.append({"codes": rows})
    path = next((tmp_path / "ix").glob("codes-*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    index = Index.open(tmp_path / "ix")
    assert (index.rows("codes", np.arange(96)) == rows[:96]).all()
    for numbers in ([96], [99], [0, 98]):
        with pytest.raises(RunError, match="row 96"):
            index.rows("codes", np.array(numbers))
    blocks = index.blocks("codes", rows=32)
    assert [start for start, _ in (next(blocks), next(blocks), next(blocks))] == [0, 32, 64]
    with pytest.raises(RunError, match="row 96"):
        next(blocks)
    trusting = Index.open(tmp_path / "ix", trust=True)
    assert trusting.rows("codes", [99])[0, -1] == rows[99, -1] ^ 1


def test_verify_tells_all_that_is_damaged_and_what_is_discarded_can_be_built_again(tmp_path: Path) -> None:
    build(tmp_path / "ix")
    (tmp_path / "ix" / "writer.lock").unlink()
    before = {p.name: p.read_bytes() for p in (tmp_path / "ix").iterdir()}
    assert Index.open(tmp_path / "ix").verify() == []
    index = Index.open(tmp_path / "ix")
    rows = index.rows("bits", np.arange(N)).copy()
    harmed = [
        *(n for n in before if n.startswith("bits-000000000012")),
        *(n for n in before if n.startswith("tensors")),
    ]
    for name in harmed:
        (tmp_path / "ix" / name).write_bytes(before[name][:-1] + bytes([before[name][-1] ^ 1]))
    # What was read before is checked anew.
    found = index.verify()
    assert sorted(d.file for d in found) == sorted(harmed)
    assert all("checksum" in d.reason for d in found)
    with index:
        for damage in found:
            if damage.rows:
                assert index.discard(damage.rows[0]) == (12, 20)
        assert index.missing() == [(12, 20)]
        assert index.adopt() == 0
        index.put(12, {"bits": rows[12:]}, np.arange(12, 20) + 7)
        assert index.adopt() == 8
    (tmp_path / "ix" / harmed[-1]).write_bytes(before[harmed[-1]])
    (tmp_path / "ix" / "writer.lock").unlink()
    assert {p.name: p.read_bytes() for p in (tmp_path / "ix").iterdir()} == before
    assert not Index.open(tmp_path / "ix").alive[[1, 13]].any(), "what was deleted stays deleted"


def test_a_damaged_last_shard_is_not_written_again_as_if_it_were_whole(tmp_path: Path) -> None:
    build(tmp_path / "ix")
    path = next((tmp_path / "ix").glob("bits-000000000012*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with Index.open(tmp_path / "ix", trust=True) as index, pytest.raises(WhenceError, match="is damaged"):
        index.append({"bits": np.zeros((1, 8), np.uint8)})
