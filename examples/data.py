"""Data sets of tensors. MNIST and tiny Shakespeare are read from the user's data folder ($OFFBEAT_DATA); `offbeat tasks`
says where it looks. The digits come with scikit-learn."""

import torch
from torch.utils.data import TensorDataset

from offbeat.tasks.data import folder
from offbeat.tasks.language import characters, windows
from offbeat.tasks.mnist import load


def mnist(examples: int) -> tuple[TensorDataset, TensorDataset]:
    """The first ``examples`` of the training set, and the test set, normalised."""
    data = load(folder())

    def ready(images, labels, count):
        return TensorDataset((images[:count].float() / 255 - 0.1307) / 0.3081, labels[:count])

    return ready(*data.train, examples), ready(*data.test, 10_000)


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,400 images of 8 x 8 as vectors, and 397 to test on."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images).float() / 8 - 1, torch.tensor(labels)
    return TensorDataset(images[:1400], labels[:1400]), TensorDataset(images[1400:], labels[1400:])


def shakespeare(context: int) -> tuple[TensorDataset, TensorDataset, int]:
    """Windows of ``context`` characters and the same one further, to train and to test; how many characters there are."""
    text = characters(folder())

    def ready(tokens):
        return TensorDataset(*(part.long() for part in windows(tokens, context)))

    return ready(text.train), ready(text.test), len(text.vocabulary)
