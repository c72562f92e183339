"""Test HumanEval and MBPP: only reference solutions pass, and malformed files are reported."""

import json
import math
import resource
from dataclasses import replace

import pytest
import zstandard

from retemper.pipeline.errors import UserError
from retemper.pipeline.evals.code_tasks import CODE_TASKS
from retemper.pipeline.evals.sandbox.execute import Program, run_programs
from retemper.pipeline.evals.sandbox.layers import Layers, find_layers
from retemper.pipeline.evals.score_code import problem_scores, score_generations, verdicts_path
from retemper.pipeline.files.records import compress_records

FILES = {"humaneval": "humaneval.jsonl", "mbpp": "mbpp_test.jsonl"}
# MBPP's reference solution of problem 342 has a class below an import, where a stop word of
# bigcode's harness cuts it off.
CUT_OFF = {"humaneval": [], "mbpp": [342]}


@pytest.fixture(scope="module")
def problems(shared_data) -> dict[str, list[dict]]:
    return {
        task: [json.loads(line) for line in (shared_data / "evals" / file).read_text().splitlines()]
        for task, file in FILES.items()
    }


@pytest.fixture(autouse=True, scope="module")
def require_sandbox() -> None:
    """Skip the tests if this machine lacks what the sandbox needs to run programs."""
    try:
        find_layers()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def bare_layers() -> Layers:
    """Return the layers of the sandbox without bubblewrap.

    The CPU time of programs under bubblewrap does not count as that of child processes.
    """
    layers = replace(find_layers(), bubblewrap=None)
    if not layers.landlock:
        pytest.skip("this kernel has no Landlock")
    return layers


def reference_solution(task: str, problem: dict) -> str:
    # The newline at the end of a prompt is removed, so that the completion begins with it.
    return "\n" + problem["canonical_solution"] if task == "humaneval" else problem["code"]


def failing_references(task: str, problems: list[dict], layers: Layers) -> dict:
    """Return problem -> reason for the problems whose reference solution fails."""
    code_task = CODE_TASKS[task]
    programs = [
        Program(
            code_task.prompt(problem) + reference_solution(task, problem), code_task.tests(problem)
        )
        for problem in problems
    ]
    verdicts = run_programs(programs, code_task.limits, layers)
    return {
        problem["task_id"]: verdict.reason
        for problem, verdict in zip(problems, verdicts)
        if not verdict.passed
    }


def test_humaneval_references_pass_within_20_seconds_on_two_cores(problems, bare_layers):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert failing_references("humaneval", problems["humaneval"], bare_layers) == {}
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert len(problems["humaneval"]) == 164
    # CPU time instead of wall time, because other processes may use the cores as well.
    assert 1 < after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 2 * 20


def test_mbpp_references_pass(problems, bare_layers):
    assert failing_references("mbpp", problems["mbpp"], bare_layers) == {}
    assert len(problems["mbpp"]) == 500


@pytest.mark.slow
@pytest.mark.parametrize("task", FILES)
def test_references_pass_in_all_available_layers(problems, task):
    assert failing_references(task, problems[task], find_layers()) == {}


@pytest.mark.parametrize("task", FILES)
def test_stop_words_do_not_cut_off_references(problems, task):
    code_task = CODE_TASKS[task]
    cut = [
        problem["task_id"]
        for problem in problems[task]
        if code_task.truncate(reference_solution(task, problem))
        != reference_solution(task, problem)
    ]
    assert cut == CUT_OFF[task]


def test_empty_completions_pass_no_problem(problems):
    code_task = CODE_TASKS["humaneval"]
    verdicts = run_programs(
        [code_task.program(problem, "") for problem in problems["humaneval"]],
        code_task.limits,
        find_layers(),
    )
    assert sum(verdict.passed for verdict in verdicts) == 0
    assert len(verdicts) == 164


def test_a_completion_ends_at_its_first_stop_word():
    task = CODE_TASKS["humaneval"]
    assert task.truncate("\n    return 1\n\nprint(f())\ndef g(): pass") == "\n    return 1\n"
    assert (
        task.truncate("\n    # a comment\n    return 1\n\n@wraps")
        == "\n    # a comment\n    return 1\n"
    )
    assert task.truncate("    return 1<file_sep>more") == "    return 1"
    assert task.truncate("    return 1") == "    return 1"
    problem = {
        "prompt": '\n\ndef f(x):\n    """Two."""\n',
        "test": "def check(f):\n    assert f(1) == 2\n",
        "entry_point": "f",
    }
    program = task.program(problem, "\n    return 2\nf = None\nif x:")
    assert program.candidate == 'def f(x):\n    """Two."""\n    return 2\nf = None'
    assert program.tests == "\ndef check(f):\n    assert f(1) == 2\n\ncheck(f)"
    assert (
        CODE_TASKS["mbpp"].prompt({"text": "Add.", "test_list": ["assert a(1) == 2", "x"]})
        == '"""\nAdd.\nassert a(1) == 2\n"""\n'
    )


@pytest.fixture
def small(tmp_path):
    """Write three problems with three samples each, of which 0, 1 and 2 are correct.

    Return the two files and the records of the samples.
    """
    problems = tmp_path / "problems.jsonl"
    test = "def check(f):\n    assert f(3) == 9\n"
    names = ["HumanEval/0", "HumanEval/1", "HumanEval/2"]
    problems.write_text(
        "".join(
            json.dumps({"task_id": n, "prompt": "def f(x):\n", "entry_point": "f", "test": test})
            + "\n"
            for n in names
        )
    )
    records = [
        {
            "task_id": name,
            "sample": sample,
            "completion": "\n    return x * x\n" if sample < correct else "\n    return x",
        }
        for sample in range(3)
        for correct, name in enumerate(names)
    ]
    generations = tmp_path / "humaneval.jsonl.zst"
    generations.write_bytes(compress_records(records))
    return problems, generations, records


def test_generations_are_scored_and_verdicts_are_written_beside_them(small):
    problems, generations, records = small
    scores = score_generations("humaneval", problems, generations, ks=[1, 2, 3])
    assert scores["pass@1"]["value"] == pytest.approx((0 + 1 / 3 + 2 / 3) / 3)
    assert scores["pass@2"]["value"] == pytest.approx((0 + 2 / 3 + 1) / 3)
    assert scores["pass@3"]["value"] == pytest.approx(2 / 3)
    assert scores["pass@1"]["stderr"] == pytest.approx(math.sqrt(2 / 9 / 2 / 3))
    assert scores["problems"] == 3
    assert scores["samples"] == 3
    assert scores["failures"] == {"AssertionError": 6}
    assert scores["sandbox"] == str(find_layers())
    assert json.loads(json.dumps(scores)) == scores
    written = [json.loads(line) for line in verdicts_path(generations).read_text().splitlines()]
    assert [(w["task_id"], w["sample"]) for w in written] == [
        (r["task_id"], r["sample"]) for r in records
    ]
    assert [w["passed"] for w in written] == ["x * x" in r["completion"] for r in records]
    assert problem_scores(verdicts_path(generations)) == pytest.approx(
        {"HumanEval/0": 0, "HumanEval/1": 1 / 3, "HumanEval/2": 2 / 3}
    )


@pytest.mark.slow
def test_fifty_samples_of_every_problem_give_the_exact_pass_at_k(problems, shared_data, tmp_path):
    """Score 8,200 programs, as many as in the paper.

    Of the n-th problem, n modulo 51 samples are the reference solution, and the others are empty.
    """
    records = [
        {
            "task_id": problem["task_id"],
            "sample": sample,
            "completion": reference_solution("humaneval", problem) if sample < number % 51 else "",
        }
        for number, problem in enumerate(problems["humaneval"])
        for sample in range(50)
    ]
    (generations := tmp_path / "humaneval.jsonl.zst").write_bytes(compress_records(records))
    scores = score_generations(
        "humaneval", shared_data / "evals" / "humaneval.jsonl", generations, ks=[1, 10]
    )
    correct = [number % 51 for number in range(164)]
    assert scores["pass@1"]["value"] == pytest.approx(sum(correct) / 50 / 164)
    exact = sum(1 - math.comb(50 - passed, 10) / math.comb(50, 10) for passed in correct) / 164
    assert scores["pass@10"]["value"] == pytest.approx(exact)


def compressed(text: str) -> bytes:
    return zstandard.compress(text.encode())


RECORD = '{"task_id": "HumanEval/0", "sample": 0, "completion": "x"}\n'


@pytest.mark.parametrize(
    "content, message",
    [
        (compressed(RECORD + "{broken\n"), "line 2 is not a JSON object"),
        (compressed(RECORD + "[1]\n"), "line 2 is not a JSON object"),
        (
            compressed(RECORD + '{"task_id": "HumanEval/1", "completion": "x"}\n'),
            "line 2: sample must be int, found null",
        ),
        (
            compressed(RECORD + '{"task_id": "HumanEval/1", "sample": true, "completion": "x"}\n'),
            "line 2: sample must be int, found true",
        ),
        (
            compressed(RECORD + '{"task_id": "HumanEval/1", "sample": 0, "completion": 7}\n'),
            "line 2: completion must be str, found 7",
        ),
        (
            compressed(RECORD + '{"task_id": null, "sample": 0, "completion": ""}\n'),
            "line 2: task_id must be str or int",
        ),
        (compressed(RECORD + RECORD), "sample 0 of problem HumanEval/0 twice"),
        (
            compressed(RECORD + RECORD.replace("/0", "/9")),
            "problem HumanEval/9 is not in .*problems.jsonl",
        ),
        (
            compressed(RECORD + RECORD.replace("/0", "/1") + RECORD.replace('": 0', '": 1')),
            "1 samples of problem HumanEval/1 and 2 of others",
        ),
        (compressed(""), "has no records"),
        (compressed(RECORD)[:-5], "damaged .*truncated"),
        (compressed(RECORD) + b"more", "damaged"),
        (RECORD.encode(), "damaged"),
        (zstandard.compress(b"\xff"), "damaged"),
        (None, "does not exist"),
    ],
)
def test_malformed_generations_are_reported_before_any_program_runs(
    small, content, message, monkeypatch
):
    problems, generations, _ = small
    monkeypatch.setattr(
        "retemper.pipeline.evals.score_code.run_programs", lambda *_: pytest.fail("a program ran")
    )
    generations.unlink() if content is None else generations.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        score_generations("humaneval", problems, generations)
    assert str(generations) in str(error.value)
    assert not verdicts_path(generations).exists()


def test_generations_in_several_zstd_frames_are_all_read(small):
    problems, generations, records = small
    generations.write_bytes(b"".join(compressed(json.dumps(record) + "\n") for record in records))
    assert score_generations("humaneval", problems, generations)["samples"] == 3


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda text: text.replace('"entry_point"', '"entry"', 1),
            "problems.jsonl, line 1: entry_point must be str, found null",
        ),
        (lambda text: text.replace("HumanEval/1", "HumanEval/0"), "problem HumanEval/0 twice"),
        (
            lambda text: text.replace("assert f(3)", "assert f(3", 1),
            "tests of problem HumanEval/0 cannot be run",
        ),
    ],
)
def test_malformed_problems_are_reported(small, change, message):
    problems, generations, _ = small
    problems.write_text(change(problems.read_text()))
    with pytest.raises(UserError, match=message):
        score_generations("humaneval", problems, generations)


def test_pass_at_k_is_refused_with_fewer_than_k_samples(small):
    with pytest.raises(UserError, match="3 samples of each problem: pass@10 needs 10"):
        score_generations("humaneval", *small[:2], ks=[1, 10])


def test_scoring_is_refused_without_a_sandbox(small, monkeypatch):
    def refuse(unsafe_code):
        raise UserError("generated programs are not run here")

    monkeypatch.setattr("retemper.pipeline.evals.score_code.find_layers", refuse)
    with pytest.raises(UserError, match="not run here"):
        score_generations("humaneval", *small[:2])
    assert small[1].exists()
    assert not verdicts_path(small[1]).exists()
