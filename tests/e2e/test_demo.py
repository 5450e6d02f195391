"""`make demo` does what it says: one run of it, small, and what a newcomer then reads."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"
RANKS, EPOCHS = 2, 3
# 1437 images on 2 ranks in batches of 16: 45 steps an epoch, of 6 points, and a test.
POINTS = RANKS * EPOCHS * (45 * 6 + 1)

pytestmark = pytest.mark.skipif(
    not (importlib.util.find_spec("torch") and importlib.util.find_spec("sklearn")),
    reason="the demo trains with torch and scikit-learn (extra: demo)",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def demo(folder: Path) -> subprocess.CompletedProcess[str]:
    """The demo, piped, in a folder of its own."""
    options = ["--processes", str(RANKS), "--epochs", str(EPOCHS), "--folder", str(folder)]
    return subprocess.run(
        [sys.executable, DEMO, *options], capture_output=True, text=True, timeout=100, check=False
    )


@pytest.fixture(scope="module")
def run(demo: subprocess.CompletedProcess[str], folder: Path) -> dict[str, Any]:
    """What the store that the demo leaves says of its run, after the demo."""
    shown = subprocess.run(
        [sys.executable, "-m", "trackagent.agent.cli", "show", "--json"],
        env={**os.environ, "TRACKAGENT_STATE": str(folder / "state")},
        stdout=subprocess.PIPE,
        timeout=30,
        check=True,
    )
    found: dict[str, Any] = json.loads(shown.stdout)
    return found


def test_the_demo_succeeds_and_complains_of_nothing(
    demo: subprocess.CompletedProcess[str],
) -> None:
    assert (demo.returncode, demo.stderr) == (0, "")


def test_the_output_is_plain_text_where_it_is_piped(
    demo: subprocess.CompletedProcess[str],
) -> None:
    assert [c for c in demo.stdout if not c.isprintable() and c != "\n"] == []


def test_the_training_says_how_it_goes_once_an_epoch(
    demo: subprocess.CompletedProcess[str],
) -> None:
    assert re.findall(r"^epoch (\d)/3 ", demo.stdout, re.MULTILINE) == ["1", "2", "3"]


def test_the_output_names_the_run_and_its_params(
    demo: subprocess.CompletedProcess[str], run: dict[str, Any]
) -> None:
    lines = [" ".join(line.split()) for line in demo.stdout.splitlines()]
    named = {f"run id {run['run_id']}", "experiment digits", "epochs 3", "world_size 2"}
    assert named - set(lines) == set()


def test_curves_of_every_rank_and_their_mean_are_drawn(
    demo: subprocess.CompletedProcess[str],
) -> None:
    trained, *_ = re.split(r"^(?:system|process)/", demo.stdout, flags=re.MULTILINE)
    legends = re.findall(r"━ (mean of 2 ranks) \S+  \S (rank 0) \S+  \S (rank 1) ", trained)
    assert legends == [("mean of 2 ranks", "rank 0", "rank 1")] * 2


def test_the_demo_prints_equal_counts_of_logged_and_stored(
    demo: subprocess.CompletedProcess[str], run: dict[str, Any]
) -> None:
    rows = re.findall(r"^  (ranks|records|points) +(\d+) +(\d+)  ", demo.stdout, re.MULTILINE)
    records = str(run["records_stored"])
    points = str(POINTS)
    assert rows == [("ranks", "2", "2"), ("records", records, records), ("points", points, points)]


def test_the_store_holds_what_the_ranks_logged(run: dict[str, Any]) -> None:
    counted = (run["status"], run["ranks"], run["points"], run["lost_records"])
    assert counted == ("finished", RANKS, POINTS, 0)
    assert run["records_stored"] == run["records_logged"]


def test_the_network_has_learned(run: dict[str, Any]) -> None:
    accuracies = [s["last_value"] for s in run["series"] if s["key"] == "test/accuracy"]
    assert len(accuracies) == RANKS
    assert min(accuracies) > 0.9


def test_the_output_draws_what_was_sampled_meanwhile(
    demo: subprocess.CompletedProcess[str], run: dict[str, Any]
) -> None:
    wanted = {"system/cpu/percent", "process/cpu/percent"}
    assert wanted & set(demo.stdout.splitlines()) == wanted & {one["key"] for one in run["samples"]}
