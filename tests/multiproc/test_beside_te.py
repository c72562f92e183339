"""Test training on CPU with Transformer Engine and apex installed, as on a login node."""

import os
import subprocess
import sys

from conftest import ROOT, overrides

from retemper.pipeline.runs.run_folder import read_metrics

# Every name of transformer_engine can be imported, and nothing of it computes without a GPU.
TRANSFORMER_ENGINE = '''
import importlib.abc
import importlib.machinery
import sys
import types

import torch


def refuse(*arguments, **options):
    raise RuntimeError("CUDA error: no CUDA-capable device is detected")


class StandIn(types.ModuleType):
    """A module, and a function where it is called."""

    __call__ = refuse

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            found = type(name, (torch.nn.Module,), {"__init__": refuse})
        else:
            found = StandIn(f"{self.__name__}.{name}")
        setattr(self, name, found)
        return found


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.startswith("transformer_engine."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass


__path__ = []  # a package, whose modules the finder makes
sys.meta_path.append(Finder())
sys.modules[__name__].__class__ = StandIn
__version__ = "2.19.0"
'''
APEX = "raise RuntimeError('CUDA error: no CUDA-capable device is detected')"


def test_a_step_on_cpu_uses_no_transformer_engine_kernel(workspace, tmp_path):
    stand_ins = {"transformer_engine": TRANSFORMER_ENGINE, "apex": APEX, "amp_C": APEX}
    for name, code in stand_ins.items():
        (tmp_path / f"{name}.py").write_text(code)
    one_step = ["train.tokens=512", "schedule.warmup_tokens=0", "evals.max_samples=2"]
    asked = overrides(workspace, "beside", *one_step)
    done = subprocess.run(
        [sys.executable, "-m", "retemper.pipeline.train", *asked],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    records = read_metrics(workspace / "runs" / "test" / "beside")
    assert [record["step"] for record in records] == [1]
