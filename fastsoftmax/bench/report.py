"""What is said of the measurements: tables and plots."""

import math
import statistics

import numpy as np

from .peers import FLOOR, PEERS, US

# --- text -----------------------------------------------------------------------------------------


def table(rows, header, file=None):
    """Print rows of cells below a header; columns of numbers, but for the first, to the right."""
    rows = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    columns = list(zip(*rows[1:], strict=True))
    numeric = [False, *(any(c[:1].isdigit() for c in column) for column in columns[1:])]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        cells = zip(row, widths, numeric, strict=True)
        line = "  ".join(c.rjust(w) if right else c.ljust(w) for c, w, right in cells)
        print(line.rstrip(), file=file)


def markdown(tables, path):
    """Write tables, each a header and rows, as they stand in docs/explanation."""
    text = ""
    for header, rows in tables:
        under = ["---", *["--:"] * (len(header) - 1)]
        lines = (" | ".join(map(str, cells)) for cells in (header, under, *rows))
        text += "\n" * bool(text) + "".join(f"| {line} |\n" for line in lines)
    path.write_text(text)


def duration(seconds):
    """Print a time with three digits: 711 us."""
    unit, name = (1e-3, "ms") if seconds >= 1e-3 else (1e-6, "us")
    value = seconds / unit
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {name}"


def cell(value, show):
    """Show a number; a word as it is."""
    return value if isinstance(value, str) else show(value)


# --- speed: results are [{group, case, work, unit, seconds: {name: number or word}}] --------------


def names_in(results):
    """The implementations that have a number anywhere."""
    names = dict.fromkeys(name for result in results for name in result["seconds"])
    return [n for n in names if any(not isinstance(r["seconds"][n], str) for r in results)]


def fastest_peer(result):
    """The time of the fastest peer; NaN if none has one."""
    times = [t for n, t in result["seconds"].items() if n in PEERS and not isinstance(t, str)]
    return min(times, default=math.nan)


def speed_tables(results):
    """For Markdown: our time, that over the floor's, and those of the peers over ours."""
    peers = [name for name in names_in(results) if name in PEERS]
    header = ["case", "time", "time / floor", *(n.replace("onnxruntime b", "b") for n in peers)]
    rows = []
    for result in results:
        ours = duration(result["seconds"][US])
        rows.append([result["case"], ours, over_floor(result), *ratios(result, peers)])
        if peers:
            rows[-1].append(f"**{fastest(result)}**".replace("**-**", "-"))
    return [([*header, *(["fastest"] if peers else [])], rows)]


def over_floor(result):
    """Our time / that of the floor, as text."""
    ours = result["seconds"][US]
    return cell(result["seconds"].get(FLOOR, "-"), lambda t: f"{ours / t:.2f}")


def ratios(result, peers):
    """The time of each peer / our time, as text."""
    ours = result["seconds"][US]
    return [cell(result["seconds"][name], lambda t: f"{t / ours:.2f}") for name in peers]


def fastest(result):
    """The time of the fastest peer / our time, as text."""
    ratio = fastest_peer(result) / result["seconds"][US]
    return "-" if math.isnan(ratio) else f"{ratio:.2f}"


def print_speed(results, file=None):
    """Print the times; the rate and the ratios; the means of the groups."""
    names = names_in(results)
    peers = [name for name in names if name in PEERS]
    print("time of one call; wrong: the result is off; -: not supported\n", file=file)
    rows = [[r["case"], *(cell(r["seconds"][n], duration) for n in names)] for r in results]
    table(rows, ["", *names], file)

    print(
        "\nrate of fastsoftmax; time of fastsoftmax / the floor; time of each peer, and of the\n"
        "fastest one, / time of fastsoftmax: above 1, fastsoftmax is faster\n",
        file=file,
    )
    rows = []
    for result in results:
        rate = f"{result['work'] / result['seconds'][US] / 1e9:.3g} {result['unit']}"
        rows.append([result["case"], rate, over_floor(result), *ratios(result, peers)])
        if peers:
            rows[-1].append(fastest(result))
    table(rows, ["", "rate", "floor", *peers, *(["fastest"] if peers else [])], file)

    if peers:
        print("\ntime of the fastest peer of each case / time of fastsoftmax\n", file=file)
        groups = {}
        for result in results:
            if not math.isnan(ratio := fastest_peer(result) / result["seconds"][US]):
                groups.setdefault(result["group"], []).append(ratio)
        groups["all"] = [ratio for ratios in groups.values() for ratio in ratios]
        rows = [
            [group, len(ratios), f"{statistics.geometric_mean(ratios):.2f}", f"{min(ratios):.2f}"]
            for group, ratios in groups.items()
        ]
        table(rows, ["group", "cases", "geometric mean", "least"], file)
    print(
        "\nfloor: copying the array with np.copyto in as many threads (one below 1 MB), for\n"
        "logsumexp and decode reading it, k and v; of other attention the time that as many\n"
        "float32 FMAs take, in registers",
        file=file,
    )


# --- growth: results are [{title, of, sizes, seconds: {name: [number or word, one per size]}}] ----


def exponent(sizes, seconds):
    """Fit time = a * size ** exponent; NaN unless there are two numbers."""
    pairs = [(n, t) for n, t in zip(sizes, seconds, strict=True) if not isinstance(t, str)]
    if len(pairs) < 2:
        return math.nan
    return float(np.polyfit(*np.log(np.transpose(pairs)), 1)[0])


def growth_tables(results):
    """For Markdown: a row for each case, a table for those that grow alike."""
    tables = {}
    for result in results:
        header = *(f"{result['of']} = {short(n)}" for n in result["sizes"]), "exponent"
        for name, times in result["seconds"].items():
            title = result["title"] if name == US else f"{result['title']}, {name}"
            fitted = f"{exponent(result['sizes'], times):.2f}"
            row = [title, *(cell(t, duration) for t in times), fitted]
            tables.setdefault(header, []).append(row)
    return [(["", *header], rows) for header, rows in tables.items()]


def short(n):
    """Write 1024 as 1k."""
    return f"{n:g}" if n < 1024 else f"{n / 1024:g}k"


def print_growth(results, file=None):
    """Print the times for each size and the fitted exponents."""
    print("time of one call; exponent: of time = a * size ** exponent, fitted to them", file=file)
    for result in results:
        rows = [
            [name, *(cell(t, duration) for t in times), f"{exponent(result['sizes'], times):.2f}"]
            for name, times in result["seconds"].items()
            if not all(isinstance(t, str) for t in times)
        ]
        sizes = [f"{result['of']}={n}" for n in result["sizes"]]
        print(file=file)
        table(rows, [result["title"], *sizes, "exponent"], file)


# --- accuracy: results are [{dtype, distribution, ulp: {name: number or word}}] -------------------


def accuracy_tables(results):
    """For the terminal and for Markdown: a table for each dtype."""
    tables = {}
    for result in results:
        row = [result["distribution"], *(cell(e, "{:.2f}".format) for e in result["ulp"].values())]
        tables.setdefault((result["dtype"], *result["ulp"]), []).append(row)
    return list(tables.items())


def overview_tables(results):
    """For Markdown: both, with the words of the picture."""
    speed = [result | {"case": result["group"]} for result in results["speed"]]
    return [*accuracy_tables(results["accuracy"]), *speed_tables(speed)]


# --- plots ----------------------------------------------------------------------------------------

COLOURS = {
    **{US: "black", FLOOR: "grey", "numpy": "tab:blue", "scipy": "tab:cyan"},
    **{"torch": "tab:red", "torch out=": "tab:pink", "jax": "tab:green"},
    **{"onnxruntime": "tab:olive", "onnxruntime bound": "tab:orange", "openvino": "tab:purple"},
}
# What is farther is drawn there, as an arrow.
FARTHEST = 12  # times slower
MOST_ULP = 10_000


def figure(width, height, rows=1, columns=1):
    """Make a figure and its axes, without a window."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("--plot needs matplotlib: python -m pip install matplotlib") from None
    fig = Figure((width, height), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False)


def save(fig, path):
    """Write the figure; an SVG of the same numbers has the same bytes, and text that is text."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "fastsoftmax", "svg.fonttype": "none"}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        fig.savefig(path, dpi=150, metadata=metadata)


def draw_speed(ax, results, labels):
    """Draw a row for each case: how many times as long as fastsoftmax the others take."""
    rows = range(len(results))
    for name in names_in(results):
        times = [result["seconds"][name] for result in results]
        ratios = np.array([
            math.nan if isinstance(t, str) else t / result["seconds"][US]
            for t, result in zip(times, results, strict=True)
        ])  # fmt: skip
        style = {"color": COLOURS[name], "linestyle": "", "markersize": 6}
        if name == US:
            ax.axvline(1, color=COLOURS[US], linewidth=1.5, label=name)
            continue
        near, far = ratios <= FARTHEST, ratios > FARTHEST
        marker = "|" if name == FLOOR else "o"
        ax.plot(np.where(near, ratios, np.nan), rows, marker=marker, label=name, **style)
        ax.plot(np.where(far, 1.05 * FARTHEST, np.nan), rows, marker=">", **style)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.set_xlabel("time / time of fastsoftmax: above 1, fastsoftmax is faster")
    one_row_each(ax, labels)


def draw_accuracy(ax, results):
    """Draw a row for each distribution: the largest errors in ulp."""
    names = list(results[0]["ulp"])
    for j, name in enumerate(names):
        rows = np.arange(len(results)) + 0.6 * ((j + 0.5) / len(names) - 0.5)  # equal, yet seen
        errors = [math.nan if isinstance(e, str) else e for e in (r["ulp"][name] for r in results)]
        errors = np.array(errors, float)
        style = {"color": COLOURS[name], "linestyle": "", "markersize": 4}
        ax.plot(np.where(errors <= MOST_ULP, errors, np.nan), rows, "o", label=name, **style)
        ax.plot(np.where(errors > MOST_ULP, 1.2 * MOST_ULP, np.nan), rows, ">", **style)
    ax.axvline(2, color=COLOURS[US], linewidth=1, linestyle=":")
    ax.set(xscale="log", xlabel="largest error in ulp")
    one_row_each(ax, [result["distribution"] for result in results])


def one_row_each(ax, labels):
    """Label the rows of a panel, the first one at the top."""
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.grid(color="0.9")
    ax.set_axisbelow(True)


def legend(fig, axes, columns):
    """Say below the panels what has which colour."""
    handles = {}
    for ax in axes:
        found = zip(*ax.get_legend_handles_labels(), strict=True)
        handles |= {name: handle for handle, name in found if name not in handles}
    style = {"loc": "outside lower center", "frameon": False, "fontsize": "small"}
    fig.legend(handles.values(), handles, ncols=columns, **style)


def plot_speed(results, title, path):
    """Draw the ratios of every case."""
    fig, ((ax,),) = figure(9, 1.6 + 0.26 * len(results))
    draw_speed(ax, results, [result["case"] for result in results])
    ax.set_title(title, fontsize="medium")
    legend(fig, [ax], 5)
    save(fig, path)


def plot_overview(results, title, path):
    """Draw accuracy and speed side by side."""
    fig, axes = figure(12, 4.6, 1, 2)
    draw_accuracy(axes[0, 0], results["accuracy"])
    draw_speed(axes[0, 1], results["speed"], [result["group"] for result in results["speed"]])
    axes[0, 0].set_title("Accuracy: softmax of float32, distributions of logits", fontsize="medium")
    axes[0, 1].set_title("Speed", fontsize="medium")
    fig.suptitle(title, fontsize="small", color="0.4")
    legend(fig, [axes[0, 1], axes[0, 0]], 8)
    save(fig, path)


def plot_growth(results, title, path):
    """Draw time against size, a panel for each thing that grows."""
    columns = min(4, len(results))
    rows = math.ceil(len(results) / columns)
    fig, axes = figure(3.4 * columns, 1 + 3 * rows, rows, columns)
    for ax in axes.flat[len(results) :]:
        ax.set_visible(False)
    lines = {}
    for ax, result in zip(axes.flat, results, strict=False):
        for name, times in result["seconds"].items():
            times = [math.nan if isinstance(t, str) else t for t in times]
            lines[name] = ax.plot(result["sizes"], times, ".-", color=COLOURS[name])[0]
        ax.set(yscale="log", xlabel=result["of"], ylabel="seconds")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda x, _: short(x))
        ax.set_title(result["title"], fontsize="small")
        ax.grid(color="0.9")
    fig.suptitle(title, fontsize="medium")
    fig.legend(lines.values(), lines, loc="outside lower center", ncols=5, frameon=False)
    save(fig, path)


def plot_accuracy(results, title, path):
    """Draw the errors of every distribution, a panel for each dtype."""
    dtypes = list(dict.fromkeys(result["dtype"] for result in results))
    fig, axes = figure(4.5 * len(dtypes) + 1, 5, 1, len(dtypes))
    for ax, dtype in zip(axes[0], dtypes, strict=True):
        draw_accuracy(ax, [result for result in results if result["dtype"] == dtype])
        ax.set_title(dtype)
    fig.suptitle(title, fontsize="medium")
    legend(fig, axes[0], 4)
    save(fig, path)
