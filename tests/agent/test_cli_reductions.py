"""What people see across ranks: `trackagent reduction`, and the list in `trackagent show`."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.agent.store.batches import OTHER_RUN, RUN, batch, param, points, producer
from trackagent.agent.cli import main
from trackagent.agent.policies import Policies
from trackagent.agent.reducing import reduced
from trackagent.agent.store import open_writer

WEIGHT = "trackagent/weight"


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder with a run of three ranks, of which rank 2 is behind, and one of a single rank, which
    gives weights."""
    folder = tmp_path_factory.mktemp("state")
    ranks = [
        producer(n, world_size=3, node=f"n{n // 2}", groups=(("tp", str(n % 2)),)) for n in range(3)
    ]
    alone = producer(0, run=OTHER_RUN, world_size=1)
    said = [
        points(one, range(30 - one.rank // 2), value=[float(one.rank)] * (30 - one.rank // 2))
        for one in ranks
    ]
    said.append(points(ranks[1], [0], keys=("bad",), value=[math.nan]))
    tokens = [points(one, [1], keys=("tokens",), value=[100.0]) for one in ranks]
    tags = [
        param(
            ranks[0], f"trackagent/define/{pattern}", json.dumps({"keep": None, "every": 1, **more})
        )
        for pattern, more in (
            ("loss", {"reduce": "mean", "keep": "extremes"}),
            ("tokens", {"reduce": "sum"}),
        )
    ]
    with contextlib.closing(open_writer(folder / "store.db")) as writer:
        whole = batch(1, *ranks, points=[*said, *tokens], tags=tags)
        writer.write(reduced(whole, learnt(whole), keep_all_ranks=64, stores=True))
        weighted = points(alone, range(3), keys=("loss", WEIGHT))
        writer.write(batch(2, alone, points=[weighted]))
    return folder


def learnt(said: Any) -> Policies:
    known = Policies()
    known.learn(said)
    return known


@pytest.fixture
def cli(state: Path, tmp_path: Path) -> Any:
    def invoke(*arguments: str, code: int = 0) -> Result:
        environment = {"TRACKAGENT_DIR": str(tmp_path / "dir"), "TRACKAGENT_STATE": str(state)}
        done = CliRunner().invoke(main, arguments, env=environment)
        assert done.exit_code == code, done.output
        return done

    return invoke


def lines(done: Result) -> list[list[str]]:
    return [line.split() for line in done.stdout.splitlines()]


def test_each_step_shows_who_reported_and_who_is_extreme(cli: Any) -> None:
    shown = lines(cli("reduction", RUN, "loss", "--last", "2"))
    assert shown[0] == ["loss", "over", "all", "ranks"]
    assert shown[1][:3] == ["28", "earlier", "steps"]
    assert shown[2] == ["step", "ranks", "mean", "std", "min", "max"]
    assert shown[3] == ["28", "3", "of", "3", "1", "0.8165", "0", "(rank", "0)", "2", "(rank", "2)"]
    assert shown[4] == ["29", "2", "of", "3", "0.5", "0.5", "0", "(rank", "0)", "1", "(rank", "1)"]


def test_what_is_defined_is_shown_first(cli: Any) -> None:
    shown = lines(cli("reduction", RUN, "tokens"))
    assert shown[1] == ["step", "ranks", "sum", "mean", "std", "min", "max"]
    assert shown[2][:5] == ["1", "3", "of", "3", "300"]


def test_a_value_that_is_no_number_is_told(cli: Any) -> None:
    assert "1 of 3, 1 NaN" in cli("reduction", RUN, "bad").stdout


def test_a_curve_is_drawn_unless_it_is_not_wanted(cli: Any) -> None:
    assert "╺" not in cli("reduction", RUN, "loss", "--no-curve").stdout
    drawn = cli("reduction", RUN, "loss").stdout
    assert all(name in drawn.splitlines()[-1] for name in ("mean", "min", "max"))


@pytest.mark.parametrize(
    ("over", "mean", "world_size"), [("all", 1.0, 3), ("node n0", 0.5, 2), ("tp=0", 1.0, 2)]
)
def test_json_has_every_step_over_these_ranks(
    cli: Any, over: str, mean: float, world_size: int
) -> None:
    said = json.loads(cli("reduction", RUN, "loss", "--over", over, "--json").stdout)
    assert (said["run_id"], said["key"], said["over"], said["reduce"]) == (
        RUN,
        "loss",
        over,
        "mean",
    )
    assert len(said["steps"]) == 30
    assert (said["steps"][5]["mean"], said["steps"][5]["world_size"]) == (mean, world_size)


def test_over_nobody_it_says_over_whom(cli: Any) -> None:
    told = cli("reduction", RUN, "loss", "--over", "tp=9", code=3).stderr
    assert "no ranks are in 'tp=9'; there is all, node n0, node n1, tp=0, tp=1" in told


def test_show_lists_what_can_be_looked_at_and_how_complete_it_is(cli: Any) -> None:
    shown = lines(cli("show", RUN, "--no-curves"))
    at = shown.index(["reductions"])
    assert shown[at + 2 : at + 5] == [
        ["bad", "mean", "0", "1", "of", "3"],
        ["loss", "mean", "29", "2", "of", "3"],
        ["tokens", "sum", "1", "3", "of", "3"],
    ]
    assert not any("trackagent/define" in word for line in shown for word in line)


def test_show_draws_the_reduction_where_not_every_point_is_stored(cli: Any) -> None:
    reduced_only = cli("show", RUN, "--key", "loss").stdout.splitlines()[-1]
    assert all(name in reduced_only for name in ("mean", "min", "max"))
    assert "rank 0" not in reduced_only
    assert "mean of 3 ranks" in cli("show", RUN, "--key", "tokens").stdout


def test_show_of_a_single_rank_lists_no_reductions(cli: Any) -> None:
    assert ["reductions"] not in lines(cli("show", OTHER_RUN, "--no-curves"))


def test_show_as_json_has_them_all(cli: Any) -> None:
    said = json.loads(cli("show", RUN, "--json").stdout)["reductions"]
    assert [(one["key"], one["reported"], one["world_size"], one["reduced"]) for one in said] == [
        ("bad", 1, 3, False),
        ("loss", 2, 3, True),
        ("tokens", 3, 3, False),
    ]


def test_weights_are_no_series_for_people(cli: Any) -> None:
    shown = cli("show", OTHER_RUN).stdout
    assert WEIGHT not in shown
    assert "keys drawn" not in shown
    tailed = cli("tail", OTHER_RUN, "--once").stdout
    assert [line.split()[-1] for line in tailed.splitlines()] == ["loss=0", "loss=1", "loss=2"]


@pytest.mark.parametrize(
    "asked",
    [
        ("show", OTHER_RUN, "--key", WEIGHT),
        ("tail", OTHER_RUN, "--once", "--key", WEIGHT),
        ("show", OTHER_RUN, "--json"),
        ("tail", OTHER_RUN, "--once", "--json"),
        ("export", OTHER_RUN),
    ],
    ids=lambda asked: " ".join(asked[::2]),
)
def test_weights_are_there_for_who_asks(cli: Any, asked: tuple[str, ...]) -> None:
    assert WEIGHT in cli(*asked).stdout
