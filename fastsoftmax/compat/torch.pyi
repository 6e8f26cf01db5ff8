from typing import Any, SupportsFloat

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

__all__ = [
    "cross_entropy",
    "gumbel_softmax",
    "log_softmax",
    "logsumexp",
    "scaled_dot_product_attention",
    "softmax",
    "softmin",
]

_Dim = int | tuple[int, ...] | None

def softmax(input: ArrayLike, dim: int, dtype: DTypeLike | None = None) -> Any: ...
def log_softmax(input: ArrayLike, dim: int, dtype: DTypeLike | None = None) -> Any: ...
def softmin(input: ArrayLike, dim: int, dtype: DTypeLike | None = None) -> Any: ...
def logsumexp(input: ArrayLike, dim: _Dim, keepdim: bool = False) -> Any: ...
def gumbel_softmax(
    logits: ArrayLike,
    tau: SupportsFloat = 1,
    hard: bool = False,
    eps: float = 1e-10,
    dim: int = -1,
    *,
    rng: np.random.Generator | int | None = None,
) -> Any: ...
def scaled_dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    attn_mask: ArrayLike | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: SupportsFloat | None = None,
    enable_gqa: bool = False,
) -> NDArray[Any]: ...
def cross_entropy(
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any: ...
