"""Continued pretraining at Megatron scale, with what was learned and what was forgotten measured.

In a checkout this folder holds links to the folders of code, for tools that resolve imports without
running them (mypy, pyright, editors). Python itself takes each module from its own folder, so that a
file has one path and a class exists once, whatever the current folder is.
"""

from pathlib import Path

if Path(__file__).with_name("pipeline").is_symlink():
    __path__ = [str(Path(__file__).resolve().parent.parent)]
