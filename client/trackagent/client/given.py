"""What a run is given to record, taken apart: metrics into numbers, tensors on devices and what is refused;
params and tags into texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trackagent.client import reductions, values
from trackagent.client.errors import ValueRefused, is_a_handlers

Refused = list[tuple[str, Exception]]
"""Names, and why."""

# Types that cannot be on a device; numpy's scalars are added when numpy is seen.
plain_types: set[type] = {float, int, bool}


def weighed(metrics: Any, weight: Any) -> Any:
    """The metrics with their weight; one that is none is refused when its number is asked for."""
    try:
        number: Any = reductions.to_weight(weight)
    except ValueRefused as error:
        number = reductions.RefusedWeight(error)
    try:
        return {**metrics, reductions.WEIGHT_KEY: number}
    except Exception as error:
        if is_a_handlers(error):
            raise
        return metrics  # which log() will refuse


def parts_of(
    metrics: Mapping[str, Any], refused: Refused, *, known: bool
) -> tuple[dict[str, float], dict[str, Any]]:
    """The numbers, and the tensors that lie on devices; adds to `refused`. known: the keys were checked."""
    numbers: dict[str, float] = {}
    on_devices: dict[str, Any] = {}
    for key, value in metrics.items():
        try:
            if not known:
                values.check_key(key)
            if type(value) is not float and values.is_on_gpu(value):
                on_devices[key] = values.to_copy(key, value)
            else:
                numbers[key] = values.to_float(key, value)
        except ValueRefused as error:
            refused.append((str(key), error))
        else:
            if type(value).__module__ == "numpy" and not hasattr(value, "__len__"):
                plain_types.add(type(value))
    return numbers, on_devices


def texts_of(what: str, items: Mapping[str, Any]) -> tuple[dict[str, str], list[str], Refused]:
    """Keys and texts of params or tags, those of them that were cut, and what is refused."""
    texts: dict[str, str] = {}
    cut: list[str] = []
    refused: Refused = []
    try:
        if not isinstance(items, Mapping):
            problem = f"{what}s must be a dict, not {type(items).__name__}"
            return texts, cut, [(what, ValueRefused("not a dict", problem))]
        for key, value in values.flatten(items):
            try:
                texts[values.check_key(key, f"{what} key")], is_cut = values.to_text(value)
                if is_cut:
                    cut.append(key)
            except Exception as error:  # noqa: BLE001 - whatever the value's own code raises
                refused.append((key, error))
    except Exception as error:  # noqa: BLE001 - the mapping's own, or it contains itself
        refused.append((what, error))
    return texts, cut, refused
