"""Measure the peak memory of a tokenize worker, which must not grow with the size of the corpus.

    python benchmarks/bench_tokenize_memory.py [--megabytes 50 100 200] [--tokenizer FOLDER]

The text is real Python sources, repeated with a different first line to reach the size (so that
the documents are distinct to deduplication and order).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_tokenize import ROOT, collect, config

WORKER = """
import sys
from retemper.pipeline.schema.data import DataConfig
from retemper.tokenize.job import tokenize
tokenize(DataConfig.model_validate_json(sys.argv[1]), progress=False)
status = open("/proc/self/status").read()
print(int(status.partition("VmHWM:")[2].split()[0]) * 1024)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[50, 100, 200, 400])
    parser.add_argument(
        "--tokenizer", default=str(ROOT.parent / "shared" / "data" / "llama2-tokenizer")
    )
    arguments = parser.parse_args()
    texts = collect(30 * 10**6)
    for megabytes in arguments.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            peak = peak_of(Path(folder), texts, megabytes * 10**6, arguments.tokenizer)
        print(f"{megabytes:5} MB of text: peak {peak / 2**30:.2f} GiB", flush=True)


def peak_of(folder: Path, texts: list[str], size: int, tokenizer: str) -> int:
    """Tokenize `size` bytes in one process of its own; its peak resident memory in bytes."""
    (folder / "text").mkdir()
    written = copy = 0
    with open(folder / "text" / "corpus.jsonl", "w") as file:
        while written < size:
            for number, text in enumerate(texts):
                written += file.write(
                    json.dumps({"text": f"# copy {copy} of {number}\n{text}"}) + "\n"
                )
                if written >= size:
                    break
            copy += 1
    source = {"kind": "rows", "path": str(folder / "text")}
    data = config(folder, "", tokenizer=tokenizer, source=source, compression="zstd")
    result = subprocess.run(
        [sys.executable, "-c", WORKER, data.model_dump_json()],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(result.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
