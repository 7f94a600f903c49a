"""Training: what a step sees, what a checkpoint holds, and that a run which was stopped ends where it would have ended."""

import json
import pathlib
import time

import pytest
import torch
from safetensors.torch import save_file

from visattn import __version__, checkpoint, data, experiment, files, models, report, training
from visattn.cli import main
from visattn.data import Normalization
from visattn.training import Options, Trainer

GREY = Normalization((0.5,), (0.5,))


def a_trainer(name="vit_mnist", images=100, **changes):
    torch.manual_seed(0)
    options = Options(GREY, batch_size=16, learning_rate=1e-3, seed=3)._replace(**changes)
    part = data.load("digits", (1, 28, 28)).train
    return Trainer(models.create_model(name), data.Images(part.pixels[:images], part.labels[:images]), options, torch.device("cpu"))


def test_an_epoch_sees_every_image_once_in_an_order_of_its_own():
    trainer = a_trainer("mlp_mnist")
    first, second = trainer._order(), (setattr(trainer, "epoch", 1), trainer._order())[1]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(100))
    assert first.tolist() != second.tolist()
    assert len(list(trainer.steps())) == trainer.steps_an_epoch == 7
    assert (trainer.epoch, trainer.step) == (2, 0)


def test_the_last_smaller_batch_can_be_left_out():
    assert len(list(a_trainer("mlp_mnist", drop_last=True).steps())) == 6


def test_it_learns():
    trainer = a_trainer("cnn_mnist", images=640)
    first = next(trainer.steps())
    trainer.step = 0
    for _ in range(4):
        *_, last = trainer.steps()
    assert last < 0.5 * first


def advance(trainer, steps):
    losses = []
    while len(losses) < steps:
        for loss in trainer.steps():
            losses.append(loss)
            if len(losses) == steps:
                break
    return losses


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_trainer_goes_on_with_the_same_bits(tmp_path, precision):
    """With dropout, whose random numbers go on as well, from the middle of an epoch, over the end of it."""
    whole, half = a_trainer("cnn_mnist", precision=precision), a_trainer("cnn_mnist", precision=precision)
    losses = advance(whole, 20)
    torch.manual_seed(0)
    models.create_model("cnn_mnist")
    assert advance(half, 9) == losses[:9]
    checkpoint.save(tmp_path / "c", *half.state())
    torch.manual_seed(99)
    other = a_trainer("cnn_mnist", precision=precision)
    other.restore(*checkpoint.load(tmp_path / "c"))
    assert advance(other, 11) == losses[9:]
    for name, tensor in whole.state()[0].items():
        assert torch.equal(tensor, other.state()[0][name]), name


def test_an_epoch_whose_steps_are_all_done_has_none_left():
    """A checkpoint between the last step and the end of its epoch was gone on with by a step on no images, whose loss is no number."""
    trainer = a_trainer("mlp_mnist")
    trainer.step = trainer.steps_an_epoch
    assert list(trainer.steps()) == []
    assert (trainer.epoch, trainer.step) == (1, 0)


def test_names_of_classes_and_folders_are_no_markup(tmp_path, capsys):
    """A class called $\\x$ ended a run when its picture was drawn, as mathematics; a folder called [/y] before it began, as a style."""
    report.confusion(tmp_path / "c.png", torch.eye(2, dtype=torch.int64), ("$\\x$", "b"), "a title")
    assert main(["train", "--model", "mlp_mnist", "--data", f"folder:{tmp_path}/[/y]", "--out", str(tmp_path / "out")]) == 2
    assert "is not there" in capsys.readouterr().err


def test_confusion_matrix_counts_what_lies_beyond_the_classes_as_wrong():
    class Model(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(x[:, 0, 0, 0].long(), 5).float()

    images = data.Images(torch.tensor([0, 1, 1, 4], dtype=torch.uint8)[:, None, None, None], torch.tensor([0, 1, 0, 1]))
    unchanged = Normalization((0.0,), (1 / 255,))
    matrix = training.confusion_matrix(Model(), images, unchanged, num_classes=2, device=torch.device("cpu"))
    assert matrix.tolist() == [[1, 1, 0, 0, 0], [0, 1, 0, 0, 1]]
    assert training.accuracy(matrix) == 0.5


TENSORS = {"a": torch.randn(3, 4), "b": torch.tensor(2.5, dtype=torch.bfloat16), "c": torch.arange(3), "d": torch.empty(0)}


class TestCheckpoint:
    def saved(self, folder):
        path = folder / "last.safetensors"
        checkpoint.save(path, TENSORS, {"epoch": 1, "loss": 0.1})
        return path

    def test_round_trip(self, tmp_path):
        tensors, description = checkpoint.load(self.saved(tmp_path))
        assert description == {"epoch": 1, "loss": 0.1}
        for name, tensor in TENSORS.items():
            assert tensors[name].dtype == tensor.dtype
            assert torch.equal(tensors[name], tensor)
        assert [p.name for p in tmp_path.iterdir()] == ["last.safetensors"]

    @pytest.mark.parametrize("at", [2, *range(10, 400, 13), -1])
    def test_a_flipped_bit_is_noticed(self, tmp_path, at):
        path = self.saved(tmp_path)
        content = bytearray(path.read_bytes())
        content[at] ^= 4
        path.write_bytes(content)
        with pytest.raises(RuntimeError, match=r"damaged|not a checkpoint"):
            checkpoint.load(path)

    @pytest.mark.parametrize("length", [0, 5, 100, -1])
    def test_a_torn_file_is_noticed(self, tmp_path, length):
        path = self.saved(tmp_path)
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(RuntimeError, match="damaged"):
            checkpoint.load(path)

    def test_other_files(self, tmp_path):
        with pytest.raises(RuntimeError, match="there is no checkpoint"):
            checkpoint.load(tmp_path / "none")
        save_file({"a": torch.ones(2)}, tmp_path / "foreign")
        with pytest.raises(RuntimeError, match="not a checkpoint that visattn wrote"):
            checkpoint.load(tmp_path / "foreign")

    def test_the_generation_before_is_kept_and_found(self, tmp_path):
        path = tmp_path / "last.safetensors"
        assert checkpoint.load_newest(path) is None
        for epoch in (1, 2, 3):
            checkpoint.save(path, TENSORS, {"epoch": epoch}, keep_previous=True)
        assert checkpoint.load_newest(path)[1:] == ({"epoch": 3}, [])
        path.write_bytes(b"")
        _, description, problems = checkpoint.load_newest(path)
        assert description == {"epoch": 2}
        assert "damaged" in problems[0]
        checkpoint.previous(path).write_bytes(b"")
        with pytest.raises(RuntimeError, match=r"damaged.*damaged"):
            checkpoint.load_newest(path)

    def test_a_failed_write_changes_nothing(self, tmp_path, monkeypatch):
        path = self.saved(tmp_path)
        before = path.read_bytes()

        def full_disk(path, content):
            with path.open("wb") as file:
                file.write(content[: len(content) // 2])
            raise OSError("no space left on device")

        monkeypatch.setattr(pathlib.Path, "write_bytes", full_disk)
        with pytest.raises(OSError, match="no space"):
            checkpoint.save(path, TENSORS, {}, keep_previous=True)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["last.safetensors"]


TRAIN = ["train", "--model", "cnn_mnist", "--data", "digits", "--epochs", "2", "--check-every", "5", "--device", "cpu"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from beginning to end."""
    out = tmp_path_factory.mktemp("run") / "whole"
    assert main([*TRAIN, "--out", str(out)]) == 0
    return out


def test_a_run_leaves_all_that_a_reader_wants(finished, capsys):
    result = json.loads((finished / "result.json").read_text())
    assert result["parameters"] == 40_730
    assert result["test_images"] == 360
    assert (result["train_images"], result["validation_images"]) == (1150, 287)
    assert 0.3 < result["test_accuracy"] <= 1
    assert len(result["epoch_losses"]) == 2
    for picture in ("curves.png", "confusion.png"):
        assert (finished / picture).read_bytes().startswith(b"\x89PNG")
        assert picture in (finished / "report.md").read_text()
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 18] * 2
    assert sum(len(line["losses"]) for line in lines) == 36
    assert max(line["validation_accuracy"] for line in lines) == result["validation_accuracy_best"]


def test_a_run_is_never_overwritten(finished, capsys):
    before = {p.name: p.read_bytes() for p in finished.iterdir()}
    assert main([*TRAIN, "--out", str(finished)]) == 2
    assert "holds a run already; add --resume" in capsys.readouterr().err
    assert main([*TRAIN, "--learning-rate", "0.1", "--out", str(finished), "--resume"]) == 2
    assert "learning_rate was 0.001, now 0.1" in capsys.readouterr().err
    assert main([*TRAIN, "--out", str(finished), "--resume"]) == 0, "finished: nothing is left to do"
    assert {p.name: p.read_bytes() for p in finished.iterdir()} == before


def test_more_epochs_go_on_with_a_run(finished, tmp_path):
    short = [*TRAIN, "--epochs", "1", "--out", str(tmp_path / "r")]
    assert main(short) == 0
    assert main([*TRAIN, "--out", str(tmp_path / "r"), "--resume"]) == 0
    expected, found = (checkpoint.load(folder / "last.safetensors")[0] for folder in (finished, tmp_path / "r"))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_evaluate_finds_what_training_reported(finished, tmp_path, capsys):
    result = json.loads((finished / "result.json").read_text())
    picture = tmp_path / "matrix.png"
    assert main(["evaluate", str(finished / "last.safetensors"), "--device", "cpu", "--out", str(picture)]) == 0
    text = capsys.readouterr().out
    assert f"{100 * result['test_accuracy']:.2f} % of 360" in text
    assert text.count("\n| ") == 12, "a row for each of ten classes"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_compare_ranks_and_goes_on(tmp_path, capsys):
    command = [
        "compare",
        "--models",
        "mlp_mnist",
        "vit_mnist:naive",
        "--data",
        "digits",
        "--epochs",
        "1",
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    assert main([*command, "--seeds", "0"]) == 0
    first = (tmp_path / "mlp_mnist-seed0" / "result.json").stat().st_mtime_ns
    assert main([*command, "--seeds", "0", "1"]) == 0
    assert (tmp_path / "mlp_mnist-seed0" / "result.json").stat().st_mtime_ns == first, "what is finished is not done again"
    table = (tmp_path / "ranking.md").read_text()
    assert "97.60" in table, "published beside ours"
    accuracies = [json.loads((tmp_path / f"mlp_mnist-seed{s}" / "result.json").read_text())["test_accuracy"] * 100 for s in (0, 1)]
    assert f"{sum(accuracies) / 2:.2f} | {accuracies[0]:.2f}, {accuracies[1]:.2f}" in table
    assert "vit_mnist (naive)" in table
    assert (tmp_path / "ranking.png").read_bytes().startswith(b"\x89PNG")


def test_models_are_listed(capsys):
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    for name, parameters in (("sagan_cnn", "520,870"), ("vit ", "497,930"), ("vit_flat", "52,213,253"), ("cnn_mnist", "40,730")):
        assert any(name in line and parameters in line for line in text.splitlines()), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "cnn"], "unknown model 'cnn'"),
        (["--model", "cnn_vanilla", "--attention", "naive"], "attention of cnn_vanilla must be left out"),
        (["--model", "sagan_cnn", "--attention", "linear"], "attention of sagan_cnn must be 'fused' or 'naive'"),
        (["--model", "mlp_mnist", "--mean", "0.5"], "--mean and --deviation belong together"),
        (["--model", "mlp_mnist", "--mean", "0.5", "0.5", "--deviation", "1", "1"], "takes 1 channels"),
        (["--model", "mlp_mnist", "--validation", "0"], "give --keep loss, or --validation"),
        (["--model", "mlp_mnist", "--batch-size", "2000", "--drop-last"], "not one batch of 2000"),
        (["--model", "mlp_mnist", "--head", "5"], "narrower than the 10 classes"),
        (["--model", "mlp_mnist", "--data", "folder:nowhere"], "is not there"),
        (["--model", "mlp_mnist", "--data", "letters"], "unknown data set 'letters'"),
        (["--model", "mlp_mnist", "--device", "abacus"], "abacus"),
        (["--model", "mlp_mnist", "--device", "meta"], "must hold numbers, got meta"),
        (["--model", "mlp_mnist", "--device", "cuda:99"], "must be one that PyTorch finds, got cuda:99"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_does_not_fit_is_said_and_nothing_is_written(tmp_path, capsys, arguments, message):
    assert main(["train", "--data", "digits", "--device", "cpu", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("deviation", ["0", "-1", "nan", "inf"])
def test_a_deviation_by_which_nothing_can_be_divided_is_refused(deviation, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--model", "mlp_mnist", "--mean", "0.5", "--deviation", deviation])
    assert "must be greater than 0" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"visattn {__version__}\n"


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="must be the path of a file"):
        files.write(tmp_path, "text")
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, capsys):
    assert main(["train", "--model", "mlp_mnist", "--data", "digits", "--learning-rate", "1e30", "--out", str(tmp_path / "out")]) == 2
    assert "a lower --learning-rate" in capsys.readouterr().err


def test_data_are_not_what_training_waits_for():
    """Even the smallest network, on images it hardly looks at, spends most of its time on itself."""
    trainer = a_trainer("mlp_mnist", images=1437, batch_size=64)
    for _ in trainer.steps():
        pass
    trainer.seconds_for_data, start = 0.0, time.perf_counter()
    for _ in range(3):
        for _ in trainer.steps():
            pass
    assert trainer.seconds_for_data < 0.5 * (time.perf_counter() - start)


def test_map_draws_where_pixels_look(tmp_path, capsys):
    """For the formula, for its departure over the queries, and for SAGAN's layer, each in the layer's own map."""
    for name, attention, layer in (("cnn_double_attention", "queries", "6"), ("sagan_cnn", "fused", None)):
        settings = experiment.settings_of(name, {"attention": attention, "data": "digits"})
        model = models.create_model(name, 10, attention=attention)
        description = {"settings": settings.for_file(), "classes": list("0123456789"), "width": 10}
        checkpoint.save(tmp_path / name, {f"model.{n}": t for n, t in model.state_dict().items()}, description)
        picture = tmp_path / f"{name}.png"
        arguments = ["map", str(tmp_path / name), "--index", "3", "--pixel", "0", "31", "--pixel", "16", "16", "--out", str(picture)]
        assert main(arguments + (["--layer", layer] if layer else [])) == 0
        assert f"where 2 of 32×32 pixels look in layer {layer or 'sa1'} of {name}" in capsys.readouterr().out
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("mlp_mnist", [], "no attention over the pixels"),
        ("cnn_late_attention", ["--layer", "2"], "no attention layer '2', expected one of 4"),
        ("cnn_late_attention", ["--index", "360"], "--index must be between 0 and 359"),
        ("cnn_late_attention", ["--pixel", "32", "0"], "32"),
        ("cnn_late_attention", ["--image", "nothing.png"], "nothing.png is not an image"),
    ],
)
def test_map_says_what_it_cannot_draw(tmp_path, capsys, name, arguments, message):
    settings = experiment.settings_of(name, {"data": "digits"})
    model = models.create_model(name, 10)
    description = {"settings": settings.for_file(), "classes": list("0123456789"), "width": 10}
    checkpoint.save(tmp_path / name, {f"model.{n}": t for n, t in model.state_dict().items()}, description)
    assert main(["map", str(tmp_path / name), *arguments, "--out", str(tmp_path / "a.png")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
