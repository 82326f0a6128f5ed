"""CIFAR-10 and CIFAR-100: 50,000 + 10,000 colour images of 32 x 32 pixels, and three residual nets from the papers."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ..core.values import require, require_count
from .data import File, Loaded, Source, Where, folder
from .resnet import Numbers, resnet18, resnet20, wrn_16_4
from .supervised import Dtype, Recipe, Supervised

Model: TypeAlias = Literal["resnet20", "resnet18", "wrn-16-4"]
MODELS = {"resnet20": resnet20, "resnet18": resnet18, "wrn-16-4": wrn_16_4}
TRAIN = 50_000
MARGIN = 4
"""Pixels by which an image is padded before a crop."""

PUBLISHER = (
    "A. Krizhevsky, 'Learning Multiple Layers of Features from Tiny Images'; the archive {} of "
    "https://www.cs.toronto.edu/~kriz/cifar.html, unpacked, or torchvision.datasets.{} with download=True"
)
CIFAR10 = Source(
    title="CIFAR-10",
    publisher=PUBLISHER.format("cifar-10-python.tar.gz", "CIFAR10"),
    folders=("cifar-10-batches-py", "cifar10/cifar-10-batches-py"),
    files={  # md5
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
)
CIFAR100 = Source(
    title="CIFAR-100",
    publisher=PUBLISHER.format("cifar-100-python.tar.gz", "CIFAR100"),
    folders=("cifar-100-python", "cifar100/cifar-100-python"),
    files={  # md5
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    },
)
SHADES10: tuple[Numbers, Numbers] = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SHADES100: tuple[Numbers, Numbers] = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
"""Mean and standard deviation of red, green and blue over the training set, with pixels scaled to 0..1."""


@dataclass(frozen=True)
class Cifar(Recipe):
    """What `Cifar10` and `Cifar100` have in common."""

    model: Model = "resnet20"
    """The net: resnet20, resnet18 or wrn-16-4."""
    batch: int = 128
    """Images per minibatch, 1 to 50,000."""
    augment: bool = True
    """Train on random crops of the images padded by 4 black pixels, mirrored half of the time: True or False."""
    eval_images: int = 10_000
    """Images of the test set that an evaluation takes, the first of it, at least 1 (all, if there are fewer)."""
    seed: int = 0
    """Any integer: initial weights, order of the images and augmentation follow from it."""
    dtype: Dtype = "float32"
    """Floating-point type of the parameters: float32 or float64."""

    def __post_init__(self) -> None:
        require(self, "model", self.model in MODELS, f"choose one of {', '.join(MODELS)}")
        require(self, "batch", isinstance(self.batch, int) and 1 <= self.batch <= TRAIN, f"choose 1 to {TRAIN}")
        require_count(self, "eval_images")
        require(self, "augment", isinstance(self.augment, bool), "choose True or False")
        require(self, "seed", isinstance(self.seed, int), "choose an integer")
        require(self, "dtype", self.dtype in ("float32", "float64"), "choose float32 or float64")


@dataclass(frozen=True)
class Cifar10(Cifar):
    """CIFAR-10, ten classes of small colour images, with a residual net. Cross-entropy loss; evaluates the accuracy.

    Models (`offbeat.tasks.resnet`): ``resnet20``, He et al., arXiv:1512.03385, 269,722 parameters; ``resnet18``, the
    wider net of SlowMo's experiments, arXiv:1910.00643, 11,173,962; ``wrn-16-4``, Zagoruyko and Komodakis,
    arXiv:1605.07146, 2,748,890. Weight decay is the method's, not the problem's.

    Looks for the official python version in ``cifar-10-batches-py/`` of the data folder (see `offbeat.tasks.data`) and
    reads its pickles without running anything in them. The first use raises `DataMissing` or `DataCorrupt`, or warns
    `DataDiffers`. Raises ``ValueError`` for bad fields.
    """

    @classmethod
    def data(cls) -> Where:
        """Where its files were looked for and which are there."""
        return CIFAR10.where(folder())

    def build(self) -> Supervised:
        """The problem with the images of the data folder as it is now."""
        return _build(self, load10(folder()), 10, SHADES10)


@dataclass(frozen=True)
class Cifar100(Cifar):
    """CIFAR-100, a hundred (fine) classes of small colour images, with a residual net; else like `Cifar10`.

    ``resnet20`` has 275,572 parameters, ``resnet18`` 11,220,132, ``wrn-16-4`` 2,772,020. Looks for the official python
    version in ``cifar-100-python/`` of the data folder (see `offbeat.tasks.data`). The first use raises `DataMissing`
    or `DataCorrupt`, or warns `DataDiffers`. Raises ``ValueError`` for bad fields.
    """

    @classmethod
    def data(cls) -> Where:
        """Where its files were looked for and which are there."""
        return CIFAR100.where(folder())

    def build(self) -> Supervised:
        """The problem with the images of the data folder as it is now."""
        return _build(self, load100(folder()), 100, SHADES100)


def crop_and_flip(pixels: Tensor, generator: Generator) -> Tensor:
    """Each image shifted by up to 4 pixels either way, black coming in, and mirrored with probability 1/2.

    ``Tensor[n, 3, h, w]`` in and out, of any dtype; a pure function of the pixels and the generator's state.
    """
    n, _, h, w = pixels.shape
    draw = partial(torch.randint, generator=generator, device=pixels.device)
    down, right = draw(2 * MARGIN + 1, (2, n, 1))
    mirrored = draw(2, (n, 1)).bool()
    rows = torch.arange(h, device=pixels.device) + down  # [n, h]
    columns = torch.arange(w, device=pixels.device) + right
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(pixels, (MARGIN,) * 4)
    image = torch.arange(n, device=pixels.device)[:, None, None]
    # Indices around a slice put the colours last.
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


@cache
def load10(folder: Path) -> Loaded:
    """CIFAR-10 from ``folder``, once per process: ``uint8 Tensor[n, 3, 32, 32]``, labels ``int64 Tensor[n]``."""
    files = CIFAR10.read(folder)
    batches = [read(files[name], "labels", 10) for name in files if name != "test_batch"]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return Loaded((images, labels), read(files["test_batch"], "labels", 10), CIFAR10.vouch(files))


@cache
def load100(folder: Path) -> Loaded:
    """CIFAR-100 from ``folder``, once per process: ``uint8 Tensor[n, 3, 32, 32]``, labels ``int64 Tensor[n]``."""
    files = CIFAR100.read(folder)
    train, test = (read(files[part], "fine_labels", 100) for part in ("train", "test"))
    return Loaded(train, test, CIFAR100.vouch(files))


def read(file: File, key: str, classes: int) -> tuple[Tensor, Tensor]:
    """Images ``uint8 Tensor[n, 3, 32, 32]`` and labels ``int64 Tensor[n]`` (under ``key``) of one batch file."""
    table = unpickle(file)
    if not isinstance(table, dict):
        raise file.corrupt(f"it holds a {type(table).__name__}, not a dict")
    fields = {_plain(name): value for name, value in table.items()}
    for name in ("data", key):
        if name not in fields:
            raise file.corrupt(f"it has no {name!r}, only {sorted(map(str, fields))}")
    pixels, labels = _array(file, fields["data"]), fields[key]
    if pixels.dim() != 2 or pixels.shape[1] != 3 * 32 * 32 or not len(pixels):
        raise file.corrupt(f"its images are an array of {list(pixels.shape)}, not of [n, 3072]")
    if not isinstance(labels, list) or not all(type(v) is int and 0 <= v < classes for v in labels):
        raise file.corrupt(f"its {key!r} are no list of labels 0 to {classes - 1}")
    if len(labels) != len(pixels):
        raise file.corrupt(f"it has {len(labels)} labels for {len(pixels)} images")
    return pixels.view(-1, 3, 32, 32), torch.tensor(labels)


class Named:
    """What stands in for a class or function that a pickle names: it keeps its arguments and state, and does nothing."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Text(Named):
    """Bytes, the way Python 3 pickles them for Python 2."""


class Type(Named):
    """The type of an array's elements."""


class Array(Named):
    """An array."""


KNOWN: dict[tuple[str, str], type[Named]] = {
    ("_codecs", "encode"): Text,
    ("numpy", "ndarray"): Named,
    ("numpy", "dtype"): Type,
    ("numpy.core.multiarray", "_reconstruct"): Array,
    ("numpy._core.multiarray", "_reconstruct"): Array,
}


def unpickle(file: File) -> Any:
    """The content of a pickle of plain values and arrays, in which every other name is refused with `DataCorrupt`.

    Nothing that the pickle names is imported or called: the names of `KNOWN` become records, read by `read`.
    """

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> type[Named]:
            if (module, name) not in KNOWN:
                raise pickle.UnpicklingError(f"it names {module}.{name}, which no file of this set does")
            return KNOWN[module, name]

    try:
        return Reader(io.BytesIO(file.content), encoding="bytes").load()
    except Exception as error:  # damaged pickles raise nearly anything
        raise file.corrupt(f"it is no pickle of images ({type(error).__name__}: {error})") from None


def _plain(value: Any) -> Any:
    """Text as ``str``, whichever Python wrote it."""
    if isinstance(value, Text) and value.args and isinstance(value.args[0], str):
        return value.args[0]
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _array(file: File, value: Any) -> Tensor:
    """The ``uint8`` tensor that an `Array` describes."""
    try:
        _, shape, kind, fortran, raw = value.state
        if isinstance(raw, Text):
            raw = raw.args[0].encode("latin-1")
        fine = isinstance(value, Array) and isinstance(kind, Type) and _plain(kind.args[0]) in ("u1", "|u1")
        fine = fine and isinstance(raw, bytes) and all(type(n) is int and n > 0 for n in shape)
    except (AttributeError, TypeError, ValueError, IndexError, UnicodeEncodeError):
        fine = False
    if not fine:
        raise file.corrupt("its 'data' are no array of bytes")
    if math.prod(shape) != len(raw):
        raise file.corrupt(f"its array of {list(shape)} has {len(raw)} values")
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return flat.view(*reversed(shape)).t().contiguous() if fortran and len(shape) == 2 else flat.view(*shape)


def _build(task: Cifar, data: Loaded, classes: int, shades: Sequence[Numbers]) -> Supervised:
    return Supervised(
        model=partial(_net, task.model, classes, *shades),
        loss=F.cross_entropy,
        train=data.train,
        test=(data.test[0][: task.eval_images], data.test[1][: task.eval_images]),
        batch=task.batch,
        seed=task.seed,
        augment=crop_and_flip if task.augment else None,
        dtype=getattr(torch, task.dtype),
        provenance=data.provenance,
    )


def _net(model: str, classes: int, mean: Numbers, std: Numbers) -> nn.Module:
    return MODELS[model](classes, mean, std)
