"""The files of a run: checkpoints, packed files, logs."""
