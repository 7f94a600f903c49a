"""Products of two weights, which serve a map in the place of both: `W_o W_v`, and `W_kᵀ W_q` where a map is wide; and their gradients."""

import torch
import triton
import triton.language as tl

from .launch_config import LaunchConfig, block_channels, num_tiles, remembered
from .launching import Constants, launch
from .primitives import dot_over_channels, tile_offsets


@triton.jit
def weight_product_kernel(
    a_ptr, stride_ar, stride_ak,
    b_ptr, stride_bk, stride_bc,
    vector_ptr, addend_ptr, column_ptr, row_ptr,
    product_ptr, image_ptr,
    factor,
    ROWS: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of `factor · (A B + column rowᵀ)`, and beside the first of its rows `factor · (A vector + addend)`.

    a_ptr (ROWS, K); b_ptr (K, COLUMNS); vector_ptr (K) or None; addend_ptr (ROWS), with a vector, or None; column_ptr (ROWS) and row_ptr
    (COLUMNS), both or None; product_ptr (ROWS, COLUMNS); image_ptr (ROWS), or None without a vector. All but a and b are contiguous.
    """
    parts: tl.constexpr = (COLUMNS + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    offs_r = pid // parts * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = pid % parts * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_r, inside_c = offs_r < ROWS, offs_c < COLUMNS
    acc = dot_over_channels(
        a_ptr, stride_ak, stride_ar, offs_r, ROWS, b_ptr, stride_bk, stride_bc, offs_c, COLUMNS, K, BLOCK_K, INPUT_PRECISION
    )
    if column_ptr is not None:
        column = tl.load(column_ptr + offs_r, mask=inside_r, other=0.0).to(tl.float32)
        acc += column[:, None] * tl.load(row_ptr + offs_c, mask=inside_c, other=0.0).to(tl.float32)[None, :]
    product = (factor * acc).to(product_ptr.dtype.element_ty)
    tl.store(product_ptr + offs_r[:, None] * COLUMNS + offs_c[None, :], product, mask=inside_r[:, None] & inside_c[None, :])

    if vector_ptr is not None and pid % parts == 0:
        image = tl.zeros((BLOCK_R,), tl.float32)
        for start_k in tl.range(0, K, BLOCK_K, num_stages=1):
            offs_k = start_k + tl.arange(0, BLOCK_K)
            inside = inside_r[:, None] & (offs_k < K)[None, :]
            a = tl.load(a_ptr + tile_offsets(offs_r, offs_k, stride_ar, stride_ak), mask=inside, other=0.0).to(tl.float32)
            image += tl.sum(a * tl.load(vector_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)[None, :], 1)
        if addend_ptr is not None:
            image += tl.load(addend_ptr + offs_r, mask=inside_r, other=0.0).to(tl.float32)
        tl.store(image_ptr + offs_r, (factor * image).to(image_ptr.dtype.element_ty), mask=inside_r)


@remembered
def _constants(rows: int, inner: int, columns: int, config: LaunchConfig) -> Constants:
    return dict(
        ROWS=rows, K=inner, COLUMNS=columns,
        BLOCK_R=min(config.block_m, block_channels(rows)), BLOCK_C=min(config.block_n, block_channels(columns)),
        BLOCK_K=min(config.block_k, block_channels(inner)),
        INPUT_PRECISION=config.input_precision, **config.options,
    )  # fmt: skip


def weight_product(
    a: torch.Tensor,
    b: torch.Tensor,
    vector: torch.Tensor | None = None,
    addend: torch.Tensor | None = None,
    outer: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    factor: float = 1.0,
    config: LaunchConfig,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`factor · (A B + column rowᵀ)` (R, C), and `factor · (A vector + addend)` (R) or None without a vector, both summed in fp32.

    a (R, K) and b (K, C) with any strides; vector (K), addend (R), and outer, a column (R) and a row (C), all contiguous, where there are.
    """
    (rows, inner), columns = a.shape, b.shape[1]
    product, image = a.new_empty((rows, columns)), None if vector is None else a.new_empty(rows)
    constants = _constants(rows, inner, columns, config)
    launch(
        weight_product_kernel, num_tiles(rows, constants["BLOCK_R"]) * num_tiles(columns, constants["BLOCK_C"]),
        constants,
        a, *a.stride(),
        b, *b.stride(),
        vector, addend, *((None, None) if outer is None else outer),
        product, image,
        factor,
    )  # fmt: skip
    return product, image
