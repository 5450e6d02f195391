"""Which torch tensors come through a ring, and with which value.

The code is the GPU's, on tensors in the CPU's memory that say they are on a GPU: their copies land at once.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest

from trackagent.client.device import ROWS, InFlight, Rings
from trackagent.client.errors import ValueRefused
from trackagent.client.values import is_on_gpu, to_copy

pytestmark = pytest.mark.skipif(find_spec("torch") is None, reason="torch is in the demo extra")

KINDS = (
    *("bool", "uint8", "int8", "int16", "int32", "int64"),
    *("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64"),
)


@pytest.fixture(scope="module")
def torch() -> Any:
    """Imported by the process that runs these tests, not by each that collects them: it takes 2 s."""
    return importlib.import_module("torch")


@pytest.fixture(scope="module")
def on_gpu(torch: Any) -> Callable[[Any], Any]:
    """on_gpu(tensor): the tensor, which says that it is on one."""
    subclass = type("OnGpu", (torch.Tensor,), {"is_cuda": True, "is_cpu": False})

    def pretend(tensor: Any) -> Any:
        return tensor.as_subclass(subclass)

    return pretend


@pytest.fixture
def in_flight(torch: Any) -> InFlight:
    from trackagent.client.cuda import Cuda

    return InFlight(Rings(Cuda), None)


def through(in_flight: InFlight, **tensors: Any) -> dict[str, float]:
    """What comes of these."""
    assert all(map(is_on_gpu, tensors.values()))
    in_flight.queue({k: to_copy(k, one) for k, one in tensors.items()}, step=0, time_ns=0)
    [record] = in_flight.landed()
    return dict(record.values)


# --- what is taken


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_value_is_what_item_gives(
    torch: Any, on_gpu: Any, in_flight: InFlight, kind: str, shape: tuple[int, ...]
) -> None:
    tensor = torch.full(shape, 0.7).to(getattr(torch, kind))
    assert through(in_flight, v=on_gpu(tensor)) == {"v": float(tensor.item())}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 65504.0], ids=repr)
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "float64"])
def test_extremes_are_kept(
    torch: Any, on_gpu: Any, in_flight: InFlight, kind: str, value: float
) -> None:
    tensor = torch.tensor(value, dtype=getattr(torch, kind))
    assert repr(through(in_flight, v=on_gpu(tensor))["v"]) == repr(float(tensor.item()))


def test_values_of_different_types_keep_theirs(
    torch: Any, on_gpu: Any, in_flight: InFlight
) -> None:
    tensors = {
        "tokens": torch.tensor(2**53 - 1),
        "loss": torch.tensor(0.1),
        "exact": torch.tensor(0.1, dtype=torch.float64),
        "found_inf": torch.tensor(True),
    }
    found = through(in_flight, **{key: on_gpu(one) for key, one in tensors.items()})
    assert found == {"tokens": 2.0**53 - 1, "loss": 0.10000000149011612, "exact": 0.1} | {
        "found_inf": 1.0
    }


def test_more_values_than_a_row_has_come(torch: Any, on_gpu: Any, in_flight: InFlight) -> None:
    values = {f"v{i}": on_gpu(torch.tensor(float(i))) for i in range(40)}
    assert through(in_flight, **values) == {f"v{i}": float(i) for i in range(40)}


def test_views_are_what_they_show(torch: Any, on_gpu: Any, in_flight: InFlight) -> None:
    table = torch.arange(12.0).reshape(3, 4)
    negated = torch.tensor([3 + 4j]).conj().imag
    assert through(in_flight, a=on_gpu(table[2, 1]), b=on_gpu(negated)) == {"a": 9.0, "b": -4.0}


def test_a_loss_that_requires_grad_is_taken_and_can_be_trained_on(
    torch: Any, on_gpu: Any, in_flight: InFlight
) -> None:
    weight = torch.nn.Parameter(torch.tensor(2.0))
    loss = weight * weight
    found = through(in_flight, loss=on_gpu(loss), weight=on_gpu(weight))
    loss.backward()
    assert (found, float(weight.grad)) == ({"loss": 4.0, "weight": 2.0}, 4.0)


def test_the_first_may_be_logged_in_inference_mode(
    torch: Any, on_gpu: Any, in_flight: InFlight
) -> None:
    with torch.inference_mode():
        first = through(in_flight, v=on_gpu(torch.tensor(1.0)))
    assert (first, through(in_flight, v=on_gpu(torch.tensor(2.0)))) == ({"v": 1.0}, {"v": 2.0})


def test_a_default_device_and_type_change_nothing(
    torch: Any, on_gpu: Any, in_flight: InFlight
) -> None:
    tensor = on_gpu(torch.tensor(0.1))
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float16)
    try:
        assert through(in_flight, v=tensor) == {"v": 0.10000000149011612}
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


# --- what is refused


def refusal(call: Callable[[], object]) -> tuple[str, str]:
    """The reason, and the message."""
    with pytest.raises(ValueRefused) as caught:
        call()
    return caught.value.reason, str(caught.value)


def test_more_or_fewer_than_one_number_are_refused_by_name(torch: Any, on_gpu: Any) -> None:
    message = "'w' is a OnGpu, of shape (2, 3), which is no number: log a float"
    assert refusal(lambda: to_copy("w", on_gpu(torch.zeros(2, 3)))) == ("not a number", message)


def test_a_complex_number_is_refused_by_name(torch: Any, on_gpu: Any) -> None:
    message = "'w' is a OnGpu, of torch.complex64, which is no number: log a float"
    assert refusal(lambda: to_copy("w", on_gpu(torch.tensor(1j)))) == ("not a number", message)


def test_a_tensor_without_a_value_is_refused_by_name(torch: Any) -> None:
    def dispatch(*arguments: Any) -> Any:
        raise NotImplementedError

    wrapper = type("Wrapper", (torch.Tensor,), {"__torch_dispatch__": classmethod(dispatch)})
    tensor = torch.Tensor._make_wrapper_subclass(wrapper, (), device="cuda")
    assert is_on_gpu(tensor)
    assert refusal(lambda: to_copy("w", tensor)) == (
        "device tensor",
        "'w' is a Wrapper, whose value need not lie in memory: log a plain tensor, or tensor.item()",
    )


def test_no_code_of_a_tensors_class_runs_when_it_is_copied(torch: Any, in_flight: InFlight) -> None:
    def intercept(cls: type, function: Any, *arguments: Any) -> Any:
        raise AssertionError(function)

    members = {"is_cuda": True, "__torch_function__": classmethod(intercept)}
    subclass = type("Intercepting", (torch.Tensor,), members)
    assert through(in_flight, v=torch.tensor(0.5).as_subclass(subclass)) == {"v": 0.5}


def test_what_cannot_be_copied_takes_no_room(torch: Any, on_gpu: Any, in_flight: InFlight) -> None:
    reasons = set()

    def log(tensor: Any) -> Any:
        reasons.add(refusal(lambda: in_flight.queue({"v": tensor}, step=0, time_ns=0))[0])
        return tensor

    for _ in range(ROWS):
        log(torch.tensor([1.0]).to_sparse())
        torch.vmap(log)(torch.zeros(2))
    assert reasons == {"device error"}
    assert through(in_flight, v=on_gpu(torch.tensor(1.0))) == {"v": 1.0}
