"""`make fuzz`: all tests of hypothesis again and again, each time with other and with many more examples."""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time

SCALE = 5
PYTEST = (
    *("-m", "pytest", "-q", "-n", "auto", "--maxprocesses=4", "--dist=loadfile"),
    # A round takes as long as it takes.
    *("--timeout=1800", "-o", "session_timeout=86400"),
    *("-p", "no:randomly", "-m", "hypothesis or fuzz"),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0, help="no round begins after these")
    parser.add_argument("--seed", type=int, help="of the first round")
    options, for_pytest = parser.parse_known_args()
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    deadline = time.monotonic() + 60 * options.minutes
    rounds = 0
    while rounds == 0 or time.monotonic() < deadline:
        print(f"=== seed {seed}", flush=True)
        done = subprocess.run(
            [sys.executable, *PYTEST, f"--hypothesis-seed={seed}", *for_pytest],
            env={**os.environ, "FUZZ_SCALE": str(SCALE)},
            check=False,
        )
        if done.returncode != 0:
            print(f"seed {seed} went wrong: make fuzz SEED={seed}")
            return 1
        rounds, seed = rounds + 1, seed + 1
    print(f"{rounds} rounds of {SCALE} times the examples of `make test`: nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
