"""Models that are not trained wait on the CPU, and what DeepSpeed cannot do is refused."""

from inspect import unwrap  # duck types are enough here
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from mossrlhf import ActorCritic, RewardModel, TrainerConfig
from mossrlhf.distributed.deepspeed import make_engine


class Traveler(RewardModel):
    """Notes where it is sent."""

    sent: tuple[str, ...] = ()

    def to(self, *args, **kwargs):
        self.sent = (*self.sent, str(args[0]))
        return super().to(*args, **kwargs)


@pytest.fixture
def traveler(reward_model):
    """A reward model that notes where it is sent."""
    made = reward_model()
    return Traveler(made.backbone, made.score)


def test_models_wait_on_the_cpu_and_are_moved_once_for_all_micro_batches(
    make, traveler, policy, monkeypatch
):
    there = "cpu:0"  # a place that can be told from where they wait
    reference = policy(seed=3)
    moves = []
    to = type(reference).to
    noted = lambda self, *a, **k: (moves.append(str(a[0])), to(self, *a, **k))[1]  # noqa: E731
    plain = make("plain", reward=traveler, ref_model=reference, args=dict(micro_batch_size=2))
    monkeypatch.setattr(type(reference), "to", noted)
    offloaded = make(
        "offloaded",
        reward=traveler,
        ref_model=reference,
        args=dict(offload_frozen=True, micro_batch_size=2),
    )
    monkeypatch.setattr(
        type(offloaded.accelerator), "device", property(lambda _: torch.device(there))
    )
    rollout = plain.collect()
    moves.clear()
    traveler.sent = ()
    scored = offloaded.score(rollout)
    assert traveler.sent == (there, "cpu")
    assert moves == []
    annotated = offloaded.annotate(scored)
    assert moves == [there, "cpu"]
    expected = plain.annotate(plain.score(rollout))
    for name in ("scores", "ref_logprobs", "logprobs", "values"):
        torch.testing.assert_close(
            getattr(annotated, name), getattr(expected, name), equal_nan=True, rtol=0, atol=0
        )


def under_deepspeed(precision: str = "bf16", **zero) -> SimpleNamespace:
    """What is asked of an accelerator before anything is prepared."""
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": zero})
    return SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        mixed_precision=precision,
        deepspeed_plugin=plugin,
    )


@pytest.mark.parametrize(
    ("accelerator", "told"),
    [
        (under_deepspeed(stage=1), "stage 1 of ZeRO, expected 2 or 3"),
        (under_deepspeed(stage=2, offload_optimizer={"device": "cpu"}), "optimizer on 'cpu'"),
        (under_deepspeed("fp16", stage=3), "'fp16' under DeepSpeed"),
    ],
)
def test_what_deepspeed_cannot_do_here_is_refused(policy, accelerator, told):
    with pytest.raises(ValueError, match=told):
        unwrap(make_engine)(ActorCritic(policy()), TrainerConfig(), accelerator)


def test_a_model_loaded_in_parts_is_refused(policy):
    model = policy()
    next(model.parameters()).ds_id = 0
    with pytest.raises(ValueError, match="ZeRO-3 has partitioned"):
        unwrap(make_engine)(ActorCritic(model), TrainerConfig(), under_deepspeed(stage=3))
