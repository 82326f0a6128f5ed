"""Language models: WikiText-2 and WikiText-103 by words, Tiny Shakespeare by characters, with a small transformer.

An example is a window of ``context`` tokens of the training text; windows follow each other without overlap, and each
token's target is its successor. A minibatch takes windows in the order of the worker's permutation. Evaluation takes
windows spread evenly over the test text; each starts without what came before it, so that figures are a little worse
than those of an evaluation with a sliding window.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.values import require, require_count
from .data import File, Source, Where, folder
from .supervised import Dtype, Recipe, Supervised
from .transformer import LanguageModel

WIKI = (
    "S. Merity, C. Xiong, J. Bradbury, R. Socher, 'Pointer Sentinel Mixture Models', arXiv:1609.07843; "
    "the word-level archive {}-v1.zip, unpacked"
)
WIKITEXT2, WIKITEXT103 = "wikitext-2", "wikitext-103"
SOURCE2 = Source(
    title="WikiText-2",
    publisher=WIKI.format("wikitext-2"),
    folders=("wikitext-2",),
    files={
        "wiki.train.tokens": "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
        "wiki.test.tokens": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
    },
)
SOURCE103 = Source(
    title="WikiText-103",
    publisher=WIKI.format("wikitext-103"),
    folders=("wikitext-103",),
    files={"wiki.train.tokens": "", "wiki.test.tokens": ""},
)
SOURCES = {WIKITEXT2: SOURCE2, WIKITEXT103: SOURCE103}
SHAKESPEARE = Source(
    title="Tiny Shakespeare",
    publisher="A. Karpathy, char-rnn: https://github.com/karpathy/char-rnn, data/tinyshakespeare/input.txt",
    folders=("tinyshakespeare",),
    files={"input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"},
)
END, UNKNOWN = "<eos>", "<unk>"


@dataclass(frozen=True)
class LanguageTask(Recipe):
    """What the tasks of this file have in common; the defaults are those of `WikiText2`."""

    batch: int = 16
    """Windows per minibatch, from 1 to those of the training text."""
    context: int = 32
    """Tokens (words or characters) per window, at least 1."""
    dim: int = 128
    """Width of the transformer, a multiple of ``heads``."""
    layers: int = 2
    """Its blocks, at least 1."""
    heads: int = 4
    """Attention heads per block, at least 1."""
    dropout: float = 0.1
    """Probability of dropout, from 0 to below 1."""
    eval_windows: int = 500
    """Windows of the test text that an evaluation takes, evenly spread, at least 1 (all, if there are fewer)."""
    seed: int = 0
    """Any integer: initial weights, order of the windows and dropout follow from it."""
    dtype: Dtype = "float32"
    """Floating-point type of the parameters: float32 or float64."""

    def __post_init__(self) -> None:
        for name in ("batch", "context", "dim", "layers", "heads", "eval_windows"):
            require_count(self, name)
        require(self, "dim", self.dim % self.heads == 0, f"choose a multiple of heads = {self.heads}")
        require(self, "dropout", 0 <= self.dropout < 1, "choose 0 or more, less than 1")
        require(self, "seed", isinstance(self.seed, int), "choose an integer")
        require(self, "dtype", self.dtype in ("float32", "float64"), "choose float32 or float64")


@dataclass(frozen=True)
class WikiText2(LanguageTask):
    """WikiText-2, two million words of Wikipedia, with a small decoder-only transformer that predicts the next word.

    The vocabulary is that of the training text, 33,278 words with ``<eos>`` after each line; 2,088,628 tokens of
    training (65,269 windows by default) and 245,569 of test text. The model is
    `offbeat.tasks.transformer.LanguageModel`, with weights tied; by default it has 4,660,480 parameters. Cross-entropy
    loss; evaluates ``loss`` in nats per word and ``perplexity``, its exponential. The validation text is not used.

    Looks for the official files in ``wikitext-2/`` of the data folder (see `offbeat.tasks.data`); the first use raises
    `DataMissing` or `DataCorrupt`, or warns `DataDiffers`. Raises ``ValueError`` for bad fields.
    """

    @classmethod
    def data(cls) -> Where:
        """Where its files were looked for and which are there."""
        return SOURCE2.where(folder())

    def build(self) -> Supervised:
        """The problem with the text of the data folder as it is now."""
        return _build(self, words(WIKITEXT2, folder()))


@dataclass(frozen=True)
class WikiText103(LanguageTask):
    """WikiText-103, a hundred million words of Wikipedia, with a decoder-only transformer; else like `WikiText2`.

    Its vocabulary has 267,735 words, and a gradient computes a score for each of them: plan for memory of about
    3 * 4 * batch * context * 267,735 bytes (1.6 GB by default). By default it has 73,295,616 parameters.

    Looks for the official files in ``wikitext-103/`` of the data folder (see `offbeat.tasks.data`); the first use
    raises `DataMissing` or `DataCorrupt`. No hash is known here, so the provenance says ``unchecked``. Raises
    ``ValueError`` for bad fields.
    """

    batch: int = 8
    context: int = 64
    dim: int = 256
    layers: int = 6
    heads: int = 8

    @classmethod
    def data(cls) -> Where:
        """Where its files were looked for and which are there."""
        return SOURCE103.where(folder())

    def build(self) -> Supervised:
        """The problem with the text of the data folder as it is now."""
        return _build(self, words(WIKITEXT103, folder()))


@dataclass(frozen=True)
class TinyShakespeare(LanguageTask):
    """Tiny Shakespeare, a million characters of plays, with a small transformer that predicts the next character.

    65 distinct characters; the first nine tenths (1,003,854, 15,685 windows by default) are for training, the rest
    (111,540) for the test. The model is `offbeat.tasks.transformer.LanguageModel`; by default it has 809,856
    parameters. Cross-entropy loss; evaluates ``loss`` in nats per character and ``bits``, the same in bits per character.

    Looks for the official file in ``tinyshakespeare/`` of the data folder (see `offbeat.tasks.data`); the first use
    raises `DataMissing` or `DataCorrupt`, or warns `DataDiffers`. Raises ``ValueError`` for bad fields.
    """

    batch: int = 32
    context: int = 64
    layers: int = 4
    dropout: float = 0.0

    @classmethod
    def data(cls) -> Where:
        """Where its file was looked for and whether it is there."""
        return SHAKESPEARE.where(folder())

    def build(self) -> Supervised:
        """The problem with the text of the data folder as it is now."""
        return _build(self, characters(folder()))


class Corpus(NamedTuple):
    """A text as numbers."""

    vocabulary: tuple[str, ...]
    """Each token's text, by its number."""
    train: Tensor
    """The training text, ``int32 Tensor[n]``."""
    test: Tensor
    """The test text, ``int32 Tensor[n]``."""
    provenance: dict[str, str]
    """See `offbeat.tasks.data.Loaded`."""


@cache
def words(name: str, folder: Path) -> Corpus:
    """A WikiText set (by its key in `SOURCES`) as words, once per process: lines split at white space, ``<eos>`` after each.

    Words are numbered in the order in which the training text has them. A word that it does not have is ``<unk>``.
    """
    source = SOURCES[name]
    files = source.read(folder)
    train, test = (_lines(files[f"wiki.{part}.tokens"]) for part in ("train", "test"))
    number: dict[str, int] = {END: 0, UNKNOWN: 1}
    for line in train:
        for word in line.split():
            number.setdefault(word, len(number))
    texts = [_numbers((number.get(w, 1) for w in (*line.split(), END)) for line in part) for part in (train, test)]
    return Corpus(tuple(number), texts[0], texts[1], source.vouch(files))


@cache
def characters(folder: Path) -> Corpus:
    """Tiny Shakespeare by characters, once per process; they are numbered in the order of Unicode."""
    files = SHAKESPEARE.read(folder)
    text = files["input.txt"].text()
    cut = len(text) * 9 // 10
    vocabulary = tuple(sorted(set(text)))
    number = {c: k for k, c in enumerate(vocabulary)}
    whole = _numbers([map(number.__getitem__, text)])
    return Corpus(vocabulary, whole[:cut], whole[cut:], SHAKESPEARE.vouch(files))


def windows(tokens: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Windows of a text that follow each other, and the same one token further: both ``Tensor[n, context]``.

    Views of ``tokens: Tensor[k]``, with n = (k - 1) // context; what is left over at the end is left out.
    """
    n = (len(tokens) - 1) // context
    return tokens[: n * context].view(n, context), tokens[1 : n * context + 1].view(n, context)


def loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats per token: scores ``Tensor[n, t, vocabulary]``, targets ``Tensor[n, t]``."""
    return F.cross_entropy(scores.flatten(0, 1), targets.flatten().long())


def perplexity(_: nn.Module, means: dict[str, float]) -> dict[str, float]:
    """The loss and its exponential."""
    return {**means, "perplexity": math.exp(min(means["loss"], 700.0))}


def bits(_: nn.Module, means: dict[str, float]) -> dict[str, float]:
    """The loss, also in bits."""
    return {**means, "bits": means["loss"] / math.log(2)}


def _lines(file: File) -> list[str]:
    lines = file.text().split("\n")  # and at nothing else: the text has other line separators inside its lines
    return lines if lines[-1] else lines[:-1]


def _numbers(parts: Iterable[Iterable[int]]) -> Tensor:
    tokens = array("i")
    for part in parts:
        tokens.extend(part)
    return torch.frombuffer(tokens, dtype=torch.int32)


def _build(task: LanguageTask, corpus: Corpus) -> Supervised:
    train, test = windows(corpus.train, task.context), windows(corpus.test, task.context)
    size = min(len(train[0]), len(test[0]))
    require(task, "context", size > 0, "it is longer than the text, choose less")
    require(task, "batch", task.batch <= len(train[0]), f"choose 1 to {len(train[0])}, the windows of the text")
    chosen = torch.linspace(0, len(test[0]) - 1, min(task.eval_windows, len(test[0])), dtype=torch.float64).long()
    return Supervised(
        model=partial(
            LanguageModel, len(corpus.vocabulary), task.context, task.dim, task.layers, task.heads, task.dropout
        ),
        loss=loss,
        train=train,
        test=(test[0][chosen], test[1][chosen]),
        batch=task.batch,
        seed=task.seed,
        dtype=getattr(torch, task.dtype),
        provenance=corpus.provenance,
        metrics={},
        finish=bits if isinstance(task, TinyShakespeare) else perplexity,
        chunk=max(1, 20_000_000 // (task.context * len(corpus.vocabulary))),  # scores of 80 MB
    )
