"""Pictures of runs, of sweeps, and of whole benchmarks."""
