"""Measure the memory of an import and of an export, in about four minutes.

    python benchmarks/bench_exchange.py

The figures are what a rank needs beyond its Python imports, beside the size of its shard and of the
model.
A random Llama of half a gigabyte, imported by one and by two ranks, exported by one.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tiny import TINY

HIDDEN, LAYERS = (64, 2) if TINY else (1024, 8)

RANK = """
import json, os, sys, threading, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from retemper.pipeline.distributed import topology
topology.prepare_megatron()
from retemper.pipeline.huggingface import verify
from retemper.pipeline.huggingface.__main__ import exporting, importing
from retemper.pipeline.schema.exchange import ExportRequest, ImportRequest
verify.verify = lambda *_, **__: None  # it holds transformers' model, and runs on one rank
verify.summary = lambda *_: ""
def resident(): return int(open("/proc/self/status").read().\
partition("RssAnon:")[2].split()[0]) >> 10  # pages of mapped files can be dropped
verb, options = sys.argv[2], json.loads(sys.argv[3])
prepare, work = (
    importing(ImportRequest(**options)) if verb == "import" else exporting(ExportRequest(**options))
)
setup, fingerprints = prepare()
place = topology.start(setup.parallel)
from retemper.pipeline.huggingface import export, load, streamed
before, peak = resident(), [0]
def watch():
    while True:
        peak[0] = max(peak[0], resident())
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
work(setup, place, fingerprints)
print("PEAK", place.rank, peak[0] - before, flush=True)
os._exit(0)
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rank.py").write_text(RANK)
        make_model(folder / "model")
        size = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors")) >> 20
        print(f"model   {size} MiB in fp32")
        for ranks in (1, 2):
            options = {
                "folder": str(folder / "model"),
                "run": str(folder / f"base{ranks}"),
                "keys": [f"parallel.tensor_parallel_size={ranks}"],
            }
            peaks = run(folder, ranks, "import", options)
            print(
                f"import  {ranks} rank(s): at most {peaks} MiB more than before, "
                f"a shard is {size // ranks} MiB"
            )
        options = {"run": str(folder / "base1"), "folder": str(folder / "out")}
        print(
            f"export  1 rank: at most {run(folder, 1, 'export', options)} MiB more than before "
            "(an output file holds up to 5 GB)"
        )


def make_model(folder: Path) -> None:
    import tokenizers
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=16, num_key_value_heads=16, vocab_size=4096,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")).save(
        str(folder / "tokenizer.json")
    )


def run(folder: Path, ranks: int, verb: str, options: dict) -> list[int]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        str(folder / "rank.py"),
    ]
    command += [str(Path(__file__).parent), verb, json.dumps(options)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return [
        int(line.split()[2])
        for line in sorted(result.stdout.splitlines())
        if line.startswith("PEAK")
    ]


if __name__ == "__main__":
    main()
