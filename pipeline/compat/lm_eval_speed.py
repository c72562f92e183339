"""lm-eval without the time it spends on templates, and without the messages of what it stands on."""

import functools
import logging


@functools.cache
def patch() -> None:
    """Cache lm-eval's compiled templates, and silence its loggers below errors.

    Compiled again for every problem and every solved example they take nine tenths of a task's time
    beside the model's (lm-eval #1286).
    """
    from lm_eval import utils

    utils.env.from_string = functools.lru_cache(maxsize=64)(utils.env.from_string)
    for name in ("lm_eval", "datasets", "huggingface_hub", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
