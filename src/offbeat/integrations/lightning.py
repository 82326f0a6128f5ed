"""The ``Trainer`` of Lightning.

    trainer = L.Trainer(strategy=OffbeatStrategy(ob.methods.DiLoCo(period=50)), max_epochs=10)
    trainer.fit(model, loader, validation)

`OffbeatStrategy` is to Lightning what ``"ddp"`` is, but that each process keeps its own pace. It is of the package, ``lightning`` or
``pytorch_lightning``, that the script has imported.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from ..core.method import Method
from ..runtime.optimizer import Offered
from ..runtime.place import Place
from ..runtime.replica import Replica
from ..runtime.schedulers import RunScheduler, bring

if TYPE_CHECKING:
    from lightning.pytorch.strategies import SingleDeviceStrategy

    rank_zero_only: Any
else:
    other = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
    # the same package twice, and neither takes the other's classes
    package = "pytorch_lightning" if other else "lightning.pytorch"
    try:
        SingleDeviceStrategy = import_module(f"{package}.strategies").SingleDeviceStrategy
        rank_zero_only = import_module(f"{package}.utilities.rank_zero").rank_zero_only
    except ImportError as error:
        raise ImportError(f"{error}: this strategy needs pip install 'offbeat[lightning]'") from error


class OffbeatStrategy(SingleDeviceStrategy):
    """This process is one worker of a run, on one device; the arguments are those of `Replica`.

    The module's optimizer is `Offered`: it takes the steps where the method lets workers step (DiLoCo, LocalSGD, ...), and else
    gives the method (DANA, ASGD, ...) its learning rate. A module that steps several optimizers by hand, as a GAN does, needs a method
    of the first kind; workers exchange after each ``training_step``. Epochs, ``max_steps``, ``limit_train_batches`` and schedulers count
    the steps of the run, that is, of all workers together; ``trainer.global_step`` and intervals such as ``val_check_interval`` count
    those of this worker. Worker 0 validates, logs and saves, with the parameters that would be shipped (others validate on one
    minibatch, so that metrics are there); where it stops early, the run is over for all. Only it is ``trainer.is_global_zero``.

    ``device`` is the accelerator's, or else the CPU, where it is None.
    """

    strategy_name = "offbeat"

    def __init__(
        self,
        method: Method | None = None,
        *,
        default: Method | None = None,
        place: Place | None = None,
        buffers: Any = "fresh",
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> None:
        if device is None:
            found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            device = "cpu" if found is None else torch.device(found.type, torch.accelerator.current_device_index())
        super().__init__(device, **kwargs)
        place = place or Place.read()
        self._terms = {"method": method, "default": default, "place": place, "buffers": buffers}
        self._looks = contextlib.ExitStack()
        self.replica: Replica | None = None
        """From ``fit`` on."""
        self._rank(place.worker or 0)

    @property
    def is_global_zero(self) -> bool:
        return self.global_rank == 0

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision and self.is_global_zero  # whether to save, or to stop

    def _rank(self, worker: int) -> None:
        self.global_rank = rank_zero_only.rank = worker

    # what the Trainer makes

    def setup_optimizers(self, trainer: Any) -> None:
        super().setup_optimizers(trainer)
        module, optimizers = self.lightning_module, self.optimizers
        assert module is not None
        self.replica = Replica(module, **self._terms, optimizer=Offered(*optimizers))
        self._rank(self.replica.id)
        if not self.is_global_zero:
            trainer.limit_val_batches, trainer.num_sanity_val_steps = min(1, trainer.limit_val_batches), 0
        if len(optimizers) == 1:
            self.optimizers = [self.replica]
        for config in self.lr_scheduler_configs:
            if not config.reduce_on_plateau:
                due = lambda config=config: self._due(config, self._loader.at, trainer.current_epoch + 1)  # noqa: E731
                config.scheduler = RunScheduler(config.scheduler, due)  # type: ignore[assignment]
            elif self.replica.workers > 1:
                raise ValueError(
                    f"{type(config.scheduler).__name__} goes by validation, which worker 0 alone does: take another scheduler"
                )

    def _due(self, config: Any, steps: int, epochs: int) -> int:
        """How many steps a scheduler is to have taken when the run has taken ``steps`` in ``epochs``."""
        return int((steps if config.interval == "step" else epochs) // config.frequency)

    def process_dataloader(self, dataloader: Any) -> Any:
        trainer: Any = self.lightning_module.trainer  # type: ignore[union-attr]
        if not trainer.training or self.replica is None:
            return dataloader
        current, epoch = trainer.fit_loop.epoch_progress.current, self.replica.passes.run_epoch(trainer.max_epochs or 0)
        if current.processed < epoch:
            for name in ("ready", "started", "processed", "completed"):
                setattr(current, name, epoch)
        self._loader = _Loader(self, trainer, dataloader)
        return self._loader

    # steps

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().training_step(*args, **kwargs)
        assert self.replica is not None
        if len(self.optimizers) > 1:
            self.replica.exchange()
        return output

    # what is shipped

    def on_validation_start(self) -> None:
        if self.replica is not None:
            self._looks.enter_context(self.replica.shipped())

    def on_validation_end(self) -> None:
        self._looks.close()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self.replica is None:
            return super().lightning_module_state_dict()
        with self.replica.shipped():
            state = super().lightning_module_state_dict()
            return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}

    # the end

    def on_train_end(self) -> None:
        trainer: Any = self.lightning_module.trainer  # type: ignore[union-attr]
        if self.is_global_zero and trainer.should_stop and self.replica is not None:
            self.replica.stop()

    def on_exception(self, exception: BaseException) -> None:
        if self.replica is not None:
            self.replica.leave(done=False)

    def teardown(self) -> None:
        self._looks.close()
        if self.replica is not None:
            self.replica.leave()
        super().teardown()


class _Loader:
    """In the place of the module's loader: going over it gives this worker's minibatches of an epoch.

    It has no length, so that the Trainer reads one minibatch ahead, and knows which is the last.
    """

    def __init__(self, strategy: OffbeatStrategy, trainer: Any, loader: Any) -> None:
        self.strategy, self.trainer, self.loader = strategy, trainer, loader
        self.epoch = self.first = 0  # the run's steps before this epoch
        self.skip = self.given = 0
        self.walk: Iterator[Any] = iter(())  # over this epoch's minibatches
        self.read: Any = None  # the last of those that it has given

    @property
    def at(self) -> int:
        """The run's steps up to the one that this worker is at, with it."""
        assert self.strategy.replica is not None
        return self.strategy.replica.passes.position

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "done": self.at - self.first}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.skip = state["epoch"], state["done"]

    def __iter__(self) -> Iterator[Any]:
        # a Trainer that begins with a later epoch goes over it twice, and drops what it had read the first time
        again = self.given == 1 and self.epoch == self.trainer.current_epoch
        if not again:
            self.given, self.walk = 0, self._walk()
        yield from [self.read] if again else []
        for minibatch in self.walk:
            self.read, self.given = minibatch, self.given + 1
            yield minibatch

    def _walk(self) -> Iterator[Any]:
        replica, trainer, epoch = self.strategy.replica, self.trainer, self.trainer.current_epoch
        assert replica is not None
        accumulate, length = trainer.accumulate_grad_batches, None
        with contextlib.suppress(TypeError):  # of a stream
            length = math.ceil(len(self.loader) / accumulate)
        skip, self.skip = self.skip if epoch == self.epoch else 0, 0
        if length is not None and skip >= length:
            # saved after the epoch's last minibatch: the Trainer is about to begin the next one
            epoch, skip = epoch + 1, 0
        self.epoch, self.first = epoch, self.at if length is None else epoch * length
        limit, most = trainer.limit_train_batches, trainer.max_steps
        end = math.inf if most < 0 else most
        last = self.first + math.ceil(limit / accumulate) if isinstance(limit, int) else math.inf
        steps = iter(replica.passes.shard(self.loader, epoch, accumulate, skip, ahead=True))
        step, begun = next(steps, None), False
        while step is not None and self.at < min(last, end):
            yield from step
            step = next(steps, None)  # with which the one before is begun
            for config in () if begun else self.strategy.lr_scheduler_configs:  # of a worker that comes late
                if isinstance(config.scheduler, RunScheduler):
                    bring(config.scheduler, self.strategy._due(config, self.at - 1, epoch))
            begun = True
        trainer.should_stop |= self.at >= end or replica.passes.stopped()
