"""Stage extractor: the feature extractor of the scores, and the statistics of the data's features."""

import torch
from safetensors.torch import save_file

from consistency.base.arrays import write_array, write_arrays
from consistency.base.files import write_with
from consistency.base.progress import Progress
from consistency.config.job import Job
from consistency.evaluation.extractor import HELD_OUT, open_extractor, train_classifier
from consistency.evaluation.features import Statistics
from consistency.provenance.card import Card
from consistency.provenance.inputs import read_dataset


def make_extractor(job: Job, device: torch.device) -> None:
    """Train the classifier (or open the staged Inception) and write the statistics of the data's features.

    Writes statistics.npz (mean and covariance over all images), features.npy (of kid_images at most, evenly spread),
    classifier.safetensors if that is the extractor, and card.json.
    """
    card, study, data, folder = Card(job, "extractor"), job.study, read_dataset(job), job.paths.extractor
    outputs, measured = [folder / "features.npy", folder / "statistics.npz"], {}
    if study.scores.extractor == "classifier":
        path = folder / "classifier.safetensors"
        model, accuracy = train_classifier(study, data, device)
        write_with(path, lambda temporary: save_file(model.cpu().state_dict(), temporary))
        measured["held_out_accuracy"] = accuracy
        outputs.append(path)
        print(f"classifier: accuracy {accuracy:.3f} on every {HELD_OUT}th image, held out", flush=True)
    progress = Progress(f"features {study.name}", len(data))
    pieces = progress.counted(open_extractor(job, data, device).pieces([data.images]))
    found = Statistics.gather(pieces, len(data), study.scores.kid_images)
    progress.close()
    write_array(outputs[0], found.features)
    write_arrays(outputs[1], {"mean": found.mean, "covariance": found.covariance})
    card.write(measured=measured)
