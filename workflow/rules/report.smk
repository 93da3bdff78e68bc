rule report:
    input:
        inputs("report"),
    output:
        report("results/{study}/report/report.html", caption="../report/report.rst", category="{study}"),
        report(
            directory("results/{study}/report/figures"),
            patterns=["{figure}.png"],
            caption="../report/figure.rst",
            category="{study}",
            subcategory="figures",
        ),
        "results/{study}/report/summary.json",
        "results/{study}/report/scores.csv",
        "results/{study}/report/table.csv",
        "results/{study}/report/speedup.csv",
        "results/{study}/report/paired.csv",
        "results/{study}/report/card.json",
    log:
        "logs/{study}/report.log",
    benchmark:
        "logs/{study}/report.tsv"
    localrule: True
    conda:
        environment
    resources:
        mem_mb=4000,
        runtime=60,
    shell:
        "python -m consistency report --study config/studies/{wildcards.study}.yaml 2>&1 | tee -i {log}"
