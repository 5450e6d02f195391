"""A bad cable: `python -m tests.multihost.cable ONE OTHER DELAY_S JITTER_S LOSS READY`.

What comes in at one interface goes out at the other, late, some of it in another order, and some of it not at
all. Says "ready" to the descriptor READY.
"""

from __future__ import annotations

import heapq
import os
import random
import select
import socket
import sys
import time
from itertools import count

ETH_P_ALL = 0x0003
PACKET_OUTGOING = 4
MAX_FRAME_BYTES = 1 << 16
# As a switch's own memory: what does not fit is lost.
MAX_HELD = 10_000


def main() -> None:
    one, other, delay_s, jitter_s, loss, ready = sys.argv[1:]
    ends = [_opened(one), _opened(other)]
    opposite = {ends[0]: ends[1], ends[1]: ends[0]}
    os.write(int(ready), b"ready")
    os.close(int(ready))
    held: list[tuple[float, int, socket.socket, bytes]] = []
    numbers = count()
    while True:
        wait_s = max(0.0, held[0][0] - time.monotonic()) if held else None
        for end in select.select(ends, [], [], wait_s)[0]:
            frame, (_, _, kind, *_) = end.recvfrom(MAX_FRAME_BYTES)
            if kind == PACKET_OUTGOING or random.random() < float(loss) or len(held) >= MAX_HELD:
                continue
            due = time.monotonic() + float(delay_s) + random.uniform(0.0, float(jitter_s))
            heapq.heappush(held, (due, next(numbers), opposite[end], frame))
        while held and held[0][0] <= time.monotonic():
            _, _, end, frame = heapq.heappop(held)
            end.send(frame)


def _opened(interface: str) -> socket.socket:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    end.bind((interface, 0))
    return end


if __name__ == "__main__":
    main()
