"""Score the initial weights of a run, or all its checkpoints, on one rank.

conftest.launch runs it, with new process groups for each case. A case is {"overrides": [...]}, with
the optional key "all": score as `retemper eval` does. Its results are evals/ in its run folder.
"""

from retemper.pipeline.config.compose import load_config
from retemper.pipeline.distributed import topology
from retemper.pipeline.entry.preflight import preflight


def main(cases: list[dict]) -> None:
    from retemper.pipeline.checkpoint.sharded import Checkpointer
    from retemper.pipeline.evals.__main__ import score_checkpoints
    from retemper.pipeline.evals.hook import evaluate
    from retemper.pipeline.model.build import build_model

    for case in cases:
        config = load_config(case["overrides"])
        place = topology.start(config.parallel)
        if case.get("all"):
            score_checkpoints(config, place, preflight(config))
            topology.stop(leave=False)
            continue
        model = build_model(config, place)
        Checkpointer(config, place, model, None, preflight(config)).restore()
        evaluate(config, place, model, 0)
        topology.stop(leave=False)
