"""offbeat: workers that find each other as under torchrun, where rank 0 hosts the run; methods of each kind."""

from work import batches, loss, model, optimizer, said, timed

import offbeat as ob

net = model()
REPLICAS = {
    "ASGD": lambda: ob.Replica(net, ob.methods.ASGD(lr=0.01)),
    "DANA-Zero": lambda: ob.Replica(net, ob.methods.DanaZero(lr=0.01)),
    "AllReduce": lambda: ob.Replica(net, ob.methods.AllReduce(), optimizer=optimizer(net)),
    "LocalSGD": lambda: ob.Replica(net, ob.methods.LocalSGD(period=8), optimizer=optimizer(net)),
    "SlowMo": lambda: ob.Replica(net, ob.methods.SlowMo(period=8, beta=0.5), optimizer=optimizer(net)),
    "DiLoCo": lambda: ob.Replica(net, ob.methods.DiLoCo(period=8), optimizer=optimizer(net)),
    "D-PSGD": lambda: ob.Replica(net, ob.methods.DPSGD(), optimizer=optimizer(net)),
    "SGP": lambda: ob.Replica(net, ob.methods.SGP(), optimizer=optimizer(net)),
    "AD-PSGD": lambda: ob.Replica(net, ob.methods.ADPSGD(), optimizer=optimizer(net)),
}
replica = REPLICAS[said()]()
batch = batches(replica.id)


def step() -> None:
    loss(net, batch()).backward()
    replica.step()


timed(step, replica.id, ob.__version__)
replica.leave()
