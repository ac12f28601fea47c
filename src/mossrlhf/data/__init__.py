"""Dialogue data: readers for the formats in use, chat templates, collation."""

from mossrlhf.data import formats
from mossrlhf.data.batches import TokenBatches, TokenBatchSampler
from mossrlhf.data.collate import PairCollator, SFTCollator, pad, pad_id
from mossrlhf.data.feed import PromptBatch, Shuffled, prompt_batch
from mossrlhf.data.fit import overlong_prompts, require_fitting_prompts, without_overlong
from mossrlhf.data.formats import DataError
from mossrlhf.data.readers import load_pairs, load_prompts, load_sft
from mossrlhf.data.records import require_record, require_records
from mossrlhf.data.streams import LazyRecords, stream_pairs, stream_prompts, stream_sft
from mossrlhf.data.templates import (
    dialogue_template,
    encode_prompt,
    encode_response,
    encode_text,
    prompt_encodings,
    set_dialogue_template,
)

__all__ = [
    "DataError",
    "LazyRecords",
    "PairCollator",
    "PromptBatch",
    "SFTCollator",
    "Shuffled",
    "TokenBatchSampler",
    "TokenBatches",
    "dialogue_template",
    "encode_prompt",
    "encode_response",
    "encode_text",
    "formats",
    "load_pairs",
    "load_prompts",
    "load_sft",
    "overlong_prompts",
    "pad",
    "pad_id",
    "prompt_batch",
    "prompt_encodings",
    "require_fitting_prompts",
    "require_record",
    "require_records",
    "set_dialogue_template",
    "stream_pairs",
    "stream_prompts",
    "stream_sft",
    "without_overlong",
]
