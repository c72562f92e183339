"""Score a file of generated programs: run them and write the verdicts next to the file.

Needs no model and no GPU.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from retemper.pipeline.errors import UserError
from retemper.pipeline.evals.code_tasks import CODE_TASKS
from retemper.pipeline.evals.sandbox.control import control
from retemper.pipeline.evals.sandbox.execute import Verdict, run_programs
from retemper.pipeline.evals.sandbox.layers import find_layers
from retemper.pipeline.evals.uncertainty import estimate, pass_at_k
from retemper.pipeline.files.atomic import replace_file
from retemper.pipeline.files.records import read_records

# Required in a generation.
_KEYS: dict[str, type | tuple[type, ...]] = {
    "task_id": (str, int),
    "sample": int,
    "completion": str,
}


def score_generations(
    task: str,
    problems: Path,
    generations: Path,
    ks: Sequence[int] = (1,),
    unsafe_code: bool = False,
) -> dict:
    """Run a code task's generated programs and score them. Only one rank may call this.

    Writes <generations>.verdicts.jsonl, a record for each generation, in the order of the file.

    Args:
        task: A key of CODE_TASKS.
        problems: The task's problems (jsonl).
        generations: The programs (jsonl or jsonl.zst), records with task_id, sample, completion.
        ks: The k of each pass@k to compute.
        unsafe_code: Run the programs even where this machine cannot isolate them.

    Returns:
        pass@k for each k with its standard error and interval; the number of problems and of
        samples per problem; the failures by kind; the sandbox's layers.

    Raises:
        UserError: A record is malformed, a problem or sample is duplicated or missing, or no
            program may run on this machine. Raised before any program runs.
    """
    by_id = _problems(task, problems)
    records = list(read_records(generations, _KEYS))
    samples = _samples(records, by_id, generations, problems)
    if not 1 <= min(ks) <= max(ks) <= samples:
        raise UserError(
            f"{generations} has {samples} samples of each problem: pass@{max(ks)} needs {max(ks)}; "
            "generate more or set a smaller k"
        )
    layers = find_layers(unsafe_code)
    code_task = CODE_TASKS[task]
    programs = [
        code_task.program(by_id[record["task_id"]], record["completion"]) for record in records
    ]
    verdicts = run_programs(programs, code_task.limits, layers)
    path = verdicts_path(generations)
    replace_file(path, _verdict_lines(records, verdicts))
    return {
        **{f"pass@{k}": asdict(estimate(list(problem_scores(path, k).values()))) for k in ks},
        "problems": len(records) // samples,
        "samples": samples,
        "failures": _failures(verdicts),
        "sandbox": str(layers),
    }


def verdicts_path(generations: Path) -> Path:
    """Return the path of the verdicts: humaneval.verdicts.jsonl next to humaneval.jsonl.zst."""
    return generations.with_name(
        generations.name.removesuffix(".zst").removesuffix(".jsonl") + ".verdicts.jsonl"
    )


def problem_scores(verdicts: Path, k: int = 1) -> dict[str | int, float]:
    """Return problem -> pass@k from a file of verdicts, as paired_difference takes them.

    Raises UserError where the file is missing or malformed, or has fewer than k samples of a
    problem.
    """
    outcomes = defaultdict(list)
    for record in read_records(verdicts, {"task_id": (str, int), "passed": bool}):
        outcomes[record["task_id"]].append(record["passed"])
    return {problem: pass_at_k(len(passed), sum(passed), k) for problem, passed in outcomes.items()}


def _problems(task: str, path: Path) -> dict[str | int, dict]:
    """Read the problems as task_id -> problem. Raises UserError for duplicates and broken tests."""
    by_id = {}
    for problem in read_records(path, CODE_TASKS[task].keys):
        name = problem["task_id"]
        if name in by_id:
            raise UserError(f"{path} has problem {name} twice: remove one")
        try:
            control(CODE_TASKS[task].program(problem, "").tests)
        except (SyntaxError, TypeError, IndexError) as error:
            raise UserError(
                f"{path}: the tests of problem {name} cannot be run ({error}): "
                "correct or replace the file"
            ) from None
        by_id[name] = problem
    return by_id


def _samples(records: list[dict], problems: dict, generations: Path, problems_path: Path) -> int:
    """Return the number of samples per problem.

    Raises UserError where a record is of an unknown problem, duplicated or missing.
    """
    seen: defaultdict[str | int, set[int]] = defaultdict(set)
    for record in records:
        name = record["task_id"]
        sample = record["sample"]
        if name not in problems:
            raise UserError(
                f"{generations}: problem {name} is not in {problems_path}: "
                "use the problems that the programs were generated for"
            )
        if sample in seen[name]:
            raise UserError(
                f"{generations} has sample {sample} of problem {name} twice: generate it again"
            )
        seen[name].add(sample)
    if not seen:
        raise UserError(f"{generations} has no records: generate it again")
    most = max(map(len, seen.values()))
    for name, numbers in seen.items():
        if len(numbers) < most:
            raise UserError(
                f"{generations} has {len(numbers)} samples of problem {name} and {most} of others: "
                "generate it again"
            )
    return most


def _verdict_lines(records: list[dict], verdicts: list[Verdict]) -> str:
    lines = (
        {"task_id": record["task_id"], "sample": record["sample"], **asdict(verdict)}
        for record, verdict in zip(records, verdicts)
    )
    return "".join(json.dumps(line) + "\n" for line in lines)


def _failures(verdicts: list[Verdict]) -> dict[str, int]:
    """Count the failures by kind, the most frequent first."""
    kinds = Counter(verdict.reason.partition(":")[0] for verdict in verdicts if not verdict.passed)
    return dict(kinds.most_common())
