"""``fastsoftmax apply IN.npy OUT.npy``: softmax of an array in a file, which may exceed the memory.

Both files are mapped. The array is done in blocks of whole rows, each of which is read, calculated
into a small array and written; so the memory in use is that of a block, whichever the axis is. Only
where a single row is larger than a block is it handed over as it lies in the file.

OUT appears at once and complete, or not at all: everything goes to a temporary file beside it,
which is given its name when it is safely on the disk, and is removed if anything goes wrong.
"""

import contextlib
import math
import mmap
import os
import signal
import stat
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

from . import _core

BLOCK = 64 << 20  # bytes of a block, about


class _Refused(Exception):
    """What the user is told, in one line."""


def add_arguments(command):
    """Add the arguments of the command to its parser."""
    command.add_argument("source", type=Path, metavar="IN.npy", help="the logits")
    command.add_argument("target", type=Path, metavar="OUT.npy", help="replaced if it exists")
    command.add_argument("--axis", type=int, default=-1, help="default: the last")
    about = "float16, float32, float64 or bfloat16 (which numpy.load reads as |V2: view it); "
    about += "default: that of IN, float64 for integers"
    command.add_argument("--dtype", help=about)
    command.add_argument("--temperature", type=float, help="divides the logits")
    command.add_argument("--log", action="store_true", help="log_softmax")


def run(args):
    """Run the command; the exit status: 0, 2 if it cannot be done, 130 after Ctrl-C."""
    try:
        with _terminated_as_interrupted():
            _apply(args)
        return 0
    except KeyboardInterrupt:
        status, why = 130, "interrupted"  # 128 + SIGINT, as shells have it
    except MemoryError:
        status, why = 2, "not enough memory"
    except OSError as error:
        status, why = 2, _of_file(error)
    except (_Refused, TypeError, ValueError) as error:
        status, why = 2, str(error)
    print(f"fastsoftmax apply: {why}".replace("\n", " "), file=sys.stderr)
    return status


def _of_file(error):
    names = [str(n) for n in (error.filename, error.filename2) if n]
    return ": ".join([*names[:1], error.strerror or str(error)])


def _apply(args):
    x = _open(args.source)
    if args.target.exists() and os.path.samefile(args.source, args.target):
        raise _Refused(f"IN and OUT are the same file, {args.source}")
    target = args.target
    if target.is_dir():
        raise _Refused(f"{target} is a folder")
    if target.exists() and not target.is_file():
        raise _Refused(f"{target} is not a file but a device or a pipe")
    if target.is_symlink():  # it stays one
        target = Path(os.path.realpath(target))
    function = _core.log_softmax if args.log else _core.softmax
    options = {"temperature": args.temperature, "dtype": _dtype(args.dtype)}
    # One entry finds out what is wrong with the rest, and the dtype of the result.
    one = np.zeros((1,) * x.ndim, x.dtype)
    options["dtype"] = function(one, args.axis, **options).dtype
    with _appearing(target) as file:
        y = _create(file, target, x.shape, options["dtype"])
        for block in _progress(list(_blocks(x.shape, args.axis, x.itemsize))):
            if x[block].nbytes <= 4 * BLOCK:
                y[block] = function(x[block], args.axis, **options)
            else:
                function(x[block], args.axis, temperature=args.temperature, out=y[block])
            _forget(x, y)
        if x.size:
            y.flush()


@contextlib.contextmanager
def _terminated_as_interrupted():
    """SIGTERM cleans up as Ctrl-C does. Only the main thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _open(path):
    with open(path, "rb") as file:
        magic = file.read(len(np.lib.format.MAGIC_PREFIX))
    if magic != np.lib.format.MAGIC_PREFIX:
        raise _Refused(f"cannot read {path}: it is not an .npy file")
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError, SyntaxError, OverflowError) as error:
        raise _Refused(
            f"cannot read {path}: damaged, cut short or not of numbers ({error})"
        ) from None


def _dtype(name):
    if name != "bfloat16":
        return name
    try:
        import ml_dtypes
    except ImportError:
        raise _Refused("--dtype bfloat16 needs the package ml_dtypes") from None
    return ml_dtypes.bfloat16


def _blocks(shape, axis, itemsize):
    """Yield the indices of blocks of whole rows, each of BLOCK bytes at the most or of one row.

    The last dimensions are kept whole as long as they fit: a block lies in few places of the file.
    """
    if math.prod(shape) == 0:
        return
    ndim = len(shape)
    kept = axis % ndim if ndim else 0
    step, left = list(shape), max(1, BLOCK // itemsize)
    for d in range(ndim):
        if d != kept:
            rest = math.prod(step[d + 1 :]) * (step[kept] if kept < d else 1)
            step[d] = min(shape[d], max(1, left // rest))
    steps = [range(0, size, by) for size, by in zip(shape, step, strict=True)]
    for at in np.ndindex(*map(len, steps)):
        starts = [s[i] for s, i in zip(steps, at, strict=True)]
        yield tuple(slice(a, a + by) for a, by in zip(starts, step, strict=True))


def _create(file, path, shape, dtype):
    """Write the header of an array; map the array, if it has any entry, into room on the disk."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    file.flush()
    start, size = file.tell(), math.prod(shape) * dtype.itemsize
    if size == 0:
        return None
    try:
        _reserve(file.fileno(), start, size)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from None
    return np.memmap(file, dtype, "r+", start, shape)


def _reserve(descriptor, start, size):
    """Make the file this long, on the disk: a full one must be known now.

    To write to a mapped page for which there is no room would end the process.
    """
    if hasattr(os, "posix_fallocate"):
        with contextlib.suppress(InterruptedError):
            os.posix_fallocate(descriptor, start, size)
            return
    zeros = bytes(min(size, 1 << 20))
    os.lseek(descriptor, start, os.SEEK_SET)
    while size > 0:
        size -= os.write(descriptor, zeros[:size])


@contextlib.contextmanager
def _appearing(path):
    """Give a temporary file that becomes `path` at the end, unless an exception comes first."""
    try:
        descriptor, name = tempfile.mkstemp(".tmp", f".{path.name}.", path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, _mode(path))  # mkstemp's is private
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    with contextlib.suppress(OSError, AttributeError):  # not every system can sync a folder
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _mode(path):
    """Return the permissions that opening a file to write would leave it: its own, if it exists."""
    with contextlib.suppress(FileNotFoundError):
        return stat.S_IMODE(os.stat(path).st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _forget(*maps):
    """Tell the system that the pages of these maps are not needed for now."""
    for array in maps:
        inner = getattr(array, "_mmap", None)
        if hasattr(inner, "madvise"):
            inner.madvise(mmap.MADV_DONTNEED)


def _progress(blocks):
    """Show a bar where someone may look at it, if tqdm is there (the extra `progress`)."""
    if not sys.stderr.isatty():
        return blocks
    try:
        from tqdm import tqdm
    except ImportError:
        return blocks
    return tqdm(blocks, unit="block", leave=False)
