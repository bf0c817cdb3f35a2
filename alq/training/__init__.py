"""Training through a schedule of epochs."""
