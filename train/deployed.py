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

from lace_loss import ext

from .images import image_files, pixels


def open_model(model: Path) -> Any:
    """Open a model as `export` writes it. Raises ValueError for any other file."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(model)
    except Exception as error:  # onnxruntime's have no base of their own
        raise ValueError(f"{model} is no model that onnxruntime reads: {error}") from error
    inputs, outputs = ([(x.type, x.shape) for x in xs] for xs in (session.get_inputs(), session.get_outputs()))
    match inputs, outputs:
        case [("tensor(uint8)", [str() | None, 1 | 3, int(), int()])], [("tensor(float)", [str() | None, int()])]:
            return session
    raise ValueError(
        f"{model} has inputs {inputs} and outputs {outputs}; a model by `export` has one input, tensor(uint8) of"
        " [any number, 1 or 3 channels, height, width], and one output, tensor(float) of [any number, classes]"
    )


def logits_of(model: Path, session: Any, files: list[Path]) -> np.ndarray:
    """Logits (N, classes), 100 images at a time. Raises ValueError for a wrong model or image."""
    (pixel_input,) = session.get_inputs()
    _, channels, height, width = pixel_input.shape
    mode, size = "L" if channels == 1 else "RGB", (width, height)
    blocks = []
    for start in range(0, len(files), 100):
        part = files[start : start + 100]
        images = np.stack([pixels(file, mode, size, "the model's images") for file in part])
        images = images.reshape(-1, height, width, channels).transpose(0, 3, 1, 2)
        try:
            (logits,) = session.run(None, {pixel_input.name: images})
        except Exception as error:
            raise ValueError(f"{model} fails on {len(part)} images from {part[0]} on: {error}") from error
        if logits.ndim != 2 or len(logits) != len(part):
            raise ValueError(f"{model} gives logits of shape {logits.shape} for {len(part)} images")
        if len(bad := (~np.isfinite(logits).all(axis=1)).nonzero()[0]):
            raise ValueError(f"{model} gives logits for {part[bad[0]]} that are not finite")
        blocks.append(logits)
    return np.concatenate(blocks)


def require_class_names(model: Path, session: Any, folder: Path, names: list[str]) -> None:
    """Raises ValueError unless the folder's classes are called as the model says, if it does."""
    text = session.get_modelmeta().custom_metadata_map.get("class_names")
    if text is None:
        return
    try:
        known = json.loads(text)
    except ValueError:
        known = None
    if not isinstance(known, list) or len(known) != len(names):
        raise ValueError(f"{model} has class_names in its metadata that are no list of its {len(names)} classes")
    for i, (name, own) in enumerate(zip(names, known, strict=True)):
        if name != own:
            raise ValueError(
                f"class {i} of {folder} is {name!r}, and {own!r} of the model: name the folders as it does"
            )


def evaluation(model: Path, folder: Path) -> ext.Evaluation:
    """Figures of the model on the folder. Raises OSError or ValueError for what cannot be used."""
    names, images = image_files(folder)
    if not model.is_file():
        raise ValueError(f"there is no file {model}")
    session = open_model(model)
    logits = logits_of(model, session, [file for file, _ in images])
    if logits.shape[1] != len(names):
        raise ValueError(f"{folder} has {len(names)} classes, the model {logits.shape[1]}")
    require_class_names(model, session, folder, names)
    return ext.evaluate(logits, np.array([label for _, label in images]), strength=0.0)


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
        result = evaluation(args.model, args.folder)
    except ModuleNotFoundError as error:
        print(f"error: {top.prog} needs {error.name}: pip install onnxruntime pillow", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
