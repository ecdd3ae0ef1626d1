"""Common parts of the commands: messages about unusable arguments, and the figures of a run."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Real
from numpyro.infer import Predictive

from probdiff._checks import AnyArray, require
from probdiff._devices import data_mesh
from probdiff.cli import UsageError
from probdiff.datasets import Dataset
from probdiff.datasets.covariates import Covariates
from probdiff.datasets.files import read_rows
from probdiff.diagnostics.plots import plot_loss, plot_marginals, plot_pairs, plot_samples, plot_step_kl
from probdiff.diffusion import Diffusion

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

FEWEST_ROWS = 500  # rows of the test split of a table for a figure beside the test split alone
MOST_LETTERS = 40  # letters of a context in a title


@contextlib.contextmanager
def usage() -> Iterator[None]:
    """A context in which arguments and files are checked or read: errors become one line and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(error) from None


def flag(name: str) -> str:
    """The name of an option on the command line."""
    return "--" + name.replace("_", "-")


def check_devices(count: int | None) -> int | None:
    """The number of devices, None for one: all devices, if there are several processes."""
    if count is None and jax.process_count() > 1:
        count = jax.device_count()
    all_of_them = jax.process_count() == 1 or count == jax.device_count()
    require(all_of_them, "--devices", f"all {jax.device_count()} devices of the processes", count)
    data_mesh(count)
    return count


def default_count(dataset: Dataset) -> int:
    """The default number of samples for a data set."""
    return 2000 if dataset.image_shape is None else 64


def contexts_of_test_data(dataset: Dataset, count: int) -> Real[np.ndarray, "count width"] | None:
    """The contexts of ``count`` test data, repeated from the first if there are fewer; None without a context."""
    return None if dataset.test_context is None else dataset.test_context[np.arange(count) % len(dataset.test)]


def read_contexts(covariates: Covariates, text: str) -> tuple[Real[np.ndarray, "row width"], bool]:
    """Rows of a context from the command line, given as text or by a .csv or .npy file; and whether it is a file."""
    in_file = Path(text).suffix in (".csv", ".npy")
    return covariates.encode(read_rows(Path(text))) if in_file else covariates.parse(text), in_file


def given(what: str) -> str:
    """The context of samples, as text for a title."""
    return f", given {what if len(what) <= MOST_LETTERS else what[: MOST_LETTERS - 1] + '…'}"


def sample_figures(samples: AnyArray, dataset: Dataset, title: str, context: AnyArray | None = None) -> dict[str, "Figure"]:
    """Figures of samples, shape ``(sample, column)``, beside as many data of the test split; for a table, beside all data if the test split is small.

    Samples with a context, ``(sample, width)``, are shown beside the data with the same context, if there are any.
    """
    many = not dataset.is_table or len(dataset.test) >= FEWEST_ROWS
    splits = ("test",) if many else ("train", "validation", "test")
    data = np.concatenate([getattr(dataset, split) for split in splits])
    beside = f", beside {'rows' if dataset.is_table else 'data'} of {'the test split' if many else 'all splits'}"
    if context is not None:
        wanted = {row.tobytes() for row in np.asarray(context)}
        contexts = np.concatenate([getattr(dataset, f"{split}_context") for split in splits])
        same = np.array([row.tobytes() in wanted for row in contexts])
        data = data[same] if same.any() else data
        beside += " with the same context" if same.any() else " with any context"
    data = data[: len(samples)]
    if not dataset.is_table:
        return {"samples": plot_samples(samples, data, dataset.image_shape, title if context is None else title + beside)}
    drawn, rows = dataset.to_frame(samples), dataset.to_frame(data)
    pairs = {"pairs": plot_pairs(drawn, rows, title + beside)} if dataset.dim > 1 else {}
    return {"samples": plot_marginals(drawn, rows, title + beside)} | pairs


def draw_figures(
    folder: Path, diffusion: Diffusion, dataset: Dataset, losses: np.ndarray, validation: np.ndarray, terms: "xr.DataTree"
) -> list[Path]:
    """Draw the figures of a fitted model into a folder; returns their paths."""
    title = f"{dataset.name}, N = {diffusion.schedule.num_steps}"
    count = default_count(dataset)
    context = contexts_of_test_data(dataset, count)
    samples = Predictive(diffusion.model, num_samples=1)(jax.random.key(0), None, num_data=count, context=context)["x"][0]
    drawn = title if context is None else title + given("the contexts of test data")
    figures = {
        "loss": plot_loss(losses, validation, title),
        "step_kl": plot_step_kl(terms, diffusion.schedule, title),
    } | sample_figures(samples, dataset, drawn, context)
    paths = [folder / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values()):
        figure.savefig(path)
    return paths
