"""Figures: loss, KL against step, samples beside data. matplotlib is imported when a figure is drawn.

Each function draws on a new figure and returns it; nothing global is changed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Real

from probdiff._checks import AnyArray
from probdiff.chain.schedules import AbstractSchedule

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas
    import xarray

    import probdiff.diagnostics.gap


def _figure(columns: int = 1, width: float = 7.0, height: float = 4.2) -> tuple["matplotlib.figure.Figure", np.ndarray]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def plot_loss(
    losses: Float[AnyArray, "iteration"], validation: Float[AnyArray, "row 2"], title: str = ""
) -> "matplotlib.figure.Figure":
    """The bound against iteration: each minibatch (light), its running mean, and the validation data.

    Args:
        losses: Negative bound of each iteration, nats per datum, shape ``(iteration,)``; NaN is not drawn.
        validation: Rows of (iteration, bound in nats per datum); may be empty.
        title: Title of the figure.
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
    """
    figure, (axes,) = _figure()
    step_kl = tree["posterior"].dataset["step_kl"]
    step = step_kl["step"].values
    if len(step) == 0:
        axes.text(0.5, 0.5, "N = 1: there are no step KLs", ha="center", transform=axes.transAxes)
        return figure
    per_datum = step_kl.mean(("chain", "draw")).values
    num_draws = step_kl.sizes["draw"]
    for mass, alpha in ((0.9, 0.2), (0.5, 0.35)):
        low, high = np.quantile(per_datum, [(1 - mass) / 2, (1 + mass) / 2], axis=1)
        axes.fill_between(step, low, high, color="C0", alpha=alpha, lw=0, label=f"{mass:.0%} of test data")
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
) -> "matplotlib.figure.Figure":
    """Samples beside data: as images, as points of a plane, or as the histogram of one dimension.

    Args:
        samples: Draws from the model, shape ``(sample, dim)``.
        data: Data, shape ``(datum, dim)``.
        image_shape: Shape of a datum as an image; None for points. Of more than two dimensions the first two are shown.
        title: Title of the figure.
    """
    panels = (("data", np.asarray(data)), ("samples from the model", np.asarray(samples)))
    low, high = panels[0][1].min(0), panels[0][1].max(0)
    span = np.where(high > low, high - low, 1)
    margin = 0.1 * span
    planar = image_shape is None and samples.shape[1] > 1
    figure, axes = _figure(2, width=8.0, height=1.1 + np.clip(3.6 * span[1] / span[0], 1.2, 7.2) if planar else 4.6)
    figure.suptitle(title)
    for ax, (name, points) in zip(axes, panels):
        ax.set_title(f"{name} (n = {len(points)})", fontsize="medium")
        if image_shape is not None:
            side = int(np.sqrt(len(points)))
            grid = points[: side**2].reshape(side, side, *image_shape).transpose(0, 2, 1, 3)
            ax.imshow(grid.reshape(side * image_shape[0], -1), cmap="gray", vmin=low.min(), vmax=high.max())
            for k in range(1, side):
                ax.axhline(k * image_shape[0] - 0.5, color="C0", lw=0.4)
                ax.axvline(k * image_shape[1] - 0.5, color="C0", lw=0.4)
            ax.set_axis_off()
        elif points.shape[1] == 1:
            ax.hist(points[:, 0], bins=np.linspace(low[0] - margin[0], high[0] + margin[0], 61), density=True)
            ax.set(xlabel="x", ylabel="density")
        else:
            ax.scatter(points[:, 0], points[:, 1], s=2, alpha=0.4, lw=0)
            ax.set(xlabel="x[0]", ylabel="x[1]", xlim=(low[0] - margin[0], high[0] + margin[0]))
            ax.set_ylim(low[1] - margin[1], high[1] + margin[1])
            ax.set_aspect("equal" if 1 / 3 < span[1] / span[0] < 2 else "auto")
    return figure


def plot_estimators(table: "pandas.DataFrame", num_items: int, title: str = "") -> "matplotlib.figure.Figure":
    """Every estimator's bound with its error, and what its variance costs.

    Args:
        table: That of :class:`~probdiff.diagnostics.compare_estimators.EstimatorComparison`.
        num_items: Number of data.
        title: Title of the figure.
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


def plot_gap(
    decomposition: "probdiff.diagnostics.gap.GapDecomposition", title: str = ""
) -> "matplotlib.figure.Figure":
    """The network's part in the gap of the bound: at each step, and summed from the first step on.

    Args:
        decomposition: A :class:`~probdiff.diagnostics.gap.GapDecomposition`.
        title: Title of the figure.
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
    right.axhline(decomposition.irreducible.mean, color="C1", ls="--", label="irreducible gap, exact ε")
    right.axhline(decomposition.gap.mean, color="0.4", ls=":", label="gap of the ELBO")
    right.set(xlabel="log-SNR of step n", ylabel="nats per datum")
    right.legend(fontsize="small")
    for axes in (left, right):
        axes.invert_xaxis()
    return figure
