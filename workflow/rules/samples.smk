# What was drawn lies under state/ until all is done: an interrupted job goes on where it stopped.
rule teacher_samples:
    input:
        "results/{study}/teacher/teacher.safetensors",
    output:
        "results/{study}/samples/teacher/heun.npy",
        "results/{study}/samples/teacher/card.json",
    log:
        "logs/{study}/samples/teacher.log",
    benchmark:
        "logs/{study}/samples/teacher.tsv"
    conda:
        environment
    resources:
        mem_mb=16000,
        runtime=1440,
        gpu=0,
        gres="",
        nodes=1,
    params:
        key=key("samples"),
        code=code("samples"),
    shell:
        "python -m consistency samples --study config/studies/{wildcards.study}.yaml --threads {threads}"
        " --processes {resources.gpu} --gres '{resources.gres}' --nodes {resources.nodes}"
        " --job-minutes {resources.runtime} 2>&1 | tee -i {log}"


rule samples:
    input:
        "results/{study}/students/{run}/seed{seed}/student.safetensors",
        coefficients_if_fitted,
    output:
        directory("results/{study}/samples/{run}/seed{seed}"),
    log:
        "logs/{study}/samples/{run}-seed{seed}.log",
    benchmark:
        "logs/{study}/samples/{run}-seed{seed}.tsv"
    conda:
        environment
    resources:
        mem_mb=16000,
        runtime=1440,
        gpu=0,
        gres="",
        nodes=1,
    params:
        key=key("samples"),
        code=code("samples"),
    shell:
        "python -m consistency samples --study config/studies/{wildcards.study}.yaml"
        " --run {wildcards.run} --seed {wildcards.seed} --threads {threads}"
        " --processes {resources.gpu} --gres '{resources.gres}' --nodes {resources.nodes}"
        " --job-minutes {resources.runtime} 2>&1 | tee -i {log}"
