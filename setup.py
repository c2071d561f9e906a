from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "lace_loss.ext._cpu",
            sources=["ext/_cpu.pyx", "ext/lace.c", "ext/lace_builds.c"],
            depends=["ext/lace.h", "ext/lace_math.h", "ext/lace_rows.h", "ext/lace_builds.h"],
            include_dirs=["ext"],
            # GCC does not vectorise the exponentials without the second; the third keeps the bits the same everywhere.
            extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"],
        )
    ]
)
