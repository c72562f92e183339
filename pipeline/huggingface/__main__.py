"""One rank of `retemper import` or `retemper export`.

Started as `python -m retemper.pipeline.huggingface import REQUEST`; schema/exchange.py has the
requests, which are passed as JSON.
"""

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from retemper.pipeline.checkpoint import commit
from retemper.pipeline.config.compose import load_parallel
from retemper.pipeline.config.validate import check_setup
from retemper.pipeline.distributed import topology as topologies
from retemper.pipeline.distributed.collectives import barrier
from retemper.pipeline.distributed.exit import exit_now
from retemper.pipeline.entry.rank import run_prepared
from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.exchange import ExportRequest, ImportRequest
from retemper.pipeline.schema.model import MethodConfig, ModelSetup, ParallelConfig


def main(verb: str, request: str) -> int:
    topologies.prepare_megatron()  # before the first import of megatron-core
    if verb == "import":
        return run_prepared(*importing(ImportRequest.model_validate_json(request)))
    export = ExportRequest.model_validate_json(request)
    prepare, work = exporting(export)
    return run_prepared(prepare, work, export.error_file)


def importing(request: ImportRequest):
    """Return the functions (prepare, work) for `run_prepared` to import a transformers folder."""
    import torch

    from retemper.pipeline.corpus.tokenizer import Tokenizer
    from retemper.pipeline.huggingface.source_config import passed_over
    from retemper.pipeline.huggingface.source_folder import Weights

    source = Path(request.folder)
    target = Path(request.run)
    weights = None

    def prepare():
        nonlocal weights
        weights = Weights(source, trusted=request.trust == source.resolve().name)
        bf16 = all(weights.dtype(name) == torch.bfloat16 for name in weights.names)
        method = MethodConfig(name="full")
        parallel = load_parallel(request.keys)
        setup = check_setup(
            ModelSetup(
                model=weights.model,
                method=method,
                parallel=parallel,
                precision="bf16" if bf16 else "fp32",
            )
        )
        topologies.check_world_size(setup)
        tokenizer = Tokenizer(source)
        if tokenizer.vocab_size > weights.model.vocab_size:
            raise UserError(
                f"{source}: its tokenizer has {tokenizer.vocab_size} tokens, "
                f"its config.json a vocab_size of only {weights.model.vocab_size}: "
                "they are not of the same model"
            )
        return setup, {"tokenizer": tokenizer.sha256}

    def work(setup, topology, fingerprints):
        from retemper.pipeline.huggingface.load import ORIGIN, import_weights
        from retemper.pipeline.huggingface.streamed import StreamedModel
        from retemper.pipeline.huggingface.verify import summary, verify

        with _whole_or_nothing(target, topology) as partial:
            tokenizer = fingerprints["tokenizer"]
            import_weights(weights, request.name, setup, topology, tokenizer, partial)
            topologies.stop(leave=False)
            topology = topologies.start(ParallelConfig(data_parallel_size=topology.world_size))
            streamed = StreamedModel(partial, 0, topology)
            if topology.rank == 0:
                verify(streamed, source, None, partial / ORIGIN, source=source, rounded=False)
        if topology.rank == 0:
            if unused := passed_over(weights.config):
                print(f"passed over in config.json, without effect here: {', '.join(unused)}")
            print(
                f"{target}: {weights.model.num_layers} layers from {source}, "
                f"for init_from={target}\n{summary(target / ORIGIN)}"
            )

    return prepare, work


def exporting(request: ExportRequest):
    """Return the functions (prepare, work) for `run_prepared` to export a checkpoint."""
    run_dir = Path(request.run)
    target = Path(request.folder)
    step = request.step

    def prepare():
        chosen = commit.folder_of(run_dir, step) if step is not None else commit.newest(run_dir)
        if not (chosen / commit.META).is_file():
            raise UserError(
                f"{chosen} is no checkpoint; "
                f"{run_dir} has those after the steps {commit.committed_steps(run_dir)}"
            )
        meta = commit.sealed_meta(chosen)
        if not request.adapter:
            from retemper.pipeline.huggingface.export import tokenizer_of

            tokenizer_of(chosen, meta, request.tokenizer)
        return ModelSetup.of(meta["config"], ParallelConfig()), {
            "checkpoint": commit.fingerprint(chosen)
        }

    def work(_setup, topology, _fingerprints):
        from retemper.pipeline.huggingface import export
        from retemper.pipeline.huggingface.streamed import StreamedModel
        from retemper.pipeline.huggingface.verify import summary, verify

        streamed = StreamedModel(run_dir, step, topology)
        with _whole_or_nothing(target, topology) as partial:
            if request.adapter:
                name, reference = export.base_of(streamed, request.base)
                export.export_adapter(streamed, partial, name)
                verify(streamed, reference, partial, partial, source=run_dir, rounded=False)
                description = f"as a peft adapter of {name}"
            else:
                chosen = export.tokenizer_of(streamed.folder, streamed.meta, request.tokenizer)
                rounding = export.export_model(streamed, partial, chosen)
                rounded = bool(rounding.rounded)
                verify(streamed, partial, None, partial, source=run_dir, rounded=rounded)
                description = f"for transformers; {rounding}"
        print(f"{target}: {streamed.folder} {description}\n{summary(target)}")

    return prepare, work


@contextlib.contextmanager
def _whole_or_nothing(target: Path, topology: topologies.Topology) -> Iterator[Path]:
    """Yield a folder to write into, which is renamed to `target` at the end.

    After an error it is removed.
    """
    partial = target.with_name(target.name + ".partial")
    if topology.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    try:
        yield partial
        if topology.rank == 0:
            partial.rename(target)
    finally:
        if topology.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)


if __name__ == "__main__":
    exit_now(main(*sys.argv[1:]))
