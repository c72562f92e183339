"""The job of `retemper tokenize`: from documents to the token shards of one corpus.

It runs in stages that can be interrupted and resumed.
"""

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from retemper.pipeline.config.differences import changed_keys
from retemper.pipeline.corpus.manifest import find_manifest
from retemper.pipeline.corpus.tokenizer import Tokenizer
from retemper.pipeline.errors import UserError
from retemper.pipeline.files.lock import only_one
from retemper.pipeline.schema.data import CorpusConfig
from retemper.tokenize import job_folder
from retemper.tokenize.clean import Clean
from retemper.tokenize.decontaminate import Decontaminate, Problems
from retemper.tokenize.encode import Encode
from retemper.tokenize.encoder import choose_encoder
from retemper.tokenize.executors import Stage, refuse_queued, run_stages
from retemper.tokenize.identify import Identify
from retemper.tokenize.listing import list_parts, locate
from retemper.tokenize.publish import Publish, find_damaged
from retemper.tokenize.select import Select
from retemper.tokenize.sketch import Sketch
from retemper.tokenize.sources import DocumentReader, prompt_wording
from retemper.tokenize.spool import ReadPart, Spool
from retemper.tokenize.write_shards import WriteBucket

# Settings that may change between runs of a job: they do not change what it writes.
_WHERE = {"path", "work_dir", "executor", "tasks", "slurm", "allow_broken_files"}
# Corpora that were made before a key existed equal those with its default, which is not recorded.
# Unless near-duplicates are dropped, the shards do not depend on this key.
_UNLESS_DROPPED = {"near_duplicates": "count or keep"}
_SAMPLE_PARTS, _SAMPLE_DOCUMENTS, _SAMPLE_CHARS = 8, 16, 20_000


def tokenize(data: CorpusConfig, *, progress: bool = True) -> dict | None:
    """Write the corpus data.path from the documents of data.source.

    A finished corpus is not changed, and an unfinished one is continued. data.path appears only
    when the corpus is complete.

    Returns:
        The manifest of the corpus, or None if the stages were submitted to Slurm.

    Raises:
        UserError: The settings or the documents are not usable, or data.path or the job's folder
            was made from another configuration or tokenizer.
    """
    if "://" not in data.path:
        data = data.model_copy(update={"path": os.path.abspath(data.path)})
    tokenizer = Tokenizer(data.tokenizer)
    tokenizer.require(bos=data.bos, eos=data.eos)
    work = _work_folder(data)
    _refuse_overlap(data, work)
    problems = Problems.read(data.decontaminate) if data.decontaminate else None
    made_from = _made_from(data, tokenizer, problems)
    if manifest := find_manifest(data.path):
        _refuse_changes(data.path, manifest["made_from"], made_from)
        damaged = find_damaged(data.path, manifest)
        if damaged is None:
            if work.exists():  # the job was killed after the corpus appeared, before the cleanup
                with _only_one(work):
                    job_folder.remove(work)
            return manifest
        print(
            f"warning: {data.path}/{damaged} is missing or damaged: the corpus is made again",
            file=sys.stderr,
        )
    elif "://" not in data.path and os.path.lexists(data.path):
        raise UserError(
            f"data.path={data.path} exists and is not a token corpus (manifest.json is missing): "
            "choose another folder"
        )
    with _only_one(work):
        if data.executor == "slurm":
            refuse_queued(data, work)
        stages = _stages(data, work, tokenizer, problems, made_from)
        if not run_stages(stages, data, work, progress=progress and sys.stderr.isatty()):
            return None
    return find_manifest(data.path)


def _stages(
    data: CorpusConfig, work: Path, tokenizer: Tokenizer, problems: Problems | None, made_from: dict
) -> list[Stage]:
    plan = _plan(data, work, tokenizer, made_from)
    dtype = tokenizer.dtype
    padding_id = tokenizer.bos_id if tokenizer.eos_id is None else tokenizer.eos_id
    assert padding_id is not None, "Tokenizer.require has found one of the two"
    reader = DocumentReader(
        data.source, plan.root, replace_invalid=data.clean.invalid_utf8 == "replace"
    )
    steps = [
        reader,
        Clean(data.clean),
        Identify(
            seed=data.seed, heldout_fraction=data.heldout_fraction, duplicates=data.clean.duplicates
        ),
    ]
    if problems:
        problems.save(work / "problems.npz")
        steps.append(Decontaminate(work / "problems.npz"))
    if plan.near_duplicates != "keep":
        steps.append(Sketch(prompt_wording(data.source)))
    token_bytes = tokenizer.token_bytes()
    encode = Encode(tokenizer, plan.encoder["name"], bos=data.bos, eos=data.eos)
    return [
        Stage(
            "encode",
            [ReadPart(work, reader), *steps[1:], encode, Spool(work, dtype, steps)],
            len(plan.parts),
        ),
        Stage("select", [Select(data, work, dtype)], 1),
        Stage(
            "write",
            [WriteBucket(data, work, dtype, padding_id, token_bytes)],
            len(plan.bucket_ids),
        ),
        Stage("publish", [Publish(data, work, tokenizer.sha256, token_bytes)], 1),
    ]


def _plan(data: CorpusConfig, work: Path, tokenizer: Tokenizer, made_from: dict) -> job_folder.Plan:
    """Return the job's plan.

    A job that has started keeps its pinned revision and its encoder, and reads again only the files
    that changed. It may get another data.tokens, which takes effect after the spool.
    """
    previous = job_folder.load_plan(work) if (work / "plan.json").is_file() else None
    root, glob = locate(data.source)
    if previous:
        _refuse_changes(str(work), previous.made_from | {"tokens": data.tokens}, made_from)
        root = previous.root
    parts, left_out = list_parts(data.source, root, glob)
    encoder = (
        previous.encoder
        if previous
        else choose_encoder(tokenizer, _sample_texts(data, root, parts))
    )
    return job_folder.make_plan(
        work,
        made_from,
        root,
        encoder,
        parts,
        left_out=left_out,
        heldout_fraction=data.heldout_fraction,
        near_duplicates=data.near_duplicates if data.heldout_fraction else "keep",
    )


def _sample_texts(data: CorpusConfig, root: str, parts: list) -> list[str]:
    reader = DocumentReader(data.source, root, replace_invalid=data.clean.invalid_utf8 == "replace")
    return [
        document.text[:_SAMPLE_CHARS]
        for part in parts[:: -(-len(parts) // _SAMPLE_PARTS)]
        for document in itertools.islice(reader.read_part(part), _SAMPLE_DOCUMENTS)
    ]


def _made_from(data: CorpusConfig, tokenizer: Tokenizer, problems: Problems | None) -> dict:
    made_from = {
        **data.model_dump(include=CorpusConfig.model_fields.keys() - _WHERE),
        "tokenizer": tokenizer.sha256,
    }
    made_from |= {
        "bos": tokenizer.bos_id if data.bos else None,
        "eos": tokenizer.eos_id if data.eos else None,
    }
    if data.near_duplicates != "drop":
        del made_from["near_duplicates"]
    if not data.source.include_hidden:
        del made_from["source"]["include_hidden"]
    if data.clean.repository_marks == "keep":
        del made_from["clean"]["repository_marks"]
    if problems:
        made_from["decontaminate"] |= {"problems": problems.counts, "sha256": problems.sha256}
    return made_from


def _work_folder(data: CorpusConfig) -> Path:
    """Return the folder of the job's intermediate files, which the job removes at the end."""
    name = data.path.rstrip("/").rpartition("/")[2] + ".partial"
    return Path(
        data.work_dir or ("." if "://" in data.path else os.path.dirname(data.path)), name
    ).resolve()


def _refuse_overlap(data: CorpusConfig, work: Path) -> None:
    """Raise UserError if the job would write into its source, or work_dir and data.path overlap."""
    source = Path(data.source.path).resolve()
    outputs = [work] if "://" in data.path else [work, Path(data.path).resolve()]
    if "://" not in data.source.path and any(
        source == path or source in path.parents for path in outputs
    ):
        raise UserError(
            f"data.path={data.path} or data.work_dir is inside "
            f"data.source.path={data.source.path}: choose a folder outside of it"
        )
    if len(outputs) == 2 and (outputs[1] in work.parents or work in outputs[1].parents):
        raise UserError(
            f"data.work_dir={data.work_dir} and data.path={data.path} overlap: "
            "choose another work_dir"
        )


def _refuse_changes(folder: str, before: dict, after: dict) -> None:
    if changes := changed_keys(_UNLESS_DROPPED | before, _UNLESS_DROPPED | after):
        raise UserError(
            "\n".join(
                [
                    f"{folder} was made from another configuration:",
                    *(f"  - data.{change}" for change in changes),
                ]
            )
            + "\nChange it back, choose another data.path, or remove the folder"
        )


@contextlib.contextmanager
def _only_one(work: Path) -> Iterator[None]:
    """Lock the work folder against a second job on it and against the workers of a killed one."""
    work.mkdir(parents=True, exist_ok=True)
    refusal = (
        f"{work} is being written by another `retemper tokenize` ({{process}}): wait for it, "
        "or choose another data.path"
    )
    with only_one(work.with_name(work.name + ".lock"), refusal):
        try:
            yield
        finally:
            if not (
                work / "plan.json"
            ).exists():  # the job finished, or was refused before it started
                job_folder.remove(work)
