"""EXO gym: DiLoCo among processes that its trainer starts. The loop is the trainer's, so the model counts the steps."""

import importlib.metadata
import os

import exogym.trainer
import torch
import torch.distributed as dist
from exogym import Trainer
from exogym.strategy import DiLoCoStrategy, OptimSpec
from torch import nn
from torch.utils.data import TensorDataset
from work import PERIOD, STEPS, Watch, loss, model

# Its own way to make the process group names the network card of a Mac.
exogym.trainer.init_process_group_portsafe = lambda kind, **place: dist.init_process_group(kind, **place)


class Net(nn.Module):
    """Gives the loss, as its trainer asks for; a step has ended when the next begins."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.watch = model(), None

    def forward(self, batch):
        if self.watch is None:
            torch.set_num_threads(1)
            self.watch = Watch(dist.get_rank(), importlib.metadata.version("exogym"), count=STEPS // 2)
        else:
            self.watch.tick()
        return loss(self.net, batch)


if __name__ == "__main__":
    os.chdir(os.environ["BENCH_OUT"])  # its logs go there
    data = TensorDataset(torch.rand(1024, 64), torch.randint(10, (1024,)))
    strategy = DiLoCoStrategy(OptimSpec(torch.optim.SGD, lr=0.01, momentum=0.9), H=PERIOD)
    rounds = Watch(0, "", count=STEPS // 2).rounds
    Trainer(Net(), data, data, device="cpu", start_port=int(os.environ["MASTER_PORT"])).fit(
        1, strategy, 2, max_steps=rounds + 1, batch_size=32, minibatch_size=32, val_size=0, disable_logging=True
    )
