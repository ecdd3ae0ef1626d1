"""The data of a run as a file: the three splits, and their description in JSON."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from probdiff.datasets import PLANAR, Covariate, Covariates, Dataset
from probdiff.storage.checkpoint import read_leaves, save_tree
from probdiff.storage.description import describe_likelihood, make_likelihood

SPLITS = ("train", "validation", "test")
PLAIN = ("name", "levels", "image_shape", "columns", "index")


def save_data(path: Path, data: Dataset) -> None:
    """Write a data set, all or nothing."""
    about = {name: getattr(data, name) for name in PLAIN}
    discrete = [[position, describe_likelihood(part)] for position, part in data.discrete.items()]
    known = data.oracle is not None and data.name in PLANAR
    rows = [] if data.rows is None else [data.rows[split] for split in SPLITS]
    contexts = [] if data.train_context is None else [data.train_context, data.validation_context, data.test_context]
    about["contexts"] = bool(contexts)
    about["covariates"] = data.covariates and [dataclasses.asdict(column) for column in data.covariates.columns]
    save_tree(path, [data.train, data.validation, data.test, *contexts, *rows], **about, discrete=discrete, planar=known)


def load_data(path: Path) -> Dataset:
    """The data set that :func:`save_data` wrote.

    Raises:
        ValueError: If the checksum does not match, or the file has other contents.
    """
    about, arrays = read_leaves(path)
    try:
        plain: dict[str, Any] = {name: tuple(value) if isinstance(value := about[name], list) else value for name in PLAIN}
        discrete = {position: make_likelihood(part) for position, part in about["discrete"]}
        oracle = PLANAR[about["name"]].oracle() if about["planar"] else None
        train, validation, test, *more = map(np.asarray, arrays)
        if about.get("contexts"):  # (Not in older runs.)
            contexts, more = more[:3], more[3:]
            plain |= dict(zip((f"{split}_context" for split in SPLITS), contexts, strict=True))
        if about.get("covariates"):
            plain["covariates"] = Covariates(tuple(map(_make_covariate, about["covariates"])))
        plain["rows"] = dict(zip(SPLITS, more, strict=True)) if more else None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: Expected the data of a run; got {type(error).__name__}: {error}") from None
    return Dataset(train=train, validation=validation, test=test, oracle=oracle, discrete=discrete, **plain)


def _make_covariate(description: dict[str, Any]) -> Covariate:
    categories = description["categories"]
    return Covariate(**description | {"categories": categories and tuple(categories)})
