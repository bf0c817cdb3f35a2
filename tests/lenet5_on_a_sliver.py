"""lenet5.py as a script, on the first few digits of each MNIST file: `python ... FLAGS`.

Within tests the fixture `sliver` does the same.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lenet5
from alq.data import mnist, read_mnist

TRAIN, TEST = 300, 100


@cache
def sliver(root, dataset="mnist"):
    train, test = read_mnist(root, dataset)
    return tuple(x[:TRAIN].clone() for x in train), tuple(x[:TEST].clone() for x in test)


if __name__ == "__main__":
    mnist.read_mnist = sliver
    lenet5.main(sys.argv[1:])
