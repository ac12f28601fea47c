"""What is tried of kernels in a process of its own, where no shape checker is; prints JSON.

python compiled_kernels.py graph BACKENDS  # token_stats under torch.compile
python compiled_kernels.py cuda            # triton's kernels for CUDA, compiled without a GPU
"""

import json
import re
import sys
from typing import Any

import torch


def graph(*backends: str) -> dict[str, Any]:
    """Run compiled and plain, over several lengths; the graph is the same for all backends."""
    from mossrlhf.kernels import token_stats, use_backend

    compiled = torch.compile(token_stats, fullgraph=True, backend="aot_eager", dynamic=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    equal = []
    for backend in backends:
        for count in (3, 5, 8):
            logits, ref = torch.randn(2, count, 70, device=device)
            found = []
            for function in (compiled, token_stats):
                leaf = logits.clone().requires_grad_()
                with use_backend(backend):
                    stats = function(leaf, torch.arange(count, device=device), 0.7, ref_logits=ref)
                    numbers = torch.stack([stats.logprob, stats.logsumexp, stats.entropy, stats.kl])
                    (numbers * torch.arange(1.0, 5, device=device)[:, None]).sum().backward()
                found.append((numbers, leaf.grad))
            equal += [torch.equal(a, b) for a, b in zip(*found, strict=True)]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {"equal": equal, "graphs": graphs}


def cuda() -> dict[str, Any]:
    """Compile both kernels to machine code, and ask under which keys they would be kept."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile, make_backend
    from triton.runtime.jit import create_function_from_signature

    from mossrlhf.kernels import triton_rows

    target = GPUTarget("cuda", 90, 32)
    found: dict[str, Any] = {}
    for kernel in (triton_rows._stats_kernel, triton_rows._gradient_kernel):
        constants = dict(ENTROPY=True, REF=True, SOFTCAP=True, BLOCK=triton_rows.BLOCK)
        constants = {name: x for name, x in constants.items() if name in kernel.arg_names}
        types = dict.fromkeys(kernel.arg_names, "*fp32") | dict(
            logits="*bf16", ref="*bf16", out="*bf16", ids="*i64", softcap="fp32"
        )
        types |= {name: "i32" for name in kernel.arg_names if name in "NV" or "stride" in name}
        types |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(
            kernel, {name: types[name] for name in kernel.arg_names}, constexprs=constants
        )
        built = compile(source, target=target, options={"num_warps": triton_rows.WARPS})
        bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(target))
        values = {name: torch.zeros(16) for name in kernel.arg_names}
        values |= {name: 0.5 for name in ("softcap",) if name in kernel.arg_names}
        values |= {name: 32001 for name in kernel.arg_names if types[name] == "i32"} | constants
        keys = {str(bind(**{**values, "N": N})[1]) for N in (1, 2, 15, 16, 17, 64, 4096, 4097)}
        # Products of a row's number, or of a block of places, with a stride.
        products = re.findall(r"arith.muli .*(?:%row|tensor).*", built.asm["ttir"])
        found[kernel.__name__] = {
            "stages": list(built.asm),
            "keys": len(keys),
            "wide": ["i64" in product for product in products],
        }
    return found


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    print(json.dumps({"graph": graph, "cuda": cuda}[name](*arguments)))
