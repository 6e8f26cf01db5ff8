"""What calls of the fuzzer (fuzz.py) are made of: arrays of any layout, garbage, a call itself."""

import decimal

import numpy as np
from common import F32, FLOATS
from test_hypothesis import NASTY, quiet_cast

INTEGERS = tuple(np.dtype(c) for c in "bhilBHIL?")


class Draw:
    """What a call is made of, from one generator."""

    def __init__(self, seed, number):
        self.g = np.random.default_rng([seed, number])

    def one_of(self, *choices):
        return choices[self.g.integers(len(choices))]

    def chance(self, p):
        return self.g.random() < p

    def integer(self, low, high):
        return int(self.g.integers(low, high + 1))

    def shape(self, most_dims=4):
        shape = [self.integer(0, 6) if self.chance(0.1) else self.integer(1, 6)
                 for _ in range(self.integer(0, most_dims))]  # fmt: skip
        if shape and self.chance(0.4):
            shape[self.integer(0, len(shape) - 1)] = self.one_of(15, 16, 17, 33, 64, 100, 150)
        return tuple(shape)

    def part_of(self, shape):
        """A shape that broadcasts to `shape`."""
        shape = tuple(1 if self.chance(0.4) else n for n in shape)
        return shape[self.integer(0, len(shape)) :] if self.chance(0.5) else shape

    def values(self, shape, dtype):
        """Gaussian numbers of one scale and offset, some of them nasty, of a dtype, in a layout."""
        if dtype.kind in "iub":
            return self.laid_out(self.g.integers(0, 2 if dtype.kind == "b" else 50, shape), dtype)
        a = self.one_of(0.0, 0.1, 3.0, 30.0, 1000.0) * self.g.standard_normal(shape)
        a += self.one_of(0.0, 0.0, 5.5, -300.0, 1e5, 3e6)
        nasty = self.g.random(shape) < self.one_of(0.0, 0.0, 0.1, 0.5)
        return self.laid_out(np.where(nasty, self.g.choice(NASTY, shape), a), dtype)

    def numbers(self, shape, dtype, scale=1.0):
        """Tame ones."""
        return self.laid_out(scale * self.g.standard_normal(shape), dtype)

    def laid_out(self, a, dtype):
        """The same values as another dtype, in a layout; now and then one for all along an axis."""
        a = quiet_cast(a, dtype) if np.dtype(dtype).kind != "b" else np.asarray(a, bool)
        if a.ndim and a.size and self.chance(0.1):  # a stride of 0
            axis = self.integer(0, a.ndim - 1)
            return np.broadcast_to(self.laid_out(a.take([0], axis), dtype), a.shape)
        return self.placed(a)

    def placed(self, a):
        """A copy: permuted axes, gaps, steps back, at an odd address, byte-swapped, read-only."""
        view = self.blank(a.shape, a.dtype)
        view[...] = a
        if self.chance(0.05):
            view = view.astype(view.dtype.newbyteorder())
        if self.chance(0.1):
            view = view.view()
            view.flags.writeable = False
        return view

    def blank(self, shape, dtype, buffer=None, start=0):
        """Memory for an array in some layout; from `buffer`, or new."""
        plain = self.chance(0.4)
        order = range(len(shape)) if plain else self.g.permutation(len(shape))
        steps = [1 if plain else self.one_of(1, 1, -1, 2, -3) for _ in shape]
        if buffer is not None:
            steps = [max(-1, min(1, s)) for s in steps]
        extent = [shape[k] * abs(steps[k]) for k in order]
        size = int(np.prod(extent, dtype=int)) * dtype.itemsize
        if buffer is None:
            start = 0 if plain else self.one_of(0, 0, 1, 3)
            buffer = np.full(start + size, 0xA5, np.uint8)
        flat = buffer[start : start + size].view(dtype)
        base = flat.reshape(extent).transpose(np.argsort(order)) if shape else flat.reshape(())
        return base[(*(slice(None, None, s) for s in steps), ...)]

    def axis(self, ndim):
        if not ndim or self.chance(0.2):
            return None if self.chance(0.5) or not ndim else -1
        if self.chance(0.7):
            return self.one_of(int, np.int64)(self.integer(-ndim, ndim - 1))
        return tuple(int(k) for k in self.g.permutation(ndim)[: self.integer(0, ndim)])

    def out(self, shape, dtype, *inputs):
        """None, new, or in memory that an input has, too; and the inputs, of which one may move."""
        inputs = list(inputs)
        kind = self.g.random()
        if kind < 0.5:
            return None, inputs
        if kind < 0.7:
            return self.blank(shape, dtype), inputs
        which = self.integer(0, len(inputs) - 1)
        a = inputs[which]
        if (
            kind < 0.8
            and a.shape == shape
            and a.dtype == dtype
            and a.dtype.isnative
            and a.flags.writeable
        ):
            if 0 not in a.strides or a.size < 2:
                return a, inputs
        size = int(np.prod(shape, dtype=int)) * dtype.itemsize
        buffer = np.full(a.nbytes + size + 64, 0xA5, np.uint8)
        moved = self.blank(a.shape, a.dtype, buffer, self.integer(0, size))
        moved[...] = a
        inputs[which] = moved
        return self.blank(shape, dtype, buffer, self.integer(0, a.nbytes)), inputs


# ---- what should not be there ----


class Hostile:
    """Has a length that it does not keep."""

    def __len__(self):
        return 3

    def __getitem__(self, i):
        if i > 1:
            raise IndexError
        return 1.0


class Vague:
    """Is neither true nor false."""

    def __bool__(self):
        raise ValueError("neither")


def garbage(d):
    """Anything at all."""
    numbers = (None, True, False, 0, 1, -1, 3, -7, 2**31, 2**70, -(2**70), 0.0, -0.0, 1.5, -2.0,
               np.nan, np.inf, -np.inf, 1e-320, 1e39, 1e308, 1j, np.float16(2), np.float32(np.nan),
               np.int8(-1), np.uint64(2**64 - 1), np.bool_(True), np.longdouble(1), np.complex64(1),
               decimal.Decimal("1.5"), np.datetime64("2020-01-01"), np.timedelta64(3, "s"),
    )  # fmt: skip
    objects = (
        "z", "float32", "axis", b"x", "", (), [], {}, {1}, (1, "a"), [None], [[1.0], [1.0, 2.0]],
        [[]], (0, 1), (None, None), (1.0, 2), (-1, 2), (2, 3, 4), range(3), slice(None), ...,
        object(), len, int, float, np.float16, np.float64, np.int32, np.dtype("f4"), complex,
        np.dtype("S3"), np.ndarray, bytearray(b"12345678"), memoryview(b"12345678"), Hostile(),
        Vague(), [2**80], [Vague()],
    )  # fmt: skip
    arrays = (
        lambda: d.values(d.shape(), d.one_of(*FLOATS)),
        lambda: d.values(d.shape(), d.one_of(*INTEGERS)),
        lambda: np.zeros(d.shape(), d.one_of("c8", "G", "O", "S2", "U1", "M8[s]", "m8[s]", "V3")),
        lambda: np.zeros(2, [("a", "f4"), ("b", "i2")]),
        lambda: np.ma.masked_array(np.ones(d.shape(2)), mask=d.chance(0.5)),
        lambda: np.ma.masked,
        lambda: np.ones((1,) * 63),  # the oracle adds one
        lambda: np.ones((1,) * 40, F32),
        lambda: np.rec.array(np.ones(3, F32)),
        lambda: np.array([None, 1.0]),
        lambda: np.array(1.0),
        lambda: np.arange(6.0)[::-1],
        lambda: np.empty((0, 3)),
        lambda: np.array(["a"]),
    )
    kind = d.one_of("number", "object", "array", "array")
    return (d.one_of(*numbers) if kind == "number" else
            d.one_of(*objects) if kind == "object" else d.one_of(*arrays)())  # fmt: skip


class Case:
    """A call: a function with its arguments by name, and what is true of its result."""

    def __init__(self, function, positional, keywords, oracle, check, name=None):
        self.function, self.oracle, self.check = function, oracle, check
        self.positional, self.keywords = positional, keywords
        self.name = name or function.__name__
        self.garbage = None

    def spoil(self, d, names):
        """Put garbage in the place of an argument, given or not."""
        self.garbage = d.one_of(*self.positional, *names)
        place = self.positional if self.garbage in self.positional else self.keywords
        place[self.garbage] = garbage(d)

    def call(self):
        return self.function(*self.positional.values(), **self.keywords)


def native(array):
    return array.dtype.newbyteorder("=")
