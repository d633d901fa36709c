"""The script that plants faults, on a tree of one module and two tests."""

import dataclasses

import pytest

from benchmarks import mutations
from benchmarks.mutations import Fault, ListError

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


def test_a_fault_is_killed_or_survives_and_is_taken_out_again(tree):
    plain = (tree / "double.py").read_text()
    assert mutations.run_fault(tree, WRONG)[0] == "killed"
    blind = dataclasses.replace(WRONG, tests=("test_double.py::test_of_zero",))
    assert mutations.run_fault(tree, blind)[0] == "SURVIVED"
    with pytest.raises(ListError, match="thrice: pytest ended with"):
        mutations.run_fault(tree, dataclasses.replace(WRONG, new="2 *"))  # no Python any more
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
