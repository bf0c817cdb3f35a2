"""The data sets of the three networks, as loaders of batches on the training device."""

from .mnist import read_mnist

__all__ = ["read_mnist"]
