"""The soak can fail: what it says of samples that grow, and of records that are missing or doubled."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes import AgentProcess, run_script
from tests.soak.producers import Logged, missing_and_doubled
from tests.soak.samples import Sample, table
from trackagent.agent.config import STORE_NAME
from trackagent.agent.store import open_reader

STEADY = Sample(**{field.name: 10.0 for field in dataclasses.fields(Sample)})


@pytest.mark.parametrize("quantity", [field.name for field in dataclasses.fields(Sample)])
def test_a_quantity_that_doubles_and_more_is_said_to_grow(quantity: str) -> None:
    samples = [dataclasses.replace(STEADY, **{quantity: 10.0 + 2 * i}) for i in range(20)]
    assert [row.name for row in table(samples) if not row.flat] == [quantity]


def test_what_stays_is_flat() -> None:
    assert all(row.flat for row in table([STEADY] * 20))


def test_one_outlier_is_shown_as_the_largest_and_is_no_growth() -> None:
    samples = [STEADY] * 30 + [dataclasses.replace(STEADY, delay_s=99.0)] + [STEADY] * 30
    row = next(row for row in table(samples) if row.name == "delay_s")
    assert (row.flat, row.largest) == (True, 99.0)


@pytest.mark.parametrize(
    ("first", "returned", "killed", "expected"),
    [
        (0, 5, False, (0, 0)),
        (0, 4, True, (0, 0)),  # the last one may be there or not
        (0, 5, True, (0, 0)),
        (0, 7, False, (2, 0)),
        (0, 3, False, (0, 2)),
        (1, 4, False, (0, 1)),
    ],
)
def test_what_was_logged_is_compared_with_what_is_stored(
    agent: AgentProcess, first: int, returned: int, killed: bool, expected: tuple[int, int]
) -> None:
    program = """
from trackagent import client
run = client.init(experiment="soak")
for step in range(5):
    client.log({"metric_0": 1.0}, step=step)
client.finish()
print(run.id)
"""
    run_id = run_script(agent.folders, program).stdout.strip()
    agent.wait_for_status(run_id, "finished")
    with contextlib.closing(open_reader(agent.folders.state / STORE_NAME)) as reader:
        logged = [Logged(run_id, 1, first, returned, killed)]
        assert missing_and_doubled(reader, logged) == expected


def test_a_short_soak_ends_with_a_table_and_no_loss() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", "--minutes", "0.05", "--json"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    shown = json.loads(done.stdout)
    counts = shown["counts"]
    assert (counts["lost"], counts["doubled"], counts["journals left"]) == (0, 0, 0)
    assert counts["records"] > 0
    assert len(shown["rows"]) == len(dataclasses.fields(Sample))
