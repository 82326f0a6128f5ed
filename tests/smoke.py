"""An installed offbeat works: python -P tests/smoke.py, with the Python that it is installed for, as `make dist` does."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = """
import torch
from torch import nn
import offbeat as ob

torch.manual_seed(0)
x = torch.randn(256, 4)
data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
model = nn.Linear(4, 1)
replica = ob.Replica(model, ob.methods.DanaZero(lr=0.02))
for inputs, targets in replica.shard(loader):
    nn.functional.mse_loss(model(inputs), targets).backward()
    replica.step()
"""


def offbeat(*words: str) -> str:
    """What the installed command prints."""
    command = Path(sys.executable).with_name("offbeat")
    done = subprocess.run([command, *words], capture_output=True, text=True, timeout=300, check=False)
    print(f"offbeat {' '.join(words)}: status {done.returncode}")
    if done.returncode:
        sys.exit(f"{done.stdout}\n{done.stderr}")
    return done.stdout


def main() -> None:
    import offbeat as ob

    home = Path(ob.__file__).parent
    checkout = Path(__file__).resolve().parent.parent
    assert checkout / "src" not in home.parents, f"{home} is the checkout, not what is installed"
    assert importlib.metadata.version("offbeat") == ob.__version__
    assert (home / "py.typed").is_file()
    assert (home / "methods" / "__init__.pyi").is_file()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        assert offbeat("--version") == f"offbeat {ob.__version__}\n"
        assert "dana-zero" in offbeat("methods")
        offbeat("simulate", "--method", "dana-zero", "--task", "quadratic", "--gradients", "200", "--out", "simulated")
        assert len(ob.Trace.read("simulated/trace.jsonl")) == 200
        Path("train.py").write_text(SCRIPT, encoding="utf-8")
        offbeat("launch", "--workers", "2", "--out", "launched", "train.py")
        assert len(ob.Trace.read("launched/trace.jsonl")) == 32
        assert Path("launched/model.pt").is_file()
        assert json.loads(Path("launched/summary.json").read_text("utf-8"))
    print(f"offbeat {ob.__version__} works on Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
