"""Plan the memory of a run before it: sizes from configurations, activations from fake tensors."""

import copy
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # as torch's documentation imports it
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig
from transformers import PreTrainedConfig as Config
from transformers.utils import find_adapter_config_file

from mossrlhf.config import TrainerConfig
from mossrlhf.kernels.chunked_head import chunks
from mossrlhf.loading.policy import at_least_float32, has_effect
from mossrlhf.loading.tokenizer import prompt_budget
from mossrlhf.loss import PPOMaxLoss
from mossrlhf.models import ValueHead, rewriting_initialization
from mossrlhf.models.backbone import PACKED_ATTENTION, attends_to_everything
from mossrlhf.models.lora import unwrap_peft
from mossrlhf.options import suggest
from mossrlhf.rewards import ModelReward
from mossrlhf.sampling import HFSampler
from mossrlhf.validation import KINDS

GIB, MIB = 2**30, 2**20

ZERO_BUCKET = 4 * 500_000_000
"""Bytes of gradients that DeepSpeed reduces at a time by default."""


@dataclass(frozen=True)
class RoleMemory:
    """Bytes that one role holds throughout; `note` describes a role without a separate model."""

    parameters: int = 0
    trained: int = 0
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    note: str = ""

    def __str__(self) -> str:
        counts = f"{self.parameters / 1e6:,.1f}M, {self.trained / 1e6:,.1f}M trained"
        return ", ".join(filter(None, [counts if self.parameters else "", self.note]))


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one device during a run, in bytes; ``print`` it for a table.

    Left out are the driver and libraries (0.5 to 1 GiB on CUDA) and gaps between blocks.

    Args:
        roles: "policy", "critic", "reference" and "reward" → what each holds throughout.
        kept: by role, what the forward pass of one micro-batch keeps for its backward pass.
        scoring: by role, the peak of scoring one micro-batch, without weights.
        kv_cache: of the responses sampled at once, at their full length.
        logits: of one chunk, in float32.
        rollout: the annotated rollout and one minibatch of it.
        extra: what several processes add to an update: weights and gradients held whole, buckets.
        lent: by role, what comes to the device beside `roles` while frozen models score.
        phases: "sampling", "scoring" and "update" → the peak of each, everything included.
        where: processes, device and precision, in words.
        sizes: tokens of a sequence, and sequences at once, by what is done with them.
        planned: `plan` with its arguments; call it with others to plan again.
    """

    roles: Mapping[str, RoleMemory]
    kept: Mapping[str, int]
    scoring: Mapping[str, int]
    kv_cache: int
    logits: int
    rollout: int
    extra: int
    lent: Mapping[str, int]
    phases: Mapping[str, int]
    where: str
    sizes: Mapping[str, int]
    planned: "partial[MemoryPlan]" = field(repr=False, compare=False)

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return sum(role.weights for role in self.roles.values())

    @property
    def steady(self) -> int:
        """Bytes of weights, gradients and optimizer states: everything but activations."""
        return self.weights + sum(r.gradients + r.optimizer for r in self.roles.values())

    @property
    def peak(self) -> int:
        """Bytes at the highest peak."""
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda name: self.phases[name])

    def again(self, **changed: Any) -> "MemoryPlan":
        """Plan the same run with arguments of `plan` `changed`, any but its model."""
        return self.planned(**changed)

    def fits(self, memory: float) -> bool:
        """Return whether the peak is within `memory` bytes; leave a tenth of a device free."""
        return self.peak <= memory

    def suggest(self, memory: float) -> str:
        """Suggest what to change for a device of `memory` bytes, in lines of 80 columns."""
        return textwrap.fill(_suggestion(self, memory), 80, break_on_hyphens=False)

    def __str__(self) -> str:
        unit, size, digits = ("GiB", GIB, 2) if self.peak >= 10 * GIB else ("MiB", MIB, 1)

        def cell(number: int, width: int = 11) -> str:
            return f"{f'{number / size:,.{digits}f}' if number else '-':>{width}}"

        head = f"{'weights':>23}{'gradients':>11}{'optimizer':>11}  parameters"
        lines = [f"Memory of one device, {unit}\n{self.where}\n\n{head}"]
        sums = [sum(getattr(r, n) for r in self.roles.values()) for n in ("gradients", "optimizer")]
        together = RoleMemory(0, 0, self.weights, *sums)
        for name, role in {**self.roles, "together": together}.items():
            cells = cell(role.weights) + cell(role.gradients) + cell(role.optimizer)
            lines.append(f"{name:12}{cells}  {role}".rstrip())
        lines.append("")
        by = max(self.scoring, key=lambda name: self.scoring[name])
        scored = "reward" if by == "reward" else "scored"
        table = [
            *((f"activations, update of the {r}", n, "updated") for r, n in self.kept.items()),
            (f"activations, scoring by the {by}", self.scoring[by], scored),
            ("KV cache while sampling", self.kv_cache, "sampled"),
            ("one chunk of logits, within the above", self.logits, ""),
            ("rollout", self.rollout, "rollout"),
            *((f"{role}, while it scores", number, "") for role, number in self.lent.items()),
            ("gathered and reduced", self.extra, ""),
        ]
        for words, number, at_once in table:
            remark = f"  {self.sizes[at_once]} x {self.sizes['length']} tokens" if at_once else ""
            lines.append(f"{words:38}{cell(number, 10)}{remark}")
        lines.append("")
        for name, number in self.phases.items():
            mark = "  <- the peak" if name == self.peak_phase else ""
            lines.append(f"{f'peak of {name}':38}{cell(number, 10)}{mark}")
        return "\n".join(lines)


def plan(  # noqa: D417
    model: Any,
    *,
    reward: Any = None,
    critic: Any = None,
    ref_model: Any = None,
    args: TrainerConfig | None = None,
    peft_config: Any = None,
    generation_config: GenerationConfig | None = None,
    sampler: Any = None,
    loss: PPOMaxLoss | None = None,
    prompt_tokens: int | None = None,
    max_new_tokens: int | None = None,
    processes: int = 1,
    sharding: str | None = None,
    frozen: str | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cuda",
) -> MemoryPlan:
    """Plan how much of each device's memory a run of `Trainer` needs, and in which phase.

    Args:
        model: the policy, as for `Trainer`; here and below a transformers configuration will do.
        reward: as for `Trainer`; functions need no memory. A ``PeftConfig`` stands for an adapter
            on the policy's base that is yet to be trained.
        critic, ref_model, args, peft_config, generation_config: as for `Trainer`.
        sampler: as for `Trainer`; the ``batch_size`` of an `HFSampler` counts.
        loss: as for `Trainer`; every loss needs the same memory.
        prompt_tokens: of the longest prompt; None for `TrainerConfig.max_prompt_length`.
        max_new_tokens: of the longest response; None for that of `sampler` or
            `generation_config`, else 512.
        processes: number of processes, one to a device.
        sharding: None (DDP: every process holds everything), "fsdp", "zero3" or "zero2".
        frozen: "whole", "sharded" or "offloaded" reference and reward models; it follows from
            `sharding` and ``offload_frozen``, and any other value is refused.
        dtype: of weights that are loaded by name; None for that of their configuration. Trained
            weights are at least float32, as with `Trainer`.
        device: "cuda" or "cpu"; the chunks of logits differ.

    Raises:
        ValueError: where a length is not known, a number or word is out of range, the processes
            cannot share the rollout, or it is unknown whether new adapters change the policy.
        TypeError: where an argument is of the wrong kind.
    """
    given = {name: value for name, value in locals().items() if name != "model"}
    _check_arguments(given)
    args = args or TrainerConfig()
    args.require_shareable(processes)
    unsharded = "offloaded" if args.offload_frozen else "whole"
    follows = "sharded" if sharding in ("fsdp", "zero3") else unsharded
    if frozen not in (None, follows):
        raise ValueError(
            f"frozen: got {frozen!r}, but sharding={sharding!r} and TrainerConfig(offload_frozen="
            f"{args.offload_frozen}) make it {follows!r}; leave frozen out, or change these"
        )
    config = generation_config or GenerationConfig(max_new_tokens=max_new_tokens or 512)
    sampler = sampler or HFSampler(generation_config=config, eos_token_id=0, pad_token_id=0)
    response = max_new_tokens or int(sampler.max_new_tokens)
    prompt = prompt_tokens or args.max_prompt_length
    if prompt is None:
        raise ValueError(
            "prompt_tokens: got None, and TrainerConfig(max_prompt_length=) is None too; pass the "
            "number of tokens in the longest prompt"
        )
    sharding = sharding if processes > 1 else None
    with torch.random.fork_rng(devices=[]):
        models = _role_models(model, reward, critic, ref_model, peft_config, dtype)
        prompt_budget(models["policy"][0].whole, args, response)
        sizes = _sizes(args, processes, prompt, response, sampler, models["reward"])
        memory = _Device(models, sizes, args, device == "cuda", processes, sharding).memory()
    if reward is not None and not models["reward"]:
        memory["roles"]["reward"] = RoleMemory(note="a function")
    where = [
        f"{processes} processes ({sharding or 'DDP'})" if processes > 1 else "1 process",
        f"{device}, {'adapters' if models['policy'][0].adapter else 'all weights trained'}",
        "bfloat16 autocast" if args.bf16 else "no autocast",
        "checkpointed" if args.gradient_checkpointing else "not checkpointed",
    ]
    return MemoryPlan(
        **memory, where=", ".join(where), sizes=sizes, planned=partial(plan, model, **given)
    )


def _check_arguments(given: Mapping[str, Any]) -> None:
    kinds = {name: KINDS[name] for name in ("args", "generation_config", "loss", "sampler")}
    kinds["peft_config"] = PeftConfig, "a peft.PeftConfig, such as LoraConfig(...)"
    kinds["dtype"] = torch.dtype, "a torch.dtype, such as torch.bfloat16"
    for name, (kind, expected) in kinds.items():
        if given[name] is not None and not isinstance(given[name], kind):
            raise TypeError(f"{name}: got {given[name]!r:.60}, expected {expected}")
    for name in ("prompt_tokens", "max_new_tokens", "processes"):
        value = given[name]
        if (value is not None or name == "processes") and (type(value) is not int or value < 1):
            error = ValueError if type(value) is int else TypeError
            raise error(f"{name}: got {value!r}, expected a whole number, at least 1")
    among = dict(sharding=(None, "fsdp", "zero3", "zero2"), device=("cuda", "cpu"))
    for name, words in among.items():
        if (value := given[name]) not in words:
            hint = suggest(str(value), list(filter(None, words)))
            raise ValueError(f"{name}: got {value!r}, expected one of {str(words)[1:-1]}{hint}")


def _sizes(
    args: TrainerConfig, processes: int, prompt: int, response: int, by: Any, rewards: Any
) -> dict[str, int]:
    """Tokens of a sequence, and sequences of one process at once."""
    rollout, minibatch = args.rollout_size // processes, args.minibatch_size // processes
    most = min(args.micro_batch_size or rollout, rollout)
    if args.max_tokens is not None:
        most = max(1, min(most, args.max_tokens // (prompt + response)))
    row = 8 * (prompt + response) + 29 * response + 24  # ids; 7 float32 numbers and a mask
    return {
        "prompt": prompt, "response": response, "length": prompt + response,
        "rollout": rollout, "minibatch": minibatch, "bytes": row * (rollout + minibatch),
        "sampled": min(rollout, getattr(by, "batch_size", None) or rollout),
        "reward": min(rollout, max((one.batch for one in rewards), default=0)),
        "scored": most, "updated": min(most, minibatch),
    }  # fmt: skip


@dataclass(frozen=True)
class _RoleModel:
    """What a role's model is made of: a configuration, or the policy's and its own adapter."""

    config: Config
    dtype: torch.dtype
    adapter: PeftConfig | None = None
    writes: bool = False  # or else it has a value head
    trained: bool = False
    shares: bool = False  # the policy's base
    batch: int = 0

    @classmethod
    def of(cls, name: str, given: Any, dtype: torch.dtype | None, **options: Any) -> "_RoleModel":
        adapter, known = None, given
        if isinstance(given, nn.Module):
            adapter = getattr(given, "peft_config", {}).get(getattr(given, "active_adapter", None))
            dtype = next(p.dtype for p in given.parameters() if p.is_floating_point())
            inner: Any = unwrap_peft(given)
            known = getattr(inner, "config", None) or inner.model.config
        elif isinstance(given, (str, Path)):
            if find_adapter_config_file(str(given)) is not None:
                adapter = PeftConfig.from_pretrained(str(given))
            base = adapter.base_model_name_or_path if adapter else given
            known = AutoConfig.from_pretrained(base)
        if not isinstance(known, Config):
            kind = "causal language model" if options.get("writes") else "RewardModel, a classifier"
            kind += ", its folder, hub name or config"
            raise TypeError(f"{name}: got {given!r:.60}, expected a {kind}")
        dtype = dtype or getattr(known, "dtype", None) or torch.float32
        dtype = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype))
        return cls(known, dtype, adapter, **options)

    @property
    def text(self) -> Any:
        return self.config.get_text_config()

    @property
    def kv_heads(self) -> int:
        return getattr(self.text, "num_key_value_heads", None) or self.text.num_attention_heads

    def build(self, layers: int | None = None) -> Any:
        """Make the model on the meta device, with all of its layers or the first `layers`."""
        config: Any = copy.deepcopy(self.config)
        quantized = vars(config).pop("quantization_config", None)
        text = config.get_text_config()
        text.use_cache = False
        if layers is not None:
            text.num_hidden_layers = layers
            if vars(text).get("layer_types"):
                text.layer_types = (2 * text.layer_types)[:layers]
        auto: Any = AutoModelForCausalLM if self.writes else AutoModel
        with torch.device("meta"):
            made = auto.from_config(config, dtype=self.dtype)
            # Of frozen models too it is seen what they would keep: what they take in passing.
            made.requires_grad_((self.trained or layers is not None) and not self.shares)
            _count_quantized(made, quantized)
            if self.adapter is not None:
                adapter = copy.deepcopy(self.adapter)
                adapter.inference_mode = False
                adapter.task_type = adapter.task_type if adapter.is_prompt_learning else None
                made = get_peft_model(made, adapter)
            if not self.writes:
                made.score = ValueHead(text.hidden_size)
        for parameter in made.parameters():
            if parameter.requires_grad and self.trained:
                parameter.data = parameter.data.to(at_least_float32(parameter.dtype))
        return made

    @cached_property
    def whole(self) -> Any:
        return self.build()

    def own_tensors(self) -> list[Tensor]:
        """Parameters and buffers, but those of a base it shares."""
        return [t for t in _tensors(self.whole) if t.requires_grad or not self.shares]

    def trained_tensors(self) -> list[Tensor]:
        """Parameters that its optimizer moves."""
        return [t for t in self.own_tensors() if t.requires_grad and self.trained]

    @cached_property
    def parts(self) -> tuple[int, int, int]:
        """Bytes of what is in no layer, of all layers, and of the largest."""
        lists = [module for module in self.whole.modules() if isinstance(module, nn.ModuleList)]
        sizes = [[_nbytes(_tensors(layer)) for layer in one] for one in lists]
        layers = max(sizes, key=sum, default=[])
        return _nbytes(_tensors(self.whole)) - sum(layers), sum(layers), max(layers, default=0)


def _count_quantized(model: Any, quantization: Any) -> None:
    """Have weights counted as bitsandbytes holds them."""
    asked = getattr(quantization, "to_dict", lambda: quantization or {})()
    bits = 4 if asked.get("load_in_4bit") else 8 if asked.get("load_in_8bit") else 0
    for layer in model.modules() if bits else ():
        if type(layer) is nn.Linear and layer is not model.get_output_embeddings():
            weight: Any = layer.weight.requires_grad_(False)
            scales = weight.numel() // 16 if bits == 4 else 4 * layer.out_features
            weight.packed = weight.numel() * bits // 8 + scales


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, shared ones once."""
    return list({id(t): t for t in (*model.parameters(), *model.buffers())}.values())


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(getattr(t, "packed", t.numel() * t.element_size()) for t in tensors)


def _role_models(
    model: Any, reward: Any, critic: Any, ref_model: Any, peft_config: Any, dtype: Any
) -> dict[str, list[_RoleModel]]:
    """What `Trainer` makes of its arguments, by role; no reference is the policy, adapters off."""
    policy = _RoleModel.of("model", model, dtype, writes=True, trained=True)
    policy = replace(policy, adapter=peft_config or policy.adapter)

    def valued(name: str, given: Any, **options: Any) -> _RoleModel:
        """A critic or reward model, on the policy's base or separate."""
        if isinstance(given, (str, Path)) and policy.adapter is not None:
            saved = find_adapter_config_file(str(given)) is not None
            given = PeftConfig.from_pretrained(str(given)) if saved else given
        if isinstance(given, PeftConfig) and policy.adapter is None:
            raise ValueError(
                f"{name}: an adapter shares the policy's base, and the policy has none: all of it "
                "is trained. Pass peft_config= too, or a whole model here"
            )
        if isinstance(given, (PeftConfig, ValueHead)):
            adapter = given if isinstance(given, PeftConfig) else None
            return replace(policy, adapter=adapter, writes=False, shares=True, **options)
        loaded = None if isinstance(given, nn.Module) else torch.float32
        return replace(_RoleModel.of(name, given, loaded, **options), adapter=None)

    rewards = []
    for one in reward if isinstance(reward, (list, tuple)) else [reward]:
        one = one[0] if isinstance(one, tuple) and one else one
        size = ModelReward.__dataclass_fields__["batch_size"].default
        if isinstance(one, ModelReward):
            one, size = one.model, one.batch_size
        if one is not None and (isinstance(one, nn.Module) or not callable(one)):
            rewards.append(valued("reward", one, trained=False, batch=size))
    critics = []
    if critic not in (None, True, False):
        critics = [valued("critic", critic, trained=True)]
    elif critic is not False:
        alike = [one for one in rewards if one.text.vocab_size == policy.text.vocab_size]
        critics = [replace((*alike, replace(policy, adapter=None, writes=False))[0], trained=True)]
    references = []
    if ref_model is not None:
        references = [_RoleModel.of("ref_model", ref_model, dtype, writes=True)]
    elif policy.adapter is None:
        references = [replace(policy, dtype=at_least_float32(policy.dtype), trained=False)]
    elif _changed_by_new_adapters(model, policy.adapter, new=peft_config is not None):
        references = [replace(policy, trained=False)]
    return {"policy": [policy], "critic": critics, "reference": references, "reward": rewards}


def _changed_by_new_adapters(model: Any, adapter: Any, new: bool) -> bool:
    """Whether adapters change the policy from the start, so that its reference is a copy."""
    if not new:  # those in a folder have been trained
        return not isinstance(model, nn.Module) or has_effect(model)
    starts = [v for k, v in vars(adapter).items() if k.startswith("init_") and "weights" in k]
    if not starts and not adapter.is_prompt_learning:
        raise ValueError(
            f"peft_config: whether a new {type(adapter).__name__} changes the policy, so that "
            "Trainer copies a whole reference, cannot be told from it; pass ref_model= to count one"
        )
    changed = not starts or starts[0] in (False, "orthogonal") or rewriting_initialization(adapter)
    return bool(changed) or getattr(adapter, "bias", "none") != "none"


@dataclass
class _Device:
    """One device's share of a run, all sizes in bytes."""

    models: Mapping[str, list[_RoleModel]]
    sizes: Mapping[str, int]
    args: TrainerConfig
    cuda: bool
    processes: int
    sharding: str | None

    def __post_init__(self) -> None:
        self.policy = self.models["policy"][0]
        self.gathers = self.sharding in ("fsdp", "zero3")  # weights, to compute with them
        self.low = self.args.bf16 and self.gathers  # in bfloat16
        text, trained = self.policy.text, self.policy.adapter is None
        self.embedding_gradient = 4 * text.vocab_size * text.hidden_size if trained else 0
        self.saved: dict[Any, tuple[int, int, int]] = {}

    def saved_for_backward(self, model: _RoleModel, rows: int) -> tuple[int, int, int]:
        """Kept for a backward: outside of the layers, in each layer, and between two of them."""
        key = id(model.config), id(model.adapter), model.dtype, model.trained, rows
        if key not in self.saved:
            one, _ = self._forward(model.build(1), rows)
            two, between = self._forward(model.build(2), rows)
            self.saved[key] = 2 * one - two, two - one, between
        return self.saved[key]

    def _forward(self, model: Any, rows: int) -> tuple[int, int]:
        """What a model's forward saves for its backward, and its hidden states."""
        with FakeTensorMode(allow_non_fake_inputs=True):
            memo: dict[int, Any] = {}
            for t in _tensors(model):  # FSDP2 gathers weights in the type it computes in
                dtype = torch.bfloat16 if self.low and t.dtype == torch.float32 else t.dtype
                fake = torch.empty_strided(t.size(), t.stride(), dtype=dtype, device="cpu")
                weight = isinstance(t, nn.Parameter)
                memo[id(t)] = nn.Parameter(fake, t.requires_grad) if weight else fake
            copied = copy.deepcopy(model, memo).train(not self.args.disable_dropout)
            saved: list[Tensor] = []
            hooks = torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: saved[0])
            with hooks, torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
                ids = torch.zeros(rows, self.sizes["length"], dtype=torch.long)
                body: Any = unwrap_peft(copied).base_model
                if attends_to_everything(body.config):  # or transformers makes a mask of fake ids
                    body.config.get_text_config()._attn_implementation = PACKED_ATTENTION
                hidden = body(ids).last_hidden_state
            weights = {id(t.untyped_storage()) for t in _tensors(copied)}
            storages = {id(t.untyped_storage()): t.untyped_storage() for t in saved}
            kept = sum(storage.nbytes() for key, storage in storages.items() if key not in weights)
            return kept, hidden.untyped_storage().nbytes()

    def logits(self, rows: int) -> int:
        """One chunk of logits, in float32."""
        tokens, vocabulary = rows * self.sizes["response"], self.policy.text.vocab_size
        return 4 * vocabulary * next(chunks(tokens, vocabulary, self.cuda)).stop

    def head(self, rows: int, gradients: bool) -> int:
        """A chunk of logits, hidden states, bfloat16 operands and, where asked, gradients."""
        text, logits = self.policy.text, self.logits(rows)
        hidden = 4 * rows * self.sizes["response"] * text.hidden_size
        size = logits + hidden
        if not self.cuda:
            size += 2 * min(MIB, logits)  # the blocks of `kernels.row_stats`
        elif self.args.bf16:
            size += 2 * text.vocab_size * text.hidden_size + (logits // 2 if gradients else 0)
        return size + (hidden + self.embedding_gradient if gradients else 0)

    def casts(self, model: _RoleModel) -> int:
        """What autocast keeps of trained weights for as long as it lasts."""
        matrices = [t for t in model.trained_tensors() if t.dim() > 1]
        return sum(2 * t.numel() for t in matrices) if self.args.bf16 and not self.low else 0

    def kept(self, model: _RoleModel) -> int:
        """What the forward of one micro-batch keeps for its backward."""
        outside, layer, between = self.saved_for_backward(model, self.sizes["updated"])
        return outside + model.text.num_hidden_layers * (
            between if self.args.gradient_checkpointing else layer
        )

    def update(self, model: _RoleModel) -> int:
        """The peak of a forward and backward."""
        _, layer, _ = self.saved_for_backward(model, self.sizes["updated"])
        most = layer // 4 + (layer if self.args.gradient_checkpointing else 0)
        most = max(most, self.head(self.sizes["updated"], True) if model.writes else 0)
        return max(self.kept(model) + most, self.embedding_gradient)

    def scoring(self, name: str) -> int:
        """The peak of scoring one micro-batch by a role's largest model, 0 without one."""
        rows, peaks = self.sizes["reward" if name == "reward" else "scored"], [0]
        for model in self.models[name] or [self.policy] * (name == "reference"):
            _, layer, between = self.saved_for_backward(model, rows)
            most = max(layer // 2, self.head(rows, False) if model.writes else 0)
            peaks.append(self.casts(model) + 2 * between + most)
        return max(peaks)

    def cache_layer(self) -> int:
        """One layer's part of the KV cache."""
        text = self.policy.text
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        # Rotated keys have the type of the hidden states, values that of the products.
        keys = 2 if self.low else self.policy.dtype.itemsize if self.policy.adapter else 4
        values = 2 if self.args.bf16 else keys
        width = self.policy.kv_heads * head * (keys + values)
        return self.sizes["sampled"] * (self.sizes["length"] - 1) * width

    def sampling(self) -> int:
        """The peak of sampling."""
        text, rows, length = self.policy.text, self.sizes["sampled"], self.sizes["length"]
        cache = self.cache_layer() * self.policy.text.num_hidden_layers
        _, layer, _ = self.saved_for_backward(self.policy, self.sizes["scored"])
        token = layer // (2 * self.sizes["scored"] * length)
        prompts = self.sizes["prompt"] * (token * rows + cache // length)
        groups = text.num_attention_heads // self.policy.kv_heads  # a layer is repeated for all
        last = cache + (self.cache_layer() * groups if groups > 1 else 0)
        logits = 5 * 4 * rows * text.vocab_size  # and what becomes of them
        return self.casts(self.policy) + logits + max(prompts, last)

    def part(self, size: int) -> int:
        return -(-size // self.processes) if self.sharding else size

    def gathered(self, layers: int | None = None) -> int:
        """Weights of the policy that are gathered at once: what is in no layer, and some layers."""
        outside, every, largest = self.policy.parts if self.gathers else (0, 0, 0)
        size = outside + (every if layers is None else layers * largest)
        return size // (2 if self.args.bf16 else 1)

    def role(self, name: str) -> tuple[RoleMemory, int]:
        """What a role holds throughout, and what comes to the device only while it scores."""
        members, lent = self.models[name], 0
        absent = {"critic": "none", "reference": "the policy, adapters off", "reward": "none given"}
        own = [t for model in members for t in model.own_tensors()]
        trained = [t for model in members for t in model.trained_tensors()]
        weights, gradients = _nbytes(own), _nbytes(trained)
        alone = [model for model in members if not (trained or model.shares)]
        note = "on the policy's base" if any(model.shares for model in members) else ""
        if self.args.offload_frozen and not self.gathers and self.cuda and alone:
            lent = sum(_nbytes(model.own_tensors()) for model in alone)
            weights, note = weights - lent, "on the CPU until it scores"
        # FSDP2 leaves what is in no layer of a frozen model whole.
        whole = sum(model.parts[0] for model in alone) if self.sharding == "fsdp" else 0
        if self.gathers and name == "reward" and members:
            shared = self.gathered() if len(alone) < len(members) else 0
            lent = sum(sum(model.parts[:2]) for model in alone) - whole + shared
        # Two moments and a count of steps; DeepSpeed has a float32 copy of the weights as well.
        states = (2 if self.sharding in (None, "fsdp") else 3) * gradients + 4 * len(trained)
        return RoleMemory(
            parameters=sum(t.numel() for t in own if isinstance(t, nn.Parameter)),
            trained=sum(t.numel() for t in trained),
            weights=whole + self.part(weights - whole) if self.gathers else weights,
            gradients=self.part(gradients),
            optimizer=self.part(states),
            note=note if members else absent[name],
        ), lent

    def memory(self) -> dict[str, Any]:
        """The fields of a `MemoryPlan` that are bytes."""
        both = {name: self.role(name) for name in self.models}
        roles = {name: role for name, (role, _) in both.items()}
        lent = {name: size for name, (_, size) in both.items() if size}
        trained = {name: self.models[name][0] for name in ("critic", "policy") if self.models[name]}
        gradients = [_nbytes(model.trained_tensors()) for model in trained.values()]
        several = self.sizes["minibatch"] > self.sizes["updated"]
        extra = self.gathered(2)
        if self.sharding == "fsdp":  # a role's gradient is whole until the last micro-batch
            extra += max(gradients) if several else 0
        elif self.processes > 1:
            extra += min(sum(gradients), ZERO_BUCKET) if self.sharding else sum(gradients)
        before = update = 0
        for name, model in trained.items():
            mine, activations = roles[name].gradients, self.update(model)
            twice = name == "policy" and model.config.tie_word_embeddings  # has two gradients
            most = max(mine + (self.embedding_gradient if twice else 0), activations)
            update = max(update, before + (mine + activations if several else most))
            before += mine
        scoring = {name: size for name in self.models if (size := self.scoring(name))}
        held = sum(role.weights + role.optimizer for role in roles.values())
        held += 0 if self.sharding else extra  # DDP's buckets are there from the start
        others = max(size for name, size in scoring.items() if name != "reward")
        others += lent.get("reference", 0) + self.gathered(2)
        scored = max(scoring.get("reward", 0) + lent.get("reward", 0), others)
        rollout = self.sizes["bytes"]
        sizes = {
            "kept": {name: self.kept(model) for name, model in trained.items()},
            "kv_cache": self.cache_layer() * self.policy.text.num_hidden_layers,
            "logits": self.logits(self.sizes["updated"]),
            "rollout": rollout,
        }
        phases = {
            "sampling": held + self.sampling() + self.gathered(),
            "scoring": held + rollout + scored,
            "update": held + rollout + update + (extra if self.sharding else 0),
        }
        return dict(roles=roles, lent=lent, scoring=scoring, extra=extra, phases=phases, **sizes)


def _suggestion(plan: MemoryPlan, memory: float) -> str:
    """What to change, planned one change after the other, those that change least first."""
    made: dict[str, str] = {}
    current = plan
    while not current.fits(memory):
        for words, changed in _changes(current, memory):
            trial = current.again(**changed)
            if trial.phases[current.peak_phase] < 0.99 * current.peak:
                made[re.sub(r"\d+", "", words)], current = words, trial  # of each kind the last
                break
        else:
            break
    room, peak = _gib(memory), f"the peak ({current.peak_phase}) is {_gib(current.peak)}"
    *first, last = made.values() or ("no change",)
    listed = f"{', '.join(first)} and {last}" if first else last
    if not current.fits(memory):
        peak += "; take a smaller model, shorter responses or larger devices"
        return f"Nothing tried here makes it fit {room}: with {listed} {peak}."
    return f"To fit {room}, {listed}: then {peak}." if made else f"It fits {room}: {peak}."


def _gib(size: float) -> str:
    return f"{size / GIB:.3g} GiB" if size >= GIB else f"{size / MIB:.3g} MiB"


def _changes(plan: MemoryPlan, memory: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes that may lower the peak, in words and as arguments of `plan`."""
    given, sizes, phase = plan.planned.keywords, plan.sizes, plan.peak_phase
    args, sampler = given["args"] or TrainerConfig(), given["sampler"]

    def option(**changed: Any) -> tuple[str, dict[str, Any]]:
        words = f"set TrainerConfig({', '.join(f'{k}={v}' for k, v in changed.items())})"
        return words, dict(args=replace(args, **changed), frozen=None)

    if plan.steady < memory:  # or smaller batches would be of no use yet
        if phase == "sampling" and (size := sizes["sampled"] // 2):
            config = getattr(sampler, "generation_config", given["generation_config"])
            config = config or GenerationConfig(max_new_tokens=sizes["response"])
            known: Any = dict(generation_config=config, eos_token_id=0, pad_token_id=0)
            words = f"sample {size} responses at a time (HFSampler(batch_size={size}))"
            yield words, dict(sampler=HFSampler(**known, batch_size=size))
        if phase != "sampling" and (size := max(sizes["updated"], sizes["scored"]) // 2):
            yield option(micro_batch_size=size)
        if phase == "update" and not args.gradient_checkpointing:
            yield option(gradient_checkpointing=True)
    if not args.offload_frozen and given["sharding"] not in ("fsdp", "zero3"):
        yield option(offload_frozen=True)
    if given["peft_config"] is None and not isinstance(given["critic"], nn.Module):
        lora = LoraConfig(r=16, target_modules="all-linear", lora_dropout=0.0)
        words = 'peft_config and critic: LoraConfig(r=16, target_modules="all-linear")'
        words = f"train adapters on one base ({words})"
        yield words, dict(peft_config=lora, critic=lora)
    elif given["dtype"] is None:
        yield "load the base in bfloat16 (dtype=torch.bfloat16)", dict(dtype=torch.bfloat16)
    for count in (2, 4, 8, 16, 32, 64):
        shares = args.rollout_size % (count * args.samples_per_prompt) == 0
        if count > given["processes"] and shares and args.minibatch_size % count == 0:
            changed = dict(processes=count, sharding="fsdp", frozen=None)
            yield f"share it among {count} devices (FSDP2)", changed
