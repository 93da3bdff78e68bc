rule extractor:
    input:
        "results/{study}/dataset/images.npy",
        "results/{study}/dataset/labels.npy",
        inception_if_used,
    output:
        directory("results/{study}/scores/extractor"),
    log:
        "logs/{study}/extractor.log",
    benchmark:
        "logs/{study}/extractor.tsv"
    conda:
        environment
    resources:
        mem_mb=16000,
        runtime=240,
        gpu=0,
    params:
        key=key("extractor"),
        code=code("extractor"),
    shell:
        "python -m consistency extractor --study config/studies/{wildcards.study}.yaml --threads {threads}"
        " 2>&1 | tee -i {log}"


# Before any student is scored: what the same measure says of the data itself and of the teacher.
rule calibration:
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
    conda:
        environment
    resources:
        mem_mb=16000,
        runtime=240,
        gpu=0,
    params:
        key=key("scores"),
        code=code("scores"),
    shell:
        "python -m consistency calibration --study config/studies/{wildcards.study}.yaml --threads {threads}"
        " 2>&1 | tee -i {log}"


rule scores:
    input:
        "results/{study}/scores/extractor",
        # They follow from the teacher and the student's own key: a calibration with another tolerance makes the same.
        ancient("results/{study}/scores/endpoints.npy"),
        "results/{study}/students/{run}/seed{seed}/student.safetensors",
        "results/{study}/students/{run}/seed{seed}/snapshots",
        "results/{study}/samples/{run}/seed{seed}",
        coefficients_if_fitted,
    output:
        "results/{study}/scores/{run}/seed{seed}.csv",
        "results/{study}/scores/{run}/seed{seed}.card.json",
    log:
        "logs/{study}/scores/{run}-seed{seed}.log",
    benchmark:
        "logs/{study}/scores/{run}-seed{seed}.tsv"
    conda:
        environment
    resources:
        mem_mb=16000,
        runtime=1440,
        gpu=0,
    params:
        key=key("scores"),
        code=code("scores"),
    shell:
        "python -m consistency scores --study config/studies/{wildcards.study}.yaml"
        " --run {wildcards.run} --seed {wildcards.seed} --threads {threads}"
        " 2>&1 | tee -i {log}"
