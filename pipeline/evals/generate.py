"""Generation with an exported model, by vLLM if installed, else transformers.

Both are used through lm-eval's model classes.
"""

import gc
import importlib.util
import math
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from retemper.pipeline.corpus.tokenizer import Tokenizer
from retemper.pipeline.evals.code_tasks import CODE_TASKS, read_problems
from retemper.pipeline.evals.run_tokenizer import prompt_tokenizer
from retemper.pipeline.evals.tasks import chosen_problems
from retemper.pipeline.files.records import compress_records
from retemper.pipeline.schema.run import Config

_MAX_TOKENS = 512  # prompt and program together, as in bigcode's harness


def language_model(config: Config, folder: Path) -> TemplateLM:
    """Load a model for lm-eval onto all GPUs, or the CPU.

    Its seed makes generation repeatable on the same machine.

    Args:
        config: The run's config.
        folder: The exported model, in transformers' format.
    """
    gc.collect()  # free the previous model
    torch.manual_seed(config.seed)
    gpus = torch.cuda.device_count()
    tokenizer = prompt_tokenizer(Tokenizer(folder))
    if importlib.util.find_spec("vllm"):
        from lm_eval.models.vllm_causallms import VLLM

        tensor_parallel_size = math.gcd(max(gpus, 1), config.model.num_attention_heads)
        lm = VLLM(
            pretrained=str(folder),
            dtype="auto",
            seed=config.seed,
            tensor_parallel_size=tensor_parallel_size,
        )
        lm.tokenizer = tokenizer  # it takes no object, but sends the ids of whole prompts
        return _with_single_bos(lm)
    from lm_eval.models.huggingface import HFLM

    batch_size = config.evals.micro_batch_size
    return _with_single_bos(
        HFLM(
            pretrained=str(folder),
            tokenizer=tokenizer,
            dtype="auto",
            batch_size=batch_size,
            device="cuda" if gpus else "cpu",
            parallelize=gpus > 1,
        )
    )


def _with_single_bos(lm: TemplateLM) -> TemplateLM:
    """Patch a model so that its rolling log-likelihoods use one begin-of-text token, not two.

    lm-eval prepends one before the one that the tokenizer adds.
    """
    encode = lm.tok_encode
    score = lm.loglikelihood_rolling

    def encode_without_bos(text: str, **_options) -> list[int]:
        tokens = encode(text, add_special_tokens=False)
        return tokens[1:] if tokens[:1] == [lm.prefix_token_id] else tokens

    def rolling(requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        lm.tok_encode = encode_without_bos
        try:
            return score(requests, disable_tqdm=disable_tqdm)
        finally:
            lm.tok_encode = encode

    lm.loglikelihood_rolling = rolling
    return lm


def complete_problems(config: Config, task: str, lm: TemplateLM) -> bytes:
    """Generate evals.tasks.TASK.repeats completions of every selected problem.

    Args:
        config: The run's config.
        task: A key of CODE_TASKS.
        lm: The model, as language_model returns it.

    Returns:
        Compressed JSON lines, a record (task_id, sample, completion) for each completion.

    Raises:
        UserError: The file of problems is missing or malformed.
    """
    task_config = config.evals.tasks[task]
    code_task = CODE_TASKS[task]
    problems = read_problems(config, task)
    if chosen := chosen_problems(len(problems), task_config.limit):
        problems = [problems[index] for index in chosen]
    requests = []
    for problem in problems:
        prompt = code_task.prompt(problem)
        max_new_tokens = min(_MAX_TOKENS, lm.max_length) - len(lm.tok_encode(prompt))
        settings = {
            "max_gen_toks": max(max_new_tokens, 1),
            "do_sample": False,
            "until": list(code_task.stop_words),
        } | task_config.generation
        requests += [
            Instance("generate_until", problem, (prompt, settings), sample)
            for sample in range(task_config.repeats)
        ]
    completions = lm.generate_until(requests)
    return compress_records(
        {"task_id": request.doc["task_id"], "sample": request.idx, "completion": completion}
        for request, completion in zip(requests, completions, strict=True)
    )
