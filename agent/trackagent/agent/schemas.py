"""Which schemas a batch of journal bytes brings: the spool keeps them, since later batches only name them."""

from __future__ import annotations

from trackagent.client import record


def schemas_in(journal_bytes: bytes) -> list[tuple[int, str]]:
    """Schema ids and keys of the valid SCHEMA records in a batch."""
    found = []
    for offset in _offsets(journal_bytes):
        try:
            schema = record.decode(journal_bytes, offset)
        except ValueError:
            continue
        found.append((schema.schema_id, "\n".join(schema.keys)))
    return found


def _offsets(data: bytes) -> list[int]:
    """Where valid SCHEMA records start. Looks at lengths only, for speed, and at every checksum only when
    the lengths do not lead to the end."""
    words = memoryview(data[: len(data) & ~7]).cast("Q")
    schema = record.Kind.SCHEMA
    found = []
    at = 0
    while at < len(words) - 1:
        length = words[at] & 0xFFFFFFFF
        if words[at + 1] & 0xFF == schema:
            found.append(8 * at)
        if length < record.HEAD_BYTES:
            break
        at += (length + 7) >> 3
    if 8 * at != len(data):
        found = [at for at in record.scan(data).offsets if data[at + 8] == schema]
    return [at for at in found if record.is_valid(data, at)]
