"""Sections `dataset` and `noise`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from consistency.config.fields import Count, Name, OneOf, Positive, Section


@dataclass(frozen=True)
class Kind:
    """An entry of KINDS; the function of that name in data/sources.py opens the images. about: for the reference; path:
    whether dataset.path is required, optional or impossible; size: images and classes of the training set; sizes: the
    same at each possible resolution, where it decides; shape: the only resolution and channels; splits: the only ones;
    download: the file of config/resources.yaml that is read without a path."""

    about: str
    path: Literal["required", "optional", "none"] = "required"
    size: tuple[int, int] | None = None
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    shape: tuple[int, int] | None = None
    splits: tuple[str, ...] = ()
    download: str | None = None


#: sources of images by their names in a study
KINDS: dict[str, Kind] = {
    "digits": Kind(
        "the 1,797 UCI 8x8 images that come with scikit-learn",
        path="none",
        size=(1_797, 10),
        shape=(8, 1),
    ),
    "photos": Kind(
        "squares cut out of the two colour photographs that come with scikit-learn, at `resolution` 8, 16 or 32",
        path="none",
        sizes={8: (5_906, 6), 16: (5_906, 6), 32: (3_746, 4)},
        splits=("train", "test"),
    ),
    "image_folder": Kind("a tree `<path>/<split>/<class>/*.{png,jpg}`"),
    "cifar10": Kind(
        "its archive, downloaded, or `path` (the archive or the folder cifar-10-batches-py)",
        path="optional",
        size=(50_000, 10),
        shape=(32, 3),
        splits=("train", "test"),
        download="cifar-10-python.tar.gz",
    ),
    "ffhq": Kind("the official aligned images, a folder or a zip", size=(70_000, 1)),
    "imagenet": Kind("the ILSVRC2012 training set, its tree or its tar", size=(1_281_167, 1000)),
    "celeba": Kind(
        "img_align_celeba, a folder or a zip, and list_eval_partition.txt in or beside it",
        size=(162_770, 1),
        splits=("train", "valid", "test"),
    ),
    "edm_zip": Kind("the zip of PNGs with dataset.json that EDM's dataset tool writes"),
}


class Dataset(Section):
    """Source of the images, and the shape they are brought to."""

    kind: Annotated[str, OneOf(KINDS)] = Field(
        description="; ".join(f"`{name}`: {kind.about}" for name, kind in KINDS.items()) + "."
    )
    path: str | None = Field(
        None, description="Where the images are: a folder, zip or tar; a relative path starts at the working directory."
    )
    split: Name = Field(
        "train",
        description="Which part to read: of an image folder any, of cifar10 and photos `train` or `test`, of "
        "celeba `train`, `valid` or `test`.",
    )
    resolution: Count = Field(
        description="Side of the square images, pixels. Others are cropped (not FFHQ's, which are square) and resized."
    )
    channels: Literal[1, 3] = Field(description="1 for grey, 3 for RGB.")
    limit: Count | None = Field(None, description="Use only so many images of each class, the first in sorted order.")
    horizontal_flip: bool = Field(False, description="Mirror each training image with probability 1/2.")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        kind = KINDS[self.kind]
        if kind.shape not in (None, (self.resolution, self.channels)):
            size, channels = kind.shape
            raise ValueError(f"{self.kind}: set dataset.resolution to {size} and dataset.channels to {channels}")
        if kind.sizes and self.resolution not in kind.sizes:
            sizes = ", ".join(map(str, kind.sizes))
            raise ValueError(f"dataset.resolution {self.resolution}: {self.kind} has the sizes {sizes}")
        if kind.path == "none" and self.path is not None:
            raise ValueError(f"dataset.path is for other kinds; remove it: {self.kind} needs no files")
        if kind.path == "required" and self.path is None:
            raise ValueError(f"dataset.path is missing: {self.kind} needs to know where the images are")
        if kind.splits and self.split not in kind.splits:
            raise ValueError(f"dataset.split {self.split!r}: {self.kind} has the splits {', '.join(kind.splits)}")
        return self


class Noise(Section):
    """The range of noise levels, shared by teacher, students and samplers."""

    sigma_min: Positive = Field(0.002, description="Smallest time eps, where a trajectory ends.")
    sigma_max: Positive = Field(80.0, description="Largest time T, where a trajectory starts.")
    rho: Positive = Field(7.0, description="Exponent of the time grids.")
    sigma_data: Positive | Literal["measured"] = Field(
        0.5, description="Standard deviation of the data in [-1, 1] units, or `measured` to take the dataset's own."
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError("noise.sigma_min must be smaller than noise.sigma_max")
        return self
