"""Run requests on one rank of several that stay for a whole test session.

They stay because imports take longer than most cases; conftest starts them under torchrun. A
request is a file, <number>.json, in the folder that is named on the command line: {"script": a
module beside this one, "cases": the argument of its main}. A rank that has finished a request
writes <number>.<rank>; an exception ends all ranks.
"""

import importlib
import itertools
import json
import os
import sys
import time
from pathlib import Path

from retemper.pipeline.distributed import topology


def main(folder: Path, session: int) -> None:
    topology.prepare_megatron()
    for number in itertools.count():
        request = folder / f"{number}.json"
        while not request.exists():
            os.kill(session, 0)  # raises once the session is gone
            time.sleep(0.02)
        asked = json.loads(request.read_text())
        importlib.import_module(asked["script"]).main(asked["cases"])
        (folder / f"{number}.{os.environ['RANK']}").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
