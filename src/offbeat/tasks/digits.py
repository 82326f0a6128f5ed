"""Digits: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, and a small net. Needs no files: good for trying."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import nn
from torch.nn import functional as F

from ..core.values import require
from .data import File, Loaded, Source
from .supervised import Dtype, Recipe, Supervised

NAME = "sklearn.datasets.load_digits"
SOURCE = Source(
    title="scikit-learn's digits",
    publisher="E. Alpaydin, C. Kaynak, 'Optical recognition of handwritten digits'; bundled with scikit-learn",
    folders=(),
    files={NAME: "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"},
)
TRAIN, TEST = 1437, 360


@dataclass(frozen=True)
class Digits(Recipe):
    """Handwritten digits with a net 64 -> ``hidden`` -> 10 and ReLU: seconds to train, about 98 % on the test set.

    The images are scikit-learn's (1,797, their pixels 0 to 16): pixels are divided by 16, then normalised with mean
    0.3053 and deviation 0.3760. A fixed 360 of them, the same for every seed and evenly from all ten classes, are the
    test set. Cross-entropy loss.

    The first use raises ``ImportError`` where scikit-learn is missing. Raises ``ValueError`` for bad fields.
    """

    batch: int = 32
    """Images per minibatch, 1 to 1,437."""
    hidden: int = 128
    """Units of the hidden layer, at least 1; the model has 75 * hidden + 10 parameters."""
    seed: int = 0
    """Any integer: initial weights and order of the images follow from it."""
    dtype: Dtype = "float32"
    """Floating-point type of parameters and images: float32 or float64."""

    def __post_init__(self) -> None:
        require(self, "batch", isinstance(self.batch, int) and 1 <= self.batch <= TRAIN, f"choose 1 to {TRAIN}")
        require(self, "hidden", isinstance(self.hidden, int) and self.hidden >= 1, "choose 1 or more")
        require(self, "seed", isinstance(self.seed, int), "choose an integer")
        require(self, "dtype", self.dtype in ("float32", "float64"), "choose float32 or float64")

    def build(self) -> Supervised:
        """The problem with scikit-learn's images."""
        data = load()
        return Supervised(
            model=partial(_net, self.hidden),
            loss=F.cross_entropy,
            train=data.train,
            test=data.test,
            batch=self.batch,
            seed=self.seed,
            dtype=getattr(torch, self.dtype),
            provenance=data.provenance,
        )


def _net(hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


@cache
def load() -> Loaded:
    """The digits, once per process: images ``float64 Tensor[n, 64]``, normalised, labels ``int64 Tensor[n]``."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("Digits needs scikit-learn's images: pip install 'offbeat[tasks]'") from error
    pixels, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    content = bytes(pixels.to(torch.uint8).flatten().tolist() + labels.tolist())
    provenance = SOURCE.vouch({NAME: File(NAME, content, SOURCE.files[NAME])})
    # Shuffled, then sorted by label: every fifth image takes a fifth of each class.
    order = torch.randperm(TRAIN + TEST, generator=torch.Generator().manual_seed(0))
    order = order[labels[order].argsort(stable=True)]
    test = torch.zeros(TRAIN + TEST, dtype=torch.bool)
    test[order[::5]] = True
    images, labels = (pixels / 16 - 0.3053) / 0.3760, labels.long()
    return Loaded((images[~test], labels[~test]), (images[test], labels[test]), provenance)
