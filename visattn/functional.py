"""The layer as a function: validate, select a backend, run."""

import torch
from torch import Tensor

from . import autograd, block, channel, dispatch, map_attention, projected_output, projected_tokens, query_normalized, validation
from .device import autocast_is_enabled, without_autocast
from .folded_values import folded_values
from .folding import Weights
from .normalization import GroupNorm, normalized


def self_attention_2d(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_q: Tensor | None = None,
    b_k: Tensor | None = None,
    b_v: Tensor | None = None,
    *,
    w_o: Tensor | None = None,
    b_o: Tensor | None = None,
    gamma: Tensor | None = None,
    scale: float | None = None,
    num_heads: int = 1,
    norm: GroupNorm | None = None,
    pool: int = 1,
    residual: bool = True,
    res_scale: float = 1.0,
    normalize: str = "keys",
    backend: str | None = None,
) -> Tensor:
    """`res_scale · (x + γ (W_o softmax(scale · q kᵀ) v + b_o))` over the H·W pixels of a feature map.

    With h = norm(x), `q = W_q h + b_q`, `k = pool(W_k h + b_k)` and `v = pool(W_v h + b_v)`. By default h is x, nothing is pooled,
    there is one head and no output projection: `x + softmax(q kᵀ / √E) v`.

    Source of the formula: `X + softmax(X W_Q (X W_K)ᵀ / √C) X W_V` (Vaswani et al. 2017, on feature maps Zhang et al. 2018);
    γ as there, pooled keys and values as in non-local networks (Wang et al. 2018), norm as in diffusion models (Ho et al. 2020).
    Memory is linear in H·W, forward, backward and for second derivatives.

    Args:
        x: the map (N, C, H, W), any strides; float16, bfloat16, float32 or float64. N may be 0.
        w_q, w_k: (E, C) or (E, C, 1, 1), for any E of at least 1.
        w_v: (V, C) or (V, C, 1, 1); V is C without w_o.
        b_q, b_k, b_v: (E), (E), (V) or None. b_k never changes the result: softmax drops it. With `normalize="queries"` it is b_q
            that never does.
        w_o: the output projection (C, V) or (C, V, 1, 1), or None; b_o: its bias (C) or None.
        gamma: one element that multiplies the branch, or None.
        scale: factor of the logits; None means 1/√(E / num_heads).
        num_heads: attentions side by side, each on E / num_heads and V / num_heads channels that lie next to each other.
        norm: what x goes through before it is projected; x itself is what is added.
        pool: side of the windows, side by side, whose maxima serve as keys and values; 1 pools nothing. Rows and columns of
            pixels that fill no window are left out, as by `torch.nn.MaxPool2d(pool)`.
        residual: whether x is added.
        res_scale: factor of the whole result.
        normalize: "keys", the formula: the weights of each query sum to one over the keys. "queries": the weights of each key sum
            to one over the queries, as in one of the published answers to the assignment; there is no kernel for it, and it goes
            with one head and without norm, pool and w_o only.
        backend: "auto", "triton" or "torch"; None asks `use_backend`, then VISATTN_BACKEND, then means "auto".

    Returns:
        (N, C, H, W) in x's dtype, channels_last if x is, contiguous otherwise. Under autocast the branch is computed in
        the autocast dtype and the sum has the wider dtype of x and branch, as with PyTorch's own operators.

    Raises:
        TypeError, ValueError: the arguments do not fit together; nothing has been computed.
        RuntimeError: an explicitly named backend cannot run; the message holds every reason.
        NotImplementedError: `torch.vmap` or forward-mode derivatives are asked for.
    """
    if w_o is not None or b_o is not None or num_heads != 1 or norm is not None or pool != 1 or res_scale != 1.0:
        weights = block.Weights(w_q, w_k, w_v, b_q, b_k, b_v, w_o, b_o, gamma)
        return _block(x, weights, scale, num_heads, norm, pool, residual, res_scale, normalize, backend)
    validation.check_self_attention_2d(x, w_q, w_k, w_v, b_q, b_k, b_v, gamma, scale, residual, normalize)
    if autocast_is_enabled(x):
        return _under_autocast(x, (w_q, w_k, w_v, b_q, b_k, b_v), gamma, scale, residual, normalize, backend)
    qk_channels = w_q.shape[0]
    selected = dispatch.select_backend(x, qk_channels, backend, normalize)
    settings = autograd.Settings(qk_channels**-0.5 if scale is None else float(scale), residual, normalize, selected)
    return _run(settings, x, Weights(w_q, b_q, w_k, b_k, w_v, b_v, gamma))


def _under_autocast(
    x: Tensor,
    projections: tuple[Tensor | None, ...],
    gamma: Tensor | None,
    scale: float | None,
    residual: bool,
    normalize: str,
    backend: str | None,
) -> Tensor:
    """The branch in the autocast dtype, with autocast off; it must not round the map that is only passed through."""
    dtype = compute_dtype(x)
    narrow_x, narrow_gamma, *narrow = [None if t is None else t.to(dtype) for t in (x, gamma, *projections)]
    add_afterwards = residual and dtype != x.dtype
    with without_autocast(x):
        out = self_attention_2d(
            narrow_x, *narrow, gamma=narrow_gamma,  # type: ignore[arg-type]
            scale=scale, residual=residual and not add_afterwards, normalize=normalize, backend=backend,
        )  # fmt: skip
    return x + out if add_afterwards else out


def _run(settings: autograd.Settings, x: Tensor, weights: Weights) -> Tensor:
    """Runs eagerly, with or without a graph, or as an op where a call is recorded rather than made."""
    if settings.normalize == "queries":  # the transposed matrix is normalised by rows
        weights = weights._replace(w_q=weights.w_k, b_q=weights.b_k, w_k=weights.w_q, b_k=weights.b_q)
    needs_graph = torch.is_grad_enabled() and (x.requires_grad or any(w is not None and w.requires_grad for w in weights))
    _check_transforms(x, *weights)
    if autograd.is_recorded(settings.backend, x, *weights):
        from . import ops

        trained_later = torch.jit.is_tracing() or torch.compiler.is_exporting()
        return ops.self_attention_2d(x, *weights, *settings, needs_graph or trained_later)[0]
    if needs_graph:
        return autograd.differentiable(x, weights, settings)
    return autograd.compute_forward(x, weights, settings, save=False)[0]


def _run_on_normalized(settings: autograd.Settings, x: Tensor, norm: GroupNorm | None, weights: Weights) -> Tensor:
    """The same for a map that may be normalised before; what is added is the map itself."""
    if norm is None:
        return _run(settings, x, weights)
    if autograd.is_looked_at(settings.backend, x, *weights):
        out = _run(settings._replace(residual=False), normalized(x, norm), weights)
        return x + out if settings.residual else out
    return map_attention.attend(x, norm.to(x.dtype), map_attention.AttentionOnMap(settings), weights)


def _block(
    x: Tensor,
    weights: block.Weights,
    scale: float | None,
    num_heads: int,
    norm: GroupNorm | None,
    pool: int,
    residual: bool,
    res_scale: float,
    normalize: str,
    backend: str | None,
) -> Tensor:
    """The block around the plain layer, or around attention on tokens."""
    w_q, w_k, w_v, b_q, b_k, b_v, w_o, b_o, gamma = weights
    validation.check_self_attention_2d(x, w_q, w_k, w_v, b_q, b_k, b_v, gamma, scale, residual, normalize, w_o is not None)
    validation.check_block(x, w_q, w_v, w_o, b_o, num_heads, norm, pool, res_scale, normalize)
    res_scale = float(res_scale)
    norm = None if norm is None else norm._replace(eps=float(norm.eps))
    _check_transforms(x, *weights, *(() if norm is None else (norm.weight, norm.bias)))
    dtype = compute_dtype(x)
    with without_autocast(x):
        narrow_x, weights = x.to(dtype), weights.map(lambda w: w.to(dtype))
        form, selected = _form_and_backend(narrow_x, weights, num_heads, pool, normalize, backend)
        factor = (w_q.shape[0] // num_heads) ** -0.5 if scale is None else float(scale)
        if norm is not None and dtype != x.dtype:
            narrow_x, norm = normalized(x, norm).to(dtype), None  # it is the normalised map that is rounded
        if form == "folded":
            w_q, w_k, _, b_q, b_k, _, _, _, gamma = weights
            w_v, b_v = folded_values(weights, selected)
            added_inside = residual and dtype == x.dtype and res_scale == 1.0
            settings = autograd.Settings(factor, added_inside, normalize, selected)
            out = _run_on_normalized(settings, narrow_x, norm, Weights(w_q, b_q, w_k, b_k, w_v, b_v, gamma))
            residual = residual and not added_inside
        else:
            y = projected_tokens.attend(narrow_x, norm, weights, num_heads, pool, factor, selected)
            return projected_output.joined(x, y, weights, num_heads, residual, res_scale, selected)
        return block.joined(x, out, residual, res_scale)


def _form_and_backend(h: Tensor, weights: block.Weights, num_heads: int, pool: int, normalize: str, backend: str | None) -> tuple[str, str]:
    """The form that the block takes on the map h, and the backend; each has a say in the other."""
    qk_channels, values = weights.w_q.shape[0], weights.w_v.shape[0]
    shape = (h, qk_channels, None if weights.w_o is None else values, num_heads, pool)
    form = block.form_of(*shape, "triton").name
    if form == "folded":
        selected = dispatch.select_backend(h, qk_channels, backend, normalize)
    else:
        selected = dispatch.select_backend(h, qk_channels // num_heads, backend, "tokens", values // num_heads)
    return form if selected == "triton" else block.form_of(*shape).name, selected


def channel_attention(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_q: Tensor | None = None,
    b_k: Tensor | None = None,
    b_v: Tensor | None = None,
    *,
    scale: float | None = None,
    residual: bool = True,
) -> Tensor:
    """`x + softmax(scale · q kᵀ) v` with q, k, v (N, C, H·W): attention between the channels, softmax over the last axis.

    Source: one of the published answers to the assignment, which leaves out a transposition, so that q kᵀ is C×C. It costs two
    large matrix products, and memory linear in the number of pixels. Gradients of any order are right.

    Args:
        x: the map (N, C, H, W), any strides; float16, bfloat16, float32 or float64. N may be 0.
        w_q, w_k, w_v: (C, C) or (C, C, 1, 1); b_q, b_k, b_v: (C) or None.
        scale: factor of the logits, which are sums over all pixels; None means 1/√C.
        residual: whether x is added.

    Returns:
        (N, C, H, W), in the dtype and memory format of `self_attention_2d`, under autocast too.

    Raises:
        TypeError, ValueError: the arguments do not fit together; nothing has been computed.
        RuntimeError: `use_backend` or VISATTN_BACKEND asks for "triton"; there is no kernel.
        NotImplementedError: `torch.vmap` or forward-mode derivatives are asked for.
    """
    validation.check_channel_attention(x, w_q, w_k, w_v, b_q, b_k, b_v, scale, residual)
    _check_transforms(x, w_q, w_k, w_v, b_q, b_k, b_v)
    channels = x.shape[1]
    dispatch.select_backend(x, channels, None, "channels")

    dtype = compute_dtype(x)
    add_afterwards = residual and dtype != x.dtype
    operands = [None if t is None else t.to(dtype) for t in (x, w_q.flatten(1), w_k.flatten(1), w_v.flatten(1), b_q, b_k, b_v)]
    factor = channels**-0.5 if scale is None else float(scale)
    with without_autocast(x):
        out = channel.forward(*operands, factor, residual and not add_afterwards)  # type: ignore[arg-type, call-arg]
    return x + out if add_afterwards else out


def attention_rows(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    pixels: Tensor,
    b_q: Tensor | None = None,
    b_k: Tensor | None = None,
    *,
    scale: float | None = None,
    num_heads: int = 1,
    norm: GroupNorm | None = None,
    pool: int = 1,
    normalize: str = "keys",
) -> Tensor:
    """The attention maps of chosen pixels: row `softmax(scale · q_i kᵀ)` of the attention matrix for each of them.

    Args:
        x: the map (N, C, H, W).
        w_q, w_k: (E, C) or (E, C, 1, 1); b_q, b_k: (E) or None. The bias that softmax drops does not change the rows: b_k, or
            b_q with `normalize="queries"`.
        pixels: integer (P, 2), pairs (row, column) of x, whether or not keys are pooled.
        scale: factor of the logits; None means 1/√(E / num_heads).
        num_heads, norm, pool, normalize: as in `self_attention_2d`.

    Returns:
        (N, P, H, W) in x's dtype, or (N, P, H // pool, W // pool), a weight for each pooled key; of several heads, their mean. Each
        map is non-negative. It sums to one over the keys that it shows, but not with `normalize="queries"`, where every key's
        weight depends on what all the other queries make of that key. Memory is as much, times the number of heads.

    Raises:
        TypeError, ValueError: the arguments do not fit together; nothing has been computed.
    """
    validation.check_queries_and_keys(x, w_q, w_k, b_q, b_k, scale, normalize)
    validation.check_block(x, w_q, w_k, None, None, num_heads, norm, pool, 1.0, normalize)
    validation.check_pixels(pixels, x)
    factor = (w_q.shape[0] // num_heads) ** -0.5 if scale is None else scale
    pixels = pixels.long()  # narrower integers would overflow
    index = pixels[:, 0] * x.shape[3] + pixels[:, 1]
    wide = torch.promote_types(x.dtype, torch.float32)  # in 16 bits logits would be rounded to whole numbers, or infinite
    with without_autocast(x):
        h = normalized(x.to(wide), norm)
        w_q, w_k, b_q, b_k = (None if t is None else t.to(wide) for t in (w_q, w_k, b_q, b_k))  # type: ignore[assignment]
        return _rows(h, w_q, w_k, b_q, b_k, index, factor, num_heads, pool, normalize).to(x.dtype)


def _rows(
    h: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    b_q: Tensor | None,
    b_k: Tensor | None,
    index: Tensor,
    scale: float,
    num_heads: int,
    pool: int,
    normalize: str,
) -> Tensor:
    """The weights that the pixels `index` (P) of the map h (N, C, H, W) give to its keys, all of one dtype."""
    tokens = h.flatten(2)
    if normalize == "queries":
        return query_normalized.rows(tokens, w_q.flatten(1), w_k.flatten(1), b_k, index, scale).unflatten(2, h.shape[2:])
    if num_heads > 1 or pool > 1:
        return block.rows(h, w_q, w_k, b_q, index, scale, num_heads, pool)
    q = w_q.flatten(1) @ tokens[:, :, index]
    if b_q is not None:
        q = q + b_q[:, None]
    u = scale * (w_k.flatten(1).mT @ q)
    return torch.softmax(u.mT @ tokens, -1).unflatten(2, h.shape[2:])


def _check_transforms(*tensors: Tensor | None) -> None:
    if torch.compiler.is_compiling():
        validation.check_no_forward_mode()
    elif autograd.follows_values():
        validation.check_transforms(tensors)


def compute_dtype(x: Tensor) -> torch.dtype:
    """x's dtype, or the autocast dtype where autocast would convert x; it never converts float64."""
    if x.dtype != torch.float64 and autocast_is_enabled(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
