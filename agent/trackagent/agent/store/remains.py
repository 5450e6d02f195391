"""A damaged store as it lies on its pages: which belong to which table or index, and the rows on them.

What a page is for is told by the pointer map, by the interior pages that lead to it, and by the schema; where
that is damaged, by where a store's tables normally begin. All of it may be wrong: what does not look like a
row of its table is left out.
"""

from __future__ import annotations

import contextlib
import sqlite3
import struct
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from trackagent.agent.pagelog import PAGE_BYTES
from trackagent.agent.pages import (
    FREE_PAGE,
    INDEX_INTERIOR,
    INDEX_LEAF,
    TABLE_LEAF,
    Cell,
    Pages,
    columns,
    map_of,
)
from trackagent.agent.store import schema

Row = dict[str, Any]

# Columns that older rows lack.
_ADDED_LATER = {"producers": 5, "losses": 1, "runs": 1, "streams": 1}
_TABLE_INTERIOR = 0x05
_CHILD = 5  # in the pointer map
_DEEPEST = 32


class Remains(Pages):
    """The pages of a store, and whose they are."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.total = self.highest
        self._owners: dict[int, int | None] = {}
        # What interior pages say: their children, and whose they are.
        self._parents = {
            child: number
            for number in range(1, self.total + 1)
            for child in _children(self.page(number), first=number == 1)
        }
        self.bad_pages: dict[str, int] = defaultdict(int)
        self._known = _current()
        self.roots: dict[int, str] = {}
        self.names: dict[str, list[str]] = {}
        self._read_schema()
        self._leaves: dict[str, list[int]] = defaultdict(list)
        self._owners.clear()
        for number in range(1, self.total + 1):
            name = self._name_of(number)
            if name is not None:
                self._leaves[name].append(number)

    def rows(self, table: str) -> Iterator[tuple[int, Cell]]:
        """The row numbers and cells of a table."""
        for number in self._leaves[table]:
            yield from self._cells(number, table, TABLE_LEAF)

    def entries(self, index: str) -> Iterator[Row]:
        """The entries of an index, columns by name, the row's number as `id`."""
        names = [*self.names.get(index, []), "id"]
        for number in self._leaves[index]:
            for _, cell in self._cells(number, index, INDEX_LEAF, INDEX_INTERIOR):
                values = columns(self.payload(cell), cell.size)
                if values is not None and len(values) == len(names):
                    yield dict(zip(names, values, strict=True))
                else:
                    self.bad_pages[index] += 1

    def row(self, table: str, number: int, cell: Cell, *, head: bool = False) -> Row | None:
        """A row's columns by name; None when the cell is none. head: what lies on the page itself."""
        names = self.names[table]
        payload = cell.local if head else self.payload(cell)
        values = columns(payload, cell.size)
        if values is None or not (head or len(payload) == cell.size) or len(values) > len(names):
            return None
        row = dict(zip(names, values, strict=False))
        if "id" in row and row["id"] is None:
            row["id"] = number
        return row

    def lost(self, name: str) -> bool:
        """Whether some of a table or index that was looked at is, or may be, gone."""
        return self.bad_pages[name] > 0 or not self._leaves[name]

    def is_short(self, table: str, row: Row) -> bool:
        """Whether a row has fewer columns than rows of that table ever had."""
        return len(row) < len(self.names[table]) - _ADDED_LATER.get(table, 0)

    def _cells(self, number: int, name: str, *kinds: int) -> Iterator[tuple[int, Cell]]:
        data = self.page(number)
        kind = data[0] if data else 0
        if kind in kinds:
            count = int.from_bytes(data[3:5], "big")
            found = 0
            for cell in self.cells_on(number):
                found += 1
                yield (cell.rowid or 0), cell
            if found != count:
                self.bad_pages[name] += 1
        elif kind != _TABLE_INTERIOR or TABLE_LEAF not in kinds:
            self.bad_pages[name] += 1

    def _read_schema(self) -> None:
        """Roots and columns: what the file says, and where it says nothing, what a current one would."""
        statements: list[str] = []
        for number in range(1, self.total + 1):
            if number == 1 or self._root_of(number) == 1:
                data = self.page(number)
                head = 100 if number == 1 else 0
                if not data or data[head] != TABLE_LEAF:
                    continue
                for cell in self.cells_on(number):
                    values = columns(self.payload(cell), cell.size)
                    if values is None or len(values) != 5 or not isinstance(values[3], int):
                        continue
                    if values[1] not in self._known:
                        continue
                    self.roots[values[3]] = str(values[1])
                    if isinstance(values[4], str):
                        statements.append(values[4])
        scratch = sqlite3.connect(":memory:")
        # Tables first: pages come in any order, and an index is none without its table.
        for statement in sorted(statements, key=lambda one: not one.startswith("CREATE TABLE")):
            with contextlib.suppress(sqlite3.Error, sqlite3.Warning):
                scratch.execute(statement)
        self.names = {name: names for _, name, _, names in _described(scratch)}
        for name, (names, root) in self._known.items():
            if name not in self.roots.values() and root not in self.roots:
                self.roots[root] = name
            if len(self.names.get(name, names)) == len(names):
                self.names[name] = names  # of a version like this one, whatever the text says
        scratch.close()

    def _name_of(self, number: int) -> str | None:
        """The table or index that a page is a leaf of, or anything but a leaf of."""
        root = self._root_of(number)
        return None if root is None else self.roots.get(root)

    def _root_of(self, number: int) -> int | None:
        seen: list[int] = []
        at: int | None = number
        while at is not None and at not in self._owners:
            if len(seen) > _DEEPEST:
                at = None
                break
            seen.append(at)
            if at == 1 or at in self.roots:
                self._owners[at] = at
                break
            at = self._parent(at)
        root = None if at is None else self._owners[at]
        for one in seen:
            self._owners[one] = root
        return root

    def _parent(self, number: int) -> int | None:
        """The page that leads to this one, None for what is no page of a tree. Where the pointer map and what
        interior pages say differ, these are right: a bad one would hardly name pages."""
        kind, parent = self._pointer(number)
        if kind == FREE_PAGE:
            return None
        said = self._parents.get(number)
        return said if said is not None else parent if kind == _CHILD else None

    def _pointer(self, number: int) -> tuple[int, int]:
        """What the pointer map says of a page: its kind and its parent."""
        mapped = map_of(number)
        at = 5 * (number - mapped - 1)
        if at < 0:  # the first page, or one of the map
            return 0, 0
        entry = self.page(mapped)[at : at + 5]
        return (entry[0], int.from_bytes(entry[1:], "big")) if len(entry) == 5 else (0, 0)


def _children(data: bytes, *, first: bool) -> list[int]:
    """The pages that an interior page leads to."""
    head = 100 if first else 0
    if len(data) != PAGE_BYTES or data[head] not in (_TABLE_INTERIOR, INDEX_INTERIOR):
        return []
    count = min(int.from_bytes(data[head + 3 : head + 5], "big"), (PAGE_BYTES - head - 12) // 2)
    places = struct.unpack_from(f">{count}H", data, head + 12)
    found = [data[at : at + 4] for at in places if head + 12 <= at <= PAGE_BYTES - 4]
    return [int.from_bytes(one, "big") for one in [*found, data[head + 8 : head + 12]]]


@cache
def _current() -> dict[str, tuple[list[str], int]]:
    """Columns and root page of every table and index of a new store."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        schema.migrate(connection, Path(":memory:"))
        return {name: (names, root) for _, name, root, names in _described(connection)}


def _described(connection: sqlite3.Connection) -> list[tuple[str, str, int, list[str]]]:
    """Kind, name, root page and columns of every table and index."""
    found = []
    for kind, name, root in connection.execute(
        "SELECT type, name, rootpage FROM sqlite_master WHERE rootpage > 0"
    ).fetchall():
        pragma = "table_info" if kind == "table" else "index_info"
        names = connection.execute(f"SELECT name FROM pragma_{pragma}(?)", (name,)).fetchall()
        found.append((kind, name, root, [str(one) for (one,) in names]))
    return found
