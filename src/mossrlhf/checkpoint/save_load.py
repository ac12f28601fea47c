"""Save a run, and resume it."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.trainer_callback import ExportableState

from mossrlhf.checkpoint.folders import (
    STATE,
    atomic_folder,
    checkpoints,
    last_checkpoint,
    prune,
)
from mossrlhf.checkpoint.state import (
    FORMAT,
    RunState,
    adapters_of,
    apply_settings,
    read_state,
    require_same_adapters,
)
from mossrlhf.distributed.processes import together
from mossrlhf.distributed.sharding import put, shape, whole
from mossrlhf.models import weights_digest
from mossrlhf.models.lora import adapter_parameters
from mossrlhf.randomness import random_state, set_random_state
from mossrlhf.serialization import (
    file_checksums,
    load_tensors,
    read_json,
    save_tensors,
    with_checksum,
    write_json,
)
from mossrlhf.version import __version__


def save_checkpoint(run: RunState, folder: Path | None = None) -> Path:
    """Write what a run changes to ``checkpoint-<step>``, and prune older ones.

    It holds the models as transformers loads them (``policy/``, ``critic/``), trained parameters,
    optimizers, schedules, running moments, the random state of every process, places in the
    datasets, settings, watches, callbacks and the history; of frozen weights a digest.
    """
    accelerator = run.accelerator
    path = (folder or run.output_dir) / run.checkpoint.name
    own = random_state()
    randoms = [own] if accelerator.num_processes == 1 else gather_object([own])
    packed = {role: run.engine.pack(role) for role in run.engine.optimizers}
    main = accelerator.is_main_process
    with together(accelerator), whole(main, run.engine.bare, run.ref_model):
        if main:
            _write(run, path, packed, randoms)
            if folder is None:
                best = run.progress.best_model_checkpoint
                prune(run.output_dir, run.args.save_total_limit, Path(best) if best else None)
    return path


def _write(run: RunState, path: Path, packed: dict[str, Any], randoms: list[Any]) -> None:
    with atomic_folder(path) as folder:
        run.save_models(folder)
        save_tensors(trained_tensors(run.engine.bare), folder / "trained.safetensors")
        for role, (tensors, _) in packed.items():
            save_tensors(tensors, folder / f"optimizer_{role}.safetensors")
        for index, (tensors, _) in enumerate(randoms):
            save_tensors(tensors, folder / f"random_{index}.safetensors")
        order = {"minibatches": run.generator.get_state()}
        save_tensors(order, folder / "generator.safetensors")
        plain = {role: numbers for role, (_, numbers) in packed.items()}
        state = _plain_state(run, plain, [numbers for _, numbers in randoms])
        write_json(with_checksum({**state, "files": file_checksums(folder)}), folder / STATE)


def is_saved(run: RunState) -> bool:
    """Whether there is a checkpoint of where a run is."""
    if not (run.checkpoint / STATE).is_file():
        return False
    saved: int = read_json(run.checkpoint / STATE)["pretrained"]
    return saved == run.pretrained


def _plain_state(run: RunState, optimizers: dict[str, Any], randoms: list[Any]) -> Any:
    progress, scaler = run.progress, run.accelerator.scaler
    best = progress.best_model_checkpoint
    return {
        "format": FORMAT,
        "version": __version__,
        "weights": _frozen_weights(run),
        "global_step": progress.global_step,
        "pretrained": run.pretrained,
        "best_metric": progress.best_metric,
        "best_global_step": progress.best_global_step,
        "best_model_checkpoint": Path(best).name if best else None,
        "settings": run.settings,
        "shaper": run.shaper_state(),
        "prompts": run.prompts.state_dict(),
        "ptx": None if run.ptx is None else run.ptx.state_dict(),
        "schedulers": {r: s.state_dict() for r, s in run.engine.schedulers.items()},
        "optimizers": optimizers,
        "random": randoms,
        "scaler": None if scaler is None else scaler.state_dict(),
        "watches": {name: watch.state_dict() for name, watch in run.watches.items()},
        "callbacks": {
            name: [callback.state()["attributes"] for callback in callbacks]
            for name, callbacks in _exportable(run).items()
        },
        "adapters": adapters_of(run),
        "history": progress.log_history,
    }


def _exportable(run: RunState) -> dict[str, list[ExportableState]]:
    found: dict[str, list[ExportableState]] = {}
    for callback in run.callbacks:
        if isinstance(callback, ExportableState):
            found.setdefault(type(callback).__name__, []).append(callback)
    return found


def _frozen_weights(run: RunState) -> dict[str, str | None]:
    """Return digests of the weights that are not trained, and that resuming does not load."""
    model = run.engine.bare
    adapters = {id(p) for p in adapter_parameters(model.policy).values()}
    frozen = {
        name: p
        for name, p in model.named_parameters()
        if not p.requires_grad and id(p) not in adapters
    }
    ref = run.ref_model
    return {
        "rewards": run.rewards_checksum,
        "frozen": weights_digest(frozen) if frozen else None,
        "reference": None if ref is None else weights_digest(dict(ref.named_parameters())),
    }


def load_checkpoint(run: RunState, source: str | Path | bool) -> None:
    """Bring a freshly built run to where a checkpoint was written.

    Nothing is changed before the checkpoint's state has been found whole and fitting.
    """
    path = _find(run.output_dir, source)
    saved = read_state(path)
    _require_same_shaper(run.shaper_state(), saved["shaper"])
    _require_same_weights(_frozen_weights(run), saved["weights"])
    require_same_adapters(adapters_of(run), saved["adapters"])
    load_trained(run.engine.bare, load_tensors(path / "trained.safetensors"))
    for role in run.engine.optimizers:
        tensors = load_tensors(path / f"optimizer_{role}.safetensors")
        run.engine.unpack(role, tensors, saved["optimizers"][role])
        run.engine.schedulers[role].load_state_dict(saved["schedulers"][role])
    if run.accelerator.scaler is not None and saved["scaler"] is not None:
        run.accelerator.scaler.load_state_dict(saved["scaler"])
    run.load_streams(saved)
    run.generator.set_state(load_tensors(path / "generator.safetensors")["minibatches"])
    apply_settings(run, saved["settings"])
    _restore_progress(run, path, saved)
    _restore_randomness(run, path, saved["random"])


def _restore_progress(run: RunState, path: Path, saved: dict[str, Any]) -> None:
    best = saved["best_model_checkpoint"]
    for name in ("global_step", "best_metric", "best_global_step"):
        setattr(run.progress, name, saved[name])
    run.progress.best_model_checkpoint = best and str(path.parent / best)
    run.progress.log_history[:] = saved["history"]
    run.pretrained = saved["pretrained"]
    for name, watch in run.watches.items():
        watch.load_state_dict(saved["watches"][name])
    for name, callbacks in _exportable(run).items():
        for callback, attributes in zip(callbacks, saved["callbacks"].get(name, ()), strict=False):
            for attribute, value in attributes.items():
                setattr(callback, attribute, value)


def _restore_randomness(run: RunState, path: Path, saved: list[Any]) -> None:
    index, now = run.accelerator.process_index, run.accelerator.num_processes
    if index < len(saved):
        set_random_state(load_tensors(path / f"random_{index}.safetensors"), saved[index])
    if now != len(saved) and run.accelerator.is_main_process:
        warnings.warn(
            f"resume_from_checkpoint: it was written by {len(saved)} processes and is resumed by "
            f"{now}: models, optimizers and prompts are where they were, but each process has "
            "other random numbers; the run is not bitwise what it would have been",
            UserWarning,
            stacklevel=2,
        )


def _require_same_weights(own: dict[str, str | None], saved: dict[str, str | None]) -> None:
    if own["frozen"] != saved["frozen"]:
        raise ValueError(
            "resume_from_checkpoint: the checkpoint was trained on other frozen weights than this "
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
            "penalty is measured from something else from here on; build the trainer from the "
            "model the run began with, or pass that as ref_model=",
            UserWarning,
            stacklevel=2,
        )


def _require_same_shaper(own: dict[str, Any], saved: dict[str, Any]) -> None:
    names = [sorted([*state, *state.get("moments", {})]) for state in (own, saved)]
    if names[0] != names[1]:
        raise ValueError(
            f"resume_from_checkpoint: the checkpoint's shaper holds {names[1]}, this trainer's "
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


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters by name; a shared one appears once."""
    return {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad}


def load_trained(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load `trained_tensors` into a model; raise ValueError where names or shapes differ."""
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    odd = sorted(set(own) ^ set(tensors))
    odd += [n for n in own if n in tensors and shape(own[n]) != tensors[n].shape]
    if odd:
        raise ValueError(
            f"resume_from_checkpoint: the checkpoint was made by another model; {len(odd)} "
            f"parameters differ, {odd[:3]} among them. Build the trainer with the same models"
        )
    for name, parameter in own.items():
        put(parameter, tensors[name])
