"""The verbs for models of other libraries: import and export."""

import argparse
from pathlib import Path
from typing import Any

from retemper.pipeline.commands.options import add_verb, announce_loading
from retemper.pipeline.errors import UserError


def add_to(verbs: Any) -> None:
    """Add the verbs of this file to the parser."""
    _add_import(verbs)
    _add_export(verbs)


def _add_import(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "import",
        _import,
        "Convert a transformers folder to a checkpoint that runs can name in init_from. "
        "Its logits are compared with those of transformers.",
        [
            "retemper import Llama-2-7b-hf/ runs/models/llama2-7b",
            "retemper import Llama-3.1-70B/ runs/models/llama3-70b parallel.tensor_parallel_size=8",
        ],
        positionals={
            "folder": "transformers folder, or a name on the Hugging Face hub",
            "run": "folder to create, for init_from",
        },
        keys="parallel=… and parallel.…=…, for a model that one process cannot hold",
    )
    verb.add_argument(
        "--trust",
        metavar="NAME",
        help="name of the folder, to accept one that contains Python code; the code is not run",
    )


def _add_export(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "export",
        _export,
        "Write a checkpoint in the format of transformers, or its adapters in the format of peft. "
        "The written files are compared with the checkpoint before the export counts as complete.",
        [
            "retemper export runs/demo/full exported/",
            "retemper export runs/paper/lora adapter/ --adapter --step 500",
        ],
        positionals={"run": "folder of the run", "folder": "folder to create"},
        keys=None,
    )
    verb.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    verb.add_argument(
        "--adapter",
        action="store_true",
        help="export only the adapters, for peft (default: merged into the model)",
    )
    verb.add_argument(
        "--base",
        metavar="NAME",
        help="with --adapter: base model that the adapter refers to, a hub name or a transformers "
        "folder (default: the one that was imported)",
    )
    verb.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="tokenizer for a model that was never imported (default: the run's data.tokenizer)",
    )


def _import(arguments: argparse.Namespace) -> int:
    _refuse_existing(arguments.run)
    announce_loading("torch, megatron-core and transformers")
    from retemper.launch.local import run_here
    from retemper.pipeline.config.compose import load_parallel
    from retemper.pipeline.config.validate import check_setup
    from retemper.pipeline.huggingface.source_config import (
        model_of,
        read_config,
        transformers_folder,
    )
    from retemper.pipeline.schema.exchange import ImportRequest
    from retemper.pipeline.schema.model import MethodConfig, ModelSetup

    parallel = load_parallel(arguments.keys)
    # Check all that config.json determines before any rank starts: the ranks then read the rest.
    folder = transformers_folder(arguments.folder, arguments.folder)
    model = model_of(read_config(folder), folder)
    check_setup(ModelSetup(model=model, method=MethodConfig(name="full"), parallel=parallel))
    request = ImportRequest(
        folder=str(folder),
        run=arguments.run,
        name=None if Path(arguments.folder).exists() else arguments.folder,
        trust=arguments.trust,
        keys=arguments.keys,
    )
    return run_here("retemper.pipeline.huggingface", request.arguments, parallel.world_size)


def _export(arguments: argparse.Namespace) -> int:
    from retemper.launch.local import run_here
    from retemper.pipeline.schema.exchange import ExportRequest

    _refuse_existing(arguments.folder)
    if arguments.base and not arguments.adapter:
        raise UserError(
            "--base requires --adapter: an exported model already contains the weights of its base"
        )
    announce_loading("torch, megatron-core and transformers")
    request = ExportRequest(
        run=arguments.run,
        folder=arguments.folder,
        step=arguments.step,
        adapter=arguments.adapter,
        base=arguments.base,
        tokenizer=arguments.tokenizer,
    )
    return run_here("retemper.pipeline.huggingface", request.arguments, 1)


def _refuse_existing(target: str) -> None:
    if Path(target).exists():
        raise UserError(f"{target} exists already: remove it, or choose another folder")
