"""The oracles of the gradients against differences of the forward oracles, in longdouble."""

import numpy as np
import pytest
from common import F64, WIDE, Size, rng

from fastsoftmax import reference
from fastsoftmax import reference_gradients as gradients

STEP = 1e-6  # central differences are off by about STEP^2, and by the rounding / STEP


def slope(function, at, way):
    """The derivative of function at a point, in a direction."""
    return (function(at + STEP * way) - function(at - STEP * way)) / (2 * STEP)


ATTENTION = {
    "plain": {},
    "softcap": {"softcap": 1.5, "scale": -0.8},
    "hidden": {"is_causal": True, "window": (3, None), "q_offset": 2, "kv_lengths": [9, 4]},
    "all": {"softcap": 2.0, "alibi_slopes": [0.1, 0.2, -0.1, 0.3], "kv_lengths": [9, 0],
            "mask": rng("mask").random((4, 7, 9)) < 0.6},
}  # fmt: skip


@pytest.mark.parametrize("how", ATTENTION)
def test_attention_backward(how):
    r = rng("gradients", how)
    q, k, v = Size((2,), 4, 2, 7, 9, 5, 3).qkv(F64, scale=0.8)
    inputs = {
        "q": q,
        "k": k[:1],
        "v": v,
        "bias": r.normal(size=(2, 1, 1, 9)),
        "sinks": r.normal(size=4),
    }

    def attend(q, k, v, **options):
        return reference.attention(
            q, k, v, **options, **ATTENTION[how], return_lse=True, precise=WIDE
        )

    out, lse = (a.astype(F64) for a in attend(**inputs))
    grad = r.normal(size=out.shape)
    options = {"bias": inputs["bias"], "sinks": inputs["sinks"], **ATTENTION[how]}
    got = gradients.attention_backward(
        grad, q, k[:1], v, out, lse, return_dbias=True, return_dsinks=True, **options
    )
    for name, gradient in zip(inputs, got, strict=True):
        assert gradient.shape == inputs[name].shape
        way = r.normal(size=gradient.shape)
        want = slope(lambda x: np.sum(grad * attend(**{**inputs, name: x})[0]), inputs[name], way)  # noqa: B023
        np.testing.assert_allclose(np.sum(gradient * way), float(want), rtol=1e-6, atol=1e-8)


def test_attention_backward_bound_is_small_and_grows():
    """Far below the gradients, above 0, and larger for larger scores."""
    q, k, v = (a.astype(np.float32) for a in Size((), 2, 1, 9, 70, 8, 4).qkv(F64, scale=0.8))
    sizes = []
    for scale in (0.3, 3):
        out, lse = reference.attention(q, k, v, scale=scale, return_lse=True)
        arrays = np.ones_like(out, np.float32), q, k, v, out, lse
        got = gradients.attention_backward(*arrays, scale=scale)
        bounds = gradients.attention_backward_bound(*arrays, scale=scale)
        for gradient, bound in zip(got, bounds, strict=True):
            assert (bound > 0).all() and np.median(bound / abs(gradient)) < 1e-3
        sizes.append(bounds[0].mean())
    assert sizes[1] > 3 * sizes[0]
