"""Run lm-eval's tasks on any lm-eval model; make the scores and per-problem records to store."""

import time

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs

from retemper.pipeline.data.streams import decontaminated
from retemper.pipeline.evals.tasks import chosen_problems, load_task
from retemper.pipeline.evals.uncertainty import estimate, scores_by_problem
from retemper.pipeline.schema.run import Config

BY_TOKEN_LOSS = "acc_token_loss"
NEW_TOKENS = 256  # if a task sets no limit; the default of lm-eval's model classes


def score_task(name: str, config: Config, lm: TemplateLM) -> tuple[dict, list[dict]]:
    """Run one task of evals.tasks.

    Args:
        name: The task's key in evals.tasks.
        config: The run's config.
        lm: The model to score.

    Returns:
        The content of evals/<step>/<task>.json, and a record for every problem.

    Raises:
        UserError: lm-eval has no such task, or the task's files are missing or malformed.
    """
    started = time.perf_counter()
    task = load_task(name, config.evals)
    task_config = config.evals.tasks[name]
    chosen = chosen_problems(len(task.eval_docs), task_config.limit)
    results = evaluate(
        lm,
        {"tasks": {name: task}},
        samples={name: chosen} if chosen else None,
        bootstrap_iters=1000,
    )
    metrics = _metrics(results["results"][name])
    problems = results["samples"][name]
    lengths = [[_lengths(lm, *request) for request in problem["arguments"]] for problem in problems]
    if task.OUTPUT_TYPE == "multiple_choice":
        metrics = _by_token_loss(task, problems, lengths) | metrics
    metric = next(iter(metrics))
    scores = {
        "decontaminated": decontaminated(config, name),
        "version": results["versions"][name],
        **estimate(list(scores_by_problem(problems, metric).values())).headline(metric),
        "metrics": metrics,
        "cut_prompts": _cut_prompts(problems, lengths, lm),
        "settings": task_config.settings
        | {"shots": task.config.num_fewshot, "lm_eval": lm_eval.__version__, "seed": config.seed},
        "seconds": round(time.perf_counter() - started, 3),
    }
    return scores, [_record(problem) for problem in problems]


def _metrics(results: dict) -> dict[str, dict[str, float | None]]:
    """Return metric -> value and stderr, from lm-eval's results with keys "metric,filter".

    A metric is named "metric/filter", or "metric" where the filter is "none".
    """
    names = {
        key: key.removesuffix(",none").replace(",", "/")
        for key in results
        if "," in key and "_stderr," not in key
    }
    errors = {key: results.get(key.replace(",", "_stderr,", 1)) for key in names}
    return {
        name: {"value": results[key], "stderr": errors[key] if errors[key] != "N/A" else None}
        for key, name in names.items()
    }


def _lengths(lm: TemplateLM, *request) -> tuple[int, int]:
    """Return the number of prompt tokens, and of tokens to score or that may be generated."""
    match request:
        case prompt, dict(settings):
            return len(lm.tok_encode(prompt)), normalize_gen_kwargs(settings, NEW_TOKENS)[
                "max_gen_toks"
            ]
        case "", answer:  # lm-eval prepends one token
            return 1, len(lm.tok_encode(answer, add_special_tokens=False)) - 1
        case prompt, answer:
            context, continuation = lm._encode_pair(prompt, answer)
            return len(context), len(continuation) - 1  # the last token is only a label
    return 0, 0  # a text without a prompt is scored in windows, so nothing is cut


def _cut_prompts(problems: list[dict], lengths: list[list[tuple[int, int]]], lm: TemplateLM) -> int:
    """Count the problems whose prompt, with the answer, exceeds the model's maximum length.

    All of lm-eval's model classes cut such a prompt at its beginning: the first solved examples.
    """
    return len(
        {
            problem["doc_id"]
            for problem, problem_lengths in zip(problems, lengths, strict=True)
            if max(map(sum, problem_lengths)) > lm.max_length
        }
    )


def _by_token_loss(
    task, problems: list[dict], lengths: list[list[tuple[int, int]]]
) -> dict[str, dict[str, float | None]]:
    """Return the share of problems whose correct choice has the lowest mean loss per token.

    MosaicML's Gauntlet scores so; it is the measure of forgetting in "LoRA Learns Less and Forgets
    Less". Adds the metric to every problem, next to lm-eval's acc and acc_norm.
    """
    for problem, problem_lengths in zip(problems, lengths, strict=True):
        pairs = zip(problem_lengths, problem["resps"], strict=True)
        means = [(nats / (scored + 1), greedy) for (_prompt, scored), [(nats, greedy)] in pairs]
        problem[BY_TOKEN_LOSS] = task.process_results(problem["doc"], means)["acc"]
    score = estimate([problem[BY_TOKEN_LOSS] for problem in problems])
    return {BY_TOKEN_LOSS: {"value": score.value, "stderr": score.stderr}}


def _record(problem: dict) -> dict:
    """Return what later comparisons need of a problem: its id, target, responses and metrics."""
    record = {key: problem[key] for key in ("doc_id", "doc_hash", "filter", "target", "resps")}
    return record | {
        metric: problem[metric]
        for metric in (*problem["metrics"], BY_TOKEN_LOSS)
        if metric in problem
    }
