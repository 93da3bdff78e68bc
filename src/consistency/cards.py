"""Cards as they are read: everything in one is checked before it is believed, and no path in one is ever opened."""

import json
import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from consistency.layout import Layout
from consistency.provenance import CARD
from consistency.study import Name, Study, explain

Digests = dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]
Stage = Literal["dataset", "teacher", "extractor", "coefficients", "student", "samples", "scores", "flows", "report"]
#: in the order of the workflow
STAGES: tuple[str, ...] = get_args(Stage)


class OutsideError(ValueError):
    """A name that leads out of the folder it belongs to."""


class Card(BaseModel):
    """What a card says, as far as it is checked or handed on; all files by their paths from the study's folder on."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    stage: Stage
    study: Name
    run: Name | None
    seed: int | None
    key: str
    settings: dict[str, Any]
    inputs: Digests
    outputs: Digests
    command: str
    created: str
    seconds: float
    git: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, Any]
    resolved: dict[str, Any] | None = None
    resolved_sha256: str | None = None

    @property
    def label(self) -> str:
        """What the card is of."""
        return label_of(self.stage, self.run, self.seed)

    @property
    def place(self) -> str:
        """Where the card belongs."""
        return place_of(self.stage, self.run, self.seed)

    def study_then(self) -> Study | None:
        """The whole study as it was, if the card holds it and it is still one."""
        try:
            return Study.model_validate(self.resolved)
        except ValidationError:
            return None


def label_of(stage: str, run: str | None, seed: int | None) -> str:
    """How what a stage makes is called."""
    if run is not None:
        return f"{stage} {run} seed {seed}"
    return {"samples": "samples of the teacher", "scores": "calibration"}.get(stage, stage)


def place_of(stage: str, run: str | None, seed: int | None) -> str:
    """Where the card of what a stage makes belongs, from the study's folder on."""
    layout = Layout("study", Path())
    return layout.card(stage, run, seed).relative_to(layout.root).as_posix()


def is_card(name: str) -> bool:
    """Whether a file is a card, by its name."""
    return PurePosixPath(name).name == "card.json" or name.endswith(".card.json")


def require_inside(name: str) -> None:
    """Raises OutsideError for a name that is not a plain path from a folder on, such as ../x, /etc/passwd or a//b."""
    parts = name.split("/")
    if {"", ".", ".."} & set(parts) or "\\" in name or not name.isprintable():
        raise OutsideError(f"the name {name[:200]!r} does not stay inside")


def parse_card(text: str) -> Card:
    """A card from its text. Raises OutsideError for a file name that leads elsewhere, ValueError for any other fault,
    in one line."""
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("not keys and values")
    try:
        card = Card.model_validate(content)
    except ValidationError as error:
        raise ValueError(explain(error, Card)[:300]) from None
    for name in (*card.inputs, *card.outputs):
        require_inside(name.removeprefix("/") if content.get("format") != CARD else name)
    inputs, outputs = card.inputs, card.outputs
    if content.get("format") != CARD:
        inputs, outputs = _as_now(card)
    folder = PurePosixPath(card.place).parent
    outputs = {str(folder / name): digest for name, digest in outputs.items()}
    return card.model_copy(update={"inputs": inputs, "outputs": outputs})


def _as_now(card: Card) -> tuple[Digests, Digests]:
    """Files as the first cards named them: inputs by their paths on that machine, snapshots by their names alone."""
    before = re.compile(rf"^(?:.*/)?{re.escape(card.study)}/(?=(?:{'|'.join(STAGES)})s?/)")
    inputs = {before.sub("", name): digest for name, digest in card.inputs.items()}
    outputs = {f"snapshots/{name}" if name.startswith("step-") else name: card.outputs[name] for name in card.outputs}
    return inputs, outputs
