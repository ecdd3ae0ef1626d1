"""``probdiff compare``: of which data and which model; its tables are tested with the comparisons."""

import json

import jax
import numpy as np
import pytest
from cli_runs import assert_is_the_bound_on_test_data, unmistakable_runs

import probdiff
from probdiff import cli

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
