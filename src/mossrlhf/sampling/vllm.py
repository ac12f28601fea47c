"""`VLLMSampler`: an inference engine with the policy's current weights."""

import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from mossrlhf.models.lora import (
    adapter_layers,
    bare_module,
    checksums,
    merged_state_dict,
    unwrap_peft,
)
from mossrlhf.options import strict
from mossrlhf.sampling.base import (
    ConfiguredSampler,
    assemble,
    departures,
    require_prompts,
    require_supported,
    unwrap_layer_adapters,
)
from mossrlhf.types import Rollout


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How an engine samples; neither its own nor a checkpoint's defaults apply.

    Args:
        temperature: 0 for the likeliest token each time.
        top_p: in (0, 1]; 1 for all tokens.
        top_k: 0 for all tokens.
        min_p: 0 for all tokens.
        repetition_penalty: 1 for none.
        max_new_tokens: length limit, in tokens.
        ends: the only token ids that end a response, as the last one.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    max_new_tokens: int
    ends: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One response of an engine.

    Args:
        token_ids: up to and including the end token.
        logprobs: of each token, nats; None if the engine returned none.
        finish_reason: "stop" for an end token, "length" for the limit; anything else is an error.
    """

    token_ids: list[int]
    logprobs: list[float] | None
    finish_reason: str | None


@runtime_checkable
class Engine(Protocol):
    """Generates responses with weights of its own."""

    @property
    def vocabulary(self) -> int | None:
        """Vocabulary size; None if unknown."""

    @property
    def processed_logprobs(self) -> bool:
        """Whether log-probs are of the sampled distribution, after temperature, top-p …"""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load all weights of a policy, named as in its checkpoint."""

    def reset_prefix_cache(self) -> None:
        """Drop keys and values of earlier weights."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings,
        seeds: Sequence[int],
    ) -> list[Completion]:
        """Generate one response for each of B prompts (token ids), each with its own seed."""


class Synchronizer:
    """Sends a policy's weights to an engine whenever they differ from those sent last.

    Changes are detected by the sum of each weight's bits, computed on its device, and by torch's
    counters of in-place changes, which optimizers may bypass (DeepSpeed does). Adapters that were
    switched on or off are seen too. `times` counts the transfers.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.times = 0
        self._sent: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.engine!r}, times={self.times})"

    def __call__(self, model: nn.Module) -> bool:
        """Send the weights of a model, with or without adapters; return whether that was needed."""
        current = weight_checksums(model)
        if current == self._sent:
            return False
        self._sent = None  # if sending fails, the engine may hold some of both
        self.engine.load_weights(checkpoint_weights(model).items())
        self.engine.reset_prefix_cache()
        self._sent, self.times = current, self.times + 1
        return True


def weight_checksums(model: nn.Module) -> dict[str, Any]:
    """Return what changes along with a model's weights or its active adapters, by name."""
    state: dict[str, Tensor] = unwrap_peft(model).state_dict()
    sums = checksums(state)
    found: dict[str, Any] = {
        name: (None if weight.is_inference() else weight._version, sums.get(name))
        for name, weight in state.items()
    }
    for index, layer in enumerate(adapter_layers(model)):
        adapters = bool(layer.disable_adapters), tuple(layer.active_adapters)
        found[f"adapters of {index}"] = (*adapters, repr(getattr(layer, "scaling", None)))
    return found


def checkpoint_weights(model: nn.Module) -> Mapping[str, Tensor]:
    """Return weights as ``save_pretrained`` names them: adapters merged, tied ones once.

    Source: LoRA §4.1: W + (α/r) B A.
    """
    base: Any = unwrap_peft(model)
    seen: set[tuple[Any, ...]] = set()
    state: dict[str, Tensor] = {}
    for name, weight in merged_state_dict(base).items():
        place = (weight.device, weight.data_ptr(), weight.shape)
        if weight.numel() and place in seen:
            continue
        seen.add(place)
        state[name] = weight
    if not isinstance(base, PreTrainedModel):
        return state
    reverted: dict[str, Tensor] = revert_weight_conversion(base, state)  # of experts, for one
    return reverted


RECEIVER = "mossrlhf.sampling.vllm.WeightReceiver"
"""Value of ``vllm.LLM(worker_extension_cls=)`` by which weights reach its workers."""

CHUNK_BYTES = 2**30
"""Approximate size of the files that weights are sent in."""


class WeightReceiver:
    """Extension of vLLM's workers, each of which takes its share of every weight.

    Source: ``worker_extension_cls`` in vLLM's examples of RLHF.
    """

    model_runner: Any

    def load_policy_weights(self, file: str) -> int:
        """Load a safetensors file into the worker's model; return the number of weights."""
        weights = load_file(file)
        self.model_runner.model.load_weights(list(weights.items()))
        return len(weights)


class VLLMEngine:
    """Generates with a ``vllm.LLM``, and sends it weights.

    **Tested against a stand-in only, never against vLLM itself.** It uses vLLM's ``generate``,
    ``collective_rpc`` with a method's name, ``reset_prefix_cache``, ``SamplingParams``, and in the
    workers ``model_runner.model.load_weights``. Weights are sent as safetensors files: nothing is
    pickled, and workers may be processes. Workers on several machines must share `folder`.
    Engines with quantized weights cannot take new ones this way.

    Args:
        llm: a ``vllm.LLM(worker_extension_cls=RECEIVER, logprobs_mode="processed_logprobs", …)``.
        folder: for those files; None for the system's temporary one. In memory (``/dev/shm``, if
            it is large enough) it is faster.

    Source: vLLM's documentation of RLHF.
    """

    def __init__(self, llm: Any, folder: str | Path | None = None) -> None:
        self.llm = llm
        self.folder = folder

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.llm).__name__})"

    @classmethod
    def load(cls, model: str, folder: str | Path | None = None, **options: Any) -> "VLLMEngine":
        """Build the engine.

        Args:
            model: folder or hub name of the checkpoint the policy starts from.
            folder: as above.
            options: of ``vllm.LLM``: ``gpu_memory_utilization``, ``max_model_len`` …

        Raises:
            ImportError: if vLLM is not installed.
        """
        needed = {
            "worker_extension_cls": RECEIVER,
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",  # none of the checkpoint's own
        }
        return cls(_vllm().LLM(model=model, **{**needed, **options}), folder)

    @property
    def vocabulary(self) -> int | None:
        """Vocabulary size; None if vLLM does not report it."""
        size = getattr(self._model_config, "get_vocab_size", None)
        return None if size is None else int(size())

    @property
    def processed_logprobs(self) -> bool:
        """Whether log-probs are of the sampled distribution; vLLM's default is of raw logits."""
        mode = getattr(self._model_config, "logprobs_mode", None)
        return str(getattr(mode, "value", mode)) == "processed_logprobs"

    @property
    def _model_config(self) -> Any:
        engine = getattr(self.llm, "llm_engine", None)
        own = getattr(engine, "model_config", None)
        return own or getattr(getattr(engine, "vllm_config", None), "model_config", None)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Send all workers the weights of a policy.

        Args:
            weights: name in the checkpoint and whole tensor, on any device.

        Raises:
            RuntimeError: if the workers cannot load them.
        """
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="mossrlhf-weights-") as folder:
            for index, chunk in enumerate(_chunks(weights)):
                file = Path(folder) / f"{index}.safetensors"
                save_file(chunk, file)
                try:
                    self.llm.collective_rpc("load_policy_weights", args=(str(file),))
                except Exception as error:  # vLLM documents no type
                    raise RuntimeError(
                        f"engine: its workers did not take the policy's weights ({error!r:.300}); "
                        "build it by VLLMEngine.load, or as "
                        f"vllm.LLM(..., worker_extension_cls={RECEIVER!r}), of the checkpoint the "
                        "policy starts from"
                    ) from error
                file.unlink()

    def reset_prefix_cache(self) -> None:
        """Drop keys and values of earlier weights."""
        self.llm.reset_prefix_cache()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings,
        seeds: Sequence[int],
    ) -> list[Completion]:
        """Generate one response for each prompt.

        Args:
            prompts: B lists of token ids.
            settings: how to sample.
            seeds: B, since equal prompts would have equal responses otherwise.
        """
        make = _vllm().SamplingParams
        params = [make(**sampling_params(settings), seed=seed) for seed in seeds]
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self.llm.generate(inputs, params, use_tqdm=False)
        return [_completion(output.outputs[0]) for output in outputs]


def sampling_params(settings: SamplingSettings) -> dict[str, Any]:
    """Return all arguments of vLLM's ``SamplingParams`` but the seed."""
    if 0 < settings.temperature < 0.01:
        raise ValueError(
            f"generation_config: temperature = {settings.temperature}, expected at least 0.01, to "
            "which vLLM raises it; for the likeliest token each time set do_sample=False"
        )
    return {
        "n": 1,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k or -1,  # all tokens: some releases take 0 for that too, some do not
        "min_p": settings.min_p,
        "repetition_penalty": settings.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": settings.max_new_tokens,
        "min_tokens": 0,
        "stop": None,
        "stop_token_ids": list(settings.ends),
        "ignore_eos": True,  # or the checkpoint's own end tokens would be added
        "logprobs": 0,  # of the sampled token alone
        "prompt_logprobs": None,
        "detokenize": False,
    }


def _completion(output: Any) -> Completion:
    tokens, logprobs = [int(token) for token in output.token_ids], None
    if output.logprobs is not None:
        pairs = zip(tokens, output.logprobs, strict=True)
        logprobs = [float(known[token].logprob) for token, known in pairs]
    return Completion(token_ids=tokens, logprobs=logprobs, finish_reason=output.finish_reason)


def _chunks(weights: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    chunk: dict[str, Tensor] = {}
    size = 0
    for name, weight in weights:
        if chunk and size + weight.nbytes > CHUNK_BYTES:
            yield chunk
            chunk, size = {}, 0
        chunk[name] = weight.detach().to("cpu").contiguous()
        size += weight.nbytes
    if chunk:
        yield chunk


def _vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise ImportError(
            'VLLMEngine needs vLLM: pip install "mossrlhf[vllm]"; or use HFSampler or '
            "ContinuousSampler, which need no extra package"
        ) from error
    return vllm


_BACKEND = "the engine"

SUPPORTED = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Fields that engines follow."""


@strict
@dataclass(frozen=True, kw_only=True)
class VLLMSampler(ConfiguredSampler):
    """Generates responses with a vLLM engine, whose weights follow the policy's.

    **Tested against a stand-in engine only, never against vLLM itself.**

    Before generating, the engine receives the model's weights if they differ from those it has,
    adapters merged in, and drops its prefix cache. Every sampled response has log-probs; their
    difference from those of the policy is logged (``sampler/…``), and
    `PPOMaxLoss.sampler_ratio_cap` weights for it. Every process of a trainer needs an engine of
    its own. Samples follow from torch's generator, by a seed for each prompt.

    Args:
        engine: a `VLLMEngine`, or any `Engine`.
        generation_config: as for `HFSampler`; of the fields that change the distribution only
            temperature, top-k, top-p, min-p and repetition penalty.
        eos_token_id: token(s) that end a response.
        pad_token_id: any id of the vocabulary; masks come from lengths.

    Raises:
        TypeError: if the engine lacks a member of `Engine`.
        ValueError: as `HFSampler`, and if the engine would ignore a field.

    Source: the engine: Kwon et al. (arXiv 2309.06180).
    """

    engine: Engine
    synchronizer: Synchronizer = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.engine, Engine):
            raise TypeError(
                f"engine: got {self.engine!r:.60}, expected VLLMEngine(llm) around a vllm.LLM, or "
                "an object with load_weights, reset_prefix_cache, generate, vocabulary and "
                "processed_logprobs"
            )
        super().__post_init__()
        config = self.effective
        require_supported(config, SUPPORTED, _BACKEND)
        if config.do_sample and config.top_p == 0:
            raise ValueError(
                "generation_config: top_p = 0, expected a number in (0, 1]; for the likeliest "
                "token each time set do_sample=False"
            )
        object.__setattr__(self, "synchronizer", Synchronizer(self.engine))

    @classmethod
    def for_tokenizer(
        cls, tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig, engine: Engine
    ) -> "VLLMSampler":
        """Take the end and padding tokens that the config leaves open from a tokenizer.

        Args: those of `VLLMSampler`; a tokenizer without a padding token pads with eos.
        """
        return cls._for_tokenizer(tokenizer, generation_config, engine=engine)

    @classmethod
    def load(
        cls,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        generation_config: GenerationConfig,
        **options: Any,
    ) -> "VLLMSampler":
        """Build a vLLM engine along with the sampler.

        Args:
            model: folder or hub name of the checkpoint the policy starts from.
            tokenizer: as for `for_tokenizer`.
            generation_config: as for `for_tokenizer`.
            options: of ``vllm.LLM``: ``gpu_memory_utilization``, ``max_model_len`` …

        Raises:
            ImportError: if vLLM is not installed.
        """
        return cls.for_tokenizer(tokenizer, generation_config, VLLMEngine.load(model, **options))

    @property
    def settings(self) -> SamplingSettings:
        """How the engine samples."""
        config = self.effective
        return SamplingSettings(
            temperature=float(config.temperature) if config.do_sample else 0.0,
            top_p=float(config.top_p) if config.do_sample else 1.0,
            top_k=int(config.top_k) if config.do_sample else 0,
            min_p=float(config.min_p or 0.0) if config.do_sample else 0.0,
            repetition_penalty=float(config.repetition_penalty),
            max_new_tokens=self.max_new_tokens,
            ends=self.ends,
        )

    def __call__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> Rollout:
        """Generate one response for each prompt with the current weights; Args: those of `Sampler`.

        Raises:
            ValueError: if there is no prompt, or an empty one, or the engine has another
                vocabulary, or returns anything but one response to each prompt, with its
                log-probs.
            RuntimeError: if the engine aborts a response, or does not load the weights.
        """
        require_prompts(prompts)
        self._require_same_vocabulary(model)
        self.synchronizer(model)
        seeds = torch.randint(2**31 - 1, (len(prompts),)).tolist()
        completions = self.engine.generate(prompts, self.settings, seeds)
        self._require_complete(completions, len(prompts))
        return assemble(
            prompts,
            [one.token_ids for one in completions],
            # At the limit the last token may be an end token too.
            [bool(one.token_ids) and one.token_ids[-1] in self.ends for one in completions],
            pad_token_id=self.pad_token_id,
            device=next(model.parameters()).device,
            logprobs=self._logprobs(completions) if self.effective.do_sample else None,
        )

    def _require_same_vocabulary(self, model: nn.Module) -> None:
        base: Any = unwrap_layer_adapters(model, _BACKEND)
        embedding: Any = bare_module(base.get_input_embeddings())
        known, own = self.engine.vocabulary, embedding.num_embeddings
        if known is not None and known != own:
            raise ValueError(
                f"engine: it chooses among {known} tokens, the model among {own}, so its tokens "
                "are others; build it of the checkpoint the policy starts from"
            )

    def _require_complete(self, completions: Sequence[Completion], count: int) -> None:
        if len(completions) != count:
            raise ValueError(
                f"engine: returned {len(completions)} responses to {count} prompts, expected one "
                "to each, in their order"
            )
        for index, one in enumerate(completions):
            if one.finish_reason not in ("stop", "length"):
                raise RuntimeError(
                    f"engine: broke response {index} off (finish_reason={one.finish_reason!r}); "
                    "see its log"
                )
            tokens = one.token_ids
            stopped = one.finish_reason == "stop"
            if len(tokens) > self.max_new_tokens or (
                stopped and (not tokens or tokens[-1] not in self.ends)
            ):
                raise ValueError(
                    f"engine: response {index} ({len(tokens)} tokens, finish_reason="
                    f"{one.finish_reason!r}) ends with {tokens[-1:]}, expected one of "
                    f"{list(self.ends)} as its last token, or {self.max_new_tokens} tokens"
                )

    def _logprobs(self, completions: Sequence[Completion]) -> list[list[float]] | None:
        """Return log-probs of the sampled distribution; None, with a warning, if of another."""
        found = [one.logprobs for one in completions if one.logprobs is not None]
        if len(found) < len(completions):
            raise ValueError(
                f"engine: returned no log-probabilities for {len(completions) - len(found)} of "
                f"{len(completions)} responses, expected one for each token; without them its "
                "mismatch with the policy could not be seen"
            )
        given = departures(self.effective).items()
        changed = [f"{n}={value}" for n, value in given if n != "do_sample"]
        if not changed or self.engine.processed_logprobs:
            return found
        if not vars(self).get("_warned"):
            vars(self)["_warned"] = True
            values = [value for known in found for value in known]
            warnings.warn(
                f"engine: its log-probabilities (mean {sum(values) / len(values):.3f} nats over "
                f"{len(values)} tokens) are of the raw logits, but responses are sampled with "
                f"{', '.join(changed)}, so they are not those of the sampled distribution and are "
                "left out: sampler/logprob_gap_nats is not logged, and "
                "PPOMaxLoss(sampler_ratio_cap=) weights nothing. Build the engine with "
                'logprobs_mode="processed_logprobs", as VLLMEngine.load does',
                UserWarning,
                stacklevel=3,
            )
        return None
