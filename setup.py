from glob import glob

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "lace_loss.ext._cpu",
            sources=["ext/_cpu.pyx", *sorted(glob("ext/lace_[fb]*.c") + glob("ext/builds/*.c"))],
            depends=sorted(glob("ext/*.h") + glob("ext/builds/*.h")),
            include_dirs=["ext"],
            # GCC vectorises the exponentials with -fno-trapping-math only; -ffp-contract=off keeps the bits the same.
            extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"],
        )
    ]
)
