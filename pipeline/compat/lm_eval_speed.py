"""Cached templates and quiet loggers for lm-eval."""

import functools
import logging


@functools.cache
def patch() -> None:
    """Cache lm-eval's compiled templates, and limit the loggers it uses to errors.

    Without the cache lm-eval compiles a template again for every problem and every few-shot
    example, which takes nine tenths of a task's time outside the model (lm-eval #1286).
    """
    from lm_eval import utils

    utils.env.from_string = functools.lru_cache(maxsize=64)(utils.env.from_string)
    for name in ("lm_eval", "datasets", "huggingface_hub", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
