# The resumable state lies under state/, undeclared: Snakemake deletes declared outputs before it runs a job again.
rule student:
    input:
        "results/{study}/dataset/images.npy",
        "results/{study}/teacher/teacher.safetensors",
        coefficients_if_fitted,
        vgg_if_used,
        predictor_if_frozen,
        # No student is trained on a teacher that fails the calibration, nor again because the teacher was measured again.
        ancient("results/{study}/scores/calibration.csv"),
    output:
        "results/{study}/students/{run}/seed{seed}/student.safetensors",
        "results/{study}/students/{run}/seed{seed}/history.jsonl",
        "results/{study}/students/{run}/seed{seed}/card.json",
        directory("results/{study}/students/{run}/seed{seed}/snapshots"),
    log:
        "logs/{study}/student/{run}-seed{seed}.log",
    benchmark:
        "logs/{study}/student/{run}-seed{seed}.tsv"
    wildcard_constraints:
        run=TRAINED,
    conda:
        environment
    resources:
        mem_mb=16000,
        runtime=1440,
        gpu=0,
        gres="",
        nodes=1,
    params:
        key=key("student"),
        code=code("student"),
    shell:
        "python -m consistency student --study config/studies/{wildcards.study}.yaml"
        " --run {wildcards.run} --seed {wildcards.seed} --threads {threads}"
        " --processes {resources.gpu} --gres '{resources.gres}' --nodes {resources.nodes}"
        " --job-minutes {resources.runtime} 2>&1 | tee -i {log}"
