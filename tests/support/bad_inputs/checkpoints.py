"""Checkpoints that are none, are damaged, or are of something else."""

import json
import shutil

from bad_inputs.room import Room
from mossrlhf import RewardShaper
from mossrlhf.checkpoint.folders import STATE

room = Room("Checkpoints")
row = room.row


def saved(shop):
    """A trainer's folder with a checkpoint of its first step."""
    trainer = shop.trainer()
    trainer.train()
    return trainer.output_dir / "checkpoint-1"


def resume(shop, path, **parts):
    args = dict(total_steps=2, output_dir=str(shop.fresh))
    return shop.trainer(args=args, **parts).train(resume_from_checkpoint=path)


def changed(shop, **changes):
    """A checkpoint whose state says something else."""
    path = saved(shop)
    state = json.loads((path / STATE).read_text())
    state.update(changes)
    kept = {name: value for name, value in state.items() if value is not ...}
    (path / STATE).write_text(json.dumps(kept))
    return path


row(
    "`True`, where there is none",
    "FileNotFoundError: resume_from_checkpoint=True: there is no finished checkpoint in …; train "
    "from the start, or name a folder. last_checkpoint(output_dir) is None there",
    lambda shop: resume(shop, True),
)
row(
    "a folder that is not there",
    "FileNotFoundError: resume_from_checkpoint: …gone' is no finished checkpoint of "
    "mossrlhf.Trainer (it has no mossrlhf_state.json); there are [] beside it",
    lambda shop: resume(shop, shop.folder / "gone"),
)
row(
    "a number",
    "TypeError: resume_from_checkpoint: got 3, expected the folder of a checkpoint, or True for "
    "the newest",
    lambda shop: resume(shop, 3),
)


@row(
    "a checkpoint without its state, where there is an earlier one",
    "FileNotFoundError: resume_from_checkpoint: …checkpoint-2' is no finished checkpoint …there "
    "are "
    "['checkpoint-1'] beside it",
)
def unfinished(shop):
    path = saved(shop)
    later = path.with_name("checkpoint-2")
    shutil.copytree(path, later)
    (later / STATE).unlink()
    return resume(shop, later)


@row(
    "a state cut off",
    "ValueError: resume_from_checkpoint: …checkpoint-2': mossrlhf_state.json is damaged (…). The "
    "one before it is whole: resume_from_checkpoint='…checkpoint-1'",
)
def cut_off(shop):
    path = saved(shop)
    text = (path / STATE).read_text()
    shutil.copytree(path, path.with_name("checkpoint-2"))
    (path.with_name("checkpoint-2") / STATE).write_text(text[: len(text) // 2])
    return resume(shop, path.with_name("checkpoint-2"))


row(
    "a state that is a list",
    "ValueError: resume_from_checkpoint: …mossrlhf_state.json is not of mossrlhf.Trainer",
    lambda shop: resume(shop, shop.file(f"checkpoint-1/{STATE}", "[]").parent),
)
row(
    "a checkpoint of transformers' own trainer",
    "FileNotFoundError: resume_from_checkpoint: …is no finished checkpoint of mossrlhf.Trainer (it "
    "is one of transformers' Trainer); there are [] beside it",
    lambda shop: resume(shop, shop.file("checkpoint-1/trainer_state.json", "{}").parent),
)
row(
    "a state of something else",
    "ValueError: resume_from_checkpoint: …mossrlhf_state.json is not of mossrlhf.Trainer",
    lambda shop: resume(shop, shop.file(f"checkpoint-1/{STATE}", '{"global_step": 1}').parent),
)
row(
    "a checkpoint of a later version",
    "ValueError: resume_from_checkpoint: …written by mossrlhf 99.0.0 in format 99, and this is …, "
    "which reads up to format 1; install the newer one. There is no whole one before it",
    lambda shop: resume(shop, changed(shop, version="99.0.0", format=99)),
)
row(
    "a state with a part missing",
    "ValueError: resume_from_checkpoint: …mossrlhf_state.json is damaged (it lacks 'prompts')",
    lambda shop: resume(shop, changed(shop, prompts=...)),
)
row(
    "a step that is no number",
    "ValueError: resume_from_checkpoint: …mossrlhf_state.json is damaged (its global_step is "
    "'one')",
    lambda shop: resume(shop, changed(shop, global_step="one")),
)


@row(
    "weights cut off",
    "ValueError: resume_from_checkpoint: …trained.safetensors is damaged (its bytes: "
    "…, expected …). There is no whole one before it; train from the start",
)
def weights(shop):
    path = saved(shop)
    file = path / "trained.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return resume(shop, path)


@row(
    "weights of which one bit has turned",
    "ValueError: resume_from_checkpoint: …trained.safetensors is damaged (its crc32: …, expected",
)
def turned(shop):
    path = saved(shop)
    file = path / "trained.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return resume(shop, path)


@row(
    "a file that is missing",
    "ValueError: resume_from_checkpoint: …checkpoint-1': optimizer_critic.safetensors is missing",
)
def missing(shop):
    path = saved(shop)
    (path / "optimizer_critic.safetensors").unlink()
    return resume(shop, path)


row(
    "a checkpoint of another model",
    "ValueError: resume_from_checkpoint: the checkpoint was made by another model; …parameters "
    "differ, …Build the trainer with the same models",
    lambda shop: resume(shop, saved(shop), model=shop.policy(intermediate_size=24)),
)
row(
    "another reference than the run began with",
    "warning: resume_from_checkpoint: the reference is not the one the run began with, so the KL "
    "penalty is measured from something else",
    lambda shop: resume(shop, saved(shop), ref_model=shop.policy(initializer_range=0.05)),
)
row(
    "a checkpoint with a critic, for a trainer without",
    "ValueError: resume_from_checkpoint: the checkpoint was made by another model",
    lambda shop: resume(shop, saved(shop), critic=False),
)
row(
    "moments that the shaper has no place for",
    "ValueError: resume_from_checkpoint: the checkpoint's shaper holds ['count', …]; build the "
    "trainer with the same kind of shaper and of moments",
    lambda shop: resume(shop, saved(shop), shaper=lambda rollout: rollout.mask * 1.0),
)
row(
    "another KL coefficient than the run began with",
    "warning: resume_from_checkpoint: kl_coef was 0.05 when the run began and is 0.2 now; from "
    "here "
    "on it is 0.2",
    lambda shop: resume(shop, saved(shop), shaper=RewardShaper(kl_coef=0.2)),
)


@row("a folder called checkpoint-old beside the others", "taken: it is passed over, and stays")
def other_names(shop):
    path = saved(shop)
    shutil.copytree(path, path.with_name("checkpoint-old"))
    args = dict(total_steps=2, output_dir=str(path.parent))
    shop.trainer(args=args).train(resume_from_checkpoint=True)
    assert (path.with_name("checkpoint-old") / STATE).is_file()
