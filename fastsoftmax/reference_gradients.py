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

from .reference import _array, _Attention, _mix, _quiet

__all__ = ["attention_backward", "attention_backward_bound"]


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

    The derivation is in src_c/attention_backward.inc.h; to first order in u = 2^-24 (2^-53):

        p      p * e,  e = u * ((D + 6) dots + 5 others + 3 |lse| + 4)
        dz     p * s * (e + (Dv + 4) u),  s = sum(|grad_out v|) + sum(|grad_out out|)
        ds     |scale| * (that + |dz| * (3 u, or with softcap the error of 1 - tanh^2))

    where dots = |scale| sum(|q k|), others are the other terms of the score, and sums over n terms
    add one u for each addition on the longest way through blocks.
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
