"""What `import trackagent.client` adds to the start of a process, with its bytecode compiled before."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks.figures import Figure

RUNS, QUICK_RUNS = 25, 9
BUDGET_MS = 30.0
SHOWN_MODULES = 5
ENVIRONMENT = {name: v for name, v in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def measure(quick: bool) -> Iterator[Figure]:
    """Milliseconds over bare python, of processes started alternately."""
    _start("import trackagent.client")
    bare: list[float] = []
    client: list[float] = []
    for _ in range(QUICK_RUNS if quick else RUNS):
        bare.append(_start("pass"))
        client.append(_start("import trackagent.client"))
    bare.sort()
    client.sort()
    over = statistics.median(client) - statistics.median(bare)
    yield Figure(
        name="over bare python",
        value=over,
        unit="ms",
        budget=BUDGET_MS,
        note=f"medians; smallest {client[0] - bare[0]:.1f} (bare python {bare[0]:.0f}); "
        f"most of it: {_heaviest()}",
    )


def _start(code: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True)
    return (time.perf_counter() - began) * 1e3


def _heaviest() -> str:
    """The modules with the longest import of their own."""
    command = [sys.executable, "-X", "importtime", "-c", "import trackagent.client"]
    report = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, check=True
    ).stderr
    rows = [line.removeprefix("import time:").split("|") for line in report.splitlines()[1:]]
    # What python imports for itself comes before the first module of ours is begun: `site` ends it.
    first = next(i for i, row in enumerate(rows) if row[2].strip() == "site") + 1
    heaviest = sorted(rows[first:], key=lambda row: -int(row[0]))[:SHOWN_MODULES]
    return ", ".join(f"{row[2].strip()} {int(row[0]) / 1e3:.1f}" for row in heaviest)
