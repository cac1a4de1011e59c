"""Which room imports what, and which names are public. Each checked in a fresh process."""

from __future__ import annotations

import json
import types

import pytest

import nbmerge
from tests.support.processes import python

HEAVY = (
    "numpy",
    "torch",
    "transformers",
    "matplotlib",
    "IPython",
    "ipywidgets",
    "huggingface_hub",
    "safetensors",
    "peft",
    "tqdm",
    "pandas",
)
SHOWING = ("nbmerge.display", "nbmerge.magics", "IPython", "ipywidgets", "matplotlib")
ENGINE_ROOMS = (
    "nbmerge.geometry", "nbmerge.dtypes", "nbmerge.expressions", "nbmerge.layout", "nbmerge.errors", "nbmerge.options",
    "nbmerge.equalities", "nbmerge.overrides",
    "nbmerge.plan", "nbmerge.planning", "nbmerge.receipt", "nbmerge.report", "nbmerge.side_files",
    "nbmerge.loaders", "nbmerge.loaders.fsdp", "nbmerge.naming", "nbmerge.naming.published", "nbmerge.naming.meta",
    "nbmerge.naming.recorder", "nbmerge.engine", "nbmerge.engine.copy", "nbmerge.engine.execute", "nbmerge.engine.read",
    "nbmerge.engine.publish", "nbmerge.engine.safetensors_file", "nbmerge.engine.comparison", "nbmerge.validator",
    "nbmerge.verification", "nbmerge.merging", "nbmerge.opening", "nbmerge.weights", "nbmerge.tracing",
    "nbmerge.engine.scan", "nbmerge.validation.checks", "nbmerge.validation.value_checks", "nbmerge.validation.report",
    "nbmerge.comparing.differ", "nbmerge.comparing.running", "nbmerge.comparing.sources",
    "nbmerge.explaining.table", "nbmerge.explaining.diagnosis", "nbmerge.explainer",
)  # fmt: skip


def imported_by(statement: str) -> set[str]:
    """The modules that are loaded after a statement in a fresh interpreter."""
    done = python(f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))")
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def below(modules: set[str], roots: tuple[str, ...]) -> list[str]:
    return sorted(name for name in modules if any(name == root or name.startswith(root + ".") for root in roots))


@pytest.mark.parametrize("statement", ["from nbmerge import *", "import nbmerge.cli", "import nbmerge.magics.line"])
def test_importing_costs_no_torch_transformers_or_matplotlib(statement: str):
    assert below(imported_by(statement), HEAVY) == []


def test_importing_the_package_loads_what_it_needs_at_first_use():
    loaded = imported_by("import nbmerge")
    assert below(loaded, ("nbmerge",)) == ["nbmerge", "nbmerge.errors"]
    assert "nbmerge.opening" in imported_by("import nbmerge; nbmerge.open_checkpoint")


def test_the_engine_rooms_import_nothing_that_shows():
    """One process: what one of them imported would be there for all."""
    loaded = imported_by("import " + ", ".join(ENGINE_ROOMS))
    assert set(ENGINE_ROOMS) <= loaded
    assert below(loaded, SHOWING) == []


def test_opening_a_checkpoint_of_dtensors_needs_no_torch(tmp_path):
    from tests.support.models import memory_state
    from tests.support.worlds import write_mesh_world

    write_mesh_world(tmp_path, memory_state("llama"), (2,))
    loaded = imported_by(
        f"import nbmerge; ckpt = nbmerge.open_checkpoint({str(tmp_path)!r}, progress=False); assert len(ckpt) == 21"
    )
    assert below(loaded, ("torch", "transformers", "IPython", "matplotlib")) == []


def test_the_public_names_are_sorted_and_complete():
    assert nbmerge.__all__ == sorted(nbmerge.__all__)
    public = {
        name
        for name, value in ((name, getattr(nbmerge, name)) for name in dir(nbmerge))
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and name not in ("annotations", "TYPE_CHECKING")
    }
    assert public == set(nbmerge.__all__)


def test_every_public_name_has_a_docstring():
    assert [name for name in nbmerge.__all__ if not getattr(nbmerge, name).__doc__] == []


def test_every_error_is_one_of_ours_and_one_of_pythons():
    from nbmerge import errors

    tree = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    for error in tree:
        assert issubclass(error, nbmerge.NbmergeError)
        assert error.__name__ in nbmerge.__all__
        assert error.__name__ in (errors.__doc__ or "")
        if error is not nbmerge.NbmergeError:
            own = {nbmerge.NbmergeError, Exception, BaseException, object}
            assert any(base.__module__ != "nbmerge.errors" for base in set(error.__mro__) - own), error
