"""`make hosts`: one job over several hosts, faults between and in them, and a table of what came of it.

Exit code 1 when the oracle finds anything, 0 also where hosts are not permitted, with the reason.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from tests.chaos.oracle import DOUBLED, LATE, LOST, Violation
from tests.multihost.network import why_not
from tests.multihost.scenarios import SCENARIOS, Result

SHOWN_VIOLATIONS = 10
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
    results: list[Result] = []
    for name in options.names or SCENARIOS:
        results += _shown(name, SCENARIOS[name])
    print()
    _print_table(results)
    print(f"\n{time.monotonic() - began:.0f} s")
    return 1 if any(result.violations for result in results) else 0


def _shown(name: str, scenario: Callable[[Callable[[str], None]], list[Result]]) -> list[Result]:
    def say(text: str) -> None:
        print(f"{name}: {text}", flush=True)

    try:
        found = scenario(say)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        found = [Result(name, "", violations=[Violation(LATE, str(error))])]
    for result in found:
        for violation in result.violations[:SHOWN_VIOLATIONS]:
            say(f"{result.fault}: {violation.kind}: {violation.what}")
        if (more := len(result.violations) - SHOWN_VIOLATIONS) > 0:
            say(f"{result.fault}: and {more} more")
    return found


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
