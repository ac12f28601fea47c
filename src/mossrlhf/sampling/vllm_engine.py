"""The vLLM engine. None of it has been run against vLLM itself."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from mossrlhf.sampling.engines import Completion, SamplingSettings

RECEIVER = "mossrlhf.sampling.vllm_engine.WeightReceiver"
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
