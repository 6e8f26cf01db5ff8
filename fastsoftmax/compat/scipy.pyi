from typing import Any, Literal, overload

from numpy.typing import ArrayLike

__all__ = ["log_softmax", "logsumexp", "softmax"]

_Axis = int | tuple[int, ...] | None

def softmax(x: ArrayLike, axis: _Axis = None) -> Any: ...
def log_softmax(x: ArrayLike, axis: _Axis = None) -> Any: ...
@overload
def logsumexp(
    a: ArrayLike,
    axis: _Axis = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: Literal[False] = False,
) -> Any: ...
@overload
def logsumexp(
    a: ArrayLike,
    axis: _Axis = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    *,
    return_sign: Literal[True],
) -> tuple[Any, Any]: ...
