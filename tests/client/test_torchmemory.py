"""Torch's memory on GPUs, read from inside the rank: over a module that stands in for torch, since without a
GPU there is no such allocator."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from tests.client.runs import logged, losses, warnings
from tests.fakes import Folders, wait_until
from trackagent.client import Run
from trackagent.client.config import ClientConfig
from trackagent.client.errors import JournalError
from trackagent.client.identity import Identity
from trackagent.client.journal import Lane
from trackagent.client.torchmemory import COUNTERS, TorchMemory

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


class FakeCuda:
    """torch.cuda, with the allocators of `devices` by what they have reserved."""

    def __init__(self, *devices: int) -> None:
        self.devices = list(devices)
        self.initialized = True
        self.backend = "native"
        self.asked: list[int] = []
        self.problem: Exception | None = None

    def is_initialized(self) -> bool:
        return self.initialized

    def get_allocator_backend(self) -> str:
        return self.backend

    def memory_stats_as_nested_dict(self, device: int) -> dict[str, Any]:
        self.asked.append(device)
        if self.problem is not None:
            raise self.problem
        if device >= len(self.devices):
            raise RuntimeError(f"Invalid device argument {device}: did you call init?")
        reserved = self.devices[device]

        def kinds(current: int) -> dict[str, dict[str, int]]:
            one = {"current": current, "peak": 2 * current, "allocated": 0, "freed": 0}
            return {"all": one, "small_pool": one, "large_pool": one}

        return {
            "allocated_bytes": kinds(reserved // 2),
            "reserved_bytes": kinds(reserved),
            "inactive_split_bytes": kinds(reserved // 4),
            "num_alloc_retries": 3,
            "num_ooms": 1,
        }


class Rank:
    """What reads `cuda`, and a clock that the test moves."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.now = 100.0
        self.memory = TorchMemory({"torch": SimpleNamespace(cuda=cuda)}, lambda: self.now)

    def read(self) -> dict[str, float]:
        self.now += 1.0
        return self.memory.read()


def test_what_the_allocator_says() -> None:
    assert Rank(FakeCuda(4096)).read() == {
        "torch/cuda/0/allocated_bytes": 2048.0,
        "torch/cuda/0/max_allocated_bytes": 4096.0,
        "torch/cuda/0/reserved_bytes": 4096.0,
        "torch/cuda/0/max_reserved_bytes": 8192.0,
        "torch/cuda/0/inactive_split_bytes": 1024.0,
        "torch/cuda/0/alloc_retries_total": 3.0,
        "torch/cuda/0/ooms_total": 1.0,
    }


def test_only_devices_that_the_process_has_memory_on() -> None:
    found = Rank(FakeCuda(0, 0, 4096, 0)).read()
    assert {key.split("/")[2] for key in found} == {"2"}


def test_that_there_is_no_further_device_is_learnt_once() -> None:
    cuda = FakeCuda(4096, 4096)
    rank = Rank(cuda)
    rank.read()
    rank.read()
    assert cuda.asked == [0, 1, 2, 0, 1]


def test_it_is_asked_once_a_second() -> None:
    cuda = FakeCuda(4096)
    rank = Rank(cuda)
    rank.read()
    assert rank.memory.read() == {}
    rank.now += 0.9
    assert rank.memory.read() == {}
    rank.now += 0.1
    assert rank.memory.read() != {}


@pytest.mark.parametrize("torch", [None, SimpleNamespace(), SimpleNamespace(cuda=object())])
def test_without_torch_or_half_imported_it_says_nothing(torch: object) -> None:
    modules = {} if torch is None else {"torch": torch}
    assert TorchMemory(modules, lambda: 100.0).read() == {}


def test_cuda_that_is_not_initialised_is_not_asked() -> None:
    cuda = FakeCuda(4096)
    cuda.initialized = False
    rank = Rank(cuda)
    assert (rank.read(), cuda.asked) == ({}, [])
    cuda.initialized = True
    assert rank.read() != {}


def test_an_allocator_whose_counters_are_cudas_is_not_asked() -> None:
    cuda = FakeCuda(4096)
    cuda.backend = "cudaMallocAsync"
    rank = Rank(cuda)
    assert (rank.read(), cuda.asked) == ({}, [])


def test_after_a_failure_it_is_not_asked_again() -> None:
    cuda = FakeCuda(4096)
    cuda.problem = RuntimeError("CUDAPluggableAllocator does not yet support getDeviceStats")
    rank = Rank(cuda)
    with pytest.raises(RuntimeError, match="Pluggable"):
        rank.read()
    cuda.problem = None
    assert rank.read() == {}


def test_the_page_lists_what_is_read() -> None:
    _, _, section = PAGE.read_text().partition("\n## torch\n")
    section, _, _ = section.partition("\n## ")
    keys = re.findall(r"^\| `torch/cuda/\{device\}/(\w+)`", section, re.MULTILINE)
    assert keys == list(COUNTERS)


# --- in a run


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda(4096)


@pytest.fixture
def run(folders: Folders, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """A run without an agent, whose torch is the fake one."""
    monkeypatch.setenv("TRACKAGENT_DIR", str(folders.directory))
    monkeypatch.setenv("TRACKAGENT_STATE", str(folders.state))
    monkeypatch.setenv("TRACKAGENT_EXIT_TIMEOUT_S", "0.4")
    who = Identity(run_id=uuid4().hex, attempt=1, rank=0, local_rank=0, world_size=1, node="node a")
    memory = TorchMemory({"torch": SimpleNamespace(cuda=cuda)})
    run = Run(config=ClientConfig.load(), who=who, experiment="test", torch_memory=memory)
    yield run
    run.finish()


def of_torch(folders: Folders) -> list[tuple[int, dict[str, float]]]:
    return [(step, values) for step, values in logged(folders) if "torch/" in str(list(values))]


def test_it_is_logged_at_the_last_step_which_it_leaves_as_it_is(run: Run, folders: Folders) -> None:
    run.log({"loss": 1.0}, step=41)
    wait_until(lambda: of_torch(folders))
    step, values = of_torch(folders)[0]
    assert (step, values["torch/cuda/0/allocated_bytes"]) == (41, 2048.0)
    run.log({"loss": 0.5})
    assert (42, {"loss": 0.5}) in logged(folders)


def test_before_the_first_step_nothing_is_asked(
    run: Run, cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    # The sender's thread warns when it comes by: the second time, the first is over.
    for key in ("one", "two"):
        run.log({key: "no number"})
        wait_until(lambda key=key: [text for text in warnings(caplog) if key in text])  # type: ignore[misc]
    assert cuda.asked == []


def test_a_failure_is_warned_of_once_and_the_run_goes_on(
    run: Run, cuda: FakeCuda, folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.problem = RuntimeError("no such counters")
    run.log({"loss": 1.0})
    wait_until(lambda: warnings(caplog))
    run.log({"loss": 0.5})
    run.finish()
    assert [one.partition(" (")[0] for one in warnings(caplog)] == [
        "torch cannot say what it has allocated"
    ]
    assert (logged(folders), len(cuda.asked)) == ([(0, {"loss": 1.0}), (1, {"loss": 0.5})], 1)


def test_what_the_journal_has_no_room_for_is_counted(
    run: Run, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = run._journal.write_metrics

    def full(lane: Lane, numbers: dict[str, float], **more: int) -> None:
        if any(key.startswith("torch/") for key in numbers):
            raise JournalError("no room")
        write(lane, numbers, **more)

    monkeypatch.setattr(run._journal, "write_metrics", full)
    run.log({"loss": 1.0})
    wait_until(lambda: losses(folders))
    run.finish()
    assert (logged(folders), set(losses(folders))) == ([(0, {"loss": 1.0})], {"journal full"})
