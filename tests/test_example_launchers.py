"""The examples under each launcher: `offbeat launch`, torchrun, SLURM's variables, Fabric and accelerate."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from crew import Nursery, Processes, until
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import offbeat as ob
from offbeat.runtime.place import Hosted
from offbeat.tasks.language import SHAKESPEARE

ROOT = Path(__file__).parent.parent
PORT = 10_000 + os.getpid() % 4_500 * 2
"""What torchrun's processes meet at; offbeat takes the one after it."""

needs_mnist = pytest.mark.skipif(not ob.tasks.Mnist.data().present, reason="MNIST's files were not found")
needs_shakespeare = pytest.mark.skipif(
    not ob.tasks.TinyShakespeare.data().present, reason=f"{SHAKESPEARE.title} was not found"
)


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """One that has imported what the examples do."""
    wanted = (
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "sklearn.datasets",
        "lightning_fabric",
        "accelerate",
    )
    there = [name for name in wanted if importlib.util.find_spec(name.partition(".")[0])]
    nursery = Nursery(tmp_path_factory.mktemp("nursery"), *there)
    yield nursery
    nursery.close()


Start = Callable[..., "subprocess.Popen[str]"]
End = Callable[["subprocess.Popen[str]"], str]
Launched = Callable[..., list[str]]


@pytest.fixture
def start(processes: Processes) -> Start:
    """Starts Python on what it is given."""
    data = os.environ.get("OFFBEAT_DATA", "")

    def start(*command: str, **variables: str) -> subprocess.Popen[str]:
        here = {"OFFBEAT_DATA": data, "OFFBEAT_OUT": str(processes.folder), "OMP_NUM_THREADS": "1"}
        words = [str(ROOT / word) if word.startswith("examples/") else word for word in command]
        return processes.start(*words, **here, **variables)

    return start


@pytest.fixture
def end(processes: Processes) -> End:
    """What a process says until it ends, well."""

    def end(process: subprocess.Popen[str]) -> str:
        assert processes.ends(process) == 0, processes.said(process)
        return processes.said(process)

    return end


@pytest.fixture
def launch(start: Start, end: End, tmp_path: Path) -> Launched:
    """What two workers under `offbeat launch` have said."""

    def launch(*script: str) -> list[str]:
        end(start("-m", "offbeat", "launch", "--workers", "2", "--restarts", "0", "--out", str(tmp_path), *script))
        return [(tmp_path / "logs" / f"worker-{i}.log").read_text() for i in range(2)]

    return launch


def torchrun(start: Start, *script: str) -> subprocess.Popen[str]:
    return start("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(PORT), *script)


def numbers(text: str, what: str) -> list[float]:
    return [float(found) for found in re.findall(rf"{what} ([\d.]+)", text)]


@needs_shakespeare
def test_characters_under_diloco(launch: Launched, tmp_path: Path) -> None:
    """Five blocks of ten steps each: the loss falls, and after the last average both have the same model."""
    few = ("--examples", "3200", "--period", "10", "--warmup", "10")
    texts = launch("examples/chars.py", *few)
    first, last = numbers(texts[0], "loss")
    assert last < first - 1
    assert numbers(texts[1], "loss") == [first, last]
    trace = ob.Trace.read(tmp_path / "trace.jsonl")
    assert [int((trace.column("worker") == i).sum()) for i in range(2)] == [50, 50]
    assert torch.load(tmp_path / "model.pt", weights_only=True)["token.weight"].shape == (65, 64)


@needs_mnist
@pytest.mark.parametrize("inside", [(), ("--shard",)], ids=["DDP", "FSDP2"])
def test_workers_of_two_ranks(inside: tuple[str, ...], launch: Launched, tmp_path: Path) -> None:
    """Each worker's two ranks keep one model, whether each has it whole or its half; both workers learn."""
    options = ("--ranks", "2", "examples/groups.py", "--examples", "6400", *inside)
    for i, text in enumerate(launch(*options)):
        first, second = (numbers(text, f"rank {rank} of worker {i}: accuracy") for rank in range(2))
        assert first == second
        assert first[0] > 80
    traces = [ob.Trace.read(tmp_path / f"shard-{rank}" / "trace.jsonl") for rank in range(2)]
    assert [len(trace) for trace in traces] == [100, 100], "each minibatch was used once, half of it by each rank"


def learned(texts: list[str], out: Path) -> None:
    """Two workers have shared five passes over the digits, and both know most of them."""
    for i, text in enumerate(texts):
        ours = numbers(text, f"worker {i}, epoch 4: accuracy")
        assert len(ours) == 1, text
        assert ours[0] > 80
    trace = ob.Trace.read(out / "trace.jsonl")
    assert len(trace) == 5 * 70
    assert {event.worker for event in trace} == {0, 1}


@pytest.mark.parametrize("method", ["sgp", "ad-psgd", "slowmo"])
def test_gossip_under_torchrun(method: str, start: Start, end: End, tmp_path: Path) -> None:
    text = end(torchrun(start, "examples/gossip.py", "--method", method, "--epochs", "5"))
    learned([text, text], tmp_path)


def test_gossip_under_offbeat_launch(launch: Launched, tmp_path: Path) -> None:
    texts = launch("examples/gossip.py", "--method", "slowmo", "--epochs", "5")
    learned(texts, tmp_path)
    assert numbers(texts[0], "accuracy") == numbers(texts[1], "accuracy"), "two who meet in each round stay equal"


def test_gossip_with_the_variables_of_srun(start: Start, end: End, tmp_path: Path) -> None:
    job = {"SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid())}
    script = ("examples/gossip.py", "--method", "ad-psgd", "--epochs", "5")
    tasks = [start(*script, **job, SLURM_PROCID=str(i)) for i in range(2)]
    learned([end(task) for task in tasks], tmp_path)


@needs_mnist
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("fabric", marks=needs("lightning_fabric")),
        pytest.param("accelerate", marks=needs("accelerate")),
    ],
)
def test_a_library_for_each_worker(name: str, launch: Launched, tmp_path: Path) -> None:
    few = ("--examples", "3200", "--epochs", "2")
    for text in launch(f"examples/{name}_mnist.py", *few):
        first, last = numbers(text, "accuracy")
        assert last > first
        assert last > 70
    model = torch.load(tmp_path / "model.pt", weights_only=True)
    assert model["conv1.weight"].shape == (16, 1, 5, 5)
    assert len(ob.Trace.read(tmp_path / "trace.jsonl")) == 100


@needs_mnist
@needs("lightning_fabric")
def test_a_fabric_of_one_device_under_torchrun(start: Start, end: End, tmp_path: Path) -> None:
    text = end(torchrun(start, "examples/fabric_mnist.py", "--examples", "1280", "--epochs", "1"))
    assert len(numbers(text, "accuracy")) == 2
    assert len(ob.Trace.read(tmp_path / "trace.jsonl")) == 20


ACCELERATE = """
import os
import torch
from accelerate import Accelerator
import offbeat as ob
from offbeat.runtime.place import Place

place = Place.read()
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
    os.environ.pop(name, None)
accelerator = Accelerator(cpu=True)
model = accelerator.prepare(torch.nn.Linear(3, 2))
replica = ob.Replica(model, ob.methods.SGP(), place=place)
for _ in range(5):
    accelerator.backward(model(torch.ones(4, 3)).square().mean())
    replica.step()
print(f"worker {replica.id} of {accelerator.num_processes}\\n", end="", flush=True)
"""


@needs("accelerate")
def test_accelerate_under_torchrun(start: Start, end: End, tmp_path: Path) -> None:
    """As docs/recipes/fabric.md has it."""
    script = tmp_path / "train.py"
    script.write_text(ACCELERATE)
    text = end(torchrun(start, str(script)))
    assert sorted(re.findall(r"worker \d of \d", text)) == ["worker 0 of 1", "worker 1 of 1"]
    assert len(ob.Trace.read(tmp_path / "trace.jsonl")) == 10


def test_a_module_that_keeps_workers_in_lockstep_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="if each is to be one, give and train the module inside"):
            ob.Replica(DistributedDataParallel(nn.Linear(2, 2)), ob.methods.SGP())
    finally:
        dist.destroy_process_group()


HOST = """
import json, pathlib, sys, time
for k in range(600):
    print(json.dumps({"workers": [1] if k < 40 else []}), flush=True)
    if k == 40:
        pathlib.Path(sys.argv[1]).touch()
    time.sleep(0.1)
"""


def test_who_hosts_a_job_stays_while_others_train(tmp_path: Path) -> None:
    """Though its own loop has ended long ago; where nobody comes back, it ends the run."""
    alone = tmp_path / "alone"
    process = subprocess.Popen([sys.executable, "-c", HOST, str(alone)], stdout=subprocess.PIPE)
    hosted = Hosted(process, patience=2.0)
    began = hosted.seen
    until(lambda: hosted.seen > began, "its first word")
    hosted.wait()
    assert alone.exists()
    assert process.wait(120) == -signal.SIGTERM
