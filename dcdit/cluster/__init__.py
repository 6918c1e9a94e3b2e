"""Runs as SLURM jobs: what is asked of SLURM, how a sweep is submitted and awaited, and what holds inside a job."""
