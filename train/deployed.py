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

import numpy as np
import onnxruntime
from PIL import Image

from lace_loss import ext


def logits_of(model: Path, files: list[Path]) -> np.ndarray:
    """(N, classes), 100 images at a time.

    Raises OSError for a file that is no image, ValueError for one of another size than the model's.
    """
    session = onnxruntime.InferenceSession(model)
    (given,) = session.get_inputs()
    _, channels, height, width = given.shape
    blocks = []
    for start in range(0, len(files), 100):
        pixels = []
        for file in files[start : start + 100]:
            image = Image.open(file).convert("L" if channels == 1 else "RGB")
            if image.size != (width, height):
                raise ValueError(f"{file} is {image.width}x{image.height} pixels, the model's images {width}x{height}")
            pixels.append(np.asarray(image))
        images = np.stack(pixels).reshape(-1, height, width, channels).transpose(0, 3, 1, 2)
        blocks.append(session.run(None, {given.name: images})[0])
    return np.concatenate(blocks)


def main(arguments: list[str]) -> int:
    top = argparse.ArgumentParser(
        "python -m lace_loss.train.deployed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("model", type=Path, metavar="MODEL.onnx")
    top.add_argument("folder", type=Path, metavar="FOLDER")
    args = top.parse_args(arguments)
    classes = sorted(path for path in args.folder.glob("*") if path.is_dir())
    files = [(file, label) for label, path in enumerate(classes) for file in sorted(path.iterdir())]
    if not files or not args.model.exists():
        missing = args.model if files else f"{args.folder}/CLASS/IMAGE"
        print(f"error: there is no {missing}", file=sys.stderr)
        return 2
    try:
        logits = logits_of(args.model, [file for file, _ in files])
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if logits.shape[1] != len(classes):
        print(f"error: {args.folder} has {len(classes)} classes, the model {logits.shape[1]}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(ext.evaluate(logits, np.array([label for _, label in files]), strength=0.0))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
