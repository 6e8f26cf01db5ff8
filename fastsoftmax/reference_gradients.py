# Copyright (c) the fastsoftmax developers. SPDX-License-Identifier: BSD-3-Clause
"""The oracle of the functions for training, as `reference` is that of the others.

>>> q, k, v = np.array([[1.0]]), np.array([[0.0], [np.log(3)]]), np.array([[1.0], [5.0]])
>>> dq, dk, dv = attention_backward([[1.0]], q, k, v, [[4.0]], [np.log(4)])
>>> dv  # the weights
array([[0.25],
       [0.75]])
>>> dk  # weights * (v - out) * q
array([[-0.75],
       [ 0.75]])
"""

import math

import numpy as np

from .reference import (
    _array,
    _Attention,
    _compute_type,
    _from_max,
    _log_of_sum,
    _mix,
    _quiet,
    _sum,
)

__all__ = [
    "attention_backward",
    "attention_backward_bound",
    "cross_entropy",
    "cross_entropy_backward",
]


@_quiet
def cross_entropy(
    logits, labels, /, axis=-1, *, weight=None, reduction="mean", ignore_index=-100,
    label_smoothing=0.0, precise=np.float64,
):  # fmt: skip
    """``logsumexp(logits) - logits[label]`` of each row, 0 if it is ignored; mean, sum or all.

    With label_smoothing s it is a share of 1 - s of the whole, and the mean of the same of every
    class, times its weight, the rest.

    >>> cross_entropy([[0.0, 0.0], [0.0, np.log(3)]], [0, 1], reduction="none").round(6)
    array([0.693147, 0.287682])
    """
    x, at, seen, w, each = _classes(logits, labels, axis, weight, ignore_index, precise)
    m, d, e = _from_max(x, (x.ndim - 1,))
    # The row's maximum is taken off first: a loss close to 0 must not be a difference of large ones
    log_sum = _log_of_sum(d, e, (x.ndim - 1,))
    at_label = np.take_along_axis(d, at, -1) if d.size else np.zeros(at.shape)
    losses = w * (log_sum - at_label)[..., 0]
    if label_smoothing:
        s, n = precise(label_smoothing), x.shape[-1]
        losses = (1 - s) * losses + s / n * (each * (log_sum - d)).sum(-1)
    losses = np.where(np.isfinite(m[..., 0]), losses, np.nan)
    losses = np.where(seen, losses, precise(0))
    if reduction == "none":
        return losses[()]
    total = w.sum() if reduction == "mean" else 1
    return losses.sum() / total if total else precise(np.nan)  # whatever smoothing adds


@_quiet
def cross_entropy_backward(
    grad, logits, labels, /, axis=-1, *, weight=None, reduction="mean", ignore_index=-100,
    label_smoothing=0.0, precise=np.float64,
):  # fmt: skip
    """``(softmax(logits) - onehot(label)) * grad`` of each row, 0 in rows that are ignored.

    >>> cross_entropy_backward(1.0, [[0.0, 0.0], [0.0, np.log(3)]], [0, 1], reduction="sum")
    array([[-0.5 ,  0.5 ],
           [ 0.25, -0.25]])
    """
    x, at, seen, w, each = _classes(logits, labels, axis, weight, ignore_index, precise)
    m, _, e = _from_max(x, (x.ndim - 1,))
    grads = np.broadcast_to(np.asarray(grad).astype(precise), seen.shape)
    grads = np.where(seen, grads / (w.sum() if reduction == "mean" else 1), 0)[..., None]
    hot = np.arange(x.shape[-1]) == at
    # 1 - p at the label is the sum of the others
    others, total = _sum(np.where(hot, 0, e), (x.ndim - 1,)), _sum(e, (x.ndim - 1,))
    dx = w[..., None] * np.where(hot, -others, e) / total
    if label_smoothing:
        s, n = precise(label_smoothing), x.shape[-1]
        dx = (1 - s) * dx + s / n * (each.sum() * e / total - each)
    dx = np.where(np.isfinite(m), dx, np.nan) * grads
    return np.moveaxis(np.where(seen[..., None], dx, precise(0)), -1, axis)


def _classes(logits, labels, axis, weight, ignore_index, precise):
    """Return logits, classes last; labels as a column; which rows count, and how much; weights."""
    x = _array(logits, "logits")
    x = np.moveaxis(x.astype(_compute_type(x.dtype)).astype(precise), axis, -1)
    labels = np.asarray(labels)
    if labels.shape != x.shape[:-1]:
        raise ValueError(f"shapes of logits and labels do not match: {x.shape} and {labels.shape}")
    seen = labels != ignore_index
    at = np.where(seen, labels, 0).astype(np.int64)
    w = np.ones(x.shape[-1]) if weight is None else np.asarray(weight).astype(np.float64)
    rows = np.where(seen, w[at], 0) if w.size else np.zeros(at.shape)
    return x, at[..., None], seen, rows.astype(precise), w.astype(precise)


@_quiet
def attention_backward(
    grad_out, q, k, v, out, lse, /, *, return_dbias=False, return_dsinks=False, **options
):
    """Gradients of attention for q, k and v [, bias][, sinks], from what the forward pass left.

    Each has the shape of its argument: what was broadcast, or shared by heads, is added up. A query
    and a key that do not see each other have no part in each other's gradients.
    """
    a, grad, out, lse = _given(grad_out, q, k, v, out, lse, options)
    p, _, delta, dz, ds = _score_gradients(a, grad, out, lse)
    turned = a.visible.swapaxes(-1, -2)
    results = [
        _folded(_mix(ds, a.visible, a.k), q),
        _folded(_mix(ds.swapaxes(-1, -2), turned, a.q), k),
        _folded(_mix(p.swapaxes(-1, -2), turned, grad), v),
    ]
    if return_dbias:
        results.append(_folded(dz, options["bias"], of_scores=True))
    if return_dsinks:
        sink = np.where(a.sinks == -np.inf, 0, np.exp(a.sinks - lse) * delta)
        results.append(-sink.sum((*range(sink.ndim - 3), -2, -1)))
    return tuple(results)


@_quiet
def attention_backward_bound(
    grad_out, q, k, v, out, lse, /, *, return_dbias=False, return_dsinks=False, **options
):
    """How far `attention_backward` may be off in the compute type: for each element of each result.

    The derivation is in src_c/attention_backward.inc.h; to first order in u = 2^-24 (2^-53)::

        p      p * e,  e = u * ((D + 6) dots + 5 others + 3 |lse| + 4)
        dz     p * s * (e + (Dv + 4) u),  s = sum(|grad_out v|) + sum(|grad_out out|)
        ds     |scale| * (that + |dz| * (3 u, or with softcap the error of 1 - tanh^2))

    where ``dots = |scale| sum(|q k|)``, others are the other terms of the score, and sums over n
    terms add one u for each addition on the longest way through blocks.
    """
    a, grad, out, lse = _given(grad_out, q, k, v, out, lse, options)
    u, depth, v_depth = a.unit, a.q.shape[-1], a.v.shape[-1]
    p, f, _, dz, ds = map(abs, _score_gradients(a, grad, out, lse))
    dots = abs(a.scale) * (abs(a.q) @ abs(a.k).swapaxes(-1, -2))
    others = sum(map(abs, a.terms if a.softcap else a.terms[1:]), np.zeros_like(dots))
    products = abs(grad) @ abs(a.v).swapaxes(-1, -2) + (abs(grad) * abs(out)).sum(-1, keepdims=True)
    of_p = p * u * ((depth + 6) * dots + 5 * others + 3 * abs(lse) + 4)
    of_dz = of_p * products + p * products * (v_depth + 4) * u
    of_f = u * ((10 + 2 * (depth + 4) * dots / a.softcap) if a.softcap else 3)
    of_ds = abs(a.scale) * (of_dz * f + dz * of_f)
    of_p, of_dz, of_ds = (np.where(a.visible, x, 0) for x in (of_p, of_dz, of_ds))

    def folded(errors, values, factors, like):
        """A sum over queries, in groups of 3 to 48, 4 groups to a unit, and then one by one."""
        rows = values[..., :1].size // max(1, math.prod(np.shape(like)[:-2]))
        steps = u * (60 + rows / 12 + rows / max(1, values.shape[-2]))
        turned = (errors + steps * values).swapaxes(-1, -2)
        return _folded(_mix(turned, a.visible.swapaxes(-1, -2), abs(factors)), like)

    steps = u * (80 + 2 * (a.k.shape[-2] / 64))  # additions in a block of 64 keys, then blocks
    results = [
        _folded(_mix(of_ds + steps * ds, a.visible, abs(a.k)), q),
        folded(of_ds, ds, a.q, k),
        folded(of_p, p, grad, v),
    ]
    if return_dbias:
        results.append(_folded(of_dz + u * dz, options["bias"], of_scores=True))
    if return_dsinks:
        off = 3 * (abs(a.sinks) + abs(lse)) + v_depth + 6
        size = (abs(grad) * abs(out)).sum(-1, keepdims=True)
        sink = np.where(a.sinks == -np.inf, 0, np.exp(a.sinks - lse) * size * u * off)
        results.append(sink.sum((*range(sink.ndim - 3), -2, -1)))
    return tuple(results)


def _given(grad_out, q, k, v, out, lse, options):
    """Return the arguments of attention; grad_out, out and lse as columns, with heads."""
    a = _Attention(q, k, v, **options)
    compute = np.float32 if a.unit == 2.0**-24 else np.float64

    def rows(x, name, columns):
        x = _array(x, name).astype(compute).astype(a.q.dtype)
        return x.reshape(*a.visible.shape[:-1], columns)

    grad, out = (rows(x, name, a.v.shape[-1]) for x, name in ((grad_out, "grad_out"), (out, "out")))
    return a, grad, out, rows(lse, "lse", 1)


def _score_gradients(a, grad, out, lse):
    """Return p, 1 - tanh^2, delta, and the gradients of the score and of the product of q and k."""
    seen = a.visible
    p = np.where(seen, np.exp(sum(a.terms) - lse), 0)
    delta = np.where(seen.any(-1, keepdims=True), (grad * out).sum(-1, keepdims=True), 0)
    dz = np.where(seen, p * (grad @ a.v.swapaxes(-1, -2) - delta), 0)
    f = 1 - (a.terms[0] / a.softcap) ** 2 if a.softcap else np.ones_like(p)
    return p, f, delta, dz, np.where(seen, dz * f * a.scale, 0)


def _folded(x, like, of_scores=False):
    """Add up what was shared or broadcast to make x, [..., H, rows, columns], of `like`."""
    shape = np.shape(like)
    if not of_scores:
        with_head = shape if len(shape) > 2 else (1, *shape)
        share = x.shape[-3] // with_head[-3]
        x = x.reshape(*x.shape[:-3], with_head[-3], share, *x.shape[-2:]).sum(-3)
    else:
        with_head = shape
    x = x.sum(tuple(range(x.ndim - len(with_head))))
    wide = tuple(i for i, n in enumerate(with_head) if n == 1 and x.shape[i] != 1)
    return x.sum(wide, keepdims=True).reshape(shape)
