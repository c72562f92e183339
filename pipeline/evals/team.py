"""Call the sharded model from rank 0: every rank computes its part, rank 0 returns the result.

Only rank 0 handles tasks, files and metrics, so an error in those can never leave the other ranks
blocked in a collective.
"""

import math

import numpy as np
import torch

from retemper.pipeline.config.rules import fp8_token_multiple
from retemper.pipeline.data.batch import Batch
from retemper.pipeline.distributed.collectives import (
    all_gather_data_parallel,
    all_reduce_from_last_stage,
    broadcast_from_rank0,
)
from retemper.pipeline.distributed.topology import Topology
from retemper.pipeline.files.progress_bar import ProgressBar
from retemper.pipeline.model.inference import Sampling, generate, log_likelihoods
from retemper.pipeline.schema.run import Config

# Micro-batches per pipeline stage that are processed together, all padded to the longest.
_IN_FLIGHT = 2


class RankZeroServer:
    """A live sharded model, called from rank 0.

    Rank 0 calls `call`, and `shutdown` at the end; all other ranks call `serve`.
    """

    def __init__(self, config: Config, topology: Topology, model: torch.nn.ModuleList):
        self.config = config
        self.topology = topology
        self.model = model
        self.in_flight = False  # after an error: whether the other ranks may still be computing

    def call(self, method: str, **arguments):
        """Call the method `method` on every rank, and return this rank's result.

        Only rank 0 calls this, while all other ranks are in `serve`.
        """
        self.in_flight = True
        broadcast_from_rank0((method, arguments))
        result = getattr(self, method)(**arguments)
        self.in_flight = False
        return result

    def serve(self) -> None:
        """Execute the calls of rank 0 until it calls `shutdown`. All ranks but 0 call this."""
        while request := broadcast_from_rank0(None):
            method, arguments = request
            getattr(self, method)(**arguments)

    def shutdown(self) -> None:
        """Let the other ranks return from `serve`. Only rank 0 calls this."""
        broadcast_from_rank0(None)

    def log_likelihoods(
        self, sequences: list[np.ndarray], lengths: list[int], label: str
    ) -> np.ndarray:
        """Score the last tokens of each sequence.

        Args:
            sequences: Token ids.
            lengths: The number of tokens to score at the end of each sequence.
            label: The label of the progress bar.

        Returns:
            For each sequence the log-likelihood in nats, and the number of scored tokens that were
            not the most likely one, (N, 2).

        Collective: every rank must call this.
        """
        scores_N2 = np.zeros((len(sequences), 2))
        size = self.config.evals.micro_batch_size
        parallel = self.config.parallel
        group_size = size * (
            _IN_FLIGHT * parallel.pipeline_parallel_size
            if parallel.pipeline_parallel_size > 1
            else 1
        )
        for ids in self._parts(
            np.array([len(sequence) for sequence in sequences]), group_size, label
        ):
            batches = self._batches([sequences[id] for id in ids], [lengths[id] for id in ids])
            scored = log_likelihoods(self.model, batches)
            if scored:
                scores_N2[ids] = torch.cat(scored)[: len(ids)].cpu().numpy()
        return np.array(all_reduce_from_last_stage(torch.from_numpy(scores_N2.ravel()))).reshape(
            -1, 2
        )

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
        """Continue each prompt until a stop string, end-of-text or the maximum number of tokens.

        Args:
            prompts: Token ids.
            sampling: How each next token is chosen.
            stops: The strings that end a text.
            tokenizer: Decodes tokens, to find the stop strings.
            eos_id: The end-of-text token.
            seed: The seed of sampling. What is drawn depends only on it and on a prompt's index.
            label: The label of the progress bar.

        Returns:
            The generated token ids of each prompt.

        Collective: every rank must call this.
        """

        # A token has at least one byte of text; the first token of a decoded tail may lose its
        # leading space.
        tail = 1 + max((len(stop.encode()) for stop in stops), default=0)

        def ended(new: list[int]) -> bool:
            text = tokenizer.decode(new[-tail:])
            return new[-1] == eos_id or any(stop in text for stop in stops)

        generated: dict[int, list[int]] = {}
        multiple = fp8_token_multiple(self.config)
        for ids in self._parts(
            np.array([len(prompt) for prompt in prompts]), self.config.evals.micro_batch_size, label
        ):
            # Some prompts are repeated where kernels need a multiple of rows.
            rows = np.resize(ids, -(-len(ids) // multiple) * multiple)
            draws = np.stack(
                [np.random.default_rng([seed, id]).random(sampling.max_new_tokens) for id in rows]
            )
            generated |= zip(
                rows,
                generate(
                    self.model, self.topology, [prompts[id] for id in rows], draws, sampling, ended
                ),
                strict=True,
            )
        gathered = {
            id: new for part in all_gather_data_parallel(generated) for id, new in part.items()
        }
        return [gathered[id] for id in range(len(prompts))]

    def _parts(self, lengths: np.ndarray, size: int, label: str):
        """Yield this replica's share of the sequences, in groups of ids of similar length.

        The longest come first, so that a size which does not fit into memory fails at once.
        """
        by_length = np.argsort(-lengths, kind="stable")
        local_ids = by_length[self.topology.data_parallel_rank :: self.topology.data_parallel_size]
        with ProgressBar(
            total=len(local_ids), desc=label, leave=False, disable=self.topology.rank > 0
        ) as bar:
            for start in range(0, len(local_ids), size):
                yield (ids := local_ids[start : start + size])
                bar.update(len(ids))

    def _batches(self, sequences: list[np.ndarray], lengths: list[int]) -> list[Batch]:
        """Make micro-batches of equal size, padded on the right; the last repeats sequences."""
        size = min(self.config.evals.micro_batch_size, len(sequences))
        parallel = self.config.parallel
        multiple = 2 * parallel.context_parallel_size if parallel.context_parallel_size > 1 else 1
        multiple = math.lcm(
            multiple, parallel.context_parallel_size * fp8_token_multiple(self.config)
        )
        padded_length = -(-(max(map(len, sequences)) - 1) // multiple) * multiple
        rows = -(-len(sequences) // size) * size
        tokens_NT = np.zeros((rows, padded_length + 1), np.int64)
        mask_NT = np.zeros((rows, padded_length), np.float32)
        for row in range(rows):
            sequence = sequences[row % len(sequences)]
            length = lengths[row % len(sequences)]
            tokens_NT[row, : len(sequence)] = sequence
            mask_NT[row, len(sequence) - 1 - length : len(sequence) - 1] = 1
        return [
            self._batch(tokens_NT[start : start + size], mask_NT[start : start + size])
            for start in range(0, rows, size)
        ]

    def _batch(self, tokens_BT: np.ndarray, mask_BT: np.ndarray) -> Batch:
        inputs_BT = torch.from_numpy(tokens_BT[:, :-1].copy())
        labels_BT = torch.from_numpy(tokens_BT[:, 1:].copy())
        positions_BT = torch.arange(inputs_BT.shape[1]).expand_as(inputs_BT).contiguous()
        batch = Batch(
            tuple(inputs_BT.shape), inputs_BT, labels_BT, torch.from_numpy(mask_BT), positions_BT
        )
        return batch.shard_for_context_parallel(
            self.topology.context_parallel_rank, self.config.parallel.context_parallel_size
        ).to(self.topology.device)
