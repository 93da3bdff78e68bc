rule report:
    input:
        "results/{study}/scores/calibration.csv",
        "results/{study}/samples/teacher/heun.npy",
        lambda w: [str(student.scores) for student in job_of(w).trainings],
        coefficients_if_read,
        lambda w: expand(rules.flows.output[:5], study=w.study) if job_of(w).study.flows else [],
        # The snapshots whose own coefficients it shows.
        lambda w: expand(
            rules.student.output[3], study=w.study, run=job_of(w).study.carrying, seed=job_of(w).study.seeds[0]
        ),
    output:
        report(
            "results/{study}/report/report.html",
            caption="../report/report.rst",
            category="{study}",
        ),
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
    params:
        **made_by("report"),
    shell:
        "python -m consistency report --study config/studies/{wildcards.study}.yaml 2>&1 | tee -i {log}"
