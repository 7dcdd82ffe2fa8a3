"""A run on disk and as a process: directory, checkpoints, metrics, progress, signals, processes."""
