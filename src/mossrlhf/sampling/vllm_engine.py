"""All that is known here of vLLM's interface. Nothing of it has been run against vLLM itself."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from mossrlhf.sampling.engines import Asked, Drawn

RECEIVER = "mossrlhf.sampling.vllm_engine.WeightReceiver"
"""What ``vllm.LLM(worker_extension_cls=)`` must be, for weights to reach its workers."""

CHUNK_BYTES = 2**30
"""Weights are handed over in files of about this size."""


class WeightReceiver:
    """Mixed into vLLM's workers, each of which takes its share of every weight.

    Source: vLLM's ``worker_extension_cls``, as its examples of RLHF use it.
    """

    model_runner: Any

    def load_policy_weights(self, file: str) -> int:
        """Put the weights of a safetensors file into the worker's model; return how many."""
        weights = load_file(file)
        self.model_runner.model.load_weights(list(weights.items()))
        return len(weights)


class VLLMEngine:
    """Asks a ``vllm.LLM`` for responses, and gives it weights.

    **Tested against a stand-in only, never against vLLM itself.** Of vLLM it takes ``generate``,
    ``collective_rpc`` with a method's name, ``reset_prefix_cache``, ``SamplingParams``, and in the
    workers ``model_runner.model.load_weights``. Weights travel as safetensors files, so nothing is
    pickled and workers may be processes; on several machines `folder` must be shared by them.
    Engines of quantized weights cannot take new ones so.

    Args:
        llm: a ``vllm.LLM(worker_extension_cls=RECEIVER, logprobs_mode="processed_logprobs", …)``.
        folder: where weights are handed over; None for the system's temporary one. In memory
            (``/dev/shm``, where it is large enough) it is faster.

    Source: ours; vLLM's documentation of RLHF.
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
            ImportError: where vLLM is not installed.
        """
        needed = {
            "worker_extension_cls": RECEIVER,
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",  # none of the checkpoint's own
        }
        return cls(_vllm().LLM(model=model, **{**needed, **options}), folder)

    @property
    def vocabulary(self) -> int | None:
        """Tokens it chooses among; None where vLLM does not say."""
        size = getattr(self._model_config, "get_vocab_size", None)
        return None if size is None else int(size())

    @property
    def processed_logprobs(self) -> bool:
        """Whether log-probabilities are of what was drawn from; vLLM's default is of raw logits."""
        mode = getattr(self._model_config, "logprobs_mode", None)
        return str(getattr(mode, "value", mode)) == "processed_logprobs"

    @property
    def _model_config(self) -> Any:
        engine = getattr(self.llm, "llm_engine", None)
        own = getattr(engine, "model_config", None)
        return own or getattr(getattr(engine, "vllm_config", None), "model_config", None)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Give all workers weights by their names in the checkpoint.

        Args:
            weights: name and tensor, whole, on any device.

        Raises:
            RuntimeError: where the workers cannot take them.
        """
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="mossrlhf-weights-") as folder:
            for index, chunk in enumerate(_chunks(weights)):
                file = Path(folder) / f"{index}.safetensors"
                save_file(chunk, file)
                try:
                    self.llm.collective_rpc("load_policy_weights", args=(str(file),))
                except Exception as error:  # of whatever kind vLLM makes of it
                    raise RuntimeError(
                        f"engine: its workers did not take the policy's weights ({error!r:.300}); "
                        "build it by VLLMEngine.load, or as "
                        f"vllm.LLM(..., worker_extension_cls={RECEIVER!r}), of the checkpoint the "
                        "policy starts from"
                    ) from error
                file.unlink()

    def reset_prefix_cache(self) -> None:
        """Forget keys and values of earlier weights."""
        self.llm.reset_prefix_cache()

    def generate(
        self, prompts: Sequence[Sequence[int]], asked: Asked, seeds: Sequence[int]
    ) -> list[Drawn]:
        """Draw one response for each prompt.

        Args:
            prompts: B lists of token ids.
            asked: how to draw.
            seeds: B, since equal prompts would have equal responses otherwise.
        """
        make = _vllm().SamplingParams
        params = [make(**sampling_params(asked), seed=seed) for seed in seeds]
        texts = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self.llm.generate(texts, params, use_tqdm=False)
        return [_drawn(output.outputs[0]) for output in outputs]


def sampling_params(asked: Asked) -> dict[str, Any]:
    """Return vLLM's ``SamplingParams`` in full, seed apart.

    Args:
        asked: how to draw.

    Raises:
        ValueError: where vLLM would draw at another temperature than the one asked for.

    Source: vLLM's documentation.
    """
    if 0 < asked.temperature < 0.01:
        raise ValueError(
            f"generation_config: temperature = {asked.temperature}, expected at least 0.01, to "
            "which vLLM raises it; for the likeliest token each time set do_sample=False"
        )
    return {
        "n": 1,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.top_k or -1,  # releases differ in whether 0 is taken for all; -1 is by each
        "min_p": asked.min_p,
        "repetition_penalty": asked.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": asked.max_new_tokens,
        "min_tokens": 0,
        "stop": None,
        "stop_token_ids": list(asked.ends),
        "ignore_eos": True,  # or the checkpoint's own ends would join those asked for
        "logprobs": 0,  # of the drawn token alone
        "prompt_logprobs": None,
        "detokenize": False,
    }


def _drawn(completion: Any) -> Drawn:
    tokens, logprobs = [int(token) for token in completion.token_ids], None
    if completion.logprobs is not None:
        pairs = zip(tokens, completion.logprobs, strict=True)
        logprobs = [float(known[token].logprob) for token, known in pairs]
    return Drawn(token_ids=tokens, logprobs=logprobs, finish_reason=completion.finish_reason)


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
            'VLLMEngine needs vLLM: pip install "mossrlhf[vllm]"; or draw with HFSampler or '
            "ContinuousSampler, which do without"
        ) from error
    return vllm
