"""A scenario a line of JSON on standard input, what it found a line on standard output: one process for many of them.

echo '["train", {"family": "qwen2_vl"}]' | python -m tests.cuda_rehearsal.worker
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


def main() -> None:
    from tests.cuda_rehearsal import fake_cuda

    fake_cuda.load(fake_cuda.compile_guard())
    _leave_out_triton()
    results, sys.stdout = sys.stdout, sys.stderr
    warnings.simplefilter("ignore")
    # Forked before anything here has gone backward: autograd's threads do not outlive a fork.
    forking = ProcessPoolExecutor(1, mp_context=get_context("fork"))
    forking.submit(gc.collect).result()
    for line in iter(sys.stdin.readline, ""):
        name, options = json.loads(line)
        if options.get("strategy", "").startswith("zero"):
            answer = forking.submit(in_a_fork, name, options).result()
        else:
            answer = answered(name, options)
        print(answer, file=results, flush=True)


def answered(name: str, options: dict[str, Any]) -> str:
    """What the scenario found, or its error, with the seconds that it took."""
    started = time.process_time()
    try:
        run = scenario(name)
        # Modules are here to stay: looking through them again at every collection takes a second each time.
        gc.freeze()
        found = run(**options)
    except Exception:
        found = {"error": traceback.format_exc()}
    found["seconds"] = round(time.process_time() - started, 1)
    return json.dumps(found, default=str)


def in_a_fork(name: str, options: dict[str, Any]) -> str:
    """The same in a process that ends with it: DeepSpeed keeps its groups and its settings as long as one lives."""
    import deepspeed  # noqa: F401, here and not in every fork anew

    scenario(name)
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as fork:
        return fork.submit(answered, name, options).result()


def _leave_out_triton() -> None:
    """Where Triton is installed, TRL's kernels would look for the driver of a real device: take its other branch."""
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    chunked_logprob._use_triton = utils._use_triton = lambda device: False


def scenario(name: str):
    from transformers.utils import logging

    logging.set_verbosity_error()
    if name == "answer":
        from tests.cuda_rehearsal.answering import answer

        return answer
    if name == "train":
        from tests.cuda_rehearsal.training import train

        return train
    raise KeyError(name)


if __name__ == "__main__":
    main()
