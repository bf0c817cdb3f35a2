"""Networks that compute from the bits of their weights: docs/inference.md says how, and how fast.

What each module is for, in the order in which to read them. Those without a star are plain Python
and PyTorch. Those with a star are kernels and need numba; they can be left out, as `rows` alone
computes the same weights. A reader of one way of the product needs its module, `outputs`,
`kernels` and a look at `vectors`.

    The network
      pack         the whole network, made of one in memory or read from a file
      folding      a batch norm behind a layer becomes part of its coordinates and bias
      layers       what packed layers share: their state, their checks, which way they take
      kinds        linear layers and convolutions
      plan         the rule that chooses the way to compute a layer

    One layer's numbers
      rows         its bits as a list of rows, and the weights of these again
      planes       its input in binary bases: levels, midpoints, and which bit of which basis
      tiles        where inputs lie and outputs go: tiles, strips, padding, stride

    One call
      compute      a layer's product and its decoded weights, by a kernel where there is numba
      prepared     all that a kernel is told and a shape says, worked out once
      jobs         the structure that a kernel is told things in, and the threads that share it

    The kernels
      kernels *    what a thread runs: unit after unit, tile after tile
      moves *      inputs are laid out side by side; int16 steps
      inputs *     inputs in binary bases become words, or are put on their levels
      tables *     many positions: sums of four inputs are looked up
      popcounts *  many positions, inputs in binary bases: ones are counted
      dots *       few positions of a linear layer, and the decoding of weights
      outputs *    rows are added to a tile's sums, sums become outputs
      vectors *    the vector instructions that all of these write, and numba's compiler
"""
