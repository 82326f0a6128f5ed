"""offbeat: local steps by the user's optimizer, and a method without a server; run by ``offbeat launch``."""

from work import batches, loss, model, optimizer, said, timed

import offbeat as ob

METHODS = {
    "LocalSGD": lambda: ob.methods.LocalSGD(period=8),
    "SlowMo": lambda: ob.methods.SlowMo(period=8, beta=0.5),
    "DiLoCo": lambda: ob.methods.DiLoCo(period=8),
    "AllReduce": lambda: ob.methods.AllReduce(),
    "D-PSGD": lambda: ob.methods.DPSGD(),
    "SGP": lambda: ob.methods.SGP(),
    "AD-PSGD": lambda: ob.methods.ADPSGD(),
    "GoSGD": lambda: ob.methods.GoSGD(),
}

net = model()
replica = ob.Replica(net, METHODS[said()[0]](), optimizer=optimizer(net))
batch = batches(replica.id)


def step() -> None:
    loss(net, batch()).backward()
    replica.step()


timed(step, replica.id, ob.__version__)
replica.leave()
