"""What is learnt: data, model and loss of each task of equal_time.py."""

import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from .models import CharGPT, GlyphNet

sys.path.insert(0, str(Path(__file__).parents[2]))
from mnist_cnn import make_cnn

# of the training data, held back for the choice of learning rate and batch size
VALIDATION = 2000


@dataclass(frozen=True)
class Images:
    """x: bytes [N, C, H, W], y: [N]."""

    x: Tensor
    y: Tensor

    def part(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.x[indices].float() / 255, self.y[indices]

    def stream(self, batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Mini-batches for ever, in a new order in each epoch."""
        while True:
            order = torch.randperm(len(self.x), generator=generator)
            for indices in order[: len(order) // batch * batch].view(-1, batch):
                yield self.part(indices)

    def first(self, count: int) -> "Images":
        return Images(self.x[:count], self.y[:count])

    def all(self, batch: int = 250) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in torch.arange(len(self.x)).split(batch):
            yield self.part(indices)


@dataclass(frozen=True)
class Text:
    """ids: [length of the text]; an example is a window, and its labels the characters after each of it."""

    ids: Tensor
    window: int

    def at(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        places = starts[:, None] + torch.arange(self.window + 1)
        return self.ids[places[:, :-1]], self.ids[places[:, 1:]]

    def stream(self, batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield self.at(torch.randint(len(self.ids) - self.window, (batch,), generator=generator))

    def first(self, count: int) -> "Text":
        return Text(self.ids[: count * self.window + 1], self.window)

    def all(self, batch: int = 100) -> Iterator[tuple[Tensor, Tensor]]:
        for starts in torch.arange(0, len(self.ids) - self.window, self.window).split(batch):
            yield self.at(starts)


@dataclass(frozen=True)
class Task:
    """One thing to learn; `make_model` draws its weights from torch's generator."""

    name: str
    make_model: Callable[[], nn.Module]
    train: Images | Text
    validation: Images | Text
    test: Images | Text
    optimizer: str  # "sgd" or "adamw"
    # whether its models begin with weights that were trained before
    pretrained: bool = False

    def examples(self, batch: int) -> tuple[Tensor, Tensor]:
        return next(self.train.stream(batch, torch.Generator().manual_seed(0)))


def loss_of(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy; of characters in text as of examples."""
    return F.cross_entropy(outputs.flatten(0, -2), labels.flatten())


def load(name: str, data: str, seed: int, test: int = 4000) -> Task:
    """glyphs, chars, mnist10k, or the name of one of torchvision's classes of labelled images.

    Args:
        data: a folder in torchvision's layout; unused for chars.
        seed: of the run; mnist10k is cross-validated over its 10,000 images, one fold in five by the seed.
        test: how many test images at most.
    """
    if name == "chars":
        return chars()
    if name == "mnist10k":
        parts = [_images("MNIST", data, train) for train in (True, False)]
        x, y = torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts])
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).roll(
            seed % 5 * len(x) // 5
        )
        ours, theirs = order[: -(len(x) // 5)], order[-(len(x) // 5) :]
        return _task(name, lambda: make_cnn("pool"), Images(x[ours], y[ours]), Images(x[theirs], y[theirs]))
    source = "MNIST" if name == "glyphs" else name
    train, held = _images(source, data, True), _images(source, data, False)
    classes, channels = int(train.y.max()) + 1, train.x.shape[1]
    return _task(name, lambda: GlyphNet(classes, channels), train, held.first(test))


def halves(data: str, test: int = 4000) -> tuple[Task, Task]:
    """The first classes of the glyphs (digits and capitals), and the rest (small letters)."""
    train, held = _images("MNIST", data, True), _images("MNIST", data, False)
    split = 36 if int(train.y.max()) == 61 else int(train.y.max() + 1) // 2
    found = []
    for name, chosen in (("pretraining", lambda y: y < split), ("finetune", lambda y: y >= split)):
        offset = 0 if name == "pretraining" else split
        parts = [Images(p.x[chosen(p.y)], p.y[chosen(p.y)] - offset) for p in (train, held)]
        classes = int(parts[0].y.max()) + 1
        found.append(_task(name, lambda classes=classes: GlyphNet(classes), parts[0], parts[1].first(test)))
    return found[0], found[1]


def starting_from(task: Task, weights: dict[str, Tensor]) -> Task:
    """The task whose models begin with these weights, but for the last layer."""

    def make() -> nn.Module:
        model = task.make_model()
        model.load_state_dict({**model.state_dict(), **weights})
        return model

    return replace(task, make_model=make, pretrained=True)


def chars(window: int = 64) -> Task:
    """The source of Python's standard library, its top level; every tenth file is for testing."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [f.read_bytes() for f in files]
    # bytes that are rare stand for one and the same character
    counts = torch.bincount(torch.tensor(list(b"".join(texts))), minlength=256)
    code = torch.zeros(256, dtype=torch.long)
    common = (counts >= 100).nonzero().flatten()
    code[common] = torch.arange(1, len(common) + 1)
    train, test, validation = (
        Text(code[torch.tensor(list(b"".join(of)))], window)
        for of in (
            [t for i, t in enumerate(texts) if i % 10 > 1],
            texts[::10],
            texts[1::10],
        )
    )
    vocabulary = len(common) + 1
    make = lambda: CharGPT(vocabulary, window)  # noqa: E731
    return Task("chars", make, train, validation.first(1000), test.first(2000), "adamw")


def _task(name: str, make_model: Callable[[], nn.Module], train: Images, test: Images) -> Task:
    order = torch.randperm(len(train.x), generator=torch.Generator().manual_seed(1))
    held = min(VALIDATION, len(order) // 5)
    ours, theirs = order[held:], order[:held]
    validation = Images(train.x[theirs], train.y[theirs])
    return Task(name, make_model, Images(train.x[ours], train.y[ours]), validation, test, "sgd")


def _images(name: str, data: str, train: bool) -> Images:
    kind = getattr(torchvision.datasets, name)
    extra = {"split": "balanced"} if name == "EMNIST" else {}
    dataset = kind(data, train=train, download=True, **extra)
    x = torch.as_tensor(dataset.data)
    x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    return Images(x[order].contiguous(), torch.as_tensor(dataset.targets)[order])
