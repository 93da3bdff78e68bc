"""Section `compute`."""

from pydantic import Field

from consistency.config.fields import Count, Section


class Compute(Section):
    """Use of the machine. Nothing here is part of a result's key: it may change during a training and then alters only
    the last bits of what follows."""

    batch_per_device: Count | None = Field(
        None, description="Images a device at once; the study's batch is kept by accumulation. Without: all at once."
    )
    channels_last: bool = Field(False, description="Memory layout NHWC inside the networks, faster on GPUs.")
    compile: bool = Field(False, description="Compile the networks with torch.compile: minutes at first, then faster.")
    data_on_device: bool | None = Field(
        None, description="Keep the whole dataset in the GPU's memory. Without: if it takes less than a 16th of it."
    )
    name_host: bool = Field(True, description="Name the machine in cards and MLflow; published pages never do.")
