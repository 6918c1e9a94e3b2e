"""Runs as SLURM jobs: the settings of a job, submitting a sweep and waiting for it, and processes within a job."""
