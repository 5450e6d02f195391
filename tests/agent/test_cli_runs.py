"""runs, show, tail and export over a store that was written as an agent writes it."""

from __future__ import annotations

import csv
import io
import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from trackagent.agent.cli import main
from trackagent.agent.cli.output import warn_of_damage
from trackagent.agent.store import open_writer
from trackagent.agent.store.contract import (
    Batch,
    BatchId,
    EventData,
    Loss,
    Points,
    ProducerEnd,
    ProducerInfo,
    Setting,
    Writer,
)

DONE, LIVE = "4f2a" + "0" * 28, "b001" + "1" * 28
START_NS = 1_760_000_000_000_000_000
SECOND_NS = 1_000_000_000
STEPS = 50
TIMEOUT_S = 20


def producer(run_id: str, rank: int, name: str, start_ns: int = START_NS) -> ProducerInfo:
    return ProducerInfo(
        producer_id=bytes.fromhex(run_id[:4]) * 7 + bytes([0, rank]),
        run_id=run_id,
        attempt=1,
        rank=rank,
        local_rank=rank,
        world_size=2,
        node="node-a",
        pid=100 + rank,
        start_time_ns=start_ns,
        experiment="gpt" if run_id == DONE else "other",
        run_name=name,
        forked=False,
    )


def values(rank: int) -> np.ndarray:
    loss = np.linspace(4.0, 1.0, STEPS) + rank
    if rank == 1:
        loss[10], loss[11], loss[12] = np.nan, np.inf, -np.inf
    return np.stack([loss, np.full(STEPS, 0.1 + 0.2)])


def finished_rank(rank: int) -> Batch:
    who = producer(DONE, rank, "brave-otter")
    steps = np.arange(STEPS)
    return Batch(
        id=BatchId("spool", rank + 1, rank + 1),
        producers=[who],
        params=[Setting(who.producer_id, "lr", "0.0003", START_NS)],
        tags=[Setting(who.producer_id, "note", "red \x1b[31m text", START_NS)],
        events=[EventData(who.producer_id, START_NS, "warning", f"from rank {rank}", 7, {"a": 1})],
        points=[
            Points(
                who.producer_id,
                ("train/loss", 'a,"b"'),
                steps,
                START_NS + steps * SECOND_NS,
                values(rank),
            )
        ],
        ends=[
            ProducerEnd(who.producer_id, START_NS + 60 * SECOND_NS, "finished", "", STEPS + rank)
        ],
        losses=[Loss(who.producer_id, "journal_full", 1)] if rank else [],
        metric_records={who.producer_id: STEPS},
    )


def live_points(first: int, last: int) -> Batch:
    who = producer(LIVE, 0, "busy-bee", START_NS + 3600 * SECOND_NS)
    steps = np.arange(first, last)
    return Batch(
        id=BatchId("live", first + 1, last),
        producers=[who],
        points=[
            Points(
                who.producer_id,
                ("reward",),
                steps,
                who.start_time_ns + steps * SECOND_NS,
                steps[np.newaxis] / 2,
            )
        ],
        metric_records={who.producer_id: last - first},
    )


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder with a finished run of two ranks and a younger one that still runs."""
    folder = tmp_path_factory.mktemp("state")
    writer = open_writer(folder / "store.db")
    for batch in (finished_rank(0), finished_rank(1), live_points(0, 5)):
        writer.write(batch)
    writer.close()
    return folder


def invoke(state: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--state", str(state)])


def output(state: Path, *arguments: str) -> str:
    result = invoke(state, *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


# --- runs


def test_runs_are_listed_newest_first(state: Path) -> None:
    assert [line.split()[1] for line in output(state, "runs").splitlines()] == [
        "name",
        "busy-bee",
        "brave-otter",
    ]


def test_runs_are_chosen_by_experiment(state: Path) -> None:
    found = json.loads(output(state, "runs", "--experiment", "gpt", "--json"))
    assert [run["run_id"] for run in found] == [DONE]


def test_runs_are_chosen_by_status(state: Path) -> None:
    found = json.loads(output(state, "runs", "--status", "running", "--json"))
    assert [run["run_id"] for run in found] == [LIVE]


def test_runs_are_limited(state: Path) -> None:
    assert len(json.loads(output(state, "runs", "--limit", "1", "--json"))) == 1


def test_the_keys_of_a_run_in_json_are_those_the_help_lists(state: Path) -> None:
    found = json.loads(output(state, "runs", "--json"))[0]
    shown = " ".join(CliRunner().invoke(main, ["runs", "--help"]).stdout.split())
    listed = shown.split("JSON keys of each run: ")[1].split(" Options:")[0]
    assert sorted(found) == sorted(name.split()[0] for name in listed.split(", "))


def test_no_match_is_said_so(state: Path) -> None:
    assert output(state, "runs", "--status", "killed") == "no runs match\n"


def test_piped_output_has_no_escape_sequences_and_no_trailing_blanks(state: Path) -> None:
    shown = output(state, "runs") + output(state, "show", DONE)
    assert "\x1b" not in shown
    assert [line for line in shown.splitlines() if line != line.rstrip()] == []


# --- show


def shown_fact(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(name)).split(None, 1)[1]


def test_show_sets_records_stored_beside_records_logged(state: Path) -> None:
    assert shown_fact(output(state, "show", DONE), "records") == "100 stored, 101 logged"


def test_show_has_losses_with_their_reason(state: Path) -> None:
    assert shown_fact(output(state, "show", DONE), "lost") == "1 record: journal_full 1"


def test_show_has_zero_losses_as_zero(state: Path) -> None:
    assert shown_fact(output(state, "show", LIVE), "lost") == "0 records"


def test_show_has_params_tags_and_events(state: Path) -> None:
    words = output(state, "show", DONE).split()
    assert {"lr", "0.0003", "note", "warning"} <= set(words)


def test_show_makes_control_characters_visible(state: Path) -> None:
    assert r"red \x1b[31m text" in output(state, "show", DONE)


def test_show_draws_every_rank_and_their_mean(state: Path) -> None:
    legend = output(state, "show", DONE, "--key", "train/*")
    assert "━ mean of 2 ranks 1.5" in legend
    assert "⠶ rank 0 1  ⠶ rank 1 2" in legend


def test_show_marks_what_is_not_finite(state: Path) -> None:
    assert "! 3 values are NaN or infinite (steps 10 to 12)" in output(state, "show", DONE)


def test_show_fits_in_80_columns_when_piped(state: Path) -> None:
    assert max(map(len, output(state, "show", DONE).splitlines())) <= 80


def test_show_without_a_run_shows_the_latest(state: Path) -> None:
    assert output(state, "show").startswith("busy-bee  running\n")


def test_show_draws_nothing_when_told_so(state: Path) -> None:
    assert "└" not in output(state, "show", "--no-curves")


def test_show_as_json_has_everything(state: Path) -> None:
    shown = json.loads(output(state, "show", DONE, "--json"))
    assert shown["params"] == {"lr": "0.0003"}
    assert shown["losses"] == {"journal_full": 1}
    assert [event["message"] for event in shown["events"]] == ["from rank 0", "from rank 1"]
    assert [(one["key"], one["source"]) for one in shown["series"]] == [
        ('a,"b"', "rank 0"),
        ('a,"b"', "rank 1"),
        ("train/loss", "rank 0"),
        ("train/loss", "rank 1"),
    ]


def test_show_says_not_known_of_an_ended_run_that_could_not_say(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "store.db")
    writer.write(live_points(0, 5))
    who = producer(LIVE, 0, "busy-bee").producer_id
    writer.write(Batch(BatchId("end", 1, 1), ends=[ProducerEnd(who, START_NS, "killed", "", -1)]))
    writer.close()
    assert (
        shown_fact(output(tmp_path, "show"), "records")
        == "5 stored; a rank ended without its count"
    )


def test_show_says_until_when_records_logged_are_not_known(state: Path) -> None:
    expected = "5 stored; ranks count theirs when they end"
    assert shown_fact(output(state, "show", LIVE), "records") == expected


# --- export


def exported(state: Path, *arguments: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in output(state, "export", DONE, *arguments).splitlines()]


def test_an_exported_line_has_the_point_and_who_logged_it(state: Path) -> None:
    found = exported(state, "--key", "train/loss")
    first = next(line for line in found if line["rank"] == 1)
    assert first == {
        "key": "train/loss",
        "source": "rank 1",
        "rank": 1,
        "attempt": 1,
        "step": 0,
        "time_ns": START_NS,
        "value": 5.0,
    }


def test_every_point_is_exported_bit_for_bit(state: Path) -> None:
    found = {
        (line["key"], line["rank"], line["step"]): float(line["value"])  # type: ignore[arg-type]
        for line in exported(state)
    }
    expected = {
        (key, rank, step): values(rank)[row, step]
        for row, key in enumerate(("train/loss", 'a,"b"'))
        for rank in range(2)
        for step in range(STEPS)
    }
    assert {k: repr(v) for k, v in found.items()} == {
        k: repr(float(v)) for k, v in expected.items()
    }


def test_exported_json_writes_what_is_not_finite_as_text(state: Path) -> None:
    found = exported(state, "--key", "train/loss")
    assert [line["value"] for line in found if isinstance(line["value"], str)] == [
        "NaN",
        "Infinity",
        "-Infinity",
    ]


def test_exported_csv_has_the_same_points(state: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(output(state, "export", DONE, "--format", "csv"))))
    lines = exported(state)
    assert [{**row, "value": repr(float(row["value"]))} for row in rows] == [
        {k: str(v) for k, v in line.items()} | {"value": repr(float(line["value"]))}  # type: ignore[arg-type]
        for line in lines
    ]


def test_an_exported_file_has_what_the_screen_would_show(state: Path, tmp_path: Path) -> None:
    output(state, "export", DONE, "--output", str(tmp_path / "points.jsonl"))
    assert (tmp_path / "points.jsonl").read_text() == output(state, "export", DONE)


def test_an_export_that_fails_leaves_no_file(state: Path, tmp_path: Path) -> None:
    result = invoke(state, "export", "nosuchrun", "--output", str(tmp_path / "points.jsonl"))
    assert (result.exit_code, list(tmp_path.iterdir())) == (3, [])


def test_an_export_into_a_missing_folder_is_one_line(state: Path, tmp_path: Path) -> None:
    result = invoke(state, "export", DONE, "--output", str(tmp_path / "no" / "points"))
    assert (result.exit_code, result.stderr) == (
        1,
        f"trackagent: cannot write {tmp_path}/no/points: No such file or directory\n",
    )


def command(state: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "trackagent.agent.cli", *arguments, "--state", str(state)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_an_export_whose_reader_goes_ends_quietly(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "store.db")
    # More than a pipe holds.
    writer.write(live_points(0, 20_000))
    writer.close()
    with command(tmp_path, "export", LIVE) as export:
        assert export.stdout is not None
        assert export.stderr is not None
        export.stdout.readline()
        export.stdout.close()
        assert (export.stderr.read(), export.wait(TIMEOUT_S)) == ("", 141)


def test_an_export_holds_few_points_in_memory(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "store.db")
    for first in range(0, 400_000, 100_000):
        writer.write(live_points(first, first + 100_000))
    writer.close()
    script = (
        "import resource, sys\n"
        "from trackagent.agent.cli import main\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"run = ['--state', {str(tmp_path)!r}, '--output', '/dev/null']\n"
        "for arguments in (['runs', '--state', run[1]], ['export', 'latest', *run[:2]]):\n"
        "    try: main(arguments)\n"
        "    except SystemExit: pass\n"
        "    print(peak(), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    before, after = map(int, done.stderr.split())
    # As text the points are 50 MB.
    assert done.stdout.count("\n") > 400_000
    assert (after - before) / 1024 < 30


# --- tail


def test_tail_prints_the_last_lines(state: Path) -> None:
    lines = output(state, "tail", LIVE, "--once", "-n", "2").splitlines()
    assert [line.split(None, 1)[1] for line in lines] == [
        "rank 0  step 3  reward=1.5",
        "rank 0  step 4  reward=2",
    ]


def test_tail_takes_any_number_of_lines(state: Path) -> None:
    shown = output(state, "tail", LIVE, "--once", "-n", "9" * 20)
    assert shown == output(state, "tail", LIVE, "--once", "-n", "5")


def test_tail_of_a_run_that_has_ended_ends(state: Path) -> None:
    assert len(output(state, "tail", DONE, "-n", "1000").splitlines()) == 2 * STEPS + 2


def test_tail_has_events(state: Path) -> None:
    assert "rank 1  step 7  warning: from rank 1" in output(state, "tail", DONE, "-n", "1000")


def test_tail_as_json_is_an_object_a_line(state: Path) -> None:
    line = json.loads(output(state, "tail", LIVE, "--once", "-n", "1", "--json"))
    assert (line["source"], line["step"], line["values"]) == ("rank 0", 4, {"reward": 2.0})


def test_tail_chooses_keys(state: Path) -> None:
    lines = output(state, "tail", DONE, "-n", "1", "--key", "train/*")
    assert "a,b" not in lines
    assert lines.split()[-1] == "train/loss=2"


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Writer]:
    writer = open_writer(tmp_path / "store.db")
    writer.write(live_points(0, 5))
    yield writer
    writer.close()


def test_tail_follows_a_run_until_it_ends(live: Writer, tmp_path: Path) -> None:
    with command(tmp_path, "tail", "--json") as tail:
        assert tail.stdout is not None
        # A run that never ends would hold the test until the limit.
        guard = threading.Timer(TIMEOUT_S, tail.kill)
        guard.start()
        seen = [json.loads(tail.stdout.readline())["step"] for _ in range(5)]
        live.write(live_points(5, 7))
        seen += [json.loads(tail.stdout.readline())["step"] for _ in range(2)]
        who = producer(LIVE, 0, "busy-bee").producer_id
        end = ProducerEnd(who, START_NS, "finished", "", 7)
        live.write(Batch(BatchId("live", 8, 8), ends=[end]))
        assert (seen, tail.stdout.read(), tail.wait()) == (list(range(7)), "", 0)
        guard.cancel()


def test_tail_is_interrupted_without_a_word(live: Writer, tmp_path: Path) -> None:
    import signal

    with command(tmp_path, "tail") as tail:
        assert tail.stdout is not None
        assert tail.stderr is not None
        tail.stdout.readline()
        os.kill(tail.pid, signal.SIGINT)
        assert (tail.stderr.read(), tail.wait(TIMEOUT_S)) == ("", 130)


# --- what is damaged

LEFT_OUT = "5 points of reward of rank 0 after the first 0: the checksum does not match"
WARNING = f"trackagent: warning: the store is damaged, left out are {LEFT_OUT}\n"


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A state folder with a run that has ended, of two chunks, the first with a changed byte."""
    path = tmp_path / "store.db"
    writer = open_writer(path)
    for points in (live_points(0, 5), live_points(5, 7)):
        writer.write(points)
    who = producer(LIVE, 0, "busy-bee").producer_id
    writer.write(Batch(BatchId("end", 1, 1), ends=[ProducerEnd(who, START_NS, "finished", "", 7)]))
    writer.close()
    connection = sqlite3.connect(path)
    with connection:
        ((data,),) = connection.execute("SELECT data FROM chunks WHERE start = 0")
        changed = data[:-1] + bytes([data[-1] ^ 0xFF])
        connection.execute("UPDATE chunks SET data = ? WHERE start = 0", (changed,))
    connection.close()
    return tmp_path


@pytest.mark.parametrize("arguments", [("show",), ("show", "--json"), ("export", "latest")])
def test_damage_is_one_warning(damaged: Path, arguments: tuple[str, ...]) -> None:
    result = invoke(damaged, *arguments)
    assert (result.exit_code, result.stderr) == (0, WARNING)


@pytest.mark.parametrize("once", [(), ("--once",)])
def test_tail_warns_of_damage_once(damaged: Path, once: tuple[str, ...]) -> None:
    result = invoke(damaged, "tail", *once)
    assert (result.exit_code, result.stderr) == (0, WARNING)


def test_what_is_left_beside_damage_is_exported(damaged: Path) -> None:
    lines = output(damaged, "export", "latest").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 6]


def test_what_is_left_beside_damage_is_tailed(damaged: Path) -> None:
    lines = output(damaged, "tail", "--json").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 6]


def test_what_is_left_beside_damage_is_drawn(damaged: Path) -> None:
    assert "└" in output(damaged, "show", "--key", "reward")


def test_show_as_json_names_damage(damaged: Path) -> None:
    assert json.loads(output(damaged, "show", "--json"))["damage"] == [LEFT_OUT]


def test_show_draws_a_series_of_which_nothing_is_left(damaged: Path) -> None:
    connection = sqlite3.connect(damaged / "store.db")
    with connection:
        connection.execute("UPDATE chunks SET data = x'00'")
    connection.close()
    result = invoke(damaged, "show")
    assert (result.exit_code, len(result.stderr.splitlines())) == (0, 1)


def test_of_much_damage_a_little_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_damage(["a", "b\x1b", "c", "d", "e"])
    expected = "a; b\\x1b; c; and 2 more (trackagent show --json lists them all)"
    assert capsys.readouterr().err.split("left out are ")[1] == f"{expected}\n"


def test_nothing_is_said_of_a_sound_store(state: Path) -> None:
    assert [invoke(state, *one).stderr for one in (("show",), ("export", DONE))] == ["", ""]


# --- what is not there


@pytest.mark.parametrize("name", ["show", "export", "tail"])
def test_an_unknown_run_is_exit_code_3_with_candidates(state: Path, name: str) -> None:
    result = invoke(state, name, "nosuchrun")
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.startswith("trackagent: ")
    assert "busy-bee" in result.stderr


@pytest.mark.parametrize("few", ["4", "b0", "4F2"])
def test_too_few_digits_of_a_run_id_are_said_so(state: Path, few: str) -> None:
    result = invoke(state, "show", few)
    assert result.exit_code == 3
    assert "(of a run id, give at least 4 digits)" in result.stderr


def test_nothing_is_said_of_digits_to_what_is_no_run_id(state: Path) -> None:
    assert (
        "digits" not in invoke(state, "show", "xyz").stderr + invoke(state, "show", "beef").stderr
    )


@pytest.mark.parametrize("name", ["show", "tail", "export"])
def test_the_help_states_the_fewest_digits_of_a_run_id(name: str) -> None:
    shown = CliRunner().invoke(main, [name, "--help"]).stdout
    assert "beginning of one (at least 4 digits)" in " ".join(shown.split())


def test_a_key_that_matches_nothing_is_exit_code_3(state: Path) -> None:
    result = invoke(state, "show", DONE, "--key", "nosuch/*")
    assert (result.exit_code, result.stdout, result.stderr) == (
        3,
        "",
        "trackagent: no key of this run matches nosuch/*\n",
    )


@pytest.mark.parametrize("arguments", [("runs",), ("show",), ("tail",), ("export", "latest")])
def test_a_missing_store_is_exit_code_3(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = invoke(tmp_path, *arguments)
    assert (result.exit_code, len(result.stderr.splitlines())) == (3, 1)


@pytest.mark.parametrize(("put", "what"), [(os.mkfifo, "a FIFO"), (Path.mkdir, "a folder")])
@pytest.mark.parametrize("arguments", [("runs",), ("show",), ("tail",), ("export", "latest")])
def test_what_is_no_file_in_the_place_of_the_store_is_named(
    tmp_path: Path, put: Callable[[Path], None], what: str, arguments: tuple[str, ...]
) -> None:
    put(tmp_path / "store.db")
    result = invoke(tmp_path, *arguments)
    assert (result.exit_code, result.stderr) == (
        1,
        f"trackagent: there is {what} in the place of the store {tmp_path}/store.db: move it away, "
        "or name another folder (--state, TRACKAGENT_STATE)\n",
    )


def test_a_damaged_store_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "store.db").write_bytes(b"not a database " * 100)
    result = invoke(tmp_path, "runs")
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
