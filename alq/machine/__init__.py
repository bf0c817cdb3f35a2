"""The machine that a run has: its processes, its signals, its arithmetic."""
