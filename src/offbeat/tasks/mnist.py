"""MNIST: 60,000 + 10,000 handwritten digits of 28 x 28 pixels, and the convolutional net of the GEM paper."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.values import require
from .data import File, Loaded, Source, Where, folder
from .supervised import Dtype, Recipe, Supervised

SOURCE = Source(
    title="MNIST",
    publisher="Y. LeCun, C. Cortes, C. J. C. Burges, 'The MNIST database of handwritten digits'; "
    "torchvision.datasets.MNIST downloads the same files",
    folders=("mnist", "MNIST/raw"),  # the second is torchvision's
    files={
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
)
TRAIN = 60_000


@dataclass(frozen=True)
class Mnist(Recipe):
    """MNIST with the LeNet-like net of the GEM paper (Hermans and Louppe, arXiv:1805.08469), 163,790 parameters.

    5 x 5 convolution 1 -> 10, max-pooling by 2, ReLU; 5 x 5 convolution 10 -> 20, dropout of whole channels (1/2),
    max-pooling by 2, ReLU; fully connected 320 -> 300 -> 200 -> 10 with ReLU between; log-softmax. As in the authors'
    program the cross-entropy is taken of the log-softmax, which is the same as of the scores: a second log-softmax
    changes nothing. Pixels are scaled to 0..1, then normalised with mean 0.1307 and deviation 0.3081.

    Looks for the four official files in ``mnist/`` or ``MNIST/raw/`` of the data folder (see `offbeat.tasks.data`);
    the first use raises `DataMissing` or `DataCorrupt`, or warns `DataDiffers`. Raises ``ValueError`` for bad fields.
    """

    batch: int = 64
    """Images per minibatch, 1 to 60,000."""
    seed: int = 0
    """Any integer: initial weights, order of the images and dropout follow from it."""
    dtype: Dtype = "float32"
    """Floating-point type of the parameters: float32 or float64."""

    def __post_init__(self) -> None:
        require(self, "batch", isinstance(self.batch, int) and 1 <= self.batch <= TRAIN, f"choose 1 to {TRAIN}")
        require(self, "seed", isinstance(self.seed, int), "choose an integer")
        require(self, "dtype", self.dtype in ("float32", "float64"), "choose float32 or float64")

    @classmethod
    def data(cls) -> Where:
        """Where its files were looked for and which are there."""
        return SOURCE.where(folder())

    def build(self) -> Supervised:
        """The problem with the images of the data folder as it is now."""
        data = load(folder())
        return Supervised(
            model=Net,
            loss=F.cross_entropy,
            train=data.train,
            test=data.test,
            batch=self.batch,
            seed=self.seed,
            dtype=getattr(torch, self.dtype),
            provenance=data.provenance,
        )


class Net(nn.Module):
    """The net of `Mnist`: pixels ``uint8 Tensor[n, 1, 28, 28]`` in, log-probabilities ``Tensor[n, 10]`` out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, kernel_size=5)
        self.conv2 = nn.Conv2d(10, 20, kernel_size=5)
        self.drop = nn.Dropout2d()
        self.fc1 = nn.Linear(320, 300)
        self.fc2 = nn.Linear(300, 200)
        self.fc3 = nn.Linear(200, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        # Normalised here, not in advance: kept as bytes the images take 55 MB instead of 220.
        x = (pixels.to(self.fc1.weight.dtype) / 255 - 0.1307) / 0.3081
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.drop(self.conv2(x)), 2))
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        return F.log_softmax(self.fc3(x), dim=1)


@cache
def load(folder: Path) -> Loaded:
    """MNIST from ``folder``, once per process: images ``uint8 Tensor[n, 1, 28, 28]``, labels ``int64 Tensor[n]``."""
    files = SOURCE.read(folder)
    pairs = []
    for part in ("train", "t10k"):
        images, labels = files[f"{part}-images-idx3-ubyte"], files[f"{part}-labels-idx1-ubyte"]
        x, y = idx(images, 3), idx(labels, 1)
        if x.shape[1:] != (28, 28):
            raise images.corrupt(f"its images are {x.shape[1]} x {x.shape[2]}, MNIST's are 28 x 28")
        if int(y.max()) > 9:
            raise labels.corrupt(f"it has the label {int(y.max())}, MNIST's are 0 to 9")
        if len(x) != len(y):
            raise labels.corrupt(f"it has {len(y)} labels for {len(x)} images")
        pairs.append((x.unsqueeze(1), y.long()))
    return Loaded(pairs[0], pairs[1], SOURCE.vouch(files))


def idx(file: File, rank: int) -> Tensor:
    """The ``uint8`` array of ``rank`` dimensions in an idx file: two zero bytes, type, rank, sizes, then the values."""
    start = 4 + 4 * rank
    magic = bytes((0, 0, 8, rank))
    if len(file.content) < start or file.content[:4] != magic:
        raise file.corrupt(f"starts with {file.content[:4].hex()!r}, not with {magic.hex()!r} and {rank} sizes")
    shape = struct.unpack(f">{rank}I", file.content[4:start])
    if (size := math.prod(shape)) != len(file.content) - start or size == 0:
        raise file.corrupt(f"its header promises {size} values, it has {len(file.content) - start}")
    return torch.frombuffer(bytearray(file.content), dtype=torch.uint8, offset=start).view(shape)
