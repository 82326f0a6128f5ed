"""Four real worker processes, one of them four times slower: DANA-Zero beside DistributedDataParallel.

Both train the same net from the same weights on the same minibatches, as many gradients in all. The workers share this
machine's few cores, so a gradient is made to last at least ``--seconds`` by sleeping, and four times as long at worker
0. MNIST where its files are found, else scikit-learn's digits.

    python examples/demo.py --out runs/demo
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import offbeat as ob
from offbeat.experiment import Cell, Comparison, Key
from offbeat.names import read
from offbeat.report import page
from offbeat.trace import Evaluation

WORKERS, SLOW = 4, 4.0
LR, MOMENTUM = 0.02, 0.9
OURS, THEIRS = "dana-zero", "DistributedDataParallel"


def asynchronous(name: str, gradients: int, seconds: float, slow: float, out: Path, seed: int = 0) -> ob.Trace:
    """`offbeat launch`, as a user would type it."""
    command = [sys.executable, "-m", "offbeat", "launch", "--task", name, "--method", OURS, "--lr", str(LR)]
    command += [
        "--momentum",
        str(MOMENTUM),
        "--warmup",
        "0.05",
        "--workers",
        str(WORKERS),
        "--gradients",
        str(gradients),
    ]
    command += [
        "--seed",
        str(seed),
        "--speed",
        f"Fixed({seconds})",
        "--faults",
        f"Straggler(0, {slow})",
        "--out",
        str(out),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return ob.Trace.read(out / "trace.jsonl")


def synchronous(task: ob.Problem, gradients: int, seconds: float, slow: float, out: Path) -> ob.Trace:
    """The same under DistributedDataParallel, one process for each worker."""
    out.mkdir(parents=True, exist_ok=True)
    store = out / "store"
    store.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--rank-of", repr(task), "--gradients", str(gradients)]
    command += ["--seconds", str(seconds), "--slow", str(slow), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*command, "--rank", str(i)], env=environment) for i in range(WORKERS)]
    try:
        for rank in ranks:
            if rank.wait(timeout=900):
                raise RuntimeError(f"a process of DistributedDataParallel ended with status {rank.returncode}")
    finally:
        for rank in ranks:
            rank.kill()
    trace = ob.Trace({"engine": THEIRS, "method": THEIRS, "problem": repr(task), "seed": 0, "gradients": gradients})
    told = [json.loads((out / f"rank-{i}.json").read_text()) for i in range(WORKERS)]
    for step, moments in enumerate(zip(*told, strict=True)):
        for i, (now, loss) in enumerate(moments):
            trace.add(ob.Event(now, i, step, 0, 0.0, 0.0, loss))
    for now, done, x in torch.load(out / "points.pt", weights_only=True):
        trace.note(Evaluation(now, done, task.evaluate(x)))
    return trace


def rank(task: ob.Problem, me: int, gradients: int, seconds: float, slow: float, out: Path) -> None:
    """One process of DistributedDataParallel. The sleep comes before the backward pass, which waits for the others and
    takes about twice as long as the forward pass."""
    dist.init_process_group("gloo", init_method=f"file://{(out / 'store').resolve()}", rank=me, world_size=WORKERS)
    problem = task.problem  # type: ignore[attr-defined]
    module = problem.model()
    vector_to_parameters(problem.x0(), module.parameters())
    net = DistributedDataParallel(module)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM, nesterov=True)
    steps = gradients // WORKERS
    rise = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, (k + 1) / max(1, round(0.05 * steps))))
    seconds *= slow if me == 0 else 1.0
    moments, points = [], []
    dist.barrier()
    began = time.monotonic()
    for step in range(steps):
        start = time.monotonic()
        inputs, targets = problem.minibatch(me, step)
        optimizer.zero_grad()
        loss = problem.loss(net(inputs), targets)
        time.sleep(max(0.0, seconds - 3 * (time.monotonic() - start)))
        loss.backward()
        optimizer.step()
        rise.step()
        moments.append((time.monotonic() - began, float(loss.detach())))
        if me == 0 and ((step + 1) % max(1, steps // 20) == 0 or step + 1 == steps):
            points.append(
                (moments[-1][0], WORKERS * (step + 1), parameters_to_vector(module.parameters()).detach().clone())
            )
    (out / f"rank-{me}.json").write_text(json.dumps(moments))
    if me == 0:
        torch.save(points, out / "points.pt")
    dist.barrier()
    dist.destroy_process_group()


def cell(label: str, trace: ob.Trace) -> Cell:
    """A run as a row of a comparison."""
    run = ob.Run(torch.zeros(1), trace, trace[-1].seconds, trace.evaluations[-1].figures)
    return Cell(Key(label, WORKERS, 0), run.summary(), "", "", trace)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--task", choices=["digits", "mnist"], help="default: mnist where its files are found")
    parser.add_argument("--gradients", type=int, default=2000, help="of each run, all workers together")
    parser.add_argument("--seconds", type=float, help="what a gradient takes at least")
    parser.add_argument("--slow", type=float, default=SLOW, help="how many times slower worker 0 is")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        rank(read(args.rank_of), args.rank, args.gradients, args.seconds, args.slow, args.out)
        return
    found = ob.tasks.Mnist.data().present
    name = args.task or ("mnist" if found else "digits")
    task = ob.tasks.TASKS[name]()
    seconds = args.seconds or (0.05 if name == "mnist" else 0.02)
    gradients = args.gradients // WORKERS * WORKERS
    print(
        f"{name}, {gradients:,} gradients, {WORKERS} processes, one {args.slow:g} times slower: {OURS}, then {THEIRS}"
    )
    cells = [
        cell(OURS, asynchronous(name, gradients, seconds, args.slow, args.out / OURS)),
        cell(THEIRS, synchronous(task, gradients, seconds, args.slow, args.out / THEIRS)),
    ]
    header = {
        "engine": "runtime",
        "task": repr(task),
        "methods": {OURS: repr(ob.methods.DanaZero(LR, momentum=MOMENTUM)), THEIRS: f"SGD({LR}, {MOMENTUM}, nesterov)"},
        "workers": [WORKERS],
        "seeds": [0],
        "gradients": gradients,
        "warmup": 0.05,
        "speed": f"at least {seconds:g} s, {args.slow:g} times as long at worker 0",
        "network": "this machine",
        "faults": "()",
        "alone": {"0": 1 / seconds},
        "parameters": task.x0().numel(),
        "provenance": dict(task.provenance),  # type: ignore[attr-defined]
        "versions": cells[0].trace.header["versions"],
    }
    comparison = Comparison({**header, "command": " ".join(["python", *sys.argv])}, cells)
    comparison.write(args.out)
    table = Table(title=f"{name}, {gradients:,} gradients, {WORKERS} processes, one {args.slow:g} times slower")
    for column in ("", "accuracy", "gradients per second", "seconds", "gradients of each worker"):
        table.add_column(column, justify="right" if column else "left")
    for c in cells:
        taken = [int((c.trace.column("worker") == i).sum()) for i in range(WORKERS)]
        f = c.figures
        row = (
            f"{f['accuracy']:.1%}",
            f"{f['gradients_per_second']:.1f}",
            f"{f['seconds']:.1f}",
            " ".join(map(str, taken)),
        )
        table.add_row(c.key.label, *row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    rates = [c.figures["gradients_per_second"] for c in cells]
    print(
        f"{OURS} takes {rates[0] / rates[1]:.1f} times as many gradients per second. page: {page(comparison, args.out)}"
    )


if __name__ == "__main__":
    main()
