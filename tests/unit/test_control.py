"""Test that the control finds forged answers in every form of assertion, and no honest ones."""

import ast
import json
from collections import Counter, OrderedDict, deque, namedtuple
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retemper.pipeline.evals.code_tasks import CODE_TASKS
from retemper.pipeline.evals.sandbox.comparisons import bind
from retemper.pipeline.evals.sandbox.control import control, relied_on

FILES = {"humaneval": "humaneval.jsonl", "mbpp": "mbpp_test.jsonl"}


class Forged:
    """An answer that equals everything, is near everything, and has as many parts as asked for."""

    def __init__(self, parts: int = 0):
        self.parts = parts

    def __eq__(self, other):
        return True

    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__
    __hash__ = object.__hash__

    def __sub__(self, other):
        return 0.0

    __rsub__ = __sub__

    def __iter__(self):
        return iter([Forged()] * self.parts)


def forge(*arguments) -> Forged:
    first = arguments[0] if arguments else None
    return Forged(len(first) if isinstance(first, (list, str)) else 0)


def reports(tests: str, names: dict) -> int:
    """Run the control of tests with `names` defined, and return the number of its reports."""
    found: list[None] = []
    exec(bind(compile(control(tests), "tests", "exec"), lambda: found.append(None)), names)
    return len(found)


FORMS = [
    "f() == 2", "2 == f()", "f() in [2, 3]", "f() == 2 and f() == 2",
    "f() == 2 or f() == 3", "1 < f() < 3", "2 <= f()", "3 > f()", "f() >= 2", "bool(f() == 2)",
    "all(f() == y for y in [2])", "any([f() == 2])", "not (f() != 2 or not f() == 2)",
    "abs(f() - 2) < 1e-6", "abs(2 - f()) <= 0.1", "f() == 2 == f()", "(f() == 2) is True",
    "(lambda x: x == 2)(f())", "[f(), f()] == [2, 2]", "(1, f()) == (1, 2)",
    "{'a': f()} == {'a': 2}", "tuple([f()]) == tuple([2])", "[[1, f()]] == [[1, 2]]",
    "2 == f(), 'a message'",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forged_answer_is_found_in_every_form_of_comparison(form):
    assert reports(f"assert {form}", {"f": forge})
    assert not reports(f"assert {form}", {"f": lambda: 2})


def test_forged_container_is_found_and_those_of_the_standard_library_are_not_reported():
    assert reports("assert 2 in f()", {"f": forge})
    pair = namedtuple("pair", "a b")
    for answer in ([1, 2], pair(1, 2), deque([1, 2]), Counter([1, 2]), range(1, 3), {2: 1}.keys()):
        assert not reports("assert 2 in f()", {"f": lambda answer=answer: answer})


@pytest.mark.parametrize(
    "answer, value",
    [
        (Decimal(2), "2"), (Fraction(1, 2), "0.5"), (OrderedDict(a=[1]), "{'a': [1]}"),
        (Counter("aab"), "{'a': 2, 'b': 1}"), (namedtuple("p", "x")(1), "(1,)"), (1e300, "1e300"),
        (float("inf"), "float('inf')"), (True, "1"), (1, "True"), (0, "0"), (-0.0, "0"), ("", "''"),
        ("aa", "'aa'"), ([], "[]"), ({}, "{}"), ({3}, "{3}"), (b"x", "b'x'"), (None, "None"),
        (2**2000, "2**2000"), ([[], [0, [""]]], "[[], [0, ['']]]"), ({1: None}, "{1: None}"),
    ],
)  # fmt: skip
def test_honest_answers_are_not_reported(answer, value):
    names = {"f": lambda: answer}
    tests = [f"assert f() == {value}", f"assert {value} == f()", f"assert f() in [7, {value}]"]
    if isinstance(answer, (int, Decimal, Fraction)):
        near = [f"assert abs(f() - {value}) < 1e-6", f"assert abs({value} - f()) <= 1"]
        tests += [*near, f"assert {value} - 1 < f() < {value} + 1"]
    assert not reports("\n".join(tests), names)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda part: (
        st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=2), part, max_size=3)
    ),
    max_leaves=6,
)


@given(values)
def test_one_forged_part_is_found_wherever_it_is(value):
    test = f"assert f() == {value!r}\nassert {value!r} == f()".replace("inf", "float('inf')")
    assert not reports(test, {"f": lambda: value})
    for forged in with_forged_part(value):
        assert reports(test, {"f": lambda forged=forged: forged}) == 2


def with_forged_part(value):
    """Yield copies of a value, in each of which another part, or the whole, equals everything."""
    yield Forged()
    items = enumerate(value) if isinstance(value, list) else ()
    for key, part in value.items() if isinstance(value, dict) else items:
        for forged in with_forged_part(part):
            copy = value.copy()
            copy[key] = forged
            yield copy


def test_object_that_equals_only_the_first_value_is_found():
    class Once(Forged):
        def __eq__(self, other):
            self.seen = getattr(self, "seen", 0) + 1
            return self.seen == 1

    exec("assert f() == 2", {"f": Once})
    with pytest.raises(AssertionError):
        exec("assert answer == 2 and answer == 2", {"answer": Once()})
    found: list[None] = []
    names = {"f": Once}
    code = bind(compile(control("assert f() == 2"), "tests", "exec"), lambda: found.append(None))
    with pytest.raises(AssertionError):
        exec(code, names)
    assert found


class OnlyComparisons(ast.NodeTransformer):
    """Keep the assertions that compare, and demand a new report after each."""

    def __init__(self):
        self.count = 0

    def visit_Assert(self, node):
        operators = [part.ops[0] for part in ast.walk(node) if isinstance(part, ast.Compare)]
        if not operators or isinstance(operators[0], ast.Is):
            return ast.Pass()
        self.count += 1
        return [node, *ast.parse("demand_report()").body]


@pytest.mark.parametrize("task, count", [("humaneval", 1096), ("mbpp", 1500)])
def test_every_comparison_of_the_benchmarks_finds_a_forged_answer(shared_data, task, count):
    """HumanEval's other assertions are 48 literals, 30 calls with or without `not`, and 6 `is`.

    An object cannot forge these: it is true or false, and it is no other object. In problem 32 the
    answer is not compared but passed on, as a number.
    """
    lines = (shared_data / "evals" / FILES[task]).read_text().split("\n")
    changed = OnlyComparisons()
    for problem in map(json.loads, filter(None, lines)):
        if problem["task_id"] != "HumanEval/32":
            tree = changed.visit(ast.parse(CODE_TASKS[task].tests(problem)))
            run_forged(tree, relied_on(CODE_TASKS[task].tests(problem))[1])
    assert changed.count == count


def run_forged(tree: ast.AST, known: list[str]) -> None:
    found: list[None] = []

    def demand_report():
        assert found
        found.clear()

    class Names(dict):
        """Global names, of which all that are not known are the forger's function."""

        def __missing__(self, name):
            if name in known:
                raise KeyError(name)
            return forge

    tests = control(ast.unparse(ast.fix_missing_locations(tree)))
    code = bind(compile(tests, "tests", "exec"), lambda: found.append(None))
    exec(code, Names(demand_report=demand_report))


def test_what_tests_rely_on():
    assert relied_on("import math\nassert abs(f(1)) < len(x)") == (["math"], ["abs", "len"])
    assert relied_on("from a.b import c\nassert sum(1, 2) == 3") == (["a.b"], [])
    assert relied_on("def check(f):\n    str = 'a'\n    assert f(str) == str") == ([], [])
