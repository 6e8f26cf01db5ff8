"""Typical uses, for `mypy --strict` to check; the run of it is in test_typing.py."""

from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

import fastsoftmax as fs
import fastsoftmax.compat.torch as F
from fastsoftmax.compat import scipy

x = np.zeros((2, 3), np.float32)
out = np.empty_like(x)

assert_type(fs.softmax(x, out=out), np.ndarray[tuple[int, int], np.dtype[np.float32]])
y: NDArray[np.float32] = fs.softmax(x, axis=0, temperature=0.5, where=x >= 0, bias=[0, 1, 2])
fs.log_softmax([1, 2, 3], dtype=np.float32)
fs.softmin([[1.0, 2.0]], axis=(0, 1))
fs.softmax(1.0, axis=None)
total: float = fs.logsumexp([1.0, 2.0], keepdims=False)
value, sign = fs.logsumexp([1.0, 2.0], b=[1, -1], return_sign=True)
fs.softmax_backward(x, y, out=out)
fs.log_softmax_backward(x, y, axis=0, temperature=2)

q, k, v = np.zeros((3, 1, 2, 4, 8), np.float32)
assert_type(fs.attention(q, k, v, is_causal=True, window=(3, None)), NDArray[Any])
result, lse = fs.attention(q, k, v, q_offset=1, kv_lengths=[4], return_lse=True)
result, weights = fs.attention(q, k, v, scale=1, softcap=50.0, return_weights=True)
result, lse, weights = fs.attention(q, k, v, sinks=[0, 0], return_lse=True, return_weights=True)
result, lse = fs.merge_attention(result, lse, result, lse)

with fs.num_threads(1):
    threads: int = fs.get_num_threads()
fs.set_num_threads(threads)
isas: tuple[str, ...] = fs.available_isas()
fs.show_config()
config: dict[str, Any] = fs.show_config(mode="dicts")
names: list[str] = [fs.isa(), fs.__version__]

F.softmax(x, dim=-1)
F.gumbel_softmax(x, hard=True, rng=np.random.default_rng(0))
F.scaled_dot_product_attention(q, k, v, is_causal=True)
scipy.softmax(x)
scipy.logsumexp(x, b=x, return_sign=True)

# What must not pass: strict mode complains of an ignored error that is none.
fs.softmax(x, 0, None)  # type: ignore[call-overload]
fs.softmax(x=x)  # type: ignore[call-overload]
fs.attention(q, k)  # type: ignore[call-overload]
fs.attention(q, k, v, window=3)  # type: ignore[call-overload]
fs.num_threads("2")  # type: ignore[arg-type]
