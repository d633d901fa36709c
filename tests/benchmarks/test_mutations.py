"""The script that plants faults, on a tree of one module and two tests."""

import dataclasses
import subprocess
import sys

import pytest

from benchmarks import mutations
from benchmarks.mutations import Fault

TESTS = """
from double import double

def test_of_zero():
    assert double(0) == 0

def test_of_three():
    assert double(3) == 6
"""


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "double.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "test_double.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\nmarkers = oracle: not here\n")
    return tmp_path


WRONG = Fault("thrice", "factor", "double.py", "2 * x", "3 * x", ("test_double.py",))


PROGRAM = """
import dataclasses, pathlib
from benchmarks import mutations

wrong = mutations.Fault("thrice", "factor", "double.py", "2 * x", "3 * x", ("test_double.py",))
root = pathlib.Path({root!r})
for changed in ({{}}, {{"tests": ("test_double.py::test_of_zero",)}}, {{"new": "2 *"}}):
    try:
        print(mutations.run_fault(root, dataclasses.replace(wrong, **changed))[0], flush=True)
    except mutations.ListError as error:
        print(str(error).splitlines()[0], flush=True)
"""


def test_a_fault_is_killed_or_survives_and_is_taken_out_again(tree):
    """In a process of its own: one in which JAX runs cannot be copied."""
    plain = (tree / "double.py").read_text()
    command = [sys.executable, "-c", PROGRAM.format(root=str(tree))]
    done = subprocess.run(command, cwd=mutations.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["killed", "SURVIVED", "thrice: pytest ended with 2, neither passed nor failed:"]
    assert (tree / "double.py").read_text() == plain


@pytest.mark.parametrize(
    "changed, problem",
    [
        ({"old": "4 * x"}, "thrice: double.py has the text 0 times"),
        ({"old": "x"}, "thrice: double.py has the text 2 times"),
        ({"new": "2 * x"}, "old and new are the same"),
        ({"file": "triple.py"}, "triple.py is not there"),
        ({"tests": ("test_triple.py",)}, "there is no test test_triple.py"),
        ({"tests": ("test_double.py::test_of_four",)}, "there is no test test_double.py::test_of_four"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tree, changed, problem):
    assert mutations.check([WRONG], tree) == []
    [found] = mutations.check([dataclasses.replace(WRONG, **changed)], tree)
    assert problem in found


def test_the_report_counts_by_kind_and_is_read_back(tmp_path):
    other = dataclasses.replace(WRONG, name="never", kind="sign")
    page = mutations.report([WRONG, other], {"thrice": ("killed", 1.25), "never": ("SURVIVED", 3.0)})
    assert "1 of 2 killed: 0.500" in page and "| factor | 1 | 1 |" in page and "| sign | 0 | 1 |" in page
    (tmp_path / "page.md").write_text(page)
    assert mutations.read_rows(tmp_path / "page.md") == {"thrice": ("killed", 1.2), "never": ("SURVIVED", 3.0)}
    assert mutations.read_rows(tmp_path / "none.md") == {}


def test_the_list_names_no_fault_twice():
    faults = mutations.read_faults()
    assert len(faults) >= 80 and len({fault.kind for fault in faults}) >= 6
