# Triton does not unpack tuples, and lets them change type as they grow:
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"
"""The kernels of `alq.extras.fused_steps` and their parts, in Triton.

A kernel is one program a group. A name that ends in _ points to a tensor's first element, in parts
also to a group's; `at` are the places of a block of weights from there, `inside` says which of them
exist. A tuple of scalars holds a number for each basis, or for each pair of them.
"""

import triton
import triton.language as tl


@triton.jit
def basis_kernel(
    g_, m_, v_, v_max_, codes_, alpha_, live_, w0_, w_hat_, new1, beta2, new2, p_factor, h_factor,
    eps, ridge, n, L: tl.constexpr, MOVE_BASE: tl.constexpr, RELATIVE_RIDGE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Take a basis step of one group."""
    group = tl.program_id(0).to(tl.int64)
    alpha = load_coordinates(alpha_ + group * L, L)
    existing = bits(live_ + group * L, L)
    levels, level_codes = positive_levels(alpha, existing, L)

    total = tl.sum(tl.zeros([BLOCK], tl.float32))  # of h
    sums = zeros(L * (L + 1) // 2)
    for start in range(0, n, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside, at = column < n, group * n + column
        # B1  moments of the gradient; p and h of the loss model
        _, m, v_max = update_moments(g_, m_, v_, v_max_, at, inside, new1, beta2, new2)
        p = m * p_factor
        h = (tl.sqrt(v_max) + eps) * h_factor
        # B2  target = w0 - p/h
        w0 = tl.load(w0_ + at, inside, 0.0)
        target = w0 - p / h
        # B3  B = the signs of the level nearest to the target
        code = nearest(tl.abs(target), levels, level_codes, L)
        code = tl.where(target < 0, code ^ existing, code)
        tl.store(codes_ + at, code.to(tl.uint8), inside)
        if MOVE_BASE:
            tl.store(w0_ + at, target, inside)
        h = tl.where(inside, h, 0.0)
        total += tl.sum(h)
        sums = add_products(sums, code, h, tl.where(inside, h * w0 - p, 0.0), L)

    # B4  alpha = argmin_a (B^T a - w0).p + 1/2 (B^T a - w0).(h*(B^T a - w0))
    alpha = load_coordinates(alpha_ + group * L, L)  # again: until here they would take registers
    alpha = solve(sums, total, alpha, existing, ridge, L, RELATIVE_RIDGE)
    # B6  a negative coordinate flips together with its basis: w_hat does not change
    tl.debug_barrier()  # all threads have read alpha, and written codes
    flipped = 0
    for i in tl.static_range(L):
        tl.store(alpha_ + group * L + i, tl.abs(alpha[i]))
        flipped += tl.where(alpha[i] < 0, 1 << i, 0)
    # B5  w_hat = B^T alpha
    write_weights(codes_, w_hat_, alpha, flipped, group, n, L, BLOCK)


@triton.jit
def products_kernel(
    x_, m_, v_, v_max_, codes_, live_, products_, new1, beta2, new2, n, L: tl.constexpr,
    MOMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write B x of one group; with MOMENTS x is the gradient, and updates them."""
    group = tl.program_id(0).to(tl.int64)
    sums = zeros(L)
    for start in range(0, n, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside, at = column < n, group * n + column
        if MOMENTS:
            x, _, _ = update_moments(x_, m_, v_, v_max_, at, inside, new1, beta2, new2)
        else:
            x = tl.load(x_ + at, inside, 0.0)
        code = tl.load(codes_ + at, inside, 0).to(tl.int32)
        added = ()
        for i in tl.static_range(L):
            added = added + (sums[i] + tl.sum(x * sign(code, i)),)
        sums = added
    for i in tl.static_range(L):
        exists = tl.load(live_ + group * L + i)
        tl.store(products_ + group * L + i, tl.where(exists, sums[i], 0.0))


@triton.jit
def rebuild_kernel(codes_, alpha_, w_hat_, n, L: tl.constexpr, BLOCK: tl.constexpr):
    """Write w_hat of one group."""
    group = tl.program_id(0).to(tl.int64)
    alpha = load_coordinates(alpha_ + group * L, L)
    write_weights(codes_, w_hat_, alpha, 0, group, n, L, BLOCK)


# ---------------------------------------------------------------------------- their parts


@triton.jit
def has(code, i):
    """Return whether codes have bit i."""
    return (code >> i) & 1 == 1


@triton.jit
def sign(code, i):
    """Return the signs, -1.0 or 1.0, that codes have in basis i."""
    return tl.where(has(code, i), 1.0, -1.0)


@triton.jit
def bits(live_, L: tl.constexpr):
    """Return the code with the bit of every basis that exists."""
    code = 0
    for i in tl.static_range(L):
        code += tl.load(live_ + i).to(tl.int32) << i
    return code


@triton.jit
def load_coordinates(alpha_, L: tl.constexpr):
    """Return a group's coordinates as a tuple."""
    alpha = ()
    for i in tl.static_range(L):
        alpha = alpha + (tl.load(alpha_ + i),)
    return alpha


@triton.jit
def zeros(count: tl.constexpr):
    """Return a tuple of `count` sums of nothing."""
    total = tl.sum(tl.zeros([2], tl.float32))
    sums = ()
    for _ in tl.static_range(count):
        sums = sums + (total,)
    return sums


@triton.jit
def update_moments(g_, m_, v_, v_max_, at, inside, new1, beta2, new2):
    """Update the moments `at` some weights; return g, m and v_max of these."""
    g = tl.load(g_ + at, inside, 0.0)
    m = tl.load(m_ + at, inside, 0.0)
    v = tl.load(v_ + at, inside, 0.0)
    v_max = tl.load(v_max_ + at, inside, 0.0)
    m += new1 * (g - m)
    v = beta2 * v + new2 * g * g
    v_max = tl.maximum(v_max, v, propagate_nan=tl.PropagateNan.ALL)  # as torch does
    tl.store(m_ + at, m, inside)
    tl.store(v_ + at, v, inside)
    tl.store(v_max_ + at, v_max, inside)
    return g, m, v_max


@triton.jit
def positive_levels(alpha, existing, L: tl.constexpr):
    """Return the 2^(L-1) levels >= 0 of a group in ascending order, and their codes."""
    K: tl.constexpr = 2 ** (L - 1)
    code = 2 * tl.arange(0, K) + 1  # of each two opposite codes one
    level = tl.zeros([K], tl.float32)
    for i in tl.static_range(L):
        level += sign(code, i) * alpha[i]
    code = tl.where(level < 0, ~code, code) & existing
    # Float32 numbers >= 0 are ordered as their bits are.
    key = tl.abs(level).to(tl.int32, bitcast=True).to(tl.int64) << 32 | code.to(tl.int64)
    if K > 1:
        key = tl.sort(key)
    return (key >> 32).to(tl.int32).to(tl.float32, bitcast=True), key.to(tl.int32)


@triton.jit
def nearest(x, levels, codes, L: tl.constexpr):
    """Return the code of the level nearest to each x >= 0, by bisection."""
    below = tl.zeros(x.shape, tl.int32)  # place of the last level below x, or 0
    for turn in tl.static_range(1, L):
        middle = below + 2 ** (L - 1 - turn)
        below = tl.where(x > tl.gather(levels, middle, 0), middle, below)
    above = tl.minimum(below + 1, 2 ** (L - 1) - 1)
    upper, lower = tl.gather(levels, above, 0), tl.gather(levels, below, 0)
    return tl.gather(codes, tl.where(upper - x < x - lower, above, below), 0)


@triton.jit
def add_products(sums, code, h, x, L: tl.constexpr):
    """Add a block's elements (i, j), j < i, of B diag(h) B^T, row by row, and of B x as row L."""
    added = ()
    for i in tl.static_range(L + 1):
        row = x
        if i < L:
            row = h * sign(code, i)
        for j in tl.static_range(i):
            added = added + (sums[i * (i - 1) // 2 + j] + tl.sum(row * sign(code, j)),)
    return added


@triton.jit
def solve(sums, total, alpha, existing, ridge, L: tl.constexpr, RELATIVE_RIDGE: tl.constexpr):
    """Solve for alpha as `steps.solve_coordinates` does; return the present one if not finite.

    By A = C D C^T (Cholesky without roots); b is one row more, which becomes D^-1 C^-1 b. `sums`
    are those of `add_products`, `total` is the sum of h.
    """
    R = ridge
    if RELATIVE_RIDGE:
        R = ridge * total
    C, D = (), ()
    for i in tl.static_range(L + 1):
        for j in tl.static_range(i):
            c = sums[i * (i - 1) // 2 + j]
            if RELATIVE_RIDGE and i == L:
                c += R * alpha[j]
            c = tl.where(has(existing, j if i == L else i), c, 0.0)  # live ones come first
            for k in tl.static_range(j):
                c -= C[i * (i - 1) // 2 + k] * D[k] * C[j * (j - 1) // 2 + k]
            C = C + (c / D[j],)
        if i < L:
            d = tl.where(has(existing, i), total + R, 1.0)
            for k in tl.static_range(i):
                c = C[i * (i - 1) // 2 + k]
                d -= c * c * D[k]
            D = D + (d,)
    solved, finite = (), total == total
    for i in tl.static_range(L - 1, -1, -1):
        a = C[L * (L - 1) // 2 + i]
        for k in tl.static_range(i + 1, L):
            a -= C[k * (k - 1) // 2 + i] * solved[k - i - 1]
        solved = (a,) + solved
        finite = finite & (tl.abs(a) < float("inf"))
    chosen = ()
    for i in tl.static_range(L):
        chosen = chosen + (tl.where(finite, solved[i], alpha[i]),)
    return chosen


@triton.jit
def write_weights(codes_, w_hat_, alpha, flipped, group, n, L: tl.constexpr, BLOCK: tl.constexpr):
    """Write w_hat = B^T alpha of a group, added in the order of `level_table`; flip its codes."""
    for start in range(0, n, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside, at = column < n, group * n + column
        code = tl.load(codes_ + at, inside, 0).to(tl.int32)
        w_hat = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(L):
            w_hat += sign(code, i) * alpha[i]
        tl.store(w_hat_ + at, w_hat, inside)
        tl.store(codes_ + at, (code ^ flipped).to(tl.uint8), inside)
