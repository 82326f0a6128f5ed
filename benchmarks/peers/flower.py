"""Flower's simulation: rounds of FedAvg, in which each of two clients takes the local steps between two averages.

A client's optimizer is new in each round, as Flower's clients keep nothing; the server passes arrays of one vector.
"""

import importlib.metadata

import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import Message
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from work import PERIOD, Watch, batches, flat, loss, model, optimizer

ROUNDS = 10
"""In each repeat: it is slow."""
server, client = ServerApp(), ClientApp()


@client.train()
def train(message, context):
    net, batch = model(), batches(int(context.node_config["partition-id"]))
    x, g = flat(net)
    x.copy_(message.content["arrays"].to_torch_state_dict()["x"])
    mine = optimizer(net)
    for _ in range(PERIOD):
        g.zero_()
        loss(net, batch()).backward()
        mine.step()
    metrics = MetricRecord({"num-examples": 32 * PERIOD})
    return Message(RecordDict({"arrays": ArrayRecord({"x": x}), "metrics": metrics}), reply_to=message)


@server.main()
def main(grid, context):
    watch = Watch(0, importlib.metadata.version("flwr"), warm=5, count=ROUNDS, steps=PERIOD)

    def tick(number, arrays):
        if number:
            watch.tick()

    x, _ = flat(model())
    FedAvg(fraction_evaluate=0.0).start(grid, ArrayRecord({"x": x}), num_rounds=watch.rounds, evaluate_fn=tick)


if __name__ == "__main__":
    torch.set_num_threads(1)
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0}, "init_args": {"num_cpus": 2}}
    run_simulation(server, client, num_supernodes=2, backend_config=resources)
