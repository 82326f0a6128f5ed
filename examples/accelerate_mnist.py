"""MNIST with accelerate: it looks after the device, precision and accumulation of each worker, offbeat after the workers.

    offbeat launch --workers 2 examples/accelerate_mnist.py

Not `accelerate launch`, nor torchrun: an Accelerator that finds their variables makes workers of its own, in lockstep.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from data import mnist
from mnist_plain import Net, accuracy
from torch.nn import functional as F
from torch.utils.data import DataLoader

import offbeat as ob


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--examples", type=int, default=60_000, help="how many of the training set")
    parser.add_argument("--lr", type=float, default=0.02)
    args = parser.parse_args()

    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    train, test = mnist(args.examples)
    loader = DataLoader(train, batch_size=32, shuffle=True, drop_last=True)  # `shard` deals its minibatches out
    model, tests = accelerator.prepare(Net(), DataLoader(test, batch_size=1000))
    replica = ob.Replica(model, ob.methods.DanaZero(args.lr, momentum=0.9))
    for epoch in range(args.epochs):
        for batch in replica.shard(loader):
            with accelerator.accumulate(model):
                x, y = send_to_device(batch, accelerator.device)
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:  # after every second minibatch
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    replica.step(loss)
        print(f"epoch {epoch}: accuracy {accuracy(model, tests):.2%}", flush=True)


if __name__ == "__main__":
    main()
