"""A finished study as one zip, with a SHA256SUMS that `sha256sum -c` checks anywhere."""

from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

from consistency.base.errors import UserError
from consistency.base.files import atomic, sha256
from consistency.config.job import Job
from consistency.provenance.verification import SUMS, require_consistent, result_files, stays_out, taken_out

# Added to the results and the study file: the environment, and the licences of the code and of official networks.
_FROM_ROOT = ("requirements.lock", "LICENSE", "NOTICE")


def archive_of(job: Job, archives: Path) -> Path:
    """Return the path of a study's archive, NAME-KEY.zip."""
    return archives / f"{job.study.name}-{job.key('report')[:8]}.zip"


def make_archive(job: Job, study_file: Path, archives: Path, snapshots: bool = False) -> None:
    """Write archives/NAME-KEY.zip and print its sha256. It leaves out arrays of images and features and, by default,
    the students' snapshots, and always what was taken out of the study.

    Raises UserError if `verify` finds a fault, outside the project's root, and if the archive cannot be written.
    """
    study, root = job.study, job.paths.root
    members = {f"config/studies/{study.name}.yaml": study_file, **{name: Path(name) for name in _FROM_ROOT}}
    for name in _FROM_ROOT:
        if not Path(name).is_file():
            raise UserError(f"{name} is not here: run `make archive` in the project's root")
    require_consistent(root, study)
    for name in result_files(root):
        if not stays_out(name, snapshots) and not taken_out(name, study):
            members[f"results/{study.name}/{name}"] = root / name
    path = archive_of(job, archives)
    with atomic(path) as temporary, ZipFile(temporary, "w", ZIP_DEFLATED, strict_timestamps=False) as archive:
        for name, source in members.items():
            archive.write(source, name)
        archive.writestr(SUMS, "".join(f"{sha256(source)}  {name}\n" for name, source in members.items()))
    print(f"{path}: {len(members) + 1} files, {path.stat().st_size / 2**20:.1f} MiB, sha256 {sha256(path)}")
