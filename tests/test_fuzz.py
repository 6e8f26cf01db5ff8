"""Some calls of the fuzzer (fuzz.py); the long run is ``make fuzz``."""

import pytest
from common import ISAS
from fuzz import fuzz

import fastsoftmax as fs

CALLS = 20_000


def test_fuzz(isa):
    seen = fuzz(CALLS // len(ISAS), seed=ISAS.index(isa), isa=isa)
    for name in ("softmax", "log_softmax", "softmin", "logsumexp", "attention"):
        for what in ("right", "accepted", "TypeError", "ValueError"):
            assert seen[name, what], f"no call of {name} was {what}"


def test_the_fuzzer_would_notice(monkeypatch):
    """A function that is wrong in the last places, and what to type to see it again."""

    def wrong(*args, **kwargs):
        y = right(*args, **kwargs)
        return y if kwargs.get("out") is not None else y * type(y.flat[0])(1.002) if y.size else y

    right = fs.softmax
    wrong.__name__ = "softmax"
    monkeypatch.setattr(fs, "softmax", wrong)
    with pytest.raises(AssertionError, match=r"python tests/fuzz.py --seed 0 --only \d+ --isa"):
        fuzz(300)
