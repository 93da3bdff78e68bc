rule track:
    input:
        "results/{study}/report/report.html",
        "results/{study}/report/summary.json",
    output:
        "results/{study}/track/tracked.json",
    log:
        "logs/{study}/track.log",
    benchmark:
        "logs/{study}/track.tsv"
    localrule: True
    conda:
        environment
    shell:
        "python -m consistency track --study config/studies/{wildcards.study}.yaml 2>&1 | tee -i {log}"
