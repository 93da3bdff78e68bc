# No student is trained on a teacher that fails the calibration, nor again because the teacher was measured again.
# The resumable state lies under state/, undeclared: Snakemake deletes declared outputs before it runs a job again.
use rule teacher as student with:
    input:
        inputs("student"),
    output:
        "results/{study}/students/{student}/seed{seed}/student.safetensors",
        "results/{study}/students/{student}/seed{seed}/history.jsonl",
        "results/{study}/students/{student}/seed{seed}/card.json",
        directory("results/{study}/students/{student}/seed{seed}/snapshots"),
    log:
        "logs/{study}/student/{student}-seed{seed}.log",
    benchmark:
        "logs/{study}/student/{student}-seed{seed}.tsv"
    params:
        **made_by("student"),
