"""Draw tokens from the logits of a language model: temperature, top-k, top-p.

    python examples/sampling.py

The core is softmax(logits / temperature) over the tokens that are left, in one call: `where` says
which they are, and all others get exactly 0, so that they can never be drawn.
"""

import numpy as np

import fastsoftmax as fs
from fastsoftmax.bench import best_time, duration, table

VOCABULARY = 128_256  # of Llama 3


def probabilities(logits, temperature=1.0, top_k=None, top_p=None, allowed=None):
    """Compute the probability of each token, [..., vocabulary].

    allowed, bool, leaves out tokens from the start (a grammar, for example); top_k keeps the k
    likeliest, and those as likely as the last of them; of these top_p keeps the likeliest that
    together reach a probability of top_p.
    """
    where = True if allowed is None else allowed
    if top_k is not None:
        ranked = np.where(where, logits, -np.inf)
        where = where & (ranked >= np.partition(ranked, -top_k, axis=-1)[..., -top_k, None])
    p = fs.softmax(logits, temperature=temperature, where=where)
    if top_p is None or top_p >= 1:
        return p
    order = np.argsort(-p, axis=-1, kind="stable")
    falling = np.take_along_axis(p, order, axis=-1).astype(np.float64)
    likelier = np.cumsum(falling, axis=-1) - falling  # the probability of all before it
    kept = np.zeros(p.shape, bool)
    np.put_along_axis(kept, order, (likelier < top_p) & (falling > 0), axis=-1)
    return fs.softmax(logits, temperature=temperature, where=kept, out=p)


def draw(p, rng):
    """Draw a token from each row of probabilities, by the inverse of their running sum."""
    total = np.cumsum(p, axis=-1, dtype=np.float64)
    last = total[..., -1:]
    u = rng.random(last.shape) * last  # < last, for all that a double below 1 leaves of it
    return np.argmax(total > u, axis=-1)


def sample(logits, rng, **options):
    """Draw the next token of each row of logits, with the options of probabilities."""
    return draw(probabilities(logits, **options), rng)


def main():
    """Show what the options leave of a large vocabulary, and what a token costs."""
    rng = np.random.default_rng(0)
    logits = 2.5 * rng.standard_normal(VOCABULARY, np.float32)
    rows = []
    for options in (
        {},
        {"temperature": 0.7},
        {"top_k": 50},
        {"top_p": 0.9},
        {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    ):
        p = probabilities(logits, **options)
        name = ", ".join(f"{k}={v}" for k, v in options.items()) or "(none)"
        time = duration(best_time(lambda o=options: sample(logits, rng, **o)))
        drawn = " ".join(f"{sample(logits, rng, **options):6}" for _ in range(5))
        rows.append([name, np.count_nonzero(p), f"{p.max():.4f}", drawn, time])
    table(rows, ["options", "left", "likeliest", "drawn", "time of one"])


if __name__ == "__main__":
    main()
