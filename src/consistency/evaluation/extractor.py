"""The feature extractor of a study's scores, and the statistics of the data's features."""

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from consistency.base.arrays import read_array, read_arrays
from consistency.base.errors import UserError, command_of
from consistency.base.files import require_output
from consistency.base.progress import Progress
from consistency.base.seeding import derived_seed, generator
from consistency.config.job import Job
from consistency.config.study import Study
from consistency.data.prepared import ImageData
from consistency.data.resources import INCEPTION, open_resource
from consistency.evaluation.features import Extractor, Statistics, classifier_extractor, inception_extractor
from consistency.nets.classifier import Classifier
from consistency.provenance.card import read_card

HELD_OUT = 5  # every fifth image is held out to measure the classifier's accuracy


def open_extractor(job: Job, data: ImageData, device: torch.device) -> Extractor:
    """Open the study's feature extractor."""
    scores = job.study.scores
    if scores.extractor == "inception":
        return inception_extractor(open_resource(INCEPTION), scores.mode, device)
    path = require_output(job.paths.extractor / "classifier.safetensors", "extractor")
    model = Classifier(data.shape[0], data.classes, scores.classifier.features)
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged ({reason}): run {command_of('extractor')} again") from None
    return classifier_extractor(model, device)


def read_data_statistics(job: Job) -> Statistics:
    """Read the statistics of the data's features; of the kept features, only the rows in use are read."""
    read_card(job, "extractor")
    folder = job.paths.extractor
    found = read_arrays(folder / "statistics.npz", "extractor", "mean", "covariance")
    return Statistics(found["mean"], found["covariance"], read_array(folder / "features.npy", "extractor"))


def train_classifier(study: Study, data: ImageData, device: torch.device) -> tuple[Classifier, float]:
    settings = study.scores.classifier
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(settings.seed, "classifier"))
        model = Classifier(data.shape[0], data.classes, settings.features).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=settings.steps)
    everything = np.arange(len(data))
    train, held_out = everything[everything % HELD_OUT > 0], everything[everything % HELD_OUT == 0]
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
    return model.eval(), _scaled_accuracy(model, data, train, held_out, device)


@torch.inference_mode()
def _scaled_accuracy(
    model: Classifier, data: ImageData, train: np.ndarray, held_out: np.ndarray, device: torch.device
) -> float:
    """Scale the features to mean square 1 over (at most 2,000 of) the data; return the accuracy on held-out images."""
    model.scale = model.features(data.take(train[:2000])[0].to(device)).square().mean().rsqrt().clone()
    right = 0
    for start in range(0, len(held_out), 512):
        images, labels = data.take(held_out[start : start + 512])
        right += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
    return right / len(held_out)
