"""``probdiff compare``: of which data and which model; its tables are tested with the comparisons."""

import dataclasses
import json
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from cli_runs import assert_is_the_bound_on_test_data, unmistakable_runs

import probdiff
from probdiff import cli, datasets

pytestmark = pytest.mark.xdist_group("cli")  # its tests share what is costly to make


def test_models_are_compared_by_their_bound_on_test_data(capsys, patched):
    bounds, _ = unmistakable_runs(patched)
    assert cli.main(["compare", *bounds, "--num-draws", "4", "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    for path, bound in bounds.items():
        assert_is_the_bound_on_test_data(models[path]["elbo"], bound, 4)


def test_estimators_are_compared_on_test_data_for_the_trained_model(patched):
    bounds, dataset = unmistakable_runs(patched)
    path, seen = next(iter(bounds)), []

    def compare(diffusion, x, **options):
        seen.extend([diffusion, x])
        raise KeyboardInterrupt

    patched(probdiff.compare_estimators, compare)
    assert cli.main(["compare", path]) == 130
    diffusion, x = seen
    np.testing.assert_array_equal(x, dataset.test)
    leaves = zip(jax.tree.leaves(diffusion.trainable()), jax.tree.leaves(probdiff.open_run(path).diffusion.trainable()))
    assert all(np.array_equal(*pair) for pair in leaves)


def test_items_and_minutes_are_those_that_were_asked_for(patched):
    bounds, dataset = unmistakable_runs(patched)
    path, seen = next(iter(bounds)), {}

    def compare(diffusion, x, **options):
        seen.update(options | {"x": x})
        raise KeyboardInterrupt

    def opened_after_12_seconds(path, run=probdiff.open_run):
        clock.append(clock[-1] + 12)
        return run(path)

    clock = [1000.0]
    patched(probdiff.compare_estimators, compare)
    patched(probdiff.open_run, opened_after_12_seconds)
    patched(time, SimpleNamespace(monotonic=lambda: clock[-1], sleep=time.sleep))
    for options, items, minutes, draws in (
        ([], 30, 1, None),
        (["--num-items", "7", "--minutes", "0.5"], 7, 0.5, None),
        (["--num-draws", "6"], 30, 1, 6),
        (["--minutes", "0.1"], 30, 0.201, None),  # all were spent: the smallest number of draws
    ):
        assert cli.main(["compare", path, *options]) == 130
        np.testing.assert_array_equal(seen["x"], dataset.test[:items])
        assert seen["minutes"] == pytest.approx(minutes - 0.2) and seen["num_draws"] == draws  # what was spent before counts


def test_a_batch_is_of_64_items(patched):
    _, dataset = unmistakable_runs(patched)
    many = dataclasses.replace(dataset, test=np.concatenate([dataset.test] * 3))
    path, seen = next(iter(unmistakable_runs(patched)[0])), []

    def compare(diffusion, x, **options):
        seen.append(x)
        raise KeyboardInterrupt

    patched(datasets.load, lambda name, seed=0, index=None: many)
    patched(probdiff.compare_estimators, compare)
    assert cli.main(["compare", path]) == 130
    np.testing.assert_array_equal(seen[0], many.test[:64])
