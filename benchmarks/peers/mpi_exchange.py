"""MPI: messages, or a window of memory that both ranks map, where the server changes x itself.

Either the worker copies its gradient into the window and x out of it, or both are there and nowhere else.
"""

import numpy as np
import torch
from mpi4py import MPI
from work import LR, SIZE, Watch, said

torch.set_num_threads(1)
world = MPI.COMM_WORLD
worker = world.rank == 0
mine, g = torch.zeros(SIZE), torch.full((SIZE,), 1e-3)
token = np.zeros(1, np.int8)
if said() != "messages":
    copies = said() == "window"
    window = MPI.Win.Allocate_shared(8 * SIZE if worker else 0, 4, comm=world)
    whole = torch.from_numpy(np.frombuffer(window.Shared_query(0)[0], np.float32))
    there, x = whole[:SIZE], whole[SIZE:]
    if worker:
        x.zero_()
        there.copy_(g)

    def exchange() -> None:
        if worker:
            if copies:
                there.copy_(g)
            world.Send(token, 1)
            world.Recv(token, 1)
            if copies:
                mine.copy_(x)
        else:
            world.Recv(token, 0)
            x.sub_(there, alpha=LR)
            world.Send(token, 0)

else:

    def exchange() -> None:
        if worker:
            world.Send(g.numpy(), 1)
            world.Recv(mine.numpy(), 1)
        else:
            world.Recv(g.numpy(), 0)
            mine.sub_(g, alpha=LR)
            world.Send(mine.numpy(), 0)


world.Barrier()
version = MPI.Get_library_version().partition(",")[0]
watch = Watch(0, version, warm=5, count=20)
for _ in range(watch.rounds):
    exchange()
    if worker:
        watch.tick()
