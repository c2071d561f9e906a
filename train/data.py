"""Data sets as uint8 tensors on one device, and their augmentation there.

A pixel x reaches the model as x / 255 - mean, where `mean` holds one value for every pixel position and channel, taken
over the training images. Crops come after that (He et al. 2016): the zeros padded around an image stand for the mean.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from .config import TrainError
from .images import image_files, pixels


@dataclass(frozen=True)
class Data:
    """Images (N, C, H, W) uint8 and labels (N,) int64 in [0, classes) of three sets, mean (C, H, W) float32 in [0, 1].

    `unused` holds the training images that a subset leaves out; it is empty where all are trained on.
    """

    name: str
    class_names: list[str]
    sha256: str  # of the six tensors' bytes, mean apart
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    unused_images: Tensor
    unused_labels: Tensor
    mean: Tensor

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def sets(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Images and labels by the name of the set, which a finished run is tested on."""
        sets = {"test": (self.test_images, self.test_labels), "train": (self.images, self.labels)}
        return sets | ({"unused": (self.unused_images, self.unused_labels)} if len(self.unused_images) else {})


def normalised(images: Tensor, mean: Tensor) -> Tensor:
    return images.to(torch.float32, copy=True).div_(255).sub_(mean)


def crop(images: Tensor, offsets: Tensor, pad: int) -> Tensor:
    """Window of the images' size at row and column `offsets` (N, 2), in [0, 2 pad], of the zero-padded (N, C, H, W)."""
    n, channels, height, width = images.shape
    device = images.device
    rows = offsets[:, 0, None] + torch.arange(height, device=device)
    columns = offsets[:, 1, None] + torch.arange(width, device=device)
    image = torch.arange(n, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[:, None, None]
    return F.pad(images, [pad] * 4)[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def flip(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror left and right the images that `chosen` (N,) bool names."""
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def draw(seed: int, epoch: int, n: int, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order (n,), crop offsets (n, 2) and flips (n,) bool of an epoch.

    A function of seed and epoch alone, so that a resumed run needs no state of a random generator.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    order, offsets, flips = random.permutation(n), random.integers(0, 2 * pad + 1, (n, 2)), random.random(n) < 0.5
    return torch.from_numpy(order), torch.from_numpy(offsets), torch.from_numpy(flips)


def load(data: str, root: str, device: torch.device, shrink: int = 1, subset: int = 0) -> Data:
    """Load `digits`, `cifar100` (below `root`, downloaded when missing), or a folder with train/ and test/.

    Raises TrainError for a folder that is missing or not laid out so, images of several sizes, a failed download, and
    images that cannot be shrunk or chosen as asked.
    """
    if data == "digits":
        arrays, class_names = digits(), [str(digit) for digit in range(10)]
    elif data == "cifar100":
        arrays, class_names = cifar100(root)
    else:
        arrays, class_names = folder(Path(data))
    images, labels, test_images, test_labels = arrays
    images, test_images = block_means(images, shrink), block_means(test_images, shrink)
    chosen = subset_mask(labels, subset)
    arrays = [images[chosen], labels[chosen], test_images, test_labels, images[~chosen], labels[~chosen]]
    arrays = [np.ascontiguousarray(array) for array in arrays]
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.data)
    mean = (arrays[0].mean(0, dtype=np.float64) / 255).astype(np.float32)
    tensors = [torch.from_numpy(array).to(device) for array in (*arrays, mean)]
    return Data(Path(data).resolve().name, class_names, digest.hexdigest(), *tensors)


def block_means(images: np.ndarray, side: int) -> np.ndarray:
    """Every block of side x side pixels replaced by its mean, rounded to uint8."""
    if side == 1:
        return images
    n, channels, height, width = images.shape
    if height % side or width % side:
        raise TrainError(f"--shrink {side} does not divide images of {width}x{height} pixels")
    blocks = images.reshape(n, channels, height // side, side, width // side, side)
    return np.rint(blocks.mean((3, 5), dtype=np.float32)).astype(np.uint8)


def subset_mask(labels: np.ndarray, subset: int) -> np.ndarray:
    """Which samples (N,) bool the subset holds: the first ones of every class, as many of each; all if it is 0."""
    if subset == 0:
        return np.ones(len(labels), bool)
    by_class, counts = np.argsort(labels, kind="stable"), np.bincount(labels)
    share, rest = divmod(subset, len(counts))
    if rest or share > counts.min():
        raise TrainError(
            f"--subset must be a multiple of the {len(counts)} classes and at most {len(counts) * counts.min()},"
            f" because one has {counts.min()} images; got {subset}"
        )
    index_in_class = np.empty_like(by_class)
    index_in_class[by_class] = np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)
    return index_in_class < share


Arrays = list[np.ndarray]  # images and labels for training, then for testing


def digits() -> Arrays:
    """1,797 handwritten digits, 8x8; every fifth is a test image, which spreads the writers over both parts."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    test = np.arange(len(labels)) % 5 == 0
    return [images[~test], labels[~test], images[test], labels[test]]


def cifar100(root: str) -> tuple[Arrays, list[str]]:
    from torchvision.datasets import CIFAR100

    try:
        parts = [CIFAR100(root, train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise TrainError(f"cifar100 is not below {root!r} and could not be downloaded: {error}") from error
    arrays = [array for part in parts for array in (part.data.transpose(0, 3, 1, 2), np.array(part.targets))]
    return arrays, parts[0].classes


def folder(path: Path) -> tuple[Arrays, list[str]]:
    """Arrays of an image folder, and the names of its classes in the order of their numbers."""
    parts = []
    for split in ("train", "test"):
        if not (path / split).is_dir():
            raise TrainError(f"--data {str(path)!r} must be digits, cifar100 or a folder with train/ and test/")
        try:
            parts.append(image_files(path / split))
        except ValueError as error:
            raise TrainError(f"{path / split} must hold a folder of images for every class: {error}") from error
    (classes, train), (others, test) = parts
    both = {"train": set(classes), "test": set(others)}
    for having, lacking in (("test", "train"), ("train", "test")):
        if missing := sorted(both[having] - both[lacking]):
            raise TrainError(f"{path / having} has classes that {path / lacking} lacks: {', '.join(missing)}")
    arrays: list[np.ndarray] = []
    for file, _ in tqdm(train + test, desc=f"reading {path.name}", unit=" images", disable=None):
        size = arrays[0].shape[1::-1] if arrays else None
        try:
            arrays.append(pixels(file, "RGB", size, "the images before it"))
        except ValueError as error:
            raise TrainError(str(error)) from error
    images, labels = np.stack(arrays).transpose(0, 3, 1, 2), np.array([label for _, label in train + test])
    n = len(train)
    return [images[:n], labels[:n], images[n:], labels[n:]], classes
