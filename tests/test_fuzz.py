"""The kernel under inputs that nobody thought of: no fault, no bit and no value out of bounds, and all of it is run.

Needs Debian's clang, libclang-rt-14-dev and llvm, and GCC on x86-64, whose 113-bit numbers are the witness. Where CI is
set it is an error that one is missing. A finding is printed with its input in base64.

fuzz/*.txt holds the known inputs, one a line in hex: what libFuzzer keeps (-merge=1) of 5 minutes of new ones; some
made by hand, because to libFuzzer a NaN before the largest logit is like one behind it; and some that found a planted
mistake.
"""

import functools
import json
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tolerances import ROUNDINGS, ROUNDINGS_OF_TERMS, ULP, UNDERFLOW

EXT = Path(__file__).parent.parent / "ext"
FUZZ = Path(__file__).parent / "fuzz"
TARGETS = ("rows", "row", "posterior", "binary", "sum")
SECONDS = 20  # a target, of which the known inputs take up to 7
STEP = int(
    os.environ.get("EXHAUSTIVE_STEP", "64")
)  # 1, as by `make exhaustive`, for every float: 6 minutes of CPU time

BOUNDS = {
    "ULP": ULP["kernel"],
    "ULP_WEIGHTED": ULP["kernel, weighted"],
    "UNDERFLOW": UNDERFLOW,
    "ROUNDINGS_LOSS": ROUNDINGS["loss"],
    "ROUNDINGS_GRADIENT": ROUNDINGS_OF_TERMS,
}
STRICT = ["-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
FAST = ["-O3", "-fno-math-errno", "-fno-trapping-math"]
CLANG = ["clang", "-g", "-O1", *STRICT]
ASAN = ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]
MSAN = ["-DALONE", "-fsanitize=fuzzer,memory"]
COVERAGE = ["-DALONE", "-fsanitize=fuzzer", "-fprofile-instr-generate", "-fcoverage-mapping"]


# libFuzzer takes the peak of the process that started it, pytest, for its own: it limits single allocations instead.
MEMORY = ["-rss_limit_mb=0", "-malloc_limit_mb=1024"]


def run(*command, **options):
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=1800, **options
    )
    return done.returncode, done.stdout


def made(*command, **options):
    status, said = run(*command, **options)
    assert status == 0, said
    return said


def missing(what):
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no {what} on this machine: the kernel is not fuzzed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the witness, GCC's builds of the kernel, and the corpus."""
    folder = tmp_path_factory.mktemp("fuzz")
    if platform.machine() != "x86_64":
        pytest.skip("GCC has no libquadmath for this processor")
    for name in ("gcc", "ld", "objcopy", "clang", "llvm-profdata", "llvm-cov"):
        if not shutil.which(name):
            missing(name)
    (folder / "nothing.c").write_text("int LLVMFuzzerTestOneInput(const char *p, long n) { return !p && n; }\n")
    for flags in (ASAN, MSAN, COVERAGE):
        if run("clang", *flags, "nothing.c", "-o", "nothing", cwd=folder)[0]:
            missing(f"runtime library of clang for {flags[-1]} (Debian: libclang-rt-14-dev)")

    bounds = [f"-D{name}={value}" for name, value in BOUNDS.items()]
    made("gcc", "-O2", *STRICT, *bounds, "-c", FUZZ / "exact.c", cwd=folder)
    sources = [EXT / "lace_f32.c", EXT / "lace_f64.c", EXT / "lace_builds.c", *(EXT / "builds").glob("*.c")]
    made("gcc", *FAST, *STRICT, "-c", *sources, cwd=folder)
    made("ld", "-r", *(f"{source.stem}.o" for source in sources), "-o", "builds.o", cwd=folder)
    made("objcopy", "--keep-global-symbol=lace_builds", "builds.o", cwd=folder)
    for target in TARGETS:
        corpus = folder / target
        corpus.mkdir()
        for i, line in enumerate((FUZZ / f"{target}.txt").read_text().splitlines()):
            (corpus / f"{i:04}").write_bytes(bytes.fromhex(line))
    return folder


@pytest.fixture(scope="module")
def program(folder):
    """Of a target and flags, from this kernel or a changed one: path of a program."""
    quadmath = made("gcc", "-print-file-name=libquadmath.a").strip()

    @functools.cache
    def built(target, *flags, kernel=EXT, name=""):
        path = folder / f"{target}-{name or flags[-1].strip('-')}"
        others = [] if "-DALONE" in flags else [folder / "builds.o"]
        sources = [kernel / name for name in ("lace_f32.c", "lace_f64.c", "lace_row.c", "lace_labels.c")]
        sources += [FUZZ / f"{target}.c", folder / "exact.o", *others]
        made(*CLANG, *flags, f"-I{kernel}", *sources, quadmath, "-lm", "-o", path)
        return path

    return built


def each(function, items):
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, items))


def replay(program, folder, target, seconds=0):
    """What is wrong, or "", and all that is said. The corpus, then new inputs for so long."""
    time = f"-max_total_time={seconds}" if seconds else "-runs=0"
    lengths = ["-max_len=200", "-len_control=0"]
    status, said = run(program, time, *MEMORY, *lengths, "-print_final_stats=1", folder / target, cwd=folder)
    found = re.search(r"WRONG: .*|ERROR: (?!libFuzzer).*|runtime error: .*|WARNING: MemorySanitizer: .*", said)
    assert (status == 0) == (found is None), said[-3000:]
    where = re.search(r"Base64: .*", said)
    return f"{found[0]}\n{where and where[0]}" if found else "", said


def test_known_and_new_inputs_break_nothing(program, folder):
    each(lambda target: program(target, *ASAN), TARGETS)

    def fuzzed(target):
        corpus = len(list((folder / target).iterdir()))
        (folder / f"{target} new").mkdir()
        wrong, said = replay(program(target, *ASAN), folder, target, SECONDS)
        rate = re.search(r"average_exec_per_sec:\s*(\d+)", said)
        print(f"{target}: {corpus} known inputs and new ones, {rate and rate[1]} a second")
        return wrong

    assert each(fuzzed, TARGETS) == [""] * len(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_known_inputs_use_no_memory_that_is_not_set(target, program, folder):
    assert replay(program(target, *MSAN), folder, target)[0] == ""


def test_known_inputs_run_every_line(program, folder):
    """The branches left: a class that is wrong after the check, which only another thread can make so."""

    def profile(target):
        raw = {**os.environ, "LLVM_PROFILE_FILE": f"{target}.raw"}
        made(program(target, *COVERAGE), "-runs=0", *MEMORY, folder / target, cwd=folder, env=raw)
        return f"{target}.raw"

    made("llvm-profdata", "merge", *each(profile, TARGETS), "-o", "all.profile", cwd=folder)
    first, *others = (program(target, *COVERAGE) for target in TARGETS)
    objects = [word for other in others for word in ("-object", other)]
    covered = [first, *objects, "-instr-profile=all.profile", "-summary-only", EXT]
    files = json.loads(made("llvm-cov", "export", *covered, cwd=folder))["data"][0]["files"]
    kernel = ["lace_rows.h", "lace_columns.h", "lace_posterior.h", "lace_binary.h", "lace_math.h"]
    for name in (*kernel, "lace_row.c", "lace_labels.c"):
        (summary,) = (file["summary"] for file in files if Path(file["filename"]).name == name)
        of = ", ".join(
            f"{summary[what]['covered']} of {summary[what]['count']} {what}" for what in ("lines", "branches")
        )
        print(f"{name}: {of}")
        assert min(summary[what]["percent"] for what in ("lines", "branches")) >= 99


def test_short_rows_are_within_the_contract_for_every_float(folder):
    sources = [FUZZ / "exhaustive.c", EXT / "lace_row.c", folder / "builds.o"]
    made("gcc", "-std=gnu11", *FAST, *STRICT, "-fopenmp", f"-I{EXT}", *sources, "-lm", "-o", "exhaustive", cwd=folder)
    said = made(folder / "exhaustive", str(STEP), env={**os.environ, "OMP_WAIT_POLICY": "passive"})
    print(said, end="")
    worst = [float(ulp) for ulp in re.findall(r"by ([\d.]+|inf)", said)]
    assert len(worst) == 14  # of rows, of one row, and of labels
    assert max(worst) <= ULP["kernel"]


# What is changed, in which file, and the target that sees it.
MISTAKES = {
    "the search for the largest logit stops at a NaN": (
        "lace_rows.h",
        "while (j < k - 1 && z[j] != max)",
        "while (j < k - 1 && z[j] < max)",
        "rows",
    ),
    "lines may overlap": ("lace_rows.h", "gradient_stride < length", "0", "rows"),
    "rows are taken to lie side by side": ("lace_rows.h", "(ptrdiff_t)i * job->logits_stride", "i * job->k", "rows"),
    "class k is allowed": ("lace_rows.h", "(uint64_t)t >= args->k))", "(uint64_t)t > args->k))", "rows"),
    "one value is written past a row": (
        "lace_rows.h",
        "for (size_t j = 0; j < k; j++) row[j] =",
        "for (size_t j = 0; j <= k; j++) row[j] =",
        "rows",
    ),
    "the rounding error of z - max is dropped": (
        "lace_rows.h",
        "d.low = smaller - (d.high - larger);",
        "d.low = 0 * larger * smaller;",
        "rows",
    ),
    "the product of pairs has no low part": (
        "lace_math.h",
        "p.low += a->high * b->low + a->low * b->high;",
        "p.low = 0;",
        "row",
    ),
    "an ignored row's gradient is not written": (
        "lace_rows.h",
        "for (size_t j = 0; row && j < k; j++) row[j] = zero;",
        "",
        "rows",
    ),
    "equal logits share a rank": ("lace_rows.h", "rank += !(z[j] <= z[t]);", "rank += !(z[j] < z[t]);", "rows"),
    "an infinite loss is NaN": ("lace_row.c", "if (n.high > FLT_MAX) {", "if (0) {", "row"),
    "a present label's weight is everybody's": (
        "lace_binary.h",
        "absent[l] *= w;",
        "absent[l] *= args->pos_weight ? w * (double)args->pos_weight[j] : w;",
        "binary",
    ),
    "rows of weights begin anew with every block": ("lace_binary.h", "(args->first + i) % args->k", "0", "binary"),
    "an infinite logit has a finite loss": ("lace_binary.h", "? loss * LARGEST * LARGEST", "? loss", "binary"),
    "a logarithm has the digits of a subnormal number": (
        "lace_binary.h",
        "#define KEPT EXP_SCALE",
        "#define KEPT 1.0",
        "binary",
    ),
    "the last block is searched for the largest logit, too": ("lace_rows.h", "j + 32 < k", "j + 32 <= k", "rows"),
    "the K of other classes is forgotten": ("lace_posterior.h", "multiply(weight, slope)", "weight", "posterior"),
    "weights any factor apart are allowed": (
        "lace_posterior.h",
        "if (largest > smallest * FARTHEST_WEIGHTS) return LACE_OPTION;",
        "",
        "posterior",
    ),
    "the last values are not added": ("lace_rows.h", "add_to_lanes(lanes, e + j, count - j);", "", "sum"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(mistake, program, folder, tmp_path):
    file, right, wrong, target = MISTAKES[mistake]
    for source in EXT.glob("lace*.[ch]"):
        text = source.read_text()
        assert source.name != file or right in text, "nothing to change: the kernel has changed"
        (tmp_path / source.name).write_text(text.replace(right, wrong) if source.name == file else text)
    flags = ["-DALONE", *ASAN, "-Wno-unused"]
    broken = program(target, *flags, kernel=tmp_path, name=mistake.replace(" ", "-").replace("'", ""))
    found, _ = replay(broken, folder, target)
    print(f"{mistake}: {found.splitlines()[0] if found else 'not found'}")
    assert found
