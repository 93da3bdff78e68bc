rule teacher:
    input:
        teacher_sources,
    output:
        "results/{study}/teacher/teacher.safetensors",
        "results/{study}/teacher/history.jsonl",
        "results/{study}/teacher/card.json",
    log:
        "logs/{study}/teacher.log",
    benchmark:
        "logs/{study}/teacher.tsv"
    conda:
        environment
    resources:
        mem_mb=16000,
        runtime=720,
        gpu=0,
        gres="",
        nodes=1,
    params:
        key=key("teacher"),
        code=code("teacher"),
    shell:
        "python -m consistency teacher --study config/studies/{wildcards.study}.yaml --threads {threads}"
        " --processes {resources.gpu} --gres '{resources.gres}' --nodes {resources.nodes}"
        " --job-minutes {resources.runtime} 2>&1 | tee -i {log}"
