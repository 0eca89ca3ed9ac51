"""The connections written a second time, one token and one number at a time.

Nothing here is shared with the package: sums are spelled out, indices are the papers' own, and
`res` is built entry by entry. Everything is float64 and differentiable.
"""

import math

import torch
from torch import Tensor


def normalised(v: Tensor, eps: float) -> Tensor:
    return v / torch.sqrt((v * v).sum() / v.numel() + eps)


def dot(a: Tensor, b: Tensor) -> Tensor:
    return sum((a[k] * b[k] for k in range(len(a))), a.new_zeros(()))


def sinkhorn_paper(logits: Tensor, iterations: int) -> Tensor:
    """logits [o][i]; columns first, rows last."""
    n = len(logits)
    m = [[torch.exp(logits[o][i]) for i in range(n)] for o in range(n)]
    for _ in range(iterations):
        columns = [sum(m[o][i] for o in range(n)) for i in range(n)]
        m = [[m[o][i] / columns[i] for i in range(n)] for o in range(n)]
        rows = [sum(m[o][i] for i in range(n)) for o in range(n)]
        m = [[m[o][i] / rows[o] for i in range(n)] for o in range(n)]
    return torch.stack([torch.stack(row) for row in m])


def sinkhorn_v4(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """logits [source][target]; returns comb[source][target]."""
    n = len(logits)
    c = []
    for s in range(n):
        total = sum(torch.exp(logits[s][t]) for t in range(n))
        c.append([torch.exp(logits[s][t]) / total + eps for t in range(n)])
    for round_number in range(iterations):
        if round_number:
            c = [[c[s][t] / (sum(c[s]) + eps) for t in range(n)] for s in range(n)]
        columns = [sum(c[s][t] for s in range(n)) + eps for t in range(n)]
        c = [[c[s][t] / columns[t] for t in range(n)] for s in range(n)]
    return torch.stack([torch.stack(row) for row in c])


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


def mhc_coefficients(x, phi, alpha, bias, *, numerics, iterations, norm_eps, hc_eps):
    """One token: x [n, C] -> (pre, post, a function of (o, i) that is res)."""
    n = len(x)
    v = normalised(torch.cat([x[i] for i in range(n)]), norm_eps)
    raw = [dot(v, row) for row in phi]
    pre = [sigmoid(alpha[0] * raw[i] + bias[i]) + hc_eps for i in range(n)]
    post = [2 * sigmoid(alpha[1] * raw[n + o] + bias[n + o]) for o in range(n)]
    logits = torch.stack(
        [
            torch.stack(
                [alpha[2] * raw[2 * n + a * n + b] + bias[2 * n + a * n + b] for b in range(n)]
            )
            for a in range(n)
        ]
    )
    if numerics == "paper":
        matrix = sinkhorn_paper(logits, iterations)
        return pre, post, lambda o, i: matrix[o][i]
    comb = sinkhorn_v4(logits, iterations, hc_eps)
    return pre, post, lambda o, i: comb[i][o]


def mixed(x, y, post, res):
    n = len(x)
    return torch.stack([sum(res(o, i) * x[i] for i in range(n)) + post[o] * y for o in range(n)])


def mhc_sublayer(x, phi, alpha, bias, y, **numbers):
    """One token: x [n, C], y [C] -> (u [C], x' [n, C])."""
    pre, post, res = mhc_coefficients(x, phi, alpha, bias, **numbers)
    return sum(pre[i] * x[i] for i in range(len(x))), mixed(x, y, post, res)


def single_pass(h, n, parameters, branches, **numbers):
    """One token through all sublayers, each reading with the pre of the one before: h [C] -> [C].

    parameters: (phi, alpha, bias) of each.
    """
    x = torch.stack([h] * n)
    weights = [1.0] + [0.0] * (n - 1)
    for own, branch in zip(parameters, branches, strict=True):
        y = branch(sum(weights[i] * x[i] for i in range(n)))
        pre, post, res = mhc_coefficients(x, *own, **numbers)
        x, weights = mixed(x, y, post, res), pre
    return sum(weights[i] * x[i] for i in range(n))


def hc_sublayer(x, A_m, A_r, B, W_m, W_r, W_b, s_a, s_b, y, *, norm_eps):
    """HC in its own letters: h_out = A_r(x)^T x + B(x)^T y, one token."""
    n = len(x)
    rows = [normalised(x[i], norm_eps) for i in range(n)]
    m = [s_a * torch.tanh(dot(rows[i], W_m)) + A_m[i] for i in range(n)]
    r = [
        [s_a * torch.tanh(dot(rows[i], W_r[:, o])) + A_r[i, o] for o in range(n)] for i in range(n)
    ]
    b = [s_b * torch.tanh(dot(rows[i], W_b)) + B[i] for i in range(n)]
    u = sum(m[i] * x[i] for i in range(n))
    new = [sum(r[i][o] * x[i] for i in range(n)) + b[o] * y for o in range(n)]
    return u, torch.stack(new)


def v4_head(x, phi, alpha, bias, *, norm_eps, hc_eps):
    n = len(x)
    v = normalised(x.reshape(-1), norm_eps)
    return sum((sigmoid(alpha[0] * dot(v, phi[k]) + bias[k]) + hc_eps) * x[k] for k in range(n))


def spectral_norm(matrix: Tensor) -> float:
    return math.sqrt(float(torch.linalg.eigvalsh(matrix.T @ matrix).max()))
