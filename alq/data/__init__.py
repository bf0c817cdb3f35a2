"""The data of the three networks, and published weights for one of them.

`mnist`, `cifar10` and `imagenet` offer the same two functions: `load_splits` for training, and
`load_test`. `read_mnist` gives MNIST as plain tensors.
"""

from .mnist import read_mnist

__all__ = ["read_mnist"]
