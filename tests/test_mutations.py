"""The list of bugs in analyses/mutations.py keeps up with the package and with the tests."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "analyses" / "mutations.py"


@pytest.fixture(scope="module")
def script():
    """What the script defines, once every bug was found to have its place and its tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), "--check"])
        try:
            return runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as ended:
            pytest.fail(ended.code)


MODULES = {
    Path("a.py"): "class A:\n    def f(self, x):\n        return x[ 1: ] +  2  # two\n",
    Path("b.py"): "def f(x):\n    y = x\n    z = y\n    return y + 1\n\n\ndef g(x):\n    return x\n",
    Path("c.py"): "def g(x):\n    return x\n",
}


def test_a_bug_is_put_in_its_place_whatever_the_formatting(script):
    for function, right, wrong, expected in (
        ("A.f", "x[1:]", "x", "class A:\n\n    def f(self, x):\n        return x + 2"),
        ("f", "y = x\nz = y", "y = z = 0", "def f(x):\n    y = z = 0\n    return y + 1\n\ndef g(x):\n    return x"),
    ):
        _, text = script["mutated"](script["Bug"]("words", function, right, wrong, "score"), MODULES)
        assert text == expected


@pytest.mark.parametrize("function, right, message", [
    ("B.f", "x", "words: there is no function B.f"),
    ("f", "y + 2", "words: f has changed, it has no y + 2"),
    ("g", "x", "words: several functions g have x"),
])  # fmt: skip
def test_a_bug_without_one_place_is_named(script, function, right, message):
    assert script["problem"](script["Bug"]("words", function, right, "y", "score"), MODULES) == message


def test_a_bug_without_its_tests_is_named(script):
    bug = script["Bug"]("words", "A.f", "x", "y", "score none")
    assert script["problem"](bug, MODULES) == "words: not one file each for the tests score none"
