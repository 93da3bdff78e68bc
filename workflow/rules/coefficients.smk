# dataset, extractor, calibration and scores inherit from this rule.
rule coefficients:
    input:
        inputs("coefficients"),
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
        verb=verb("coefficients"),
    shell:
        "python -m consistency {params.verb} --study config/studies/{wildcards.study}.yaml"
        " --threads {threads} 2>&1 | tee -i {log}"
