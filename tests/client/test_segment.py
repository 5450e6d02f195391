"""The header of a segment: it is read as it was written, or refused with its problem."""

from __future__ import annotations

import struct
from typing import Any
from zlib import crc32

import pytest

from tests.client.journals import (
    SEGMENT_BYTES,
)
from trackagent.client.segment import (
    HEADER_BYTES,
    read_header,
)


def header(**changes: Any) -> bytearray:
    """A segment's header, right but for `changes`; the checksum fits them."""
    fields: dict[str, Any] = {
        "magic": b"TRKJRNL1",
        "version": 1,
        "mark": 0xFEFF,
        "size": SEGMENT_BYTES,
        "lane": 5,
        "base": 4096,
        "number": 2,
        "identity": b'{"rank": 3}',
    } | changes
    identity = fields["identity"]
    checked = (
        struct.pack("<IIQII", fields["size"], fields["lane"], fields["base"], fields["number"],
                    fields.get("length", len(identity))) + identity
    )  # fmt: skip
    head = fields["magic"] + struct.pack("<HHI", fields["version"], fields["mark"], crc32(checked))
    return bytearray((head + checked).ljust(HEADER_BYTES, b"\0"))


def test_a_header_is_read() -> None:
    found = read_header(bytes(header()))
    assert found is not None
    assert (found.segment_bytes, found.lane, found.base, found.number, found.identity) == (
        SEGMENT_BYTES, 5, 4096, 2, {"rank": 3},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"magic": b"TRKJRNL2"}, "the magic is b'TRKJRNL2' instead of b'TRKJRNL1'"),
        ({"version": 2}, "version 2; this program reads version 1"),
        ({"mark": 0xFFFE}, "written on a machine with another byte order"),
        ({"lane": 64}, "lane 64"),
        ({"length": 5000}, "an identity of 5000 bytes"),
        ({"identity": b"{"}, "Expecting property name enclosed in double quotes"),
    ],
    ids=["magic", "version", "byte order", "lane", "identity length", "identity"],
)
def test_a_wrong_header_is_refused_with_its_problem(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  compared below
        read_header(bytes(header(**changes)))
    assert str(caught.value).startswith(problem)


@pytest.mark.parametrize("at", [12, 16, 20, 24, 32, 40, 45])
def test_a_changed_byte_of_the_header_is_noticed(at: int) -> None:
    data = header()
    data[at] ^= 1
    with pytest.raises(ValueError, match="checksum"):
        read_header(bytes(data))


def test_a_file_without_magic_is_a_spare() -> None:
    assert read_header(bytes(header(magic=bytes(8)))) is None


@pytest.mark.parametrize("size", [0, 8, HEADER_BYTES - 1])
def test_a_file_shorter_than_a_header_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"{size} bytes, shorter than the header of 4096"):
        read_header(bytes(header())[:size])
