"""python -m tests.reliability.fuzzing --cases 10000 --seed 0: random calls of `functional.self_attention_2d`, each held to the gates.

A case is a call in a few numbers and words: shapes, form, dtype, memory layouts, what asks for a gradient, and a seed for its numbers.
Hypothesis draws cases from its own seed, so that a run can be repeated; a mismatch is printed as the line that repeats it alone.
The kernels run in Triton's interpreter, in a process of its own and on smaller maps.

Judged is all that `tests/oracle.py` judges, and the strides of the result, which inputs get a gradient, which backend ran, and that
no input has changed. With a residual the branch is judged, and the sum is held against map and branch.

On a map of few pixels, or a gradient of one number, eager is now and then right by chance, and what is twice as wrong says nothing.
A complaint counts if it stands when the call is judged together with the same call on other numbers, against eager or against what
the exact formula makes of inputs that are moved by as much as rounding moves them in sums of that length, whichever is farther from
the truth. What is wrong and no rounding error exceeds both by far.
"""

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor

from visattn import block, device, functional, reference, report, use_backend

from ..general_problems import Block, Problem, make_problem, run, truth_of
from ..layouts import LAYOUTS, lazily_negated
from ..oracle import Results, complaints, poisoned_memory, recorded_backends, stacked
from .figures import Figure

CASES, INTERPRETED = 10_000, 300
"""Of a whole run: in PyTorch, and on the kernels in the interpreter."""

POOLED = (12, 60)
"""On how many sets of numbers a call is judged once it has raised a complaint, and once it has again."""

SMALLEST_BLOCK = 16
"""All block sizes are multiples of it; what it does not divide, none does."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
ALL_LAYOUTS = {layout.__name__: layout for layout in (*LAYOUTS, lazily_negated)}
REPEATED = ("one_map_for_all", "one_column_for_all")
"""Layouts in which pixels are equal, so that the maximum of a window is nobody's in particular."""

_generating = hypothesis.settings(
    database=None, deadline=None, phases=[hypothesis.Phase.generate], suppress_health_check=list(hypothesis.HealthCheck)
)

Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One call. Widths are those of all heads together; value_channels is None without an output projection, groups 0 without a norm."""

    maps: int
    channels: int
    height: int
    width: int
    qk_channels: int
    value_channels: int | None
    num_heads: int
    pool: int
    groups: int
    affine: bool
    biases: tuple[str, ...]
    gamma: bool
    convolutions: bool
    scale: float | None
    residual: bool
    res_scale: float
    normalize: str
    dtype: str
    layout: str
    gradient_layout: str
    regime: str
    mean: float
    spoiled: bool
    wanted: tuple[str, ...]
    backend: str
    seed: int

    @property
    def replay(self) -> str:
        """The command that repeats this case."""
        return f"python -m tests.reliability.fuzzing --case {shlex.quote(json.dumps(dataclasses.asdict(self)))}"

    @staticmethod
    def parse(text: str) -> "Case":
        found = json.loads(text)
        return Case(**found | {name: tuple(found[name]) for name in ("biases", "wanted")})

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that are no tensors."""
        names = ("num_heads", "pool", "scale", "residual", "res_scale", "normalize")
        return {name: getattr(self, name) for name in names}

    @property
    def form(self) -> str:
        """Plain calls, those with softmax over the queries, and the two forms of the general block."""
        if self.normalize == "queries":
            return "queries"
        if self.value_channels is None and self.num_heads == self.pool == 1 and not self.groups and self.res_scale == 1.0:
            return "plain"
        shape = torch.empty(self.maps, self.channels, self.height, self.width, device="meta")
        return block.form_of(shape, self.qk_channels, self.value_channels, self.num_heads, self.pool, self.expected_backend).name

    @property
    def expected_backend(self) -> str:
        """Cases that "auto" sends elsewhere for their width are not drawn."""
        if self.backend != "auto":
            return self.backend
        possible = device.triton_is_interpreting() and self.normalize == "keys" and self.dtype in ("float32", "float16")
        return "triton" if possible else "torch"

    @property
    def fits_no_block(self) -> bool:
        return bool(self.height * self.width % SMALLEST_BLOCK and self.channels % SMALLEST_BLOCK and self.qk_channels % SMALLEST_BLOCK)

    @property
    def without_effect(self) -> str:
        return "b_k" if self.normalize == "keys" else "b_q"

    def problem(self) -> Problem:
        """Its numbers, laid out."""
        value, out = self.value_channels or self.channels, self.value_channels is not None
        made = make_problem(
            Block(self.channels, self.qk_channels, value, out, True, self.gamma, self.groups, self.settings), DTYPES[self.dtype],
            maps=self.maps, size=(self.height, self.width), regime=self.regime, mean=self.mean, seed=self.seed,
        )  # fmt: skip
        tensors = {name: t for name, t in made.tensors.items() if name in self.tensor_names}
        if self.convolutions:
            tensors |= {name: t[:, :, None, None] for name, t in tensors.items() if name.startswith("w_")}
        if self.spoiled and self.maps:
            tensors["x"][-1, 0, 0, 0] = float("nan")
        tensors["x"] = ALL_LAYOUTS[self.layout](tensors["x"])
        return replace(made, tensors=tensors, d_out=ALL_LAYOUTS[self.gradient_layout](made.d_out))

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """All the tensors of the call."""
        out, norm = ("w_o",) * (self.value_channels is not None), ("norm_weight", "norm_bias") * (self.groups > 0 and self.affine)
        return ("x", "w_q", "w_k", "w_v", *out, *self.biases, *("gamma",) * self.gamma, *norm)


@st.composite
def cases(draw: st.DrawFn, backends: Sequence[str] = ("torch", "torch", "auto")) -> Case:
    """All calls there are, of sizes that are judged in milliseconds; smaller ones for the kernels, in the interpreter."""
    kernels = "triton" in backends
    kind = draw(st.sampled_from(["tiny", "usual", "usual", "long"]))
    if kind == "long":  # beyond FLASH_MIN_TOKENS; for the interpreter, beyond one tile
        height, width = 1, draw(st.integers(60, 80) if kernels else st.integers(250, 400))
    else:
        side = 3 if kind == "tiny" else 6 if kernels else 13
        height, width = draw(st.integers(1, side)), draw(st.integers(1, side))
    few, wide = st.integers(1, 24), st.sampled_from([31, 32, 33, 40] if kernels else [31, 32, 33, 48, 64, 65, 100, 130, 257])
    channels = draw(few if kind == "long" else st.one_of(few, few, wide))
    if kernels and kind == "tiny" and draw(st.integers(0, 9)) == 0:  # beyond what one kernel computes by itself
        channels = 257
    layout, gradient_layout = (draw(st.sampled_from(list(ALL_LAYOUTS))) for _ in range(2))

    normalize = "keys" if kernels else draw(st.sampled_from(["keys"] * 7 + ["queries"]))
    general = normalize == "keys" and draw(st.booleans())
    has_out, num_heads, pool, groups, value_channels = general and draw(st.booleans()), 1, 1, 0, None
    if general:
        num_heads = draw(st.integers(1, 4) if has_out else st.sampled_from([n for n in range(1, 9) if channels % n == 0]))
        value_channels = num_heads * draw(st.integers(1, 24 // num_heads)) if has_out else None
        pool = draw(st.sampled_from([1, 1, *range(2, 1 + min(3, height, width))]))
        # A group of equal numbers has no variance: what remains are rounding errors, a thousand times as large.
        equal = height * width == 1 or (layout == "one_column_for_all" and height == 1)
        groups = draw(st.sampled_from([0, 0, *(n for n in range(1, channels + 1) if channels % n == 0 and not (equal and n == channels))]))
    qk_channels = num_heads * draw(st.one_of(st.just(max(1, channels // num_heads)), st.integers(1, 24 // num_heads)))
    biases = draw(st.sampled_from([(), ("b_q", "b_k", "b_v"), ("b_q",), ("b_k", "b_v"), ("b_v",)]))
    # Peaked logits of one channel, with a mean, or times more than the usual scale are in the hundreds, and so are, in units in the
    # last place, the errors of weights that a backward pass computes anew from logits and lse.
    regime = draw(st.sampled_from(["uniform", "peaked"])) if channels > 1 else "uniform"
    # Equal weights for all keys leave nothing of what has a mean of zero in each channel: all would be rounding errors.
    scale = draw(st.sampled_from([None, None, 1.0, 0.3, -0.5, 0.0 if groups < channels else None])) if regime == "uniform" else None
    case = Case(
        maps=draw(st.sampled_from([0, 1, 1, 2, 3] if kernels else [0, 1, 1, 2, 3, 4, 5])),
        channels=channels, height=height, width=width, qk_channels=qk_channels, value_channels=value_channels, num_heads=num_heads,
        pool=pool, groups=groups, affine=draw(st.booleans()), biases=(*biases, "b_o") if has_out and draw(st.booleans()) else biases,
        gamma=draw(st.booleans()), convolutions=draw(st.booleans()), scale=scale, residual=draw(st.sampled_from([False, False, True])),
        res_scale=draw(st.sampled_from([1.0, 1.0, 0.5])) if general else 1.0, normalize=normalize,
        dtype=draw(st.sampled_from(["float32", "float16"] if kernels else list(DTYPES))),
        layout=layout, gradient_layout=gradient_layout,
        regime=regime, mean=draw(st.sampled_from([0.0, 0.0, 3.0])) if regime == "uniform" else 0.0,
        spoiled=draw(st.integers(0, 19)) == 0 and scale != 0.0, wanted=(),
        backend=draw(st.sampled_from(list(backends))), seed=draw(st.integers(0, 1 << 30)),
    )  # fmt: skip
    names = case.tensor_names
    chosen = draw(st.integers(0, 2 ** len(names) - 1)) if draw(st.booleans()) else -1
    return replace(case, wanted=tuple(name for n, name in enumerate(names) if chosen >> n & 1))


def judge(case: Case, function: Attention = functional.self_attention_2d) -> list[str]:
    """What is wrong with a call, in sentences; nothing if nothing is."""
    found: list[str] = []
    if case.residual:
        whole, found = attempt(case, function)
        case = replace(case, residual=False)
        ours, more = attempt(case, function)
        found += more
        if whole is not None and ours is not None and not case.spoiled:
            found += _complaints_of_residual(case, whole, ours)
    else:
        ours, found = attempt(case, function)
    if ours is None or case.maps == 0:
        return found
    results, problems, complained = [ours], [case.problem()], _complaints(case, [ours], [case.problem()])
    for number in POOLED:
        others = [replace(case, seed=case.seed + n) for n in range(len(problems), number)] if complained else []
        for other in others:
            more, faults = attempt(other, function)
            if more is None or faults:
                return [*found, *faults]
            results.append(more)
            problems.append(other.problem())
        complained = complained and _complaints(case, results, problems, second_opinion=True)
    return found + complained


def attempt(case: Case, function: Attention) -> tuple[Results | None, list[str]]:
    """What the function makes of a case, the output and the gradients that it was asked for; and what is wrong with it but the numbers."""
    problem, found = case.problem(), []
    before = {name: t.clone() for name, t in problem.named()}
    versions = {name: t._version for name, t in problem.named()}
    leaves = {name: t.detach().requires_grad_(name in case.wanted) for name, t in problem.tensors.items()}
    wanted = [leaves[name] for name in case.wanted]
    try:
        with use_backend(case.backend), recorded_backends() as ran:
            out = problem.call(function, leaves)
            gradients = torch.autograd.grad(out, wanted, problem.d_out) if wanted else ()
    except Exception as error:  # whatever it raises, the call was a right one
        return None, [f"raised {type(error).__name__}: {str(error).splitlines()[0]}"]
    x = leaves["x"]
    if function is functional.self_attention_2d:
        if set(ran) != {case.expected_backend}:
            found.append(f"expected to run on {case.expected_backend}, ran {ran}")
        if not out.is_contiguous(memory_format=_memory_format_due(x)):
            found.append(f"out: strides {out.stride()} for strides {x.stride()} of x")
    if out.requires_grad != bool(wanted):
        found.append(f"out: requires_grad is {out.requires_grad}, gradients are wanted by {case.wanted}")
    if out.shape != x.shape or out.dtype != x.dtype:
        found.append(f"out: {out.dtype} {tuple(out.shape)} for x {x.dtype} {tuple(x.shape)}")
    changed = [name for name, t in problem.named() if t._version != versions[name] or not _same(t, before[name])]
    found += [f"{name}: has been changed" for name in changed]
    if case.maps == 0 and any(gradient.any() for gradient in gradients):
        found.append("without maps, a gradient is not zero")
    return {"out": out.detach(), **dict(zip(case.wanted, gradients, strict=True))}, found


def _complaints_of_residual(case: Case, whole: Results, branch: Results) -> list[str]:
    """Of `whole`, with the residual, and `branch`, without: the map and its gradient have to have come in once, and nothing else.

    A sum may be rounded at each of its terms, in fp32 or wider, which add up like a random walk, and once in its dtype.
    """
    problem, found = case.problem(), []
    eps = torch.finfo(DTYPES[case.dtype]).eps
    for name, passed in (("out", problem.tensors["x"]), ("x", problem.d_out)):
        if name not in whole or case.maps == 0:
            continue
        expected = branch[name].double() + case.res_scale * passed.double()
        error, size = (whole[name].double() - expected).abs().max().item(), branch[name].abs().max().item() + passed.abs().max().item()
        allowed = (2 * eps + case.channels**0.5 * min(eps, torch.finfo(torch.float32).eps)) * size
        if not error <= allowed:
            found.append(f"{name}: with the residual {error:.1e} from the sum of map and branch, allowed {allowed:.1e}")
    others = [name for name in whole if name not in ("out", "x")]
    return found + [f"{name}: another gradient with the residual" for name in others if not torch.equal(whole[name], branch[name])]


def _complaints(case: Case, results: list[Results], problems: list[Problem], second_opinion: bool = False) -> list[str]:
    """Those of the gates; as a second opinion, against the larger loss of eager's and that of the exact formula of moved inputs.

    Where the maximum of a window is undecided, so is who gets its gradient: judged is the output. Where eager leaves the range of its
    dtype and the truth does not, there is nothing to judge by: ours has to be finite.
    """
    truth = stacked([truth_of(reference.self_attention_2d, p) for p in problems])
    eager = stacked([run(reference.self_attention_2d, p) for p in problems])
    if second_opinion:
        moved = stacked([run(reference.self_attention_2d, _moved(p, case, seed)) for seed, p in enumerate(problems)])
        for name, result in moved.items():
            if _error(result, truth[name]) > _error(eager[name], truth[name]):
                eager[name] = result.to(eager[name].dtype)
    ours = stacked(results)
    if case.pool > 1 and (case.dtype in ("float16", "bfloat16") or case.layout in REPEATED):
        ours = {"out": ours["out"]}
    if case.spoiled:  # eager's gradients of these are NaN as well; here they do not depend on the map, and stay right
        ours = {name: t for name, t in ours.items() if name not in (case.without_effect, "b_v")}
    beyond = {name for name, t in eager.items() if not t.isfinite().all() and truth[name].to(t.dtype).isfinite().all()}
    infinite = [f"{name}: NaN or Inf where the truth has none" for name in beyond & set(ours) if not ours[name].isfinite().all()]
    ours = {name: t for name, t in ours.items() if name not in beyond}
    return infinite + complaints(ours, truth, eager, case.without_effect)


def _moved(problem: Problem, case: Case, seed: int) -> Problem:
    """Each number moved at random, in float64, by up to one unit in its last place and √K rounding errors for sums of K terms.

    In whatever order it adds, a sum of K products is the exact one of such numbers (Higham and Mary 2019, with λ = 1); of K equal
    products, which are rounded alike, that of numbers moved by K. 16 bits are added up in fp32. A backward pass that keeps lse computes
    the weights of d_out anew as exp(logit - lse), and they are off by a rounding error of the logit.
    """
    generator = torch.Generator().manual_seed(seed)
    eps = torch.finfo(DTYPES[case.dtype]).eps
    terms = max(case.channels, case.qk_channels, case.value_channels or 0, case.height * case.width)
    roundings = terms if case.layout in REPEATED else terms**0.5
    accumulated = min(eps, torch.finfo(torch.float32).eps)
    distance = eps + roundings * accumulated / 2
    distance_of_weights = distance + accumulated * _largest_logit(problem, case)

    def moved(t: Tensor, distance: float = distance) -> Tensor:
        return t.double() * (1 + distance * (2 * torch.rand(t.shape, generator=generator, dtype=torch.float64) - 1))

    return replace(
        problem, tensors={name: moved(t) for name, t in problem.tensors.items()}, d_out=moved(problem.d_out, distance_of_weights)
    )


def _largest_logit(problem: Problem, case: Case) -> float:
    """Of pixels that are not pooled."""
    tensors = {name: t.double() for name, t in problem.tensors.items()}
    x, scale = tensors["x"].nan_to_num(), (case.qk_channels // case.num_heads) ** -0.5 if case.scale is None else case.scale
    if case.groups:
        x = torch.group_norm(x, case.groups, tensors.get("norm_weight"), tensors.get("norm_bias"), 1e-6)
    q, k = (tensors[name].flatten(1) @ x.flatten(2) for name in ("w_q", "w_k"))
    q = q + tensors["b_q"][:, None] if "b_q" in tensors else q
    logits = scale * q.unflatten(1, (case.num_heads, -1)).mT @ k.unflatten(1, (case.num_heads, -1))
    return logits.abs().max().item()


def _error(result: Tensor, truth: Tensor) -> float:
    return (result.double() - truth).abs().max().item()


def _memory_format_due(x: Tensor) -> torch.memory_format:
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()))


@dataclass
class Outcome:
    """What a run came to: its cases, and the mismatches among them with their complaints."""

    cases: list[Case]
    mismatches: list[tuple[Case, list[str]]]

    def share(self, holds: Callable[[Case], bool]) -> float:
        return sum(map(holds, self.cases)) / len(self.cases)

    @property
    def fits_no_block(self) -> float:
        return self.share(lambda case: case.fits_no_block)

    @property
    def not_contiguous(self) -> float:
        """The share in which x or the gradient that comes back is not contiguous."""
        return self.share(lambda case: {case.layout, case.gradient_layout} != {"contiguous"})

    def __str__(self) -> str:
        kinds = {kind: Counter(getattr(case, kind) for case in self.cases) for kind in ("form", "dtype", "backend", "layout", "regime")}
        rows = [[kind, ", ".join(f"{name} {count}" for name, count in counts.most_common())] for kind, counts in kinds.items()]
        rows.append(["shape no multiple of any block", f"{self.fits_no_block:.0%}"])
        rows.append(["x or gradient not contiguous", f"{self.not_contiguous:.0%}"])
        rows.append(["gradients of a part of the inputs", f"{self.share(lambda c: 0 < len(c.wanted) < len(c.tensor_names)):.0%}"])
        lines = [f"{len(self.cases)} cases, {len(self.mismatches)} mismatches", "", report.markdown_table(["kind", "cases"], rows)]
        for case, found in self.mismatches:
            lines += ["", case.replay, *(f"    {complaint}" for complaint in found)]
        return "\n".join(lines)


def fuzz(
    number: int, seed: int, function: Attention = functional.self_attention_2d, drawn: st.SearchStrategy[Case] | None = None
) -> Outcome:
    """Draws and judges so many cases."""
    outcome = Outcome([], [])
    on_kernels = cases(backends=("triton", "triton", "auto")) if device.triton_is_interpreting() else cases()

    @hypothesis.seed(seed)
    @hypothesis.settings(_generating, max_examples=number)
    @hypothesis.given(on_kernels if drawn is None else drawn)
    def one(case: Case) -> None:
        outcome.cases.append(case)
        if found := judge(case, function):
            outcome.mismatches.append((case, found))

    with poisoned_memory():
        one()
    return outcome


def in_interpreter(number: int, seed: int) -> tuple[bool, str]:
    """The same on the kernels, in a process of its own: whether all was right, and what it says."""
    command = [sys.executable, "-m", "tests.reliability.fuzzing", "--cases", str(number), "--seed", str(seed), "--interpreted", "0"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    return done.returncode == 0, done.stdout + done.stderr


def figures() -> list[Figure]:
    outcome = fuzz(CASES, 0)
    right, said = in_interpreter(INTERPRETED, 0)
    if outcome.mismatches or not right:
        print(outcome, said, sep="\n", file=sys.stderr)
    mismatches = f"{len(outcome.cases)}, {len(outcome.mismatches)} mismatches"
    odd, strided = outcome.fits_no_block, outcome.not_contiguous
    return [
        Figure("random calls in PyTorch against float64", mismatches, "0 mismatches", not outcome.mismatches),
        Figure("of them with a shape that is no multiple of any block", f"{odd:.0%}", "≥ 40 %", odd >= 0.4),
        Figure("of them with an input or gradient that is not contiguous", f"{strided:.0%}", "≥ 30 %", strided >= 0.3),
        Figure("random calls on the kernels in the interpreter", said.partition(": ")[2].partition("\n")[0], "0 mismatches", right),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.fuzzing", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--interpreted", type=int, default=None, help="cases on the kernels; by default three in a hundred")
    parser.add_argument("--case", type=Case.parse, help="one case, as a mismatch is printed")
    options = parser.parse_args(arguments)
    if options.case:
        if options.case.backend == "triton" and not device.triton_is_interpreting():
            parser.error("the case is one of the kernels; set TRITON_INTERPRET=1")
        with poisoned_memory():
            found = judge(options.case)
        print("\n".join(found) or "no complaint")
        return int(bool(found))
    start = time.perf_counter()
    outcome = fuzz(options.cases, options.seed)
    where = "on the kernels, in the interpreter" if device.triton_is_interpreting() else "in PyTorch"
    print(f"{where}, seed {options.seed}: {outcome}\n\n{time.perf_counter() - start:.0f} s")
    right = not outcome.mismatches
    number = options.cases * INTERPRETED // CASES if options.interpreted is None else options.interpreted
    if number:
        kernels_right, said = in_interpreter(number, options.seed)
        print(said)
        right = right and kernels_right
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
