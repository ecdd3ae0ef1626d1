"""A data set in three splits, with its description."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int, Real

from probdiff._checks import AnyArray, require
from probdiff.chain.schedules import AbstractSchedule
from probdiff.datasets.covariates import Covariates
from probdiff.likelihoods import (
    AbstractLikelihood,
    CategoricalLikelihood,
    ColumnLikelihood,
    DiscretizedNormalLikelihood,
    NormalLikelihood,
)
from probdiff.likelihoods.density import atom
from probdiff.networks.base import Network
from probdiff.oracles.distributions import GaussianMixture, LogProb, Points, UniformBoxes

if TYPE_CHECKING:
    import pandas

MOST_NAMED = 30  # columns


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Data in three splits, with their description.

    Attributes:
        name: Name of the set, or stem of the file.
        train, validation, test: Arrays of shape ``(datum, column)``: floats, or integers for data on a grid.
        levels: Number of levels of data on a grid; None for continuous data, and for columns of several kinds.
        oracle: The true distribution (see :mod:`probdiff.oracles.distributions`) if it is known; otherwise None.
        image_shape: Shape of a datum as an image; None if the data are not images.
        columns: Names of the columns; None if they have none.
        discrete: The likelihoods of the columns without a density, by position, if columns are of several kinds.
        index: Name of the column that was left out because it numbers the rows; None if there was none.
        rows: For shuffled data, by the name of each split, the index in the source of each of its rows, counted from 0.
        train_context, validation_context, test_context: The encoded context of each split, ``context=`` of a conditional model, an array with a row
            for each datum; None for a model without a context.
        covariates: The :class:`Covariates`, which encode the user's units and labels, if they are known.

    Example:
        >>> import numpy as np, probdiff
        >>> train, validation, test = np.random.default_rng(0).normal(size=(3, 5, 2))
        >>> data = probdiff.datasets.Dataset("mine", train, validation, test)
        >>> data.dim, type(data.likelihood()).__name__
        (2, 'NormalLikelihood')
    """

    name: str
    train: Real[np.ndarray, "train column"]
    validation: Real[np.ndarray, "validation column"]
    test: Real[np.ndarray, "test column"]
    levels: int | None = None
    oracle: GaussianMixture | UniformBoxes | None = None
    image_shape: tuple[int, int] | None = None
    columns: tuple[str, ...] | None = None
    discrete: Mapping[int, AbstractLikelihood] = dataclasses.field(default_factory=dict)
    index: str | None = None
    rows: Mapping[str, Int[np.ndarray, "row"]] | None = None
    train_context: Real[np.ndarray, "train *context"] | None = None
    validation_context: Real[np.ndarray, "validation *context"] | None = None
    test_context: Real[np.ndarray, "test *context"] | None = None
    covariates: Covariates | None = None

    def __repr__(self) -> str:
        """The description, as text."""
        return self.describe()

    @property
    def dim(self) -> int:
        """Number of columns of the data."""
        return self.train.shape[1]

    def with_context(self, covariates: Covariates, contexts: Sequence[Real[np.ndarray, "_ width"]]) -> "Dataset":
        """The data with a context: the arrays of the training, the validation and the test split, as encoded by ``covariates``."""
        train, validation, test = contexts
        return dataclasses.replace(self, train_context=train, validation_context=validation, test_context=test, covariates=covariates)

    def without_context(self) -> "Dataset":
        """The data without their context."""
        return dataclasses.replace(self, train_context=None, validation_context=None, test_context=None, covariates=None)

    @property
    def context_dim(self) -> int | None:
        """Number of columns of the encoded context, the ``context_dim`` of a network; None without a context."""
        if self.train_context is None:
            return None
        shape = self.train_context.shape
        require(len(shape) == 2, "train_context", "shape (datum, context_dim), for the networks of probdiff.presets", f"shape {shape}")
        return shape[1]

    @property
    def is_table(self) -> bool:
        """Whether the data are a table, whose columns are treated one by one: neither images nor points of a plane."""
        return self.image_shape is None and (self.dim != 2 or bool(self.discrete))

    def column_name(self, position: int) -> str:
        """The name of a column; ``x[0]`` and so on if it has none."""
        return f"x[{position}]" if self.columns is None else self.columns[position]

    def likelihood(self) -> AbstractLikelihood:
        """The likelihood for these data: discretised for a grid, by column for several kinds, otherwise standardised by the training split."""
        if self.levels is not None:
            return DiscretizedNormalLikelihood(self.levels)
        if not self.discrete:
            return NormalLikelihood.standardized(self.train)
        keys: Sequence[int] | Sequence[str] = range(self.dim) if self.columns is None else self.columns
        parts: dict[tuple[int | str, ...], AbstractLikelihood] = {(keys[j],): part for j, part in self.discrete.items()}
        if continuous := self._continuous:
            density = NormalLikelihood.standardized(self.train[:, continuous])
            parts = {tuple(keys[j] for j in continuous): density} | parts
        return ColumnLikelihood(parts, self.columns)

    def describe(self) -> str:
        """The number of rows and the kind of each column, as text."""
        rows = ", ".join(f"{len(getattr(self, split))} {split}" for split in ("train", "validation", "test"))
        lines = [f"{self.name}: {rows} rows of {self.dim} columns"]
        if self.index is not None:
            lines.append(f"  left out, as it numbers the rows: {repr(self.index) if self.index else 'the first column, which has no name'}")
        if self.levels is not None:
            lines.append(f"  a grid of {self.levels} levels in every column")
            return "\n".join(lines + self._given)
        if self._continuous:
            names = [*map(self.column_name, self._continuous[:MOST_NAMED])]
            more = len(self._continuous) - len(names)
            lines.append(f"  continuous, with a density: {', '.join(names)}{f' and {more} more' if more else ''}")
        for j in self._continuous:
            if found := atom(self.train[:, j]):
                lines.append(f"    though {found[1]:.0%} of the rows of {self.column_name(j)} are {found[0]:g}, so that its density can be arbitrarily large")
        lines += [f"  {part.words}: {self.column_name(j)}" for j, part in self.discrete.items()]
        return "\n".join(lines + self._given)

    def to_frame(
        self, x: Real[AnyArray, "row column"] | None = None, context: Real[AnyArray, "row width"] | None = None
    ) -> "pandas.DataFrame":
        """Data or samples as a pandas data frame, with the names of the columns and the labels of categories.

        Args:
            x: Data as an array of numbers, shape ``(row, column)``; the training data if not given.
            context: The encoded context of the data, shape ``(row, width)``, to be added as columns.
        """
        import pandas as pd

        values = np.asarray(self.train if x is None else x)
        require(values.ndim == 2 and values.shape[1] == self.dim, "x", f"shape (row, {self.dim})", f"shape {values.shape}")
        frame = {}
        for j in range(self.dim):
            column, part = values[:, j], self.discrete.get(j)
            if isinstance(part, CategoricalLikelihood) and part.labels is not None:
                frame[self.column_name(j)] = pd.Categorical.from_codes(column.astype(int).tolist(), part.labels)
            else:
                frame[self.column_name(j)] = column.astype(np.int64) if part and np.all(column == np.round(column)) else column
        given = {} if context is None or self.covariates is None else self.covariates.decode(context)
        return pd.DataFrame(frame | given)

    @property
    def log_prob(self) -> Callable[[Points], LogProb] | None:
        """True log-density in nats of points of shape ``(*batch, dim)``, a function; None if it is not known."""
        return None if self.oracle is None else self.oracle.log_prob

    def entropy(self) -> tuple[float, float]:
        """Differential entropy in nats, and an estimate of its numerical error.

        Raises:
            ValueError: If the density is not known.
        """
        return self._known().entropy()

    def exact_network(self, schedule: AbstractSchedule, likelihood: AbstractLikelihood) -> Network:
        r"""The exact ε-network for these data, :math:`E[\epsilon | z_n]`: nothing is trained.

        Args:
            schedule: The noise schedule.
            likelihood: The NormalLikelihood that encodes the data for the chain.

        Returns:
            An ε-network, ``network(z, n) -> eps_hat`` with ``z`` of shape ``(*batch, dim)``.

        Raises:
            ValueError: If the density is not known; TypeError for another likelihood.
        """
        oracle = self._known()
        kind = type(likelihood).__name__
        require(isinstance(likelihood, NormalLikelihood), "likelihood", "a NormalLikelihood", kind, TypeError)
        assert isinstance(likelihood, NormalLikelihood)
        return oracle.standardized(likelihood.loc, likelihood.scale).network(schedule)

    def independent_columns(self) -> tuple[float, float]:
        """Mean test log-likelihood in nats, and its standard error, when the columns are modelled as independent.

        A column with a density is modelled by a normal with the mean and standard deviation of the training split; any other by the frequencies of its
        values there, with half a count added to each (Jeffreys' prior).
        """
        per_datum = np.zeros(len(self.test))
        for train, test, part in zip(self.train.T, self.test.T, map(self._grid, range(self.dim))):
            if part is None:
                train = train.astype(np.float64)
                z = (test - train.mean()) / train.std()
                per_datum -= z**2 / 2 + np.log(train.std() * np.sqrt(2 * np.pi))
            else:
                order = np.argsort(part)
                of_train, of_test = (np.searchsorted(part, values, sorter=order) for values in (train, test))
                counts = 0.5 + np.bincount(of_train, minlength=len(part))
                per_datum += np.log(counts / counts.sum())[of_test]
        return float(per_datum.mean()), float(per_datum.std(ddof=1) / np.sqrt(len(per_datum)))

    def _grid(self, position: int) -> np.ndarray | None:
        """The values that a column can have; None for a column with a density."""
        part = DiscretizedNormalLikelihood(self.levels) if self.levels is not None else self.discrete.get(position)
        if isinstance(part, DiscretizedNormalLikelihood):
            return part.first + np.arange(part.levels)
        return np.asarray(part.values, self.train.dtype) if isinstance(part, CategoricalLikelihood) else None

    def _known(self) -> GaussianMixture | UniformBoxes:
        require(self.oracle is not None, "dataset", "a data set with a known density", self.name)
        assert self.oracle is not None
        return self.oracle

    @property
    def _given(self) -> list[str]:
        return [] if self.covariates is None else [f"  given: {column.words}" for column in self.covariates.columns]

    @property
    def _continuous(self) -> list[int]:
        return [j for j in range(self.dim) if j not in self.discrete]
