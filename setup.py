from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_py import build_py


class BuildPython(build_py):
    """The package's folder is the checkout, where this file lies, too."""

    def find_package_modules(self, package, package_dir):
        return [found for found in super().find_package_modules(package, package_dir) if found[1] != "setup"]


setup(
    cmdclass={"build_py": BuildPython},
    ext_modules=[
        Extension(
            "lace_loss.ext._cpu",
            sources=["ext/_cpu.pyx", *sorted(glob("ext/lace_[fb]*.c") + glob("ext/builds/*.c"))],
            depends=sorted(glob("ext/*.h") + glob("ext/builds/*.h")),
            include_dirs=["ext"],
            # GCC vectorises the exponentials with -fno-trapping-math only; -ffp-contract=off keeps the bits the same.
            extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"],
        )
    ],
)
