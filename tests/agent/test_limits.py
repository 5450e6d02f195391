"""What the agent's process takes of its system, and gives back."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

MIB = 1 << 20

# A block that lies below a small one when it is freed, after a larger one has been freed.
KEPT_AFTER_FREEING = """
import os
from trackagent.agent.limits import give_memory_back

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

give_memory_back()
larger = bytearray(b"x") * (20 << 20)
del larger
before = resident()
block = bytearray(b"x") * (16 << 20)
above = [bytearray(b"x") * 100_000 for _ in range(10)]
del block
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
def test_memory_of_large_blocks_goes_back() -> None:
    told = subprocess.run(
        [sys.executable, "-c", KEPT_AFTER_FREEING], check=True, capture_output=True, text=True
    )
    assert int(told.stdout) < 4 * MIB
