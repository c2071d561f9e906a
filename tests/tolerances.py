"""Every bound that the tests use, with its reason. None may be widened to make a test pass."""

ULP = {
    # Double-doubles keep 2^-97: what is seen is the final rounding, and a second one where results are subnormal.
    "ref": 1.01,
    # The contract of the kernel. exp is within 0.55 ulp; L is about its square (2 x 0.55 ulp, worth up to 2.2 where the
    # mantissas fall badly) and is rounded once, a gradient entry twice. Largest seen: 3.2 over 8e6 float32 rows.
    "kernel": 4,
    # A weight multiplies the rounded loss: 4 ulp may be 8 of the product's, which is rounded again.
    "kernel, weighted": 8.5,
    # The contract of the kernels of a GPU. exp2 there is within 2 ulp, a block's sum adds a few, and L is about the
    # square of both. In the interpreter, whose exp2 is rounded once, the largest seen is 9.6, over 228 rows made for it
    # of 262,144 classes; and 13.5 where 262,143 of 1.1e-7 are added to 1, which NumPy does 16 at a time, GPUs in pairs.
    "gpu": 16,
}


# Beside those, in units of the smallest subnormal number, for results near it: an exponential is rounded to that unit,
# by half of it, and so are q, q K and the product with grad_output; K is at most 1 + e^-2 = 1.14.
UNDERFLOW = 0.57 * 2 + 1

# A gradient entry of ref with targets in several classes is a difference of sums: 2^-97 of them, a few operations long,
# is left where they cancel. Relative to the coefficients' sum.
CANCELLED = 2.0**-90

# The kernel's rows with targets in several classes, in units of half an ulp at worst, one a rounding. e^d 1.1 (0.55
# ulp), d 1, a = ((1-e) y + e/C) w 4, and 2 more wherever terms are added up in fours. Loss: a sum of a (1 - s q) n with
# q <= 1/2, so that of a n, at most twice as large, only what a n does not share with a q n counts double: a d 6, the
# sums of a and a d 4, of a e d 4.1, the loss 1. Gradient, relative to q sum of |a K| + |a K|: the sum of a K 11.6, with
# grad_output and 1/sum 13.6, q times it 16.7; K 8.2, a K 15.2; 3 where a is near the smallest normal number. That is at
# most 41 of the sum of |a|, as K <= 1 + e^-2.
ROUNDINGS = {"loss": 16, "gradient": 41}
ROUNDINGS_OF_TERMS = 20

# scipy's log_softmax, times 2^-53 (C + n): the arguments' roundings move each exponential by at most 1/e of a unit, exp
# is good to 2, a sum of C adds C - 1, log 2 log C, and z - max and the last subtraction 2 n: 1.4 C + 1 + 4 n in all.
LOG_SOFTMAX = 4

# Fourth-order differences of ref's gradient with step h = 2^-12 along |v| <= 1, per unit of the coefficients' sum.
# Rounding 1.5 x 1.01 x 2^-52 (1 + e^-2) / h = 1.6e-12. Truncation h^4/30 |g^(5)|: by Cauchy |g^(5)| <= 5! max |g| on a
# circle of radius 1, where |sum e^z| is at least cos 1 of the sum of |e^z|, so that |g| <= 22: 3e-13.
HVP = 2e-12

# Two implementations in float64, both within a few ulp of each term: relative to the largest term of a sum.
FLOAT64 = 1e-13

# The composite form in torch: log-sum-exp and subtraction round the log odds u to some ulp of the largest logit (here
# below 100), and L's relative error is that of u times at most 2.
COMPOSITE = {"float64": 1e-12, "float32": 1e-4}

# float32 kernel against float64 reference where class terms of both signs are added (smoothing, probabilities).
FLOAT32 = 2e-6

# Second-order finite differences of the float64 gradient with step 1e-5: h^2 truncation, 1e-16 / h rounding.
DIFFERENCES = 1e-8

# ref's posterior with label smoothing e is a difference where y_k is near e / C: 2^-97 of it, a few operations long, is
# left. Divided by 1 - e.
POSTERIOR_CANCELLED = 2.0**-90

# scipy's softmax relative to the exact one, times 2^-53 (C + n): as LOG_SOFTMAX, whose error is this one's logarithm.
SOFTMAX = LOG_SOFTMAX

# Probabilities at a minimum of scipy's BFGS: it stops where the gradient is below 1e-9, or where the loss, which
# is flat there, no longer changes in float64: about sqrt(2^-52) away.
MINIMUM = 2e-6

# Constants of ref/THEORY.md, given with so many digits: half a unit of the last one.
ROUNDED_4, ROUNDED_6 = 0.5e-4, 0.5e-6
