"""Run `retemper tokenize` with such sizes that a small corpus has several parts and buckets.

python tokenize_job.py CONFIG_JSON PART_BYTES BUCKET_BYTES
"""

import json
import sys

from retemper.pipeline.errors import UserError
from retemper.pipeline.schema.data import DataConfig
from retemper.tokenize import job_folder, listing
from retemper.tokenize.job import tokenize

if __name__ == "__main__":
    listing.PART_BYTES, job_folder._BUCKET_BYTES = int(sys.argv[2]), int(sys.argv[3])
    try:
        print(json.dumps(tokenize(DataConfig.model_validate_json(sys.argv[1]))))
    except UserError as error:
        sys.exit(f"error: {error}")
