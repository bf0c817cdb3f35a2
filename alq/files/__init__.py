"""The files that runs write and read: checkpoints, packed files, logs."""
