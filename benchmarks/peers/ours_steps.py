"""offbeat: workers that find each other as under torchrun, where rank 0 hosts the run; methods of each kind, by their own
rules or, as in ``LocalSGD, torch.optim``, by torch's optimizer."""

from work import PERIOD, batches, loss, model, optimizer, said, timed

import offbeat as ob

net = model()
sgd = ob.SGD(0.01, momentum=0.9)
METHODS = {
    "ASGD": ob.methods.ASGD(lr=0.01),
    "DANA-Zero": ob.methods.DanaZero(lr=0.01),
    "AllReduce": ob.methods.AllReduce(sgd),
    "LocalSGD": ob.methods.LocalSGD(ob.Local(sgd), period=PERIOD),
    "SlowMo": ob.methods.SlowMo(ob.Local(sgd), period=PERIOD, beta=0.5),
    "DiLoCo": ob.methods.DiLoCo(ob.Local(sgd), period=PERIOD),
    "D-PSGD": ob.methods.DPSGD(sgd),
    "SGP": ob.methods.SGP(sgd),
    "AD-PSGD": ob.methods.ADPSGD(sgd),
}
name, _, rule = said().partition(", ")
replica = ob.Replica(net, METHODS[name], optimizer=optimizer(net) if rule == "torch.optim" else None)
batch = batches(replica.id)


def step() -> None:
    loss(net, batch()).backward()
    replica.step()


timed(step, replica.id, ob.__version__)
replica.leave()
