"""The experiment: data, model, resuming, records, the report, and what each mistake is answered with."""

import contextlib
import copy
import dataclasses
import errno
import fcntl
import hashlib
import importlib.metadata
import io
import json
import math
import os
import pickle
import resource
import socket
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for needed in ("torch", "sklearn", "scipy", "matplotlib", "torchvision", "tqdm"):
    pytest.importorskip(needed)

import kills  # noqa: E402
import mpmath  # noqa: E402
import scipy.optimize  # noqa: E402
import torch  # noqa: E402
from kills import figures, kill, server, start  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from lace_loss import ref  # noqa: E402
from lace_loss.train import experiment, lock, replicas, runs, store  # noqa: E402
from lace_loss.train.__main__ import main, seeds  # noqa: E402
from lace_loss.train.attack import adversarial  # noqa: E402
from lace_loss.train.config import Config, TrainError  # noqa: E402
from lace_loss.train.data import Data, block_means, crop, draw, flip, load, normalised, subset_mask  # noqa: E402
from lace_loss.train.experiment import Training, learning_rate  # noqa: E402
from lace_loss.train.model import ResNet18  # noqa: E402
from lace_loss.train.probabilities import log_probabilities, qualities  # noqa: E402
from lace_loss.train.processes import is_out_of_memory  # noqa: E402
from lace_loss.train.schema import FIGURES, Record  # noqa: E402
from lace_loss.train.shared import SharedTraining  # noqa: E402
from lace_loss.train.store import load_checkpoint, previous_generation, read_record, save_checkpoint  # noqa: E402

CPU = torch.device("cpu")
SMALL = ["--epochs", "3", "--width", "1", "--device", "cpu", "--threads", "1"]


def small(out: Path, *more: str) -> list[str]:
    return [*SMALL, "--loss", "lace", "--out", str(out), *more]


def weights(out: Path) -> dict[str, bytes]:
    """Of a record, or of the only one in a folder."""
    return kills.weights(next(out.glob("*.jsonl")) if out.is_dir() else out)


def images(folder: Path, size: tuple[int, int] = (8, 8), n: int = 3) -> Path:
    """n PNG files of random RGB pixels of (height, width) `size`."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(len(str(folder.name)))
    for i in range(n):
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    assert main(small(out)) == 0
    return out


# --- model and data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "classes", "channels"), [(64, 100, 3), (8, 10, 1)])
def test_parameters_follow_from_the_architecture(width: int, classes: int, channels: int) -> None:
    w = width
    # Convolution weights, then two batch-norm parameters a channel, stage by stage, and the head.
    count = 9 * channels * w + 2 * w + 4 * (9 * w * w + 2 * w)
    for k in (2 * w, 4 * w, 8 * w):
        count += 9 * (k // 2) * k + 3 * 9 * k * k + (k // 2) * k + 5 * 2 * k
    count += 8 * w * classes + classes
    model = ResNet18(width, classes, channels)
    assert sum(p.numel() for p in model.parameters()) == count
    if width == 64:
        assert count == 11_220_132


def test_stem_keeps_every_pixel_and_stages_halve() -> None:
    model, shapes = ResNet18(2, 5), []
    for module in (model.stem, *model.blocks):
        module.register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape[1:])))
    model(torch.zeros(2, 3, 32, 32))
    assert shapes == [(2, 32, 32)] * 3 + [(4, 16, 16)] * 2 + [(8, 8, 8)] * 2 + [(16, 4, 4)] * 2


def test_crop_equals_numpy_slicing() -> None:
    random = np.random.default_rng(0)
    batch = random.normal(size=(50, 3, 7, 9)).astype(np.float32)
    offsets = random.integers(0, 9, (50, 2))
    padded = np.pad(batch, ((0, 0), (0, 0), (4, 4), (4, 4)))
    expected = np.stack([p[:, y : y + 7, x : x + 9] for p, (y, x) in zip(padded, offsets, strict=True)])
    assert np.array_equal(crop(torch.from_numpy(batch), torch.from_numpy(offsets), 4), expected)


def test_flip_mirrors_the_chosen_images_only() -> None:
    batch = np.random.default_rng(0).normal(size=(4, 2, 3, 5))
    chosen = np.array([True, False, False, True])
    expected = np.stack([image[..., ::-1] if c else image for image, c in zip(batch, chosen, strict=True)])
    assert np.array_equal(flip(torch.from_numpy(batch), torch.from_numpy(chosen)), expected)


def test_draws_depend_on_seed_and_epoch_alone_and_cover_every_offset() -> None:
    first, again, other = draw(3, 5, 2000, 4), draw(3, 5, 2000, 4), draw(3, 6, 2000, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    order, offsets, flips = first
    assert sorted(order.tolist()) == list(range(2000))
    assert set(offsets[:, 0].tolist()) == set(offsets[:, 1].tolist()) == set(range(9))
    assert abs(flips.double().mean().item() - 0.5) < 4 * 0.5 / math.sqrt(2000)


def test_per_pixel_mean_is_that_of_the_training_images_and_centres_them() -> None:
    digits = load("digits", "unused", CPU)
    expected = np.mean(digits.images.numpy().astype(np.float64), axis=0) / 255
    assert digits.mean.shape == (1, 8, 8)
    assert np.allclose(digits.mean, expected, atol=1e-7)
    assert normalised(digits.images, digits.mean).double().mean(0).abs().max() < 1e-6


def test_digits_are_the_1797_of_scikit_learn_every_fifth_for_testing() -> None:
    from sklearn.datasets import load_digits

    bunch, digits = load_digits(), load("digits", "unused", CPU)
    assert (len(digits.images), len(digits.test_images), digits.classes) == (1437, 360, 10)
    assert np.array_equal(digits.test_labels, bunch.target[::5])
    assert np.abs(digits.test_images[:, 0].numpy() / 255 - bunch.images[::5] / 16).max() <= 0.5 / 255


def test_image_folder_gives_the_files_pixels_with_the_classes_of_train(tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "test"):
        for name in ("ant", "bee", "cat"):
            images(tmp_path / split / name, n=3 if split == "train" else 1)
    found = load(str(tmp_path), "unused", CPU)
    assert (found.name, found.classes, found.labels.tolist()) == (tmp_path.name, 3, [0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert found.test_labels.tolist() == [0, 1, 2]
    bee = np.asarray(Image.open(tmp_path / "train" / "bee" / "1.png"))
    assert np.array_equal(found.images[4].permute(1, 2, 0), bee)


def test_shrinking_replaces_blocks_of_pixels_by_their_mean() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 6), dtype=np.uint8)
    small = block_means(pixels, 2)
    assert small.shape == (5, 3, 2, 3)
    assert small[4, 2, 1, 2] == np.rint(pixels[4, 2, 2:, 4:].mean())
    assert np.abs(small.mean((2, 3)) - pixels.mean((2, 3))).max() <= 0.5
    with pytest.raises(TrainError, match="--shrink 3 does not divide images of 4x4 pixels"):
        block_means(pixels[..., :4], 3)


def test_a_subset_holds_as_many_of_every_class_and_the_rest_is_unused() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [10, 20, 30]))
    chosen = subset_mask(labels, 24)
    assert np.bincount(labels[chosen]).tolist() == [8, 8, 8]
    assert all(chosen[labels == c].nonzero()[0].tolist() == list(range(8)) for c in range(3))
    assert subset_mask(labels, 0).all()
    for subset in (25, 2, 33):  # uneven, less than one of each, more than there are of one
        with pytest.raises(TrainError, match=f"multiple of the 3 classes and at most 30, .* got {subset}"):
            subset_mask(labels, subset)
    whole, part = load("digits", "unused", CPU), load("digits", "unused", CPU, subset=1000)
    assert (len(part.images), len(part.unused_images)) == (1000, 437)
    assert whole.sha256 != part.sha256
    assert torch.equal(part.mean, (part.images.double().mean(0) / 255).float())


# --- training ---------------------------------------------------------------------------------------------------------


def test_errors_agree_with_scikit_learn_topk() -> None:
    from sklearn.metrics import top_k_accuracy_score

    digits, model = load("digits", "unused", CPU), ResNet18(1, 10, 1)
    logits = experiment.evaluation_logits(model, digits.test_images, digits.mean, "float32")
    found = experiment.figures(logits, digits.test_labels)
    with torch.inference_mode():
        logits = model(normalised(digits.test_images, digits.mean)).numpy()
    for k in (1, 5):
        expected = 100 - 100 * top_k_accuracy_score(digits.test_labels, logits, k=k)
        assert found[f"top{k}_error"] == pytest.approx(expected, abs=1e-9)


def test_a_record_holds_settings_an_epoch_a_line_and_the_last_epoch_as_result(finished: Path) -> None:
    header, *log, final = map(json.loads, (finished / "digits_lace_seed0_w1.jsonl").read_text().splitlines())
    assert {"loss", "seed", "data", "width", "strength", "epochs", "commit", "versions", "device"} <= header.keys()
    assert [row["epoch"] for row in log] == [0, 1, 2]
    assert [row["lr"] for row in log] == pytest.approx([0.1, 0.1, 0.01])
    assert final["final"] is True
    assert {key: final[key] for key in FIGURES} == {key: log[-1][key] for key in FIGURES}


def test_training_learns_the_digits_with_both_losses(tmp_path: Path) -> None:
    assert main(["--epochs", "4", "--width", "2", "--device", "cpu", "--out", str(tmp_path)]) == 0
    for record in tmp_path.glob("*.jsonl"):
        assert read_record(record)["top5_error"] < 25  # guessing: 50


def test_the_same_seed_gives_the_same_figures_and_another_seed_others(finished: Path, tmp_path: Path) -> None:
    assert main(small(tmp_path, "--seeds", "0-1")) == 0
    name = "digits_lace_seed{}_w1.jsonl"
    same = figures(tmp_path / name.format(0))
    assert same == figures(finished / name.format(0))
    assert same[1:] != figures(tmp_path / name.format(1))[1:]


@pytest.mark.parametrize("verbose", [False, True])
def test_a_log_has_a_line_a_finished_run_the_tables_and_a_sentence_in_80_columns(
    verbose: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """stderr is no terminal here: no bar, and no other line than these."""
    monkeypatch.chdir(tmp_path)
    command = [*SMALL, "--loss", "both", "--seeds", "0-1", "--epochs", "2", *(["--verbose"] if verbose else [])]
    assert main(command) == 0
    said = capsys.readouterr()
    lines = []
    for seed in (0, 1):
        for loss in ("ce", "lace"):
            record, name = read_record(Path(f"runs/digits_{loss}_seed{seed}_w1.jsonl")), f"digits_{loss}_seed{seed}_w1"
            for i, row in enumerate(record["epochs_log"] if verbose else [], 1):
                errors = f"top-1 {row['top1_error']:.2f} %, top-5 {row['top5_error']:.2f} %"
                lines.append(f"{name}: epoch {i}/2: loss {row['train_loss']:.4g}, {errors}")
            errors = f"top-1 error {record['top1_error']:.2f} %, top-5 {record['top5_error']:.2f} %"
            lines.append(f"{name}: {errors}, {record['seconds']:.0f} s")
    assert said.err.splitlines() == lines
    paths = [line for line in said.out.splitlines() if str(tmp_path) in line]
    assert max(len(line) for line in [*said.out.splitlines(), *lines] if line not in paths) <= 80
    *_, tables, pictures, sentence = said.out.strip().split("\n\n")
    assert tables.startswith("| CE - LACE, without a claim")
    assert " ".join(pictures.split()) == f"Pictures: {tmp_path}/runs/curves.png, {tmp_path}/runs/reliability.png"
    assert sentence.startswith("Seen: a mean top-1 test error of ")


def test_lace_of_strength_zero_trains_as_cross_entropy_does(tmp_path: Path) -> None:
    assert main(small(tmp_path / "lace", "--strength", "0", "--epochs", "1")) == 0
    assert main([*SMALL, "--loss", "ce", "--epochs", "1", "--out", str(tmp_path / "ce")]) == 0
    lace, ce = (read_record(next((tmp_path / loss).glob("*.jsonl"))) for loss in ("lace", "ce"))
    assert lace["train_loss"] == pytest.approx(ce["train_loss"], rel=1e-3)


def test_calibration_error_is_the_gap_between_confidence_and_accuracy_bin_by_bin() -> None:
    digits, model = load("digits", "unused", CPU), ResNet18(2, 10, 1)
    logits = experiment.evaluation_logits(model, digits.test_images, digits.mean, "float32")
    found = experiment.figures(logits, digits.test_labels)
    with torch.inference_mode():
        q = model(normalised(digits.test_images, digits.mean)).double().softmax(1).numpy()
    sure, right = q.max(1), q.argmax(1) == digits.test_labels.numpy()
    gap = 0.0
    for i in range(15):
        inside = (sure > i / 15) & (sure <= (i + 1) / 15)
        assert found["count"][i] == inside.sum()
        gap += abs(sure[inside].sum() - right[inside].sum())
    assert found["calibration_error"] == pytest.approx(100 * gap / len(q), rel=1e-6)
    nll = -np.log(q[range(len(q)), digits.test_labels]).mean()
    assert found["nll"] == pytest.approx(nll, rel=1e-6)
    again = qualities(logits.numpy(), digits.test_labels.numpy(), 1.0, scaled=False)["softmax"]
    one_hot = np.eye(10)[digits.test_labels]
    assert again["brier"] == pytest.approx(np.square(q - one_hot).sum(1).mean(), rel=1e-6)
    assert again["nll"] == pytest.approx(nll, rel=1e-6)
    assert again["calibration_error"] == pytest.approx(found["calibration_error"], rel=1e-6)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sure", [1.0, 8.0, 60.0])
def test_class_probabilities_are_q_over_k_normalised(strength: float, sure: float) -> None:
    """The witness has 60 digits: in float64 the largest class's K is 0 from a margin of 40 on, if formed from q."""
    logits = np.array([[sure, 0.0, -1.0, 0.5], [0.3, 0.3, 0.3, -sure]])
    found = log_probabilities(logits, strength)
    with mpmath.workdps(60):
        for row, logs in zip(logits, found, strict=True):
            e = [mpmath.exp(z) for z in row]
            q = [x / mpmath.fsum(e) for x in e]
            ratio = [x / ((1 - strength) + strength * (1 - x - x * mpmath.log(x))) for x in q]
            expected = [float(mpmath.log(x / mpmath.fsum(ratio))) for x in ratio]
            assert logs == pytest.approx(expected, rel=1e-12, abs=1e-30)


def test_the_loss_is_smallest_where_the_class_probabilities_are_the_truth() -> None:
    """Minimise the expected loss by its gradient, by ref: the map gives the truth back."""
    truth = np.array([0.6, 0.3, 0.1])
    z = scipy.optimize.minimize(
        lambda z: ref.forward(z[None], truth[None]),
        np.zeros(3),
        jac=lambda z: ref.backward(z[None], truth[None])[0],
        options={"gtol": 1e-10},
    ).x
    assert np.exp(log_probabilities(z[None], 1.0))[0] == pytest.approx(truth, abs=1e-8)
    assert np.exp(log_probabilities(z[None], 0.0))[0] != pytest.approx(truth, abs=0.02)


def test_one_temperature_is_found_again_and_is_fitted_on_the_other_half() -> None:
    random = np.random.default_rng(0)
    z = random.normal(size=(20_000, 5)) * 2
    labels = np.array([random.choice(5, p=np.exp(row) / np.exp(row).sum()) for row in z])
    found = qualities((3 * z).astype(np.float32), labels, 0.0, scaled=True)
    assert found["softmax_scaled"]["temperature"] == pytest.approx(3, rel=0.03)
    assert found["softmax_scaled"]["calibration_error"] < 1.5 < found["softmax"]["calibration_error"]
    z[1::2] *= 3  # odd samples alone are too sure: it is the even ones that are divided by 3
    halves = qualities(z.astype(np.float32), labels, 0.0, scaled=True)["softmax_scaled"]
    assert halves["temperature"] == pytest.approx((3 + 1) / 2, rel=0.03)
    assert halves["nll"] > found["softmax_scaled"]["nll"] + 0.1


def test_the_tests_logits_are_kept_and_give_the_records_figures(finished: Path) -> None:
    record = read_record(finished / "digits_lace_seed0_w1.jsonl")["sets"]["test"]
    with np.load(finished / "digits_lace_seed0_w1.logits.npz") as kept:
        found = experiment.figures(torch.from_numpy(kept["logits"]), torch.from_numpy(kept["target"]))
    assert found == {key: record[key] for key in found}


def test_the_focal_arm_trains_as_lace_does_while_no_sample_is_sure(tmp_path: Path) -> None:
    assert main([*SMALL, "--epochs", "1", "--lr", "0.01", "--loss", "focal", "--out", str(tmp_path)]) == 0
    assert main(small(tmp_path, "--epochs", "1", "--lr", "0.01")) == 0
    lace, focal = (read_record(next(tmp_path.glob(f"*_{loss}_*.jsonl"))) for loss in ("lace", "focal"))
    assert lace["train_loss"] == pytest.approx(focal["train_loss"], rel=1e-4)


def test_a_step_is_that_of_momentum_sgd_with_weight_decay() -> None:
    config, digits = Config("digits", "ce", width=2, strength=0.0, lr=0.2, pad=1, flip=False), load("digits", "", CPU)
    training = Training(config, digits)
    parameter = training.model.head.weight
    weight, buffer = parameter.detach().clone(), torch.zeros_like(parameter)
    training.begin(0)
    for i in range(3):
        training.step(i)
        buffer = 0.9 * buffer + parameter.grad + 5e-4 * weight
        weight = weight - 0.2 * buffer
        assert torch.allclose(parameter, weight, rtol=1e-5, atol=1e-7)
    norm = math.sqrt(sum(p.grad.double().square().sum() for p in training.model.parameters()))
    assert training.grad_norms[2].item() == pytest.approx(norm, rel=1e-5)


def test_learning_rates_are_those_of_the_schedule() -> None:
    steps = Config(lr=0.1, epochs=40, lr_step=18)
    rates = [learning_rate(steps, epoch, 7, 10) for epoch in (0, 17, 18, 35, 36, 39)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    triangle = Config(lr=0.1, epochs=20, schedule="triangle")
    rates = [learning_rate(triangle, epoch, step, 10) for epoch in range(20) for step in range(10)]
    middles = np.arange(0.5, 200) / 200
    assert rates == pytest.approx(np.interp(middles, [0, 0.15, 1], [0, 0.2, 0]).tolist())
    assert min(rates) > 0


def test_a_step_has_the_schedules_rate() -> None:
    training = Training(Config("digits", width=1, pad=1, epochs=3, schedule="triangle"), load("digits", "", CPU))
    for epoch in range(2):
        training.begin(epoch)
        for i in (0, 1, 14):
            training.step(i)
            assert training.lr.item() == pytest.approx(learning_rate(training.config, epoch, i, 15), rel=1e-6)


def test_bfloat16_is_refused_by_a_processor_that_lacks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert_error(capsys, small(tmp_path, "--precision", "bfloat16"), "--precision bfloat16", "avx512_bf16")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert main(small(tmp_path, "--precision", "bfloat16", "--epochs", "1")) == 0
    assert read_record(next(tmp_path.glob("*.jsonl")))["precision"] == "bfloat16"


@pytest.mark.parametrize(("epochs", "lr_step"), [(10, 5), (40, 18), (99, 45), (100, 25), (200, 50)])
def test_a_short_run_keeps_its_first_rates_longer(tmp_path: Path, epochs: int, lr_step: int) -> None:
    command = small(tmp_path, "--max-seconds", "0", "--epochs", str(epochs))
    assert main(command) == 0
    assert read_record(next(tmp_path.glob("*.jsonl")))["lr_step"] == lr_step


def test_what_a_step_reads_and_writes_stays_where_it_is() -> None:
    training = Training(Config("digits", width=2, pad=1), load("digits", "unused", CPU))

    def places() -> list[int]:
        tensors = [*training.model.state_dict().values(), *training.momentum, training.lr, training.order]
        tensors += [training.offsets, training.flips, training.losses, training.grad_norms, training.ranks]
        assert [m.data_ptr() for m in training.momentum] == [
            s["momentum_buffer"].data_ptr() for s in training.optimizer.state.values()
        ]
        return [tensor.data_ptr() for tensor in tensors]

    before = places()
    for epoch in range(2):
        training.begin(epoch)
        training.step(0)
    store.restore(Path(), {"model": ResNet18(2, 10, 1).state_dict(), "momentum": training.momentum}, training.state())
    assert places() == before


class Operations(TorchDispatchMode):
    """The names of what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_step_asks_the_device_for_no_value() -> None:
    """Which would wait for it, and is what a CUDA graph forbids."""
    asking = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"}
    training = Training(Config("digits", width=2, pad=1), load("digits", "unused", CPU))
    training.begin(0)
    with Operations() as step:
        training.step(0)
    assert {"convolution", "convolution_backward"} <= step.names
    assert not step.names & asking
    with Operations() as look:
        training.losses[0].item()
    assert look.names & asking


def test_a_captured_step_begins_each_epoch_anew_and_warming_up_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stand-in for CUDA, whose capture notes a step in place of taking it, and whose replay takes it."""
    update, capturing = Training.update, list[bool]()

    class Graph:
        training: Training

        def replay(self) -> None:
            update(self.training, self.training.positions)  # type: ignore[attr-defined]
            self.training.positions += self.training.config.batch  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def capture(graph: Graph, stream: object) -> Iterator[None]:
        capturing.append(True)
        yield
        capturing.clear()

    def noted(training: Training, positions: torch.Tensor) -> None:
        if capturing:
            assert positions is training.positions  # type: ignore[attr-defined]
            Graph.training = training
        else:
            update(training, positions)

    stream = type("Stream", (), {"wait_stream": lambda self, other: None})
    for name, stand_in in {"Stream": stream, "current_stream": stream, "CUDAGraph": Graph, "graph": capture}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(Training, "update", noted)
    config, digits = Config("digits", width=2, pad=1, batch=479), load("digits", "unused", CPU)
    eager, captured = Training(config, digits), replicas.GraphTraining(config, digits)
    for epoch in range(2):
        for training in (eager, captured):
            training.begin(epoch)
            for i in range(3):
                training.step(i)
        pairs = zip((*eager.end(), *eager.momentum), (*captured.end(), *captured.momentum), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), f"epoch {epoch}"
    states = store.tensors(eager.state()), store.tensors(captured.state())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_experiment_is_one_file_of_at_most_180_lines_that_knows_no_graph_process_attack_or_report() -> None:
    text = Path(experiment.__file__).read_text()
    assert len(text.splitlines()) <= 180
    rooms = {line.split()[1] for line in text.splitlines() if line.startswith("from .")}
    assert rooms == {".config", ".data", ".model", ".probabilities", ".runs", ".schema"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_graphs_of_steps_equal_eager_steps_bit_for_bit(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    digits = load("digits", "unused", torch.device("cuda"))
    config = Config("digits", width=16, batch=25, precision=precision)
    eager, captured = Training(config, digits), [replicas.GraphTraining(config, digits) for _ in range(2)]
    for epoch in range(2):
        for training in (eager, *captured):
            training.begin(epoch)
        for i in range(50):
            for training in (eager, *captured):
                training.step(i)
        expected, *found = ((*r.end(), *r.model.state_dict().values(), *r.momentum) for r in (eager, *captured))
        for tensors in found:
            assert all(torch.equal(a, b) for a, b in zip(expected, tensors, strict=True)), f"epoch {epoch}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("loss", ["both", "focal"])
def test_runs_by_graphs_are_those_of_eager_steps_also_when_stopped_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """Three runs a loss, two side by side: the last begins in the place of one that is done."""
    common = f"--device cuda --loss {loss} --seeds 0-2 --subset 1000 --epochs 4 --width 16".split()
    graphs = ["--mode", "graph", "--replicas", "2"]
    assert main([*common, "--mode", "eager", "--out", str(tmp_path / "eager")]) == 0
    assert main([*common, *graphs, "--out", str(tmp_path / "graph")]) == 0
    with monkeypatch.context() as patch:
        looks = iter([False] * 4)  # two runs and two epochs
        patch.setattr(runs, "any_past_deadline", lambda _: next(looks, True))
        assert main([*common, *graphs, "--out", str(tmp_path / "resumed")]) == 0
    assert main([*common, *graphs, "--out", str(tmp_path / "resumed")]) == 0
    records = sorted(path.name for path in (tmp_path / "eager").glob("*.jsonl"))
    assert len(records) == (6 if loss == "both" else 3)
    for name in records:
        eager, *others = (tmp_path / mode / name for mode in ("eager", "graph", "resumed"))
        for other in others:
            assert figures(other)[1:] == figures(eager)[1:]
            assert weights(other) == weights(eager)


# --- stopping and going on --------------------------------------------------------------------------------------------


def test_a_run_killed_twenty_times_at_random_moments_ends_with_the_same_bytes(tmp_path: Path) -> None:
    found = kill(tmp_path, 20)
    assert found["kills"] == 20
    assert sum("epoch" in state for state in found) > 3, "kills must fall into different epochs"


def test_a_kill_before_the_records_last_line_costs_that_line_alone(finished: Path, tmp_path: Path) -> None:
    name = "digits_lace_seed0_w1"
    for suffix in (".jsonl", ".checkpoint"):
        (tmp_path / f"{name}{suffix}").write_bytes((finished / f"{name}{suffix}").read_bytes())
    lines = (finished / f"{name}.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / f"{name}.jsonl").write_text("".join(lines[:-1]))
    assert main(small(tmp_path)) == 0
    assert figures(tmp_path / f"{name}.jsonl") == figures(finished / f"{name}.jsonl")
    assert weights(tmp_path) == weights(finished)


def test_max_seconds_stops_at_an_epochs_end_and_the_command_goes_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 10**6))  # a second a look
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: float(next(clock)))
        assert main(small(tmp_path, "--max-seconds", "20")) == 0
    assert "stopped by --max-seconds 20" in capsys.readouterr().err
    record = tmp_path / "digits_lace_seed0_w1.jsonl"
    assert 0 < len(read_record(record)["epochs_log"]) < 3
    assert main(small(tmp_path)) == 0
    assert figures(record) == figures(finished / "digits_lace_seed0_w1.jsonl")
    assert weights(tmp_path) == weights(finished)


def test_a_stop_right_after_a_checkpoint_keeps_the_generation_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = iter([False, False, True])
    monkeypatch.setattr(runs, "SAVING_SHARE", math.inf)
    monkeypatch.setattr(runs, "any_past_deadline", lambda _: next(stops))
    assert main(small(tmp_path)) == 0
    newest = tmp_path / "digits_lace_seed0_w1.checkpoint"
    states = [load_checkpoint(path, CPU) for path in (newest, previous_generation(newest))]
    assert [len(state["log"]) for state in states if state] == [2, 1]


def test_a_full_disk_is_an_error_that_loses_nothing(finished: Path, tmp_path: Path) -> None:
    assert main(small(tmp_path, "--max-seconds", "0")) == 0
    before = weights(tmp_path)
    full = start(small(tmp_path), {resource.RLIMIT_FSIZE: 20_000}, tmp_path / "said")  # less than a checkpoint
    full.join()
    assert full.exitcode == 2
    assert "digits_lace_seed0_w1.checkpoint cannot be written" in (tmp_path / "said").read_text()
    assert weights(tmp_path) == before
    assert main(small(tmp_path)) == 0
    assert weights(tmp_path) == weights(finished)


def torchrun(folder: Path, arguments: list[str]) -> str:
    """What two processes say that run in `folder`/0 and `folder`/1, as if on two machines."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    in_its_folder = f'mkdir -p $LOCAL_RANK && cd $LOCAL_RANK && exec {sys.executable} -m lace_loss.train "$@"'
    command += ["--no-python", "bash", "-c", in_its_folder, "bash", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


STEADY = ["--epochs", "1", "--lr", "0.001", "--width", "2"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("shared")
    return folder, torchrun(folder, small(Path("runs"), *STEADY, "--verbose"))


def test_two_processes_that_share_every_batch_train_as_one(shared: tuple[Path, str], tmp_path: Path) -> None:
    """Sums in another order: 1e-7 a step, which momentum and 15 small steps make 1e-5 of."""
    assert main(small(tmp_path, *STEADY)) == 0
    outs = tmp_path, shared[0] / "0" / "runs"
    one, two = (read_record(next(out.glob("*.jsonl"))) for out in outs)
    assert two["device"] == f"2 processes, {one['device']}"
    for key in ("train_loss", "train_top1_error", "grad_norm", "nll"):
        assert two[key] == pytest.approx(one[key], rel=1e-5)
    ours, theirs = ({k: np.frombuffer(v, np.float32) for k, v in weights(out).items()} for out in outs)
    assert all(np.allclose(ours[key], theirs[key], rtol=1e-4, atol=1e-5) for key in ours)
    assert main(small(outs[1], *STEADY, "--lr", "0.1")) == 2, "one process must not go on with it"


def steps_of_ten_and_two(rank: int, processes: int, folder: Path) -> None:
    """Trains on twelve images of 32 by 32 random pixels and saves what became of the model to `folder`."""
    torch.set_num_threads(1)
    if processes > 1:
        torch.distributed.init_process_group("gloo", f"file://{folder}/met", rank=rank, world_size=processes)
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (12, 3, 32, 32), generator=random, dtype=torch.uint8)
    labels, none = torch.arange(12) % 5, torch.zeros(0)
    data = Data("random", list("abcde"), "", pixels, labels, none, none, none, none, torch.full((3, 32, 32), 0.5))
    make = SharedTraining if processes > 1 else Training
    training = make(Config("random", width=2, batch=10, lr=0.001), data)
    training.begin(0)
    for i in range(2):
        training.step(i)
    losses, norms, ranks = training.end()
    state = {**training.model.state_dict(), "losses": losses, "norms": norms, "ranks": ranks}
    torch.save({key: value.clone() for key, value in state.items()}, folder / f"{rank} of {processes}")


def test_a_last_batch_of_fewer_images_than_processes_trains_as_one_process_does(tmp_path: Path) -> None:
    together = [server.Process(target=steps_of_ten_and_two, args=(rank, 3, tmp_path)) for rank in range(3)]
    for process in together:
        process.start()
    steps_of_ten_and_two(0, 1, tmp_path)
    for process in together:
        process.join()
    alone, *shares = (torch.load(tmp_path / name) for name in ("0 of 1", "0 of 3", "1 of 3", "2 of 3"))
    for share in shares:
        assert all(torch.allclose(share[key], alone[key], rtol=1e-5, atol=1e-6) for key in alone)


def test_the_first_process_alone_has_the_files_and_speaks(shared: tuple[Path, str]) -> None:
    folder, said = shared
    assert said.count("epoch 1/1: loss") == 1
    assert not list((folder / "1" / "runs").iterdir())
    (record,) = (folder / "0" / "runs").glob("*.jsonl")
    finished = record.read_text().splitlines(keepends=True)
    record.write_text("".join(finished[:-1]))
    assert torchrun(folder, small(Path("runs"), *STEADY)).count("resumed after epoch 1") == 1
    assert record.read_text().splitlines(keepends=True) == finished


def test_processes_with_other_data_are_refused(tmp_path: Path) -> None:
    for place in "01":
        for split in ("train", "test"):
            images(tmp_path / place / "data" / split / "ant", n=2 + int(place))
    with pytest.raises(AssertionError, match="error: --data data is not the same for all processes"):
        torchrun(tmp_path, small(Path("runs"), "--data", "data"))


def test_a_process_beyond_the_gpus_is_told_how_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert_error(capsys, ["--out", str(tmp_path)], "process 2", "--nproc-per-node is at most 2")


def test_seeds_of_several_commands_in_one_folder_are_reported_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for share in ("0", "1-2"):
        assert main(small(tmp_path, "--epochs", "1", "--seeds", share)) == 0
    capsys.readouterr()
    assert main(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"][0]["arms"]["LACE"]["seeds"] == [0, 1, 2]


@contextlib.contextmanager
def digits_runs(out: Path, count: int, replicas: int, **settings: Any) -> Iterator[list[runs.Run]]:
    """Runs on the digits that differ in their seeds, as a command sets them up."""
    out.mkdir(exist_ok=True)
    digits, config = load("digits", "unused", CPU), Config("digits", width=1, pad=1, **settings)
    with runs.tqdm(disable=True) as bar, contextlib.ExitStack() as locks:
        common = digits, out, {"replicas": replicas}, bar, locks, runs.Deadline(math.inf)
        yield [runs.Run(dataclasses.replace(config, seed=seed), *common) for seed in range(count)]


def test_runs_that_take_turns_end_with_the_bytes_of_runs_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three runs, two of them side by side; eager steps on a CPU, which only the order of the steps can change."""
    turns, step = dict[int, list[int]](), Training.step

    def noted(training: Training, i: int) -> None:
        turns[at_a_time].append(training.config.seed)
        step(training, i)

    monkeypatch.setattr(Training, "step", noted)
    for at_a_time in (1, 2):
        turns[at_a_time] = []
        with digits_runs(tmp_path / str(at_a_time), 3, at_a_time, epochs=2, test_every=2) as waiting:
            replicas.train_all(waiting, Training, at_a_time, waiting[0].deadline)
    assert turns == {1: [0] * 30 + [1] * 30 + [2] * 30, 2: [0, 1] * 30 + [2] * 30}
    for record in (tmp_path / "1").glob("*.jsonl"):
        other = tmp_path / "2" / record.name
        assert figures(record)[1:] == figures(other)[1:] and "final" in read_record(other)
        assert weights(record) == weights(other)


@pytest.mark.parametrize(
    ("fitting", "count", "words"),
    [(2, 4, "with 4 replicas, --replicas 2 may fit"), (0, 1, "with 1 replicas, not even one replica fits")],
)
def test_out_of_memory_says_how_many_replicas_fit(tmp_path: Path, fitting: int, count: int, words: str) -> None:
    made = list[Training]()

    def make(config: Config, data: Data) -> Training:
        if len(made) == fitting:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        made.append(Training(config, data))
        return made[-1]

    with digits_runs(tmp_path, count, count) as waiting, pytest.raises(TrainError, match=words):
        replicas.train_all(waiting, make, count, waiting[0].deadline)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory",  # torch.AcceleratorError, when a graph is made
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_out_of_memory_of_the_driver_and_of_libraries_is_seen_as_that(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_with_replicas_checkpoints_still_take_two_percent_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save of 0.095 s and an epoch of 1 s: two replicas save, 0.19 s, every tenth epoch."""
    clock, saves = [0.0], list[int]()
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def save(run: runs.Run) -> None:
        clock[0] += 0.095
        saves.append(len(run.log))

    def begin(training: Training, epoch: int) -> None:
        clock[0] += 0.5

    monkeypatch.setattr(runs.Run, "save", save)
    monkeypatch.setattr(Training, "begin", begin)
    monkeypatch.setattr(Training, "step", lambda *_: None)
    with digits_runs(tmp_path, 2, 2, epochs=31, batch=1437, test_every=31) as both:
        replicas.train_all(both, Training, 2, both[0].deadline)
    assert saves == [1, 1, 11, 11, 21, 21, 31, 31]


def test_out_of_memory_in_a_step_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Training.step

    def full(training: Training, i: int) -> None:
        if i == 10 and training.epoch == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        step(training, i)

    monkeypatch.setattr(runs, "SAVING_SHARE", math.inf)
    monkeypatch.setattr(Training, "step", full)
    assert_error(capsys, small(tmp_path), "out of memory with 1 replicas", "--width or --batch", "checkpoints are kept")
    state = load_checkpoint(tmp_path / "digits_lace_seed0_w1.checkpoint", CPU)
    assert state is not None and len(state["log"]) == 1


def test_a_cpu_out_of_memory_is_an_error_in_words(tmp_path: Path) -> None:
    limit = {resource.RLIMIT_AS: 64 << 30}  # the first convolution of this width wants 155 GB
    process = start(small(tmp_path, "--width", "65536"), limit, tmp_path / "said")
    process.join()
    assert process.exitcode == 2
    assert "error: out of memory with 1 replicas, not even one replica fits" in (tmp_path / "said").read_text()


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A folder with a run that Ctrl-C stopped in its third epoch."""

    def stop(seed: int, epoch: int, n: int, pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if epoch == 2:
            raise KeyboardInterrupt
        return draw(seed, epoch, n, pad)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "draw", stop)
        patch.setattr(runs, "SAVING_SHARE", math.inf)  # a checkpoint every epoch
        assert main(small(tmp_path)) == 130
    assert f"--out {tmp_path}" in capsys.readouterr().err
    return tmp_path


def test_a_run_that_goes_on_under_another_torch_says_so(interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "version", lambda package: f"newer {package}")
    assert main(small(interrupted)) == 0
    found = read_record(interrupted / "digits_lace_seed0_w1.jsonl")
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    (change,) = found["resumed"]
    assert (change["after_epoch"], change["versions"]["torch"]) == (2, "newer torch")


def test_ctrl_c_loses_the_epoch_at_work_only(interrupted: Path, finished: Path) -> None:
    record = interrupted / "digits_lace_seed0_w1.jsonl"
    assert [row["epoch"] for row in read_record(record)["epochs_log"]] == [0, 1]
    assert main(small(interrupted)) == 0
    assert figures(record) == figures(finished / "digits_lace_seed0_w1.jsonl")


@pytest.mark.parametrize("damage", ["truncated", "one bit", "missing"])
def test_a_damaged_checkpoint_falls_back_a_generation_and_ends_the_same(
    interrupted: Path, finished: Path, damage: str
) -> None:
    checkpoint = interrupted / "digits_lace_seed0_w1.checkpoint"
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        checkpoint.unlink()
    else:
        checkpoint.write_bytes(content if damage == "one bit" else content[:-100])
    assert main(small(interrupted)) == 0
    assert figures(interrupted / "digits_lace_seed0_w1.jsonl") == figures(finished / "digits_lace_seed0_w1.jsonl")
    assert weights(interrupted) == weights(finished)


def test_two_damaged_generations_are_an_error_that_changes_nothing(
    interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = interrupted / "digits_lace_seed0_w1.checkpoint"
    for file in (checkpoint, previous_generation(checkpoint)):
        file.write_bytes(file.read_bytes()[:1000])
    before = {file.name: file.read_bytes() for file in interrupted.iterdir()}
    assert_error(capsys, small(interrupted), "damaged", str(checkpoint))
    assert before == {file.name: file.read_bytes() for file in interrupted.iterdir()}


def test_a_save_that_fails_leaves_both_generations_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint"
    save_checkpoint(path, {"log": [1]})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    save_checkpoint(path, {"log": [1, 2]})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainError, match=f"{path} cannot be written, what was written before is kept: .*No space"):
        save_checkpoint(path, {"log": [1, 2, 3]})
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_a_checkpoint_is_its_sha256_and_what_torch_saved(finished: Path) -> None:
    digest, _, content = next(finished.glob("*.checkpoint")).read_bytes().partition(b"\n")
    assert hashlib.sha256(content).hexdigest().encode() == digest


def test_a_finished_run_is_left_alone(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in finished.iterdir() if file.suffix != ".png"}
    assert main(small(finished)) == 0
    assert "already finished" in capsys.readouterr().err
    assert before == {file.name: file.stat().st_mtime_ns for file in finished.iterdir() if file.suffix != ".png"}


def test_a_loss_that_is_not_finite_stops_and_names_epoch_and_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_error(capsys, small(tmp_path, "--lr", "1e30"), "the loss is", "epoch 1, step")


def test_a_gradient_that_is_not_finite_stops_and_the_checkpoint_before_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    norms = iter([1.0] * 20 + [math.inf] * 100)  # 15 steps an epoch
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda _: torch.tensor(next(norms)))
    monkeypatch.setattr(runs, "SAVING_SHARE", math.inf)
    assert_error(capsys, small(tmp_path), "the gradient's norm is inf in epoch 2, step 6 of 15", "checkpoint is kept")
    state = load_checkpoint(tmp_path / "digits_lace_seed0_w1.checkpoint", CPU)
    assert state is not None and len(state["log"]) == 1
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_weights_that_the_last_step_made_infinite_are_not_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_step = ["--batch", "1437", "--lr", "1e30", "--weight-decay", "1e30"]
    assert_error(capsys, small(tmp_path, *one_step), "not all weights are finite after epoch 1")
    assert not list(tmp_path.glob("*.checkpoint"))


# --- one owner of a run -----------------------------------------------------------------------------------------------


def is_locked(file: Path) -> bool:
    with open(file, "a") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_run_in_training_is_refused_to_a_second_process_until_the_first_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also by a kill, which leaves the file of the lock and files that were being written."""
    name, epochs, out = "digits_lace_seed0_w1", ["--epochs", "20"], tmp_path / "out"
    first = start(small(out, *epochs))
    while not (out / f"{name}.jsonl").exists():
        assert first.is_alive()
        time.sleep(0.01)
    assert_error(capsys, small(out, *epochs), name, f"process {first.pid} on {socket.gethostname()}", f"{name}.lock")
    assert first.is_alive(), "the first must be at work all the time, or nothing was shown"
    first.kill()
    first.join()
    assert (out / f"{name}.lock").exists()
    left = [out / f"{name}{kind}" for kind in (".checkpoint.1.tmp", ".jsonl.4194304.tmp", ".logits.npz.7.tmp")]
    others = [out / "digits_lace_seed0_w10.jsonl.1.tmp", out / "mine.tmp"]
    for file in (*left, *others):
        file.write_bytes(b"part")
    assert main(small(out, *epochs)) == 0
    assert main(small(tmp_path / "whole", *epochs)) == 0
    assert weights(out) == weights(tmp_path / "whole")
    assert {file.name for file in out.iterdir()} == {
        *(file.name for file in (tmp_path / "whole").iterdir()),
        *(file.name for file in others),
    }


def test_every_run_of_a_command_is_locked_before_its_files_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "digits_lace_seed1_w1.jsonl").write_text("no record")
    with open(tmp_path / "digits_lace_seed1_w1.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert_error(capsys, small(tmp_path, "--seeds", "0-1"), "digits_lace_seed1_w1: another process works")
        assert not (tmp_path / "digits_lace_seed0_w1.jsonl").exists()
        assert not (tmp_path / "digits_lace_seed0_w1.lock").exists(), "the lock of the run that is left, too"
    assert_error(capsys, small(tmp_path, "--seeds", "0-1"), "not JSON")


def test_a_finished_run_is_no_longer_locked_while_the_command_trains_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked, begin = list[list[bool]](), Training.begin

    def look(training: Training, epoch: int) -> None:
        locked.append([is_locked(tmp_path / f"digits_lace_seed{seed}_w1.lock") for seed in (0, 1)])
        begin(training, epoch)

    monkeypatch.setattr(Training, "begin", look)
    assert main(small(tmp_path, "--seeds", "0-1", "--epochs", "2")) == 0
    assert locked == [[True, True]] * 2 + [[False, True]] * 2


@pytest.mark.parametrize("command", [["export"], ["report", "--attack"]], ids=" ".join)
def test_what_writes_beside_a_record_is_refused_while_another_process_works_on_the_run(
    command: list[str], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "digits_lace_seed0_w1"
    before = {file.name: file.read_bytes() for file in finished.iterdir()}
    with open(finished / f"{name}.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert_error(capsys, [command[0], str(finished / f"{name}.jsonl"), *command[1:]], name, "another process works")
    (finished / f"{name}.lock").unlink()
    assert before == {file.name: file.read_bytes() for file in finished.iterdir()}


def test_a_lock_file_that_is_removed_makes_no_second_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between `open` and `lock` by the owner before, or by hand."""
    record, path, take, gone = tmp_path / "run.jsonl", tmp_path / "run.lock", lock.lock, list[Path]()

    def lose_it_once(file: Any) -> None:
        if not gone:
            gone.append(path)
            path.unlink()
        take(file)

    monkeypatch.setattr(lock, "lock", lose_it_once)
    with lock.owned(record):
        assert gone and is_locked(path)
        with pytest.raises(TrainError, match=f"run: process {os.getpid()} on"), lock.owned(record):
            pass
        path.unlink()
        with lock.owned(record):
            assert is_locked(path)
    assert not path.exists()
    with lock.owned(record):
        path.unlink()
        path.write_text("another's")
    assert path.read_text() == "another's"


def test_where_the_file_system_has_no_locks_a_run_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert main(small(tmp_path, "--epochs", "1")) == 0
    assert "digits_lace_seed0_w1.lock cannot be locked ([Errno 37] No locks available)" in capsys.readouterr().err


def write_often(path: Path, content: bytes) -> None:
    for _ in range(200):
        store.write(path, content)


def test_two_processes_that_write_one_file_leave_the_whole_content_of_one(tmp_path: Path) -> None:
    path, contents = tmp_path / "file", [b"a" * 100_000, b"b" * 200_000]
    writers = [server.Process(target=write_often, args=(path, content)) for content in contents]
    for writer in writers:
        writer.start()
    read = set[bytes]()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            read.add(path.read_bytes())
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert read <= set(contents)
    assert list(tmp_path.iterdir()) == [path]


# --- errors -----------------------------------------------------------------------------------------------------------


def assert_error(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> None:
    capsys.readouterr()
    assert main(arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert all(word in last for word in words), last


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seeds", "4-0"], ["--seeds", "'4-0'", "0-4"]),
        (["--seeds", "1,1"], ["'1,1'"]),
        (["--seeds", "-1"], ["--seeds"]),
        (["--seeds", "a"], ["'a'"]),
        (["--width", "0"], ["--width", "at least 1", "got 0"]),
        (["--epochs", "0"], ["--epochs", "at least 1", "got 0"]),
        (["--batch", "0"], ["--batch", "got 0"]),
        (["--width", "9999999999"], ["--width", "at most 16777216", "got 9999999999"]),
        (["--batch", "1" + "0" * 30], ["--batch", "at most 16777216"]),
        (["--threads", "0"], ["--threads", "got 0"]),
        (["--threads", "1" + "0" * 30], ["--threads", "at most 1024"]),
        (["--max-seconds", "nan"], ["--max-seconds", "at least 0", "nan"]),
        (["--max-seconds", "-1"], ["--max-seconds", "at least 0", "-1"]),
        (["--seeds", "0-999999999"], ["--seeds", "'0-999999999'", "at most 10,000"]),
        (["--seed=1"], ["unrecognized", "--seed=1"]),
        (["--weight=0"], ["unrecognized", "--weight=0"]),
        (["report", "--js"], ["--js"]),
        *((["report", "--attack", size], ["--attack", f"'{size}'"]) for size in ("0", "nan", "inf", "1,", "1,1", "a")),
        (["report", "--attack=-1"], ["--attack", "'-1'", "positive, finite"]),
        (["--strength", "1.5"], ["--strength", "[0, 1]", "1.5"]),
        (["--subset", "-1"], ["--subset", "at least 0", "-1"]),
        (["--shrink", "3"], ["--shrink 3", "8x8"]),
        (["--precision", "half"], ["--precision", "'half'"]),
        (["--schedule", "cosine"], ["--schedule", "steps or triangle", "'cosine'"]),
        (["--mode", "graph"], ["--mode graph", "CUDA"]),
        (["--replicas", "2"], ["--replicas 2", "--mode graph"]),
        (["--loss", "hinge"], ["--loss", "'hinge'"]),
        (["--batch", "4"], ["1437 images in batches of 4", "a last batch of one"]),
        (["--data", "no/such"], ["no/such", "train/ and test/"]),
        (["--nonsense"], ["--nonsense"]),
    ],
    ids=" ".join,
)
def test_a_wrong_argument_is_named_with_its_rule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    assert_error(capsys, ["--out", str(tmp_path), *SMALL, *arguments], *words)
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize("command", [[], ["report"], ["export"]], ids=str)
def test_help_names_every_setting_and_exits_with_0(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    names = {field.name for field in dataclasses.fields(Config)} - {"data", "loss", "seed"}
    assert all(f"--{name.replace('_', '-')}" in said for name in names) or command


def test_seeds_are_ranges_lists_and_numbers() -> None:
    assert [seeds(text) for text in ("0-4", "0,2,5", "3", "0-1,7")] == [[0, 1, 2, 3, 4], [0, 2, 5], [3], [0, 1, 7]]


def test_a_wrong_data_folder_is_named_with_the_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data"
    run = ["--data", str(folder), "--out", str(tmp_path / "out"), *SMALL]
    folder.mkdir()
    assert_error(capsys, run, str(folder), "train/ and test/")
    (folder / "train").mkdir()
    (folder / "test").mkdir()
    assert_error(capsys, run, str(folder / "train"), "a folder of images for every class")
    images(folder / "train" / "ant")
    assert_error(capsys, run, str(folder / "test"), "a folder of images for every class")
    images(folder / "test" / "wasp")
    assert_error(capsys, run, "wasp", f"{folder / 'train'} lacks")
    images(folder / "train" / "wasp")
    assert_error(capsys, run, "ant", f"{folder / 'test'} lacks")
    images(folder / "test" / "ant")
    images(folder / "train" / "wasp", size=(8, 9))
    assert_error(capsys, run, str(folder / "train" / "wasp" / "0.png"), "9x8", "8x8")
    (folder / "train" / "wasp" / "0.png").write_bytes(b"no picture")
    assert_error(capsys, run, str(folder / "train" / "wasp" / "0.png"), "not an image")


def test_a_failed_download_of_cifar100_says_where_it_looked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision.datasets

    def offline(*_: object, **__: object) -> None:
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", offline)
    assert_error(capsys, ["--data", "cifar100", "--root", "here", "--out", str(tmp_path)], "'here'", "File not found")


def test_results_that_cannot_be_written_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert_error(capsys, small(tmp_path / "file"), str(tmp_path / "file"))


@pytest.mark.parametrize("state", ["finished", "interrupted"])
def test_another_runs_files_are_refused_by_the_name_of_the_setting(
    state: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    out = request.getfixturevalue(state)
    assert_error(capsys, small(out, "--lr", "0.05"), "lr = 0.1", "0.05", "digits_lace_seed0_w1")


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_an_exported_model_gives_the_runs_own_figures_without_torch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    for split in ("train", "test"):
        for name in ("ant", "bee", "cat", "dog", "elk", "fox"):
            images(tmp_path / "data" / split / name, size=(16, 8), n=20)
    arguments = ["--data", str(tmp_path / "data"), "--out", str(tmp_path), "--loss", "lace", "--shrink", "2"]
    assert main([*SMALL, *arguments, "--batch", "20", "--epochs", "5"]) == 0
    capsys.readouterr()
    record = next(tmp_path.glob("*.jsonl"))
    assert main(["export", str(record)]) == 0
    exported = capsys.readouterr().out.splitlines()[-1]
    assert exported == str(record.with_suffix(".onnx"))

    before = {file.name: file.read_bytes() for file in tmp_path.glob("*.*")}
    with monkeypatch.context() as patch:
        patch.setattr(store.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert_error(capsys, ["export", str(record)], exported, "No space")
    assert before == {file.name: file.read_bytes() for file in tmp_path.glob("*.*")}, "the model before is whole"

    without_torch = "import sys; sys.modules['torch'] = None; from lace_loss.train.deployed import main;"
    without_torch += "sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", without_torch, exported, str(tmp_path / "data" / "test")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    found = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
    expected = read_record(record)["sets"]["test"]
    assert found["count"] == 120
    assert [100 * (1 - found["accuracy"][k]) for k in "15"] == [expected["top1_error"], expected["top5_error"]]
    assert found["cross_entropy"] == pytest.approx(expected["nll"], rel=1e-5)
    assert 100 * found["calibration_error"] == pytest.approx(expected["calibration_error"], rel=1e-4)

    # One listing: what systems and people put beside images is read past by training and here; images may lie deeper.
    test = tmp_path / "data" / "test"
    for junk in (".DS_Store", "elk/.DS_Store", "elk/._0.png", "elk/readme.txt", "elk/.cache/0.png", ".git/0.png"):
        (test / junk).parent.mkdir(exist_ok=True)
        (test / junk).write_text("no picture")
    assert main([*SMALL, *arguments, "--batch", "20", "--epochs", "5"]) == 0, "the same data: the run is done"
    (test / "elk" / "deep").mkdir()
    (test / "elk" / "0.png").rename(test / "elk" / "deep" / "0.PNG")
    again = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
    assert again == found
    (test / "elk" / "deep" / "0.PNG").rename(test / "elk" / "0.png")
    (test / "dog").rename(test / "hound")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        f"error: class 3 of {test} is 'elk', and 'dog' of the model: name the folders as it does",
    )
    (test / "hound").rename(test / "dog")

    for text, words in (("another size", ["16x8 pixels", "8x16"]), ("no picture", ["elk/0.png", "identify"])):
        bad = tmp_path / "data" / "test" / "elk" / "0.png"
        images(bad.parent, size=(8, 16), n=1) if text == "another size" else bad.write_text(text)
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and all(word in done.stderr for word in words), done.stderr


def test_an_export_without_weights_or_of_an_unfinished_run_is_an_error(
    finished: Path, interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "digits_lace_seed0_w1.jsonl"
    assert_error(capsys, ["export", str(interrupted / name)], name, "not finished")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / name).write_bytes((finished / name).read_bytes())
    assert_error(capsys, ["export", str(alone / name)], "weights", "digits_lace_seed0_w1.checkpoint")
    other = (interrupted / name).with_suffix(".checkpoint")
    (alone / other.name).write_bytes(other.read_bytes())
    for arguments in (["export", str(alone / name)], ["report", str(alone), "--attack"]):
        assert_error(capsys, arguments, str(alone / other.name), "does not belong to the run recorded in", name)


# --- attacks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("size", [0.5, 1.0, 2.0, 8.0])
def test_an_attack_on_a_linear_model_moves_every_pixel_by_its_size_against_the_true_class(
    size: float, steps: int
) -> None:
    """Two classes: the gradient's sign is that of (w_other - w_true), whatever the image, and the margin loses
    size / 255 times the sum of |w_other - w_true|.
    """
    model, mean = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)), torch.full((3, 2, 2), 0.4)
    pixels = torch.randint(20, 230, (200, 3, 2, 2), dtype=torch.uint8)
    labels = torch.randint(0, 2, (200,))
    w = model[1].weight.detach()
    change = (w[1 - labels] - w[labels]).view(-1, 3, 2, 2)
    found = adversarial(model, pixels, labels, mean, size, steps)
    assert torch.equal(found, pixels + size * change.sign())
    with torch.no_grad():
        before, after = (model(normalised(x, mean)).gather(1, labels[:, None]) for x in (pixels, found))
        others = [model(normalised(x, mean)).gather(1, 1 - labels[:, None]) for x in (pixels, found)]
    lost = (before - others[0]) - (after - others[1])
    assert lost[:, 0] == pytest.approx(size / 255 * change.abs().sum((1, 2, 3)), abs=1e-5)


def test_pgd_stays_near_the_image_within_the_pixels_range_and_raises_the_loss() -> None:
    digits, model = load("digits", "unused", CPU), ResNet18(2, 10, 1).eval()
    x, labels = digits.test_images[:50], digits.test_labels[:50]
    changed = adversarial(model, x, labels, digits.mean, 8.0, 10)
    assert changed.min() >= 0 and changed.max() <= 255
    assert (changed - x).abs().max() <= 8
    losses = [torch.nn.functional.cross_entropy(model(normalised(y, digits.mean)), labels) for y in (x, changed)]
    assert losses[1] > losses[0]


def test_a_report_with_attacks_adds_them_to_the_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path
) -> None:
    name = "digits_lace_seed0_w1"
    for suffix in (".jsonl", ".checkpoint"):
        (tmp_path / f"{name}{suffix}").write_bytes((finished / f"{name}{suffix}").read_bytes())
    assert main(["report", str(tmp_path), "--attack"]) == 0
    said = capsys.readouterr().out
    found = read_record(tmp_path / f"{name}.jsonl")["sets"]
    attacks = [f"{kind} {size}/255" for kind in ("FGSM", "PGD-10") for size in ("0.5", "1", "2")]
    assert set(found) == {"test", "train", *attacks}
    places = [said.index(f"| top-1 error, {attack}, %") for attack in attacks]
    assert places == sorted(places)
    assert found["PGD-10 2/255"]["top1_error"] >= found["test"]["top1_error"]
    assert main(["report", str(tmp_path), "--attack", "8,2"]) == 0
    more = read_record(tmp_path / f"{name}.jsonl")["sets"]
    assert more.keys() - found.keys() == {"FGSM 8/255", "PGD-10 8/255"}, "beside those of the sizes before"
    assert {key: more[key] for key in found} == found
    assert more["FGSM 8/255"]["top1_error"] > more["FGSM 0.5/255"]["top1_error"]
    (tmp_path / f"{name}.checkpoint").unlink()
    assert main(["report", str(tmp_path), "--attack"]) == 0, "what the records hold is not asked again"
    (tmp_path / f"{name}.jsonl").write_bytes((finished / f"{name}.jsonl").read_bytes())
    assert_error(capsys, ["report", str(tmp_path), "--attack"], "weights", f"{name}.checkpoint")
    for split in ("train", "test"):
        images(tmp_path / "other" / split / "ant")
    arguments = ["--data", str(tmp_path / "other"), "report", str(tmp_path), "--attack"]
    assert_error(capsys, arguments, name, "other data")


# --- files of another meaning -----------------------------------------------------------------------------------------


def sealed(path: Path, content: bytes) -> None:
    path.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(name, "text")
    return buffer.getvalue()


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


class Command:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("executed",)


NOT_CHECKPOINTS = {
    "nothing": b"",
    "text": b"weights",
    "numbers": bytes(range(256)) * 100,
    "a command in a pickle": pickle.dumps(Command()),
    "a command that torch saved": saved({"header": Command()}),
    "a zip": zipped("text"),
    "a zip that looks like torch's": zipped("archive/data.pkl"),
    "half a file of torch": saved({"model": torch.zeros(1000)})[:2000],
    "a list": saved([1, 2]),
    "a tensor": saved(torch.zeros(3)),
    "a dict of other keys": saved({"state_dict": {}, "epoch": 3}),
}


def without(key: str) -> Callable[[Record], object]:
    return lambda state: state.pop(key)


def with_(key: str, value: object) -> Callable[[Record], object]:
    return lambda state: state.update({key: value})


def with_header(key: str, value: object) -> Callable[[Record], object]:
    return lambda state: state["header"].update({key: value})


def with_row(key: str, value: object) -> Callable[[Record], object]:
    return lambda state: state["log"][1].update({key: value})


def with_tensor(part: str, key: Any, change: Callable[[torch.Tensor], object]) -> Callable[[Record], object]:
    return lambda state: state[part].__setitem__(key, change(state[part][key]))


# What is done to the right content, and the words of the answer.
OTHER_MEANINGS: list[tuple[Callable[[Record], object], str]] = [
    *((without(key), f"it lacks {key}") for key in ("header", "log", "mean", "model", "momentum")),
    (with_("header", [1]), "header must be a dict"),
    (with_("log", {}), "log must be a list"),
    (with_("log", [1, 2]), "line 2: not a line of a record"),
    (with_("model", None), "model must be a dict of tensors"),
    (with_("model", {"head.weight": 1}), "model must be a dict of tensors"),
    (with_("momentum", {}), "momentum must be a list of tensors"),
    (with_("mean", torch.zeros(8, 8)), "mean must be a float32 tensor of three dimensions"),
    (with_header("lr", 0.05), "lr = 0.05, not 0.1"),
    (with_header("lr", torch.zeros(3)), "not those of a record"),
    (with_header("seed", -1), "line 1: seed must be a whole number"),
    (with_header("resumed", 5), "resumed must be a list"),
    (with_header("mode", math.inf), "not those of a record"),
    (with_row("epoch", 5), "line 3: epoch must be 1"),
    (with_row("seconds", "long"), "line 3: seconds must be a number"),
    (with_row("train_loss", math.nan), "not those of a record"),
    (lambda state: state["log"][1].pop("train_loss"), "line 3: it lacks train_loss"),
    (
        lambda state: state["log"].append(state["log"][2] | {"epoch": 3}),
        "line 5: the run has more epochs than --epochs",
    ),
    (lambda state: state["log"][2].update(final=True, sets={}), "line 4: "),
    (lambda state: state["momentum"].pop(), "does not fit: its momentum of parameter 61 is missing"),
    (lambda state: state["momentum"].append(torch.zeros(1)), "this run's missing"),
    (lambda state: state["model"].pop("head.bias"), "does not fit: its head.bias is missing"),
    (with_tensor("momentum", 0, lambda t: t[:, :, :2]), "momentum of parameter 0 is (1, 1, 2, 3)"),
    (with_tensor("momentum", 0, torch.Tensor.double), "momentum of parameter 0 is (1, 1, 3, 3) torch.float64"),
    (with_tensor("momentum", 0, torch.Tensor.to_sparse), "momentum must be a list of tensors"),
    (with_tensor("model", "head.weight", lambda t: t.to("meta")), "model must be a dict of tensors"),
    (with_tensor("model", "head.weight", torch.Tensor.long), "its head.weight is (10, 8) torch.int64"),
    (with_tensor("model", "head.weight", lambda t: t[:5]), "its head.weight is (5, 8) torch.float32"),
]


@pytest.fixture
def at_the_last_line(finished: Path, tmp_path: Path) -> Path:
    """A run whose record lacks its last line, so that its checkpoint is read; the path of the checkpoint."""
    name = "digits_lace_seed0_w1"
    (tmp_path / f"{name}.checkpoint").write_bytes((finished / f"{name}.checkpoint").read_bytes())
    lines = (finished / f"{name}.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / f"{name}.jsonl").write_text("".join(lines[:-1]))
    return tmp_path / f"{name}.checkpoint"


def refused_unchanged(capsys: pytest.CaptureFixture[str], arguments: list[str], checkpoint: Path, *words: str) -> None:
    before = {file.name: file.read_bytes() for file in checkpoint.parent.iterdir()}
    assert_error(capsys, arguments, str(checkpoint), *words)
    assert before == {file.name: file.read_bytes() for file in checkpoint.parent.iterdir()}


def test_a_checkpoint_with_the_right_sha256_and_other_content_is_refused(
    at_the_last_line: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(at_the_last_line.parent)
    for content in NOT_CHECKPOINTS.values():
        sealed(at_the_last_line, content)
        refused_unchanged(capsys, small(at_the_last_line.parent), at_the_last_line, "not a checkpoint")
    assert not Path("executed").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, when it reads a sparse tensor
def test_a_checkpoint_that_lacks_something_or_does_not_fit_is_refused_with_what_it_is(
    at_the_last_line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = load_checkpoint(at_the_last_line, CPU)
    assert right is not None and len(right["momentum"]) == 62
    for change, words in OTHER_MEANINGS:
        state = copy.deepcopy(right)
        change(state)
        sealed(at_the_last_line, saved(state))
        refused_unchanged(capsys, small(at_the_last_line.parent), at_the_last_line, words)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(50_000)
    content = saved(right | {"header": right["header"] | {"mode": nested(5000)}})
    sys.setrecursionlimit(limit)
    sealed(at_the_last_line, content)
    refused_unchanged(capsys, small(at_the_last_line.parent), at_the_last_line, "not those of a record", "recursion")
    sealed(at_the_last_line, saved(right | {"model": dict(right["model"])}))
    assert main(small(at_the_last_line.parent)) == 0, "the rest is right"


@pytest.mark.parametrize("command", [["export"], ["report", "--attack"]], ids=" ".join)
def test_a_finished_runs_checkpoint_must_be_of_its_header_and_hold_its_model(
    command: list[str], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "digits_lace_seed0_w1"
    (tmp_path / f"{name}.jsonl").write_bytes((finished / f"{name}.jsonl").read_bytes())
    right = load_checkpoint(finished / f"{name}.checkpoint", CPU)
    assert right is not None
    checkpoint, arguments = tmp_path / f"{name}.checkpoint", [command[0], str(tmp_path / f"{name}.jsonl"), *command[1:]]
    for change, words in [
        (with_header("lr", 0.05), "lr = 0.05, not 0.1"),
        (with_header("data_sha256", "0"), "data_sha256 = '0'"),
        (with_row("train_loss", 1.0), "their logs differ"),
        (with_tensor("model", "head.weight", lambda t: t[:5]), "its head.weight is (5, 8) torch.float32"),
    ]:
        state = copy.deepcopy(right)
        change(state)
        sealed(checkpoint, saved(state))
        refused_unchanged(capsys, arguments, checkpoint, words)


def test_a_record_under_the_name_of_another_file_of_the_run_is_not_overwritten(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in (".onnx", ".lock"):
        file = tmp_path / f"run{suffix}"
        file.write_bytes((finished / "digits_lace_seed0_w1.jsonl").read_bytes())
        assert_error(capsys, ["export", str(file)], str(file), ".jsonl")
        assert file.read_bytes() == (finished / "digits_lace_seed0_w1.jsonl").read_bytes()


def png_header(width: int, height: int) -> bytes:
    """The first bytes of a PNG file of so many pixels, up to where they begin."""
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 200) + b"IDAT"


NOT_IMAGES = {
    "nothing": b"",
    "text": b"no picture",
    "3.6e9 pixels": png_header(60_000, 60_000),
    "a PNG without pixels": png_header(8, 8),
    "a PNG that is damaged": png_header(8, 8) + bytes(300),
    "a PNG whose chunks are damaged": png_header(8, 8)[:-8] + b"\0\0\0\4\1\2\3\4" * 30,
}


@pytest.mark.parametrize("kind", NOT_IMAGES)
def test_a_file_that_is_no_image_is_named_also_in_training(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "test"):
        images(tmp_path / "data" / split / "ant")
    bad = tmp_path / "data" / "train" / "ant" / "1.png"
    bad.write_bytes(NOT_IMAGES[kind])
    assert_error(capsys, small(tmp_path, "--data", str(tmp_path / "data")), f"{bad} is not an image")


def onnx_model(
    batch: object = "n",
    type_in: str = "UINT8",
    type_out: str = "FLOAT",
    two_inputs: bool = False,
    two_outputs: bool = False,
    size: object = 8,
    filled: float = 0.0,
    classes: object = 2,
    class_names: str | None = None,
) -> bytes:
    """(n, 3, 8, 8) pixels to (n, 2) logits: `filled` times the means of the channels and of all."""
    import onnx
    from onnx import TensorProto, helper

    given = [helper.make_tensor_value_info("x", getattr(TensorProto, type_in), [batch, 3, size, size])]
    made = [helper.make_tensor_value_info("y", getattr(TensorProto, type_out), [batch, classes])]
    factor = helper.make_tensor("factor", TensorProto.FLOAT, [3, 2], [filled] * 6)
    nodes = [
        helper.make_node("Cast", ["x"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["means", "factor"], ["product"]),
        helper.make_node("Cast", ["product"], ["y"], to=getattr(TensorProto, type_out)),
    ]
    if two_inputs:
        given.append(helper.make_tensor_value_info("unused", TensorProto.FLOAT, [1]))
    if two_outputs:
        made.append(helper.make_tensor_value_info("means", TensorProto.FLOAT, [batch, 3]))
    graph = helper.make_graph(nodes, "model", given, made, [factor])
    opset = [helper.make_opsetid("", 13)]
    made_model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    if class_names is not None:
        helper.set_model_props(made_model, {"class_names": class_names})
    return made_model.SerializeToString()


def test_a_model_or_an_image_that_cannot_be_used_is_named_by_deployed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package)
    from lace_loss.train import deployed

    for name in ("ant", "bee"):
        images(tmp_path / "data" / name)
    model, data = tmp_path / "model.onnx", tmp_path / "data"
    right = onnx_model()

    def refused(content: bytes, *words: str) -> None:
        model.write_bytes(content)
        capfd.readouterr()
        assert deployed.main([str(model), str(data)]) == 2
        last = capfd.readouterr().err.splitlines()[-1]
        assert last.startswith("error: ") and all(word in last for word in words), last

    for content in (b"", b"no model", right[: len(right) // 2], bytes(len(right)), zipped("model"), saved({})):
        refused(content, str(model))
    refused(onnx_model(type_in="FLOAT"), str(model), "tensor(float)", "one input, tensor(uint8)")
    refused(onnx_model(type_out="DOUBLE"), str(model), "tensor(double)", "one output")
    refused(onnx_model(two_inputs=True), str(model), "tensor(uint8)", "[1]")
    refused(onnx_model(two_outputs=True), str(model), "one output")
    refused(onnx_model(batch=4), str(model), "any number")
    refused(onnx_model(size="side"), str(model), "'side'", "height")
    refused(onnx_model(filled=math.nan), str(model), str(data / "ant" / "0.png"), "not finite")
    refused(onnx_model(filled=math.inf), str(model), str(data / "ant" / "0.png"), "not finite")
    refused(onnx_model(size=4), str(data / "ant" / "0.png"), "8x8 pixels", "4x4")
    bad = data / "bee" / "1.png"
    for content in NOT_IMAGES.values():
        bad.write_bytes(content)
        refused(right, f"{bad} is not an image")
    bad.unlink()
    (data / "cat").mkdir()
    (data / "cat" / "cat.txt").write_text("no picture")
    refused(right, f"there is no image in {data / 'cat'}: no name ends with .bmp, .jpeg")
    images(data / "cat")
    refused(right, str(data), "3 classes, the model 2")
    for text in ("no JSON", "null", '["ant", "bee", "cat"]', '{"ant": 0, "bee": 1}'):
        (data / "cat").rename(tmp_path / "cat")
        refused(
            onnx_model(class_names=text), str(model), "class_names in its metadata that are no list of its 2 classes"
        )
        (tmp_path / "cat").rename(data / "cat")
    for folder in ("none", "data/ant", "model.onnx"):
        assert deployed.main([str(model), str(tmp_path / folder)]) == 2
        assert f"there is no {tmp_path / folder}/CLASS/IMAGE" in capfd.readouterr().err
    for other in (tmp_path, tmp_path / "none.onnx"):
        assert deployed.main([str(other), str(data)]) == 2
        assert f"there is no file {other}" in capfd.readouterr().err
    images(data / "cat", n=0)
    for file in (*(data / "cat").iterdir(), data / "cat"):
        file.unlink() if file.is_file() else file.rmdir()
    model.write_bytes(right)
    assert deployed.main([str(model), str(data)]) == 0, "the rest is right"
    assert json.loads(capfd.readouterr().out)["count"] == 5
    model.write_bytes(onnx_model(class_names='["ant", "wasp"]'))
    assert deployed.main([str(model), str(data)]) == 2
    assert f"class 1 of {data} is 'bee', and 'wasp' of the model" in capfd.readouterr().err


@pytest.mark.parametrize("package", ["torch", "tqdm"])
def test_a_missing_package_is_named_with_the_extra_that_has_it(package: str) -> None:
    run = "runpy.run_module('lace_loss.train', run_name='__main__')"
    code = f"import runpy, sys; sys.modules[{package!r}] = None; {run}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: python -m lace_loss.train needs {package}: pip install 'lace-loss[train]'\n"


@pytest.mark.parametrize("package", ["onnxruntime", "PIL"])
def test_deployed_says_which_package_it_lacks(package: str, tmp_path: Path) -> None:
    images(tmp_path / "data" / "ant")
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    (tmp_path / "model.onnx").write_bytes(onnx_model())
    without = f"import sys; sys.modules[{package!r}] = None; from lace_loss.train.deployed import main;"
    command = [
        sys.executable,
        "-c",
        f"{without} sys.exit(main(sys.argv[1:]))",
        tmp_path / "model.onnx",
        tmp_path / "data",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: python -m lace_loss.train.deployed needs {package}: pip install onnxruntime pillow\n"
    )
