"""Trains a small network on data that it makes up, on any number of nodes. What tracks it says `client.`."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from trackagent import client

STEPS = int(os.environ.get("STEPS", "1000"))

local_rank = int(os.environ["LOCAL_RANK"])
cuda = torch.cuda.is_available()
device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
dist.init_process_group("nccl" if cuda else "gloo")
torch.manual_seed(dist.get_rank())

client.init(experiment="kubernetes", params={"steps": STEPS, "world_size": dist.get_world_size()})
model = DistributedDataParallel(
    nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 1)).to(device)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(STEPS):
    inputs = torch.randn(256, 64, device=device)
    loss = mse_loss(model(inputs), inputs.sum(1, keepdim=True))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    client.log({"train/loss": loss.detach()}, step=step)
client.finish()
dist.destroy_process_group()
