"""Which backends a test runs on, and what is skipped where, each with its reason."""

import contextlib
import os

import pytest
import torch

from visattn import device

from . import oracle
from .wrong_attentions import BACKWARD_FAULTS, FORWARD_FAULTS, GENERAL_FAULTS

INTERPRETING = device.triton_is_interpreting()
HAS_GPU = torch.cuda.is_available() and not INTERPRETING

# With more threads the gradient of a convolution's bias is up to seven times as wrong as a sum of the same numbers, and what
# is judged against eager PyTorch depends on the machine.
torch.set_num_threads(1)

if INTERPRETING:
    from . import interpreting
    from .tensor_cores import tensor_cores

    interpreting.make_quicker()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if item.get_closest_marker("kernels") and not (HAS_GPU or INTERPRETING):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, or TRITON_INTERPRET=1 to run in Triton's interpreter"))


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Ends a worker of pytest-xdist whose device is dead, once its failure is told: what it ran next would fail too, another does not."""
    if report.failed and HAS_GPU and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


def pytest_report_header() -> str:
    where = "on the GPU" if HAS_GPU else "in the interpreter" if INTERPRETING else "not run"
    return f"visattn: Triton kernels {where}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    forward, backward = len(FORWARD_FAULTS), len(BACKWARD_FAULTS)
    terminalreporter.write_line(f"known-wrong attentions that test_oracle.py must reject: {forward} forward, {backward} backward")
    terminalreporter.write_line(f"known-wrong blocks that test_general_layer.py must reject: {len(GENERAL_FAULTS)}")


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.kernels)])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def place(backend: str) -> torch.device:
    """Where the backend under test is run."""
    return torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")


@pytest.fixture(autouse=True)
def _bfloat16_as_on_tensor_cores(request: pytest.FixtureRequest):
    """Of which the interpreter by itself computes dots wrongly. Only tests of the kernels that are given the dtype ask for them."""
    given = getattr(request.node, "callspec", None)
    wanted = INTERPRETING and given and given.params.get("dtype") == torch.bfloat16 and request.node.get_closest_marker("kernels")
    with tensor_cores("hopper") if wanted else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with oracle.poisoned_memory():
        yield
