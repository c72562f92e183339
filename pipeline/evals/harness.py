"""lm-eval's tasks on any model that it knows, and what is kept of them."""

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
NEW_TOKENS = 256  # of a task that does not say, as lm-eval's own classes have it


def score_task(name: str, config: Config, lm: TemplateLM) -> tuple[dict, list[dict]]:
    """Run one task of evals.tasks: what evals/<step>/<task>.json holds, and a record for every problem.

    Raises UserError where the task or its files are not what they must be.
    """
    started = time.perf_counter()
    task = load_task(name, config.evals)
    asked = config.evals.tasks[name]
    chosen = chosen_problems(len(task.eval_docs), asked.limit)
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
        "settings": asked.settings
        | {"shots": task.config.num_fewshot, "lm_eval": lm_eval.__version__, "seed": config.seed},
        "seconds": round(time.perf_counter() - started, 3),
    }
    return scores, [_record(problem) for problem in problems]


def _metrics(results: dict) -> dict[str, dict[str, float | None]]:
    """lm-eval's "metric,filter" keys: metric -> value and stderr; the filter is named where there is one."""
    named = {
        key: key.removesuffix(",none").replace(",", "/")
        for key in results
        if "," in key and "_stderr," not in key
    }
    errors = {key: results.get(key.replace(",", "_stderr,", 1)) for key in named}
    return {
        name: {"value": results[key], "stderr": errors[key] if errors[key] != "N/A" else None}
        for key, name in named.items()
    }


def _lengths(lm: TemplateLM, *request) -> tuple[int, int]:
    """Tokens of a prompt, and of the answer that is scored, or that may be generated."""
    match request:
        case prompt, dict(settings):
            return len(lm.tok_encode(prompt)), normalize_gen_kwargs(settings, NEW_TOKENS)[
                "max_gen_toks"
            ]
        case "", answer:  # lm-eval puts one token before it
            return 1, len(lm.tok_encode(answer, add_special_tokens=False)) - 1
        case prompt, answer:
            context, continuation = lm._encode_pair(prompt, answer)
            return len(context), len(continuation) - 1  # the last is only a label
    return 0, 0  # a text without a prompt is scored in windows


def _cut_prompts(problems: list[dict], lengths: list[list[tuple[int, int]]], lm: TemplateLM) -> int:
    """Problems whose prompt is longer than the model takes: all of lm-eval's classes leave its beginning away, the first examples."""
    return len(
        {
            problem["doc_id"]
            for problem, of_it in zip(problems, lengths, strict=True)
            if max(map(sum, of_it)) > lm.max_length
        }
    )


def _by_token_loss(
    task, problems: list[dict], lengths: list[list[tuple[int, int]]]
) -> dict[str, dict[str, float]]:
    """How often the right choice has the lowest mean loss of a token, as MosaicML's Gauntlet scores: the paper's measure of forgetting.

    Marks every problem with it, beside lm-eval's acc and acc_norm.
    """
    for problem, of_it in zip(problems, lengths, strict=True):
        pairs = zip(of_it, problem["resps"], strict=True)
        means = [(nats / (scored + 1), greedy) for (_prompt, scored), [(nats, greedy)] in pairs]
        problem[BY_TOKEN_LOSS] = task.process_results(problem["doc"], means)["acc"]
    score = estimate([problem[BY_TOKEN_LOSS] for problem in problems])
    return {BY_TOKEN_LOSS: {"value": score.value, "stderr": score.stderr}}


def _record(problem: dict) -> dict:
    """What later comparisons need of a problem: which it was, what was said, what that was worth."""
    kept = {key: problem[key] for key in ("doc_id", "doc_hash", "filter", "target", "resps")}
    return kept | {
        metric: problem[metric]
        for metric in (*problem["metrics"], BY_TOKEN_LOSS)
        if metric in problem
    }
