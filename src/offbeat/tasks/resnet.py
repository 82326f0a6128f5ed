"""Residual networks for images, as their papers define them; pixels go in as bytes and are normalised inside."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Numbers = tuple[float, float, float]


class Classifier(nn.Module):
    """What the nets here share: ``uint8 Tensor[n, 3, h, w]`` in, scores ``Tensor[n, classes]`` out.

    Pixels are normalised here, not in advance: kept as bytes they take a quarter of the memory.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, stem: nn.Module, body: nn.Module, head: nn.Linear, mean: Numbers, std: Numbers) -> None:
        """``mean`` and ``std`` are those of the three colours of the training set, with pixels scaled to 0..1."""
        super().__init__()
        self.stem, self.body, self.head = stem, body, head
        for name, numbers in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(numbers).view(3, 1, 1), persistent=False)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pixels: Tensor) -> Tensor:
        x = (pixels.to(self.mean.dtype) / 255 - self.mean) / self.std
        return self.head(self.body(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


def resnet20(classes: int, mean: Numbers, std: Numbers) -> Classifier:
    """ResNet-20 for 32 x 32 images: 16, 32 and 64 channels, three blocks each, 269,722 parameters for 10 classes.

    He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition. arXiv:1512.03385, section 4.2, with its
    shortcuts without parameters (option A).
    """
    body = _stages(16, [(16, 3, 1), (32, 3, 2), (64, 3, 2)], lambda c, w, s: Basic(c, w, s, Padded(w, s)))
    return Classifier(_small_stem(16), body, nn.Linear(64, classes), mean, std)


def resnet18(classes: int, mean: Numbers, std: Numbers) -> Classifier:
    """ResNet-18 with a 3 x 3 stem for 32 x 32 images: 11,173,962 parameters for 10 classes.

    The net of the CIFAR experiments of SlowMo (Wang, Tantia, Ballas, Rabbat, arXiv:1910.00643): the ImageNet net of
    arXiv:1512.03385 with stride 1 and no pooling at the start, and projections (option B) where the shape changes.
    """
    body = _stages(
        64, [(64, 2, 1), (128, 2, 2), (256, 2, 2), (512, 2, 2)], lambda c, w, s: Basic(c, w, s, _project(c, w, s))
    )
    return Classifier(_small_stem(64), body, nn.Linear(512, classes), mean, std)


def wrn_16_4(classes: int, mean: Numbers, std: Numbers) -> Classifier:
    """Wide ResNet 16-4 without dropout: 64, 128 and 256 channels, two blocks each, 2,748,890 parameters for 10 classes.

    Zagoruyko, Komodakis. Wide Residual Networks. arXiv:1605.07146.
    """
    body = _stages(16, [(64, 2, 1), (128, 2, 2), (256, 2, 2)], Wide)
    end = nn.Sequential(body, nn.BatchNorm2d(256), nn.ReLU())
    return Classifier(nn.Conv2d(3, 16, 3, padding=1, bias=False), end, nn.Linear(256, classes), mean, std)


def resnet50(classes: int, mean: Numbers, std: Numbers) -> Classifier:
    """ResNet-50 for ImageNet: 25,557,032 parameters for 1000 classes.

    arXiv:1512.03385, with the stride in the 3 x 3 convolution as in torchvision (He et al. have it in the first 1 x 1).
    """
    stages = [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)]
    stem = nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)
    )
    return Classifier(stem, _stages(64, stages, Bottleneck, Bottleneck.GROWTH), nn.Linear(2048, classes), mean, std)


class Basic(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity() if channels == width and stride == 1 else shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut; gives four times ``width`` channels."""

    GROWTH = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = self.GROWTH * width
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(out)
        self.shortcut = nn.Identity() if channels == out and stride == 1 else _project(channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


class Wide(nn.Module):
    """Two 3 x 3 convolutions, each after its normalisation and ReLU; where the shape changes the shortcut is 1 x 1."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False) if channels != width else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        kept = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(F.relu(self.norm2(self.conv1(y)))) + kept  # type: ignore[no-any-return]


class Padded(nn.Module):
    """Option A: every ``stride``-th pixel, and zeros for the new channels, half of them on either side."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.width, self.stride = width, stride

    def forward(self, x: Tensor) -> Tensor:
        more = self.width - x.shape[1]
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, more // 2, more - more // 2))


def _project(channels: int, width: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))


def _small_stem(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


def _stages(
    channels: int, stages: list[tuple[int, int, int]], block: Callable[[int, int, int], nn.Module], growth: int = 1
) -> nn.Sequential:
    """Stages of (width, blocks, stride of the first); a block gives ``growth`` times its width channels."""
    blocks = []
    for width, count, stride in stages:
        for k in range(count):
            blocks.append(block(channels, width, stride if k == 0 else 1))
            channels = width * growth
    return nn.Sequential(*blocks)
