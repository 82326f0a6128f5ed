"""Translation from English to German: Multi30k and WMT'16, with an encoder-decoder transformer, measured in BLEU.

Each sentence ends with an end token; the target so far is given (teacher forcing), and the loss is the cross-entropy of
its next token. Sentences are padded to the longest of the minibatch. BLEU is sacrebleu's, of greedy translations.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..core.values import require, require_count
from .data import File, Source, Where, folder
from .supervised import Dtype, Recipe, Supervised
from .transformer import BOS, EOS, PAD, UNK, Translator, next_token_loss

MULTI30K = Source(
    title="Multi30k",
    publisher="D. Elliott, S. Frank, K. Sima'an, L. Specia, 'Multi30K: Multilingual English-German Image Descriptions',"
    " arXiv:1605.00459; data/task1/raw of https://github.com/multi30k/dataset",
    folders=("multi30k",),
    files={
        "train.en": "460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6",
        "train.de": "2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72",
        "test_2016_flickr.en": "399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182",
        "test_2016_flickr.de": "4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16",
    },
)
WMT16 = Source(
    title="WMT'16 English-German",
    publisher="the Conference on Machine Translation, https://www.statmt.org/wmt16; as prepared for fairseq's "
    "'Scaling Neural Machine Translation' example, archive wmt16_en_de.tar.gz, unpacked",
    folders=("wmt16_en_de_bpe32k", "wmt16_en_de"),
    files={
        "train.tok.clean.bpe.32000.en": "",
        "train.tok.clean.bpe.32000.de": "",
        "newstest2014.tok.bpe.32000.en": "",
        "newstest2014.tok.bpe.32000.de": "",
    },
)
TOKEN = re.compile(r"\w+(?:[-'\u2019]\w+)*|[^\w\s]")
"""A word, with the hyphens and apostrophes inside it, or any other character by itself."""
SPLIT: dict[str, tuple[Source, Callable[[str], list[str]]]] = {
    "multi30k": (MULTI30K, TOKEN.findall),
    "wmt16": (WMT16, str.split),
}
"""Each corpus and how a line of it becomes tokens. Its files are source and target, of training and of test."""
MARKS = ("<pad>", "<s>", "</s>", "<unk>")
"""What `PAD`, `BOS`, `EOS` and `UNK` stand for."""


@dataclass(frozen=True)
class TranslationTask(Recipe):
    """What the tasks of this file have in common; the defaults are those of `Multi30k`."""

    batch: int = 64
    """Sentence pairs per minibatch, from 1 to those of the training set."""
    min_count: int = 2
    """How often the training text must have a token for it to be in the vocabulary, at least 1."""
    longest: int = 40
    """Tokens of the longest sentence, at least 1: longer ones are left out of training and cut in the test set."""
    dim: int = 128
    """Width of the transformer, a multiple of ``heads``."""
    layers: int = 2
    """Blocks of the encoder and of the decoder, at least 1."""
    heads: int = 4
    """Attention heads per block, at least 1."""
    dropout: float = 0.1
    """Probability of dropout, from 0 to below 1."""
    eval_sentences: int = 200
    """Test sentences that an evaluation translates for BLEU, the first of the set; 0 leaves BLEU out."""
    seed: int = 0
    """Any integer: initial weights, order of the sentences and dropout follow from it."""
    dtype: Dtype = "float32"
    """Floating-point type of the parameters: float32 or float64."""

    def __post_init__(self) -> None:
        for name in ("batch", "min_count", "longest", "dim", "layers", "heads"):
            require_count(self, name)
        require_count(self, "eval_sentences", 0)
        require(self, "dim", self.dim % self.heads == 0, f"choose a multiple of heads = {self.heads}")
        require(self, "dropout", 0 <= self.dropout < 1, "choose 0 or more, less than 1")
        require(self, "seed", isinstance(self.seed, int), "choose an integer")
        require(self, "dtype", self.dtype in ("float32", "float64"), "choose float32 or float64")


@dataclass(frozen=True)
class Multi30k(TranslationTask):
    """Multi30k, 29,000 image descriptions in English and German, with a small transformer that translates them.

    Words and punctuation are tokens, case is kept, and each language has the words that its training text has at least
    ``min_count`` times (6,278 English and 8,018 German by default, with four marks). The model is
    `offbeat.tasks.transformer.Translator`; by default it has 2,766,592 parameters. Trains on sentences of up to
    ``longest`` tokens (by default all but 3). Evaluates on the 2016 Flickr test set (1,000 sentences): ``loss`` in nats
    per token, and ``bleu``, 0 to 100, as sacrebleu computes it by default (13a, mixed case), of the first
    ``eval_sentences``, translated greedily and never into unknown words.

    Looks for the official raw text in ``multi30k/`` of the data folder (see `offbeat.tasks.data`); the first use raises
    `DataMissing` or `DataCorrupt`, or warns `DataDiffers`. An evaluation raises ``ImportError`` where sacrebleu is
    missing. Raises ``ValueError`` for bad fields.
    """

    @classmethod
    def data(cls) -> Where:
        """Where its files were looked for and which are there."""
        return MULTI30K.where(folder())

    def build(self) -> Supervised:
        """The problem with the text of the data folder as it is now."""
        return _build(self, load("multi30k", folder(), self.min_count, self.longest))


@dataclass(frozen=True)
class Wmt16EnDe(TranslationTask):
    """WMT'16 English-German, 4.5 million sentence pairs, with a transformer; the translation task of SlowMo's paper.

    Reads the prepared files of fairseq's "Scaling Neural Machine Translation" (Ott et al., arXiv:1806.00187):
    ``train.tok.clean.bpe.32000.{en,de}`` and ``newstest2014.tok.bpe.32000.{en,de}``, tokenised text in 32,000
    byte-pair units that white space separates, where ``@@`` ends a unit that goes on. By default the model has the
    sizes of the base transformer of arXiv:1706.03762, each language with a vocabulary of its own. Evaluates on newstest2014: ``loss`` in nats per unit, and
    ``bleu``, 0 to 100, of tokenised text with the units joined (sacrebleu without a tokeniser of its own), of the first
    ``eval_sentences``, translated greedily.

    Looks in ``wmt16_en_de_bpe32k/`` of the data folder (see `offbeat.tasks.data`); the first use raises `DataMissing` or
    `DataCorrupt`. No hash is known here, so the provenance says ``unchecked``. An evaluation raises ``ImportError``
    where sacrebleu is missing. Raises ``ValueError`` for bad fields.
    """

    batch: int = 128
    min_count: int = 1
    longest: int = 100
    dim: int = 512
    layers: int = 6
    heads: int = 8

    @classmethod
    def data(cls) -> Where:
        """Where its files were looked for and which are there."""
        return WMT16.where(folder())

    def build(self) -> Supervised:
        """The problem with the text of the data folder as it is now."""
        return _build(self, load("wmt16", folder(), self.min_count, self.longest))


class Corpus(NamedTuple):
    """Sentence pairs as numbers."""

    vocabularies: tuple[tuple[str, ...], tuple[str, ...]]
    """Each token's text by its number, of the source and of the target; the first four are `MARKS`."""
    train: Pairs
    """What is trained on."""
    test: Pairs
    """What is measured on."""
    references: tuple[str, ...]
    """The text of the test set's target, line by line."""
    provenance: dict[str, str]
    """See `offbeat.tasks.data.Loaded`."""


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Sentence pairs: item k is (source and target so far ``int32 Tensor[2, t]``, target ``int32 Tensor[t]``).

    Row 0 is the source and row 1 `BOS` and the target; the target ends with `EOS`; all are padded to ``longest`` + 1.
    Sentences are held without padding, one after another.
    """

    def __init__(self, longest: int) -> None:
        self.width = longest + 1
        self.tokens = (array("i"), array("i"))
        self.ends = (array("q", [0]), array("q", [0]))

    def append(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Add a pair; what is longer than ``longest`` is cut."""
        for tokens, ends, sentence in zip(self.tokens, self.ends, (source, target), strict=True):
            tokens.extend((*sentence[: self.width - 1], EOS))
            ends.append(len(tokens))

    def sentence(self, side: int, k: int) -> list[int]:
        """Sentence ``k`` of the source (side 0) or of the target (side 1), with its `EOS`."""
        ends = self.ends[side]
        return self.tokens[side][ends[k] : ends[k + 1]].tolist()

    def __len__(self) -> int:
        return len(self.ends[0]) - 1

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        source, target = self.sentence(0, k), self.sentence(1, k)
        rows = (source, [BOS, *target[:-1]], target)
        padded = torch.tensor([row + [PAD] * (self.width - len(row)) for row in rows], dtype=torch.int32)
        return padded[:2], padded[2]


@cache
def load(name: str, folder: Path, min_count: int, longest: int) -> Corpus:
    """A parallel text (by its key in `SPLIT`), once per process.

    A vocabulary has the most frequent words first, equally frequent ones in the order of Unicode. Training pairs with
    an empty sentence or one longer than ``longest`` are left out.
    """
    source, split = SPLIT[name]
    names = tuple(source.files)
    files = source.read(folder)
    lines = {name: _lines(files[name]) for name in names}
    for one, other in (names[:2], names[2:]):
        if len(lines[one]) != len(lines[other]):
            raise files[other].corrupt(f"it has {len(lines[other])} lines, {files[one].path} has {len(lines[one])}")
    vocabularies = [vocabulary((w for line in lines[name] for w in split(line)), min_count) for name in names[:2]]
    numbers = [{word: k for k, word in enumerate(words)} for words in vocabularies]

    def read(pair: Sequence[str], training: bool) -> Pairs:
        pairs = Pairs(longest)
        for texts in zip(*(lines[name] for name in pair), strict=True):
            one, other = ([n.get(w, UNK) for w in split(text)] for n, text in zip(numbers, texts, strict=True))
            if not training or (1 <= len(one) <= longest and 1 <= len(other) <= longest):
                pairs.append(one, other)
        return pairs

    train, test = read(names[:2], True), read(names[2:], False)
    if not len(train):
        raise files[names[0]].corrupt(f"no pair of its sentences has 1 to {longest} tokens")
    return Corpus((vocabularies[0], vocabularies[1]), train, test, tuple(lines[names[3]]), source.vouch(files))


def vocabulary(words: Iterable[str], min_count: int) -> tuple[str, ...]:
    """`MARKS`, then the words that come at least ``min_count`` times, the most frequent first."""
    counts = Counter(words)
    kept = sorted((-n, w) for w, n in counts.items() if n >= min_count and w not in MARKS)
    return (*MARKS, *(w for _, w in kept))


def bleu(translations: Sequence[str], references: Sequence[str], tokenised: bool = False) -> float:
    """BLEU of a whole text, 0 to 100, as sacrebleu computes it (Post 2018, arXiv:1804.08771).

    ``tokenised``: words are separated by white space already; else by sacrebleu's tokeniser 13a. Raises ``ImportError``
    where sacrebleu is missing.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise ImportError("BLEU needs sacrebleu: pip install 'offbeat[tasks]', or set eval_sentences=0") from error
    # force: no warning about text that looks tokenised, as ours does.
    metric = BLEU(tokenize="none" if tokenised else "13a", force=True)
    return float(metric.corpus_score(list(translations), [list(references)]).score)


def words(tokens: Iterable[int], vocabulary: Sequence[str]) -> str:
    """The text of token numbers, up to the first `EOS`: separated by blanks, byte-pair units joined."""
    found = []
    for k in tokens:
        if k == EOS:
            break
        found.append(vocabulary[k])
    return (" ".join(found) + " ").replace("@@ ", "").strip()


class _Score:
    """What `Supervised.finish` calls: the loss per token, and BLEU."""

    def __init__(self, corpus: Corpus, sentences: int, tokenised: bool) -> None:
        self.corpus, self.tokenised = corpus, tokenised
        self.sentences = min(sentences, len(corpus.test))

    def __call__(self, module: nn.Module, means: dict[str, float]) -> dict[str, float]:
        figures = {"loss": means["nats"] / means["tokens"]}
        if not self.sentences:
            return figures
        assert isinstance(module, Translator)
        device = module.target.token.weight.device
        found: list[str] = []
        for start in range(0, self.sentences, CHUNK):
            some = range(start, min(start + CHUNK, self.sentences))
            source = torch.stack([self.corpus.test[k][0][0] for k in some]).to(device)
            found += [words(line, self.corpus.vocabularies[1]) for line in module.translate(source).tolist()]
        references = self.corpus.references[: self.sentences]
        if self.tokenised:
            references = tuple((r + " ").replace("@@ ", "").strip() for r in references)
        return {**figures, "bleu": bleu(found, references, self.tokenised)}


CHUNK = 100
"""Sentences per forward pass of an evaluation."""


def _tokens(_: Tensor, targets: Tensor) -> Tensor:
    return (targets != PAD).sum(1).double().mean()


def _nats(scores: Tensor, targets: Tensor) -> Tensor:
    return next_token_loss(scores, targets).double() * _tokens(scores, targets)


def _lines(file: File) -> list[str]:
    lines = file.text().split("\n")
    return lines if lines[-1] else lines[:-1]


def _build(task: TranslationTask, corpus: Corpus) -> Supervised:
    require(task, "batch", task.batch <= len(corpus.train), f"choose 1 to {len(corpus.train)}, the training pairs")
    sizes = [len(words) for words in corpus.vocabularies]
    return Supervised(
        model=partial(
            Translator, sizes[0], sizes[1], task.longest + 1, task.dim, task.layers, task.heads, task.dropout
        ),
        loss=next_token_loss,
        train=corpus.train,
        test=corpus.test,
        batch=task.batch,
        seed=task.seed,
        dtype=getattr(torch, task.dtype),
        provenance=corpus.provenance,
        metrics={"nats": _nats, "tokens": _tokens},
        finish=_Score(corpus, task.eval_sentences, isinstance(task, Wmt16EnDe)),
        chunk=CHUNK,
    )
