"""Section `teacher`: the networks, and where their weights come from."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self, Union

from pydantic import Field, SerializeAsAny, TypeAdapter, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from consistency.config.fields import Blocks, Count, Dropout, Fraction, Name, Positive, Section

_VARIANTS: dict[str, dict[str, Any]] = {
    "ddpmpp": {"embedding_type": "positional", "encoder_type": "standard"}
    | {"channel_mult_noise": 1, "resample_filter": [1, 1]},
    "ncsnpp": {"embedding_type": "fourier", "encoder_type": "residual"}
    | {"channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]},
}


class Network(Section):
    """A network: its keys by `kind`, in a table each."""

    kind: str = Field(description="The network.")

    def architecture(self) -> dict[str, Any]:
        """Return the description of the network that `build_denoiser` takes, without the data's part of it."""
        raise NotImplementedError

    def refuses(self, resolution: int, channels: int) -> str:
        """Say why the network cannot take images of that shape; '' if it can."""
        return ""


class SongUNet(Network):
    """DDPM++ or NCSN++, with the official parameter names."""

    kind: Literal["songunet"] = "songunet"
    variant: Literal["ddpmpp", "ncsnpp"] = Field("ddpmpp", description="DDPM++ (the -vp teachers) or NCSN++ (-ve).")
    model_channels: Count = Field(128, description="Channels at full resolution before the multiplier.")
    channel_mult: list[Count] = Field(
        [2, 2, 2], min_length=1, max_length=16, description="Channel multiplier of each level."
    )
    num_blocks: Blocks = Field(4, description="Residual blocks a level; a list: one number for each level.")
    attn_resolutions: list[Count] = Field(
        [16], description="Resolutions with self-attention, pixels; the decoder's first block always has it."
    )
    dropout: Dropout = Field(0.13, description="Dropout probability; a list: one for each level.")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for key in ("num_blocks", "dropout"):
            for problem in self.wrong_levels(f"teacher.network.{key}", getattr(self, key)):
                raise ValueError(problem)
        return self

    def architecture(self) -> dict[str, Any]:
        options = self.model_dump(exclude={"kind", "variant"})
        return {"network": "songunet", **options, **_VARIANTS[self.variant], "decoder_type": "standard"}

    def refuses(self, resolution: int, channels: int) -> str:
        halvings = len(self.channel_mult) - 1
        if resolution % 2**halvings == 0:
            return ""
        return (
            f"dataset.resolution {resolution} cannot be halved {halvings} times, as teacher.network.channel_mult asks"
        )

    def wrong_levels(self, key: str, value: float | list[int] | list[float]) -> Iterator[str]:
        """Yield a message that names the key, if its list is not as long as channel_mult."""
        if isinstance(value, list) and len(value) != len(self.channel_mult):
            levels = len(self.channel_mult)
            yield f"{key} lists {len(value)} levels, teacher.network.channel_mult {levels}: give as many"


class MLP(Network):
    """A residual multi-layer perceptron for vectors up to a few hundred dimensions."""

    kind: Literal["mlp"] = "mlp"
    width: Count = Field(256, description="Units a layer.")
    depth: Count = Field(4, le=1024, description="Residual blocks.")
    embedding: Count = Field(64, description="Size of the noise embedding.")
    dropout: Fraction = Field(0.0, description="Dropout probability.")

    def architecture(self) -> dict[str, Any]:
        return {"network": "mlp", **self.model_dump(exclude={"kind"})}

    def refuses(self, resolution: int, channels: int) -> str:
        values = channels * resolution**2
        if values <= 1024:
            return ""
        return f"teacher.network.kind mlp is for up to 1024 values, the images have {values}: use songunet"


#: networks by their names in a study
NETWORKS: dict[str, type[Network]] = {"songunet": SongUNet, "mlp": MLP}


def _of_its_kind(given: Any, build: ValidatorFunctionWrapHandler) -> Any:
    members: Any = Union[tuple(NETWORKS.values())]  # noqa: UP007 - the registry may grow
    return TypeAdapter(Annotated[members, Field(discriminator="kind")]).validate_python(given)


#: a network of any kind
AnyNetwork = Annotated[SerializeAsAny[Network], WrapValidator(_of_its_kind)]


class Teacher(Section):
    """The EDM denoiser that is distilled, trained on the dataset."""

    kind: Literal["trained"] = "trained"
    network: AnyNetwork = Field(description="The network inside the denoiser.")
    conditional: bool = Field(False, description="Condition on the class.")
    steps: Count = Field(description="Optimiser steps.")
    batch: Count = Field(description="Images a step.")
    learning_rate: Positive = Field(1e-3, description="Adam's learning rate after the ramp.")
    learning_rate_ramp: Annotated[int, Field(ge=0)] = Field(0, description="Linear ramp of the rate, images.")
    p_mean: float = Field(-1.2, description="Mean of ln sigma in the loss.")
    p_std: Positive = Field(1.2, description="Standard deviation of ln sigma in the loss.")
    ema_half_life: Positive = Field(500_000, description="Half-life of the weight average, images.")
    ema_ramp_up: Positive = Field(0.05, description="The half-life is at most this share of the images seen.")
    seed: int = Field(0, description="Seed of weights, data order and noise.")
    log_every: Count = Field(100, description="Steps a line of history.jsonl; the state is saved at these steps.")


class OfficialTeacher(Section):
    """An official checkpoint, NVIDIA's of EDM or OpenAI's, downloaded and converted."""

    kind: Literal["edm"] = "edm"
    checkpoint: Name = Field(description="Its file name in config/resources.yaml: edm-cifar10-32x32-uncond-vp.pkl, ...")
    conditional: bool = Field(False, description="Whether it is conditioned on the class; must agree with the file.")


class GivenTeacher(Section):
    """A safetensors file of your own: a teacher of another study, or weights with this project's parameter names."""

    kind: Literal["safetensors"] = "safetensors"
    path: str = Field(description="The file; a relative path starts at the working directory.")
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = Field(
        None, description="Its digest: a file with another is refused. Without, any file is taken and its digest noted."
    )
    network: AnyNetwork | None = Field(
        None, description="The network inside the denoiser, for a file that another program wrote."
    )
    conditional: bool = Field(False, description="Whether it is conditioned on the class; must agree with the file.")


class NoTeacher(Section):
    """No teacher: only the network of the students of consistency training. No measurement uses a teacher."""

    kind: Literal["none"] = "none"
    network: AnyNetwork = Field(description="The network inside the students.")
    conditional: bool = Field(False, description="Condition on the class.")
