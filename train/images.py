"""Image folders: which files are images, of which class, and their pixels; the same for training and for `deployed`."""

import os
from pathlib import Path

import numpy as np

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def image_files(folder: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """Names of the classes, in order, and every image with the number of its class.

    Each folder is a class. Its images are the files below it, at any depth, whose names end with one of SUFFIXES.
    Names that begin with a dot are left out: systems and editors put hidden files and folders there. Raises ValueError
    where there is no class, or one without an image.
    """
    classes = sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())
    if not classes:
        raise ValueError(f"there is no {folder}/CLASS/IMAGE")
    images = []
    for label, name in enumerate(classes):
        walked = sorted(os.walk(folder / name, followlinks=True))
        below = [Path(at) / file for at, _, files in walked for file in sorted(files)]
        shown = [file for file in below if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
        of_class = [file for file in shown if file.suffix.lower() in SUFFIXES]
        if not of_class:
            raise ValueError(f"there is no image in {folder / name}: no name ends with {', '.join(SUFFIXES)}")
        images += [(file, label) for file in of_class]
    return classes, images


def pixels(file: Path, mode: str, size: tuple[int, int] | None, whose: str) -> np.ndarray:
    """Pixels (H, W) or (H, W, 3) uint8 in Pillow's mode "L" or "RGB".

    Raises ValueError for a file that is no image, or one of another `size` (width, height) than `whose` images have.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            width, height = image.size
            if size in (None, (width, height)):
                return np.asarray(image.convert(mode))
    except Exception as error:  # Pillow has one for most of the formats, and one for an image that is too large
        raise ValueError(f"{file} is not an image: {error}") from error
    assert size is not None
    raise ValueError(f"{file} is {width}x{height} pixels, {whose} {size[0]}x{size[1]}")
