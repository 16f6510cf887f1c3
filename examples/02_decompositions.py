"""An article's example made right: a 100x100 matrix W taken apart at rank 10, and then what LoRA does instead.

The article calls L = U S_k Vt and R = U (S - S_k) Vt factors and writes W = L R. A sentence each on what is wrong:
- L and R are as large as W and add up to it; their product is another matrix, and neither saves any computation.
- It keeps the smallest values in one place and the largest in another, which are opposite ideas (MiLoRA, PiSSA).
- LoRA factors neither W nor a piece of it: it leaves W alone and trains a new product B A beside it.
- Its update, dL/dZ, has the shape of an activation; the gradients of A and B are the two lines below.
- Its program stops at once, 100x100 times 10x10; past that its R is zero, and `R` and `delta_L` have no value yet.
- Equal outputs before and after, which it takes for success, would mean that nothing was learned.
"""

import numpy as np

from thimble.core.inits import LayerData, kaiming
from thimble.core.lowrank import Factors, delta, eigen, merge, pca, qr, randomised_svd, svd

random = np.random.default_rng(0)
W, RANK = random.random((100, 100)), 10
X = random.standard_normal((400, 100)) @ (random.standard_normal((100, 100)) * 0.9 ** np.arange(100)) + 1.0

print(f"{'rank 10 of':24} {'by':24} {'energy':>7} {'left over':>10}  used by")
pieces = {
    ("W", "SVD, largest"): (W, svd(W, RANK), "PiSSA"),
    ("W", "SVD, smallest"): (W, svd(W, RANK, "bottom"), "MiLoRA"),
    ("W", "randomised SVD"): (W, randomised_svd(W, RANK), "PiSSA, fast"),
    ("W", "QR, first columns"): (W, qr(W, RANK), "OLoRA"),
    ("XᵀX, which is symmetric", "eigendecomposition"): (X.T @ X, eigen(X.T @ X, RANK), "CorDA, EVA here"),
    ("inputs X", "PCA, not centred"): (X, pca(X, RANK, is_centred=False), "EVA here"),
    ("inputs X less their mean", "PCA, centred"): (X - X.mean(0), pca(X, RANK), "EVA as published"),
}
for (matrix, method), (whole, piece, user) in pieces.items():
    left_over = np.linalg.norm(whole - piece.product) / np.linalg.norm(whole)
    print(f"{matrix:24} {method:24} {piece.energy:7.1%} {left_over:10.1%}  {user}")

L = svd(W, RANK).product
R = svd(W, 100 - RANK, "bottom").product
print(f"\nL + R = W up to {np.abs(L + R - W).max():.0e}; L R differs from W by {np.abs(L @ R - W).max():.2f}")

print("\nLoRA: y = x Wᵀ + scale · x Aᵀ Bᵀ, learning an update of rank 2 that W lacks")
wanted = W + delta(Factors(random.standard_normal((2, 100)), random.standard_normal((100, 2)), 0.05))
start = kaiming(LayerData("layer", W.shape, RANK, 2.0))
A, B, scale, frozen = start.A.astype(float), start.B.astype(float), start.scale, W.copy()
for step in range(81):
    x = random.standard_normal((200, 100))
    y = x @ W.T + scale * (x @ A.T) @ B.T
    g = (y - x @ wanted.T) / len(x)  # gradient of the loss at y
    if step % 20 == 0:
        print(f"  step {step:2}  loss {0.5 * len(x) * (g**2).sum():9.5f}")
    gradient_a, gradient_b = scale * (g @ B).T @ x, scale * g.T @ (x @ A.T)
    A, B = A - 0.02 * gradient_a, B - 0.02 * gradient_b

changed = {"W": not np.array_equal(W, frozen), "A": not np.array_equal(A, start.A), "B": bool(B.any())}
print(f"changed: {changed}")
error = np.abs(merge(W, Factors(A, B, scale)) - wanted).max()
print(f"trained: {A.size + B.size:,} numbers beside the {W.size:,} of W")
print(f"merged: W + scale · B A is the wanted weight up to {error:.0e}, with the computation of W alone")
