"""How compiled code calls fastsoftmax: routing (Cython), plain (C), with_numba."""
