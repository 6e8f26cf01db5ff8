/* From C: a pointer to fsm_softmax_rows and one to fsm_compute_softmax, fetched once. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <fastsoftmax.h>

static fsm_softmax_rows_function *softmax_rows;
static fsm_compute_softmax_function *compute_softmax;

/* logsumexp(x): of a contiguous buffer of doubles. */
static PyObject *logsumexp(PyObject *self, PyObject *x) {
    Py_buffer view;
    double result;
    fsm_status status;
    (void)self;
    if (PyObject_GetBuffer(x, &view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0) return NULL;
    if (view.format[0] != 'd' || view.format[1]) {
        PyBuffer_Release(&view);
        PyErr_SetString(PyExc_TypeError, "x must hold doubles");
        return NULL;
    }
    PyThreadState *lock = PyEval_SaveThread();
    status = softmax_rows(NULL, FSM_LOGSUMEXP, FSM_F64, view.buf, 0, sizeof result, &result, 0, 0,
                          1, view.len / view.itemsize, 1);
    PyEval_RestoreThread(lock);
    PyBuffer_Release(&view);
    return status == FSM_DONE ? PyFloat_FromDouble(result) : PyErr_NoMemory();
}

/* biased(x, bias): softmax(x + bias) of bytes that are floats, by a problem of its own. */
static PyObject *biased(PyObject *self, PyObject *args) {
    const char *x, *bias;
    Py_ssize_t size, bias_size;
    fsm_problem problem = {.op = FSM_SOFTMAX, .compute = FSM_F32, .ndim = 1, .threads = 1};
    const ptrdiff_t step = sizeof(float);
    (void)self;
    if (!PyArg_ParseTuple(args, "y#y#", &x, &size, &bias, &bias_size)) return NULL;
    if (size != bias_size || size % step) return PyErr_Format(PyExc_ValueError, "sizes differ");
    PyObject *out = PyBytes_FromStringAndSize(NULL, size);
    if (!out) return NULL;
    problem.shape[0] = size / step;
    problem.reduced[0] = 1;
    problem.operand[FSM_X] = (fsm_array){(char *)x, FSM_F32, {step}};
    problem.operand[FSM_BIAS] = (fsm_array){(char *)bias, FSM_F32, {step}};
    problem.operand[FSM_OUT] = (fsm_array){PyBytes_AS_STRING(out), FSM_F32, {step}};
    if (compute_softmax(&problem) == FSM_DONE) return out;
    Py_DECREF(out);
    return PyErr_NoMemory();
}

static PyMethodDef methods[] = {{"logsumexp", logsumexp, METH_O, NULL},
                                {"biased", biased, METH_VARARGS, NULL},
                                {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "plain", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_plain(void) {
    softmax_rows = (fsm_softmax_rows_function *)fsm_import("softmax_rows");
    compute_softmax = (fsm_compute_softmax_function *)fsm_import("compute_softmax");
    return softmax_rows && compute_softmax ? PyModule_Create(&module) : NULL;
}
