"""Figures: loss, KL against step, samples beside data. matplotlib is imported when a figure is drawn.

Each function draws on a new figure and returns it; nothing global is changed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Real

from probdiff._checks import AnyArray
from probdiff.chain.schedules import AbstractSchedule

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure
    import pandas
    import xarray

MOST_PAIRS = 6  # columns
FEW_VALUES = 12  # distinct values of a column that are shown one by one


def _figure(columns: int = 1, width: float = 7.0, height: float = 4.2) -> tuple["matplotlib.figure.Figure", np.ndarray]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def plot_loss(losses: Float[AnyArray, "iteration"], validation: Float[AnyArray, "row 2"], title: str = "") -> "matplotlib.figure.Figure":
    """The bound against iteration: each minibatch (light), its running mean, and the validation data.

    Args:
        losses: Negative bound of each iteration, nats per datum, shape ``(iteration,)``; NaN is not drawn.
        validation: Rows of (iteration, bound in nats per datum); may be empty.
        title: Title of the figure.

    Example:
        >>> import numpy as np, probdiff
        >>> figure = probdiff.plots.plot_loss(np.linspace(3.0, 1.0, 20), np.zeros((0, 2)))
        >>> figure.axes[0].get_ylabel()
        'ELBO, nats per datum'
    """
    figure, (axes,) = _figure()
    finite = np.isfinite(losses)
    iteration = np.flatnonzero(finite) + 1
    bound = -np.asarray(losses, np.float64)[finite]
    axes.plot(iteration, bound, lw=0.4, alpha=0.3, color="C0", label="minibatch, one step per datum")
    window = max(1, min(500, len(bound) // 10))
    running = np.convolve(bound, np.ones(window) / window, "valid")
    axes.plot(iteration[window - 1 :], running, color="C0", label=f"mean of {window} iterations")
    shown = running[len(running) // 10 :]
    if len(validation):
        axes.plot(validation[:, 0], validation[:, 1], "o-", ms=3, color="C1", label="validation, averaged parameters")
        shown = np.concatenate([shown, validation[len(validation) // 10 :, 1]])
    low, high = shown.min(), shown.max()
    axes.set(xlabel="iteration", ylabel="ELBO, nats per datum", title=title)
    margin = max(0.25 * (high - low), 1e-3)
    axes.set_ylim(low - margin, high + margin)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    return figure


def plot_step_kl(tree: "xarray.DataTree", schedule: AbstractSchedule, title: str = "") -> "matplotlib.figure.Figure":
    """The KL of each step: mean over draws and data, and bands over data.

    Args:
        tree: The DataTree of :func:`~probdiff.to_datatree`.
        schedule: The noise schedule, for the second axis.
        title: Title of the figure.

    Example:
        >>> import jax, probdiff
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), lambda z, n: 0 * z)
        >>> terms = probdiff.elbo_terms(diffusion, jax.numpy.zeros((3, 2)), key=jax.random.key(1), num_draws=4)
        >>> probdiff.plots.plot_step_kl(probdiff.to_datatree(terms), diffusion.schedule).axes[0].get_xlabel()
        'step n'
    """
    figure, (axes,) = _figure()
    step_kl = tree["per_step"].dataset["step_kl"]
    step = step_kl["step"].values
    if len(step) == 0:
        axes.text(0.5, 0.5, "N = 1: there are no step KLs", ha="center", transform=axes.transAxes)
        return figure
    per_datum = step_kl.mean(("chain", "draw")).values
    num_draws = step_kl.sizes["chain"] * step_kl.sizes["draw"]
    for mass, alpha in ((0.9, 0.2), (0.5, 0.35)):
        low, high = np.quantile(per_datum, [(1 - mass) / 2, (1 + mass) / 2], axis=1)
        axes.fill_between(step, low, high, color="C0", alpha=alpha, lw=0, label=f"{mass:.0%} of {per_datum.shape[1]} items")
    axes.plot(step, per_datum.mean(1), color="C0", lw=1.5, label="mean")
    axes.set(xlabel="step n", ylabel=f"KL of step n, nats (mean of {num_draws} draws)", title=title, ylim=(0, None))
    axes.set_xlim(1, schedule.num_steps)
    axes.legend(fontsize="small")
    snr = axes.secondary_xaxis("top")
    ticks = np.unique(np.linspace(1, schedule.num_steps, 7).round().astype(int))
    snr.set_xticks(ticks, [f"{schedule.log_snr[n - 1]:.1f}" for n in ticks])
    snr.set_xlabel("log-SNR")
    return figure


def plot_samples(
    samples: Real[AnyArray, "sample dim"],
    data: Real[AnyArray, "datum dim"],
    image_shape: Sequence[int] | None = None,
    title: str = "",
    names: tuple[str, str] = ("data", "samples from the model"),
) -> "matplotlib.figure.Figure":
    """Samples beside data: as images, or as points of a plane. For tables there are :func:`plot_marginals` and :func:`plot_pairs`.

    Args:
        samples: Draws from the model, shape ``(sample, dim)``.
        data: Data, shape ``(datum, dim)``.
        image_shape: Shape of a datum as an image; None for points. If there are more than two dimensions, the first two are shown.
        title, names: The title of the figure, and the titles of its two panels, that of the data first.

    Example:
        >>> import numpy as np, probdiff
        >>> x = np.random.default_rng(0).normal(size=(2, 10, 2))
        >>> figure = probdiff.plots.plot_samples(samples=x[0], data=x[1])  # figure.savefig("samples.png")
        >>> len(figure.axes)
        2
    """
    panels = tuple(zip(names, (np.asarray(data), np.asarray(samples))))
    low, high = panels[0][1].min(0), panels[0][1].max(0)
    span = np.where(high > low, high - low, 1)
    margin = 0.1 * span
    figure, axes = _figure(2, width=8.0, height=4.6 if image_shape else 1.1 + np.clip(3.6 * span[1] / span[0], 1.2, 7.2))
    figure.suptitle(title, wrap=True)
    if image_shape is not None:
        figure.set_layout_engine("constrained", wspace=0.08)  # wider than the gaps between images
    for ax, (name, points) in zip(axes, panels):
        ax.set_title(name if len(points) == 1 else f"{name} (n = {len(points)})", fontsize="medium")
        if image_shape is not None:
            ax.imshow(_tiled(points, image_shape), cmap="gray", vmin=np.nanmin(panels[0][1]), vmax=np.nanmax(panels[0][1]))
            ax.set_axis_off()
        else:
            ax.scatter(points[:, 0], points[:, 1], s=_marker_size(len(points)), alpha=0.5, lw=0)
            ax.set(xlabel="x[0]", ylabel="x[1]", xlim=(low[0] - margin[0], high[0] + margin[0]))
            ax.set_ylim(low[1] - margin[1], high[1] + margin[1])
            ax.set_aspect("equal" if 1 / 3 < span[1] / span[0] < 2 else "auto")
    return figure


def _tiled(images: Real[np.ndarray, "image dim"], shape: Sequence[int]) -> Float[np.ndarray, "row column"]:
    """The images in a square, NaN in a gap of one pixel between them."""
    side = int(np.sqrt(len(images)))
    padded = np.full((side, side, shape[0] + 1, shape[1] + 1), np.nan)
    padded[..., :-1, :-1] = images[: side**2].reshape(side, side, *shape)
    return padded.transpose(0, 2, 1, 3).reshape(side * (shape[0] + 1), -1)[:-1, :-1]


def plot_marginals(samples: "pandas.DataFrame", data: "pandas.DataFrame", title: str = "") -> "matplotlib.figure.Figure":
    """The distribution of each column, of samples and of data: densities, or the frequencies of the values if these are few.

    Args:
        samples: Draws from the model, a data frame as returned by :meth:`~probdiff.datasets.Dataset.to_frame`.
        data: Data, with the same columns.
        title: Title of the figure.

    Example:
        >>> import pandas, probdiff
        >>> frame = pandas.DataFrame({"height": [1.6, 1.7, 1.8], "age": [20, 30, 40]})
        >>> len(probdiff.plots.plot_marginals(samples=frame, data=frame).axes)
        2
    """
    from matplotlib.figure import Figure

    across = min(4, len(data.columns))
    down = -(-len(data.columns) // across)
    figure = Figure(figsize=(2.4 * max(2, across) + 0.4, 1.8 * down + 0.9), dpi=130, layout="constrained")
    figure.suptitle(title, wrap=True, fontsize="medium")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes, name in zip(panels, data.columns):
        _draw_marginal(axes, samples[name], data[name])
        axes.set_xlabel(name, fontsize="small")
        axes.tick_params(labelsize="x-small")
        axes.set_yticks([])
    for axes in panels[len(data.columns) :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    counts = (f"{label} (n = {len(frame)})" for label, frame in zip(labels, (data, samples)))
    figure.legend(handles, list(counts), loc="outside lower center", ncols=min(2, across), fontsize="small")
    return figure


def plot_pairs(samples: "pandas.DataFrame", data: "pandas.DataFrame", title: str = "") -> "matplotlib.figure.Figure":
    """Each column against each: data below the diagonal, up to as many samples, or 200 if there are fewer data, above it, and the distributions of the column on the diagonal.

    Args:
        samples: Draws from the model, a data frame as returned by :meth:`~probdiff.datasets.Dataset.to_frame`.
        data: Data, with the same columns; of more than six columns the first six are shown.
        title: Title of the figure.

    Example:
        >>> import pandas, probdiff
        >>> frame = pandas.DataFrame({"height": [1.6, 1.7, 1.8], "age": [20, 30, 40]})
        >>> len(probdiff.plots.plot_pairs(samples=frame, data=frame).axes)
        4
    """
    from matplotlib.figure import Figure

    names = list(data.columns[:MOST_PAIRS])
    more = len(data.columns) - len(names)
    size = len(names)
    figure = Figure(figsize=(1.6 * size + 0.6, 1.5 * size + 0.9), dpi=130, layout="constrained")
    figure.suptitle(f"{title}{f' (the first {size} of {len(data.columns)} columns)' if more else ''}", wrap=True, fontsize="medium")
    grid = figure.subplots(size, size, squeeze=False)
    rng = np.random.default_rng(0)
    for i, row in enumerate(names):
        for j, column in enumerate(names):
            axes, frame = grid[i, j], (data if i > j else samples.head(max(len(data), 200)))
            if i == j:
                _draw_marginal(axes, samples[column], data[column])
                axes.set_yticks([])
            else:
                x, y = (_positions(frame[name], data[name], rng) for name in (column, row))
                axes.scatter(x, y, s=_marker_size(len(frame)), alpha=0.5, lw=0, color="C0" if i > j else "C1")
                axes.set(xlim=_limits(data[column], samples[column]), ylim=_limits(data[row], samples[row]))
                for name, axis in ((column, axes.xaxis), (row, axes.yaxis)):
                    if (values := _few_values(data[name])) is not None:
                        axis.set_ticks(np.arange(len(values)), values)
            axes.tick_params(labelsize="xx-small", labelbottom=i == size - 1, labelleft=j == 0 and i != j)
            if i == size - 1:
                axes.set_xlabel(column, fontsize="x-small")
            if j == 0:
                axes.set_ylabel(row, fontsize="x-small")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    places = (f"{label}, {where}" for label, where in zip(labels, ("below the diagonal", "above it")))
    figure.legend(handles, list(places), loc="outside lower center", ncols=2 if size > 3 else 1, fontsize="small")
    return figure


def _draw_marginal(axes: "matplotlib.axes.Axes", samples: "pandas.Series", data: "pandas.Series") -> None:
    """A column of data, filled, and of samples, as a line; the frequencies of the values if these are few."""
    values = _few_values(data)
    looks: tuple[dict[str, Any], ...] = ({"color": "C0", "alpha": 0.5, "label": "data"}, {"color": "C1", "label": "samples from the model"})
    if values is not None:
        for side, (column, look) in enumerate(zip((data, samples), looks)):
            shares = [np.mean(np.asarray(column) == value) for value in values]
            axes.bar(np.arange(len(values)) + 0.4 * side - 0.2, shares, width=0.4, **look)
        axes.set_xticks(np.arange(len(values)), values, rotation=30 * (len(values) > 3))
        return
    low, high = _limits(data, samples)
    edges = np.linspace(low, high, 26)
    if data.dtype.kind in "iu":  # bins of as many whole numbers each
        width = int(np.ceil((high - low) / 25))
        edges = np.arange(np.floor(low), high + width, width) - 0.5
        low, high = edges[0], edges[-1]
    for column, look, filled in zip((data, samples), looks, (True, False)):
        density, _ = np.histogram(np.clip(np.asarray(column, float), low, high), edges, density=True)
        axes.stairs(density, edges, fill=filled, **look)


def _few_values(data: "pandas.Series") -> np.ndarray | None:
    """The values of a column of categories, or of few whole numbers; None for any other column."""
    values = np.unique(data)
    return values if hasattr(data, "cat") or (data.dtype.kind in "iu" and len(values) <= FEW_VALUES) else None


def _positions(column: "pandas.Series", data: "pandas.Series", rng: np.random.Generator) -> np.ndarray:
    """The coordinates of points: numbers unchanged; few values by their index, with a little noise."""
    values = _few_values(data)
    if values is None:
        return np.asarray(column, float)
    place = {value: k for k, value in enumerate(values)}
    return np.array([place.get(value, np.nan) for value in column]) + rng.uniform(-0.2, 0.2, len(column))


def _limits(data: "pandas.Series", samples: "pandas.Series") -> tuple[float, float]:
    """The range of a column of data and of all but a hundredth of the samples, and a tenth of it on either side."""
    values = _few_values(data)
    if values is not None:
        return -0.6, len(values) - 0.4
    ends = [data.min(), data.max(), *np.quantile(np.asarray(samples, float), [0.005, 0.995])]
    low, high = float(min(ends)), float(max(ends))
    margin = 0.1 * (high - low or 1)
    return low - margin, high + margin


def _marker_size(count: int) -> float:
    """The area of a marker, in square points: large for few markers."""
    return float(np.clip(4000 / count, 2, 12))


def plot_posterior(
    samples: Real[np.ndarray, "particle dim"],
    weights: Float[np.ndarray, "particle"],
    ess: Float[np.ndarray, "step"],
    title: str = "",
) -> "matplotlib.figure.Figure":
    """The first two dimensions of weighted particles, and the effective sample size of their weights at each step.

    Args:
        samples: Particles, shape ``(particle, dim)``.
        weights: Their weights, which add up to 1.
        ess: Effective sample size of the weights at z_n, n = 1 … N, for one run of particles.
        title: Title of the figure.

    Example:
        >>> import numpy as np, probdiff
        >>> samples, weights = np.random.default_rng(0).normal(size=(10, 2)), np.full(10, 0.1)
        >>> len(probdiff.plots.plot_posterior(samples, weights, ess=np.full(5, 10.0)).axes)
        2
    """
    figure, (left, right) = _figure(2, width=9.0)
    if samples.shape[1] == 1:
        left.hist(samples[:, 0], 50, weights=weights, density=True, color="C0")
        left.set(xlabel="x", ylabel="density")
    else:
        size = 20 * weights / weights.max()
        left.scatter(samples[:, 0], samples[:, 1], size, color="C0", alpha=0.5, lw=0)
        more = f" (of {samples.shape[1]})" if samples.shape[1] > 2 else ""
        left.set(xlabel=f"first dimension{more}", ylabel=f"second dimension{more}")
    left.set_title(f"{len(samples)} particles, area by weight" if samples.shape[1] > 1 else f"{len(samples)} weighted particles", fontsize="medium")
    right.plot(np.arange(1, len(ess) + 1), ess, color="C1")
    right.set(xlabel="step n (from N to 1)", ylabel="effective sample size, of one run", ylim=(0, None))
    right.invert_xaxis()
    figure.suptitle(title)
    return figure


def plot_estimators(table: "pandas.DataFrame", num_items: int, title: str = "") -> "matplotlib.figure.Figure":
    """Every estimator's bound with its error, and its cost, variance × time or variance × evaluations.

    Args:
        table: The ``table`` of an :class:`~probdiff.diagnostics.compare_estimators.EstimatorComparison`.
        num_items: Number of data.
        title: Title of the figure.

    Example:
        >>> import pandas, probdiff
        >>> row = {"elbo": -2.0, "se": 0.1, "items": 8}
        >>> costs = [f"{kind}_by_{unit}{end}" for kind in ("value", "gradient") for unit in ("evaluations", "seconds") for end in ("", "_error")]
        >>> table = pandas.DataFrame([row | dict.fromkeys(costs, 1.0)], index=["kl_uniform"])  # as of probdiff.compare_estimators(…).table
        >>> len(probdiff.plots.plot_estimators(table, num_items=8).axes)
        2
    """
    figure, (left, right) = _figure(2, width=10.0, height=1.6 + 0.3 * len(table))
    figure.suptitle(title)
    rows = np.arange(len(table))
    left.errorbar(table["elbo"], rows, xerr=2 * table["se"], fmt="o", ms=4, capsize=2, label="mean ± 2 s.e.")
    left.set_yticks(rows, table.index)
    left.invert_yaxis()
    fewest = table["items"].min()
    left.set(xlabel=f"ELBO, nats per item ({num_items} items{f'; all steps: the first {fewest}' if fewest < num_items else ''})")
    left.legend(fontsize="small")
    marks = (("value", "o", "C0"), ("gradient", "s", "C1"))
    for kind, marker, color in marks:
        for unit, filled in (("evaluations", color), ("seconds", "none")):
            cost, error = table[f"{kind}_by_{unit}"], 2 * table[f"{kind}_by_{unit}_error"].fillna(0)
            low = np.minimum(error, 0.9 * cost)  # the axis is logarithmic
            style = {"fmt": marker, "ms": 5, "mfc": filled, "mec": color, "ecolor": color, "elinewidth": 0.8}
            right.errorbar(cost, rows, xerr=[low, error], label=f"{kind}, variance × {unit} ± 2 s.e.", **style)
    right.axvline(1, color="0.7", lw=0.8, zorder=0)
    right.set_yticks(rows, [])
    right.invert_yaxis()
    right.grid(axis="y", lw=0.3)
    right.set(xscale="log", xlabel="cost relative to kl_uniform (left is better)")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    return figure


def plot_gap(decomposition: Any, title: str = "") -> "matplotlib.figure.Figure":
    """The part of the gap that the network adds: at each step, and summed from the first step on.

    Args:
        decomposition: A :class:`~probdiff.diagnostics.gap.GapDecomposition`.
        title: Title of the figure.

    Example:
        >>> import jax, numpy as np, probdiff
        >>> schedule, normal = probdiff.cosine_schedule(5), probdiff.oracles.GaussianOracle([0.0], [[1.0]])
        >>> off = probdiff.Diffusion(schedule, normal.network(schedule, scale=0.9), reverse_variance="forward")
        >>> gap = probdiff.diagnostics.gap_decomposition(off, normal, np.ones((4, 1)), key=jax.random.key(0))
        >>> len(probdiff.plots.plot_gap(gap).axes)
        2
    """
    figure, (left, right) = _figure(2, width=10.0)
    figure.suptitle(title)
    log_snr, per_step = decomposition.log_snr, decomposition.network_per_step
    error = 2 * decomposition.network_per_step_error
    lowest = 1e-3 * per_step.max()
    left.fill_between(log_snr, np.maximum(per_step - error, lowest), per_step + error, alpha=0.3, lw=0, label="± 2 s.e.")
    left.plot(log_snr, per_step, ".", ms=3, label="mean over data")
    left.set(xlabel="log-SNR of step n", ylabel="added by the network at step n, nats", yscale="log")
    left.set_ylim(lowest if lowest > 0 else None, None)
    left.legend(fontsize="small")
    right.plot(log_snr, np.cumsum(per_step), label="network, steps 1 … n")
    lines = (("irreducible gap, exact ε", decomposition.irreducible, "C1", "--"), ("gap of the ELBO", decomposition.gap, "0.4", ":"))
    for name, estimate, color, style in lines:
        right.axhline(estimate.mean, color=color, ls=style, label=f"{name} ({estimate.mean:.4f} ± {estimate.error:.4f})")
    right.set(xlabel="log-SNR of step n", ylabel="nats per datum")
    right.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0))
    for axes in (left, right):
        axes.invert_xaxis()
    return figure
