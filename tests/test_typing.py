"""The stubs: what runs is what they promise. mypy and stubtest are a part of `make lint`."""

from pathlib import Path

import numpy as np
import pytest

USES = Path(__file__).parent / "typing" / "uses.py"


def test_uses_run():
    """All of the file but what mypy must refuse, which Python refuses, too."""
    good, bad = USES.read_text().split("# What must not pass")
    names = {}
    exec(compile(good, USES, "exec"), names)
    assert type(names["y"]) is np.ndarray
    lines = [line for line in bad.splitlines() if "type: ignore" in line]
    assert len(lines) == 5
    for line in lines:
        with pytest.raises((TypeError, ValueError)):
            exec(line, names)
