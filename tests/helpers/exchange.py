"""Import, train and export in turn on one rank, with new process groups for each case.

conftest.launch runs it. A case is {"import": options} or {"export": options}, with the values
of a request (schema/exchange.py), or {"train": overrides}.
"""

from retemper.pipeline.config.compose import load_config
from retemper.pipeline.distributed import topology
from retemper.pipeline.distributed.collectives import barrier
from retemper.pipeline.entry.preflight import preflight
from retemper.pipeline.schema.exchange import ExportRequest, ImportRequest


def main(cases: list[dict]) -> None:
    from retemper.pipeline.huggingface.__main__ import exporting, importing

    verbs = {
        "import": lambda **options: importing(ImportRequest(**options)),
        "export": lambda **options: exporting(ExportRequest(**options)),
        "train": training,
    }
    for case in cases:
        ((verb, options),) = case.items()
        prepare, work = verbs[verb](**options)
        setup, fingerprints = prepare()
        work(setup, topology.start(setup.parallel), fingerprints)
        barrier()  # one rank alone compares with transformers
        topology.stop(leave=False)


def training(overrides: list[str]):
    from retemper.pipeline.train.loop import train

    def prepare():
        config = load_config(overrides)
        return config, preflight(config)

    return prepare, train
