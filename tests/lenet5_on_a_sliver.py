"""lenet5.py as a script, on the first few digits of each MNIST file: `python ... FLAGS`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lenet5
from alq.data import mnist, read_mnist

TRAIN, TEST = 300, 100


def sliver(root):
    train, test = read_mnist(root)
    return tuple(x[:TRAIN] for x in train), tuple(x[:TEST] for x in test)


mnist.read_mnist = sliver

if __name__ == "__main__":
    lenet5.main(sys.argv[1:])
