"""Prepare what the GPU benches read: corpora of real text, and the measured commit without git.

    python benchmarks/bench_gpu.py corpora FOLDER    once, on any machine: FOLDER/long, ...
    python benchmarks/bench_gpu.py commit FILE       for a copy of the tree without git

Then, on the machine with the GPU, each with the results of earlier runs kept beside its own:

    python benchmarks/gpu_lora.py FOLDER --seconds 240       LoRA: kernels, graphs
    python benchmarks/gpu_correct.py FOLDER --seconds 240    tests, curves, graph against eager
    python benchmarks/gpu_full.py FOLDER --seconds 240       full training of 7B, with 140 GB
    python benchmarks/gpu_table.py                           README's table of all results

benchmarks/results/gpu.json holds the results of commit 645f4c6, before these scripts.
"""

import ast
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LONG, SHORT, DOCUMENTS = "long", "short", "documents"
# Tokens kept of each corpus, two bytes each on disk. Of LONG the full training of 8 steps takes 16
# samples of 4096 a step; of DOCUMENTS a part of LoRA 8 a step; SHORT is read about twice by a curve
# of 300 steps.
TOKENS = {LONG: 640_000, SHORT: 2_200_000, DOCUMENTS: 400_000}
SEQ_LENGTH = {LONG: 4096, SHORT: 512, DOCUMENTS: 4096}
# Characters of one function, so that documents have some hundred tokens as SQuAD's have (fewer than
# 500 in the mean).
SHORTEST, LONGEST = 300, 1500


def main(arguments: list[str]) -> None:
    match arguments:
        case ["corpora", folder]:
            make_corpora(Path(folder))
        case ["commit", file]:
            from gpu_machine import commit_of_tree

            Path(file).write_text(json.dumps(commit_of_tree()) + "\n")
        case _:
            sys.exit(__doc__)


def make_corpora(folder: Path) -> None:
    """Tokenize this Python's standard library into folder/<name>; what is there already stays as it
    is.
    """
    from retemper.pipeline.config.compose import load_data_config
    from retemper.pipeline.corpus.tokenizer import train_tokenizer
    from retemper.tokenize.job import tokenize
    from retemper.tokenize.sources import read_documents

    rows = folder / "functions.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in functions()))
    data = {name: load_data_config(of_source(folder, name, rows)) for name in SEQ_LENGTH}
    train_tokenizer(
        (document.text for document in read_documents(data[SHORT].source)),
        2048,
        folder / "tokenizer",
    )
    for corpus in data.values():
        tokenize(corpus)
    rows.unlink()


def of_source(folder: Path, name: str, rows: Path) -> list[str]:
    """Return the overrides of a corpus as it is tokenized.

    Args:
        rows: the jsonl file of DOCUMENTS.
    """
    asked = ["data=demo_code", f"data.name={name}", f"data.path={folder / name}"]
    asked += [f"data.tokenizer={folder / 'tokenizer'}", f"data.tokens={TOKENS[name]}"]
    asked += [
        f"data.seq_length={SEQ_LENGTH[name]}",
        "data.source.path=stdlib",
        "data.heldout_fraction=0",
    ]
    if name == DOCUMENTS:
        asked += ["data.source.kind=rows", f"data.source.path={rows}", "data.source.glob=null"]
        asked += ["data.source.exclude=[]", "data.packing=best_fit"]
    return asked


def functions() -> Iterator[str]:
    """Yield the source of the standard library's functions of SHORTEST to LONGEST characters."""
    library = Path(sysconfig.get_path("stdlib"))
    excluded = {
        "site-packages",
        "dist-packages",
        "__pycache__",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
    }
    for path in sorted(library.rglob("*.py")):
        if excluded & set(path.relative_to(library).parts):
            continue
        text = path.read_text(errors="replace")
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        lines = text.splitlines(keepends=True)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                function = "".join(lines[node.lineno - 1 : node.end_lineno])
                if SHORTEST <= len(function) <= LONGEST:
                    yield function


if __name__ == "__main__":
    main(sys.argv[1:])
