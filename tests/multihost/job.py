"""A rank of the job: logs as the ranks of a storm do, and sums with the others, without waiting, as it goes.

    torchrun … tests/multihost/job.py NOTES STOP PER_SECOND

Which run and attempt it is in is rank 0's word. Its notes lie under these, its rank, host and process id in
the folder NOTES; a file beside them, .ended, says that finish() has returned, and what. It goes on until
the file STOP says "together", which the ranks agree on, or "alone", for what is left of a job.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from datetime import timedelta
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist

from tests.chaos.producer import BURST, log
from tests.chaos.records import Producer
from trackagent import client


def main() -> None:
    notes, stop, per_second = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    run = client.init(experiment="hosts", strict=True)
    begin_group(run)
    producer = Producer(run.id, run.rank, run.attempt - 1, run.rank)
    name = f"{run.id}-{run.rank}-{run.attempt}-{socket.gethostname()}-{os.getpid()}"
    noted = os.open(notes / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    told = torch.zeros(1)
    sum_ = None
    for first in count(0, BURST):
        for number in range(first, first + BURST):
            log(noted, producer, number)
        word = stop.read_text() if stop.exists() else ""
        if word == "alone":
            break
        if sum_ is not None and sum_.is_completed():
            sum_.wait()
            if told.item():
                break
            sum_ = None
        if sum_ is None:
            told.fill_(word == "together")
            sum_ = dist.all_reduce(told, async_op=True)
        time.sleep(BURST / per_second)
    complete = client.finish()
    (notes / f"{name}.ended").write_text(str(complete))
    if word == "alone":
        os._exit(0)  # its process group would wait for those that are gone
    dist.destroy_process_group()


def begin_group(run: client.Run) -> None:
    """The process group of the run's attempt. The one that torch makes by itself asks each launcher for the
    number of restarts: they differ, since a node that joins the others' restart counts none, and its ranks
    find the addresses of dead ones."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(f"{run.id}/{run.attempt}", store),
        rank=run.rank,
        world_size=run.world_size,
        timeout=timedelta(minutes=5),
    )


if __name__ == "__main__":
    main()
