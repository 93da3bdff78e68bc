"""Consistency training in the workflow: which student waits for which."""

import yaml
from tests.conftest import Changes, changed
from tests.workflow.checkout import Checkout


def test_a_student_waits_for_the_one_that_it_is_made_from(checkout: Checkout, untaught: Changes) -> None:
    students = {
        "full": {"coupling": "gc", "mu": 1.0, "predictor": {"run": "ic"}},
        "weak": {"coupling": "gc", "mu": 1.0, "predictor": {"run": "ic", "step": 3}},
        "ic": {"coupling": "ic"},
    }
    study = changed(
        untaught | {"name": "frozen", "students": students, "varies": ["coupling", "mu", "predictor"], "seeds": [0, 1]}
    )
    (checkout.path / "config/studies/frozen.yaml").write_text(yaml.safe_dump(study))
    text = Checkout(checkout.path, "frozen").done("-n")
    rules = [block for block in text.split("\nrule ") if block.startswith("student:")]
    inputs = {block.split("wildcards: ")[1].split("\n")[0]: block.split("\n")[1] for block in rules}
    assert len(inputs) == 6
    for seed in (0, 1):
        made = f"results/frozen/students/ic/seed{seed}"
        assert f"{made}/student.safetensors" in inputs[f"study=frozen, student=full, seed={seed}"]
        assert f"{made}/snapshots" in inputs[f"study=frozen, student=weak, seed={seed}"]
        assert "students/" not in inputs[f"study=frozen, student=ic, seed={seed}"]
    assert text.index("student=ic, seed=1") < min(
        text.index("student=full, seed=1"), text.index("student=weak, seed=1")
    )
