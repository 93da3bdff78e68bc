# One study goes dataset -> teacher -> coefficients -> student -> samples -> scores -> report, then to MLflow.
configfile: "config/config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/resources.smk"
include: "workflow/rules/coefficients.smk"
include: "workflow/rules/dataset.smk"
include: "workflow/rules/teacher.smk"
include: "workflow/rules/student.smk"
include: "workflow/rules/samples.smk"
include: "workflow/rules/scores.smk"
include: "workflow/rules/flows.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/track.smk"


onstart:
    # What would leave jobs waiting for ever stops this before any is submitted.
    if workflow.executor_plugin.name == "slurm":
        with in_one_line():
            require_cluster()


# It must stand here: an include would restore the default target, and an included `all` would never run.
rule all:
    default_target: True
    input:
        expand("results/{study}/report/report.html", study=STUDIES),
        expand("results/{study}/track/tracked.json", study=STUDIES),
