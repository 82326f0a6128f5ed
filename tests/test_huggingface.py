"""Hugging Face's Trainer: alone it is what it is without the library, and several share their steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crew import Serving
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import IterableDataset

import offbeat as ob
from offbeat.runtime.host import Terms

transformers = pytest.importorskip("transformers")
from offbeat.integrations.huggingface import distribute  # noqa: E402

Serve = Callable[..., Serving]


class Net(nn.Module):
    """A classifier as Trainers want them: it gets ``labels`` and returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.norm, self.out = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.out(self.norm(self.inside(x).relu()))
        return (
            {"logits": logits}
            if labels is None
            else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
        )


def examples(count: int = 50) -> list[dict[str, Tensor]]:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    return [{"x": row, "labels": (row.sum() > 0).long()} for row in x]


class Endless(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from examples()


def trainer(
    folder: Path, *, data: Any = None, callbacks: Any = None, model: nn.Module | None = None, **args: Any
) -> Any:
    """A plain one, whose order of minibatches is that of the data."""
    usual = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "warmup_steps": 3,
        "max_grad_norm": 0.5,
        "train_sampling_strategy": "sequential",
        "logging_steps": 4,
        "save_strategy": "no",
        "eval_strategy": "epoch",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return transformers.Trainer(
        model=model or Net(),
        args=transformers.TrainingArguments(str(folder), **usual | args),
        train_dataset=examples() if data is None else data,
        eval_dataset=examples(10),
        callbacks=callbacks,
    )


def weights(trainer: Any) -> Tensor:
    return parameters_to_vector(trainer.model.parameters()).detach()


def figures(trainer: Any) -> list[dict[str, float]]:
    """What it has logged, but for times and for the epoch, which the Trainer counts by examples."""
    timed = ("runtime", "second", "epoch")
    return [{k: v for k, v in line.items() if not any(t in k for t in timed)} for line in trainer.state.log_history]


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"gradient_accumulation_steps": 1, "lr_scheduler_type": "cosine"},
        {"gradient_accumulation_steps": 3, "num_train_epochs": 1.5, "save_strategy": "steps", "save_steps": 5},
        {"max_steps": 17, "eval_strategy": "steps", "eval_steps": 5, "logging_first_step": True},
        {"data": Endless(), "max_steps": 9, "eval_strategy": "no"},
        {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 3, "num_train_epochs": 1},
    ],
    ids=["epochs", "cosine", "short steps", "max_steps", "stream", "processes"],
)
def test_a_trainer_alone_is_the_plain_one(args: dict[str, Any], tmp_path: Path) -> None:
    """Parameters, schedule, clipping, accumulation, the log and what is saved, with the trainer's own AdamW."""
    plain, ours = trainer(tmp_path / "plain", **args), trainer(tmp_path / "ours", **args)
    plain.train()
    distribute(ours, ob.methods.LocalSGD(period=1)).train()
    assert torch.equal(weights(ours), weights(plain))
    assert [line.keys() for line in figures(ours)] == [line.keys() for line in figures(plain)]
    for mine, its in zip(figures(ours), figures(plain), strict=True):
        assert mine == pytest.approx(its, rel=1e-6)  # the losses of one step are summed first
    assert ours.state.global_step == plain.state.global_step
    saved = [
        sorted(p.relative_to(t.args.output_dir) for p in Path(t.args.output_dir).rglob("*")) for t in (plain, ours)
    ]
    assert saved[0] == saved[1]


def test_a_server_takes_the_trainers_rate_and_schedule(tmp_path: Path) -> None:
    """Adam at a server that one worker visits is Adam."""
    args = {"weight_decay": 0.0}
    plain, ours = trainer(tmp_path, **args), trainer(tmp_path, **args)
    plain.train()
    distribute(ours, ob.methods.AsyncAdam()).train()
    torch.testing.assert_close(weights(ours), weights(plain), rtol=1e-4, atol=1e-6)
    rates = [[line["learning_rate"] for line in figures(t) if "learning_rate" in line] for t in (plain, ours)]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 3


@pytest.mark.parametrize(
    ("method", "args", "message"),
    [
        (
            ob.methods.DanaZero(lr=0.3),
            {},
            r"DanaZero has the learning rate 0.3, and AdamW has 0.01: leave the method's out",
        ),
        (ob.methods.Overlap(ob.methods.DanaZero(lr=0.3)), {}, r"Overlap has the learning rate 0.3"),
        (ob.methods.LocalSGD(), {"auto_find_batch_size": True}, r"TrainingArguments\(auto_find_batch_size=...\)"),
    ],
)
def test_what_does_not_go_with_a_trainer_is_refused(method: ob.Method, args: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        distribute(trainer(tmp_path, **args), method).train()


def test_two_workers_share_the_steps_and_one_that_comes_late_begins_where_the_run_is(
    serve: Serve, tmp_path: Path
) -> None:
    """By turns: a worker leaves in the second of four epochs, another one comes, and each step is taken once."""
    run = serve(Terms(method=ob.methods.AsyncAdam(), workers=2, beat=0.05, timeout=2.0))

    class Away(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 20:
                raise KeyboardInterrupt

    args = {"num_train_epochs": 4, "weight_decay": 0.0}
    first = trainer(tmp_path, callbacks=[Away()], **args)
    with pytest.raises(KeyboardInterrupt):
        distribute(first, place=run.place(0)).train()
    first.replica.leave()
    second = distribute(trainer(tmp_path, **args), place=run.place(1))
    second.train()
    run.join()
    assert second.state.global_step == 4 * 13
    assert len(run.trace()) == run.server.leases.expected == 4 * 13
    rates = [event.extra["lr"] for event in run.trace()]
    assert rates[3:] == sorted(rates[3:], reverse=True), "after the warm-up"
    assert len(set(rates)) > 48
    assert not second.state.is_world_process_zero
    assert not [line for line in second.state.log_history if "loss" in line], "worker 0 alone logs and evaluates"


def test_early_stopping_ends_the_run(serve: Serve, tmp_path: Path) -> None:
    """Worker 0 decides; the best model is loaded at its end, and is not what others get."""
    run = serve(Terms(method=ob.methods.AsyncLocalSGD(period=1), workers=2, beat=0.05, timeout=20.0))
    stopping = transformers.EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=10.0)
    args = {"num_train_epochs": 50, "save_strategy": "epoch", "load_best_model_at_end": True}
    ours = distribute(trainer(tmp_path, callbacks=[stopping], **args), place=run.place(0))
    ours.train()
    assert ours.state.global_step == 26, "two of fifty epochs"
    late = distribute(trainer(tmp_path, **args), place=run.place(1))
    late.train()
    assert late.state.global_step == 0
    run.join()
    assert ours.state.best_model_checkpoint is not None


def test_a_trainer_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """In the middle of an epoch: the same as without a break."""
    args = {"save_strategy": "steps", "save_steps": 17, "eval_strategy": "no"}
    whole = distribute(trainer(tmp_path / "a", **args), ob.methods.LocalSGD(period=1))
    whole.train()
    again = distribute(trainer(tmp_path / "b", **args), ob.methods.LocalSGD(period=1))
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-17"))
    assert again.state.global_step == whole.state.global_step == 26
    assert torch.equal(weights(again), weights(whole))
