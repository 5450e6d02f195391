"""`make chaos`: storms of faults, one after the other, and a table of what came of them.

A storm lasts half a minute or a little more; the next has the next seed. Exit code 1 when the oracle finds
anything, after what replays it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from tests.chaos import oracle
from tests.chaos.schedule import KINDS, schedule
from tests.chaos.storm import MEMORY_MIB, STATE_MIB, Outcome, can_mount, run

STORM_S = 30.0
NEED_MOUNTS = ("state disk full", "memory full")
SHOWN_VIOLATIONS = 20


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Storms of faults.")
    parser.add_argument("--seed", type=int, help="of the first storm; the next has the next")
    parser.add_argument("--minutes", type=float, default=1.0, help="of all storms together")
    parser.add_argument("--seconds", type=float, help="the same, in seconds")
    parser.add_argument(
        "--faults", default="", help=f"only these, by comma, of: {', '.join(KINDS)}"
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    options = parser.parse_args(arguments)
    kinds = [kind.strip() for kind in options.faults.split(",") if kind.strip()] or list(KINDS)
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"no such faults: {', '.join(sorted(unknown))}")
    seed = random.SystemRandom().getrandbits(32) if options.seed is None else options.seed
    out = sys.stderr if options.json else sys.stdout

    with tempfile.TemporaryDirectory() as folder:
        no_mounts = can_mount(Path(folder))
    if no_mounts:
        print(f"no full disks ({', '.join(NEED_MOUNTS)}): {no_mounts}", file=out)
        kinds = [kind for kind in kinds if kind not in NEED_MOUNTS]
    total_s = 60 * options.minutes if options.seconds is None else options.seconds
    storms = max(1, int(total_s // STORM_S))
    seconds = total_s / storms
    outcomes: list[Outcome] = []
    for number in range(storms):
        print(f"storm {number + 1} of {storms}: seed {seed + number}", file=out, flush=True)
        plan = schedule(seed + number, seconds, kinds)
        outcomes.append(run(plan, small_disks=not no_mounts))
        if outcomes[-1].violations:
            _explain(outcomes[-1], options.faults, out)
    if options.json:
        print(json.dumps(_summary(outcomes), indent=2))
    else:
        _print_table(_summary(outcomes))
    return 1 if any(outcome.violations for outcome in outcomes) else 0


def _explain(outcome: Outcome, faults: str, out: TextIO) -> None:
    for violation in outcome.violations[:SHOWN_VIOLATIONS]:
        print(f"  {violation.kind}: {violation.what}", file=out)
    if len(outcome.violations) > SHOWN_VIOLATIONS:
        print(f"  and {len(outcome.violations) - SHOWN_VIOLATIONS} more", file=out)
    only = f" --faults '{faults}'" if faults else ""
    replay = (
        f".venv/bin/python -m tests.chaos --seed {outcome.seed} --seconds {outcome.seconds:g}{only}"
    )
    print(f"  its folders: {outcome.folder}; again: {replay}", file=out)


def _summary(outcomes: Sequence[Outcome]) -> dict[str, object]:
    """The figures of all storms together."""
    violations = Counter(v.kind for outcome in outcomes for v in outcome.violations)
    return {
        "seeds": [outcome.seed for outcome in outcomes],
        "disks_mib": {"memory": MEMORY_MIB, "state": STATE_MIB},
        "faults": dict(sum((outcome.faults for outcome in outcomes), Counter[str]())),
        "died_at": dict(sum((outcome.reached for outcome in outcomes), Counter[str]())),
        "logged": sum(outcome.logged for outcome in outcomes),
        "returned": sum(outcome.returned for outcome in outcomes),
        "refused_and_counted": sum(outcome.refused for outcome in outcomes),
        "violations": {kind: violations[kind] for kind in oracle.KINDS},
        "longest_recovery_s": round(max(o.longest_recovery_s for o in outcomes), 2),
    }


def _print_table(summary: dict[str, object]) -> None:
    for title in ("faults", "died_at", "violations"):
        counts = summary[title]
        assert isinstance(counts, dict)
        print(f"\n{title.replace('_', ' ')}")
        for name, count in sorted(counts.items()) if title != "violations" else counts.items():
            print(f"  {name:50} {count:8}")
    print()
    for name in ("logged", "returned", "refused_and_counted", "longest_recovery_s"):
        print(f"{name.replace('_', ' '):52} {summary[name]:8}")


if __name__ == "__main__":
    sys.exit(main())
