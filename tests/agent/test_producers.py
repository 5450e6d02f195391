"""A producer's identity as it comes from outside: every field, believed only when it can be true."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.agent.samples import producer
from trackagent.agent.producers import (
    MAX_RANKS,
    BadIdentity,
    checked,
    from_fields,
    from_message,
    to_fields,
    to_message,
)
from trackagent.agent.store.contract import ProducerInfo

FIELDS = [field.name for field in dataclasses.fields(ProducerInfo)]

BAD: list[tuple[str, Any, str]] = [
    ("producer_id", b"", "producer_id is not 16 bytes"),
    ("producer_id", bytes(15), "producer_id is not 16 bytes"),
    ("producer_id", bytes(17), "producer_id is not 16 bytes"),
    ("producer_id", "00" * 16, "producer_id is '0000.*': expected bytes"),
    ("run_id", "", "run_id is not 32 lower-case hexadecimal digits"),
    ("run_id", "a" * 31, "run_id is not 32"),
    ("run_id", "a" * 33, "run_id is not 32"),
    ("run_id", "A" * 32, "run_id is not 32"),
    ("run_id", "g" * 32, "run_id is not 32"),
    ("run_id", "a" * 31 + "\n", "run_id is not 32"),
    ("run_id", "../" + "a" * 29, "run_id is not 32"),
    ("run_id", 7, "run_id is 7: expected str"),
    ("attempt", 0, "attempt is 0: expected 1 to"),
    ("attempt", -1, "attempt is -1: expected 1 to"),
    ("attempt", 1 << 31, "attempt is 2147483648: expected 1 to 2147483647"),
    ("attempt", 1.0, "attempt is 1.0: expected int"),
    ("attempt", True, "attempt is True: expected int"),
    ("rank", -1, "rank is -1: expected 0 to"),
    ("rank", 64, "rank is 64 in a world of 64"),
    ("rank", MAX_RANKS, "rank is 16777216: expected 0 to 16777215"),
    ("rank", "3", "rank is '3': expected int"),
    ("local_rank", -1, "local_rank is -1: expected 0 to"),
    ("local_rank", MAX_RANKS, "local_rank is 16777216: expected"),
    ("world_size", 0, "world_size is 0: expected 1 to"),
    ("world_size", MAX_RANKS, "world_size is 16777216: expected"),
    ("world_size", None, "world_size is None: expected int"),
    ("node", "", "node is not a host name of 1 to 253 characters"),
    ("node", "x" * 254, "node is not a host name"),
    ("node", "a b", "node is not a host name"),
    ("node", "a\n", "node is not a host name"),
    ("node", "knoten-ü", "node is not a host name"),
    ("node", b"host", "node is b'host': expected str"),
    ("pid", -1, "pid is -1: expected 0 to"),
    ("pid", 1 << 32, "pid is 4294967296: expected"),
    ("start_time_ns", -1, "start_time_ns is -1: expected 0 to"),
    ("start_time_ns", 1 << 63, "start_time_ns is 9223372036854775808: expected"),
    ("start_time_ns", 1.5, "start_time_ns is 1.5: expected int"),
    ("experiment", "", "an empty experiment"),
    ("experiment", "x" * 251, "experiment .* has 251 characters"),
    ("experiment", "a\nb", "experiment .* control characters"),
    ("experiment", "\ud800", "experiment .* cannot be written as UTF-8"),
    ("experiment", None, "experiment is None: expected str"),
    ("run_name", "x" * 251, "run_name .* has 251 characters"),
    ("run_name", "a\x00b", "run_name .* control characters"),
    ("run_name", 3, "run_name is 3: expected str"),
    ("forked", 1, "forked is 1: expected bool"),
    ("forked", None, "forked is None: expected bool"),
    ("job_time_ns", -1, "job_time_ns is -1: expected 0 to"),
    ("sampled", "gpu\n0", "the sampled"),
    ("groups", {"tp": 0}, "group 'tp' is 0: expected text"),
    ("groups", {"": "0"}, "group '' is '0': expected text"),
    ("groups", {"a=b": "0"}, "group 'a=b' is"),
    ("groups", {"tp": "0\n"}, "a group .* control characters"),
    ("groups", {f"group {n}": "0" for n in range(9)}, "in 9 groups: expected at most 8"),
    ("groups", "tp", "groups is 'tp': expected a table"),
    ("reduced", "tp=\n", "the reduced"),
    ("hub", 7, "hub is 7: expected str"),
    ("hub", "AB" * 32, "hub is not 64 lower-case"),
    ("job_time_ns", 1 << 63, "job_time_ns is 9223372036854775808: expected"),
]

GOOD: list[tuple[str, Any]] = [
    ("attempt", (1 << 31) - 1),
    ("rank", 63),
    ("local_rank", 0),
    ("world_size", MAX_RANKS - 1),
    ("node", "x" * 253),
    ("node", "10.0.0.1"),
    ("pid", (1 << 32) - 1),
    ("start_time_ns", (1 << 63) - 1),
    ("experiment", "x" * 250),
    ("experiment", "größe ✓"),
    ("run_name", ""),
    ("run_name", "x" * 250),
    ("forked", True),
    ("hub", "ab" * 32),
    ("reduced", "node a"),
    ("job_time_ns", (1 << 63) - 1),
]


def fields(**changes: Any) -> dict[str, Any]:
    return dataclasses.asdict(producer()) | changes


def test_good_fields_are_the_producer() -> None:
    assert checked(fields()) == producer()


@pytest.mark.parametrize(("name", "value"), GOOD)
def test_a_field_at_its_limit_is_believed(name: str, value: Any) -> None:
    assert getattr(checked(fields(**{name: value})), name) == value


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_a_bad_field_is_refused_by_name(name: str, value: Any, message: str) -> None:
    with pytest.raises(BadIdentity, match=message):
        checked(fields(**{name: value}))


# What wrote a journal or a spool may be older than these.
LATER = ("job_time_ns", "sampled", "groups", "reduced", "hub")


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in LATER])
def test_a_missing_field_is_refused_by_name(name: str) -> None:
    incomplete = fields()
    del incomplete[name]
    with pytest.raises(BadIdentity, match=f"the producer has no {name}"):
        checked(incomplete)


def test_a_producer_that_does_not_know_its_job_is_believed() -> None:
    older = fields(job_time_ns=7)
    del older["job_time_ns"]
    assert checked(older) == producer(job_time_ns=0)


def test_a_producer_that_says_nothing_of_samples_logs() -> None:
    older = fields()
    del older["sampled"]
    assert checked(older).source == "rank 0"


def test_the_source_of_what_is_sampled_is_what_it_says() -> None:
    assert checked(fields(sampled="gpu a:0")).source == "gpu a:0"


def test_groups_are_in_the_order_of_their_names() -> None:
    info = checked(fields(groups={"tp": "0", "dp": "3"}))
    assert info.groups == (("dp", "3"), ("tp", "0"))
    assert from_fields(to_fields(info)) == info
    assert from_message(to_message(info)) == info


def test_which_way_records_go_is_kept_and_not_told() -> None:
    info = producer(hub="ab" * 32)
    assert from_fields(to_fields(info)) == info
    assert from_message(to_message(info)).hub == ""


def test_every_field_has_a_bad_example() -> None:
    assert {name for name, _, _ in BAD} == set(FIELDS)


def test_a_field_that_is_not_known_is_ignored() -> None:
    assert checked(fields(colour="blue")) == producer()


def test_a_long_bad_value_is_cut_in_the_message() -> None:
    with pytest.raises(BadIdentity) as error:
        checked(fields(rank="x" * 100_000))
    assert len(str(error.value)) < 200
