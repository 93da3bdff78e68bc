# dataset, calibration and scores inherit from this rule.
rule extractor:
    input:
        inputs("extractor"),
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
        verb=verb("extractor"),
    shell:
        "python -m consistency {params.verb} --study config/studies/{wildcards.study}.yaml"
        " --threads {threads} 2>&1 | tee -i {log}"


# Scores data against data and the teacher against data, before any student is trained or scored.
use rule extractor as calibration with:
    input:
        inputs("scores"),
    output:
        "results/{study}/scores/calibration.csv",
        "results/{study}/scores/endpoints.npy",
        "results/{study}/scores/calibration.passed",
        "results/{study}/scores/calibration.card.json",
    log:
        "logs/{study}/calibration.log",
    benchmark:
        "logs/{study}/calibration.tsv"
    params:
        verb=verb("scores"),


use rule extractor as scores with:
    input:
        inputs("scores"),
    output:
        "results/{study}/scores/{student}/seed{seed}.csv",
        "results/{study}/scores/{student}/seed{seed}.card.json",
    log:
        "logs/{study}/scores/{student}-seed{seed}.log",
    benchmark:
        "logs/{study}/scores/{student}-seed{seed}.tsv"
    resources:
        mem_mb=16000,
        runtime=1440,
        gpu=0,
    params:
        verb=verb("scores"),
