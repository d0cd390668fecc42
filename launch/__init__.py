"""Commands that start training: one process, Accelerate, SLURM, Ray clusters, jobs and sweeps. No training logic."""
