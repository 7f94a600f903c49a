"""What may import what, what an import costs, and what an installation may touch."""

import ast
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Each file of visattn may import these siblings; kernels only its own files.
ALLOWED = {
    "__init__": {"functional", "reference", "dispatch", "modules", "patching", "convert"},
    "normalization": set(),
    "reference": {"normalization"},
    "folding": set(),
    "layout": {"folding"},
    "device": {"kernels"},
    "validation": {"device", "normalization"},
    "dispatch": {"device", "kernels", "validation"},
    "torch_attention": set(),
    "torch_backend": {"torch_attention", "folding", "layout"},
    "query_normalized": {"torch_attention", "torch_backend", "folding", "layout"},
    "channel": {"torch_backend", "layout"},
    "wide_triton_backend": {"torch_backend", "kernels", "device", "folding", "layout", "normalization"},
    "triton_backend": {"wide_triton_backend", "kernels", "device", "folding", "layout", "normalization"},
    "second_order": {"folding"},
    "autograd": {"device", "torch_backend", "query_normalized", "triton_backend", "folding", "second_order", "validation"},
    "torch_token_attention": {"torch_attention", "torch_backend"},
    "triton_token_attention": {"kernels", "device"},
    "map_attention": {"autograd", "device", "folding", "normalization"},
    "triton_projected_tokens": {"kernels", "device", "layout", "normalization", "triton_backend"},
    "projected_tokens": {
        "autograd",
        "block",
        "kernels",
        "map_attention",
        "normalization",
        "ops",
        "token_attention",
        "triton_projected_tokens",
    },
    "folded_values": {"autograd", "block", "device", "kernels", "layout"},
    "projected_output": {"autograd", "block", "device", "kernels", "layout"},
    "token_attention": {
        "autograd",
        "device",
        "second_order",
        "torch_attention",
        "torch_token_attention",
        "triton_token_attention",
        "validation",
    },
    "block": {"layout"},
    "ops": {"autograd", "device", "token_attention", "torch_backend", "folding", "layout", "second_order"},
    "functional": {
        "autograd",
        "block",
        "channel",
        "device",
        "dispatch",
        "folded_values",
        "folding",
        "map_attention",
        "normalization",
        "ops",
        "projected_output",
        "projected_tokens",
        "query_normalized",
        "validation",
    },
    "modules": {"block", "dispatch", "functional", "normalization", "projections", "validation"},
    "projections": set(),
    "models": {"modules", "functional"},
    "patching": {"modules", "functional", "projections", "validation"},
    "convert": {"patching", "validation"},
    "files": set(),
    "provenance": set(),
    "data": {"files"},
    "recipes": {"data"},
    "processes": set(),
    "training": {"data", "processes"},
    "checkpoint": {"files"},
    "report": {"files"},
    "experiment": {
        "checkpoint",
        "data",
        "device",
        "dispatch",
        "files",
        "models",
        "modules",
        "processes",
        "provenance",
        "recipes",
        "report",
        "training",
    },
    "comparison": {"experiment", "files", "models", "processes", "recipes", "report"},
    "evaluation": {"data", "experiment", "models", "modules", "report", "training"},
    "demo": {"data", "files", "models", "modules", "recipes", "report", "training"},
    "cli": {"__version__", "comparison", "data", "demo", "device", "evaluation", "experiment", "processes"},
    "__main__": {"cli"},
}


def imported_siblings(path: Path, level: int = 1) -> set[str]:
    """The names that `from . import a` and `from .a import b` bring in, at any depth of the file; `from ..` at level 2."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == level:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "visattn").glob("*.py")), ids=lambda p: p.stem)
def test_imports_go_one_way(path):
    assert imported_siblings(path) <= ALLOWED[path.stem]


@pytest.mark.parametrize("path", sorted((ROOT / "visattn" / "models").glob("*.py")), ids=lambda p: p.stem)
def test_models_know_layers_only(path):
    assert imported_siblings(path, level=2) <= ALLOWED["models"]


@pytest.mark.parametrize("path", sorted((ROOT / "visattn" / "patching").glob("*.py")), ids=lambda p: p.stem)
def test_patching_knows_layers_and_torch_only(path):
    assert imported_siblings(path, level=2) <= ALLOWED["patching"]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "torch"}


def test_kernels_know_torch_and_triton_only():
    standard = set(sys.stdlib_module_names)
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in standard | {"torch", "triton"}, f"{path.name} imports {name}"


def test_only_device_py_asks_about_devices():
    for path in (ROOT / "visattn").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.stem not in ("device", "training"):
            for question in ("torch.cuda", "find_spec", "knobs", "get_device_properties"):
                assert question not in text, f"{path.name} asks {question}"


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, env=os.environ | environment, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_brings_neither_triton_nor_compiler_nor_training_libraries():
    heavy = "{'torch._dynamo', 'torchvision', 'matplotlib', 'sklearn', 'rich', 'visattn.kernels', 'visattn.models'}"
    assert run_python(f"import sys, visattn; print(sorted({heavy} & set(sys.modules)))").strip() == "[]"


def test_works_without_triton():
    code = """
import sys
class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'triton':
            raise ModuleNotFoundError("No module named 'triton'", name='triton')
sys.meta_path.insert(0, NoTriton())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == 'triton' else real(name, package)
import torch, visattn
layer, x = visattn.Attention(4), torch.randn(1, 4, 3, 3, requires_grad=True)
layer(x).sum().backward()
print(x.grad.shape, visattn.explain(layer, x))
"""
    out = run_python(code)
    assert "torch.Size([1, 4, 3, 3])" in out
    assert "the package triton is not installed" in out


def test_does_not_shadow_a_distribution_called_kernels(tmp_path):
    """The name `kernels` belongs to another distribution; both must work side by side, whichever is found first."""
    decoy = tmp_path / "kernels"
    decoy.mkdir()
    (decoy / "__init__.py").write_text("OWNER = 'somebody else'\n")
    code = "import visattn.kernels, kernels; print(kernels.OWNER, visattn.kernels.attention_forward.__name__)"
    assert run_python(code, PYTHONPATH=str(tmp_path)).split() == ["somebody", "else", "attention_forward"]


def test_installs_no_top_level_kernels(tmp_path):
    """A wheel of this project holds visattn, visattn.kernels inside of it, and nothing else."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)],
        check=True, capture_output=True,
    )  # fmt: skip
    import zipfile

    (wheel,) = tmp_path.glob("visattn-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"visattn"}
    assert "visattn/kernels/attention_forward.py" in names
    assert "visattn/py.typed" in names
    assert not (Path(sysconfig.get_paths()["purelib"]) / "kernels").exists()
