use rule extractor as dataset with:
    input:
        inputs("dataset"),
    output:
        "results/{study}/dataset/images.npy",
        "results/{study}/dataset/labels.npy",
        "results/{study}/dataset/dataset.json",
        "results/{study}/dataset/card.json",
    log:
        "logs/{study}/dataset.log",
    benchmark:
        "logs/{study}/dataset.tsv"
    threads: 8
    resources:
        mem_mb=4000,
        runtime=720,
    params:
        verb=verb("dataset"),
