# Images lie under state/ until all are drawn, so that an interrupted job resumes.
use rule teacher as teacher_samples with:
    input:
        inputs("samples"),
    output:
        "results/{study}/samples/teacher/heun.npy",
        "results/{study}/samples/teacher/card.json",
    log:
        "logs/{study}/samples/teacher.log",
    benchmark:
        "logs/{study}/samples/teacher.tsv"
    params:
        verb=verb("samples"),


use rule teacher as samples with:
    input:
        inputs("samples"),
    output:
        directory("results/{study}/samples/{student}/seed{seed}"),
    log:
        "logs/{study}/samples/{student}-seed{seed}.log",
    benchmark:
        "logs/{study}/samples/{student}-seed{seed}.tsv"
    params:
        verb=verb("samples"),
