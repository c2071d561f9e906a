"""The paper's experiment: ResNet-18 trained on CIFAR-100 with cross entropy and with LACE, several seeds each.

J. W. Shim, "Linearly adaptive cross entropy", Scientific Reports 2024 (arXiv:2507.10574) reports 6.7 % top-5 test
error with cross entropy and 6.2 % with LACE. `python -m lace_loss.train --help` says how to repeat it. Errors are in
percent throughout: 6.7 means 6.7 %.
"""
