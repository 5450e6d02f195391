"""The page of `trackagent top`: drawn from made-up answers, in small and large terminals."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console

from trackagent.agent.cli.page import page, shared, sparkline
from trackagent.protos.v1 import agent_pb2

TIME_NS = 1_700_000_000_000_000_000
SMALL, LARGE = (80, 24), (160, 50)


def answer(*, runs: int = 1, ranks: int = 2, gpus: int = 0, **more: Any) -> agent_pb2.NodeResponse:
    """A node that trains."""
    return agent_pb2.NodeResponse(
        node="host-a",
        agent_version="1.2.3",
        time_ns=TIME_NS,
        readings={
            "system/cpu/percent": 42.0,
            "system/cpu/max_core_percent": 99.0,
            "system/memory/total_bytes": 64.0 * 2**30,
            "system/memory/used_bytes": 16.0 * 2**30,
            "system/load_1m": 1.5,
            "system/load_5m": 1.25,
            "system/load_15m": 1.0,
        },
        collectors=[
            agent_pb2.CollectorState(name="system", state="on", sampled_ns=TIME_NS),
            agent_pb2.CollectorState(
                name="gpu", state="on" if gpus else "off", reason="" if gpus else "no driver"
            ),
        ],
        runs=[run(*map(rank, range(ranks)), number=number) for number in range(runs)],
        gpus=[gpu(str(number)) for number in range(gpus)],
        **more,
    )


def run(*ranks: agent_pb2.RankState, number: int = 0, **changes: Any) -> agent_pb2.RunState:
    fields: dict[str, Any] = {
        "run_id": f"{number:032x}",
        "run_name": f"resnet-{number}",
        "attempt": 1,
        "world_size": 2,
        "loss_key": "train/loss",
        "losses": [1 / step for step in range(1, 65)],
        "ranks": ranks,
    }
    return agent_pb2.RunState(**(fields | changes))


def rank(number: int, **changes: Any) -> agent_pb2.RankState:
    fields: dict[str, Any] = {
        "rank": number,
        "connected": True,
        "step": 1234,
        "still_seconds": 0.1,
        "step_seconds": 0.25,
        "score": 1.0,
        "cpu_percent": 98.7,
        "rss_bytes": 3.0 * 2**30,
    }
    return agent_pb2.RankState(**(fields | changes))


def gpu(index: str, **changes: Any) -> agent_pb2.GpuState:
    fields: dict[str, Any] = {
        "gpu": index,
        "uuid": f"GPU-{index}",
        "name": "NVIDIA H100 80GB HBM3",
        "readings": {
            "utilization_percent": 97.0,
            "memory_used_bytes": 70.0 * 2**30,
            "memory_total_bytes": 80.0 * 2**30,
            "power_watts": 650.4,
            "power_limit_watts": 700.0,
            "temperature_celsius": 66.0,
            "throttle/sw_power_cap": 1.0,
            "throttle/hw_thermal": 0.0,
            "throttle/idle": 1.0,
        },
    }
    return agent_pb2.GpuState(**(fields | changes))


def alarm(message: str = "it hangs", run_id: str = "") -> agent_pb2.Alarm:
    return agent_pb2.Alarm(
        rule="hang", subject="run", level="error", message=message, run_id=run_id
    )


def drawn(
    said: agent_pb2.NodeResponse, size: tuple[int, int] | None = SMALL, note: str = ""
) -> list[str]:
    """The lines, as a terminal of so many columns and rows shows them; None: a pipe."""
    columns, rows = size or (80, None)
    console = Console(
        file=io.StringIO(), record=True, width=columns, height=rows, force_terminal=True
    )
    for part in page(said, columns, rows, note=note):
        console.print(part)
    return [line.rstrip() for line in console.export_text().splitlines()]


def line_with(text: str, lines: list[str]) -> str:
    """The only line with this."""
    (found,) = [line for line in lines if text in line]
    return found


@pytest.mark.parametrize("size", [SMALL, LARGE, (40, 10), (300, 100)])
@pytest.mark.parametrize(
    "many", [{}, {"gpus": 8}, {"runs": 40, "ranks": 25, "gpus": 128}, {"runs": 0, "ranks": 0}]
)
def test_a_page_fits_into_its_terminal(size: tuple[int, int], many: dict[str, int]) -> None:
    said = answer(**many, alarms=[alarm("so long " * 100)] * 20)
    lines = drawn(said, size, note="waiting: no agent runs")
    assert len(lines) <= size[1]
    assert max(map(len, lines)) <= size[0]


def test_a_node_without_a_gpu() -> None:
    lines = drawn(answer())
    assert lines[0].startswith("node host-a  ")
    assert lines[1:3] == [
        "cpu 42 % (max core 99 %)  memory 16.0/64.0 GiB (25 %)  load 1.50 1.25 1.00",
        "no GPUs: no driver",
    ]


def test_a_run_has_its_rate_and_its_loss() -> None:
    assert line_with("train/loss", drawn(answer())).split() == [
        *("resnet-0", "1", "2/2", "1234", "4", "train/loss", "0.015625"),
        "█▃▂▁▁▁▁▁▁▁▁▁",
    ]


def test_a_rank_has_its_step_and_score() -> None:
    said = answer(ranks=1)
    assert line_with("ms", drawn(said)).split() == [
        *("0", "resnet-0", "1234", "250", "ms", "1.00", "99", "3.0", "GiB")
    ]


def test_what_is_not_known_is_a_dash() -> None:
    said = answer(runs=0)
    bare = agent_pb2.RankState(rank=7, connected=True)
    said.runs.append(run(bare, run_name="new", loss_key="", losses=[]))
    rows = [line.split() for line in drawn(said) if "new" in line]
    assert rows == [["new", "1", "1/2", "-", "-"], ["7", "new", "-", "-", "-", "-", "-"]]


def test_a_gpu_has_what_it_does() -> None:
    assert line_with("H100", drawn(answer(gpus=1))).split() == [
        *(
            "0",
            "NVIDIA",
            "H100",
            "80GB",
            "…",
            "97",
            "%",
            "70.0/80",
            "GiB",
            "650/700",
            "W",
            "66",
            "°C",
        ),
        *("sw", "power", "cap"),
    ]


def test_a_lost_gpu_says_so() -> None:
    said = answer()
    said.gpus.append(gpu("3", readings={}, lost="GPU is lost"))
    assert line_with("lost", drawn(said)).endswith("lost: GPU is lost")


def test_a_lost_gpu_is_shown_where_others_are_not() -> None:
    said = answer(gpus=40, ranks=40)
    said.gpus[39].lost = "GPU is lost"
    assert line_with("lost", drawn(said)).startswith("39 ")


def test_slow_and_disconnected_ranks_stand_first() -> None:
    said = answer(runs=0)
    ranks = [rank(0), rank(1, score=0.5), rank(2), rank(3, connected=False)]
    said.runs.append(run(*ranks))
    shown = [line.split() for line in drawn(said) if " ms " in line]
    assert [row[0] for row in shown] == ["3", "1", "0", "2"]
    assert shown[0][-1] == "disconnected"


def test_a_rank_that_stands_still_says_for_how_long() -> None:
    said = answer(runs=0)
    said.runs.append(run(rank(0, still_seconds=75.0)))
    assert line_with(" ms ", drawn(said)).endswith("still 1m 15s")


def test_kinds_share_the_rows_and_say_how_many_more_there_are() -> None:
    lines = drawn(answer(ranks=100, gpus=16))
    assert len(lines) == SMALL[1]
    ranks, gpus = (sum(text in line for line in lines) for text in (" ms ", "H100"))
    assert f"and {100 - ranks} more ranks" in lines
    assert f"and {16 - gpus} more GPUs" in lines
    assert min(ranks, gpus) >= 5


def test_what_the_agent_left_out_is_counted_too() -> None:
    assert "and 24 more ranks" in drawn(answer(more_ranks=24))


def test_a_pipe_gets_a_bounded_number_of_each() -> None:
    lines = drawn(answer(ranks=1000), None)
    assert "and 937 more ranks" in lines
    assert sum(" ms " in line for line in lines) == 63


def test_an_alarm_names_its_run_and_is_folded() -> None:
    lines = drawn(answer(alarms=[alarm("it hangs for " + "long " * 20, f"{0:032x}")]))
    at = lines.index("wrong now")
    assert lines[at + 1].startswith("error  resnet-0: it hangs for long")
    assert lines[at + 2].startswith("    long")


def test_the_latest_event_stands_first() -> None:
    events = [
        agent_pb2.RunEvent(
            run_id=f"{0:032x}", time_ns=TIME_NS, level="info", source="rank 0", step=5, message=text
        )
        for text in ("before", "after")
    ]
    lines = drawn(answer(events=events))
    at = lines.index("events")
    assert [line.partition("  ")[2] for line in lines[at + 1 :]] == [
        "resnet-0 rank 0 step 5: after",
        "resnet-0 rank 0 step 5: before",
    ]


def test_control_characters_are_shown_and_not_obeyed() -> None:
    said = answer(gpus=1, alarms=[alarm("\x1b[2Jcleared\x07")])
    said.runs[0].run_name = "a\x1b]0;title\x07"
    said.gpus[0].name = "\x9bx"
    said.node = "n\r\n"
    text = "\n".join(drawn(said, LARGE, note="\x1b[31m"))
    assert [c for c in text if not c.isprintable() and c != "\n"] == []
    assert "\\x1b[2Jcleared\\x07" in text


def test_a_note_stands_above_what_is_old() -> None:
    assert drawn(answer(), note="waiting: no agent runs")[1] == "waiting: no agent runs"


def test_a_failing_collector_is_named() -> None:
    said = answer()
    said.collectors[0].state, said.collectors[0].reason = "failing", "no answer for 5 s"
    assert "system: failing: no answer for 5 s" in drawn(said)


def test_samples_that_are_old_say_so() -> None:
    said = answer()
    said.collectors[0].sampled_ns = TIME_NS - 75 * 10**9
    assert line_with("cpu 42 %", drawn(said, LARGE)).endswith("1m 15s ago")


def test_a_container_shows_what_it_may_use() -> None:
    said = answer()
    said.readings["cgroup/cpu/percent"] = 150.0
    said.readings["cgroup/cpu/limit_cores"] = 2.0
    assert "container cpu 1.5 of 2 cores" in drawn(said)


@pytest.mark.parametrize(
    ("values", "columns", "bars"),
    [
        ([], 5, ""),
        ([3.0], 5, "▁"),
        ([0.0, 1.0, 2.0], 5, "▁▅█"),
        ([math.nan, 1.0, math.inf, 2.0], 5, "×▁×█"),
        ([math.nan] * 3, 5, "×××"),
        ([0.0, 0.0, 1.0, 1.0], 2, "▁█"),
        ([-1.7e308, 1.7e308], 5, "▁█"),
        ([1.7e308] * 4, 2, "▁▁"),
    ],
)
def test_a_sparkline(values: list[float], columns: int, bars: str) -> None:
    assert sparkline(values, columns) == bars


@pytest.mark.parametrize(
    ("room", "wanted", "given"),
    [
        (10, [2, 3], [2, 3]),
        (4, [9, 9], [2, 2]),
        (5, [1, 9, 9], [1, 2, 2]),
        (1, [5, 5], [1, 0]),
        (0, [5], [0]),
        (-3, [5], [0]),
        (4, [], []),
    ],
)
def test_rows_are_shared(room: int, wanted: list[int], given: list[int]) -> None:
    assert shared(room, wanted) == given
