"""Measure tokens per CPU-second of the encode step and the job, beside tokenizers and datatrove.

    python benchmarks/bench_tokenize.py [--megabytes 60] [--rounds 3] [--tokenizer FOLDER]

In one run the contenders are interleaved, on the same text: this Python's standard library and the
sources of the installed packages. datatrove's contender is its own DocumentTokenizer. CPU time is
that of the whole process with its threads; Python imports are not part of it.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import streaming  # noqa: F401 (its import takes seconds, which are not the job's)
import tokenizers
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer

from retemper.pipeline.corpus.tokenizer import Tokenizer
from retemper.pipeline.schema.data import DataConfig
from retemper.tokenize.encode import Encode
from retemper.tokenize.encoder import load_encoder
from retemper.tokenize.job import tokenize
from retemper.tokenize.sources import read_documents

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--tokenizer", default=str(ROOT.parent / "shared" / "data" / "llama2-tokenizer")
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), arguments)


def run(folder: Path, arguments: argparse.Namespace) -> None:
    texts = collect(arguments.megabytes * 10**6)
    source = folder / "text" / "corpus.jsonl"
    source.parent.mkdir()
    source.write_text(
        "".join(
            json.dumps({"text": text, "id": str(number)}) + "\n"
            for number, text in enumerate(texts)
        )
    )
    contenders = Contenders(folder, texts, arguments.tokenizer)
    expected = contenders.tokens()
    print(
        f"{len(texts):,} documents, {sum(len(text.encode()) for text in texts) / 1e6:.0f} MB, "
        f"{expected:,} tokens, {arguments.rounds} rounds"
    )
    seconds: dict[str, list[float]] = {name: [] for name in contenders.all}
    for _ in range(arguments.rounds):
        for name, contender in contenders.all.items():
            prepared = contender()
            started = time.process_time()
            prepared()
            seconds[name].append(time.process_time() - started)
    rates = {name: expected / statistics.median(values) for name, values in seconds.items()}
    for name, rate in rates.items():
        spread = ", ".join(f"{expected / value / 1e6:.2f}" for value in seconds[name])
        print(f"{name:40} {rate / 1e6:6.2f} M tokens/CPU-s   ({spread})")
    for name, other, wanted in (
        ("encode step", "datatrove DocumentTokenizer step", 12),
        ("encode step", "tokenizers.encode_batch", 12),
        ("jsonl to MDS", "encode step", 0.35),
        ("jsonl to MDS", "jsonl to DocumentTokenizer", 12),
    ):
        ratios = [there / here for here, there in zip(seconds[name], seconds[other])]
        print(
            f"{name} / {other}: {statistics.median(ratios):.2f} "
            f"(wanted {wanted}; rounds {min(ratios):.2f} to {max(ratios):.2f})"
        )


def collect(size: int) -> list[str]:
    """Return distinct Python files, about `size` bytes of them."""
    texts: dict[str, None] = {}
    total = 0
    for path in ("stdlib", f"{Path(np.__file__).parent.parent}"):
        for document in read_documents(config(Path(), path).source):
            if document.text.strip() and document.text not in texts and "\0" not in document.text:
                texts[document.text] = None
                total += len(document.text.encode())
                if total > size:
                    return list(texts)
    return list(texts)


def config(folder: Path, path: str, **changes) -> DataConfig:
    source = {
        "kind": "text",
        "path": path,
        "glob": "**/*.py",
        "exclude": ["site-packages", "__pycache__"] if path == "stdlib" else [],
    }
    values = {
        "name": "bench",
        "path": str(folder / "mds"),
        "tokenizer": "",
        "seq_length": 4096,
        "tasks": 1,
        "source": source,
    }
    return DataConfig.model_validate(values | changes)


class Contenders:
    """The contenders: each prepares (unmeasured) and returns the call that is measured."""

    def __init__(self, folder: Path, texts: list[str], tokenizer: str):
        self.folder, self.texts, self.tokenizer = folder, texts, tokenizer
        self.backend = tokenizers.Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
        self.backend.encode_special_tokens = True
        self.run_number = 0
        self.all = {
            "tokenizers.encode_batch": lambda: (
                lambda: self.backend.encode_batch(self.texts, add_special_tokens=False)
            ),
            "datatrove DocumentTokenizer step": self._datatrove_step,
            "encode step": self._encode_step,
            "jsonl to DocumentTokenizer": self._datatrove_job,
            "jsonl to MDS": self._job,
        }

    def tokens(self) -> int:
        """Return the number of tokens.

        Every id of the encode step is compared with tokenizers' before.
        """
        expected = self.backend.encode_batch(self.texts, add_special_tokens=False)
        eos = Tokenizer(self.tokenizer).eos_id
        for document, encoding in zip(self._encoded(), expected, strict=True):
            assert document.metadata["token_ids"].tolist() == [*encoding.ids, eos], document.id
        return sum(len(encoding.ids) + 1 for encoding in expected)

    def _encoded(self):
        step = Encode(Tokenizer(self.tokenizer), "gigatoken", bos=False, eos=True)
        documents = [
            Document(text, str(number), metadata={"utf8": text.encode(), "prompt_chars": 0})
            for number, text in enumerate(self.texts)
        ]
        return step.run(iter(documents))

    def _encode_step(self):
        documents = self._encoded()

        def measured():
            for _ in documents:
                pass

        return measured

    def _new_folder(self) -> Path:
        self.run_number += 1
        return self.folder / f"run{self.run_number}"

    def _document_tokenizer(self, folder: Path) -> DocumentTokenizer:
        return DocumentTokenizer(
            str(folder / "tokens"), f"{self.tokenizer}/tokenizer.json", eos_token="</s>"
        )

    def _datatrove_step(self):
        step = self._document_tokenizer(self._new_folder())
        documents = [Document(text, str(number)) for number, text in enumerate(self.texts)]
        return lambda: step.run(iter(documents)) and None

    def _datatrove_job(self):
        folder = self._new_folder()
        steps = [JsonlReader(str(self.folder / "text")), self._document_tokenizer(folder)]
        return LocalPipelineExecutor(steps, tasks=1, logging_dir=str(folder / "logs")).run

    def _job(self):
        source = {"kind": "rows", "path": str(self.folder / "text")}
        data = config(
            self._new_folder(), "", tokenizer=self.tokenizer, source=source, compression="zstd"
        )
        load_encoder.cache_clear()  # every job loads its encoder, as datatrove's does
        return lambda: tokenize(data, progress=False)


if __name__ == "__main__":
    sys.exit(main())
