rule dataset:
    input:
        downloads_of("dataset"),
    output:
        "results/{study}/dataset/images.npy",
        "results/{study}/dataset/labels.npy",
        "results/{study}/dataset/dataset.json",
        "results/{study}/dataset/card.json",
    log:
        "logs/{study}/dataset.log",
    benchmark:
        "logs/{study}/dataset.tsv"
    conda:
        environment
    threads: 8
    resources:
        mem_mb=4000,
        runtime=720,
    params:
        **made_by("dataset"),
    shell:
        "python -m consistency dataset --study config/studies/{wildcards.study}.yaml --threads {threads}"
        " 2>&1 | tee -i {log}"
