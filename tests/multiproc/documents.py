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
    from retemper.pipeline.data.batch import make_batch
    from retemper.pipeline.data.shards import TokenShards
    from retemper.pipeline.distributed.seeds import seed_step
    from retemper.pipeline.model.build import build_model
    from retemper.pipeline.model.forward import run_schedule

    seed_step(config.train.seed, 0, place)
    model = build_model(config, place)
    shards = TokenShards(config.data.path, "train")
    samples = [shards.sample(id) for id in range(4)]

    @torch.no_grad()
    def losses(samples, *, mask_documents):
        batch = make_batch(samples, mask_documents=mask_documents)
        (output,) = run_schedule(model, [batch], forward_only=True)
        return output["losses_BT"].flatten()

    together = losses(samples, mask_documents=True)
    alone, labelled = [], []
    for sample in samples:
        padding = len(sample["tokens"]) - int(sample["lengths"].sum())
        for tokens in np.split(sample["tokens"], np.cumsum(sample["lengths"]))[: len(sample["lengths"])]:
            alone.append(losses([{"tokens": tokens, "lengths": np.array([len(tokens)])}], mask_documents=False))
            labelled += [True] * (len(tokens) - 1) + [False]  # the last has another document's token for its label
        alone.append(torch.zeros(padding))
        labelled += [False] * padding
    labelled = torch.tensor(labelled)
    assert labelled.sum() > 100 and max(len(sample["lengths"]) for sample in samples) > 1
    torch.testing.assert_close(together[labelled], torch.cat(alone)[labelled], rtol=1e-5, atol=1e-6)
    unmasked = losses(samples, mask_documents=False)
    assert not torch.allclose(unmasked[labelled], together[labelled], rtol=1e-3), "without the mask documents see each other"


if __name__ == "__main__":
    topology.prepare_megatron()
    main(json.loads(sys.argv[1]))
