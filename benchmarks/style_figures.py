"""Print figures of style of the product code: `python benchmarks/style_figures.py`."""

import ast
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).parents[1]
CODE = ("pipeline", "tokenize", "launch")
MOST_COLUMNS = 100


def figures(root: Path = ROOT) -> dict[str, float]:
    """Return each figure by its name, over all product code below a checkout."""
    files = [path for name in CODE for path in sorted((root / name).rglob("*.py"))]
    texts = [path.read_text() for path in files]
    lines = [line for text in texts for line in text.splitlines()]
    trees = [ast.parse(text) for text in texts]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    functions = [node for node in nodes if _is_function(node)]
    lengths = [_length(node) for node in functions]
    code = [_length(node) - _docstring_length(node) for node in functions]
    unrelated = sum(map(is_unrelated, nodes))
    return {
        "lines": len(lines),
        f"lines over {MOST_COLUMNS} columns": sum(len(line) > MOST_COLUMNS for line in lines),
        "functions": len(lengths),
        "function length, median": median(lengths),
        "function length without its docstring, median": median(code),
        "function length, p90": quantiles(lengths, n=10)[-1],
        "function length, max": max(lengths),
        "unrelated parallel assignments": unrelated,
        "unrelated parallel assignments per 1,000 lines": round(1000 * unrelated / len(lines), 2),
        "walrus operators per 1,000 lines": round(
            1000 * sum(isinstance(node, ast.NamedExpr) for node in nodes) / len(lines), 2
        ),
    }


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def _length(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


def _docstring_length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return _length(node.body[0]) if ast.get_docstring(node) is not None else 0


def is_unrelated(node: ast.AST) -> bool:
    """Whether a statement assigns values that are not one thing: `a, b = x(), y` and its kind.

    One thing are constants, and attributes of one object, as the sizes of a layout.
    """
    if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)):
        return False
    if not all(isinstance(target, ast.Tuple) for target in node.targets):
        return False
    values = node.value.elts
    if all(isinstance(value, ast.Constant) for value in values):
        return False
    owners = {ast.dump(value.value) for value in values if isinstance(value, ast.Attribute)}
    return not (len(owners) == 1 and all(isinstance(value, ast.Attribute) for value in values))


if __name__ == "__main__":
    for name, value in figures().items():
        print(f"{name:50} {value:10,.2f}".rstrip("0").rstrip("."))
