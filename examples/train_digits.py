"""Trains a small network on scikit-learn's handwritten digits, on any number of processes.

    python examples/train_digits.py
    torchrun --standalone --nproc-per-node 4 examples/train_digits.py --epochs 20

Everything that tracks the run says `client.`; the rest is an ordinary DistributedDataParallel training. Needs
no agent to run; `trackagent run -- torchrun ...` puts one beside it.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from trackagent import client

TEST_IMAGES = 360


def main() -> None:
    """Trains on every process of the job."""
    options = parse_arguments()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = choose_device(options.device)
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)

    params = {**vars(options), "device": device.type, "world_size": world_size}
    client.init(experiment="digits", params=params)
    model: nn.Module = network(options.hidden).to(device)
    client.log_params({"weights": sum(weights.numel() for weights in model.parameters())})
    if world_size > 1:
        model = DistributedDataParallel(model)

    train, test = load_data()
    sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(
        train, world_size, rank, seed=options.seed
    )
    loader = DataLoader(train, batch_size=options.batch_size, sampler=sampler)
    images, labels = (tensor[rank::world_size].to(device) for tensor in test.tensors)

    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    steps = options.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=options.lr, total_steps=steps)

    step = 0
    with progress(steps, options.epochs, shown=rank == 0) as report:
        for epoch in range(1, options.epochs + 1):
            sampler.set_epoch(epoch)
            for inputs, wanted in loader:
                targets = wanted.to(device)
                with client.timer("forward"):
                    outputs = model(inputs.to(device))
                    loss = cross_entropy(outputs, targets)
                with client.timer("backward"):
                    optimizer.zero_grad()
                    loss.backward()
                with client.timer("optimizer"):
                    optimizer.step()
                accuracy = (outputs.argmax(1) == targets).float().mean()
                client.log(
                    {
                        "train/loss": loss.item(),
                        "train/accuracy": accuracy.item(),
                        "train/lr": schedule.get_last_lr()[0],
                    },
                    step=step,
                )
                schedule.step()
                step += 1
                report.step(step, loss.item())

            # Every rank tests its share and logs that; the mean across ranks is the agent's work.
            right = (model(images).argmax(1) == labels).sum()
            client.log({"test/accuracy": right.item() / len(labels)}, step=step - 1)
            if world_size > 1:
                dist.all_reduce(right)
            report.epoch(epoch, loss.item(), right.item() / TEST_IMAGES)

    client.finish()
    if world_size > 1:
        dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    """The options of the command line, which become the run's params."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=positive, default=12, help="default: %(default)s")
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=16,
        help="images a rank and step; default: %(default)s",
    )
    parser.add_argument("--lr", type=float, default=0.01, help="peak; default: %(default)s")
    parser.add_argument(
        "--hidden", type=positive, default=64, help="units of a layer; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s"
    )
    return parser.parse_args()


def positive(text: str) -> int:
    """A whole number above zero."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def choose_device(wanted: str) -> torch.device:
    """This process's GPU, or the CPU where there is not one for each process of the node."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= local_size
    if wanted == "cpu" or (wanted == "auto" and not enough):
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def network(hidden: int) -> nn.Module:
    """From (n, 64) pixels to (n, 10) logits."""
    return nn.Sequential(
        nn.Linear(64, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
    )


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """1437 images of 8 x 8 pixels to train on and TEST_IMAGES to test on, the same on every rank."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return (
        TensorDataset(images[TEST_IMAGES:], labels[TEST_IMAGES:]),
        TensorDataset(images[:TEST_IMAGES], labels[:TEST_IMAGES]),
    )


class Report(Protocol):
    """What the person at the terminal sees."""

    def step(self, step: int, loss: float) -> None: ...

    def epoch(self, epoch: int, loss: float, test_accuracy: float) -> None: ...


class Silence:
    """On every rank but the first."""

    def step(self, step: int, loss: float) -> None:
        pass

    def epoch(self, epoch: int, loss: float, test_accuracy: float) -> None:
        pass


class Lines(Silence):
    """Where the output is piped: a line an epoch."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs

    def epoch(self, epoch: int, loss: float, test_accuracy: float) -> None:
        print(
            f"epoch {epoch}/{self._epochs}  loss {loss:.3f}  test accuracy {test_accuracy:.1%}",
            flush=True,
        )


class Bar:
    """In a terminal: a bar that moves with every step."""

    def __init__(self, bar: Progress, steps: int) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=steps, loss=math.nan, accuracy=math.nan)

    def step(self, step: int, loss: float) -> None:
        self._bar.update(self._task, completed=step, loss=loss)

    def epoch(self, epoch: int, loss: float, test_accuracy: float) -> None:
        self._bar.update(self._task, accuracy=100 * test_accuracy)


@contextmanager
def progress(steps: int, epochs: int, *, shown: bool) -> Iterator[Report]:
    """Says how far the training is, for as long as the block runs."""
    console = Console()
    if not shown:
        yield Silence()
    elif not console.is_terminal:
        yield Lines(epochs)
    else:
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("loss {task.fields[loss]:.3f}  test accuracy {task.fields[accuracy]:.1f} %"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        )
        with Progress(*columns, console=console, expand=True) as bar:
            yield Bar(bar, steps)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        client.finish("killed", "interrupted")
        sys.exit(130)
