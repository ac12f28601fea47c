"""Samplers and generation configs whose responses could not be trained on."""

import torch
from transformers import GenerationConfig

from bad_inputs.room import Room
from bad_inputs.shop import WORLD
from mossrlhf import ContinuousSampler, HFSampler, VLLMSampler
from mossrlhf.sampling import Completion, assemble
from mossrlhf.types import Rollout

room = Room("Samplers")
row = room.row


def sampler(batch_size=None, **options):
    config = GenerationConfig(**{"max_new_tokens": 4, **options})
    return HFSampler.for_tokenizer(WORLD.tokenizer(), config, batch_size)


def config(given, gets, **options):
    """A row on a generation config."""
    row(given, gets, lambda shop: shop.trainer(
        generation_config=GenerationConfig(**{"max_new_tokens": 4, **options})
    ).collect())  # fmt: skip


class Odd:
    """A sampler of one's own whose responses are changed before they are handed out."""

    temperature, max_new_tokens = 1.0, 4

    def __init__(self, change):
        self.change = change

    def __call__(self, model, prompts):
        return self.change(sampler()(model, prompts))


class Told:
    """An engine of one's own that returns what it is told to."""

    processed_logprobs = True

    def __init__(self, drawn=(), vocabulary=None):
        self.drawn, self.vocabulary = list(drawn), vocabulary

    def load_weights(self, weights):
        list(weights)

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, asked, seeds):
        return self.drawn


def by_engine(engine, **options):
    config = GenerationConfig(**{"max_new_tokens": 4, "do_sample": True, **options})
    return VLLMSampler.for_tokenizer(WORLD.tokenizer(), config, engine)


def continuous(**options):
    config = GenerationConfig(**{"max_new_tokens": 4, "do_sample": True, **options})
    return ContinuousSampler.for_tokenizer(WORLD.tokenizer(), config)


def drawn(tokens, logprobs=None, finish_reason="length"):
    return Completion(token_ids=tokens, logprobs=logprobs, finish_reason=finish_reason)


def joined(shop):
    """A rollout beside itself, scored."""
    trainer = shop.trainer()
    rollout = trainer.collect()
    return Rollout.concat([rollout, trainer.score(rollout)])


config(
    "no length of a response",
    "ValueError: generation_config: max_new_tokens is None; say how long a response may become",
    max_new_tokens=None,
)
config(
    "beams",
    "ValueError: generation_config: num_beams = 2, expected 1",
    num_beams=2,
)
config(
    "several sequences per prompt",
    "ValueError: generation_config: num_return_sequences = 2, expected 1; for several responses to "
    "a prompt set TrainerConfig.samples_per_prompt",
    num_return_sequences=2,
    do_sample=True,
)
config(
    "stop strings",
    "ValueError: generation_config: stop_strings = '.', expected None: a response ends with a "
    "token",
    stop_strings=".",
)
config(
    "an empty list of end tokens",
    "ValueError: eos_token_id: got none, expected at least one token that ends a response",
    eos_token_id=[],
)
config(
    "a temperature of 0 while sampling",
    "ValueError: generation_config: temperature = 0.0, expected a number above 0; for the "
    "likeliest "
    "token each time set do_sample=False",
    do_sample=True,
    temperature=0.0,
)
config(
    "a negative temperature",
    "ValueError: generation_config: temperature = -1.0, expected a number above 0",
    do_sample=True,
    temperature=-1.0,
)
config(
    "a top-p above 1",
    "ValueError: generation_config: top_p = 1.5, expected a number in [0, 1]",
    do_sample=True,
    top_p=1.5,
)
config(
    "more new tokens than the model's context holds",
    "ValueError: max_prompt_length: None prompt tokens and max_new_tokens=300 do not fit into the "
    "model's context of 256; lower one of them",
    max_new_tokens=300,
)
row(
    "a sampler and a generation config",
    "ValueError: generation_config: got one beside a sampler, which has its own; give it to "
    "the sampler instead",
    lambda shop: shop.trainer(sampler=sampler(), generation_config=GenerationConfig()),
)
row(
    "a dict for a generation config",
    "TypeError: generation_config: got {'max_new_tokens': 4}, expected GenerationConfig(...)",
    lambda shop: shop.trainer(generation_config={"max_new_tokens": 4}),
)
row(
    "a batch size of 0",
    "ValueError: HFSampler(batch_size=): got 0, expected a number in [1, inf]",
    lambda shop: sampler(batch_size=0),
)
row(
    "no prompts",
    "ValueError: prompts: got 0, of which [] are empty; expected at least one",
    lambda shop: sampler()(shop.policy(), []),
)
row(
    "a prompt without tokens",
    "ValueError: prompts: got 2, of which [1] are empty; expected at least one, and at least one "
    "token in each",
    lambda shop: sampler()(shop.policy(), [[5], []]),
)
row(
    "a function without a temperature",
    "TypeError: sampler: got <function …>, expected an HFSampler, or an object with temperature "
    "and "
    "max_new_tokens that is called with (model, prompts) and returns a Rollout",
    lambda shop: shop.trainer(sampler=lambda model, prompts: None),
)
row(
    "a class for a sampler",
    "TypeError: sampler: got the class HFSampler, expected HFSampler(...)",
    lambda shop: shop.trainer(sampler=HFSampler),
)
row(
    "a sampler of one's own that returns texts",
    "TypeError: sampler: Odd returned list, expected a Rollout",
    lambda shop: shop.trainer(sampler=Odd(lambda rollout: ["a"] * 8)).collect(),
)
row(
    "a sampler of one's own that loses a response",
    "ValueError: sampler: Odd returned 7 responses to 8 prompts, expected one to each",
    lambda shop: shop.trainer(
        sampler=Odd(lambda rollout: rollout.select(torch.arange(7)))
    ).collect(),
)
row(
    "rollouts that are not filled in alike, joined",
    "ValueError: rollouts: scores is filled in 1 of 2 rollouts; bring all of them through the same "
    "stages before joining them",
    joined,
)
row(
    "a repetition penalty for continuous batching",
    "ValueError: generation_config: repetition_penalty = 1.2, expected 1.0: continuous batching "
    "would pass over it; leave it out, or use HFSampler",
    lambda shop: continuous(repetition_penalty=1.2),
)
row(
    "a prompt without tokens for continuous batching",
    "ValueError: prompts: got 2, of which [1] are empty",
    lambda shop: continuous()(shop.policy(), [[5], []]),
)
row(
    "something that is no engine",
    "TypeError: engine: got 3, expected VLLMEngine(llm) around a vllm.LLM, or an object with "
    "load_weights, reset_prefix_cache, generate, vocabulary and processed_logprobs",
    lambda shop: by_engine(3),
)
row(
    "an engine of another vocabulary",
    "ValueError: engine: it chooses among 7 tokens, the model among … build it of the checkpoint "
    "the policy starts from",
    lambda shop: by_engine(Told(vocabulary=7))(shop.policy(), [[5]]),
)
row(
    "an engine that loses a response",
    "ValueError: engine: returned 1 responses to 2 prompts, expected one to each, in their order",
    lambda shop: by_engine(Told([drawn([4], [-1.0])]))(shop.policy(), [[5], [6]]),
)
row(
    "an engine without log-probabilities",
    "ValueError: engine: returned no log-probabilities for 1 of 1 responses",
    lambda shop: by_engine(Told([drawn([4])]))(shop.policy(), [[5]]),
)
row(
    "an engine that gives up",
    "RuntimeError: engine: broke response 0 off (finish_reason='abort')",
    lambda shop: by_engine(Told([drawn([4], [-1.0], "abort")]))(shop.policy(), [[5]]),
)
row(
    "a field that the engine does not know",
    "ValueError: generation_config: typical_p = 0.9, expected 1.0: the engine would pass over it",
    lambda shop: by_engine(Told(), typical_p=0.9),
)
row(
    "a response without tokens, to be assembled",
    "ValueError: completions: [1] have no token, expected at least one in each",
    lambda shop: assemble([[5], [6]], [[7], []], [True, True], pad_token_id=0),
)
row(
    "fewer log-probabilities than tokens, to be assembled",
    "ValueError: logprobs: got 1 for the 2 tokens of response 0, expected one for each",
    lambda shop: assemble([[5]], [[7, 8]], [True], pad_token_id=0, logprobs=[[-1.0]]),
)
