"""What is measured: every case, its data, the work that it is, and whether a result is right."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from fastsoftmax import reference, reference_gradients


def dtype_of(name):
    """A NumPy dtype by its name; bfloat16 is that of ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


# --- a case of either kind ------------------------------------------------------------------------


@dataclass(frozen=True)
class Softmax:
    """One call of a function of the softmax family.

    fused is what else the call does: "where", "bias" or "temperature", the same for each row. With
    out the result goes into an array that is there, where an implementation can do that.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    axis: int = -1
    function: str = "softmax"
    fused: str = ""
    out: bool = True

    def __str__(self):
        words = "x".join(map(str, self.shape)), "" if self.dtype == "float32" else self.dtype
        axis = "" if self.axis == -1 else f"axis {self.axis}"
        function = "" if self.function == "softmax" else self.function
        fresh = "" if self.out else "fresh"
        return " ".join(filter(None, [*words, axis, function, self.fused, fresh]))

    @property
    def result_shape(self):
        """The shape of the result."""
        axis = self.axis % len(self.shape)
        return self.shape if self.function != "logsumexp" else np.delete(self.shape, axis).tolist()

    @property
    def work(self):
        """How much there is to do, and in what unit of work a second its rate is told."""
        elements = math.prod(self.shape) + math.prod(self.result_shape)
        return elements * dtype_of(self.dtype).itemsize, "GB/s"

    def small(self):
        """The same in a few rows."""
        axis = self.axis % len(self.shape)
        shape = (min(n, 200_000 if i == axis else 40) for i, n in enumerate(self.shape))
        return replace(self, shape=tuple(shape))

    def operands(self):
        """By name, the same in every process."""
        r, dtype = np.random.default_rng(2026), dtype_of(self.dtype)
        row = np.ones(len(self.shape), int)
        row[self.axis] = self.shape[self.axis]
        x = (3 * r.standard_normal(self.shape, np.float32)).astype(dtype)
        fused = {
            "where": lambda: r.random(row) < 0.75,
            "bias": lambda: r.standard_normal(row).astype(dtype),
            "temperature": lambda: np.array(0.7, dtype),
        }
        return {"x": x} | ({self.fused: fused[self.fused]()} if self.fused else {})

    def is_right(self, got, x, **fused):
        """Whether it is, but for the rounding that is usual among the peers."""
        operands = (a if a.dtype == bool else a.astype(np.float64) for a in (x, *fused.values()))
        x, *values = operands
        function = getattr(reference, self.function)
        true = function(x, axis=self.axis, **dict(zip(fused, values, strict=True)))
        tolerance = {"float16": 0.02, "bfloat16": 0.15, "float64": 1e-9}.get(self.dtype, 1e-3)
        least = 1e-7 if self.function == "softmax" else tolerance  # logarithms may be near 0
        return got.shape == true.shape and np.allclose(got, true, rtol=tolerance, atol=least)


@dataclass(frozen=True)
class Attention:
    """One call of attention, on (batch, heads, heads of k and v, queries, keys, depth).

    mode is "full"; "causal"; "window", of the 256 keys up to the query's position; "padding", a
    mask [batch, 1, 1, keys] that hides up to half of the keys; "bias" [1, heads, queries, keys];
    "backward", the gradients of a causal call; or "packed", causal sequences one behind the other,
    the first of `queries` positions and batch - 1 of `keys`.
    """

    shape: tuple[int, int, int, int, int, int]
    mode: str = "full"
    dtype: str = "float32"

    def __str__(self):
        batch, heads, kv_heads, *rest = self.shape
        heads = f"{heads}({kv_heads})" if heads != kv_heads else heads
        mode = "decode" if self.queries == 1 else self.mode
        dtype = [] if self.dtype == "float32" else [self.dtype]
        return " ".join(["x".join(map(str, (batch, heads, *rest))), mode, *dtype])

    @property
    def queries(self):
        """The number of queries of each head; 1: the step of a decoder."""
        return self.shape[3]

    @property
    def window(self):
        """The keys to the left and right that a query sees, or None."""
        return (255, 0) if self.mode == "window" else None

    @property
    def causal(self):
        """Whether no query sees what follows it."""
        return self.mode in ("causal", "backward", "packed")

    def starts(self):
        """Where each of the packed sequences begins, and the last one ends."""
        return np.cumsum([0, self.queries, *[self.shape[4]] * (self.shape[0] - 1)])

    def lengths(self):
        """How many keys of each sequence are not padding, as an array [batch, 1, 1, 1]."""
        lengths = np.linspace(self.shape[4] / 2, self.shape[4], self.shape[0]).astype(int)
        return lengths.reshape(-1, 1, 1, 1)

    def pattern(self):
        """What a window lets the queries see: [queries, keys]."""
        p, j = np.arange(self.queries)[:, None], np.arange(self.shape[4])
        return (j <= p) & (j >= p - self.window[0])

    @property
    def work(self):
        """Products of the pairs that see each other; of one query, the bytes of k and v."""
        batch, heads, kv_heads, queries, keys, depth = self.shape
        if queries == 1:
            return 2 * batch * kv_heads * keys * depth * dtype_of(self.dtype).itemsize, "GB/s"
        pairs = batch * queries * keys
        if self.mode == "packed":
            pairs = sum(n * (n + 1) // 2 for n in np.diff(self.starts()).tolist())
        elif self.causal or self.window:
            farthest = self.window[0] + 1 if self.window else keys
            pairs = batch * int(np.clip(np.arange(1, queries + 1), 0, min(farthest, keys)).sum())
        elif self.mode == "padding":
            pairs = queries * int(self.lengths().sum())
        products = 5 if self.mode == "backward" else 2
        return 2 * products * depth * heads * pairs, "GFLOP/s"

    def small(self):
        """The same with fewer sequences, heads, queries and keys."""
        batch, heads, kv_heads, queries, keys, depth = self.shape
        group = heads // kv_heads
        shape = min(batch, 2), group * min(kv_heads, 2), min(kv_heads, 2)
        return replace(self, shape=(*shape, min(queries, 300), min(keys, 1000), depth))

    def operands(self):
        """By name, the same in every process."""
        batch, heads, kv_heads, queries, keys, depth = self.shape
        r, dtype = np.random.default_rng(2026), dtype_of(self.dtype)
        shapes = [(batch, *n) for n in ((heads, queries), (kv_heads, keys), (kv_heads, keys))]
        if self.mode == "packed":
            shapes = [(self.starts()[-1], n) for n in (heads, kv_heads, kv_heads)]
        q, k, v = (r.standard_normal((*n, depth), np.float32).astype(dtype) for n in shapes)
        more = {}
        if self.mode == "packed":
            more["starts"] = self.starts()
        elif self.mode == "backward":
            more["grad"] = r.standard_normal(q.shape, np.float32).astype(dtype)
        elif self.mode == "padding":
            more["mask"] = np.arange(keys) < self.lengths()
        elif self.mode == "bias":
            more["bias"] = r.standard_normal((1, heads, queries, keys), np.float32).astype(dtype)
        return {"q": q, "k": k, "v": v} | more

    def is_right(self, got, q, k, v, mask=None, bias=None, grad=None, starts=None):
        """Whether the first, middle and last queries are, but for the rounding usual of peers.

        Of packed sequences the first two are looked at, of gradients those of one head.
        """
        if starts is not None:
            _, *heads, _, _, depth = self.shape
            for i, j in pairwise(starts[:3].tolist()):
                alone = Attention((1, *heads, j - i, j - i, depth), "causal", self.dtype)
                if not alone.is_right(*(a[i:j].swapaxes(0, 1)[None] for a in (got, q, k, v))):
                    return False
            return True
        tolerance = {"float16": 0.02, "bfloat16": 0.05}.get(self.dtype, 1e-3)
        if grad is not None:
            group = self.shape[1] // self.shape[2]
            q, grad = q[:1, :group], grad[:1, :group]
            k, v = k[:1, :1], v[:1, :1]
            forward = reference.attention(q, k, v, is_causal=True, return_lse=True)
            true = reference_gradients.attention_backward(grad, q, k, v, *forward, is_causal=True)
            pairs = [(a[:1, : t.shape[1]], t) for a, t in zip(got, true, strict=True)]
            return all(abs(a - t).max() <= tolerance * abs(t).max() for a, t in pairs)
        n = min(self.queries, 64)
        options = {"mask": mask, "is_causal": self.causal, "window": self.window}
        for first in {0, (self.queries - n) // 2, self.queries - n}:
            some = slice(first, first + n)
            near = None if bias is None else bias[:, :, some]
            true = reference.attention(q[:, :, some], k, v, bias=near, q_offset=first, **options)
            error = np.abs(got[:, :, some] - true).max()
            if not (got.shape == q.shape and error <= tolerance * np.abs(true).max()):
                return False
        return True


KINDS = {"softmax": Softmax, "attention": Attention}


def to_json(case):
    """The case as a dictionary from which from_json makes it again."""
    kind = next(name for name, kind in KINDS.items() if isinstance(case, kind))
    return {"kind": kind, **vars(case)}


def from_json(fields):
    """Undo to_json."""
    kind = KINDS[fields["kind"]]
    values = {name: value for name, value in fields.items() if name != "kind"}
    return kind(**values | {"shape": tuple(fields["shape"])})


# --- the cases: suite, group, cases ---------------------------------------------------------------

SMALL = (8,), (32, 10), (1, 1000), (12, 16, 16)
SUITES = {
    "softmax": {
        "float32": [
            Softmax(shape)
            for shape in (
                *((64, 1000), (12288, 128), (4096, 1024), (4096, 4096), (32, 512, 512)),
                *((16, 128256), (1, 128256), (2, 4_000_000)),
            )
        ],
        "short rows": [Softmax(shape) for shape in ((1024, 64), (65536, 8), (65536, 16))],
        **{t: [Softmax((4096, 1024), t)] for t in ("float16", "bfloat16", "float64")},
        "strided axes": [
            *(Softmax(shape, axis=0) for shape in ((2048, 2048), (1000, 1024))),
            *(Softmax(shape, axis=1) for shape in ((64, 1000, 32), (8, 3, 100003))),
        ],
        "logarithms": [Softmax((4096, 1024), function=f) for f in ("log_softmax", "logsumexp")],
        "fused": [
            Softmax(shape, fused=fused)
            for shape in ((65536, 64), (4096, 1024))
            for fused in ("", "where", "bias", "temperature")
        ],
        "fresh result": [Softmax(s, out=False) for s in ((12288, 128), (4096, 1024), (4096, 4096))],
    },
    "attention": {
        "full": [
            Attention((1, 8, 8, 2048, 2048, 64)),
            Attention((1, 1, 1, 8192, 8192, 64)),
            Attention((1, 12, 12, 512, 512, 64)),
            Attention((1, 12, 12, 128, 128, 64)),
        ],
        "causal": [
            Attention((1, 8, 8, 2048, 2048, 64), "causal"),
            Attention((1, 8, 8, 2048, 2048, 128), "causal"),
            Attention((1, 1, 1, 8192, 8192, 64), "causal"),
            Attention((1, 32, 8, 512, 512, 128), "causal"),
        ],
        "window": [Attention((1, 1, 1, 8192, 8192, 64), "window")],
        "padding": [
            Attention((8, 12, 12, 128, 128, 64), "padding"),
            Attention((4, 12, 12, 512, 512, 64), "padding"),
        ],
        "bias": [
            Attention((1, 8, 8, 1024, 1024, 80), "bias"),
            Attention((1, 12, 12, 512, 512, 64), "bias"),
        ],
        "decode": [Attention((1, 32, 8, 1, 4096, 128)), Attention((1, 1, 1, 1, 32768, 128))],
        "gradients": [
            Attention((1, 8, 8, 2048, 2048, 64), "backward"),
            Attention((4, 12, 12, 512, 512, 64), "backward"),
        ],
        "packed": [Attention((501, 8, 8, 8192, 16, 64), "packed")],
        **{
            f"{dtype} {mode}": [Attention(shape, mode.replace("decode", "full"), dtype)]
            for dtype in ("float16", "bfloat16")
            for mode, shape in (
                ("full", (1, 8, 8, 2048, 2048, 64)),
                ("causal", (1, 8, 8, 2048, 2048, 128)),
                ("decode", (1, 32, 8, 1, 4096, 128)),
            )
        },
    },
    "small": {
        "fresh result": [Softmax(shape, out=False) for shape in SMALL],
        "out=": [Softmax(shape) for shape in SMALL],
    },
}

THREADS = [  # measured with 1, 2, 4 ... threads
    *(Softmax(shape) for shape in ((64, 1000), (4096, 1024), (4096, 4096), (1, 128256))),
    *(Attention((1, 8, 8, 2048, 2048, 64), mode) for mode in ("full", "causal")),
    Attention((1, 32, 8, 1, 4096, 128)),
    Attention((1, 1, 1, 1, 32768, 128)),
    Attention((501, 2, 2, 8192, 16, 64), "packed"),
]

_K = [1024 << i for i in range(7)]
_R = [16 << 2 * i for i in range(7)]
SCALING = {  # what grows: its name, its sizes, the case of a size
    "softmax of 64 rows of K": ("K", _K, lambda n: Softmax((64, n))),
    "softmax of R rows of 1024": ("R", _R, lambda n: Softmax((n, 1024))),
    "256 queries, K keys": ("K", _K, lambda n: Attention((1, 8, 8, 256, n, 64))),
    "Q queries, 512 keys": ("Q", _K, lambda n: Attention((1, 8, 8, n, 512, 64))),
    "K queries, K keys": ("K", _K, lambda n: Attention((1, 1, 1, n, n, 64))),
    "K queries, K keys, causal": ("K", _K, lambda n: Attention((1, 1, 1, n, n, 64), "causal")),
    "K queries, K keys, window": ("K", _K, lambda n: Attention((1, 1, 1, n, n, 64), "window")),
    "decode, K keys": ("K", _K, lambda n: Attention((1, 32, 8, 1, n, 128))),
}

ROW_LENGTHS = 1, 2, 3, 8, 16, 33, 64, 100, 128, 1000, 1024, 20_000, 128_256, 1_000_000
DISTRIBUTIONS = {  # of the logits whose softmax `accuracy` examines
    **{
        f"scale {scale:g}": lambda r, shape, scale=scale: r.normal(0, scale, shape)
        for scale in (0.1, 1, 10, 100, 1000)
    },
    **{
        f"offset {offset:g}": lambda r, shape, offset=offset: r.normal(offset, 3, shape)
        for offset in (100, -3000, 1e5, 1e6, 1e8, 1e30)
    },
    "constant": lambda r, shape: np.full(shape, r.normal(0, 100)),
    "few values": lambda r, shape: r.choice(r.normal(0, 5, 4), shape),
    "two scales": lambda r, shape: r.normal(0, 1, shape) * r.choice([0.1, 10], shape),
}

# The picture of the README: some of these, and some calls as they are mostly made.
OVERVIEW = "scale 1", "scale 10", "scale 100", "offset 100", "few values", "two scales"
OVERVIEW_OF_SPEED = {
    "softmax of 8 numbers": [Softmax((8,), out=False)],
    "1024 rows of 64": [Softmax((1024, 64), out=False)],
    "4096 rows of 1024": [Softmax((4096, 1024), out=False)],
    "the same in float16": [Softmax((4096, 1024), "float16", out=False)],
    "16 rows of 128,256": [Softmax((16, 128256), out=False)],
    "2048 x 2048 along axis 0": [Softmax((2048, 2048), axis=0, out=False)],
    "attention, 12 heads, 512 x 512": [Attention((1, 12, 12, 512, 512, 64))],
    "8 heads, 2048 x 2048": [Attention((1, 8, 8, 2048, 2048, 64))],
    "the same, causal": [Attention((1, 8, 8, 2048, 2048, 64), "causal")],
    "one query, 4096 keys, 32 heads": [Attention((1, 32, 8, 1, 4096, 128))],
}
