"""Fits a line to points of which each rank has its own, under torchrun on any number of machines.

Everything that tracks the run says `client.`; README.md beside it has the commands.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trackagent import client

POINTS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend)
    rank = dist.get_rank()
    client.init(experiment="line", params=vars(options))

    torch.manual_seed(rank)
    x = torch.rand(POINTS, 1)
    y = 3 * x + 1 + 0.1 * torch.randn(POINTS, 1)
    model = DistributedDataParallel(nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(options.steps):
        with client.timer("step"):
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        client.log({"loss": loss.detach()}, step=step, weight=POINTS)

    client.finish()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
