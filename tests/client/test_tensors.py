"""The real torch. Tensors as values and steps: which are taken, and with which words others are refused; what
the client looks for in it without a GPU."""

from __future__ import annotations

import importlib
import math
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from trackagent.client.errors import ValueRefused
from trackagent.client.torchmemory import TorchMemory
from trackagent.client.values import to_copy, to_float, to_step

pytestmark = pytest.mark.skipif(find_spec("torch") is None, reason="torch is in the demo extra")

NAN_WITH_PAYLOAD: float = struct.unpack("<d", struct.pack("<Q", 0xFFF8_0000_DEAD_BEEF))[0]
BITS = (0.1, -0.0, math.inf, -math.inf, math.nan, NAN_WITH_PAYLOAD, 5e-324, 1.7976931348623157e308)
KINDS = (
    *("bool", "uint8", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64"),
)


@pytest.fixture(scope="module")
def torch() -> Any:
    """Imported by the process that runs these tests, not by each that collects them: it takes 2 s."""
    return importlib.import_module("torch")


def refusal(function: Any, *arguments: Any) -> tuple[str, str]:
    """The reason, and the message."""
    with pytest.raises(ValueRefused) as caught:
        function(*arguments)
    return caught.value.reason, str(caught.value)


# --- values


@pytest.mark.parametrize("value", BITS, ids=repr)
def test_a_float64_keeps_its_bits(torch: Any, value: float) -> None:
    found = to_float("k", torch.tensor(value, dtype=torch.float64))
    assert type(found) is float
    assert struct.pack("<d", found) == struct.pack("<d", value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_cpu_tensors_of_one_element_are_taken(
    torch: Any, kind: str, shape: tuple[int, ...]
) -> None:
    assert to_float("k", torch.ones(shape, dtype=getattr(torch, kind))) == 1.0


def test_a_tensor_that_requires_grad_is_taken(torch: Any) -> None:
    loss = torch.tensor(3.0, requires_grad=True) * 0.5
    assert to_float("k", loss) == 1.5


def test_a_bfloat16_is_taken_as_it_is(torch: Any) -> None:
    assert to_float("k", torch.tensor(0.1, dtype=torch.bfloat16)) == 0.10009765625


def test_a_parameter_is_taken(torch: Any) -> None:
    assert to_float("k", torch.nn.Parameter(torch.tensor(2.0))) == 2.0


def test_what_is_no_number_is_refused(torch: Any) -> None:
    message = "'k' is a Tensor, tensor(0.+1.j), which is no number: log a float"
    assert refusal(to_float, "k", torch.tensor(1j)) == ("not a number", message)


@pytest.mark.parametrize("shape", [(2, 3), (0,)], ids=str)
def test_more_or_fewer_than_one_number_are_refused(torch: Any, shape: tuple[int, ...]) -> None:
    message = f"'k' is a Tensor, of shape {shape}, which is no number: log a float"
    assert refusal(to_float, "k", torch.zeros(shape)) == ("not a number", message)


def test_a_tensor_on_a_device_is_refused_since_reading_it_would_wait(torch: Any) -> None:
    assert refusal(to_float, "loss", torch.zeros((), device="meta")) == (
        "device tensor",
        "'loss' is a tensor on meta, and reading it would make the training loop wait: "
        "log tensor.item() where that is acceptable",
    )


# --- tensors of several ranks


@pytest.fixture(scope="module")
def mesh(torch: Any) -> Iterator[Any]:
    """Of this process alone."""
    distributed = importlib.import_module("torch.distributed")
    distributed.init_process_group(
        "gloo", store=distributed.HashStore(), rank=0, world_size=1, device_id=None
    )
    yield importlib.import_module("torch.distributed.device_mesh").DeviceMesh("cpu", [0])
    distributed.destroy_process_group()


def distributed_tensor(mesh: Any, tensor: Any, placement: str) -> Any:
    module = importlib.import_module("torch.distributed.tensor")
    place = {"replicated": module.Replicate(), "part": module.Partial(), "shard": module.Shard(0)}
    return module.DTensor.from_local(tensor, mesh, [place[placement]])


def test_a_replicated_tensor_is_taken(torch: Any, mesh: Any) -> None:
    loss = distributed_tensor(mesh, torch.tensor(1.5, requires_grad=True), "replicated")
    assert to_float("loss", loss) == 1.5


@pytest.mark.parametrize("placement", ["part", "shard"])
@pytest.mark.parametrize("take", [to_float, to_copy])
def test_a_tensor_of_which_other_ranks_have_parts_is_refused(
    torch: Any, mesh: Any, placement: str, take: Any
) -> None:
    loss = distributed_tensor(mesh, torch.ones(1), placement)
    assert refusal(take, "loss", loss) == (
        "part of a tensor",
        f"'loss' is a DTensor of which this rank has a part {loss.placements}, and getting the rest would "
        "make it wait for others: log tensor.full_tensor(), called on every rank",
    )


def test_the_local_tensor_of_a_replicated_one_is_copied(torch: Any, mesh: Any) -> None:
    local = torch.tensor(1.5)
    found = to_copy("loss", distributed_tensor(mesh, local, "replicated"))
    assert (type(found), found.data_ptr()) == (torch.Tensor, local.data_ptr())


def test_what_a_collective_has_not_ended_is_refused(torch: Any, mesh: Any) -> None:
    collectives = importlib.import_module("torch.distributed._functional_collectives")
    total = collectives.all_reduce(torch.tensor(1.0), "sum", mesh)
    try:
        assert refusal(to_float, "loss", total) == (
            "unfinished collective",
            "'loss' is the result of a collective operation that may not have ended: log tensor.wait()",
        )
    finally:
        total.wait()


# --- steps


def test_a_whole_number_is_a_step(torch: Any) -> None:
    step = to_step(torch.tensor(8))
    assert (step, type(step)) == (8, int)


def test_another_number_is_no_step(torch: Any) -> None:
    message = "the step tensor(1.5000) is no whole number"
    assert refusal(to_step, torch.tensor(1.5)) == ("bad step", message)


# --- its memory


def test_without_a_gpu_its_memory_is_not_read_and_cuda_stays_as_it_is(torch: Any) -> None:
    assert TorchMemory({"torch": torch}, lambda: 100.0).read() == {}
    assert not torch.cuda.is_initialized()


def test_it_has_what_its_memory_is_read_by(torch: Any) -> None:
    assert (
        torch.cuda.memory_stats_as_nested_dict(0) == {}
    )  # what it gives until CUDA is initialised
    assert callable(torch.cuda.get_allocator_backend)
