"""One of four real workers four times slower: gradients per second and accuracy beside DistributedDataParallel.

The same net, weights, minibatches and number of gradients, three seeds; `examples/demo.py` holds both sides. A gradient is
made to last at least 20 ms by sleeping, as four workers share this machine's few cores.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from types import ModuleType

import offbeat as ob

from .measure import Row

SEEDS = (0, 1, 2)
GRADIENTS, SECONDS, SLOW = 1200, 0.02, 4.0


def run() -> list[Row]:
    demo, pairs = _demo(), []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as name:
            folder, task = Path(name), ob.tasks.Digits(seed=seed)
            ours = demo.asynchronous("digits", GRADIENTS, SECONDS, SLOW, folder / "ours", seed)
            theirs = demo.synchronous(task, GRADIENTS, SECONDS, SLOW, folder / "theirs")
            pairs.append((ours, theirs))
    rates = [tuple(len(t) / t[-1].seconds for t in side) for side in zip(*pairs, strict=True)]
    right = [tuple(t.evaluations[-1].figures["accuracy"] for t in side) for side in zip(*pairs, strict=True)]
    ratio = tuple(a / b for a, b in zip(*rates, strict=True))
    points = tuple(100 * (a - b) for a, b in zip(*right, strict=True))
    return [
        Row("DANA-Zero", "gradients/s", rates[0], "gradients per second"),
        Row("DistributedDataParallel", "gradients/s", rates[1], "gradients per second", peer=True),
        Row("DANA-Zero / DistributedDataParallel", "x", ratio, "gradients per second", aim=2.5),
        Row("DANA-Zero", "%", tuple(100 * a for a in right[0]), "accuracy"),
        Row("DistributedDataParallel", "%", tuple(100 * b for b in right[1]), "accuracy", peer=True),
        Row("DANA-Zero - DistributedDataParallel", "points", points, "accuracy", aim=-0.5),
    ]


def _demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", Path(__file__).parent.parent / "examples" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    return demo
