"""With other numerical libraries in one process: imported before or after, calls in turns.

Each brings an OpenMP runtime or a pool of its own.
"""

import pytest
from test_teams import run

PEERS = {
    "torch": """
import torch
t = torch.from_numpy(x)
def peer():
    return torch.nn.functional.softmax(t, -1).numpy()
""",
    "sklearn": """
import sklearn
from sklearn.cluster import KMeans
def peer():
    return KMeans(3, n_init=1, max_iter=5, random_state=0).fit(x[:, :20]).cluster_centers_
""",
    "onnxruntime": """
import onnx, onnxruntime
from onnx import TensorProto, helper
value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, None]) for n in "xy"]
node = helper.make_node("Softmax", ["x"], ["y"], axis=-1)
model = helper.make_model(helper.make_graph([node], "g", value[:1], value[1:]),
                          opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
cpu = ["CPUExecutionProvider"]
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=cpu)
def peer():
    return session.run(None, {"x": x})[0]
""",
    "scipy": """
import scipy.special
def peer():
    return scipy.special.softmax(x, -1)
""",
}

OURS = """
import fastsoftmax as fs
fs.set_num_threads(3)
def ours():
    y = fs.softmax(x), fs.softmax(x, 0), fs.attention(x, x, x), fs.logsumexp(x, -1)
    return b"".join(a.tobytes() for a in y)
"""

IN_TURNS = """
first, theirs = ours(), peer()
for _ in range(6):
    assert ours() == first and np.allclose(peer(), theirs, atol=1e-5)
found = []
def work():
    for _ in range(2):
        found.append(ours() == first and np.allclose(peer(), theirs, atol=1e-5))
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
tiny = np.array([2.0**-140], np.float32)
assert (tiny * np.float32(0.5))[0] == 2.0**-141, "flush to zero"
print(fs.get_num_threads(), sum(found))
"""


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", PEERS)
def test_in_turns(name, order):
    pytest.importorskip(name)
    if name == "onnxruntime":
        pytest.importorskip("onnx")
    x = "import threading, numpy as np\nx = np.random.default_rng(0).normal(0, 3, (300, 200))\n"
    parts = [PEERS[name], OURS] if order == "before" else [OURS, PEERS[name]]
    code = x + "x = x.astype('f4')\n" + "".join(parts) + IN_TURNS
    assert run(code).split() == ["3", "6"]
