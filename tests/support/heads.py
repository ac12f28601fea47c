"""Hidden states, heads and a loss to try them with, and all of the logits at once, in float64."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from scored import oracle

from mossrlhf.kernels import IGNORED_ID
from mossrlhf.types import LossOutput

N, V, D = 37, 83, 16

BIAS = torch.linspace(-1, 1, V, dtype=torch.float64)
FORMS = {
    "plain": {},
    "bias": dict(bias=BIAS),
    "scale": dict(scale=1.5),
    "softcap": dict(softcap=2.0),
    "all": dict(bias=BIAS, scale=1.3, softcap=2.0, temperature=0.6),
}


def drawn(device="cpu", dtype=torch.float32):
    hidden = torch.randn(N, D, device=device).to(dtype).requires_grad_()
    weight = torch.randn(V, D, device=device).to(dtype).requires_grad_()
    ids = torch.randint(V, (N,), device=device)
    ids[5] = IGNORED_ID
    return hidden, weight, ids


def cast(form, like):
    """The settings of a form, with a bias of the type and device of a tensor."""
    settings = dict(FORMS[form])
    if "bias" in settings:
        settings["bias"] = settings["bias"].to(like).detach().requires_grad_()
    return settings


def whole(hidden, weight, ids, *, bias=None, scale=1.0, softcap=None, temperature=1.0):
    """The statistics, from all logits, in float64."""
    z = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    z = z * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    stats = oracle(z, ids.clamp(min=0), temperature)
    keep = (ids >= 0).double()
    fields = ("logprob", "entropy", "logsumexp")
    return SimpleNamespace(**{name: getattr(stats, name) * keep for name in fields}, kl=None)


def ppo(stats, rows):
    """Clipped ratios, an entropy bonus and a penalty on log-sum-exp: all statistics take part."""
    like, noise = stats.logprob, torch.Generator().manual_seed(3)
    old, advantage = torch.randn(2, N, generator=noise, dtype=torch.float64).to(like)
    ratio = (0.3 * (stats.logprob + 4 + old[rows])).exp()
    gain = torch.minimum(ratio * advantage[rows], ratio.clamp(0.8, 1.2) * advantage[rows])
    rest = 0.01 * stats.entropy + 1e-3 * stats.logsumexp**2
    share = -(gain + rest).sum() / N
    return LossOutput(share, {"entropy": stats.entropy.sum().detach(), "calls": torch.tensor(1)})


def slopes(loss, *inputs):
    return torch.autograd.grad(loss, [x for x in inputs if x is not None])
