rule resource:
    output:
        "resources/{name}",
    log:
        "logs/resources/{name}.log",
    wildcard_constraints:
        name=RESOURCES,
    localrule: True
    conda:
        environment
    shell:
        "python -m consistency fetch {wildcards.name} 2>&1 | tee -i {log}"
