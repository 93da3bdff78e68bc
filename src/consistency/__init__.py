"""Consistency distillation with analytically fitted preconditioning: a reproducibility workflow."""

__version__ = "0.1.0"
