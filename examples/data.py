"""MNIST as a data set of tensors, read from the user's data folder ($OFFBEAT_DATA); `offbeat tasks` says where it looks."""

from torch.utils.data import TensorDataset

from offbeat.tasks.data import folder
from offbeat.tasks.mnist import load


def mnist(examples: int) -> tuple[TensorDataset, TensorDataset]:
    """The first ``examples`` of the training set, and the test set, normalised."""
    data = load(folder())

    def ready(images, labels, count):
        return TensorDataset((images[:count].float() / 255 - 0.1307) / 0.3081, labels[:count])

    return ready(*data.train, examples), ready(*data.test, 10_000)
