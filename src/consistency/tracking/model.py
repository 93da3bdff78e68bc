"""A student as MLflow loads it: a model from code. What it does lies in consistency.tracking.sampler."""

from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class StudentModel(PythonModel):
    """predict({"count": 8, "nfe": 2, "seed": 0, "label": 3}): images of the seeds seed to seed + count - 1."""

    def load_context(self, context: PythonModelContext) -> None:
        """Find and check the files that the configuration refers to."""
        from consistency.tracking.sampler import open_student

        self.student = open_student(context.model_config)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: Any = None
    ) -> np.ndarray[Any, Any]:
        """uint8 [N, H, W, C]; the images of several rows follow one another."""
        from consistency.tracking.sampler import draw_rows

        return draw_rows(self.student, model_input)


set_model(StudentModel())
