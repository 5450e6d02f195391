"""Who may log: a producer's identity as it comes from outside, checked before it is believed, and as kept."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from trackagent.agent.errors import AgentError
from trackagent.agent.store.contract import ProducerInfo
from trackagent.client.errors import ValueRefused
from trackagent.client.values import check_key

_RUN_ID = re.compile(r"[0-9a-f]{32}")
_NODE = re.compile(r"[!-~]{1,253}")
MAX_RANKS = 1 << 24
ID_BYTES = 16


class BadIdentity(AgentError):
    """A field of a producer's identity is missing or out of range; the message names it."""


def checked(fields: Mapping[str, Any]) -> ProducerInfo:
    """The producer with these fields of trackagent.v1.Producer (producer_id as bytes). BadIdentity
    otherwise.
    """
    try:
        # What wrote it may be older than these fields.
        known = {"job_time_ns": 0, "sampled": "", **fields}
        info = ProducerInfo(**{name: known[name] for name in ProducerInfo.__slots__})
    except KeyError as error:
        raise BadIdentity(f"the producer has no {error.args[0]}") from None
    for field in dataclasses.fields(ProducerInfo):
        value = getattr(info, field.name)
        if type(value).__name__ != field.type:
            raise BadIdentity(f"{field.name} is {value!r:.80}: expected {field.type}")
    integers = {
        "attempt": (1, 1 << 31),
        "world_size": (1, MAX_RANKS),
        "rank": (0, MAX_RANKS),
        "local_rank": (0, MAX_RANKS),
        "pid": (0, 1 << 32),
        "start_time_ns": (0, 1 << 63),
        "job_time_ns": (0, 1 << 63),
    }
    for name, (low, high) in integers.items():
        value = getattr(info, name)
        if not low <= value < high:
            raise BadIdentity(f"{name} is {value!r}: expected {low} to {high - 1}")
    if len(info.producer_id) != ID_BYTES:
        raise BadIdentity(f"producer_id is not {ID_BYTES} bytes")
    if not _RUN_ID.fullmatch(info.run_id):
        raise BadIdentity("run_id is not 32 lower-case hexadecimal digits")
    if not _NODE.fullmatch(info.node):
        raise BadIdentity("node is not a host name of 1 to 253 characters")
    if info.rank >= info.world_size:
        raise BadIdentity(f"rank is {info.rank} in a world of {info.world_size}")
    try:
        check_key(info.experiment, "experiment")
        if info.run_name:
            check_key(info.run_name, "run_name")
        if info.sampled:
            check_key(info.sampled, "sampled")
    except ValueRefused as error:
        raise BadIdentity(str(error)) from None
    return info


def to_fields(info: ProducerInfo) -> dict[str, Any]:
    """As JSON can hold it."""
    return {**dataclasses.asdict(info), "producer_id": info.producer_id.hex()}


def from_fields(fields: Mapping[str, Any]) -> ProducerInfo:
    """What `to_fields` was given. KeyError, TypeError or ValueError for anything else."""
    return ProducerInfo(**{**fields, "producer_id": bytes.fromhex(fields["producer_id"])})
