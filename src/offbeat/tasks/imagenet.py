"""ImageNet: 1.28 million photographs in 1,000 classes, one folder for each, and ResNet-50."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..core.values import require, require_count
from .data import DataCorrupt, DataDiffers, DataMissing, Where, folder
from .resnet import resnet18, resnet20, resnet50
from .supervised import Dtype, Recipe, Supervised

Model: TypeAlias = Literal["resnet50", "resnet18", "resnet20"]
MODELS = {"resnet50": resnet50, "resnet18": resnet18, "resnet20": resnet20}
TITLE = "ImageNet (ILSVRC 2012)"
PUBLISHER = (
    "O. Russakovsky et al., 'ImageNet Large Scale Visual Recognition Challenge', arXiv:1409.0575; the archives "
    "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar of https://image-net.org, unpacked into one folder per class"
)
FOLDER = "imagenet"
PARTS = {"train": 1_281_167, "val": 50_000}
"""Images in each part of the published set."""
CLASSES = 1000
SHADES = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of red, green and blue, with pixels scaled to 0..1."""
SUFFIXES = (".jpeg", ".jpg", ".png")
CHUNK = 64
"""Images per forward pass of an evaluation."""


@dataclass(frozen=True)
class ImageNet(Recipe):
    """ImageNet with ResNet-50 (He et al., arXiv:1512.03385), 25,557,032 parameters for its 1,000 classes.

    Training images are decoded when they are needed: a random part of 8 to 100 % of the area, its sides 3:4 to 4:3, is
    scaled to ``size`` pixels square and mirrored half of the time (Szegedy et al., arXiv:1409.4842). For evaluation
    the shorter side is scaled to 256/224 of ``size`` and the centre is cut out. Batch normalisation's statistics for an
    evaluation come from training images, cut in the random way from a fixed seed. Cross-entropy loss; evaluates the
    accuracy.

    Looks for ``imagenet/train/CLASS/*.JPEG`` and ``imagenet/val/CLASS/*.JPEG`` in the data folder (see
    `offbeat.tasks.data`); classes are numbered in the order of their names. The first use raises `DataMissing`, or
    warns `DataDiffers` where the numbers of images or classes are not ImageNet's; an image that cannot be decoded
    raises `DataCorrupt` when it is needed. Needs Pillow, else raises ``ImportError``. Raises ``ValueError`` for bad fields.
    """

    model: Model = "resnet50"
    """The net: resnet50, or one of CIFAR's for small sizes (resnet18, resnet20)."""
    batch: int = 64
    """Images per minibatch, from 1 to those of the training set."""
    size: int = 224
    """Height and width of the images that the net sees, in pixels, 32 or more."""
    eval_images: int = 5000
    """Images of the validation set that an evaluation takes, evenly spread, at least 1 (all, if there are fewer)."""
    seed: int = 0
    """Any integer: initial weights, order and cuts of the images follow from it."""
    dtype: Dtype = "float32"
    """Floating-point type of the parameters: float32 or float64."""

    def __post_init__(self) -> None:
        require(self, "model", self.model in MODELS, f"choose one of {', '.join(MODELS)}")
        require_count(self, "batch")
        require_count(self, "size", 32)
        require_count(self, "eval_images")
        require(self, "seed", isinstance(self.seed, int), "choose an integer")
        require(self, "dtype", self.dtype in ("float32", "float64"), "choose float32 or float64")

    @classmethod
    def data(cls) -> Where:
        """Where its folders were looked for and which are there; does not look inside."""
        return where(folder())

    def build(self) -> Supervised:
        """The problem with the images that the data folder lists now."""
        _pillow()
        listed = scan(folder())
        require(self, "batch", self.batch <= len(listed.train), f"choose 1 to {len(listed.train)}, the training images")
        count = min(self.eval_images, len(listed.val))
        chosen = torch.linspace(0, len(listed.val) - 1, count, dtype=torch.float64).long().tolist()
        return Supervised(
            model=partial(_net, self.model, len(listed.classes)),
            loss=F.cross_entropy,
            train=Images(listed.train, self.size, training=True),
            test=Images(tuple(listed.val[k] for k in chosen), self.size, training=False),
            batch=self.batch,
            seed=self.seed,
            dtype=getattr(torch, self.dtype),
            provenance=listed.provenance,
            chunk=CHUNK,
        )


class Listed(NamedTuple):
    """What the folders of a data set hold."""

    classes: tuple[str, ...]
    """The classes by number."""
    train: tuple[tuple[Path, int], ...]
    """Each training image's file and class."""
    val: tuple[tuple[Path, int], ...]
    """The same for validation."""
    provenance: dict[str, str]
    """``"official numbers"`` or how the numbers differ, for each part; the images themselves are not hashed."""


class Images(Dataset[tuple[Tensor, int]]):
    """Item k is (``uint8 Tensor[3, size, size]``, class); a training image is cut at random, from torch's generator."""

    def __init__(self, files: tuple[tuple[Path, int], ...], size: int, training: bool) -> None:
        self.files, self.size, self.training = files, size, training

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, k: int) -> tuple[Tensor, int]:
        path, label = self.files[k]
        return decode(path, self.size, torch.default_generator if self.training else None), label


def decode(path: Path, size: int, generator: Generator | None) -> Tensor:
    """The image as ``uint8 Tensor[3, size, size]``: cut at random with ``generator``, else from its centre.

    A pure function of the file and the generator's state. Raises `DataCorrupt` for what is no image.
    """
    pillow = _pillow()
    try:
        with pillow.open(path) as stored:
            image = stored.convert("RGB")
    except Exception as error:  # Pillow raises nearly anything for damaged files
        reason = f"{path}: it cannot be decoded ({type(error).__name__}: {error}). Delete the file and fetch it again"
        raise DataCorrupt(reason) from None
    width, height = image.size
    box = center(width, height, size) if generator is None else random_part(width, height, generator)
    image = image.resize((size, size), pillow.Resampling.BILINEAR, box=box)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3)
    if generator is not None and int(torch.randint(2, (), generator=generator)):
        pixels = pixels.flip(1)
    return pixels.permute(2, 0, 1).contiguous()


def center(width: int, height: int, size: int) -> tuple[float, float, float, float]:
    """The square in the middle (left, upper, right, lower) that is ``size`` after the shorter side became 256/224 of it."""
    side = min(width, height) * size / round(size * 256 / 224)
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def random_part(width: int, height: int, generator: Generator) -> tuple[float, float, float, float]:
    """A random rectangle (left, upper, right, lower) of 8 to 100 % of the area with sides 3:4 to 4:3.

    Ten tries, after which the middle is taken, as large as these proportions allow.
    """
    for _ in range(10):
        a, b, c, d = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        area, ratio = width * height * (0.08 + 0.92 * a), (3 / 4) ** (1 - 2 * b)  # uniform in the logarithm
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(c * (width - w + 1)), int(d * (height - h + 1))
            return left, upper, left + w, upper + h
    x, y = min(width, height * 4 / 3) / 2, min(height, width * 4 / 3) / 2
    return width / 2 - x, height / 2 - y, width / 2 + x, height / 2 + y


def where(folder: Path) -> Where:
    """Which of the two parts are under ``folder``."""
    paths = {part: folder / FOLDER / part for part in PARTS}
    found = {part: path for part, path in paths.items() if path.is_dir()}
    return Where(TITLE, PUBLISHER, (folder / FOLDER,), found, tuple(part for part in PARTS if part not in found))


@cache
def scan(folder: Path) -> Listed:
    """The images under ``folder``, once per process, sorted by class and name."""
    found = where(folder)
    if found.missing:
        looked = ", ".join(str(folder / FOLDER / part) for part in found.missing)
        raise DataMissing(
            f"{TITLE}: {' and '.join(found.missing)} missing. Looked for {looked}. Nothing is downloaded: get "
            f"{PUBLISHER}, and put them in {folder / FOLDER}/train and /val, or set OFFBEAT_DATA to the folder "
            f"that has {FOLDER}/ in it"
        )
    classes = tuple(sorted(p.name for p in found.found["train"].iterdir() if p.is_dir()))
    others = tuple(sorted(p.name for p in found.found["val"].iterdir() if p.is_dir()))
    if others != classes:
        odd = sorted(set(classes) ^ set(others))
        raise DataCorrupt(
            f"{folder / FOLDER}: train and val do not have the same classes, {odd[0]} is in one only. Unpack both into "
            "one folder per class"
        )
    listed = {
        part: tuple(
            (path, k)
            for k, name in enumerate(classes)
            for path in sorted((found.found[part] / name).iterdir())
            if path.suffix.lower() in SUFFIXES
        )
        for part in PARTS
    }
    if empty := [part for part in PARTS if not listed[part]]:
        raise DataMissing(f"{TITLE}: no images in {found.found[empty[0]]}. Nothing is downloaded: get {PUBLISHER}")
    notes = {
        part: "official numbers, images unchecked"
        if (len(listed[part]), len(classes)) == (count, CLASSES)
        else f"differs: {len(listed[part])} images in {len(classes)} classes, not {count} in {CLASSES}"
        for part, count in PARTS.items()
    }
    if odd := [f"{part} {note}" for part, note in notes.items() if note.startswith("differs")]:
        message = f"{TITLE}: not the published content, results will differ: {', '.join(odd)}"
        warnings.warn(message, DataDiffers, stacklevel=2)
    return Listed(classes, listed["train"], listed["val"], notes)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("ImageNet needs Pillow to decode images: pip install 'offbeat[tasks]'") from error
    return Image


def _net(model: str, classes: int) -> nn.Module:
    return MODELS[model](classes, *SHADES)
