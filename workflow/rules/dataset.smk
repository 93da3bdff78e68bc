rule dataset:
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
    resources:
        mem_mb=2000,
        runtime=240,
    params:
        key=key("dataset"),
    shell:
        "python -m consistency dataset --study config/studies/{wildcards.study}.yaml 2>&1 | tee -i {log}"
