"""Params, tags and events of a run."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.client.runs import losses, warnings
from tests.fakes import Folders, said
from trackagent import client
from trackagent.client import Run
from trackagent.client.record import Kind


def test_params_are_kept_as_text(start: Callable[..., Run], folders: Folders) -> None:
    start(params={"lr": 3e-4, "model": {"depth": 12, "norm": {"eps": 1e-5}}, "amp": True})
    assert said(folders, Kind.PARAMS) == [
        {"lr": "0.0003", "model.depth": "12", "model.norm.eps": "1e-05", "amp": "True"}
    ]


def test_a_param_is_written_once(run: Run, folders: Folders) -> None:
    run.log_params({"lr": 0.1})
    run.log_params({"lr": 0.1, "wd": 0.0})
    params = [item for data in said(folders, Kind.PARAMS) for item in data.items()]
    assert sorted(set(params)) == [("lr", "0.1"), ("wd", "0.0")]


def test_a_param_that_changes_is_refused(
    run: Run, folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    run.log_params({"lr": 0.1})
    run.log_params({"lr": 0.2, "wd": 0.0})
    client.finish()
    assert said(folders, Kind.PARAMS) == [{"lr": "0.1"}, {"wd": "0.0"}]
    assert losses(folders) == {"param changed": 1}
    assert warnings(caplog) == [
        "the param 'lr' is '0.1' and cannot become '0.2': log what changes as a metric or a tag"
    ]


def test_many_long_params_all_arrive(run: Run, folders: Folders) -> None:
    params = {f"p{i}": "ä" * 6000 for i in range(50)}
    run.log_params(params)
    found = {key: text for data in said(folders, Kind.PARAMS) for key, text in data.items()}
    assert found == params


def test_a_long_param_is_cut_and_warned_of(
    run: Run, folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    run.log_params({"p": "x" * 6001})
    client.finish()
    assert said(folders, Kind.PARAMS) == [{"p": "x" * 6000}]
    assert warnings(caplog) == ["the param 'p' was cut to 6000 characters"]


def test_tags_may_change(start: Callable[..., Run], folders: Folders) -> None:
    run = start(tags={"phase": "warmup"})
    run.set_tags({"phase": "main"})
    phases = [data["phase"] for data in said(folders, Kind.TAGS) if "phase" in data]
    assert phases == ["warmup", "main"]


@pytest.mark.parametrize("level", ["info", "warning", "error"])
def test_an_event_has_level_message_and_step(run: Run, folders: Folders, level: str) -> None:
    run.event("the disk is full", level, step=7)
    assert said(folders, Kind.EVENT) == [{"level": level, "message": "the disk is full"}]


def test_an_unknown_level_is_refused(run: Run, folders: Folders) -> None:
    run.event("x", "fatal")
    client.finish()
    assert (said(folders, Kind.EVENT), losses(folders)) == ([], {"bad level": 1})


def test_a_long_event_is_cut(run: Run, folders: Folders) -> None:
    run.event("x" * 10_000)
    assert said(folders, Kind.EVENT) == [{"level": "info", "message": "x" * 6000}]
