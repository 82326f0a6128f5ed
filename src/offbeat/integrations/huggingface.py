"""The ``Trainer`` of Hugging Face's transformers.

    trainer = distribute(Trainer(model=model, args=args, train_dataset=train, eval_dataset=valid), ob.methods.DiLoCo(period=50))
    trainer.train()

`distribute` takes a trainer that is made already, of any subclass, so that a script changes in one place. (A callback could
neither deal out minibatches nor take a step, and an optimizer could not begin at the run's epoch.) As ``fully_shard`` does
with a module, it puts a class before the trainer's own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from itertools import islice
from typing import Any, TypeVar

from ..core.method import Method
from ..runtime.optimizer import Offered
from ..runtime.place import Place
from ..runtime.replica import Replica
from ..runtime.schedulers import RunScheduler, bring

try:
    import transformers
    from transformers.trainer_callback import DefaultFlowCallback
    from transformers.trainer_utils import has_length
except ImportError as error:
    raise ImportError(f"{error}: the integration of Trainer needs pip install 'offbeat[hf]'") from error

T = TypeVar("T", bound=transformers.Trainer)


def distribute(
    trainer: T,
    method: Method | None = None,
    *,
    default: Method | None = None,
    place: Place | None = None,
    buffers: Any = "fresh",
) -> T:
    """``trainer``, which from now on trains together with the other workers of the run; the arguments are those of `Replica`.

    The trainer's optimizer is `Offered`: it takes the steps where the method lets workers step (DiLoCo, LocalSGD, ...), and else
    gives the method (DANA, ASGD, ...) its learning rate. Epochs, ``max_steps``, the schedule, ``global_step``, and the intervals for
    logging, evaluating and saving count the steps of the run, that is, of all workers together. Worker 0 logs, evaluates and
    saves, with the parameters that would be shipped; where it stops early, the run is over for all. Only it is
    ``trainer.is_world_process_zero()``.

    Raises ``ValueError`` for what cannot be had.
    """
    args = trainer.args
    if args.world_size > 1:
        raise ValueError(
            f"the Trainer has found {args.world_size} processes, which it would keep in lockstep: start the script with "
            "offbeat launch, not with torchrun or accelerate launch"
        )
    if args.n_gpu > 1:
        raise ValueError(f"the Trainer would use {args.n_gpu} GPUs, and a worker has one: set CUDA_VISIBLE_DEVICES")
    for name in ("deepspeed", "fsdp", "auto_find_batch_size"):
        if getattr(args, name, None):
            raise ValueError(f"TrainingArguments({name}=...) does not go with distribute: leave it out")
    kind = type(trainer)
    if issubclass(kind, _Distributed):
        raise ValueError("this trainer is distributed already")
    trainer.__class__ = type(kind.__name__, (_Distributed, kind), {"__module__": kind.__module__})
    made: Any = trainer
    made._terms = {"method": method, "default": default, "place": place or Place.read(), "buffers": buffers}
    trainer.remove_callback(DefaultFlowCallback)
    trainer.callback_handler.callbacks.insert(0, _Flow(trainer))
    return trainer


class _Distributed:
    """Goes before the class of a trainer. One of its minibatches is a list, of all that are accumulated for a step."""

    args: Any
    state: Any
    control: Any
    accelerator: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    current_gradient_accumulation_steps: int
    _terms: dict[str, Any]
    _loader: _Loader
    _own: Any  # the trainer's optimizer
    replica: Replica | None = None
    """From the beginning of ``train`` on."""
    accumulate = 1

    def train(self, *args: Any, **kwargs: Any) -> Any:
        this: Any = super()
        accumulate = self.args.gradient_accumulation_steps
        self.accumulate, self.args.gradient_accumulation_steps = accumulate, 1
        skipping, self.args.ignore_data_skip = self.args.ignore_data_skip, True  # the loader does it
        try:
            return this.train(*args, **kwargs)
        finally:
            self.args.gradient_accumulation_steps, self.args.ignore_data_skip = accumulate, skipping

    def get_total_train_batch_size(self, args: Any) -> Any:
        this: Any = super()
        return this.get_total_train_batch_size(args) * self.accumulate

    # what the trainer makes

    def get_train_dataloader(self) -> Any:
        this: Any = super()
        if not getattr(self, "is_in_train", False):
            return this.get_train_dataloader()
        self.accelerator.dataloader_config.use_seedable_sampler = False  # which would take the place of the run's seed
        self._loader = _Loader(self, this.get_train_dataloader())
        return self._loader

    def create_optimizer(self, *args: Any) -> Any:
        this: Any = super()
        if self.replica is not None and self.replica.worker.left:
            if self._terms["place"].servers:
                raise RuntimeError("train() was called again, and this worker has left its run: start another run")
            self.replica, self.optimizer = None, self._own
        if self.replica is None:
            self._own = this.create_optimizer(*args)
            self.optimizer = self.replica = Replica(self.model, **self._terms, optimizer=Offered(self._own))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        this: Any = super()
        assert self.replica is not None
        scheduler = this.create_scheduler(num_training_steps, optimizer)
        if hasattr(scheduler, "step_with_metrics") or type(scheduler).__name__ in ("ReduceLROnPlateau", "GreedyLR"):
            if self.replica.workers > 1:
                raise ValueError(
                    f"{type(scheduler).__name__} goes by evaluations, which worker 0 alone makes: take another lr_scheduler_type"
                )
        elif not isinstance(scheduler, RunScheduler):
            self.lr_scheduler = scheduler = RunScheduler(scheduler, lambda: self.replica.passes.position)  # type: ignore[union-attr]
        return scheduler

    # a step

    def get_batch_samples(self, epoch_iterator: Iterator[list[Any]], num_batches: int, device: Any) -> Any:
        this: Any = super()
        steps = list(islice(epoch_iterator, 1))  # none at the epoch's end
        minibatches = [minibatch for step in steps for minibatch in step]
        return steps, this.get_batch_samples(iter(minibatches), len(minibatches), device)[1]

    def training_step(self, model: Any, inputs: list[Any], *rest: Any) -> Any:
        this: Any = super()
        self.current_gradient_accumulation_steps = len(inputs)
        return sum(this.training_step(model, minibatch, *rest) for minibatch in inputs)

    def floating_point_ops(self, inputs: list[Any]) -> Any:
        this: Any = super()
        return sum(this.floating_point_ops(minibatch) for minibatch in inputs)

    def _track_num_input_tokens(self, inputs: list[Any]) -> None:
        this: Any = super()
        for minibatch in inputs:
            this._track_num_input_tokens(minibatch)

    # the loop

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        this: Any = super()
        assert self.replica is not None
        sized = self._loader.length is not None
        if epoch >= self.replica.passes.run_epoch(self.state.num_train_epochs if sized else 0):
            this._run_epoch(*args, epoch=epoch, **kwargs)

    def _finalize_training(self, *args: Any) -> Any:
        this: Any = super()
        assert self.replica is not None
        self.replica.leave()  # before the best model is loaded, which is worker 0's alone
        return this._finalize_training(*args)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        this: Any = super()
        control, replica = self.control, self.replica
        assert replica is not None
        if not replica.main:
            control.should_log = control.should_evaluate = control.should_save = False
        this._maybe_log_save_evaluate(*args, **kwargs)
        if replica.main and control.should_training_stop and self.state.global_step < self.state.max_steps:
            replica.stop()  # as a callback wants

    # what worker 0 does

    def is_world_process_zero(self) -> bool:
        return self.replica.main if self.replica is not None else self._terms["place"].worker in (None, 0)

    def is_local_process_zero(self) -> bool:
        return self.is_world_process_zero()

    def _shipped(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.replica is None else self.replica.shipped()

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        this: Any = super()
        with self._shipped():
            return this.evaluate(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        this: Any = super()
        if self.is_world_process_zero():
            with self._shipped():
                this.save_model(*args, **kwargs)


class _Loader:
    """In the place of the trainer's loader: going over it gives this worker's steps of an epoch."""

    def __init__(self, trainer: Any, loader: Any) -> None:
        self.trainer, self.loader, self.dataset = trainer, loader, loader.dataset
        self.length: int | None = None  # steps of an epoch; None: a stream
        if has_length(loader):
            self.length = math.ceil(len(loader) / trainer.accumulate)
        self.epoch = self.given = 0  # steps that this worker has had of the epoch
        self.whole = False  # whether nothing of it was left at the end

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("the data have no length")
        return self.length

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[Any]]:
        trainer, self.given, self.whole = self.trainer, 0, False
        replica: Replica = trainer.replica
        before = self.epoch * (self.length or 0)
        at = trainer.state.global_step - before  # more than 0 where it goes on from a checkpoint
        for step in replica.shard(self.loader, self.epoch, accumulate=trainer.accumulate, skip=max(at, 0)):
            position = replica.passes.position
            if position > trainer.state.max_steps:
                return
            if isinstance(trainer.lr_scheduler, RunScheduler):
                bring(trainer.lr_scheduler, position - 1)  # of a worker that comes late
            self.given += 1
            yield step
        self.whole = True


class _Flow(DefaultFlowCallback):
    """When to log, evaluate and save, by the run's steps, of which this worker takes some only."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.before = trainer, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.before = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self._reach(self.trainer.replica.passes.position, args, state, control, **kwargs)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        loader: _Loader = self.trainer._loader
        stopped = self.trainer.replica.passes.stopped()
        if not loader.given:  # others had all of it, so that the Trainer would stop
            control.should_training_stop = False
        if loader.whole and loader.length is not None and not stopped:
            end = min((loader.epoch + 1) * loader.length, state.max_steps)
            control = self._reach(end, args, state, control, **kwargs)
        control.should_training_stop |= stopped
        return super().on_epoch_end(args, state, control, **kwargs)

    def _reach(self, now: int, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """The run is at step ``now``."""
        trainer, mine = self.trainer, state.global_step
        now = max(now, mine)
        trainer._globalstep_last_logged += now - mine  # losses are means over this worker's own steps
        trainer._initial_global_step += now - mine
        for state.global_step in range(self.before + 1, now + 1):
            control = super().on_step_end(args, state, control, **kwargs)
        self.before = now
        if (length := trainer._loader.length) is not None:
            state.epoch = now / length
        return control
