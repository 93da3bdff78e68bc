localrules:
    resource,


# Snakemake removes what an interrupted job has made, but not the .part beside it: a download goes on where it stopped.
rule resource:
    output:
        "resources/{name}",
    log:
        "logs/resources/{name}.log",
    wildcard_constraints:
        name=RESOURCES,
    conda:
        environment
    shell:
        "python -m consistency fetch {wildcards.name} 2>&1 | tee -i {log}"
