"""Adapters that do not fit."""

import json

from peft import LoraConfig, get_peft_model

from bad_inputs.room import Room
from mossrlhf import RewardModel, ValueHead
from mossrlhf.models import add_adapters

room = Room("Adapters")
row = room.row


def lora(**options):
    return LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 2, "target_modules": "all-linear", **options}
    )


def twice(shop):
    """A model with an adapter inside, given bare."""
    model = shop.policy()
    get_peft_model(model, lora())
    return shop.trainer(model=model, peft_config=lora())


def again(shop):
    """Two adapters on a reward model."""
    model = shop.reward_model()
    for _ in range(2):
        add_adapters(model, lora(task_type=None, target_modules=["q_proj"]))


row(
    "a dict for a LoRA config",
    "TypeError: peft_config: got {'r': 8}, expected a peft.PeftConfig, such as LoraConfig(...)",
    lambda shop: shop.trainer(peft_config={"r": 8}),
)
row(
    "target modules that the model does not have",
    "ValueError: peft_config: cannot be added to a LlamaForCausalLM (Target modules {'c_attn'} not "
    "found in …); name modules that it has, or set target_modules='all-linear'",
    lambda shop: shop.trainer(peft_config=lora(target_modules=["c_attn"])),
)
row(
    "the base model of a model with an adapter",
    "ValueError: model: it contains an adapter, added by PEFT or by an earlier Trainer with "
    "peft_config=; pass that trainer's policy to train the adapter further",
    twice,
)


row(
    "an adapted policy whose adapter is frozen",
    "ValueError: model: none of its parameters requires a gradient, …load its adapter with "
    "is_trainable=True",
    lambda shop: shop.trainer(model=get_peft_model(shop.policy(), lora()).requires_grad_(False)),
)


@row(
    "an adapter that has learned, and another on top", "warning: model: its adapter is merged into"
)
def merged(shop):
    model = get_peft_model(shop.policy(), lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    return shop.trainer(model=model, peft_config=lora())


row(
    "adapters on a reward model that has some",
    "ValueError: peft_config: the reward model has adapters inside already; train those on",
    again,
)


row(
    "modules to be trained whole beside adapters of a reward model",
    "ValueError: peft_config: got modules_to_save=…; the head is trained anyway",
    lambda shop: add_adapters(
        shop.reward_model(), LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    ),
)


@row(
    "a folder of adapters that does not say over which base",
    "ValueError: path: …holds adapters, and does not say over which base; name it as "
    "base_model_name_or_path in adapter_config.json",
)
def baseless(shop):
    shared = shop.trainer(critic=lora(), peft_config=lora())
    shared.save_model(shop.folder)
    path = shop.folder / "critic" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": None}))
    return RewardModel.from_pretrained(shop.folder / "critic")


row(
    "a critic's adapter, where the policy has none",
    "ValueError: critic: an adapter shares the policy's base, and the policy has no adapter: "
    "all of it is trained. Pass peft_config= for the policy too, or a whole model here",
    lambda shop: shop.trainer(critic=lora()),
)


row(
    "a critic's adapter whose initialization rewrites the base it shares",
    "ValueError: critic: got init_lora_weights='pissa', which rewrites the base of the "
    "adapter, and with it the outputs of policy and reference; leave init_lora_weights as it is",
    lambda shop: shop.trainer(critic=lora(init_lora_weights="pissa"), peft_config=lora()),
)
row(
    "a policy's adapter whose initialization rewrites its base",
    "warning: ref_model: got None, and init_lora_weights='olora' has rewritten the base of "
    "the policy's adapter, so the reference is a copy of the whole policy, which costs the memory "
    "of a second base. To avoid it, leave init_lora_weights at its default",
    lambda shop: shop.trainer(critic=False, peft_config=lora(init_lora_weights="olora")),
)
row(
    "biases of the base trained beside the policy's adapter",
    "warning: …ref_model: got None, and parameters of the policy's base are trained besides its "
    "adapter (…bias…), so the reference is a copy of the whole policy, which costs the memory of "
    "a second base. To avoid it, leave bias='none' in peft_config",
    lambda shop: shop.trainer(model=shop.policy(attention_bias=True), peft_config=lora(bias="all")),
)
row(
    "those, and a critic's adapter on that base",
    "ValueError: critic: an adapter shares the policy's base, and that is trained besides the "
    "policy's own (…bias…), so this one's outputs would change too. Pass peft_config= with "
    "bias='none' for the policy, or a whole model here",
    lambda shop: shop.trainer(
        model=shop.policy(attention_bias=True), peft_config=lora(bias="all"), critic=lora()
    ),
)
row(
    "a head with a bias as the critic",
    "ValueError: critic: transformers' LlamaForSequenceClassification has no place for its head's "
    "bias, so it could not be saved; pass a head without, as ValueHead(16) is",
    lambda shop: shop.trainer(critic=ValueHead(16, bias=True)),
)
row(
    "a head for hidden states of another size",
    "ValueError: head: it reads 17 numbers a token, and the backbone's hidden states have 16; "
    "pass ValueHead(16)",
    lambda shop: shop.trainer(critic=ValueHead(17)),
)
