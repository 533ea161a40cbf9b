"""Many workers fill one index, in any order and twice; one that dies leaves a range missing and the rest whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from whence.engine.randomness import stream
from whence.errors import OutputError, RunError
from whence.store import Index, Manifest

N, PER = 70, 16
ROWS = stream("workers").integers(0, 256, (N, 5), dtype=np.uint8)


def made(place: Path | str) -> Index:
    return Index.create(place, Manifest(model="m", data="d", examples=N, planes={"bits": 5}), rows_per_shard=PER)


def files(place: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in place.iterdir() if p.name != "writer.lock"}


def alone(place: Path) -> dict[str, bytes]:
    with made(place) as index:
        index.append({"bits": ROWS})
    return files(place)


def test_workers_in_any_order_and_twice_give_the_bytes_of_one_builder(tmp_path: Path) -> None:
    with made(tmp_path / "many") as index:
        work = index.missing()
        assert work == [(0, 16), (16, 32), (32, 48), (48, 64), (64, 70)]
        for a, b in [*reversed(work), *work]:
            worker = Index.open(tmp_path / "many")  # workers ask nobody for a turn
            worker.put(a, {"bits": ROWS[a:b]})
        assert index.done == 0
        assert index.adopt() == N
        assert index.missing() == []
    assert files(tmp_path / "many") == alone(tmp_path / "one")


def test_what_a_dead_worker_left_out_is_missing_and_everything_else_can_be_read(tmp_path: Path) -> None:
    with made(tmp_path / "many") as index:
        for a, b in index.missing():
            if a != 16:
                index.put(a, {"bits": ROWS[a:b]})
        index.adopt()
    index = Index.open(tmp_path / "many")
    gap = np.arange(N) // PER == 1
    assert (index.done, len(index), index.missing()) == (16, N, [(16, 32)])
    assert (index.alive == ~gap).all()
    assert (index.ids == np.where(gap, -1, np.arange(N))).all()
    assert [start for start, _ in index.blocks("bits")] == [0, 32, 48, 64]
    assert (np.concatenate([rows for _, rows in index.blocks("bits")]) == ROWS[~gap]).all()
    with pytest.raises(RunError, match="read row 16"):
        index.rows("bits", [3, 16])
    with index:
        with pytest.raises(OutputError, match=r"rows 16\.\.31 are missing"):
            index.append({"bits": ROWS[:1]})
        with pytest.raises(RunError, match="not in it: -1"):
            index.delete([-1])
        index.put(16, {"bits": ROWS[16:32]})
        index.adopt()
    assert files(tmp_path / "many") == alone(tmp_path / "one")


def test_rows_whose_planes_are_not_all_there_are_not_taken(tmp_path: Path) -> None:
    with made(tmp_path / "many") as index:
        index.put(0, {"bits": ROWS[:16]})
        index.put(16, {"bits": ROWS[16:32]})
        index.put(32, {"bits": ROWS[32:48]})
        next((tmp_path / "many").glob("ids-000000000016*")).unlink()
        short = next((tmp_path / "many").glob("bits-000000000032*"))
        short.write_bytes(short.read_bytes()[:-3])
        assert index.adopt() == 16
        assert index.missing()[0] == (16, 32)


def test_shards_of_another_index_in_the_same_folder_are_not_taken(tmp_path: Path) -> None:
    with made(tmp_path / "ix") as index:
        index.put(0, {"bits": ROWS[:16]})
    (tmp_path / "ix" / "manifest.json").unlink()
    other = Manifest(model="another", data="d", examples=N, planes={"bits": 5})
    with Index.create(tmp_path / "ix", other, rows_per_shard=PER) as index:
        assert index.adopt() == 0
    # Other bases make other rows, too.
    (tmp_path / "ix" / "manifest.json").unlink()
    same = Manifest(model="m", data="d", examples=N, planes={"bits": 5})
    with Index.create(tmp_path / "ix", same, {"basis": np.ones(3)}, rows_per_shard=PER) as index:
        assert index.adopt() == 0


def test_two_answers_for_the_same_rows_are_not_mixed_up(tmp_path: Path) -> None:
    """A worker that was started twice on a machine that rounds differently, before or after the first was listed."""
    with made(tmp_path / "ix") as index:
        index.put(0, {"bits": ROWS[:16]})
        index.adopt()
        index.put(0, {"bits": ROWS[:16] ^ 1})
        assert index.adopt() == 0
        assert (index.rows("bits", np.arange(16)) == ROWS[:16]).all()
    with Index.open(tmp_path / "ix") as index:
        index.delete([])
    assert len(list((tmp_path / "ix").glob("bits-*"))) == 1
    assert Index.open(tmp_path / "ix").verify() == []


def test_what_cannot_be_a_shard_is_refused(tmp_path: Path) -> None:
    with made(tmp_path / "ix") as index:
        for first, rows in ((0, ROWS[:17]), (0, ROWS[:0]), (-1, ROWS[:3])):
            with pytest.raises(OutputError, match="1 to 16 rows"):
                index.put(first, {"bits": rows})
        with pytest.raises(RunError, match="no shard"):
            index.discard(3)


def test_work_that_is_left_starts_where_shards_start(tmp_path: Path) -> None:
    with made(tmp_path / "ix") as index:
        index.append({"bits": ROWS[:20]})
        index.flush()
        assert index.missing() == [(20, 32), (32, 48), (48, 64), (64, 70)]
        for a, b in index.missing():
            index.put(a, {"bits": ROWS[a:b]})
        index.adopt()
        assert (index.rows("bits", np.arange(N)) == ROWS).all()
        index.append({"bits": ROWS[:40]})
    assert (Index.open(tmp_path / "ix").rows("bits", np.arange(N, N + 40)) == ROWS[:40]).all()
