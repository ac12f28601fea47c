"""Two processes equal one: parameters and metrics, however the work is split."""

from pathlib import Path

import pytest
import torch
from launching import launch
from rollouts import recorded_rollout
from transformers import LlamaForCausalLM

from mossrlhf import ActorCritic, RewardModel, ToyWorld, micro_batches
from mossrlhf.models import full_logits, policy_stats


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    world = ToyWorld()
    torch.save(recorded_rollout(world), folder / "rollout.pt")
    policy = LlamaForCausalLM(world.model_config(hidden_size=16, num_layers=2))
    policy.save_pretrained(folder / "policy")
    return folder


# Without the PTX term the policy is the last to exchange gradients. At 34 padded tokens one process
# has three micro-batches, the other two.
@pytest.mark.parametrize(
    ("ptx", "splits"),
    [
        ("1", [{}, {"MICRO": "1"}, {"MICRO": "2"}, {"MICRO": "4"}, {"TOKENS": "34"}]),
        ("0", [{}, {"MICRO": "1"}]),
    ],
)
def test_two_processes_equal_one(folder, ptx, splits):
    one = launch(folder, 1, PTX=ptx)
    for settings in splits:
        two = launch(folder, 2, PTX=ptx, **settings)
        difference = torch.norm(one["parameters"] - two["parameters"])
        assert difference <= 1e-12 * torch.norm(one["parameters"]), settings
        local = ("time/", "response/distinct_2")
        for name, value in one["metrics"].items():
            if not name.startswith(local):
                assert two["metrics"][name] == pytest.approx(value, rel=1e-9, abs=1e-9), name


def test_two_processes_equal_one_with_an_accelerator_of_the_users(folder):
    """Which waits in each backward for all parameters, if nobody says otherwise."""
    one, two = (launch(folder, processes, PTX="0", OWN="1") for processes in (1, 2))
    difference = torch.norm(one["parameters"] - two["parameters"])
    assert difference <= 1e-12 * torch.norm(one["parameters"])


def test_log_normal_lengths_under_a_token_budget(tmp_path):
    """One process has one micro-batch, the other three: neither waits for ever."""
    lengths = torch.randn(8, generator=torch.Generator().manual_seed(5)).add(2.5).exp().clamp(1, 80)
    rollout = recorded_rollout(ToyWorld(), lengths.long())
    torch.save(rollout, tmp_path / "rollout.pt")
    sizes = (rollout.prompt_lengths + rollout.response_lengths).tolist()
    assert max(sizes) > 4 * min(sizes)
    one = launch(tmp_path, 1)
    two = launch(tmp_path, 2, TOKENS="60")
    counts = [len(micro_batches(rollout.select(torch.arange(i, 8, 2)), None, 60)) for i in (0, 1)]
    assert counts == [1, 3]
    difference = torch.norm(one["parameters"] - two["parameters"])
    assert difference <= 1e-12 * torch.norm(one["parameters"])


@pytest.mark.parametrize("recomputed", ["0", "1"])
def test_two_processes_equal_one_where_roles_share_a_base(folder, recomputed):
    settings = dict(ADAPTERS="1", CHECKPOINTS=recomputed)
    one = launch(folder, 1, **settings)
    two = launch(folder, 2, MICRO="2", **settings)
    for name in ("parameters", "gradient"):
        difference = torch.norm(one[name] - two[name])
        assert difference <= 1e-12 * torch.norm(one[name]), name


def test_in_single_precision_two_processes_equal_one(folder):
    one = launch(folder, 1, DTYPE="float32")
    two = launch(folder, 2, DTYPE="float32", MICRO="2")
    difference = torch.norm(one["parameters"] - two["parameters"])
    assert difference <= 1e-6 * torch.norm(one["parameters"])


def test_kernels_on_two_processes_equal_full_logits_on_one(folder):
    """With accumulation, PTX, value loss, a tied head and recomputed activations all on."""
    everything = dict(TIED="1", CHECKPOINTS="1")
    whole = launch(folder, 1, WHOLE="1", **everything)
    fused = launch(folder, 2, MICRO="2", **everything)
    single = launch(folder, 2, MICRO="2", DTYPE="float32", **everything)
    for got, bound in ((fused, 1e-12), (single, 1e-6)):
        distance = torch.norm(got["gradient"].double() - whole["gradient"])
        assert distance <= bound * torch.norm(whole["gradient"])
    distance = torch.norm(fused["parameters"] - whole["parameters"])
    assert distance <= 1e-12 * torch.norm(whole["parameters"])


@pytest.mark.parametrize("units", ["fused", "recomputed"])
def test_a_policy_sharded_by_fsdp_gets_the_gradient_of_full_logits(folder, units):
    rollout = torch.load(folder / "rollout.pt", weights_only=False)
    mine = rollout.select(torch.arange(0, len(rollout), 2))
    got = launch(folder, 2, "fsdp_step.py", units)
    policy = LlamaForCausalLM.from_pretrained(folder / "policy", dtype=torch.float64)
    with full_logits():
        stats = policy_stats(policy, rollout, 0.7, entropy=True)
        scored = policy_stats(policy, mine, 0.7, entropy=True)
    torch.testing.assert_close(got["scored"], torch.stack([scored.logprob, scored.entropy]))
    (stats.logprob + 0.1 * stats.entropy**2).sum().backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert got["sharded"]
    assert torch.norm(got["gradient"] - expected) <= 1e-12 * torch.norm(expected)


def test_policies_sharded_by_zero_get_the_gradients_of_full_logits(folder):
    """Both ways of the weight, a head that is the embedding, and one that has an adapter."""
    pytest.importorskip("deepspeed")
    from zero_step import made

    rollout = torch.load(folder / "rollout.pt", weights_only=False)
    mine = rollout.select(torch.arange(0, len(rollout), 2))
    results = launch(folder, 2, "zero_step.py", DS_ACCELERATOR="cpu", LOCAL_SIZE="2")
    assert len(results) == 4
    for kind, got in results.items():
        assert got["sharded"], kind
        assert ("as a module" if "adapted" in kind else "by its weight") in got["path"], kind
        policy = made(folder, kind.split()[0])
        critic = RewardModel.from_language_model(folder / "policy")
        with full_logits():
            stats = policy_stats(policy, rollout, 0.7, entropy=True)
            scored = policy_stats(policy, mine, 0.7, entropy=True)
        scored = torch.stack([scored.logprob, scored.entropy])
        values = ActorCritic(policy, critic).values(mine)[0][mine.states]
        (stats.logprob + 0.1 * stats.entropy**2).sum().backward()
        gradient = [p.grad.flatten() for p in policy.parameters() if p.requires_grad]
        for name, whole in (
            ("scored", scored),
            ("values", values),
            ("gradient", torch.cat(gradient)),
        ):
            assert torch.norm(got[name] - whole) <= 1e-6 * torch.norm(whole), (kind, name)


def test_statistics_weigh_minibatches_by_the_tokens_of_all_processes(folder):
    metrics = launch(folder, 2, MINI="4")["metrics"]
    ranks = [torch.load(folder / f"steps{rank}.pt") for rank in range(2)]
    weights = [sum(tokens for tokens, _ in steps) for steps in zip(*ranks, strict=True)]
    losses = [sum(share for _, share in steps) for steps in zip(*ranks, strict=True)]
    assert len(set(weights)) > 1
    expected = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
    assert metrics["policy/loss"] == pytest.approx(expected, rel=1e-9)
