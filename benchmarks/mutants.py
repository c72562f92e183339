"""Plant faults in the code, one at a time, and see whether the default tests notice them.

    python benchmarks/mutants.py draw [--count 50] [--seed 1]
    python benchmarks/mutants.py run [--count 50] [--seed 1] [--results FILE] [--whole]

A fault is one change of one line: a comparison, an operator, a constant, a condition, or a call
that is left out. As many are drawn from each package as its share of the lines, without code that
only a GPU runs. `run` takes about a minute a fault: it runs the test files that import the changed
module, or else those of its package. `run --whole` runs all tests on what these did not notice.
Both continue where they stopped.
"""

import argparse
import ast
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"
CODE = ("pipeline", "tokenize", "launch")
ONLY_ON_A_GPU = {
    "lora_te.py",
    "lion_triton.py",
    "activations_te.py",
    "fp8.py",
    "graph.py",
    "kernels.py",
}
COMPARISONS = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.In: "not in",
    ast.NotIn: "in",
    ast.Is: "is not",
    ast.IsNot: "is",
}
SECONDS_OF_NEAREST = 150
UNNOTICED_BY_NEAREST = "not noticed by the nearest tests"
UNNOTICED = "not noticed"
OPERATORS = {ast.Add: "-", ast.Sub: "+", ast.Mult: "//", ast.FloorDiv: "*", ast.Mod: "//"}


@dataclass(frozen=True)
class Fault:
    """A change of a file: the text between two offsets becomes another."""

    file: str
    line: int
    start: int
    end: int
    text: str

    def describe(self) -> str:
        source = (ROOT / self.file).read_text()
        return f"{self.file}:{self.line}: {source[self.start : self.end]!r} -> {self.text!r}"


def faults_of(path: Path) -> list[Fault]:
    """Return every fault that can be planted in a file."""
    source = path.read_text()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    name = str(path.relative_to(ROOT))
    faults = []

    def offset(line: int, column: int) -> int:
        text = source[starts[line - 1] : starts[line]].encode()[:column].decode()
        return starts[line - 1] + len(text)

    def add(node: ast.AST, text: str, start: int | None = None, end: int | None = None) -> None:
        begin = offset(node.lineno, node.col_offset) if start is None else start
        stop = offset(node.end_lineno, node.end_col_offset) if end is None else end
        faults.append(Fault(name, node.lineno, begin, stop, text))

    def between(left: ast.AST, right: ast.AST) -> tuple[int, int]:
        return (
            offset(left.end_lineno, left.end_col_offset),
            offset(right.lineno, right.col_offset),
        )

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
            start, end = between(node.left, node.comparators[0])
            if "(" not in source[start:end] and ")" not in source[start:end]:
                add(node, f" {COMPARISONS[type(node.ops[0])]} ", start, end)
        elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            if isinstance(node.left, ast.Constant) and isinstance(node.left.value, str):
                continue
            start, end = between(node.left, node.right)
            if "(" not in source[start:end] and ")" not in source[start:end]:
                add(node, f" {OPERATORS[type(node.op)]} ", start, end)
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            add(node, str(node.value + 1))
        elif isinstance(node, ast.If) and not isinstance(node.test, ast.Name):
            add(node.test, "False")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            add(node, ast.get_source_segment(source, node.operand))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            add(node, "None")
    return faults


def draw(count: int, seed: int) -> list[Fault]:
    """Return the faults of a seed, from each package by its share of the lines."""
    files = defaultdict(list)
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name not in ONLY_ON_A_GPU and path.stat().st_size:
                files[path.parent].append(path)
    lines = {
        folder: sum(len(path.read_text().splitlines()) for path in paths)
        for folder, paths in files.items()
    }
    rng = random.Random(seed)
    folders = sorted(files)
    chosen = rng.choices(folders, [lines[folder] for folder in folders], k=count)
    return [
        rng.choice([fault for path in files[one] for fault in faults_of(path)]) for one in chosen
    ]


def first_failure(fault: Fault, copy: Path, selection: list[str]) -> str:
    """Run the default tests on a copy with a fault; return the first test that fails, or "".

    selection: further arguments of pytest.
    """
    changed = copy / fault.file
    source = changed.read_text()
    changed.write_text(source[: fault.start] + fault.text + source[fault.end :])
    environment = os.environ | {
        "PYTHONPATH": str(copy),
        "RETEMPER_SHARED_DATA": os.environ.get(
            "RETEMPER_SHARED_DATA", str(ROOT.parent / "shared" / "data")
        ),
    }
    pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "2", "--dist", "loadfile"]
    pytest += ["--no-loadscope-reorder", "-m", "not slow and not gpu"]
    try:
        result = subprocess.run(
            [*pytest, *selection],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS_OF_NEAREST if selection else None,
        )
    except subprocess.TimeoutExpired:
        return ""
    finally:
        changed.write_text(source)
    failed = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if failed:
        return failed[0].partition(" - ")[0]
    if result.returncode not in (0, 5):  # 5: no test was selected
        return (result.stdout + result.stderr)[-200:]
    return ""


def nearest_tests(file: str) -> list[str]:
    """Return the test files in tests/unit that import a module, or else its package, or else all.

    Tests on several ranks are taken only if there is no such file in tests/unit.
    """
    module = "retemper." + file.removesuffix(".py").replace("/", ".")
    package, _, name = module.rpartition(".")
    imports = (f"from {module} import", f"from {package} import {name}"), (f"from {package}",)
    for texts in imports:
        for folder in ("tests/unit", "tests/multiproc"):
            files = [
                str(path.relative_to(ROOT))
                for path in sorted((ROOT / folder).glob("test_*.py"))
                if any(text in path.read_text() for text in texts)
            ]
            if files:
                return files
    return ["tests/unit"]


def run(faults: list[Fault], file: Path, *, whole: bool) -> None:
    """Test each fault that was not noticed before, and record the results after each."""
    results = json.loads(file.read_text()) if file.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)
        for fault in faults:
            description = fault.describe()
            known = results.get(description)
            if known is None or (whole and known == UNNOTICED_BY_NEAREST):
                found = first_failure(fault, copy, [] if whole else nearest_tests(fault.file))
                results[description] = found or (UNNOTICED if whole else UNNOTICED_BY_NEAREST)
                file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
            print(f"{description}: {results[description]}", flush=True)
    noticed = sum(
        results[fault.describe()] not in (UNNOTICED_BY_NEAREST, UNNOTICED) for fault in faults
    )
    print(f"{noticed} of {len(faults)} faults were noticed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("draw", "run"))
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--whole",
        action="store_true",
        help="run all default tests on the faults that the nearest tests did not notice",
    )
    arguments = parser.parse_args()
    faults = draw(arguments.count, arguments.seed)
    if arguments.action == "run":
        run(faults, arguments.results, whole=arguments.whole)
        return
    print("\n".join(fault.describe() for fault in faults))


if __name__ == "__main__":
    main()
