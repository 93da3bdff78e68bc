rule coefficients:
    input:
        "results/{study}/dataset/images.npy",
        "results/{study}/teacher/teacher.safetensors",
    output:
        "results/{study}/coefficients/coefficients.npz",
        "results/{study}/coefficients/card.json",
    log:
        "logs/{study}/coefficients.log",
    benchmark:
        "logs/{study}/coefficients.tsv"
    conda:
        environment
    resources:
        mem_mb=16000,
        runtime=240,
        gpu=0,
    params:
        key=key("coefficients"),
        code=code("coefficients"),
    shell:
        "python -m consistency coefficients --study config/studies/{wildcards.study}.yaml --threads {threads}"
        " 2>&1 | tee -i {log}"
