# cross_entropy and its gradient: a part of _core.pyx, whose helpers they share.

_REDUCTIONS = ("mean", "sum", "none")


cdef _loss_arguments(fsm_problem *problem, fsm_op op, logits, labels, axis, weight, reduction,
                     ignore_index, label_smoothing):
    """Checks the arguments and enters logits and labels. Returns what must outlive the problem,
    logits and labels; the compute type; the weight of each class and of each row, in float64, or
    None; the number of rows that count, or the sum of their weights; and the smoothing."""
    cdef int d
    cdef object given = _as_integers(labels, "labels", "an array of integers, the classes")
    cdef ndarray x = _as_array(logits, "logits")
    if not isinstance(reduction, str) or reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if x.ndim == 0:
        raise ValueError("logits must have a dimension of classes, got shape ()")
    axis, ignored = _as_index(axis, "axis"), _as_index(ignore_index, "ignore_index")
    smoothing = _as_number(label_smoothing, "label_smoothing", np.dtype(np.float64))
    if not 0 <= smoothing <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {smoothing}")
    _begin(problem, op, x, axis)
    shape = ()
    for d in range(x.ndim):
        if not problem.reduced[d]:
            shape += (x.shape[d],)
    classes = np.shape(x)[axis]  # not x.shape, which is a pointer here
    if given.shape != shape:
        raise ValueError("labels must have the shape of logits without axis, "
                         f"{shape}, got {given.shape}")
    seen = given != ignored
    least, most = given.min(where=seen, initial=0), given.max(where=seen, initial=0)
    if seen.any() and (least < 0 or most >= classes):
        raise ValueError(f"labels must be from 0 to {classes - 1} or ignore_index, {ignored}, got "
                         f"{least if least < 0 else most}")
    places = np.where(seen, np.where(seen, given, 0).astype(np.int64), -1)

    compute = _compute_dtype(x.dtype, None, None)
    problem.compute = <fsm_dtype><int>_code(compute)
    rows, total = None, np.count_nonzero(seen)
    if weight is not None:
        weight = _as_floats(weight, "weight", np.float64)
        if np.shape(weight) != (classes,):
            raise ValueError(f"weight must have shape ({classes},), one number for each class, got "
                             f"{np.shape(weight)}")
        with np.errstate(all="ignore"):
            weight = weight.astype(np.float64)
            rows = weight[places] if classes else 0.0
            rows = np.where(seen, rows, 0)
            total = rows.sum()
    _describe(problem, FSM_X, x)
    _describe_reduced(problem, FSM_LABEL, places, False)
    return x, places, compute, weight, rows, total, smoothing


cdef _as_index(value, name):
    try:
        return index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r:.40}") from None


cdef _smoothed(losses, x, axis, places, weight, rows, smoothing):
    """The losses with smooth labels. The share of all classes, the mean of weight * (lse - x_j), is
    taken from the loss lse - x_label, so that a large offset of the logits cancels exactly."""
    classes = np.moveaxis(x, axis, -1)
    n = classes.shape[-1]
    label = np.take_along_axis(classes, np.maximum(places, 0)[..., None], -1)[..., 0]
    if weight is None:
        total, logits = n, classes.sum(-1, dtype=np.float64)
    else:
        total = weight.sum()
        logits = np.einsum("...c,c->...", classes, weight, dtype=np.float64, casting="unsafe")
    losses = losses.astype(np.float64)
    every = total * losses + (total * label.astype(np.float64) - logits)
    every = np.where(np.isfinite(logits), every, -logits)
    return (1 - smoothing) * losses * (1 if rows is None else rows) + smoothing / n * every


cdef _cross_entropy(logits, labels, axis, weight, reduction, ignore_index, label_smoothing):
    cdef fsm_problem problem
    x, places, compute, weight, rows, total, smoothing = _loss_arguments(
        &problem, FSM_CROSS_ENTROPY, logits, labels, axis, weight, reduction, ignore_index,
        label_smoothing)
    result = _result_dtype(x.dtype, None, None)
    plain = rows is None and not smoothing and reduction == "none"
    losses = np.zeros(places.shape, result if plain else compute)
    _describe_reduced(&problem, FSM_OUT, losses, False)
    _run(&problem)
    with np.errstate(all="ignore"):
        if smoothing and x.size:
            losses = _smoothed(losses, x, axis, places, weight, rows, smoothing)
            losses = np.where(places < 0, 0, losses)
        elif rows is not None:
            losses = np.where(places < 0, 0, losses * rows)
        if reduction == "none":
            losses = losses.astype(result, copy=False)
            return losses if losses.ndim else losses[()]
        # One number a row is left, which NumPy adds up in pairs.
        loss = losses.sum(dtype=np.float64)
        if reduction == "mean":  # of no weight at all it is NaN, whatever smoothing adds
            loss = loss / total if total else np.float64(np.nan)
        return np.asarray(loss).astype(result)[()]


cdef _smooth_gradients(dx, places, weight, every):
    """Takes weight * every off the gradients of each row, and adds their sum at its label."""
    n = dx.shape[-1]
    step = (1 << 16) // max(1, places.size) + 1  # classes whose products are held at a time
    for c in range(0, n, step):
        products = every[..., None] * (1 if weight is None else weight[c:c + step])
        np.subtract(dx[..., c:c + step], products, out=dx[..., c:c + step], casting="same_kind")
    at = np.maximum(places, 0)[..., None]
    more = (every * (n if weight is None else weight.sum()))[..., None]
    np.put_along_axis(dx, at, np.take_along_axis(dx, at, -1) + more, -1)
    if not np.isfinite(every).all():  # inf - inf is a NaN with a sign
        np.copyto(dx, np.nan, where=np.isnan(dx))


cdef _cross_entropy_backward(grad, logits, labels, axis, weight, reduction, ignore_index,
                             label_smoothing, out):
    cdef fsm_problem problem
    y = _as_out(out)
    x, places, compute, weight, rows, total, smoothing = _loss_arguments(
        &problem, FSM_CROSS_ENTROPY_BACKWARD, logits, labels, axis, weight, reduction, ignore_index,
        label_smoothing)
    grad = _as_floats(grad, "grad", np.float64)
    shape = places.shape if reduction == "none" else ()
    if np.shape(grad) != shape:
        raise ValueError(f"grad must have the shape of the loss, {shape}, got {np.shape(grad)}")
    result = _result_dtype(x.dtype, None, y)
    if out is not None:
        _check_out(y, np.shape(x))
        compute = _compute_dtype(x.dtype, None, result)
        problem.compute = <fsm_dtype><int>_code(compute)
        x = _apart(x, y, True)
        _describe(&problem, FSM_X, x)
    with np.errstate(all="ignore"):
        grads = grad.astype(np.float64)
        if reduction == "mean":
            grads = grads / total
        share = 0
        if smoothing and x.size:
            n = np.shape(x)[axis]
            every = np.where(places < 0, 0, grads * (smoothing / n))
            share = every * (n if weight is None else weight.sum())
            grads = grads * (1 - smoothing)
        if rows is not None:
            grads = grads * rows
        grads = np.broadcast_to(np.asarray(grads + share, compute), places.shape)
    if out is None:
        y = np.empty_like(x, result, subok=False)
    # Where more is to be added it is not rounded to a half before.
    dx = np.empty(np.shape(x), compute) if smoothing and y.dtype != compute else y
    _describe_reduced(&problem, FSM_GRAD, grads, False)
    _describe(&problem, FSM_OUT, dx)
    _run(&problem)
    if smoothing and x.size:
        with np.errstate(all="ignore"):
            _smooth_gradients(np.moveaxis(dx, axis, -1), places, weight, every)
            if dx is not y:
                y[...] = dx
    return y if out is None else out


def cross_entropy(logits, labels, /, axis=-1, *, weight=None, reduction="mean", ignore_index=-100,
                  label_smoothing=0.0):
    """Cross entropy of classes under the softmax of logits: ``logsumexp(logits) - logits[label]``.

    The probabilities are never stored: the logits are read twice, and nothing of their size is
    written. A loss close to 0 is as accurate as a large one.

    Parameters
    ----------
    logits : array_like
        Scores of the classes along axis: float16, bfloat16 (of ml_dtypes), float32 or float64;
        integers are taken as float64. Any strides are read where they lie.
    labels : array_like of int
        The class of each row, from 0 to the number of classes - 1, or ignore_index; of the shape of
        logits without axis.
    axis : int, default -1
        The axis of the classes.
    weight : array_like, optional
        A number for each class: the loss of a row is multiplied by that of its label.
    reduction : {"mean", "sum", "none"}
        The mean over the rows that are not ignored (with weight: divided by the sum of their
        weights), their sum, or the loss of each row.
    ignore_index : int, default -100
        Rows with this label are ignored, whatever their logits are: their loss is 0.
    label_smoothing : float, default 0.0
        From 0 to 1: how much of each label is spread evenly over all classes. The loss of a row is
        ``(1 - s) * weight[label] * (lse - x[label]) + s / n * sum(weight * (lse - x))`` then, s
        being label_smoothing and n the number of classes.

    Returns
    -------
    NumPy scalar or ndarray
        In the dtype of logits (float64 for integers). "none": of the shape of labels, else a
        scalar. The mean of no rows is NaN. A row with NaN or +inf, or of -inf only, is NaN.

    Raises
    ------
    TypeError
        For a dtype that is not supported, a masked array, labels, axis or ignore_index that are not
        integers.
    ValueError
        For shapes that do not fit, a label out of range, an unknown reduction, a label_smoothing
        out of range.
    numpy.exceptions.AxisError
        For an axis that logits does not have.

    See Also
    --------
    cross_entropy_backward, log_softmax

    Notes
    -----
    Semantics: `torch.nn.functional.cross_entropy` with class indices, but axis is the last one by
    default. Largest error of the loss of a row in float32: 4 ulp, plus n * 2**-45 for n classes.
    With label_smoothing the logits are read once more, and their sum is NumPy's, in float64.

    Examples
    --------
    >>> import numpy as np
    >>> from fastsoftmax import cross_entropy
    >>> logits = np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0], [9.0, 9.0, 9.0]])
    >>> cross_entropy(logits, [0, 2, -100], reduction="none").round(4)
    array([0.4076, 1.0986, 0.    ])
    >>> round(float(cross_entropy(logits, [0, 2, -100])), 4)
    0.7531
    """
    cdef fenv_t callers = _own_environment()
    try:
        return _cross_entropy(logits, labels, axis, weight, reduction, ignore_index,
                              label_smoothing)
    finally:
        fesetenv(&callers)


def cross_entropy_backward(grad, logits, labels, /, axis=-1, *, weight=None, reduction="mean",
                           ignore_index=-100, label_smoothing=0.0, out=None):
    """Gradient of :func:`cross_entropy`: ``(softmax(logits) - onehot(labels)) * grad`` of each row.

    Parameters
    ----------
    grad : array_like
        Gradient with respect to the loss, of its shape: a number, or with reduction "none" one for
        each row.
    logits, labels, axis, weight, reduction, ignore_index, label_smoothing
        As in the forward call.
    out : ndarray, optional
        Where to put the result; of the shape of logits and a floating type. It may be logits.

    Returns
    -------
    ndarray
        Gradient with respect to the logits, in their dtype (float64 for integers) or that of out. 0
        in rows that are ignored.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As for :func:`cross_entropy`; for a grad or out that does not fit.

    Notes
    -----
    Largest error in float32: 4 ulp, at the label, too, where ``p - 1`` does not cancel, but for
    ``abs(grad) * n * 2**-45`` there, of n classes; one more for the rounding of the row's
    ``grad / n``; with label_smoothing 4 of the larger of that and the result, and float16 and
    bfloat16 results are kept once in float32.

    Examples
    --------
    >>> import numpy as np
    >>> from fastsoftmax import cross_entropy_backward
    >>> logits = np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0], [9.0, 9.0, 9.0]])
    >>> cross_entropy_backward(1.0, logits, [0, 2, -100]).round(4)
    array([[-0.1674,  0.1224,  0.045 ],
           [ 0.1667,  0.1667, -0.3333],
           [ 0.    ,  0.    ,  0.    ]])
    """
    cdef fenv_t callers = _own_environment()
    try:
        return _cross_entropy_backward(grad, logits, labels, axis, weight, reduction, ignore_index,
                                       label_smoothing, out)
    finally:
        fesetenv(&callers)
