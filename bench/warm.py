"""`python -m bench warm`: compiles what the suites launch, in as many processes as there are cores, so that nothing waits for it later.

Triton compiles a kernel when it is first launched, for a second or two, and keeps it on the disk, where every later process finds it.
"""

import argparse
import multiprocessing
import os
import time
from multiprocessing.sharedctypes import Synchronized

import torch

from visattn import models
from visattn.device import chosen_device, float32_precision

from . import cases, layers, model_steps, problems, timing
from .providers import PROVIDERS, first_line


def configure(parser: argparse.ArgumentParser) -> None:
    suites = (*cases.LAYER_SUITES, "models")
    parser.add_argument("--suite", nargs="+", choices=suites, default=suites, help=f"what is launched (default: {', '.join(suites)})")
    cases.add_case_argument(parser)
    cases.add_size_arguments(parser)
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: one a core")


def run(options: argparse.Namespace) -> int:
    """Returns 1 if a case failed, 0 otherwise. A process that dies ends no other: what is left of the cases is theirs."""
    device = chosen_device(options.device)
    chosen = ours(cases.named(cases.suite_cases(options.suite, device.type, options.size), options.case))
    spawning = multiprocessing.get_context("spawn")
    taken = spawning.Value("i", 0)
    processes = [spawning.Process(target=work, args=(chosen, taken, device)) for _ in range(min(options.processes, len(chosen)))]
    start = time.perf_counter()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    failed = sum(process.exitcode != 0 for process in processes)
    print(f"{len(chosen)} cases in {time.perf_counter() - start:.0f} s by {len(processes)} processes, {failed} of them with failures")
    return int(failed > 0)


def ours(chosen: list[cases.Case | cases.ModelCase]) -> list[cases.Case | cases.ModelCase]:
    """Those that have this package's layer in them; training first, which launches six times as many kernels."""
    launching = [case for case in chosen if isinstance(case, cases.Case) or "fused" in models.attentions(case.model)]
    return sorted(launching, key=lambda case: case.mode != "training")


def work(chosen: list[cases.Case | cases.ModelCase], taken: "Synchronized[int]", device: torch.device) -> None:
    """One process's part: runs the next case that none has taken, until there is none; exits with 1 if one of its cases failed.

    A device that is dead ends it at once, or it would take every case only to fail.
    """
    torch.set_num_threads(1)
    failed = False
    while (case := _next(chosen, taken)) is not None:
        start = time.perf_counter()
        try:
            launch(case, device)
            outcome = f"{time.perf_counter() - start:.1f} s"
        except Exception as error:
            failed, outcome = True, f"{type(error).__name__}: {first_line(error)}"
        print(f"{case}: {outcome}\n", end="", flush=True)
        if failed:
            timing.check_alive(device)
    if failed:
        raise SystemExit(1)


def launch(case: cases.Case | cases.ModelCase, device: torch.device) -> None:
    """One call of our layer, or of the model with it, as it is measured."""
    with float32_precision(case.tf32):
        if isinstance(case, cases.Case):
            problem = problems.make_problem(case, device)
            built = PROVIDERS["visattn"](problem, layers.no_choice)
            with layers.in_force(built, case):
                layers.calls(built, problem)[0]()
        else:
            model_steps.call_of(case, "fused", device)()
        timing.synchronize(device)


def _next(chosen: list[cases.Case | cases.ModelCase], taken: "Synchronized[int]") -> cases.Case | cases.ModelCase | None:
    with taken.get_lock():
        place, taken.value = taken.value, taken.value + 1
    return chosen[place] if place < len(chosen) else None
