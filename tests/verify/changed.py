"""An implementation of DeepSeek-V4's connections that can be changed in one detail.

Written for the tests alone: it shares no code with the package.
"""

import torch


def results(x, y, phi, alpha, bias, **changes):
    """u and new of one sublayer; x [N, n, C], y [N, C]."""
    n = x.shape[1]
    logits = normalised(x, changes) @ phi.T
    gates = torch.cat([alpha[0].expand(n), alpha[1].expand(n), alpha[2].expand(n * n)])
    pre, post, comb = (logits * gates + bias).split([n, n, n * n], -1)
    pre = torch.sigmoid(pre) + changes.get("pre_eps", 1e-6)
    post = changes.get("factor", 2) * torch.sigmoid(post)
    comb = sinkhorn(comb.reshape(-1, n, n), changes)
    if changes.get("direct"):
        comb = comb.transpose(1, 2)
    mixed = torch.stack([(comb[:, :, o, None] * x).sum(1) for o in range(n)], 1)
    u = sum(pre[:, i, None] * x[:, i] for i in range(n))
    return {"u": u, "new": mixed + post[:, :, None] * y[:, None]}


def normalised(x, changes):
    v = x.reshape(len(x), -1)
    mean = (v * v).mean(1, keepdim=True)
    eps = changes.get("norm_eps", 1e-6)
    return v / (mean.sqrt() + eps) if changes.get("outside") else v / (mean + eps).sqrt()


def sinkhorn(logits, changes):
    eps = changes.get("eps", 1e-6)
    first, last = (1, 2) if changes.get("rows_last") else (2, 1)
    comb = torch.exp(logits - logits.amax(first, keepdim=True))
    comb = comb / comb.sum(first, keepdim=True) + changes.get("softmax_eps", 1e-6)
    for step in range(changes.get("iterations", 20)):
        if step:
            comb = comb / (comb.sum(first, keepdim=True) + eps)
        comb = comb / (comb.sum(last, keepdim=True) + eps)
    return comb


def head(x, phi, alpha, bias, **changes):
    if changes.get("exit") == "mean":
        return x.sum(1) / x.shape[1]
    weights = torch.sigmoid(normalised(x, changes) @ phi.T * alpha + bias)
    return ((weights + changes.get("pre_eps", 1e-6))[..., None] * x).sum(1)


def recording(stack, tokens=6, dtype=torch.float64, compute=torch.float64, **changes):
    """Tensors of a recording of every sublayer and the exit, with the stack's parameters."""
    generator = torch.Generator().manual_seed(7)
    n, C = stack.config.n, stack.connections[0].channels
    tensors = {}

    def draw(*shape):
        scale = torch.logspace(-2, 1, tokens).view(-1, *[1] * (len(shape) - 1))
        values = torch.randn(*shape, generator=generator) * scale
        return values.to(dtype)

    def parameters(module):
        return (p.detach().to(compute) for p in (module.phi, module.alpha, module.bias))

    for index, connection in enumerate(stack.connections):
        x, y = draw(tokens, n, C), draw(tokens, C)
        own = parameters(connection.maps)
        found = results(x.to(compute), y.to(compute), *own, **changes)
        for name, value in {"x": x, "y": y, **found}.items():
            tensors[f"sublayers.{index}.{name}"] = value.to(dtype).contiguous()
    x = tensors["exit.x"] = draw(tokens, n, C)
    tensors["exit.h"] = head(x.to(compute), *parameters(stack.exit), **changes).to(dtype)
    return tensors
