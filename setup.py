"""Builds the native CPU kernels at install time, if a C++ compiler is there; pyproject.toml has the rest."""

import importlib.util
import logging
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

KERNELS = Path(__file__).parent / "server" / "kernels" / "cpu"


class BuildWithKernels(build_py):
    """The kernels are a plain shared library behind a C interface: no torch, no Python headers needed to build them."""

    def run(self) -> None:
        super().run()
        spec = importlib.util.spec_from_file_location("kernel_build", KERNELS / "build.py")
        build = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(build)
            target = KERNELS if self.editable_mode else Path(self.build_lib) / "server" / "kernels" / "cpu"
            build.build_all(target, for_this_machine=self.editable_mode)
        except Exception as error:
            # Not fatal: the server builds them at first start, or serves with torch and says so.
            logging.warning("native CPU kernels were not built: %s", error)


setup(cmdclass={"build_py": BuildWithKernels})
