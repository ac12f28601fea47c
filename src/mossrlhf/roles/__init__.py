"""The four models of PPO, made of whatever a user gives: objects, names or nothing."""

from mossrlhf.roles.judges import lent_base, load_critic, load_reward, load_rewards
from mossrlhf.roles.machine import (
    checkpoint_activations,
    count_parameters,
    disable_dropout,
    make_accelerator,
    set_switches,
)
from mossrlhf.roles.policy import (
    as_reference,
    is_adapted,
    load_policy,
    load_reference,
    save_policy,
)
from mossrlhf.roles.reading import (
    load_tokenizer,
    policy_context,
    prompt_budget,
    require_vocabulary,
    vocabulary_size,
)

__all__ = [
    "as_reference",
    "checkpoint_activations",
    "count_parameters",
    "disable_dropout",
    "is_adapted",
    "lent_base",
    "load_critic",
    "load_policy",
    "load_reference",
    "load_reward",
    "load_rewards",
    "load_tokenizer",
    "make_accelerator",
    "policy_context",
    "prompt_budget",
    "require_vocabulary",
    "save_policy",
    "set_switches",
    "vocabulary_size",
]
