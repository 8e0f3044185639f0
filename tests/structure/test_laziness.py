"""Importing llmc, and starting its command line, loads neither torch nor transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run_python(code, cwd):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def heavy_modules_after(statement, cwd):
    code = f"import sys\n{statement}\nprint(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    result = run_python(code, cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.pure
@pytest.mark.parametrize(
    "statement",
    [
        "import llmc; assert llmc.__version__",
        "import llmc.cli.main",
        "import llmc; llmc.SamplingParams, llmc.LLM, llmc.load",
        "import llmc.kernels, llmc.artifact, llmc.spec, llmc.runtime",
    ],
)
def test_no_torch_is_imported(statement, tmp_path):
    assert heavy_modules_after(statement, tmp_path) == "[]"


@pytest.mark.pure
def test_help_of_every_command_needs_no_torch(tmp_path):
    code = (
        "import sys; import llmc.cli.main as m; from click.testing import CliRunner\n"
        "for name in [[], *([c] for c in m.main.commands)]:\n"
        "    result = CliRunner().invoke(m.main, [*name, '--help'])\n"
        "    assert result.exit_code == 0, (name, result.output)"
    )
    assert heavy_modules_after(code, tmp_path) == "[]"


def test_public_names_resolve_and_are_listed(tmp_path):
    code = (
        "import llmc\n"
        "assert set(llmc.__all__) <= set(dir(llmc))\n"
        "for name in llmc.__all__: assert getattr(llmc, name) is not None"
    )
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.pure
def test_an_unknown_name_is_an_attribute_error(tmp_path):
    result = run_python("import llmc; llmc.nonsense", tmp_path)
    assert "AttributeError: module 'llmc' has no attribute 'nonsense'" in result.stderr


def test_transformers_imports_when_started_at_the_root(repository):
    """The root's `kernels` folder is then on sys.path; transformers looks for a package of that name."""
    code = (
        "import transformers\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "assert not is_kernels_available()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "sizes = dict.fromkeys(['vocab_size', 'hidden_size', 'intermediate_size'], 8)\n"
        "LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=1))"
    )
    result = run_python(code, repository)
    assert result.returncode == 0, result.stderr
