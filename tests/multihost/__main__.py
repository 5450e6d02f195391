"""`make hosts`: jobs over several hosts, faults between and in them, and a table of what came of it.

Exit code 1 when the oracle finds anything, 0 also where hosts are not permitted, with the reason.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from tests.chaos.oracle import DOUBLED, LOST, Violation
from tests.multihost.network import why_not
from tests.multihost.scenarios import SCENARIOS, Result, carry_out

COLUMNS = ("fault", "hosts x ranks", "records", "lost", "doubled", "other", "recovered in s")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.multihost", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"only these, of: {', '.join(SCENARIOS)}")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(SCENARIOS):
        parser.error(f"no such scenarios: {', '.join(sorted(unknown))}")
    if reason := why_not():
        print(f"skipped: {reason}")
        return 0
    began = time.monotonic()
    # Two at once: they wait most of the time, and each has hosts of its own.
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:
        found = processes.map(carry_out, options.names or SCENARIOS)
        results = [result for one in found for result in one]
    print()
    _print_table(results)
    print(f"\n{time.monotonic() - began:.0f} s")
    return 1 if any(result.violations for result in results) else 0


def _print_table(results: Sequence[Result]) -> None:
    def count(violations: Sequence[Violation], *kinds: str) -> int:
        return sum(violation.kind in kinds for violation in violations)

    rows = [COLUMNS, tuple("---" for _ in COLUMNS)]
    for result in results:
        found = result.violations
        other = len(found) - count(found, LOST, DOUBLED)
        counts = (str(result.records), str(count(found, LOST)), str(count(found, DOUBLED)))
        rows.append((result.fault, result.size, *counts, str(other), f"{result.recovered_s:.1f}"))
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    sys.exit(main())
