# `snakemake` in this folder finds this file first; the workflow is in workflow/Snakefile.
include: "workflow/Snakefile"


# An include restores the default target, and without one a run would end with "Nothing to be done".
workflow.default_target = "all"
