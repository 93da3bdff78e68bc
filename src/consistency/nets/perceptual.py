"""LPIPS, CTM's distance: differences of VGG16 features, weighted by fits to human judgements of similarity."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchmetrics.functional.image.lpips import _LPIPS, _normalize_tensor

from consistency.base.errors import UserError, user_error

# As in CTM, images smaller than 256 pixels are resized to VGG's 224.
_SMALL, _SIZE = 256, 224


class PerceptualDistance(nn.Module):
    """LPIPS v0.1 by VGG16 with average pooling (Zhang et al. 2018; Gatys et al. 2016). Downloads nothing.

    Maps pairs of images [N, 1 or 3, H, W] in [-1, 1] to distances [N]. weights: torchvision's VGG16, of which only the
    convolutions are read. The weights are frozen; gradients reach the images. Raises UserError for another file.
    """

    def __init__(self, weights: Path) -> None:
        super().__init__()
        # torchmetrics' public class would download the backbone. The random initial weights, which the file's replace,
        # must not advance the training's generator.
        with torch.random.fork_rng(devices=[]):
            lpips = _LPIPS(net="vgg", pnet_rand=True)
        self.scaling, self.slices = lpips.scaling_layer, nn.ModuleList(lpips.net.children())
        # The last layer of each: the dropout before it is for fitting.
        self.linear = nn.ModuleList(layer.model[-1] for layer in lpips.lins)
        _read_convolutions(self.slices, weights)
        _average_pooling(self.slices)
        self.requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return distances [N] of images a and b. VGG runs in the ambient autocast, all else in the weights' dtype."""
        features = zip(self._features(self._prepared(a)), self._features(self._prepared(b)), strict=True)
        with torch.autocast(a.device.type, enabled=False):
            return torch.stack([self._layer(k, u, v) for k, (u, v) in enumerate(features)]).sum(0)

    def _prepared(self, images: Tensor) -> Tensor:
        """Convert to three channels, VGG's size, and ImageNet's mean and deviation."""
        images = images.to(self.scaling.shift.dtype).expand(-1, 3, -1, -1)
        if images.shape[-1] < _SMALL:
            images = interpolate(images, size=(_SIZE, _SIZE), mode="bilinear", align_corners=False)
        return self.scaling(images)

    def _features(self, x: Tensor) -> list[Tensor]:
        """Return the activations relu1_2, relu2_2, relu3_3, relu4_3, relu5_3."""
        features = []
        for layers in self.slices:
            x = layers(x)
            features.append(x)
        return features

    def _layer(self, k: int, u: Tensor, v: Tensor) -> Tensor:
        """Return the weighted squared difference of unit-length features, averaged over the pixels, [N]."""
        dtype = self.scaling.shift.dtype
        difference = _normalize_tensor(u.to(dtype)) - _normalize_tensor(v.to(dtype))
        return self.linear[k](difference.square()).mean((1, 2, 3))


def _average_pooling(slices: nn.ModuleList) -> None:
    for layers in slices:
        for name, layer in layers.named_children():
            if isinstance(layer, nn.MaxPool2d):
                setattr(layers, name, nn.AvgPool2d(layer.kernel_size, layer.stride))


def _read_convolutions(slices: nn.ModuleList, path: Path) -> None:
    """Load the convolutions from torchvision's state dict, whose keys are features.<layer>.weight and .bias."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Errors of unpickling a foreign file have no common class; torch's text suggests unsafe loading.
        message = f"{path} is not a file of VGG16 weights: it is damaged or holds more than tensors"
        raise user_error(error, message) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a file of VGG16 weights: it holds no state dict")
    for name, parameter in (named for layers in slices for named in layers.named_parameters()):
        value = content.get(f"features.{name}")
        if not isinstance(value, Tensor) or value.shape != parameter.shape:
            shape = list(parameter.shape)
            raise UserError(f"{path} is not a file of VGG16 weights: features.{name} is not a {shape} tensor")
        if not value.is_floating_point() or not value.isfinite().all():
            raise UserError(f"{path} is damaged: features.{name} has values that are not finite numbers")
        parameter.data.copy_(value)
