"""The rows of `python -m bench static` as text: aligned columns for a terminal, Markdown for a report, and whole passes."""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from visattn.report import markdown_table

from .throughput import MACHINES, PIPES, floor_cycles

Row = dict[str, Any]

_COUNTS = ("tensor", "mufu", "conversion", "fp32", "imad", "alu", "shared", "shuffle", "barrier")
_HEADER = (
    "kernel", "blocks", "reg", "spill", "KB", "CTAs", "instr", "matrix", "tens", "mufu", "cvt", "fp32", "imad", "alu", "smem", "shfl",
    "bar", "work", "|", *PIPES, "|", "bound", "floor", "share", "L2 B/clk",
)  # fmt: skip
_NOTE = """\
CTAs: resident on an SM, limited by registers (r), shared memory (s) or threads (t). Left of the first bar one iteration of the main
loop, counted for one warp; work: matrix products done over those needed. Right of it the cycles of one CTA's iteration on each pipe.
share: of the floor, an upper limit, since latency is not modelled and resident CTAs are taken to overlap perfectly; in brackets, where
one CTA fits, if nothing overlaps. L2 B/clk: what an SM would draw at that pace; an A100's L2 gives each at most 47."""


def rows_table(rows: Iterable[Row]) -> str:
    """One block for each target, dtype and width."""
    lines: list[Sequence[str]] = [_HEADER]
    headings: dict[int, str] = {}
    for _, group in groupby(rows, key=_form):
        members = list(group)
        headings[len(lines)] = f"\n{heading(members[0])}"
        lines += [_cells(r) for r in members]
    text = _aligned(lines)
    out = []
    for index, line in enumerate(text):
        if index in headings:
            out += [headings[index], text[0]]
        if index:
            out.append(line)
    return "\n".join([*out, "", _NOTE, ""])


def heading(row: Row) -> str:
    width = f"heads of {row['channels']}" if _on_tokens(row) else f"C = {row['channels']}"
    if row["qk_channels"] != row["channels"]:
        width += f", queries and keys projected to {row['qk_channels']}"
    return f"{row['target']} {row['dtype']} {width}"


def _form(row: Row) -> tuple[Any, ...]:
    return row["target"], row["dtype"], row["channels"], row["qk_channels"], _on_tokens(row)


def _on_tokens(row: Row) -> bool:
    """Whether it is one of the kernels on queries, keys and values that exist."""
    return row["kernel"] in ("token_attention_forward", "token_query_gradient", "token_key_value_gradient")


def _cells(row: Row) -> list[str]:
    loop, predicted = row["loop"], row["prediction"]
    programs = "" if row["programs"] is None else f"{row['programs']}{row['limit'][0]}"
    cells = [row["kernel"], row["config"], str(row["registers"]), str(row["spills"]), f"{row['shared_memory'] / 1024:.0f}", programs]
    if loop is None:
        where = "no loop, " if row["target"].startswith("sm_") else ""  # the loops of AMD's kernels are not read
        return [*cells, "", f"{where}{row['matrix_instructions']} in all"] + [""] * (len(_HEADER) - len(cells) - 2)
    work = "" if loop["products"] is None else f"{loop['products']:.2f}"
    cells += [str(loop["instructions"]), loop["matrices"], *(str(loop[name]) for name in _COUNTS), work, "|"]
    if predicted is None:
        return cells + [""] * (len(_HEADER) - len(cells))
    share = "" if predicted["share"] is None else f"{predicted['share']:.0%}"
    if share and row["programs"] == 1:
        share += f" ({predicted['share_alone']:.0%})"
    floor = "" if predicted["floor"] is None else f"{predicted['floor']:.0f}"
    cycles = [f"{predicted['cycles'][pipe]:.0f}" for pipe in PIPES]
    return [*cells, *cycles, "|", predicted["bound"], floor, share, f"{predicted['l2_bytes']:.0f}"]


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Words to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADER))]
    words = {_HEADER.index(name) for name in ("kernel", "blocks", "matrix", "bound")}
    return [
        "  ".join(cell.ljust(width) if i in words else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]


def passes(rows: Iterable[Row]) -> list[Row]:
    """Forward and backward pass of each form: cycles of an SM for 4096 pairs of tokens, the floor, and its share.

    Only the loops over pairs of tokens count, which are all that matters where there are many tokens. The backward pass walks over all
    pairs twice, once for the queries' and once for the keys' gradient; its floor takes every product and every exponential once.
    """
    found = []
    for _, group in groupby(rows, key=_form):
        counted = [r for r in group if r["prediction"] and r["prediction"]["floor"]]
        loops = {re.sub("^(projected|token|wide)_", "", r["kernel"]): r for r in counted}
        for name, kernels in (("forward", ["attention_forward"]), ("backward", ["query_gradient", "key_value_gradient"])):
            if all(kernel in loops for kernel in kernels):
                found.append(_pass(name, [loops[kernel] for kernel in kernels]))
    return found


def _pass(name: str, loops: Sequence[Row]) -> Row:
    first = loops[0]
    c, d = first["channels"], first["qk_channels"]
    # Folded keys are as wide as the map. Backward: logits, and the gradients of weights, values, queries and keys.
    widths = [d if first["kernel"].startswith("projected") else c, c]
    if name == "backward":
        widths = [widths[0], c, c, widths[0], widths[0]]
    element_bytes = 4 if first["dtype"].startswith("fp32") else 2
    floor = floor_cycles(MACHINES[first["target"]], widths, 4096, element_bytes, first["dtype"] == "fp32-highest")
    pairs = [4096 / r["loop"]["elements"] for r in loops]
    pace = sum(max(r["prediction"]["cycles"].values()) * n for r, n in zip(loops, pairs, strict=True))
    serial = sum(
        (r["prediction"]["serial"] if r["programs"] == 1 else max(r["prediction"]["cycles"].values())) * n
        for r, n in zip(loops, pairs, strict=True)
    )
    bounds = ", ".join(r["prediction"]["bound"] for r in loops)
    form = {key: first[key] for key in ("target", "dtype", "channels", "qk_channels")}
    form["on_tokens"] = _on_tokens(first)
    return form | {"pass": name, "bound": bounds, "cycles": pace, "floor": floor, "share": floor / pace, "share_alone": floor / serial}


_PASS_HEADER = ["dtype", "C", "queries, keys", "pass", "cycles a 64×64 pairs", "floor", "bound", "share of the floor", "without overlap"]


def _pass_cells(p: Row) -> list[str]:
    alone = f"{p['share_alone']:.0%}" if p["share_alone"] < p["share"] else ""
    qk = "of heads" if p["on_tokens"] else "folded" if p["qk_channels"] == p["channels"] else str(p["qk_channels"])
    return [
        p["dtype"],
        str(p["channels"]),
        qk,
        p["pass"],
        f"{p['cycles']:.0f}",
        f"{p['floor']:.0f}",
        p["bound"],
        f"{p['share']:.0%}",
        alone,
    ]


def passes_table(rows: Iterable[Row]) -> str:
    lines = [_PASS_HEADER, *map(_pass_cells, passes(rows))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_PASS_HEADER))]
    note = "without overlap: in kernels of which one CTA fits on an SM, pipes add up."
    return "\n".join(["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines] + ["", note, ""])


def markdown(rows: Sequence[Row]) -> str:
    """Both tables for a report: whole passes, then kernels."""
    header = ["kernel", "blocks", "registers", "spills", "CTAs", "matrix instructions", "MUFU", "bound", "share of the floor"]
    kernels = []
    for r in rows:
        loop, predicted = r["loop"] or {}, r["prediction"] or {}
        share = "" if not predicted.get("share") else f"{predicted['share']:.0%}"
        cells = [r["kernel"], r["config"], r["registers"], r["spills"], r["programs"] or "", loop.get("matrices", ""), loop.get("mufu", "")]
        kernels.append([heading(r), *map(str, cells), predicted.get("bound", ""), share])
    text = markdown_table(["target, dtype, width", *header], kernels)
    whole = [_pass_cells(p) for p in passes(rows)]
    return f"{markdown_table(_PASS_HEADER, whole)}\n{text}" if whole else text
