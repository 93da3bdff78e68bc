"""One checksummed file of a study: packed, verified, refused, opened again in another folder."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.fake_results import SMALL, make_report, make_results, make_study

from consistency import archive
from consistency.archive import make_archive, unpack, verify
from consistency.errors import UserError
from consistency.files import sha256
from consistency.layout import Layout
from consistency.study import Study

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def in_the_projects_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def home(finished_small: Path, tmp_path: Path) -> Path:
    """A finished study of one's own: small.yaml and results/."""
    return Path(shutil.copytree(finished_small, tmp_path / "home"))


def pack(home: Path, to: str = "archives", **options: Any) -> Path:
    study = make_study(home)
    return make_archive(study, Layout(study.name, home / "results"), home / "small.yaml", home / to, **options)


@pytest.fixture(scope="module")
def packed(finished_small: Path) -> Path:
    """An archive that no test changes."""
    with contextlib.chdir(ROOT):
        return pack(finished_small, "packed")


@pytest.fixture
def copied(packed: Path, tmp_path: Path) -> Path:
    """An archive of one's own, without the digest beside it."""
    return Path(shutil.copy(packed, tmp_path / "small.zip"))


def names(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as zipped:
        return set(zipped.namelist())


def bad(path: Path, study: Study | None = None) -> dict[str, str]:
    return {finding.artifact: finding.state for finding in verify(path, study) if finding.faults}


Change = Callable[[dict[str, bytes]], None]


def rewritten(path: Path, change: Change, method: int = zipfile.ZIP_STORED) -> Path:
    """The archive with members changed, by someone who can write zips."""
    with zipfile.ZipFile(path) as zipped:
        members = {name: zipped.read(name) for name in zipped.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", method) as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    return path


# --- packing


def test_it_holds_what_a_second_person_needs(packed: Path) -> None:
    found = names(packed)
    results = {name.removeprefix("results/small/") for name in found if name.startswith("results/")}
    assert {
        "report/report.html",
        "report/figures/curves.svg",
        "scores/calibration.csv",
        "scores/ctm/seed1.csv",
    } <= results
    assert {"coefficients/coefficients.npz", "teacher/teacher.safetensors", "dataset/dataset.json"} <= results
    assert {
        f"students/{run}/seed{seed}/student.safetensors" for run in ("ctm", "analytic") for seed in (0, 1)
    } <= results
    assert len([name for name in results if name.endswith("card.json")]) == 19
    assert {"requirements.lock", "environment.yml", "CITATION.cff", "LICENSE", "README.md", "Snakefile"} <= found
    assert {
        "config/studies/small.yaml",
        "manifest.sha256",
        "ro-crate-metadata.json",
        "src/consistency/study.py",
    } <= found
    assert not [name for name in found if name.endswith((".npy", ".pyc")) or "/snapshots/" in name]


def test_the_study_is_the_file_itself(packed: Path, finished_small: Path) -> None:
    with zipfile.ZipFile(packed) as zipped:
        assert zipped.read("config/studies/small.yaml") == (finished_small / "small.yaml").read_bytes()


def test_snapshots_come_if_wanted(home: Path) -> None:
    found = names(pack(home, snapshots=True))
    assert "results/small/students/ctm/seed0/snapshots/step-000020.safetensors" in found


def test_the_same_results_give_the_same_bytes(packed: Path, home: Path) -> None:
    for path in (home / "results").rglob("*"):
        os.utime(path, (1, 1))
    again = pack(home)
    assert again.name == packed.name == f"small-{make_study(home).key('report')[:8]}.zip"
    assert again.read_bytes() == packed.read_bytes()


def test_the_digest_lies_beside_it(packed: Path) -> None:
    words = ["sha256sum", "-c", f"{packed.name}.sha256"]
    assert subprocess.run(words, cwd=packed.parent, capture_output=True).returncode == 0


def test_it_verifies_with_unzip_and_sha256sum_alone(packed: Path, tmp_path: Path) -> None:
    # Python's own unzip stands for any: Debian's is a package of its own.
    with zipfile.ZipFile(packed) as zipped:
        zipped.extractall(tmp_path)
    check = ["sha256sum", "-c", "--quiet", "--strict", "manifest.sha256"]
    assert subprocess.run(check, cwd=tmp_path, capture_output=True).returncode == 0
    listed = {line.split("  ", 1)[1] for line in (tmp_path / "manifest.sha256").read_text().splitlines()}
    assert listed == names(packed) - {"manifest.sha256"}
    assert bad(tmp_path) == {}


def test_results_that_are_not_whole_are_not_packed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = home / "results/small/scores/ctm/seed0.csv"
    table.write_text(table.read_text().replace("1", "2", 1))
    with pytest.raises(UserError, match=r"results/small is not packed: 1 tampered"):
        pack(home)
    assert "scores ctm seed 0" in capsys.readouterr().out
    table.unlink()
    with pytest.raises(UserError, match="1 missing"):
        pack(home)
    assert not (home / "archives").exists()


def test_results_of_another_study_file_are_not_packed(home: Path) -> None:
    study = make_study(home, text=SMALL.replace("seeds: [0, 1]", "seeds: [0]"))
    with pytest.raises(UserError, match="stale"):
        make_archive(study, Layout("small", home / "results"), home / "small.yaml", home / "archives")


def test_images_that_are_gone_hinder_nothing(packed: Path, home: Path) -> None:
    for path in (home / "results").rglob("*.npy"):
        path.unlink()
    assert pack(home).read_bytes() == packed.read_bytes()


def test_what_no_card_names_is_left_out_and_said(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "results/small/notes.txt").write_text("mine")
    assert "results/small/notes.txt" not in names(pack(home))
    assert "left out: ./ notes.txt" in capsys.readouterr().out


def test_outside_of_the_projects_root_it_says_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    with pytest.raises(UserError, match=r"CITATION\.cff is not here: run .* in the project's root"):
        pack(home)


def test_no_results_is_one_line(home: Path) -> None:
    shutil.rmtree(home / "results")
    with pytest.raises(UserError, match=r"small is not there: run `snakemake"):
        pack(home)


def test_a_full_disk_is_one_line_and_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*words: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(zipfile._ZipWriteFile, "write", full)
    with pytest.raises(UserError, match="No space left on device"):
        pack(home)
    assert list((home / "archives").iterdir()) == []


def test_a_file_that_changes_meanwhile_is_noticed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = archive._entry

    def meanwhile(member: archive.Member) -> zipfile.ZipInfo:
        if member.name.endswith("summary.json"):
            (home / "results/small/report/summary.json").write_text("{}")
        return entry(member)

    monkeypatch.setattr(archive, "_entry", meanwhile)
    with pytest.raises(UserError, match=r"summary\.json changed while it was packed"):
        pack(home)
    assert list((home / "archives").iterdir()) == []


# --- RO-Crate


@pytest.fixture(scope="module")
def crate(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The archive as RO-Crate's own library opens it."""
    from rocrate.rocrate import ROCrate

    folder = tmp_path_factory.mktemp("crate")
    with zipfile.ZipFile(packed) as zipped:
        zipped.extractall(folder)
    return ROCrate(folder)


def test_the_crate_describes_every_file(crate: Any, packed: Path) -> None:
    files = {entity.id: entity for entity in crate.get_by_type("File")}
    assert files.keys() == names(packed) - {"manifest.sha256", "ro-crate-metadata.json"}
    with zipfile.ZipFile(packed) as zipped:
        manifest = dict(reversed(line.split("  ", 1)) for line in zipped.read("manifest.sha256").decode().splitlines())
    assert {name: entity["sha256"] for name, entity in files.items()} == {name: manifest[name] for name in files}


def test_the_crate_names_workflow_authors_and_licence(crate: Any) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert crate.mainEntity.id == "Snakefile"
    assert crate.mainEntity["programmingLanguage"]["name"] == "Snakemake"
    assert [author["name"] for author in crate.root_dataset["author"]] == [citation["authors"][0]["name"]]
    assert crate.license.id == f"https://spdx.org/licenses/{citation['license']}"
    packages = {entity["name"] for entity in crate.mainEntity["softwareRequirements"]}
    assert {"python", "torch", "numpy"} <= packages


def test_the_crate_has_an_action_for_each_stage(crate: Any) -> None:
    actions = {action["name"]: action for action in crate.get_by_type("CreateAction")}
    assert len(actions) == 19
    student = actions["student analytic seed 0"]
    objects = {entity.get("name", entity.id) for entity in student["object"]}
    assert objects == {
        "dataset/images.npy",
        "results/small/teacher/teacher.safetensors",
        "results/small/coefficients/coefficients.npz",
    }
    assert "results/small/students/analytic/seed0/student.safetensors" in {entity.id for entity in student["result"]}
    assert student["startTime"] < student["endTime"]


def test_networks_from_an_official_teacher_keep_its_terms(tmp_path: Path) -> None:
    official = "teacher: {kind: edm, checkpoint: edm-cifar10-32x32-cond-vp.pkl, conditional: true}"
    text = "\n".join(official if line.startswith("teacher:") else line for line in SMALL.splitlines())
    text = text.replace("{sigma_data: measured}", "{sigma_data: 0.5}")
    study = make_study(tmp_path, text=text)
    layout = Layout("small", tmp_path / "results")
    make_results(study, layout)
    make_report(study, layout)
    with zipfile.ZipFile(make_archive(study, layout, tmp_path / "small.yaml", tmp_path / "a")) as zipped:
        graph = {entity["@id"]: entity for entity in json.loads(zipped.read("ro-crate-metadata.json"))["@graph"]}
        readme = zipped.read("README.md").decode()
    terms = graph[graph["results/small/students/ctm/seed0/student.safetensors"]["license"]["@id"]]
    assert terms["name"].startswith("CC BY-NC-SA 4.0")
    assert "CC BY-NC-SA 4.0 (NVIDIA)" in readme
    assert {"@id": terms["@id"]} in graph["./"]["license"]


# --- verifying


def test_an_archive_is_consistent_anywhere(packed: Path, copied: Path, finished_small: Path) -> None:
    for path in (packed, copied):
        assert bad(path) == bad(path, make_study(finished_small)) == {}
        assert len(verify(path)) == 20


def test_verifying_writes_nothing(copied: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    verify(copied)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["teacher/teacher.safetensors", "scores/ctm/seed1.csv", "report/report.html"])
def test_a_flipped_bit_is_found(copied: Path, name: str) -> None:
    with zipfile.ZipFile(copied) as zipped:
        info = zipped.getinfo(f"results/small/{name}")
    content = bytearray(copied.read_bytes())
    content[info.header_offset + 30 + len(info.filename) + info.file_size // 2] ^= 1
    copied.write_bytes(content)
    found = bad(copied)
    assert found["archive"] == "damaged"
    assert len(found) == 2


def test_a_flipped_bit_with_a_right_checksum_is_found(copied: Path) -> None:
    def change(members: dict[str, bytes]) -> None:
        members["results/small/scores/ctm/seed1.csv"] += b"\n"

    assert bad(rewritten(copied, change)) == {"archive": "tampered", "scores ctm seed 1": "tampered"}


def test_a_member_and_its_line_of_the_manifest_are_no_card(copied: Path) -> None:
    def change(members: dict[str, bytes]) -> None:
        name = "results/small/scores/ctm/seed1.csv"
        old = hashlib.sha256(members[name]).hexdigest().encode()
        members[name] += b"\n"
        new = hashlib.sha256(members[name]).hexdigest().encode()
        members["manifest.sha256"] = members["manifest.sha256"].replace(old, new)

    assert bad(rewritten(copied, change)) == {"scores ctm seed 1": "tampered"}


@pytest.mark.parametrize("name", ["results/small/teacher/teacher.safetensors", "results/small/report/card.json"])
def test_a_member_that_is_missing_is_said(copied: Path, name: str) -> None:
    found = bad(rewritten(copied, lambda members: members.pop(name)))  # type: ignore[arg-type, return-value]
    assert found["archive"] == "missing"
    assert found["teacher" if "teacher" in name else "report"] == "missing"


@pytest.mark.parametrize("name", ["extra.txt", "results/small/teacher/extra.txt", "results/other/x"])
def test_a_member_too_many_is_said(copied: Path, name: str) -> None:
    def change(members: dict[str, bytes]) -> None:
        members[name] = b"x"

    assert bad(rewritten(copied, change))["archive"] == "tampered"


def test_another_digest_beside_it_is_said(copied: Path) -> None:
    copied.with_name("small.zip.sha256").write_text(f"{'0' * 64}  small.zip\n")
    assert bad(copied) == {"archive": "tampered"}
    copied.with_name("small.zip.sha256").write_text(f"{sha256(copied)}  small.zip\n")
    assert bad(copied) == {}


def test_an_archive_cut_short_is_one_line(copied: Path) -> None:
    content = copied.read_bytes()
    copied.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="is not a whole archive"):
        verify(copied)


def test_another_zip_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "other.zip"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("a.txt", "a")
    with pytest.raises(UserError, match=r"other\.zip is not an archive of a study: it has no manifest\.sha256"):
        verify(path)


@pytest.mark.parametrize(
    "line", ["x", f"{'a' * 64} one space", f"{'a' * 64}  ../x", f"{'a' * 64}  results/other/x", f"{'g' * 64}  x"]
)
def test_a_damaged_manifest_is_one_line(copied: Path, line: str) -> None:
    def change(members: dict[str, bytes]) -> None:
        members["manifest.sha256"] += f"{line}\n".encode()

    with pytest.raises(UserError, match=r"small\.zip: its manifest\.sha256 ") as caught:
        verify(rewritten(copied, change))
    assert "\n" not in str(caught.value)


# --- hostile archives


def with_member(path: Path, info: zipfile.ZipInfo, content: bytes = b"x") -> Path:
    with zipfile.ZipFile(path, "a") as zipped:
        zipped.writestr(info, content)
    return path


@pytest.mark.parametrize(
    "name", ["../evil", "/tmp/evil", "results/../../evil", "a\\..\\evil", "results//x", "evil\x1b[2J"]
)
def test_a_name_that_leads_outside_is_refused(copied: Path, tmp_path: Path, name: str) -> None:
    with_member(copied, zipfile.ZipInfo(name))
    for attempt in (lambda: verify(copied), lambda: unpack(copied, tmp_path / "results")):
        with pytest.raises(UserError, match=r"is refused: the name .* does not stay inside"):
            attempt()
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFDIR])
def test_what_is_no_plain_file_is_refused(copied: Path, kind: int) -> None:
    info = zipfile.ZipInfo("results/small/link")
    info.create_system, info.external_attr = 3, (kind | 0o777) << 16
    with pytest.raises(UserError, match="'results/small/link' is not a plain file"):
        verify(with_member(copied, info, b"/etc/passwd"))


def test_a_bomb_is_refused_unread(copied: Path) -> None:
    def change(members: dict[str, bytes]) -> None:
        members["bomb"] = bytes(10_000_000)

    with pytest.raises(UserError, match="is compressed or encrypted"):
        verify(rewritten(copied, change, zipfile.ZIP_DEFLATED))


def test_members_that_share_their_bytes_are_refused(copied: Path) -> None:
    # A bomb without compression: many entries that point to the same bytes.
    with zipfile.ZipFile(copied, "a") as zipped:
        zipped.writestr("large", bytes(1_000_000))
        for k in range(9):
            info = zipped.getinfo("large")
            twin = zipfile.ZipInfo(f"large{k}")
            twin.CRC, twin.file_size, twin.compress_size = info.CRC, info.file_size, info.compress_size
            twin.header_offset, twin.compress_type = info.header_offset, zipfile.ZIP_STORED
            zipped.filelist.append(twin)
            zipped.NameToInfo[twin.filename] = twin
    with pytest.raises(UserError, match="its members would be larger than it is"):
        verify(copied)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["README.md", "README.md/x", "results/small"])
def test_two_members_of_one_name_are_refused(copied: Path, name: str) -> None:
    with pytest.raises(UserError, match="two members of one name"):
        verify(with_member(copied, zipfile.ZipInfo(name)))


# --- unpacking


def test_unpacked_elsewhere_it_is_where_the_workflow_expects_it(packed: Path, home: Path, tmp_path: Path) -> None:
    folder = unpack(packed, tmp_path / "there/results")
    assert folder == tmp_path / "there/results/small"
    for name in ("report/report.html", "students/ctm/seed1/student.safetensors", "scores/calibration.card.json"):
        assert (folder / name).read_bytes() == (home / "results/small" / name).read_bytes()
    study_file = folder / "archive/config/studies/small.yaml"
    assert study_file.read_bytes() == (home / "small.yaml").read_bytes()
    assert bad(folder) == bad(folder, make_study(home)) == {}
    assert [path.name for path in folder.parent.iterdir()] == ["small"]


def test_unpacked_and_packed_again_it_is_the_same(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = unpack(packed, tmp_path / "results")
    monkeypatch.chdir(folder / "archive")
    study_file = Path("config/studies/small.yaml")
    study = make_study(tmp_path)
    again = make_archive(study, Layout("small", tmp_path / "results"), study_file, tmp_path / "again")
    assert again.read_bytes() == packed.read_bytes()


@pytest.mark.parametrize(
    ("name", "artifact"), [("archive/requirements.lock", "archive"), ("teacher/history.jsonl", "teacher")]
)
def test_a_bit_flipped_after_unpacking_is_found(packed: Path, tmp_path: Path, name: str, artifact: str) -> None:
    folder = unpack(packed, tmp_path / "results")
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).write_bytes(content)
    assert bad(folder) == {artifact: "tampered"}


def test_what_was_packed_and_is_lost_later_is_missing(packed: Path, tmp_path: Path) -> None:
    folder = unpack(packed, tmp_path / "results")
    (folder / "coefficients/coefficients.npz").unlink()
    (folder / "archive/LICENSE").unlink()
    assert bad(folder) == {"archive": "missing", "coefficients": "missing"}


def test_results_that_are_there_already_are_kept(packed: Path, home: Path) -> None:
    with pytest.raises(UserError, match="is there already: move it away, or choose another --results"):
        unpack(packed, home / "results")
    assert bad(home / "results/small") == {}


def test_a_tampered_archive_is_not_unpacked(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(members: dict[str, bytes]) -> None:
        members["results/small/report/report.html"] += b"<script>"

    with pytest.raises(UserError, match="is not unpacked: 2 tampered"):
        unpack(rewritten(copied, change), tmp_path / "results")
    assert "report/report.html" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


def test_a_full_disk_while_unpacking_is_one_line(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(UserError, match="No space left on device"):
        unpack(packed, tmp_path / "results")
    assert list((tmp_path / "results").iterdir()) == []


# --- the verbs


def test_the_verbs_pack_verify_and_unpack(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from consistency.__main__ import main

    file, results, archives = str(home / "small.yaml"), str(home / "results"), tmp_path / "archives"
    assert main(["archive", "--study", file, "--results", results, "--archives", str(archives)]) == 0
    (path,) = archives.glob("*.zip")
    assert f"sha256 {sha256(path)}" in capsys.readouterr().out
    assert main(["verify", str(path), "--study", file]) == 0
    assert main(["unpack", str(path), "--results", str(tmp_path / "there")]) == 0
    assert "report/report.html" in capsys.readouterr().out
    assert main(["unpack", str(path), "--results", str(tmp_path / "there")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
