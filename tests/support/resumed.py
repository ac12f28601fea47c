"""One process of `test_kill`: begin a run, or go on with it."""

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file


def main(folder: Path, steps: int) -> None:
    """Train to a step, and say what was found at the one it began with."""
    sys.path.append(str(Path(__file__).parent.parent.parent / "tools"))
    from kill_runs import build

    from mossrlhf import last_checkpoint
    from mossrlhf.checkpoint.save_load import trained_tensors
    from mossrlhf.optimization import pack_optimizer

    torch.set_num_threads(1)
    trainer = build(folder / "run", total_steps=steps)
    begin, found = trainer.run.begin_step, {}

    def noted() -> None:
        found.setdefault("step", trainer.run.state.global_step)
        found.setdefault("prompts", trainer.prompts.position)
        found.setdefault("moments", trainer.shaper.state_dict())
        found.setdefault(
            "trained", {n: p.clone() for n, p in trained_tensors(trainer.model).items()}
        )
        for role, optimizer in trainer.engine.optimizers.items():
            tensors, _ = pack_optimizer(optimizer)
            found.setdefault(role, {n: t.clone() for n, t in tensors.items()})
        begin()

    trainer.run.begin_step = noted
    last = last_checkpoint(folder / "run")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=last)
    result = {"step": found["step"], "warned": [str(w.message) for w in caught]}
    if last is not None:
        state = json.loads((folder / "before.json").read_text())
        expected = load_file(folder / "trained.safetensors")
        result["trained"] = all(torch.equal(w, found["trained"][n]) for n, w in expected.items())
        for role in ("policy", "critic"):
            kept = load_file(folder / f"optimizer_{role}.safetensors")
            result[role] = all(torch.equal(w, found[role][n]) for n, w in kept.items())
        result["prompts"] = state["prompts"] == {"position": found["prompts"]}
        result["moments"] = state["shaper"] == json.loads(json.dumps(found["moments"]))
    if trainer.accelerator.is_main_process:
        torch.save(result, folder / "result.pt")
    trainer.accelerator.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort an interpreter that takes its time to end


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
