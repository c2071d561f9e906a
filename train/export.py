"""A finished run's model as an ONNX file; `python -m lace_loss.train.deployed` tests such a file without torch."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import TrainError
from .lock import owned
from .model import ResNet18
from .store import finished_checkpoint, record_lines, restore, write


class FromPixels(nn.Module):
    """(N, C, H, W) uint8 images as the data set has them to (N, classes) logits: the mean and shrinking are inside."""

    mean: Tensor

    def __init__(self, model: ResNet18, mean: Tensor, shrink: int) -> None:
        super().__init__()
        self.model, self.shrink = model, shrink
        self.register_buffer("mean", mean)

    def forward(self, images: Tensor) -> Tensor:
        x = images.float()
        if self.shrink > 1:
            x = F.avg_pool2d(x, self.shrink).round()
        logits: Tensor = self.model(x / 255 - self.mean)
        return logits


def export(record_path: Path) -> Path:
    """Write the model of a run beside its record, and return the path of the file.

    Raises TrainError where the run is not finished, its checkpoint is not beside it, another process works on the run,
    or onnx is not installed.
    """
    header, log, final = record_lines(record_path)
    if not final:
        raise TrainError(f"{record_path} belongs to a run that is not finished")
    path = record_path.with_suffix(".onnx")
    with owned(record_path):
        state = finished_checkpoint(record_path, header, log, torch.device("cpu"))
        mean, shrink = state["mean"], header["shrink"]
        channels, height, width = mean.shape
        model = ResNet18(header["width"], header["classes"], channels)
        restore(record_path.with_suffix(".checkpoint"), {"model": state["model"]}, {"model": model.state_dict()})
        whole = FromPixels(model, mean, shrink).eval()
        images = torch.zeros(2, channels, height * shrink, width * shrink, dtype=torch.uint8)
        try:
            program = torch.onnx.export(whole, (images,), dynamo=True, dynamic_shapes=({0: "n"},), verbose=False)
        except ModuleNotFoundError as error:
            raise TrainError(f"an export needs {error.name}: pip install 'lace-loss[integrations]'") from error
        assert program is not None
        if "class_names" in header:  # which older records lack
            program.model.metadata_props["class_names"] = json.dumps(header["class_names"])
        write(path, program.model_proto.SerializeToString())
    return path
