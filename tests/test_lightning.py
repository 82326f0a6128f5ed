"""Lightning's Trainer: alone it is what it is without the library, and several share their steps."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crew import Serving
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import offbeat as ob
from offbeat.runtime.host import Terms

L = pytest.importorskip("lightning")
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint  # noqa: E402

from offbeat.integrations.lightning import OffbeatStrategy  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]
Serve = Callable[..., Serving]
X = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
ADAM = lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1)  # noqa: E731


class Module(L.LightningModule):  # type: ignore[misc,name-defined]
    """A regression, its optimizer and its scheduler, if it has one."""

    def __init__(self, optimizer: Any = ADAM, scheduler: Any = None, interval: str = "step") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))
        self.optimizer, self.scheduler, self.interval = optimizer, scheduler, interval
        self.rates: list[float] = []
        self.validated: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        (x,) = batch
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        return (self.net(x) - x.sum(1, keepdim=True)).square().mean()

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        (x,) = batch
        loss = (self.net(x) - x.sum(1, keepdim=True)).square().mean()
        self.validated.append(float(loss))
        self.log("loss", loss)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.scheduler(optimizer), "interval": self.interval, "monitor": "loss"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class Pair(L.LightningModule):  # type: ignore[misc,name-defined]
    """Two nets by turns, by hand, as in a GAN."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 2)

    def training_step(self, batch: list[Tensor], index: int) -> None:
        (x,) = batch
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward((self.a(x) - self.b(x) - x[:, :2]).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), 0.1, momentum=0.9) for net in (self.a, self.b)]


def loader(count: int = 50, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X[:count]), 2, **options)


def trainer(folder: Path, strategy: Any = "auto", **options: Any) -> Any:
    usual = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "gradient_clip_val": 0.5,
        "default_root_dir": folder,
    }
    return L.Trainer(**usual | options, strategy=strategy)


def weights(module: nn.Module) -> Tensor:
    return parameters_to_vector(module.parameters()).detach()


class Endless(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield X[0] * torch.ones(4)


def one_cycle(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=60)


def linear(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 52)


def decay(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (Module, {}),
        (lambda: Module(scheduler=one_cycle), {"accumulate_grad_batches": 3}),
        (lambda: Module(scheduler=decay, interval="epoch"), {"max_epochs": 3}),
        (lambda: Module(scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau, interval="epoch"), {}),
        (Module, {"max_epochs": None, "max_steps": 17, "accumulate_grad_batches": 2}),
        (Module, {"limit_train_batches": 7, "val_check_interval": 3}),
        (Pair, {"gradient_clip_val": None}),
    ],
    ids=["usual", "accumulate", "epochs", "plateau", "max_steps", "limit", "by hand"],
)
def test_a_trainer_alone_is_the_plain_one(module: Callable[[], Any], options: dict[str, Any], tmp_path: Path) -> None:
    """Parameters, rates and validations, with the module's own optimizer."""
    plain, ours = module(), module()
    validation = [] if module is Pair else [loader(10)]
    trainer(tmp_path, **options).fit(plain, loader(), *validation)
    one = trainer(tmp_path, OffbeatStrategy(ob.methods.LocalSGD(period=1)), **options)
    one.fit(ours, loader(), *validation)
    assert torch.equal(weights(ours), weights(plain))
    if module is not Pair:
        assert ours.rates == plain.rates
        assert ours.validated[: len(plain.validated)] == plain.validated
        assert len(ours.validated) == len(plain.validated) + 5 * ("max_steps" in options), "once more at its end"
    assert one.is_global_zero


def test_a_stream_alone_ends_where_the_plain_one_does(tmp_path: Path) -> None:
    plain, ours = Module(), Module()
    data, options = (
        DataLoader(Endless(), 2, collate_fn=lambda xs: [torch.stack(xs)]),
        {"max_epochs": None, "max_steps": 9},
    )
    trainer(tmp_path, **options).fit(plain, data)
    trainer(tmp_path, OffbeatStrategy(ob.methods.LocalSGD(period=1)), **options).fit(ours, data)
    assert torch.equal(weights(ours), weights(plain))


def test_a_server_takes_the_module_s_rate_and_schedule(tmp_path: Path) -> None:
    """Adam at a server that one worker visits is Adam."""
    plain, ours = (Module(lambda p: torch.optim.Adam(p, 0.01), linear) for _ in range(2))
    trainer(tmp_path).fit(plain, loader())
    trainer(tmp_path, OffbeatStrategy(ob.methods.AsyncAdam())).fit(ours, loader())
    torch.testing.assert_close(weights(ours), weights(plain), rtol=1e-4, atol=1e-6)
    assert ours.rates == plain.rates


@pytest.mark.parametrize(
    ("method", "module", "message"),
    [
        (ob.methods.DanaZero(lr=0.3), Module, r"DanaZero has the learning rate 0.3, and AdamW has 0.01"),
        (ob.methods.DanaZero(), Pair, r"DanaZero takes one step .* and this script has 2 optimizers"),
    ],
)
def test_what_does_not_go_with_a_trainer_is_refused(
    method: ob.Method, module: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, OffbeatStrategy(method), gradient_clip_val=None).fit(module(), loader())


class Away(Callback):  # type: ignore[misc]
    """Leaves after so many steps, as a machine that is taken away."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.after:
            trainer.strategy.replica.leave()
            raise ConnectionAbortedError


def test_two_workers_share_the_steps_and_one_that_comes_late_begins_where_the_run_is(
    serve: Serve, tmp_path: Path
) -> None:
    """By turns: a worker leaves in the second of four epochs, another one comes, and each step is taken once."""
    run = serve(Terms(method=ob.methods.AsyncAdam(), workers=2, beat=0.05, timeout=2.0))
    options = {"max_epochs": 4, "accumulate_grad_batches": 2}
    first, second = (Module(lambda p: torch.optim.Adam(p, 0.01), linear) for _ in range(2))
    one = trainer(tmp_path, OffbeatStrategy(place=run.place(0)), callbacks=[Away(20)], **options)
    with pytest.raises(ConnectionAbortedError):
        one.fit(first, loader())
    other = trainer(tmp_path, OffbeatStrategy(place=run.place(1)), **options)
    other.fit(second, loader(), loader(10))
    run.join()
    assert len(run.trace()) == run.server.leases.expected == 4 * 13
    assert other.current_epoch == 4
    assert not other.is_global_zero
    assert len(second.validated) == 3, "one minibatch each time"
    rates = [event.extra["lr"] for event in run.trace()]
    assert rates == pytest.approx([0.01 * (1 - k / 52) for k in range(52)], rel=0.2)
    assert rates == sorted(rates, reverse=True)


def test_early_stopping_ends_the_run(serve: Serve, tmp_path: Path) -> None:
    """Worker 0 decides for all."""
    run = serve(Terms(method=ob.methods.AsyncLocalSGD(period=1), workers=2, beat=0.05, timeout=20.0))
    options = {"max_epochs": 50, "enable_checkpointing": True}
    modules = [Module(), Module()]
    for i, module in enumerate(modules):
        stopping = EarlyStopping("loss", min_delta=1e3, patience=1)
        best = ModelCheckpoint(tmp_path / str(i), monitor="loss")
        one = trainer(tmp_path, OffbeatStrategy(place=run.place(i)), callbacks=[stopping, best], **options)
        one.fit(module, loader(), loader(10))
    run.join()
    assert len(run.trace()) == 50, "two of fifty epochs"
    assert [sorted(p.name for p in (tmp_path / str(i)).glob("*")) != [] for i in (0, 1)] == [True, False]


def test_a_checkpoint_is_of_what_would_be_shipped(tmp_path: Path) -> None:
    """In the middle of an epoch, where the worker's own parameters look ahead."""
    one = trainer(tmp_path, OffbeatStrategy(ob.methods.DanaZero()), callbacks=[Away(30)])
    module = Module(lambda p: torch.optim.SGD(p, 0.01))
    seen: list[Tensor] = []

    class Save(Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 20:
                trainer.save_checkpoint(tmp_path / "it.ckpt")
                seen.extend([trainer.strategy.replica.worker.master().clone(), weights(module)])

    one.callbacks.insert(0, Save())
    with pytest.raises(ConnectionAbortedError):
        one.fit(module, loader())
    state = torch.load(tmp_path / "it.ckpt", weights_only=False)["state_dict"]
    saved = torch.cat([state[name].flatten() for name, _ in module.named_parameters()])
    assert torch.equal(saved, seen[0])
    assert not torch.equal(saved, seen[1])


@pytest.mark.parametrize("step", [17, 25, 32])
def test_a_trainer_goes_on_from_its_checkpoint(step: int, tmp_path: Path) -> None:
    """In the middle of an epoch or at its end: the same as without a break."""
    found = []
    for broken in (False, True):
        save = ModelCheckpoint(tmp_path / str(broken), every_n_train_steps=step, save_top_k=-1)
        options = {"enable_checkpointing": True, "callbacks": [save, *([Away(step + 2)] if broken else [])]}
        module = Module(scheduler=one_cycle)
        one = trainer(tmp_path, OffbeatStrategy(ob.methods.LocalSGD(period=1)), **options)
        if broken:
            with pytest.raises(ConnectionAbortedError):
                one.fit(module, loader(shuffle=True))
            (path,) = (tmp_path / "True").glob("*.ckpt")
            module = Module(scheduler=one_cycle)
            one = trainer(tmp_path, OffbeatStrategy(ob.methods.LocalSGD(period=1)))
            one.fit(module, loader(shuffle=True), ckpt_path=path)
        else:
            one.fit(module, loader(shuffle=True))
        found.append(weights(module))
        assert one.global_step == 50
    assert torch.equal(*found)


def test_the_strategy_is_of_the_package_that_the_script_has_imported() -> None:
    pytest.importorskip("pytorch_lightning")
    code = (
        "import pytorch_lightning as pl; from offbeat.integrations.lightning import OffbeatStrategy; "
        "assert issubclass(OffbeatStrategy, pl.strategies.Strategy)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
