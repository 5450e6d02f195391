"""The ports of InfiniBand and RoCE adapters: what goes through, what goes wrong, and whether they are up.

Each counter that is read asks the adapter, so those of errors are read every ten seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trackagent.agent.collect.contract import Here, Incident, Sample, Unavailable
from trackagent.agent.collect.counters import Rates, bounded, part
from trackagent.agent.collect.metrics import Metric

ERRORS_S = 10.0
PORTS_S = 60.0
_WORD_BYTES = 4  # data is counted in words, of every lane of the link together

_PORT = "infiniband/{device}/{port}/"
# File of a port → the end of its key, and how many of its units are one of ours.
_RATES = {
    "counters/port_rcv_data": ("received_bytes_per_second", _WORD_BYTES),
    "counters/port_xmit_data": ("sent_bytes_per_second", _WORD_BYTES),
    "counters/port_rcv_packets": ("received_packets_per_second", 1),
    "counters/port_xmit_packets": ("sent_packets_per_second", 1),
}
_ERRORS = {
    "counters/link_downed": ("link_downed_total", "how often the link went down"),
    "counters/link_error_recovery": ("link_recoveries_total", "how often the link recovered"),
    "counters/symbol_error": ("symbol_errors_total", "errors of the wire"),
    "counters/port_rcv_errors": ("receive_errors_total", "packets received badly"),
    "counters/port_xmit_discards": ("send_drops_total", "packets dropped, not sent"),
    "counters/local_link_integrity_errors": ("integrity_errors_total", "bursts of errors"),
    "counters/excessive_buffer_overrun_errors": ("overruns_total", "buffers that ran over"),
    "hw_counters/out_of_sequence": ("out_of_sequence_total", "packets out of order (RoCE)"),
    "hw_counters/packet_seq_err": ("sequence_errors_total", "packets asked for again (RoCE)"),
    "hw_counters/local_ack_timeout_err": ("ack_timeouts_total", "answers that never came (RoCE)"),
    "hw_counters/np_cnp_sent": ("congestion_notices_total", "notices of congestion sent (RoCE)"),
}
METRICS = (
    Metric(f"{_PORT}state", "number", "1 down, 2 init, 3 armed, 4 active", "`state` of the port"),
    *(
        Metric(
            f"{_PORT}{end}",
            "bytes/s" if "bytes" in end else "1/s",
            end.partition("_")[0],
            f"`{file}`",
        )
        for file, (end, _) in _RATES.items()
    ),
    *(
        Metric(f"{_PORT}{end}", "number", f"{meaning}; every 10 s", f"`{file}`")
        for file, (end, meaning) in _ERRORS.items()
    ),
)


def make(here: Here) -> Infiniband:
    folder = here.sys / "class" / "infiniband"
    if not folder.is_dir():
        raise Unavailable(f"no InfiniBand or RoCE adapter: there is no {folder}")
    return Infiniband(here, folder)


class Infiniband:
    """Collector `infiniband`."""

    name = "infiniband"

    def __init__(self, here: Here, folder: Path) -> None:
        self._clock = here.clock
        self._folder = folder
        # By how the keys of a port begin, its folder.
        self._ports: dict[str, Path] = {}
        self._ports_due = self._errors_due = self._clock()
        self._rates = Rates()

    def sample(self) -> Sequence[Sample | Incident]:
        now = self._clock()
        if now >= self._ports_due:
            self._ports_due = now + PORTS_S
            self._ports = self._find_ports()
        values, counters = {}, {}
        for prefix, port in self._ports.items():
            if (state := _number(port / "state")) is not None:
                values[f"{prefix}state"] = state
            for file, (end, size) in _RATES.items():
                if (count := _number(port / file)) is not None:
                    counters[prefix + end] = count * size
        found = [Sample(values | self._rates.per_second(counters, now))]
        if now >= self._errors_due:
            self._errors_due = now + ERRORS_S
            found.append(Sample(self._errors()))
        return found

    def _errors(self) -> dict[str, float]:
        return {
            prefix + end: count
            for prefix, port in self._ports.items()
            for file, (end, _) in _ERRORS.items()
            if (count := _number(port / file)) is not None
        }

    def _find_ports(self) -> dict[str, Path]:
        names = bounded(
            f"{port.parent.parent.name}/{port.name}" for port in self._folder.glob("*/ports/*")
        )
        found = {}
        for name in names:
            device, _, port = name.partition("/")
            found[f"infiniband/{part(device)}/{part(port)}/"] = (
                self._folder / device / "ports" / port
            )
        return found


def _number(path: Path) -> float | None:
    """What the file begins with, as `4` in `4: ACTIVE`; None where there is none, or its adapter is gone."""
    try:
        text = path.read_text().partition(":")[0].strip()
    except OSError:
        return None
    return float(text) if text.isdecimal() else None
