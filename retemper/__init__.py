"""Continued pretraining at Megatron scale that measures what was learned and what was forgotten.

In a checkout this folder contains links to the code folders, for tools that resolve imports without
running them (mypy, pyright, editors). Python itself imports each module from the folder that the
link points to, so that a file has one path and a class exists once, whatever the current folder is.
"""

from pathlib import Path

if Path(__file__).with_name("pipeline").is_symlink():
    __path__ = [str(Path(__file__).resolve().parent.parent)]
