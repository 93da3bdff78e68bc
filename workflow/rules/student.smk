# A student needs a teacher that passed the calibration, but is not trained again when the teacher is scored again.
# The resumable state lies under state/, undeclared: Snakemake deletes declared outputs before it reruns a job.
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
        verb=verb("student"),
