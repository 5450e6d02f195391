"""Tensors on a real GPU: values, streams, captures, and no call of CUDA's that waits."""

from __future__ import annotations

import importlib
import math
import threading
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest

from tests.client.runs import logged, losses
from tests.fakes import Folders
from trackagent.client import Run


@pytest.fixture(scope="module")
def torch() -> Any:
    """Torch with a GPU. Asked here, not where tests are collected: importing it takes 2 s."""
    if find_spec("torch") is None:
        pytest.skip("torch is in the demo extra")
    module = importlib.import_module("torch")
    if not module.cuda.is_available():
        pytest.skip("no GPU here")
    return module


def loss_of(torch: Any, device: str = "cuda", products: int = 50) -> Any:
    """A tensor that the GPU computes for a while, 2048.0: the sum of a chain of products."""
    matrix = torch.eye(2048, device=device)
    for _ in range(products):
        matrix = matrix @ matrix
    return matrix.sum()


KINDS = (
    *("bool", "uint8", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_is_what_item_gives(torch: Any, run: Run, folders: Folders, kind: str) -> None:
    tensor = torch.tensor(0.7, device="cuda").to(getattr(torch, kind))
    run.log({"a": tensor, "b": tensor.reshape(1, 1), "c": 1.0}, step=1)
    run.finish()
    value = float(tensor.item())
    assert sorted(logged(folders), key=lambda one: len(one[1])) == [
        (1, {"c": 1.0}),
        (1, {"a": value, "b": value}),
    ]


def test_nan_and_infinities_are_kept(torch: Any, run: Run, folders: Folders) -> None:
    values = (math.nan, math.inf, -math.inf)
    run.log({f"v{i}": torch.tensor(v, device="cuda") for i, v in enumerate(values)}, step=1)
    run.finish()
    [(_, found)] = logged(folders)
    assert repr(list(found.values())) == repr(list(values))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_log_makes_no_call_that_synchronises(torch: Any, run: Run) -> None:
    run.log({"loss": loss_of(torch)}, step=0)  # prepares the ring
    torch.cuda.synchronize()
    loss = loss_of(torch, products=500)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 20):
            run.log({"loss": loss, "twice": loss}, step=step)
        was_behind = not torch.cuda.current_stream().query()
        with pytest.raises(RuntimeError, match="synchron"):
            loss.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert was_behind


def test_a_tensor_may_be_overwritten_and_freed_right_after(
    torch: Any, run: Run, folders: Folders
) -> None:
    run.log({"loss": torch.zeros((), device="cuda")}, step=0)
    for step in range(1, 200):
        loss = loss_of(torch) + step
        run.log({"loss": loss}, step=step)
        loss.fill_(-1.0)
        del loss
        torch.full((), -2.0, device="cuda")  # takes the memory that is free now
    run.finish()
    found = dict(logged(folders))
    assert found == {0: {"loss": 0.0}} | {n: {"loss": 2048.0 + n} for n in range(1, 200)}


def test_another_stream_is_logged_in_its_order(torch: Any, run: Run, folders: Folders) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        run.log({"loss": loss_of(torch)}, step=1)
    run.log({"loss": loss_of(torch) + 1}, step=2)
    run.finish()
    assert dict(logged(folders)) == {1: {"loss": 2048.0}, 2: {"loss": 2049.0}}


def test_every_gpu_has_a_ring_of_its_own(torch: Any, run: Run, folders: Folders) -> None:
    gpus = torch.cuda.device_count()
    if gpus < 2:
        pytest.skip("one GPU here")
    run.log({f"loss{i}": loss_of(torch, f"cuda:{i}") + i for i in range(gpus)}, step=1)
    run.finish()
    assert logged(folders) == [(1, {f"loss{i}": 2048.0 + i for i in range(gpus)})]


def test_a_capture_is_left_alone_and_its_values_refused(
    torch: Any, start: Callable[..., Run], folders: Folders
) -> None:
    run = start()
    value = torch.ones((), device="cuda")
    result = torch.zeros((), device="cuda")
    run.log({"loss": value}, step=0)  # prepares the ring
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result.copy_(value * 2)
        run.log({"loss": result}, step=1)
    graph.replay()
    run.log({"loss": result}, step=2)
    run.finish()
    assert dict(logged(folders)) == {0: {"loss": 1.0}, 2: {"loss": 2.0}}
    assert losses(folders) == {"graph capture": 1}


def test_watching_does_not_disturb_a_capture(torch: Any, run: Run, folders: Folders) -> None:
    result = torch.zeros((), device="cuda")
    torch.cuda.synchronize()
    for step in range(20):
        run.log({"loss": loss_of(torch)}, step=step)
    graph = torch.cuda.CUDAGraph()
    # In CUDA's strictest mode: a forbidden call in any thread ends the capture.
    with torch.cuda.graph(graph, capture_error_mode="global"):
        for _ in range(1000):
            result.add_(1.0)
    graph.replay()
    run.log({"result": result}, step=20)
    run.finish()
    assert len(logged(folders)) == 21
    assert dict(logged(folders))[20] == {"result": 1000.0}


def test_many_threads_may_log(torch: Any, run: Run, folders: Folders) -> None:
    def work(number: int) -> None:
        for step in range(30):
            run.log({"loss": torch.full((), float(step), device="cuda")}, step=30 * number + step)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run.finish()
    assert dict(logged(folders)) == {n: {"loss": float(n % 30)} for n in range(120)}
