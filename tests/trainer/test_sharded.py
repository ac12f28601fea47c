"""A step under FSDP2 and under ZeRO equals one process's, from scoring to the draw after it."""

import pytest
import torch
from launching import launched
from rollouts import recorded_rollout

from mossrlhf import ToyWorld

LOCAL = "response/distinct_2"  # of a process's own responses


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run `sharded_step.py` on some processes, once for each kind and settings."""
    known: dict[tuple, list[dict]] = {}

    def results(kind: str, **settings: str) -> list[dict]:
        key = (kind, *sorted(settings.items()))
        if key not in known:
            folder = tmp_path_factory.mktemp(kind)
            torch.save(recorded_rollout(ToyWorld()), folder / "rollout.pt")
            count = 1 if kind == "one" else 2
            environment = dict(KIND=kind, DS_ACCELERATOR="cpu", LOCAL_SIZE="2", **settings)
            launched(folder, count, "sharded_step.py", **environment)
            known[key] = [torch.load(folder / f"result{rank}.pt") for rank in range(count)]
        return known[key]

    return results


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
            if not metric.endswith(LOCAL):
                near = pytest.approx(value, rel=max(1e-9, bound * 100), abs=max(1e-9, bound))
                assert two[0][name][metric] == near, (name, metric)
    for name in ("reference", "drawn"):
        got = [None] * len(one[name])
        got[0::2], got[1::2] = two[0][name], two[1][name]
        assert got == one[name], name


def test_a_step_under_fsdp2_equals_one_process(run):
    """Warm-up, scoring, PTX, evaluation of unequal shares, micro-batches of unequal number."""
    compare("fsdp2", run("one")[0], run("fsdp2", TOKENS="34"), 1e-12)


def test_a_step_under_fsdp2_equals_one_process_where_roles_share_a_base(run):
    settings = dict(ADAPTERS="1", CHECKPOINTS="1")
    one = run("one", **settings)[0]
    compare("fsdp2", one, run("fsdp2", TOKENS="34", **settings), 1e-12)


@pytest.mark.parametrize("kind", ["zero2", "zero3", "zero3offloaded"])
def test_a_step_under_zero_equals_one_process(run, kind):
    pytest.importorskip("deepspeed")
    one = run("one", DTYPE="float32")[0]
    compare(kind[:5], one, run(kind, DTYPE="float32"), 1e-6)
