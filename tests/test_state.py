"""The layers in the hands of PyTorch's own machinery: the short form of `tests/reliability/state.py`, and what only a GPU can show.

Copies, pickles and function transforms are tested with each layer; exports and compiled steps in test_compile.py.
"""

import pytest
import torch

from visattn import use_backend

from .conftest import HAS_GPU, INTERPRETING
from .reliability import cold, sanitized, state
from .reliability.cold import LAYERS, make, make_map, same, step

every_layer = pytest.mark.parametrize("name", LAYERS)
PLACE = torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def _as_users_have_it():
    """Without the mode of the other tests, which changes what PyTorch's own operators run."""
    torch.use_deterministic_algorithms(False)


@every_layer
def test_repeats_are_bitwise_equal(name):
    assert state.different_repeats(make(name, PLACE), make_map(device=PLACE), times=20) == 0


@pytest.mark.kernels
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "ChannelAttention"])
def test_repeats_on_the_kernels_are_bitwise_equal(name):
    size = (1, 8, 6, 5) if INTERPRETING else (8, 8, 33, 31)
    with use_backend("triton"):
        assert state.different_repeats(make(name, PLACE), make_map(*size, device=PLACE), times=2 if INTERPRETING else 50) == 0


@pytest.mark.parametrize("use_reentrant", [True, False])
@every_layer
def test_activation_checkpointing(name, use_reentrant):
    assert state.checkpointed_is_the_same(name, use_reentrant)


@pytest.mark.parametrize("dtype", state.RMS_FLOOR, ids=str)
@every_layer
def test_autocast_is_as_exact_as_the_layer_in_that_dtype(name, dtype):
    for tensor, (ours, narrow) in state.errors_under_autocast(name, dtype).items():
        assert ours <= max(2 * narrow, state.RMS_FLOOR[dtype]), tensor


@pytest.mark.parametrize("dtype", state.RMS_FLOOR, ids=str)
@every_layer
def test_dtypes_under_autocast(name, dtype):
    with torch.autocast(PLACE.type, dtype=dtype):
        results = step(make(name, PLACE), make_map(device=PLACE))
    assert {t.dtype for t in results} == {torch.float32}


@every_layer
def test_gradient_scaler(name):
    assert state.scaler_is_right(name)


@every_layer
def test_inference_mode(name):
    module, x = make(name, PLACE), make_map(device=PLACE)
    with torch.no_grad():
        expected = module(x)
    with torch.inference_mode():
        out = module(x)
        assert same([module(x.clone())], [out])  # a map that was made there
    assert same([out], [expected])


def test_one_graph_for_many_sizes():
    """The text that explained a form once held the map's size, and every new size was compiled anew."""
    sizes = [(2, 8, 5, 6), (3, 8, 7, 4), (4, 8, 6, 9)]
    one, three = (state.graphs_for_many_sizes("SelfAttention2d that folds", some, dynamic=True) for some in (sizes[:1], sizes))
    assert one == three


@pytest.mark.skipif(INTERPRETING, reason="Triton's interpreter does not take threads")
def test_threads_processes_and_forks_from_cold():
    """8 threads and 2 ranks that run the layers first of all, and a child of a process that has run them."""
    assert cold.run("ranks", "threads", "fork") == {"ranks": [], "threads": 0, "fork": True}


@pytest.mark.full
@pytest.mark.skipif(INTERPRETING, reason="the interpreter replaces the compiler")
def test_processes_compile_into_one_cold_cache():
    """pytorch#92664: ranks that compile the same kernel at once must not read each other's half-written files."""
    assert cold.run("compiling") == {"compiling": state.ONE_BINARY}


def test_what_the_sanitizer_watches_runs():
    assert sanitized.work() == len(sanitized.LAYERS) * (3 if HAS_GPU else 1)


@pytest.mark.gpu
class TestOnTheDevice:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("name", [name for name in LAYERS if name != "ChannelAttention"])
    def test_a_thousand_repeats(self, name, dtype):
        """So many programs at once that a race would show; odd sides, so that every loop has a rest."""
        torch.use_deterministic_algorithms(True)  # for the projections by cuDNN; the kernels have but one way
        module, x = make(name, "cuda", dtype), make_map(64, 8, 31, 33, device="cuda", dtype=dtype)
        with use_backend("triton"):
            assert state.different_repeats(module, x, state.REPEATS) == 0

    def test_threads_on_a_cold_cache(self, tmp_path):
        """triton#11494."""
        assert cold.run("threads on a GPU", TRITON_CACHE_DIR=str(tmp_path)) == {"threads on a GPU": 0}

    def test_processes_on_a_cold_cache(self, tmp_path):
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: cold.run("threads on a GPU", TRITON_CACHE_DIR=str(tmp_path)), range(8)))
        assert found == [{"threads on a GPU": 0}] * 8

    def test_capture_of_what_has_run_before(self):
        assert set(cold.run("warm capture")["warm capture"].values()) == {"right"}

    def test_capture_of_a_first_call_is_right_or_refused(self, tmp_path):
        """CUDA may refuse to load a module while it captures; what must not be is a graph that computes something else."""
        assert "wrong" not in cold.run("cold capture", TRITON_CACHE_DIR=str(tmp_path))["cold capture"].values()

    @every_layer
    def test_training_step_as_a_graph(self, name):
        module, x = make(name, "cuda"), make_map(device="cuda")
        expected = step(module, make_map(device="cuda", seed=2))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(module, x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step(module, x)
        x.copy_(make_map(device="cuda", seed=2))
        graph.replay()
        for got, want in zip(results, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)

    @every_layer
    def test_streams_side_by_side(self, name):
        """Each of four streams has late input of its own; nothing waits for the others, or for the default stream."""
        module, maps = make(name, "cuda"), [make_map(device="cuda", seed=seed) for seed in range(4)]
        expected = [step(module, x) for x in maps]
        torch.cuda.synchronize()
        found = []
        streams = [torch.cuda.Stream() for _ in maps]
        for stream, x in zip(streams, maps, strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(50_000_000)
                found.append(step(module, x * 2 / 2))
        for stream in streams:
            stream.synchronize()
        for got, want in zip(found, expected, strict=True):
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
