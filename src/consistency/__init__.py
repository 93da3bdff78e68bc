"""Consistency distillation with analytically fitted preconditioning: a reproducibility workflow."""

__version__ = "0.1.0"

#: the package's rooms in order: a module imports from its own room and from those before it; __main__ has the verbs,
#: api the Python interface
ROOMS = (
    *("base", "theory", "config", "nets", "data", "runtime"),
    *("provenance", "training", "evaluation", "report", "tracking", "stages"),
)
