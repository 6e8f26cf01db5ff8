from typing import Any, Literal, Self, SupportsFloat, SupportsIndex, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

_Out = TypeVar("_Out", bound=NDArray[Any])
_Axis = int | tuple[int, ...] | None
_Window = tuple[int | None, int | None] | list[int | None]

# Without `out` the result is an array, or a NumPy scalar if x is 0-d.

@overload
def softmax(
    x: ArrayLike,
    /,
    axis: _Axis = -1,
    *,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    temperature: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    out: None = None,
) -> Any: ...
@overload
def softmax(
    x: ArrayLike,
    /,
    axis: _Axis = -1,
    *,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    temperature: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    out: _Out,
) -> _Out: ...
@overload
def log_softmax(
    x: ArrayLike,
    /,
    axis: _Axis = -1,
    *,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    temperature: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    out: None = None,
) -> Any: ...
@overload
def log_softmax(
    x: ArrayLike,
    /,
    axis: _Axis = -1,
    *,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    temperature: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    out: _Out,
) -> _Out: ...
@overload
def softmin(
    x: ArrayLike,
    /,
    axis: _Axis = -1,
    *,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    temperature: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    out: None = None,
) -> Any: ...
@overload
def softmin(
    x: ArrayLike,
    /,
    axis: _Axis = -1,
    *,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    temperature: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    out: _Out,
) -> _Out: ...
@overload
def logsumexp(
    x: ArrayLike,
    /,
    axis: _Axis = None,
    *,
    b: ArrayLike | None = None,
    where: ArrayLike | None = None,
    keepdims: bool = False,
    dtype: DTypeLike | None = None,
    out: None = None,
    return_sign: Literal[False] = False,
) -> Any: ...
@overload
def logsumexp(
    x: ArrayLike,
    /,
    axis: _Axis = None,
    *,
    b: ArrayLike | None = None,
    where: ArrayLike | None = None,
    keepdims: bool = False,
    dtype: DTypeLike | None = None,
    out: _Out,
    return_sign: Literal[False] = False,
) -> _Out: ...
@overload
def logsumexp(
    x: ArrayLike,
    /,
    axis: _Axis = None,
    *,
    b: ArrayLike | None = None,
    where: ArrayLike | None = None,
    keepdims: bool = False,
    dtype: DTypeLike | None = None,
    out: NDArray[Any] | None = None,
    return_sign: Literal[True],
) -> tuple[Any, Any]: ...
@overload
def softmax_backward(
    grad: ArrayLike,
    y: ArrayLike,
    /,
    axis: _Axis = -1,
    *,
    temperature: ArrayLike | None = None,
    out: None = None,
) -> Any: ...
@overload
def softmax_backward(
    grad: ArrayLike,
    y: ArrayLike,
    /,
    axis: _Axis = -1,
    *,
    temperature: ArrayLike | None = None,
    out: _Out,
) -> _Out: ...
@overload
def log_softmax_backward(
    grad: ArrayLike,
    y: ArrayLike,
    /,
    axis: _Axis = -1,
    *,
    temperature: ArrayLike | None = None,
    out: None = None,
) -> Any: ...
@overload
def log_softmax_backward(
    grad: ArrayLike,
    y: ArrayLike,
    /,
    axis: _Axis = -1,
    *,
    temperature: ArrayLike | None = None,
    out: _Out,
) -> _Out: ...
def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    /,
    axis: SupportsIndex = -1,
    *,
    weight: ArrayLike | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    ignore_index: SupportsIndex = -100,
    label_smoothing: float = 0.0,
) -> Any: ...
def cross_entropy_backward(
    grad: ArrayLike,
    logits: ArrayLike,
    labels: ArrayLike,
    /,
    axis: SupportsIndex = -1,
    *,
    weight: ArrayLike | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    ignore_index: SupportsIndex = -100,
    label_smoothing: float = 0.0,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]: ...
@overload
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    /,
    *,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    is_causal: bool = False,
    q_offset: ArrayLike = 0,
    kv_lengths: ArrayLike | None = None,
    window: _Window | None = None,
    scale: SupportsFloat | None = None,
    softcap: SupportsFloat | None = None,
    sinks: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    out: None = None,
    return_lse: Literal[False] = False,
    return_weights: Literal[False] = False,
) -> NDArray[Any]: ...
@overload
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    /,
    *,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    is_causal: bool = False,
    q_offset: ArrayLike = 0,
    kv_lengths: ArrayLike | None = None,
    window: _Window | None = None,
    scale: SupportsFloat | None = None,
    softcap: SupportsFloat | None = None,
    sinks: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    out: _Out,
    return_lse: Literal[False] = False,
    return_weights: Literal[False] = False,
) -> _Out: ...
@overload
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    /,
    *,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    is_causal: bool = False,
    q_offset: ArrayLike = 0,
    kv_lengths: ArrayLike | None = None,
    window: _Window | None = None,
    scale: SupportsFloat | None = None,
    softcap: SupportsFloat | None = None,
    sinks: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
    return_lse: Literal[True],
    return_weights: Literal[False] = False,
) -> tuple[NDArray[Any], NDArray[Any]]: ...
@overload
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    /,
    *,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    is_causal: bool = False,
    q_offset: ArrayLike = 0,
    kv_lengths: ArrayLike | None = None,
    window: _Window | None = None,
    scale: SupportsFloat | None = None,
    softcap: SupportsFloat | None = None,
    sinks: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
    return_lse: Literal[False] = False,
    return_weights: Literal[True],
) -> tuple[NDArray[Any], NDArray[Any]]: ...
@overload
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    /,
    *,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    is_causal: bool = False,
    q_offset: ArrayLike = 0,
    kv_lengths: ArrayLike | None = None,
    window: _Window | None = None,
    scale: SupportsFloat | None = None,
    softcap: SupportsFloat | None = None,
    sinks: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
    return_lse: Literal[True],
    return_weights: Literal[True],
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]: ...
def attention_backward(
    grad_out: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    /,
    *,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    is_causal: bool = False,
    q_offset: ArrayLike = 0,
    kv_lengths: ArrayLike | None = None,
    window: _Window | None = None,
    scale: SupportsFloat | None = None,
    softcap: SupportsFloat | None = None,
    sinks: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    return_dbias: bool = False,
    return_dsinks: bool = False,
) -> tuple[NDArray[Any], ...]: ...
@overload
def attention_varlen(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    /,
    *,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    is_causal: bool = False,
    q_offset: ArrayLike = 0,
    kv_lengths: ArrayLike | None = None,
    window: _Window | None = None,
    scale: SupportsFloat | None = None,
    softcap: SupportsFloat | None = None,
    sinks: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    out: None = None,
    return_lse: Literal[False] = False,
) -> NDArray[Any]: ...
@overload
def attention_varlen(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    /,
    *,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    is_causal: bool = False,
    q_offset: ArrayLike = 0,
    kv_lengths: ArrayLike | None = None,
    window: _Window | None = None,
    scale: SupportsFloat | None = None,
    softcap: SupportsFloat | None = None,
    sinks: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    out: _Out,
    return_lse: Literal[False] = False,
) -> _Out: ...
@overload
def attention_varlen(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    /,
    *,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    is_causal: bool = False,
    q_offset: ArrayLike = 0,
    kv_lengths: ArrayLike | None = None,
    window: _Window | None = None,
    scale: SupportsFloat | None = None,
    softcap: SupportsFloat | None = None,
    sinks: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
    return_lse: Literal[True],
) -> tuple[NDArray[Any], NDArray[Any]]: ...
def merge_attention(
    out_a: ArrayLike,
    lse_a: ArrayLike,
    out_b: ArrayLike,
    lse_b: ArrayLike,
    /,
) -> tuple[NDArray[Any], NDArray[Any]]: ...
def set_num_threads(n: int, /) -> None: ...
def get_num_threads() -> int: ...

class num_threads:
    def __init__(self, n: int, /) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...

def isa() -> str: ...
def available_isas() -> tuple[str, ...]: ...
@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, Any]: ...
def get_include() -> str: ...

# fastsoftmax.ufuncs
_softmax_ufunc: np.ufunc
_log_softmax_ufunc: np.ufunc
_logsumexp_ufunc: np.ufunc

def _register_bfloat16(dtype: np.dtype[Any]) -> None: ...

# Private: for the tests and the self-test.
class _use_isa:
    def __init__(self, name: str) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...

def _multiply_add(count: int, name: str) -> float: ...
def _exp32(x: NDArray[np.float32], name: str) -> NDArray[np.float32]: ...
def _exp64(x: NDArray[np.float64], name: str) -> NDArray[np.float64]: ...
