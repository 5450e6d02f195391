"""`python -m benchmarks`: every figure beside its budget, in one table."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import platform
import sys
import time

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.figures import BenchmarkError, Figure, NotOnThisMachine

# Module of this package → what it measures.
SUBJECTS = {
    "log_call": "log() of 10 floats, on its caller's thread",
    "sender": "training process at 200 records/s of 10 floats",
    "imports": "import trackagent.client",
    "throughput": "whole path, from log() to durable and readable",
    "agent": "agent at 8 ranks x 50 metrics x 10 Hz",
    "curves": "store",
    "scale": "a hub under the agents of many nodes",
    "cuda": "log() of 10 tensors on a GPU",
}
PIPED_COLUMNS = 110


def main() -> int:
    """The exit code: 0 whatever the figures say, since another machine has others; 1 when one is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures the budgets on this machine, in temporary folders (TMPDIR chooses the disk). "
        "Takes about 4 minutes; run nothing else beside it.",
    )
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"of {', '.join(SUBJECTS)}")
    parser.add_argument(
        "--quick", action="store_true", help="shorter and less exact: about a minute"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    for subject in options.subjects:
        if subject not in SUBJECTS:
            parser.error(f"no subject {subject!r}: choose of {', '.join(SUBJECTS)}")

    progress = Console(stderr=True, highlight=False)
    found: dict[str, list[Figure]] = {}
    failed = False
    for subject in options.subjects or SUBJECTS:
        began = time.monotonic()
        with progress.status(f"measuring: {SUBJECTS[subject]}"):
            measure = importlib.import_module(f"benchmarks.{subject}").measure
            try:
                found[subject] = list(measure(options.quick))
            except BenchmarkError as error:
                failed = failed or not isinstance(error, NotOnThisMachine)
                progress.print(f"not measured: {SUBJECTS[subject]}: {error}", style="bold red")
                continue
        progress.print(
            f"measured: {SUBJECTS[subject]} ({time.monotonic() - began:.0f} s)", style="dim"
        )
    if options.json:
        figures = [
            {"subject": subject, **dataclasses.asdict(figure), "met": figure.met}
            for subject, rows in found.items()
            for figure in rows
        ]
        print(json.dumps({"machine": machine(), "figures": figures}, indent=2))
    else:
        print_table(found)
    return int(failed)


def machine() -> str:
    """What the figures were measured on, in a line."""
    model = platform.processor() or platform.machine()
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        model = next((line.split(": ")[1].strip() for line in lines if "model name" in line), model)
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, Linux {platform.release()}, "
        f"Python {platform.python_version()}, load {os.getloadavg()[0]:.1f} at the end"
    )


def print_table(found: dict[str, list[Figure]]) -> None:
    """Figures beside their budgets, and below each what else there is to say of it."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_COLUMNS)
    console.print(machine(), style="bold")
    rows = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    rows.add_column("")
    rows.add_column("figure", justify="right")
    rows.add_column("budget", justify="right")
    rows.add_column("")
    notes: list[str] = []
    for subject, figures in found.items():
        rows.add_row(f"[bold]{SUBJECTS[subject]}[/]")
        for figure in figures:
            budget = ""
            if figure.budget is not None:
                budget = f"{'≥' if figure.at_least else '≤'} {shown(figure.budget)}"
            mark = {None: "", True: "[green]met[/]", False: "[bold red]missed[/]"}[figure.met]
            number = ""
            if figure.note:
                notes.append(figure.note)
                number = f" ({len(notes)})"
            name = f"  {figure.name}[dim]{number}[/]"
            rows.add_row(name, f"{shown(figure.value)} {figure.unit}", budget, mark)
    console.print(rows)
    for number, note in enumerate(notes, 1):
        console.print(f"({number}) {note}", style="dim", markup=False)
    every = [figure.met for figures in found.values() for figure in figures]
    console.print(f"{every.count(True)} budgets met, {every.count(False)} missed", style="bold")


def shown(value: float) -> str:
    """Three digits, or all of a whole number."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
