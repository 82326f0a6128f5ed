"""offbeat: a worker's exchange with ``offbeat server``, over the transport that the command line names."""

import os
import sys
import time
from dataclasses import replace

import torch
from work import LR, SIZE, said, timed

import offbeat as ob
from offbeat.log import WORKER
from offbeat.names import read
from offbeat.runtime.entry import enter
from offbeat.runtime.place import Place

torch.set_num_threads(1)
method, port = f"ASGD(lr={LR})", os.environ["MASTER_PORT"]
os.environ["OFFBEAT_TOKEN"] = "bench"
if os.environ["RANK"] == "0":
    flags = ["--port", port, "--transport", said(), "--method", method, "--out", os.environ["OFFBEAT_OUT"], "--status"]
    os.execv(sys.executable, [sys.executable, "-m", "offbeat", "server", *flags, "--every", "1000000"])

place = replace(Place.read(), servers=(f"127.0.0.1:{port}",), worker=0, hosts=0)
worker = enter(place, torch.zeros(SIZE), read(method), {"layout": None}, read, WORKER)
room = worker.room()  # in which a replica's gradients are, if there is any
g = (torch.empty(SIZE) if room is None else room).fill_(1e-3)
end = time.monotonic() + 15  # by then the server has compiled its handler, and measured whether that is faster
while time.monotonic() < end:
    worker.step(g, 0.0)
    time.sleep(0.2)
timed(lambda: worker.step(g, 0.0), 0, ob.__version__, warm=5, count=20)
worker.leave(done=True)
