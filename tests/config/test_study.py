"""The study: every mistake is one line that says where and what, and every key names what it should."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import ABSENT
from tests.processes import ROOT

from consistency.base.errors import UserError
from consistency.config.keys import key_of
from consistency.config.objectives import OBJECTIVES, Consistency
from consistency.config.paths import SHIPPED
from consistency.config.reading import dump_yaml, find_study, load_studies, load_study, parse_yaml
from consistency.config.reference import REFERENCE, write_reference
from consistency.config.study import Study

STUDIES = sorted((ROOT / "config/studies").glob("*.yaml"))

WriteStudy = Callable[..., Path]
Tiny = Callable[..., Study]


def mistake(path: Path) -> str:
    """The message of a study that must be refused: one line that names the file."""
    with pytest.raises(UserError) as error:
        load_study(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# --- the studies of the project


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_loads_and_its_students_differ_in_nothing_but_what_varies(path: Path) -> None:
    study = load_study(path)
    dumps = [student.model_dump() for student in study.students.values()]
    differing = {key for dump in dumps for key in dump if len({repr(each.get(key, dump[key])) for each in dumps}) > 1}
    assert differing <= set(study.varies)


def test_a_loaded_study_cannot_be_changed(tiny: Tiny) -> None:
    study = tiny()
    with pytest.raises(ValueError, match="frozen"):
        study.teacher.steps = 7  # type: ignore[misc]


# --- mistakes


UNET = {"kind": "songunet", "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": []}
PHOTOS = {"kind": "photos", "resolution": 8, "channels": 3}
NO_LEVELS = "students.ctm: dropout lists levels, which only teacher.network.kind songunet has; use a number"
FOR_COUPLINGS = {"predictor": {"run": "ctm"}, "coupling": "gc", "mu": 0.3, "curriculum": {"kind": "doubling"}}
MISTAKES: list[tuple[dict[str, Any], str]] = [
    # misspelt keys
    ({"sedes": [1]}, "unknown key 'sedes'; did you mean 'seeds'?"),
    ({"dataset.zzzz": 1}, "unknown key 'dataset.zzzz'; there are kind, path, split, resolution"),
    ({"teacher.network.widht": 8}, "unknown key 'teacher.network.widht'; did you mean 'width'?"),
    ({"teacher.steps": ABSENT, "teacher.setps": 60}, "unknown key 'teacher.setps'; did you mean 'steps'?"),
    ({"student.stpes": 8}, "unknown key 'student.stpes'; did you mean 'steps'?"),
    ({"students.ctm.precondition": "ctm"}, "'students.ctm.precondition'; did you mean 'preconditioning'?"),
    ({"scores.classifier.feature": 9}, "unknown key 'scores.classifier.feature'; did you mean 'features'?"),
    ({"varies": ["preconditionin"]}, "varies names 'preconditionin'"),
    ({"flows": {"toy_step": 5}}, "unknown key 'flows.toy_step'; did you mean 'toy_steps'?"),
    (
        {"teacher": {"kind": "safetensors", "path": "x", "netwrok": {"kind": "mlp"}}},
        "unknown key 'teacher.netwrok'; did you mean 'network'?",
    ),
    # wrong values
    ({"teacher": {"kind": "safetensors", "path": "x", "sha256": "abc"}}, "key 'teacher.sha256': string should match"),
    ({"teacher.steps": "ten"}, "key 'teacher.steps': input should be a valid integer, got 'ten'"),
    ({"teacher.steps": 60.0}, "key 'teacher.steps': input should be a valid integer, got 60.0"),
    ({"teacher.steps": 0}, "key 'teacher.steps': input should be greater than or equal to 1, got 0"),
    ({"teacher.learning_rate": float("inf")}, "key 'teacher.learning_rate': input should be a finite number"),
    ({"teacher.network": {"kind": "mpl"}}, "key 'teacher.network': input tag 'mpl'"),
    ({"teacher.network": {"width": 9}}, "key 'teacher.network': unable to extract tag using discriminator 'kind'"),
    ({"dataset": [1]}, "key 'dataset': input should be a valid dictionary"),
    ({"noise.sigma_data": "meausred"}, "key 'noise.sigma_data': input should be"),
    ({"student": [1]}, "key 'student': input should be a valid dictionary"),
    ({"student.steps": "many"}, "key 'student.steps': input should be a valid integer, got 'many'"),
    ({"students.ctm": None}, "key 'students.ctm': input should be a valid dictionary"),
    ({"students.ctm.preconditioning": "ctn"}, "key 'students.ctm.preconditioning': input should be 'cm', 'bcm'"),
    ({"students": {}}, "key 'students': dictionary should have at least 1 item"),
    ({"students": {"Bad Name": {}}}, "key 'students.Bad Name': string should match pattern"),
    ({"seeds": [0, -1]}, "key 'seeds.1': input should be greater than or equal to 0, got -1"),
    ({"report.baseline": {"trajectry": "ctm"}}, "key 'report.baseline.trajectry': input should be 'trajectory'"),
    ({"flows": {"intervals": 9}}, "key 'flows.intervals': input should be greater than or equal to 10, got 9"),
    # missing keys
    ({"teacher.steps": ABSENT}, "key 'teacher.steps' is missing"),
    ({"student.steps": ABSENT}, "key 'student.steps' is missing"),
    # numbers for each level
    (
        {"teacher.network": UNET | {"num_blocks": [1, 2, 3]}},
        "teacher.network.num_blocks lists 3 levels, teacher.network.channel_mult 2: give as many",
    ),
    (
        {"teacher.network": UNET | {"dropout": [0.1]}},
        "teacher.network.dropout lists 1 levels, teacher.network.channel_mult",
    ),
    (
        {"teacher.network": UNET | {"num_blocks": [1, 0]}},
        "key 'teacher.network.num_blocks.1': input should be greater than or",
    ),
    (
        {"teacher.network": UNET | {"num_blocks": 1.5}},
        "key 'teacher.network.num_blocks': input should be a valid integer",
    ),
    (
        {"teacher.network": UNET, "student.dropout": [0.1]},
        "students.ctm: dropout lists 1 levels, teacher.network.channel_mult 2",
    ),
    ({"student.objective": ["trajectory"]}, "unknown objective ['trajectory']"),
    ({"seeds": list(range(5001))}, "students and seeds are 10,002 trainings; 10,000 are possible: list fewer seeds"),
    (
        {"student.steps": 10_001, "student.snapshot_every": 1, "student.log_every": 1},
        "students.ctm: there are more than 10,000 snapshots: raise snapshot_every",
    ),
    (
        {"student.dsm_balance": "adaptive-block"},
        "students.ctm: dsm_balance adaptive-block is for U-Nets, the network is",
    ),
    ({"student.dropout": [0.0, 0.2]}, NO_LEVELS),
    (
        {"student.dropout": [0.0, 0.2], "noise.sigma_data": 0.5}
        | {"teacher": {"kind": "edm", "checkpoint": "edm-cifar10-32x32-uncond-vp.pkl"}},
        NO_LEVELS,
    ),
    # numbers without which nothing can be measured
    ({"sampling.count": 1}, "key 'sampling.count': input should be greater than or equal to 2"),
    ({"scores.curve_count": 1}, "key 'scores.curve_count': input should be greater than or equal to 2"),
    ({"scores.kid_images": 3}, "key 'scores.kid_images': input should be greater than or equal to 4"),
    # combinations that cannot be
    ({"dataset.resolution": 16}, "set dataset.resolution to 8"),
    ({"dataset.path": "data"}, "dataset.path is for other kinds"),
    ({"dataset": PHOTOS | {"resolution": 24}}, "dataset.resolution 24: photos has the sizes 8, 16, 32"),
    ({"dataset": PHOTOS | {"path": "data"}}, "remove it: photos needs no files"),
    ({"dataset": PHOTOS | {"split": "valid"}}, "dataset.split 'valid': photos has the splits train, test"),
    ({"dataset.kind": "celeba"}, "dataset.path is missing: celeba needs to know where the images are"),
    (
        {"dataset.kind": "celeba", "dataset.path": "data", "dataset.split": "val"},
        "dataset.split 'val': celeba has the splits train, valid, test",
    ),
    ({"noise.sigma_max": 0.001}, "noise.sigma_min must be smaller than noise.sigma_max"),
    (
        {"dataset": {"kind": "image_folder", "path": "data", "resolution": 64, "channels": 3}},
        "teacher.network.kind mlp is for up to 1024 values, the images have 12288: use songunet",
    ),
    (
        {"teacher.network": {"kind": "songunet", "channel_mult": [1, 1, 1, 1, 1]}},
        "dataset.resolution 8 cannot be halved 4 times",
    ),
    ({"seeds": [1, 1]}, "seeds lists a seed twice"),
    ({"report.grid_nfe": [1, 4]}, "report.grid_nfe has 4, which sampling.nfe does not sample"),
    ({"sampling.count": 8}, "sampling.count must exceed scores.classifier.features"),
    ({"scores.alignment_count": 81}, "scores.alignment_count must not exceed scores.curve_count"),
    (
        {"scores.curve_count": 8, "scores.alignment_count": 8},
        "scores.curve_count must exceed scores.classifier.features",
    ),
    ({"students.ctm.preconditioning": "cm"}, "preconditioning 'cm' is defined for s = eps only"),
    (
        {"student.objective": "endpoint", "student.max_heun_steps": ABSENT, "student.dsm_weight": ABSENT}
        | {"students.ctm.preconditioning": "analytic-centred", "report.baseline": {}},
        "preconditioning 'analytic-centred' is for jumps between any two times: use it with objective: trajectory",
    ),
    ({"student.theta": 1.5}, "student.theta"),
    ({"student.max_heun_steps": 6}, "max_heun_steps 6 is more than nodes - 1 = 5"),
    ({"student.snapshot_every": 4}, "snapshot_every 4 does not divide steps 6"),
    ({"student.log_every": 2}, "log_every 2 does not divide snapshot_every 3"),
    ({"students.ctm.dropout": 0.1}, "students.ctm changes 'dropout', but the study says"),
    (
        {"varies": ["preconditioning", "snapshot_every"], "students.ctm.snapshot_every": 6},
        "students must share snapshot_every",
    ),
    ({"report.baseline": {"trajectory": "ctn"}}, "report.baseline.trajectory names 'ctn', which is not one"),
    ({"report.baseline": {"endpoint": "ctm"}}, "report.baseline.endpoint names 'ctm', whose objective differs"),
    ({"report.against": {"analytic": "ctn"}}, "report.against names 'ctn', which is not one of the students"),
    ({"report.against": {"analytc": "ctm"}}, "report.against names 'analytc', which is not one of the students"),
    ({"students": {"teacher": {}}, "report": {}}, "students.teacher: that name is taken"),
    ({"students": {"extractor": {}}, "report": {}}, "students.extractor: that name is taken"),
    ({"students": {"flows": {}}, "report": {}}, "students.flows: that name is taken"),
    ({"flows": {}}, "flows measures students of consistency training, and there is none: remove the section"),
    (
        {"student.objective": "endpoint", "student.max_heun_steps": ABSENT, "varies": ["objective"]}
        | {"students": {"ic": {"objective": "consistency"}, "cd": {}}, "report.baseline": {}}
        | {"flows": {"discrepancy": ["cd"]}},
        "flows.discrepancy names 'cd', which is not one of the students of consistency training",
    ),
    ({"student.start": "teacher"}, "student.start is for objective consistency: remove it, or set that objective"),
    *(({f"student.{key}": FOR_COUPLINGS[key]}, f"student.{key} is for objective consistency") for key in FOR_COUPLINGS),
    ({"student.preconditioning": "analytic", "student.fit": "data"}, "student.fit is for objective consistency"),
    ({"student.objective": "consistency"}, "student.nodes is for objective trajectory or endpoint: remove it"),
    ({"student.objective": "endpont"}, "students.ctm: unknown objective 'endpont'; did you mean 'endpoint'?"),
    ({"name": "other"}, "the study is named 'other'; its file must be other.yaml"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[",".join(changes) for changes, _ in MISTAKES])
def test_a_mistake_is_named_with_what_would_do(write_study: WriteStudy, changes: dict[str, Any], message: str) -> None:
    assert message in mistake(write_study(changes))


def test_levels_are_those_of_a_described_songunet(tiny: Tiny) -> None:
    study = tiny({"teacher.network": UNET | {"num_blocks": [1, 2]}, "student.dropout": [0.0, 0.2]})
    assert study.students["ctm"].dropout == [0.0, 0.2]


DISTILLED = {"objective": "endpoint", "steps": 6, "batch": 4, "snapshot_every": 6, "log_every": 6}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student.distance": "lpips"}, "distance lpips is for distillation: compare by pseudo_huber"),
        ({"student.curriculum.first": 17}, "curriculum.first 17 is more than curriculum.last 16: raise last"),
        (
            {"student.curriculum.p_mean": 50.0},
            "curriculum.p_mean 50 is far from the study's ln sigma, -6.21 to 4.38: move it",
        ),
        ({"student.curriculum.p_mean": -17.0}, "students.ic: curriculum.p_mean -17 is far from the study's ln sigma"),
        (
            {"student.curriculum": {"kind": "shrinking", "double_every": 2}, "student.steps": 99},
            "students.ic: curriculum.double_every 2 makes the two levels one before step 99: raise it",
        ),
        (
            {"student.curriculum": {"kind": "shrinking", "double_every": 1, "q": 512.0}},
            "students.ic: curriculum.double_every 1 makes the two levels one",
        ),
        ({"student.curriculum.frist": 2}, "unknown key 'student.curriculum.frist'; did you mean 'first'?"),
        ({"student.curriculum": {"kind": "shrinking"}}, "key 'student.curriculum.double_every' is missing"),
        ({"student.start": "teacher"}, "students.ic needs a teacher, and teacher.kind is none"),
        ({"student.preconditioning": "analytic"}, "students.ic needs a teacher, and teacher.kind is none"),
        (
            {"student": DISTILLED, "students": {"cm": {}}, "report": {}},
            "students.cm needs a teacher, and teacher.kind is none",
        ),
        (
            {"scores.extractor": "inception", "calibration.published_fid": 1.97},
            "calibration.published_fid is of a teacher, and teacher.kind is none: remove it",
        ),
        ({"teacher.network.widht": 8}, "unknown key 'teacher.network.widht'; did you mean 'width'?"),
        ({"teacher.steps": 8}, "unknown key 'teacher.steps'; there are kind, network, conditional"),
        ({"student.predictor": {"run": "gc"}}, "students.ic: predictor is for coupling gc, ic makes no endpoints"),
        ({"flows": {"toy_seeds": [1, 1]}}, "toy_seeds lists a seed twice"),
        (
            {"flows": {"discrepancy": ["ic", "gx"]}},
            "flows.discrepancy names 'gx', which is not one of the students of consistency training",
        ),
    ],
)
def test_a_study_without_a_teacher_is_held_to_what_it_can_do(
    write_study: WriteStudy, untaught: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    assert message in mistake(write_study(untaught | changes))


@pytest.mark.parametrize(
    ("predictor", "message"),
    [
        ("averge", "key 'students.gc.predictor': input should be 'average', got 'averge'"),
        ({"rum": "ic"}, "unknown key 'students.gc.predictor.rum'; did you mean 'run'?"),
        ({"step": 3}, "key 'students.gc.predictor.run' is missing"),
        ({"run": "ic", "step": 0}, "key 'students.gc.predictor.step': input should be greater than or equal to 1"),
        ({"run": "otehr"}, "predictor names 'otehr', which is not one of the students other, ctm, ic, ot, gc"),
        ({"run": "ic", "step": 2}, "names step 2 of 'ic', which keeps a snapshot every 3 steps up to 6: name one"),
        ({"run": "ic", "step": 9}, "names step 9 of 'ic', which keeps a snapshot every 3 steps up to 6: name one"),
        ({"run": "gc"}, "students.gc: predictor leads round in a circle (gc -> gc): one must come first"),
        ({"run": "other"}, "predictor leads round in a circle (other -> gc -> other): one must come first"),
        ({"run": "ctm"}, "students.gc: predictor names 'ctm', whose preconditioning differs: they must agree"),
    ],
)
def test_a_frozen_predictor_is_a_student_that_can_come_first(
    write_study: WriteStudy, untaught: dict[str, Any], predictor: Any, message: str
) -> None:
    students = {
        "other": {"coupling": "gc", "predictor": {"run": "gc" if predictor == {"run": "other"} else "ic"}},
        "ctm": {"preconditioning": "ctm"},
        **untaught["students"],
    }
    varies = {"varies": ["coupling", "mu", "predictor", "preconditioning"]}
    changes = untaught | varies | {"students": students, "students.gc.predictor": predictor}
    assert message in mistake(write_study(changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preconditioning": "cm", "fit": "data"}, "fit data: cm has no l_t and s_t; use analytic or remove it"),
        ({"fit": "average"}, "fit average is of D(x, t, t), which only a DSM term trains: set dsm_weight"),
        ({"fit": "avrage"}, "key 'students.own.fit': input should be 'teacher', 'data' or 'average', got 'avrage'"),
        ({"fit": "teacher"}, "students.own needs a teacher, and teacher.kind is none"),
        ({"dsm_balance": "adaptive", "fit": "data"}, "dsm_balance adaptive needs a DSM term: set dsm_weight above 0"),
        (
            {"fit": "average", "dsm_weight": 1.0, "coupling": "gc", "predictor": {"run": "other"}},
            "predictor has coefficients of its own, fitted at other steps: use fit: teacher or data",
        ),
    ],
)
def test_coefficients_of_a_students_own_need_something_to_be_fitted_from(
    write_study: WriteStudy, untaught: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    students = {"own": {"preconditioning": "analytic", **changes}, "other": {}, "ic": {}}
    varies = ["preconditioning", "fit", "dsm_weight", "dsm_balance", "coupling", "predictor"]
    assert message in mistake(write_study(untaught | {"students": students, "varies": varies}))


def test_a_student_s_own_fit_asks_for_no_teacher_and_is_part_of_its_key(
    write_study: WriteStudy, untaught: dict[str, Any]
) -> None:
    own = {"preconditioning": "analytic", "fit": "data"}
    students = {"ic": {}, "own": own, "self": own | {"fit": "average", "dsm_weight": 1.0}}
    settings = untaught | {"students": students, "varies": ["preconditioning", "fit", "dsm_weight"]}
    study = load_study(write_study(settings))
    assert not study.needs_coefficients
    assert study.students["ic"].dsm_weight == 0
    finer = load_study(write_study(settings | {"coefficients.times": 99}))
    changed = {run for run in students if key_of(study, "student", run, 0) != key_of(finer, "student", run, 0)}
    assert changed == {"own", "self"}
    assert len({key_of(study, "student", run, 0) for run in students}) == 3


def test_students_may_differ_in_what_the_study_says_varies(write_study: WriteStudy) -> None:
    path = write_study({"varies": ["preconditioning", "dropout"], "students.ctm.dropout": 0.1})
    study = load_study(path)
    assert study.students["ctm"].dropout == 0.1
    assert study.students["analytic"].dropout == 0.0


def test_a_shared_key_of_another_students_objective_is_left_out(tiny: Tiny) -> None:
    study = tiny({"varies": ["preconditioning", "objective"], "students.cm": {"objective": "endpoint"}})
    assert "max_heun_steps" in study.students["ctm"].model_dump()
    assert "max_heun_steps" not in study.students["cm"].model_dump()


def test_fields_without_effect_are_named() -> None:
    common: dict[str, Any] = {"steps": 50, "batch": 4, "snapshot_every": 50}
    for settings in OBJECTIVES.values():
        assert settings(**common).unused_fields <= settings.model_fields.keys()
    assert Consistency(**common).unused_fields == {"fit", "dsm_balance", "mu", "predictor", "theta"}
    used = Consistency(coupling="gc", preconditioning="analytic-midpoint", dsm_weight=1.0, **common)
    assert not used.unused_fields


def test_a_student_that_is_not_there_is_named_with_those_that_are(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"study tiny has no seed 7; its seeds are \[0\]"):
        tiny().require("ctm", 7)
    with pytest.raises(UserError, match="study tiny has no student 'ctn'; it has ctm, analytic"):
        tiny().require("ctn", 0)


# --- files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: tiny\nname: tiny\n", 'is not valid YAML: found duplicate key "name"'),
        ("teacher: {steps: 1, steps: 2}\n", 'found duplicate key "steps"'),
        ("a: [", "is not valid YAML: expected the node content"),
        ("\ta: b", "is not valid YAML: found character '\\t'"),
        ("a: *b\n", "found undefined alias"),
        ("? {a: 1}\n: 2\n", "found unhashable key"),
        ("---\na: 1\n---\nb: 2\n", "but found another document"),
        ('a: !!python/object/apply:os.mkdir ["sprung"]', "could not determine a constructor"),
        ("\x00", "is not valid YAML"),
        ("", "must hold keys and values, such as `name: tiny`"),
        ("- 1\n", "must hold keys and values"),
        ("tiny\n", "must hold keys and values"),
        ("1: 2\n", "key 'name' is missing"),
    ],
)
def test_a_file_that_is_no_study_says_why(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(text)
    assert message in mistake(path)
    assert not Path("sprung").exists()


def test_a_number_with_an_exponent_is_a_number(write_study: WriteStudy) -> None:
    path = write_study()
    path.write_text(path.read_text().replace("teacher:\n", "teacher:\n  learning_rate: 1e-3\n"))
    assert load_study(path).teacher.learning_rate == 1e-3
    path.write_text(path.read_text().replace("1e-3", "2.5E+0"))
    assert load_study(path).teacher.learning_rate == 2.5


def test_sections_may_be_shared_by_anchors(tmp_path: Path, tiny: Tiny, write_study: WriteStudy) -> None:
    path = write_study()
    text = path.read_text().replace("  ctm:\n    preconditioning: ctm\n", "  ctm: &ctm {preconditioning: ctm}\n")
    text = text.replace("  analytic:\n    preconditioning: analytic\n", "  other: {<<: *ctm}\n")
    path.write_text(text)
    assert load_study(path).students["other"].preconditioning == "ctm"


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot read the study file" in mistake(path)
    path.unlink()
    path.mkdir()
    assert "cannot read the study file" in mistake(path)


def test_a_missing_file_is_named_with_the_nearest_there_is(write_study: WriteStudy) -> None:
    path = write_study()
    message = mistake(path.with_name("tinny.yaml"))
    assert message == f"no study file {path.with_name('tinny.yaml')}; did you mean {path.name!r}?"
    path = path.parent / "nowhere" / "tinny.yaml"
    assert mistake(path) == f"no study file {path}; did you mean 'tiny'?"  # shipped


def test_a_name_is_a_file_then_a_study_of_the_working_directory_then_a_shipped_one(
    write_study: WriteStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_study("tiny") == load_study(ROOT / "config/studies/tiny.yaml")
    assert mistake(Path("tinny")) == "no study file tinny; did you mean 'tiny'?"
    assert mistake(Path("config/studies/digits.yaml")).startswith("no study file config/studies/digits.yaml")
    here = tmp_path / "config/studies"
    here.mkdir(parents=True)
    write_study({"student.steps": 9}).rename(here / "tiny.yaml")
    assert load_study("tiny").student["steps"] == 9
    write_study({"student.steps": 12}).rename("tiny")
    assert find_study("tiny") == Path("tiny")


def test_every_study_and_its_reference_are_shipped() -> None:
    studies = {path.name: path.read_bytes() for path in (ROOT / "config/studies").glob("*.yaml")}
    assert {path.name: path.read_bytes() for path in (SHIPPED / "studies").glob("*.yaml")} == studies
    assert (SHIPPED / "resources.yaml").read_bytes() == (ROOT / "config/resources.yaml").read_bytes()


# --- keys

UPSTREAM = {"dataset", "extractor", "teacher", "coefficients"}
CTM = {"student ctm", "samples ctm", "scores ctm"}
ANALYTIC = {"student analytic", "samples analytic", "scores analytic"}
CALIBRATION = {"samples", "scores"}
SAMPLES = {"samples", "samples ctm", "samples analytic"}
SCORES = {"scores", "scores ctm", "scores analytic"}


def keys(study: Study) -> dict[str, str]:
    """The key of every stage."""
    found = {stage: key_of(study, stage) for stage in (*sorted(UPSTREAM), "samples", "scores", "report")}
    for run in study.students:
        for stage in ("student", "samples", "scores"):
            found[f"{stage} {run}"] = key_of(study, stage, run, 0)
    return found


@pytest.mark.parametrize(
    ("key", "value", "changed"),
    [
        ("title", "Another", set()),
        ("report.grid_nfe", [1], set()),
        ("seeds", [0, 1], set()),
        ("students.bcm", {"preconditioning": "bcm"}, set()),
        ("scores.curve_count", 90, SCORES),
        ("scores.classifier.steps", 21, SCORES | {"extractor"}),
        ("sampling.count", 90, SAMPLES | SCORES),
        ("calibration.steps", 5, CALIBRATION),
        ("calibration.tolerance", 0.2, {"scores"}),
        ("student.log_every", 1, CTM | ANALYTIC),
        ("students.ctm.preconditioning", "bcm", CTM),
        ("students.analytic.preconditioning", "analytic-forward", ANALYTIC),
        ("coefficients.times", 17, ANALYTIC | {"coefficients"}),
        ("teacher.steps", 61, CTM | ANALYTIC | CALIBRATION | {"teacher", "coefficients"}),
        ("noise.sigma_data", 0.5, CTM | ANALYTIC | CALIBRATION | {"teacher", "coefficients"}),
        ("dataset.horizontal_flip", True, CTM | ANALYTIC | CALIBRATION | {"teacher", "coefficients"}),
        ("dataset.limit", 21, CTM | ANALYTIC | CALIBRATION | UPSTREAM),
    ],
)
def test_a_key_changes_exactly_when_a_setting_it_depends_on_does(
    tiny: Tiny, key: str, value: Any, changed: set[str]
) -> None:
    before, after = keys(tiny()), keys(tiny({key: value}))
    assert {name for name in before if before[name] != after[name]} == changed | {"report"}


def test_a_student_made_from_a_student_changes_with_it(tiny: Tiny, untaught: dict[str, Any]) -> None:
    students = untaught["students"] | {"weak": {"coupling": "gc", "mu": 1.0, "predictor": {"run": "ic", "step": 3}}}
    study = untaught | {"varies": ["coupling", "mu", "predictor", "learning_rate"], "students": students}
    before = keys(tiny(study))
    assert len(set(before.values())) == len(before)
    for change, runs in (
        ({"students.ic.learning_rate": 1e-3}, ("ic", "weak")),
        ({"students.weak.predictor": {"run": "ic"}}, ("weak",)),
        ({"students.gc.mu": 0.7}, ("gc",)),
    ):
        after = keys(tiny(study | change))
        expected = {f"{stage} {run}" for stage in ("student", "samples", "scores") for run in runs} | {"report"}
        assert {name for name in before if before[name] != after[name]} == expected


def test_the_batch_of_the_samplers_changes_no_key(tiny: Tiny) -> None:
    assert keys(tiny()) == keys(tiny({"sampling.batch": 3}))


def test_writing_out_a_default_changes_no_key_but_the_reports(tiny: Tiny) -> None:
    before, after = keys(tiny()), keys(tiny({"noise.rho": 7.0, "student.distance": "pseudo_huber"}))
    assert {name for name in before if before[name] != after[name]} <= {"report"}


def test_a_key_names_the_stage_the_student_and_the_seed(tiny: Tiny) -> None:
    study = tiny({"seeds": [0, 1]})
    found = [*keys(study).values(), key_of(study, "student", "ctm", 1)]
    assert len(set(found)) == len(found)
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in found)


def test_keys_do_not_depend_on_the_order_of_the_file(tiny: Tiny, write_study: WriteStudy) -> None:
    path = write_study()
    content = yaml.safe_load(path.read_text())
    backwards = {name: content[name] for name in reversed(content)}
    path.write_text(yaml.safe_dump(backwards, sort_keys=False))
    assert keys(load_study(path)) == keys(tiny())


# --- the reference


def test_the_reference_is_in_step_with_the_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails: python -m consistency reference."""
    monkeypatch.chdir(tmp_path)
    write_reference()
    assert (tmp_path / REFERENCE).read_text() == (ROOT / REFERENCE).read_text()


def test_yaml_is_read_back_as_it_was_written() -> None:
    names = ["100", "007", "08", "0o7", "1e3", "0.5", "1.", "null", "nan", "true", "2024-01-01", "1.5.2", "0x1f"]
    content = {"names": {name: name for name in names}, "numbers": [1e-5, 1000.0, 0, -3, 0.5, True, None]}
    text = dump_yaml(content)
    assert parse_yaml(text, Path("any")) == yaml.safe_load(text) == content


@pytest.mark.parametrize("names", [2024, 1000.0, ["tiny", 7], True])
def test_a_study_that_is_named_by_a_number_is_to_be_quoted(names: Any) -> None:
    with pytest.raises(UserError, match="is not a name: write a name that looks like a number as --config studies="):
        load_studies(names, keep=False)


def test_a_number_in_place_of_a_name_is_to_be_quoted(write_study: WriteStudy) -> None:
    said = mistake(write_study({"name": 2024}))
    assert said.endswith("key 'name': input should be a valid string, got 2024: write it in quotes")
