"""Answers of an exported model: by vLLM where it is installed, else by transformers, both behind lm-eval's own classes."""

import gc
import importlib.util
import math
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from retemper.pipeline.evals.code_tasks import CODE_TASKS, read_problems
from retemper.pipeline.evals.tasks import chosen_problems
from retemper.pipeline.files.records import compress_records
from retemper.pipeline.schema.run import Config

_LENGTH = 512  # tokens of a program with its prompt: bigcode's harness


def language_model(config: Config, folder: Path) -> TemplateLM:
    """A model in a folder of transformers' format, on all GPUs that there are. Its seed makes answers repeatable on the same machine."""
    gc.collect()  # the model before this one
    torch.manual_seed(config.seed)
    gpus = torch.cuda.device_count()
    if importlib.util.find_spec("vllm"):
        from lm_eval.models.vllm_causallms import VLLM

        shares = math.gcd(max(gpus, 1), config.model.num_attention_heads)
        settings = {"seed": config.seed, "tensor_parallel_size": shares}
        return _begun_once(VLLM(pretrained=str(folder), dtype="auto", **settings))
    from lm_eval.models.huggingface import HFLM

    batch_size = config.evals.micro_batch_size
    settings = {"device": "cuda" if gpus else "cpu", "parallelize": gpus > 1}
    return _begun_once(
        HFLM(pretrained=str(folder), dtype="auto", batch_size=batch_size, **settings)
    )


def _begun_once(lm: TemplateLM) -> TemplateLM:
    """The model, whose rolling scores begin a text with one begin-of-text.

    lm-eval puts its own before that of the tokenizer.
    """
    encode = lm.tok_encode
    score = lm.loglikelihood_rolling

    def text_alone(text: str, **_options) -> list[int]:
        tokens = encode(text, add_special_tokens=False)
        return tokens[1:] if tokens[:1] == [lm.prefix_token_id] else tokens

    def rolling(requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        lm.tok_encode = text_alone
        try:
            return score(requests, disable_tqdm=disable_tqdm)
        finally:
            lm.tok_encode = encode

    lm.loglikelihood_rolling = rolling
    return lm


def complete_problems(config: Config, task: str, lm: TemplateLM) -> bytes:
    """evals.tasks.TASK.repeats completions of every chosen problem, as generations.py keeps them."""
    asked = config.evals.tasks[task]
    code_task = CODE_TASKS[task]
    problems = read_problems(config, task)
    if chosen := chosen_problems(len(problems), asked.limit):
        problems = [problems[place] for place in chosen]
    requests = []
    for problem in problems:
        prompt = code_task.prompt(problem)
        room = min(_LENGTH, lm.max_length) - len(lm.tok_encode(prompt))
        settings = {
            "max_gen_toks": max(room, 1),
            "do_sample": False,
            "until": list(code_task.stop_words),
        } | asked.generation
        requests += [
            Instance("generate_until", problem, (prompt, settings), sample)
            for sample in range(asked.repeats)
        ]
    completions = lm.generate_until(requests)
    return compress_records(
        {"task_id": request.doc["task_id"], "sample": request.idx, "completion": completion}
        for request, completion in zip(requests, completions, strict=True)
    )
