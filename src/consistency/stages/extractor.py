"""Stage extractor: what the scores measure with, and the statistics of the data's features."""

import time
from collections.abc import Iterator
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from consistency.errors import UserError
from consistency.features import Extractor, Statistics, classifier_extractor, inception_extractor
from consistency.files import made, write_with
from consistency.layout import Layout
from consistency.nets.classifier import Classifier
from consistency.progress import Progress
from consistency.provenance import read_card, write_card
from consistency.resources import INCEPTION, downloads, open_resource
from consistency.seeding import derived_seed, generator
from consistency.stages.inputs import read_array, read_dataset, write_array, write_arrays
from consistency.study import Study
from consistency.training.data import ImageData

_HELD_OUT = 5  # every fifth image is kept from the classifier, to measure its accuracy


def make_extractor(study: Study, layout: Layout, device: torch.device) -> None:
    """Train the classifier (or open the staged Inception) and write the statistics of the data's features.

    Writes statistics.npz (mean and covariance over all images), features.npy (of kid_images at most, evenly spread),
    classifier.safetensors if that is the extractor, and card.json.
    """
    started = time.time()
    data, folder = read_dataset(study, layout), layout.extractor
    outputs, measured = [folder / "features.npy", folder / "statistics.npz"], {}
    if study.scores.extractor == "classifier":
        path = folder / "classifier.safetensors"
        model, accuracy = _train_classifier(study, data, device)
        write_with(path, lambda temporary: save_file(model.cpu().state_dict(), temporary))
        measured["held_out_accuracy"] = accuracy
        outputs.append(path)
        print(f"classifier: accuracy {accuracy:.3f} on every {_HELD_OUT}th image, held out", flush=True)
    found = _data_statistics(study, data, open_extractor(study, layout, data, device))
    write_array(outputs[0], found.features)
    write_arrays(outputs[1], {"mean": found.mean, "covariance": found.covariance})
    write_card(
        study,
        layout,
        "extractor",
        started=started,
        inputs=[layout.dataset / name for name in ("images.npy", "labels.npy")],
        downloads=downloads(study, "extractor"),
        outputs=outputs,
        measured=measured,
    )


def open_extractor(study: Study, layout: Layout, data: ImageData, device: torch.device) -> Extractor:
    """The study's feature extractor."""
    if study.scores.extractor == "inception":
        return inception_extractor(open_resource(INCEPTION), study.scores.mode, device)
    path = layout.extractor / "classifier.safetensors"
    model = Classifier(data.shape[0], data.classes, study.scores.classifier.features)
    try:
        model.load_state_dict(load_file(made(path, "extractor")))
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged ({reason}): run `extractor` again") from None
    return classifier_extractor(model, device)


def read_data_statistics(study: Study, layout: Layout) -> Statistics:
    """Statistics of the data's features; of the kept ones, only the rows that are used are read."""
    read_card(layout.extractor, study, "extractor")
    path = made(layout.extractor / "statistics.npz", "extractor")
    try:
        with np.load(path) as arrays:
            mean, covariance = arrays["mean"], arrays["covariance"]
    except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}): run `extractor` again") from None
    return Statistics(mean, covariance, read_array(layout.extractor / "features.npy", "extractor"))


def _data_statistics(study: Study, data: ImageData, extractor: Extractor) -> Statistics:
    progress = Progress(f"features {study.name}", len(data))

    def pieces() -> Iterator[np.ndarray]:
        for piece in extractor.pieces([data.images]):
            yield piece
            progress.update(len(piece))

    found = Statistics.gather(pieces(), len(data), study.scores.kid_images)
    progress.close()
    return found


def _train_classifier(study: Study, data: ImageData, device: torch.device) -> tuple[Classifier, float]:
    settings = study.scores.classifier
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(settings.seed, "classifier"))
        model = Classifier(data.shape[0], data.classes, settings.features).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=settings.steps)
    everything = np.arange(len(data))
    train, held_out = everything[everything % _HELD_OUT > 0], everything[everything % _HELD_OUT == 0]
    progress = Progress("classifier", settings.steps)
    for step in range(settings.steps):
        draws = generator(settings.seed, "classifier", step)
        rows = train[torch.randint(len(train), (settings.batch,), generator=draws).numpy()]
        images, labels = data.take(rows)
        loss = torch.nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update()
    progress.close()
    _normalise(model.eval(), data, train, device)
    return model, _accuracy(model, data, held_out, device)


@torch.inference_mode()
def _normalise(model: Classifier, data: ImageData, rows: np.ndarray, device: torch.device) -> None:
    """Scale the features to mean square 1 over (at most 2,000 of) the data."""
    images, _ = data.take(rows[:2000])
    model.scale = model.features(images.to(device)).square().mean().rsqrt().clone()


@torch.inference_mode()
def _accuracy(model: Classifier, data: ImageData, rows: np.ndarray, device: torch.device) -> float:
    right = 0
    for start in range(0, len(rows), 512):
        images, labels = data.take(rows[start : start + 512])
        right += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
    return right / len(rows)
