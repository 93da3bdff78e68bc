"""A small classifier whose features replace Inception's on images too small for Inception (8x8 digits)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    """Three convolutions, a feature layer, a linear head. x: [N, C, H, W] in [-1, 1]."""

    def __init__(self, channels: int, classes: int, features: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.embed = nn.Linear(256, features)
        self.head = nn.Linear(features, classes)
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()))

    def features(self, x: Tensor) -> Tensor:
        """Return features [N, features] for FD and KID, with mean square 1 over the data (KID's kernel is cubic)."""
        return self._embedding(x) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """Return class logits [N, classes]."""
        return self.head(self._embedding(x))

    def _embedding(self, x: Tensor) -> Tensor:
        return F.silu(self.embed(self.body(x)))
