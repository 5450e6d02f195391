"""What becomes of a batch of ranks' points: what is kept, what is reduced, over one hop and over two."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.agent.store.batches import RUN, batch, param, points, producer
from tests.fakes_store import MemoryStore
from trackagent.agent import reduce
from trackagent.agent.policies import MAX_PATTERNS, Policies
from trackagent.agent.reducing import Reducer, from_points, is_partial, reduced
from trackagent.agent.store.contract import Batch, Points, ProducerInfo
from trackagent.agent.wire import decode, encode

WEIGHT = "trackagent/weight"


def rank(number: int, *, node: str = "a", **changes: Any) -> ProducerInfo:
    return producer(number, node=node, **{"world_size": 100, "job_time_ns": 5, **changes})


def policies(**defined: dict[str, Any]) -> Policies:
    """Those that rank 0 defines: pattern → what is other than the default."""
    known = Policies()
    known.learn(batch(1, rank(0), tags=[definition(rank(0), k, **v) for k, v in defined.items()]))
    return known


def definition(by: ProducerInfo, pattern: str, **said: Any) -> Any:
    text = json.dumps({"reduce": "mean", "keep": None, "every": 1, **said})
    return param(by, f"trackagent/define/{pattern}", text)


def through(said: Batch, known: Policies | None = None, *, stores: bool = True) -> Batch:
    return reduced(said, known or Policies(), keep_all_ranks=64, stores=stores)


def own(found: Batch, by: ProducerInfo) -> list[tuple[tuple[str, ...], list[int], list[float]]]:
    """The points of a rank: keys, steps, and the values of the first key."""
    return [
        (one.keys, one.steps.tolist(), one.values[0].tolist())
        for one in found.points
        if one.producer_id == by.producer_id
    ]


def over(found: Batch, scope: str, key: str = "loss") -> dict[int, dict[str, float]]:
    """What partials say over some ranks, by step, merged as a reader does."""
    infos = {info.producer_id: info for info in found.producers}
    rows = []
    for one in found.points:
        if is_partial(one.keys) and infos[one.producer_id].reduced == scope:
            keys, some = from_points(one)
            if key in keys:
                rows.append((some.steps, some.times_ns, some.table[:, [keys.index(key)]]))
    if not rows:
        return {}
    steps, times, tables = zip(*rows, strict=True)
    merged = reduce.by_step(
        np.concatenate(steps), np.concatenate(times), np.concatenate(tables, axis=2)
    )
    mean, std = reduce.mean(merged[2])[0].tolist(), reduce.std(merged[2])[0].tolist()
    columns = dict(zip(reduce.STATS, merged[2][:, 0].tolist(), strict=True))
    return {
        step: {"mean": mean[at], "std": std[at], **{k: v[at] for k, v in columns.items()}}
        for at, step in enumerate(merged[0].tolist())
    }


def test_a_small_run_keeps_every_point_and_needs_no_reduction() -> None:
    small = [replace(rank(n), world_size=64) for n in range(3)]
    said = batch(1, *small, points=[points(one, range(3)) for one in small])
    assert through(said) == said


def test_a_large_run_keeps_reductions_and_the_points_of_extreme_ranks() -> None:
    ranks = [rank(n) for n in range(4)]
    values = ([5.0, 1.0], [2.0, 2.0], [9.0, 3.0], [4.0, 0.5])
    found = through(
        batch(
            1,
            *ranks,
            points=[points(one, [7, 8], value=v) for one, v in zip(ranks, values, strict=True)],
        )
    )
    assert over(found, "all")[7]["mean"] == 5.0
    assert over(found, "all") == over(found, "node a")
    assert [own(found, one) for one in ranks] == [
        [],
        [(("loss",), [7], [2.0])],
        [(("loss",), [7, 8], [9.0, 3.0])],
        [(("loss",), [8], [0.5])],
    ]
    assert all(one.reduced for one in found.points if one.keys == ("loss",))


def test_nothing_is_kept_of_ranks_where_nothing_shall_be() -> None:
    found = through(
        batch(1, rank(0), points=[points(rank(0), range(5))]), policies(loss={"keep": "none"})
    )
    assert own(found, rank(0)) == []
    assert sorted(over(found, "all")) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("keep", ["all", "extremes"])
def test_points_are_kept_at_every_nth_step(keep: str) -> None:
    known = policies(**{"lo*": {"keep": keep, "every": 10}})
    found = through(batch(1, rank(0), points=[points(rank(0), range(25))]), known)
    assert own(found, rank(0)) == [(("loss",), [0, 10, 20], [0.0, 10.0, 20.0])]
    assert len(over(found, "all")) == 25


def test_of_a_very_large_run_what_nodes_have_is_not_kept() -> None:
    said = batch(1, rank(0), points=[points(rank(0), [1])])
    for keep, overs in ((99, {"all"}), (100, {"all", "node a"})):
        found = reduced(said, Policies(), keep_all_ranks=64, keep_node_ranks=keep, stores=True)
        assert {one.reduced for one in found.producers if one.reduced} == overs
        passed_on = reduced(said, Policies(), keep_all_ranks=64, keep_node_ranks=keep, stores=False)
        assert {one.reduced for one in passed_on.producers if one.reduced} == {"node a"}


def test_what_was_stored_stays_the_same_where_it_is_copied_to() -> None:
    said = [points(rank(n, node=f"n{n}"), [1, 2], value=[n, n]) for n in range(3)]
    once = through(batch(1, *(rank(n, node=f"n{n}") for n in range(3)), points=said))
    again = through(once)
    for scope in ("all", "node n0", "node n2"):
        assert over(again, scope) == over(once, scope)
    assert [own(again, rank(n)) for n in range(3)] == [own(once, rank(n)) for n in range(3)]


def test_what_is_not_reduced_is_kept_as_it_is_or_thinned() -> None:
    known = policies(loss={"reduce": "none"}, acc={"reduce": "none", "every": 2})
    found = through(
        batch(1, rank(0), points=[points(rank(0), range(4), keys=("loss", "acc"))]), known
    )
    assert own(found, rank(0)) == [
        (("loss",), [0, 1, 2, 3], [0, 1, 2, 3]),
        (("acc",), [0, 2], [0.1, 2.1]),
    ]
    assert not any(one.reduced for one in found.points)
    assert over(found, "all") == {}


def test_the_definition_with_the_most_letters_counts_and_the_last_of_a_pattern() -> None:
    known = policies(
        **{"*": {"keep": "all"}, "train/*": {"keep": "none"}, "train/loss": {"keep": "all"}}
    )
    definitions = known.of(RUN)
    kept = {key: definitions.of(key).keep for key in ("lr", "train/acc", "train/loss")}
    assert kept == {"lr": "all", "train/acc": "none", "train/loss": "all"}
    known.learn(batch(2, rank(1), tags=[definition(rank(1), "train/loss", keep="extremes")]))
    assert known.of(RUN).of("train/loss").keep == "extremes"


def test_definitions_outlive_the_agent(tmp_path: Path) -> None:
    path = tmp_path / "policies.json"
    Policies(path).learn(batch(1, rank(0), tags=[definition(rank(0), "loss", keep="none")]))
    assert Policies(path).of(RUN).of("loss").keep == "none"


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b'{"version": 1, "runs": 3}', b"\xff", b"[" * 100_000]
)
def test_a_damaged_file_of_definitions_costs_the_definitions_only(
    tmp_path: Path, text: bytes
) -> None:
    path = tmp_path / "policies.json"
    path.write_bytes(text)
    known = Policies(path)
    assert known.of(RUN).of("loss").keep is None
    known.learn(batch(1, rank(0), tags=[definition(rank(0), "loss", keep="none")]))
    assert Policies(path).of(RUN).of("loss").keep == "none"


@pytest.mark.parametrize(
    "text", ["", "{}", '{"reduce": "median", "keep": null, "every": 1}', "[" * 9999]
)
def test_a_definition_that_no_client_writes_is_not_heeded(text: str) -> None:
    known = Policies()
    known.learn(batch(1, rank(0), tags=[param(rank(0), "trackagent/define/loss", text)]))
    assert known.of(RUN).of("loss").reduce == "mean"


def test_a_definition_that_is_not_heeded_changes_none_that_is() -> None:
    known = policies(loss={"keep": "none"})
    known.learn(batch(2, rank(0), tags=[param(rank(0), "trackagent/define/loss", "{}")]))
    assert known.of(RUN).of("loss").keep == "none"


def test_what_defines_nothing_takes_no_room(tmp_path: Path) -> None:
    path = tmp_path / "policies.json"
    known = Policies(path)
    good = json.dumps({"reduce": "mean", "keep": "none", "every": 1})
    nothing = {f"key{number}": "x" * 1000 for number in range(MAX_PATTERNS)}
    padded = {"padded": good + " " * 100_000}
    tags = [param(rank(0), f"trackagent/define/{k}", v) for k, v in (nothing | padded).items()]
    known.learn(batch(1, rank(0), tags=[*tags, definition(rank(0), "loss", keep="none")]))
    assert [known.of(RUN).of(key).keep for key in ("loss", "padded")] == ["none", "none"]
    assert path.stat().st_size < 1000


def test_weights_count_in_means_and_not_in_sums() -> None:
    ranks = [rank(0), rank(1)]
    said = [
        Points(
            one.producer_id,
            ("loss", "tokens", WEIGHT),
            np.array([1]),
            np.array([1]),
            np.array([[loss], [weight], [weight]]),
        )
        for one, loss, weight in zip(ranks, (1.0, 5.0), (300.0, 100.0), strict=True)
    ]
    found = through(batch(1, *ranks, points=said), policies(tokens={"reduce": "sum"}))
    assert over(found, "all")[1]["mean"] == 2.0
    assert over(found, "all", "tokens")[1]["sum"] == 400.0
    assert over(found, "all", WEIGHT) == {}


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_that_no_client_writes_counts_as_1(weight: float) -> None:
    values = np.array([[4.0], [weight]])
    said = [Points(rank(0).producer_id, ("loss", WEIGHT), np.array([1]), np.array([1]), values)]
    assert over(through(batch(1, rank(0), points=said)), "all")[1]["weight"] == 1.0


def test_forked_processes_and_samples_are_left_as_they_are() -> None:
    forked, sampled = rank(0, forked=True), rank(1, sampled="rank 1")
    said = [points(forked, range(3)), points(sampled, range(3))]
    assert through(batch(1, forked, sampled, points=said)).points == said


def test_attempts_and_jobs_are_not_mixed() -> None:
    again, other = rank(1, attempt=2), rank(2, job_time_ns=6)
    found = through(
        batch(1, rank(0), again, other, points=[points(o, [1]) for o in (rank(0), again, other)])
    )
    stands_for_all = {info.producer_id for info in found.producers if info.reduced == "all"}
    assert len(stands_for_all) == 3


# --- any split, order and delay

LOGGED = st.lists(
    st.tuples(
        st.integers(0, 7),  # rank; node: rank // 2; tp: rank % 2
        st.integers(0, 2),  # step
        st.floats(-1e3, 1e3) | st.floats(-1e-3, 1e-3).map(lambda x: 1e9 + x),
        st.floats(0.1, 100),
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=40)
@given(LOGGED, st.data())
def test_over_two_hops_in_any_batches_it_is_the_same_as_in_one(
    logged: list[tuple[int, int, float, float]], data: st.DataObject
) -> None:
    ranks = [rank(n, node=f"n{n // 2}", groups=(("tp", str(n % 2)),)) for n in range(8)]

    def of(some: list[tuple[int, int, float, float]], number: int) -> Batch:
        said = [
            Points(
                ranks[who].producer_id,
                ("loss", WEIGHT),
                np.array([step]),
                np.array([step]),
                np.array([[value], [weight]]),
            )
            for who, step, value, weight in some
        ]
        return batch(number, *ranks, points=said)

    whole = through(of(logged, 1))
    rest = data.draw(st.permutations(logged))
    forwarded = []
    while rest:  # batches of each node, of any size
        size = data.draw(st.integers(1, len(rest)))
        for node in range(4):
            part = [one for one in rest[:size] if one[0] // 2 == node]
            forwarded.append(through(of(part, 1), stores=False))
        rest = rest[size:]
    stored: list[Points] = []
    infos: dict[bytes, ProducerInfo] = {}
    forwarded = data.draw(st.permutations(forwarded))
    while forwarded:  # several of them make a batch of the hub
        size = data.draw(st.integers(1, len(forwarded)))
        known = {i.producer_id: i for one in forwarded[:size] for i in one.producers}
        together = [one for some in forwarded[:size] for one in some.points]
        found = through(batch(1, *known.values(), points=together))
        stored += found.points
        infos |= {info.producer_id: info for info in found.producers}
        forwarded = forwarded[size:]
    hub = batch(1, *infos.values(), points=stored)
    for scope in ("all", "tp=0", "tp=1", *(f"node n{n}" for n in range(4))):
        once, twice = over(whole, scope), over(hub, scope)
        assert once.keys() == twice.keys()
        for step, said in once.items():
            for stat in ("count", "nans", "min", "max", "min_rank", "max_rank"):
                assert twice[step][stat] == said[stat]
            assert twice[step]["mean"] == pytest.approx(said["mean"], rel=1e-12)
            assert twice[step]["m2"] == pytest.approx(said["m2"], rel=1e-12, abs=1e-14)


def test_partials_of_very_many_keys_can_be_told_to_a_hub() -> None:
    keys = tuple(f"key/{n}" for n in range(4096))
    by = rank(0, producer_id=b"r" * 16)
    found = through(batch(1, by, points=[points(by, [1], keys=keys)]), stores=False)
    told = decode(encode(found), found.id)
    assert over(told, "node a", "key/4095")[1]["mean"] == 1 + 409.5


@pytest.mark.parametrize("said", [math.nan, math.inf, -1.0, 1e300, 0.5])
def test_a_partial_that_says_what_cannot_be_holds_nothing_up(said: float) -> None:
    (partial,) = through(batch(1, rank(0), points=[points(rank(0), [1])]), stores=False).points
    wrong = replace(partial, values=np.full_like(partial.values, said))
    known = through(batch(1, rank(0), points=[points(rank(0), [1])]), stores=False).producers
    found = through(batch(1, *known, points=[wrong]))
    assert own(found, rank(0)) == []
    store = MemoryStore()
    store.write(found)
    assert len(store.reduction(RUN, "loss").steps) == 1


def test_keys_of_ranks_that_look_like_partials_are_none() -> None:
    odd = tuple(f"loss\x1f{stat}" for stat in reduce.STATS)
    store = MemoryStore()
    store.write(through(batch(1, rank(0), points=[points(rank(0), [1], keys=odd)])))
    assert store.reduction(RUN, odd[3]).count.tolist() == [1]


def test_a_reducer_heeds_what_the_batch_itself_defines() -> None:
    said = batch(
        1, rank(0), points=[points(rank(0), [1])], tags=[definition(rank(0), "loss", keep="none")]
    )
    found = Reducer(policies=Policies(), keep_all_ranks=1000, stores=True).reduced(said)
    assert (own(found, rank(0)), sorted(over(found, "all"))) == ([], [1])
