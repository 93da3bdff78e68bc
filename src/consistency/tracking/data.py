"""A study's images as a dataset of MLflow: described from what is known of them, not by reading 16 GB."""

import json
from typing import Any

import numpy as np
from mlflow.data.dataset import Dataset
from mlflow.data.schema import TensorDatasetSchema
from mlflow.data.sources import LocalArtifactDatasetSource  # type: ignore[attr-defined] # made at run time
from mlflow.types.schema import Schema, TensorSpec

from consistency.tracking.plan import Data

_DIGEST = 32  # hex digits; MLflow takes 36 characters


class Images(Dataset):
    """uint8 images [N, H, W, C]; the digest is that of images.npy."""

    def __init__(self, data: Data) -> None:
        self.data = data
        super().__init__(LocalArtifactDatasetSource(data.path), data.name, data.sha256[:_DIGEST])

    def _compute_digest(self) -> str:
        return self.data.sha256[:_DIGEST]

    @property
    def profile(self) -> dict[str, Any]:
        """How many images, their shape, and the whole sha256."""
        elements = self.data.count * int(np.prod(self.data.shape))
        shape = [self.data.count, *self.data.shape]
        return {
            "num_rows": self.data.count,
            "num_elements": elements,
            "features_shape": shape,
            "sha256": self.data.sha256,
        }

    @property
    def schema(self) -> TensorDatasetSchema:
        """uint8 [-1, H, W, C]."""
        return TensorDatasetSchema(Schema([TensorSpec(np.dtype(np.uint8), (-1, *self.data.shape), "images")]))

    def to_dict(self) -> dict[str, str]:
        """What MLflow stores: name, digest, source, schema and profile."""
        described = {"schema": json.dumps(self.schema.to_dict()), "profile": json.dumps(self.profile)}
        return super().to_dict() | described
