"""Devices, processes, signals, Slurm and the start of Snakemake, for any computation."""
