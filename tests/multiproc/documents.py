"""One rank: with document masking every document has the losses it has alone. Started by conftest.launch under torchrun.

A case: {"overrides": [...]} of a run with data.mask_documents on a corpus of several documents a sample.
"""

import json
import sys

import numpy as np
import torch

from retemper.pipeline.config import load_config
from retemper.pipeline.distributed import topology


def main(cases: list[dict]) -> None:
    for case in cases:
        config = load_config(case["overrides"])
        place = topology.start(config.parallel)
        compare(config, place)
        topology.stop(leave=False)


def compare(config, place) -> None:
    from retemper.pipeline.data.batch import make_batches
    from retemper.pipeline.data.mds import Samples
    from retemper.pipeline.data.shards import TokenShards
    from retemper.pipeline.distributed.seeds import seed_step
    from retemper.pipeline.model.build import build_model
    from retemper.pipeline.model.forward import run_schedule

    seed_step(config.seed, 0, place)
    model = build_model(config, place)
    shards = TokenShards(config.data.path, "train")
    samples = shards.samples(np.arange(4))

    @torch.no_grad()
    def losses(samples, *, mask_documents):
        [batch] = make_batches(samples, len(samples), mask_documents=mask_documents)
        (output,) = run_schedule(model, [batch], forward_only=True)
        return output["losses_BT"].flatten()

    def loss_of_one(tokens):
        sample = Samples(1, len(tokens))
        sample.leave_out(0)
        sample.tokens_NT[0] = tokens
        return losses(sample, mask_documents=False)

    together = losses(samples, mask_documents=True)
    alone, labelled = [], []
    for row, tokens_T in enumerate(samples.tokens_NT):
        *documents, padding = np.split(tokens_T, samples.values("lengths", row).cumsum())
        for tokens in documents:
            alone.append(loss_of_one(tokens))
            labelled += [True] * (len(tokens) - 1) + [False]  # the last has another document's token for its label
        alone.append(torch.zeros(len(padding)))
        labelled += [False] * len(padding)
    labelled = torch.tensor(labelled)
    assert labelled.sum() > 100 and len(samples.values("lengths")) > len(samples)
    torch.testing.assert_close(together[labelled], torch.cat(alone)[labelled], rtol=1e-5, atol=1e-6)
    unmasked = losses(samples, mask_documents=False)
    assert not torch.allclose(unmasked[labelled], together[labelled], rtol=1e-3), "without the mask documents see each other"


if __name__ == "__main__":
    topology.prepare_megatron()
    main(json.loads(sys.argv[1]))
