"""lm-eval's tasks on any model that it knows, and what is kept of them."""

import time

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate

from retemper.pipeline.data.corpus import decontaminated
from retemper.pipeline.evals.tasks import chosen_problems, load_task
from retemper.pipeline.evals.uncertainty import estimate, scores_by_problem
from retemper.pipeline.schema.run import Config

BY_TOKEN_LOSS = "acc_token_loss"


def score_task(name: str, config: Config, lm: TemplateLM) -> tuple[dict, list[dict]]:
    """Run one task of evals.tasks: what evals/<step>/<task>.json holds, and a record for every problem.

    Raises UserError where the task or its files are not what they must be.
    """
    started = time.perf_counter()
    task, asked = load_task(name, config.evals), config.evals.tasks[name]
    chosen = chosen_problems(len(task.eval_docs), asked.limit)
    results = evaluate(lm, {"tasks": {name: task}}, samples={name: chosen} if chosen else None, bootstrap_iters=1000)
    metrics, problems = _metrics(results["results"][name]), results["samples"][name]
    if task.OUTPUT_TYPE == "multiple_choice":
        metrics = _by_token_loss(task, problems, lm) | metrics
    metric = next(iter(metrics))
    scores = {
        "decontaminated": decontaminated(config, name),
        "version": results["versions"][name],
        **estimate(list(scores_by_problem(problems, metric).values())).headline(metric),
        "metrics": metrics,
        "settings": asked.settings | {"shots": task.config.num_fewshot, "lm_eval": lm_eval.__version__, "seed": config.seed},
        "seconds": round(time.perf_counter() - started, 3),
    }
    return scores, [_record(problem) for problem in problems]


def _metrics(results: dict) -> dict[str, dict[str, float | None]]:
    """lm-eval's "metric,filter" keys: metric -> value and stderr; the filter is named where there is one."""
    named = {key: key.removesuffix(",none").replace(",", "/") for key in results if "," in key and "_stderr," not in key}
    errors = {key: results.get(key.replace(",", "_stderr,", 1)) for key in named}
    return {name: {"value": results[key], "stderr": errors[key] if errors[key] != "N/A" else None} for key, name in named.items()}


def _by_token_loss(task, problems: list[dict], lm: TemplateLM) -> dict[str, dict[str, float]]:
    """How often the right choice has the lowest mean loss of a token, as MosaicML's Gauntlet scores: the paper's measure of forgetting.

    Marks every problem with it, beside lm-eval's acc and acc_norm.
    """
    for problem in problems:
        pairs = zip(problem["arguments"], problem["resps"], strict=True)
        means = [(nats / len(lm._encode_pair(*texts)[1]), greedy) for texts, [(nats, greedy)] in pairs]
        problem[BY_TOKEN_LOSS] = task.process_results(problem["doc"], means)["acc"]
    score = estimate([problem[BY_TOKEN_LOSS] for problem in problems])
    return {BY_TOKEN_LOSS: {"value": score.value, "stderr": score.stderr}}


def _record(problem: dict) -> dict:
    """What later comparisons need of a problem: which it was, what was said, what that was worth."""
    kept = {key: problem[key] for key in ("doc_id", "doc_hash", "filter", "target", "resps")}
    return kept | {metric: problem[metric] for metric in (*problem["metrics"], BY_TOKEN_LOSS) if metric in problem}
