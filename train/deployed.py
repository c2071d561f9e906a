"""Test an exported model on the CPU at hand, by onnxruntime and without torch.

    python -m lace_loss.train.deployed MODEL.onnx FOLDER     FOLDER has a folder of images for every class

Prints the figures of `lace_loss.ext.evaluate`, which are those of the run's own test (but for rounding where that was
in bfloat16: the model is in float32). Needs onnxruntime and Pillow.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

from lace_loss import ext


def loaded(model: Path) -> Any:
    """The session of a model as `export` writes it. Raises ValueError for any other file."""
    try:
        session = onnxruntime.InferenceSession(model)
    except Exception as error:  # onnxruntime's have no base of their own
        raise ValueError(f"{model} is no model that onnxruntime reads: {error}") from error
    given, made = ([(x.type, x.shape) for x in values] for values in (session.get_inputs(), session.get_outputs()))
    match given, made:
        case [("tensor(uint8)", [str() | None, 1 | 3, int(), int()])], [("tensor(float)", [str() | None, int()])]:
            return session
    raise ValueError(
        f"{model} has inputs {given} and outputs {made}; a model by `export` has one input, tensor(uint8) of"
        " [any number, 1 or 3 channels, height, width], and one output, tensor(float) of [any number, classes]"
    )


def pixels(file: Path, channels: int, size: tuple[int, int]) -> np.ndarray:
    """Raises ValueError for a file that is no image, or one of another size (width, height)."""
    try:
        with Image.open(file) as image:
            found = image.size
            if found == size:
                return np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except Exception as error:  # Pillow has one for most of the formats, and one for an image that is too large
        raise ValueError(f"{file} is not an image: {error}") from error
    raise ValueError(f"{file} is {found[0]}x{found[1]} pixels, the model's images {size[0]}x{size[1]}")


def logits_of(model: Path, files: list[Path]) -> np.ndarray:
    """(N, classes), 100 images at a time. Raises ValueError for a wrong model or image."""
    session = loaded(model)
    (given,) = session.get_inputs()
    _, channels, height, width = given.shape
    blocks = []
    for start in range(0, len(files), 100):
        part = files[start : start + 100]
        images = np.stack([pixels(file, channels, (width, height)) for file in part])
        images = images.reshape(-1, height, width, channels).transpose(0, 3, 1, 2)
        try:
            (logits,) = session.run(None, {given.name: images})
        except Exception as error:
            raise ValueError(f"{model} fails on {len(part)} images from {part[0]} on: {error}") from error
        if logits.ndim != 2 or len(logits) != len(part):
            raise ValueError(f"{model} gives logits of shape {logits.shape} for {len(part)} images")
        if len(bad := (~np.isfinite(logits).all(axis=1)).nonzero()[0]):
            raise ValueError(f"{model} gives logits for {part[bad[0]]} that are not finite")
        blocks.append(logits)
    return np.concatenate(blocks)


def evaluation(model: Path, folder: Path) -> ext.Evaluation:
    """Raises OSError or ValueError for what cannot be used."""
    classes = sorted(path for path in folder.glob("*") if path.is_dir())
    files = [(file, label) for label, path in enumerate(classes) for file in sorted(path.iterdir())]
    for missing, there in ((f"{folder}/CLASS/IMAGE", files), (f"file {model}", model.is_file())):
        if not there:
            raise ValueError(f"there is no {missing}")
    logits = logits_of(model, [file for file, _ in files])
    if logits.shape[1] != len(classes):
        raise ValueError(f"{folder} has {len(classes)} classes, the model {logits.shape[1]}")
    return ext.evaluate(logits, np.array([label for _, label in files]), strength=0.0)


def main(arguments: list[str]) -> int:
    top = argparse.ArgumentParser(
        "python -m lace_loss.train.deployed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("model", type=Path, metavar="MODEL.onnx")
    top.add_argument("folder", type=Path, metavar="FOLDER")
    args = top.parse_args(arguments)
    try:
        found = evaluation(args.model, args.folder)
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
