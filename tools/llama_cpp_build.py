"""llama.cpp, built from a source distribution, for the tools that compare with it.

The source is that in the distribution of llama-cpp-python on PyPI, whose bindings are used as well.
It is built by gcc and a CMake from PyPI in a folder of its own, in ten minutes on two cores, and
later found there.
"""

from __future__ import annotations

import os
import subprocess
import venv
from dataclasses import dataclass
from pathlib import Path

VERSION = "0.3.36"  # of llama-cpp-python
AMX = ("AMX_TILE", "AMX_INT8", "AMX_BF16")  # with AMX its quantised models crashed
BINDINGS = ("numpy", "diskcache", "jinja2", "typing-extensions")
TARGETS = ("llama", "llama-bench")


@dataclass(frozen=True)
class LlamaCpp:
    """A build in a folder: the program `bench`, and a Python in which llama_cpp can be imported."""

    folder: Path

    @property
    def bench(self) -> Path:
        """The program llama-bench."""
        return self.libraries / "llama-bench"

    @property
    def libraries(self) -> Path:
        """Where the programs and the libraries are."""
        return self.folder / "cmake" / "bin"

    @property
    def distribution(self) -> Path:
        """The unpacked source distribution."""
        return self.folder / f"llama_cpp_python-{VERSION}"

    @property
    def scripts(self) -> Path:
        """Where the Python of the build and what is installed in it are."""
        return self.folder / "venv" / "bin"

    def python(self, *arguments: str | Path) -> str:
        """What a script prints that imports llama_cpp."""
        paths = {"PYTHONPATH": self.distribution, "LLAMA_CPP_LIB_PATH": self.libraries}
        command = [str(part) for part in (self.scripts / "python", *arguments)]
        env = os.environ | {name: str(path) for name, path in paths.items()}
        return subprocess.check_output(command, text=True, env=env)


def build_llama_cpp(folder: Path) -> LlamaCpp:
    """llama.cpp in a folder, built there unless it is there."""
    made = LlamaCpp(folder.resolve())
    if made.bench.exists() and (made.libraries / "libllama.so").exists():
        return made
    if not made.scripts.exists():
        venv.create(made.scripts.parent, with_pip=True)
    pip = (made.scripts / "pip", "--quiet")
    run(*pip, "install", "cmake", "scikit-build-core", *BINDINGS)
    flags = ("--no-deps", "--no-build-isolation", "--no-binary", "llama-cpp-python")
    run(*pip, "download", *flags, "--dest", made.folder, f"llama-cpp-python=={VERSION}")
    run("tar", "-xf", f"{made.distribution}.tar.gz", "-C", made.folder)
    cmake, tree = made.scripts / "cmake", made.libraries.parent
    off = ("CURL", "OPENSSL", "BUILD_TESTS", "BUILD_SERVER", "BUILD_EXAMPLES")
    run(
        cmake, "-S", made.distribution / "vendor" / "llama.cpp", "-B", tree,
        "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DGGML_NATIVE=ON",
        *(f"-DLLAMA_{name}=OFF" for name in off), *(f"-DGGML_{name}=OFF" for name in AMX),
    )  # fmt: skip
    run(cmake, "--build", tree, "--target", *TARGETS, "--parallel", str(os.cpu_count()))
    return made


def run(*command: str | Path) -> None:
    """Run a command without its output; what it says of errors is shown."""
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
