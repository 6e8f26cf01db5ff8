from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

_Out = TypeVar("_Out", bound=NDArray[Any])
_Axis = int | tuple[int, ...] | None

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
def set_num_threads(n: int) -> None: ...
def get_num_threads() -> int: ...
def num_threads(n: int) -> AbstractContextManager[None]: ...
def isa() -> str: ...
def available_isas() -> tuple[str, ...]: ...
@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, Any]: ...

# Private: for the tests and the self-test.
def _use_isa(name: str) -> AbstractContextManager[None]: ...
def _exp32(x: NDArray[np.float32], isa_name: str) -> NDArray[np.float32]: ...
def _exp64(x: NDArray[np.float64], isa_name: str) -> NDArray[np.float64]: ...
