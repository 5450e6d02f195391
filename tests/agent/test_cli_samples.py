"""What show and export say of what agents sampled while a run was on their nodes."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.agent.store.batches import OTHER_RUN, RUN, batch, end, points, producer
from trackagent.agent.cli import main, samples
from trackagent.agent.store import open_writer
from trackagent.agent.store.contract import Points, ProducerInfo, SeriesInfo, node_run_id

START_S = 1_760_000_000
SECOND_NS = 1_000_000_000
SECONDS = range(START_S - 50, START_S + 200)
RAN_S = 110
GIB = 1 << 30


def who(source: str, **changes: Any) -> ProducerInfo:
    return producer(
        **{"run": node_run_id("node-a"), "sampled": source, "producer_id": source.encode()}
        | changes
    )


NODE = who("node node-a")
GPUS = [who(f"gpu node-a:{index}") for index in range(2)]
PROCESSES = [who(f"rank {rank}", rank=rank, run=RUN) for rank in range(2)]
DEVICES = tuple(f"system/disk/d{number}/busy_percent" for number in range(20))


def sampled(by: ProducerInfo, *keys: str, value: float = 1.0) -> Points:
    times = [second * SECOND_NS for second in SECONDS]
    return points(by, SECONDS, times=times, keys=keys, value=[value] * len(SECONDS))


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder with a run of two ranks that took 110 s on a sampled node, and one of another node."""
    folder = tmp_path_factory.mktemp("state")
    ranks = [producer(rank, start_time_ns=START_S * SECOND_NS) for rank in range(2)]
    alone = producer(0, run=OTHER_RUN, node="node-b", start_time_ns=1)
    said = [points(rank, range(50), keys=("train/loss",)) for rank in ranks]
    said += [points(alone, range(50))]
    said += [sampled(NODE, "system/cpu/percent", "system/memory/used_bytes", *DEVICES)]
    for at, gpu in enumerate(GPUS):
        said.append(sampled(gpu, f"gpu/{at}/utilization_percent", value=100.0 + at))
        said.append(sampled(gpu, f"gpu/{at}/power_watts", value=300.0 + at))
    said += [sampled(one, "process/cpu/percent") for one in PROCESSES]
    ends = [end(rank, time_ns=(START_S + RAN_S) * SECOND_NS) for rank in ranks]
    with contextlib.closing(open_writer(folder / "store.db")) as writer:
        every = [*ranks, alone, NODE, *GPUS, *PROCESSES]
        writer.write(batch(1, *every, points=said, ends=ends))
    return folder


def invoke(state: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--state", str(state)])


def output(state: Path, *arguments: str) -> str:
    result = invoke(state, *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def section(state: Path, *arguments: str) -> list[str]:
    """The lines of the samples' section."""
    lines = output(state, "show", RUN, "--no-curves", *arguments).splitlines()
    found = lines[lines.index("samples") + 2 :]
    return found[: found.index("")] if "" in found else found


def drawings(state: Path, *arguments: str) -> list[str]:
    """The titles of the drawings."""
    lines = output(state, "show", *arguments).splitlines()
    below = [at for at, line in enumerate(lines) if "└" in line]
    return [lines[at - 13] for at in below]


# --- show


def test_show_lists_samples_those_first_that_people_look_at(state: Path) -> None:
    # The second key of `points` has as its value the step and a tenth: here the run's last second.
    memory = f"{(START_S + RAN_S) / GIB:.1f} GiB"
    assert [" ".join(line.split()) for line in section(state)[:5]] == [
        "system/cpu/percent node node-a 1",
        "gpu/*/utilization_percent 2 GPUs 100 to 101",
        "gpu/*/power_watts 2 GPUs 300 to 301",
        "process/cpu/percent 2 ranks 1",
        f"system/memory/used_bytes node node-a {memory}",
    ]


def test_show_lists_a_dozen_and_says_how_many_more(state: Path) -> None:
    lines = section(state)
    assert (len(lines), lines[-1]) == (13, "  and 13 more keys (--samples lists them all)")


def test_show_lists_all_samples_when_told_so(state: Path) -> None:
    assert len(section(state, "--samples")) == 5 + len(DEVICES)


def test_show_has_no_section_for_a_run_without_samples(state: Path) -> None:
    assert "samples" not in output(state, "show", OTHER_RUN)


def test_show_draws_two_samples_beside_the_training_curves(state: Path) -> None:
    assert drawings(state, RUN) == [
        "train/loss",
        "gpu/*/utilization_percent",
        "system/cpu/percent",
    ]


def test_show_draws_samples_that_match(state: Path) -> None:
    assert drawings(state, RUN, "--key", "process/*", "--key", "gpu/1/*", "--key", "train/*") == [
        "train/loss",
        "gpu/*/utilization_percent",
        "gpu/*/power_watts",
        "process/cpu/percent",
    ]


def test_samples_are_drawn_over_the_seconds_of_the_run(state: Path) -> None:
    drawn = output(state, "show", RUN, "--key", "gpu/*/power_watts").splitlines()
    at = next(at for at, line in enumerate(drawn) if "└" in line)
    labels = drawn[at + 1].split()
    assert (labels[0], labels[-2:]) == ("0", ["100", "s"])
    assert "⠶ gpu node-a:0 300  ⠶ gpu node-a:1 301" in drawn[at + 2]


def test_a_pattern_that_neither_series_nor_samples_match_finds_nothing(state: Path) -> None:
    result = invoke(state, "show", RUN, "--key", "no/such")
    assert (result.exit_code, result.stderr) == (
        3,
        "trackagent: no key of this run matches no/such\n",
    )


def test_show_as_json_has_samples_as_it_has_series(state: Path) -> None:
    shown = json.loads(output(state, "show", RUN, "--json"))
    assert [one["key"] for one in shown["series"]] == ["train/loss"] * 2
    found = [one for one in shown["samples"] if one["source"] == "gpu node-a:1"]
    assert found[0] == {
        "key": "gpu/1/power_watts",
        "source": "gpu node-a:1",
        "points": RAN_S + 1,
        "first_step": 0,
        "last_step": RAN_S,
        "last_value": 301.0,
    }


def test_nothing_is_drawn_of_a_moment_or_of_more_curves_than_anyone_reads() -> None:
    brief = SeriesInfo("system/cpu/percent", "node a", 2, 5, 5, 1.0)
    many = [
        SeriesInfo(f"gpu/{at}/utilization_percent", f"gpu a:{at}", 9, 0, 9, 1.0)
        for at in range(samples.MOST_DRAWN + 1)
    ]
    groups = samples.grouped([brief, *many])
    assert samples.drawn(groups, ()) == {}
    assert list(samples.drawn(groups, ("gpu/*", "system/*"))) == [*groups]
    assert list(samples.drawn(samples.grouped(many[1:]), ())) == ["gpu/*/utilization_percent"]


# --- runs and export


def test_samples_are_no_runs(state: Path) -> None:
    runs = json.loads(output(state, "runs", "--json"))
    assert [run["run_id"] for run in runs] == [RUN, OTHER_RUN]


def test_an_export_has_what_was_logged(state: Path) -> None:
    lines = output(state, "export", RUN).splitlines()
    assert {json.loads(line)["key"] for line in lines} == {"train/loss"}


def test_samples_are_exported_when_told_so(state: Path) -> None:
    lines = output(state, "export", RUN, "--samples", "--key", "gpu/1/power_watts").splitlines()
    assert (len(lines), json.loads(lines[0])) == (
        RAN_S + 1,
        {
            "key": "gpu/1/power_watts",
            "source": "gpu node-a:1",
            "rank": -1,
            "attempt": 0,
            "step": 0,
            "time_ns": START_S * SECOND_NS,
            "value": 301.0,
        },
    )


def test_exported_samples_of_an_attempt_are_those_of_its_ranks(state: Path) -> None:
    text = output(state, "export", RUN, "--samples", "--attempt", "1", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert {(row["source"], row["rank"]) for row in rows} == {("rank 0", "0"), ("rank 1", "1")}


def test_tail_prints_what_was_sampled_where_it_is_asked_for(state: Path) -> None:
    pattern = ("--key", "gpu/0/power_watts")
    lines = output(state, "tail", RUN, "--once", "--json", "--samples", *pattern).splitlines()
    told = [json.loads(line) for line in lines]
    values = {"gpu/0/power_watts": 300.0}
    assert [(one["source"], one["step"], one["values"]) for one in told] == [
        ("gpu node-a:0", step, values) for step in range(RAN_S - 9, RAN_S + 1)
    ]


def test_tail_prints_no_samples_where_they_are_not_asked_for(state: Path) -> None:
    assert output(state, "tail", RUN, "--once", "--key", "gpu/*") == ""
