"""The job `retemper tokenize`: one corpus from documents to token shards, in stages that can be stopped and started again."""

import contextlib
import fcntl
import itertools
import os
import sys
from pathlib import Path

from retemper.pipeline.config.differences import changed_keys
from retemper.pipeline.corpus.manifest import find_manifest
from retemper.pipeline.corpus.tokenizer import Tokenizer
from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.data import CorpusConfig
from retemper.tokenize import job_folder
from retemper.tokenize.clean import Clean
from retemper.tokenize.decontaminate import Decontaminate, Problems
from retemper.tokenize.encode import Encode
from retemper.tokenize.encoder import choose_encoder
from retemper.tokenize.executors import Stage, refuse_queued, run_stages
from retemper.tokenize.finish import Finish, is_whole
from retemper.tokenize.listing import list_parts, locate
from retemper.tokenize.sketch import Sketch
from retemper.tokenize.sources import DocumentReader, prompt_wording
from retemper.tokenize.split import Identify
from retemper.tokenize.spool import ReadPart, Spool
from retemper.tokenize.write_shards import Choose, WriteBucket

# What may differ from run to run: where the job works, not what it makes.
_WHERE = {"path", "work_dir", "executor", "tasks", "slurm", "allow_broken_files"}
# Where near-duplicates are not dropped, the shards are the same whether they are counted or not,
# and those of corpora from before that key.
_UNLESS_DROPPED = {"near_duplicates": "count or keep"}
_SAMPLE_PARTS, _SAMPLE_DOCUMENTS = 8, 16


def tokenize(data: CorpusConfig, *, progress: bool = True) -> dict | None:
    """Write data.path from data.source; returns its manifest, or None where the stages were handed to Slurm.

    A finished corpus is left as it is, an unfinished one continued; either made from another configuration or tokenizer is
    refused. data.path appears only when it is complete. Raises UserError.
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
        if is_whole(data.path, manifest):
            if work.exists():  # killed between the name and the tidying up
                with _only_one(work):
                    job_folder.remove(work)
            return manifest
    elif "://" not in data.path and os.path.lexists(data.path):
        raise UserError(
            f"data.path={data.path} exists and is not a token corpus (no manifest.json of one): choose another folder"
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
    encode = Encode(tokenizer, plan.encoder["name"], bos=data.bos, eos=data.eos)
    return [
        Stage(
            "encode",
            [ReadPart(work, reader), *steps[1:], encode, Spool(work, dtype, steps)],
            len(plan.parts),
        ),
        Stage("choose", [Choose(data, work, dtype)], 1),
        Stage(
            "write",
            [WriteBucket(data, work, dtype, padding_id, tokenizer.token_bytes())],
            len(plan.bucket_ids),
        ),
        Stage("finish", [Finish(data, work, str(tokenizer.folder))], 1),
    ]


def _plan(data: CorpusConfig, work: Path, tokenizer: Tokenizer, made_from: dict) -> job_folder.Plan:
    """The job's plan; one that was begun keeps its pinned revision and its encoder, and reads only the files that changed since."""
    before = job_folder.load_plan(work) if (work / "plan.json").is_file() else None
    root, glob = locate(data.source)
    if before:
        _refuse_changes(str(work), before.made_from, made_from)
        root = before.root
    parts = list_parts(data.source, root, glob)
    encoder = (
        before.encoder if before else choose_encoder(tokenizer, _sample_texts(data, root, parts))
    )
    return job_folder.make_plan(
        work,
        made_from,
        root,
        encoder,
        parts,
        heldout_fraction=data.heldout_fraction,
        near_duplicates=data.near_duplicates if data.heldout_fraction else "keep",
    )


def _sample_texts(data: CorpusConfig, root: str, parts: list) -> list[str]:
    reader = DocumentReader(data.source, root, replace_invalid=data.clean.invalid_utf8 == "replace")
    return [
        document.text[:100_000]
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
    if problems:
        made_from["decontaminate"] |= {"problems": problems.counts, "sha256": problems.sha256}
    return made_from


def _work_folder(data: CorpusConfig) -> Path:
    """A folder of the job's own, which it removes at the end."""
    name = data.path.rstrip("/").rpartition("/")[2] + ".partial"
    return Path(
        data.work_dir or ("." if "://" in data.path else os.path.dirname(data.path)), name
    ).resolve()


def _refuse_overlap(data: CorpusConfig, work: Path) -> None:
    """Raises UserError where the job would write into its own source, or its corpus into its intermediate files."""
    source = Path(data.source.path).resolve()
    written = [work] if "://" in data.path else [work, Path(data.path).resolve()]
    if "://" not in data.source.path and any(
        source == path or source in path.parents for path in written
    ):
        raise UserError(
            f"data.path={data.path} or data.work_dir lies in data.source.path={data.source.path}: choose a folder outside of it"
        )
    if len(written) == 2 and (written[1] in work.parents or work in written[1].parents):
        raise UserError(
            f"data.work_dir={data.work_dir} and data.path={data.path} lie in each other: choose another work_dir"
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
def _only_one(work: Path):
    """Hold the work folder, against a second job on it and against the workers of a killed one."""
    work.mkdir(parents=True, exist_ok=True)
    with open(work.with_name(work.name + ".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{work} is being written by another `retemper tokenize`: wait for it, or choose another data.path"
            ) from None
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            Path(lock.name).unlink(missing_ok=True)
            if not (work / "plan.json").exists():  # finished, or refused before it began
                job_folder.remove(work)
