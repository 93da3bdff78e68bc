"""Sections `dataset` and `noise`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from consistency.config.fields import Count, Name, Positive, Section


class Dataset(Section):
    """Source of the images, and the shape they are brought to."""

    kind: Literal["digits", "image_folder", "cifar10", "ffhq", "imagenet", "celeba", "edm_zip"] = Field(
        description="`digits`: the 1,797 UCI 8x8 images that come with scikit-learn; "
        "`image_folder`: a tree `<path>/<split>/<class>/*.{png,jpg}`; "
        "`cifar10`: its archive, downloaded, or `path` (the archive or the folder cifar-10-batches-py); "
        "`ffhq`: the official aligned images, a folder or a zip; "
        "`imagenet`: the ILSVRC2012 training set, its tree or its tar; "
        "`celeba`: img_align_celeba, a folder or a zip, and list_eval_partition.txt in or beside it; "
        "`edm_zip`: the zip of PNGs with dataset.json that EDM's dataset tool writes."
    )
    path: str | None = Field(
        None, description="Where the images are: a folder, zip or tar; relative paths start at the project's root."
    )
    split: Name = Field(
        "train",
        description="Which part to read: of an image folder any, of cifar10 `train` or `test`, of celeba `train`, "
        "`valid` or `test`.",
    )
    resolution: Count = Field(
        description="Side of the square images, pixels. Others are cropped (not FFHQ's, which are square) and resized."
    )
    channels: Literal[1, 3] = Field(description="1 for grey, 3 for RGB.")
    limit: Count | None = Field(None, description="Use only so many images of each class, the first in sorted order.")
    horizontal_flip: bool = Field(False, description="Mirror each training image with probability 1/2.")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        size, channels = {"digits": (8, 1), "cifar10": (32, 3)}.get(self.kind, (self.resolution, self.channels))
        if (self.resolution, self.channels) != (size, channels):
            raise ValueError(f"{self.kind}: set dataset.resolution to {size} and dataset.channels to {channels}")
        if self.kind == "digits" and self.path is not None:
            raise ValueError("dataset.path is for other kinds; the digits come with scikit-learn")
        if self.kind not in ("digits", "cifar10") and self.path is None:
            raise ValueError(f"dataset.path is missing: {self.kind} needs to know where the images are")
        splits = {"cifar10": ["train", "test"], "celeba": ["train", "valid", "test"]}.get(self.kind, [self.split])
        if self.split not in splits:
            raise ValueError(f"dataset.split {self.split!r}: {self.kind} has the splits {', '.join(splits)}")
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
