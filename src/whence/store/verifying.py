"""Is an index whole? Every byte is read and checked, whatever was found before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..errors import RunError
from .contents import FILE, Contents
from .places import Place
from .reading import Reader
from .shards import unchecked
from .tensors import Tensors
from .tombstones import read_tombstones


@dataclass(frozen=True)
class Damage:
    """A file of an index that cannot be trusted; ``rows``: the first row and the one after the last, if it has any."""

    file: str
    reason: str
    rows: tuple[int, int] | None = None


def damage_of(place: Place, contents: Contents, tensors: Iterable[Tensors], reader: Reader) -> Iterator[Damage]:
    """What is damaged or missing; of a store, everything is fetched anew."""
    try:
        Contents.decode(place.read(FILE), place.url)
    except RunError as error:
        yield Damage(FILE, error.found)
    try:
        read_tombstones(place, contents.deleted)
    except RunError as error:
        yield Damage(contents.deleted, error.found)
    for found, record in zip(tensors, (contents.learned, contents.tensors), strict=True):
        for reason in found.damage():
            yield Damage(record["file"], reason)
    for entry in contents.entries:
        for plane in contents.planes():
            try:
                checked = unchecked(contents.shard(entry, plane), False)
                reader.open(contents, entry, plane, checked, fresh=True).check_all()
            except RunError as error:
                yield Damage(contents.name(entry, plane), error.found, (entry.first, entry.stop))
