"""The ranks of a model as one answerer: rank 0 asks, every rank computes its part, rank 0 has the answer.

Only rank 0 knows tasks, files and metrics; what goes wrong with those can therefore never leave the ranks waiting for each other.
"""

import math

import numpy as np
import torch
from tqdm import tqdm

from retemper.pipeline.config.rules import fp8_token_multiple
from retemper.pipeline.data.batch import Batch
from retemper.pipeline.distributed.collectives import (
    from_each_replica,
    from_last_stage,
    from_rank_zero,
)
from retemper.pipeline.distributed.topology import Topology
from retemper.pipeline.model.inference import Sampling, generate, log_likelihoods
from retemper.pipeline.schema.run import Config

_IN_FLIGHT = 2  # micro-batches for each stage of a pipeline that it works on at once, all padded to the longest of them


class Team:
    """A live sharded model. Rank 0 calls ask, and dismiss at the end; the other ranks serve."""

    def __init__(self, config: Config, topology: Topology, model: torch.nn.ModuleList):
        self.config = config
        self.topology = topology
        self.model = model
        self.in_flight = False  # after an error: whether the other ranks are in the midst of it

    def ask(self, what: str, **arguments):
        """Call a method of this object on every rank, and return what it gives here."""
        self.in_flight = True
        from_rank_zero((what, arguments))
        answer = getattr(self, what)(**arguments)
        self.in_flight = False
        return answer

    def serve(self) -> None:
        """Do what rank 0 asks until it dismisses."""
        while request := from_rank_zero(None):
            what, arguments = request
            getattr(self, what)(**arguments)

    def dismiss(self) -> None:
        from_rank_zero(None)

    def log_likelihoods(
        self, sequences: list[np.ndarray], lengths: list[int], label: str
    ) -> np.ndarray:
        """Of the last lengths[n] tokens of each sequence: log-likelihood in nats, and how many of them were not the likeliest, (N, 2)."""
        scores_N2 = np.zeros((len(sequences), 2))
        size = self.config.evals.micro_batch_size
        parallel = self.config.parallel
        together = size * (
            _IN_FLIGHT * parallel.pipeline_parallel_size
            if parallel.pipeline_parallel_size > 1
            else 1
        )
        for ids in self._parts(
            np.array([len(sequence) for sequence in sequences]), together, label
        ):
            batches = self._batches([sequences[id] for id in ids], [lengths[id] for id in ids])
            scored = log_likelihoods(self.model, batches)
            if scored:
                scores_N2[ids] = torch.cat(scored)[: len(ids)].cpu().numpy()
        return np.array(from_last_stage(torch.from_numpy(scores_N2.ravel()))).reshape(-1, 2)

    def generate(
        self,
        prompts: list[np.ndarray],
        sampling: Sampling,
        stops: list[str],
        tokenizer,
        eos_id: int | None,
        seed: int,
        label: str,
    ) -> list[list[int]]:
        """Continue each prompt until a stop string or end-of-text. A prompt's place in the list and the seed decide what is drawn."""

        # A token has a byte or more of text; the first of a decoded tail may have lost its leading space.
        tail = 1 + max((len(stop.encode()) for stop in stops), default=0)

        def ended(new: list[int]) -> bool:
            text = tokenizer.decode(new[-tail:])
            return new[-1] == eos_id or any(stop in text for stop in stops)

        mine = {}
        multiple = fp8_token_multiple(self.config)
        for ids in self._parts(
            np.array([len(prompt) for prompt in prompts]), self.config.evals.micro_batch_size, label
        ):
            rows = np.resize(
                ids, -(-len(ids) // multiple) * multiple
            )  # some twice, where kernels ask for more
            draws = np.stack(
                [np.random.default_rng([seed, id]).random(sampling.max_new_tokens) for id in rows]
            )
            mine |= zip(
                rows,
                generate(
                    self.model, self.topology, [prompts[id] for id in rows], draws, sampling, ended
                ),
                strict=True,
            )
        answers = {id: new for part in from_each_replica(mine) for id, new in part.items()}
        return [answers[id] for id in range(len(prompts))]

    def _parts(self, lengths: np.ndarray, size: int, label: str):
        """This replica's share of sequences, as ids of like length, the longest first: what does not fit into memory fails at once."""
        by_length = np.argsort(-lengths, kind="stable")
        mine = by_length[self.topology.data_parallel_rank :: self.topology.data_parallel_size]
        with tqdm(
            total=len(mine),
            desc=label,
            leave=False,
            dynamic_ncols=True,
            disable=True if self.topology.rank else None,
        ) as bar:
            for start in range(0, len(mine), size):
                yield (ids := mine[start : start + size])
                bar.update(len(ids))

    def _batches(self, sequences: list[np.ndarray], lengths: list[int]) -> list[Batch]:
        """Micro-batches of one size, padded on the right; the last is filled up with repetitions."""
        size = min(self.config.evals.micro_batch_size, len(sequences))
        parallel = self.config.parallel
        parts = 2 * parallel.context_parallel_size if parallel.context_parallel_size > 1 else 1
        parts = math.lcm(parts, parallel.context_parallel_size * fp8_token_multiple(self.config))
        longest = -(-(max(map(len, sequences)) - 1) // parts) * parts
        filled = -(-len(sequences) // size) * size
        tokens_NT = np.zeros((filled, longest + 1), np.int64)
        mask_NT = np.zeros((filled, longest), np.float32)
        for row in range(filled):
            sequence = sequences[row % len(sequences)]
            length = lengths[row % len(sequences)]
            tokens_NT[row, : len(sequence)] = sequence
            mask_NT[row, len(sequence) - 1 - length : len(sequence) - 1] = 1
        return [
            self._batch(tokens_NT[start : start + size], mask_NT[start : start + size])
            for start in range(0, filled, size)
        ]

    def _batch(self, tokens_BT: np.ndarray, mask_BT: np.ndarray) -> Batch:
        inputs_BT = torch.from_numpy(tokens_BT[:, :-1].copy())
        labels_BT = torch.from_numpy(tokens_BT[:, 1:].copy())
        positions_BT = torch.arange(inputs_BT.shape[1]).expand_as(inputs_BT).contiguous()
        batch = Batch(
            tuple(inputs_BT.shape), inputs_BT, labels_BT, torch.from_numpy(mask_BT), positions_BT
        )
        return batch.of_context_rank(
            self.topology.context_parallel_rank, self.config.parallel.context_parallel_size
        ).to(self.topology.device)
