"""One rank that scores the weights a run begins with, megatron's groups built anew for each case. Run by conftest.launch.

A case: {"overrides": [...]}, and "twice": true to score again. Its results are evals/00000000 in its run folder.
"""

from retemper.pipeline.config import load_config
from retemper.pipeline.distributed import topology
from retemper.pipeline.preflight import preflight


def main(cases: list[dict]) -> None:
    from retemper.pipeline.checkpoint.sharded import Checkpointer
    from retemper.pipeline.evals.hook import evaluate, format_scores
    from retemper.pipeline.model.build import build_model

    for case in cases:
        config = load_config(case["overrides"])
        place = topology.start(config.parallel)
        model = build_model(config, place)
        Checkpointer(config, place, model, None, preflight(config)).restore()
        scores = evaluate(config, place, model, 0)
        if place.rank == 0:
            print(format_scores(0, scores))
        topology.barrier()
        topology.stop(leave=False)
