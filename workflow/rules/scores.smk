use rule coefficients as extractor with:
    input:
        "results/{study}/dataset/images.npy",
        "results/{study}/dataset/labels.npy",
        downloads_of("extractor"),
    output:
        directory("results/{study}/scores/extractor"),
    log:
        "logs/{study}/extractor.log",
    benchmark:
        "logs/{study}/extractor.tsv"
    params:
        **made_by("extractor"),


# Before any student is scored: what the same measure says of the data itself and of the teacher.
use rule coefficients as calibration with:
    input:
        "results/{study}/scores/extractor",
        "results/{study}/samples/teacher/heun.npy",
        "results/{study}/teacher/teacher.safetensors",
    output:
        "results/{study}/scores/calibration.csv",
        "results/{study}/scores/endpoints.npy",
        "results/{study}/scores/calibration.card.json",
    log:
        "logs/{study}/calibration.log",
    benchmark:
        "logs/{study}/calibration.tsv"
    params:
        **made_by("scores", verb="calibration"),


use rule coefficients as scores with:
    input:
        "results/{study}/scores/extractor",
        # They follow from the teacher and the student's own key: a calibration with another tolerance makes the same.
        ancient("results/{study}/scores/endpoints.npy"),
        "results/{study}/students/{run}/seed{seed}/student.safetensors",
        "results/{study}/students/{run}/seed{seed}/snapshots",
        "results/{study}/samples/{run}/seed{seed}",
        coefficients_if_read,
    output:
        "results/{study}/scores/{run}/seed{seed}.csv",
        "results/{study}/scores/{run}/seed{seed}.card.json",
    log:
        "logs/{study}/scores/{run}-seed{seed}.log",
    benchmark:
        "logs/{study}/scores/{run}-seed{seed}.tsv"
    resources:
        mem_mb=16000,
        runtime=1440,
        gpu=0,
    params:
        **made_by("scores"),
