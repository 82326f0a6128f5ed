"""Images, language and translation: the nets are the papers', the files are what they claim to be, all is repeatable."""

from __future__ import annotations

import hashlib
import math
import pickle
import re
import struct
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offbeat.cli import main
from offbeat.core.problem import Problem
from offbeat.experiment import Comparison
from offbeat.tasks import (
    TASKS,
    Cifar10,
    Cifar100,
    DataCorrupt,
    DataDiffers,
    DataMissing,
    Digits,
    ImageNet,
    Multi30k,
    Quadratic,
    Recipe,
    Supervised,
    TimeOnly,
    TinyShakespeare,
    WikiText2,
    WikiText103,
    Wmt16EnDe,
    catalogue,
    cifar,
    data,
    imagenet,
    language,
    translation,
)
from offbeat.tasks.resnet import resnet18, resnet20, resnet50, wrn_16_4
from offbeat.tasks.transformer import BOS, EOS, PAD, UNK, LanguageModel, Translator, next_token_loss, trim

np = pytest.importorskip("numpy")

differs = pytest.mark.filterwarnings("ignore::offbeat.tasks.DataDiffers")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_words(n: int, seed: int, vocabulary: int = 12) -> list[str]:
    return [LETTERS[k] * 2 for k in torch.randint(vocabulary, (n,), generator=generator(seed)).tolist()]


# --- small sets in the official layouts


def batch(n: int, seed: int, key: str, classes: int, as_bytes: bool = True) -> dict[Any, Any]:
    pixels = torch.randint(256, (n, 3072), generator=generator(seed), dtype=torch.uint8).numpy()
    labels = torch.randint(classes, (n,), generator=generator(seed + 1)).tolist()
    table = {"batch_label": "batch", "data": pixels, key: labels, "filenames": ["a.png"] * n}
    return {k.encode(): v for k, v in table.items()} if as_bytes else table


def put_cifar10(root: Path, n: int = 8, protocol: int = 2) -> Path:
    place = root / "cifar-10-batches-py"
    place.mkdir(parents=True)
    for k, name in enumerate(cifar.CIFAR10.files):
        (place / name).write_bytes(pickle.dumps(batch(n, k, "labels", 10), protocol=protocol))
    return place


def put_cifar100(root: Path, n: int = 30) -> Path:
    place = root / "cifar-100-python"
    place.mkdir(parents=True)
    for k, name in enumerate(("train", "test")):
        table = batch(n, k, "fine_labels", 100, as_bytes=False) | {"coarse_labels": [0] * n}
        (place / name).write_bytes(pickle.dumps(table, protocol=2))
    return place


def put_wikitext(root: Path, name: str) -> Path:
    place = root / name
    place.mkdir(parents=True)
    for seed, part in enumerate(("train", "valid", "test")):
        lines = [" " + " ".join(random_words(9, 10 * k + seed)) + " " for k in range(40)]
        (place / f"wiki.{part}.tokens").write_text("\n".join(lines) + "\n", "utf-8")
    return place


def put_shakespeare(root: Path) -> Path:
    place = root / "tinyshakespeare"
    place.mkdir(parents=True)
    (place / "input.txt").write_text("To be, or not to be: that is the question.\n" * 60, "utf-8")
    return place


def put_pairs(root: Path, folder: str, names: list[str], n: int = 24) -> Path:
    """The "German" of a word is the word backwards and in capitals."""
    place = root / folder
    place.mkdir(parents=True)
    for seed, (source, target) in enumerate(zip(names[::2], names[1::2], strict=True)):
        lines = [random_words(3 + k % 3, 100 * seed + k) for k in range(n)]
        (place / source).write_text("\n".join(" ".join(line) for line in lines) + "\n", "utf-8")
        (place / target).write_text(
            "\n".join(" ".join(w.upper() for w in line[::-1]) for line in lines) + "\n", "utf-8"
        )
    return place


def put_imagenet(root: Path, images: int = 3) -> Path:
    from PIL import Image

    place = root / "imagenet"
    for part in ("train", "val"):
        for k, wnid in enumerate(("n01440764", "n01443537")):
            (place / part / wnid).mkdir(parents=True)
            for j in range(images):
                pixels = torch.randint(256, (40 + 5 * j, 60 - 7 * j, 3), generator=generator(j + 10 * k))
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(place / part / wnid / f"{wnid}_{j}.JPEG")
    return place


@pytest.fixture
def away(monkeypatch, tmp_path):
    monkeypatch.setenv("OFFBEAT_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def small_sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    put_cifar10(root)
    put_cifar100(root)
    put_wikitext(root, "wikitext-2")
    put_wikitext(root, "wikitext-103")
    put_shakespeare(root)
    put_pairs(root, "multi30k", list(translation.MULTI30K.files))
    put_pairs(root, "wmt16_en_de_bpe32k", list(translation.WMT16.files))
    pytest.importorskip("PIL")
    put_imagenet(root)
    return root


@pytest.fixture
def small(monkeypatch, small_sets):
    monkeypatch.setenv("OFFBEAT_DATA", str(small_sets))
    return small_sets


NET = {"dim": 16, "layers": 1, "heads": 2, "dropout": 0.2}
SMALL: list[Recipe] = [
    Cifar10(batch=4),
    Cifar10(batch=2, augment=False, eval_images=4, dtype="float64"),
    Cifar100(batch=4, eval_images=10),
    WikiText2(batch=3, context=8, eval_windows=5, **NET),
    WikiText103(batch=3, context=8, **NET),
    TinyShakespeare(batch=3, context=8, eval_windows=7, **NET),
    Multi30k(batch=3, min_count=1, longest=6, eval_sentences=4, **NET),
    Wmt16EnDe(batch=3, longest=5, eval_sentences=4, **NET),
    ImageNet(model="resnet20", batch=2, size=32, eval_images=3),
]
tasks = pytest.mark.parametrize("task", SMALL, ids=lambda t: type(t).__name__ + ("64" if t.dtype == "float64" else ""))


# --- every task


@differs
@tasks
def test_a_gradient_is_a_pure_function(small, task):
    a, b = task, pickle.loads(pickle.dumps(replace(task)))
    assert isinstance(a, Problem)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    x = a.x0()
    y = x + 0.01
    calls = [(x, 0, 0), (y, 0, 1), (x, 1, 0), (x, 0, 9)]
    first = [a.grad(*call) for call in calls]
    evaluated = a.evaluate(x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    for call, (g, loss) in reversed(list(zip(calls, first, strict=True))):
        for again in (a.grad(*call), b.grad(*call)):
            assert torch.equal(again[0], g)
            assert torch.equal(again[1], loss)
    assert a.evaluate(x) == evaluated == b.evaluate(x)
    assert all(math.isfinite(v) for v in evaluated.values())
    g, loss = first[0]
    assert g.shape == x.shape
    assert g.dtype == x.dtype == getattr(torch, task.dtype)
    assert g.norm() > 0
    for i, (one, _) in enumerate(first):
        assert not any(torch.equal(one, other) for other, _ in first[:i])
    assert not torch.equal(replace(task, seed=1).x0(), x)
    down = x - 1e-3 * g / g.norm()
    assert a.grad(down, 0, 0)[1] < loss, "the gradient points uphill"


@differs
@pytest.mark.parametrize("task", [*SMALL, Digits(), Quadratic(), TimeOnly()], ids=lambda t: type(t).__name__)
def test_every_task_can_be_compared_on_eight_workers(small, task, tmp_path):
    argv = ["compare", "--task", type(task).__name__.lower(), "--methods", "asgd", "local-sgd", "--workers", "8"]
    argv += ["--seeds", "0", "--gradients", "16", "--evaluations", "2", "--jobs", "1", "--out", str(tmp_path)]
    for f in fields(task):
        value = getattr(task, f.name)
        if value != f.default:
            flag = f.name.replace("_", "-")
            argv += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    assert main(argv) == 0
    comparison = Comparison.read(tmp_path)
    assert comparison.header["task"] == repr(task)
    assert [len(cell.trace) for cell in comparison.cells] == [16, 16]
    assert not any(cell.failure for cell in comparison.cells)
    assert (tmp_path / "index.html").is_file()


@differs
@tasks
def test_tasks_print_compare_and_pickle(small, task):
    again = eval(repr(task), {type(task).__name__: type(task)})
    assert again == task
    assert hash(again) == hash(task)
    assert replace(task, seed=9) != task
    task.x0()
    assert len(pickle.dumps(task)) < 500, "what was built stays behind"
    assert pickle.loads(pickle.dumps(task)) == task


@tasks
def test_missing_data_says_what_to_get_and_where_to_put_it(away, task):
    where = task.data()
    assert not where.present
    assert not where.found
    with pytest.raises(DataMissing, match="Nothing is downloaded") as error:
        replace(task).x0()
    message = str(error.value)
    for part in (where.missing[0], str(where.folders[0]), "OFFBEAT_DATA", where.publisher):
        assert part in message


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (partial(Cifar10, model="resnet21"), "Cifar10.model = 'resnet21': choose one of resnet20"),
        (partial(Cifar10, batch=50_001), "Cifar10.batch = 50001: choose 1 to 50000"),
        (partial(Cifar10, augment=1), "Cifar10.augment = 1: choose True"),
        (partial(Cifar100, eval_images=0), "Cifar100.eval_images = 0: must be"),
        (partial(Cifar100, dtype="half"), "Cifar100.dtype = 'half': choose"),
        (partial(WikiText2, dim=130), "WikiText2.dim = 130: choose a multiple of heads = 4"),
        (partial(WikiText2, dropout=1.0), "WikiText2.dropout = 1.0: choose"),
        (partial(WikiText103, dropout=math.nan), "WikiText103.dropout = nan: choose"),
        (partial(TinyShakespeare, context=0), "TinyShakespeare.context = 0: must be"),
        (partial(TinyShakespeare, seed="a"), "TinyShakespeare.seed = 'a': choose"),
        (partial(Multi30k, min_count=0), "Multi30k.min_count = 0: must be"),
        (partial(Multi30k, eval_sentences=-1), "Multi30k.eval_sentences = -1: must be"),
        (partial(Wmt16EnDe, heads=3), "Wmt16EnDe.dim = 512: choose a multiple of heads = 3"),
        (partial(ImageNet, size=31), "ImageNet.size = 31: must be"),
        (partial(ImageNet, model="vgg"), "ImageNet.model = 'vgg': choose"),
    ],
)
def test_bad_values_are_refused(make, field):
    with pytest.raises(ValueError, match="^" + re.escape(field)):
        make()


@differs
@pytest.mark.parametrize(
    "task",
    [
        WikiText2(batch=1000, context=8),
        WikiText2(context=1000),
        Multi30k(batch=1000),
        ImageNet(batch=1000),
    ],
    ids=repr,
)
def test_sizes_beyond_the_data_are_refused_when_it_is_known(small, task):
    with pytest.raises(ValueError, match=rf"{type(task).__name__}\.(batch|context) = 1000: "):
        task.x0()


def test_the_catalogue_tells_of_every_task_without_reading(small, monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
    entries = {entry.name: entry for entry in catalogue()}
    assert list(entries) == sorted(TASKS)
    for name, entry in entries.items():
        assert entry.task is TASKS[name]
        assert 20 < len(entry.summary) <= 120
    assert entries["quadratic"].where is None
    assert entries["digits"].where is None
    assert not entries["mnist"].where.present
    found = entries["cifar10"].where
    assert found.present
    assert found.found["test_batch"] == small / "cifar-10-batches-py" / "test_batch"
    assert entries["imagenet"].where.found == {p: small / "imagenet" / p for p in ("train", "val")}


# --- nets


def size(make: Callable[[], torch.nn.Module]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters())


GREY = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (partial(resnet20, 10, *GREY), 269_722),  # 0.27 M in He et al., table 6
        (partial(resnet18, 10, *GREY), 11_173_962),
        (partial(wrn_16_4, 10, *GREY), 2_748_890),  # 2.75 M: Zagoruyko and Komodakis
        (partial(resnet50, 1000, *GREY), 25_557_032),
        (partial(resnet20, 100, *GREY), 275_572),
        (partial(resnet18, 100, *GREY), 11_220_132),
        (partial(wrn_16_4, 100, *GREY), 2_772_020),
        (partial(LanguageModel, 33_278, 32, 128, 2, 4, 0.1), 4_660_480),
        (partial(LanguageModel, 267_735, 64, 256, 6, 8, 0.1), 73_295_616),
        (partial(LanguageModel, 65, 64, 128, 4, 4, 0.0), 809_856),
        (partial(Translator, 6278, 8018, 41, 128, 2, 4, 0.1), 2_766_592),
    ],
)
def test_the_nets_have_the_sizes_of_their_papers(make, expected):
    assert size(make) == expected


@pytest.mark.parametrize(
    ("make", "side", "channels"), [(resnet20, 8, 64), (resnet18, 4, 512), (wrn_16_4, 8, 256), (resnet50, 1, 2048)]
)
def test_the_nets_shrink_images_as_their_papers_say(make, side, channels):
    net = make(7, *GREY).eval()
    pixels = torch.randint(256, (2, 3, 32, 32), generator=generator(), dtype=torch.uint8)
    with torch.no_grad():
        assert net.body(net.stem(pixels.float())).shape == (2, channels, side, side)
        assert net(pixels).shape == (2, 7)


def test_pixels_are_normalised_inside():
    net = resnet20(3, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    seen = []
    net.stem.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    net(torch.full((2, 3, 32, 32), 51, dtype=torch.uint8))
    torch.testing.assert_close(seen[0][0, :, 5, 5], torch.tensor([0.1 / 0.5, 0.0, -0.1 / 0.7]))


def test_shortcuts_of_option_a_pick_pixels_and_pad_channels():
    block = resnet20(10, *GREY).body[3]
    x = torch.randn(2, 16, 8, 8, generator=generator())
    y = block.shortcut(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert y[:, :8].count_nonzero() == y[:, 24:].count_nonzero() == 0


def test_a_language_model_does_not_see_the_future():
    net = LanguageModel(11, 9, 16, 2, 4, 0.0)
    tokens = torch.randint(11, (3, 9), generator=generator())
    scores = net(tokens)
    assert scores.shape == (3, 9, 11)
    for t in range(1, 9):
        changed = tokens.clone()
        changed[:, t:] = (changed[:, t:] + 1) % 11
        other = net(changed)
        torch.testing.assert_close(other[:, :t], scores[:, :t])
        assert (other[:, t] - scores[:, t]).abs().amax() > 1e-4
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 11
    assert (net(changed)[:, -1] - scores[:, -1]).abs().amax() > 1e-6, "it does see the past"


def pair() -> Tensor:
    source = torch.tensor([[5, 6, 7, EOS, PAD, PAD], [5, EOS, PAD, PAD, PAD, PAD]])
    target = torch.tensor([[BOS, 4, 8, PAD, PAD, PAD], [BOS, 9, PAD, PAD, PAD, PAD]])
    return torch.stack([source, target], 1)


def test_a_translator_sees_the_source_and_the_target_so_far_and_no_padding():
    net = Translator(12, 10, 8, 16, 2, 2, 0.0).double()
    inputs = pair()
    scores = net(inputs)
    assert scores.shape == (2, 3, 10), "cut to the longest target"
    changed = inputs.clone()
    changed[0, 1, 2] = 5
    torch.testing.assert_close(net(changed)[0, :2], scores[0, :2])
    assert (net(changed)[0, 2] - scores[0, 2]).abs().max() > 1e-6
    changed = inputs.clone()
    changed[0, 0, 2] = 11
    assert (net(changed)[0, 0] - scores[0, 0]).abs().max() > 1e-9
    torch.testing.assert_close(net(inputs[1:])[0], scores[1, :2])  # alone, with less padding


def test_greedy_translation_takes_the_most_likely_token_at_each_step():
    torch.manual_seed(3)
    net = Translator(12, 10, 8, 16, 2, 2, 0.0).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(20)
        source = pair()[:, 0]
        out = net.translate(source)
        assert out.shape[1] <= 8
        for row, words in zip(source, out.tolist(), strict=True):
            so_far = [BOS]
            for word in words:
                if so_far[-1] == EOS:
                    assert word == PAD
                    continue
                inputs = torch.zeros(1, 2, 9, dtype=torch.long)
                inputs[0, 0, :6] = row
                inputs[0, 1, : len(so_far)] = torch.tensor(so_far)
                scores = net(inputs)[0, len(so_far) - 1]
                scores[[PAD, BOS, UNK]] = -math.inf
                assert word == int(scores.argmax())
                so_far.append(word)


def test_the_loss_of_padded_targets_is_the_mean_over_tokens():
    scores = torch.randn(2, 3, 10, generator=generator(), dtype=torch.float64)
    targets = torch.tensor([[4, 8, EOS, PAD, PAD], [9, EOS, PAD, PAD, PAD]])
    logs = scores.log_softmax(2)
    expected = -(logs[0, 0, 4] + logs[0, 1, 8] + logs[0, 2, EOS] + logs[1, 0, 9] + logs[1, 1, EOS]) / 5
    torch.testing.assert_close(next_token_loss(scores, targets), expected)
    assert trim(targets).shape == (2, 3)
    assert trim(torch.zeros(2, 4)).shape == (2, 1)


# --- augmentation


def test_crops_and_flips_are_a_pure_function_of_the_generator():
    pixels = torch.randint(256, (64, 3, 32, 32), generator=generator(), dtype=torch.uint8)
    kept = pixels.clone()
    one = cifar.crop_and_flip(pixels, generator(5))
    assert torch.equal(pixels, kept)
    assert torch.equal(cifar.crop_and_flip(pixels, generator(5)), one)
    assert not torch.equal(cifar.crop_and_flip(pixels, generator(6)), one)
    assert one.dtype == torch.uint8
    padded = torch.nn.functional.pad(pixels, (4, 4, 4, 4))
    seen = set()
    for k in range(64):
        matches = [
            (down, right, flip)
            for down in range(9)
            for right in range(9)
            for flip in (False, True)
            if torch.equal(crop(padded[k], down, right, flip), one[k])
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {s[0] for s in seen} == {s[1] for s in seen} == set(range(9))
    assert 20 < sum(s[2] for s in seen) < 44


def crop(image: Tensor, down: int, right: int, flip: bool) -> Tensor:
    part = image[:, down : down + 32, right : right + 32]
    return part.flip(2) if flip else part


@differs
def test_only_training_images_are_augmented(small):
    task, still = Cifar10(batch=4), Cifar10(batch=4, augment=False)
    assert not torch.equal(task.problem.minibatch(0, 0)[0], still.problem.minibatch(0, 0)[0])
    assert task.problem.train[0] is still.problem.train[0], "held once per process, as bytes"
    assert task.problem.train[0].dtype == torch.uint8
    assert task.problem.test[0].shape == (8, 3, 32, 32)


def test_random_parts_stay_inside_and_have_the_papers_proportions():
    g = generator()
    areas, ratios = [], []
    for _ in range(2000):
        left, upper, right, lower = imagenet.random_part(400, 300, g)
        assert 0 <= left < right <= 400
        assert 0 <= upper < lower <= 300
        areas.append((right - left) * (lower - upper) / 120_000)
        ratios.append((right - left) / (lower - upper))
    assert 0.075 < min(areas) < 0.1
    assert max(areas) > 0.9
    assert 0.74 < min(ratios) < 0.8
    assert 1.28 < max(ratios) < 1.34
    assert imagenet.random_part(1000, 10, g) == pytest.approx((493.333, 0, 506.667, 10), abs=1e-3)
    assert imagenet.center(500, 400, 224) == (75, 25, 425, 375)


# --- CIFAR's files


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_cifar10_is_read_in_the_official_layout(away, protocol):
    place = put_cifar10(away, protocol=protocol)
    task = Cifar10(batch=4)
    with pytest.warns(DataDiffers, match="CIFAR-10: not the published content") as caught:
        loaded = cifar.load10(away)
    assert len(caught) == 1
    contents = {name: (place / name).read_bytes() for name in cifar.CIFAR10.files}
    expected = {n: f"differs: sha256 {hashlib.sha256(c).hexdigest()}" for n, c in contents.items()}
    assert dict(task.provenance) == expected
    assert loaded.train[0].shape == (40, 3, 32, 32)
    third = batch(8, 2, "labels", 10)
    assert torch.equal(loaded.train[0][16:24].flatten(1), torch.from_numpy(third[b"data"]))
    assert loaded.train[1][16:24].tolist() == third[b"labels"]
    assert loaded.test[1].tolist() == batch(8, 5, "labels", 10)[b"labels"]


def python2(n: int, black: bool = False) -> tuple[bytes, bytes, list[int]]:
    """A batch as Python 2 and numpy 1 wrote it, opcode by opcode; its pixels and labels."""

    def text(s: str) -> bytes:
        return b"U" + bytes([len(s)]) + s.encode()

    pixels = bytes(n * 3072) if black else bytes(torch.randint(256, (n * 3072,), generator=generator(9)).tolist())
    labels = [k % 10 for k in range(n)]
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text("b") + b"\x87R"
    kind = (
        b"cnumpy\ndtype\n"
        + text("u1")
        + b"K\x00K\x01\x87R(K\x03"
        + text("|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    state = (
        b"(K\x01"
        + b"K"
        + bytes([n])
        + b"M\x00\x0c\x86"
        + kind
        + b"\x89T"
        + struct.pack("<i", len(pixels))
        + pixels
        + b"tb"
    )
    items = text("data") + array + state + text("labels") + b"](" + b"".join(b"K" + bytes([k]) for k in labels) + b"e"
    return b"\x80\x02}(" + text("batch_label") + text("training batch 1 of 5") + items + b"u.", pixels, labels


def test_cifars_python_2_pickles_are_read(away):
    content, pixels, labels = python2(5)
    assert pickle.loads(content, encoding="bytes")[b"data"].tobytes() == pixels, "the test writes what numpy reads"
    images, numbers = cifar.read(data.File("batch", content, ""), "labels", 10)
    assert bytes(images.flatten().tolist()) == pixels
    assert numbers.tolist() == labels


def test_matching_cifar_is_official_by_its_md5_and_silent(away, monkeypatch):
    place = put_cifar100(away)
    hashes = {name: hashlib.md5((place / name).read_bytes()).hexdigest() for name in cifar.CIFAR100.files}
    monkeypatch.setattr(cifar, "CIFAR100", replace(cifar.CIFAR100, files=hashes))
    task = Cifar100(batch=4)
    assert set(task.provenance.values()) == {"official"}
    assert task.problem.train[1].max() > 20, "the fine labels"


class Hostile:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("inside", [True, False])
def test_a_hostile_pickle_is_refused_and_runs_nothing(away, protocol, inside):
    import os

    place = put_cifar10(away)
    trace = away / "ran"
    for attack in (
        Hostile(os.system, f"touch {trace}"),
        Hostile(eval, f"open({str(trace)!r}, 'w')"),
        Hostile(os.mkdir, str(trace)),
        Hostile(np.fromfile, str(trace)),
    ):
        table = batch(8, 0, "labels", 10)
        content = pickle.dumps(table | {b"labels": attack} if inside else attack, protocol=protocol)
        (place / "data_batch_1").write_bytes(content)
        with pytest.raises(DataCorrupt, match=r"it names .*, which no file of this set does"):
            Cifar10().x0()
        assert not trace.exists()


def encoded(value: Any) -> bytes:
    return pickle.dumps(value, protocol=2)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no pickle of images"),
        (b"<html>moved</html>", "no pickle of images"),
        (encoded(batch(8, 0, "labels", 10))[:9000], "no pickle of images"),
        (encoded([1, 2]), "it holds a list"),
        (encoded({b"data": 1}), "it has no 'labels'"),
        (encoded(batch(8, 0, "labels", 10) | {b"data": 3}), "no array of bytes"),
        (encoded(batch(8, 0, "labels", 10) | {b"data": np.zeros((8, 3072))}), "no array of bytes"),
        (encoded(batch(8, 0, "labels", 10) | {b"data": np.zeros((8, 3000), "u1")}), r"\[8, 3000\], not of \[n, 3072\]"),
        (encoded(batch(8, 0, "labels", 10) | {b"labels": [0] * 7}), "7 labels for 8 images"),
        (encoded(batch(8, 0, "labels", 10) | {b"labels": [10] * 8}), "labels 0 to 9"),
        (encoded(batch(8, 0, "labels", 10) | {b"labels": [1.0] * 8}), "labels 0 to 9"),
        (python2(5)[0].replace(b"M\x00\x0c\x86", b"M\x00\x0d\x86"), r"array of \[5, 3328\] has 15360 values"),
    ],
)
def test_impossible_cifar_is_refused(away, content, reason):
    place = put_cifar10(away)
    (place / "test_batch").write_bytes(content)
    with pytest.raises(DataCorrupt, match=reason) as error:
        Cifar10().x0()
    message = str(error.value)
    assert str(place / "test_batch") in message
    assert f"Its md5 is {hashlib.md5(content).hexdigest()}" in message
    assert cifar.CIFAR10.files["test_batch"] in message


def test_a_changed_byte_is_read_or_refused_and_nothing_else():
    content, pixels, _ = python2(3, black=True)
    start = content.index(pixels)
    places = [*range(start), *range(start + len(pixels), len(content))]
    draw = torch.randint(256, (len(places), 3), generator=generator()).tolist()
    refused = 0
    for place, values in zip(places, draw, strict=True):
        for value in values:
            changed = content[:place] + bytes([value]) + content[place + 1 :]
            if bytes([value]) in b"rj":  # indices of any size
                continue
            try:
                images, labels = cifar.read(data.File("batch", changed, ""), "labels", 10)
                assert images.shape == (len(labels), 3, 32, 32)
            except DataCorrupt:
                refused += 1
    assert refused > len(places)
    # An object made without its arguments: NEWOBJ instead of a call.
    for content in (
        b"\x80\x02}cnumpy\nndarray\n)\x81K\x01s.",
        b"\x80\x02}c_codecs\nencode\n)\x81K\x01s.",
        b"\x80\x02cnumpy\ndtype\n}b.",
    ):
        with pytest.raises(DataCorrupt):
            cifar.read(data.File("batch", content, ""), "labels", 10)


# --- text


def test_words_are_numbered_in_the_order_of_the_training_text(away):
    place = away / "wikitext-2"
    place.mkdir()
    (place / "wiki.train.tokens").write_text(" \n = A\u2028title = \n b a <unk> b \n", "utf-8")
    (place / "wiki.test.tokens").write_text("b new\n", "utf-8")
    with pytest.warns(DataDiffers, match="WikiText-2"):
        corpus = language.words("wikitext-2", away)
    assert corpus.vocabulary == ("<eos>", "<unk>", "=", "A", "title", "b", "a")
    assert corpus.train.tolist() == [0, 2, 3, 4, 2, 0, 5, 6, 1, 5, 0]
    assert corpus.test.tolist() == [5, 1, 0]


def test_windows_follow_each_other_and_targets_are_one_further():
    inputs, targets = language.windows(torch.arange(11), 3)
    assert inputs.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert torch.equal(targets, inputs + 1)
    assert len(language.windows(torch.arange(9), 3)[0]) == 2, "every token needs a successor"


@differs
def test_language_figures_are_what_they_say(small):
    task = TinyShakespeare(batch=3, context=8, dtype="float64", **NET)
    p = task.problem
    assert len(p.train[0]) == 60 * 43 * 9 // 10 // 8
    figures = task.evaluate(task.x0())
    assert figures["bits"] == pytest.approx(figures["loss"] / math.log(2))
    net = p._live.module.eval()
    scores = net(p.test[0]).log_softmax(2)
    expected = -scores.gather(2, p.test[1].long()[..., None]).mean()
    assert figures["loss"] == pytest.approx(expected.item())
    wiki = WikiText2(batch=3, context=8, eval_windows=5, **NET)
    figures = wiki.evaluate(wiki.x0())
    assert set(figures) == {"loss", "perplexity"}
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    assert len(wiki.problem.test[0]) == 5
    assert set(WikiText103(context=8).provenance) == {"wiki.train.tokens", "wiki.test.tokens"}
    assert all(note.startswith("unchecked: sha256 ") for note in WikiText103(context=8).provenance.values())


@pytest.mark.parametrize("content", [b"", b" \n \n", b"\xff\xfe\x00", "é".encode()[:1]])
def test_what_is_no_text_is_refused(away, content):
    put_shakespeare(away)
    put_wikitext(away, "wikitext-2")
    put_pairs(away, "multi30k", list(translation.MULTI30K.files))
    for path, task in (
        ("tinyshakespeare/input.txt", TinyShakespeare()),
        ("wikitext-2/wiki.test.tokens", WikiText2()),
        ("multi30k/train.de", Multi30k()),
    ):
        (away / path).write_bytes(content)
        with pytest.raises(DataCorrupt, match=r"it is no UTF-8 text|it has no words") as error:
            task.x0()
        assert str(away / path) in str(error.value)


def test_tokens_are_words_with_their_hyphens_and_marks_alone():
    text = "Two men's T-shirts, e.g. \u201eblau-weiß\u201c - ok!"
    tokens = translation.TOKEN.findall(text)
    assert tokens == [
        "Two",
        "men's",
        "T-shirts",
        ",",
        "e",
        ".",
        "g",
        ".",
        "\u201e",
        "blau-weiß",
        "\u201c",
        "-",
        "ok",
        "!",
    ]


def test_vocabularies_have_frequent_words_first_and_no_marks_twice():
    words = ["b", "a", "b", "c", "<unk>", "<unk>", "a", "b"]
    assert translation.vocabulary(words, 2) == ("<pad>", "<s>", "</s>", "<unk>", "b", "a")
    assert translation.vocabulary(words, 1)[4:] == ("b", "a", "c")


@differs
def test_pairs_are_padded_and_end_with_their_marks(away):
    place = put_pairs(away, "multi30k", list(translation.MULTI30K.files))
    for name, text in {"train.en": "a b c\na b c d\nb\n\n", "train.de": "A B\nB\n\nA\n"}.items():
        (place / name).write_text(text, "utf-8")
    corpus = translation.load("multi30k", away, 1, 3)
    assert len(corpus.train) == 1, "too long or empty pairs are left out"
    inputs, targets = corpus.train[0]
    assert inputs.tolist() == [[4 + 1, 4, 4 + 2, EOS], [BOS, 4, 5, PAD]]
    assert targets.tolist() == [4, 5, EOS, PAD]
    assert len(corpus.test) == 24
    assert corpus.test[2][1].dtype == torch.int32
    (place / "train.de").write_text("A\n", "utf-8")
    with pytest.raises(DataCorrupt, match=r"it has 1 lines, .*train\.en has 4"):
        translation.load("multi30k", away, 1, 4)


def test_bleu_of_a_perfect_copy_is_100():
    pytest.importorskip("sacrebleu")
    text = ["Ein Mann schläft auf einer grünen Couch.", "Zwei Hunde spielen im Schnee, sagt man."]
    assert translation.bleu(text, text) == pytest.approx(100)
    joined = [" ".join(translation.TOKEN.findall(line)) for line in text]
    assert translation.bleu(joined, text) == pytest.approx(100), "our tokens are no finer than sacrebleu's"
    assert translation.bleu(joined, joined, tokenised=True) == pytest.approx(100)
    assert translation.bleu(text[::-1], text) < 10


def test_text_comes_back_from_numbers():
    vocabulary = ("<pad>", "<s>", "</s>", "<unk>", "Schnee@@", "mann", "ist", "da@@")
    assert translation.words([4, 5, 6, EOS, 5], vocabulary) == "Schneemann ist"
    assert translation.words([6, 7], vocabulary) == "ist da"
    assert translation.words([], vocabulary) == ""


@differs
def test_a_translator_learns_and_its_figures_are_what_they_say(small):
    pytest.importorskip("sacrebleu")
    task = Multi30k(batch=24, min_count=1, longest=6, dim=32, layers=1, heads=2, dropout=0.0, eval_sentences=24)
    p = replace(task.problem, test=task.problem.train)
    score = translation._Score(
        task.problem.finish.corpus._replace(
            test=task.problem.train,
            references=tuple((small / "multi30k" / "train.de").read_text("utf-8").split("\n")[:-1]),
        ),
        24,
        False,
    )
    p = replace(p, finish=score)
    x = p.x0()
    before = p.evaluate(x)
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(1, 151):
        g = p.grad(x, 0, step)[0]
        m, v = m.lerp(g, 0.1), v.lerp(g * g, 0.01)
        x = x - 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
    after = p.evaluate(x)
    assert set(after) == {"loss", "bleu"}
    assert before["bleu"] < 10
    assert after["bleu"] > 90
    # One batch of all is the whole set, so that its loss is the mean over all tokens.
    assert after["loss"] == pytest.approx(float(p.grad(x, 0, 0)[1]), rel=1e-4)
    assert set(replace(task, eval_sentences=0).evaluate(x)) == {"loss"}


@differs
def test_without_sacrebleu_an_evaluation_says_what_to_install(small, monkeypatch):
    task = Multi30k(batch=3, min_count=1, longest=6, eval_sentences=2, **NET)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    x = task.x0()
    task.grad(x, 0, 0)
    with pytest.raises(ImportError, match=r"offbeat\[tasks\]"):
        task.evaluate(x)


# --- ImageNet's folders


@differs
def test_imagenet_is_read_from_class_folders(away):
    pytest.importorskip("PIL")
    place = put_imagenet(away)
    (place / "train" / "readme.txt").write_text("no class", "utf-8")
    (place / "train" / "n01440764" / "notes.txt").write_text("no image", "utf-8")
    task = ImageNet(batch=2, size=64, eval_images=4)
    with pytest.warns(DataDiffers, match=r"train differs: 6 images in 2 classes, not 1281167 in 1000"):
        p = task.problem
    assert task.provenance["val"] == "differs: 6 images in 2 classes, not 50000 in 1000"
    assert len(p.train) == 6
    assert len(p.test) == 4
    assert p.test[0][0].shape == (3, 64, 64)
    assert [p.train[k][1] for k in range(6)] == [0, 0, 0, 1, 1, 1]
    assert len({tuple(p.train[0][0].flatten().tolist()) for _ in range(3)}) == 3, "cut at random"
    assert torch.equal(p.test[1][0], p.test[1][0])
    x = task.x0()
    assert x.numel() == 25_557_032 - 998 * 2049
    g, loss = task.grad(x, 0, 0)
    assert math.isfinite(loss)
    again, _ = task.grad(x, 0, 0)
    assert torch.equal(again, g)
    assert task.grad(x - 1e-3 * g / g.norm(), 0, 0)[1] < loss


@differs
def test_damaged_images_and_folders_are_refused(away):
    pytest.importorskip("PIL")
    place = put_imagenet(away)
    bad = place / "val" / "n01440764" / "n01440764_0.JPEG"
    bad.write_bytes(bad.read_bytes()[:300])
    task = ImageNet(model="resnet20", batch=2, size=32)
    with pytest.raises(DataCorrupt, match=r"n01440764_0\.JPEG: it cannot be decoded"):
        task.evaluate(task.x0())
    imagenet.scan.cache_clear()
    (place / "train" / "n09999999").mkdir()
    with pytest.raises(DataCorrupt, match="n09999999 is in one only"):
        ImageNet(batch=2).x0()


def test_without_pillow_imagenet_says_what_to_install(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"offbeat\[tasks\]"):
        ImageNet().x0()


# --- new parts of Supervised


def test_an_evaluation_can_be_finished_and_cut_in_chunks():
    x = torch.arange(10.0)[:, None]
    seen = []

    def finish(module: torch.nn.Module, means: dict[str, float]) -> dict[str, float]:
        assert not module.training
        assert not torch.is_grad_enabled()
        return {**means, "root": means["loss"] ** 0.5}

    class Line(torch.nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            seen.append(len(inputs))
            return super().forward(inputs)

    loss = torch.nn.functional.mse_loss
    p = Supervised(partial(Line, 1, 1), loss, (x, x), (x, x), batch=5, finish=finish, chunk=4)
    figures = p.evaluate(p.x0())
    assert seen == [4, 4, 2]
    assert figures["root"] == pytest.approx(figures["loss"] ** 0.5)
    plain = replace(p, finish=None, chunk=None)
    assert plain.evaluate(p.x0()) == {"loss": pytest.approx(figures["loss"])}
    with pytest.raises(ValueError, match=r"Supervised\.chunk = 0: choose"):
        replace(p, chunk=0)
    with pytest.raises(ValueError, match=r"Supervised\.finish = 3: give"):
        replace(p, finish=3)


# --- the real sets, where they are


def real(read: Callable[[Path], Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataDiffers)
            return read(data.folder())
    except DataMissing as missing:
        pytest.skip(f"the data set is not here: {missing}")


def test_cifar10_itself():
    loaded = real(cifar.load10)
    assert loaded.train[0].shape == (50_000, 3, 32, 32)
    assert loaded.test[0].shape == (10_000, 3, 32, 32)
    assert loaded.train[1].bincount().tolist() == [5000] * 10
    assert loaded.test[1].bincount().tolist() == [1000] * 10
    assert loaded.train[1][:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    some = loaded.train[0][::10].double() / 255
    assert some.mean((0, 2, 3)).tolist() == pytest.approx(cifar.SHADES10[0], abs=0.01)
    assert some.transpose(0, 1).flatten(1).std(1).tolist() == pytest.approx(cifar.SHADES10[1], abs=0.01)


def test_cifar100_itself():
    loaded = real(cifar.load100)
    assert loaded.train[1].bincount().tolist() == [500] * 100


def test_wikitext2_itself():
    corpus = real(partial(language.words, "wikitext-2"))
    assert set(corpus.provenance.values()) == {"official"}
    assert len(corpus.vocabulary) == 33_278
    assert len(corpus.train) == 2_088_628
    assert len(corpus.test) == 245_569
    assert 0 < int((corpus.test == 1).sum()) < 20_000
    place = data.folder() / "wikitext-2" / "wiki.valid.tokens"
    if place.is_file():
        lines = language._lines(data.File(str(place), place.read_bytes(), ""))
        assert sum(len(line.split()) + 1 for line in lines) == 217_646
    task = WikiText2()
    x = task.x0()
    assert x.numel() == 4_660_480
    assert task.grad(x, 0, 0)[1].item() == pytest.approx(math.log(33_278), abs=0.3)


def test_tiny_shakespeare_itself():
    corpus = real(language.characters)
    assert set(corpus.provenance.values()) == {"official"}
    assert len(corpus.vocabulary) == 65
    assert (len(corpus.train), len(corpus.test)) == (1_003_854, 111_540)
    task = TinyShakespeare(dim=32, layers=1)
    x = task.x0()
    start = task.evaluate(x)["bits"]
    assert start == pytest.approx(math.log2(65), abs=0.1)
    for step in range(40):
        x = x - 0.5 * task.grad(x, 0, step)[0]
    assert task.evaluate(x)["bits"] < 5.2


def test_multi30k_itself():
    corpus = real(lambda folder: translation.load("multi30k", folder, 2, 40))
    assert set(corpus.provenance.values()) == {"official"}
    assert [len(v) for v in corpus.vocabularies] == [6278, 8018]
    assert (len(corpus.train), len(corpus.test), len(corpus.references)) == (28_997, 1000, 1000)
    pytest.importorskip("sacrebleu")
    perfect = [translation.words(corpus.test.sentence(1, k), corpus.vocabularies[1]) for k in range(1000)]
    assert 75 < translation.bleu(perfect, corpus.references) < 99, "only unknown words and punctuation are lost"
    task = Multi30k(eval_sentences=5)
    x = task.x0()
    assert x.numel() == 2_766_592
    assert task.grad(x, 0, 0)[1].item() == pytest.approx(math.log(8018), abs=0.3)
