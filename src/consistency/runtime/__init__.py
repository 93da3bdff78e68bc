"""Devices, processes, signals, Slurm and the start of Snakemake. It knows nothing of what is computed."""
