"""nnU-Net's command that plans and preprocesses, with threads in place of the processes that it spawns.

Each of them would import nnU-Net anew, which takes several seconds; the data of tests take far less.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence

_SCRIPT = """
import json, multiprocessing, sys
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace
multiprocessing.Pool, multiprocessing.get_context = ThreadPool, lambda kind=None: SimpleNamespace(Pool=ThreadPool)
from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import plan_and_preprocess_entry
for command in json.loads(sys.argv[1]):
    sys.argv = command
    plan_and_preprocess_entry()
"""


def plan_and_preprocess(configurations: Mapping[str, Sequence[str]], environment: Mapping[str, str]) -> None:
    """Run ``nnUNetv2_plan_and_preprocess`` for datasets, all in one process.

    Args:
        configurations: dataset -> its configurations, e.g. {"Dataset004_Hippocampus": ["2d", "3d_fullres"]}.
        environment: the process's variables, nnU-Net's folders among them.
    """
    commands = [["nnUNetv2_plan_and_preprocess", "-d", dataset[7:10], "-npfp", "1", "--no_pbar", "-c", *names,
                 "-np", *["1"] * len(names)] for dataset, names in configurations.items()]
    done = subprocess.run([sys.executable, "-c", _SCRIPT, json.dumps(commands)], env=dict(environment),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:]
