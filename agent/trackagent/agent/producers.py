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
from trackagent.protos.v1 import agent_pb2

_RUN_ID = re.compile(r"[0-9a-f]{32}")
_PIN = re.compile(r"[0-9a-f]{64}")
_NODE = re.compile(r"[!-~]{1,253}")
MAX_RANKS = 1 << 24
ID_BYTES = 16
MAX_GROUPS = 8


class BadIdentity(AgentError):
    """A field of a producer's identity is missing or out of range; the message names it."""


def checked(fields: Mapping[str, Any]) -> ProducerInfo:
    """The producer with these fields of trackagent.v1.Producer (producer_id as bytes). BadIdentity
    otherwise.
    """
    try:
        # What wrote it may be older than these fields.
        known = {"job_time_ns": 0, "sampled": "", "reduced": "", "hub": "", **fields}
        known["groups"] = _groups(known.get("groups") or {})
        info = ProducerInfo(**{name: known[name] for name in ProducerInfo.__slots__})
    except KeyError as error:
        raise BadIdentity(f"the producer has no {error.args[0]}") from None
    for field in dataclasses.fields(ProducerInfo):
        value = getattr(info, field.name)
        if field.name != "groups" and type(value).__name__ != field.type:
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
        if info.hub and not _PIN.fullmatch(info.hub):
            raise BadIdentity("hub is not 64 lower-case hexadecimal digits")
        if info.reduced:
            check_key(info.reduced, "reduced")
        for name, value in info.groups:
            check_key(f"{name}={value}", "a group")
    except ValueRefused as error:
        raise BadIdentity(str(error)) from None
    return info


def _groups(groups: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(groups, Mapping):
        raise BadIdentity(f"groups is {groups!r:.80}: expected a table")
    if len(groups) > MAX_GROUPS:
        raise BadIdentity(f"the rank is in {len(groups)} groups: expected at most {MAX_GROUPS}")
    for name, value in groups.items():
        if not (isinstance(name, str) and isinstance(value, str) and name and "=" not in name):
            raise BadIdentity(
                f"group {name!r:.80} is {value!r:.80}: expected text, no = in its name"
            )
    return tuple(sorted(groups.items()))


def to_fields(info: ProducerInfo) -> dict[str, Any]:
    """As JSON can hold it."""
    fields = {**dataclasses.asdict(info), "producer_id": info.producer_id.hex()}
    return {**fields, "groups": dict(info.groups)}


def to_message(info: ProducerInfo) -> agent_pb2.Producer:
    """As agents and hubs are told it: without which way its records go."""
    fields = {name: getattr(info, name) for name in ProducerInfo.__slots__ if name != "hub"}
    return agent_pb2.Producer(**{**fields, "groups": dict(info.groups)})


def from_message(message: agent_pb2.Producer) -> ProducerInfo:
    """BadIdentity where it is none."""
    fields = {name: getattr(message, name) for name in ProducerInfo.__slots__ if name != "hub"}
    return checked({**fields, "groups": dict(message.groups)})


def from_fields(fields: Mapping[str, Any]) -> ProducerInfo:
    """What `to_fields` was given. KeyError, TypeError or ValueError for anything else."""
    groups = tuple(sorted(fields.get("groups", {}).items()))
    return ProducerInfo(
        **{**fields, "producer_id": bytes.fromhex(fields["producer_id"]), "groups": groups}
    )
