"""Comparisons in the candidate's process, which report answers that also equal a wrong value.

Answers made of Python's own types compare as Python says. Any other object may say what it likes,
so it is first compared with wrong values, which the candidate cannot tell from the right one.
"""

from __future__ import annotations

import builtins
import operator
from types import CodeType, SimpleNamespace

TYPE_CHECKING = False  # importing typing and collections would treble the start-up time
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

# The candidate can replace builtins, but not for the functions below.
__builtins__ = vars(builtins).copy()  # type: ignore[assignment]

HELPER = "the comparisons of the control"  # stands for the functions in the source of the tests
_OPERATORS: dict[str, Callable] = {
    **{"==": operator.eq, "!=": operator.ne, "is": operator.is_, "is not": operator.is_not},
    **{"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge},
    **{"in": lambda a, b: a in b, "not in": lambda a, b: a not in b},
}
_MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "in": "contains"}
_TOO_FAR = {"<": -(10**100), "<=": -(10**100), ">": 10**100, ">=": 10**100}
_SCALARS = {bool, int, float, complex, str, bytes, type(None)}
_COLLECTIONS = {list, tuple, set, frozenset}


def bind(tests: CodeType, report: Callable[[], None]) -> CodeType:
    """Put the comparisons in the place of HELPER in compiled tests.

    No name leads to them, so the candidate can neither ask for it nor replace them by it.

    Args:
        tests: The compiled control.
        report: Called when a comparison holds with a wrong value.

    Returns:
        The code to run.
    """
    helper = SimpleNamespace(
        compare=lambda symbols, *operands: _compare(report, symbols, operands),
        near=lambda symbols, *operands: _near(report, symbols[0], operands),
    )
    return _replace_constant(tests, helper)


def _replace_constant(code: CodeType, helper: SimpleNamespace) -> CodeType:
    constants = list(code.co_consts)
    for index, constant in enumerate(constants):
        if isinstance(constant, CodeType):
            constants[index] = _replace_constant(constant, helper)
        elif constant == HELPER:
            constants[index] = helper
    return code.replace(co_consts=tuple(constants))


def _compare(report: Callable[[], None], symbols: tuple, operands: tuple) -> object:
    """Return what `a < b == c` does, except that all operands have been evaluated before."""
    result: object = True
    for symbol, left, right in zip(symbols, operands, operands[1:]):
        compared = _OPERATORS[symbol]
        if not _plain(left) and any(_holds(compared, left, w) for w in _wrong(symbol, right)):
            report()
        mirrored = _MIRRORED.get(symbol, symbol)
        if not _plain(right) and any(_holds(compared, w, right) for w in _wrong(mirrored, left)):
            report()
        result = compared(left, right)
        if not result:
            break
    return result


def _near(report: Callable[[], None], symbol: str, operands: tuple) -> object:
    """Return what `function(a - b) < limit` or `function(a) < limit` does.

    Each term that is a number is first replaced by one that is too far away, as subtraction may be
    the answer's, and the function may be the candidate's.
    """
    function, *terms, limit = operands

    def within(*terms: Any) -> object:
        size = function(terms[0] - terms[1] if len(terms) == 2 else terms[0])
        return _OPERATORS[symbol](size, limit)

    def within_far_away(index: int) -> object:
        term = terms[index]
        far = term + abs(term) + 3 * limit + 1
        return within(*terms[:index], far, *terms[index + 1 :])

    numbers = [index for index, term in enumerate(terms) if type(term) in (int, float)]
    if any(_holds(within_far_away, index) for index in numbers):
        report()
    return within(*terms)


def _holds(compared: Callable, *operands: object) -> bool:
    try:
        return bool(compared(*operands))
    except Exception:  # the candidate's code
        return False


def _plain(value: Any) -> bool:
    kind = type(value)
    if kind is dict:
        return all(_plain(key) and _plain(value[key]) for key in value)
    return kind in _SCALARS or (kind in _COLLECTIONS and all(map(_plain, value)))


def _wrong(symbol: str, value: Any) -> Iterator[object]:
    """Yield values with which a comparison must not hold if it holds with the right operand."""
    if symbol == "==":
        yield from _others(value)
    elif symbol in _TOO_FAR and type(value) in (int, float):
        yield type(value)(_TOO_FAR[symbol])
    elif symbol == "in" and type(value) in _COLLECTIONS:
        yield [other for part in value for other in _others(part) if other not in value]
    elif symbol == "contains":
        yield object()


def _others(value: Any) -> Iterator[object]:
    """Yield other values, of the same type where possible, as `__eq__` may look at the type.

    Of a list, tuple or dict, each yielded one has another element, as `__eq__` may be an element's.
    """
    kind = type(value)
    if kind is bool:
        yield not value
    elif kind in (int, float, complex):
        yield from {value + 1, -value} - {value}
    elif kind is str:
        yield value[:-1] + ("b" if value.endswith("a") else "a")
        yield value + "a"
    elif kind in (list, tuple):
        for index, part in enumerate(value):
            for other in _others(part):
                yield value[:index] + kind([other]) + value[index + 1 :]
        yield value + kind([None])
    elif kind is dict:
        for key in value:
            yield from ({**value, key: other} for other in _others(value[key]))
        yield {**value, object(): None}
    elif kind in (set, frozenset):
        yield value ^ {None}
    else:
        yield object()
