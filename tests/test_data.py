"""Data sets: what comes out of each source, and what is said when one is missing or damaged."""

import gzip
import struct

import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms

from visattn import data
from visattn.recipes import CIFAR


def write_folder(root, *, parts=("train", "test"), classes=("cat", "dog"), images=3, size=(32, 32), mode="RGB"):
    for part in parts:
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(images):
                colour = 40 * label + 5 * i + (100 if part == "train" else 0)
                Image.new(mode, size, colour if mode == "L" else (colour, 10, 20)).save(root / part / name / f"{i}.png")
    return f"folder:{root}"


def tear(path):
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 64, 64)])
def test_digits(shape):
    train, test, classes = data.load("digits", shape)
    assert train.pixels.shape == (1437, *shape)
    assert test.pixels.shape == (360, *shape)
    assert train.pixels.dtype == torch.uint8
    assert classes == tuple("0123456789")
    assert train.pixels.amax() == 255
    assert train.pixels.amin() == 0
    assert torch.equal(data.load("digits", shape).test.labels, test.labels)
    assert torch.equal(
        torch.bincount(torch.cat((train.labels, test.labels))), torch.tensor([178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
    )


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_folder(tmp_path, held_out):
    train, test, classes = data.load(write_folder(tmp_path, parts=("train", held_out)), (3, 32, 32))
    assert classes == ("cat", "dog")
    assert sorted(train.labels.tolist()) == [0, 0, 0, 1, 1, 1]
    assert train.labels.tolist() != sorted(train.labels.tolist()), "the training part comes in mixed order"
    for pixels, label in zip(train.pixels, train.labels, strict=True):
        assert (pixels[0, 0, 0] - 100) // 40 == label
        assert pixels[1:, 0, 0].tolist() == [10, 20]
    assert test.pixels[:, 0, 0, 0].tolist() == [0, 5, 10, 40, 45, 50]


def test_images_of_other_sizes_are_scaled_and_cut_to_the_middle(tmp_path):
    wide = torch.zeros(3, 20, 60, dtype=torch.uint8)
    wide[:, :, 20:40] = 200
    path = tmp_path / "wide.png"
    transforms.ToPILImage()(wide).save(path)
    assert data.read_image(path, (3, 10, 10)).float().mean() > 180
    assert data.read_image(path, (1, 10, 10)).shape == (1, 10, 10)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: (root / "train").rename(root / "training"), "is not there"),
        (lambda root: (root / "test" / "dog").rename(root / "test" / "wolf"), "differ: dog, wolf"),
        (lambda root: (root / "train" / "cat" / "1.png").write_bytes(b"no image"), r"1\.png is not an image"),
        (lambda root: tear(root / "train" / "cat" / "1.png"), r"1\.png is not an image"),
        (lambda root: [p.unlink() for p in (root / "test" / "cat").iterdir()], "a folder of images a class"),
    ],
    ids=["part missing", "classes differ", "not an image", "torn image", "class empty"],
)  # fmt: skip
def test_damaged_folder(tmp_path, break_it, message):
    source = write_folder(tmp_path)
    break_it(tmp_path)
    with pytest.raises(RuntimeError, match=message):
        data.load(source, (3, 32, 32))


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.numpy().tobytes())


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_from_its_own_files(tmp_path, name, folder):
    images = torch.randint(0, 256, (7, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for part in ("train", "t10k"):
        write_idx(tmp_path / folder / "raw" / f"{part}-images-idx3-ubyte", images)
        write_idx(tmp_path / folder / "raw" / f"{part}-labels-idx1-ubyte", torch.arange(7, dtype=torch.uint8))
    train, _, classes = data.load(name, (1, 28, 28), root=tmp_path)
    assert torch.equal(train.pixels[:, 0], images)
    assert train.labels.tolist() == list(range(7))
    assert len(classes) == 10
    assert data.load(name, (3, 32, 32), root=tmp_path).train.pixels.shape == (7, 3, 32, 32)


def test_cifar10_keeps_the_order_of_its_files(tmp_path, monkeypatch):
    class Source:
        classes = ("a", "b")

        def __init__(self, root, train):
            self.data = torch.arange(2 * 32 * 32 * 3).reshape(2, 32, 32, 3).to(torch.uint8).numpy()
            self.targets = [1, 0] if train else [0, 1]

    monkeypatch.setattr(datasets, "CIFAR10", Source)
    train, _, _ = data.load("cifar10", (3, 32, 32), root=tmp_path)
    assert train.labels.tolist() == [1, 0]
    assert train.pixels[0, :, 0, 1].tolist() == [3, 4, 5], "NCHW from NHWC"


def test_missing_data_is_not_fetched_unless_asked_for(tmp_path):
    with pytest.raises(RuntimeError, match=r"cifar10 is not in .*--download"):
        data.load("cifar10", (3, 32, 32), root=tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_download_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    class Source:
        def __init__(self, root, train, download=False):
            if not download:
                raise RuntimeError("not found")
            with gzip.open(f"{root}/half.gz", "wb") as file:
                file.write(b"half")
            raise RuntimeError("the line went dead")

    monkeypatch.setattr(datasets, "MNIST", Source)
    with pytest.raises(RuntimeError, match="went dead"):
        data.load("mnist", (1, 28, 28), root=tmp_path, download=True)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("name", ["cifar100", "folder:", "folder"])
def test_unknown_names(name):
    with pytest.raises(ValueError, match="expected one of digits, cifar10, mnist, fashion_mnist, folder:PATH"):
        data.load(name, (3, 32, 32))


def test_batches_are_what_torchvision_makes():
    images = data.load("digits", (3, 32, 32)).test
    expected = transforms.Normalize(*CIFAR)(images.pixels[[3, 1]].float() / 255)
    order = torch.tensor([3, 1, 0])
    (pixels, labels), (rest, _) = data.batches(images, CIFAR, 2, order)
    torch.testing.assert_close(pixels, expected)
    assert labels.tolist() == images.labels[[3, 1]].tolist()
    assert rest.shape == (1, 3, 32, 32)
