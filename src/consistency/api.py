"""The Python interface: open studies, networks and results, sample, score images, and fit anybody's denoiser.

    from consistency import api

    student = api.load_student("results/tiny/students/analytic/seed0/student.safetensors")
    images = student.sample(64, nfe=3)

Every error that its caller can mend is a `UserError` with a message of one line. `import consistency` alone is quick;
this module imports PyTorch.
"""

import importlib
import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from consistency.base import files
from consistency.base.arrays import read_arrays, read_table, write_array, write_arrays
from consistency.base.errors import UserError
from consistency.base.files import atomic
from consistency.base.progress import track
from consistency.config import reading
from consistency.config.dataset import Noise
from consistency.config.job import Job
from consistency.config.paths import SHIPPED, StudyPaths
from consistency.config.study import Study
from consistency.data.given import open_given, read_given
from consistency.evaluation.fitted import fit_denoiser
from consistency.evaluation.forecast import forecast
from consistency.evaluation.scores import Distances, Measures
from consistency.evaluation.trained import BATCH, TrainedStudent, open_student
from consistency.nets.denoiser import Denoiser
from consistency.provenance.card import read_card
from consistency.provenance.graph import REPORT_FILES
from consistency.provenance.inputs import read_teacher
from consistency.report.results import TEXT
from consistency.runtime.machine import as_in_a_stage, pick_device
from consistency.theory.estimators import CoefficientFit, Mode
from consistency.theory.generalized_ode import GeneralizedODE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Denoiser",
    "Distances",
    "FittedODE",
    "Study",
    "TrainedStudent",
    "UserError",
    "fit_preconditioning",
    "load_student",
    "load_study",
    "load_teacher",
    "read_tables",
    "save_images",
    "score_images",
]

Images = np.ndarray[Any, np.dtype[np.uint8]]


def load_study(study: str | Path) -> Study:
    """Read and check a study, with every default filled in.

    study: a file, or a name: config/studies/NAME.yaml of the working directory, else the study of that name that the
    package ships. Raises UserError for a missing file and for the first thing that is wrong in it.

    Examples:
        >>> study = load_study("tiny")
        >>> study.students["analytic"].preconditioning
        'analytic'
    """
    return reading.load_study(study)


def load_teacher(
    study: Study | str | Path, results: str | Path = "results", device: str | torch.device = "auto"
) -> Denoiser:
    """Load the EDM teacher of a study, frozen: teacher(x, t, labels=labels) is its denoiser D(x,t).

    x: float [N, C, H, W], images in [-1, 1] units with noise of standard deviation t; t: a number or [N]; labels: of a
    conditional teacher, int64 [N] (`Denoiser` says more). results: the folder that has <study>/teacher/; device: auto,
    cpu, cuda or cuda:N. Raises UserError if the study has no teacher, and if its file is missing, damaged or of other
    settings.

    Examples:
        >>> teacher = load_teacher("tiny")
        >>> x = 80 * torch.randn(4, 1, 8, 8, device=next(teacher.parameters()).device)
        >>> denoised = teacher(x, 80.0)
    """
    job = _job(study, results)
    if not job.study.taught:
        raise UserError(f"the study {job.study.name} has no teacher")
    return read_teacher(job, _device(device))


def load_student(
    file: str | Path, device: str | torch.device = "auto", precision: str = "float32", batch: int = BATCH
) -> TrainedStudent:
    """Load a student from its file alone, final weights or a snapshot; no study and no results folder are needed.
    Without such a file, `digits` names the student that the package ships.

    The student is a function, student(x, t, s), and has a method `sample`. device: auto, cpu, cuda or cuda:N;
    precision: arithmetic of its network, float32, bfloat16 or float16; batch: images an evaluation. To repeat the
    images of a study's stage bit for bit, give the study's sampling.precision and sampling.batch here, and its
    sampling.labels to `sample`. No code of the file is ever run. Raises UserError for a missing, damaged or foreign
    file, for a teacher, and for a student of an earlier version, whose file does not say how it jumps.

    Examples:
        >>> student = load_student("results/tiny/students/analytic/seed0/student.safetensors")
        >>> images = student.sample(16, nfe=2, seed=100)
    """
    if precision not in ("float32", "bfloat16", "float16") or batch < 1:
        raise UserError(f"precision is float32, bfloat16 or float16, batch 1 or more; got {precision} and {batch}")
    path, shipped = Path(file), SHIPPED / "students" / f"{file}.safetensors"
    named = path.name == str(file) and not path.exists() and shipped.is_file()
    return open_student(shipped if named else path, _device(device), precision, batch)


def score_images(
    study: Study | str | Path,
    images: Images | str | Path,
    results: str | Path = "results",
    device: str | torch.device = "auto",
    threads: int = 1,
) -> Distances:
    """Compare images with a study's dataset, as its stage scores does: the same features, FD and KID.

    images: uint8 [N, H, W, C] of the study's size, a .npy file of that, or a folder of such images (*.png, *.jpg,
    folders below it too, in sorted order). results: where the study's dataset and extractor are prepared; threads: CPU
    threads. With the features of a classifier, FD is not Inception FID. Compare distances at equal N only. Raises
    UserError for fewer than two images or images of another size, and if dataset or extractor are missing.

    Examples:
        >>> found = score_images("tiny", images)
        >>> found.images, found.extractor, found.fd, found.kid
    """
    job = _job(study, results)
    with as_in_a_stage(threads):
        measures = Measures(job, _device(device))
        count, chunks = open_given(images, job.study.dataset)
        if count < 2:
            raise UserError("a score needs at least two images")
        found = measures.statistics(measures.extractor.pieces(chunks), count)
        return measures.distances(found, measures.data, count)


def read_tables(study: Study | str | Path, results: str | Path = "results") -> dict[str, pd.DataFrame]:
    """Read the tables of a study's report.

    Returns scores (every score), table (each student at the end of training, mean and interval over seeds), speedup
    and paired (students against their baselines). Raises UserError if the report is missing or of other settings.

    Examples:
        >>> read_tables("tiny")["table"][["run", "nfe", "fd"]]
    """
    job = _job(study, results)
    read_card(job, "report")
    paths = [job.paths.report / name for name in REPORT_FILES if name.endswith(".csv")]
    return {path.stem: read_table(path, "report", TEXT) for path in paths}


def save_images(images: Images, file: str | Path) -> None:
    """Write images: a square grid for .png, the array itself for .npy.

    images: uint8 [N, H, W, C] with 1 or 3 channels, row by row in the grid, with 1 white pixel between them. Raises
    UserError for another suffix and if the file cannot be written.

    Examples:
        >>> save_images(student.sample(64, nfe=3), "grid.png")
    """
    path = _writable(file)
    if path.suffix == ".npy":
        write_array(path, images)
        return
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    grid = make_grid(pixels, math.ceil(math.sqrt(len(images))), padding=1, pad_value=255)
    with atomic(path) as temporary:
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(temporary, "PNG")


class FittedODE(GeneralizedODE):
    """Generalised ODE of a fit: its `forward`, `backward` and `step` give the coefficients f and g of a jump.

    They take times float64 [N], sigma_min <= s <= t <= sigma_max (attributes), on the device given, and return f and g
    [N] of a jump from t to s, f x + g D(x, t), or around `centre` with (1 - f - g) centre added. fit: l_t, s_t and
    their standard errors, around 0 and (`fit.centred`) around the mean image; centre: that image [...], or None for
    the coefficients around 0. AP (11)-(14).
    """

    def __init__(
        self, fit: CoefficientFit, mean: Tensor, centred: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        self.fit, self.mean = fit, mean
        used = fit.centred if centred and fit.centred is not None else fit
        super().__init__(*used.nodes, device, mean if centred else None)

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return the arrays of a study's coefficients.npz."""
        return {**self.fit.arrays(), "centre": self.mean.cpu().numpy()}

    def save(self, path: str | Path) -> None:
        """Write both fits and the mean image as .npz, atomically. Raises UserError where that fails."""
        if Path(path).suffix != ".npz":
            raise UserError(f"{path}: a fit is written to a .npz")
        write_arrays(Path(path), self.arrays())

    @classmethod
    def load(cls, path: str | Path, centred: bool = False, device: torch.device | str = "cpu") -> Self:
        """Read what `save` wrote, or a study's coefficients.npz; no code of the file is ever run.

        Raises UserError for a missing, damaged or foreign file.
        """
        names = ("times", "l", "l_se", "s", "s_se", "determined", "s_centred", "s_centred_se", "determined_centred")
        with files.reading(Path(path), "coefficients"):
            arrays = read_arrays(Path(path), "coefficients", *names, "centre")
            times, l, l_se, s, s_se, known, c, c_se, c_known = (arrays[name] for name in names)
            fit = CoefficientFit(times, l, l_se, s, s_se, known, CoefficientFit(times, l, l_se, c, c_se, c_known))
            return cls(fit, torch.from_numpy(arrays["centre"]), centred, device)

    def plot(self) -> "Figure":
        """Draw l_t and s_t with two standard errors, and f and g of both forms minus ctm's, against s/t."""
        from consistency.report import figures

        here = FittedODE(self.fit, self.mean, self.centre is not None)
        fit = self.fit if self.centre is None else self.fit.centred
        forms = {"backward": here.backward, "forward": here.forward}
        return figures.fitted(vars(fit), forms, self.sigma_min, self.sigma_max)


def fit_preconditioning(
    denoiser: Callable[..., Tensor],
    images: Tensor,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    times: int = 40,
    samples: int | None = None,
    probes: int | None = 1,
    batch: int = 64,
    seed: int = 0,
    centred: bool = False,
    mode: Mode = "reverse",
    tolerance: float = 0.0,
    progress: bool = True,
    **condition: Tensor,
) -> FittedODE:
    """Fit l_t (AP (15)) and s_t (AP (17)) of any denoiser: neither a study nor a workflow is needed.

    denoiser(x, sigma, **condition) -> D = E[x_0 | x] with x = x_0 + sigma z: x, D float [B, ...] of one dtype and
    device, sigma [B] > 0. It must be differentiable in x and in sigma, and not random (.eval()); `consistency.nets.
    adapters` makes one of networks of diffusers, k-diffusion, EDM and flow matching. images: x_0, float32 or float64
    [N, ...], N >= 2, on the denoiser's device, in its units: pixels, latents or vectors. condition: tensors of N rows.
    samples: images to use, 2 to N, drawn without replacement (None: all); on the digits 1,000 give the backward f and g
    to 1e-3, the forward ones to 1e-2. times: noise levels, 4 or more, even in log sigma. probes: Rademacher vectors an
    image, 1 or more, or None for the exact trace. batch: images an evaluation, by memory. centred: around the mean of
    the images (`FittedODE.centre`). mode: reverse, an evaluation and probes + 3 vector-Jacobian products an image and
    time, or forward, Jacobian-vector products. tolerance: begin with 128 of the samples and double them until the
    backward f and g are known to that standard error (relative, above 1) at the jumps of an 18-node rho grid (0: take
    all); `fit.images` and `fit.error` say what came of it. Raises UserError, one line, for what cannot be used,
    for NaN and for a singular jump.

    Examples:
        >>> teacher = load_teacher("tiny", device="cpu")
        >>> ode = fit_preconditioning(teacher, torch.rand(64, 1, 8, 8) * 2 - 1, times=10)
        >>> f, g = ode.backward(torch.tensor([80.0]).double(), torch.tensor([0.5]).double())
    """
    shown = track("fit") if progress else lambda steps: steps
    fit, mean = fit_denoiser(
        *(denoiser, images, (sigma_min, sigma_max), times, samples, probes, batch, seed),
        *(mode, tolerance, centred, shown, condition),
    )
    if not all(FittedODE(fit, mean, around).is_regular() for around in (False, True)):
        raise UserError("the fitted l_t and s_t give a singular jump: use more images or probes")
    return FittedODE(fit, mean, centred, images.device)


def _job(study: Study | str | Path, results: str | Path) -> Job:
    study = study if isinstance(study, Study) else load_study(study)
    return Job(study, StudyPaths(study.name, Path(results)))


def _device(device: str | torch.device) -> torch.device:
    return device if isinstance(device, torch.device) else pick_device(device)


def _writable(file: str | Path) -> Path:
    if Path(file).suffix not in (".png", ".npy"):
        raise UserError(f"{file}: images are written to a .png (a grid) or a .npy (the array)")
    return Path(file)


# --- the verbs sample, score and fit


def write_samples(
    student_file: Path,
    out: Path,
    count: int,
    nfe: int,
    first_seed: int,
    label: int | None,
    labels: Literal["data", "balanced"],
    device: torch.device,
    threads: int,
) -> None:
    """Sample a student from its file and write the images."""
    _writable(out)  # before the work
    student = load_student(student_file, device)
    save_images(student.sample(count, nfe, first_seed, label, threads=threads, labels=labels), out)
    print(f"{out}: {count} images, {nfe} jumps each, seeds {first_seed} to {first_seed + count - 1}")


def print_score(study: Study, results: Path, images: Path, device: torch.device, threads: int) -> None:
    """Score a folder of images and print the distances."""
    found = score_images(study, images, results, device, threads)
    name = "FID" if found.extractor.startswith("inception") else "FD (classifier features, not Inception FID)"
    print(f"{name} {found.fd:.6g}, KID {found.kid:.6g}, N = {found.images:,}, extractor {found.extractor}, ", end="")
    print(f"against the dataset of {study.name}")


def write_fit(
    denoiser: str,
    images: Path,
    out: Path,
    sigma_min: float,
    sigma_max: float,
    times: int,
    samples: int | None,
    probes: int,
    batch: int,
    tolerance: float,
    first_seed: int,
    device: torch.device,
) -> None:
    """Fit a denoiser of the user's own code, write the fit and print the rule of thumb."""
    if out.suffix != ".npz":  # before the work
        raise UserError(f"{out}: a fit is written to a .npz")
    found = _own_denoiser(denoiser, device)
    given = read_given(images).to(device)
    ode = fit_preconditioning(
        found,
        given,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        times=times,
        samples=samples,
        probes=probes,
        batch=batch,
        seed=first_seed,
        tolerance=tolerance,
    )
    ode.save(out)
    noise = Noise(sigma_min=sigma_min, sigma_max=sigma_max)
    print(*forecast(ode.arrays(), given.std().item(), noise, [1, 2, 3, 5]), sep="\n")


def _own_denoiser(name: str, device: torch.device) -> Callable[..., Tensor]:
    """Import MODULE:ATTRIBUTE from the working directory; a function without parameters is called for its result."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise UserError(f"--denoiser is MODULE:ATTRIBUTE, of MODULE.py in the working directory; got {name!r}")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise UserError(f"--denoiser {name}: {error}; run the command where {module} can be imported") from None
    finally:
        sys.path.remove("")
    if not callable(found):
        raise UserError(f"--denoiser {name}: {module} has no function, class or module {attribute}")
    if not isinstance(found, torch.nn.Module) and not inspect.signature(found).parameters:
        found = found()
    return found.to(device) if isinstance(found, torch.nn.Module) else found
