# The resumable state lies under state/, undeclared: Snakemake deletes declared outputs before it runs a job again.
use rule teacher as student with:
    input:
        "results/{study}/dataset/images.npy",
        "results/{study}/teacher/teacher.safetensors",
        coefficients_if_read,
        downloads_of("student"),
        predictor_if_frozen,
        # No student is trained on a teacher that fails the calibration, nor again because the teacher was measured again.
        ancient("results/{study}/scores/calibration.csv"),
    output:
        "results/{study}/students/{run}/seed{seed}/student.safetensors",
        "results/{study}/students/{run}/seed{seed}/history.jsonl",
        "results/{study}/students/{run}/seed{seed}/card.json",
        directory("results/{study}/students/{run}/seed{seed}/snapshots"),
    log:
        "logs/{study}/student/{run}-seed{seed}.log",
    benchmark:
        "logs/{study}/student/{run}-seed{seed}.tsv"
    wildcard_constraints:
        run=TRAINED,
    params:
        **made_by("student"),
