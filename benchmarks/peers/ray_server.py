"""Ray: a server actor and two worker actors; the driver hands each gradient on as soon as it is there."""

import ray
import torch
from work import STEPS, Server, Watch, batches, flat, loss, model

WORKERS = 2


@ray.remote(num_cpus=0)
class ServerActor(Server):
    def __init__(self) -> None:
        torch.set_num_threads(1)
        super().__init__()

    def exchange(self, g):
        return super().exchange(torch.from_numpy(g.copy())).numpy()

    def start(self):
        return self.x.numpy()


@ray.remote(num_cpus=0)
class WorkerActor:
    def __init__(self, rank: int) -> None:
        self.net, self.batch = model(), batches(rank)
        self.x, self.g = flat(self.net)

    def gradient(self, x):
        self.x.copy_(torch.from_numpy(x.copy()))  # what Ray gives may not be written to, of which torch would warn
        self.g.zero_()
        loss(self.net, self.batch()).backward()
        return self.g.numpy()


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
server = ServerActor.remote()
x = server.start.remote()
under_way = {}
for rank in range(WORKERS):
    worker = WorkerActor.remote(rank)
    under_way[worker.gradient.remote(x)] = worker
watch = Watch(0, ray.__version__, count=STEPS // 2)
for _ in range(watch.rounds):
    for _ in range(WORKERS):  # about a step of each
        (g,), _ = ray.wait(list(under_way))
        worker = under_way.pop(g)
        under_way[worker.gradient.remote(server.exchange.remote(g))] = worker
    watch.tick()
ray.shutdown()
