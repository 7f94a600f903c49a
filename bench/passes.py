"""The launches of whole passes, caught on meta tensors, for any device, none of which need be at hand."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

from visattn import folded_values, kernels, triton_backend, wide_triton_backend
from visattn.folding import Weights

from .ahead_of_time import Device
from .launches import Launch, caught_launches


def layer_launches(
    device: Device,
    dtype: torch.dtype,
    channels: int,
    tokens: int = 1024,
    *,
    qk_channels: int | None = None,
    highest: bool = True,
    channels_last: bool = False,
    maps: int = 128,
) -> list[Launch]:
    """Every launch of one forward and backward pass of the layer, with biases, γ and residual, on maps of `tokens` pixels.

    So many maps that none has its keys split among programs, unless `maps` is small. Queries and keys are as wide as the map, or of
    `qk_channels`; the form of the kernels is the one that the layer would take.
    """

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    width, format_ = qk_channels or channels, torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty((maps, channels, tokens, 1), dtype=dtype, device="meta", memory_format=format_)
    weights = Weights(
        empty(width, channels), empty(width), empty(width, channels), empty(width), empty(channels, channels), empty(channels), empty(1)
    )
    with caught_launches() as launches, _on(device.kernel_target(highest)):
        _, y, lse = triton_backend.forward(x, weights, 0.125, residual=True, save=True)
        assert y is not None
        triton_backend.backward(x, torch.empty_like(x), weights, y, lse, 0.125, residual=True, need_x=True, need_weights=True)
    return launches


@contextlib.contextmanager
def _on(target: kernels.Target) -> Iterator[None]:
    """Within the block the backend takes every device for one of that target."""
    with (
        mock.patch.object(triton_backend, "kernel_target", return_value=target),
        mock.patch.object(wide_triton_backend, "kernel_target", return_value=target),
        mock.patch.object(folded_values, "kernel_target", return_value=target),
    ):
        yield


def folded_value_launches(device: Device, dtype: torch.dtype, channels: int, value_channels: int, *, highest: bool = True) -> list[Launch]:
    """Every launch that the weights of the values cost, both ways, where one head's output is projected and all has biases."""

    def parameter(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

    weights = parameter(channels, value_channels), parameter(value_channels, channels), parameter(value_channels), parameter(channels)
    with caught_launches() as launches, _on(device.kernel_target(highest)):
        results = folded_values.FoldedValues.apply(*weights)
        torch.autograd.grad(results, weights, [torch.empty_like(result) for result in results])
    return launches


def token_launches(
    device: Device,
    dtype: torch.dtype,
    qk_channels: int,
    value_channels: int,
    queries: int = 1024,
    keys: int = 1024,
    *,
    highest: bool = True,
    channels_last: bool = False,
) -> list[Launch]:
    """Every launch of one forward and backward pass of attention on tokens, with heads of these widths.

    In channels_last all tensors are as a single head has them whose map lies so in memory.
    """

    def tokens(channels: int, length: int) -> torch.Tensor:
        empty = torch.empty((2, length, channels), dtype=dtype, device="meta")
        return empty.transpose(1, 2) if channels_last else kernels.empty_aligned(empty, (2, channels, length))

    configs = kernels.token_configs(qk_channels, value_channels, dtype, device.kernel_target(highest))
    q, d_q = (tokens(qk_channels, queries) for _ in range(2))
    k, d_k = (tokens(qk_channels, keys) for _ in range(2))
    v, d_v = (tokens(value_channels, keys) for _ in range(2))
    y, d_y = (tokens(value_channels, queries) for _ in range(2))
    c = torch.empty(2, value_channels, dtype=dtype, device="meta")
    lse = torch.empty(2, queries, dtype=torch.float32, device="meta")
    with caught_launches() as launches:
        kernels.token_attention_forward(q, k, v, c, y, lse, config=configs.forward)
        kernels.token_attention_backward(q, k, v, c, d_y, y, lse, d_q, d_k, d_v, scale=0.125, configs=configs)
    return launches


def projection_launches(
    device: Device,
    dtype: torch.dtype,
    channels: int,
    qk_channels: int,
    value_channels: int,
    tokens: int = 1024,
    *,
    highest: bool = True,
    channels_last: bool = False,
) -> list[Launch]:
    """What attention on tokens launches before and after itself, on a map of `tokens` pixels: projections, and their gradients.

    The output is projected by a kernel up to `kernels.FUSED_CHANNELS`.
    """

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    maps = (empty(2, tokens, channels).mT if channels_last else empty(2, channels, tokens) for _ in range(2))
    x, d_x = (kernels.writable(m) for m in maps)
    w_q, w_k, w_v = (empty(width, channels) for width in (qk_channels, qk_channels, value_channels))
    d_q, d_k, d_v = (kernels.empty_aligned(x, (2, width, tokens)) for width in (qk_channels, qk_channels, value_channels))
    target = device.kernel_target(highest)
    configs, of_weights = kernels.projection_configs(channels, dtype, target), kernels.weight_gradients_config(target)
    b_q, centre, y_total = empty(qk_channels), torch.empty(2, channels, device="meta"), torch.empty(value_channels, device="meta")
    with caught_launches() as launches:
        keys, values = kernels.Projection(w_k), kernels.Projection(w_v)
        kernels.qkv_projection(x, kernels.Projection(w_q, b_q, 0.125), keys, values, centre=centre, config=configs.qkv_projection)
        kernels.qkv_projection_backward(d_q, d_k, d_v, w_q, w_k, w_v, d_x, config=configs.backward)
        if max(channels, value_channels) <= kernels.FUSED_CHANNELS:
            of_output = kernels.projection_configs(value_channels, dtype, target)
            w_o, b_v, b_o, gamma = empty(channels, value_channels), empty(value_channels), empty(channels), empty(1)
            kernels.output_projection(d_v, w_o, b_v, b_o, gamma, x, d_x, residual=True, factor=0.5, config=of_output.qkv_projection)
            kernels.output_projection_backward(x, w_o, gamma, config=of_output.backward)
            sums = kernels.partial_moments(x, d_v, need_arrived=True, config=of_output.token_moments)
            kernels.output_gradients(sums, w_o, b_v, b_o, gamma, config=of_weights)
        sums = kernels.partial_moments(d_q, x, (d_k, x), need_right=True, config=configs.token_moments)
        value_sums = kernels.partial_moments(d_v, x, config=configs.token_moments)
        kernels.projection_gradients(
            sums, value_sums, w_q, b_q, w_k, None, w_v, None, None, y_total, num_tokens=tokens, scale=1.0, config=of_weights
        )
    return launches


def pooling_launches(
    dtype: torch.dtype, height: int, width: int, pool: int, qk_channels: int = 8, value_channels: int = 32
) -> list[Launch]:
    """What takes the maxima of keys and values of such maps, and hands their gradients back; the same on every device."""

    def rows(channels: int, length: int) -> torch.Tensor:
        return kernels.empty_aligned(torch.empty(0, dtype=dtype, device="meta"), (2, channels, length))

    k, v = (rows(channels, height * width) for channels in (qk_channels, value_channels))
    with caught_launches() as launches:
        *pooled, _ = kernels.max_pool(k, v, torch.empty(2, value_channels, device="meta"), height, width, pool)
        kernels.max_pool_backward(k, v, *pooled, height, width, pool)
    return launches


def normalized_launches(
    device: Device, dtype: torch.dtype, channels: int, tokens: int = 1024, *, highest: bool = True, channels_last: bool = False
) -> list[Launch]:
    """What a normalised map of `tokens` pixels launches that is not launched for others: statistics, and kernels that normalise.

    Which of the two that normalise a block takes is left open here.
    """

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    maps = (empty(128, tokens, channels).mT if channels_last else empty(128, channels, tokens) for _ in range(3))
    x, y, out = (kernels.writable(m) for m in maps)
    lse = torch.empty(128, tokens, device="meta")
    weight, vector, target = empty(channels, channels), empty(channels), device.kernel_target(highest)
    with caught_launches() as launches:
        norm = kernels.group_statistics(x, vector, vector, channels // 2, 1e-6)
        projection, config = kernels.Projection(weight), kernels.projection_configs(channels, dtype, target)
        kernels.qkv_projection(x, projection, projection, projection, norm, norm[:, -1], config=config.qkv_projection)
        if kernels.attends_normalized(channels, dtype, target):
            forward = kernels.forward_config(channels, dtype, target, True)
            kernels.attention_forward(
                x, weight, vector, weight, weight, vector, vector[:1], out, y, lse, norm, scale=0.125, residual=True, config=forward
            )
            kernels.split_attention_forward(
                x, weight, vector, weight, y, lse, norm, scale=0.125, splits=2, keys_per_split=tokens // 128 * 64, config=forward
            )
    return launches
