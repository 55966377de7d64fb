"""Builds packages; pyproject.toml has the rest.

A wheel has everything under one name, `boomerang_serve`, so that it collides with nobody's `server`. In the repository
the packages lie side by side; their imports are renamed as they are copied, but not for an editable install.
A wheel carries the native CPU kernels, if a C++ compiler is there, and then the tag of their platform.
"""

import importlib.util
import io
import logging
import sys
import tokenize
from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
NAME, TOPS = "boomerang_serve", ("server", "model_store", "deploy")
PACKAGES = find_namespace_packages(str(ROOT), include=[pattern for top in TOPS for pattern in (top, f"{top}.*")])
IS_EDITABLE = "editable_wheel" in sys.argv
PREFIX = "" if IS_EDITABLE else f"{NAME}."
MAIN = f"import sys\n\nfrom {NAME}.server.__main__ import main\n\nsys.exit(main())\n"


class Renamer:
    """Puts `boomerang_serve.` before the packages' names in imports, and in strings that name one of their modules."""

    def __init__(self, modules: set[str]) -> None:
        self.modules = modules

    def __call__(self, source: str) -> str:
        """ValueError for an import that has no counterpart: `import server.x` binds the name `server`."""
        tokens = [
            token
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT)
        ]
        lines, edits, start = source.splitlines(keepends=True), [], 0
        for i, token in enumerate(tokens):
            if token.type == tokenize.NEWLINE:
                start = i + 1
            elif token.type == tokenize.STRING and self._names_module(token.string, tokens[max(i - 2, 0) : i]):
                row, column = token.start
                edits.append(((row, column + 1), 0, f"{NAME}."))
            elif token.type == tokenize.NAME and token.string in TOPS and i > start:
                words = [t.string for t in tokens[start : i + 4]]
                if words[: i - start] == ["from"]:
                    edits.append((token.start, 0, f"{NAME}."))
                elif words[: i - start] == ["import"]:
                    statement = [t.string for t in tokens[start:] if t.start[0] == token.start[0]]
                    if statement[2:3] == ["\n"]:
                        edits.append((tokens[start].start, len("import"), f"from {NAME} import"))
                    elif "as" in statement and "," not in statement:
                        edits.append((token.start, 0, f"{NAME}."))
                    else:
                        raise ValueError(f"cannot be renamed: {''.join(statement)}")
        for (row, column), length, text in sorted(edits, reverse=True):
            line = lines[row - 1]
            lines[row - 1] = line[:column] + text + line[column + length :]
        return "".join(lines)

    def _names_module(self, literal: str, before: list[tokenize.TokenInfo]) -> bool:
        """Whether a string names a module: "server.cli", "deploy.ray.app:build", or "server" after "-m"."""
        text = literal[1:-1]
        is_run = [token.string for token in before] == ['"-m"', ","]
        return text.partition(":")[0] in self.modules and ("." in text or is_run)


class BuildWithKernels(build_py):
    """The kernels are a plain shared library behind a C interface: no torch, no Python headers needed to build them."""

    def run(self) -> None:
        super().run()
        if not IS_EDITABLE:
            self._rename(Path(self.build_lib) / NAME)
        kernels = ROOT / "server" / "kernels" / "cpu"
        spec = importlib.util.spec_from_file_location("kernel_build", kernels / "build.py")
        build = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(build)
            target = kernels if IS_EDITABLE else Path(self.build_lib) / NAME / "server" / "kernels" / "cpu"
            build.build_all(target, for_this_machine=IS_EDITABLE)
        except Exception as error:
            # Not fatal: the server builds them at first start, or serves with torch and says so.
            logging.warning("native CPU kernels were not built: %s", error)

    def _rename(self, folder: Path) -> None:
        files = sorted(folder.rglob("*.py"))
        names = [file.relative_to(folder).with_suffix("").parts for file in files]
        rename = Renamer({".".join(name).removesuffix(".__init__") for name in names} | set(TOPS))
        for file in files:
            file.write_text(rename(file.read_text(encoding="utf-8")), encoding="utf-8")
        (folder / "__init__.py").write_text(
            '"""Every size of a teacher-student pair from one copy of their tensors."""\n'
        )
        (folder / "__main__.py").write_text(MAIN)


class PlatformWheel(bdist_wheel):
    """py3-none-any without kernels; with them for any Python on this platform: they know nothing of Python."""

    def run(self) -> None:
        self.run_command("build_py")
        build_lib = Path(self.get_finalized_command("build_py").build_lib)
        self.root_is_pure = not any((build_lib / NAME).rglob("*.so"))
        if not self.root_is_pure:
            self.distribution.has_ext_modules = lambda: True  # or files would be installed as those of a pure package
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", "any" if self.root_is_pure else super().get_tag()[2])


setup(
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel},
    packages=[PREFIX + name for name in PACKAGES],
    package_dir={PREFIX + top: top for top in TOPS},
    entry_points={"console_scripts": [f"boomerang = {PREFIX}server.__main__:main"]},
)
