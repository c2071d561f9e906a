"""Every bound that the tests use, with its reason. None may be widened to make a test pass."""

ULP = {
    # Double-doubles keep 2^-97: what is seen is the final rounding, and a second one where results are subnormal.
    "ref": 1.01,
    # The contract of the kernel. exp is within 0.55 ulp; L is about its square (2 x 0.55 ulp, worth up to 2.2 where the
    # mantissas fall badly) and is rounded once, a gradient entry twice. Largest seen: 3.3 over 1e8 float32 rows.
    "kernel": 4,
}

# Two implementations in float64, both within a few ulp of each term: relative to the largest term of a sum.
FLOAT64 = 1e-13

# The composite form in torch: log-sum-exp and subtraction round the log odds u to some ulp of the largest logit (here
# below 100), and L's relative error is that of u times at most 2.
COMPOSITE = {"float64": 1e-12, "float32": 1e-4}

# float32 kernel against float64 reference where class terms of both signs are added (smoothing, probabilities).
FLOAT32 = 2e-6

# Second-order finite differences of the float64 gradient with step 1e-5: h^2 truncation, 1e-16 / h rounding.
DIFFERENCES = 1e-8
