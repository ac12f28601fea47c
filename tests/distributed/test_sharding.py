"""A step under FSDP2 and under ZeRO equals one process's, from scoring to its checkpoint."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launching import launch
from rollouts import recorded_rollout
from safetensors.torch import load_file

from mossrlhf import ToyWorld, TrainerConfig, plan

ONE = ("one:float64", "one:float64:adapters", "one:float32")


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict[str, dict]:
    """What comes of one process, by type and adapters."""
    results = started(tmp_path_factory.mktemp("one"), 1, ONE)[0]
    return {name.partition(":")[2]: result for name, result in results.items()}


def started(folder: Path, count: int, words: tuple[str, ...]) -> list[dict[str, dict]]:
    """Run cases on some processes, and return what each of them saw."""
    torch.save(recorded_rollout(ToyWorld()), folder / "rollout.pt")
    told = dict(DS_ACCELERATOR="cpu", LOCAL_SIZE=str(count))
    launch(folder, count, "sharded_step.py", *words, **told)
    return [torch.load(folder / f"result{rank}.pt") for rank in range(count)]


def apart(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float(torch.norm(got.double() - expected) / torch.norm(expected.double()))


def compare(kind: str, one: dict, two: list[dict], bound: float) -> None:
    """Hold two processes' results to one's."""
    assert all(r["in_force"][kind] and r["in_force_still"][kind] for r in two)
    assert not any(one["in_force"].values())
    assert apart(one["critic alone"], one["before"]) > 1e-5
    assert apart(one["parameters"], one["critic alone"]) > 1e-3
    for name in ("before", "critic alone", "parameters"):
        assert apart(two[0][name], one[name]) <= bound, name
        assert torch.equal(two[0][name], two[1][name])
    for name, expected in one["scored"].items():
        got = torch.zeros_like(expected)
        for rank, result in enumerate(two):
            part = result["scored"][name]
            got[rank::2, : part.shape[1]] = part
        assert apart(got.nan_to_num(), expected.nan_to_num()) <= bound * 10, name
    for name in ("warm-up", "metrics", "evaluated"):
        for metric, value in one[name].items():
            if not metric.endswith("response/distinct_2"):  # of a process's own responses
                near = pytest.approx(value, rel=max(1e-9, bound * 100), abs=max(1e-9, bound))
                assert two[0][name][metric] == near, (name, metric)
    for name in ("reference", "drawn"):
        got = [None] * len(one[name])
        got[0::2], got[1::2] = two[0][name], two[1][name]
        assert got == one[name], name
    compare_checkpoints(one, two[0], bound)


def compare_checkpoints(one: dict, two: dict, bound: float) -> None:
    """Same files, names and numbers; and one process's is taken up to the bit."""
    assert torch.equal(two["resumed"], one["parameters"])
    folders = [Path(path) for path in (one["checkpoint"], two["checkpoint"], two["again"])]
    files = [path.relative_to(folders[0]) for path in folders[0].rglob("*.safetensors")]
    compared = [file for file in files if file.name[:6] not in ("random", "genera")]
    assert len(compared) == 5  # trained, two optimizers, two models
    for file in compared:
        own, theirs, again = (load_file(folder / file) for folder in folders)
        assert own.keys() == theirs.keys() == again.keys()
        assert own
        for name, tensor in own.items():
            assert torch.equal(again[name], tensor), (file, name)
            assert again[name].dtype == theirs[name].dtype == tensor.dtype
            scale = max(float(torch.norm(tensor.double())), 1e-30)
            assert float(torch.norm(theirs[name].double() - tensor)) <= 10 * bound * scale


def sharded(folder: Path, one: dict[str, dict], *words: str) -> list[dict[str, dict]]:
    """Run cases on two processes, each to go on from the checkpoint of one process's like case."""
    checkpoints = {word: one[word.partition(":")[2]]["checkpoint"] for word in words}
    return started(folder, 2, tuple(f"{word}@{path}" for word, path in checkpoints.items()))


def test_a_step_under_fsdp2_equals_one_process(one, tmp_path):
    """Warm-up, scoring, PTX, unequal shares and micro-batches; and all roles on one base."""
    words = ("fsdp2:float64", "fsdp2:float64:adapters")
    two = sharded(tmp_path, one, *words)
    for word in words:
        compare("fsdp2", one[word.partition(":")[2]], [r[word] for r in two], 1e-12)
    compare_held_gradients(two)


def compare_held_gradients(two: list[dict[str, dict]]) -> None:
    """Between micro-batches FSDP2 holds a role's whole gradient, which `plan` counts."""
    config = ToyWorld().model_config(hidden_size=16, num_layers=2)
    config.tie_word_embeddings = False
    several = TrainerConfig(rollout_size=8, minibatch_size=8, micro_batch_size=2)
    asked = dict(processes=2, sharding="fsdp", prompt_tokens=8, max_new_tokens=8)
    ahead = [
        plan(config, dtype=torch.float64, args=args, **asked)
        for args in (several, replace(several, micro_batch_size=4))
    ]
    critic, policy = (2 * ahead[0].roles[role].gradients for role in ("critic", "policy"))
    for result in two:
        held = result["fsdp2:float64"]["held"]
        steps = held[: len(held) // 2], held[len(held) // 2 :]
        for *waiting, last in steps:
            assert waiting == pytest.approx([critic] * len(waiting), rel=0.01)
            assert waiting
            assert last == 0  # it has been shared out
    assert ahead[0].extra - ahead[1].extra == max(critic, policy)


def test_a_step_under_zero_equals_one_process(one, tmp_path):
    """At stage 2, stage 3, and stage 3 with its optimizer on the CPU."""
    pytest.importorskip("deepspeed")
    words = ("zero2:float32", "zero3:float32", "zero3offloaded:float32")
    two = sharded(tmp_path, one, *words)
    for word in words:
        compare(word[:5], one["float32"], [r[word] for r in two], 1e-6)
