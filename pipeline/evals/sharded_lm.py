"""The live sharded model as an lm-eval model.

Only rank 0 imports this; the other ranks serve its requests (team.py).
"""

import numpy as np
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from transformers import PreTrainedTokenizerFast

from retemper.pipeline.errors import UserError
from retemper.pipeline.evals.harness import NEW_TOKENS
from retemper.pipeline.evals.team import RankZeroServer
from retemper.pipeline.model.inference import Sampling

_SAMPLING_KEYS = {"do_sample", "temperature", "top_p"}


class ShardedLM(TemplateLM):
    """A model that looks like a single process to lm-eval, whatever the layout.

    Text is tokenized, cut and scored as lm-eval's `hf` class does.
    """

    def __init__(
        self, team: RankZeroServer, tokenizer: PreTrainedTokenizerFast, seed: int, label: str
    ):
        """Wrap the ranks of a model.

        Args:
            team: The ranks of the model.
            tokenizer: The model's tokenizer, with an end-of-text token.
            seed: The seed of sampling in generation.
            label: The label of the progress bar.
        """
        super().__init__()
        self.team = team
        self.tokenizer = tokenizer
        self.seed = seed
        self.label = label
        self.max_length = team.config.model.max_sequence_length

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_options
    ) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests, **_options) -> list[tuple[float, bool]]:
        # One token more than the maximum length, because the last is only a label.
        sequences = [
            np.array((context + continuation)[-self.max_length - 1 :], np.int32)
            for _, context, continuation in requests
        ]
        lengths = [len(continuation) for _, _, continuation in requests]
        if max(lengths) > self.max_length:
            raise UserError(
                f"the task has an answer of {max(lengths)} tokens, "
                f"model.max_sequence_length is only {self.max_length}"
            )
        scores_N2 = self.team.call(
            "log_likelihoods", sequences=sequences, lengths=lengths, label=self.label
        )
        return [(nats, mismatches == 0) for nats, mismatches in scores_N2.tolist()]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        windows = [
            (number, None, *pair)
            for number, request in enumerate(requests)
            for pair in self._windows(*request.args)
        ]
        totals = [0.0] * len(requests)
        for (number, *_), (nats, _greedy) in zip(
            windows, self._loglikelihood_tokens([window[1:] for window in windows]), strict=True
        ):
            totals[number] += nats
        return totals

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        tokens = self.tok_encode(text, add_special_tokens=False)
        # get_rolling_token_windows prepends the prefix token, so drop the one that the tokenizer
        # adds; lm-eval's `hf` class keeps both.
        if tokens[:1] == [self.prefix_token_id]:
            tokens = tokens[1:]
        windows = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
        return [utils.make_disjoint_window(window) for window in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        answers: list[str] = [""] * len(requests)
        settings = [normalize_gen_kwargs(request.args[1], NEW_TOKENS) for request in requests]
        for group_settings in {repr(each): each for each in settings}.values():
            indices = [index for index, each in enumerate(settings) if each == group_settings]
            group_answers = self._generate(
                [requests[index].args[0] for index in indices], dict(group_settings)
            )
            for index, answer in zip(indices, group_answers, strict=True):
                answers[index] = answer
        return answers

    def _generate(self, contexts: list[str], settings: dict) -> list[str]:
        stops = handle_stop_sequences(
            settings.pop("until"), eos=self.tokenizer.decode(self.eot_token_id)
        )
        sampling = Sampling(
            settings.pop("max_gen_toks"),
            settings.get("temperature", 0.0),
            settings.get("top_p", 1.0),
        )
        if unknown := settings.keys() - _SAMPLING_KEYS:
            raise UserError(
                "the task uses generation settings that are not supported on the live model: "
                f"{', '.join(sorted(unknown))}"
            )
        if self.team.config.parallel.context_parallel_size > 1:
            raise UserError(
                "tasks that generate text do not work with parallel.context_parallel_size > 1: "
                "score them in another layout"
            )
        max_prompt_tokens = self.max_length - sampling.max_new_tokens
        if max_prompt_tokens < 1:
            raise UserError(
                f"the task may generate {sampling.max_new_tokens} tokens, model.max_sequence_length"
                f"={self.max_length} leaves no room for its prompt: set max_new_tokens of the task"
            )
        generated = self.team.call(
            "generate",
            prompts=[
                np.array(self.tok_encode(context)[-max_prompt_tokens:], np.int32)
                for context in contexts
            ],
            sampling=sampling,
            stops=stops,
            tokenizer=self.tokenizer,
            eos_id=self.eot_token_id,
            seed=self.seed,
            label=self.label,
        )
        return [
            postprocess_generated_text(
                self.tokenizer.decode(tokens, skip_special_tokens=True), stops, None
            )
            for tokens in generated
        ]
