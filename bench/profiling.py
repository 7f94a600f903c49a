"""`python -m bench profile`: which kernels a step of the layer launches, and how long each takes."""

import argparse
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from visattn import files
from visattn.device import chosen_device, float32_precision

from . import cases, layers, problems, timing
from .providers import PROVIDERS

STEPS = 10


def configure(parser: argparse.ArgumentParser) -> None:
    cases.add_size_arguments(parser)
    cases.add_case_argument(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of profile.txt (default: runs/bench)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")


def run(options: argparse.Namespace) -> int:
    device = chosen_device(options.device)
    kind = "cuda" if device.type == "cuda" else "cpu"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (kind == "cuda")
    text = []
    training = [case for case in cases.layer_cases("cifar", device.type, options.size) if case.mode == "training"]
    for case in cases.named(training, options.case):
        with float32_precision(case.tf32):
            problem = problems.make_problem(case, device)
            built = PROVIDERS["visattn"](problem, layers.no_choice)
            (call,) = layers.calls(built, problem)
            timing.estimate(call, device)  # compiles
            with profile(activities=activities) as profiler:
                for _ in range(STEPS):
                    call()
                timing.synchronize(device)
        table = profiler.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=12, max_name_column_width=60)
        text.append(f"{case}, {STEPS} calls\n{table}\n")
    options.out.mkdir(parents=True, exist_ok=True)
    files.write(options.out / "profile.txt", "\n".join(text))
    print(f"{len(text)} profiles in {options.out / 'profile.txt'}")
    return 0
