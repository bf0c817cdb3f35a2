"""The data of the three networks, and published weights for one of them.

`mnist`, `cifar` and `imagenet` offer the same two functions. `load_splits` returns the loaders of
training, validation and test, and the validation images' places in the training set, which it is
given if a checkpoint has them already. `load_test` returns the loader of the test images alone, and
needs no others. `read_mnist` gives MNIST, or Fashion-MNIST, as plain tensors.
"""

from .mnist import read_mnist

__all__ = ["read_mnist"]
