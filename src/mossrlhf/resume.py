"""Saving a trainer whole, and going on from there as if nothing had happened."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from transformers.trainer_callback import ExportableState

from mossrlhf.checkpoint import (
    load_tensors,
    load_trained,
    read_json,
    save_tensors,
    seal,
    sealed_state,
    trained_tensors,
    write_json,
)
from mossrlhf.models import weights_digest
from mossrlhf.models.lora import adapter_parameters
from mossrlhf.processes import together
from mossrlhf.randomness import random_state, set_random_state
from mossrlhf.retention import STATE, checkpoints, last_checkpoint, prune, written_aside
from mossrlhf.rewinding import shaper_state
from mossrlhf.saved_state import FORMAT, read_state
from mossrlhf.settings import adapters_of, apply_settings, require_same_adapters
from mossrlhf.sharding import whole
from mossrlhf.version import __version__

if TYPE_CHECKING:
    from mossrlhf.trainer import Trainer


def save_checkpoint(trainer: "Trainer", folder: Path | None = None) -> Path:
    """Write everything a run needs to go on to ``checkpoint-<step>``, and prune older ones.

    The models as others load them (``policy/``, ``critic/``), trained parameters, optimizers,
    schedules, running moments, random states of every process, places in the datasets, history.

    Args:
        trainer: what to save.
        folder: where to; None for the output directory, where older ones are pruned.

    Returns:
        the folder.

    Raises:
        OSError: where it could not be written; `PeerError` on the other processes.

    Source: ours.
    """
    run, accelerator = trainer.run, trainer.accelerator
    path = (folder or trainer.output_dir) / f"checkpoint-{run.state.global_step}"
    own_random = random_state()
    alone = accelerator.num_processes == 1
    randoms = [own_random] if alone else gather_object([own_random])
    packed = {role: trainer.engine.pack(role) for role in trainer.engine.optimizers}
    main = accelerator.is_main_process
    with together(accelerator), whole(main, trainer.model, trainer.ref_model):
        if main:
            _write(trainer, path, packed, randoms)
            if folder is None:
                best = run.state.best_model_checkpoint
                keep = trainer.args.save_total_limit
                prune(trainer.output_dir, keep, Path(best) if best else None)
    return path


def _write(trainer: "Trainer", path: Path, packed: dict[str, Any], randoms: list[Any]) -> None:
    with written_aside(path) as folder:
        trainer.save_model(folder)
        save_tensors(trained_tensors(trainer.model), folder / "trained.safetensors")
        for role, (tensors, _) in packed.items():
            save_tensors(tensors, folder / f"optimizer_{role}.safetensors")
        for index, (tensors, _) in enumerate(randoms):
            save_tensors(tensors, folder / f"random_{index}.safetensors")
        order = {"minibatches": trainer.generator.get_state()}
        save_tensors(order, folder / "generator.safetensors")
        plain = {role: numbers for role, (_, numbers) in packed.items()}
        state = _plain_state(trainer, plain, [numbers for _, numbers in randoms])
        write_json(sealed_state({**state, "files": seal(folder)}), folder / STATE)


def is_saved(trainer: "Trainer") -> bool:
    """Whether there is a checkpoint of where a trainer is.

    Args:
        trainer: any.

    Source: ours.
    """
    path = trainer.output_dir / f"checkpoint-{trainer.run.state.global_step}"
    if not (path / STATE).is_file():
        return False
    saved: int = read_json(path / STATE)["pretrained"]
    return saved == trainer.run.pretrained


def _plain_state(trainer: "Trainer", optimizers: dict[str, Any], randoms: list[Any]) -> Any:
    state = trainer.run.state
    best = state.best_model_checkpoint
    scaler = trainer.accelerator.scaler
    return {
        "format": FORMAT,
        "version": __version__,
        "weights": _weights_beneath(trainer),
        "global_step": state.global_step,
        "pretrained": trainer.run.pretrained,
        "best_metric": state.best_metric,
        "best_global_step": state.best_global_step,
        "best_model_checkpoint": Path(best).name if best else None,
        "settings": trainer.run.settings,
        "shaper": shaper_state(trainer),
        "prompts": trainer.prompts.state_dict(),
        "ptx": None if trainer.ptx is None else trainer.ptx.state_dict(),
        "schedulers": {r: s.state_dict() for r, s in trainer.engine.schedulers.items()},
        "optimizers": optimizers,
        "random": randoms,
        "scaler": None if scaler is None else scaler.state_dict(),
        "watches": {name: watch.state_dict() for name, watch in trainer.run.watches().items()},
        "callbacks": {
            name: [callback.state()["attributes"] for callback in callbacks]
            for name, callbacks in _callbacks(trainer).items()
        },
        "adapters": adapters_of(trainer),
        "history": state.log_history,
    }


def _callbacks(trainer: "Trainer") -> dict[str, list[ExportableState]]:
    found: dict[str, list[ExportableState]] = {}
    for callback in trainer.run.callbacks.callbacks:
        if isinstance(callback, ExportableState):
            found.setdefault(type(callback).__name__, []).append(callback)
    return found


def _weights_beneath(trainer: "Trainer") -> dict[str, str | None]:
    """Tell the weights that are not trained, and so are not in the checkpoint."""
    adapters = {id(p) for p in adapter_parameters(trainer.policy).values()}
    frozen = {
        name: p
        for name, p in trainer.model.named_parameters()
        if not p.requires_grad and id(p) not in adapters
    }
    ref = trainer.ref_model
    return {
        "rewards": trainer.run.judges,
        "frozen": weights_digest(frozen) if frozen else None,
        "reference": None if ref is None else weights_digest(dict(ref.named_parameters())),
    }


def load_checkpoint(trainer: "Trainer", source: str | Path | bool) -> None:
    """Bring a freshly built trainer to where a checkpoint was written.

    Nothing is put in its place before all of the checkpoint has been found whole and fitting.

    Args:
        trainer: built with the same models and components.
        source: the checkpoint's folder; True for the newest in the output directory.

    Raises:
        FileNotFoundError: where there is no finished checkpoint.
        TypeError: where `source` names nothing.
        ValueError: where a file is damaged, or it was made by another model, shaper or version; it
            names the newest whole checkpoint before it.

    Warns:
        UserWarning: of what is not as it was: settings, the reference, the number of processes.

    Source: ours.
    """
    path = _find(trainer.output_dir, source)
    saved = read_state(path)
    _require_same_shaper(shaper_state(trainer), saved["shaper"])
    _require_same_weights(_weights_beneath(trainer), saved["weights"])
    require_same_adapters(adapters_of(trainer), saved["adapters"])
    load_trained(trainer.model, load_tensors(path / "trained.safetensors"))
    for role in trainer.engine.optimizers:
        tensors = load_tensors(path / f"optimizer_{role}.safetensors")
        trainer.engine.unpack(role, tensors, saved["optimizers"][role])
        trainer.engine.schedulers[role].load_state_dict(saved["schedulers"][role])
    if saved["shaper"]:
        trainer.shaper.load_state_dict(saved["shaper"])
    if trainer.accelerator.scaler is not None and saved["scaler"] is not None:
        trainer.accelerator.scaler.load_state_dict(saved["scaler"])
    trainer.prompts.load_state_dict(saved["prompts"])
    if trainer.ptx is not None and saved["ptx"] is not None:
        trainer.ptx.load_state_dict(saved["ptx"])
    trainer.generator.set_state(load_tensors(path / "generator.safetensors")["minibatches"])
    apply_settings(trainer, saved["settings"])
    _restore_run(trainer, path, saved)
    _restore_randomness(trainer, path, saved["random"])


def _restore_run(trainer: "Trainer", path: Path, saved: dict[str, Any]) -> None:
    run, best = trainer.run, saved["best_model_checkpoint"]
    for name in ("global_step", "best_metric", "best_global_step"):
        setattr(run.state, name, saved[name])
    run.state.best_model_checkpoint = best and str(path.parent / best)
    run.state.log_history[:] = saved["history"]
    run.pretrained = saved["pretrained"]
    for name, watch in run.watches().items():
        watch.load_state_dict(saved["watches"][name])
    for name, callbacks in _callbacks(trainer).items():
        for callback, attributes in zip(callbacks, saved["callbacks"].get(name, ()), strict=False):
            for attribute, value in attributes.items():
                setattr(callback, attribute, value)


def _restore_randomness(trainer: "Trainer", path: Path, saved: list[Any]) -> None:
    accelerator = trainer.accelerator
    index, now = accelerator.process_index, accelerator.num_processes
    if index < len(saved):
        set_random_state(load_tensors(path / f"random_{index}.safetensors"), saved[index])
    if now != len(saved) and accelerator.is_main_process:
        warnings.warn(
            f"resume_from_checkpoint: it was written by {len(saved)} processes and goes on with "
            f"{now}: models, optimizers and prompts are where they were, but who draws which "
            "random numbers is not; the run is not bitwise what it would have been",
            UserWarning,
            stacklevel=2,
        )


def _require_same_weights(own: dict[str, str | None], saved: dict[str, str | None]) -> None:
    if own["frozen"] != saved["frozen"]:
        raise ValueError(
            "resume_from_checkpoint: what was trained stood on other frozen weights than this "
            "trainer's models have; build them from the same base"
        )
    if own["rewards"] != saved["rewards"]:
        warnings.warn(
            "resume_from_checkpoint: the reward models are not those the run began with; from here "
            "on it is trained for something else",
            UserWarning,
            stacklevel=2,
        )
    if own["reference"] != saved["reference"]:
        warnings.warn(
            "resume_from_checkpoint: the reference is not the one the run began with, so the KL "
            "penalty holds the policy to something else from here on; build the trainer from the "
            "model the run began with, or pass that as ref_model=",
            UserWarning,
            stacklevel=2,
        )


def _require_same_shaper(own: dict[str, Any], saved: dict[str, Any]) -> None:
    """Refuse moments that the shaper has no place for, before anything is put in its place."""
    names = [sorted([*state, *state.get("moments", {})]) for state in (own, saved)]
    if names[0] != names[1]:
        raise ValueError(
            f"resume_from_checkpoint: the checkpoint's shaper remembers {names[1]}, this trainer's "
            f"{names[0]}; build the trainer with the same kind of shaper and of moments"
        )


def _find(output_dir: Path, source: str | Path | bool) -> Path:
    if source is True:
        found = last_checkpoint(output_dir)
        if found is None:
            raise FileNotFoundError(
                f"resume_from_checkpoint=True: there is no finished checkpoint in "
                f"{str(output_dir)!r}; train from the start, or name a folder. "
                "last_checkpoint(output_dir) is None there, which starts a run"
            )
        return found
    if not isinstance(source, str | Path):
        raise TypeError(
            f"resume_from_checkpoint: got {source!r}, expected the folder of a checkpoint, or True "
            "for the newest"
        )
    path = Path(source)
    if (path / STATE).is_file():
        return path
    what = f"it has no {STATE}"
    if (path / "trainer_state.json").is_file():
        what = "it is one of transformers' Trainer"
    raise FileNotFoundError(
        f"resume_from_checkpoint: {str(path)!r} is no finished checkpoint of mossrlhf.Trainer "
        f"({what}); there are {[p.name for p in checkpoints(path.parent)]} beside it"
    )
