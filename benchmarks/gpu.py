"""ResNet-20 on CIFAR-10 with 32 workers simulated on a GPU, and the server's kernels beside a plain copy.

``python -m benchmarks.gpu --whole`` trains 160 epochs on the real images and prints the accuracy. The benchmark itself takes
a few hundred gradients on random images of that size, of which the speed does not depend. Without a GPU it says so.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

import offbeat as ob
from offbeat.core.tree import leaves, rebuild
from offbeat.engines.kernel import Visits
from offbeat.tasks import Supervised
from offbeat.tasks.cifar import crop_and_flip
from offbeat.tasks.resnet import resnet20

from .measure import Row, over, seconds

WORKERS, GRADIENTS, REPEATS, SIZE = 32, 400, 5, 25_000_000
IMAGES, EPOCHS = 50_000, 160


def run() -> list[Row]:
    if not torch.cuda.is_available():
        return [Row("ResNet-20 on CIFAR-10, 32 workers", "images/s", (math.nan,), note="no GPU was found")]
    torch.backends.cudnn.benchmark = True
    return training(problem("cuda"), WORKERS, GRADIENTS, REPEATS) + kernels("cuda", SIZE, REPEATS)


def problem(device: str, images: int = IMAGES, batch: int = 128) -> Supervised:
    """ResNet-20 on random images in the place of CIFAR-10's."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 3, 32, 32), generator=draw, dtype=torch.uint8)
    data = pixels, torch.randint(10, (images,), generator=draw)
    test = data[0][:1000], data[1][:1000]
    return Supervised(partial(net, device), F.cross_entropy, data, test, batch=batch, augment=crop_and_flip)


def net(device: str) -> nn.Module:
    return resnet20(10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)).to(device)


def plain(problem: Supervised, gradients: int) -> None:
    """The loop that anybody would write, with all data on the device."""
    module = problem.model()
    device = next(module.parameters()).device
    inputs, targets = (part.to(device) for part in problem.train)
    draw = torch.Generator(device)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    for _ in range(gradients):
        chosen = torch.randint(len(targets), (problem.batch,), device=device)
        optimizer.zero_grad()
        problem.loss(module(crop_and_flip(inputs[chosen], draw)), targets[chosen]).backward()
        optimizer.step()
    settle(device)


def simulated(problem: Supervised, workers: int, gradients: int) -> None:
    method, cluster = ob.methods.DanaZero(lr=0.1 / workers), ob.Cluster(workers)
    run = ob.simulate(method, problem, cluster, gradients=gradients, lanes="auto")
    settle(run.x.device)


def training(problem: Supervised, workers: int, gradients: int, repeats: int) -> list[Row]:
    """Images per second, simulated and in a plain loop, in turn."""
    acts = partial(simulated, problem, workers, gradients), partial(plain, problem, gradients)
    for act in acts:
        act()  # which does not count
    images = gradients * problem.batch
    ours, theirs = zip(*([images / seconds(act) for act in acts] for _ in range(repeats)), strict=True)
    group = "ResNet-20, batches of 128, cropped and mirrored"
    rows = [
        Row(f"{workers} workers simulated", "images/s", ours, group),
        Row("plain PyTorch loop", "images/s", theirs, group, peer=True),
    ]
    hours = tuple(EPOCHS * IMAGES / rate / 3600 for rate in ours)
    return [
        *rows,
        over(*rows, "simulated / plain loop", group, aim=1.0),
        Row(f"{EPOCHS} epochs, {workers} workers, by this rate", "h", hours, group),
    ]


def kernels(device: str, size: int, repeats: int) -> list[Row]:
    """Bytes that each server method's kernel reads and writes in a second, over those of a copy, in turn."""
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    rows = []
    for cls in ob.methods.all_methods():
        if not issubclass(cls, ob.ServerMethod):
            continue
        group = f"serve / copy, {size:,} float32"
        try:
            kernel = Visits(cls(), source).serve
            kernel.warm(size, repeats=1)
        except Exception as error:  # compilers raise nearly anything
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            rows.append(Row(cls.__name__, "x", (math.nan,), group, reason[:100]))
            continue
        args = rebuild(kernel.args, [torch.ones_like(source) if t.dim() else t for t in leaves(kernel.args)])
        moved = kernel.reads + sum(t.dim() for t in kernel.new)
        if not moved:
            rows.append(Row(cls.__name__, "x", (math.nan,), group, "it moves nothing"))
            continue

        def visit(kernel=kernel, args=args) -> None:
            kernel.fused(*args)
            settle(source.device)

        def copy() -> None:
            target.copy_(source)
            settle(source.device)

        shares = tuple(moved / 2 * seconds(copy) / seconds(visit) for _ in range(repeats))
        rows.append(Row(cls.__name__, "x", shares, group, aim=1.0))
    return rows


def settle(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def whole() -> None:
    """160 epochs of the real images."""
    task = ob.tasks.Cifar10().build()
    task = replace(task, model=partial(moved, task.model))
    gradients = EPOCHS * (IMAGES // task.batch)
    method = ob.methods.DanaZero(lr=ob.Warmup(5 * IMAGES // task.batch) * (0.1 / WORKERS), weight_decay=1e-4)
    start = time.perf_counter()
    run = ob.simulate(method, task, ob.Cluster(WORKERS), gradients=gradients, lanes="auto")
    took = time.perf_counter() - start
    print(f"{torch.cuda.get_device_name()}: {took / 3600:.2f} h, {gradients * task.batch / took:,.0f} images/s")
    print(run.summary())


def moved(build) -> nn.Module:
    return build().to("cuda")


if __name__ == "__main__":
    if sys.argv[1:] != ["--whole"]:
        raise SystemExit(
            "python -m benchmarks.gpu --whole trains 160 epochs; python -m benchmarks gpu is the benchmark"
        )
    if not torch.cuda.is_available():
        print("no GPU was found: 160 epochs would take days")
    else:
        whole()
