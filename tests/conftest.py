"""Provide real text, a small tokenizer, corpora, and launches of real ranks to all tests."""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STARTED = time.monotonic()
# Real evaluation files, tokenizer and weights, which the project never copies in.
SHARED_DATA = Path(os.environ.get("RETEMPER_SHARED_DATA", ROOT.parent / "shared" / "data"))
VOCAB_SIZE = 300  # no multiple of 128: the vocabulary is padded
SEQ_LENGTH = 64

# A run small enough for a hundred of them, on every feature of the demo's.
TINY = [
    "study=test",
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    f"model.vocab_size={VOCAB_SIZE}",
    f"model.max_sequence_length={SEQ_LENGTH}",
    f"data.seq_length={SEQ_LENGTH}",
    "precision=fp32",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    f"train.tokens={10 * 8 * SEQ_LENGTH}",
    "train.log_every_steps=1",
    "schedule.warmup_tokens=1024",
    "optimizer.lr=5e-3",
    "evals.max_samples=11",
    "evals.micro_batch_size=4",
    "track.wandb=off",
]


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """Return a folder with data/tokenizer and the corpora data/code and data/math.

    The real tokenize job writes them.
    """
    import email

    import sympy.core

    folder = tmp_path_factory.mktemp("workspace")
    code, math = Path(email.__file__).parent, Path(sympy.core.__file__).parent
    from retemper.pipeline.corpus.tokenizer import train_tokenizer
    from retemper.tokenize.job import tokenize
    from retemper.tokenize.sources import read_documents

    corpora = {
        "code": data_config(folder, "code", "text", code),
        "math": data_config(folder, "math", "docstrings", math),
    }
    texts = [
        document.text for corpus in corpora.values() for document in read_documents(corpus.source)
    ]
    train_tokenizer(texts, VOCAB_SIZE, folder / "data" / "tokenizer")
    for corpus in corpora.values():
        tokenize(corpus, progress=False)
    return folder


def data_config(folder: Path, name: str, kind: str = "text", documents: Path = Path(), **changes):
    """Return a DataConfig below `folder`, of Python files below `documents`."""
    from retemper.pipeline.schema.data import DataConfig

    values = {
        "name": name,
        "path": str(folder / "data" / name),
        "tokenizer": str(folder / "data" / "tokenizer"),
        "seq_length": SEQ_LENGTH,
        "heldout_fraction": 0.2,
        "source": {
            "kind": kind,
            "path": str(documents),
            "glob": "**/*.py",
            "exclude": ["tests", "__pycache__"],
        },
    }
    return DataConfig.model_validate(values | changes)


def overrides(workspace: Path, name: str, *changes: str, corpus: str = "math") -> list[str]:
    """Return the overrides of a tiny run on one of the workspace's corpora."""
    data = workspace / "data"
    return [
        *TINY,
        f"name={name}",
        f"runs_dir={workspace / 'runs'}",
        f"data=demo_{corpus}",
        f"data.path={data / corpus}",
        f"data.tokenizer={data / 'tokenizer'}",
        f"data.seq_length={SEQ_LENGTH}",
        f"evals.heldout.code={data / 'code'}",
        f"evals.heldout.math={data / 'math'}",
        *changes,
    ]


def run_command(
    arguments: list[str], cwd: Path = ROOT, timeout: int = 300, **options
) -> subprocess.CompletedProcess:
    """Run the `retemper` of this environment; text output captured."""
    command = [str(Path(sys.executable).parent / "retemper"), *arguments]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=timeout, **options
    )


class Ranks:
    """The ranks under torchrun that run lists of cases, one after another (multiproc/ranks.py)."""

    def __init__(self, world_size: int, folder: Path):
        self.world_size, self.folder, self.requests = world_size, folder, 0
        self.said = open(folder / "said", "w+")  # noqa: SIM115
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=127.0.0.1:0",
        ]
        command += [
            "--local-addr=127.0.0.1",
            f"--nproc-per-node={world_size}",
            str(ROOT / "tests" / "helpers" / "ranks.py"),
        ]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "NVIDIA_TF32_OVERRIDE": "0",
        }  # on a GPU, fp32 is fp32
        self.process = subprocess.Popen(
            [*command, str(folder), str(os.getpid())],
            stdout=self.said,
            stderr=subprocess.STDOUT,
            env=environment,
        )

    def run(self, script: str, cases: list[dict], timeout: int) -> None:
        """Run the cases; raise AssertionError with the output of the ranks if one of them fails."""
        request = self.folder / f"{self.requests}.json"
        whole = request.with_suffix(".tmp")
        whole.write_text(json.dumps({"script": script, "cases": cases}))
        whole.rename(request)
        deadline = time.monotonic() + timeout
        while not all(
            (self.folder / f"{self.requests}.{rank}").exists() for rank in range(self.world_size)
        ):
            assert self.process.poll() is None, self._words()
            assert time.monotonic() < deadline, (
                f"{self.world_size} ranks did not end {script} in {timeout} s: {self._words()}"
            )
            time.sleep(0.02)
        self.requests += 1

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)

    def _words(self) -> str:
        self.said.seek(0)
        lines = self.said.read().splitlines()
        said_by_ranks = [line for line in lines if line.startswith(("[rank", "error:"))]
        return "\n".join(said_by_ranks or lines)[-6000:]


_RANKS: dict[int, Ranks] = {}


def launch(world_size: int, cases: list[dict], script: str = "cases", timeout: int = 900) -> None:
    """Run cases one after another on the same real ranks: tests/helpers/cases.py trains them."""
    if world_size not in _RANKS:
        _RANKS[world_size] = Ranks(world_size, Path(tempfile.mkdtemp(prefix="retemper-ranks-")))
    try:
        _RANKS[world_size].run(script, cases, timeout)
    except AssertionError:
        _RANKS.pop(world_size).close()
        raise


def bits_per_byte(run: Path) -> dict[tuple[int, str], float]:
    """Return a run's held-out scores by step and domain."""
    from retemper.pipeline.runs import eval_folder

    return {
        (step, domain): scores["bits_per_byte"]
        for step, domains in eval_folder.read_scores(run).items()
        for domain, scores in domains.items()
    }


def pytest_addoption(parser) -> None:
    parser.addoption("--package", help="only tests whose file imports from this package")


def pytest_collection_modifyitems(config, items) -> None:
    if package := config.getoption("--package"):
        imports = f"from retemper.{package}.", f"from retemper.pipeline.{package}."
        kept = [item for item in items if any(text in item.path.read_text() for text in imports)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def pytest_terminal_summary(terminalreporter) -> None:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_seconds = sum(part.ru_utime + part.ru_stime for part in usage)
    seconds = time.monotonic() - STARTED
    terminalreporter.write_line(f"{seconds:.0f} s, {cpu_seconds:.0f} CPU-seconds")


def pytest_sessionfinish() -> None:
    for ranks in _RANKS.values():
        ranks.close()
        shutil.rmtree(ranks.folder)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return SHARED_DATA, or skip the test without it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is not here; set RETEMPER_SHARED_DATA")
    return SHARED_DATA


@pytest.fixture(scope="session")
def pairs(workspace) -> Path:
    """Return the folder of a corpus of instruction pairs.

    A sample has several whole pairs, and padding. The prompts ask for real functions by name.
    """
    import ast
    import email

    from retemper.tokenize.job import tokenize

    rows = []
    for path in sorted(Path(email.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is None:
                rows.append({"ask": node.name, "answer": ast.unparse(node.body)[:60]})
    folder = workspace / "pairs"
    folder.mkdir()
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "rows", "path": str(folder), "text_key": "answer", "prompt": "Write {ask}:\n"}
    corpus = data_config(workspace, "pairs", source=source, packing="best_fit")
    tokenize(corpus, progress=False)
    return Path(corpus.path)


@pytest.fixture(scope="session")
def wide(workspace) -> list[str]:
    """Return overrides of a model and of samples whose sizes are multiples of 128.

    Every 8-bit recipe supports them.
    """
    import email

    from retemper.tokenize.job import tokenize

    length = 128
    corpus = data_config(
        workspace, "wide", documents=Path(email.__file__).parent, seq_length=length
    )
    tokenize(corpus, progress=False)
    asked = [
        f"data.path={corpus.path}",
        "data.name=wide",
        f"data.seq_length={length}",
        f"model.max_sequence_length={length}",
    ]
    asked += [
        f"train.tokens={10 * 8 * length}",
        *(f"evals.heldout.{domain}={corpus.path}" for domain in ("code", "math")),
    ]
    return [*asked, "model.hidden_size=128", "model.ffn_hidden_size=256"]


@pytest.fixture(scope="session")
def store():
    """Start a real S3 endpoint on loopback with the empty bucket "corpora".

    It is behind a proxy that fails on request.
    """
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'retemper[s3]'")
    server = pytest.importorskip("moto.server", reason="moto's server is not installed")
    import boto3
    from faulty_store import FaultyStore

    endpoint = server.ThreadedMotoServer(port=0, verbose=False)
    endpoint.start()
    proxy = FaultyStore(*endpoint.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket="corpora")
        yield proxy
    proxy.close()
    endpoint.stop()
