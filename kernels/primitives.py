"""Device helpers shared by the kernels: tiles in, tiles out, and the two small steps of mathematics they all take.

Every tensor a kernel reads is a stack of maps `(N, C, L)` with free strides. A tile of it is held as `(BLOCK_C, BLOCK_L)`:
channels down, tokens across, the way NCHW lies in memory.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

NORM_ROWS = tl.constexpr(4)
"""What is known of a normalised map `h = factor · (x - mean) + bias`, for each channel: mean, factor, bias, and the mean of h."""


@triton.jit
def locate(tiles_per_map):
    """Which map and which tile of it this program works on: `(n, tile)`, n as int64 so that `n * stride` cannot wrap."""
    pid = tl.program_id(0)
    return (pid // tiles_per_map).to(tl.int64), pid % tiles_per_map


@triton.jit
def tile_offsets(offs_c, offs_l, stride_c, stride_l):
    """Element offsets of a tile `(BLOCK_C, BLOCK_L)`, in int64: an index times a stride leaves int32 on large maps."""
    return offs_c.to(tl.int64)[:, None] * stride_c + offs_l.to(tl.int64)[None, :] * stride_l


@triton.jit
def load_tile(ptr, offsets, offs_c, offs_l, num_channels: tl.constexpr, num_tokens, MASK_TOKENS: tl.constexpr):
    """A tile `(BLOCK_C, BLOCK_L)`, zero outside `num_channels` and, with MASK_TOKENS, outside `num_tokens`."""
    if MASK_TOKENS:
        inside = (offs_c < num_channels)[:, None] & (offs_l < num_tokens)[None, :]
        return tl.load(ptr + offsets, mask=inside, other=0.0)
    if offs_c.shape[0] != num_channels:
        return tl.load(ptr + offsets, mask=(offs_c < num_channels)[:, None], other=0.0)
    return tl.load(ptr + offsets)


@triton.jit
def load_norm(norm_ptr, offs_c, num_channels: tl.constexpr):
    """mean, factor and bias (BLOCK_C) in fp32, zero outside of `num_channels`; norm_ptr (NORM_ROWS, num_channels)."""
    inside = offs_c < num_channels
    mean = tl.load(norm_ptr + offs_c, mask=inside, other=0.0)
    factor = tl.load(norm_ptr + num_channels + offs_c, mask=inside, other=0.0)
    bias = tl.load(norm_ptr + 2 * num_channels + offs_c, mask=inside, other=0.0)
    return mean, factor, bias


@triton.jit
def load_normalized(ptr, offsets, offs_c, offs_l, num_channels: tl.constexpr, num_tokens, norm_ptr):
    """A tile `(BLOCK_C, BLOCK_L)` of x, or of the normalised map in x's dtype where norm_ptr (NORM_ROWS, num_channels) is given.

    Zero outside `num_channels`; what a normalised tile has outside `num_tokens` means nothing.
    """
    x = load_tile(ptr, offsets, offs_c, offs_l, num_channels, num_tokens, True)
    if norm_ptr is not None:
        mean, factor, bias = load_norm(norm_ptr, offs_c, num_channels)
        x = ((x.to(tl.float32) - mean[:, None]) * factor[:, None] + bias[:, None]).to(x.dtype)
    return x


@triton.jit
def store_tile(ptr, offsets, tile, offs_c, offs_l, num_channels: tl.constexpr, num_tokens):
    """Writes a tile `(BLOCK_C, BLOCK_L)`, leaving out what lies beyond `num_channels` and `num_tokens`."""
    inside = (offs_c < num_channels)[:, None] & (offs_l < num_tokens)[None, :]
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def parts_to_store(tile, HALVES: tl.constexpr):
    """A tile (ROWS, COLUMNS) as a tuple of tiles to be stored one after the other: itself, or two of half the columns.

    On its way a tile is held as its product left it and as memory wants it, beside what is to be added; halves take half of that.
    """
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split() if HALVES else (tile,)


@triton.jit
def store_sum(
    acc, addend_ptr, stride_ac, stride_al, out_ptr, stride_oc, stride_ol, first_c, offs_l, num_channels: tl.constexpr, num_tokens,
    HALVES: tl.constexpr,
):  # fmt: skip
    """Writes acc (BLOCK_L, BLOCK_C) to out_ptr (C, num_tokens), from channel first_c on, plus addend_ptr (C, num_tokens) unless None.

    HALVES: `parts_to_store`.
    """
    parts = parts_to_store(acc, HALVES)
    for part in tl.static_range(len(parts)):
        total = tl.trans(parts[part])
        offs_c = first_c + part * total.shape[0] + tl.arange(0, total.shape[0])
        if addend_ptr is not None:
            offsets = tile_offsets(offs_c, offs_l, stride_ac, stride_al)
            total += load_tile(addend_ptr, offsets, offs_c, offs_l, num_channels, num_tokens, True)
        store_tile(out_ptr, tile_offsets(offs_c, offs_l, stride_oc, stride_ol), total, offs_c, offs_l, num_channels, num_tokens)
        if part + 1 < len(parts):
            tl.debug_barrier()  # or the next part would be loaded beside this one


@triton.jit
def row_sums(tile, BY_PRODUCT: tl.constexpr):
    """Sums (ROWS) of a tile (ROWS, COLUMNS) in fp32, of the numbers as its dtype has rounded them.

    Converting 16-bit numbers back would take the place of exponentials. With BY_PRODUCT they are multiplied by a constant
    matrix whose 16 equal columns add up to the sums, which takes the fewest instructions; else bf16, the upper half of
    fp32, is shifted there, which takes the fewest registers. Both are exact.
    """
    if tile.dtype == tl.float32:
        sums = tl.sum(tile, 1)
    elif BY_PRODUCT:
        sums = tl.sum(tl.dot(tile, tl.full((tile.shape[1], 16), 1 / 16, tile.dtype)), 1)
    elif tile.dtype == tl.bfloat16:
        sums = tl.sum((tile.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True), 1)
    else:
        sums = tl.sum(tile.to(tl.float32), 1)
    return sums


@triton.jit
def load_rows(w_ptr, offs_rows, offs_cols, num_rows: tl.constexpr, num_cols: tl.constexpr):
    """Rows `(BLOCK_ROWS, BLOCK_COLS)` of a contiguous matrix `(num_rows, num_cols)`, zero outside of it."""
    inside = (offs_rows < num_rows)[:, None] & (offs_cols < num_cols)[None, :]
    return tl.load(w_ptr + offs_rows[:, None] * num_cols + offs_cols[None, :], mask=inside, other=0.0)


@triton.jit
def dot_over_channels(
    a_ptr, stride_ac, stride_al, offs_a, num_a, b_ptr, stride_bc, stride_bl, offs_b, num_b,
    C: tl.constexpr, BLOCK_K: tl.constexpr, INPUT_PRECISION: tl.constexpr, a_norm_ptr=None,
):  # fmt: skip
    """`a_i · b_j` for a tile of tokens of a (C, num_a) and one of b (C, num_b): (BLOCK_A, BLOCK_B) in fp32.

    BLOCK_K channels at a time come from memory: for maps with so many channels that no whole tile fits into registers.
    With a_norm_ptr (NORM_ROWS, C) a is normalised as it is loaded.
    """
    acc = tl.zeros((offs_a.shape[0], offs_b.shape[0]), tl.float32)
    for start_k in tl.range(0, C, BLOCK_K, loop_unroll_factor=1, disable_licm=True):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        a = load_normalized(a_ptr, tile_offsets(offs_k, offs_a, stride_ac, stride_al), offs_k, offs_a, C, num_a, a_norm_ptr)
        b = load_tile(b_ptr, tile_offsets(offs_k, offs_b, stride_bc, stride_bl), offs_k, offs_b, C, num_b, True)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit
def project_there_and_back(
    t_ptr, stride_tc, stride_tl, offs_l, num_tokens, w_in_ptr, b_in_ptr, w_out_ptr, scale,
    C: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    norm_ptr=None,
):  # fmt: skip
    """`scale · W_outᵀ (W_in t + b_in)` for each token t of a tile of the map behind t_ptr (C, num_tokens): (BLOCK_L, BLOCK_C), fp32.

    w_in_ptr (D, C), b_in_ptr (D) or None, w_out_ptr (D, C); norm_ptr (NORM_ROWS, C), by which t is normalised, or None. D is walked
    BLOCK_D rows at a time, so neither a weight nor the D-wide projection is ever whole. Forward it folds the keys' weight into the
    query, backward it takes that back.
    """
    offs_c = tl.arange(0, BLOCK_C)
    acc = tl.zeros((offs_l.shape[0], BLOCK_C), tl.float32)
    for start_d in tl.range(0, D, BLOCK_D, num_stages=1):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        # The rows of a weight are to its columns what tokens are to channels.
        projected = dot_over_channels(
            t_ptr, stride_tc, stride_tl, offs_l, num_tokens, w_in_ptr, 1, C, offs_d, D, C, BLOCK_K, INPUT_PRECISION, norm_ptr
        )
        if b_in_ptr is not None:
            projected += tl.load(b_in_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)[None, :]
        w_out = load_rows(w_out_ptr, offs_d, offs_c, D, C)
        acc = tl.dot((projected * scale).to(w_out.dtype), w_out, acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit
def project_tile(
    x, w_ptr, b_ptr, factor, out_ptr, stride_oc, stride_ol, offs_c, offs_l, num_tokens,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr, centre_ptr=None, shift_ptr=None,
):  # fmt: skip
    """Writes `factor · (W (t - centre) + b)` of each token t of the tile x (BLOCK_C, BLOCK_L) to out_ptr (ROWS, num_tokens).

    w_ptr (ROWS, C); b_ptr (ROWS) or None; factor a number or None; centre_ptr (C) fp32 or None, and then shift_ptr (ROWS) fp32, where
    `W centre` goes, or None where it is not wanted. BLOCK_R rows of the weight are taken at a time.
    """
    for start_r in tl.range(0, ROWS, BLOCK_R, num_stages=1):
        offs_r = start_r + tl.arange(0, BLOCK_R)
        w = load_rows(w_ptr, offs_r, offs_c, ROWS, C)
        projected = tl.dot(w, x, input_precision=INPUT_PRECISION)
        if centre_ptr is not None:
            shift = tl.sum(w.to(tl.float32) * tl.load(centre_ptr + offs_c, mask=offs_c < C, other=0.0)[None, :], 1)
            if shift_ptr is not None:
                tl.store(shift_ptr + offs_r, shift, mask=offs_r < ROWS)
            projected -= shift[:, None]
        if b_ptr is not None:
            projected += tl.load(b_ptr + offs_r, mask=offs_r < ROWS, other=0.0).to(tl.float32)[:, None]
        if factor is not None:
            projected *= factor
        store_tile(out_ptr, tile_offsets(offs_r, offs_l, stride_oc, stride_ol), projected, offs_r, offs_l, ROWS, num_tokens)


@triton.jit
def project_back(
    acc, t_ptr, stride_tc, stride_tl, w_ptr, offs_c, offs_l, num_tokens,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """acc (BLOCK_L, BLOCK_C) plus `Wᵀ t` for each token t of a tile of the map behind t_ptr (ROWS, num_tokens); w_ptr (ROWS, C)."""
    for start_r in tl.range(0, ROWS, BLOCK_R, num_stages=1):
        offs_r = start_r + tl.arange(0, BLOCK_R)
        w = load_rows(w_ptr, offs_r, offs_c, ROWS, C)
        t = load_tile(t_ptr, tile_offsets(offs_r, offs_l, stride_tc, stride_tl), offs_r, offs_l, ROWS, num_tokens, True)
        acc = tl.dot(tl.trans(t), w, acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit
def store_output(
    y, y_ptr, stride_yc, stride_yl, w_v_ptr, b_v_ptr, gamma_ptr, x_ptr, stride_xc, stride_xl,
    out_ptr, stride_oc, stride_ol, offs_cv, offs_m, num_tokens,
    C: tl.constexpr, C_V: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr, factor=None, b_y_ptr=None,
):  # fmt: skip
    """Writes `x + γ (W_v (y + b_y) + b_v)`, times factor if there is one, of a tile of tokens to out_ptr (C, num_tokens), x with RESIDUAL.

    y (BLOCK_M, BLOCK_CV), or, where that is wider than BLOCK_K, in y_ptr (C_V, num_tokens); w_v_ptr (C, C_V); b_v_ptr (C) or
    None; gamma_ptr (1) or None; x_ptr (C, num_tokens); b_y_ptr (C_V), where y is not in memory, or None.
    """
    gamma = 1.0
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr).to(tl.float32)
    for start_r in tl.range(0, C, BLOCK_R, num_stages=1):
        offs_r = start_r + tl.arange(0, BLOCK_R)
        if offs_cv.shape[0] > BLOCK_K:
            branch = dot_over_channels(
                w_v_ptr, 1, C_V, offs_r, C, y_ptr, stride_yc, stride_yl, offs_m, num_tokens, C_V, BLOCK_K, INPUT_PRECISION
            )
        else:
            w_v = load_rows(w_v_ptr, offs_r, offs_cv, C, C_V)
            branch = tl.dot(w_v, tl.trans(y), input_precision=INPUT_PRECISION)
            if b_y_ptr is not None:
                b_y = tl.load(b_y_ptr + offs_cv, mask=offs_cv < C_V, other=0.0).to(tl.float32)
                branch += tl.sum(w_v.to(tl.float32) * b_y[None, :], 1)[:, None]
        if b_v_ptr is not None:
            branch += tl.load(b_v_ptr + offs_r, mask=offs_r < C, other=0.0).to(tl.float32)[:, None]
        branch *= gamma
        if RESIDUAL:
            branch += load_tile(x_ptr, tile_offsets(offs_r, offs_m, stride_xc, stride_xl), offs_r, offs_m, C, num_tokens, True)
        if factor is not None:
            branch *= factor
        store_tile(out_ptr, tile_offsets(offs_r, offs_m, stride_oc, stride_ol), branch, offs_r, offs_m, C, num_tokens)


@triton.jit
def gradient_of_y(
    d_out_ptr, stride_gc, stride_gl, w_v_ptr, gamma_ptr, offs_cv, offs_m, num_tokens,
    C: tl.constexpr, C_V: tl.constexpr, BLOCK_R: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """`dy = γ W_vᵀ dOut` for a tile of tokens: (BLOCK_CV, BLOCK_M), in the dtype of dOut. d_out_ptr (C, num_tokens); w_v_ptr (C, C_V)."""
    d_y = tl.zeros((offs_m.shape[0], offs_cv.shape[0]), tl.float32)
    d_y = project_back(d_y, d_out_ptr, stride_gc, stride_gl, w_v_ptr, offs_cv, offs_m, num_tokens, C_V, C, BLOCK_R, INPUT_PRECISION)
    if gamma_ptr is not None:
        d_y *= tl.load(gamma_ptr).to(tl.float32)
    return tl.trans(d_y.to(d_out_ptr.dtype.element_ty))


@triton.jit
def attend_tile(
    logits, x, acc, m_i, l_i, offs_n, num_tokens,
    MASK_TOKENS: tl.constexpr, INPUT_PRECISION: tl.constexpr, SUM_ROUNDED: tl.constexpr = False, SUM_BY_PRODUCT: tl.constexpr = False,
):  # fmt: skip
    """One step of online softmax: base-2 logits (BLOCK_M, BLOCK_N) weigh one tile x (BLOCK_C, BLOCK_N) of values.

    acc (BLOCK_M, BLOCK_C) is the running weighted sum, m_i (BLOCK_M) the running maximum, l_i (BLOCK_M) the running sum of the weights,
    with SUM_ROUNDED as the product takes them, so that the mean of values that hardly differ lies among them. SUM_BY_PRODUCT: `row_sums`.
    """
    if MASK_TOKENS:
        logits = tl.where((offs_n < num_tokens)[None, :], logits, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(logits, 1))
    p = tl.exp2(logits - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    weights = p.to(x.dtype)
    acc = tl.dot(weights, tl.trans(x), acc * alpha[:, None], input_precision=INPUT_PRECISION)
    total = row_sums(weights, SUM_BY_PRODUCT) if SUM_ROUNDED else tl.sum(p, 1)
    return acc, m_new, l_i * alpha + total
