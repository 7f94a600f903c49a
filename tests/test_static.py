"""`python -m bench static`: the disassembly is read, counted and priced as by hand, and the default configurations hold."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from .conftest import INTERPRETING

if INTERPRETING:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from bench import static
from bench.ahead_of_time import DEVICES, compile_launch
from bench.disassembly import Instruction, Loop, Matrix, inner_loops, loops, main_loop, matrix, parse, work
from bench.passes import layer_launches
from bench.static_tables import markdown, passes, passes_table, rows_table
from bench.throughput import MACHINES, Residency, floor_cycles, machine, pipe_cycles, predict, residency
from bench.tile import Tile, tile_of, work_of_tile

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results" / "static"


def sass(*instructions: str) -> str:
    """As cuobjdump prints it, 16 bytes an instruction, each with the two words of its encoding."""
    lines = ["\t\tFunction : some_kernel", '\t.headerflags\t@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"']
    for index, text in enumerate(instructions):
        lines.append(f"        /*{16 * index:04x}*/    {text} ;    /* 0x00000a00ff017b82 */")
        lines.append(" " * 70 + "/* 0x000fe20000000800 */")
    return "\n".join([*lines, "\t\t.........."])


# A loop that projects, the loop over tiles of keys, the masked remainder, and the trap behind the end.
FORWARD = sass(
    "LDC R1, c[0x0][0x28]",
    "HGMMA.64x32x16.F32.BF16 R56, gdesc[UR20].tnspA, R56",  # 0x10
    "HGMMA.64x32x16.F32.BF16 R56, gdesc[UR24].tnspA, R56",
    "HGMMA.64x256x16.F32.BF16 R56, gdesc[UR28].tnspA, R56, gsb0",
    "@P0 BRA 0x10",
    "LDGSTS.E.BYPASS.128 [R9], [R2.64]",  # 0x50
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "WARPGROUP.ARRIVE",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR16].tnspA, RZ, !UPT, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "FMNMX R3, R4, R5, !PT",
    "SHFL.BFLY PT, R6, R3, 0x1, 0x1f",
    "@!P1 FADD R4, R4, -R3",
    "MUFU.EX2 R4, R4",
    "MUFU.EX2 R5, R5",
    "F2FP.BF16.F32.PACK_AB R88, R5, R4",
    "F2F.BF16.F32 R7, R4",
    "FFMA R8, R8, R7, R4",
    "IMAD.MOV.U32 R9, RZ, RZ, R8",
    "UIADD3 UR4, UR4, 0x1, URZ",
    "LDS.64 R10, [R11+UR4]",
    "STS [R11], R4",
    "HGMMA.64x64x16.F32.BF16 R56, R88, gdesc[UR16], R56, gsb0",
    "@!P4 BRA 0x50",
    "MUFU.EX2 R4, R4",
    "HGMMA.64x64x16.F32.BF16 R56, R88, gdesc[UR16], R56, gsb0",
    "EXIT",
    "BRA 0x1b0",
)

# Loop over tiles of keys at 0x10, inside of it a loop over channels from 0x20 to 0x60.
NESTED = sass(
    "S2R R14, SR_TID.X",
    "IADD3 R2, R2, 0x10, RZ",
    "LDG.E.128 R4, [R2.64]",  # 0x20
    "LDSM.16.M88.4 R8, [R3]",
    "HMMA.16816.F32.BF16 R16, R8, R12, R16",
    "HMMA.16816.F32.BF16 R20, R8, R12, R20",
    "@P1 BRA 0x20",
    "MUFU.EX2 R4, R4",
    "HMMA.16816.F32.BF16 R24, R16, R12, R24",
    "@!P0 BRA 0x10",
    "EXIT",
)


def test_loops_and_the_main_one():
    instructions = parse(FORWARD)
    assert loops(instructions) == [Loop(0x10, 0x40), Loop(0x50, 0x170)]
    assert main_loop(instructions) == Loop(0x50, 0x170), "the projection has more matrix work, but no exponential"
    assert main_loop([i for i in instructions if i.name != "MUFU"]) == Loop(0x10, 0x40)
    assert main_loop(parse(sass("EXIT", "BRA 0x10"))) is None


def test_code_behind_the_exit_closes_no_loop():
    body = ("NOP", "HMMA.16816.F32 R0, R4, R8, R0", "@!P0 BRA 0x50", "@P1 EXIT", "EXIT")
    assert loops(parse(sass(*body, "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2", "BRA 0x10"))) == []
    assert loops(parse(sass(*body[:-1], "NOP", "BRA 0x10"))) == [Loop(0x10, 0x50)]


def test_counts_of_the_main_loop():
    instructions = parse(FORWARD)
    found = work(instructions, main_loop(instructions))
    assert found.instructions == 19
    assert found.categories == {
        "tensor": 2, "mufu": 2, "conversion": 1, "fp32": 2, "imad": 1, "alu": 2, "shared": 3, "shuffle": 1, "barrier": 1, "wait": 2,
        "uniform": 1, "branch": 1,
    }  # fmt: skip
    assert found.matrices == {Matrix(64, 64, 16, 2, 4, True): 1, Matrix(64, 64, 16, 2, 4, False): 1}
    assert found.multiply_adds(num_warps=8) == 2 * 2 * 64 * 64 * 16
    assert found.shared_bytes == 512 + 128 + 256 + 128  # LDGSTS.128, SHFL, LDS.64, STS
    assert found.global_bytes == 512


def test_cycles_of_the_main_loop():
    instructions = parse(FORWARD)
    found = work(instructions, main_loop(instructions))
    cycles = pipe_cycles(MACHINES["sm_90"], found, num_warps=4)
    operands = (64 + 64) * 16 * 2 + 64 * 16 * 2  # A and B of one product, B of the other
    assert cycles == {
        "tensor": 2 * 64 * 64 * 16 / 2048,
        "mufu": 128 * 3 / 16,
        "fp32": 128 * 3 / 128,
        "alu": 128 * 2 / 64,
        "shared": (4 * 1024 + operands) / 128,
        "issue": 4 * 19 / 4,
    }
    tile = Tile(64, 64, (16, 16), (16, 16), (), 16, 1, 2, 1)
    predicted = predict(MACHINES["sm_90"], found, 4, tile)
    assert (predicted.bound, predicted.pace) == ("shared", 80)
    assert predicted.serial == 64 + 24 + 3 + 4 + 4 * 1024 / 128
    assert predicted.floor == 64 * 64 / 16


def test_loops_inside_count_as_often_as_they_run():
    instructions = parse(NESTED)
    loop = main_loop(instructions)
    assert loop == Loop(0x10, 0x90)
    (inner,) = inner_loops(instructions, loop)
    assert inner == Loop(0x20, 0x60)
    assert work(instructions, loop).categories["tensor"] == 3
    assert work(instructions, loop, {inner: 4}).categories["tensor"] == 9
    assert work(instructions, loop, {inner: 4}).shared_bytes == 4 * 512
    # One turn loads 512 bytes: 16 channels of a row and of a column of 8 tokens, so 64 channels take 4 turns, or 2 where a step is 8.
    assert work_of_tile(instructions, loop, Tile(8, 8, (64, 64), (64, 64), (64,), 16, 1, 2, 1), num_warps=1).instructions == 4 + 5 * 4
    assert work_of_tile(instructions, loop, Tile(8, 8, (64, 64), (64, 64), (64,), 8, 1, 2, 1), num_warps=1).instructions == 4 + 5 * 4
    # Of two streamed dots the narrower was unrolled.
    assert work_of_tile(instructions, loop, Tile(8, 8, (32, 64), (32, 64), (32, 64), 16, 1, 2, 1), num_warps=1).instructions == 4 + 5 * 4
    with pytest.raises(ValueError, match="at most 0 loops"):
        work_of_tile(instructions, loop, Tile(8, 8, (16, 16), (16, 16), (), 16, 1, 2, 1), num_warps=1)


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("HGMMA.64x128x16.F32", "R24, R4, gdesc[UR4].tnspB, R24", Matrix(64, 128, 16, 2, 4, False)),
        ("HGMMA.64x64x8.F32.TF32", "R24, gdesc[UR4], RZ, !UPT", Matrix(64, 64, 8, 4, 4, True)),
        ("HMMA.16816.F32.BF16", "R24, R4, R8, R24", Matrix(16, 8, 16, 2, 1, False)),
        ("HMMA.1688.F32.TF32", "R24, R4, R8, R24", Matrix(16, 8, 8, 4, 1, False)),
        ("HMMA.1684.F32.TF32", "R24, R4, R8, R24", Matrix(16, 8, 4, 4, 1, False)),
    ],
)
def test_shapes_of_matrix_instructions(opcode, operands, expected):
    assert matrix(Instruction(0, opcode, operands)) == expected


@pytest.mark.parametrize(
    ("opcode", "shared_bytes", "global_bytes"),
    [
        ("LDSM.16.M88.4", 512, 0), ("LDSM.16.MT88.2", 256, 0), ("STSM.16.M88", 128, 0), ("LDS", 128, 0), ("LDS.128", 512, 0),
        ("STS.U16", 128, 0), ("LDS.U.64", 256, 0), ("LDG.E", 0, 128), ("LDG.E.U16", 0, 64), ("LDG.E.128.CONSTANT", 0, 512),
        ("STG.E.64", 0, 256), ("LDGSTS.E.BYPASS.128", 512, 512), ("SHFL.BFLY", 128, 0), ("FADD", 0, 0),
    ],
)  # fmt: skip
def test_bytes(opcode, shared_bytes, global_bytes):
    instruction = Instruction(0, opcode, "R4, [R2]")
    assert (instruction.shared_bytes, instruction.global_bytes) == (shared_bytes, global_bytes)


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="without an instruction"):
        parse("nothing of the kind")
    with pytest.raises(ValueError, match="one function"):
        parse(NESTED + NESTED)
    with pytest.raises(ValueError, match="HMMA\\.8816"):
        matrix(Instruction(0, "HMMA.8816.F32", "R0, R1, R2, R3"))
    with pytest.raises(NotImplementedError, match="not for gfx942: only resources"):
        machine("gfx942")


@pytest.mark.parametrize(
    ("registers", "shared_kib", "num_warps", "programs", "limit"),
    [
        (90, 12, 4, 5, "registers"), (120, 33, 4, 4, "registers"), (120, 33, 8, 2, "registers"), (167, 41, 4, 3, "registers"),
        (231, 98, 4, 2, "registers"), (172, 49, 4, 2, "registers"), (202, 90, 8, 1, "registers"), (251, 82, 4, 2, "registers"),
        (128, 64, 4, 3, "shared memory"), (24, 4, 8, 8, "threads"), (24, 0, 1, 32, "threads"),
    ],
)  # fmt: skip
def test_residency(registers, shared_kib, num_warps, programs, limit):
    assert residency(MACHINES["sm_90"], registers, shared_kib * 1024, num_warps) == Residency(programs, limit)


@pytest.mark.parametrize(
    ("channels", "element_bytes", "microseconds"), [(32, 2, 17), (64, 2, 17), (128, 2, 35), (256, 2, 69), (64, 4, 35), (128, 4, 69)]
)
def test_floor_is_that_of_the_datasheet(channels, element_bytes, microseconds):
    """64 maps of 1024 tokens on 132 SMs at 1.83 GHz, FLOPs and exponentials over the datasheet's rates: by arithmetic, not by code."""
    cycles = floor_cycles(MACHINES["sm_90"], (channels, channels), 64 * 1024**2, element_bytes, False)
    assert cycles / 132 / 1830 == pytest.approx(microseconds, abs=0.6)


def test_floor_of_full_precision_is_three_products_of_tf32_or_six_of_bf16():
    assert floor_cycles(MACHINES["sm_90"], (64, 64), 4096, 4, True) == pytest.approx(
        3 * floor_cycles(MACHINES["sm_90"], (64, 64), 4096, 4, False)
    )


def compiled(target: str, index: int):
    """One of the kernels of the layer of 64 channels in bf16, what it became, and its main loop's work."""
    device = DEVICES[target]
    launch = layer_launches(device, torch.bfloat16, 64)[index]
    result = compile_launch(launch, device)
    instructions = parse(result.assembly)
    num_warps = launch.options["num_warps"]
    return launch, result, work_of_tile(instructions, main_loop(instructions), tile_of(launch), num_warps)


def test_row_sums_in_bf16_leave_the_exponentials_their_pipe():
    """Converting the rounded weights back took as many cycles of it as the exponentials."""
    launch, result, found = compiled("sm_90", 2)
    assert result.name == "query_gradient_kernel"
    lanes = launch.options["num_warps"] * 32
    assert found.categories["conversion"] == 0
    assert found.categories["mufu"] * lanes == tile_of(launch).elements


@pytest.mark.parametrize(("target", "index", "dots"), [("sm_90", 0, 2), ("sm_90", 3, 4), ("sm_80", 0, 2)])
def test_compiled_loops_do_the_arithmetic_of_their_tile(target, index, dots):
    launch, result, found = compiled(target, index)
    rows, columns, num_warps = launch.arguments["BLOCK_M"], launch.arguments["BLOCK_N"], launch.options["num_warps"]
    assert 2 * found.multiply_adds(num_warps) == dots * 2 * rows * columns * 64
    exponentials = rows * columns // (32 * num_warps)
    assert exponentials <= found.opcodes["MUFU.EX2"] <= exponentials + 2 * (index == 0)  # the forward pass rescales two rows a thread
    assert found.categories["other"] <= found.instructions // 20
    r = static.row(launch, result, DEVICES[target])
    assert r["loop"]["products"] == 1
    assert r["spills"] == 0
    assert r["programs"] >= 2
    if target == "sm_90" and index == 0:
        assert found.matrices == {Matrix(64, 64, 16, 2, 4, False): 8}


def fake_rows(spills: int) -> list[dict]:
    loop = dict.fromkeys((*static._COUNTED, "instructions", "asynchronous_copies", "global_bytes"), 4)
    loop |= {"matrices": "8 64x64x16 RS", "products": 1.0, "elements": 4096}
    cycles = {"tensor": 256.0, "mufu": 272.0, "fp32": 100.0, "alu": 100.0, "shared": 252.0, "issue": 320.0}
    prediction = {"cycles": cycles, "bound": "issue", "serial": 800.0, "floor": 256.0, "share": 0.8, "share_alone": 0.32, "l2_bytes": 26.0}
    r = {"target": "sm_90", "dtype": "bf16", "channels": 64, "qk_channels": 64, "kernel": "attention_forward", "config": "M64 N64 4w 2s"}
    r |= {"registers": 139, "spills": spills, "shared_memory": 16384, "matrix_instructions": 38, "programs": 1, "limit": "registers"}
    prepare = r | {"kernel": "prepare_backward", "loop": None, "prediction": None}
    return [r | {"loop": loop, "prediction": prediction}, prepare]


@pytest.mark.parametrize("spills", [0, 8])
def test_command(monkeypatch, capsys, tmp_path, spills):
    monkeypatch.setattr(static, "rows_of", lambda target, dtype, channels, qk: fake_rows(spills))
    parser = argparse.ArgumentParser()
    static.configure(parser)
    path = tmp_path / "new" / "rows.json"
    options = parser.parse_args(["--dtype", "bf16", "--channels", "64", "--qk", "full", "--jobs", "1", "--json", str(path)])
    assert static.run(options) == (1 if spills else 0)
    out, err = capsys.readouterr()
    assert "8 64x64x16 RS" in out
    assert "80% (32%)" in out
    assert ("attention_forward spills 8 bytes on sm_90: bf16, 64 channels, queries and keys of 64" in err) == bool(spills)
    assert json.loads(path.read_text())["rows"] == fake_rows(spills)


def test_forms_are_those_that_the_layer_takes():
    assert list(static._forms([16, 32, 256], "both")) == [(16, 16), (32, 32), (32, 4), (256, 256), (256, 32)]
    assert list(static._forms([16, 64], "eighth")) == [(64, 8)]


def test_tables():
    rows = fake_rows(0)
    assert "no loop" in rows_table(rows)
    (forward,) = passes(rows)
    assert (forward["pass"], forward["share"], forward["share_alone"]) == ("forward", 0.8, 0.32)
    assert "80%" in passes_table(rows)
    assert "| sm_90 bf16 C = 64 | attention_forward | M64 N64 4w 2s | 139 | 0 | 1 | 8 64x64x16 RS |" in markdown(rows)


def test_backward_pays_for_seven_products_and_is_judged_by_five():
    first = fake_rows(0)[0]
    loops_of = [first | {"kernel": name} for name in ("query_gradient", "key_value_gradient")]
    (backward,) = passes(loops_of)
    assert backward["floor"] == 5 * 4096 * 64 / 2048
    assert backward["cycles"] == 2 * 320


def test_heads_have_tables_of_their_own():
    forward = fake_rows(0)[0]
    rows = [forward, *(forward | {"kernel": f"token_{name}"} for name in ("attention_forward", "query_gradient", "key_value_gradient"))]
    assert [(p["pass"], p["on_tokens"]) for p in passes(rows)] == [("forward", False), ("forward", True), ("backward", True)]
    assert "sm_90 bf16 heads of 64" in rows_table(rows)
    assert "of heads" in passes_table(rows)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_filed_rows(target):
    """What `python -m bench static` found of the default configurations; at 64 channels in bf16 an SM holds at least two CTAs."""
    rows = json.loads((RESULTS / f"{target}.json").read_text(encoding="utf-8"))["rows"]
    assert not [(r["dtype"], r["kernel"], r["channels"], r["qk_channels"]) for r in rows if r["spills"]]
    (forward,) = (r for r in rows if r["kernel"] == "attention_forward" and r["dtype"] == "bf16" and r["channels"] == 64)
    assert forward["programs"] >= 2
    for r in rows:
        if r["prediction"] and r["prediction"]["floor"]:
            assert r["loop"]["products"] >= 1, f"{r['dtype']} {r['channels']} {r['kernel']}: work of the loop was not found"
            assert r["prediction"]["share"] <= 1


def test_narrow_queries_have_a_row_for_each_kernel():
    """Projections once, though both passes launch them; the kernel of the weights' gradients has no products."""
    names = [r["kernel"] for r in static.rows_of("sm_90", "bf16", 32, 4)]
    assert names.count("qkv_projection") == 1
    assert names.count("token_moments") == 2
    assert names[-1] == "projection_gradients"


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("qk_channels", [8, 64])
@pytest.mark.parametrize("dtype", static.DTYPES)
@pytest.mark.parametrize("target", MACHINES)
def test_every_kernel_of_64_channels(target, dtype, qk_channels):
    rows = static.rows_of(target, dtype, 64, qk_channels)
    attention = [r for r in rows if r["loop"] and r["loop"]["products"] is not None]
    assert len(attention) == (5 if qk_channels == 8 else 4)  # narrow queries take two launches for the sums of three weights
    for r in attention:
        # Tiles in fp32 are narrower than what their warps cover, so that some warps repeat others' work. In 16 bits the rows' sums of the
        # query gradient are a product of 16 columns more: beside three of 64, or one of 64 and two of 16.
        sums = 16 / (96 if qk_channels == 8 else 192) if "query_gradient" in r["kernel"] else 0
        assert 1 <= r["loop"]["products"] <= (1.001 + sums if dtype in ("bf16", "fp16") else 4), r
