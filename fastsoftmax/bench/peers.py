"""The implementations: from a case and its operands each prepares a call that returns the result.

Two functions for each library, NAME_softmax and NAME_attention, and the table IMPLEMENTATIONS at
the end. What a library computes only once (compiling, wrapping arrays) is prepared; what it must do
each time is in the call. A case that a library lacks raises whatever that library raises.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import fastsoftmax as fs
from fastsoftmax import _core

from .cases import dtype_of


def logits(xp, x, temperature=None, bias=None, where=None):
    """What comes before a softmax without fused arguments; xp is numpy, torch or jax.numpy."""
    if temperature is not None:
        x = x / temperature
    if bias is not None:
        x = x + bias
    return x if where is None else xp.where(where, x, -math.inf)


def one_mask(case, mask=None, bias=None):
    """Mask, bias or the window's pattern: most libraries have one argument for all of them."""
    return case.pattern() if case.window else mask if bias is None else bias


# --- fastsoftmax ----------------------------------------------------------------------------------


def fastsoftmax_softmax(case, x, **fused):
    """Us."""
    out = np.empty(case.result_shape, x.dtype) if case.out else None
    function = getattr(fs, case.function)
    return lambda: function(x, axis=case.axis, out=out, **fused)


def fastsoftmax_attention(case, q, k, v, starts=None, grad=None, **more):
    """Us."""
    if starts is not None:
        packed = {"is_causal": True, "out": np.empty_like(q)}
        return lambda: fs.attention_varlen(q, k, v, starts, starts, **packed)
    if grad is not None:
        forward = fs.attention(q, k, v, is_causal=True, return_lse=True)
        return lambda: fs.attention_backward(grad, q, k, v, *forward, is_causal=True)
    more |= {"is_causal": case.causal, "window": case.window, "out": np.empty_like(q)}
    return lambda: fs.attention(q, k, v, **more)


# --- the floor: what no implementation can beat ---------------------------------------------------


def in_threads(work, *arrays):
    """Let each thread do the work on its part of the arrays; it repeats it without waiting.

    call.times is how often. One thread only below 1 MB, where it would be the threads of Python
    that are measured.
    """
    size = sum(array.nbytes for array in arrays)
    threads, times = (fs.get_num_threads(), 1 + 2**26 // size) if size >= 2**20 else (1, 1)
    parts = list(zip(*(np.array_split(a.reshape(-1), threads) for a in arrays), strict=True))
    pool = ThreadPoolExecutor(threads)

    def repeat(part):
        for _ in range(times):
            work(*part)

    def call():
        if threads == 1:
            repeat(parts[0])
        else:
            list(pool.map(repeat, parts))

    call.times = times
    return call


def read(array):
    """Read an array once, as fast as NumPy can."""
    array.view(np.int32).max(initial=0)


def floor_softmax(case, x, **fused):
    """Copy x with np.copyto; of logsumexp, which writes next to nothing, read it."""
    if case.function == "logsumexp":
        return in_threads(read, x)
    return in_threads(np.copyto, np.empty_like(x), x)


def floor_attention(case, q, k, v, **more):
    """Read k and v, for one query; else as many float32 FMAs, in registers."""
    if case.queries == 1:
        return in_threads(lambda k, v: (read(k), read(v)), k, v)
    threads = fs.get_num_threads()
    pool = ThreadPoolExecutor(threads)

    def call():
        return sum(pool.map(_core._multiply_add, [2**18] * threads, [fs.isa()] * threads))

    call.times = call() / case.work[0]
    return call


# --- NumPy, SciPy ---------------------------------------------------------------------------------


def numpy_softmax(case, x, **fused):
    """The formula that everybody writes, its temporaries saved."""
    axis = case.axis
    buffer = np.empty_like(x) if case.out else None

    def call():
        z = logits(np, x, **fused)
        top = z.max(axis, keepdims=True)
        z = np.subtract(z, top, out=buffer)
        if case.function == "softmax":
            np.exp(z, out=z)
            return np.divide(z, z.sum(axis, keepdims=True), out=z)
        log_sum = np.log(np.exp(z).sum(axis, keepdims=True))
        if case.function == "log_softmax":
            return np.subtract(z, log_sum, out=z)
        return (top + log_sum).squeeze(axis)

    return call


def numpy_attention(case, q, k, v, **more):
    """The five lines of NumPy; not where the scores would fill gigabytes, or in float16."""
    batch, heads, kv_heads, queries, keys, depth = case.shape
    if batch * heads * queries * keys > 2**22 or case.dtype not in ("float32", "float64"):
        raise NotImplementedError
    scale, mask = np.array(depth**-0.5, q.dtype), one_mask(case, **more)
    if case.causal:
        mask = np.tri(queries, keys, dtype=bool)
    if mask is not None and mask.ndim == 4:
        mask = mask[:, :, None]
    q = q.reshape(batch, kv_heads, -1, queries, depth)  # the heads that share k and v together
    k, v = k[:, :, None].swapaxes(-1, -2), v[:, :, None]

    def call():
        z = q @ k
        z *= scale
        if mask is not None:
            z = np.where(mask, z, -np.inf) if mask.dtype == bool else np.add(z, mask, out=z)
        z -= z.max(-1, keepdims=True)
        np.exp(z, out=z)
        z /= z.sum(-1, keepdims=True)
        return (z @ v).reshape(batch, heads, queries, depth)

    return call


def scipy_softmax(case, x, **fused):
    """Through scipy.special, which has no out=."""
    from scipy import special

    function = getattr(special, case.function)
    return lambda: function(logits(np, x, **fused), case.axis)


# --- PyTorch --------------------------------------------------------------------------------------


def torch_tensors(operands):
    """Wrap arrays; torch does not know the bfloat16 of ml_dtypes, but its bits."""
    import torch

    torch.set_num_threads(fs.get_num_threads())
    torch.set_grad_enabled(False)
    return {
        name: torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        if array.dtype.name == "bfloat16"
        else torch.from_numpy(array)
        for name, array in operands.items()
    }


def torch_softmax(case, **operands):
    """Through torch.softmax and its like, with a fresh result."""
    import torch

    operands, function = torch_tensors(operands), getattr(torch, case.function)
    return lambda: function(logits(torch, **operands), case.axis)


def torch_softmax_out(case, **operands):
    """With out=."""
    import torch

    if not case.out:
        raise NotImplementedError
    operands, function = torch_tensors(operands), getattr(torch, case.function)
    out = torch.empty(case.result_shape, dtype=operands["x"].dtype)
    return lambda: function(logits(torch, **operands), case.axis, out=out)


def torch_gradients(case, q, k, v, grad):
    """Backwards through scaled_dot_product_attention; what its forward pass keeps is kept."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    *qkv, grad = torch_tensors({"q": q, "k": k, "v": v, "grad": grad}).values()
    torch.set_grad_enabled(True)
    qkv = [tensor.requires_grad_() for tensor in qkv]
    options = {"is_causal": True, "enable_gqa": case.shape[1] != case.shape[2]}
    out = scaled_dot_product_attention(*qkv, **options)
    return lambda: torch.autograd.grad(out, qkv, grad, retain_graph=True)


def torch_attention(case, q, k, v, **more):
    """Through torch.nn.functional.scaled_dot_product_attention."""
    from torch.nn.functional import scaled_dot_product_attention

    if "grad" in more:
        return torch_gradients(case, q, k, v, **more)
    mask = one_mask(case, **more)
    operands = {"query": q, "key": k, "value": v} | ({} if mask is None else {"attn_mask": mask})
    options = {"is_causal": case.causal, "enable_gqa": case.shape[1] != case.shape[2]}
    operands = torch_tensors(operands) | options
    return lambda: scaled_dot_product_attention(**operands)


# --- ONNX Runtime ---------------------------------------------------------------------------------


def onnx_softmax_model(case, operands):
    """Make a model of Softmax and of what comes before it; its inputs are the operands."""
    from onnx import helper

    nodes, z = [], "x"
    for name, op in {"temperature": "Div", "bias": "Add"}.items():
        if name in operands:
            nodes.append(helper.make_node(op, [z, name], [op]))
            z = op
    if "where" in operands:
        nodes.append(helper.make_node("Constant", [], ["none"], value_float=-math.inf))
        nodes.append(helper.make_node("Where", ["where", z, "none"], ["Where"]))
        z = "Where"
    if case.function == "logsumexp":
        nodes.append(helper.make_node("Constant", [], ["axes"], value_ints=[case.axis]))
        node = helper.make_node("ReduceLogSumExp", [z, "axes"], ["y"], keepdims=0)
    else:
        op = {"softmax": "Softmax", "log_softmax": "LogSoftmax"}[case.function]
        node = helper.make_node(op, [z], ["y"], axis=case.axis)
    return onnx_model([*nodes, node], operands, case.dtype, case.result_shape, 18)


def onnx_model(nodes, operands, dtype, shape, opset):
    """Serialize a model."""
    from onnx import helper

    def value(name, dtype, shape):
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return helper.make_tensor_value_info(name, kind, shape)

    inputs = [value(name, array.dtype, array.shape) for name, array in operands.items()]
    graph = helper.make_graph(nodes, "graph", inputs, [value("y", dtype_of(dtype), shape)])
    imports = [helper.make_opsetid("", opset)]
    version = 8 if opset < 23 else 10
    model = helper.make_model(graph, opset_imports=imports, ir_version=version)
    return model.SerializeToString()


def onnxruntime_call(model, operands, dtype, shape, bound):
    """Call a model with its buffers bound to the arrays, or with a fresh result."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = fs.get_num_threads()
    options.log_severity_level = 4  # a dtype that it lacks is reported in the table
    session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    if not bound:
        return lambda: session.run(None, operands)[0]
    out, binding = np.empty(shape, dtype_of(dtype)), onnxruntime.IOBinding(session)
    for name, array in operands.items():
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    binding.bind_output("y", "cpu", 0, out.dtype, out.shape, out.ctypes.data)

    def call():
        session.run_with_iobinding(binding)
        return out

    call.bound = operands  # a binding knows addresses only: keep the arrays alive
    return call


def onnxruntime_softmax(case, bound=False, **operands):
    """Through a model of one node, a few if there are fused arguments."""
    if bound and not case.out:
        raise NotImplementedError
    model = onnx_softmax_model(case, operands)
    return onnxruntime_call(model, operands, case.dtype, case.result_shape, bound)


def onnxruntime_softmax_bound(case, **operands):
    """With buffers bound to the arrays."""
    return onnxruntime_softmax(case, True, **operands)


def onnxruntime_attention(case, bound=False, *, q, k, v, **more):
    """Through a model of one node, the standard's Attention (opset 23)."""
    from onnx import helper

    mask, operands = one_mask(case, **more), {"q": q, "k": k, "v": v}
    if mask is not None:
        if mask.ndim == 4:  # it has no mask that is the same for all queries
            mask = np.broadcast_to(mask, (*mask.shape[:2], case.queries, mask.shape[3]))
        operands["mask"] = np.ascontiguousarray(mask)
    node = helper.make_node("Attention", list(operands), ["y"], is_causal=int(case.causal))
    model = onnx_model([node], operands, case.dtype, q.shape, 23)
    return onnxruntime_call(model, operands, case.dtype, q.shape, bound)


def onnxruntime_attention_bound(case, **operands):
    """With buffers bound to the arrays."""
    return onnxruntime_attention(case, True, **operands)


# --- JAX ------------------------------------------------------------------------------------------


def jax_for(case):
    """Import jax, set up for the case."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", case.dtype == "float64")
    return jax


def jax_softmax(case, **operands):
    """Through jax.nn.softmax and its like under jit."""
    jax = jax_for(case)
    function = getattr(jax.nn, case.function)
    compiled = jax.jit(lambda **operands: function(logits(jax.numpy, **operands), case.axis))
    operands = jax.device_put(operands)
    return lambda: compiled(**operands).block_until_ready()


def jax_attention(case, q, k, v, **more):
    """Through jax.nn.dot_product_attention under jit, on arrays laid out as it wants them."""
    jax = jax_for(case)
    options = {"is_causal": case.causal, "local_window_size": case.window}
    function = jax.nn.dot_product_attention
    compiled = jax.jit(lambda q, k, v, **more: function(q, k, v, **more, **options))
    q, k, v = (np.ascontiguousarray(array.swapaxes(1, 2)) for array in (q, k, v))
    q, k, v, more = jax.device_put((q, k, v, more))

    def call():
        return compiled(q, k, v, **more).block_until_ready()

    call.restore = lambda y: y.swapaxes(1, 2)  # to [batch, heads, queries, depth]
    return call


# --- OpenVINO -------------------------------------------------------------------------------------


def openvino_tensor(array):
    """Wrap an array; it does not know the bfloat16 of ml_dtypes, but its bits."""
    import openvino

    if array.dtype.name != "bfloat16":
        return openvino.Tensor(array, shared_memory=True)
    shape = openvino.Shape(array.shape)
    return openvino.Tensor(array.view(np.int16), shape, openvino.Type.bf16)


def openvino_call(model, operands, case, shape):
    """Call a model on bound buffers; with a fresh result if the case asks for that."""
    import openvino

    precision = openvino_tensor(np.empty(0, dtype_of(case.dtype))).element_type
    properties = {
        "INFERENCE_NUM_THREADS": fs.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision.get_type_name(),  # else it may choose bfloat16
    }
    core = openvino.Core()
    if isinstance(model, bytes):
        model = core.read_model(model)
    compiled = core.compile_model(model, "CPU", properties)
    if not getattr(case, "out", True):
        arrays = list(operands.values())
        return lambda: compiled(arrays, share_inputs=True)[0]
    out, request = np.empty(shape, dtype_of(case.dtype)), compiled.create_infer_request()
    for i, array in enumerate(operands.values()):
        request.set_input_tensor(i, openvino_tensor(array))
    request.set_output_tensor(0, openvino_tensor(out))

    def call():
        request.infer()
        return out

    call.bound = operands
    return call


def openvino_softmax(case, **operands):
    """Through the model that ONNX Runtime is given."""
    return openvino_call(onnx_softmax_model(case, operands), operands, case, case.result_shape)


def openvino_attention(case, q, k, v, **more):
    """Through scaled_dot_product_attention of opset 13.

    It has as many heads in k as in q. The heads that share k and v are therefore given as so many
    queries, if there is one each; else k and v are repeated in the model.
    """
    import openvino
    from openvino import opset13 as ops

    batch, heads, kv_heads, queries, keys, depth = case.shape
    mask, grouped = one_mask(case, **more), heads != kv_heads
    if grouped and queries == 1:
        q = q.reshape(batch, kv_heads, -1, depth)
    operands = {"q": q, "k": k, "v": v} | ({} if mask is None else {"mask": mask})
    tensors = map(openvino_tensor, operands.values())
    inputs = [ops.parameter(tensor.shape, tensor.element_type) for tensor in tensors]
    nodes = list(inputs)
    if grouped and queries > 1:
        shape = np.array([batch, kv_heads, heads // kv_heads, keys, depth])
        for i in 1, 2:
            node = ops.broadcast(ops.unsqueeze(nodes[i], np.int64(2)), shape)
            nodes[i] = ops.reshape(node, np.array([batch, heads, keys, depth]), False)
    node = ops.scaled_dot_product_attention(*nodes, causal=case.causal)
    model = openvino.Model([node], inputs, "graph")
    call = openvino_call(model, operands, case, q.shape)
    call.restore = lambda y: y.reshape(batch, heads, queries, depth)
    return call


# --- all of them ----------------------------------------------------------------------------------

US, FLOOR = "fastsoftmax", "floor"
IMPLEMENTATIONS = {  # the functions of Softmax and of Attention
    US: (fastsoftmax_softmax, fastsoftmax_attention),
    FLOOR: (floor_softmax, floor_attention),
    "numpy": (numpy_softmax, numpy_attention),
    "scipy": (scipy_softmax, None),
    "torch": (torch_softmax, torch_attention),
    "torch out=": (torch_softmax_out, None),
    "onnxruntime": (onnxruntime_softmax, onnxruntime_attention),
    "onnxruntime bound": (onnxruntime_softmax_bound, onnxruntime_attention_bound),
    "jax": (jax_softmax, jax_attention),
    "openvino": (openvino_softmax, openvino_attention),
}
PEERS = tuple(name for name in IMPLEMENTATIONS if name not in (US, FLOOR))
