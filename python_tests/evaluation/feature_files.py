"""Small feature networks with random weights, saved as users' files are."""

from __future__ import annotations

from pathlib import Path

import torch
from factories import randomise
from torch import nn

from pyard.evaluation.pixels import resized


class Block(nn.Module):
    """As a block of the Inception of FID: its first branch is `conv`."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 1)
        self.tower = nn.Conv2d(channels, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.conv(x), self.tower(x)], dim=1)


class Layers(nn.Module):
    """A container whose children run in order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=16)
        self.pool = nn.AvgPool2d(2)
        self.mixed_6 = Block(6)
        self.end = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(self.mixed_6(self.pool(self.conv(x))))


class SmallInception(nn.Module):
    """The face of inception-2015-12-05.pt: bytes in, resized inside as TensorFlow 1 did, features or probabilities out."""

    def __init__(self, shift: float = 128.0):
        super().__init__()
        self.shift = shift
        self.layers = Layers()
        self.output = nn.Linear(12, 5)
        randomise(self, seed=3, std=0.5)

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        n, c, h, w = img.shape
        theta = torch.eye(2, 3)
        theta[0, 2] += 1 / w - 1 / 299
        theta[1, 2] += 1 / h - 1 / 299
        grid = nn.functional.affine_grid(theta[None].repeat([n, 1, 1]), [n, c, 299, 299], align_corners=False)
        x = nn.functional.grid_sample(img.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
        features = self.layers((x - self.shift) / 128).flatten(1)
        if return_features:
            return features
        logits = features @ self.output.weight.T if no_output_bias else self.output(features)
        return logits.softmax(dim=1)

    def spatial(self, pixels: torch.Tensor) -> torch.Tensor:
        """The first branch of `mixed_6`, which `forward` does not give."""
        x = (resized(pixels.float(), 299, "tf1") - 128) / 128
        return self.layers.mixed_6.conv(self.layers.pool(self.layers.conv(x)))


class Plain(nn.Module):
    """Images to a tuple of features and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 9, 3, padding=1))
        self.head = nn.Linear(9, 6)
        randomise(self, seed=4, std=0.5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(x).mean(dim=(2, 3))
        return features, self.head(features)


def save_torchscript(module: nn.Module, path: Path) -> nn.Module:
    """Write a module as users get them, and give it back."""
    torch.jit.save(torch.jit.script(module.eval()), str(path))
    return module


def save_onnx(module: nn.Module, path: Path, size: int, batch_size: int | None = None) -> nn.Module:
    """Write a module as ONNX with outputs `features` and `logits`; a batch size of None is dynamic."""
    shape = None if batch_size else {"x": {0: torch.export.Dim("n")}}
    program = torch.onnx.export(
        module.eval(),
        (torch.zeros(batch_size or 2, 3, size, size),),
        dynamo=True,
        dynamic_shapes=shape,
        input_names=["x"],
        output_names=["features", "logits"],
        verbose=False,
    )
    assert program is not None
    program.save(str(path))
    return module
