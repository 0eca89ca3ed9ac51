"""A compiler for the tests of building and loading."""

import shutil

import pytest

from manifold_hc.kernels.cpu.compiler import find_compiler

SCRIPT = """#!/bin/sh
echo "$@" >> {calls}
case " $* " in *" -c "*) ;; *) exec {real} "$@" ;; esac
for out; do :; done
kept={kept}/${{out##*/}}
if [ ! -f "$kept" ]; then
    {real} -O0 "$@" -O0 && cp "$out" "$kept.$$" && mv "$kept.$$" "$kept" || exit
fi
cp "$kept" "$out"
"""


@pytest.fixture(scope="session")
def objects(tmp_path_factory):
    """Folder where the compiler below keeps its objects: it compiles a source once a session."""
    return tmp_path_factory.mktemp("objects")


@pytest.fixture
def compiler(tmp_path, objects):
    """A C++ compiler that records every file it compiles, for this processor at -O0."""
    real = shutil.which(find_compiler()[0])
    script = tmp_path / "counting-compiler"
    script.write_text(SCRIPT.format(calls=tmp_path / "calls", kept=objects, real=real))
    script.chmod(0o755)
    return script
