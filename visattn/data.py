"""Images to train on: decoded once, kept as bytes, normalised batch by batch on the device they are computed on."""

import hashlib
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import files
from .files import DamagedError

Shape = tuple[int, int, int]
"""(channels, height, width) of an image."""


class Images(NamedTuple):
    """Images (N, C, H, W) as uint8, and their classes (N) as int64."""

    pixels: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Images":
        return Images(self.pixels.to(device), self.labels.to(device))

    def split(self, held_back: int) -> tuple["Images", "Images"]:
        """All but the last `held_back` images, and those."""
        kept = len(self.labels) - held_back
        return Images(self.pixels[:kept], self.labels[:kept]), Images(self.pixels[kept:], self.labels[kept:])


class Dataset(NamedTuple):
    """A training part in mixed order, a test part, and the name of each class."""

    train: Images
    test: Images
    classes: tuple[str, ...]

    def checksum(self) -> str:
        """Of every pixel and label."""
        value = zlib.crc32("\0".join(self.classes).encode())
        for tensor in (*self.train, *self.test):
            value = zlib.crc32(tensor.contiguous().numpy().data, value)
        return f"{value:08x}"


class Normalization(NamedTuple):
    """What is subtracted from, and then divides, each channel of an image whose values lie between 0 and 1."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def apply(self, pixels: Tensor) -> Tensor:
        """uint8 (N, C, H, W) to fp32, on the device the pixels are on."""
        mean, deviation = (pixels.new_tensor(v, dtype=torch.float32)[:, None, None] for v in self)
        return (pixels.float() - 255 * mean) / (255 * deviation)


NAMES = ("digits", "cifar10", "mnist", "fashion_mnist", "folder:PATH")


def load(name: str, shape: Shape, *, root: Path = Path("data"), download: bool = False) -> Dataset:
    """The data set of that name, its images brought to `shape`.

    Args:
        name: one of `NAMES`. "folder:PATH" reads PATH/train and PATH/test, or PATH/val, each with a folder of images a class.
        shape: images in colour become grey and grey ones get three equal channels, as it asks; other sizes are resized.
        root: where torchvision keeps, or puts, the data sets that are not embedded.
        download: whether what is missing may be fetched from the network.

    Raises:
        ValueError: there is no data set of that name.
        RuntimeError: it is missing or damaged; nothing was written.
    """
    kind, _, path = name.partition(":")
    if kind == "folder" and path:
        return _folder(Path(path), shape)
    if name not in NAMES[:-1]:
        raise ValueError(f"unknown data set {name!r}, expected one of {', '.join(NAMES)}")
    return _digits(shape) if name == "digits" else _torchvision(name, shape, root, download)


def batches(images: Images, normalization: Normalization, sizes: int | list[int], order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """`(fp32 images, labels)` in the order given, on the device the images are on.

    sizes: of all batches, the last of which may be smaller, or of each.
    """
    for chosen in order.to(images.labels.device).split(sizes):
        yield normalization.apply(images.pixels[chosen]), images.labels[chosen]


def read_image(path: Path, shape: Shape) -> Tensor:
    """An image file as uint8 (C, H, W): its shorter side is scaled to the size wanted and the middle is kept.

    Raises:
        RuntimeError: it is not an image that can be read.
    """
    from PIL import Image
    from torchvision.transforms import functional as transforms

    channels, height, width = shape
    try:
        with Image.open(path) as file:
            image = file.convert("RGB" if channels == 3 else "L")
    except Exception as error:  # Pillow's decoders raise a dozen kinds for bytes that they do not understand
        raise RuntimeError(f"{path} is not an image that can be read ({error}); remove it or fetch it again") from None
    if image.size != (width, height):
        factor = max(height / image.height, width / image.width)
        image = transforms.resize(image, [max(height, round(image.height * factor)), max(width, round(image.width * factor))])
        image = transforms.center_crop(image, [height, width])
    return transforms.pil_to_tensor(image)


DIGITS_HELD_OUT = 360


def _digits(shape: Shape) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, which come with it: 1,437 to train on and the same 360 to test on every time."""
    from sklearn.datasets import load_digits

    source = load_digits()
    grey = torch.from_numpy(source.images).float()[:, None] * (255 / 16)
    images = Images(_fitted(grey, shape), torch.from_numpy(source.target).long())
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(0))
    test, train = (
        Images(images.pixels[part], images.labels[part]) for part in order.split([DIGITS_HELD_OUT, len(order) - DIGITS_HELD_OUT])
    )
    return Dataset(train, test, tuple(str(digit) for digit in range(10)))


def _torchvision(name: str, shape: Shape, root: Path, download: bool) -> Dataset:
    from torchvision import datasets

    source = {"cifar10": datasets.CIFAR10, "mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST}[name]
    try:
        train, test = _read(source, root)
    except DamagedError as error:
        if not download:
            raise RuntimeError(
                f"{name} is not in {root}, or is damaged{error}; --download fetches it, --data-root says where it is, "
                "--data folder:PATH reads a folder of images instead"
            ) from None
        train, test = _downloaded(source, root)
    parts: list[Images] = []
    for part in (train, test):
        pixels = torch.as_tensor(part.data)
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        parts.append(Images(_fitted(pixels, shape), torch.as_tensor(part.targets)))
    return Dataset(parts[0], parts[1], tuple(train.classes))


def _read(source: Any, root: Path) -> tuple[Any, Any]:
    """The training and the test part of a data set of torchvision.

    CIFAR-10 comes as pickles, and torchvision looks at their checksums before it opens them. MNIST comes as numbers, and its
    checksums are those of the archives, which are compared where they are kept. Their old pickled form is not read.

    Raises:
        DamagedError: it is missing or damaged; the message is a remark in brackets.
    """
    folder = root / source.__name__
    if (folder / "processed").exists():
        raise DamagedError(f" ({folder / 'processed'} holds pickles, which are not read; remove it)")
    for archive, md5 in getattr(source, "resources", ()):
        _compare(folder / "raw" / archive, md5)
    try:
        parts = source(root, train=True), source(root, train=False)
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError):  # what torchvision makes of missing and damaged files
        raise DamagedError("") from None
    for part in parts:
        labels = torch.as_tensor(part.targets)
        if len(labels) != len(part.data) or not len(labels) or not 0 <= labels.min() <= labels.max() < len(part.classes):
            raise DamagedError(" (labels and images do not fit each other)")
    return parts


def _compare(archive: Path, md5: str) -> None:
    """An unpacked file with the .gz file that it comes from, if that is there."""
    unpacked = archive.with_suffix("")
    if not archive.exists() or not unpacked.exists():
        return
    packed = archive.read_bytes()
    if hashlib.md5(packed, usedforsecurity=False).hexdigest() != md5:
        raise DamagedError(f" ({archive} has another checksum than was published)")
    if zlib.crc32(unpacked.read_bytes()).to_bytes(4, "little") != packed[-8:-4]:
        raise DamagedError(f" ({unpacked} is not what {archive.name} holds)")


def _downloaded(source: Any, root: Path) -> tuple[Any, Any]:
    """Fetches a data set beside its place and moves it there once all of it has come and its checksums are right."""
    root.mkdir(parents=True, exist_ok=True)
    with files.locked(root, wait=True):
        try:
            return _read(source, root)  # another process may have fetched it meanwhile
        except DamagedError:
            pass
        for left in root.glob(".download-*"):
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as folder:
            for part in (True, False):
                source(folder, train=part, download=True)
            for path in [path for path in Path(folder).iterdir() if path.is_dir()]:
                if (root / path.name).exists():
                    (root / path.name).replace(Path(folder, f"damaged-{path.name}"))
                path.replace(root / path.name)
        return _read(source, root)


def _folder(path: Path, shape: Shape) -> Dataset:
    parts = [path / "train", path / "test" if (path / "test").is_dir() else path / "val"]
    for part in parts:
        if not part.is_dir():
            raise RuntimeError(f"{path} must hold train/ and test/ or val/, each with a folder of images a class; {part} is not there")
    from torchvision.datasets import ImageFolder

    try:
        train, test = (ImageFolder(str(part)) for part in parts)
    except FileNotFoundError as error:
        raise RuntimeError(f"{path} must hold a folder of images a class: {error}") from None
    if train.classes != test.classes:
        raise RuntimeError(f"the classes of {parts[0]} and {parts[1]} differ: {', '.join(sorted(set(train.classes) ^ set(test.classes)))}")
    first = _decoded(train.samples, shape)
    order = torch.randperm(len(train.samples), generator=torch.Generator().manual_seed(0))  # the folders come one class after another
    return Dataset(Images(first.pixels[order], first.labels[order]), _decoded(test.samples, shape), tuple(train.classes))


def _decoded(samples: Sequence[tuple[str, int]], shape: Shape) -> Images:
    """Reads the image files of `samples`, pairs of path and class."""
    pixels = torch.empty((len(samples), *shape), dtype=torch.uint8)

    def decode(index: int) -> None:
        pixels[index] = read_image(Path(samples[index][0]), shape)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(decode, range(len(samples))):
            pass
    return Images(pixels, torch.tensor([label for _, label in samples]))


def _fitted(pixels: Tensor, shape: Shape) -> Tensor:
    """Images (N, C, H, W) with values from 0 to 255 as uint8 images of `shape`."""
    channels, height, width = shape
    if pixels.shape[1] == 3 and channels == 1:
        pixels = (pixels.float() * pixels.new_tensor([0.299, 0.587, 0.114], dtype=torch.float32)[:, None, None]).sum(1, keepdim=True)
    if pixels.shape[2:] != (height, width):
        resized = [
            torch.nn.functional.interpolate(some.float(), (height, width), mode="bilinear", antialias=True) for some in pixels.split(4096)
        ]
        pixels = torch.cat(resized)
    if pixels.dtype != torch.uint8:
        pixels = pixels.round().clamp(0, 255).to(torch.uint8)
    return pixels.expand(-1, channels, -1, -1).contiguous()
