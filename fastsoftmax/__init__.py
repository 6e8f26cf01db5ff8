"""Softmax and attention for NumPy arrays on the CPU: fast, accurate, and reproducible to the bit.

A map of the house. The public names below come from ``_core``, the only Cython (parts of it are in
``_*.pxi``), which checks the arguments, makes a plan and calls the C library in ``src_c``;
all arithmetic is there, compiled once for each instruction set (ISA) and chosen when the package is
imported. ``ufuncs`` and ``compat`` have them as ufuncs and under the names of other libraries,
``dask`` and ``awkward`` over their arrays. ``reference`` has the same functions in a few lines of
NumPy each (``reference_gradients`` those for training): read it to know what a function means, use
it to test one. ``__main__`` is the command line (``fastsoftmax demo | info | selftest | bench |
apply``); ``bench`` and ``apply`` are behind the last of these.
"""

__version__ = "0.1.0.dev0"

try:
    from ._core import (
        attention,
        attention_backward,
        attention_varlen,
        available_isas,
        cross_entropy,
        cross_entropy_backward,
        get_include,
        get_num_threads,
        isa,
        log_softmax,
        log_softmax_backward,
        logsumexp,
        merge_attention,
        num_threads,
        set_num_threads,
        show_config,
        softmax,
        softmax_backward,
        softmin,
    )
except ModuleNotFoundError as error:
    if error.name != f"{__name__}._core":
        raise
    raise ImportError(
        f"the compiled core of fastsoftmax is missing from {__path__[0]}. If this is the source "
        "tree, build it with `python -m pip install -e .`; if you meant an installed fastsoftmax, "
        "start Python from another folder."
    ) from None

__all__ = [
    "__version__",
    "attention",
    "attention_backward",
    "attention_varlen",
    "available_isas",
    "cross_entropy",
    "cross_entropy_backward",
    "get_include",
    "get_num_threads",
    "isa",
    "log_softmax",
    "log_softmax_backward",
    "logsumexp",
    "merge_attention",
    "num_threads",
    "set_num_threads",
    "show_config",
    "softmax",
    "softmax_backward",
    "softmin",
]
