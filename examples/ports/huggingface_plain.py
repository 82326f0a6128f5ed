"""A small language model on generated text, by the Trainer of Hugging Face's transformers."""

from dataclasses import dataclass

import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments, set_seed


@dataclass
class Arguments(TrainingArguments):
    output_dir: str = "runs/huggingface"
    num_train_epochs: float = 24
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 64
    gradient_accumulation_steps: int = 2
    learning_rate: float = 0.005
    weight_decay: float = 0.01
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 10
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int = 1
    report_to: str = "none"
    use_cpu: bool = True


def sentences(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Sequences of 24 of 16 tokens, where each token allows four others to follow."""
    follow = torch.randint(0, 16, (16, 4), generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 16, (count, 1), generator=draw)
    for _ in range(23):
        choice = torch.randint(0, 4, (count,), generator=draw)
        tokens = torch.cat([tokens, follow[tokens[:, -1], choice][:, None]], 1)
    return [{"input_ids": row, "labels": row} for row in tokens]


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    set_seed(args.seed)
    config = GPT2Config(vocab_size=16, n_positions=24, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    trainer = Trainer(model=model, args=args, train_dataset=sentences(640, 1), eval_dataset=sentences(256, 2))
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    print(f"validation loss {metrics['eval_loss']:.4f}", flush=True)


if __name__ == "__main__":
    main()
