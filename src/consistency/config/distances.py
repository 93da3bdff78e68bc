"""Distances between a student's two endpoints, by their names in a study."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Distance:
    """An entry of DISTANCES. function: "module:name" of a function of two batches [N, C, H, W] -> [N], or, with
    weights, of an nn.Module that is built from that file of config/resources.yaml; operations: floating-point
    operations an image, the backward pass included."""

    function: str
    weights: str | None = None
    operations: float = 0.0


DISTANCES: dict[str, Distance] = {
    "pseudo_huber": Distance("theory.distance:pseudo_huber"),
    "l2": Distance("theory.distance:squared_l2"),
    "euclidean": Distance("theory.distance:euclidean"),
    # 30.7e9 operations of VGG16's convolutions at 224x224: forward for both images, back through one of them.
    "lpips": Distance("nets.perceptual:PerceptualDistance", "vgg16-397923af.pth", 4 * 30.7e9),
}
