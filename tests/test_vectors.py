"""The golden vectors: reproducible, explained, and exact by witnesses other than their generator."""

import hashlib
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import make_vectors
import mpmath
import numpy as np
import pytest
from mpmath import mpf

from lace_loss import ref

VECTORS = Path(__file__).parent.parent / "ref" / "vectors"
FILES = sorted(VECTORS.glob("*.txt"))
SUMS = VECTORS / "SHA256SUMS"
NUMPY = {"f64": (np.float64, np.uint64), "f32": (np.float32, np.uint32), "f16": (np.float16, np.uint16)}


def cases(path):
    """Cases of a file as {key: words}."""
    for block in path.read_text("ascii").split("\ncase ")[1:]:
        name, *lines = block.split("\n")
        yield {"name": name} | {line.split(" ")[0]: line.split(" ")[1:] for line in lines}


def f64(words):
    return np.array([0x7FF8 << 48 if word == "nan" else int(word, 16) for word in words], np.uint64).view(float)


def test_200_digits_give_the_same_bytes(tmp_path):
    make_vectors.write(tmp_path, 200)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in [*FILES, SUMS]}
    for path in [*FILES, SUMS]:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_sums_are_those_of_the_files_in_the_format_of_sha256sum():
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in FILES]
    assert SUMS.read_text() == "".join(lines)
    tool = shutil.which("sha256sum") or pytest.skip("no sha256sum")
    done = subprocess.run([tool, "--check", "--strict", SUMS.name], cwd=VECTORS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(f"{path.name}: OK\n" for path in FILES)


def test_headers_count_their_cases_and_the_whole_stays_small():
    total = 0
    for path in FILES:
        text = path.read_text("ascii")
        dtype, level = path.stem.split("-")
        found = list(cases(path))
        assert text.startswith(f"lace-vectors 1\ndtype {dtype}\nlevel {level}\ncount {len(found)}\n")
        numbers, names = zip(*(case["name"].split(" ") for case in found), strict=True)
        assert numbers == tuple(map(str, range(1, len(found) + 1)))
        assert len(set(zip(names, (case["category"][0] for case in found), strict=True))) == len(found)
        total += len(found)
    assert total >= 400
    assert sum(path.stat().st_size for path in FILES) < 2_500_000


def test_the_readme_explains_every_category_and_no_other():
    table = (VECTORS / "README.md").read_text().split("## Categories")[1]
    explained = re.findall(r"^\| `([a-z0-9-]+)` \| .+ \|$", table, re.MULTILINE)
    assert Counter(explained) == Counter({case["category"][0] for path in FILES for case in cases(path)})


def test_the_reference_agrees_within_the_tolerances():
    for case in cases(VECTORS / "f64-gradient.txt"):
        logits, target = f64(case["logits"]), int(case["target"][0])
        for key, got in (("loss", ref.forward(logits, target)), ("gradient", ref.backward(logits, target))):
            wanted, allowed = f64(case[key]), f64(case[f"{key}-tolerance"])
            with np.errstate(invalid="ignore"):
                near = np.abs(got - wanted) <= allowed
            assert np.all(near | (got == wanted) | (np.isnan(got) & np.isnan(wanted))), case["name"]


def test_the_hostile_cases_are_hostile():
    for dtype, (p, width) in make_vectors.FORMATS.items():
        losses = {}
        for case in cases(VECTORS / f"{dtype}-core.txt"):
            losses.setdefault(case["category"][0], []).append(case["loss"][0])
        size = {key: [int(word, 16) for word in words if word != "nan"] for key, words in losses.items()}
        assert 0 in size["underflow"]
        assert any(0 < pattern < 1 << (p - 1) for pattern in size["underflow"])
        assert (2**width - 1) << (p - 1) in size["huge"]
        assert min(size["q-to-1"]) >= 1 << (p - 1)


@pytest.mark.parametrize("dtype", make_vectors.FORMATS)
def test_rounding_is_to_the_nearest_pattern_and_ties_are_even(dtype):
    rng = np.random.default_rng(0)
    p, width = make_vectors.FORMATS[dtype]
    largest = ((2**width - 1) << (p - 1)) - 1
    near = [0, 1, 2, (1 << (p - 1)) - 1, 1 << (p - 1), largest - 1]
    with mpmath.workdps(400):
        for pattern in near + [int(largest * x) for x in rng.random(200)]:
            low, high = (make_vectors.decode(b, dtype) for b in (pattern, pattern + 1))
            for part in (mpf(0), mpf(2) ** -300, mpf("0.49"), mpf("0.5"), 0.5 + mpf(2) ** -300, mpf(1)):
                wanted = pattern + (part > 0.5 or (part == 0.5 and pattern % 2))
                assert make_vectors.encode(low + part * (high - low), dtype) == wanted
        assert make_vectors.encode(make_vectors.decode(largest, dtype) * 2, dtype) == largest + 1


@pytest.mark.parametrize("dtype", NUMPY)
def test_patterns_are_those_of_numpy(dtype):
    rng = np.random.default_rng(1)
    kind, bits = NUMPY[dtype]
    lowest = make_vectors.lowest(dtype)
    values = rng.normal(size=500) * 2 ** rng.uniform(max(lowest - 2, -1074), -lowest / 2, 500)
    for x in (*values, np.inf, -np.inf):
        assert make_vectors.encode(mpf(float(x)), dtype) == int(kind(x).view(bits))


@pytest.mark.parametrize("strength", [0, 0.5, 1])
@pytest.mark.parametrize("logits", [[0.5, -0.25, 1.0], [20.0, 0.0, -1.0], [-30.0, 2.0, 2.0], [0.1, 0.1, 0.1]])
def test_products_are_the_change_of_the_gradient(logits, strength):
    """Central differences with step 1e-30, at 120 digits."""
    v, a, h = [mpf("0.7"), mpf(-2), mpf("0.3")], {0: mpf("0.75"), 2: mpf("0.25")}, mpf(10) ** -30
    with mpmath.workdps(120):

        def gradient(step):
            z = [mpf(x) + step * y for x, y in zip(logits, v, strict=True)]
            return [value for value, _ in make_vectors.sample(z, a, mpf(strength), range(3))[1]]

        product = make_vectors.sample([mpf(x) for x in logits], a, mpf(strength), range(3), v)[2]
        for (value, terms), up, down in zip(product, gradient(h), gradient(-h), strict=True):
            assert abs(value - (up - down) / (2 * h)) < terms * mpf(10) ** -50
