#!/usr/bin/env python3
# Copyright (c) the fastsoftmax developers. SPDX-License-Identifier: BSD-3-Clause
"""Derive the constants of exp and log in the kernels; check that a header has them.

What
    exp: p(r) = 1 + r + r^2 q(r), of the smallest relative error on |r| <= 0.34664, just beyond
    ln2/2: reduced arguments are rounded and may step over it. Degree 6 for float32, 11 for float64.

    exp2: p(r) = 1 + r q(r) = 2^r, of the smallest relative error on |r| <= 1/2. The same degrees.

    log: log f = 2 atanh(u) = 2 u + u^3 P(u^2) with u = (f - 1)/(f + 1), of the smallest relative
    error for f in [sqrt(1/2), sqrt(2)], |u| <= 0.1716, float64. Degree 6 in u^2.

    log2(e); and ln2 = LN2_HI + LN2_LO (Cody & Waite, *Software Manual for the Elementary
    Functions*, 1980): LN2_HI of so few bits that 1/64 of an integer times LN2_HI, and what it
    leaves of x, are exact.

How
    The best polynomial on a grid of Chebyshev points is a linear program, solved in 60 digits by
    exchange: Remez' algorithm, one point at a time (Stiefel 1959), which does not mind that the
    error is pinned to 0 at r = 0. The coefficients are then rounded to the type one after another,
    the lowest order first, those that are left being fitted again each time (Muller, *Elementary
    Functions*, 3rd ed., section 4.4). The error printed is that of the rounded polynomial, in
    exact arithmetic: the largest of a dense sample, each of its peaks refined by golden section.

Run (needs mpmath and NumPy; ten seconds)
    python src_c/derive_exp.py                                       prints the constants as C
    python src_c/derive_exp.py --check src_c/exp_constants.h   and looks for them there
"""

import argparse
import re
import sys
from pathlib import Path

import mpmath as mp
import numpy as np

mp.mp.dps = 60

EXP_LIMIT = mp.mpf("0.34664")  # > ln2/2 + 4.5e-5, the rounding of m log2(e) for |m| < 1024
LOG_LIMIT = mp.mpf("0.1716")  # > (sqrt(2) - 1)/(sqrt(2) + 1) = 0.171573


def rounded(x, bits, direction="n"):
    """x as a number of `bits` bits: the nearest ("n"), the one below ("f") or above ("c")."""
    return mp.fadd(x, 0, prec=bits, rounding=direction)


def minimax(columns, target):
    """c with the smallest max |sum(c[j] * columns[j]) - target| over the grid; and that maximum.

    The error of the best fit on len(c) + 1 points has one size h at all of them. While it is
    larger at some other point, that point enters and h grows; the one that leaves is chosen
    as in the dual simplex method, so that h never shrinks.
    """
    if not columns:
        return [], max(abs(target))
    rows = np.array(columns, dtype=object).T  # one row of values for each grid point
    n = rows.shape[1]
    used = list(np.linspace(0, len(rows) - 1, n + 1).round().astype(int))
    signs = mp.matrix([(-1) ** i for i in range(n + 1)])
    while True:
        # The error has the sign of w at each point, where sum(w[i] * rows[used[i]]) = 0.
        a = mp.matrix([list(rows[i]) for i in used]).T
        w = mp.lu_solve(a[:, :n], -a[:, n])
        w = [*w, mp.mpf(1)]
        signs = [mp.sign(v) for v in w]
        system = mp.matrix([[*rows[i], -s] for i, s in zip(used, signs, strict=True)])
        *c, h = mp.lu_solve(system, mp.matrix([target[i] for i in used]))
        if h < 0:
            w, signs, h = [-v for v in w], [-s for s in signs], -h
        error = rows @ np.array(c, dtype=object) - target
        new = int(np.argmax(np.abs(error)))
        if abs(error[new]) <= h * (1 + mp.mpf("1e-6")) or new in used:
            return c, abs(error[new])
        # rows[new] = sum(t[i] * rows[used[i]]) for a t made unique by sum(t[i] * signs[i]) = s.
        s = mp.sign(error[new])
        system = mp.matrix([[*rows[i], v] for i, v in zip(used, signs, strict=True)]).T
        t = mp.lu_solve(system, mp.matrix([*rows[new], s]))
        leaving = max(range(n + 1), key=lambda i: s * t[i] / w[i])
        used[leaving] = new


def derive(columns, target, bits):
    """The minimax coefficients, rounded one after another to where the rest can make up best."""
    coefficients = []
    while columns:
        first, *columns = columns
        exact = minimax([first, *columns], target)[0][0]
        c = min(
            (rounded(exact, bits, "f"), rounded(exact, bits, "c")),
            key=lambda c: minimax(columns, target - c * first)[1],
        )
        target = target - c * first
        coefficients.append(c)
    return coefficients


def chebyshev_points(low, high, n):
    middle, half = (low + high) / 2, (high - low) / 2
    return [middle + half * mp.cospi(mp.mpf(2 * i + 1) / (2 * n)) for i in range(n)]


def largest(error, low, high, n=4001):
    """The maximum of |error| on [low, high]."""
    x = [low + (high - low) * i / (n - 1) for i in range(n)]
    size = [abs(error(v)) for v in x]
    best = max(size)
    golden = (mp.sqrt(5) - 1) / 2
    for i in range(1, n - 1):
        if size[i] < best * 0.9 or size[i] < max(size[i - 1], size[i + 1]):
            continue
        a, b = x[i - 1], x[i + 1]
        for _ in range(40):
            c, d = b - golden * (b - a), a + golden * (b - a)
            if abs(error(c)) > abs(error(d)):
                b = d
            else:
                a = c
        best = max(best, abs(error((a + b) / 2)))
    return best


def derive_exp(degree, bits, grid):
    """c[2..degree] of exp(r) = 1 + r + c2 r^2 + ..., and the largest relative error."""
    r = np.array(chebyshev_points(-EXP_LIMIT, EXP_LIMIT, grid), dtype=object)
    e = np.array([mp.exp(v) for v in r], dtype=object)
    c = derive([r**k / e for k in range(2, degree + 1)], (e - 1 - r) / e, bits)

    def error(v):
        return mp.polyval([*reversed(c), 1, 1], v) / mp.exp(v) - 1

    return c, largest(error, -EXP_LIMIT, EXP_LIMIT)


def derive_exp2(degree, bits, grid):
    """c[1..degree] of 2^r = 1 + c1 r + c2 r^2 + ..., and the largest relative error."""
    half = mp.mpf("0.5")
    r = np.array(chebyshev_points(-half, half, grid), dtype=object)
    e = np.array([mp.power(2, v) for v in r], dtype=object)
    c = derive([r**k / e for k in range(1, degree + 1)], (e - 1) / e, bits)

    def error(v):
        return mp.polyval([*reversed(c), 1], v) / mp.power(2, v) - 1

    return c, largest(error, -half, half)


def derive_log(degree, bits, grid):
    """The coefficients of P, where log f = 2 u + u^3 P(u^2), and the largest relative error."""
    s = np.array(chebyshev_points(mp.mpf(0), LOG_LIMIT**2, grid), dtype=object)
    a = np.array([mp.atanh(mp.sqrt(v)) / mp.sqrt(v) for v in s], dtype=object)
    c = derive([s ** (k + 1) / (2 * a) for k in range(degree + 1)], (a - 1) / a, bits)

    def error(u):
        return (2 * u + u**3 * mp.polyval(c[::-1], u * u)) / (2 * mp.atanh(u)) - 1

    return c, largest(error, LOG_LIMIT / 4000, LOG_LIMIT)


def literal(value, bits):
    """The value rounded to `bits` bits, as a C hexadecimal floating constant."""
    mantissa, exponent = float(rounded(value, bits)).hex().split("p")
    return f"{mantissa.rstrip('0').rstrip('.')}p{exponent}{'f' if bits == 24 else ''}"


def define(name, value, bits):
    return f"#define {name} {literal(value, bits)}"


def derivation(grid):
    """The text of all constants, as C."""
    lines = []
    for bits, degree, short in ((24, 6, 17), (53, 11, 33)):
        c, error = derive_exp(degree, bits, grid)
        ln2_hi = rounded(mp.ln2, short)
        lines += [
            f"/* float{32 if bits == 24 else 64}: exp(r), |r| <= {mp.nstr(EXP_LIMIT, 6)}, "
            f"degree {degree}, {described(error, bits)} */",
            define("LOG2E", 1 / mp.ln2, bits),
            define("LN2_HI", ln2_hi, bits),
            define("LN2_LO", mp.ln2 - ln2_hi, bits),
            *(define(f"EXP{k}", v, bits) for k, v in enumerate(c, 2)),
        ]
        c, error = derive_exp2(degree, bits, grid)
        lines += [
            f"/* 2^r, |r| <= 1/2, degree {degree}, {described(error, bits)} */",
            *(define(f"POW{k}", v, bits) for k, v in enumerate(c, 1)),
            "",
        ]
    c, error = derive_log(6, 53, grid)
    lines += [
        f"/* float64: log f = 2u + u^3 P(u^2), u = (f-1)/(f+1), |u| <= {mp.nstr(LOG_LIMIT, 6)}, "
        f"{described(error, 53)} */",
        *(define(f"LOG_P{k}", v, 53) for k, v in enumerate(c)),
    ]
    return "\n".join(lines)


def described(error, bits):
    units = mp.nstr(error * mp.mpf(2) ** bits, 4)
    return f"relative error <= 2^{mp.nstr(mp.log(error, 2), 5)} = {units} * 2^-{bits}"


def constants(text):
    """The hexadecimal floating constants of C source, each as (value, suffix)."""
    found = re.findall(r"(-?0x[0-9a-f.]+p[+-]?\d+)(f?)", text.lower())
    return {(float.fromhex(value), suffix) for value, suffix in found}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--check", metavar="FILE", nargs="+", help="exit with 1 if a constant is in none of them"
    )
    parser.add_argument(
        "--grid", type=int, default=400, help="points of the linear program (default 400)"
    )
    args = parser.parse_args()
    text = derivation(args.grid)
    print(text)
    if args.check:
        found = constants("".join(Path(name).read_text(encoding="utf-8") for name in args.check))
        missing = [line for line in text.splitlines() if constants(line) - found]
        if missing:
            sys.exit("\n".join([f"missing in {', '.join(args.check)}:", *missing]))
        print(f"all of them are in {', '.join(args.check)}")


if __name__ == "__main__":
    main()
