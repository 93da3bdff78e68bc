# The couplings' denoisers are trained here and resume from state/.
rule flows:
    input:
        inputs("flows"),
    output:
        "results/{study}/flows/transport.csv",
        "results/{study}/flows/discrepancy.csv",
        "results/{study}/flows/toy.npz",
        "results/{study}/flows/plane.csv",
        "results/{study}/flows/limit.csv",
        "results/{study}/flows/card.json",
    log:
        "logs/{study}/flows.log",
    benchmark:
        "logs/{study}/flows.tsv"
    conda:
        environment
    resources:
        mem_mb=16000,
        runtime=1440,
        gpu=0,
    shell:
        "python -m consistency flows --study config/studies/{wildcards.study}.yaml --threads {threads}"
        " --gpu {resources.gpu} --job-minutes {resources.runtime} 2>&1 | tee -i {log}"
